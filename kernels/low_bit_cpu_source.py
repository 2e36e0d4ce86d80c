"""The loops of Numba kernels whose numbers are rounded by chance or kept in blocks of codes.

A block is decoded, updated and encoded in three loops, each of which vectorises: one over what the rule computes, which
finds the range of each block on the way; one that encodes sizes and roots; and one for signed numbers, whose quotients by
the stored roots are known only then. In between, a block lies on the stack.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusedopt.kernels import generate
from fusedopt.kernels.codes import BLOCK

if TYPE_CHECKING:
    from fusedopt.kernels.tables import Kind

_TEMPLATE = '''\
@njit(**JIT)
def update_block(addresses, tensor, start, count, key, other_key{coefficient_arguments}):
    index = word(start)
    {open_arrays}
    {before}
    for i in range(count):
        {update}
    {after}


@njit(**JIT)
def update_chunk(addresses, tensor, start, count, c):
    {coefficients}
    key = word(addresses[{key_row}, tensor])
    other_key = step_key(word(addresses[{key_row}, tensor] >> 32), c_step)
    for first in range(0, count, {block}):
        update_block(addresses, tensor, start + first, min({block}, count - first), key, other_key{coefficient_arguments})
'''


def _half(slot: int) -> str:
    """Return the expression for the 16 random bits of the ``slot``-th number that is rounded by chance."""
    return f"word(random_{slot // 2} >> 16)" if slot % 2 == 0 else f"word(random_{slot // 2} & 65535)"


def _draw(slots: list[int], drawn: set[int], kept: set[int]) -> list[str]:
    """Return lines that have the random words of ``slots``: drawn where they are new, and kept for later loops."""
    lines = []
    for number in sorted({slot // 2 for slot in slots}):
        if number in drawn:
            lines.append(f"random_{number} = random_{number}_kept[i]")
            continue
        drawn.add(number)
        other = f"word(other_key + {0x3C6EF372 * number % 2**32})" if number else "other_key"
        lines.append(f"random_{number} = scramble(word(index + word(i)), key, {other})")
        if number in kept:
            lines.append(f"random_{number}_kept[i] = random_{number}")
    return lines


def update_chunk(kind: Kind, unscale: list[str]) -> str:
    """Return the text of ``update_chunk`` for ``kind``, some of whose formats have codes."""
    compute = kind.compute.name
    arrays = list(zip(generate.arrays(kind.update), kind.formats, strict=True))
    slots = {array: slot for slot, (array, form) in enumerate((a, f) for a, f in arrays if f.chance)}
    partners = {f"s_{state}": f"s_{partner}" for state, partner in kind.update.relative.items()}
    before, update, stores, sizes, signed = [], [], [], [], []
    word_rows = {array: len(arrays) + at for at, array in enumerate(array for array, form in arrays if form.words)}
    open_arrays = [
        f"{array}_array = carray(runtime.{form.pointer}(addresses[{at}, tensor] + {form.itemsize} * start), count)"
        for at, (array, form) in enumerate(arrays)
    ]
    # A relative number is decoded after the root that it is relative to.
    for array, form in sorted(arrays, key=lambda pair: pair[1].name == "relative"):
        if not form.words:
            update.append(f"{array} = {compute}(runtime.load_{form.plain}({array}_array, i))")
            continue
        open_arrays.append(
            f"{array}_words = carray(runtime.uint32_pointer(addresses[{word_rows[array]}, tensor] + {4 * form.words} * (start // {BLOCK})), "
            f"{form.words})"
        )
        before += [
            f"{array}_new = carray(runtime.scratch(), {BLOCK})",
            f"{array}_highest = word(0)",
            *(f"{array}_{part} = {array}_words[{at}]" for at, part in enumerate(form.parts)),
        ]
        code = f"word({array}_array[i])"
        if form.name in ("size", "root"):
            before.append(f"{array}_lowest = word(0xFFFFFFFF)")
            update.append(f"{array}_root = decode_size({code}, {array}_base, {array}_distance)")
            update.append(f"{array} = {array}_root" + (f" * {array}_root" if form.name == "root" else ""))
        elif form.name == "relative":
            before.append(f"{array}_factor = from_bits({array}_factor)")
            update.append(f"{array} = decode_relative({code}, {array}_factor, {partners[array]}_root)")
        else:
            before.append(f"{array}_factor = from_bits({array}_factor)")
            update.append(f"{array} = decode_signed({code}, {array}_factor)")
        if form.name == "root":
            stores.append(f"new_{array} = sqrt(new_{array})")
        stores.append(f"{array}_new[i] = new_{array}")
        if form.name != "relative":
            stores.append(f"{array}_bits = size_bits(new_{array})")
        if form.name in ("size", "root"):
            stores.append(f"{array}_lowest = lower({array}_lowest, word({array}_bits - 1))")
            sizes.append((array, form))
        else:
            signed.append((array, form))
        if form.name != "relative":
            stores.append(f"{array}_highest = higher({array}_highest, {array}_bits)")
    at_once = [slots[array] for array, form in arrays if form.chance and not form.words]
    loops = [at_once, *([slots[array]] for array, _ in (*sizes, *signed))]
    words = [number for loop in loops for number in {slot // 2 for slot in loop}]
    kept = {number for number in words if words.count(number) > 1}
    drawn: set[int] = set()
    before += [f"random_{number}_kept = carray(runtime.random_scratch(), {BLOCK})" for number in sorted(kept)]
    stores += _draw(at_once, drawn, kept)
    for array, form in arrays:
        if form.words or array == "g":
            continue
        if form.chance:
            stores.append(f"runtime.store_{form.name}({array}_array, i, new_{array}, {_half(slots[array])})")
        else:
            stores.append(f"runtime.store_{form.name}({array}_array, i, new_{array})")
    after = []
    relatives = [array for array, form in signed if form.name == "relative"]
    for array, form in sizes:
        after += [
            f"{array}_first, {array}_distance = grid(word({array}_lowest + 1), {array}_highest)",
            f"{array}_words[0], {array}_words[1] = grid_words({array}_first, {array}_distance, {array}_highest)",
            f"{array}_inverse = float32(1.0) / real({array}_distance)",
            "for i in range(count):",
            *(f"    {line}" for line in _draw([slots[array]], drawn, kept)),
            f"    code, size = encode_{form.name}({array}_new[i], {array}_first, {array}_distance, {array}_inverse, "
            f"{_half(slots[array])})",
            f"    {array}_array[i] = code",
        ]
        for each in relatives:
            if partners[each] == array:
                after += [
                    f"    {each}_quotient = quotient({each}_new[i], size)",
                    f"    {each}_new[i] = {each}_quotient",
                    f"    {each}_bits = size_bits({each}_quotient)",
                    f"    {each}_highest = higher({each}_highest, {each}_bits)",
                ]
    for array, form in signed:
        after += [
            f"{array}_factor, {array}_inverse = {form.name}_factors({array}_highest)",
            f"{array}_words[0] = bits({array}_factor)",
            "for i in range(count):",
            *(f"    {line}" for line in _draw([slots[array]], drawn, kept)),
            f"    {array}_array[i] = encode_{form.name}({array}_new[i], {array}_inverse, {_half(slots[array])})",
        ]
    names = generate.coefficient_names(kind.update)
    return _TEMPLATE.format(
        coefficient_arguments="".join(f", {name}" for name in names),
        before=generate.indent(before, 4),
        update=generate.indent([*update, *unscale, *generate.element(kind.update), *stores], 8),
        after=generate.indent(after, 4),
        open_arrays=generate.indent(open_arrays, 4),
        coefficients=generate.indent([f"{name} = c[{i}]" for i, name in enumerate(names)] + [f"c_step = word(c[{len(names)}])"], 4),
        key_row=len(arrays) + len(word_rows),
        block=BLOCK,
    )
