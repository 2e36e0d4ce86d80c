"""The README's table and picture from the record of a whole run: ``make bench-readme``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from .cases import CASES as CASES_BY_NAME
from .first_step import CHECKOUT
from .plots import overview, save_png
from .report import cells
from .report.cells import machine_line
from .report.contests import ratio_table
from .report.page import markdown_table
from .run import MAIN_OPTIMIZERS, read

TABLE, PICTURE = "bench", "bench-picture"
#: Cases of the table, in its order; reports have them all.
CASES = ("1x20M", "1x1M", "100x50k", "1000x1k", "1000x100", "mobilenet-v2", "resnet50", "gpt2-small")
#: Those in which the other optimizers are named.
ONE_TENSOR, MANY_TENSORS = "1x10M", "1000x1k"
EXPLANATION = (
    "float32 on the CPU; a whole `optimizer.step()` against torch's fused one. torch / ours: ratio of the times, above 1 where "
    "fusedopt is faster; median of interleaved rounds, quartiles in brackets. Moved gradients: the same ratio where each step "
    "finds "
    "its gradients at new addresses, as after `zero_grad()`. Of the limit: bytes moved over time, against a kernel that moves the "
    "same bytes without arithmetic; in caches, which the smaller cases fit into, no step reaches it."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite table and picture; return 2 if there is no whole run to take them from."""
    parser = argparse.ArgumentParser(prog="python -m bench.readme", description=__doc__)
    parser.add_argument(
        "record", type=Path, nargs="?", metavar="FILE.json", help="of a whole run; default: the newest in bench/results"
    )
    path = parser.parse_args(arguments).record or newest(CHECKOUT / "bench" / "results")
    if path is None:
        parser.error("bench/results holds no record of a whole run: make one by python -m bench, without options")
    record = read(path)
    if not record.whole:
        parser.error(f"{path.name} is not of a whole run: make one by python -m bench, without options")
    update(CHECKOUT, record, path.with_suffix(".md").name)
    return 0


def newest(folder: Path) -> Path | None:
    """The record of the latest whole run in `folder`, by its date, or None."""
    whole = [path for path in folder.glob("*.json") if read(path).whole]
    return max(whole, key=lambda path: (read(path).machine.date, path.stat().st_mtime), default=None)


def update(checkout: Path, record: SimpleNamespace, report: str) -> None:
    """Put table and picture of `record` into the README of `checkout`, which names the file `report`."""
    results = [r for r in record.results if r.device == "cpu" and r.optimizer in MAIN_OPTIMIZERS and r.case in CASES]
    results.sort(key=lambda r: (MAIN_OPTIMIZERS.index(r.optimizer), CASES.index(r.case)))
    first_steps = "; ".join(
        f"{step.optimizer} {step.fresh_seconds:.1f} s after installation, {step.warm_seconds:.1f} s in a later process"
        for step in record.first_steps
    )
    paragraphs = [EXPLANATION, markdown_table(ratio_table(results)), f"First step, Numba's import included: {first_steps}."]
    paragraphs += [line for line in (other_optimizers(record), packages(record)) if line]
    paragraphs.append(f"{machine_line(record.machine)}; {record.machine.date}. Reproduce with `{record.command}`.")
    readme = checkout / "README.md"
    text = replace_between(readme.read_text(encoding="utf-8"), TABLE, "\n\n".join(paragraphs))
    link = f"[bench/results/{report}](bench/results/{report})"
    picture = f"![How many times as fast as torch's fused step](docs/benchmark.png)\n\n*All cases, and more: {link}.*"
    text = replace_between(text, PICTURE, picture)
    figure = overview(record)
    if figure is None or not results:
        raise ValueError(f"{report}: expected results of {' and '.join(MAIN_OPTIMIZERS)} on the CPU, found none")
    save_png(figure, checkout / "docs" / "benchmark.png")
    readme.write_text(text, encoding="utf-8")


def other_optimizers(record: SimpleNamespace) -> str:
    """How many times as fast as torch's best the other optimizers are, and what the memory would allow."""
    said = []
    for name in dict.fromkeys(r.optimizer for r in cells.on_cpu(record, None) if r.optimizer not in MAIN_OPTIMIZERS):
        large, small = (
            next((t for r in cells.on_cpu(record, [name]) if r.case == case and (t := cells.timing_of(r, "fusedopt"))), None)
            for case in (ONE_TENSOR, MANY_TENSORS)
        )
        if large and large.ratio and small and small.ratio:
            share = large.share_of_limit.median
            most = f" ({cells.number(large.ratio.median / share)})" if share < 1 else ""
            said.append(f"{name} {cells.number(large.ratio.median)}{most}, {cells.number(small.ratio.median)}")
    text = (
        f"The others, against the best that torch has of each, at {CASES_BY_NAME[ONE_TENSOR].title} (in brackets what it would be "
        "if our step ran at the measured limit of the memory; without them it does, and no kernel could be much faster) and at "
        f"{CASES_BY_NAME[MANY_TENSORS].title}: "
    )
    return f"{text}{'; '.join(said)}." if said else ""


def packages(record: SimpleNamespace) -> str:
    """Between what times of ours the steps of other packages take; empty where none is installed."""
    results = [result for result in cells.on_cpu(record, MAIN_OPTIMIZERS[:1]) if cells.timing_of(result, "fusedopt")]
    said = []
    for package in cells.others(results):
        timings = [(cells.timing_of(result, package), result.title) for result in results]
        times = [(t.ratio_to_ours.median, title) for t, title in timings if t and getattr(t, "ratio_to_ours", None)]
        if times:
            (least, quick), (most, slow) = min(times), max(times)
            said.append(f"{package} {cells.number(least)} ({quick}) to {cells.number(most)} ({slow})")
    text = f"A step of {MAIN_OPTIMIZERS[0]} by other packages for CPUs, as they come, takes so many times as long as ours: "
    return f"{text}{'; '.join(said)}." if said else ""


def replace_between(text: str, name: str, new: str) -> str:
    """Return `text` with `new` between the two markers of this name."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"README.md: expected one line {begin} and after it one line {end}; add them")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{new}\n{end}{rest.split(end)[1]}"


if __name__ == "__main__":
    sys.exit(main())
