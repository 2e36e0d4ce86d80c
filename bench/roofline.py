"""The memory limit: the streams of a step, read and written without arithmetic, in the same rounds as the optimizers.

On the CPU a kernel of its own, which shares nothing with fusedopt: threads of Python, each in compiled code that releases the
interpreter's lock, walk their own contiguous share again and again, so that no start of a thread is in the time. Each stream is
one contiguous array. Every number is written changed (a bit operation), for a compiler leaves out stores of what is there.
On a GPU it is a copy within its memory of the same number of bytes, by the driver or by a kernel, whichever is faster: on an H200
the driver's was seen to reach two thirds of the bandwidth; https://github.com/NVIDIA/cccl/issues/1672
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy
import torch
from numba import njit
from numpy.typing import NDArray

# Elements: the blocks of all streams stay in the first cache together.
_BLOCK = 1024
#: torch's threads look for work for about a millisecond after each of its operations, and would take a core from ours.
_PAUSE_SECONDS = 0.005
#: By which the faster way to copy on a GPU is chosen.
_TRIED_COPIES = 10


@njit(nogil=True)
def _combine(p, g):
    for i in range(p.size):
        p[i] ^= g[i]


@njit(nogil=True)
def _invert(state):
    for i in range(state.size):
        state[i] = ~state[i]


@njit(nogil=True)
def _walk(p, g, states, times):
    for _ in range(times):
        for start in range(0, p.size, _BLOCK):
            stop = min(start + _BLOCK, p.size)
            _combine(p[start:stop], g[start:stop])
            for row in range(states.shape[0]):
                _invert(states[row, start:stop])


class CpuLimit:
    """Reads a parameter, a gradient and states, and writes all but the gradient.

    Args:
        elements: of each stream.
        itemsizes: bytes of an element of the parameter, of its gradient, and of each state.
        threads: that share the elements.
    """

    def __init__(self, elements: int, itemsizes: Sequence[int], threads: int) -> None:
        p, g, *states = itemsizes
        self._threads = threads
        self._pool = ThreadPoolExecutor(max(1, threads - 1))
        # In shares, each made by its own thread, as large arrays would be on machines with several memories.
        bounds = numpy.linspace(0, elements, threads + 1).astype(int)
        lengths = [int(stop - start) for start, stop in itertools.pairwise(bounds)]
        self._shares = self._on_all_threads(lambda i: _share(lengths[i], p, g, states))
        self._walk_all(1)

    def _on_all_threads(self, work: Any) -> list[Any]:
        others = [self._pool.submit(work, i) for i in range(1, self._threads)]
        return [work(0), *(other.result() for other in others)]

    def take(self, seconds: float) -> float:
        """Walk for some seconds; return the mean seconds of one pass over all streams."""
        time.sleep(_PAUSE_SECONDS)
        return self._walk_all(max(1, round(seconds / self._walk_all(1))))

    def _walk_all(self, times: int) -> float:
        started = time.perf_counter()
        self._on_all_threads(lambda i: _walk(*self._shares[i], times))
        return (time.perf_counter() - started) / times


def _share(length: int, p: int, g: int, states: Sequence[int]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    integers = {2: numpy.int16, 4: numpy.int32, 8: numpy.int64}
    first = integers[states[0] if states else p]
    return numpy.ones(length, integers[p]), numpy.ones(length, integers[g]), numpy.ones((len(states), length), first)


class CudaLimit:
    """Copies as many bytes as the streams of a step have, half of them read and half written."""

    def __init__(self, elements: int, itemsizes: Sequence[int], threads: int, device: str = "cuda") -> None:
        # Numbers of four bytes, of which a kernel moves four at a time.
        count = -(-elements * bytes_moved(itemsizes) // 8)
        self._source, self._target = (torch.zeros(count, dtype=torch.int32, device=device) for _ in range(2))
        ways = (self._copy_by_driver, self._copy_by_kernel)
        for copy in ways:
            _seconds_on_gpu(copy, 1)
        self._copy = min(ways, key=lambda copy: _seconds_on_gpu(copy, _TRIED_COPIES))

    def _copy_by_driver(self) -> None:
        self._target.copy_(self._source)

    def _copy_by_kernel(self) -> None:
        torch.bitwise_not(self._source, out=self._target)

    def take(self, seconds: float) -> float:
        """Copy for some seconds; return the mean seconds of one copy."""
        return _seconds_on_gpu(self._copy, max(1, round(seconds / _seconds_on_gpu(self._copy, 1))))


def _seconds_on_gpu(work: Callable[[], Any], times: int) -> float:
    """The mean seconds of `work`, from when the GPU is idle until it is again."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(times):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / times


def bytes_moved(itemsizes: Sequence[int]) -> int:
    """Bytes an element that a step has to move: everything is read, and all but the gradient is written."""
    return 2 * sum(itemsizes) - itemsizes[1]
