"""One step of ours beside the same step of the reference in float64, within the tolerance of tolerances.py."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

import tolerances
from cases import SCALARS, Case

# Hyperparameters of which one minus them is taken, whose rounding matters more where they are small.
WEIGHTS = ("betas", "beta", "momentum", "dampening", "alpha", "rho")
# Classes whose update of an element depends on others of its tensor.
OF_WHOLE_TENSORS = ("Adafactor",)
# States that hold quotients of moments.
QUOTIENTS = {"RMSprop": ("momentum_buffer",), "Adadelta": ("acc_delta",)}


@dataclass
class Inputs:
    """What a step starts from, in float64: the numbers of a parameter, and its group's hyperparameters."""

    parameter: torch.Tensor
    gradient: torch.Tensor
    state: dict[str, torch.Tensor]
    hyperparameters: dict[str, Any]

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, group: dict, p: torch.Tensor) -> "Inputs":
        """Read what `optimizer` knows of `p`; step counts keep their type."""
        state = {key: as_it_is(value) if key == "step" else exact(value) for key, value in optimizer.state.get(p, {}).items()}
        hyperparameters = {key: value for key, value in group.items() if key != "params"}
        if type(group.get("eps")) is tuple and group["eps"][0] is None:  # Adafactor's, for the reference's is that of float64
            hyperparameters["eps"] = (torch.finfo(p.dtype).eps, group["eps"][1])
        return cls(exact(p), exact(p.grad), state, hyperparameters)

    @classmethod
    def joined(cls, parts: list["Inputs"]) -> "Inputs":
        """One long parameter for many: an element's step depends on no other element, and one step takes less time."""
        first = parts[0]
        if len(parts) == 1:
            return first
        state = {
            key: value if key in SCALARS else torch.cat([part.state[key].flatten() for part in parts])
            for key, value in first.state.items()
        }
        parameter = torch.cat([part.parameter.flatten() for part in parts])
        gradient = torch.cat([part.gradient.flatten() for part in parts])
        return cls(parameter, gradient, state, first.hyperparameters)


def as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    """A copy."""
    return tensor.detach().clone()


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
    default = torch.get_default_dtype()
    if case.truth is torch.optim.NAdam:
        # It rounds its product of momenta to the default type before it uses it; ours when it keeps it.
        torch.set_default_dtype(torch.float64)
    try:
        truth.step()
    finally:
        torch.set_default_dtype(default)
    return outputs(truth, p)


def disturbed(inputs: Inputs, dtype: torch.dtype, sign: int) -> Iterator[Inputs]:
    """Yield `inputs` with one tensor or number after the other made slightly larger (smaller if `sign` is -1)."""

    def size(role: str) -> float:
        return sign * tolerances.relative_tolerance(role, dtype)

    yield replace(inputs, parameter=inputs.parameter * (1 + size("parameter")))
    yield replace(inputs, gradient=inputs.gradient * (1 + size("gradient")))
    for key, value in inputs.state.items():
        if key not in SCALARS:
            yield replace(inputs, state={**inputs.state, key: value * (1 + size("state"))})
    for key, value in inputs.hyperparameters.items():
        relative = size(key if key in tolerances.ROUNDINGS else "hyperparameter")
        if key == "lr" and "step_sizes" in inputs.hyperparameters and not inputs.state:
            relative += sign * tolerances.unit_roundoff(dtype)  # it is what a state starts from, as stored
        if key == "lr":
            # The step size holds the bias corrections 1 - beta**step, whose error is that of beta**step and much smaller
            # terms: relatively it is the larger the closer beta is to one.
            relative += sum(size("hyperparameter") / (1 - float(beta)) for beta in inputs.hyperparameters.get("betas", ()))
        factor, addend = (1, relative) if key in WEIGHTS else (1 + relative, 0)
        for changed in numbers_moved(value, factor, addend):
            yield replace(inputs, hyperparameters={**inputs.hyperparameters, key: changed})


def numbers_moved(value: Any, factor: float, addend: float) -> list:
    """`value` with one of the numbers in it times `factor` plus `addend`, for each of them but flags and zeros."""
    if isinstance(value, tuple):
        moved = [(i, new) for i, each in enumerate(value) for new in numbers_moved(each, factor, addend)]
        return [(*value[:i], new, *value[i + 1 :]) for i, new in moved]
    is_number = isinstance(value, int | float | torch.Tensor) and not isinstance(value, bool)
    return [value * factor + addend] if is_number and value != 0 else []


def true_step_and_errors(case: Case, inputs: Inputs, dtype: torch.dtype):
    """The true results for parameters of `dtype`, and how far from each the arithmetic of a correct step may lead."""
    truth = true_step(case, inputs)
    names = truth.keys() - set(SCALARS)
    errors = {name: truth[name].abs() * tolerances.relative_tolerance("result", dtype) for name in names}
    for name in names.intersection(QUOTIENTS.get(case.ours.__name__, ())):
        size = truth[name].abs() + inputs.state.get(name, torch.zeros(())).abs()
        errors[name] += size * tolerances.relative_tolerance("quotient", dtype)
    for larger, smaller in zip(disturbed(inputs, dtype, 1), disturbed(inputs, dtype, -1), strict=True):
        above, below = true_step(case, larger), true_step(case, smaller)
        for name in names:
            errors[name] += torch.maximum((above[name] - truth[name]).abs(), (below[name] - truth[name]).abs())
    return truth, errors


def assert_close(what: str, ours: torch.Tensor, truth: torch.Tensor, error: torch.Tensor, dtype: torch.dtype) -> None:
    """Fail, naming the worst element, if one of `ours` is further from the truth than its arithmetic and storage may lead."""
    allowed = error + tolerances.storage_tolerance(truth.abs() + error, ours.dtype, tolerances.computed_in(dtype))
    found = exact(ours)
    # The second alternative is for infinities and NaN, also those that the true result becomes when it is stored.
    rounded = truth.to(ours.dtype)
    wrong = ~(((found - truth).abs() <= allowed) | (ours == rounded) | (ours.isnan() & rounded.isnan()))
    if wrong.any():
        excess = torch.where(wrong, ((found - truth).abs() / allowed).nan_to_num(nan=torch.inf), 0.0)
        worst = int(excess.flatten().argmax())
        value, right = float(found.flatten()[worst]), float(truth.flatten()[worst])
        ulps = tolerances.in_ulps(abs(value - right), right, ours.dtype)
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} elements are wrong; the worst, at {worst}, is {value!r} "
            f"where {right!r} is right: {ulps:.3g} ulps of {ours.dtype}, {float(excess.max()):.3g} times the allowed"
        )


def checked_step(case: Case, optimizer: torch.optim.Optimizer) -> None:
    """Step `optimizer`, and see that it makes of every parameter and state what the reference makes of the same."""
    # Those that step alike are checked together.
    alike: dict[tuple, list[tuple[torch.Tensor, Inputs]]] = {}
    for number, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            if p.grad is not None:
                inputs = Inputs.of(optimizer, group, p)
                scalars = [float(inputs.state.get(name, 0)) for name in SCALARS]
                alone = id(p) if case.ours.__name__ in OF_WHOLE_TENSORS else None
                if alone and p.numel() == 0:  # torch's Adafactor divides by its size
                    continue
                key = (number, p.dtype, alone, *scalars, *sorted(inputs.state))
                alike.setdefault(key, []).append((p, inputs))
    optimizer.step()
    with one_thread():
        for key, members in alike.items():
            check_members(case, optimizer, key[1], members)


def check_members(case: Case, optimizer: torch.optim.Optimizer, dtype: torch.dtype, members: list) -> None:
    """Compare what `optimizer` has made of (parameter, inputs) with what the reference makes of the inputs."""
    truth, errors = true_step_and_errors(case, Inputs.joined([inputs for _, inputs in members]), dtype)
    sizes = [p.numel() for p, _ in members]
    for name, right in truth.items():
        if name in SCALARS:
            found = [optimizer.state[p][name] for p, _ in members]
            errors_in_ulps = [tolerances.in_ulps(abs(float(number) - float(right)), float(right), number.dtype) for number in found]
            assert max(errors_in_ulps) <= 0.5, f"wrong {name}"
            continue
        parts = [(right, errors[name])] if len(members) == 1 else zip(right.split(sizes), errors[name].split(sizes), strict=True)
        for (p, _), (true_part, error) in zip(members, parts, strict=True):
            ours = outputs(optimizer, p)
            shape = p.shape if len(members) > 1 else right.shape
            assert ours.keys() == truth.keys(), f"states {sorted(ours)} where {sorted(truth)} are right"
            assert ours[name].shape == shape
            what = f"{case}, {name} of a parameter of shape {tuple(p.shape)} and {dtype}"
            assert_close(what, ours[name].cpu(), true_part.view(shape), error.view(shape), dtype)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Have torch work on one thread: beside a busy core, each of its parallel regions waits for milliseconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
