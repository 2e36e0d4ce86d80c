"""How it is measured: first whether a subject is right, then how long its steps take beside the others'."""

from __future__ import annotations

import gc
import math
import re
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import cases, roofline
from .cases import Case, Optimizer
from .subjects import Subject, baseline

CHECKED_STEPS = 3
TURN_SECONDS = 0.05
"""A turn takes steps for this long, or one: well above the clock's and the scheduler's grain."""
LEAST_ROUNDS, MOST_ROUNDS = 5, 31
LIMIT = "memory limit"

#: Takes steps for some seconds, one at least, and returns the mean seconds of one.
Turn = Callable[[float], float]


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


@dataclass
class Timing:
    """One subject in one contest; whatever is None has not been measured.

    Args:
        subject: its name.
        wrong: why it was not timed.
        error_ulps: the largest error of any parameter, before anything is timed.
        error: the relative L2 error of the way that all parameters have come, before anything is timed.
        milliseconds: of a step.
        moved_milliseconds: of a step that finds its gradients at new addresses.
        ratio: time of the baseline over that of this one, round by round.
        moved_ratio: the same where gradients have moved.
        gigabytes_per_second: bytes that the step has to move, over its time.
        share_of_limit: this rate over that of the memory limit, round by round.
        ratio_to_ours: its time over that of ours, round by round.
        kept_bytes: of states, for an element.
        moved_bytes: that a step has to read and write, for an element.
    """

    subject: str
    wrong: str | None = None
    error_ulps: float | None = None
    error: float | None = None
    milliseconds: Spread | None = None
    moved_milliseconds: Spread | None = None
    ratio: Spread | None = None
    moved_ratio: Spread | None = None
    gigabytes_per_second: float | None = None
    share_of_limit: Spread | None = None
    ratio_to_ours: Spread | None = None
    kept_bytes: float | None = None
    moved_bytes: float | None = None


@dataclass
class Result:
    """One contest: an optimizer on a case.

    Args:
        baseline: the subject that ratios refer to.
        ours: the subject that ratios to ours refer to.
        left_out: why nothing was measured.
    """

    optimizer: str
    case: str
    title: str
    device: str
    tensors: int
    elements: int
    bytes_per_element: int = 0
    rounds: int = 0
    baseline: str | None = None
    ours: str | None = None
    left_out: str | None = None
    limit_gigabytes_per_second: Spread | None = None
    timings: list[Timing] = field(default_factory=list)


class Entrant:
    """A subject with parameters and gradients of its own."""

    def __init__(self, subject: Subject, optimizer: Optimizer, case: Case) -> None:
        self.subject, self._case = subject, case
        self.parameters = [p.requires_grad_() for p in case.filled(cases.values(0, subject.dtype), subject.device)]
        self._built = subject.build(optimizer, self.parameters)
        self._move = False

    def step_with_gradients(self, seed: int) -> None:
        """Take a step with new gradients."""
        gradients = self._case.filled(cases.values(seed, self.subject.dtype), self.subject.device)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self._built.step()

    def itemsizes(self) -> list[int]:
        """Bytes of an element of the parameters, of gradients and of each state."""
        parameter = self.parameters[0]
        states = [part for part in self._built.state[parameter].values() if getattr(part, "shape", None) == parameter.shape]
        return [parameter.itemsize, parameter.itemsize, *(state.itemsize for state in states)]

    def kept_bytes(self) -> float:
        """Bytes of all states, for an element; numbers such as a step count are left out."""
        states = [part for state in self._built.state.values() for part in state.values() if isinstance(part, Tensor)]
        return sum(_nbytes(part) for part in states if part.dim()) / self._case.elements

    def moved_bytes(self) -> float:
        """Bytes that a step has to read and write, for an element: everything is read, and all but the gradient is written."""
        itemsize = self.subject.dtype.itemsize
        return 3 * itemsize + 2 * self.kept_bytes()

    def take(self, seconds: float) -> float:
        """Take steps for some seconds, one at least; return the mean seconds of one."""
        return self._take_on_gpu(seconds) if self.subject.device == "cuda" else self.take_after(seconds, None)

    def take_moved(self, seconds: float) -> float:
        """The same, with new gradients at other addresses before every step, as after `zero_grad(set_to_none=True)`.

        They are allocated outside of the time measured, as `backward` would.
        """
        return self.take_after(seconds, self.move_gradients)

    def take_after(self, seconds: float, prepare: Callable[[], None] | None, host_alone: bool = False) -> float:
        """The same, with `prepare` called before every step, outside of the time measured.

        Where the host's time alone is asked for, a step counts until it returns, whether or not the GPU has done its part.
        """
        total, steps, begun = 0.0, 0, time.perf_counter()
        while steps == 0 or time.perf_counter() - begun < seconds:
            if prepare is not None:
                prepare()
                self._wait()
            started = time.perf_counter()
            self._built.step()
            if not host_alone:
                self._wait()
            total += time.perf_counter() - started
            self._wait()
            steps += 1
        return total / steps

    def move_gradients(self) -> None:
        """Put a copy in the place of each gradient."""
        # All copies are made before the first old one is freed, so that none lands at its own old address.
        copies = [parameter.grad.clone() for parameter in self.parameters if parameter.grad is not None]
        for parameter, copy in zip(self.parameters, copies, strict=True):
            parameter.grad = copy

    def step(self) -> None:
        """Take one step."""
        self._built.step()

    def kinds(self) -> list[Any]:
        """What each launch of a step of ours is compiled for."""
        return [part.bucket.kind for part in self._built._prepared.plan.parts]

    def _take_on_gpu(self, seconds: float) -> float:
        # Steps follow each other as in training, without the host waiting for each.
        self._wait()
        steps = max(1, round(seconds / self.take_after(0.0, None)))
        started = time.perf_counter()
        for _ in range(steps):
            self._built.step()
        self._wait()
        return (time.perf_counter() - started) / steps

    def _wait(self) -> None:
        if self.subject.device == "cuda":
            torch.cuda.synchronize()


def measure(
    optimizer: Optimizer,
    case: Case,
    subjects: Sequence[Subject],
    seconds: float,
    turn_seconds: float = TURN_SECONDS,
    baseline_names: Collection[str] | None = None,
    ours_name: str | None = None,
) -> Result:
    """Check each of `subjects` on `case`, and time those that are right.

    Args:
        optimizer: what they all are.
        case: the shapes.
        subjects: of one device.
        seconds: about how long to measure, twice: with the same gradients, and with moved ones.
        turn_seconds: about how long a turn takes.
        baseline_names: the subjects of which the fastest is the baseline.
        ours_name: the one of ours that others' ratios to ours refer to; default: the first.
    """
    device = subjects[0].device
    names = baseline(optimizer, device) if baseline_names is None else baseline_names
    result = Result(optimizer.name, case.name, case.title, device, case.tensors, case.elements)
    entrants: dict[str, Entrant] = {}
    timings = {subject.name: Timing(subject.name) for subject in subjects}
    result.timings = list(timings.values())
    for subject in subjects:
        timing = timings[subject.name]
        try:
            entrant, errors = checked(subject, optimizer, case)
        except Exception as error:  # Other packages fail in any way, as where a compiler is missing; the report says how.
            timing.wrong = f"fails: {_brief(error)}"
            continue
        timing.error_ulps, timing.error = errors.ulps, errors.relative
        timing.wrong = errors.beyond(subject)
        if timing.wrong is None:
            entrants[subject.name] = entrant
    if not entrants:
        return result
    ours = [name for name in entrants if name.startswith("fusedopt")]
    itemsizes = entrants[ours[0] if ours else next(iter(entrants))].itemsizes()
    result.bytes_per_element = roofline.bytes_moved(itemsizes)
    limit = (roofline.CudaLimit if device == "cuda" else roofline.CpuLimit)(case.elements, itemsizes, torch.get_num_threads())
    regular = {LIMIT, *ours, *names, *(subject.name for subject in subjects if subject.every_round)}

    times = interleaved({LIMIT: limit.take, **{n: e.take for n, e in entrants.items()}}, regular, seconds, turn_seconds)
    result.rounds = len(times[LIMIT])
    result.limit_gigabytes_per_second = Spread.of([result.bytes_per_element * case.elements / t / 1e9 for t in times[LIMIT]])
    found = [name for name in names if name in times]
    if device == "cuda" and not found:  # torch's fused implementations are not all there for GPUs
        found = [name for name in times if name.startswith("torch ")]
    result.baseline = min(found, key=lambda name: statistics.median(times[name]), default=None)
    result.ours = ours_name if ours_name in entrants else next(iter(ours), None)
    for name, entrant in entrants.items():
        timing, own = timings[name], times[name]
        timing.kept_bytes, timing.moved_bytes = entrant.kept_bytes(), entrant.moved_bytes()
        timing.milliseconds = Spread.of([1e3 * t for t in own])
        timing.gigabytes_per_second = timing.moved_bytes * case.elements / statistics.median(own) / 1e9
        timing.share_of_limit = ratio(times[LIMIT], own, timing.moved_bytes / result.bytes_per_element)
        timing.ratio = ratio(times[result.baseline], own) if result.baseline else None
        timing.ratio_to_ours = ratio(own, times[result.ours]) if result.ours else None

    pair = {name: entrants[name].take_moved for name in (*ours, result.baseline) if name}
    moved_times = interleaved(pair, pair, seconds, turn_seconds)
    for name, own in moved_times.items():
        timings[name].moved_milliseconds = Spread.of([1e3 * t for t in own])
        timings[name].moved_ratio = ratio(moved_times[result.baseline], own) if result.baseline else None
    del entrants, limit
    gc.collect()
    return result


@dataclass(frozen=True)
class Errors:
    """How far parameters are from those of torch's for-loop in float64 after a few steps, all elements compared.

    Args:
        ulps: of the element that is farthest off.
        relative: the L2 norm of what is between them, over that of the way from the start.
    """

    ulps: float
    relative: float

    def beyond(self, subject: Subject) -> str | None:
        """Say how this is more than `subject` is allowed, or None."""
        after = f"from torch's for-loop in float64 after {CHECKED_STEPS} steps"
        # Written so that NaN is wrong.
        if subject.allowed_error is None:
            within = self.ulps <= subject.allowed_ulps
            said = f"off by {self.ulps:.3g} ulps {after}; {subject.allowed_ulps:g} are allowed"
        else:
            within = self.relative <= subject.allowed_error
            said = f"off by {self.relative:.2%} of the way {after}; {subject.allowed_error:.0%} are allowed"
        return None if within else said


def checked(subject: Subject, optimizer: Optimizer, case: Case) -> tuple[Entrant, Errors]:
    """Take a few steps with new gradients; return the entrant and its errors.

    Values repeat with a period, so torch's for-loop in float64 need step one period alone, and all elements are compared. An
    ulp is taken at the distance which an element has come from zero, its start included: where the reference happens to end
    near zero, nothing that rounds could keep ulps of that.
    """
    entrant = Entrant(subject, optimizer, case)
    start = cases.values(0, subject.dtype).double()
    exact = start.clone().requires_grad_()
    travelled = exact.detach().abs()
    reference = optimizer.reference([exact])
    for step in range(CHECKED_STEPS):
        entrant.step_with_gradients(1 + step)
        before = exact.detach().clone()
        exact.grad = cases.values(1 + step, subject.dtype).double()
        reference.step()
        travelled += (exact.detach() - before).abs()
    ulp = torch.from_numpy(np.spacing(travelled.float().numpy())).double()
    ulp *= torch.finfo(subject.dtype).eps / torch.finfo(torch.float32).eps
    return entrant, _errors(entrant.parameters, exact.detach(), exact.detach() - start, ulp)


def _errors(parameters: Sequence[Tensor], exact: Tensor, way: Tensor, ulp: Tensor) -> Errors:
    periods = [torch.cat([period, period]).to(parameters[0].device) for period in (exact, way, ulp)]
    first, worst, missed, come = 0, [], 0.0, 0.0
    for parameter in parameters:
        flat = parameter.detach().view(-1)
        for pieces in zip(*(cases.by_period(flat, period, first) for period in periods), strict=True):
            part, (numbers, way_of_each, ulp_of_each) = pieces[0][0], (piece[1] for piece in pieces)
            if part.numel():
                distances = (part.double() - numbers).abs_()
                missed += float(distances.norm()) ** 2
                come += float(way_of_each.expand_as(part).norm()) ** 2
                worst.append(distances.div_(ulp_of_each).max())
        first = (first + flat.numel()) % cases.PERIOD
    # torch's max, unlike Python's, keeps NaN.
    return Errors(float(torch.stack(worst).max()), (missed / come) ** 0.5 if come else math.nan)


def _nbytes(tensor: Tensor) -> int:
    # A tensor made of others says how large it would be in the dtype that it stands for.
    if is_traceable_wrapper_subclass(tensor):
        return sum(_nbytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.nbytes


def interleaved(
    turns: Mapping[str, Turn], regular: Collection[str], seconds: float, turn_seconds: float = TURN_SECONDS
) -> dict[str, list[float]]:
    """Time in rounds: in each round everyone has a turn of several steps, in alternating order.

    Args:
        turns: by name.
        regular: who takes part in all rounds; the others, far slower as a rule, in the first few.
        seconds: about how long those in `regular` are measured.
        turn_seconds: about how long a turn takes, if a step is shorter.

    Returns:
        The mean seconds per step of each turn.
    """
    for turn in turns.values():  # caches fill, memory is mapped
        turn(0.0)
    times: dict[str, list[float]] = {name: [] for name in turns}
    elapsed, rounds = 0.0, 0
    while rounds < LEAST_ROUNDS or (rounds < MOST_ROUNDS and elapsed < seconds):
        order = [name for name in turns if name in regular or rounds < LEAST_ROUNDS]
        for name in order if rounds % 2 == 0 else reversed(order):
            started = time.perf_counter()
            times[name].append(turns[name](turn_seconds))
            elapsed += time.perf_counter() - started if name in regular else 0.0
        rounds += 1
    return times


def ratio(above: Sequence[float], below: Sequence[float], factor: float = 1.0) -> Spread:
    """Spread of the ratios in the rounds that both took part in."""
    return Spread.of([factor * a / b for a, b in zip(above, below, strict=False)])


def _brief(error: Exception) -> str:
    # Paths would name the machine.
    text = re.sub(r"\S*/\S+", "...", str(error).strip().partition("\n")[0])
    return f"{type(error).__name__}: {text[:120]}" if text else type(error).__name__
