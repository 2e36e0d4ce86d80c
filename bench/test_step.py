"""Single steps under pytest-benchmark: ``pytest bench/test_step.py``.

``python -m bench`` compares more fairly: it checks results first, and interleaves the implementations.
"""

from __future__ import annotations

import pytest

from .cases import OPTIMIZERS, SYNTHETIC
from .measure import Entrant
from .subjects import ON_CPU

ENTRIES = [
    pytest.param(optimizer, subject, id=f"{optimizer.name}-{subject.name}".replace(" ", "_"))
    for optimizer in OPTIMIZERS.values()
    for subject in ON_CPU
    if subject.serves(optimizer)
]


@pytest.mark.parametrize("case", SYNTHETIC, ids=lambda case: case.name)
@pytest.mark.parametrize(("optimizer", "subject"), ENTRIES)
def test_step(benchmark, optimizer, subject, case):
    if subject.obstacle is not None:
        pytest.skip(f"{subject.name}: {subject.obstacle}")
    benchmark.group = f"{optimizer.name} {case.title}"
    benchmark.extra_info["implementation"] = subject.name
    entrant = Entrant(subject, optimizer, case)
    entrant.step_with_gradients(1)  # compiles, and allocates the states
    benchmark(entrant.step)
