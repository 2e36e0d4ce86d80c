"""Tensors into codes and back by operations of torch: for the backends without kernels, and for checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fusedopt.kernels import codes, layout
from fusedopt.kernels.codes import BLOCK
from fusedopt.kernels.formats import Format

#: The codes on tensors; words are 64-bit integers there.
CODES: Any = codes.bound(codes.TENSORS)

_MASK = 0xFFFFFFFF


def key_of(seed: int, index: int) -> int:
    """Return the key of a parameter's random bits: two words, as a 64-bit integer."""
    first = int(CODES.step_key(_word(seed & _MASK), _word(2 * index + 1)))
    second = int(CODES.step_key(_word(first ^ (seed >> 32) & _MASK), _word(2 * index + 2)))
    return (second << 32 | first) - (1 << 64 if second >> 31 else 0)


def _word(number: int) -> Tensor:
    return torch.tensor(number, dtype=torch.int64, device="cpu")


def random_words(key: int, step: int, first: int, count: int, number: int, device: torch.device) -> Tensor:
    """Return the random words of consecutive elements at a step.

    Args:
        key: of the parameter.
        step: 1 at the first.
        first: the index of the first element.
        number: which of the words that an element has.
    """
    index = torch.arange(first, first + count, device=device)
    of_step = CODES.step_key(((key >> 32) + (index >> 32)) & _MASK, step)
    place = (index + key + of_step + codes.NEXT_WORD * number) & _MASK
    words: Tensor = CODES.scramble((place * codes.STRIDE) & _MASK)
    return words


def draw(words: Tensor, slot: int, form: Format) -> Tensor:
    """Return the random bits of the ``slot``-th number of an element that is rounded by chance, which has format ``form``."""
    places, mask = codes.bits_drawn(slot, form.chance)
    return words >> places & mask


def sqrt(x: Tensor) -> Tensor:
    """Return the root, correctly rounded, which torch's own in float32 is not on every processor."""
    return x.double().sqrt().float()


def flat(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """Return the elements of ``tensor`` in the order of the memory of ``torch.empty_like(like)``; of its own (default)."""
    like = tensor if like is None else like
    dense = torch.empty_like(like, dtype=tensor.dtype, requires_grad=False)
    dense.copy_(tensor)
    return dense.as_strided((dense.numel(),), (1,))


def unflat(elements: Tensor, like: Tensor) -> Tensor:
    """Return ``elements`` in the order of the memory of ``torch.empty_like(like)`` as a tensor of its shape."""
    dense = torch.empty_like(like, dtype=elements.dtype, requires_grad=False)
    dense.as_strided((dense.numel(),), (1,)).copy_(elements)
    return dense


def blocks(count: int) -> int:
    """Return how many blocks ``count`` elements take."""
    return -(-count // BLOCK)


def _in_blocks(elements: Tensor) -> Tensor:
    padded = elements.new_zeros(blocks(elements.numel()) * BLOCK)
    padded[: elements.numel()] = elements
    return padded.view(-1, BLOCK)


def words_of(form: Format, parameter: Tensor, words: Tensor | None) -> Tensor:
    """Return the ``words`` of the blocks of this rank, zeros if None, as part of a state of ``parameter``.

    All ranks have as many rows as the one with the most blocks, so that parts of words are as even as those of tensors.
    """
    rows = torch.zeros((blocks(layout.largest_part(parameter)), form.words), dtype=torch.int32, device=parameter.device)
    if words is not None:
        rows[: len(words)] = words
    return layout.rows_as_part(rows, parameter)


def decode(form: Format, elements: Tensor, words: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the numbers that flat codes mean, and what others may be relative to.

    Args:
        elements: codes.
        words: [blocks, words].
        sizes: what the numbers are relative to, or None.
    """
    code = _in_blocks(elements)
    own = None if sizes is None else _in_blocks(sizes)
    value, size = _meaning(form, code, layout.local(words)[: len(code), None], own)
    count = elements.numel()
    return value.reshape(-1)[:count], size.reshape(-1)[:count]


def _meaning(form: Format, elements: Tensor, words: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the numbers that codes of any shape mean, and what others may be relative to.

    ``words`` has one dimension more, and may be broadcast.
    """
    code, parts = elements.long(), (words.long() & _MASK).unbind(-1)
    if form.name in ("size", "root"):
        size = CODES.decode_size(code, *parts)
        return size, CODES.near_root(code, *parts) if form.name == "root" else size
    factor = codes.TENSORS["from_bits"](parts[0])
    if form.name == "relative":
        assert sizes is not None
        value = CODES.decode_relative(code, factor, sizes)
    else:
        value = CODES.decode_signed(code, factor)
    return value, value


def encode(form: Format, elements: Tensor, random: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the codes of flat float32 ``elements``, the words of their blocks, and what others may be relative to.

    Args:
        random: as many random bits an element as ``form`` takes.
        sizes: what the numbers are relative to, or None.
    """
    x, bits = _in_blocks(elements), _in_blocks(random)
    if form.name == "relative":
        assert sizes is not None
        own = _in_blocks(sizes)
        x = CODES.quotient(x, own, own)
    highest = CODES.size_bits(x).amax(1, keepdim=True)
    meant = x
    if form.name in ("size", "root"):
        lowest = ((CODES.size_bits(x) - 1) & _MASK).amin(1, keepdim=True)
        first, distance, *more = CODES.grid((lowest + 1) & _MASK, highest)
        parts = CODES.grid_words(first, distance, highest)
        code = CODES.encode_size(x, first, *more, bits)
        meaning = CODES.near_root if form.name == "root" else CODES.decode_size
        meant = torch.where(x == 0, 0, meaning(code, CODES.base(first, distance), distance))
    else:
        signed = form.name == "signed"
        factor, inverse = (CODES.signed_factors if signed else CODES.relative_factors)(highest)
        parts = (codes.TENSORS["bits"](factor),)
        code = (CODES.encode_signed if signed else CODES.encode_relative)(x, inverse, bits)
    words = torch.cat(parts, dim=1)
    words = (((words + (1 << 31)) & _MASK) - (1 << 31)).int()
    count = elements.numel()
    return code.reshape(-1)[:count].to(torch.uint8), words, meant.reshape(-1)[:count]


def to_bfloat16(elements: Tensor, random: Tensor) -> Tensor:
    """Return flat float32 ``elements`` in bfloat16, rounded by chance."""
    return _as_bfloat16(CODES.encode_bfloat16(elements, random))


def _as_bfloat16(bits: Tensor) -> Tensor:
    return (((bits + (1 << 15)) & 0xFFFF) - (1 << 15)).to(torch.int16).view(torch.bfloat16)


def join(form: Format, parameter: Tensor, master: Tensor) -> Tensor:
    """Return the float32 numbers of a flat bfloat16 ``parameter`` and its ``master``."""
    kept = parameter.view(torch.int16).long() & 0xFFFF
    joined: Tensor = getattr(CODES, f"join_{form.name}")(kept, master if form.name == "fp32" else master.long())
    return joined


def split(form: Format, elements: Tensor, random: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return flat float32 ``elements`` as a bfloat16 parameter and its master."""
    function = getattr(CODES, f"split_{form.name}")
    kept, low = function(elements, random) if form.chance else function(elements)
    if form.name != "fp32":
        width = 8 * (form.master.itemsize if form.master is not None else 0)
        low = (((low + (1 << (width - 1))) & ((1 << width) - 1)) - (1 << (width - 1))).to(form.master)
    return _as_bfloat16(kept), low


def decoded_states(forms: Mapping[str, Format], partners: Mapping[str, str], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the numbers of coded states, flat, by name.

    Args:
        forms: of the coded states.
        partners: what relative states are relative to.
        state: flat codes by name, and the words of their blocks by name and ``_words``.
    """
    padded = {name: _in_blocks(state[name]) for name in forms}
    words = {name: layout.local(state[f"{name}_words"])[: len(own), None] for name, own in padded.items()}
    values = meanings(forms, partners, padded, words)
    return {name: value.reshape(-1)[: state[name].numel()] for name, value in values.items()}


def meanings(
    forms: Mapping[str, Format], partners: Mapping[str, str], states: Mapping[str, Tensor], words: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the numbers of coded states by name.

    Args:
        forms: of the coded states.
        partners: what relative states are relative to.
        states: their codes, of one shape.
        words: of one dimension more: those of each code, or of neighbours that it is broadcast to.
    """
    values: dict[str, Tensor] = {}
    sizes: dict[str, Tensor] = {}
    for name in sorted(forms, key=lambda name: forms[name].name == "relative"):
        of = sizes.get(partners.get(name, ""))
        values[name], sizes[name] = _meaning(forms[name], states[name], words[name], of)
    return values
