"""The words of blocks of codes as checkpoints hold them: in tables that are cut into shards as the tensor is itself.

A block is 256 neighbours in the memory of one rank. Where a tensor is cut into other shards, blocks are others, and who reads
a part of it needs the words of blocks that began in another. So a checkpoint has, for each index of dimension 0, which is a row
here, the words of all blocks that the row lies in: by them any rank decodes its rows, and where it cuts them as the writer
did, it has the writer's own codes and words again.

A line of a table begins with a heading: the place in its first block where the row begins, in 8 bits, and above it the
order of the tensor's dimensions in memory, zero for that of a contiguous tensor. The words follow, block by block.

Some tensors are no rows of neighbours, as their dimension 0 is not the outermost in memory or they are cut along another; of
many short rows the table would be larger than the numbers themselves. There a line is for the whole part of a rank, and only
parts of the same sizes can read it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fusedopt.kernels import blocks, layout
from fusedopt.kernels.codes import BLOCK
from fusedopt.kernels.formats import Format

#: Elements, and rows: a line of 20 bytes for a row of 64 codes adds a third to them; more than that only small tensors may take.
_SHORT_ROW, _MANY_ROWS = 64, 1 << 16
#: Bits of a digit in the order of dimensions, and dimensions that it can hold.
_DIGIT, _DIMENSIONS = 3, 7
#: Elements that are decoded at a time where each has words of its own.
_AT_ONCE = 1 << 20


def packed(forms: Mapping[str, Format], state: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``state`` with copies of its codes, which a later step would change, and tables in the place of words.

    Args:
        forms: of the states that are kept in codes.
        state: of one parameter.
    """
    found = dict(state)
    for name, form in forms.items():
        codes, words = state[name], state[f"{name}_words"]
        # Also of what was loaded: the next step writes its codes into the same memory.
        found[name], found[f"{name}_words"] = codes.clone(), words.clone() if _is_table(form, words) else _table(codes, words)
    return found


def unpacked(
    forms: Mapping[str, Format], partners: Mapping[str, str], state: Mapping[str, Any], parameter: Tensor
) -> dict[str, Tensor]:
    """Return what of ``state`` a checkpoint has brought, as steps take it: nothing where it holds no table.

    Codes and words where blocks are cut as they were; else numbers in float32, without words.

    Args:
        forms: of the states that are kept in codes.
        partners: what relative states are relative to.
        state: of one parameter.
        parameter: whose state it is.

    Raises:
        RuntimeError: if codes are not sharded as the parameter is, or only shards of other sizes could read their words.
    """
    if not any(_is_table(form, state[f"{name}_words"]) for name, form in forms.items()):
        return {}
    parts, tables = {}, {}
    for name in forms:
        words = state[f"{name}_words"]
        table = words if _is_table(forms[name], words) else _table(state[name], words)
        _check(name, state[name], table, forms[name], parameter)
        tables[name] = layout.local(table).reshape(-1, table.shape[-1])
        parts[name] = _in_order(layout.local(state[name]), tables[name])
    codes = {name: blocks.flat(part).view(*_rows_and_columns(state[name])) for name, part in parts.items()}
    if not all(_same_blocks(tables[name], codes[name]) for name in forms):
        values = _decoded(forms, partners, codes, tables)
        return {name: layout.as_part(blocks.unflat(value, parts[name]), parameter) for name, value in values.items()}
    found = {}
    for name, form in forms.items():
        found[name] = layout.as_part(parts[name], parameter)
        found[f"{name}_words"] = blocks.words_of(form, parameter, _words(form, tables[name], codes[name].shape[1]))
    return found


def _is_table(form: Format, words: Tensor) -> bool:
    return words.shape[-1] != form.words


def _in_rows(codes: Tensor) -> bool:
    """Whether a row of ``codes`` has a line; the same on all ranks, and for any sharding that begins with dimension 0."""
    rows, columns = codes.shape[0], math.prod(codes.shape[1:])
    neighbours = rows == 1 or codes.stride(0) == columns
    return neighbours and set(layout.cuts(codes)[1:]) <= {1} and (columns >= _SHORT_ROW or rows <= _MANY_ROWS)


def _rows_and_columns(codes: Tensor) -> tuple[int, int]:
    """Return how many lines this rank's part of ``codes`` has, and of how many elements each is."""
    part = layout.local(codes)
    return (len(part), math.prod(part.shape[1:])) if _in_rows(codes) else (1, part.numel())


def _most_blocks(codes: Tensor) -> int:
    """Return how many blocks a row of ``codes`` lies in at most, or a rank's part where it has the line."""
    if not _in_rows(codes):
        return blocks.blocks(layout.largest_part(codes))
    return blocks.blocks(math.prod(codes.shape[1:]) - 1) + 1


def _table_shape(codes: Tensor, width: int) -> tuple[int, ...]:
    count = 1 + width * _most_blocks(codes)
    return (codes.shape[0], count) if _in_rows(codes) else (*layout.cuts(codes), count)


def _table(codes: Tensor, words: Tensor) -> Tensor:
    """Return the ``words`` of the blocks of ``codes`` as a table."""
    part, own = layout.local(codes), layout.local(words)
    rows, columns = _rows_and_columns(codes)
    first = torch.arange(rows, device=part.device)[:, None] * columns
    block = first // BLOCK + torch.arange(_most_blocks(codes), device=part.device)
    lies_in = block * BLOCK < first + columns
    lines = own[torch.where(lies_in, block, 0)] * lies_in[:, :, None]
    heading = first % BLOCK | _order(part) << 8
    table = torch.cat([heading.int(), lines.flatten(1)], dim=1)
    shape = _table_shape(codes, own.shape[1])
    return layout.as_part(table if _in_rows(codes) else table.view(*(1 for _ in part.shape), -1), codes, shape)


def _order(part: Tensor) -> int:
    """Return the order of the dimensions of ``part`` in memory, the outermost first, in octal digits; 0 if it is contiguous."""
    if part.is_contiguous():
        return 0
    dimensions = sorted(_dimensions(part), key=part.stride, reverse=True)
    if len(dimensions) > _DIMENSIONS:
        raise RuntimeError(
            f"a checkpoint of 8-bit states has no words for the strides {part.stride()} of a parameter of shape "
            f'{tuple(part.shape)}: make it contiguous, or save state_dict(format="torch")'
        )
    return sum(dimension << _DIGIT * place for place, dimension in enumerate(reversed(dimensions)))


def _dimensions(part: Tensor) -> list[int]:
    return [dimension for dimension, size in enumerate(part.shape) if size > 1]


def _in_order(part: Tensor, table: Tensor) -> Tensor:
    """Return the codes ``part`` in the memory that they were in when ``table`` was made."""
    order = int(table[0, 0]) >> 8 if len(table) else 0
    if _order(part) == order and layout.is_dense(part):
        return part
    outer = _dimensions(part)
    if order:
        outer = [order >> _DIGIT * place & (1 << _DIGIT) - 1 for place in reversed(range(len(outer)))]
    order_of_all = [*outer, *(dimension for dimension in range(part.dim()) if dimension not in outer)]
    inverse = sorted(range(part.dim()), key=order_of_all.__getitem__)
    return part.permute(order_of_all).contiguous().permute(inverse)


def _check(name: str, codes: Tensor, table: Tensor, form: Format, parameter: Tensor) -> None:
    what = f"the codes of the state {name!r} of a parameter of shape {tuple(parameter.shape)}"
    if codes.shape != parameter.shape:
        raise RuntimeError(f"{what} have shape {tuple(codes.shape)}: load a checkpoint of the same model, or delete this state")
    if not layout.same_shards(codes, parameter) or layout.cuts(table)[:1] != layout.cuts(codes)[:1]:
        raise RuntimeError(
            f"{what} are not sharded as the parameter is: load the checkpoint by set_optimizer_state_dict of "
            "torch.distributed.checkpoint.state_dict, or delete this state"
        )
    expected = _table_shape(codes, form.words)
    if table.shape != expected:
        raise RuntimeError(
            f"{what} have words of shape {tuple(table.shape)}, where {expected} are asked for: they were cut into blocks in parts "
            'of other sizes, or in another layout, and cannot be read in these; save state_dict(format="torch") where the '
            "checkpoint was written, and load that"
        )


def _same_blocks(table: Tensor, codes: Tensor) -> bool:
    """Whether blocks of [rows, columns] ``codes``, beginning with the first of this rank, are those of ``table``."""
    rows, columns = codes.shape
    own = torch.arange(rows, device=table.device) * columns % BLOCK
    return torch.equal(table[:, 0].long() & BLOCK - 1, own)


def _words(form: Format, table: Tensor, columns: int) -> Tensor:
    """Return the words of this rank's blocks out of ``table``, whose blocks are the same."""
    first = torch.arange(0, len(table) * columns, BLOCK, device=table.device)
    row = first // columns if columns else first
    block = ((table[row, 0].long() & BLOCK - 1) + first - row * columns) // BLOCK
    return _lines(form, table)[row, block]


def _lines(form: Format, table: Tensor) -> Tensor:
    """Return [rows, blocks, words] of ``table``."""
    return table[:, 1:].reshape(len(table), (table.shape[1] - 1) // form.words, form.words)


def _decoded(
    forms: Mapping[str, Format], partners: Mapping[str, str], codes: Mapping[str, Tensor], tables: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the numbers of [rows, columns] ``codes``, flat, each by the words of its own block."""
    own = next(iter(codes.values()))
    columns = own.shape[1]
    found: dict[str, list[Tensor]] = {name: [] for name in forms}
    for rows in torch.arange(len(own), device=own.device).split(max(1, _AT_ONCE // max(1, columns))):
        words = {}
        for name, table in tables.items():
            place = (table[rows, :1].long() & BLOCK - 1) + torch.arange(columns, device=own.device)
            words[name] = _lines(forms[name], table[rows]).gather(1, (place // BLOCK)[:, :, None].expand(-1, -1, forms[name].words))
        values = blocks.meanings(forms, partners, {name: each[rows] for name, each in codes.items()}, words)
        for name, value in values.items():
            found[name].append(value)
    return {name: torch.cat(values).reshape(-1) for name, values in found.items()}
