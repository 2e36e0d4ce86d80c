"""Adafactor by Numba: up to three launches over the tiles of a bucket, written out, compiled and cached for its formats.

The first sums squares, the second those of updates, the third writes parameters. A tile that holds whole matrices has all
that it needs by itself, and one that is a whole parameter is done within the first launch, while it is in the cache: so
only matrices of more than a tile are read three times. Who finishes the last tile of a matrix, or of a parameter, puts the sums
of all together, in the order of the tiles: results do not depend on threads.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy
import torch

from fusedopt.kernels import adafactor, source
from fusedopt.kernels.adafactor_source import kernel_source

if TYPE_CHECKING:
    from numpy.typing import NDArray


@functools.cache
def _kernel(kind: adafactor.Kind) -> Any:
    return source.load(f"cpu_{kind.name}", kernel_source(kind)).run


def prepare(kind: adafactor.Kind) -> None:
    """Compile the kernel for buckets of ``kind``, or load it from the cache."""
    _kernel(kind)


class _Kept:
    """The arrays that a bucket keeps between launches and steps, and the table of their addresses.

    Args:
        bucket: whose they are.
        workers: most threads that take part.
    """

    def __init__(self, bucket: adafactor.Bucket, workers: int) -> None:
        from fusedopt.kernels import adafactor_tiles as at

        tables, compute = bucket.tables, bucket.kind.compute.name
        self.workers = workers
        self.finished = numpy.zeros(tables.finished, numpy.int64)
        self.arrays = {
            at.TILE_TABLE: tables.tiles,
            at.TENSOR_TABLE: tables.tensors,
            at.TILE_SUMS: numpy.zeros(2 * len(tables.tiles)),
            at.ROW_SUMS: numpy.zeros(tables.row_sums),
            at.COLUMN_SUMS: numpy.zeros(tables.column_sums),
            at.ROW_FACTORS: numpy.zeros(tables.row_factors, compute),
            at.COLUMN_FACTORS: numpy.zeros(tables.column_factors, compute),
            at.FINISHED: self.finished,
            at.STEP_SIZES: numpy.zeros(len(tables.tensors)),
            at.SCRATCH: numpy.zeros(2 * workers * tables.scratch),
        }
        self.problem = numpy.zeros(at.PROBLEM, numpy.int64)
        for place, array in self.arrays.items():
            self.problem[place] = array.ctypes.data
        self.problem[[at.SCRATCH_LENGTH, at.TENSORS, at.TILES]] = tables.scratch, len(tables.tensors), len(tables.tiles)


def _header(problem: NDArray[numpy.int64], tiles: NDArray[numpy.int64], workers: int) -> NDArray[numpy.int64]:
    from fusedopt.kernels import cpu_runtime as runtime

    header = numpy.zeros(runtime.CLAIMED + runtime.LINE * workers, numpy.int64)
    # What a thread takes in one launch is in its cache at the next.
    header[runtime.REGIONS] = workers
    header[runtime.CHUNKS] = len(tiles)
    header[runtime.ADDRESS_TABLE], header[runtime.CHUNK_TABLE] = problem.ctypes.data, tiles.ctypes.data
    header[runtime.BATCH] = max(1, len(tiles) // (12 * workers))
    return header


def run(bucket: adafactor.Bucket, launch: adafactor.Launch) -> None:
    """Update the active tensors of ``bucket`` in place."""
    from fusedopt.kernels import adafactor_tiles as at
    from fusedopt.kernels import threads

    workers = torch.get_num_threads()
    kept = bucket.kept
    if kept is None or kept.workers != workers:
        kept = bucket.kept = _Kept(bucket, workers)
    tables = (launch.addresses, launch.row_of_tensor, launch.coefficients)
    kept.finished[:] = 0
    for phase, tiles in zip(at.PHASES, launch.tiles, strict=True):
        if len(tiles):
            problem = kept.problem.copy()  # each launch has its own, which a thread may still read when the next one begins
            for place, table in zip((at.ADDRESSES, at.ROW_OF_TENSOR, at.COEFFICIENTS), tables, strict=True):
                problem[place] = table.ctypes.data
            problem[at.PHASE] = phase
            header = _header(problem, tiles, workers)
            threads.run(_kernel(bucket.kind), header, (kept, problem, tiles, *tables), launch.elements, workers)
