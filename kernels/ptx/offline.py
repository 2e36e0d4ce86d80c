"""Kernels compiled for GPUs that are not there: the very specialisations that a step launches."""

from __future__ import annotations

from typing import Any

import torch

from fusedopt.kernels import gpu_kernels
from fusedopt.kernels.ptx.driver import TARGETS, driver
from fusedopt.kernels.tables import Kind

# Neither 1 nor a multiple of 16, of which Triton would make variants.
_TENSORS = 3


def compile_update(kind: Kind, target: str, aligned: bool = True, guarded: bool = False) -> Any:
    """Return Triton's compiled kernel for buckets of ``kind``.

    Args:
        kind: what the kernel is for.
        target: a name of ``fusedopt.kernels.ptx.driver.TARGETS``.
        aligned: for tensors whose memory is aligned, or for others.
        guarded: whether the kernel asks if a gradient scaler has found infinities.
    """
    by_position, by_name = gpu_kernels.run_arguments(
        kind,
        addresses=torch.int64,
        sizes=torch.int64,
        chunks=torch.int32,
        row_of_tensor=torch.int64,
        coefficients=kind.compute.dtype,
        found_inf=torch.float32 if guarded else None,
        tensors=_TENSORS,
        aligned=aligned,
        lanes=TARGETS[target].warp_size,
    )
    with driver(target):
        return gpu_kernels.kernel(kind).run.warmup(*by_position, grid=(1,), **by_name)


def compile_prepare(kind: Kind, target: str, guarded: bool = False, scaled: bool = False, clipped: bool = False) -> Any:
    """Return Triton's compiled kernel that computes the coefficients of ``kind``; arguments as above.

    Args:
        kind: what the coefficients are for.
        target: a name of ``fusedopt.kernels.ptx.driver.TARGETS``.
        guarded: whether the kernel asks if a gradient scaler has found infinities.
        scaled: whether it reads a loss scale.
        clipped: whether it reads factors that clip gradients.
    """
    by_position, by_name = gpu_kernels.prepare_arguments(
        scalars=torch.float32,
        active=torch.int64,
        group_of_tensor=torch.int64,
        hyperparameters=torch.float64,
        coefficients=kind.compute.dtype,
        found_inf=torch.float32 if guarded else None,
        grad_scale=torch.float32 if scaled else None,
        factors=torch.float64 if clipped else None,
        tensors=_TENSORS,
    )
    with driver(target):
        return gpu_kernels.prepare_kernel(kind).prepare.warmup(*by_position, grid=(1,), **by_name)
