"""How numbers are kept in 8 and in 16 bits: each code written once, for every backend.

A block is 256 neighbouring elements of a tensor's memory. Its codes are a byte an element, and what they mean follows from
one or two 32-bit words that the block has beside them:

| code | for | a byte means | words of a block |
|---|---|---|---|
| size | states that are never negative | 0 is zero; else 1 of 255 bit patterns in equal distances | first pattern, distance |
| root | second moments | the same; first moments are relative to a root near it | first pattern, distance |
| signed | other states | a sign and 7 bits, four binades of 32 steps | a factor |
| relative | first moments | a sign and 7 bits, two binades of 64 steps, of the quotient by the root | a factor |

Bit patterns of float32 in equal distances are a logarithm, near enough, that costs an addition. They are rounded up or down
by chance, so that averages stay unbiased however slowly they move. A moment relative to a root is of one size for gradients
of any: what is tiny keeps its digits beside what is huge. All of it is exact arithmetic on integers, or correctly
rounded on float32, so that every backend has the same bits.

The functions run as they stand on NumPy arrays and on torch tensors, and are written out into kernels, with these names
bound anew: ``bits`` (of float32) and ``from_bits``, ``word`` (an integer modulo 2^32), ``real`` and ``truncate``
(integers to float32 and back), ``float32`` (a literal), ``where``, ``absolute`` and ``/``.
"""

from __future__ import annotations

import ast
import builtins
import types
from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import Tensor

from fusedopt.kernels import source

# ruff: noqa: F821  # compiled by several compilers, under names that each of them binds
# mypy: disable-error-code="name-defined, no-untyped-def, no-untyped-call"

#: Elements a block; memory of a block is read and written by one thread of a CPU, or by the threads of one warp.
BLOCK = 256
#: What is added to the index of an element for the next random word of it: a billion and more, so that tensors do not meet theirs.
NEXT_WORD = 0x3C6EF372
#: What an index is multiplied by before it is hashed: in a loop that is an addition.
STRIDE = 0x7FEB352D


# --- chance ------------------------------------------------------------------------------------------------------------------


def scramble(x):
    """Return a random word from an index times :data:`STRIDE`: bits from 7 on, those from 12 on without a trace of each other.

    Wellons' hash lowbias32 without its first and its last fold: numbers in sequence do without the one, upper bits without
    the other.
    """
    return word((x ^ (x >> 16)) * 0x846CA68B)


def step_key(key, step):
    """Return the key of one step from the key of a parameter, by a hash of its own."""
    x = word(key + step * 0x9E3779B9)
    x = word((x ^ (x >> 16)) * 0x21F0AAAD)
    x = word((x ^ (x >> 15)) * 0x735A2D97)
    return word(x ^ (x >> 15))


def bits_drawn(slot: int, count: int) -> tuple[int, int]:
    """Return by how many bits a random word is moved, and the mask then, for the ``slot``-th number of an element.

    Two numbers share a word: one has its upper bits, the other those from 7 on, whose first ones are the last of the other.

    Args:
        count: of bits that the number's format takes.
    """
    return (32 - count if slot % 2 == 0 else 7), (1 << count) - 1


# --- sizes: bit patterns in equal distances ----------------------------------------------------------------------------------


def size_bits(x):
    """Return the bit pattern of the magnitude of ``x``."""
    return word(bits(x) & 0x7FFFFFFF)


def grid(lowest, highest):
    """Return what encodes a block, from the patterns of its least non-zero and of its largest number.

    Powers of two are among the patterns, as near as distances are integers: between two codes a number is then proportional
    to its pattern, and who rounds patterns by chance keeps the mean of the numbers. Not so in a block with numbers from 2^126
    on, or with some from 2^103 on beside others below 2^-125.

    Returns:
        The first pattern, the distance (as it is stored: with an upper bit where the block is scaled), its inverse, and the
        scale.
    """
    # All codes of a block with infinity or NaN but that of zero mean NaN; one of zeros has them about 1.
    bad = highest > 0x7F7FFFFF
    highest = where(highest > 0x7F800000, word(highest * 0 + 0x7F800000), highest)
    highest = where(highest == 0, word(highest * 0 + 0x3F800000), highest)
    lowest = where((lowest > highest) | (lowest == 0), highest, lowest)
    # Patterns below 2^-126 are no logarithm: such blocks are kept 2^24 times as large.
    scaled = (lowest < 0x01000000) & (highest < 0x73000000)
    scale = where(scaled, float32(16777216.0), float32(1.0))
    lowest, highest = bits(from_bits(lowest) * scale), bits(from_bits(highest) * scale)
    span = word(highest - lowest)
    distance = word(span // 252 + 1)
    # Of more than a binade, as many steps in each as there is room for; 255 binades have less than one.
    steps = truncate(float32(8388608.0) / real(distance))
    even = truncate(real(word(steps + 0x7FFFFF)) / real(where(steps == 0, word(steps + 1), steps)))
    distance = where((span > 0x7FFFFF) & (steps > 0), even, distance)
    # From 2^126 on, infinity is the second power of two, and nothing finite may be rounded up to it: the largest number is the
    # last pattern then, and its place is a little too low, as a product of two rounded numbers could be too high.
    extreme = highest > 0x7E7FFFFF
    cramped = extreme & (lowest < 0x02000000)
    distance = where(cramped, word(span // 250), distance)
    inverse = float32(1.0) / real(distance)
    fixed = where(extreme, highest, word((lowest + 0x7FFFFF) & 0x7F800000))
    steps = word(truncate(real(word(fixed - lowest)) * inverse) + where(extreme, word(fixed * 0 + 2), word(fixed * 0 + 1)))
    below = word(steps * distance)
    inverse = where(extreme, inverse * float32(0.99993896484375), inverse)
    # Not where the patterns would begin below zero.
    first = where((below < fixed) & (cramped == 0), word(fixed - below), lowest)
    kept = where(scaled, word(distance + 0x80000000), distance)
    return first, kept, where(bad, float32(0.0), inverse), scale


def base(first, distance):
    """Return the pattern that code 0 would have."""
    return word(first - (distance & 0x7FFFFFFF))


def grid_words(first, distance, highest):
    """Return the words of a block: the pattern that code 0 would have, and the distance."""
    bad = highest > 0x7F7FFFFF
    return where(bad, word(highest * 0 + 0x7FC00000), base(first, distance)), where(bad, word(highest * 0), distance)


def encode_size(x, first, inverse_distance, scale, random):
    """Return the code of ``x`` >= 0, which means ``x`` on the average.

    ``random``: 16 bits, of which a number from 1 to 2 is made: it rounds, and counts the codes from 1.
    """
    place = real(word(bits(x * scale) - first)) * inverse_distance + from_bits(word((random << 7) | 0x3F800040))
    code = truncate(place)
    return where(x == float32(0.0), word(code * 0), code)


def decode_size(code, base, distance):
    """Return the number that a code means."""
    scale = where(distance > 0x7FFFFFFF, float32(5.9604644775390625e-08), float32(1.0))
    return where(code == 0, float32(0.0), from_bits(word(base + code * (distance & 0x7FFFFFFF))) * scale)


def near_root(code, base, distance):
    """Return what is within 7 % of the root of what a code means, times 2^12 where the block is scaled: half of its bit pattern."""
    step = word((distance & 0x7FFFFFFF) >> 1)
    return from_bits(word(word((word(base + (distance & 0x7FFFFFFF)) >> 1) + 0x1FC00000 - step) + code * step))


# --- signed numbers: one binade or several above zero ------------------------------------------------------------------------


def factors(highest, top):
    """Return the word of a block whose largest magnitude has the pattern ``highest``, and the factor that encodes.

    ``top`` is what the largest code means before the factor.
    """
    largest = from_bits(highest)
    usable = (highest > 0x037FFFFF) & (highest < 0x7F800000)  # from 2^-120 on, so that the quotients are finite
    kept = where(usable, largest, float32(1.0))
    factor = where(usable, kept / top, where(highest < 0x7F800000, float32(0.0), from_bits(word(highest * 0 + 0x7FC00000))))
    return factor, where(usable, top / kept, float32(0.0))


def signed_factors(highest):
    """Return :func:`factors` for signed codes."""
    return factors(highest, float32(12.75))


def relative_factors(highest):
    """Return :func:`factors` for relative codes."""
    return factors(highest, float32(2.96875))


def encode_signed(x, inverse_factor, random):
    """Return the code of ``x``; chance decides up or down."""
    pattern = word(bits(float32(1.0) + absolute(x) * inverse_factor) - 0x3F800000)
    size = word(pattern + (random << 2)) >> 18
    return word(where(size > 127, word(size * 0 + 127), size) | ((bits(x) >> 24) & 128))


def decode_signed(code, factor):
    """Return the number that a code means."""
    size = (from_bits(word(0x3F800000 + ((code & 127) << 18))) - float32(1.0)) * factor
    return from_bits(word(bits(size) | ((code & 128) << 24)))


def encode_relative(x, inverse_factor, random):
    """Return the code of the quotient ``x``: the nearest one, but by chance where an average that fades would get stuck.

    A sign, and bits 17 to 23 of one more than the size. To nearest, 16 steps and fewer would keep what loses a thirtieth at
    each step; chance in all of them would cost a third more error. ``random``: 17 bits.
    """
    pattern = bits(float32(1.0) + absolute(x) * inverse_factor)
    pattern = word(pattern + where(pattern < 0x3FA00000, random, word(random * 0 + 0x10000)))
    pattern = where(pattern > 0x407FFFFF, word(pattern * 0 + 0x407FFFFF), pattern)
    return word(((pattern >> 17) & 127) | ((bits(x) >> 24) & 128))


def decode_relative(code, factor, root):
    """Return the number that a code means beside the ``root`` of what is stored."""
    size = (from_bits(word((((code & 127) << 17) ^ 0x800000) + 0x3F800000)) - float32(1.0)) * factor * root
    return from_bits(word(bits(size) | ((code & 128) << 24)))


def quotient(x, root, of):
    """Return what the relative code keeps of ``x``: nothing where the number ``of`` that it is relative to is zero."""
    return where(of == float32(0.0), float32(0.0), x / root)


# --- 16 bits, with or without more bits beside them --------------------------------------------------------------------------


def encode_bfloat16(x, random):
    """Return the bits of ``x`` in bfloat16, rounded up with the chance that keeps the mean; NaN stays NaN."""
    return where(x != x, word(random * 0 + 0x7FC0), word(bits(x) + random) >> 16)


def narrow(x):
    """Return the bits of ``x`` in bfloat16: the nearest, of two the one of the larger pattern; NaN stays NaN."""
    pattern = bits(x)
    return where(x != x, word(pattern * 0 + 0x7FC0), word(pattern + 0x8000) >> 16)


def join_fp32(kept, master):
    """Return the ``master`` of a parameter whose bits are ``kept``, or the parameter where somebody else has written it."""
    return where(narrow(master) == kept, master, from_bits(word(kept << 16)))


def split_fp32(x):
    """Return a parameter's bits, and its master."""
    return narrow(x), x


def join_split16(kept, low):
    """Return the float32 of a parameter's bits and the 16 bits beside it, a signed distance."""
    return from_bits(word((kept << 16) + low))


def split_split16(x):
    """Return a parameter's bits and the distance of ``x`` from it, which 16 bits hold as ties go upward."""
    kept = narrow(x)
    return kept, where(x != x, word(kept * 0), word(bits(x) - (kept << 16)))


def join_split8(kept, low):
    """Return the upper 24 bits of a float32 from a parameter's bits and the 8 bits beside it."""
    return from_bits(word((kept << 16) + (low << 8)))


def split_split8(x, random):
    """Return a parameter's bits and 8 more, of ``x`` rounded to 24 by chance."""
    pattern = word(bits(x) + (random & 255)) >> 8
    kept = where(x != x, word(pattern * 0 + 0x7FC0), word(pattern + 128) >> 8)
    return kept, where(x != x, word(pattern * 0), word(pattern - (kept << 8)))


# --- the same for NumPy, for torch, and as text ------------------------------------------------------------------------------

#: The functions above, callees first.
FUNCTIONS: tuple[Callable[..., Any], ...] = (
    scramble,
    step_key,
    size_bits,
    base,
    grid,
    grid_words,
    encode_size,
    decode_size,
    near_root,
    factors,
    signed_factors,
    relative_factors,
    encode_signed,
    decode_signed,
    encode_relative,
    decode_relative,
    quotient,
    encode_bfloat16,
    narrow,
    join_fp32,
    split_fp32,
    join_split16,
    split_split16,
    join_split8,
    split_split8,
)
#: Bindings for NumPy arrays: the reference.
ARRAYS: dict[str, Callable[..., Any]] = {
    "bits": lambda x: x.view(numpy.uint32),
    "from_bits": lambda b: b.view(numpy.float32),
    "word": lambda x: numpy.asarray(x).astype(numpy.uint32),
    "real": lambda x: x.astype(numpy.float32),
    "truncate": lambda x: x.astype(numpy.int64).astype(numpy.uint32),
    "float32": numpy.float32,
    "where": numpy.where,
    "absolute": numpy.abs,
}

#: Bindings for torch tensors: words are 64-bit integers, because torch does not compute with 32 unsigned bits.
TENSORS: dict[str, Callable[..., Any]] = {
    "bits": lambda x: x.view(torch.int32).to(torch.int64) & 0xFFFFFFFF,
    "from_bits": lambda b: (((b + 0x80000000) & 0xFFFFFFFF) - 0x80000000).to(torch.int32).view(torch.float32),
    "word": lambda x: x & 0xFFFFFFFF,
    "real": lambda x: x.to(torch.float32),
    "truncate": lambda x: x.to(torch.int64),
    # torch divides a plain number by a tensor in two roundings.
    "float32": lambda x: torch.tensor(x, dtype=torch.float32, device="cpu"),
    "where": torch.where,
    "absolute": Tensor.abs,
}


def bound(names: dict[str, Callable[..., Any]]) -> types.SimpleNamespace:
    """Return the functions for arrays or tensors whose operations are ``names``."""
    namespace: dict[str, Any] = {"__builtins__": builtins, **names}
    for function in FUNCTIONS:
        namespace[function.__name__] = types.FunctionType(function.__code__, namespace, function.__name__)
    return types.SimpleNamespace(**{function.__name__: namespace[function.__name__] for function in FUNCTIONS})


def texts(decorator: str, rewrite: ast.NodeTransformer | None = None) -> str:
    """Return the functions as source for a generated file, each under ``decorator``."""
    return "\n\n\n".join(source.texts(function, decorator, rewrite)[-1] for function in FUNCTIONS)
