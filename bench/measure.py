"""How it is measured: first whether a subject is right, then how long its steps take beside the baseline's."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .cases import Build, Case, Contest, Subject

CHECKED_STEPS = 3
ALLOWED_ULPS = 8.0
"""A step rounds the parameter two or three times, by half an ulp at most, and some more inside the update: torch's own
for-loop in float32 comes to 4.1 ulps in three steps of AdamW. A step without its decay is off by hundreds."""
TURN_SECONDS = 0.05
"""A turn takes as many steps as need about this long: well above the clock's and the scheduler's grain."""
WARM_UP_STEPS = 3


@dataclass(frozen=True)
class Spread:
    """Median and quartiles over the rounds."""

    median: float
    lower_quartile: float
    upper_quartile: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, lower, upper)


@dataclass(frozen=True)
class Result:
    """One contest on one case; `ratio`s are the baseline's time over ours, round by round. Times in milliseconds."""

    contest: str
    case: str
    error_ulps: dict[str, float]
    baseline_ms: Spread | None = None
    ours_ms: Spread | None = None
    ratio: Spread | None = None
    moved_gradients_ratio: Spread | None = None

    @property
    def wrong(self) -> list[str]:
        """Subjects that do not compute what the reference computes; nothing of such a result is timed."""
        # Written so that NaN is wrong.
        return [name for name, error in self.error_ulps.items() if not error <= ALLOWED_ULPS]


def measure(contest: Contest, case: Case, rounds: int, turn_seconds: float = TURN_SECONDS) -> Result:
    """Check both subjects of `contest` on `case`, and time them only if both are right."""
    subjects = (contest.baseline, contest.ours)
    result = Result(
        contest.name,
        case.title,
        {subject.name: error_in_ulps(subject.build, contest.reference, case) for subject in subjects},
    )
    if result.wrong:
        return result
    baseline, ours = interleaved(subjects, case, rounds, turn_seconds, move_gradients=False)
    moved_baseline, moved_ours = interleaved(subjects, case, rounds, turn_seconds, move_gradients=True)
    return Result(
        result.contest,
        result.case,
        result.error_ulps,
        Spread.of([1e3 * seconds for seconds in baseline]),
        Spread.of([1e3 * seconds for seconds in ours]),
        _ratio(baseline, ours),
        _ratio(moved_baseline, moved_ours),
    )


def error_in_ulps(build: Build, build_reference: Build, case: Case) -> float:
    """Largest error of any parameter after a few steps with new gradients, against the reference in float64.

    An ulp is taken at the distance which the parameter has come from zero, its start included: where the reference
    happens to end near zero, no float32 computation could keep ulps of that.
    """
    parameters = case.parameters()
    exact = [parameter.detach().double().requires_grad_() for parameter in parameters]
    travelled = [parameter.detach().abs() for parameter in exact]
    optimizer, reference = build(parameters), build_reference(exact)
    for step in range(CHECKED_STEPS):
        before = [parameter.detach().clone() for parameter in exact]
        for parameter, counterpart, gradient in zip(parameters, exact, case.gradients(step), strict=True):
            parameter.grad, counterpart.grad = gradient, gradient.double()
        optimizer.step()
        reference.step()
        for total, parameter, earlier in zip(travelled, exact, before, strict=True):
            total += (parameter.detach() - earlier).abs()
    # NumPy's max, unlike Python's, keeps NaN.
    return float(np.max([_largest_error(*tensors) for tensors in zip(parameters, exact, travelled, strict=True)]))


def interleaved(
    subjects: Sequence[Subject], case: Case, rounds: int, turn_seconds: float, move_gradients: bool
) -> list[list[float]]:
    """Time whole steps: in every round each subject has a turn of several steps, in alternating order.

    Args:
        subjects: each steps parameters of its own.
        case: the shapes.
        rounds: turns of each subject.
        turn_seconds: about how long a turn takes.
        move_gradients: give new gradients at other addresses before every step, as training does that calls
            `zero_grad(set_to_none=True)`. They are allocated outside the time measured, as `backward` would.

    Returns:
        For each subject the mean seconds per step of each round.
    """
    turns = [_turn(subject, case, move_gradients) for subject in subjects]
    for turn in turns:
        turn(WARM_UP_STEPS)
    steps = max(1, math.ceil(turn_seconds / max(turn(1) for turn in turns)))
    seconds: list[list[float]] = [[] for _ in subjects]
    for index in range(rounds):
        order = range(len(turns)) if index % 2 == 0 else reversed(range(len(turns)))
        for subject in order:
            seconds[subject].append(turns[subject](steps))
    return seconds


def _turn(subject: Subject, case: Case, move_gradients: bool) -> Callable[[int], float]:
    """Return a function that takes some steps and returns the mean seconds of one."""
    parameters = case.parameters()
    optimizer = subject.build(parameters)
    for parameter, gradient in zip(parameters, case.gradients(0), strict=True):
        parameter.grad = gradient

    def take(steps: int) -> float:
        total = 0.0
        for _ in range(steps):
            if move_gradients:
                _move_gradients(parameters)
            started = time.perf_counter()
            optimizer.step()
            total += time.perf_counter() - started
        return total / steps

    return take


def _move_gradients(parameters: Sequence[Tensor]) -> None:
    # All copies are made before the first old one is freed, so that none lands at its own old address.
    copies = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    for parameter, copy in zip(parameters, copies, strict=True):
        parameter.grad = copy


def _largest_error(parameter: Tensor, exact: Tensor, travelled: Tensor) -> float:
    ulp = torch.from_numpy(np.spacing(travelled.float().numpy())).double()
    return float(((parameter.detach().double() - exact.detach()).abs() / ulp).max())


def _ratio(baseline: Sequence[float], ours: Sequence[float]) -> Spread:
    return Spread.of([theirs / mine for theirs, mine in zip(baseline, ours, strict=True)])
