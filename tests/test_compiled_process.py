"""Tests that another process runs are reported as their own: passed, failed, skipped, or lost with a process that ended early."""

import os
import re
import subprocess
import sys
from pathlib import Path

TESTS = """
import os, pytest

pytestmark = pytest.mark.compiled

def test_there():
    assert os.environ["TRITON_INTERPRET"] == "0"

def test_wrong():
    assert 1 == 2, "a reason"

@pytest.mark.skip(reason="of its own")
def test_not_here():
    pass

@pytest.mark.proof
def test_long():
    pass
"""
ENDS_EARLY = """
import os, pytest

pytestmark = pytest.mark.compiled

def test_there():
    pass

def test_that_ends_it():
    os._exit(3)

def test_never_reached():
    pass
"""


def outcomes(folder, text, *options, interpret="1"):
    (folder / "test_some.py").write_text(text)
    (folder / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-p", "compiled_process", "-p", "no:cacheprovider", "-v", *options, "test_some.py"]
    path = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": interpret, "PYTEST_ADDOPTS": "-p compiled_process"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return dict(re.findall(r"^test_some.py::(\w+) (\w+)", done.stdout, re.MULTILINE)), done.stdout


def test_reports_are_handed_over(tmp_path):
    found, output = outcomes(tmp_path, TESTS)
    assert found == {"test_there": "PASSED", "test_wrong": "FAILED", "test_not_here": "SKIPPED"}
    assert "a reason" in output and "1 deselected" in output


def test_without_the_interpreter_they_run_here(tmp_path):
    found, _ = outcomes(tmp_path, TESTS, "--gpu-proof", interpret="0")
    assert found == {"test_there": "PASSED", "test_wrong": "FAILED", "test_not_here": "SKIPPED", "test_long": "PASSED"}


def test_a_process_that_ends_early_fails_what_it_left(tmp_path):
    found, output = outcomes(tmp_path, ENDS_EARLY)
    assert found == {"test_there": "PASSED", "test_that_ends_it": "FAILED", "test_never_reached": "FAILED"}
    assert "ended early" in output
