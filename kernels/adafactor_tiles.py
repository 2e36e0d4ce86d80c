"""How Adafactor's kernels cut parameters into tiles, and the tables that tell them so.

Where the sums of a tensor are put together depends on its shape alone: not on the other tensors, nor on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy
from numpy.typing import NDArray

#: Most elements of a tile: the parameter and the gradient of as many (float32: 512 KiB) stay in a core's second cache.
TILE_ELEMENTS = 65_536
#: Columns of a block of a matrix: four rows of a gradient and the sums of their columns (24 KiB) stay in the first cache, and
#: the sums of columns, 8 bytes for each block of 64 rows, are 3 % of the matrix.
BLOCK_COLUMNS = 1024

#: What a launch points to, by number: addresses of tables, and how long one thread's part of the scratch is.
(
    TILE_TABLE,
    TENSOR_TABLE,
    ADDRESSES,
    ROW_OF_TENSOR,
    COEFFICIENTS,
    TILE_SUMS,
    ROW_SUMS,
    COLUMN_SUMS,
    ROW_FACTORS,
    COLUMN_FACTORS,
    FINISHED,
    STEP_SIZES,
    SCRATCH,
    SCRATCH_LENGTH,
    TENSORS,
    TILES,
    PHASE,
    PROBLEM,
) = range(18)

#: The launches of a step, in order: sums of squares, those of the updates, and the updates themselves.
PHASES = SUMS, UPDATE_SUMS, UPDATES = range(3)

#: The columns of the table of tiles. A tile is a piece of a vector, some whole matrices, or a block of one matrix.
SHAPE, TENSOR, FIRST, MATRIX, MATRICES, ROW, ROWS, COLUMN, COLUMNS, WHOLE, TILE = range(11)
VECTOR, WHOLE_MATRICES, BLOCK = range(3)

#: The columns of the table of tensors: shape, tiles, and where its part of each shared array begins.
(
    HEIGHT,
    WIDTH,
    SIZE,
    FIRST_TILE,
    TILE_COUNT,
    ROW_BLOCKS,
    COLUMN_BLOCKS,
    BLOCK_ROWS,
    FIRST_ROW_FACTOR,
    FIRST_COLUMN_FACTOR,
    FIRST_ROW_SUM,
    FIRST_COLUMN_SUM,
    FIRST_FINISHED,
    TENSOR_ROW,
) = range(14)

#: The columns of the table of coefficients, in float64.
AVERAGING, DECAY, STEP_LIMIT, EPS1, EPS2, THRESHOLD, COEFFICIENT_ROW = range(7)


class Tiles(NamedTuple):
    """The tables of some tensors.

    Args:
        tensors: [tensors, TENSOR_ROW].
        tiles: [tiles, TILE], those of a tensor one after the other.
        row_factors: how many there are in all tensors; likewise the others.
        scratch: most rows, or columns, of a tile of whole matrices.
    """

    tensors: NDArray[numpy.int64]
    tiles: NDArray[numpy.int64]
    row_factors: int
    column_factors: int
    row_sums: int
    column_sums: int
    finished: int
    scratch: int


def cut(shapes: Sequence[tuple[int, ...]]) -> Tiles:
    """Return the tables of tensors of ``shapes``; one of less than two dimensions is a vector, others end in matrices."""
    tensors = numpy.zeros((len(shapes), TENSOR_ROW), numpy.int64)
    tiles: list[NDArray[numpy.int64]] = []
    row_factors = column_factors = row_sums = column_sums = finished = scratch = first_tile = 0
    for index, shape in enumerate(shapes):
        size = math.prod(shape)
        height, width = (shape[-2], shape[-1]) if len(shape) > 1 else (1, size)
        matrices = size // (height * width) if size else 0
        block_columns = max(1, min(width, BLOCK_COLUMNS))
        block_rows = max(1, min(height, TILE_ELEMENTS // block_columns))
        blocks = -(-height // block_rows), -(-width // block_columns)
        if size == 0:
            own = numpy.zeros((0, TILE), numpy.int64)
        elif len(shape) < 2:
            own = _pieces(size)
        elif height * width <= TILE_ELEMENTS:
            own = _whole_matrices(matrices, height, width)
            scratch = max(scratch, int((own[:, MATRICES] * max(height, width)).max()))
        else:
            own = _blocks(matrices, height, width, block_rows, block_columns)
        own[:, TENSOR], own[:, WHOLE] = index, len(own) == 1
        tensors[index] = (
            *(height, width, size, first_tile, len(own), *blocks, block_rows),
            *(row_factors, column_factors, row_sums, column_sums, finished),
        )
        if len(shape) > 1:
            row_factors += matrices * height
            column_factors += matrices * width
        if len(own) and own[0, SHAPE] == BLOCK:
            row_sums += matrices * blocks[1] * height
            column_sums += matrices * blocks[0] * width
            finished += matrices
        finished += 1
        first_tile += len(own)
        tiles.append(own)
    table = numpy.ascontiguousarray(numpy.concatenate([numpy.zeros((0, TILE), numpy.int64), *tiles]))
    return Tiles(tensors, table, row_factors, column_factors, row_sums, column_sums, finished, scratch)


def _pieces(size: int) -> NDArray[numpy.int64]:
    first = numpy.arange(0, size, TILE_ELEMENTS)
    own = numpy.zeros((len(first), TILE), numpy.int64)
    own[:, SHAPE], own[:, FIRST] = VECTOR, first
    own[:, MATRICES], own[:, ROWS] = 1, 1
    own[:, COLUMNS] = numpy.minimum(size - first, TILE_ELEMENTS)
    return own


def _whole_matrices(matrices: int, height: int, width: int) -> NDArray[numpy.int64]:
    together = TILE_ELEMENTS // (height * width)
    first = numpy.arange(0, matrices, together)
    own = numpy.zeros((len(first), TILE), numpy.int64)
    own[:, SHAPE], own[:, FIRST], own[:, MATRIX] = WHOLE_MATRICES, first * height * width, first
    own[:, MATRICES] = numpy.minimum(matrices - first, together)
    own[:, ROWS], own[:, COLUMNS] = height, width
    return own


def _blocks(matrices: int, height: int, width: int, rows: int, columns: int) -> NDArray[numpy.int64]:
    places = numpy.meshgrid(numpy.arange(matrices), numpy.arange(0, height, rows), numpy.arange(0, width, columns), indexing="ij")
    matrix, row, column = (place.reshape(-1) for place in places)
    own = numpy.zeros((len(matrix), TILE), numpy.int64)
    own[:, SHAPE], own[:, FIRST] = BLOCK, (matrix * height + row) * width + column
    own[:, MATRIX], own[:, MATRICES] = matrix, 1
    own[:, ROW], own[:, ROWS] = row, numpy.minimum(height - row, rows)
    own[:, COLUMN], own[:, COLUMNS] = column, numpy.minimum(width - column, columns)
    return own
