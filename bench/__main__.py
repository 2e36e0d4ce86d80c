"""Measure whole optimizer steps, and write a report; each subject is checked before it is timed."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from .cases import CASES, OPTIMIZERS
from .first_step import CHECKOUT
from .machine import Machine
from .report import write
from .report.contests import BUSY_LOAD, wrong_subjects
from .run import FULL, PARTS, QUICK, Choice, read, run
from .subjects import SUBJECTS

RESULTS = CHECKOUT / "bench" / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks; return 1 if any subject was wrong, else 0."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parse(given)
    if options.list:
        _print_names()
        return 0
    console = Console()
    if options.report:
        _say_written(console, write(read(options.report), options.report.with_suffix("")))
        return 0
    machine = Machine.here()
    if machine.load is not None and machine.load > BUSY_LOAD:
        console.print(
            f"[bold yellow]Other programs are running (load {machine.load:.1f}): what they take from whom, ratios show too. "
            "Better measure when nothing else runs.[/]",
            highlight=False,
        )
    choice = Choice(*(tuple(options_of or ()) for options_of in (options.case, options.optimizer, options.subject, options.part)))
    # Refreshed between measurements alone: a thread that draws would take time from what is being timed.
    with Progress(console=console, auto_refresh=False) as progress:
        bar = progress.add_task("")

        def begin(doing: str, number: int, total: int) -> None:
            progress.update(bar, description=doing, completed=number, total=total)
            progress.refresh()

        command = shlex.join(["python", "-m", "bench", *_without_output(given)])
        record = run(QUICK if options.quick else FULL, choice, command, begin)
        progress.update(bar, description="done", completed=progress.tasks[0].total)
    options.output.mkdir(parents=True, exist_ok=True)
    name = options.output / (machine.file_name + ("" if record["whole"] else "-quick" if choice.is_whole else "-part"))
    name.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    read_back = read(name.with_suffix(".json"))
    _say_written(console, write(read_back, name))
    wrong = wrong_subjects(read_back)
    for line in wrong:
        console.print(f"[bold red]WRONG, so not timed: {line}[/]", highlight=False)
    return 1 if wrong else 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds: two minutes on two cores, not ten")
    chosen = {"case": [*CASES], "optimizer": [*OPTIMIZERS], "subject": [*SUBJECTS], "part": [*PARTS]}
    for name, known in chosen.items():
        parser.add_argument(f"--{name}", action="append", choices=known, metavar="NAME", help=f"this {name} alone; may be repeated")
    parser.add_argument("--list", action="store_true", help="print the names of cases, optimizers, subjects and parts")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER", help="where reports go (bench/results)")
    parser.add_argument(
        "--report", type=Path, metavar="FILE.json", help="measure nothing: write the report of an earlier run again"
    )
    return parser.parse_args(arguments)


def _without_output(arguments: Sequence[str]) -> list[str]:
    # A folder would name the machine.
    found = list(arguments)
    if "--output" in found:
        place = found.index("--output")
        del found[place : place + 2]
    return [argument for argument in found if not argument.startswith("--output=")]


def _print_names() -> None:
    for title, names in (("cases", [*CASES]), ("optimizers", [*OPTIMIZERS]), ("subjects", [*SUBJECTS]), ("parts", [*PARTS])):
        print(f"{title}: {', '.join(names)}")


def _say_written(console: Console, paths: Sequence[Path]) -> None:
    console.print(f"Report: {', '.join(str(path) for path in paths)}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
