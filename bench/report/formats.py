"""The section on short formats: bytes, times, arithmetic and errors together."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

from ..formats import ALLOWED_ERROR, ALLOWED_ERROR_OF_4_BITS, EIGHT_BIT_STATES
from ..measure import CHECKED_STEPS
from . import cells
from .page import Picture, Section, Table

BASELINE = "torch fused, float32"


def formats(record: SimpleNamespace) -> Section:
    section = Section("Short formats")
    if record.formats:
        section.blocks.append(
            "AdamW with states, and parameters, in fewer bytes, against torch's fused step in float32. *Error*: how far "
            f"parameters are after {CHECKED_STEPS} steps from where float64 takes them, as a share of the way. No short format is "
            f"exact, so each is checked by this number: beyond {100 * ALLOWED_ERROR:.0f} %, in 4 bits "
            f"{100 * ALLOWED_ERROR_OF_4_BITS:.0f} %, it would be called wrong; without its decay a step is off by 15 %. *Bytes*: "
            "of states that are kept, and that a step has to read and write, for each element of a parameter. *Of the limit*: "
            "the rate of these bytes over that of the memory limit. *torch / it*: above 1 where it is faster than torch's fused "
            f"step in float32. *It / ours*: its time over that of {EIGHT_BIT_STATES.name}. Quartiles in brackets."
        )
        for result in record.formats:
            section.blocks += _contest(result)
        section.blocks.append(
            Picture("formats", "Without arithmetic a step in half as many bytes would be twice as fast: the dashed line.")
        )
    if record.format_arithmetic:
        section.blocks += _arithmetic(record)
    if record.format_scaling:
        section.blocks += _scaling(record.format_scaling)
    if record.format_errors:
        section.blocks += _errors(record.format_errors)
    if section.blocks:
        section.blocks.append(
            "Whether training suffers is another measurement, of many runs: its figure and table are in `docs/short_formats.rst`, "
            "and `python -m bench.short_formats FOLDER` repeats it."
        )
    return section


def _contest(result: SimpleNamespace) -> list[str | Table]:
    where = "" if result.device == "cpu" else ", on the GPU"
    if result.left_out:
        return [f"**{result.title}{where}: not measured.** {result.left_out}."]
    rows = []
    for timing in result.timings:
        if timing.milliseconds:
            rows.append(
                [
                    timing.subject,
                    f"{100 * timing.error:.2g} %" if timing.error > 1e-4 else f"{timing.error_ulps:.2g} ulps",
                    f"{timing.kept_bytes:.4g}",
                    f"{timing.moved_bytes:.4g}",
                    cells.number(timing.milliseconds.median),
                    f"{timing.gigabytes_per_second:.1f}",
                    cells.percent(timing.share_of_limit),
                    cells.spread(timing.ratio),
                    cells.spread(timing.ratio_to_ours),
                ]
            )
    heading = ["implementation", "error", "bytes kept", "bytes moved", "ms", "GB/s", "of the limit", "torch / it", "it / ours"]
    limit = f"memory limit {cells.number(result.limit_gigabytes_per_second.median)} GB/s" if rows else "nobody was right"
    return [f"**{result.title}{where}**, {result.elements:,} elements; {limit}.", Table(heading, rows)]


def _arithmetic(record: SimpleNamespace) -> list[str | Table]:
    float32 = next(each for each in record.format_arithmetic if each.subject == BASELINE)
    rows = []
    for each in record.format_arithmetic:
        nanoseconds, fewer = each.nanoseconds.median, float32.moved_bytes / each.moved_bytes
        below = f"{float32.moved_bytes / nanoseconds:.3g}" if fewer > 1 else ""
        rows.append([each.subject, cells.spread(each.nanoseconds), f"{each.moved_bytes:.4g}", below, f"{fewer:.2f}"])
    each_core = [
        result.limit_gigabytes_per_second.median / record.machine.threads
        for result in record.formats
        if result.device == "cpu" and result.limit_gigabytes_per_second
    ]
    here = f" This machine has {cells.number(each_core[-1])} GB/s for each thread." if each_core else ""
    text = (
        "What the formats cost in arithmetic: nanoseconds for an element on one core, in its caches. A step in float32 takes no "
        f"less than its {float32.moved_bytes:g} bytes over the bandwidth that a core has, so a format overtakes it where a core "
        "has less bandwidth than these bytes over the format's nanoseconds, and by its fewer bytes at most. Servers with many "
        f"cores have some 5 GB/s for each.{here}"
    )
    heading = [
        "implementation",
        "ns for an element and core",
        "bytes moved",
        "faster than float32 below, GB/s a core",
        "at most, times",
    ]
    return [text, Table(heading, rows)]


def _scaling(scaling: Sequence[SimpleNamespace]) -> list[str | Table]:
    first = scaling[0]
    rows = [
        [
            str(each.threads),
            cells.spread(each.fused, 3),
            f"{first.fused.median / each.fused.median:.2f}",
            cells.spread(each.ours, 3),
            f"{first.ours.median / each.ours.median:.2f}",
            cells.spread(each.ratio),
        ]
        for each in scaling
    ]
    heading = ["threads", f"{BASELINE}, ms", "times as fast as on one", f"{EIGHT_BIT_STATES.name}, ms", "times as fast as on one"]
    text = f"8-bit states on fewer threads, {first.title}: where arithmetic is the limit, twice the threads are twice as fast."
    return [text, Table([*heading, "torch / ours"], rows)]


def _errors(found: Sequence[SimpleNamespace]) -> list[str | Table]:
    streams = list(vars(found[0].errors))

    def cell(each: SimpleNamespace, stream: str) -> str:
        error, largest = (vars(numbers)[stream] for numbers in (each.errors, each.largest))
        return f"{cells.number(error)} ({cells.number(largest)})" if error == error else "NaN"

    rows = [[each.subject, *(cell(each, stream) for stream in streams)] for each in found]
    text = (
        "Gradients that are hard on short formats: the relative error of AdamW's updates against float32 in steps 51 to 300 of "
        "4,096 elements, and in brackets the largest update in learning rates, of which float32 makes 1 to 2. Formats of others "
        "are simulated as they are published, which is for GPUs; what is installed is run as well, on the CPU, where "
        "bitsandbytes rounds no moment to zero, neither the second one of tiny gradients nor the first one of none."
    )
    return [text, Table(["format", *streams], rows)]
