"""The backends without kernels: a rule as it stands, on NumPy arrays (the reference) and on torch tensors (any device)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedopt.kernels import layout
from fusedopt.kernels import math as kernel_math

if TYPE_CHECKING:
    from fusedopt.kernels.tables import Bucket, Launch


def _run(bucket: Bucket, launch: Launch, names: dict[str, Any], to_array: Any, to_tensor: Any, to_scalars: Any) -> None:
    assert launch.coefficients is not None  # only Triton's buckets leave them to the device
    compute = launch.kind.compute.dtype
    for index, gradient in enumerate(launch.gradients):
        if gradient is None:
            continue
        written = [column[index] for column in (bucket.parameters, *bucket.states)]
        row = to_scalars(launch.coefficients[launch.row_of_tensor[index]])
        p, g, *states = (to_array(layout.real(tensor.detach()).to(compute)) for tensor in (written[0], gradient, *written[1:]))
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
        for tensor, array in zip(written, new, strict=True):
            tensor.copy_(_as_stored(to_tensor(array), tensor))


def _as_stored(value: Tensor, like: Tensor) -> Tensor:
    return torch.view_as_complex(value.contiguous()).to(like.dtype) if like.is_complex() else value.to(like.dtype)


def run(bucket: Bucket, launch: Launch) -> None:
    """Update the active tensors of ``bucket`` by the backend "numpy" or "tensor"."""
    (run_on_arrays if bucket.backend == "numpy" else run_on_tensors)(bucket, launch)


def run_on_arrays(bucket: Bucket, launch: Launch) -> None:
    """Update the active tensors of ``bucket``, on a CPU, by NumPy."""
    import numpy

    with numpy.errstate(all="ignore"):
        _run(bucket, launch, kernel_math.ARRAYS, Tensor.numpy, lambda a: torch.from_numpy(numpy.asarray(a)), tuple)


def run_on_tensors(bucket: Bucket, launch: Launch) -> None:
    """Update the active tensors of ``bucket`` by operations of torch, one tensor after the other."""
    _run(bucket, launch, kernel_math.TENSORS, lambda t: t, lambda t: t, lambda row: row.tolist())
