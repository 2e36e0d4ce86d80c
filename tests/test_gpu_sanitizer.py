"""The kernels under NVIDIA's compute-sanitizer, which watches each access of the machine code itself; on a GPU alone.

The executing driver checks bounds, alignment and races by itself, in each of the tests that are watched here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
#: Tools, and what each looks for.
TOOLS = {
    "memcheck": "accesses out of bounds or misaligned",
    "initcheck": "reads of memory that nobody has written",
    "racecheck": "races in shared memory",
    "synccheck": "barriers that not all threads reach",
}
#: Full and ragged blocks, unaligned tensors, tensors that rest, coefficients from the device, and what a scaler found.
TESTS = "unaligned_memory or gradients_that_are_missing or coefficients_from_the_device or gradient_scaler_found"
FAULTS_FOUND = 97


def command(*options: str) -> list[str]:
    return [
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options),
        *("-m", "gpu and not proof", "-k", TESTS, "tests/test_gpu_executed.py"),
    ]


def environment() -> dict[str, str]:
    # Without torch's cache of memory each tensor is an allocation of its own, beyond whose end nothing belongs to anyone.
    return {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TRITON_INTERPRET": "0"}


def test_there_is_something_to_watch():
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton (Linux), or fusedopt's extra [triton]")
    done = subprocess.run(command("--collect-only"), cwd=ROOT, env=environment(), capture_output=True, text=True)
    for name in TESTS.split(" or "):
        assert f"{name}[" in done.stdout, f"no test of a GPU is called {name}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("tool", TOOLS)
def test_sanitizer_finds_nothing(tool):
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not there: it comes with the CUDA toolkit")
    watched = [sanitizer, f"--tool={tool}", "--target-processes=all", f"--error-exitcode={FAULTS_FOUND}", *command()]
    done = subprocess.run(watched, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, f"{TOOLS[tool]}, or a test that failed:\n{done.stdout[-6000:]}{done.stderr[-2000:]}"
