"""What `make gpu-proof` writes down: the costs of all kernels, compiled for GPUs that are not here, beside their limits."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import triton

import fusedopt
from fusedopt.kernels import rules
from fusedopt.kernels.formats import FORMATS
from fusedopt.kernels.ptx import offline, steps, table
from fusedopt.kernels.ptx.driver import TARGETS
from fusedopt.kernels.ptx.execute import Settings
from fusedopt.kernels.rule import Rule, Update
from fusedopt.kernels.rules import decoupled_decay
from fusedopt.kernels.tables import Kind

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import test_gpu_mutations

RULES = {name: rule for name, rule in vars(rules).items() if isinstance(rule, Rule)}
#: Types of the parameter and its gradient, and of the states.
STORED = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "bfloat16, float32 states": (torch.bfloat16, torch.float32),
    "float16": (torch.float16, torch.float16),
    "float64": (torch.float64, torch.float64),
}
#: What is shown for itself.
SHOWN = {"gradient_descent": "SGD", "momentum": "SGD with momentum", "adam": "AdamW", "amsgrad": "AdamW with AMSGrad"}

PAGE = Path(__file__).with_name("gpu_proof.md")

TEXT = """\
# Proof without a GPU

This page is written by `make gpu-proof`, which compiles every rule in every format for {targets} by Triton {triton}, reads the
machine code, and executes the PTX of whole optimizer steps, instruction by instruction, on a CPU. **None of it was run on a
GPU**: that a kernel is right has been seen of its PTX and not of what `ptxas` makes of it, and times are not known.

## What is executed

`tests/test_gpu_executed.py` runs the sm_90 PTX of every optimizer, dtype and option through the public interface: the
parameters, the tables of addresses, the coefficients, and the kernel that computes coefficients on the device. The results equal
those of the Numba kernels bit for bit; each access is checked for bounds, alignment and races; programs and threads in reversed
and in shuffled order give the same bits. `tests/test_gpu_captured.py` notes the launches and writes of a step once and
executes them many times, as a CUDA graph would: each time the step reads the learning rate, the loss scale and what the scaler
found, and counts. Both files hold the tests of a GPU as well, which run where there is one.

An AdamW step in float32 moves {bytes:.3f} bytes a parameter: {ideal:.0f} for the
parameter, its gradient and its two moments, and {overhead:.2f} % more for tables.

`tests/test_gpu_mutations.py` plants {faults} faults, one at a time, in the kernels' text and in what the host hands them: masks and
blocks that are off by one, alignment that is promised and not there, offsets of 32 bits, stale addresses, plain divisions, rows
and signs that are mistaken. Each is caught by executing, or by the limits below.

## Limits

Kernels of aligned buckets: no register spilled, no shared memory, at most {registers} registers a thread ({rdna} on gfx1100,
which has three times as many), the widest array in 128-bit accesses, no instruction on float64 numbers but for float64
parameters, no division and no root that is not correctly rounded.

{violations}

## Some kernels

Instructions are those of the machine code, of full and ragged blocks together, for each element that a thread updates; occupancy
is the part of a multiprocessor's threads that registers leave room for.

{shown}

## The worst of all rules

{worst}
"""


def kind(rule: Rule, stored: str) -> Kind:
    """Return what a kernel of ``rule`` behind decoupled weight decay is compiled for."""
    given, states = STORED[stored]
    update = Update(rule, decoupled_decay)
    return Kind(update, (FORMATS[given],) * 2 + (FORMATS[states],) * len(update.states))


def costs() -> Iterator[tuple[str, str, table.Cost, list[str]]]:
    """Yield rule, format, cost and exceeded limits of every kernel."""
    for name, rule in RULES.items():
        for stored in STORED:
            for target in TARGETS:
                own = kind(rule, stored)
                found = table.cost(offline.compile_update(own, target), target)
                yield name, stored, found, table.violations(own, found)


def bytes_of_adamw(size: int = 1_000_000) -> float:
    """Return the bytes that an executed AdamW step in float32 loads and stores for each parameter."""
    p = torch.nn.Parameter(torch.zeros(size))
    p.grad = torch.ones(size)
    optimizer = fusedopt.AdamW([p])
    with steps.executing("sm_90", Settings(races=False)) as session:
        optimizer.step()
    counts = session.counts()
    return (counts.bytes_loaded + counts.bytes_stored) / size


def _rows(titles: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [titles, ["---"] * len(titles), *rows])


def page() -> str:
    """Return the text of the page."""
    found = list(costs())
    exceeded = [
        f"- `{name}` in {stored} on {cost.target}: {'; '.join(messages)}" for name, stored, cost, messages in found if messages
    ]
    moved = bytes_of_adamw()
    titles = ["registers", "occupancy", "128-bit loads, stores", "instructions an element"]
    return TEXT.format(
        targets=", ".join(TARGETS),
        triton=triton.__version__,
        bytes=moved,
        ideal=28,
        faults=sum(map(len, (test_gpu_mutations.KERNEL, test_gpu_mutations.HOST, test_gpu_mutations.CODES))),
        overhead=(moved / 28 - 1) * 100,
        registers=table.MOST_REGISTERS["sm_90"],
        rdna=table.MOST_REGISTERS["gfx1100"],
        violations="\n".join(
            [f"Of {len(found)} kernels these exceed one:", "", *exceeded] if exceeded else [f"All {len(found)} kernels keep them."]
        ),
        shown=_rows(
            ["optimizer", "format", "target", *titles],
            [
                [
                    SHOWN[name],
                    stored,
                    cost.target,
                    str(cost.registers),
                    f"{cost.occupancy:.0%}",
                    f"{cost.loads.get(128, 0)}, {cost.stores.get(128, 0)}",
                    f"{cost.instructions_per_element():.0f}",
                ]
                for name, stored, cost, _ in found
                if name in SHOWN and stored in ("float32", "bfloat16")
            ],
        ),
        worst=_rows(
            ["format", "target", "registers", "lowest occupancy", "spilled", "shared", "float64", "approximate"],
            [
                _worst(stored, target, [c for _, s, c, _ in found if (s, c.target) == (stored, target)])
                for stored in STORED
                for target in TARGETS
            ],
        ),
    )


def _worst(stored: str, target: str, each: list[table.Cost]) -> list[str]:
    numbers = [max(getattr(cost, name) for cost in each) for name in ("spilled", "shared", "float64", "approximate")]
    lowest = min(cost.occupancy for cost in each)
    return [stored, target, str(max(cost.registers for cost in each)), f"{lowest:.0%}", *map(str, numbers)]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
    sys.exit()
