"""What generated Numba kernels are made of: options, typed pointers, conversions of formats, claims of chunks."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

#: The options of every njit here. Numba hands a helper's options down from its first caller, so all must agree.
#: Without error_model="numpy" a division checks for zero, and loops stay scalar; fastmath would cost the equal bits.
JIT: dict[str, Any] = {"error_model": "numpy", "fastmath": False, "boundscheck": False}

# A launch is an array of 64-bit integers, whose address is all that a kernel is given. The first two lines say what to do:
# addresses of tables, their lengths, how many chunks to claim at a time, from how many regions, by a team of how many
# threads, and the address of the function that numbers them (0: in the order of their arrival). The others change, a cache
# line each; the last ones are the chunks that have been claimed of each region.
TENSORS, CHUNKS, ROWS, ADDRESS_TABLE, CHUNK_TABLE, ROW_TABLE, COEFFICIENT_TABLE, BATCH = range(8)
REGIONS, TEAM, NUMBER, RESULT_TABLE = range(8, 12)
ARRIVED, DONE, LEFT, LATE, CLAIMED = range(16, 56, 8)
LINE = 8

#: Looks at a launch before a thread takes another for descheduled, and stops looking: about a millisecond, longer
#: than the longest claim takes.
PATIENCE = 3_000_000


def pointer_maker(element):
    """Return a function of an address that gives it as a pointer to ``element``."""

    @intrinsic
    def pointer(typing_context, address):
        def generate(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(element)(types.int64), generate

    return pointer


int64_pointer = pointer_maker(types.int64)
float32_pointer = pointer_maker(types.float32)
float64_pointer = pointer_maker(types.float64)
# Half precision numbers are loaded and stored as their bits.
float16_pointer = bfloat16_pointer = pointer_maker(types.uint16)


def stack_of_float64(length):
    """Return a function that gives a pointer to ``length`` numbers on the stack of the function it is called from."""

    @intrinsic
    def stack(typing_context):
        def generate(context, builder, signature, arguments):
            numbers = cgutils.alloca_once(builder, ir.DoubleType(), size=length)
            return builder.bitcast(numbers, context.get_value_type(signature.return_type))

        return types.CPointer(types.float64)(), generate

    return stack


@intrinsic
def _from_float16(typing_context, bits):
    def generate(context, builder, signature, arguments):
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic
def _to_float16(typing_context, number):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), generate


@intrinsic
def _from_bfloat16(typing_context, bits):
    def generate(context, builder, signature, arguments):
        word = ir.IntType(32)
        return builder.bitcast(builder.shl(builder.zext(arguments[0], word), word(16)), ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic
def _to_bfloat16(typing_context, number):
    # In LLVM's words, because Numba widens sums of 32-bit integers to 64 bits. To nearest, ties to even; NaN stays NaN.
    def generate(context, builder, signature, arguments):
        word, half = ir.IntType(32), ir.IntType(16)
        bits = builder.bitcast(arguments[0], word)
        odd = builder.and_(builder.lshr(bits, word(16)), word(1))
        rounded = builder.add(bits, builder.add(odd, word(0x7FFF)))
        is_nan = builder.fcmp_unordered("uno", arguments[0], arguments[0])
        return builder.select(is_nan, half(0x7FC0), builder.trunc(builder.lshr(rounded, word(16)), half))

    return types.uint16(types.float32), generate


@intrinsic
def fetch_add(typing_context, address, amount):
    """Add to the 64-bit integer at ``address`` atomically; return what it was."""

    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def look(typing_context, address):
    """Return the 64-bit integer at ``address``, which other threads may change."""

    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(types.int64), generate


@intrinsic
def word(typing_context, address, place):
    """Return the 64-bit integer ``place`` words behind ``address``."""

    def generate(context, builder, signature, arguments):
        address, place = arguments
        integer = ir.IntType(64)
        return builder.load(builder.inttoptr(builder.add(address, builder.mul(place, integer(8))), integer.as_pointer()))

    return types.int64(types.int64, types.int64), generate


@intrinsic
def add_to_count(typing_context, address):
    """Add one to the 32-bit integer at ``address`` atomically."""

    def generate(context, builder, signature, arguments):
        integer = ir.IntType(32)
        builder.atomic_rmw("add", builder.inttoptr(arguments[0], integer.as_pointer()), integer(1), "monotonic")

    return types.void(types.int64), generate


@intrinsic
def _call(typing_context, function):
    """Call the C function at the address ``function``, which takes nothing and returns an int."""

    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.IntType(32), [])
        return builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [])

    return types.int32(types.int64), generate


@njit(**JIT)
def number(launch, function):
    """Return the number of the calling thread, from 0."""
    return types.int64(_call(function)) if function != 0 else fetch_add(launch + 8 * ARRIVED, 1)


@njit(**JIT)
def leave(launch, team):
    """Wait for the ``team`` to have left ``launch``; note it in the launch where that takes too long."""
    left = fetch_add(launch + 8 * LEFT, 1) + 1
    for _ in range(PATIENCE):
        if left >= team:
            return
        left = look(launch + 8 * LEFT)
    fetch_add(launch + 8 * LATE, 1)


@njit(**JIT)
def load_float32(array, i):
    return array[i]


load_float64 = load_float32


@njit(**JIT)
def load_float16(array, i):
    return _from_float16(array[i])


@njit(**JIT)
def load_bfloat16(array, i):
    return _from_bfloat16(array[i])


@njit(**JIT)
def store_float32(array, i, number):
    array[i] = number


store_float64 = store_float32


@njit(**JIT)
def store_float16(array, i, number):
    array[i] = _to_float16(types.float32(number))


@njit(**JIT)
def store_bfloat16(array, i, number):
    array[i] = _to_bfloat16(types.float32(number))


@njit(**JIT)
def absolute(x):
    return abs(x)


@njit(**JIT)
def where(condition, a, b):
    return a if condition else b


@njit(**JIT)
def maximum(a, b):
    return a if (a > b or a != a) else b


@intrinsic
def sign(typing_context, x):
    """Return 1 above zero, -1 below, else ``x`` itself, in its own type: literals of Python would make it float64."""

    def generate(context, builder, signature, arguments):
        number = arguments[0]
        zero, one = number.type(0.0), number.type(1.0)
        below = builder.select(builder.fcmp_ordered("<", number, zero), number.type(-1.0), number)
        return builder.select(builder.fcmp_ordered(">", number, zero), one, below)

    return x(x), generate


@njit(**JIT)
def nonzero(x):
    return x != 0
