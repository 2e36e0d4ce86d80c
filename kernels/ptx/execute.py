"""A translated kernel, compiled by the machine's C compiler, and its launches."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy

from fusedopt.kernels import source
from fusedopt.kernels.ptx.parse import parse
from fusedopt.kernels.ptx.translate import translate

#: In which order programs run, and the threads of each.
Order = Literal["forward", "reversed", "shuffled"]
#: What approximate instructions give: the correctly rounded result, or one that is off by the documented bound.
Errors = Literal["none", "random", "up", "down"]
_ORDERS: tuple[Order, ...] = ("forward", "reversed", "shuffled")
_ERRORS: tuple[Errors, ...] = ("none", "random", "up", "down")

# No contraction: the code does what the PTX says. With -Og a kernel compiles in 0.2 seconds where -O1 takes 0.5.
_FLAGS = ("-Og", "-std=gnu11", "-ffp-contract=off", "-fno-math-errno", "-fno-strict-aliasing", "-fPIC", "-shared", "-w")

_FAULTS = {
    1: "out of bounds",
    2: "misaligned",
    3: "race with an earlier write",
    4: "race with an earlier read",
    5: "deadlock: threads wait at barriers that others do not reach",
    6: "trap, or an assertion that failed",
}


class PtxError(RuntimeError):
    """An access or a wait that a GPU would fail on; names the lines."""


@dataclass(frozen=True)
class Settings:
    """How launches are executed.

    Args:
        races: whether races are looked for; without, it is some ten times faster.
        order: of programs, and of the threads of each.
        errors: what approximate instructions give.
        seed: of random errors.
    """

    races: bool = True
    order: Order = "forward"
    errors: Errors = "none"
    seed: int = 1


@dataclass
class Counts:
    """What launches moved: an access that all threads of a program make to one address counts once.

    Args:
        launches: of kernels.
        loads: of global memory.
        stores: to global memory.
        bytes_loaded: from global memory.
        bytes_stored: to global memory.
        shared_bytes: to and from shared memory.
    """

    launches: int = 0
    loads: int = 0
    stores: int = 0
    bytes_loaded: int = 0
    bytes_stored: int = 0
    shared_bytes: int = 0

    def add(self, other: Counts) -> None:
        """Add the numbers of ``other``."""
        for name in vars(self):
            setattr(self, name, getattr(self, name) + getattr(other, name))


class _Fault(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("kind", "line", "source_line", "thread")),
        ("program", ctypes.c_uint64),
        ("address", ctypes.c_uint64),
        ("size", ctypes.c_int32),
        ("other", ctypes.c_int32),
    )


class _Options(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("races", "order", "errors")),
        ("grid", ctypes.c_uint32 * 3),
        *((name, ctypes.c_uint64) for name in ("shared_size", "seed", "allocation_count")),
    )


def compiler() -> str | None:
    """Return the path of the C compiler: ``CC``, else gcc, clang or cc; or None."""
    wanted = os.environ.get("CC")
    return shutil.which(wanted) if wanted else next(filter(None, map(shutil.which, ("gcc", "clang", "cc"))), None)


def obstacle() -> str | None:
    """Return why PTX cannot be executed here, or None."""
    if compiler() is None:
        return "a C compiler is needed to execute PTX, and none was found: install gcc, or set CC"
    return None


@dataclass
class Kernel:
    """A kernel that can be launched on the CPU.

    Args:
        ptx: its text, as Triton wrote it.

    Raises:
        UnknownInstructionError: for PTX that is not translated.
        RuntimeError: if there is no C compiler.
    """

    ptx: str
    #: Of the last launch.
    counts: Counts = field(default_factory=Counts, init=False)

    def __post_init__(self) -> None:
        self.program = parse(self.ptx)
        self._library = ctypes.CDLL(str(_compiled(translate(self.program))))

    def launch(
        self,
        grid: Sequence[int],
        arguments: Sequence[float],
        memory: Iterable[tuple[int, int]],
        shared: int = 0,
        settings: Settings | None = None,
    ) -> Counts:
        """Run all programs of ``grid``, and return what they moved.

        Args:
            grid: programs along x, y, z.
            arguments: of the kernel, in order; addresses for pointers.
            memory: (start, end) of the ranges that may be accessed; nothing else is.
            shared: bytes of shared memory that the launch adds.
            settings: how to execute.

        Raises:
            PtxError: for bad accesses, races, deadlocks and failed assertions; bad accesses have not been made.
        """
        settings = settings or Settings()
        ranges = numpy.array(_merged(memory), numpy.uint64).reshape(-1, 2)
        options = _Options(
            settings.races,
            _ORDERS.index(settings.order),
            _ERRORS.index(settings.errors),
            (ctypes.c_uint32 * 3)(*grid, *[1] * (3 - len(grid))),
            shared + sum(self.program.shared.values()),
            settings.seed,
            len(ranges),
        )
        parameters = (ctypes.c_uint64 * max(1, len(self.program.parameters)))(*self._packed(arguments))
        faults, total, counts = (_Fault * 64)(), ctypes.c_uint64(), (ctypes.c_uint64 * 5)()
        found = self._library.launch(
            parameters,
            ctypes.byref(options),
            ranges.ctypes.data_as(ctypes.c_void_p),
            faults,
            ctypes.byref(total),
            counts,
        )
        if found:
            lines = [self._described(fault) for fault in faults[:found]]
            raise PtxError(f"{self.program.name} of {self.program.source_file}: {total.value} faults\n  " + "\n  ".join(lines))
        self.counts = Counts(1, *counts)
        return self.counts

    def _packed(self, arguments: Sequence[float]) -> list[int]:
        parameters = self.program.parameters
        if len(arguments) > len(parameters):
            raise ValueError(f"{self.program.name} takes {len(parameters)} arguments, and {len(arguments)} are given")
        packed = []
        for (_, kind), argument in zip(parameters, [*arguments, *[0] * (len(parameters) - len(arguments))], strict=True):
            if kind == "f32":
                packed.append(struct.unpack("<I", struct.pack("<f", argument))[0])
            elif kind == "f64":
                packed.append(struct.unpack("<Q", struct.pack("<d", argument))[0])
            else:
                packed.append(int(argument) & (2**64 - 1))
        return packed

    @staticmethod
    def _described(fault: _Fault) -> str:
        what = _FAULTS[fault.kind]
        if fault.kind in (3, 4):
            what += f" by thread {fault.other}"
        if fault.size:
            what += f": {fault.size} bytes at {fault.address:#x}"
        where = f", PTX line {fault.line}, source line {fault.source_line}" if fault.line else ""
        return f"{what}, by thread {fault.thread} of program {fault.program}{where}"


def _merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return ``ranges`` sorted, those that overlap as one; neighbours stay apart."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(set(ranges)):
        if merged and start < merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        elif end > start:
            merged.append((start, end))
    return merged


@functools.cache
def _compiler_version(path: str) -> str:
    return subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout


def _compiled(code: str) -> Path:
    """Return the shared library of ``code``, from the cache where it is there."""
    path = compiler()
    if path is None:
        raise RuntimeError(obstacle())
    key = hashlib.sha256("\n".join([code, _compiler_version(path), *_FLAGS]).encode()).hexdigest()[:24]
    library = source.cache_directory() / f"ptx_{key}.so"
    if library.exists():
        return library
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        file = Path(folder) / "kernel.c"
        file.write_text(code, encoding="utf-8")
        made = file.with_suffix(".so")
        done = subprocess.run([path, *_FLAGS, str(file), "-o", str(made), "-lm"], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{path} could not compile what was translated from PTX:\n{done.stderr[:3000]}")
        made.replace(library)
    return library
