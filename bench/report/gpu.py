"""Sections on GPUs: measured where there is one, and what is known and predicted without."""

from __future__ import annotations

from types import SimpleNamespace

from ..prediction import GPUS, LAUNCH_SECONDS
from . import cells
from .page import Section, Table


def measured(record: SimpleNamespace) -> Section:
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
            ours, on_cpu = cells.timing_of(gpu, "fusedopt, CUDA"), cells.timing_of(cpu, "fusedopt") if cpu else None
            row = [cells.median(cells.timing_of(cpu, cpu.baseline) if cpu else None), cells.median(on_cpu)]
            row += [cells.median(cells.timing_of(gpu, gpu.baseline)), cells.median(ours)]
            if ours and ours.milliseconds:
                both = on_cpu.milliseconds.median / ours.milliseconds.median if on_cpu and on_cpu.milliseconds else None
                row += [cells.spread(ours.ratio), "" if both is None else cells.number(both)]
                row += [f"{ours.gigabytes_per_second:.0f}", cells.percent(ours.share_of_limit)]
            rows.append([gpu.optimizer, gpu.title, *row, *([""] * (len(heading) - 2 - len(row)))])
        section.blocks.append("The same cases on both. Steps on the GPU follow each other without the host waiting for each.")
        section.blocks.append(Table(heading, rows, frozenset({0, 1})))
        section.blocks.append(
            "All implementations there, beside a copy within the GPU's memory that moves the bytes of our step: by the driver or "
            "by a kernel, whichever is faster."
        )
        section.blocks.append(_all_on_gpu(on_gpu))
    elif not record.machine.gpu:
        section.blocks.append("**torch found no GPU on this machine, so no time on one was measured, and none stands here.**")
    if record.launches:
        section.blocks.append("Known without a GPU, as it does not depend on one:")
        heading = ["optimizer", "case", "tensors", "bytes an element", "our launches", "torch fused", "torch lists", "torch loop"]
        rows = [
            [
                *(e.optimizer, e.case, f"{e.tensors:,}", str(e.bytes_per_element), str(e.buckets)),
                *("" if n is None else f"{n:,}" for n in (e.fused_operations, e.foreach_operations, e.loop_operations)),
            ]
            for e in record.launches
        ]
        profiled = list(dict.fromkeys(subject for e in record.launches for subject in vars(e.profiled)))
        if profiled:
            heading += [f"profiled: {subject}" for subject in profiled]
            rows = [
                [*row, *(str(vars(e.profiled).get(subject, "")) for subject in profiled)]
                for row, e in zip(rows, record.launches, strict=True)
            ]
        section.blocks.append(Table(heading, rows, frozenset({0, 1})))
        section.blocks.append(
            "*Bytes an element*: what a step of float32 reads and writes, on any device. *Our launches*: one for each combination "
            "of device, dtypes and rule, whatever the number of tensors. The other columns count the operations of torch that a "
            "step calls, without those on step counts: each is a launch or more in the for-loop, and one for each few dozen "
            "tensors in lists and in the fused implementation."
        )
    return section


def _all_on_gpu(results: list[SimpleNamespace]) -> Table:
    """Milliseconds and the rate of every implementation, and the rate of a copy."""
    subjects = list(dict.fromkeys(timing.subject for result in results for timing in result.timings))
    rows = []
    for result in results:
        row = []
        for subject in subjects:
            timing = cells.timing_of(result, subject)
            rate = f" ({timing.gigabytes_per_second:.0f})" if timing and timing.gigabytes_per_second else ""
            row.append(f"{cells.median(timing)}{rate}")
        limit = result.limit_gigabytes_per_second
        rows.append([result.optimizer, result.title, *row, "" if limit is None else f"{limit.median:.0f}"])
    heading = [f"{subject.removesuffix(', CUDA')}, ms (GB/s)" for subject in subjects]
    return Table(["optimizer", "case", *heading, "copy, GB/s"], rows, frozenset({0, 1}))


def predicted(record: SimpleNamespace) -> Section:
    """Times by a roofline, beside those that were measured."""
    section = Section("Predicted times on GPUs")
    if not record.predictions:
        return section
    names = list(dict.fromkeys(each.gpu for each in record.predictions))
    here = next((name for name in names if name in (record.machine.gpu or "")), None)
    heading = ["optimizer", "case", "MB", "CPU, measured, ms", *(f"{name}, predicted, ms" for name in names)]
    heading += [f"{here}, measured, ms", "measured / predicted"] if here else []
    rows = []
    for optimizer, case in dict.fromkeys((each.optimizer, each.case) for each in record.predictions):
        own = {each.gpu: each for each in record.predictions if (each.optimizer, each.case) == (optimizer, case)}
        first = own[names[0]]
        row = [optimizer, first.title, cells.number(first.bytes / 1e6), cells.median(_ours(record, first, "cpu"))]
        row += [cells.number(own[name].milliseconds) for name in names]
        if here:
            found = _ours(record, first, "cuda")
            row.append(cells.median(found))
            row.append(cells.number(found.milliseconds.median / own[here].milliseconds) if found and found.milliseconds else "")
        rows.append(row)
    section.blocks += [
        "**Predicted, and not measured:** by a roofline. The bytes were counted by executing the PTX of a step on a CPU, tables "
        "included. A step takes as long as they do at the rate that a copy reaches, or as the instructions do where that is "
        f"longer, and {1e6 * LAUNCH_SECONDS:.1f} µs for each launch. Caches are left out, which the smaller cases fit into, and "
        "so is the host, whose part stands above: a step cannot follow another sooner.",
        Table(heading, rows, frozenset({0, 1})),
        "What is assumed of the GPUs (sources: `bench/prediction.py`; no measured copy of an H200 was found, and the H100's share "
        "is taken), and what instructions take at most on the largest of these cases, as a share of the memory's time: all "
        "that are in the machine code, of both paths of a kernel, one a lane and cycle.",
        _assumptions(record, names),
    ]
    return section


def _assumptions(record: SimpleNamespace, names: list[str]) -> Table:
    optimizers = list(dict.fromkeys(each.optimizer for each in record.predictions))
    rows = []
    for gpu in (gpu for gpu in GPUS if gpu.name in names):
        shares = []
        for optimizer in optimizers:
            own = [each for each in record.predictions if (each.optimizer, each.gpu) == (optimizer, gpu.name)]
            largest = max(own, key=lambda each: each.bytes)
            shares.append(f"{largest.instruction_milliseconds / largest.memory_milliseconds:.0%}")
        published = [f"{gpu.bandwidth / 1e9:,.0f}", f"{gpu.copy_share:.0%}", f"{gpu.lanes:,}", f"{gpu.clock / 1e9:.2f}"]
        rows.append([gpu.name, gpu.target, *published, *shares])
    heading = [
        "GPU",
        "target",
        "published GB/s",
        "of it by a copy",
        "lanes",
        "GHz",
        *(f"{name}, instructions" for name in optimizers),
    ]
    return Table(heading, rows, frozenset({0, 1}))


def _ours(record: SimpleNamespace, prediction: SimpleNamespace, device: str) -> SimpleNamespace | None:
    for result in record.results:
        if (result.device, result.optimizer, result.case) == (device, prediction.optimizer, prediction.case):
            return cells.timing_of(result, "fusedopt" if device == "cpu" else "fusedopt, CUDA")
    return None
