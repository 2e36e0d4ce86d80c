"""Whole optimizer steps on CPU tensors, by the PTX of their kernels.

.. code-block:: python

    with ptx.steps.executing("sm_90") as session:
        optimizer.step()
    print(session.counts("run").bytes_loaded)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

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
    run, stand_in = gpu.run, Bucket.stand_in
    copies: list[Tensor] = []

    def noted_stand_in(bucket: Bucket, launch: Launch) -> Sequence[tuple[Tensor, Tensor, int, int]]:
        pairs = stand_in(bucket, launch)
        copies[:] = [copy for _, copy, _, _ in pairs]
        return pairs

    def announced_run(bucket: Bucket, launch: Launch) -> None:
        gradients = launch.gradients or [parameter.grad for parameter in bucket.parameters]
        columns = (bucket.parameters, gradients, *bucket.states)
        active = [tensor for column in columns for tensor, takes_part in zip(column, launch.active, strict=True) if takes_part]
        with memory(*(tensor for tensor in active if tensor is not None), *copies):
            run(bucket, launch)
        copies.clear()

    gpu.run, Bucket.stand_in = announced_run, noted_stand_in  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        gpu.run, Bucket.stand_in = run, stand_in  # type: ignore[method-assign]
