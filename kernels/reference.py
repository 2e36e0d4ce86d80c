"""The backends without kernels: a rule as it stands, on NumPy arrays (the reference) and on torch tensors (any device)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusedopt.kernels import layout, norms
from fusedopt.kernels import math as kernel_math
from fusedopt.kernels.coded import Coded, correct_root

if TYPE_CHECKING:
    from fusedopt.kernels.tables import Bucket, Launch


def _run(bucket: Bucket, launch: Launch, names: dict[str, Any], to_array: Any, to_tensor: Any, to_scalars: Any) -> None:
    assert launch.coefficients is not None  # only Triton's buckets leave them to the device
    compute = launch.kind.compute.dtype
    for index, gradient in enumerate(launch.gradients):
        if gradient is None:
            continue
        written = [column[index] for column in (bucket.parameters, *bucket.states)]
        coded = Coded(bucket, launch, index) if launch.kind.coded else None
        row = to_scalars(launch.coefficients[launch.row_of_tensor[index]][: 1 + launch.kind.update.coefficient_count])
        if coded is None:
            read = [written[0], gradient, *written[1:]]
        else:
            parameter, held = coded.load()
            read = [parameter, gradient, *held]
        p, g, *states = (to_array(layout.real(tensor.detach()).to(compute)) for tensor in read)
        inverse_scale, *coefficients = row
        if launch.kind.unscale:
            g = inverse_scale * g
            unscaled = _as_stored(to_tensor(g), gradient)
            if layout.overlaps_itself(gradient):  # an expanded gradient cannot hold it
                bucket.parameters[index].grad = unscaled
            else:
                gradient.copy_(unscaled)
        if layout.is_sharded(gradient):
            g = layout.sharded_as(g, written[0])
        new = launch.kind.update.apply(names, p, g, states, coefficients)
        if coded is not None:
            coded.store(to_tensor(new[0]), [to_tensor(array) for array in new[1:]])
            continue
        for tensor, array in zip(written, new, strict=True):
            tensor.copy_(_as_stored(to_tensor(array), tensor))


def _as_stored(value: Tensor, like: Tensor) -> Tensor:
    return torch.view_as_complex(value.contiguous()).to(like.dtype) if like.is_complex() else value.to(like.dtype)


def run(bucket: Bucket, launch: Launch) -> None:
    """Update the active tensors of ``bucket`` by the backend "numpy" or "tensor"."""
    (run_on_arrays if bucket.backend == "numpy" else run_on_tensors)(bucket, launch)


def run_on_arrays(bucket: Bucket, launch: Launch) -> None:
    """Update the active tensors of ``bucket``, on a CPU, by NumPy."""
    with numpy.errstate(all="ignore"):
        _run(bucket, launch, kernel_math.ARRAYS, Tensor.numpy, lambda a: torch.from_numpy(numpy.asarray(a)), tuple)


def run_on_tensors(bucket: Bucket, launch: Launch) -> None:
    """Update the active tensors of ``bucket`` by operations of torch, one tensor after the other."""
    names = correct_root(kernel_math.TENSORS) if bucket.kind.coded else kernel_math.TENSORS
    _run(bucket, launch, names, lambda t: t, lambda t: t, lambda row: row.tolist())


def add_sums_of_squares(bucket: Bucket, launch: Launch, slots: NDArray[numpy.int64], totals: NDArray[numpy.float64]) -> None:
    """Add the sums of squares of active gradients to ``totals``, by slot; on tensors in whatever order torch adds."""
    assert launch.coefficients is not None
    scale = launch.coefficients[0, 0]
    of_pieces = numpy.zeros(len(launch.chunks))
    for index in numpy.flatnonzero(launch.active).tolist():
        parameter, gradient = bucket.parameters[index], launch.gradients[index]
        assert gradient is not None
        if layout.is_sharded(gradient):
            gradient = layout.local(layout.sharded_as(gradient, bucket.held_parameters[index]))
        gradient = layout.real(gradient.detach()).to(launch.kind.compute.dtype)
        if bucket.backend == "tensor":
            totals[slots[index]] += (gradient * float(scale)).double().square().sum().item()
            continue
        # In the order of the parameter's memory, as kernels go.
        dense = torch.empty_like(layout.real(parameter.detach()), dtype=gradient.dtype).copy_(gradient)
        numbers = scale * dense.as_strided((dense.numel(),), (1,)).numpy()
        for chunk in numpy.flatnonzero(launch.chunks[:, 0] == index):
            first, count = launch.chunks[chunk, 1:]
            of_pieces[chunk] = norms.sum_of_squares(numbers[first : first + count])
    if bucket.backend == "numpy":
        totals += norms.totals(of_pieces, slots[launch.chunks[:, 0]], len(totals))
