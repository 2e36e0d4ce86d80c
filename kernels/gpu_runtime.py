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
def sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))


@triton.jit
def negative(x):
    return x * -1.0  # -x is 0 - x in Triton 3.7.1, which makes 0 of 0 and not -0


@triton.jit
def nonzero(x):
    return x != 0


@triton.jit
def number(x: tl.constexpr):
    return tl.full((), x, tl.float64)  # a literal beside no block is float32


@triton.jit
def power(base, exponent):
    # The products and roots of fusedopt.kernels.math.power, in its order, for a block of bases or of exponents.
    base, exponent = tl.broadcast(base, exponent)
    magnitude = tl.abs(exponent)
    remaining = magnitude.to(tl.int64)
    fraction = magnitude - remaining.to(tl.float64)
    result = magnitude * 0.0 + 1.0
    square = result * base
    root = square
    while tl.max(remaining, axis=0) > 0:
        result = tl.where((remaining & 1) == 1, result * square, result)
        square = square * square
        remaining = remaining >> 1
    while tl.max(fraction, axis=0) > 0.0:
        root = tl.sqrt(root)
        fraction = 2.0 * fraction
        result = tl.where(fraction >= 1.0, result * root, result)
        fraction = tl.where(fraction >= 1.0, fraction - 1.0, fraction)
    return tl.where(exponent < 0.0, 1.0 / result, result)
