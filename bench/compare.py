"""This checkout against another revision, by the same cases in alternating processes: ``make bench-compare BASE=main``."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from .cases import CASES, OPTIMIZERS
from .first_step import CHECKOUT

ROUNDS = 7
#: A step may get slower by this share before it counts as a regression.
THRESHOLD = 0.10
#: Seconds of each case in each process, with the same gradients and again with moved ones.
SECONDS = 0.4
DEFAULT_CASES = ("1x1M", "100x50k", "1000x1k", "1000x100", "mobilenet-v2")
DEFAULT_OPTIMIZERS = ("AdamW", "SGD momentum")

# The fusedopt of the revision, and the benchmarks of this checkout, whatever else is installed.
_CHILD = """\
import sys
sys.path.insert(0, sys.argv[1])
import fusedopt
assert fusedopt.__file__.startswith(sys.argv[1]), fusedopt.__file__
sys.path[0] = sys.argv[2]
from bench.compare import child
child(sys.argv[3:])
"""

#: Milliseconds of a step by name of what is measured.
Times = dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """One case: the ratio new / old of a step's time, and its noise.

    `noise` is how far the quartiles of either revision's own processes lie apart, as a share of their median.
    """

    name: str
    old_milliseconds: float
    new_milliseconds: float
    ratio: float
    noise: float

    def is_regression(self, threshold: float) -> bool:
        """Whether the step has become slower beyond the threshold and beyond noise."""
        return self.ratio > 1.0 + max(threshold, self.noise)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare; return 1 if anything has become slower beyond noise and threshold."""
    options = _parse(arguments)
    console = Console()
    names = [options.optimizer or DEFAULT_OPTIMIZERS, options.case or DEFAULT_CASES]
    with worktree(options.base) as base, Progress(console=console, auto_refresh=False) as progress:
        bar = progress.add_task(f"{options.base} against this checkout", total=options.rounds)

        def advance() -> None:
            progress.advance(bar)
            progress.refresh()

        rounds = []
        for old_and_new in alternated(base, CHECKOUT, names, options.rounds):
            rounds.append(old_and_new)
            advance()
    comparisons = compared(rounds)
    for line in described(comparisons, options.threshold):
        console.print(line, highlight=False, soft_wrap=True)
    return 1 if any(each.is_regression(options.threshold) for each in comparisons) else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("base", help="the revision to compare with, as git names it")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="processes of each revision (%(default)s)")
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="share that counts as slower (%(default)s)")
    for name, known in (("case", CASES), ("optimizer", OPTIMIZERS)):
        parser.add_argument(f"--{name}", action="append", choices=list(known), metavar="NAME", help="this alone; may be repeated")
    options = parser.parse_args(arguments)
    if options.rounds < 2:
        parser.error(f"--rounds {options.rounds}: noise shows from two rounds on")
    if not options.base or _git("rev-parse", "--verify", "--quiet", f"{options.base}^{{commit}}").returncode:
        parser.error(f"{options.base!r} names no revision of this repository: give one, as in make bench-compare BASE=HEAD~1")
    return options


@contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """A throw-away checkout of `revision`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder).resolve() / "base"
        made = _git("worktree", "add", "--detach", str(path), revision)
        if made.returncode:
            raise RuntimeError(f"git cannot check {revision} out: {made.stderr.strip()}")
        try:
            yield path
        finally:
            _git("worktree", "remove", "--force", str(path))


def alternated(old: Path, new: Path, names: Sequence[Sequence[str]], rounds: int) -> Iterator[tuple[Times, Times]]:
    """Yield the times of both checkouts, from processes that take turns in alternating order."""
    with tempfile.TemporaryDirectory() as caches:
        for index in range(rounds):
            order = [old, new] if index % 2 == 0 else [new, old]
            times = {checkout: _times_of(checkout, names, Path(caches) / checkout.name) for checkout in order}
            yield times[old], times[new]


def compared(rounds: Sequence[tuple[Times, Times]]) -> list[Comparison]:
    """Compare what both revisions have measured in all rounds."""
    found = []
    for name in rounds[0][0]:
        if all(name in times for pair in rounds for times in pair):
            old, new = [pair[0][name] for pair in rounds], [pair[1][name] for pair in rounds]
            ratio = statistics.median(b / a for a, b in zip(old, new, strict=True))
            noise = max(_noise(old), _noise(new))
            found.append(Comparison(name, statistics.median(old), statistics.median(new), ratio, noise))
    return found


def described(comparisons: Sequence[Comparison], threshold: float) -> list[str]:
    """A line for each comparison, and the verdict."""
    width = max((len(each.name) for each in comparisons), default=0)
    lines = [f"{'':{width}}      old, ms    new, ms   new / old   noise"]
    for each in comparisons:
        verdict = "SLOWER" if each.is_regression(threshold) else ""
        times = f"{each.old_milliseconds:10.4g} {each.new_milliseconds:10.4g}"
        lines.append(f"{each.name:{width}}   {times}   {each.ratio:9.3f}   {each.noise:5.1%}   {verdict}".rstrip())
    slower = sum(each.is_regression(threshold) for each in comparisons)
    rule = f"more than {threshold:.0%}, and more than the noise"
    return [
        *lines,
        f"{slower} of {len(comparisons)} have become slower by {rule}." if slower else f"None has become slower by {rule}.",
    ]


def child(arguments: Sequence[str]) -> None:
    """Measure in this process, and print the times."""
    from .measure import Entrant, interleaved
    from .subjects import OURS

    optimizers, cases = (text.split(",") for text in arguments)
    times: Times = {}
    for optimizer in optimizers:
        for case in cases:
            try:
                entrant = Entrant(OURS, OPTIMIZERS[optimizer], CASES[case])
            except (AttributeError, TypeError):  # a revision without this optimizer, or without fused=True for it
                continue
            entrant.step_with_gradients(1)
            for what, turn in (("", entrant.take), (", moved gradients", entrant.take_moved)):
                turns = interleaved({"": turn}, {""}, SECONDS)[""]
                times[f"{optimizer}, {CASES[case].title}{what}"] = 1e3 * statistics.median(turns)
    print(json.dumps(times))


def _times_of(checkout: Path, names: Sequence[Sequence[str]], caches: Path) -> Times:
    environment = {**os.environ, "FUSEDOPT_CACHE_DIR": str(caches / "fusedopt"), "NUMBA_CACHE_DIR": str(caches / "numba")}
    command = [sys.executable, "-c", _CHILD, str(checkout), str(CHECKOUT), *(",".join(each) for each in names)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    if finished.returncode:
        raise RuntimeError(f"the benchmarks fail in a checkout:\n{finished.stderr.strip()}")
    found: Times = json.loads(finished.stdout)
    return found


def _noise(times: Sequence[float]) -> float:
    lower, median, upper = statistics.quantiles(times, n=4, method="inclusive")
    return (upper - lower) / median


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], cwd=CHECKOUT, capture_output=True, text=True)


if __name__ == "__main__":
    sys.exit(main())
