"""`python -m fusedopt demo`: train a network with torch.optim and with fusedopt, and compare results and times."""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from fusedopt.info import bytes_by_kind
from fusedopt.kernels.source import cache_directory
from fusedopt.optimizer import FusedOptimizer

try:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    from ._demo.digits import Digits
    from ._demo.report import LEGEND, draw, make_table
    from ._demo.training import COMPARED_STEPS, FUSED, LOOP, OURS, RECIPES, Comparison, compare
except ModuleNotFoundError as error:
    MISSING: str | None = (error.name or "a package").partition(".")[0]
else:
    MISSING = None

LARGEST_FLOAT64_DIFFERENCE = 1e-10
"""Only the order of roundings may differ from torch's for-loop: 1e-16 at each step, grown a little in training."""
EPOCHS = 20
QUICK_EPOCHS = 5
STEPS_PER_REFRESH = 10


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; return 0, or 1 if float64 weights are not torch's, or 2 if it cannot run here."""
    options = _parse(arguments)
    device, obstacle = _choose_device(options.device)
    if MISSING is not None:
        obstacle = f'{MISSING} is not installed, and the demo needs it: pip install "fusedopt[demo]"'
    elif options.threads < 1:
        obstacle = f"--threads {options.threads}: one thread is the least"
    elif not options.output.absolute().parent.is_dir():
        obstacle = f"--output {options.output}: there is no folder {options.output.absolute().parent}: make it first"
    if obstacle is not None:
        print(f"fusedopt demo: {obstacle}", file=sys.stderr)
        return 2
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        return _run(device, QUICK_EPOCHS if options.quick else EPOCHS, options.output)
    finally:
        torch.set_num_threads(threads)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fusedopt demo", description=__doc__.partition(": ")[2])
    parser.add_argument("--quick", action="store_true", help=f"train for {QUICK_EPOCHS} epochs instead of {EPOCHS}")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if torch finds a GPU, else cpu")
    parser.add_argument(
        "--threads", type=int, default=1, help="of torch, on the CPU (%(default)s: so small a network gains nothing by more)"
    )
    parser.add_argument("--output", type=Path, default=Path("fusedopt-demo.png"), metavar="FILE", help="the picture (%(default)s)")
    return parser.parse_args(arguments)


def _choose_device(asked: str | None) -> tuple[torch.device, str | None]:
    available = torch.cuda.is_available()
    if asked == "cuda" and not available:
        return torch.device("cpu"), "--device cuda: torch finds no GPU here; leave the option out to use the CPU"
    return torch.device(asked or ("cuda" if available else "cpu")), None


def _run(device: torch.device, epochs: int, output: Path) -> int:
    console = Console()
    digits = Digits.load(device)
    steps = epochs * digits.steps_per_epoch
    console.print(
        f"Training on {len(digits.train_labels)} handwritten digits, testing on {len(digits.test_labels)} others: "
        f"{epochs} epochs of {digits.steps_per_epoch} steps. Device: {_describe(device)}.",
        highlight=False,
    )
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    # Refreshed between steps alone: a thread that draws would take time from what is being timed.
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        bar = progress.add_task("", total=len(RECIPES) * (steps + COMPARED_STEPS))

        def advance(doing: str) -> None:
            progress.update(bar, advance=1, description=doing)
            if progress.tasks[bar].completed % STEPS_PER_REFRESH == 0:
                progress.refresh()

        comparisons = [compare(recipe, digits, steps, advance) for recipe in RECIPES]

    console.print(make_table(comparisons))
    for line in (LEGEND, *_facts(comparisons), *_verdict(comparisons)):
        console.print(line, highlight=False)
    caption = f"{_describe(device)}; {_kernels(comparisons)}"
    draw(comparisons, caption, output)
    console.print(f"Picture: {output}", highlight=False, soft_wrap=True)
    return 0 if all(map(_agrees, comparisons)) else 1


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return f"GPU ({torch.cuda.get_device_name(device)})"
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def _kernels(comparisons: Sequence["Comparison"]) -> str:
    """Say how many parameters fusedopt updated by which backend, from `optimizer.explain()`."""
    found = []
    for comparison in comparisons:
        optimizer = comparison.runs[OURS].optimizer
        assert isinstance(optimizer, FusedOptimizer)
        counts = Counter(re.findall(r"-> (\w+)", optimizer.explain()))
        found.append(", ".join(f"{path} for {count} parameters" for path, count in counts.items()))
    return "; ".join(dict.fromkeys(found))


def _facts(comparisons: Sequence["Comparison"]) -> list[str]:
    first_steps = ", ".join(f"{one.recipe.title} {one.runs[OURS].step_seconds[0]:.2f} s" for one in comparisons)
    return [
        *(f"{one.recipe.title}: the optimizer's share of a training step: {_shares(one)}." for one in comparisons),
        f"First step of {OURS}: {first_steps}. Kernels are compiled once and kept in {cache_directory()}.",
        f"Backend of {OURS}: {_kernels(comparisons)}.",
        *(f"{one.recipe.title}: bytes a parameter: {bytes_by_kind(one.runs[OURS].optimizer)}." for one in comparisons),
    ]


def _shares(comparison: "Comparison") -> str:
    runs = [comparison.runs[name] for name in (LOOP, FUSED, OURS)]
    return ", ".join(
        f"{run.step_milliseconds / (run.step_milliseconds + run.gradient_milliseconds):.0%} with {run.implementation}"
        for run in runs
    )


def _agrees(comparison: "Comparison") -> bool:
    # Written so that NaN does not agree.
    within: bool = comparison.float64_difference < LARGEST_FLOAT64_DIFFERENCE
    return within


def _verdict(comparisons: Sequence["Comparison"]) -> list[str]:
    limit = f"{LARGEST_FLOAT64_DIFFERENCE:.0e}"
    wrong = [comparison for comparison in comparisons if not _agrees(comparison)]
    if not wrong:
        return [f"[green]float64 weights after {COMPARED_STEPS} steps are torch's: they differ by less than {limit}.[/]"]
    return [
        f"[bold red]WRONG: with {comparison.recipe.title} float64 weights differ from torch's by "
        f"{comparison.float64_difference:.1e} after {COMPARED_STEPS} steps; less than {limit} is right.[/]"
        for comparison in wrong
    ]
