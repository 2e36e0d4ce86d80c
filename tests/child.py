"""Run a Python program in a process of its own: for what may crash, for fresh caches and for forks."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import fusedopt

#: The folder that ``import fusedopt`` finds the package in, for a checkout and for an installed package alike.
PACKAGE_ROOT = Path(fusedopt.__file__).resolve().parents[1]


def run(program: str, *arguments: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """Run ``program`` with warnings as errors; its exit status is the caller's to judge.

    Args:
        program: text in Python, indented as a whole or not.
        arguments: what the program finds in ``sys.argv[1:]``.
        environment: variables beside those of this process; None removes one.
    """
    return _command(program, arguments, environment, subprocess.run, capture_output=True)


def start(program: str, *arguments: str, **environment: str | None) -> subprocess.Popen[str]:
    """Start ``program`` and return at once; read its output by ``communicate``."""
    return _command(program, arguments, environment, subprocess.Popen, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def output(program: str, *arguments: str, **environment: str | None) -> str:
    """Run ``program``, which must end with status 0, and return what it printed."""
    finished = run(program, *arguments, **environment)
    assert finished.returncode == 0, f"exit status {finished.returncode}\n{finished.stdout}\n{finished.stderr}"
    return finished.stdout


def _command(program, arguments, environment, call, **options):
    path = os.pathsep.join(filter(None, (str(PACKAGE_ROOT), os.environ.get("PYTHONPATH"))))
    variables = {**os.environ, "PYTHONPATH": path, **environment}
    return call(
        # -P: the working directory is no place to import from, or it would come before PYTHONPATH.
        [sys.executable, "-P", "-W", "error", "-c", textwrap.dedent(program), *arguments],
        env={name: value for name, value in variables.items() if value is not None},
        text=True,
        **options,
    )
