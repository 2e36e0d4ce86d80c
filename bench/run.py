"""A whole run: which contests are held, and the record of all that was measured."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from . import compiled, costs, formats, prediction, surroundings
from .cases import CASES, CONTEST_BYTES, OPTIMIZER_BYTES, OPTIMIZERS, SYNTHETIC, Case, Optimizer, available_bytes
from .ends import CLIPPED, EVERYTHING, measure_end, measure_norm
from .first_step import measure_first_step
from .machine import Machine
from .measure import measure
from .published_formats import update_errors
from .subjects import FUSED_FLOAT32, ON_CPU, ON_GPU, OURS_BFLOAT16, SUBJECTS, Subject, baseline

#: torch's for-loop and lists take seconds a step on more elements than this; they are left out there.
MANY_ELEMENTS = 50_000_000
SLOW_SUBJECTS = ("torch loop", "torch foreach", "torch foreach, CUDA")
#: Of the memory that is free, what a contest may take; beyond it other packages are left out.
MEMORY_SHARE = 0.75
MAIN_OPTIMIZERS = ("AdamW", "SGD momentum")
PARTS = ("steps", "bfloat16", "formats", "ends", "costs", "threads", "busy", "first-step", "predictions")


@dataclass(frozen=True)
class Extent:
    """How much is measured.

    Args:
        seconds: for each contest, about, with the same gradients and with moved ones; half of it for the other optimizers.
        cases: of the main optimizers.
        other_cases: of the other optimizers.
        bfloat16_cases: with parameters in bfloat16.
        format_elements: of the parameter that has its states, and itself, in short formats.
        end_cases: of the whole end of a training step; the first one of all that it may hold.
        surrounded_cases: on fewer threads, and beside a busy core.
        first_steps: optimizers whose first step is taken in new processes.
    """

    seconds: float
    cases: tuple[str, ...]
    other_cases: tuple[str, ...]
    bfloat16_cases: tuple[str, ...]
    format_elements: tuple[int, ...]
    end_cases: tuple[str, ...]
    surrounded_cases: tuple[str, ...]
    first_steps: tuple[str, ...]


FULL = Extent(
    seconds=5.0,
    cases=tuple(CASES),
    other_cases=("1x10M", "1000x1k", "resnet50"),
    bfloat16_cases=("1x20M", "1x1M", "resnet50"),
    format_elements=(20_000_000, 64_000_000),
    end_cases=("1x20M", "gpt2-small", "100x50k", "1000x1k"),
    surrounded_cases=("1x20M", "1x1M", "100x50k", "1000x1k"),
    first_steps=MAIN_OPTIMIZERS,
)
QUICK = Extent(
    seconds=0.8,
    cases=("1x20M", "1x1M", "100x50k", "1000x1k", "1000x100", "mobilenet-v2", "resnet50"),
    other_cases=("1000x1k",),
    bfloat16_cases=("1x20M",),
    format_elements=(10_000_000,),
    end_cases=("1x20M", "1000x1k"),
    surrounded_cases=("1x1M", "100x50k"),
    first_steps=MAIN_OPTIMIZERS[:1],
)


@dataclass(frozen=True)
class Choice:
    """What a user asks for; whatever is empty is all that belongs to the extent."""

    cases: tuple[str, ...] = ()
    optimizers: tuple[str, ...] = ()
    subjects: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whether nothing was left out."""
        return not (self.cases or self.optimizers or self.subjects or self.parts)


#: A piece of a run: what it is called, the list of the record that it adds to, and what measures.
Task = tuple[str, str, Callable[[], Sequence[Any]]]


def tasks(extent: Extent, choice: Choice) -> list[Task]:
    """Everything to measure, in order."""
    found: list[Task] = []
    for optimizer in OPTIMIZERS.values():
        if choice.optimizers and optimizer.name not in choice.optimizers:
            continue
        main = optimizer.name in MAIN_OPTIMIZERS
        for case in _chosen(extent.cases if main else extent.other_cases, choice):
            for subjects in (ON_CPU, ON_GPU):
                found += _contest(optimizer, case, subjects, extent.seconds / (1 if main else 2), choice)
        if main and _wants("bfloat16", choice):
            for case in _chosen(extent.bfloat16_cases, choice):
                work = partial(_bfloat16, optimizer, case, extent.seconds)
                found.append((f"{optimizer.name}, {case.title}, bfloat16", "bfloat16", work))
    adamw, seconds = OPTIMIZERS["AdamW"], extent.seconds / 2
    if _wants("formats", choice):
        found += _formats(extent, choice)
    if _wants("ends", choice):
        for end, names in ((CLIPPED, extent.end_cases), (EVERYTHING, extent.end_cases[:1])):
            for case in _chosen(names, choice):
                found.append((f"{end.name}, {case.title}", "ends", _one(measure_end, end, case, seconds)))
        for case in _chosen(extent.end_cases[:1], choice):
            found.append((f"norm alone, {case.title}", "ends", _one(measure_norm, case, seconds)))
    if _wants("costs", choice):
        found.append(("cost of a step by tensors", "host_costs", partial(costs.host_costs, adamw, seconds)))
        for case, moved in ((SYNTHETIC[3], True), (Case.equal(1000, 1), True), (Case.equal(1000, 1), False)):
            found.append((f"parts of a step, {case.title}", "breakdowns", _one(costs.breakdown, adamw, case, moved, seconds)))
        found.append(("start of threads", "thread_starts", partial(costs.thread_starts, adamw, seconds)))
        if compiled.obstacle() is None:
            found.append(("host's part of a step on a GPU", "gpu_host_costs", partial(costs.gpu_host_costs, adamw, seconds)))
        for name in MAIN_OPTIMIZERS:
            for case in (SYNTHETIC[3], CASES["resnet50"], CASES["gpt2-small"]):
                found.append((f"launches, {case.title}", "launches", _one(costs.launches, OPTIMIZERS[name], case)))
    for case in _chosen(extent.surrounded_cases, choice):
        if _wants("threads", choice):
            found.append((f"threads, {case.title}", "scaling", partial(surroundings.scaling, adamw, [case], seconds)))
        if _wants("busy", choice):
            beside = partial(surroundings.beside_a_busy_core, adamw, [case], seconds)
            found.append((f"beside a busy core, {case.title}", "busy", beside))
    if _wants("first-step", choice):
        found += [(f"first step, {name}", "first_steps", _one(measure_first_step, name)) for name in extent.first_steps]
    if _wants("predictions", choice) and compiled.obstacle() is None:
        predicted = partial(prediction.predictions, MAIN_OPTIMIZERS, _chosen(extent.cases, choice))
        found.append(("predicted times on GPUs", "predictions", predicted))
    return found


def _formats(extent: Extent, choice: Choice) -> list[Task]:
    chosen = [CASES[name] for name in choice.cases] or [Case.equal(1, elements) for elements in extent.format_elements]
    found: list[Task] = [
        (f"short formats, {case.title}, {device}", "formats", _one(formats.measure_formats, case, device, extent.seconds))
        for case in chosen
        for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else []))
    ]
    found.append(("arithmetic of short formats", "format_arithmetic", partial(formats.arithmetic, extent.seconds)))
    ours = formats.EIGHT_BIT_STATES
    scaling = partial(surroundings.scaling, formats.ADAMW, chosen[:1], extent.seconds / 2, ours)
    found.append((f"threads, {ours.name}, {chosen[0].title}", "format_scaling", scaling))
    found.append(("errors of short formats", "format_errors", update_errors))
    return found


def _one(work: Callable[..., Any], *arguments: Any) -> Callable[[], Sequence[Any]]:
    return lambda: [work(*arguments)]


def _wants(part: str, choice: Choice) -> bool:
    # Who chooses subjects or optimizers wants steps alone, unless parts are chosen as well.
    return part in (choice.parts or (("steps",) if choice.subjects or choice.optimizers else PARTS))


def _chosen(names: Sequence[str], choice: Choice) -> list[Case]:
    return [CASES[name] for name in choice.cases or names]


def _contest(optimizer: Optimizer, case: Case, subjects: Sequence[Subject], seconds: float, choice: Choice) -> list[Task]:
    large = case.elements > MANY_ELEMENTS
    names = baseline(optimizer, subjects[0].device)
    taking_part = [
        subject
        for subject in subjects
        if subject.serves(optimizer)
        and subject.obstacle is None
        and (
            subject.name in choice.subjects
            if choice.subjects
            else not large or subject.name not in SLOW_SUBJECTS or subject.name in names
        )
    ]
    packages = [subject for subject in taking_part if subject.package is not None]
    if packages and case.elements * (CONTEST_BYTES + OPTIMIZER_BYTES * len(packages)) > MEMORY_SHARE * available_bytes():
        taking_part = [subject for subject in taking_part if subject.package is None]
    if not taking_part or not _wants("steps", choice):
        return []
    where = "" if subjects[0].device == "cpu" else ", GPU"
    return [(f"{optimizer.name}, {case.title}{where}", "results", _one(measure, optimizer, case, taking_part, seconds))]


def _bfloat16(optimizer: Optimizer, case: Case, seconds: float) -> Sequence[Any]:
    return [measure(optimizer, case, [FUSED_FLOAT32, OURS_BFLOAT16], seconds, baseline_names=[FUSED_FLOAT32.name])]


def run(extent: Extent, choice: Choice, command: str, begin: Callable[[str, int, int], None]) -> dict[str, Any]:
    """Measure everything and return the record.

    Args:
        extent: how much.
        choice: what of it.
        command: that repeats the run.
        begin: is told each task, its number and their number, before it begins.
    """
    started = time.perf_counter()
    record: dict[str, Any] = {
        "command": command,
        "whole": choice.is_whole and extent is FULL,
        "machine": dataclasses.asdict(Machine.here()),
        "subjects": [{"name": s.name, "obstacle": s.obstacle, "remark": s.remark} for s in (*SUBJECTS.values(), *formats.SUBJECTS)],
        **{name: [] for name in RECORDED},
    }
    every = tasks(extent, choice)
    for number, (name, kind, work) in enumerate(every):
        begin(name, number, len(every))
        record[kind] += [dataclasses.asdict(found) for found in work()]
    record["seconds"] = time.perf_counter() - started
    return record


RECORDED = (
    *("results", "bfloat16", "formats", "format_arithmetic", "format_scaling", "format_errors", "ends"),
    *("host_costs", "gpu_host_costs", "breakdowns", "thread_starts", "launches", "scaling", "busy"),
    *("first_steps", "predictions"),
)


def read(path: Path) -> SimpleNamespace:
    """Read a record; what was a dict has attributes, and what is newer than the record is empty."""
    found: SimpleNamespace = json.loads(path.read_text(encoding="utf-8"), object_hook=lambda d: SimpleNamespace(**d))
    for name in RECORDED:
        vars(found).setdefault(name, [])
    return found
