"""What Adafactor's generated Numba kernels are made of: sums of squares, and memory of one call."""

from __future__ import annotations

from math import sqrt

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from fusedopt.kernels.adafactor_tiles import EPS2, STEP_LIMIT, THRESHOLD
from fusedopt.kernels.cpu_runtime import JIT

#: Partial sums of a sum of squares: what a compiler may not reorder by itself, and the same on every processor.
_LANES = 16


def _sum_of_squares(stored, decode):
    """Return an intrinsic that sums the squares of ``count`` numbers, in float64, in an order that is fixed.

    Squares of float32 numbers are exact in float64, and of so many of them a sum is, too, for all that float32 can tell.

    Args:
        stored: LLVM's type of a stored number.
        decode: function of a builder, the numbers and the type for them, a vector or one; returns them in float64.
    """

    @intrinsic
    def sum_of_squares(typing_context, address, count):
        def generate(context, builder, signature, arguments):
            address, count = arguments
            integer, wide = ir.IntType(64), ir.DoubleType()
            lanes = ir.VectorType(wide, _LANES)
            first = builder.inttoptr(address, stored.as_pointer())
            with builder.goto_entry_block():
                many, single = builder.alloca(lanes), builder.alloca(wide)
            builder.store(ir.Constant(lanes, [0.0] * _LANES), many)
            builder.store(wide(0.0), single)

            def add(to, at, kind, result):
                numbers = decode(builder, builder.load(at, align=_bytes(stored)), kind, result)
                builder.store(builder.fadd(builder.load(to), builder.fmul(numbers, numbers)), to)

            blocks = builder.udiv(count, integer(_LANES))
            with cgutils.for_range(builder, blocks) as loop:
                at = builder.gep(first, [builder.mul(loop.index, integer(_LANES))])
                kind = ir.VectorType(stored, _LANES)
                add(many, builder.bitcast(at, kind.as_pointer()), lambda part: ir.VectorType(part, _LANES), lanes)
            with cgutils.for_range_slice(builder, builder.mul(blocks, integer(_LANES)), count, integer(1)) as (index, _):
                add(single, builder.gep(first, [index]), lambda part: part, wide)
            sums, width = builder.load(many), _LANES
            while width > 1:
                width //= 2
                places = ir.VectorType(ir.IntType(32), width)
                halves = [ir.Constant(places, list(range(start, start + width))) for start in (0, width)]
                sums = builder.fadd(*(builder.shuffle_vector(sums, sums, half) for half in halves))
            return builder.fadd(builder.extract_element(sums, ir.IntType(32)(0)), builder.load(single))

        return types.float64(types.int64, types.int64), generate

    return sum_of_squares


def _bytes(stored):
    return {"half": 2, "i16": 2, "float": 4, "double": 8}[str(stored)]


def _widen(builder, numbers, kind, result):
    return builder.fpext(numbers, result)


def _from_bfloat16(builder, bits, kind, result):
    words = kind(ir.IntType(32))
    sixteen = ir.Constant(words, [16] * _LANES) if isinstance(words, ir.VectorType) else words(16)
    shifted = builder.shl(builder.zext(bits, words), sixteen)
    return builder.fpext(builder.bitcast(shifted, kind(ir.FloatType())), result)


sum_of_squares_float32 = _sum_of_squares(ir.FloatType(), _widen)
sum_of_squares_float64 = _sum_of_squares(ir.DoubleType(), lambda builder, numbers, kind, result: numbers)
sum_of_squares_float16 = _sum_of_squares(ir.HalfType(), _widen)
sum_of_squares_bfloat16 = _sum_of_squares(ir.IntType(16), _from_bfloat16)


def _buffer_maker(llvm_type):
    @intrinsic
    def buffer(typing_context, length):
        """Return memory for ``length`` numbers, a literal, until the calling function returns."""
        if not isinstance(length, types.IntegerLiteral):
            return None
        count = length.literal_value

        def generate(context, builder, signature, arguments):
            with builder.goto_entry_block():
                memory = builder.alloca(ir.ArrayType(llvm_type, count))
            return builder.ptrtoint(memory, ir.IntType(64))

        return types.int64(length), generate

    return buffer


float32_buffer = _buffer_maker(ir.FloatType())
float64_buffer = _buffer_maker(ir.DoubleType())


@njit(**JIT)
def add_to(totals, parts):
    """Add ``parts`` to ``totals``, element by element."""
    for i in range(totals.size):
        totals[i] += parts[i]


@njit(**JIT)
def step_size(parameter_squares, update_squares, size, c):
    """Return how far the update of a tensor moves it: relative to its own root mean square, and to that of the update.

    A root mean square that is NaN is passed over, as by torch.
    """
    own = sqrt(parameter_squares / size)
    ratio = sqrt(update_squares / size) / c[THRESHOLD]
    return (own if own > c[EPS2] else c[EPS2]) * c[STEP_LIMIT] / (ratio if ratio > 1.0 else 1.0)
