"""AdamW in short formats, against torch's fused step in float32: bytes, times, and the arithmetic that they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import fusedopt

from .cases import CONTEST_BYTES, OPTIMIZER_BYTES, Case, Optimizer, available_bytes
from .costs import threads_set
from .measure import Entrant, Result, Spread, interleaved, measure
from .subjects import FUSED_FLOAT32, Build, Subject, from_package

#: A rate and a decay at which errors of short formats do not hide that one of them is wrong: after the steps of the check
#: parameters without decay are off by 15 % of the way, with a rate that is 10 % too large by 10 %.
ADAMW = Optimizer("AdamW", "AdamW", {"lr": 0.1, "weight_decay": 0.1})
#: States in 8 bits are off by 0.4 to 1.3 % of the way, parameters in bfloat16 by 1, and rounded by chance by 2.
ALLOWED_ERROR = 0.03
#: States in 4 bits, which are off by 14 %; without decay they would be by 21.
ALLOWED_ERROR_OF_4_BITS = 0.17
#: Sizes between which arithmetic is measured, both within the caches of one core and above the least size of short formats.
SMALL, LARGE = 8_192, 40_960
ARITHMETIC_TURN_SECONDS = 0.01


def _ours(**formats: Any) -> Build:
    def build(optimizer: Optimizer, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        return fusedopt.AdamW(parameters, **optimizer.arguments, fused=True, **formats)

    return build


def _of_package(name: str, package: str, module: str, class_name: str, allowed_error: float, **more: Any) -> Subject:
    build, serves = from_package(module, {"AdamW": class_name})
    return Subject(name, build, serves, package=package, allowed_error=allowed_error, **more)


FLOAT32 = Subject("fusedopt, float32", _ours())
BFLOAT16_STATES = Subject("fusedopt, bf16 states", _ours(state_format="bf16"), allowed_error=ALLOWED_ERROR)
EIGHT_BIT_STATES = Subject("fusedopt, 8-bit states", _ours(state_format="8bit"), allowed_error=ALLOWED_ERROR)
OURS = (
    FLOAT32,
    BFLOAT16_STATES,
    EIGHT_BIT_STATES,
    *(
        Subject(f"fusedopt, {name}", _ours(**options), dtype=torch.bfloat16, allowed_error=ALLOWED_ERROR)
        for name, options in {
            "bfloat16, split16, bf16 states": {"state_format": "bf16", "master_weights": "split16"},
            "bfloat16, split16, 8-bit states": {"state_format": "8bit", "master_weights": "split16"},
            "bfloat16 by chance, 8-bit states": {"state_format": "8bit", "stochastic_rounding": True},
        }.items()
    ),
)
_COMPILED = "torch.compile makes a step for each shape"
BITSANDBYTES = _of_package(
    "bitsandbytes, AdamW8bit",
    "bitsandbytes",
    "bitsandbytes.optim",
    "AdamW8bit",
    ALLOWED_ERROR,
    remark="on a CPU operations of torch, and C++ that converts",
)
TORCHAO = _of_package("torchao, AdamW8bit", "torchao", "torchao.optim", "AdamW8bit", ALLOWED_ERROR, remark=_COMPILED)
SUBJECTS = (
    FUSED_FLOAT32,
    *OURS,
    BITSANDBYTES,
    TORCHAO,
    _of_package("torchao, AdamW4bit", "torchao", "torchao.optim", "AdamW4bit", ALLOWED_ERROR_OF_4_BITS, remark=_COMPILED),
    _of_package(
        "flashoptim, FlashAdamW",
        "flashoptim",
        "flashoptim",
        "FlashAdamW",
        ALLOWED_ERROR,
        only_on_gpu=True,
        dtype=torch.bfloat16,
        remark="bfloat16 parameters, 8 more bits of each, 8-bit states",
    ),
)


@dataclass
class Arithmetic:
    """What a format costs where memory does not limit it: nanoseconds for an element on one core; and the bytes that it moves."""

    subject: str
    nanoseconds: Spread
    moved_bytes: float


def measure_formats(case: Case, device: str, seconds: float) -> Result:
    """Check all formats on `case`, and time them beside torch's fused step in float32."""
    subjects = [replace(subject, device=device) for subject in SUBJECTS]
    taking_part = [subject for subject in subjects if subject.obstacle is None]
    needed, free = case.elements * (CONTEST_BYTES + OPTIMIZER_BYTES * len(taking_part)), available_bytes()
    if needed > free:
        said = f"{needed / 2**30:.1f} GiB of memory are needed, and {free / 2**30:.1f} are free"
        return Result(ADAMW.name, case.name, case.title, device, case.tensors, case.elements, left_out=said)
    names = [FUSED_FLOAT32.name]
    return measure(ADAMW, case, taking_part, seconds, baseline_names=names, ours_name=EIGHT_BIT_STATES.name)


def arithmetic(seconds: float) -> list[Arithmetic]:
    """Measure on one thread, in its caches, by how much a step takes longer on more elements: what the host adds drops out."""
    with threads_set(1):
        entrants = {
            (subject.name, elements): Entrant(subject, ADAMW, Case.equal(1, elements))
            for subject in (FUSED_FLOAT32, *OURS)
            for elements in (SMALL, LARGE)
        }
        for entrant in entrants.values():
            entrant.step_with_gradients(1)
        turns = {f"{name}, {elements}": entrant.take for (name, elements), entrant in entrants.items()}
        times = interleaved(turns, turns, seconds, ARITHMETIC_TURN_SECONDS)
    found = []
    for subject in (FUSED_FLOAT32, *OURS):
        pairs = zip(times[f"{subject.name}, {SMALL}"], times[f"{subject.name}, {LARGE}"], strict=True)
        spread = Spread.of([1e9 * (large - small) / (LARGE - SMALL) for small, large in pairs])
        found.append(Arithmetic(subject.name, spread, entrants[subject.name, LARGE].moved_bytes()))
    return found
