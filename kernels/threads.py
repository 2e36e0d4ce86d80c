"""A pool of threads that sleep between steps, claim chunks as they go, and leave every setting of the process alone.

The caller works as well, so a worker that the system does not schedule costs nothing but its help: with another program on
one of two cores, a step of 1 M elements takes 0.45 ms this way and 12 ms in OpenMP's or Numba's own parallel regions, whose
barriers wait for whole scheduler ticks (2 cores of an AMD EPYC).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import numpy

from fusedopt.kernels.cpu_runtime import CLAIMED, DONE, PROGRESS_LENGTH, spin_until

#: Waking a sleeping thread takes 20-90 microseconds, in which one core updates about this many elements.
SERIAL_ELEMENTS = 131_072
# Looks at the counter before the caller sleeps: some 50 microseconds.
_SPINS = 2_000
_NAP_SECONDS = 20e-6

_Job = tuple[Callable[..., None], tuple[Any, ...]]


class _Pool:
    def __init__(self) -> None:
        self._jobs: SimpleQueue[_Job] = SimpleQueue()
        self._threads = 0
        self._lock = threading.Lock()

    def _work(self) -> None:
        while True:
            kernel, arguments = self._jobs.get()
            kernel(*arguments)
            # Tensors' tables must not live on while this thread sleeps.
            del kernel, arguments

    def call(self, kernel: Callable[..., None], arguments: tuple[Any, ...], helpers: int) -> None:
        """Have up to ``helpers`` threads call ``kernel(*arguments)`` soon."""
        if self._threads < helpers:
            with self._lock:
                while self._threads < helpers:
                    self._threads += 1
                    threading.Thread(target=self._work, name=f"fusedopt-{self._threads}", daemon=True).start()
        # Jobs that workers have not come to are done by their callers; there is no use in piling up more.
        for _ in range(min(helpers, 2 * self._threads - self._jobs.qsize())):
            self._jobs.put((kernel, arguments))


_pool = _Pool()


def _forget_threads() -> None:
    global _pool
    _pool = _Pool()


if hasattr(os, "register_at_fork"):
    # A forked child has the pool's memory but none of its threads.
    os.register_at_fork(after_in_child=_forget_threads)


def run(kernel: Callable[..., None], arguments: tuple[Any, ...], chunks: int, elements: int, threads: int) -> None:
    """Run ``kernel(*arguments, progress, address)`` on up to ``threads`` threads until all ``chunks`` are done.

    Args:
        kernel: compiled, without the GIL; claims chunks by adding to ``progress[CLAIMED]``, counts finished ones in
            ``progress[DONE]``, and returns when none is left to claim.
        arguments: its first arguments; kept alive until the last thread has returned.
        chunks: number of chunks.
        elements: number of elements in all chunks; few of them are left to the calling thread alone.
        threads: most threads to use, the caller included.
    """
    progress = numpy.zeros(PROGRESS_LENGTH, numpy.int64)
    address = progress.__array_interface__["data"][0]
    arguments = (*arguments, progress, address + 8 * CLAIMED, address + 8 * DONE)
    helpers = min(threads, chunks) - 1 if elements > SERIAL_ELEMENTS else 0
    if helpers <= 0:
        kernel(*arguments)
        return
    _pool.call(kernel, arguments, helpers)
    kernel(*arguments)
    if not spin_until(progress, address + 8 * DONE, chunks, _SPINS):
        while progress[DONE] < chunks:
            time.sleep(_NAP_SECONDS)
