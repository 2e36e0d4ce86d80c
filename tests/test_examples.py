"""Every program in examples/ runs to its end without a warning, and does what its text says."""

import re
from pathlib import Path

import pytest

import child

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
RUN = """
    import runpy, sys
    runpy.run_path(sys.argv[1], run_name="__main__")
"""


def learns_the_digits(printed):
    accuracies = [float(percent) for percent in re.findall(r"test accuracy ([\d.]+)%", printed)]
    assert len(accuracies) == 10
    assert accuracies[-1] > 90
    # One line of explain() for each parameter, weights and biases of three layers.
    assert len(re.findall(r"\b(?:numba|triton)\b", printed)) == 6


def learns_by_a_rule_of_its_own(printed):
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed)]
    assert len(losses) == 11
    assert losses[-1] < 0.2 < 2 < losses[0]
    assert len(re.findall(r"\b(?:numba|triton)\b", printed)) == 4
    assert len((EXAMPLES / "custom_rule.py").read_text(encoding="utf-8").splitlines()) < 40


def averages_and_clips(printed):
    epochs = re.findall(r"norm ([\d.]+)  accuracy ([\d.]+)%  averaged ([\d.]+)%", printed)
    assert len(epochs) == 12
    assert float(epochs[0][0]) > 0
    assert float(epochs[-1][2]) > 85


CHECKS = {
    "custom_rule.py": learns_by_a_rule_of_its_own,
    "train_digits.py": learns_the_digits,
    "whole_step.py": averages_and_clips,
}


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_example(name):
    assert name in CHECKS, f"examples/{name}: say in CHECKS what it has to print"
    CHECKS[name](child.output(RUN, str(EXAMPLES / name)))
