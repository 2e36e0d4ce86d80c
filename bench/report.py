"""What is made of a record: one document, as a self-contained page of HTML and as Markdown."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from . import plots
from .measure import CHECKED_STEPS, LEAST_ROUNDS, MOST_ROUNDS, TURN_SECONDS
from .run import MAIN_OPTIMIZERS, MANY_ELEMENTS
from .subjects import ALLOWED_ULPS, ALLOWED_ULPS_OF_OTHERS

#: Other programs kept a third of a core or more in the minute before.
BUSY_LOAD = 0.3


@dataclass(frozen=True)
class Table:
    """Rows of text under a heading; the first column to the left, the others to the right."""

    heading: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: frozenset[int] = frozenset({0})


@dataclass(frozen=True)
class Picture:
    """One of the plots, by name, and what it shows."""

    name: str
    caption: str


@dataclass
class Section:
    """A heading, and paragraphs, tables and pictures."""

    title: str
    blocks: list[str | Table | Picture] = field(default_factory=list)


def write(record: SimpleNamespace, name: Path) -> list[Path]:
    """Write the report of `record` to `name` with .html and .md; return both paths."""
    title = f"fusedopt on {record.machine.gpu or record.machine.cpu}, {record.machine.date}"
    sections = document(record)
    pages = {".html": as_html(title, sections, record), ".md": as_markdown(title, sections)}
    paths = []
    for suffix, text in pages.items():
        path = name.with_suffix(suffix)
        path.write_text(text, encoding="utf-8")
        paths.append(path)
    return paths


def wrong_subjects(record: SimpleNamespace) -> list[str]:
    """A line for each subject that computed something else than torch's for-loop, or failed."""
    return [
        f"{timing.subject}, {result.optimizer}, {result.title}: {timing.wrong}"
        for result in [*record.results, *record.bfloat16]
        for timing in result.timings
        if timing.wrong
    ]


def document(record: SimpleNamespace) -> list[Section]:
    """All of the report, as far as it was measured."""
    sections = [
        _summary(record),
        *_main_optimizers(record),
        _other_optimizers(record),
        _bfloat16(record),
        _costs(record),
        _first_steps(record),
        _surroundings(record),
        _gpu(record),
        _subjects(record),
        _method(record),
    ]
    return [section for section in sections if section.blocks]


def machine_line(machine: SimpleNamespace) -> str:
    """The machine and the versions in a line."""
    parts = [machine.cpu, f"{machine.cores} cores", f"{machine.threads} threads"]
    parts += [f"{machine.memory_gib} GiB of memory"] if machine.memory_gib else []
    parts += [machine.gpu or "no GPU", machine.system]
    return f"{', '.join(parts)}; {', '.join(f'{name} {version}' for name, version in vars(machine.versions).items())}"


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
        ours, theirs = _timing(result, "fusedopt"), _timing(result, result.baseline)
        if ours and theirs and ours.milliseconds:
            numbers = [_number(theirs.milliseconds.median), _number(ours.milliseconds.median), _spread(ours.ratio)]
            numbers += [_spread(ours.moved_ratio), f"{ours.gigabytes_per_second:.1f}", _percent(ours.share_of_limit)]
            rows.append([result.optimizer, result.title, _count(result.elements), *numbers])
    return Table(heading, rows, frozenset({0, 1}))


# --- sections ---------------------------------------------------------------------------------------------------------------


def _summary(record: SimpleNamespace) -> Section:
    section = Section("In short")
    for name in MAIN_OPTIMIZERS:
        ratios = [(t.ratio.median, r.title) for r in _on_cpu(record, [name]) if (t := _timing(r, "fusedopt")) and t.ratio]
        if ratios:
            (least, slow), (most, fast) = min(ratios), max(ratios)
            section.blocks.append(
                f"**{name}**, whole steps against torch's fused implementation: between {_number(least)} ({slow}) and "
                f"{_number(most)} "
                f"({fast}) times as fast."
            )
    noise = sorted(_noise(t.ratio) for r in _on_cpu(record, None) if (t := _timing(r, "fusedopt")) and t.ratio)
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
    section.blocks.append(f"Machine: {machine_line(record.machine)}. Repeat with `{record.command}`, from a checkout.")
    return section


def _main_optimizers(record: SimpleNamespace) -> list[Section]:
    sections = []
    for name in MAIN_OPTIMIZERS:
        results = _on_cpu(record, [name])
        if results:
            slow = [
                title for title in ("torch loop", "torch foreach", *_others(results)) if any(_timing(r, title) for r in results)
            ]
            rows = []
            for result in results:
                ours = _timing(result, "fusedopt")
                if not (ours and ours.milliseconds and result.baseline):
                    continue
                times = [_median(_timing(result, title)) for title in (*slow, "torch fused", "fusedopt")]
                ratios = [_spread(ours.ratio), _spread(ours.moved_ratio)]
                rates = [
                    f"{ours.gigabytes_per_second:.1f}",
                    _number(result.limit_gigabytes_per_second.median),
                    _percent(ours.share_of_limit),
                ]
                rows.append([result.title, f"{result.tensors:,}", _count(result.elements), *times, *ratios, *rates])
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
        large = [result.title for result in _on_cpu(record, MAIN_OPTIMIZERS[:1]) if result.elements > MANY_ELEMENTS]
        if large:
            sections[-1].blocks.append(
                f"torch's for-loop and lists of tensors take seconds a step on {_listed(large)}, and were left out there."
            )
    return sections


def _beside(theirs: SimpleNamespace, ours: SimpleNamespace) -> list[str]:
    """The times of both, and their ratio with the same gradients and with moved ones."""
    times = [_number(each.milliseconds.median) for each in (theirs, ours)]
    return [*times, _spread(ours.ratio), _spread(ours.moved_ratio)]


def _other_optimizers(record: SimpleNamespace) -> Section:
    names = list(dict.fromkeys(r.optimizer for r in record.results if r.optimizer not in MAIN_OPTIMIZERS))
    rows = []
    for result in _on_cpu(record, names):
        ours, theirs = _timing(result, "fusedopt"), _timing(result, result.baseline)
        if ours and theirs and ours.milliseconds:
            numbers = _beside(theirs, ours)
            rows.append([result.optimizer, result.title, theirs.subject, *numbers, _percent(ours.share_of_limit)])
    if not rows:
        return Section("Other optimizers")
    heading = ["optimizer", "case", "torch's best", "torch, ms", "fusedopt, ms", "torch / ours", "moved gradients", "of the limit"]
    text = (
        "Against the fastest that torch has on a CPU: its fused implementation where there is one, else the faster of its for-loop "
        "and its lists of tensors."
    )
    return Section("Other optimizers", [text, Table(heading, rows, frozenset({0, 1, 2}))])


def _bfloat16(record: SimpleNamespace) -> Section:
    rows = []
    for result in record.bfloat16:
        ours, theirs = _timing(result, "fusedopt, bfloat16"), _timing(result, result.baseline)
        if ours and theirs and ours.milliseconds:
            numbers = _beside(theirs, ours)
            rows.append(
                [result.optimizer, result.title, *numbers, f"{ours.gigabytes_per_second:.1f}", _percent(ours.share_of_limit)]
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


def _costs(record: SimpleNamespace) -> Section:
    section = Section("What a step costs apart from its kernel")
    if record.host_costs:
        heading = ["tensors", "torch fused, µs", "fusedopt, µs", "torch fused, new gradients, µs", "fusedopt, new gradients, µs"]
        rows = []
        for tensors in dict.fromkeys(cost.tensors for cost in record.host_costs):
            own = {cost.subject: cost for cost in record.host_costs if cost.tensors == tensors}
            spreads = [own["torch fused"].same, own["fusedopt"].same, own["torch fused"].moved, own["fusedopt"].moved]
            rows.append([f"{tensors:,}", *(_spread(spread, 3) for spread in spreads)])
        section.blocks += ["AdamW on tensors of one element each: nearly all of such a step is the host's.", Table(heading, rows)]
        section.blocks.append(Picture("host_costs", "Both axes are logarithmic."))
    if record.breakdowns:
        section.blocks.append(
            "The same by function, from Python's profiler: each with the compiled code that it calls, checks and kernel included, "
            "but "
            "without the Python functions that it calls. The profiler adds to each call; the step without it stands in the last "
            "line."
        )
        section.blocks.append(_breakdown_table(record.breakdowns))
        section.blocks.append(Picture("breakdown", "The largest parts, and all others added up."))
    if record.thread_starts:
        heading = ["subject", "threads", "steps back to back, µs", "after a pause of 20 ms, µs"]
        rows = [[s.subject, str(s.threads), _spread(s.back_to_back, 3), _spread(s.after_pause, 3)] for s in record.thread_starts]
        section.blocks.append(
            "Start of threads: by how much AdamW on 262,144 elements takes longer on all threads than its host's part (a step of "
            "one "
            "element) and its work (the rest of a step on one thread), divided among them. Below zero the threads' caches gain "
            "more "
            "than their start costs."
        )
        section.blocks.append(Table(heading, rows))
    return section


def _breakdown_table(breakdowns: Sequence[SimpleNamespace]) -> Table:
    names = plots.largest_parts(breakdowns)
    purposes = {part.function: part.purpose for each in breakdowns for part in each.parts}

    def cell(each: SimpleNamespace, microseconds: float) -> str:
        return f"{_number(microseconds)} ({microseconds / each.profiled_microseconds:.0%})"

    rows = [
        [f"`{name}`", purposes[name], *(cell(each, plots.microseconds_of(each, name)) for each in breakdowns)] for name in names
    ]
    rest = [sum(part.microseconds for part in each.parts if part.function not in names) for each in breakdowns]
    rows.append(["all other functions", "", *(cell(each, other) for each, other in zip(breakdowns, rest, strict=True))])
    rows.append(["**the step, profiled**", "", *(_number(each.profiled_microseconds) for each in breakdowns)])
    rows.append(["**the step by itself**", "", *(_number(each.microseconds) for each in breakdowns)])
    return Table(["function", "what it does", *(f"{each.title}, µs" for each in breakdowns)], rows, frozenset({0, 1}))


def _first_steps(record: SimpleNamespace) -> Section:
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


def _surroundings(record: SimpleNamespace) -> Section:
    section = Section("Threads, and a busy core beside")
    heading = ["case", "threads", "torch fused, ms", "fusedopt, ms", "torch / ours"]
    if record.scaling:
        rows = [[e.title, str(e.threads), _spread(e.fused, 3), _spread(e.ours, 3), _spread(e.ratio)] for e in record.scaling]
        section.blocks += [
            "AdamW on fewer threads.",
            Table(heading, rows),
            Picture("scaling", "The axis of each panel begins at zero."),
        ]
    if record.busy:
        rows = [
            [e.title, "one core busy" if e.busy else "idle", _spread(e.fused, 3), _spread(e.ours, 3), _spread(e.ratio)]
            for e in record.busy
        ]
        section.blocks.append("AdamW on all threads while another program keeps one core busy, as a worker that loads data does.")
        section.blocks.append(Table([heading[0], "machine", *heading[2:]], rows, frozenset({0, 1})))
        section.blocks.append(Picture("busy", "Each panel has its own axis."))
    return section


def _gpu(record: SimpleNamespace) -> Section:
    section = Section("CPU against GPU")
    on_gpu = [result for result in record.results if result.device == "cuda"]
    if on_gpu:
        heading = ["optimizer", "case", "CPU torch, ms", "CPU fusedopt, ms", "GPU torch, ms", "GPU fusedopt, ms"]
        heading += ["GPU torch / ours", "CPU / GPU, ours", "GPU ours, GB/s", "of the GPU's limit"]
        rows = []
        for gpu in on_gpu:
            cpu = next(
                (r for r in record.results if r.device == "cpu" and (r.optimizer, r.case) == (gpu.optimizer, gpu.case)), None
            )
            ours, on_cpu = _timing(gpu, "fusedopt, CUDA"), _timing(cpu, "fusedopt") if cpu else None
            cells = [_median(_timing(cpu, cpu.baseline) if cpu else None), _median(on_cpu)]
            cells += [_median(_timing(gpu, gpu.baseline)), _median(ours)]
            if ours and ours.milliseconds:
                both = on_cpu.milliseconds.median / ours.milliseconds.median if on_cpu and on_cpu.milliseconds else None
                cells += [_spread(ours.ratio), "" if both is None else _number(both)]
                cells += [f"{ours.gigabytes_per_second:.0f}", _percent(ours.share_of_limit)]
            rows.append([gpu.optimizer, gpu.title, *cells, *([""] * (len(heading) - 2 - len(cells)))])
        section.blocks.append("The same cases on both. Steps on the GPU follow each other without the host waiting for each.")
        section.blocks.append(Table(heading, rows, frozenset({0, 1})))
    elif not record.machine.gpu:
        section.blocks.append("**torch found no GPU on this machine, so no time on one was measured, and none stands here.**")
    if record.launches:
        section.blocks.append("Known without a GPU, as it does not depend on one:")
        heading = ["optimizer", "case", "tensors", "bytes an element", "our launches", "torch fused", "torch lists", "torch loop"]
        rows = [
            [
                *(e.optimizer, e.case, f"{e.tensors:,}", str(e.bytes_per_element), str(e.buckets or "")),
                *("" if n is None else f"{n:,}" for n in (e.fused_operations, e.foreach_operations, e.loop_operations)),
            ]
            for e in record.launches
        ]
        section.blocks.append(Table(heading, rows, frozenset({0, 1})))
        section.blocks.append(
            "*Bytes an element*: what a step of float32 reads and writes, on any device. *Our launches*: one for each combination "
            "of "
            "device, dtypes and rule, whatever the number of tensors. The other columns count the operations of torch that a step "
            "calls, without those on step counts: each is a launch or more in the for-loop, and one for each few dozen tensors in "
            "lists and in the fused implementation."
        )
    return section


def _subjects(record: SimpleNamespace) -> Section:
    rows = []
    for subject in record.subjects:
        own = [t for result in record.results for t in result.timings if t.subject == subject.name]
        wrong = next((timing.wrong for timing in own if timing.wrong), None)
        errors = [timing.error_ulps for timing in own if timing.error_ulps is not None]
        said = subject.obstacle or (f"wrong, so not timed: {wrong}" if wrong else "measured" if own else "not chosen")
        rows.append([subject.name, said, f"{max(errors):.2g}" if errors else ""])
    return Section("Who took part", [Table(["implementation", "here", "largest error, ulps"], rows, frozenset({0, 1}))])


def _method(record: SimpleNamespace) -> Section:
    items = [
        f"**Right first.** Each subject takes {CHECKED_STEPS} steps with new gradients. If any element of any parameter is more "
        f"than {ALLOWED_ULPS:g} ulps from torch's for-loop in float64, or NaN, the subject is reported wrong, and not timed. For "
        f"other packages, some of which compute bias corrections in float32, the bound is {ALLOWED_ULPS_OF_OTHERS:g} ulps: a step "
        "without its decay is beyond it.",
        f"**Interleaved.** In each of {LEAST_ROUNDS} to {MOST_ROUNDS} rounds everyone has a turn of {1e3 * TURN_SECONDS:.0f} ms "
        "(one step at least), in alternating order; far slower subjects take part in the first rounds alone. A turn counts as its "
        "mean, a subject as the median of its turns; ratios are taken round by round. Times are of whole steps as a user calls "
        "them.",
        "**The memory limit** is measured in the same rounds: a kernel of its own, not one of fusedopt, reads and writes the same "
        "streams (AdamW in float32: 4 read and 3 written, 28 bytes an element) without arithmetic, on as many threads, each "
        "walking "
        "its own contiguous share again and again. Where a case fits into caches, the limit is theirs, which a step that also "
        "divides and takes roots does not reach.",
        "**Moved gradients** are allocated outside of the time measured, as `backward` would.",
        f"The run took {record.seconds / 60:.1f} minutes.",
        "Commands: `make bench` (quick), `python -m bench` (all), `python -m bench --list` (names of cases, optimizers and "
        "subjects), `make bench-compare BASE=<revision>` (this checkout against a revision).",
    ]
    return Section("How it was measured", list(items))


# --- text -------------------------------------------------------------------------------------------------------------------


def as_markdown(title: str, sections: Sequence[Section]) -> str:
    """The document in Markdown; its pictures are in the page of HTML."""
    parts = [f"# {title}"]
    for section in sections:
        parts.append(f"## {section.title}")
        for block in section.blocks:
            if isinstance(block, Table):
                parts.append(markdown_table(block))
            elif isinstance(block, str):
                parts.append(block)
    parts.append("The page of HTML beside this file shows the same with plots.")
    return "\n\n".join(parts) + "\n"


def markdown_table(table: Table) -> str:
    """A table in Markdown."""
    rule = ["---" if i in table.left else "---:" for i in range(len(table.heading))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (table.heading, rule, *table.rows))


def as_html(title: str, sections: Sequence[Section], record: SimpleNamespace) -> str:
    """The document as one page that needs nothing else."""
    body = []
    for section in sections:
        body.append(f"<h2>{html.escape(section.title)}</h2>")
        for block in section.blocks:
            if isinstance(block, Table):
                body.append(_html_table(block))
            elif isinstance(block, Picture):
                figure = plots.FIGURES[block.name](record)
                if figure is not None:
                    drawing = plots.svg(figure, block.name)
                    body.append(f"<figure>{drawing}<figcaption>{html.escape(block.caption)}</figcaption></figure>")
            else:
                body.append(f"<p>{_inline(block)}</p>")
    return _PAGE.format(title=html.escape(title), body="\n".join(body))


def _html_table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        kinds = [(" class=text" if len(cell) > 40 else " class=left") if i in table.left else "" for i, cell in enumerate(cells)]
        made = [f"<{tag}{kind}>{_inline(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True)]
        return f"<tr>{''.join(made)}</tr>"

    rows = "\n".join(row(cells, "td") for cells in table.rows)
    return f"<div class=table><table>\n<thead>{row(table.heading, 'th')}</thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>"


def _inline(text: str) -> str:
    text = html.escape(text)
    for pattern, tag in ((r"`([^`]+)`", "code"), (r"\*\*([^*]+)\*\*", "strong"), (r"\*([^*]+)\*", "em")):
        text = re.sub(pattern, rf"<{tag}>\1</{tag}>", text)
    return text


_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff; }}
body {{ max-width: 1080px; margin: 2rem auto; padding: 0 1.2rem; }}
h1 {{ font-size: 1.7rem; border-bottom: 3px solid #123a7a; padding-bottom: .4rem; }}
h2 {{ font-size: 1.2rem; margin-top: 2.4rem; border-bottom: 1px solid #ccc; padding-bottom: .2rem; }}
p {{ max-width: 52rem; }}
code {{ font: .88em ui-monospace, monospace; background: #f2f4f7; padding: .05em .3em; border-radius: 3px; }}
.table {{ overflow-x: auto; margin: 1rem 0; }}
table {{ border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .25rem .6rem; text-align: right; }}
td {{ border-top: 1px solid #e3e3e3; white-space: nowrap; }}
th {{ vertical-align: bottom; border-bottom: 2px solid #123a7a; font-weight: 600; }}
.left, .text {{ text-align: left; }}
td.text {{ white-space: normal; }}
tbody tr:nth-child(even) {{ background: #f7f9fb; }}
figure {{ margin: 1.4rem 0; }}
figure svg {{ width: 100%; height: auto; }}
figcaption {{ color: #555; font-size: .85rem; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def _on_cpu(record: SimpleNamespace, names: Sequence[str] | None) -> list[SimpleNamespace]:
    return [r for r in record.results if r.device == "cpu" and (names is None or r.optimizer in names)]


def _timing(result: SimpleNamespace, subject: str | None) -> SimpleNamespace | None:
    return next((timing for timing in result.timings if timing.subject == subject), None)


def _others(results: Sequence[SimpleNamespace]) -> list[str]:
    """Other packages that were timed."""
    known = ("torch loop", "torch foreach", "torch fused", "fusedopt")
    return list(dict.fromkeys(t.subject for r in results for t in r.timings if t.subject not in known))


def _median(timing: SimpleNamespace | None) -> str:
    if timing is None:
        return ""
    return "wrong" if timing.wrong else _number(timing.milliseconds.median)


def _number(value: float) -> str:
    """Three digits."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def _count(elements: int) -> str:
    return f"{elements / 1e6:.3g} M" if elements < 1e8 else f"{elements / 1e6:.0f} M"


def _spread(spread: SimpleNamespace | None, digits: int = 0) -> str:
    if spread is None:
        return ""
    numbers = (spread.median, spread.lower_quartile, spread.upper_quartile)
    if digits:
        return "{} ({} to {})".format(*map(_number, numbers))
    return "{} ({}-{})".format(*(f"{number:.2f}" if number < 10 else f"{number:.1f}" for number in numbers))


def _percent(spread: SimpleNamespace | None) -> str:
    return "" if spread is None else f"{100 * spread.median:.0f} %"


def _noise(spread: SimpleNamespace) -> float:
    noise: float = (spread.upper_quartile - spread.lower_quartile) / spread.median
    return noise


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
