"""What is made of the measurements: tables, in Markdown for the README, and JSON for machines."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fusedopt

from .first_step import FirstStep
from .measure import ALLOWED_ULPS, Result, Spread

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
EXPLANATION = (
    "float32 on the CPU; a whole `optimizer.step()`. torch / ours: ratio of the times, above 1 where fusedopt is "
    "faster; median of interleaved rounds, quartiles in brackets. Moved gradients: the same ratio where each step finds its "
    "gradients at new addresses, as after `zero_grad()`."
)


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a reader needs to judge the numbers; nothing that names the machine itself."""

    cpu: str
    cores: int
    threads: int
    system: str
    python: str
    torch: str
    numba: str
    fusedopt: str
    date: str
    load: float | None

    @classmethod
    def here(cls) -> Machine:
        return cls(
            cpu=cpu_model(),
            cores=os.cpu_count() or 1,
            threads=torch.get_num_threads(),
            system=f"{platform.system()} {platform.machine()}",
            python=platform.python_version(),
            torch=torch.__version__,
            numba=importlib.metadata.version("numba"),
            fusedopt=fusedopt.__version__,
            date=datetime.date.today().isoformat(),
            load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        )

    @property
    def busy(self) -> bool:
        """Whether other programs kept a third of a core or more in the minute before."""
        return self.load is not None and self.load > 0.3

    def __str__(self) -> str:
        return (
            f"{self.cpu}, {self.cores} cores, {self.threads} threads, {self.system}; Python {self.python}, "
            f"torch {self.torch}, numba {self.numba}, fusedopt {self.fusedopt}; {self.date}"
        )


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text(encoding="utf-8")) if cpuinfo.exists() else None
    return named.group(1).strip() if named else platform.processor() or platform.machine()


def result_rows(results: Sequence[Result]) -> list[list[str]]:
    """The heading, and a row of text for each result."""
    rows = [["optimizer", "tensors x elements", "torch fused, ms", "fusedopt, ms", "torch / ours", "moved gradients"]]
    for result in results:
        times = (_milliseconds(result.baseline_ms), _milliseconds(result.ours_ms))
        rows.append([result.contest, result.case, *times, _ratio(result.ratio), _ratio(result.moved_gradients_ratio)])
    return rows


def complaints(results: Sequence[Result]) -> list[str]:
    """A line for each subject that computes something else than torch's for-loop does."""
    return [
        f"WRONG, so not timed: {name}, {result.contest}, {result.case}: off by {result.error_ulps[name]:.3g} ulps "
        f"from torch's for-loop in float64; {ALLOWED_ULPS:g} are allowed"
        for result in results
        for name in result.wrong
    ]


def first_step_rows(first_steps: Sequence[FirstStep]) -> list[list[str]]:
    """The heading, and a row of text for each optimizer."""
    rows = [["optimizer", "first step after installation, s", "in a later process, s", "files cached, then added"]]
    for step in first_steps:
        files = f"{step.fresh_files}, then {step.warm_files}"
        rows.append([step.contest, f"{step.fresh_seconds:.2f}", f"{step.warm_seconds:.2f}", files])
    return rows


def markdown(results: Sequence[Result], first_steps: Sequence[FirstStep], machine: Machine, command: str) -> str:
    tables = (_markdown_table(result_rows(results)), _markdown_table(first_step_rows(first_steps)))
    return "\n\n".join([EXPLANATION, *tables, f"{machine}. Reproduce with `{command}`."])


def update_readme(path: Path, text: str) -> None:
    """Put `text` between the two markers of the file at `path`."""
    old = path.read_text(encoding="utf-8")
    if old.count(BEGIN) != 1 or old.count(END) != 1 or old.index(BEGIN) > old.index(END):
        raise ValueError(f"{path.name}: expected one line {BEGIN} and after it one line {END}; add them")
    before, rest = old.split(BEGIN)
    after = rest.split(END)[1]
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def as_json(results: Sequence[Result], first_steps: Sequence[FirstStep], machine: Machine) -> dict[str, Any]:
    return {
        "machine": dataclasses.asdict(machine),
        "results": [{**dataclasses.asdict(result), "wrong": result.wrong} for result in results],
        "first_steps": [dataclasses.asdict(step) for step in first_steps],
    }


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
    heading, *body = rows
    rule = ["---", *["---:"] * (len(heading) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (heading, rule, *body))


def _milliseconds(spread: Spread | None) -> str:
    return f"{spread.median:.3g}" if spread else ""


def _ratio(spread: Spread | None) -> str:
    if spread is None:
        return ""
    numbers = (spread.median, spread.lower_quartile, spread.upper_quartile)
    return "{} ({}-{})".format(*(f"{number:.2f}" if number < 10 else f"{number:.1f}" for number in numbers))
