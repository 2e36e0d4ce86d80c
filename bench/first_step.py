"""How long the first step takes: in new processes, with empty caches (as after an installation) and with warm ones.

``python -m bench.first_step CONTEST`` is such a process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from .cases import contests

CHECKOUT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class FirstStep:
    """Seconds for making an optimizer and its first step in a process, and how many files that added to the caches."""

    contest: str
    fresh_seconds: float
    warm_seconds: float
    fresh_files: int
    warm_files: int


def measure_first_step(contest_name: str) -> FirstStep:
    """Run two processes one after the other over caches that are empty for the first."""
    with tempfile.TemporaryDirectory() as folder:
        caches = {"FUSEDOPT_CACHE_DIR": f"{folder}/fusedopt", "NUMBA_CACHE_DIR": f"{folder}/numba"}
        fresh_seconds = _first_step_in_child(contest_name, caches)
        fresh_files = _count_files(folder)
        warm_seconds = _first_step_in_child(contest_name, caches)
        warm_files = _count_files(folder) - fresh_files
    return FirstStep(contest_name, fresh_seconds, warm_seconds, fresh_files, warm_files)


def _first_step_in_child(contest_name: str, caches: dict[str, str]) -> float:
    child = subprocess.run(
        [sys.executable, "-m", "bench.first_step", contest_name],
        cwd=CHECKOUT,
        env={**os.environ, **caches},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return float(json.loads(child.stdout)["seconds"])


def _count_files(folder: str) -> int:
    return sum(path.is_file() for path in Path(folder).rglob("*"))


def _time_first_step(contest_name: str) -> float:
    contest = next(contest for contest in contests() if contest.name == contest_name)
    parameter = torch.ones(1000, requires_grad=True)
    parameter.grad = torch.ones(1000)
    started = time.perf_counter()
    contest.ours.build([parameter]).step()
    return time.perf_counter() - started


if __name__ == "__main__":
    print(json.dumps({"seconds": _time_first_step(sys.argv[1])}))
