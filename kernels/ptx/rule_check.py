"""A rule alone, without an optimizer, compiled and executed: what `python -m fusedopt check` does with it."""

from __future__ import annotations

import numpy
import torch
from torch import Tensor

from fusedopt.kernels import gpu_kernels
from fusedopt.kernels.formats import FORMATS
from fusedopt.kernels.math import ARRAYS
from fusedopt.kernels.ptx import offline, steps, table
from fusedopt.kernels.ptx.driver import TARGETS, memory
from fusedopt.kernels.rule import Rule, Update
from fusedopt.kernels.tables import Kind


def kind_of(update: Update, dtype: torch.dtype) -> Kind:
    """Return what a kernel is compiled for where everything is stored in ``dtype``."""
    return Kind(update, (FORMATS[dtype],) * (2 + len(update.states)))


def compiled_cost(update: Update, dtype: torch.dtype, target: str) -> tuple[table.Cost, list[str]]:
    """Return what the kernel of ``update`` costs on ``target``, and in words the limits that it exceeds."""
    kind = kind_of(update, dtype)
    found = table.cost(offline.compile_update(kind, target), target)
    return found, table.violations(kind, found)


def differing_elements(a: Tensor, b: Tensor) -> int:
    """Return how many elements differ in a bit; one NaN is as good as another."""
    differ = (a != b) | (a.signbit() != b.signbit())
    return int((differ & ~(a.isnan() & b.isnan())).sum())


def execute_rule(rule: Rule, target: str, size: int = 2 * gpu_kernels.BLOCK + 5) -> dict[str, int]:
    """Execute ``rule`` on random float32 elements and coefficients; return by array how many elements differ from NumPy.

    Args:
        rule: what is executed.
        target: whose PTX.
        size: elements.

    Raises:
        PtxError: for a bad access.
    """
    update = Update(rule)
    kind = kind_of(update, torch.float32)
    generator = torch.Generator().manual_seed(0)
    count = 2 + len(rule.states)
    arrays = torch.randn(count, size, generator=generator).unbind()
    # States are averages of squares more often than not.
    arrays = (*arrays[:2], *(state.abs() for state in arrays[2:]))
    coefficients = torch.cat([torch.ones(2), torch.rand(update.coefficient_count - 1, generator=generator)])
    p, g, *states = (array.numpy().copy() for array in arrays)
    with numpy.errstate(all="ignore"):
        right = update.apply(ARRAYS, p, g, states, list(coefficients[1:].numpy()))
    owned = [array.clone() for array in arrays]
    chunks = torch.tensor([[0, index] for index in range(-(-size // gpu_kernels.BLOCK))], dtype=torch.int32)
    by_position, by_name = gpu_kernels.run_arguments(
        kind,
        addresses=torch.tensor([array.data_ptr() for array in owned]),
        sizes=torch.tensor([size]),
        chunks=chunks,
        row_of_tensor=torch.tensor([0]),
        coefficients=coefficients,
        found_inf=None,
        tensors=1,
        aligned=all(array.data_ptr() % 16 == 0 for array in owned),
        lanes=TARGETS[target].warp_size,
    )
    with steps.executing(target), memory(*owned):
        gpu_kernels.kernel(kind).run[(len(chunks),)](*by_position, **by_name)
    found = [owned[0], *owned[2:]]
    return {
        name: differing_elements(mine, torch.from_numpy(numpy.asarray(theirs, numpy.float32)))
        for name, mine, theirs in zip(("p", *rule.states), found, right, strict=True)
    }
