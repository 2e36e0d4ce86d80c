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

_TEMPLATE = """\
@njit(**JIT)
def update_block(addresses, tensor, start, count, key, other_key{coefficient_arguments}):
    {before}
    for i in range(count):
        {update}
    {after}


@njit(**JIT)
def update_chunk(addresses, tensor, start, count, c):
    {coefficients}
    {keys}
    for first in range(0, count, {block}):
        update_block(addresses, tensor, start + first, min({block}, count - first), key, other_key{coefficient_arguments})
"""


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
        lines.append(f"random_{number} = scramble(moved(index, i), key, {other})")
        if number in kept:
            lines.append(f"random_{number}_kept[i] = random_{number}")
    return lines


def update_chunk(kind: Kind, gradient: list[str]) -> str:
    """Return the text of ``update_chunk`` for ``kind``, which is coded.

    Args:
        gradient: lines that follow the loads.
    """
    compute = kind.compute.name
    arrays = list(zip(generate.arrays(kind.update), kind.formats, strict=True))
    row_of = {name: 2 + at for at, name in enumerate(kind.tensors)}
    slots = {array: slot for slot, (array, form) in enumerate((a, f) for a, f in arrays if f.chance)}
    partners = {f"s_{state}": f"s_{partner}" for state, partner in kind.update.rule.relative.items()}
    before, update, stores, sizes, signed = [], [], [], [], []
    if kind.chance:
        before.append(f"index = word(start + addresses[{3 + len(kind.tensors)}, tensor])")
    # A relative number is decoded after the root that it is relative to.
    for at, (array, form) in sorted(enumerate(arrays), key=lambda each: each[1][1].name == "relative"):
        pointer = "cpu_codes.uint8_pointer" if form.words else f"runtime.{form.plain}_pointer"
        before.append(f"{array}_array = carray({pointer}(addresses[{at}, tensor] + {form.itemsize} * start), count)")
        if form.master is not None:
            pointer = f"cpu_codes.{str(form.master).removeprefix('torch.')}_pointer"
            master = f"addresses[{row_of['master']}, tensor] + {form.master.itemsize} * start"
            before.append(f"p_master = carray({pointer}({master}), count)")
            given = "p_master[i]" if form.name == "fp32" else "word(p_master[i])"
            update.append(f"p = join_{form.name}(word(p_array[i]), {given})")
            continue
        if not form.words:
            update.append(f"{array} = {compute}(runtime.load_{form.plain}({array}_array, i))")
            continue
        words = f"addresses[{row_of[f'{array[2:]}_words']}, tensor] + {4 * form.words} * (start // {BLOCK})"
        before += [
            f"{array}_words = carray(cpu_codes.uint32_pointer({words}), {form.words})",
            f"{array}_new = carray(cpu_codes.float32_room(), {BLOCK})",
            f"{array}_highest = word(0)",
            *(f"{array}_{part} = {array}_words[{at}]" for at, part in enumerate(form.parts)),
        ]
        code = f"word({array}_array[i])"
        if form.name in ("size", "root"):
            before.append(f"{array}_lowest = word(0xFFFFFFFF)")
            update.append(f"{array}_root = decode_size({code}, {array}_base, {array}_distance)")
            update.append(f"{array} = {array}_root" + (f" * {array}_root" if form.name == "root" else ""))
        elif form.name == "relative":
            update.append(f"{array} = decode_relative({code}, from_bits({array}_factor), {partners[array]}_root)")
        else:
            update.append(f"{array} = decode_signed({code}, from_bits({array}_factor))")
        if form.name == "root":
            stores.append(f"new_{array} = sqrt(new_{array})")
        stores.append(f"{array}_new[i] = new_{array}")
        if form.name != "relative":
            stores.append(f"{array}_bits = size_bits(new_{array})")
            stores.append(f"{array}_highest = higher({array}_highest, {array}_bits)")
        if form.name in ("size", "root"):
            stores.append(f"{array}_lowest = lower({array}_lowest, word({array}_bits - 1))")
            sizes.append((array, form))
        else:
            signed.append((array, form))
    at_once = [slots[array] for array, form in arrays if form.chance and not form.words]
    loops = [at_once, *([slots[array]] for array, _ in (*sizes, *signed))]
    needed = [number for loop in loops for number in {slot // 2 for slot in loop}]
    kept = {number for number in needed if needed.count(number) > 1}
    drawn: set[int] = set()
    before += [f"random_{number}_kept = carray(cpu_codes.uint32_room(), {BLOCK})" for number in sorted(kept)]
    stores += _draw(at_once, drawn, kept)
    for array, form in arrays:
        if form.words or array == "g":
            continue
        if form.master is not None:
            given = f"new_p, {_half(slots['p'])}" if form.chance else "new_p"
            stores.append(f"p_array[i], p_master[i] = split_{form.name}({given})")
        elif form.chance:
            stores.append(f"{array}_array[i] = encode_bfloat16(new_{array}, {_half(slots[array])})")
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
            f"{array}_new_factor, {array}_inverse = {form.name}_factors({array}_highest)",
            f"{array}_words[0] = bits({array}_new_factor)",
            "for i in range(count):",
            *(f"    {line}" for line in _draw([slots[array]], drawn, kept)),
            f"    {array}_array[i] = encode_{form.name}({array}_new[i], {array}_inverse, {_half(slots[array])})",
        ]
    names = generate.coefficient_names(kind.update)
    keys = ["key = word(0)", "other_key = word(0)"]
    if kind.chance:
        row = 2 + len(kind.tensors)
        keys = [
            f"key = word(addresses[{row}, tensor])",
            f"high = word((start + addresses[{row + 1}, tensor]) >> 32)",
            f"other_key = step_key(word(word(addresses[{row}, tensor] >> 32) + high), word(c[{len(names)}]))",
        ]
    return _TEMPLATE.format(
        coefficient_arguments="".join(f", {name}" for name in names),
        before=generate.indent(before, 4),
        update=generate.indent([*update, *gradient, *generate.element(kind.update), *stores], 8),
        after=generate.indent(after, 4),
        coefficients=generate.indent([f"{name} = c[{i}]" for i, name in enumerate(names)], 4),
        keys=generate.indent(keys, 4),
        block=BLOCK,
    )
