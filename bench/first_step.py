"""How long the first step takes: in new processes, with empty caches (as after an installation) and with warm ones.

``python -m bench.first_step OPTIMIZER`` is such a process.
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

from .cases import OPTIMIZERS
from .subjects import OURS

CHECKOUT = Path(__file__).resolve().parents[1]


@dataclass
class FirstStep:
    """Seconds for making an optimizer and its first step in a process, and how many files that added to the caches.

    `numba_seconds` is what importing Numba takes of both, in a process of its own.
    """

    optimizer: str
    fresh_seconds: float
    warm_seconds: float
    numba_seconds: float
    fresh_files: int
    warm_files: int


def measure_first_step(optimizer_name: str) -> FirstStep:
    """Run two processes one after the other over caches that are empty for the first."""
    with tempfile.TemporaryDirectory() as folder:
        caches = {"FUSEDOPT_CACHE_DIR": f"{folder}/fusedopt", "NUMBA_CACHE_DIR": f"{folder}/numba"}
        fresh_seconds = _in_child(optimizer_name, caches)
        fresh_files = _count_files(folder)
        warm_seconds = _in_child(optimizer_name, caches)
        warm_files = _count_files(folder) - fresh_files
        numba_seconds = _in_child("numba", caches)
    return FirstStep(optimizer_name, fresh_seconds, warm_seconds, numba_seconds, fresh_files, warm_files)


def _in_child(what: str, caches: dict[str, str]) -> float:
    child = subprocess.run(
        [sys.executable, "-m", "bench.first_step", what],
        cwd=CHECKOUT,
        env={**os.environ, **caches},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return float(json.loads(child.stdout)["seconds"])


def _count_files(folder: str) -> int:
    return sum(path.is_file() for path in Path(folder).rglob("*"))


def _time(what: str) -> float:
    parameter = torch.ones(1000, requires_grad=True)
    parameter.grad = torch.ones(1000)
    # Any optimizer of torch's, when the first is made, imports a second's worth of torch.
    torch.optim.SGD([parameter])
    started = time.perf_counter()
    if what == "numba":
        import numba  # noqa: F401
    else:
        OURS.build(OPTIMIZERS[what], [parameter]).step()
    return time.perf_counter() - started


if __name__ == "__main__":
    print(json.dumps({"seconds": _time(sys.argv[1])}))
