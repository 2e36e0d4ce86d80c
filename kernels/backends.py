"""Which backend updates which parameter, and the calls that all backends share."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import platform
import shutil
import types
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusedopt.kernels import layout
from fusedopt.kernels.formats import FORMATS
from fusedopt.kernels.tables import BY_ADDRESS

if TYPE_CHECKING:
    from fusedopt.kernels.tables import Bucket, Kind, Launch

NAMES = (*BY_ADDRESS, "numpy", "tensor")

_forced: str | None = None


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Have one backend update all parameters, for tests: "numba", "triton", "numpy" or "tensor".

    Triton takes tensors of a CPU only in its interpreter (``TRITON_INTERPRET=1``, set before triton is imported).
    """
    global _forced
    if name not in NAMES:
        raise ValueError(f"there is no backend {name!r}; there are {', '.join(NAMES)}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "0") not in ("", "0")


def disabled() -> bool:
    """Whether ``FUSEDOPT_DISABLE`` turns all kernels off."""
    return _is_set("FUSEDOPT_DISABLE")


def state() -> tuple[str | None, bool]:
    """Return what a choice depends on beside the parameter; a plan holds while it stays the same."""
    return _forced, disabled()


@functools.cache
def triton_obstacle() -> str | None:
    """Return why Triton cannot compile for a GPU here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'fusedopt[triton]')"
    if not any(map(shutil.which, ("gcc", "clang", "cc"))) and not os.environ.get("CC"):
        return "Triton needs a C compiler, and found none (install gcc or clang, or set CC)"
    return None


@functools.cache
def half_obstacle() -> str | None:
    """Return why Numba cannot convert float16 on this processor, or None."""
    if platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686"):
        return None
    # Imported here, for the sake of parameters that are no halves.
    from llvmlite import binding
    from numba import config

    name, features = vars(config)["CPU_NAME"], vars(config)["CPU_FEATURES"]
    if "+f16c" in (features or "" if name or features else binding.get_host_cpu_features().flatten()):
        return None
    # Without the instructions LLVM calls a function that Numba does not have, and ends the process.
    return "this processor has no instructions to convert float16 (F16C)"


def choose(parameter: Tensor, gradient: Tensor | None) -> tuple[str, str]:
    """Return the name of the backend for ``parameter``, and the reason."""
    if _forced is not None:
        return _forced, "forced by fusedopt.kernels.backends.use"
    if disabled():
        return "tensor", "FUSEDOPT_DISABLE is set"
    tensors = [parameter] if gradient is None else [parameter, gradient]
    if not all(layout.is_plain_memory(layout.local(tensor)) for tensor in tensors):
        return "tensor", f"{type(parameter).__name__} is not plain memory"
    if layout.is_unfinished_sum(parameter):
        return "tensor", "it is a sum over ranks that has not been taken"
    if not all(layout.same_shards(parameter, tensor) for tensor in tensors):
        return "tensor", "its gradient is sharded otherwise"
    if gradient is not None and layout.is_sharded(gradient) and layout.overlaps_itself(layout.local(gradient)):
        return "tensor", "its gradient is expanded, and an unscaled one could not be put in its place"
    part = ", on this rank's part" if layout.is_sharded(parameter) else ""
    if parameter.device.type == "cpu" and _is_set("NUMBA_DISABLE_JIT"):
        return "tensor", "NUMBA_DISABLE_JIT is set"
    if parameter.device.type == "cpu":
        halves = any(tensor is not None and tensor.dtype == torch.float16 for tensor in (parameter, gradient))
        obstacle = half_obstacle() if halves else None
        return ("tensor", obstacle) if obstacle else ("numba", f"compiled kernel for CPUs{part}")
    if parameter.device.type == "cuda":
        obstacle = triton_obstacle()
        return ("tensor", obstacle) if obstacle else ("triton", f"compiled kernel for GPUs{part}")
    return "tensor", f"there is no kernel for {parameter.device.type} devices"


def decides_on_device(parameter: Tensor) -> bool:
    """Whether the device itself reads what a gradient scaler found, without the host waiting for it."""
    return choose(parameter, None)[0] == "triton"


def prepare(backend: str, kind: Kind) -> None:
    """Compile what ``backend`` needs for buckets of ``kind``, or load it from the cache."""
    if backend in BY_ADDRESS:
        _module(backend).prepare(kind)


def run(bucket: Bucket, launch: Launch) -> None:
    """Update the active tensors of ``bucket`` in place by its backend."""
    _module(bucket.backend).run(bucket, launch)


def add_sums_of_squares(bucket: Bucket, launch: Launch, slots: NDArray[numpy.int64], totals: Any) -> None:
    """Add the sums of squares of active gradients to ``totals``, in place.

    Args:
        bucket: whose backend does it.
        launch: of the step; gradients are unscaled first if it unscales them.
        slots: [tensors], where in ``totals`` each is added.
        totals: [slots], in float64: a tensor of the device that counts the bucket's steps, or an array where the host does.
    """
    _module(bucket.backend).add_sums_of_squares(bucket, launch, slots, totals)


def sum_of_squares(tensors: Sequence[Tensor]) -> float | None:
    """Return the sum of squares of ``tensors`` by a compiled kernel, or None where none serves all of them.

    One serves dense tensors of a CPU, of one real dtype.
    """
    kinds = {(type(tensor), tensor.dtype, tensor.device.type, tensor.layout) for tensor in tensors}
    if len(kinds) != 1 or disabled() or _is_set("NUMBA_DISABLE_JIT"):
        return None
    _, dtype, device, kind = kinds.pop()
    served = device == "cpu" and kind == torch.strided and dtype in FORMATS and layout.is_plain_memory(tensors[0])
    if not served or (dtype == torch.float16 and half_obstacle()) or not all(map(layout.is_dense, tensors)):
        return None
    total: float = _module("numba").sum_of_squares(tensors, FORMATS[dtype])
    return total


@functools.cache
def _module(backend: str) -> types.ModuleType:
    # An import statement in each step would take a microsecond of it.
    name = {"numba": "cpu", "triton": "gpu"}.get(backend, "reference")
    return importlib.import_module(f"fusedopt.kernels.{name}")
