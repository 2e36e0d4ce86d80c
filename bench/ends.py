"""The whole end of a training step: unscaling, clipping, the update, an average of the weights and zeroed gradients."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fusedopt

from . import cases
from .cases import Case
from .measure import TURN_SECONDS, Spread, interleaved, ratio

MOST, DECAY, SCALE = 1.0, 0.999, 1024.0
CHECKED_STEPS = 3
#: In ulps of the parameter, which each step rounds a few times.
ALLOWED_ULPS = 8.0


@dataclass(frozen=True)
class End:
    """What stands at the end of a training step.

    Args:
        name: as reports call it.
        scales: whether a gradient scaler has scaled the loss.
        averages: whether an average of the weights is kept.
    """

    name: str
    scales: bool = False
    averages: bool = False


CLIPPED = End("clip, step, zero")
EVERYTHING = End("unscale, clip, step, average, zero", scales=True, averages=True)


@dataclass
class EndTimes:
    """One end on one case: milliseconds of torch's functions one after the other, of ours, and their ratio by round."""

    end: str
    case: str
    title: str
    wrong: str | None = None
    torch_milliseconds: Spread | None = None
    milliseconds: Spread | None = None
    ratio: Spread | None = None


class _Contender:
    """Parameters, gradients and whatever the end of a step needs."""

    def __init__(self, end: End, case: Case) -> None:
        self.end = end
        self.parameters = [torch.nn.Parameter(p) for p in case.filled(cases.values(0))]
        self._gradients = case.filled(cases.values(1) * (SCALE if end.scales else 1.0))
        for parameter in self.parameters:
            parameter.grad = torch.empty_like(parameter)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, enabled=end.scales)
        if end.scales:
            self.scaler.scale(torch.ones(()))

    def fill_gradients(self) -> None:
        """Write gradients, as a backward pass does."""
        for parameter, gradient in zip(self.parameters, self._gradients, strict=True):
            assert parameter.grad is not None
            parameter.grad.copy_(gradient)

    def finish(self) -> None:
        raise NotImplementedError

    def take(self, seconds: float) -> float:
        """Finish steps for some seconds, one at least; return the mean seconds of one, without the writing of gradients."""
        total, steps, begun = 0.0, 0, time.perf_counter()
        while steps == 0 or time.perf_counter() - begun < seconds:
            self.fill_gradients()
            started = time.perf_counter()
            self.finish()
            total += time.perf_counter() - started
            steps += 1
        return total / steps


class _Torch(_Contender):
    def __init__(self, end: End, case: Case) -> None:
        super().__init__(end, case)
        self._optimizer = torch.optim.AdamW(self.parameters, fused=True)
        self._model = torch.nn.ParameterList(self.parameters)
        self._averaged = AveragedModel(self._model, multi_avg_fn=get_ema_multi_avg_fn(DECAY)) if end.averages else None

    def finish(self) -> None:
        if self.end.scales:
            self.scaler.unscale_(self._optimizer)
        self._clip()
        self.scaler.step(self._optimizer)
        self.scaler.update()
        if self._averaged is not None:
            self._averaged.update_parameters(self._model)
        self._optimizer.zero_grad(set_to_none=False)

    def _clip(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters, MOST, foreach=True)


class _Exact(_Torch):
    """By torch's functions but for the norm, whose sum over 20 M numbers in float32 is off by 1e-4."""

    def _clip(self) -> None:
        norms = [p.grad.double().norm() for p in self.parameters if p.grad is not None]
        torch.nn.utils.clip_grads_with_norm_(self.parameters, MOST, torch.stack(norms).norm())


class _Ours(_Contender):
    def __init__(self, end: End, case: Case) -> None:
        super().__init__(end, case)
        average = {"ema_decay": DECAY} if end.averages else {}
        self._optimizer = fusedopt.AdamW(self.parameters, fused=True, max_grad_norm=MOST, **average)  # type: ignore[typeddict-item]

    def finish(self) -> None:
        self.scaler.step(self._optimizer, zero_grad=True)
        self.scaler.update()


def measure_end(end: End, case: Case, seconds: float) -> EndTimes:
    """Check that both make the same of a few steps, and time them."""
    found = EndTimes(end.name, case.name, case.title)
    exact, ours = _Exact(end, case), _Ours(end, case)
    for _ in range(CHECKED_STEPS):
        for contender in (exact, ours):
            contender.fill_gradients()
            contender.finish()
    apart = max(_ulps_apart(p.detach(), q.detach()) for p, q in zip(exact.parameters, ours.parameters, strict=True))
    del exact
    if not apart <= ALLOWED_ULPS:
        found.wrong = f"{apart:.3g} ulps apart after {CHECKED_STEPS} steps; {ALLOWED_ULPS:g} are allowed"
        return found
    times = interleaved({"torch": _Torch(end, case).take, "fusedopt": ours.take}, {"torch", "fusedopt"}, seconds, TURN_SECONDS)
    return _record(found, times["torch"], times["fusedopt"])


def measure_norm(case: Case, seconds: float) -> EndTimes:
    """Time the norm of all gradients alone."""
    found = EndTimes("norm alone", case.name, case.title)
    gradients = case.filled(cases.values(1))
    parameters = [torch.nn.Parameter(torch.empty_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient

    def turn(norm: Callable[[], object]) -> Callable[[float], float]:
        def take(seconds: float) -> float:
            steps, begun = 0, time.perf_counter()
            while steps == 0 or time.perf_counter() - begun < seconds:
                norm()
                steps += 1
            return (time.perf_counter() - begun) / steps

        return take

    turns = {
        "torch": turn(lambda: torch.nn.utils.get_total_norm(gradients, foreach=True)),
        "fusedopt": turn(lambda: fusedopt.clip_grad_norm_(parameters, torch.inf)),
    }
    times = interleaved(turns, turns, seconds, TURN_SECONDS)
    return _record(found, times["torch"], times["fusedopt"])


def _record(found: EndTimes, theirs: list[float], ours: list[float]) -> EndTimes:
    found.torch_milliseconds, found.milliseconds = (Spread.of([1e3 * t for t in each]) for each in (theirs, ours))
    found.ratio = ratio(theirs, ours)
    return found


def _ulps_apart(a: torch.Tensor, b: torch.Tensor) -> float:
    # What is nearly zero has come from somewhere: no closer than by an ulp of a learning rate.
    ulp = torch.maximum(a.abs(), torch.tensor(1e-3)) * torch.finfo(a.dtype).eps
    return float(((a - b).abs() / ulp).max())
