"""`python -m examples.lecture`: run one topic, several, or all with a page about them."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import TOPICS

try:
    import sklearn  # noqa: F401
    from markdown_it import MarkdownIt  # noqa: F401
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table

    from .shared import data, page, plotting, topic
except ModuleNotFoundError as error:
    MISSING: str | None = (error.name or "a package").partition(".")[0]
else:
    MISSING = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run topics; return 0, or 2 if they cannot be run here."""
    options = _parse(arguments)
    unknown = [name for name in options.topics if name not in TOPICS]
    obstacle = None
    if MISSING is not None:
        obstacle = f'{MISSING} is not installed, and the lecture needs it: pip install "fusedopt[lecture]"'
    elif unknown:
        obstacle = f"no topic is called {', '.join(unknown)}; there are {', '.join(TOPICS)}"
    if obstacle is None:
        try:
            images = data.cifar10(options.cifar) if options.cifar else data.digits()
        except FileNotFoundError as error:
            obstacle = str(error)
    if obstacle is not None:
        print(f"lecture: {obstacle}", file=sys.stderr)
        return 2
    _run(options, topic.Setting(images, options.quick))
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.lecture", description=__doc__.partition(": ")[2])
    parser.add_argument("topics", nargs="*", metavar="TOPIC", help=f"all if none is named: {', '.join(TOPICS)}")
    parser.add_argument("--quick", action="store_true", help="as short as the claims allow")
    parser.add_argument("--cifar", type=Path, metavar="DIR", help="CIFAR-10's python files, in place of scikit-learn's digits")
    parser.add_argument("--output", type=Path, default=Path("build/lecture"), metavar="DIR", help="figures and page (%(default)s)")
    return parser.parse_args(arguments)


def _run(options: argparse.Namespace, setting: "topic.Setting") -> None:
    console = Console()
    options.output.mkdir(parents=True, exist_ok=True)
    results = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Refreshed between topics alone: a thread that draws would take time from what is being timed.
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        bar = progress.add_task("", total=len(options.topics or TOPICS))
        for name in options.topics or TOPICS:
            progress.update(bar, description=name, refresh=True)
            results[name] = topic.run(name, setting)
            plotting.save(results[name].figure, options.output / f"{name}.png")
            progress.console.print(_table(name, results[name]))
            progress.update(bar, advance=1, refresh=True)
    if not options.topics:
        page.write(options.output, results, setting)
    written = "pictures" if options.topics else "lecture.html, lecture.md and pictures"
    console.print(f"Written to {options.output}: {written}", highlight=False, soft_wrap=True)


def _table(name: str, result: "topic.Result") -> "Table":
    table = Table("measured", "value", title=topic.text_of(name)[0], title_justify="left")
    table.columns[1].justify = "right"
    for what, value in result.numbers.items():
        table.add_row(what, page.shown(value))
    return table


if __name__ == "__main__":
    sys.exit(main())
