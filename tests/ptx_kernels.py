"""Small kernels: what the executor of PTX must get right, and faults that it must find."""

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def convert(source, target, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(target + offsets, tl.load(source + offsets).to(target.dtype.element_ty))


@triton.jit
def short_arithmetic(a, b, target, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x, y = tl.load(a + offsets), tl.load(b + offsets)
    tl.store(target + offsets, x + y)
    tl.store(target + BLOCK + offsets, x - y)
    tl.store(target + 2 * BLOCK + offsets, x * y)
    tl.store(target + 3 * BLOCK + offsets, tl.where(x < y, x, y))
    tl.store(target + 4 * BLOCK + offsets, tl.abs(x))


@triton.jit
def extremes(a, b, target, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x, y = tl.load(a + offsets), tl.load(b + offsets)
    tl.store(target + offsets, tl.maximum(x, y))
    tl.store(target + BLOCK + offsets, tl.minimum(x, y))
    tl.store(target + 2 * BLOCK + offsets, tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL))
    tl.store(target + 3 * BLOCK + offsets, tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def functions(x, target, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    v = tl.load(x + offsets)
    tl.store(target + offsets, tl.sqrt_rn(v))
    tl.store(target + BLOCK + offsets, tl.div_rn(1.0, v))
    tl.store(target + 2 * BLOCK + offsets, tl.fma(v, v, v))
    tl.store(target + 3 * BLOCK + offsets, tl.sqrt(v))
    tl.store(target + 4 * BLOCK + offsets, 3.0 / v)
    tl.store(target + 5 * BLOCK + offsets, tl.rsqrt(v))
    tl.store(target + 6 * BLOCK + offsets, tl.exp(-v))
    tl.store(target + 7 * BLOCK + offsets, tl.log(v))
    tl.store(target + 8 * BLOCK + offsets, libdevice.pow(v, 0.8))
    tl.store(target + 9 * BLOCK + offsets, tl.floor(v * 8))


@triton.jit
def integers(a, b, target, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x, y = tl.load(a + offsets), tl.load(b + offsets)
    tl.store(target + offsets, x // y)
    tl.store(target + BLOCK + offsets, x % y)
    tl.store(target + 2 * BLOCK + offsets, (x * y) ^ (x & y) | (x >> 3))
    tl.store(target + 3 * BLOCK + offsets, x << (y & 31))
    tl.store(target + 4 * BLOCK + offsets, tl.umulhi(x.to(tl.uint32, bitcast=True), y.to(tl.uint32, bitcast=True)))
    tl.store(target + 5 * BLOCK + offsets, (x.to(tl.int64) * y.to(tl.int64) >> 7).to(tl.int32))
    tl.store(target + 6 * BLOCK + offsets, tl.minimum(x, y) - tl.maximum(x, -y) + tl.abs(y))


@triton.jit
def philox(target, seed, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    a, b, c, d = tl.randint4x(seed, offsets)
    tl.store(target + offsets, a)
    tl.store(target + BLOCK + offsets, b)
    tl.store(target + 2 * BLOCK + offsets, c)
    tl.store(target + 3 * BLOCK + offsets, d)


@triton.jit
def reductions(x, target, counts, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + offsets, mask=offsets < size, other=0.0)
    tl.atomic_add(target, tl.sum(v, 0))
    tl.atomic_max(target + 1, tl.max(tl.abs(v), 0))
    tl.atomic_add(counts, 1)
    tl.atomic_or(counts + 1, 1 << tl.program_id(0))
    tl.store(target + 2 + tl.program_id(0), tl.min(v, 0))


@triton.jit
def rows_and_columns(x, of_rows, of_columns, transposed, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    v = tl.load(x + row[:, None] * COLUMNS + column[None, :])
    tl.store(of_rows + row, tl.sum(v, 1))
    tl.store(of_columns + column, tl.max(v, 0))
    tl.store(transposed + column[:, None] * ROWS + row[None, :], tl.trans(v))
    tl.store(x + row[:, None] * COLUMNS + column[None, :], tl.cumsum(v, 1))


@triton.jit
def quantised(codes, table, scale, size, BLOCK: tl.constexpr):
    """Read codes through a table, scale to the block's largest, look the codes up again."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    v = tl.load(table + tl.load(codes + offsets, mask=mask, other=0).to(tl.int32)) * 1.5
    largest = tl.max(tl.abs(v), 0)
    v = tl.div_rn(v, tl.zeros_like(v) + largest)
    code = tl.zeros((BLOCK,), tl.int32)
    for i in tl.static_range(8):
        step = 128 >> i
        code = tl.where(tl.load(table + code + step) <= v, code + step, code)
    tl.store(codes + offsets, code.to(tl.uint8), mask=mask)
    tl.store(scale + tl.program_id(0), largest)


@triton.jit
def strided_sum(x, target, size, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    first = tl.program_id(0) * BLOCK
    while first < size:
        offsets = first + tl.arange(0, BLOCK)
        total += tl.load(x + offsets, mask=offsets < size, other=0.0)
        first += tl.num_programs(0) * BLOCK
    tl.atomic_add(target, tl.sum(total, 0))


# --- sound, and unsound in one place each ------------------------------------------------------------------------------------


@triton.jit
def sound(x, y, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    tl.store(y + offsets, tl.load(x + offsets, mask=mask) * 2, mask=mask)


@triton.jit
def unmasked_load(x, y, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + offsets)  # fault
    tl.store(y + offsets, v * 2, mask=offsets < size)


@triton.jit
def mask_one_too_long(x, y, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + offsets, mask=offsets < size, other=0.0)
    tl.store(y + offsets, v * 2, mask=offsets <= size)  # fault


@triton.jit
def programs_overlap(x, y, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * (BLOCK - 1) + tl.arange(0, BLOCK)
    mask = offsets < size
    tl.store(y + offsets, tl.load(x + offsets, mask=mask) + tl.program_id(0), mask=mask)  # fault


@triton.jit
def lost_update(x, y, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.sum(tl.load(x + offsets, mask=offsets < size, other=0.0), 0)
    tl.store(y, tl.load(y) + total)  # fault


@triton.jit
def reads_what_others_write(x, y, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + offsets + 1, mask=offsets + 1 < size, other=0.0)
    tl.store(x + offsets, v, mask=offsets < size)  # fault


@triton.jit
def reads_back_without_a_barrier(x, y, size, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(y + offsets, tl.load(x + offsets, mask=offsets < size, other=0.0), mask=offsets < size)
    back = tl.load(y + (BLOCK - 1 - offsets), mask=BLOCK - 1 - offsets < size, other=0.0)  # fault
    tl.store(x + offsets, back, mask=offsets < size)


@triton.jit
def alignment_that_is_not_there(x, y, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # A table of one address.
    x_at = tl.multiple_of(tl.load(x).to(tl.pointer_type(tl.float32)), 16)
    mask = offsets < tl.multiple_of(size, 16)
    tl.store(y + offsets, tl.load(x_at + offsets, mask=mask), mask=mask)  # fault


@triton.jit
def assertion(x, y, size, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    v = tl.load(x + offsets, mask=offsets < size, other=0.0)
    tl.device_assert(v < 0.5, "too big")  # fault
    tl.store(y + offsets, v, mask=offsets < size)


@triton.jit
def index_overflow(x, y, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    far = (size + offsets) * 65536 * 65536  # fault
    tl.store(y + offsets, tl.load(x + offsets, mask=far == 0, other=0.0), mask=offsets < size)
