"""Loads, stores and atomics, each checked before it happens."""

from __future__ import annotations

import re

from fusedopt.kernels.ptx.parse import STORAGE, UnknownInstructionError
from fusedopt.kernels.ptx.translate import Instruction, translates

_ATOMIC = {
    "add": "{0} + {1}",
    "and": "{0} & {1}",
    "or": "{0} | {1}",
    "xor": "{0} ^ {1}",
    "min": "{0} < {1} ? {0} : {1}",
    "max": "{0} > {1} ? {0} : {1}",
}


def address_of(instruction: Instruction, index: int) -> str | None:
    """Return the address that an operand stands for; None where it is a parameter of the kernel."""
    match = re.fullmatch(r"\[\s*([%$\w.]+)\s*(?:([+-])\s*(-?\w+))?\s*\]", instruction.operands[index])
    if match is None:
        raise UnknownInstructionError(f"the address {instruction.operands[index]!r}")
    base, sign, offset = match.groups()
    if base in [name for name, _ in instruction.translation.program.parameters]:
        return None
    distance = int(offset, 0) * (-1 if sign == "-" else 1) if offset else 0
    return f"((u64)({instruction.raw_operand(base, 'u64')}) + (u64)({distance}ll))"


def _is_shared(instruction: Instruction) -> bool:
    return any(modifier.startswith("shared") for modifier in instruction.modifiers)


def _lanes(instruction: Instruction) -> int:
    return next((int(m[1:]) for m in instruction.modifiers if re.fullmatch(r"v[248]", m)), 1)


def _access(instruction: Instruction, size: int, kind: str) -> tuple[str, str]:
    """Return C that checks an access at ``address``, and the pointer to it."""
    who = f"{size}, {kind}, thread->index, thread->warp_time"
    if _is_shared(instruction):
        stored = "stored" if kind == "STORE" else "0"
        return f"may_access_shared(launch, address, {who}, {stored}, {instruction.where})", "launch->shared + address"
    return f"may_access_global(launch, address, {who}, &site, {instruction.where})", "(char *)address"


@translates("ld")
def load(instruction: Instruction) -> None:
    """Translate loads; of a parameter of the kernel they are not accesses to memory."""
    targets = instruction.lanes(instruction.operands[0])
    storage, size = STORAGE[instruction.type], instruction.element_bytes
    address = address_of(instruction, 1)
    if address is None:
        _load_parameter(instruction, targets)
        return
    count = _lanes(instruction)
    check, pointer = _access(instruction, size * count, "LOAD")
    instruction.emit(f"{{ static Site site; u64 address = {address}; {storage} loaded[{count}] = {{0}};")
    instruction.emit(f"if ({check}) memcpy(loaded, {pointer}, {size * count});")
    for i, target in enumerate(targets):
        if target != "_":
            # A signed type extends to the width of the register.
            value = instruction.number(f"loaded[{i}]", instruction.type) if instruction.type.startswith("s") else f"loaded[{i}]"
            instruction.assign(target, f"({instruction.storage_of(target)}){value}")
    instruction.emit("}")


def _load_parameter(instruction: Instruction, targets: list[str]) -> None:
    names = [name for name, _ in instruction.translation.program.parameters]
    name, _, offset = instruction.operands[1][1:-1].partition("+")
    place, start = names.index(name.strip()), int(offset or "0", 0)
    for i, target in enumerate(targets):
        at = start + i * instruction.element_bytes
        instruction.emit(f"memcpy(&{instruction.raw_operand(target)}, (char *)&launch->parameters[{place}] + {at}, ")
        instruction.emit(f"       {instruction.element_bytes});")


@translates("st")
def store(instruction: Instruction) -> None:
    """Translate stores."""
    if "param" in instruction.modifiers:
        return  # arguments of a message
    sources = instruction.lanes(instruction.operands[1])
    storage, size, count = STORAGE[instruction.type], instruction.element_bytes, _lanes(instruction)
    check, pointer = _access(instruction, size * count, "STORE")
    values = ", ".join(f"({storage}){instruction.raw_operand(source, storage)}" for source in sources)
    instruction.emit(f"{{ static Site site; u64 address = {address_of(instruction, 0)}; {storage} stored[{count}] = {{{values}}};")
    instruction.emit(f"if ({check}) memcpy({pointer}, stored, {size * count}); }}")


@translates("atom", "red")
def atomic(instruction: Instruction) -> None:
    """Translate atomics; `red` gives nothing back."""
    if _lanes(instruction) > 1:
        raise UnknownInstructionError("an atomic on a vector")
    returns = int(instruction.opcode == "atom")
    kind, storage = instruction.type, STORAGE[instruction.type]
    check, pointer = _access(instruction, instruction.element_bytes, "ATOMIC")
    operation = instruction.modifier(*_ATOMIC, "exch", "cas")
    given = instruction.raw(1 + returns)
    if operation == "exch":
        result = given
    elif operation == "cas":
        result = f"before == ({storage})({given}) ? ({storage})({instruction.raw(2 + returns)}) : before"
    elif kind in ("f16x2", "bf16x2"):
        raise UnknownInstructionError("an atomic on a pair")
    else:
        number = _ATOMIC[operation].format(instruction.number("before", kind), instruction.number(given, kind))
        result = instruction.bits(f"({number})", kind)
    address = address_of(instruction, returns)
    instruction.emit(f"{{ static Site site; u64 address = {address}; {storage} before = 0, after;")
    instruction.emit(f"if ({check}) {{ memcpy(&before, {pointer}, sizeof before); after = {result};")
    instruction.emit(f"memcpy({pointer}, &after, sizeof after); }}")
    if returns:
        instruction.write("before")
    instruction.emit("}")


@translates("prefetch", "prefetchu", "discard", "applypriority", "createpolicy", "membar", "fence", "griddepcontrol", "nanosleep")
def hint(instruction: Instruction) -> None:
    """Translate what changes no result: hints, and fences, as one thread runs at a time."""
    if instruction.opcode == "createpolicy":
        instruction.write("0")
