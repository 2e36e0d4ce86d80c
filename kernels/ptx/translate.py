"""PTX statements into C: operands and types here; what each instruction does stands in modules by kind.

A thread's registers are fields of a C struct, so that a thread can stop at a barrier and go on later: `run(launch, thread)` jumps
to where the thread stopped. The C text around the statements is in ``runtime.c`` (what instructions call) and ``schedule.c`` (who
runs when).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from importlib import resources

from fusedopt.kernels.ptx.parse import BYTES, STORAGE, Program, Statement, UnknownInstructionError

FLOATS = {"f16": "f16", "bf16": "bf16", "f32": "f32", "f64": "f64"}
#: Packed types: the type of a lane, and its bits.
PACKED = {"f16x2": ("f16", 16), "bf16x2": ("bf16", 16), "f32x2": ("f32", 32)}
#: States that the scheduler knows a thread by.
DONE, AT_BARRIER, AT_WARP = 0, 1, 2

_SPECIAL = {
    "%laneid": "(thread->index & 31)",
    "%warpid": "(thread->index >> 5)",
    "%lanemask_lt": "((1u << (thread->index & 31)) - 1)",
    "%lanemask_le": "((2u << (thread->index & 31)) - 1)",
    "%lanemask_eq": "(1u << (thread->index & 31))",
    "WARP_SZ": "32",
}

Handler = Callable[["Instruction"], None]
_HANDLERS: dict[str, Handler] = {}


def translates(*opcodes: str) -> Callable[[Handler], Handler]:
    """Register the decorated function as what translates ``opcodes``."""

    def register(handler: Handler) -> Handler:
        _HANDLERS.update(dict.fromkeys(opcodes, handler))
        return handler

    return register


class Translation:
    """The C of one kernel while it is written.

    Args:
        program: the kernel.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.lines: list[str] = []
        self._stops = 0

    def emit(self, line: str) -> None:
        """Add a line of C."""
        self.lines.append(f"  {line}")

    def stop(self, state: int) -> None:
        """Have the thread stop here, and be started again when what it waits for has happened."""
        self._stops += 1
        self.emit(f"thread->resume = {self._stops}; return {state}; S{self._stops}: ;")

    def text(self) -> str:
        """Return the whole C file."""
        for statement in self.program.statements:
            if statement.is_label:
                self.lines.append(f"{label(statement.text)}: ;")
            else:
                self._statement(statement)
        files = resources.files(__package__)
        fields = "\n".join(f"  {kind} {name};" for name, kind in self.program.registers.items())
        resume = "\n".join(f"    case {i}: goto S{i};" for i in range(1, self._stops + 1))
        x, y, z = self.program.threads
        return "\n".join(
            [
                f"enum {{ SIZE_X = {x}, SIZE_Y = {y}, SIZE_Z = {z}, THREADS = {self.program.thread_count} }};",
                (files / "runtime.c").read_text(encoding="utf-8"),
                f"struct Thread {{\n  STATE_OF_A_THREAD\n{fields}\n}};",
                "static int run(Launch *launch, Thread *thread) {",
                f"  switch (thread->resume) {{\n    case 0: break;\n{resume}\n  }}",
                *self.lines,
                "  return DONE;\n}",
                (files / "schedule.c").read_text(encoding="utf-8"),
            ]
        )

    def _statement(self, statement: Statement) -> None:
        guard = re.match(r"@(!?)([%\w$]+)\s+(.*)$", statement.text, re.DOTALL)
        text = guard.group(3) if guard else statement.text
        instruction = Instruction(self, statement, text)
        handler = _HANDLERS.get(instruction.opcode)
        try:
            if handler is None:
                raise UnknownInstructionError("an unknown instruction")
            if guard:
                self.emit(f"if ({guard.group(1)}{instruction.raw_operand(guard.group(2))}) {{")
            handler(instruction)
            if guard:
                self.emit("}")
        except (UnknownInstructionError, LookupError, StopIteration, ValueError) as error:
            reason = str(error) if isinstance(error, UnknownInstructionError) else f"a form that is not translated: {error!r}"
            raise UnknownInstructionError(f"PTX line {statement.line}: {statement.text}   ({reason})") from error


def label(name: str) -> str:
    """Return the C label for a label of PTX."""
    return "L_" + re.sub(r"\W", "_", name)


def split(text: str) -> list[str]:
    """Split operands at the commas outside of brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


class Instruction:
    """One instruction, and the C of its operands.

    Args:
        translation: that it is part of.
        statement: that it stands in.
        text: without its guard.
    """

    def __init__(self, translation: Translation, statement: Statement, text: str) -> None:
        self.translation, self.statement, self.text = translation, statement, text
        name, _, operands = text.partition(" ") if " " in text else text.partition("\t")
        self.opcode, *self.modifiers = name.strip().split(".")
        self.operands = split(operands)
        #: Types in the order of the name; the last is the instruction's own, where there is one.
        self.types = [modifier for modifier in self.modifiers if modifier in STORAGE]
        self.flushes = "ftz" in self.modifiers

    @property
    def type(self) -> str:
        """The type that the operation has."""
        return self.types[-1]

    @property
    def where(self) -> str:
        """Lines in the PTX and the source, as arguments of C functions that report."""
        return f"{self.statement.line}, {self.statement.source_line}"

    def emit(self, line: str) -> None:
        """Add a line of C."""
        self.translation.emit(line)

    def modifier(self, *names: str) -> str:
        """Return the one of ``names`` that the instruction has; raise StopIteration if it has none."""
        return next(modifier for modifier in self.modifiers if modifier in names)

    def refuse(self, *modifiers: str) -> None:
        """Raise if the instruction has one of ``modifiers``, which are not translated."""
        for modifier in modifiers:
            if modifier in self.modifiers:
                raise UnknownInstructionError(f"the modifier .{modifier} is not translated")

    # --- operands ------------------------------------------------------------------------------------------------------------

    def register(self, name: str) -> str | None:
        """Return the C variable of a register, or None if ``name`` is none."""
        return next((scope[name] for scope in self.statement.scope if name in scope), None)

    def raw_operand(self, text: str, storage: str = "u32") -> str:
        """Return the bits of an operand as a C expression."""
        text = text.strip()
        if text.startswith("!"):
            return f"(!{self.raw_operand(text[1:], storage)})"
        variable = self.register(text)
        if variable is not None:
            return f"thread->{variable}"
        if text in _SPECIAL:
            return _SPECIAL[text]
        special = re.fullmatch(r"%(tid|ntid|ctaid|nctaid)\.([xyz])", text)
        if special:
            axis = "xyz".index(special.group(2))
            return {
                "tid": f"thread->place[{axis}]",
                "ntid": ("SIZE_X", "SIZE_Y", "SIZE_Z")[axis],
                "ctaid": f"launch->program_at[{axis}]",
                "nctaid": f"launch->grid[{axis}]",
            }[special.group(1)]
        if re.fullmatch(r"0[fF][0-9A-Fa-f]{8}", text):
            return f"0x{text[2:]}u"
        if re.fullmatch(r"0[dD][0-9A-Fa-f]{16}", text):
            return f"0x{text[2:]}ull"
        if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)U?", text):
            number = int(text.rstrip("U"), 0)
            return f"(({storage}){number & (2**64 - 1):#x}ull)"
        program = self.translation.program
        if text in program.shared:
            names = list(program.shared)
            return f"((u64){sum(program.shared[name] for name in names[: names.index(text)])})"
        if text in program.strings:
            return "0"  # the text of a message, which nothing reads
        raise UnknownInstructionError(f"the operand {text!r} is unknown")

    def raw(self, index: int, kind: str | None = None) -> str:
        """Return the bits of an operand, by default of the instruction's type."""
        return self.raw_operand(self.operands[index], STORAGE[kind or self.type])

    def value(self, index: int, kind: str | None = None) -> str:
        """Return the number that an operand stands for, by default in the instruction's type."""
        return self.number(self.raw(index, kind), kind or self.type)

    def number(self, bits: str, kind: str) -> str:
        """Return the number of type ``kind`` that ``bits`` stand for, as a C expression."""
        if kind in FLOATS:
            number = f"from_{kind}({bits})"
            return f"flush({number})" if self.flushes and kind == "f32" else number
        if kind.startswith("s"):
            return f"(({kind})({bits}))"
        return f"(({STORAGE[kind]})({bits}))"

    def bits(self, number: str, kind: str) -> str:
        """Return the bits that stand for ``number`` in type ``kind``, as a C expression."""
        if kind in FLOATS:
            return f"to_{kind}(flush({number}))" if self.flushes and kind == "f32" else f"to_{kind}({number})"
        return f"(({STORAGE[kind]})({number}))"

    def write(self, bits: str, index: int = 0) -> None:
        """Assign ``bits`` to an operand."""
        self.assign(self.operands[index], bits)

    def assign(self, text: str, bits: str) -> None:
        """Assign ``bits`` to a register; nothing to ``_``."""
        if text.strip() != "_":
            self.emit(f"{self.raw_operand(text)} = {bits};")

    def storage_of(self, text: str) -> str:
        """Return the C type of a register."""
        variable = self.register(text.strip())
        if variable is None:
            raise UnknownInstructionError(f"the operand {text!r} is no register")
        return self.translation.program.registers[variable]

    def lanes(self, text: str) -> list[str]:
        """Return the parts of a vector operand ``{a, b}``, or the operand alone."""
        return split(text.strip()[1:-1]) if text.strip().startswith("{") else [text]

    @functools.cached_property
    def element_bytes(self) -> int:
        """Bytes of the instruction's type."""
        return BYTES[STORAGE[self.type]]


def translate(program: Program) -> str:
    """Return a C file that executes ``program``.

    Raises:
        UnknownInstructionError: for what is not translated, naming the line of the PTX.
    """
    # Registered on import, and so imported where it is needed: they import this module.
    from fusedopt.kernels.ptx import conversions, floats, integers, memory, warps  # noqa: F401

    return Translation(program).text()
