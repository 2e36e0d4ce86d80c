"""PTX text into what is executed: parameters, registers, shared memory, statements with the lines they come from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

#: The unsigned C type that holds the bits of each PTX type.
STORAGE = {
    **dict.fromkeys(("pred", "b8", "u8", "s8"), "u8"),
    **dict.fromkeys(("b16", "u16", "s16", "f16", "bf16"), "u16"),
    **dict.fromkeys(("b32", "u32", "s32", "f32", "f16x2", "bf16x2"), "u32"),
    **dict.fromkeys(("b64", "u64", "s64", "f64", "f32x2"), "u64"),
    "b128": "u128",
}
BYTES = {"u8": 1, "u16": 2, "u32": 4, "u64": 8, "u128": 16}

# The names in scope, innermost first, each with the register that it stands for.
Scope = tuple[dict[str, str], ...]


class UnknownInstructionError(NotImplementedError):
    """PTX that is not translated; the message names the line."""


@dataclass(frozen=True)
class Statement:
    """One instruction or label.

    Args:
        text: without the semicolon.
        line: in the PTX.
        source_line: in the source that Triton compiled; 0 where it is not known.
        scope: what register names mean here.
        is_label: whether it is a place to go to.
    """

    text: str
    line: int
    source_line: int
    scope: Scope
    is_label: bool = False


@dataclass
class Program:
    """A kernel.

    Args:
        name: of its entry.
        parameters: (name, type) in order.
        threads: of a program, along x, y, z.
        shared: bytes of each variable in shared memory, by name; 0 where the launch decides.
        strings: names of constants that only messages are made of.
        source_file: that Triton compiled.
    """

    name: str
    parameters: list[tuple[str, str]]
    threads: tuple[int, int, int]
    shared: dict[str, int]
    strings: set[str]
    source_file: str
    #: C variable of each register, with its C type.
    registers: dict[str, str] = field(default_factory=dict)
    statements: list[Statement] = field(default_factory=list)

    @property
    def thread_count(self) -> int:
        """Threads of a program."""
        x, y, z = self.threads
        return x * y * z


def parse(ptx: str) -> Program:
    """Return the only kernel of ``ptx``.

    Raises:
        ValueError: if there is none.
        UnknownInstructionError: for a register of an unknown type.
    """
    entry = re.search(r"\.visible\s+\.entry\s+([\w$]+)\s*\((.*?)\)", ptx, re.DOTALL)
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", ptx)
    if entry is None or threads is None:
        raise ValueError("expected PTX with a `.visible .entry` and `.reqntid`, as Triton writes it, and found none")
    if ".func" in re.sub(r"\.extern \.func", "", ptx):
        raise UnknownInstructionError("a device function of its own (.func): have Triton inline it")
    files = re.findall(r'\.file\s+1\s+"([^"]+)"(?:\s+"([^"]+)")?', ptx)
    program = Program(
        name=entry.group(1),
        parameters=[_parameter(text) for text in entry.group(2).split(",") if text.strip()],
        threads=tuple(int(size or 1) for size in threads.groups()),  # type: ignore[arg-type]
        shared={
            name: int(size or 0) for name, size in re.findall(r"\.shared\s+(?:\.align\s+\d+\s+)?\.b8\s+([\w$]+)\[(\d*)\]", ptx)
        },
        strings=set(re.findall(r"\.(?:global|const)\s+(?:\.align\s+\d+\s+)?\.b8\s+([\w$]+)\[", ptx)),
        source_file="/".join(filter(None, files[0])) if files else "",
    )
    _Body(program).read(ptx, ptx.index("{", entry.end()))
    return program


def _parameter(text: str) -> tuple[str, str]:
    words = text.split()
    return words[-1], words[1].removeprefix(".") if words[1] != ".align" else words[3].removeprefix(".")


class _Body:
    """Reads the statements between the braces of a kernel."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._scopes: list[dict[str, str]] = [{}]
        self._source_line = 0

    def read(self, ptx: str, start: int) -> None:
        first = ptx.count("\n", 0, start) + 1
        for line, text in self._pieces(ptx[start + 1 :].split("\n"), first):
            if text == "{":
                self._scopes.append({})
            elif text == "}":
                self._scopes.pop()
                if not self._scopes:
                    return
            elif text.startswith(".reg"):
                self._declare(text, line)
            elif text.endswith(":"):
                self._add(text[:-1], line, is_label=True)
            elif not text.startswith((".pragma", ".param", ".loc")):
                self._add(text, line)

    def _add(self, text: str, line: int, is_label: bool = False) -> None:
        scope = tuple(reversed(self._scopes))
        self._program.statements.append(Statement(text, line, self._source_line, scope, is_label))

    def _pieces(self, lines: list[str], first: int) -> Iterator[tuple[int, str]]:
        """Yield braces, labels and statements, each with its line."""
        begun, begun_at = "", 0
        for line, text in enumerate(lines, first):
            location = re.match(r"\s*\.loc\s+\d+\s+(\d+)", text)
            if location:
                self._source_line = int(location.group(1))
                continue
            rest = text.partition("//")[0].strip()
            while rest:
                label = re.match(r"[$\w%.]+:(?!:)", rest)
                if not begun and rest[0] in "{}":
                    piece, rest = rest[0], rest[1:].strip()
                    yield line, piece
                elif not begun and label:
                    piece, rest = label.group(0), rest[label.end() :].strip()
                    yield line, piece
                else:
                    part, end, rest = rest.partition(";")
                    begun, begun_at = f"{begun} {part}".strip(), begun_at or line
                    rest = rest.strip()
                    if end:
                        if begun:
                            yield begun_at, begun
                        begun, begun_at = "", 0

    def _declare(self, text: str, line: int) -> None:
        _, kind, names = text.split(None, 2)
        storage = STORAGE.get(kind.removeprefix("."))
        if storage is None:
            raise UnknownInstructionError(f"PTX line {line}: {text} (a register of unknown type)")
        for name in names.split(","):
            many = re.fullmatch(r"([%\w$]+)<(\d+)>", name.strip())
            each = [f"{many.group(1)}{i}" for i in range(int(many.group(2)))] if many else [name.strip()]
            for register in each:
                variable = "r_" + re.sub(r"\W", "_", register.replace("%", ""))
                if variable in self._program.registers:  # the same name in another scope
                    variable += f"_{len(self._program.registers)}"
                self._program.registers[variable] = storage
                self._scopes[-1][register] = variable
