"""A Triton driver for a GPU that is not there.

.. code-block:: python

    with ptx.driver.driver("sm_90"):
        kernel[grid](cpu_tensor, ...)     # specialised and compiled as for that GPU; its PTX is executed on the CPU

What a kernel reaches through a table of addresses must be announced: ``with memory(tensor, ...):``. Triton's interpreter replaces
compilation for the whole process, so ``TRITON_INTERPRET`` must not be set.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver as triton_driver
from triton.runtime.cache import get_cache_manager

from fusedopt.kernels import layout
from fusedopt.kernels.ptx.execute import Counts, Kernel, Settings

#: The GPUs that kernels are compiled for.
TARGETS = {
    "sm_75": GPUTarget("cuda", 75, 32),
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}

_kernels: dict[str, Kernel] = {}
_sessions = itertools.count()
_announced: list[tuple[int, int]] = []


@contextlib.contextmanager
def memory(*tensors: Tensor) -> Iterator[None]:
    """Allow accesses to ``tensors``, from the first element of each to its last, by their addresses."""
    before = len(_announced)
    _announced.extend(layout.extent(tensor) for tensor in tensors)
    try:
        yield
    finally:
        del _announced[before:]


class Session:
    """What was launched under a driver.

    Args:
        settings: how launches are executed; may be replaced between launches.
        execute: whether they are.
    """

    def __init__(self, settings: Settings, execute: bool = True) -> None:
        self.settings, self.execute = settings, execute
        self.number = next(_sessions)
        #: (name, counts) of each launch.
        self.launches: list[tuple[str, Counts]] = []
        #: How many kernels were compiled or loaded.
        self.compilations = 0

    def counts(self, name: str | None = None) -> Counts:
        """Return the sum over launches, of all kernels or of those called ``name``."""
        total = Counts()
        for kernel, counts in self.launches:
            if name in (None, kernel):
                total.add(counts)
        return total


class _Launcher:
    """What Triton calls to launch a kernel that it has compiled."""

    session: Session

    def __init__(self, compiled: Any, metadata: Any) -> None:
        self.session.compilations += 1
        if not self.session.execute:
            return
        self._signature = list(compiled.signature.values())
        self._metadata = metadata
        files = get_cache_manager(metadata.hash).get_group(f"{compiled.name[:150]}.json") or {}
        texts = [path for name, path in files.items() if name.endswith(".ptx")]
        if not texts:
            raise RuntimeError(
                f"{compiled.name} was compiled for {metadata.target.backend} {metadata.target.arch}, which has no PTX to execute: "
                "launch it under an sm_ target; other targets are compiled only"
            )
        with open(texts[0], encoding="utf-8") as file:  # noqa: PTH123  # a path of Triton's, as text
            ptx = file.read()
        key = hashlib.sha256(ptx.encode()).hexdigest()
        self._kernel = _kernels.get(key) or Kernel(ptx)
        _kernels[key] = self._kernel

    def __call__(self, *launch: Any) -> None:
        if not self.session.execute:
            return
        grid, arguments = launch[:3], launch[9:]
        flat: list[float] = []
        ranges = list(_announced)
        self._collect(self._signature, arguments, flat, ranges)
        session = triton_driver.active.session
        if grid[0] * grid[1] * grid[2]:
            counts = self._kernel.launch(grid, flat, ranges, self._metadata.shared, session.settings)
            session.launches.append((self._metadata.name, counts))

    def _collect(
        self, signature: Sequence[Any], arguments: Sequence[Any], flat: list[float], ranges: list[tuple[int, int]]
    ) -> None:
        for kind, argument in zip(signature, arguments, strict=True):
            if isinstance(kind, tuple):
                self._collect(kind, argument, flat, ranges)
            elif kind == "constexpr":
                continue
            elif hasattr(argument, "data_ptr"):
                flat.append(argument.data_ptr())
                ranges.append(layout.extent(getattr(argument, "base", argument)))
            else:
                flat.append(0 if argument is None else argument)


class _Utilities:
    """What Triton asks a driver for beside launches."""

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[object, ...]:  # noqa: ARG002
        return name, name, 0, 0, 1024  # module, function, registers, spills, most threads

    def unload_module(self, module: object) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:  # noqa: ARG002
        return {"max_shared_mem": 232448, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32}


class _Driver(DriverBase):  # type: ignore[misc]  # untyped
    def __init__(self, target: GPUTarget, session: Session) -> None:
        super().__init__()
        self.session, self.utils = session, _Utilities()
        self._target = target
        # Kernels are kept by device: one for each session, so that each compiles for its own target.
        self._device = str(target), session.number
        self.launcher_cls = type("Launcher", (_Launcher,), {"session": session})

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> tuple[str, int]:
        return self._device

    def get_current_stream(self, device: object = None) -> int:  # noqa: ARG002
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Callable[..., Any]:
        raise NotImplementedError("times of executed PTX say nothing of a GPU")


@contextlib.contextmanager
def driver(target: str = "sm_90", settings: Settings | None = None, execute: bool = True) -> Iterator[Session]:
    """Have Triton compile for ``target``, and launches on CPU tensors executed by their PTX.

    Args:
        target: a name of ``TARGETS``; only for those that start with sm_ can kernels be launched.
        settings: how to execute.
        execute: False leaves launches out, so that the host's part of a step is all that takes time; needs no C compiler.

    Raises:
        ValueError: for a target that is not known.
        RuntimeError: while Triton's interpreter is on.
    """
    if target not in TARGETS:
        raise ValueError(f"there is no target {target!r}; there are {', '.join(TARGETS)}")
    if knobs.runtime.interpret:
        raise RuntimeError("Triton's interpreter is on, and compiles nothing: unset TRITON_INTERPRET, and start anew")
    session = Session(settings or Settings(), execute)
    before = triton_driver._active
    triton_driver.set_active(_Driver(TARGETS[target], session))
    try:
        yield session
    finally:
        triton_driver._active = before
