"""The benchmarks' own logic, on tiny cases: a wrong subject is found out, turns alternate, the README is rewritten."""

import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys

import pytest
import torch

from bench import __main__ as command
from bench.cases import Case, Contest, Subject, contests
from bench.first_step import CHECKOUT, FirstStep, measure_first_step
from bench.measure import CHECKED_STEPS, Spread, error_in_ulps, interleaved, measure
from bench.report import BEGIN, END, update_readme

TINY = Case(3, 5)
CONTESTS = {contest.name: contest for contest in contests()}
ADAMW = CONTESTS["AdamW"]


class Recorder:
    """In an optimizer's place: notes its name and where the gradients are at every step, then lets `inner` step."""

    def __init__(self, name, log, parameters, inner=None):
        self.name, self.log, self.parameters, self.inner = name, log, parameters, inner

    def step(self):
        self.log.append((self.name, [parameter.grad.data_ptr() for parameter in self.parameters]))
        if self.inner is not None:
            self.inner.step()


def recording(name, log, build=None):
    return Subject(name, lambda parameters: Recorder(name, log, parameters, build and build(parameters)))


def no_decay(parameters):
    return torch.optim.AdamW(parameters, weight_decay=0.0)


def other_rate(parameters):
    return torch.optim.AdamW(parameters, lr=1.001e-3)


class NanInTheLastParameter:
    def __init__(self, parameters):
        self.parameters, self.inner = parameters, torch.optim.AdamW(parameters)

    def step(self):
        self.inner.step()
        with torch.no_grad():
            self.parameters[-1][-1] = math.nan


@pytest.mark.parametrize("contest", CONTESTS.values(), ids=CONTESTS.keys())
def test_right_subjects_are_timed(contest):
    result = measure(contest, TINY, rounds=3, turn_seconds=0.0)
    assert result.wrong == []
    for spread in (result.baseline_ms, result.ours_ms, result.ratio, result.moved_gradients_ratio):
        assert 0 < spread.lower_quartile <= spread.median <= spread.upper_quartile


@pytest.mark.parametrize("build", [no_decay, other_rate, NanInTheLastParameter])
@pytest.mark.parametrize("role", ["baseline", "ours"])
def test_wrong_subject_is_reported_and_nothing_is_timed(build, role):
    log = []
    contest = dataclasses.replace(ADAMW, **{role: recording("the wrong one", log, build)})
    result = measure(contest, TINY, rounds=3)
    assert result.wrong == ["the wrong one"]
    assert result.ratio is result.baseline_ms is result.ours_ms is result.moved_gradients_ratio is None
    assert len(log) == CHECKED_STEPS, "steps beyond the check were taken"


def test_reference_itself_is_exact():
    assert error_in_ulps(lambda parameters: ADAMW.reference(parameters), ADAMW.reference, TINY) <= 4


def test_turns_alternate_with_equal_numbers_of_steps():
    log = []
    seconds = interleaved([recording("a", log), recording("b", log)], TINY, 4, 0.0, move_gradients=False)
    assert [len(turns) for turns in seconds] == [4, 4]
    assert "".join(name for name, _ in log).endswith("abbaabba")


@pytest.mark.parametrize("move_gradients", [False, True], ids=["same addresses", "moved"])
def test_gradients_move_at_every_step_where_asked(move_gradients):
    log = []
    interleaved([recording("a", log)], TINY, 4, 0.0, move_gradients)
    addresses = [found for _, found in log]
    for before, after in itertools.pairwise(addresses):
        moved = [old != new for old, new in zip(before, after, strict=True)]
        assert moved == [move_gradients] * TINY.tensors


def test_spread_of_rounds():
    assert Spread.of([4.0, 1.0, 2.0, 5.0, 3.0]) == Spread(median=3.0, lower_quartile=2.0, upper_quartile=4.0)


@pytest.mark.parametrize("contest", CONTESTS)
def test_first_step_of_a_second_process_compiles_nothing(contest):
    step = measure_first_step(contest)
    assert step.fresh_files > 0
    assert step.warm_files == 0
    assert step.fresh_seconds > 0
    assert step.warm_seconds > 0


def test_readme_is_rewritten_between_the_markers(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nrest\n", encoding="utf-8")
    update_readme(readme, "| new |")
    update_readme(readme, "| newer |")
    assert readme.read_text(encoding="utf-8") == f"# Title\n\n{BEGIN}\n| newer |\n{END}\n\nrest\n"


@pytest.mark.parametrize(
    "text", ["nothing", BEGIN, END, f"{END}\n{BEGIN}", f"{BEGIN}\n{BEGIN}\n{END}"], ids=lambda text: repr(text)
)
def test_readme_without_two_markers_is_refused_and_kept(tmp_path, text):
    readme = tmp_path / "README.md"
    readme.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"README\.md: expected one line"):
        update_readme(readme, "| new |")
    assert readme.read_text(encoding="utf-8") == text


@pytest.fixture
def tiny_run(tmp_path, monkeypatch):
    """The command on a tiny case, for a checkout that consists of a README."""
    monkeypatch.setattr(command, "CASES", (TINY,))
    monkeypatch.setattr(command, "ROUNDS", 3)
    monkeypatch.setattr(command, "CHECKOUT", tmp_path)
    monkeypatch.setattr(command, "measure_first_step", lambda name: FirstStep(name, 2.5, 0.125, 4, 0))
    (tmp_path / "README.md").write_text(f"{BEGIN}\n{END}\n", encoding="utf-8")
    return tmp_path


def test_command_writes_readme_and_json(tiny_run):
    assert command.main(["--update-readme", "--json", str(tiny_run / "numbers.json")]) == 0
    readme = (tiny_run / "README.md").read_text(encoding="utf-8")
    for expected in ("| AdamW | 3 x 5 |", "| SGD, momentum=0.9 | 3 x 5 |", "| AdamW | 2.50 | 0.12 | 4, then 0 |"):
        assert expected in readme
    for expected in (f"torch {torch.__version__}", f"{os.cpu_count()} cores", "`python -m bench --update-readme`"):
        assert expected in readme
    numbers = json.loads((tiny_run / "numbers.json").read_text(encoding="utf-8"))
    assert [result["contest"] for result in numbers["results"]] == list(CONTESTS)
    assert all(result["ratio"]["median"] > 0 for result in numbers["results"])
    assert numbers["machine"]["torch"] == torch.__version__


def test_command_fails_and_keeps_the_readme_where_a_subject_is_wrong(tiny_run, monkeypatch, capsys):
    wrong: Contest = dataclasses.replace(ADAMW, ours=Subject("fusedopt", no_decay))
    monkeypatch.setattr(command, "contests", lambda: (wrong,))
    assert command.main(["--update-readme"]) == 1
    assert "WRONG, so not timed: fusedopt, AdamW, 3 x 5" in capsys.readouterr().out.replace("\n", " ")
    assert (tiny_run / "README.md").read_text(encoding="utf-8") == f"{BEGIN}\n{END}\n"


@pytest.mark.parametrize("partial", [["--quick"], ["--case", "3x5"]], ids=" ".join)
def test_readme_is_for_full_runs(tiny_run, capsys, partial):
    with pytest.raises(SystemExit) as stopped:
        command.main(["--update-readme", *partial])
    assert stopped.value.code == 2
    assert "leave out --quick and --case" in capsys.readouterr().err


def test_single_steps_run_under_pytest_benchmark():
    selected = "bench/test_step.py::test_step[ours-AdamW-1000x100]"
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-disable", selected],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "1 passed" in finished.stdout
