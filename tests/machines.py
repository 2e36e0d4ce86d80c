"""Where a test of the GPU kernels runs: on the CPU, by executing their PTX, or on a GPU. The tests are the same."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs

from bench.costs import count_kernels
from fusedopt import settings
from fusedopt.kernels import backends
from fusedopt.kernels.ptx import driver, steps
from fusedopt.kernels.ptx.execute import Settings


@dataclass(frozen=True)
class Executed:
    """The CPU, which executes the PTX.

    Args:
        settings: how.
        target: the GPU that the PTX is for.
    """

    settings: Settings = field(default_factory=Settings)
    target: str = "sm_90"
    device = "cpu"

    def __str__(self) -> str:
        return "executed"

    def running(self) -> contextlib.AbstractContextManager[driver.Session]:
        """Steps are executed; yields their launches, and how many kernels were compiled."""
        return steps.executing(self.target, self.settings)

    def count_launches(self, work: Callable[[], None]) -> int:
        """How many kernels `work` launches."""
        with self.running() as session:
            work()
        return len(session.launches)

    @contextlib.contextmanager
    def capturing(self, work: Callable[[], None]) -> Iterator[Callable[[], None]]:
        """Note what `work` launches and writes, as a CUDA graph does, without doing it; yields what does it anew."""
        calls: list[Callable[[], None]] = []
        launch = driver._Launcher.__call__

        def noted(launcher: Any, *arguments: Any) -> None:
            calls.append(partial(_launched_again, launch, list(driver._announced), launcher, *arguments))

        with self.running(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(driver._Launcher, "__call__", noted)
            patch.setattr(settings, "live_number", _number_of_the_device)
            with _Noting(calls):
                work()
            patch.undo()
            yield lambda: [call() for call in calls]


def _number_of_the_device(value: Any, group: dict[str, Any]) -> Any:
    """What a step reads of a hyperparameter where the CPU is the device."""
    return value if isinstance(value, torch.Tensor) and group.get("capturable") else settings.as_number(value)


def _launched_again(launch: Callable[..., None], announced: list[tuple[int, int]], launcher: Any, *arguments: Any) -> None:
    before, driver._announced[:] = list(driver._announced), announced
    try:
        launch(launcher, *arguments)
    finally:
        driver._announced[:] = before


class _Noting(TorchDispatchMode):
    """Operations that write are noted, and not done."""

    def __init__(self, calls: list[Callable[[], None]]) -> None:
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(self, operation: Any, kinds: Any, arguments: Any = (), options: Any = None) -> Any:
        options = options or {}
        if not operation._schema.is_mutable:
            return operation(*arguments, **options)
        self._calls.append(partial(operation, *arguments, **options))
        return arguments[0]


@dataclass
class Launched:
    """What was launched on a GPU, as a session of the executing driver has it."""

    launches: list[tuple[str, None]] = field(default_factory=list)
    compilations: int = 0


@dataclass(frozen=True)
class Gpu:
    """A GPU."""

    device = "cuda"

    def __str__(self) -> str:
        return "gpu"

    @contextlib.contextmanager
    def running(self) -> Iterator[Launched]:
        """Steps run on the GPU; yields their launches, and how many kernels were compiled."""
        launched = Launched()

        def note(metadata: Any) -> None:
            launched.launches.append((metadata.get()["name"], None))

        def count(**_: Any) -> None:
            launched.compilations += 1

        knobs.runtime.launch_enter_hook.add(note)
        before, knobs.runtime.jit_post_compile_hook = knobs.runtime.jit_post_compile_hook, count
        try:
            with backends.use("triton"):
                yield launched
        finally:
            knobs.runtime.launch_enter_hook.remove(note)
            knobs.runtime.jit_post_compile_hook = before

    def count_launches(self, work: Callable[[], None]) -> int:
        """How many kernels `work` launches, by torch's profiler."""
        with backends.use("triton"):
            return count_kernels(work)

    @contextlib.contextmanager
    def capturing(self, work: Callable[[], None]) -> Iterator[Callable[[], None]]:
        """Capture `work` in a CUDA graph; yields what replays it."""
        graph = torch.cuda.CUDAGraph()
        with backends.use("triton"), torch.cuda.graph(graph):
            work()
        yield graph.replay


Machine = Executed | Gpu
EXECUTED, GPU = Executed(), Gpu()
#: For a test that is the same on both.
each_machine = pytest.mark.parametrize("machine", [EXECUTED, pytest.param(GPU, marks=pytest.mark.gpu)], ids=str)
