"""The loops of Numba kernels whose numbers are rounded by chance or kept in blocks of codes.

A block is decoded, updated and encoded in three loops, each of which vectorises: one over what the rule computes, which
finds the range of the block on the way; one that encodes sizes; and one for signed numbers, whose quotients by the stored
sizes are known only then. In between, a block lies on the stack. Some blocks take each of the loops in turn, so that a
processor begins the next one while the range of the last is on its way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusedopt.kernels import generate
from fusedopt.kernels.codes import BLOCK, NEXT_WORD, STRIDE
from fusedopt.kernels.cpu_codes import GROUP

if TYPE_CHECKING:
    from fusedopt.kernels.tables import Kind

_TEMPLATE = """\
@njit(**JIT)
def update_group(addresses, tensor, start, count, index{coefficient_arguments}):
    blocks = (count + {last_of_block}) // {block}
    {before}
    {loops}


@njit(**JIT)
def update_chunk(addresses, tensor, start, count, c):
    {coefficients}
    {index}
    for first in range(0, count, {group}):
        update_group(addresses, tensor, start + first, min({group}, count - first), moved(index, first){coefficient_arguments})
"""


def _draw(slots: list[int], drawn: set[int], kept: set[int]) -> tuple[list[str], list[str]]:
    """Return lines that have the random words of ``slots``, drawn where they are new and kept for later loops.

    Returns:
        Those before the loop over the elements of a block, and those in it.
    """
    before, body = [], []
    for number in sorted({slot // 2 for slot in slots}):
        if number in drawn:
            body.append(f"random_{number} = random_{number}_kept[i]")
            continue
        drawn.add(number)
        before.append(f"place_{number} = word(word(index_of_block + {NEXT_WORD * number % 2**32}) * {STRIDE})")
        body += [f"random_{number} = scramble(place_{number})", f"place_{number} = word(place_{number} + {STRIDE})"]
        if number in kept:
            body.append(f"random_{number}_kept[i] = random_{number}")
    return before, body


def _loop(rows: list[str], before: list[str], body: list[str], after: list[str]) -> list[str]:
    """Return the lines of a loop over the elements of each block of a group.

    Args:
        rows: what opens the arrays of the block.
    """
    # An element is counted from the first of its block: only of what begins at zero does Numba know that it is not negative.
    return [
        "for block in range(blocks):",
        f"    first, size = {BLOCK} * block, min({BLOCK}, count - {BLOCK} * block)",
        "    index_of_block = moved(index, first)",
        *(f"    {line}" for line in (*rows, *before)),
        "    for i in range(size):",
        *(f"        {line}" for line in body),
        *(f"    {line}" for line in after),
    ]


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
    roots = {array for array, form in arrays if form.name == "root"}
    rooms: list[str] = []
    rows: dict[str, list[str]] = {}  # what opens the arrays of a block, by array
    before, update, stores, after = [], [], [], []  # of the loop over what the rule computes
    sizes, signed = [], []
    # A relative number is decoded after the size that it is relative to.
    for at, (array, form) in sorted(enumerate(arrays), key=lambda each: each[1][1].name == "relative"):
        pointer = "cpu_codes.uint8_pointer" if form.words else f"runtime.{form.plain}_pointer"
        rows[array] = [f"{array}_array = carray({pointer}(addresses[{at}, tensor] + {form.itemsize} * (start + first)), size)"]
        if form.master is not None:
            pointer = f"cpu_codes.{str(form.master).removeprefix('torch.')}_pointer"
            master = f"addresses[{row_of['master']}, tensor] + {form.master.itemsize} * (start + first)"
            rows[array].append(f"p_master = carray({pointer}({master}), size)")
            given = "p_master[i]" if form.name == "fp32" else "word(p_master[i])"
            update.append(f"p = join_{form.name}(word(p_array[i]), {given})")
            continue
        if not form.words:
            update.append(f"{array} = {compute}(runtime.load_{form.plain}({array}_array, i))")
            continue
        words = f"addresses[{row_of[f'{array[2:]}_words']}, tensor] + {4 * form.words} * (start // {BLOCK})"
        rooms += [
            f"{array}_words = carray(cpu_codes.uint32_pointer({words}), (blocks, {form.words}))",
            f"{array}_room = carray(cpu_codes.float32_room(), ({GROUP}, {BLOCK}))",
            f"{array}_highest_of = carray(cpu_codes.word_room(), {GROUP})",
        ]
        rows[array].append(f"{array}_new = {array}_room[block]")
        before += [f"{array}_{part} = {array}_words[block, {at}]" for at, part in enumerate(form.parts)]
        code = f"word({array}_array[i])"
        if form.name in ("size", "root"):
            update.append(f"{array} = decode_size({code}, {array}_base, {array}_distance)")
        elif form.name == "relative":
            partner = partners[array]
            root = f"near_root(word({partner}_array[i]), {partner}_base, {partner}_distance)" if partner in roots else partner
            update.append(f"{array} = decode_relative({code}, from_bits({array}_factor), {root})")
        else:
            update.append(f"{array} = decode_signed({code}, from_bits({array}_factor))")
        stores.append(f"{array}_new[i] = new_{array}")
        if form.name != "relative":
            before.append(f"{array}_highest = word(0)")
            stores.append(f"{array}_bits = size_bits(new_{array})")
            stores.append(f"{array}_highest = higher({array}_highest, {array}_bits)")
            after.append(f"{array}_highest_of[block] = {array}_highest")
        if form.name in ("size", "root"):
            rooms.append(f"{array}_lowest_of = carray(cpu_codes.word_room(), {GROUP})")
            before.append(f"{array}_lowest = word(0xFFFFFFFF)")
            stores.append(f"{array}_lowest = lower({array}_lowest, word({array}_bits - 1))")
            after.append(f"{array}_lowest_of[block] = {array}_lowest")
            sizes.append((array, form))
        else:
            signed.append((array, form))
    at_once = [slots[array] for array, form in arrays if form.chance and not form.words]
    loops = [at_once, *([slots[array]] for array, _ in (*sizes, *signed))]
    needed = [number for loop in loops for number in {slot // 2 for slot in loop}]
    kept = {number for number in needed if needed.count(number) > 1}
    drawn: set[int] = set()
    rooms += [f"random_{number}_room = carray(cpu_codes.uint32_room(), ({GROUP}, {BLOCK}))" for number in sorted(kept)]
    random_rows = [f"random_{number}_kept = random_{number}_room[block]" for number in sorted(kept)]
    places, draws = _draw(at_once, drawn, kept)
    before += places
    stores += draws
    for array, form in arrays:
        if form.words or array == "g":
            continue
        if form.master is not None:
            given = f"new_p, {generate.draw(slots['p'], form)}" if form.chance else "new_p"
            stores.append(f"p_array[i], p_master[i] = split_{form.name}({given})")
        elif form.chance:
            stores.append(f"{array}_array[i] = encode_bfloat16(new_{array}, {generate.draw(slots[array], form)})")
        else:
            stores.append(f"runtime.store_{form.name}({array}_array, i, new_{array})")
    opened = [line for lines in rows.values() for line in lines] + random_rows
    lines = _loop(opened, before, [*update, *gradient, *generate.element(kind.update), *stores], after)
    relatives = [array for array, form in signed if form.name == "relative"]
    for array, form in sizes:
        places, draws = _draw([slots[array]], drawn, kept)
        before = [
            *places,
            f"least, distance, inverse, scale = grid(word({array}_lowest_of[block] + 1), {array}_highest_of[block])",
            f"{array}_words[block, 0], {array}_words[block, 1] = grid_words(least, distance, {array}_highest_of[block])",
            "of_zero = base(least, distance)",
        ]
        body = [
            *draws,
            f"code = encode_size({array}_new[i], least, inverse, scale, {generate.draw(slots[array], form)})",
            f"{array}_array[i] = code",
        ]
        opened, after = [*rows[array], *random_rows], []
        for each in (each for each in relatives if partners[each] == array):
            opened += rows[each]
            before.append(f"{each}_highest = word(0)")
            root = f"{'near_root' if array in roots else 'decode_size'}(code, of_zero, distance)"
            body += [
                f"{each}_quotient = quotient({each}_new[i], {root}, {array}_new[i])",
                f"{each}_new[i] = {each}_quotient",
                f"{each}_highest = higher({each}_highest, size_bits({each}_quotient))",
            ]
            after.append(f"{each}_highest_of[block] = {each}_highest")
        lines += _loop(opened, before, body, after)
    for array, form in signed:
        places, draws = _draw([slots[array]], drawn, kept)
        before = [
            *places,
            f"factor, inverse = {form.name}_factors({array}_highest_of[block])",
            f"{array}_words[block, 0] = bits(factor)",
        ]
        body = [
            *draws,
            f"{array}_array[i] = encode_{form.name}({array}_new[i], inverse, {generate.draw(slots[array], form)})",
        ]
        lines += _loop([*rows[array], *random_rows], before, body, [])
    names = generate.coefficient_names(kind.update)
    index = ["index = word(0)"]
    if kind.chance:
        row = 2 + len(kind.tensors)
        index = [
            f"place, key = start + addresses[{row + 1}, tensor], addresses[{row}, tensor]",
            f"of_step = step_key(word(word(key >> 32) + word(place >> 32)), word(c[{len(names)}]))",
            "index = word(word(place) + word(word(key) + of_step))",
        ]
    return _TEMPLATE.format(
        coefficient_arguments="".join(f", {name}" for name in names),
        before=generate.indent(rooms, 4),
        loops=generate.indent(lines, 4),
        coefficients=generate.indent([f"{name} = c[{i}]" for i, name in enumerate(names)], 4),
        index=generate.indent(index, 4),
        block=BLOCK,
        last_of_block=BLOCK - 1,
        group=GROUP * BLOCK,
    )
