"""`python -m fusedopt check`: what it prints of sound rules, of unsound ones, and of files that it cannot read."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install triton (Linux), or fusedopt's extra [triton]")

from fusedopt import check
from fusedopt.__main__ import main
from fusedopt.kernels import gpu_kernels
from fusedopt.kernels.ptx import execute

pytestmark = [
    pytest.mark.triton,
    pytest.mark.compiled,
    pytest.mark.skipif(execute.obstacle() is not None, reason=str(execute.obstacle())),
]

SOUND = """
from fusedopt.custom import Rule, RuleOptimizer, sqrt

def scaled(p, g, sum, lr, eps):
    sum = sum + g * g
    return p - lr * (g / (sqrt(sum) + eps)), sum

def scaled_coefficients(step, lr, eps):
    return lr / step, eps

class Scaled(RuleOptimizer):
    rule = Rule(scaled, scaled_coefficients, states=("sum",))
    hyperparameters = {"lr": 1e-3, "eps": 1e-8}
"""
ALONE = """
from fusedopt.custom import Rule

def plain(p, g, lr):
    return (p - lr * g,)

def plain_coefficients(step, lr):
    return (lr,)

descent = Rule(plain, plain_coefficients)
"""


@pytest.fixture
def checked(tmp_path, capsys):
    def run(text, *options, name="my_rules.py"):
        file = tmp_path / name
        if text is not None:
            file.write_text(text)
        status = main(["check", str(file), *options])
        return status, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("text", "name"), [(SOUND, "Scaled: states sum; hyperparameters lr, eps"), (ALONE, "descent: states none")]
)
def test_sound_rules(checked, text, name):
    status, out, err = checked(text, "--target", "sm_90", "gfx1100")
    assert (status, err) == (0, "")
    assert name in out
    header, *rows = out.splitlines()[1:6]
    assert [*header.split()][:4] == ["format", "target", "registers", "spilled"]
    assert [row.split()[:2] for row in rows] == [[dtype, gpu] for dtype in ("float32", "bfloat16") for gpu in ("sm_90", "gfx1100")]
    assert "executed: the PTX for sm_90 on a CPU" in out


@pytest.mark.parametrize("text", [pytest.param(SOUND, marks=pytest.mark.proof), ALONE], ids=["optimizer", "rule"])
def test_other_bits_are_reported(checked, text, monkeypatch):
    """As products and sums contracted into one operation give."""
    monkeypatch.setattr(gpu_kernels, "OPTIONS", {**gpu_kernels.OPTIONS, "enable_fp_fusion": True})
    status, out, _ = checked(text, "--target", "sm_90")
    assert status == 1
    assert "different from" in out and " elements of p" in out


@pytest.mark.proof
def test_exceeded_limits_are_reported(checked, monkeypatch):
    monkeypatch.setattr(gpu_kernels, "OPTIONS", {**gpu_kernels.OPTIONS, "maxnreg": 24})
    status, out, _ = checked(SOUND, "--target", "sm_90")
    assert status == 1
    assert "exceeded: float32 on sm_90" in out and "bytes are spilled" in out


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (None, [], "is not a file"),
        ("1 +", [], "cannot be imported: SyntaxError"),
        ("import nothing_of_this_name", [], "cannot be imported: ModuleNotFoundError"),
        ("x = 1", [], "defines no Rule and no RuleOptimizer"),
        (ALONE.replace("lr * g", "0.5 * g"), [], "holds the literal 0.5"),
        (SOUND, ["--target", "sm_1"], "--target sm_1 is not known; there are sm_75"),
    ],
    ids=["no file", "syntax", "import", "no rules", "literal", "target"],
)
def test_what_stands_in_the_way_is_said(checked, text, options, message):
    status, out, err = checked(text, *options)
    assert (status, out) == (1, "")
    assert err.startswith("error: ") and message in err


def test_files_of_other_kinds_are_refused(checked):
    _, _, err = checked("", name="rules.txt")
    assert "must end in .py" in err


def test_rules_of_an_optimizer_are_not_listed_twice(tmp_path):
    file = tmp_path / "both.py"
    file.write_text(SOUND + "\nthe_rule = Scaled.rule\n" + ALONE)
    assert list(check.find(check._imported(file))) == ["Scaled", "descent"]
