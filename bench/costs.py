"""What a step costs apart from its kernel: the host's time by number of tensors, its parts, and the start of threads."""

from __future__ import annotations

import cProfile
import functools
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from .cases import Case, Optimizer
from .compiled import in_child
from .measure import Entrant, Spread, interleaved
from .subjects import FOREACH, FUSED, LOOP, ON_GPU, OURS, Subject

HOST_TENSORS = (10, 100, 1_000, 10_000)
#: More elements than the calling thread keeps to itself, few enough for the caches.
THREADED_CASE = Case.equal(1, 262_144)
#: What is measured with a driver that launches nothing: with coefficients from the host, and from the device.
UNLAUNCHED, UNLAUNCHED_CAPTURABLE = "fusedopt, nothing launched", "fusedopt, capturable, nothing launched"
#: Threads of torch and ours are asleep after this long.
PAUSE_SECONDS = 0.02


#: What functions without a docstring do, by the end of their names.
PURPOSES = {
    "FusedOptimizer._step.<listcomp>": "List all parameters",
    "tensor_objects.unchanged": "Check at once that no tensor has changed in kind or place, and read the addresses of gradients",
    "tensor_objects.count_versions": "Tell autograd that parameters and states are written",
}


@dataclass
class HostCost:
    """Microseconds of a step on tensors of one element, with gradients as they were, and newly allocated."""

    subject: str
    tensors: int
    same: Spread
    moved: Spread


@dataclass
class Part:
    """A function of the host, without what it calls: microseconds of a step."""

    function: str
    purpose: str
    microseconds: float


@dataclass
class Breakdown:
    """The parts of a step, measured by Python's profiler; and the step without it."""

    title: str
    microseconds: float
    profiled_microseconds: float
    parts: list[Part]


@dataclass
class ThreadStart:
    """Microseconds by which a step on all threads is longer than its work divided among them.

    `back_to_back`: one step after the other; `after_pause`: after a pause in which threads fall asleep.
    """

    subject: str
    threads: int
    back_to_back: Spread
    after_pause: Spread


def host_costs(
    optimizer: Optimizer, seconds: float, numbers: Sequence[int] = HOST_TENSORS, subjects: Sequence[Subject] = (FUSED, OURS)
) -> list[HostCost]:
    """Measure the host's part of steps; on a CPU it does the kernel's work as well."""
    found = []
    for number in numbers:
        entrants = {subject.name: _entrant(subject, optimizer, Case.equal(number, 1)) for subject in subjects}
        both = []
        for moved in (False, True):
            turns = {
                name: functools.partial(entrant.take_after, prepare=entrant.move_gradients if moved else None, host_alone=True)
                for name, entrant in entrants.items()
            }
            both.append(interleaved(turns, turns, seconds))
        found += [HostCost(name, number, *(_microseconds(times[name]) for times in both)) for name in entrants]
    return found


def gpu_host_costs(optimizer: Optimizer, seconds: float, numbers: Sequence[int] = HOST_TENSORS) -> list[HostCost]:
    """Measure the host's part of our steps on a GPU: by a driver that launches nothing, and on the GPU where there is one."""
    found = in_child(_unlaunched_host_costs, optimizer, seconds, numbers)
    on_gpu = [subject for subject in ON_GPU if subject.package is None and subject.obstacle is None and subject.serves(optimizer)]
    return found + (host_costs(optimizer, seconds, numbers, on_gpu) if on_gpu else [])


def _unlaunched_host_costs(optimizer: Optimizer, seconds: float, numbers: Sequence[int]) -> list[HostCost]:
    from fusedopt.kernels import backends
    from fusedopt.kernels.ptx.driver import driver

    capturable = replace(OURS, name=UNLAUNCHED_CAPTURABLE, build=_capturable)
    # The tables stay on the host: what remains is everything but the calls of CUDA.
    with driver("sm_90", execute=False), backends.use("triton"):
        return host_costs(optimizer, seconds, numbers, (replace(OURS, name=UNLAUNCHED), capturable))


def _capturable(optimizer: Optimizer, parameters: Sequence[Tensor]) -> Any:
    return OURS.build(replace(optimizer, arguments={**optimizer.arguments, "capturable": True}), parameters)


def breakdown(optimizer: Optimizer, case: Case, moved: bool, seconds: float) -> Breakdown:
    """Profile our steps: functions of Python alone, each with the compiled code that it calls."""
    entrant = _entrant(OURS, optimizer, case)
    prepare = entrant.move_gradients if moved else lambda: None
    plain = entrant.take_after(seconds, prepare)
    profile, steps, ended = cProfile.Profile(builtins=False), 0, time.perf_counter() + seconds
    while steps == 0 or time.perf_counter() < ended:
        prepare()
        profile.enable()
        entrant.step()
        profile.disable()
        steps += 1
    entries = [entry for entry in profile.getstats() if not isinstance(entry.code, str)]
    parts = [Part(*_described(entry.code), 1e6 * entry.inlinetime / steps) for entry in entries]
    total = sum(part.microseconds for part in parts)
    title = f"{case.title}, gradients {'newly allocated' if moved else 'as they were'}"
    return Breakdown(title, 1e6 * plain, total, parts)


def thread_starts(optimizer: Optimizer, seconds: float) -> list[ThreadStart]:
    """Measure what starting threads, and waiting for them, adds to a step."""
    threads = torch.get_num_threads()
    found = []
    for subject in (FUSED, OURS):
        one, large = _entrant(subject, optimizer, Case.equal(1, 1)), _entrant(subject, optimizer, THREADED_CASE)

        def on(count: int, entrant: Entrant, prepare: Callable[[], None] | None, turn_seconds: float) -> float:
            with threads_set(count):
                return entrant.take_after(turn_seconds, prepare)

        spreads = []
        for prepare in (None, functools.partial(time.sleep, PAUSE_SECONDS)):
            turns = {
                "host": functools.partial(on, threads, one, prepare),
                "one thread": functools.partial(on, 1, large, prepare),
                "all threads": functools.partial(on, threads, large, prepare),
            }
            times = interleaved(turns, turns, seconds)
            rounds = zip(times["host"], times["one thread"], times["all threads"], strict=True)
            spreads.append(_microseconds([every - host - (alone - host) / threads for host, alone, every in rounds]))
        found.append(ThreadStart(subject.name, threads, *spreads))
    return found


@contextmanager
def threads_set(count: int) -> Iterator[None]:
    """Let torch, and so fusedopt, use `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class Launches:
    """What is known of a step on a GPU without one, from the same step on the CPU.

    Args:
        buckets: launches of our kernel.
        loop_operations: operations of torch that its for-loop calls, each a launch or more.
        foreach_operations: those that its lists of tensors take, each a launch for some dozens of tensors.
        fused_operations: those of its fused implementation, each a launch for some dozens of tensors.
        profiled: kernels of a step that the profiler counts, by subject; empty without a GPU.
    """

    optimizer: str
    case: str
    tensors: int
    bytes_per_element: int
    buckets: int
    loop_operations: int
    foreach_operations: int
    fused_operations: int | None
    profiled: dict[str, int]


def launches(optimizer: Optimizer, case: Case) -> Launches:
    """Count on tensors of one element, as many as `case` has."""
    small = Case(case.name, case.title, case.tensors * ((1,),))
    operations = {}
    for subject in (LOOP, FOREACH, FUSED):
        if subject.serves(optimizer):
            entrant = _entrant(subject, optimizer, small)
            with _Operations() as counted:
                entrant.step()
            operations[subject] = counted.number
    ours = _entrant(OURS, optimizer, small)
    itemsizes = ours.itemsizes()
    return Launches(
        optimizer.name,
        case.title,
        case.tensors,
        2 * sum(itemsizes) - itemsizes[1],
        len(ours.kinds()),
        operations[LOOP],
        operations[FOREACH],
        operations.get(FUSED),
        {
            subject.name: count_kernels(_entrant(subject, optimizer, small).step)
            for subject in ON_GPU
            if subject.package is None and subject.obstacle is None and subject.serves(optimizer)
        },
    )


def count_kernels(work: Callable[[], None]) -> int:
    """Count the kernels that `work` launches on the GPU, copies apart."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        work()
        torch.cuda.synchronize()
    # The profiler repeats on the GPU's side what the host has annotated, as torch does each optimizer's step.
    on_gpu = [event for event in found.events() or [] if event.device_type.name == "CUDA" and not event.is_user_annotation]
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in on_gpu)


class _Operations(TorchDispatchMode):
    """Counts the operations of torch on tensors of more than zero dimensions; the others stay on the host."""

    number = 0

    def __torch_dispatch__(self, operation: Any, kinds: Any, arguments: Any = (), options: Any = None) -> Any:
        first = arguments[0] if arguments else None
        tensor = first[0] if isinstance(first, (list, tuple)) and first else first
        # Views launch nothing.
        if isinstance(tensor, torch.Tensor) and tensor.dim() > 0 and not operation.is_view:
            self.number += 1
        return operation(*arguments, **(options or {}))


def _entrant(subject: Subject, optimizer: Optimizer, case: Case) -> Entrant:
    entrant = Entrant(subject, optimizer, case)
    for seed in (1, 2, 3):  # plans settle
        entrant.step_with_gradients(seed)
    return entrant


def _microseconds(seconds: Sequence[float]) -> Spread:
    return Spread.of([1e6 * each for each in seconds])


def _described(code: Any) -> tuple[str, str]:
    """Return the name of a function by its code, and the first sentence of its docstring."""
    known = next((m for m in list(sys.modules.values()) if getattr(m, "__file__", None) == code.co_filename), None)
    module = known.__name__ if known else Path(code.co_filename).stem  # the path itself would name the machine
    # Generated modules are called after the hash of their text.
    module = re.sub(r"^fusedopt_generated_(\w+)_[0-9a-f]{16}$", r"generated \1", module)
    name = f"{module}.{code.co_qualname}".replace(".<locals>", "")
    for end, purpose in PURPOSES.items():
        if name.endswith(end):
            return name, purpose
    try:
        documented = functools.reduce(getattr, code.co_qualname.split("."), known).__doc__
    except AttributeError:
        documented = None
    purpose = (documented or "").strip().partition("\n")[0].replace("``", "`")
    return name, purpose.rstrip(".:,;")
