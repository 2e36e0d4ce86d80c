"""Kernels compiled for GPUs that are not there: the very specialisations that a step launches."""

from __future__ import annotations

from typing import Any

import torch

from fusedopt.kernels import gpu
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
    numbers = kind.compute.dtype
    with driver(target):
        return gpu._kernel(kind).run.warmup(
            torch.int64,
            torch.int64,
            torch.int32,
            torch.int64,
            numbers,
            torch.float32 if guarded else numbers,
            _TENSORS,
            ALIGNED=aligned,
            GUARDED=guarded,
            BLOCK=gpu.BLOCK,
            grid=(1,),
            **gpu.options(kind, TARGETS[target].warp_size),
        )


def compile_prepare(kind: Kind, target: str, guarded: bool = False, scaled: bool = False) -> Any:
    """Return Triton's compiled kernel that computes the coefficients of ``kind``; arguments as above.

    Args:
        kind: what the coefficients are for.
        target: a name of ``fusedopt.kernels.ptx.driver.TARGETS``.
        guarded: whether the kernel asks if a gradient scaler has found infinities.
        scaled: whether it reads a loss scale.
    """
    numbers = kind.compute.dtype
    with driver(target):
        return gpu._prepare_kernel(kind).prepare.warmup(
            torch.float32,
            torch.int64,
            torch.int64,
            torch.float64,
            numbers,
            torch.float32 if guarded else numbers,
            torch.float32 if scaled else numbers,
            _TENSORS,
            GUARDED=guarded,
            SCALED=scaled,
            BLOCK=gpu._TENSORS_A_PROGRAM,
            num_warps=1,
            enable_fp_fusion=False,
            grid=(1,),
        )
