"""What `make gpu-proof` writes down: the costs of all kernels, compiled for GPUs that are not here, beside their limits."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import triton

import fusedopt
from fusedopt.kernels import codes, gpu_kernels, rules
from fusedopt.kernels.formats import BFLOAT16_BY_CHANCE, CODES, FORMATS, MASTERS
from fusedopt.kernels.ptx import offline, steps, table
from fusedopt.kernels.ptx.driver import TARGETS
from fusedopt.kernels.ptx.execute import Settings
from fusedopt.kernels.rule import Rule, Update
from fusedopt.kernels.rules import decoupled_decay
from fusedopt.kernels.tables import Kind

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import test_gpu_mutations
from bench import readme
from bench.prediction import GPUS, Gpu
from bench.report.costs import host_table
from bench.run import read

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

_FLOAT32, _BFLOAT16 = FORMATS[torch.float32], FORMATS[torch.bfloat16]
#: Formats of the parameter, its gradient and the moments of AdamW whose numbers are rounded by chance or kept in codes.
SHORT = {
    "8 bits": (_FLOAT32, _FLOAT32, CODES["relative"], CODES["root"]),
    "bfloat16 by chance, float32 parameters": (_FLOAT32, _FLOAT32, BFLOAT16_BY_CHANCE, BFLOAT16_BY_CHANCE),
    "bfloat16 by chance": (BFLOAT16_BY_CHANCE, _BFLOAT16, BFLOAT16_BY_CHANCE, BFLOAT16_BY_CHANCE),
    "8 bits, bfloat16 parameters": (_BFLOAT16, _BFLOAT16, CODES["relative"], CODES["root"]),
    **{f"8 bits, {name} masters": (form, _BFLOAT16, CODES["relative"], CODES["root"]) for name, form in MASTERS.items()},
}
#: What a load from a busy memory is taken to need, in seconds; of an idle one half of it and less has been measured.
LATENCY = 0.8e-6
#: Lanes of a multiprocessor, and the threads that it holds.
MULTIPROCESSORS = {"sm_80": (64, 2048), "sm_90": (128, 2048), "gfx942": (64, 2048)}

#: Files of tests that execute PTX; those of `test_gpu_compiled` read machine code.
EXECUTING = (
    "test_gpu_executed",
    "test_gpu_captured",
    "test_gpu_step_options",
    "test_formats_gpu",
    "test_gpu_mutations",
    "test_ptx",
    "test_check",
)

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
found, and counts. Both files hold the tests of a GPU as well, which run where there is one. Steps with another learning rate,
weight decay and number of tensors each time, 59 of them, compile one kernel.

{executed:,} tests execute PTX: {by_file}.

An AdamW step in float32 moves {bytes:.3f} bytes a parameter: {ideal:.0f} for the
parameter, its gradient and its two moments, and {overhead:.2f} % more for tables.

`tests/test_gpu_mutations.py` plants {faults} faults, one at a time, in the kernels' text and in what the host hands them: masks and
blocks that are off by one, alignment that is promised and not there, offsets of 32 bits, stale addresses, plain divisions, rows
and signs that are mistaken. Each is caught by executing, or by the limits below.

The host's part of an AdamW step, with a driver of Triton's that launches nothing, in microseconds (from `bench/results`):

{host}

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

## Short formats

Numbers that are rounded by chance, and blocks of codes: AdamW's kernels, of one warp, which takes whole blocks one after the other
and then the end of the tensor under a mask. There is no shared memory and no division or root that is not correctly rounded.
Registers a thread, and the bytes that are spilled, if any:

{short}

NVIDIA's GPUs exceed the limit of 64 here, and so do `fp32` and `split16` masters on gfx90a and gfx942, and `fp32` and `split8`
masters on gfx1100 (96 there). What a block has in common is known when all its numbers are, so each of 32 threads keeps two
moments and the random bits of 8 elements meanwhile. Tried on sm_90, with codes of some more instructions: with `maxnreg=64`
ptxas spills 40 to 416 bytes a thread, with 96 up to 184. With the two halves of a thread's elements computed one after the
other and `maxnreg=64`, the full blocks need no spill but for `split8` masters (72 bytes), and the end of a tensor, by single
elements under a mask, spills 16 to 216. Fewer elements a thread would be a block for two warps, which have only shared memory
and a barrier in common.

## Bytes under way

What the limit is for: as many bytes have to be on their way from the memory as it delivers in the time that one load takes, which
is bandwidth times latency (Little's law), here {latency:.1f} µs of the published bandwidth for each multiprocessor. Below are the
bytes that resident threads can have asked for at once, by the registers of each kernel; of all rules the least. It is enough
everywhere but for `split8` masters on an H200, which would get six sevenths of its bandwidth at best, and barely enough there for 8
bits with bfloat16 parameters.

{under_way}
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


def short_costs() -> dict[tuple[str, str], table.Cost]:
    """Return the cost of AdamW's kernel in each short format, for each target."""
    update = Update(rules.adam, decoupled_decay)
    return {
        (name, target): table.cost(offline.compile_update(Kind(update, formats), target), target)
        for name, formats in SHORT.items()
        for target in TARGETS
    }


def _loaded(own: Kind) -> int:
    """Return the bytes that the update of one element loads."""
    return sum(form.itemsize + (0 if form.master is None else form.master.itemsize) for form in own.formats)


def _under_way(cost: table.Cost, own: Kind) -> float:
    """Return the bytes that the threads of a multiprocessor can have asked for at once."""
    elements = (codes.BLOCK if own.coded else gpu_kernels.BLOCK) / cost.threads
    return cost.occupancy * MULTIPROCESSORS[cost.target][1] * elements * _loaded(own)


def _needed(gpu: Gpu) -> float:
    """Return the bytes that have to be under way for a multiprocessor of ``gpu``."""
    return gpu.bandwidth * LATENCY / (gpu.lanes / MULTIPROCESSORS[gpu.target][0])


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


def executed() -> dict[str, int]:
    """Return how many tests of each file execute PTX on the CPU."""
    chosen = ["-m", "compiled and not gpu", "--gpu-proof", "--collect-only", "-q", "-p", "no:cacheprovider"]
    files = [str(path) for name in EXECUTING for path in [Path(test_gpu_mutations.__file__).with_name(f"{name}.py")]]
    # The interpreter of Triton, where it is asked for, would leave nothing to compile.
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "pytest", *chosen, *files]
    listed = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    names = [Path(line.split("::")[0]).stem for line in listed.splitlines() if "::" in line]
    return {name: names.count(name) for name in EXECUTING}


def host() -> str:
    """Return the table of the newest whole run."""
    path = readme.newest(Path(__file__).resolve().parent.parent / "bench" / "results")
    assert path is not None, "bench/results holds no record of a whole run: make one by python -m bench"
    table_of = host_table(read(path).gpu_host_costs)
    return _rows(list(table_of.heading), [list(row) for row in table_of.rows])


def page() -> str:
    """Return the text of the page."""
    tests = executed()
    found = list(costs())
    exceeded = [
        f"- `{name}` in {stored} on {cost.target}: {'; '.join(messages)}" for name, stored, cost, messages in found if messages
    ]
    moved = bytes_of_adamw()
    short = short_costs()
    kinds = {name: Kind(Update(rules.adam, decoupled_decay), formats) for name, formats in SHORT.items()}
    least = {
        **{
            (stored, gpu.name): min(
                _under_way(cost, kind(RULES[name], stored))
                for name, s, cost, _ in found
                if (s, cost.target) == (stored, gpu.target)
            )
            for stored in STORED
            for gpu in GPUS
        },
        **{(name, gpu.name): _under_way(short[name, gpu.target], own) for name, own in kinds.items() for gpu in GPUS},
    }
    titles = ["registers", "occupancy", "128-bit loads, stores", "instructions an element"]
    return TEXT.format(
        targets=", ".join(TARGETS),
        triton=triton.__version__,
        executed=sum(tests.values()),
        by_file=", ".join(f"{count:,} in `tests/{name}.py`" for name, count in tests.items()),
        host=host(),
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
        latency=LATENCY * 1e6,
        short=_rows(
            ["AdamW's states", *TARGETS],
            [[name, *(_short_cell(short[name, target]) for target in TARGETS)] for name in SHORT],
        ),
        under_way=_rows(
            ["KiB of a multiprocessor", *(gpu.name for gpu in GPUS)],
            [
                ["**needed**", *(f"**{_needed(gpu) / 1024:.0f}**" for gpu in GPUS)],
                *([name, *(f"{least[name, gpu.name] / 1024:.0f}" for gpu in GPUS)] for name in (*STORED, *SHORT)),
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


def _short_cell(cost: table.Cost) -> str:
    return str(cost.registers) + (f" ({cost.spilled} spilled)" if cost.spilled else "")


def _worst(stored: str, target: str, each: list[table.Cost]) -> list[str]:
    numbers = [max(getattr(cost, name) for cost in each) for name in ("spilled", "shared", "float64", "approximate")]
    lowest = min(cost.occupancy for cost in each)
    return [stored, target, str(max(cost.registers for cost in each)), f"{lowest:.0%}", *map(str, numbers)]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
    sys.exit()
