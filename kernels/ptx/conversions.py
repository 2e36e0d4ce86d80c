"""Conversions between types, and moves."""

from __future__ import annotations

from fusedopt.kernels.ptx.parse import STORAGE, UnknownInstructionError
from fusedopt.kernels.ptx.translate import FLOATS, PACKED, Instruction, translates

_TO_WHOLE = {"rni": "rint", "rzi": "trunc", "rmi": "floor", "rpi": "ceil"}
_ROUNDINGS = ("rn", "rz", "rm", "rp", "rna", "rs")


@translates("cvt")
def convert(instruction: Instruction) -> None:
    """Translate conversions."""
    target, source = instruction.types
    instruction.refuse("relu", "rm", "rp", "rna", "rs")
    if source in FLOATS and target not in FLOATS and target not in PACKED:
        _float_to_integer(instruction, target, source)
        return
    if target not in FLOATS:
        instruction.refuse("sat")
    if target in PACKED:
        high, low = (instruction.bits(instruction.value(i, source), PACKED[target][0]) for i in (1, 2))
        instruction.refuse("rz")
        instruction.write(f"(u32){low} | ((u32){high} << 16)")
    elif target in FLOATS:
        number = instruction.value(1, source)
        whole = next((_TO_WHOLE[modifier] for modifier in instruction.modifiers if modifier in _TO_WHOLE), None)
        if whole is not None:
            number = f"{whole}((double){number})"
        if "sat" in instruction.modifiers:
            number = f"fmin(fmax({number}, 0.0), 1.0)"
        if "rz" in instruction.modifiers and target != "bf16":
            raise UnknownInstructionError("rounding towards zero")
        truncate = "_truncated" if "rz" in instruction.modifiers else ""
        instruction.write(f"to_{target}{truncate}({number})")
    else:
        # The source's value, cut to the target's type, extended by the target's sign to the register's width.
        own = target if target.startswith("s") else STORAGE[target]
        register = instruction.storage_of(instruction.operands[0])
        instruction.write(f"({register})({own}){instruction.value(1, source)}")


def _float_to_integer(instruction: Instruction, target: str, source: str) -> None:
    whole = _TO_WHOLE[instruction.modifier(*_TO_WHOLE)]
    signed, bits = target.startswith("s"), int(target[1:])
    register = instruction.storage_of(instruction.operands[0])
    function = "to_signed" if signed else "to_unsigned"
    instruction.write(f"({register}){function}({whole}((double){instruction.value(1, source)}), {bits})")


@translates("mov")
def move(instruction: Instruction) -> None:
    """Translate moves, and the packing and unpacking of registers."""
    target, source = instruction.operands
    storage = STORAGE[instruction.type]
    if target.startswith("{"):
        parts = instruction.lanes(target)
        bits = 8 * instruction.element_bytes // len(parts)
        instruction.emit(f"{{ {storage} whole = {instruction.raw(1)};")
        for place, part in enumerate(parts):
            instruction.assign(part, f"(u{bits})(whole >> {place * bits})")
        instruction.emit("}")
    elif source.startswith("{"):
        parts = instruction.lanes(source)
        bits = 8 * instruction.element_bytes // len(parts)
        each = [f"(({storage})(u{bits}){instruction.raw_operand(part, f'u{bits}')} << {i * bits})" for i, part in enumerate(parts)]
        instruction.write(" | ".join(each))
    else:
        instruction.write(instruction.raw(1))


@translates("cvta", "mapa")
def address(instruction: Instruction) -> None:
    """Translate conversions between address spaces, which are one here."""
    instruction.write(instruction.raw(1))
