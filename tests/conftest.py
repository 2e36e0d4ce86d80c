"""What every test runs under: Triton's interpreter without a GPU, poisoned memory, fixed seeds, reasons for skips."""

import importlib.util
import os
import random
import sys

import hypothesis
import pytest
import torch
from torch.utils._device import _device_constructors

# Triton reads this once, when it is imported, so it has to stand before anything imports Triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest_plugins = ["compiled_process"]

# torch keeps the functions that make tensors at its first use of a device context: these, and not what a test puts there.
_device_constructors()

LIBRARY = "fusedopt"

# The same examples each time, without a limit on time: the first may compile. `pytest --hypothesis-profile=exploring` looks
# for new ones.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.register_profile("exploring", deadline=None, max_examples=500)
hypothesis.settings.load_profile("repeatable")


def pytest_configure(config):
    config.addinivalue_line("markers", "unpoisoned: leaves torch.empty alone, for tests in which torch.compile traces it")


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device is here")
    if item.get_closest_marker("triton"):
        if importlib.util.find_spec("triton") is None:
            pytest.skip("Triton is not installed: pip install triton (Linux), or fusedopt's extra [triton]")
        if os.environ.get("TRITON_INTERPRET") == "1":
            import triton_interpreter

            triton_interpreter.correct()


@pytest.fixture(autouse=True)
def fixed_seeds():
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory(request, monkeypatch):
    """Memory that the library asks for uninitialised holds NaN: whoever reads it before writing it is found out."""
    if request.node.get_closest_marker("unpoisoned"):
        return
    monkeypatch.setattr(torch, "empty", poisoning(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoning(torch.empty_like))
    monkeypatch.setattr(torch, "empty_strided", poisoning(torch.empty_strided))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoning(torch.Tensor.new_empty))


def poisoning(make):
    def poisoned(*args, **kwargs):
        tensor = make(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.split(".")[0] == LIBRARY and tensor.device.type != "meta":
            with torch.no_grad():
                tensor.fill_(poison(tensor.dtype))
        return tensor

    return poisoned


def poison(dtype):
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return True if dtype == torch.bool else torch.iinfo(dtype).max
