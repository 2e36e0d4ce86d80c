"""Measure whole optimizer steps on the CPU against torch's fused implementations; each subject is checked first."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import textwrap
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from .cases import CASES, contests
from .first_step import CHECKOUT, measure_first_step
from .measure import measure
from .report import Machine, as_json, complaints, first_step_rows, markdown, result_rows, update_readme

ROUNDS, QUICK_ROUNDS = 31, 7
README_COMMAND = "python -m bench --update-readme"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks; return 1 if any subject was wrong, else 0."""
    options = _parse(arguments)
    console = Console()
    machine = Machine.here()
    console.print(str(machine), highlight=False)
    if machine.busy:
        console.print(
            f"[bold yellow]Other programs are running (load {machine.load:.1f}): what they take from whom, ratios show too. "
            "Better measure when nothing else runs.[/]",
            highlight=False,
        )
    cases = [case for case in CASES if not options.case or case.name in options.case]
    rounds = QUICK_ROUNDS if options.quick else ROUNDS
    results, first_steps = [], []
    # Refreshed between measurements alone: a thread that draws would take time from what is being timed.
    with Progress(console=console, auto_refresh=False) as progress:
        bar = progress.add_task("", total=len(contests()) * (len(cases) + 1))

        def begin(doing: str) -> None:
            progress.update(bar, description=doing)
            progress.refresh()

        for contest in contests():
            for case in cases:
                begin(f"{contest.name}: {case.title}")
                results.append(measure(contest, case, rounds))
                progress.advance(bar)
            begin(f"{contest.name}: first step of a new process")
            first_steps.append(measure_first_step(contest.name))
            progress.advance(bar)

    for rows in (result_rows(results), first_step_rows(first_steps)):
        console.print(_table(rows))
    for line in complaints(results):
        console.print(f"[bold red]{line}[/]", highlight=False)
    if options.json:
        options.json.write_text(json.dumps(as_json(results, first_steps, machine), indent=2) + "\n", encoding="utf-8")
    wrong = any(result.wrong for result in results)
    if options.update_readme and not wrong:
        update_readme(CHECKOUT / "README.md", markdown(results, first_steps, machine, README_COMMAND))
    return 1 if wrong else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds instead of {ROUNDS}")
    parser.add_argument("--case", action="append", choices=[case.name for case in CASES], help="this case alone; may be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    parser.add_argument("--update-readme", action="store_true", help="rewrite the table in README.md")
    options = parser.parse_args(arguments)
    if options.update_readme and (options.quick or options.case):
        parser.error("--update-readme: the README shows full runs over all cases; leave out --quick and --case")
    return options


def _table(rows: Sequence[Sequence[str]]) -> Table:
    """Lay out `rows` for a terminal; those with the same first cell stand under it as their heading."""
    (_, *heading), *body = rows
    table = Table(box=box.HORIZONTALS, pad_edge=False, collapse_padding=True)
    for index, title in enumerate(heading):
        # Headings wrap, cells do not.
        widest = max(map(len, [*(row[1 + index] for row in body), *title.split()]))
        table.add_column(textwrap.fill(title, widest), justify="right" if index else "left", no_wrap=True)
    for name, group in itertools.groupby(body, key=itemgetter(0)):
        table.add_section()
        table.add_row(f"[bold]{name}")
        for _, *cells in group:
            table.add_row(*cells)
    return table


if __name__ == "__main__":
    sys.exit(main())
