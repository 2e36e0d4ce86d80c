"""Triton's interpreter, corrected, computes what a GPU computes: else tests in it would show little."""

import os

import pytest
import torch

pytestmark = pytest.mark.triton
triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels run on the GPU here, not in the interpreter", allow_module_level=True)
tl = triton.language
BLOCK = tl.constexpr(4096)

# Every bfloat16, but NaN, whose payload is nobody's promise.
ALL_BFLOAT16 = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
ALL_BFLOAT16 = ALL_BFLOAT16[~ALL_BFLOAT16.isnan()]


@triton.jit
def convert(source, target, size):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(source + offsets, mask=offsets < size)
    tl.store(target + offsets, values.to(target.dtype.element_ty), mask=offsets < size)


@triton.jit
def add(target, a, b):
    tl.store(target, (a + b).to(tl.float32))


@triton.jit
def double(target):
    values = tl.load(target)
    tl.store(target, values + values)


@triton.jit
def product(target, a, b):
    tl.store(target, tl.load(a) * tl.load(b))


def converted(source, dtype):
    target = torch.empty(source.shape, dtype=dtype)
    convert[(triton.cdiv(source.numel(), BLOCK.value),)](source, target, source.numel())
    return target


def test_bfloat16_is_rounded_to_nearest_even():
    exact = ALL_BFLOAT16[ALL_BFLOAT16.isfinite()].float()
    # Between neighbours: a quarter, half (a tie) and three quarters of the way, and next to the tie.
    bits = exact.view(torch.int32).repeat(5) + torch.tensor([0x4000, 0x7FFF, 0x8000, 0x8001, 0xC000]).repeat_interleave(
        exact.numel()
    ).to(torch.int32)
    source = bits.view(torch.float32)
    assert torch.equal(converted(source, torch.bfloat16), source.to(torch.bfloat16))


def test_bfloat16_is_read_exactly():
    """Subnormals of either sign included."""
    assert torch.equal(converted(ALL_BFLOAT16, torch.float32), ALL_BFLOAT16.float())


def test_nan_stays_nan():
    assert converted(torch.tensor([torch.nan, -torch.nan]), torch.bfloat16).isnan().all()


def test_float_arguments_are_float32():
    target = torch.empty(1)
    # The argument rounds to 2**-24, and one and that to one; their sum in double precision lies above the tie.
    add[(1,)](target, 1.0, 2.0**-24 + 2.0**-50)
    assert target.item() == 1.0


def test_arithmetic_on_bfloat16_is_refused():
    with pytest.raises(triton.runtime.errors.InterpreterError, match="convert them to float32 first"):
        double[(1,)](torch.ones(1, dtype=torch.bfloat16))


def test_overflow_is_no_warning():
    a, b = torch.tensor([3e38]), torch.tensor([torch.inf])
    target = torch.empty(1)
    product[(1,)](target, a, a)
    assert target.item() == torch.inf
    product[(1,)](target, torch.zeros(1), b)
    assert target.isnan().all()
