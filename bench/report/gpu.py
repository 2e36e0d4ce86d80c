"""The section on GPUs: measured where there is one, and what is known without."""

from __future__ import annotations

from types import SimpleNamespace

from . import cells
from .page import Section, Table


def gpu(record: SimpleNamespace) -> Section:
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
            "of device, dtypes and rule, whatever the number of tensors. The other columns count the operations of torch that a "
            "step calls, without those on step counts: each is a launch or more in the for-loop, and one for each few dozen "
            "tensors in lists and in the fused implementation."
        )
    return section
