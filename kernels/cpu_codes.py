"""What generated Numba kernels of low-bit formats are made of beside :mod:`~fusedopt.kernels.cpu_runtime`."""

from __future__ import annotations

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from fusedopt.kernels.codes import BLOCK
from fusedopt.kernels.cpu_runtime import JIT, pointer_maker

# Numba computes with 64-bit integers; where each result is cut to 32 bits, LLVM computes with 32, twice as many at once.

uint8_pointer = pointer_maker(types.uint8)
uint32_pointer = pointer_maker(types.uint32)
int8_pointer, int16_pointer, float32_pointer = map(pointer_maker, (types.int8, types.int16, types.float32))


@intrinsic
def bits(typing_context, x):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@intrinsic
def from_bits(typing_context, pattern):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


#: Blocks that are updated together: of memory, 4 are 20 % slower than 2 (two threads, AdamW in 8 bits, Zen 4), and 1 is 6 % slower.
GROUP = 2


def _room(element, of, length):
    @intrinsic
    def room(typing_context):
        """Return room on the stack of the calling function."""

        def generate(context, builder, signature, arguments):
            # Not Numba's own way, which fills it with zeros.
            with builder.goto_entry_block():
                memory = builder.alloca(ir.ArrayType(of, length))
            memory.align = 64
            return builder.bitcast(memory, of.as_pointer())

        return types.CPointer(element)(), generate

    return room


float32_room = _room(types.float32, ir.FloatType(), GROUP * BLOCK)
uint32_room = _room(types.uint32, ir.IntType(32), GROUP * BLOCK)
word_room = _room(types.uint32, ir.IntType(32), GROUP)


@njit(**JIT)
def word(x):
    return types.uint32(x)


@njit(**JIT)
def real(x):
    return types.float32(types.uint32(x))


@njit(**JIT)
def truncate(x):
    return types.uint32(types.int32(x))


float32 = types.float32


@intrinsic
def moved(typing_context, index, places):
    """Return the word ``places`` behind ``index``."""

    def generate(context, builder, signature, arguments):
        # In LLVM's words: as a sum of Numba's the loop counts in vectors of 64 bits, which a tenth of its time goes into.
        index, places = arguments
        return builder.add(index, builder.trunc(places, ir.IntType(32)))

    return types.uint32(types.uint32, types.int64), generate


def _chooser(comparison):
    @intrinsic
    def choose(typing_context, a, b):
        def generate(context, builder, signature, arguments):
            return builder.select(builder.icmp_unsigned(comparison, *arguments), *arguments)

        return types.uint32(types.uint32, types.uint32), generate

    return choose


# LLVM knows these for reductions; of the same as a choice in Python it sees branches.
lower, higher = _chooser("<"), _chooser(">")
