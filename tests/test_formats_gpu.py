"""Short formats on GPUs that are not here: the PTX of their kernels executed on the CPU, and their machine code held to limits."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install triton (Linux), or fusedopt's extra [triton]")

from fusedopt.kernels.formats import BFLOAT16_BY_CHANCE, CODES, FORMATS, MASTERS
from fusedopt.kernels.ptx import execute, offline, steps, table
from fusedopt.kernels.rule import Update
from fusedopt.kernels.rules import adam, decoupled_decay
from fusedopt.kernels.tables import Kind
from machines import each_machine
from test_formats import VARIANTS, by, equal, make, train

pytestmark = [pytest.mark.triton, pytest.mark.compiled]

QUICK = ("8bit", "split8", "by chance", "Adamax", "average")


@pytest.mark.skipif(execute.obstacle() is not None, reason=str(execute.obstacle()))
@each_machine
@pytest.mark.parametrize(
    ("name", "dtype", "options"),
    [
        pytest.param(*row, marks=[] if each in QUICK else pytest.mark.proof, id=each)
        for each, row in VARIANTS.items()
        if each not in ("float16", "clipped")
    ],
)
def test_bits_of_numba(name, dtype, options, machine):
    """Ends of blocks and of tensors included, with every access in bounds."""
    shapes = [(70, 67), (10,), (1300, 4)]
    with machine.running() as session:
        ours = train(make(name, dtype, shapes, machine.device, **options), 3)
    assert session.launches
    with machine.running():
        train(ours, 1, first=3)
    truth = by("numba", name, dtype, options, shapes)
    assert equal(ours, truth)


@pytest.mark.skipif(execute.obstacle() is not None, reason=str(execute.obstacle()))
def test_a_device_counts_the_steps_of_chance():
    """Where the device computes coefficients, the step that random bits come from is its own; what it skips is not counted."""
    runs = []
    for scaled in (False, True):
        optimizer = make(state_format="8bit", shapes=[(5000,)])
        with steps.executing("sm_90"):
            for step in range(3):
                if scaled:
                    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(float(step == 1))
                if scaled or step != 1:
                    train(optimizer, 1, first=step)
        runs.append(optimizer)
    assert equal(*runs)


FLOAT32, BFLOAT16 = FORMATS[torch.float32], FORMATS[torch.bfloat16]
#: The formats of a kernel, and the registers that it may take.
KINDS = {
    "8bit": ((FLOAT32, FLOAT32, CODES["relative"], CODES["root"]), 112),
    "bf16": ((FLOAT32, FLOAT32, BFLOAT16_BY_CHANCE, BFLOAT16_BY_CHANCE), 88),
    "8bit, bfloat16": ((BFLOAT16, BFLOAT16, CODES["relative"], CODES["root"]), 112),
    "split16": ((MASTERS["split16"], BFLOAT16, CODES["relative"], CODES["root"]), 128),
}


@pytest.mark.parametrize(("formats", "registers"), KINDS.values(), ids=KINDS)
def test_machine_code(formats, registers):
    """No spills, and no shared memory: what a block has in common is found by exchanges within a warp."""
    found = table.cost(offline.compile_update(Kind(Update(adam, decoupled_decay), formats), "sm_90"), "sm_90")
    assert (found.spilled, found.shared, found.float64, found.approximate, found.threads) == (0, 0, 0, 0, 32)
    assert found.registers <= registers
    # The parameter and its gradient by 16 bytes a thread.
    assert found.loads[128] >= 2
    assert found.stores[128] >= 1
