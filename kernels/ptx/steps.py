"""Whole optimizer steps on CPU tensors, by the PTX of their kernels.

.. code-block:: python

    with ptx.steps.executing("sm_90") as session:
        optimizer.step()
    print(session.counts("run").bytes_loaded)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager

import numpy
from numpy.typing import NDArray
from torch import Tensor

from fusedopt.kernels import backends, gpu
from fusedopt.kernels.ptx.driver import Session, driver, memory
from fusedopt.kernels.ptx.execute import Settings
from fusedopt.kernels.tables import Bucket, Launch


@contextlib.contextmanager
def executing(target: str = "sm_90", settings: Settings | None = None) -> Iterator[Session]:
    """Have all parameters updated by the Triton backend, its kernels executed for ``target``.

    A kernel may access the tensors that take part in a step, announced by the tensors themselves: an address in a table that
    leads elsewhere, or to a parameter without a gradient, is out of bounds.

    Args:
        target: as for :func:`fusedopt.kernels.ptx.driver.driver`.
        settings: how to execute.
    """
    with driver(target, settings) as session, backends.use("triton"), _announcing():
        yield session


@contextlib.contextmanager
def _announcing() -> Iterator[None]:
    run, add_sums_of_squares = gpu.run, gpu.add_sums_of_squares

    def announced(bucket: Bucket, launch: Launch) -> AbstractContextManager[None]:
        gradients = launch.gradients or [parameter.grad for parameter in bucket.parameters]
        columns = (bucket.parameters, gradients, *bucket.states)
        active = [tensor for column in columns for tensor, takes_part in zip(column, launch.active, strict=True) if takes_part]
        return memory(*(tensor for tensor in active if tensor is not None), *(copy for _, copy, _, _ in launch.stand_ins))

    def announced_run(bucket: Bucket, launch: Launch) -> None:
        with announced(bucket, launch):
            run(bucket, launch)

    def announced_sums(bucket: Bucket, launch: Launch, slots: NDArray[numpy.int64], totals: Tensor) -> None:
        with announced(bucket, launch):
            add_sums_of_squares(bucket, launch, slots, totals)

    gpu.run, gpu.add_sums_of_squares = announced_run, announced_sums
    try:
        yield
    finally:
        gpu.run, gpu.add_sums_of_squares = run, add_sums_of_squares
