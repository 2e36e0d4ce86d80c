"""Sections on whole steps on the CPU: each optimizer on each case, against the others."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace

from ..run import MAIN_OPTIMIZERS, MANY_ELEMENTS
from . import cells
from .page import Picture, Section, Table

#: Other programs kept a third of a core or more in the minute before.
BUSY_LOAD = 0.3


def wrong_subjects(record: SimpleNamespace) -> list[str]:
    """A line for each subject that computed something else than torch's for-loop, or failed."""
    return [
        f"{timing.subject}, {result.optimizer}, {result.title}: {timing.wrong}"
        for result in [*record.results, *record.bfloat16, *record.formats]
        for timing in result.timings
        if timing.wrong
    ]


def ratio_table(results: Iterable[SimpleNamespace]) -> Table:
    """The table of the README: torch's fused step against ours."""
    heading = [
        "optimizer",
        "case",
        "elements",
        "torch, ms",
        "fusedopt, ms",
        "torch / ours",
        "moved gradients",
        "GB/s",
        "of the limit",
    ]
    rows = []
    for result in results:
        ours, theirs = cells.timing_of(result, "fusedopt"), cells.timing_of(result, result.baseline)
        if ours and theirs and ours.milliseconds:
            numbers = [cells.number(theirs.milliseconds.median), cells.number(ours.milliseconds.median), cells.spread(ours.ratio)]
            numbers += [cells.spread(ours.moved_ratio), f"{ours.gigabytes_per_second:.1f}", cells.percent(ours.share_of_limit)]
            rows.append([result.optimizer, result.title, cells.count(result.elements), *numbers])
    return Table(heading, rows, frozenset({0, 1}))


def summary(record: SimpleNamespace) -> Section:
    section = Section("In short")
    for name in MAIN_OPTIMIZERS:
        ratios = [
            (t.ratio.median, r.title) for r in cells.on_cpu(record, [name]) if (t := cells.timing_of(r, "fusedopt")) and t.ratio
        ]
        if ratios:
            (least, slow), (most, fast) = min(ratios), max(ratios)
            section.blocks.append(
                f"**{name}**, whole steps against torch's fused implementation: between {cells.number(least)} ({slow}) and "
                f"{cells.number(most)} ({fast}) times as fast."
            )
    noise = sorted(cells.noise(t.ratio) for r in cells.on_cpu(record, None) if (t := cells.timing_of(r, "fusedopt")) and t.ratio)
    if noise:
        section.blocks.append(
            f"Noise: quartiles of a ratio are {100 * noise[len(noise) // 2]:.1f} % of it apart in the middle contest, and "
            f"{100 * noise[-1]:.0f} % in the noisiest. They stand beside each ratio."
        )
    load = record.machine.load
    if load is not None and load > BUSY_LOAD:
        section.blocks.append(
            f"**Other programs were running** when this began (load {load:.1f}): what they took, and from whom, shows in these "
            "numbers."
        )
    section.blocks += [f"**WRONG, so not timed:** {line}." for line in wrong_subjects(record)]
    section.blocks.append(f"Machine: {cells.machine_line(record.machine)}. Repeat with `{record.command}`, from a checkout.")
    return section


def main_optimizers(record: SimpleNamespace) -> list[Section]:
    sections = []
    for name in MAIN_OPTIMIZERS:
        results = cells.on_cpu(record, [name])
        if results:
            slow = [title for title in ("torch loop", "torch foreach") if any(cells.timing_of(r, title) for r in results)]
            rows = []
            for result in results:
                ours = cells.timing_of(result, "fusedopt")
                if not (ours and ours.milliseconds and result.baseline):
                    continue
                times = [cells.median(cells.timing_of(result, title)) for title in (*slow, "torch fused", "fusedopt")]
                ratios = [cells.spread(ours.ratio), cells.spread(ours.moved_ratio)]
                rates = [
                    f"{ours.gigabytes_per_second:.1f}",
                    cells.number(result.limit_gigabytes_per_second.median),
                    cells.percent(ours.share_of_limit),
                ]
                rows.append([result.title, f"{result.tensors:,}", cells.count(result.elements), *times, *ratios, *rates])
            heading = ["case", "tensors", "elements", *(f"{title}, ms" for title in (*slow, "torch fused", "fusedopt"))]
            heading += ["torch fused / ours", "moved gradients", "ours, GB/s", "limit, GB/s", "of the limit"]
            sections.append(Section(f"{name}, float32, on the CPU", [Table(heading, rows)] if rows else []))
    if sections and sections[0].blocks:
        sections[0].blocks.insert(
            0,
            "A whole `optimizer.step()`, medians. *torch fused / ours*: ratio of the times, round by round, above 1 where fusedopt "
            "is faster; quartiles in brackets. *Moved gradients*: the same ratio where each step finds its gradients at new "
            "addresses, as after `zero_grad()`. *GB/s*: the bytes that the step has to move, over its time.",
        )
        sections[-1].blocks.append(Picture("speed", "Elements updated per second; the axis is logarithmic."))
        sections[-1].blocks.append(
            Picture(
                "limit_shares",
                "Share of what the memory, or the caches where a case fits into them, can deliver for the same streams.",
            )
        )
        crowded = [r.title for r in cells.on_cpu(record, MAIN_OPTIMIZERS[:1]) if not cells.others([r])]
        if crowded and cells.others(cells.on_cpu(record, MAIN_OPTIMIZERS[:1])):
            sections[-1].blocks.append(f"For other packages there was no memory beside them on {cells.listed(crowded)}.")
        large = [result.title for result in cells.on_cpu(record, MAIN_OPTIMIZERS[:1]) if result.elements > MANY_ELEMENTS]
        if large:
            sections[-1].blocks.append(
                f"torch's for-loop and lists of tensors take seconds a step on {cells.listed(large)}, and were left out there."
            )
    return sections


def other_packages(record: SimpleNamespace) -> Section:
    """How many times as fast as other packages ours is."""
    results = [r for r in cells.on_cpu(record, None) if cells.others([r])]
    packages = cells.others(results)
    rows = []
    for result in results:
        theirs = [cells.timing_of(result, package) for package in packages]
        times = [cells.median(timing) for timing in (cells.timing_of(result, "fusedopt"), *theirs)]
        rows.append([result.optimizer, result.title, *times, *map(cells.of_ours, theirs)])
    remarks = {subject.name: cells.remark(subject) for subject in record.subjects}
    said = [f"*{package}*: {remarks[package]}." for package in packages if remarks.get(package)]
    text = (
        "*Name / ours*: its time over that of fusedopt, round by round, so how many times as fast fusedopt is; quartiles in "
        "brackets. All as they come, with torch's hyperparameters."
    )
    heading = ["optimizer", "case", *(f"{name}, ms" for name in ("fusedopt", *packages)), *(f"{name} / ours" for name in packages)]
    return Section("Other packages", [" ".join([text, *said]), Table(heading, rows, frozenset({0, 1}))] if rows else [])


def beside(theirs: SimpleNamespace, ours: SimpleNamespace) -> list[str]:
    """The times of both, and their ratio with the same gradients and with moved ones."""
    times = [cells.number(each.milliseconds.median) for each in (theirs, ours)]
    return [*times, cells.spread(ours.ratio), cells.spread(ours.moved_ratio)]


def other_optimizers(record: SimpleNamespace) -> Section:
    names = list(dict.fromkeys(r.optimizer for r in record.results if r.optimizer not in MAIN_OPTIMIZERS))
    rows = []
    for result in cells.on_cpu(record, names):
        ours, theirs = cells.timing_of(result, "fusedopt"), cells.timing_of(result, result.baseline)
        if ours and theirs and ours.milliseconds:
            numbers = beside(theirs, ours)
            at_limit = cells.number(ours.ratio.median / min(1.0, ours.share_of_limit.median))
            rows.append([result.optimizer, result.title, theirs.subject, *numbers, cells.percent(ours.share_of_limit), at_limit])
    if not rows:
        return Section("Other optimizers")
    heading = ["optimizer", "case", "torch's best", "torch, ms", "fusedopt, ms", "torch / ours", "moved gradients", "of the limit"]
    heading.append("ratio at the limit")
    text = (
        "Against the fastest that torch has on a CPU: its fused implementation where there is one, else the faster of its for-loop "
        "and its lists of tensors."
    )
    ceiling = (
        "*Ratio at the limit*: what torch / ours would be if our step moved its bytes at the whole of the memory limit; where it "
        "does, the ratio itself. A ratio well above it cannot be had on this machine, whatever the kernel."
    )
    return Section("Other optimizers", [text, Table(heading, rows, frozenset({0, 1, 2})), ceiling])


def bfloat16(record: SimpleNamespace) -> Section:
    rows = []
    for result in record.bfloat16:
        ours, theirs = cells.timing_of(result, "fusedopt, bfloat16"), cells.timing_of(result, result.baseline)
        if ours and theirs and ours.milliseconds:
            numbers = beside(theirs, ours)
            rows.append(
                [result.optimizer, result.title, *numbers, f"{ours.gigabytes_per_second:.1f}", cells.percent(ours.share_of_limit)]
            )
    heading = [
        "optimizer",
        "case",
        "torch float32, ms",
        "fusedopt, ms",
        "torch / ours",
        "moved gradients",
        "ours, GB/s",
        "of the limit",
    ]
    text = "Parameters and gradients in bfloat16 with states in float32, against torch's fused step all in float32."
    return Section("bfloat16", [text, Table(heading, rows, frozenset({0, 1}))] if rows else [])


def ends(record: SimpleNamespace) -> Section:
    rows = []
    for end in record.ends:
        if not end.wrong:
            times = [cells.number(each.median) for each in (end.torch_milliseconds, end.milliseconds)]
            rows.append([end.end, end.title, *times, cells.spread(end.ratio)])
    wrong = [f"**WRONG, so not timed:** {end.end}, {end.title}: {end.wrong}." for end in record.ends if end.wrong]
    text = (
        "AdamW with what stands around it in training. torch: `GradScaler.unscale_`, `clip_grad_norm_(foreach=True)`, the fused "
        "step, `AveragedModel` with a multi-average, `zero_grad(set_to_none=False)`, as far as the name says; fusedopt: one `step` "
        "with `max_grad_norm`, `ema_decay` and `zero_grad=True`. Gradients are written anew before each, outside of the time."
    )
    table = Table(["end of a step", "case", "torch, ms", "fusedopt, ms", "torch / ours"], rows, frozenset({0, 1}))
    return Section("The whole end of a training step", [text, table, *wrong] if record.ends else [])


def subjects(record: SimpleNamespace) -> Section:
    rows = []
    for subject in record.subjects:
        exact, short = (
            [t for result in results for t in result.timings if t.subject == subject.name]
            for results in (record.results, record.formats)
        )
        wrong = next((timing.wrong for timing in (*exact, *short) if timing.wrong), None)
        measured = "measured" if exact or short else "not chosen"
        errors = [timing.error_ulps for timing in exact if timing.error_ulps is not None]
        error = f"{max(errors):.2g} ulps" if errors else ""
        said = subject.obstacle or (f"wrong, so not timed: {wrong}" if wrong else measured)
        rows.append([subject.name, said, error, cells.remark(subject)])
    heading = ["implementation", "here", "largest error in float32", "what it is"]
    text = (
        "torchao has AdamW in 8 bits, 4 bits and fp8 alone, so it takes part in short formats. The errors of all short formats "
        "stand there."
    )
    return Section("Who took part", [Table(heading, rows, frozenset({0, 1, 3})), text])
