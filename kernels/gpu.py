"""The Triton backend: a launch over all chunks of a bucket, and what the host keeps on the device for it.

Tensors whose memory is not aligned to 16 bytes go into a launch of their own; where the device computes coefficients, a small
launch goes before, and where it measures the norm of gradients, two.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusedopt.kernels import gpu_kernels
from fusedopt.kernels.tables import CHUNK, chunk_table
from fusedopt.kernels.upload import Ring

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from fusedopt.kernels.tables import Bucket, Kind, Launch


def prepare(kind: Kind) -> None:
    """Write out and import the kernels for buckets of ``kind``; Triton compiles them at their first launch."""
    gpu_kernels.kernel(kind)
    gpu_kernels.prepare_kernel(kind)


class _Tables:
    """What a bucket keeps on its device."""

    def __init__(self, bucket: Bucket) -> None:
        self.device = bucket.parameters[0].device
        on_gpu = self.device.type == "cuda"
        self.lanes = torch.cuda.get_device_properties(self.device).warp_size if on_gpu else 32
        self.sizes = torch.from_numpy(bucket.sizes).to(self.device)
        self.ring = Ring(self.device)
        self._chunks: dict[bytes, list[tuple[bool, Tensor]]] = {}
        self._pieces: dict[bytes, Tensor] = {}
        #: The slots of a norm, and the same on the device.
        self.slots: tuple[Any, Tensor] | None = None
        #: Whether a CUDA graph reads these tables, so that none may be freed.
        self.captured = False
        #: The coefficients that the device computes for itself, one row a tensor.
        dtype = bucket.kind.compute.dtype
        self.coefficients = torch.zeros((len(bucket.members), bucket.kind.row_length), dtype=dtype, device=self.device)

    def chunks(self, bucket: Bucket, launch: Launch) -> list[tuple[bool, Tensor]]:
        """Return (aligned, [chunks, 2] of tensor and index) of active tensors, aligned and others apart."""
        # Wide accesses promise the alignment that fresh tensors have and views into others may lack.
        aligned = numpy.bitwise_or.reduce(launch.addresses[: 2 + len(bucket.kind.tensors)]) & 15 == 0
        key = launch.active.tobytes() + aligned.tobytes()
        if key not in self._chunks:
            lists = [(flag, self._table(bucket, launch.active & (aligned == flag), gpu_kernels.BLOCK)) for flag in (True, False)]
            self._keep(self._chunks, key, [(flag, table) for flag, table in lists if len(table)])
        return self._chunks[key]

    def pieces(self, bucket: Bucket, launch: Launch) -> Tensor:
        """Return [pieces, 2], tensor and index, of active tensors in the pieces whose squares are summed."""
        key = launch.active.tobytes()
        if key not in self._pieces:
            self._keep(self._pieces, key, self._table(bucket, launch.active, CHUNK))
        return self._pieces[key]

    def _keep(self, known: dict[bytes, Any], key: bytes, value: Any) -> None:
        if len(known) >= 16 and not self.captured:
            known.clear()
        known[key] = value

    def _table(self, bucket: Bucket, chosen: NDArray[numpy.bool_], length: int) -> Tensor:
        table = chunk_table(bucket.sizes, length)
        table[:, 1] //= length
        found = torch.from_numpy(numpy.ascontiguousarray(table[chosen[table[:, 0]], :2].astype(numpy.int32)))
        # From pinned memory, or the host would wait at each new pattern of gradients, as experts make them.
        return found.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else found


def _words(array: NDArray[Any]) -> NDArray[numpy.int64]:
    """Return the bytes of ``array`` as 64-bit words."""
    data = array.tobytes()
    return numpy.frombuffer(data + bytes(-len(data) % 8), numpy.int64)


@dataclass
class _Placed:
    """The tables of one step on the device."""

    addresses: Tensor
    rows: Tensor
    slot: Any
    coefficients: Tensor
    #: What coefficients are computed from; None where the host has computed them.
    groups: Tensor | None = None
    active: Tensor | None = None
    hyperparameters: Tensor | None = None


def _tables(bucket: Bucket) -> _Tables:
    if bucket.tables is None:
        with torch.inference_mode(False):  # they outlive the mode
            bucket.tables = _Tables(bucket)
    tables: _Tables = bucket.tables
    tables.captured |= tables.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return tables


def _device(tables: _Tables) -> AbstractContextManager[Any]:
    return torch.cuda.device(tables.device) if tables.device.type == "cuda" else contextlib.nullcontext()


def run(bucket: Bucket, launch: Launch) -> None:
    """Update the active tensors of ``bucket`` in place, on the current stream of their device."""
    tables = _tables(bucket)
    with _device(tables):
        placed = _place(bucket, launch, tables)
        if launch.coefficients is None:
            _prepare_on_device(bucket, launch, tables, placed)
        found_inf = None if launch.loss_scale is None else _on(tables.device, launch.loss_scale.found_inf)
        count = len(bucket.members)
        for aligned, chunks in tables.chunks(bucket, launch):
            by_position, by_name = gpu_kernels.run_arguments(
                launch.kind,
                placed.addresses,
                tables.sizes,
                chunks,
                placed.rows,
                placed.coefficients,
                found_inf,
                count,
                aligned,
                tables.lanes,
            )
            gpu_kernels.kernel(launch.kind).run[(chunks.shape[0],)](*by_position, **by_name)
        placed.slot.in_use()


def add_sums_of_squares(bucket: Bucket, launch: Launch, slots: NDArray[numpy.int64], totals: Tensor) -> None:
    """Add to ``totals`` the sums of squares of active gradients, unscaled if a scaler asks for it.

    Args:
        bucket: of the device of ``totals``.
        launch: of the step.
        slots: [tensors], where in ``totals`` each is added.
        totals: [slots], in float64; written in place.
    """
    from fusedopt.kernels import gpu_runtime

    tables = _tables(bucket)
    with _device(tables):
        placed = _place(bucket, launch, tables)
        if tables.slots is None or tables.slots[0] is not slots:
            with torch.inference_mode(False):
                tables.slots = slots, torch.from_numpy(slots).to(tables.device)
        pieces = tables.pieces(bucket, launch)
        sums = torch.empty(len(pieces), dtype=torch.float64, device=tables.device)
        scale = None if launch.loss_scale is None else _on(tables.device, launch.loss_scale.grad_scale)
        by_position, by_name = gpu_kernels.sums_arguments(
            launch.kind.formats[1], placed.addresses, tables.sizes, pieces, scale, sums, len(bucket.members)
        )
        if len(pieces):
            gpu_runtime.sums_of_squares[(len(pieces),)](*by_position, **by_name)
        by_position, by_name = gpu_kernels.totals_arguments(sums, pieces, tables.slots[1], totals, len(pieces))
        gpu_runtime.add_totals[(len(totals),)](*by_position, **by_name)


def _on(device: torch.device, value: Tensor | float | None) -> Tensor | None:
    if value is None or isinstance(value, Tensor):
        return None if value is None else value.to(device, non_blocking=True)
    return torch.full((), value, dtype=torch.float32, device=device)


def _place(bucket: Bucket, launch: Launch, tables: _Tables) -> _Placed:
    """Start the copy of the tables of ``launch`` to the device, once."""
    if launch.placed is None:
        launch.placed = (_place_coefficients if launch.coefficients is not None else _place_hyperparameters)(bucket, launch, tables)
    placed: _Placed = launch.placed
    return placed


def _place_coefficients(bucket: Bucket, launch: Launch, tables: _Tables) -> _Placed:
    assert launch.coefficients is not None
    parts = [launch.addresses, launch.row_of_tensor, _words(launch.coefficients)]
    slot = tables.ring.upload(numpy.concatenate([part.reshape(-1) for part in parts]))
    addresses, rows, numbers = slot.split([part.size for part in parts])
    return _Placed(addresses, rows, slot, numbers.view(bucket.kind.compute.dtype))


def _place_hyperparameters(bucket: Bucket, launch: Launch, tables: _Tables) -> _Placed:
    update = bucket.kind.update
    table = numpy.zeros((len(launch.hyperparameters), 1 + len(update.hyperparameters)), numpy.float64)
    live = []
    for group in numpy.unique(bucket.groups):
        own = launch.hyperparameters[group]
        table[group, 0] = -1.0 if own.maximize else 1.0
        for column, value in enumerate(own.values, 1):
            if isinstance(value, Tensor):
                live.append((int(group), column, value))
            else:
                table[group, column] = value
    tensors = numpy.arange(len(bucket.members))
    parts = [launch.addresses, tensors, bucket.groups, launch.active.astype(numpy.int64), _words(table)]
    slot = tables.ring.upload(numpy.concatenate([part.reshape(-1) for part in parts]))
    addresses, rows, groups, active, numbers = slot.split([part.size for part in parts])
    hyperparameters = numbers.view(torch.float64)
    for group, column, value in live:
        # On the stream, so that a captured graph reads what the tensor holds when it is replayed.
        hyperparameters[group * table.shape[1] + column].copy_(value.reshape(()))
    return _Placed(addresses, rows, slot, tables.coefficients, groups, active, hyperparameters)


def _prepare_on_device(bucket: Bucket, launch: Launch, tables: _Tables, placed: _Placed) -> None:
    scale = launch.loss_scale
    found_inf = None if scale is None else _on(tables.device, scale.found_inf)
    grad_scale = None if scale is None else _on(tables.device, scale.grad_scale)
    count = len(bucket.members)
    by_position, by_name = gpu_kernels.prepare_arguments(
        bucket.scalars,
        placed.active,
        placed.groups,
        placed.hyperparameters,
        placed.coefficients,
        found_inf,
        grad_scale,
        _on(tables.device, launch.factors),
        count,
    )
    gpu_kernels.prepare_kernel(launch.kind).prepare[(-(-count // gpu_kernels.TENSORS_A_PROGRAM),)](*by_position, **by_name)
