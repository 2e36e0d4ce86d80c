"""Sections on what a step costs apart from its kernel, on first steps and on other surroundings."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

from .. import plots
from . import cells
from .page import Picture, Section, Table


def costs(record: SimpleNamespace) -> Section:
    section = Section("What a step costs apart from its kernel")
    if record.host_costs:
        section.blocks.append("AdamW on tensors of one element each: nearly all of such a step is the host's.")
        section.blocks.append(host_table(record.host_costs))
        section.blocks.append(Picture("host_costs", "Both axes are logarithmic."))
    if record.gpu_host_costs:
        section.blocks.append(
            "The host's part of such a step on a GPU. *Nothing launched*: the step is that of a GPU, with the tensors on the host "
            "and a driver of Triton's that leaves launches out, so what CUDA itself takes of the host is not in the time. "
            "*Capturable*: the coefficients are computed on the device, by a second kernel."
        )
        section.blocks.append(host_table(record.gpu_host_costs))
    if record.breakdowns:
        section.blocks.append(
            "The same by function, from Python's profiler: each with the compiled code that it calls, checks and kernel included, "
            "but without the Python functions that it calls. The profiler adds to each call; the step without it stands in the "
            "last line."
        )
        section.blocks.append(_breakdown_table(record.breakdowns))
        section.blocks.append(Picture("breakdown", "The largest parts, and all others added up."))
    if record.thread_starts:
        heading = ["subject", "threads", "steps back to back, µs", "after a pause of 20 ms, µs"]
        rows = [
            [s.subject, str(s.threads), cells.spread(s.back_to_back, 3), cells.spread(s.after_pause, 3)]
            for s in record.thread_starts
        ]
        section.blocks.append(
            "Start of threads: by how much AdamW on 262,144 elements takes longer on all threads than its host's part (a step of "
            "one element) and its work (the rest of a step on one thread), divided among them. Below zero the threads' caches gain "
            "more than their start costs."
        )
        section.blocks.append(Table(heading, rows))
    return section


def host_table(costs: Sequence[SimpleNamespace]) -> Table:
    """Microseconds by number of tensors."""
    subjects = list(dict.fromkeys(cost.subject for cost in costs))
    rows = []
    for tensors in dict.fromkeys(cost.tensors for cost in costs):
        own = {cost.subject: cost for cost in costs if cost.tensors == tensors}
        spreads = [*(own[subject].same for subject in subjects), *(own[subject].moved for subject in subjects)]
        rows.append([f"{tensors:,}", *(cells.spread(found, 3) for found in spreads)])
    heading = [*(f"{subject}, µs" for subject in subjects), *(f"{subject}, new gradients, µs" for subject in subjects)]
    return Table(["tensors", *heading], rows)


def _breakdown_table(breakdowns: Sequence[SimpleNamespace]) -> Table:
    names = plots.largest_parts(breakdowns)
    purposes = {part.function: part.purpose for each in breakdowns for part in each.parts}

    def cell(each: SimpleNamespace, microseconds: float) -> str:
        return f"{cells.number(microseconds)} ({microseconds / each.profiled_microseconds:.0%})"

    rows = [
        [f"`{name}`", purposes[name], *(cell(each, plots.microseconds_of(each, name)) for each in breakdowns)] for name in names
    ]
    rest = [sum(part.microseconds for part in each.parts if part.function not in names) for each in breakdowns]
    rows.append(["all other functions", "", *(cell(each, other) for each, other in zip(breakdowns, rest, strict=True))])
    rows.append(["**the step, profiled**", "", *(cells.number(each.profiled_microseconds) for each in breakdowns)])
    rows.append(["**the step by itself**", "", *(cells.number(each.microseconds) for each in breakdowns)])
    return Table(["function", "what it does", *(f"{each.title}, µs" for each in breakdowns)], rows, frozenset({0, 1}))


def first_steps(record: SimpleNamespace) -> Section:
    heading = [
        "optimizer",
        "after installation, s",
        "in a later process, s",
        "of it importing Numba, s",
        "files cached, then added",
    ]
    rows = [
        [
            s.optimizer,
            f"{s.fresh_seconds:.2f}",
            f"{s.warm_seconds:.2f}",
            f"{s.numba_seconds:.2f}",
            f"{s.fresh_files}, then {s.warm_files}",
        ]
        for s in record.first_steps
    ]
    text = (
        "Making an optimizer, and its first step, in a new process: with empty caches, where it compiles, and with warm ones. What "
        "torch itself imports when the first optimizer is made, its own included, has been imported before."
    )
    return Section("First step", [text, Table(heading, rows)] if rows else [])


def surroundings(record: SimpleNamespace) -> Section:
    section = Section("Threads, and a busy core beside")
    heading = ["case", "threads", "torch fused, ms", "fusedopt, ms", "torch / ours"]
    if record.scaling:
        rows = [
            [e.title, str(e.threads), cells.spread(e.fused, 3), cells.spread(e.ours, 3), cells.spread(e.ratio)]
            for e in record.scaling
        ]
        section.blocks += [
            "AdamW on fewer threads.",
            Table(heading, rows),
            Picture("scaling", "The axis of each panel begins at zero."),
        ]
    if record.busy:
        rows = [
            [
                e.title,
                "one core busy" if e.busy else "idle",
                cells.spread(e.fused, 3),
                cells.spread(e.ours, 3),
                cells.spread(e.ratio),
            ]
            for e in record.busy
        ]
        section.blocks.append("AdamW on all threads while another program keeps one core busy, as a worker that loads data does.")
        section.blocks.append(Table([heading[0], "machine", *heading[2:]], rows, frozenset({0, 1})))
        section.blocks.append(Picture("busy", "Each panel has its own axis."))
    return section
