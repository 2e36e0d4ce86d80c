"""Plots of a record, as figures of matplotlib; each implementation has one colour, marker and hatch everywhere."""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH = 9.0
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 6,
    # Letters as shapes: a report looks the same wherever it is opened.
    "svg.fonttype": "path",
}


def _styled(draw: Callable[[SimpleNamespace], Figure | None]) -> Callable[[SimpleNamespace], Figure | None]:
    @functools.wraps(draw)
    def drawn(record: SimpleNamespace) -> Figure | None:
        with mpl.rc_context(STYLE):
            return draw(record)

    return drawn


@dataclass(frozen=True)
class Look:
    """How an implementation is drawn; lightness differs, so that it can be told apart in grey."""

    colour: str
    marker: str
    hatch: str = ""


LOOKS = {
    "fusedopt": Look("#123a7a", "o"),
    "torch fused": Look("#f0a04b", "s", "///"),
    "torch foreach": Look("#a9c9a4", "^", "..."),
    "torch loop": Look("#d9d9d9", "v"),
    "DeepSpeed CPUAdam": Look("#7b3f8c", "D", "xxx"),
    "bitsandbytes": Look("#b5485d", "P"),
    "torchao": Look("#5c8a8a", "X"),
    "optimi": Look("#8c6d46", "*"),
    "optimi foreach": Look("#d8c3a5", "<"),
}
_LIMIT_COLOUR = "#555555"
_FORMAT_MARKERS = "osD^vP*Xh<>p"
_OVERVIEW_LOOKS: tuple[dict[str, Any], ...] = ({"color": "#123a7a"}, {"color": "#9cc3e6", "edgecolor": "black", "linewidth": 0.5})
#: Of the parts of a step, from dark to light; of all others last.
_PART_COLOURS: list[Any] = [*(mpl.colormaps["viridis"](place / 8) for place in range(9)), "#e6e6e6"]


def look(subject: str) -> Look:
    """The look of a subject; dtypes and devices do not count."""
    return LOOKS.get(subject.partition(",")[0], Look("#999999", "h"))


@_styled
def speed(record: SimpleNamespace) -> Figure | None:
    """Elements updated per second by size of the model, a panel for each main optimizer."""
    panels = _by_optimizer(record)
    if not panels:
        return None
    figure, axes = _figure(len(panels), 1, 3.4 * len(panels))
    for axis, (optimizer, results) in zip(axes, panels.items(), strict=True):
        places = range(len(results))
        for subject in _subjects(results):
            points = [(i, result.elements / spread.median / 1e3) for i, result, spread in _times(results, subject)]
            style = look(subject)
            axis.plot(
                *zip(*points, strict=True),
                marker=style.marker,
                color=style.colour,
                markeredgecolor="black",
                markeredgewidth=0.5,
                label=subject,
            )
        limits = [r.limit_gigabytes_per_second.median * 1e3 / r.bytes_per_element for r in results]
        axis.plot(places, limits, linestyle="--", color=_LIMIT_COLOUR, label="memory limit")
        axis.set_yscale("log")
        axis.set_ylabel("million elements per second")
        _label_cases(axis, results)
        axis.set_title(f"{optimizer}: speed by size, smallest model first (up is better)")
        axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


@_styled
def limit_shares(record: SimpleNamespace) -> Figure | None:
    """Share of the memory limit that torch's best and ours reach."""
    panels = _by_optimizer(record)
    if not panels:
        return None
    figure, axes = _figure(1, len(panels), 4.4)
    for axis, (optimizer, results) in zip(axes, panels.items(), strict=True):
        _grouped_bars(
            axis,
            [(r.title, {t.subject: t.share_of_limit for t in r.timings if t.share_of_limit and _fast(t.subject)}) for r in results],
            scale=100.0,
            horizontal=True,
        )
        axis.axvline(100, color=_LIMIT_COLOUR, linestyle="--", linewidth=1.2)
        axis.set_xlabel("% of the memory limit, with quartiles")
        axis.set_title(optimizer)
        axis.invert_yaxis()
    if len(axes) > 1:
        axes[1].set_yticklabels([])
    _legend_below(figure, axes[0])
    return figure


@_styled
def formats(record: SimpleNamespace) -> Figure | None:
    """How many times as fast as torch in float32 short formats are, by the bytes that they move."""
    results = [result for result in record.formats if result.baseline]
    if not results:
        return None
    figure, axes = _figure(1, len(results), 4.0)
    names = list(dict.fromkeys(t.subject for result in results for t in result.timings if t.ratio))
    for axis, result in zip(axes, results, strict=True):
        timings = [timing for timing in result.timings if timing.ratio]
        for timing in timings:
            ratio, index = timing.ratio, names.index(timing.subject)
            axis.errorbar(
                timing.moved_bytes,
                ratio.median,
                yerr=[[ratio.median - ratio.lower_quartile], [ratio.upper_quartile - ratio.median]],
                fmt=_FORMAT_MARKERS[index % len(_FORMAT_MARKERS)],
                color=look(timing.subject).colour,
                markeredgecolor="black",
                markeredgewidth=0.5,
                markersize=8,
                label=timing.subject,
            )
        bytes_moved = sorted(timing.moved_bytes for timing in timings)
        most = max(bytes_moved)
        curve = [bytes_moved[0] + place * (most - bytes_moved[0]) / 50 for place in range(51)]
        axis.plot(curve, [most / each for each in curve], linestyle="--", color=_LIMIT_COLOUR, label="by the bytes alone")
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_xlabel("bytes that a step moves, for an element")
        axis.set_title(result.title + ("" if result.device == "cpu" else ", GPU"))
    axes[0].set_ylabel("times as fast as torch fused in float32")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


@_styled
def host_costs(record: SimpleNamespace) -> Figure | None:
    """Microseconds of a step on tensors of one element."""
    if not record.host_costs:
        return None
    figure, (axis,) = _figure(1, 1, 3.4)
    for subject in dict.fromkeys(cost.subject for cost in record.host_costs):
        own = [cost for cost in record.host_costs if cost.subject == subject]
        style = look(subject)
        for kind, line, face in (("same", "-", style.colour), ("moved", ":", "white")):
            axis.plot(
                [cost.tensors for cost in own],
                [getattr(cost, kind).median for cost in own],
                linestyle=line,
                marker=style.marker,
                color=style.colour,
                markerfacecolor=face,
                label=f"{subject}, gradients {'as they were' if kind == 'same' else 'newly allocated'}",
            )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("tensors of one element")
    axis.set_ylabel("microseconds per step")
    axis.set_title("What a step of AdamW costs the host (down is better)")
    axis.legend(loc="upper left")
    return figure


@_styled
def breakdown(record: SimpleNamespace) -> Figure | None:
    """The parts of a step, stacked."""
    if not record.breakdowns:
        return None
    names = largest_parts(record.breakdowns)
    figure, (axis,) = _figure(1, 1, 1.8 + 0.45 * len(record.breakdowns) + 0.12 * len(names))
    left = [0.0] * len(record.breakdowns)
    rest = [sum(part.microseconds for part in each.parts if part.function not in names) for each in record.breakdowns]
    rows = [(name.removeprefix("fusedopt."), [microseconds_of(each, name) for each in record.breakdowns]) for name in names]
    for (label, widths), colour in zip([*rows, ("all other functions", rest)], _PART_COLOURS, strict=False):
        axis.barh(range(len(widths)), widths, left=left, color=colour, edgecolor="black", linewidth=0.4, height=0.6, label=label)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.set_yticks(range(len(record.breakdowns)), [each.title.replace(", ", ",\n") for each in record.breakdowns])
    axis.invert_yaxis()
    axis.grid(visible=False, axis="y")
    axis.set_xlabel("microseconds per step, under the profiler")
    axis.set_title("Where the time of a step of AdamW goes, by function")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def largest_parts(breakdowns: Sequence[SimpleNamespace]) -> list[str]:
    """Functions that take most of several steps together, as many as there are colours."""
    totals: dict[str, float] = {}
    for each in breakdowns:
        for part in each.parts:
            totals[part.function] = totals.get(part.function, 0.0) + part.microseconds / each.profiled_microseconds
    return sorted(totals, key=lambda name: -totals[name])[: len(_PART_COLOURS) - 1]


def microseconds_of(breakdown: SimpleNamespace, function: str) -> float:
    """What a function takes of a step."""
    return float(sum(part.microseconds for part in breakdown.parts if part.function == function))


@_styled
def scaling(record: SimpleNamespace) -> Figure | None:
    """Times by number of threads, as multiples of the time on one."""
    if not record.scaling:
        return None
    cases = list(dict.fromkeys(each.title for each in record.scaling))
    figure, axes = _figure(1, len(cases), 2.9)
    for axis, title in zip(axes, cases, strict=True):
        own = [each for each in record.scaling if each.title == title]
        threads = [each.threads for each in own]
        for name, spreads in (("torch fused", [e.fused for e in own]), ("fusedopt", [e.ours for e in own])):
            style = look(name)
            axis.plot(threads, [s.median for s in spreads], marker=style.marker, color=style.colour, label=name)
            axis.fill_between(
                threads, [s.lower_quartile for s in spreads], [s.upper_quartile for s in spreads], color=style.colour, alpha=0.2
            )
        axis.plot(threads, [e.limit.median for e in own], linestyle="--", color=_LIMIT_COLOUR, label="memory limit")
        axis.set_xticks(threads)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("threads")
        axis.set_title(title)
    axes[0].set_ylabel("milliseconds per step")
    _legend_below(figure, axes[0])
    return figure


@_styled
def busy(record: SimpleNamespace) -> Figure | None:
    """Times beside a busy core and without one."""
    if not record.busy:
        return None
    cases = list(dict.fromkeys(each.title for each in record.busy))
    figure, axes = _figure(1, len(cases), 2.9)
    for axis, title in zip(axes, cases, strict=True):
        own = [each for each in record.busy if each.title == title]
        bars = [("one core busy" if e.busy else "idle", {"torch fused": e.fused, "fusedopt": e.ours}) for e in own]
        _grouped_bars(axis, bars)
        axis.set_title(title)
    axes[0].set_ylabel("milliseconds per step, with quartiles")
    _legend_below(figure, axes[0])
    return figure


@_styled
def overview(record: SimpleNamespace) -> Figure | None:
    """The picture of the README: how many times as fast as torch's fused step ours is."""
    panels = _by_optimizer(record)
    if not panels:
        return None
    figure, (axis,) = _figure(1, 1, 1.4 + 0.36 * max(map(len, panels.values())))
    results = max(panels.values(), key=len)
    width = 0.8 / len(panels)
    for index, (optimizer, own) in enumerate(panels.items()):
        ratios = {result.case: ours.ratio for result in own if (ours := _ours(result))}
        present = [(place, ratios[result.case]) for place, result in enumerate(results) if result.case in ratios]
        places = [place + (index - (len(panels) - 1) / 2) * width for place, _ in present]
        errors = [
            [spread.median - spread.lower_quartile for _, spread in present],
            [spread.upper_quartile - spread.median for _, spread in present],
        ]
        lengths = [spread.median - 1 for _, spread in present]  # bars begin at equality
        axis.barh(
            places, lengths, width, left=1, xerr=errors, error_kw={"linewidth": 0.8}, **_OVERVIEW_LOOKS[index], label=optimizer
        )
        for y, (_, spread) in zip(places, present, strict=True):
            axis.annotate(f" {spread.median:.3g}", (max(1, spread.upper_quartile), y), va="center", fontsize=8)
    axis.set_yticks(range(len(results)), [result.title for result in results])
    axis.axvline(1, color="black", linewidth=1)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.invert_yaxis()
    axis.grid(visible=False, axis="y")
    axis.set_xlabel("time of torch's fused step / time of ours, with quartiles: right of 1 fusedopt is faster")
    axis.set_title(f"Whole optimizer steps in float32 on {record.machine.threads} threads of {record.machine.cpu}")
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


#: In the order of the report.
FIGURES: dict[str, Callable[[SimpleNamespace], Figure | None]] = {
    "speed": speed,
    "limit_shares": limit_shares,
    "formats": formats,
    "host_costs": host_costs,
    "breakdown": breakdown,
    "scaling": scaling,
    "busy": busy,
}


def svg(figure: Figure, name: str) -> str:
    """A figure as an element of HTML."""
    text = io.StringIO()
    # The same record gives the same file; ids of several plots on one page differ.
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    drawing = text.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    # The sheet decides how wide a plot is.
    return re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", drawing, count=1), count=1)


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure as a picture."""
    with mpl.rc_context(STYLE):
        figure.savefig(path, dpi=130, metadata={"Software": None})


def _figure(rows: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _by_optimizer(record: SimpleNamespace) -> dict[str, list[SimpleNamespace]]:
    """Results on the CPU of optimizers with several cases, by number of elements."""
    found: dict[str, list[SimpleNamespace]] = {}
    for result in record.results:
        if result.device == "cpu" and result.optimizer in ("AdamW", "SGD momentum") and _ours(result) and _ours(result).ratio:
            found.setdefault(result.optimizer, []).append(result)
    return {optimizer: sorted(own, key=lambda r: r.elements) for optimizer, own in found.items()}


def _ours(result: SimpleNamespace) -> SimpleNamespace | None:
    return next((timing for timing in result.timings if timing.subject == "fusedopt"), None)


def _fast(subject: str) -> bool:
    return subject not in ("torch loop", "torch foreach")


def _subjects(results: Sequence[SimpleNamespace]) -> list[str]:
    present = {timing.subject for result in results for timing in result.timings if timing.milliseconds}
    return [name for name in LOOKS if name in present]


def _times(results: Sequence[SimpleNamespace], subject: str) -> list[tuple[int, SimpleNamespace, SimpleNamespace]]:
    return [
        (index, result, timing.milliseconds)
        for index, result in enumerate(results)
        for timing in result.timings
        if timing.subject == subject and timing.milliseconds
    ]


def _label_cases(axis: Axes, results: Sequence[SimpleNamespace]) -> None:
    axis.set_xticks(range(len(results)), [result.title for result in results], rotation=30, ha="right", rotation_mode="anchor")


def _grouped_bars(
    axis: Axes, groups: Sequence[tuple[str, dict[str, SimpleNamespace]]], scale: float = 1.0, horizontal: bool = False
) -> None:
    """Bars of spreads, a group for each title, a bar in it for each subject."""
    subjects = [name for name in LOOKS if any(name in spreads for _, spreads in groups)]
    width = 0.8 / max(1, len(subjects))
    for index, subject in enumerate(subjects):
        present = [(place, spreads[subject]) for place, (_, spreads) in enumerate(groups) if subject in spreads]
        places = [place + (index - (len(subjects) - 1) / 2) * width for place, _ in present]
        medians = [scale * spread.median for _, spread in present]
        errors = [
            [scale * (spread.median - spread.lower_quartile) for _, spread in present],
            [scale * (spread.upper_quartile - spread.median) for _, spread in present],
        ]
        style = look(subject)
        looks: dict[str, Any] = {
            "color": style.colour,
            "hatch": style.hatch,
            "edgecolor": "black",
            "linewidth": 0.5,
            "label": subject,
            "error_kw": {"linewidth": 0.8},
        }
        if horizontal:
            axis.barh(places, medians, width, xerr=errors, **looks)
        else:
            axis.bar(places, medians, width, yerr=errors, capsize=2, **looks)
    titles = [title for title, _ in groups]
    if horizontal:
        axis.set_yticks(range(len(titles)), titles)
        axis.grid(visible=False, axis="y")
    else:
        axis.set_xticks(range(len(titles)), titles)
        axis.grid(visible=False, axis="x")


def _legend_below(figure: Figure, axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=max(1, math.ceil(len(labels))))
