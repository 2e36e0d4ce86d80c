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
def thread_halves(x):
    # Of each thread's 8 elements the first 4 and the last 4, which stay in their registers.
    return tl.split(tl.trans(tl.reshape(x, (x.shape[0] // 8, 2, 4)), (0, 2, 1)))


@triton.jit
def thread_whole(first, second):
    return tl.reshape(tl.trans(tl.join(first, second), (0, 2, 1)), (first.shape[0] * 8,))


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


@triton.jit
def tree(lanes, LEVELS: tl.constexpr):
    # By halves, as fusedopt.kernels.norms.tree; a sum of two does not depend on their order.
    for _ in tl.static_range(LEVELS):
        lanes = tl.sum(tl.reshape(lanes, (2, lanes.shape[0] // 2)), axis=0)
    return lanes


@triton.jit(do_not_specialize=["tensors"], do_not_specialize_on_alignment=["addresses", "grad_scale"])
def sums_of_squares(
    addresses, sizes, pieces, grad_scale, sums, tensors,
    SCALED: tl.constexpr, STORED: tl.constexpr, COMPUTE: tl.constexpr, PIECE: tl.constexpr, LANES: tl.constexpr,
    LEVELS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(pieces + 2 * program)
    first = tl.load(pieces + 2 * program + 1).to(tl.int64) * PIECE
    remaining = tl.load(sizes + tensor) - first
    gradient = tl.load(addresses + tensors + tensor).to(tl.pointer_type(STORED)) + first
    scale = tl.full((), 1.0, COMPUTE)
    if SCALED:
        # As torch's unscale_: the reciprocal in float64, rounded to float32.
        scale = (tl.full((), 1.0, tl.float64) / tl.load(grad_scale).to(tl.float64)).to(tl.float32).to(COMPUTE)
    lanes = tl.arange(0, LANES)
    total = tl.zeros((LANES,), tl.float64)
    if remaining >= PIECE:
        for row in tl.static_range(PIECE // LANES):
            g = (scale * tl.load(gradient + row * LANES + lanes).to(COMPUTE)).to(tl.float64)
            total += g * g
    else:
        left = remaining.to(tl.int32)
        for start in range(0, left, LANES):
            g = (scale * tl.load(gradient + start + lanes, mask=start + lanes < left, other=0.0).to(COMPUTE)).to(tl.float64)
            total += g * g
    tl.store(sums + program + tl.arange(0, 1), tree(total, LEVELS))


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["totals"])
def add_totals(sums, pieces, slot_of_tensor, totals, count, LANES: tl.constexpr, LEVELS: tl.constexpr):
    slot = tl.program_id(0)
    total = tl.zeros((LANES,), tl.float64)
    for start in range(0, count, LANES):
        piece = start + tl.arange(0, LANES)
        tensor = tl.load(pieces + 2 * piece, mask=piece < count, other=0)
        own = tl.load(slot_of_tensor + tensor, mask=piece < count, other=-1) == slot
        total += tl.where(own, tl.load(sums + piece, mask=piece < count, other=0.0), 0.0)
    at = totals + slot + tl.arange(0, 1)
    tl.store(at, tl.load(at) + tree(total, LEVELS))
