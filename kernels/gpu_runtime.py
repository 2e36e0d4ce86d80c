"""What generated Triton kernels are made of: the functions that rules call, correctly rounded."""

import triton
import triton.language as tl

# Plain names of triton.language are not enough: its interpreter patches the module's attributes, not what was taken from it.


@triton.jit
def sqrt_float32(x):
    return tl.sqrt_rn(x)  # tl.sqrt is approximate in float32


@triton.jit
def sqrt_float64(x):
    return tl.sqrt(x)  # and exact in float64, which sqrt_rn refuses


@triton.jit
def divide_float32(a, b):
    return tl.div_rn(a, b)  # a / b is approximate in float32


@triton.jit
def divide_float64(a, b):
    return a / b


@triton.jit
def absolute(x):
    return tl.abs(x)


@triton.jit
def where(condition, a, b):
    return tl.where(condition, a, b)


@triton.jit
def maximum(a, b):
    return tl.where((a > b) | (a != a), a, b)  # tl.maximum drops NaN


@triton.jit
def nonzero(x):
    return x != 0


@triton.jit
def power(base, exponent):
    # The products of fusedopt.kernels.math.power, in its order, for a block of exponents.
    remaining = exponent.to(tl.int64)
    result = exponent * 0.0 + 1.0
    while tl.max(remaining, axis=0) > 0:
        result = tl.where((remaining & 1) == 1, result * base, result)
        base = base * base
        remaining = remaining >> 1
    return result
