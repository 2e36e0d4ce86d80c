"""The section on how it was measured."""

from __future__ import annotations

from types import SimpleNamespace

from ..measure import CHECKED_STEPS, LEAST_ROUNDS, MOST_ROUNDS, TURN_SECONDS
from ..subjects import ALLOWED_ULPS, ALLOWED_ULPS_OF_OTHERS
from .page import Section


def method(record: SimpleNamespace) -> Section:
    items = [
        f"**Right first.** Each subject takes {CHECKED_STEPS} steps with new gradients. If any element of any parameter is more "
        f"than {ALLOWED_ULPS:g} ulps from torch's for-loop in float64, or NaN, the subject is reported wrong, and not timed. For "
        f"other packages, some of which compute bias corrections in float32, the bound is {ALLOWED_ULPS_OF_OTHERS:g} ulps: a step "
        "without its decay is beyond it. Short formats are checked by the error of the way that parameters have come.",
        f"**Interleaved.** In each of {LEAST_ROUNDS} to {MOST_ROUNDS} rounds everyone has a turn of {1e3 * TURN_SECONDS:.0f} ms "
        "(one step at least), in alternating order; far slower subjects take part in the first rounds alone. A turn counts as its "
        "mean, a subject as the median of its turns; ratios are taken round by round. Times are of whole steps as a user calls "
        "them.",
        "**The memory limit** is measured in the same rounds: a kernel of its own, not one of fusedopt, reads and writes the same "
        "streams (AdamW in float32: 4 read and 3 written, 28 bytes an element) without arithmetic, on as many threads, each "
        "walking "
        "its own contiguous share again and again. Where a case fits into caches, the limit is theirs, which a step that also "
        "divides and takes roots does not reach.",
        "**Moved gradients** are allocated outside of the time measured, as `backward` would.",
        f"The run took {record.seconds / 60:.1f} minutes.",
        "Commands: `make bench` (quick), `python -m bench` (all), `python -m bench --list` (names of cases, optimizers and "
        "subjects), `make bench-compare BASE=<revision>` (this checkout against a revision).",
    ]
    return Section("How it was measured", list(items))
