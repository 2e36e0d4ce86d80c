"""Single steps under pytest-benchmark: ``pytest bench/test_step.py``.

``python -m bench`` compares more fairly: it checks results first, and interleaves the implementations.
"""

from __future__ import annotations

import pytest

from .cases import CASES, contests


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("contest", contests(), ids=lambda contest: contest.name)
@pytest.mark.parametrize("role", ["baseline", "ours"])
def test_step(benchmark, contest, case, role):
    subject = getattr(contest, role)
    benchmark.group = f"{contest.name} {case.title}"
    benchmark.extra_info["implementation"] = subject.name
    parameters = case.parameters()
    for parameter, gradient in zip(parameters, case.gradients(0), strict=True):
        parameter.grad = gradient
    optimizer = subject.build(parameters)
    optimizer.step()  # compiles, and allocates the states
    benchmark(optimizer.step)
