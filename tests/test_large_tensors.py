"""Offsets that 32 bits cannot hold: in elements, and in bytes, along contiguous tensors and between the elements of views."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy
import pytest
import torch

import fusedopt

pytestmark = pytest.mark.slow


def available_memory():
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        return 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError):
        return 0


def needs(amount):
    if available_memory() < 1.5 * amount:
        pytest.skip(f"{1.5 * amount / 2**30:.0f} GiB of free memory are needed")


def untouched_memory(elements):
    """Return float32 zeros that take no memory until they are written."""
    try:
        # Never reserved, so any size will do.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        memory = mmap.mmap(-1, 4 * elements, flags=flags)
    except (AttributeError, OSError) as error:
        pytest.skip(f"this system cannot set aside so much address space: {error}")
    return torch.from_numpy(numpy.frombuffer(memory, numpy.float32))


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_elements_far_apart(name):
    """A view of three elements, each 2**31 + 1 elements from the next; memory is touched only where they lie."""
    stride = 2**31 + 1
    base = untouched_memory(2 * stride + 2)
    param = base[::stride].detach()
    assert param.shape == (3,)
    param.grad = torch.tensor([1.0, 2.0, -3.0])
    getattr(fusedopt, name)([param], lr=0.5, **({"weight_decay": 0} if name == "AdamW" else {})).step()
    expected = [-0.5, -1.0, 1.5] if name == "SGD" else [-0.5, -0.5, 0.5]
    torch.testing.assert_close(param, torch.tensor(expected), rtol=1e-5, atol=0)
    assert base[1] == base[stride - 1] == base[stride + 1] == 0


def test_views_far_into_a_buffer():
    base = untouched_memory(2**32 + 100)
    params = [base[start : start + 50].detach() for start in (0, 2**29, 2**31, 2**32)]
    for p in params:
        p.grad = torch.linspace(1, 2, 50)
    fusedopt.SGD(params, lr=0.5).step()
    for p in params:
        assert torch.equal(p, -0.5 * torch.linspace(1, 2, 50))


def test_more_elements_than_32_bits_count():
    size = 2**31 + 33
    needs(4 * size)
    param = torch.zeros(size, dtype=torch.bfloat16)
    param.grad = torch.ones(size, dtype=torch.bfloat16)
    fusedopt.SGD([param], lr=0.5).step()
    # A comparison of all elements would take as much memory again.
    for start in (0, 2**30 - 8, 2**31 - 8, size - 33):
        assert (param[start : start + 33] == -0.5).all()
    assert param.view(torch.int16).amin() == param.view(torch.int16).amax()
