"""What is looked up in a record, and how it stands in a cell."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace


def on_cpu(record: SimpleNamespace, names: Sequence[str] | None) -> list[SimpleNamespace]:
    """Contests on the CPU, of these optimizers or of all."""
    return [r for r in record.results if r.device == "cpu" and (names is None or r.optimizer in names)]


def timing_of(result: SimpleNamespace, subject: str | None) -> SimpleNamespace | None:
    """What was found of a subject in a contest, or None."""
    return next((timing for timing in result.timings if timing.subject == subject), None)


def others(results: Sequence[SimpleNamespace]) -> list[str]:
    """Other packages that were timed."""
    known = ("torch loop", "torch foreach", "torch fused", "fusedopt")
    return list(dict.fromkeys(t.subject for r in results for t in r.timings if t.subject not in known))


def machine_line(machine: SimpleNamespace) -> str:
    """The machine and the versions in a line."""
    parts = [machine.cpu, f"{machine.cores} cores", f"{machine.threads} threads"]
    parts += [f"{machine.memory_gib} GiB of memory"] if machine.memory_gib else []
    parts += [machine.gpu or "no GPU", machine.system]
    return f"{', '.join(parts)}; {', '.join(f'{name} {version}' for name, version in vars(machine.versions).items())}"


def median(timing: SimpleNamespace | None) -> str:
    """Milliseconds."""
    if timing is None:
        return ""
    return "wrong" if timing.wrong else number(timing.milliseconds.median)


def number(value: float) -> str:
    """Three digits."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def count(elements: int) -> str:
    return f"{elements / 1e6:.3g} M" if elements < 1e8 else f"{elements / 1e6:.0f} M"


def spread(found: SimpleNamespace | None, digits: int = 0) -> str:
    """Median and quartiles, to two places or, where digits are asked for, to three digits."""
    if found is None:
        return ""
    numbers = (found.median, found.lower_quartile, found.upper_quartile)
    if digits:
        return "{} ({} to {})".format(*map(number, numbers))
    return "{} ({}-{})".format(*(f"{each:.2f}" if each < 10 else f"{each:.1f}" for each in numbers))


def percent(found: SimpleNamespace | None) -> str:
    """Its median, as a share."""
    return "" if found is None else f"{100 * found.median:.0f} %"


def of_ours(timing: SimpleNamespace | None) -> str:
    """Its time over that of ours."""
    if timing is None:
        return ""
    return "wrong" if timing.wrong else spread(getattr(timing, "ratio_to_ours", None))


def remark(subject: SimpleNamespace) -> str:
    """What a reader has to know of a subject; older records have no such words."""
    return getattr(subject, "remark", "")


def noise(found: SimpleNamespace) -> float:
    """How far its quartiles are apart, as a share of the median."""
    quartiles_apart: float = (found.upper_quartile - found.lower_quartile) / found.median
    return quartiles_apart


def listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
