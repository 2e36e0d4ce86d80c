"""Steps in other surroundings: on fewer threads, and beside a program that keeps a core busy."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from . import roofline
from .cases import Case, Optimizer
from .costs import threads_set
from .measure import LIMIT, Entrant, Spread, interleaved, ratio
from .subjects import FUSED, OURS, Subject

#: A program is running, and the scheduler has placed it, after this long.
_START_SECONDS = 0.5


@dataclass
class Surrounded:
    """A contest of torch's fused implementation and ours in some surroundings; times in milliseconds."""

    case: str
    title: str
    threads: int
    busy: bool
    fused: Spread
    ours: Spread
    ratio: Spread
    limit: Spread


def scaling(optimizer: Optimizer, cases: Sequence[Case], seconds: float, ours: Subject = OURS) -> list[Surrounded]:
    """Measure on one thread, two, four and so on, up to torch's own number."""
    most = torch.get_num_threads()
    counts = sorted({min(2**power, most) for power in range(most.bit_length() + 1)})
    return [_measure(optimizer, case, threads, False, seconds, ours) for case in cases for threads in counts]


def beside_a_busy_core(optimizer: Optimizer, cases: Sequence[Case], seconds: float) -> list[Surrounded]:
    """Measure with and without another program that keeps one core busy."""
    found = []
    for case in cases:
        found.append(_measure(optimizer, case, torch.get_num_threads(), False, seconds, OURS))
        with busy_core():
            found.append(_measure(optimizer, case, torch.get_num_threads(), True, seconds, OURS))
    return found


@contextmanager
def busy_core() -> Iterator[None]:
    """Keep one core busy by another process."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(_START_SECONDS)
        yield
    finally:
        process.kill()
        process.wait()


def _measure(optimizer: Optimizer, case: Case, threads: int, busy: bool, seconds: float, our_subject: Subject) -> Surrounded:
    with threads_set(threads):
        entrants = {subject.name: Entrant(subject, optimizer, case) for subject in (FUSED, our_subject)}
        for entrant in entrants.values():
            entrant.step_with_gradients(1)
        limit = roofline.CpuLimit(case.elements, entrants[FUSED.name].itemsizes(), threads)
        turns = {LIMIT: limit.take, **{name: entrant.take for name, entrant in entrants.items()}}
        times = interleaved(turns, turns, seconds)
    fused, ours, alone = (Spread.of([1e3 * t for t in times[name]]) for name in (FUSED.name, our_subject.name, LIMIT))
    ratios = ratio(times[FUSED.name], times[our_subject.name])
    return Surrounded(case.name, case.title, threads, busy, fused, ours, ratios, alone)
