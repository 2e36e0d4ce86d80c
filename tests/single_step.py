"""One step of ours beside the same step of the reference in float64, within the tolerance of tolerances.py."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

import tolerances
from cases import Case

# Rounded to the type of the arithmetic; every other hyperparameter takes part in float64 alone.
ROUNDED = ("lr", "weight_decay")


@dataclass
class Inputs:
    """What the step of one parameter starts from, in float64: its numbers, and its group's hyperparameters."""

    parameter: torch.Tensor
    gradient: torch.Tensor
    state: dict[str, torch.Tensor]
    hyperparameters: dict[str, Any]

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, group: dict, p: torch.Tensor) -> "Inputs":
        """Read what `optimizer` knows of `p`; step counts keep their type."""
        state = {
            key: value.detach().clone() if key == "step" else exact(value) for key, value in optimizer.state.get(p, {}).items()
        }
        return cls(exact(p), exact(p.grad), state, {key: value for key, value in group.items() if key != "params"})


def exact(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous float64 copy on the CPU."""
    return tensor.detach().to("cpu", torch.float64, copy=True, memory_format=torch.contiguous_format)


def outputs(optimizer: torch.optim.Optimizer, p: torch.Tensor) -> dict[str, torch.Tensor]:
    """The parameter and its states, by name."""
    return {"parameter": p.detach(), **optimizer.state.get(p, {})}


def true_step(case: Case, inputs: Inputs) -> dict[str, torch.Tensor]:
    """The reference's parameter and states after one step from `inputs`."""
    p = torch.nn.Parameter(inputs.parameter.clone())
    p.grad = inputs.gradient.clone()
    truth = case.make_truth([p])
    group = truth.param_groups[0]
    group.update({key: inputs.hyperparameters[key] for key in group.keys() - {"params", "foreach", "fused"}})
    if inputs.state:
        truth.state[p] = {key: value.clone() for key, value in inputs.state.items()}
    truth.step()
    return outputs(truth, p)


def disturbed(inputs: Inputs, dtype: torch.dtype, sign: int) -> Iterator[Inputs]:
    """Yield `inputs` with one tensor or number after the other made slightly larger (smaller if `sign` is -1)."""
    factor = 1 + sign * tolerances.relative_tolerance(dtype)
    factor64 = 1 + sign * tolerances.relative_tolerance(torch.float64)
    yield replace(inputs, parameter=inputs.parameter * factor)
    yield replace(inputs, gradient=inputs.gradient * factor)
    for key, value in inputs.state.items():
        if key != "step":
            yield replace(inputs, state={**inputs.state, key: value * factor})
    for key, value in inputs.hyperparameters.items():
        for changed in scaled(value, factor if key in ROUNDED else factor64):
            yield replace(inputs, hyperparameters={**inputs.hyperparameters, key: changed})
        # 1 - beta is rounded, too, and matters more where beta is small.
        for changed in scaled_complement(value, factor64):
            yield replace(inputs, hyperparameters={**inputs.hyperparameters, key: changed})


def scaled(value: Any, factor: float) -> list:
    """The hyperparameter `value` times `factor`: once for each number that it holds, and never for flags and zeros."""
    return changes_of_one(value, lambda number: number * factor)


def scaled_complement(value: Any, factor: float) -> list:
    """`value` with one minus it times `factor`, for each number in it that is a weight between 0 and 1."""
    return changes_of_one(value, lambda number: 1 - (1 - number) * factor if 0 < number < 1 else number)


def changes_of_one(value: Any, change: Callable[[Any], Any]) -> list:
    """`value` with one of the numbers that it holds changed, for each that is not zero."""
    if isinstance(value, tuple):
        return [(*value[:i], new, *value[i + 1 :]) for i, each in enumerate(value) for new in changes_of_one(each, change)]
    is_number = isinstance(value, int | float | torch.Tensor) and not isinstance(value, bool)
    return [change(value)] if is_number and value != 0 else []


def allowed_errors(case: Case, inputs: Inputs, dtype: torch.dtype, stored: dict[str, torch.dtype]):
    """The true results, and how far from each ours may be."""
    truth = true_step(case, inputs)
    names = truth.keys() - {"step"}
    allowed = {name: truth[name].abs() * tolerances.relative_tolerance(dtype) for name in names}
    for larger, smaller in zip(disturbed(inputs, dtype, 1), disturbed(inputs, dtype, -1), strict=True):
        above, below = true_step(case, larger), true_step(case, smaller)
        for name in names:
            allowed[name] += torch.maximum((above[name] - truth[name]).abs(), (below[name] - truth[name]).abs())
    for name in names:
        reach = truth[name].abs() + allowed[name]
        allowed[name] += tolerances.storage_tolerance(reach, stored[name], tolerances.computed_in(dtype))
    return truth, allowed


def assert_close(what: str, ours: torch.Tensor, truth: torch.Tensor, allowed: torch.Tensor) -> None:
    """Fail, naming the worst element, if one of `ours` is further from the truth than `allowed`."""
    assert ours.shape == truth.shape, f"{what}: {ours.shape} where {truth.shape} is right"
    error = (exact(ours) - truth).abs()
    # The second alternative is for infinities and NaN, also those that the true result becomes when it is stored.
    rounded = truth.to(ours.dtype)
    same = (exact(ours) == rounded.double()) | (exact(ours).isnan() & rounded.isnan())
    wrong = ~((error <= allowed) | same)
    if wrong.any():
        excess = torch.where(wrong, (error / allowed).nan_to_num(nan=torch.inf), 0.0)
        worst = int(excess.flatten().argmax())
        value, right = float(exact(ours).flatten()[worst]), float(truth.flatten()[worst])
        ulps = tolerances.in_ulps(abs(value - right), right, ours.dtype)
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} elements are wrong; the worst, at {worst}, is {value!r} "
            f"where {right!r} is right: {ulps:.3g} ulps of {ours.dtype}, {float(excess.max()):.3g} times the allowed"
        )


def checked_step(case: Case, optimizer: torch.optim.Optimizer) -> None:
    """Step `optimizer`, and see that it makes of every parameter and state what the reference makes of the same."""
    before = [
        (p, Inputs.of(optimizer, group, p)) for group in optimizer.param_groups for p in group["params"] if p.grad is not None
    ]
    optimizer.step()
    for index, (p, inputs) in enumerate(before):
        ours = outputs(optimizer, p)
        stored = {name: value.dtype for name, value in ours.items()}
        truth, allowed = allowed_errors(case, inputs, p.dtype, stored)
        assert ours.keys() == truth.keys(), f"states {sorted(ours)} where {sorted(truth)} are right"
        for name, right in truth.items():
            what = f"{case}, parameter {index} of shape {tuple(p.shape)} and {p.dtype}, its {name}"
            if name == "step":
                assert float(ours[name]) == float(right), f"{what}: {float(ours[name])}, not {float(right)}"
            else:
                assert_close(what, ours[name], right, allowed[name])
