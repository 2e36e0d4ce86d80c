"""Arithmetic on integers and bits."""

from __future__ import annotations

from fusedopt.kernels.ptx.parse import STORAGE, UnknownInstructionError
from fusedopt.kernels.ptx.translate import Instruction, translates

_WIDER = {"u16": "32", "u32": "64", "u64": "128"}
_BITWISE = {"and": "&", "or": "|", "xor": "^"}


def integer(instruction: Instruction) -> None:
    """Translate arithmetic on integers; called for the names that floats have as well."""
    instruction.refuse("sat", "cc")
    opcode, kind = instruction.opcode, instruction.type
    storage = STORAGE[kind]
    if opcode in ("add", "sub"):
        sign = {"add": "+", "sub": "-"}[opcode]
        instruction.write(f"({storage})(({storage})({instruction.raw(1)}) {sign} ({storage})({instruction.raw(2)}))")
    elif opcode in ("mul", "mad"):
        _product(instruction)
    elif opcode in ("min", "max"):
        a, b = instruction.value(1), instruction.value(2)
        instruction.write(f"({storage})({a} {'<' if opcode == 'min' else '>'} {b} ? {a} : {b})")
    elif opcode == "neg":
        instruction.write(f"({storage})-({storage})({instruction.raw(1)})")
    elif opcode == "abs":
        instruction.write(f"({storage})({instruction.value(1)} < 0 ? -({storage})({instruction.raw(1)}) : {instruction.raw(1)})")
    elif opcode == "div":
        _quotient(instruction, "/")
    else:
        raise UnknownInstructionError(f"{opcode} on {kind}")


def _product(instruction: Instruction) -> None:
    kind, storage = instruction.type, STORAGE[instruction.type]
    bits, wider = 8 * instruction.element_bytes, _WIDER[STORAGE[instruction.type]]
    product = f"(({kind[0]}{wider}){instruction.value(1)} * ({kind[0]}{wider}){instruction.value(2)})"
    if "wide" in instruction.modifiers:
        storage, product = f"u{wider}", f"((u{wider}){product})"
    elif "hi" in instruction.modifiers:
        product = f"(({storage})({product} >> {bits}))"
    else:
        instruction.modifier("lo")
        # In the unsigned type, where an overflow is defined.
        unsigned = "u32" if storage == "u16" else storage
        product = f"(({storage})(({unsigned})({instruction.raw(1)}) * ({unsigned})({instruction.raw(2)})))"
    if instruction.opcode == "mad":
        product = f"{product} + ({storage})({instruction.raw_operand(instruction.operands[3], storage)})"
    instruction.write(f"({storage})({product})")


def _quotient(instruction: Instruction, sign: str) -> None:
    storage = STORAGE[instruction.type]
    a, b = instruction.value(1), instruction.value(2)
    # By zero a GPU gives all ones, and C a trap; the quotient of the least number and -1 traps as well.
    by_minus_one = f"-({storage})({instruction.raw(1)})" if sign == "/" else "0"
    special = f"{b} == -1 ? ({storage})({by_minus_one}) : " if instruction.type.startswith("s") else ""
    instruction.write(f"{b} == 0 ? ({storage})-1 : {special}({storage})({a} {sign} {b})")


@translates("rem")
def remainder(instruction: Instruction) -> None:
    """Translate remainders."""
    _quotient(instruction, "%")


@translates(*_BITWISE)
def bitwise(instruction: Instruction) -> None:
    """Translate and, or, xor."""
    instruction.write(f"({instruction.raw(1)}) {_BITWISE[instruction.opcode]} ({instruction.raw(2)})")


@translates("not")
def complement(instruction: Instruction) -> None:
    """Translate the complement."""
    instruction.write(f"{'!' if instruction.type == 'pred' else '~'}({instruction.raw(1)})")


@translates("shl", "shr")
def shift(instruction: Instruction) -> None:
    """Translate shifts; by the width or more everything is shifted out."""
    storage, bits = STORAGE[instruction.type], 8 * instruction.element_bytes
    distance = instruction.raw_operand(instruction.operands[2], "u32")
    if instruction.opcode == "shl":
        result = f"distance >= {bits} ? 0 : (({storage})({instruction.raw(1)}) << distance)"
    elif instruction.type.startswith("s"):
        result = f"({storage})({instruction.value(1)} >> (distance >= {bits} ? {bits - 1} : distance))"
    else:
        result = f"distance >= {bits} ? 0 : (({storage})({instruction.raw(1)}) >> distance)"
    instruction.emit(f"{{ u32 distance = {distance};")
    instruction.write(result)
    instruction.emit("}")


@translates("shf")
def funnel_shift(instruction: Instruction) -> None:
    """Translate shifts of a pair of registers."""
    left = instruction.modifier("l", "r") == "l"
    limit = "distance > 32 ? 32 : distance" if instruction.modifier("clamp", "wrap") == "clamp" else "distance & 31"
    instruction.emit(f"{{ u32 distance = {instruction.raw(3)}; distance = {limit};")
    instruction.emit(f"u64 pair = ((u64)({instruction.raw(2)}) << 32) | (u32)({instruction.raw(1)});")
    instruction.write("(u32)((pair << distance) >> 32)" if left else "(u32)(pair >> distance)")
    instruction.emit("}")


@translates("lop3")
def any_of_three(instruction: Instruction) -> None:
    """Translate any function of three bits, given by its table."""
    a, b, c, table = (instruction.raw(i) for i in range(1, 5))
    instruction.write(f"three_way({a}, {b}, {c}, {table})")


@translates("prmt")
def permute(instruction: Instruction) -> None:
    """Translate the choice of four bytes from eight."""
    if len(instruction.modifiers) > 1:
        raise UnknownInstructionError("a mode of prmt")
    instruction.write(f"permute({instruction.raw(1)}, {instruction.raw(2)}, {instruction.raw(3)})")


@translates("bfe")
def extract(instruction: Instruction) -> None:
    """Translate the extraction of a field of bits, extended by its sign or by zeros."""
    bits = 8 * instruction.element_bytes
    at, length = (instruction.raw_operand(instruction.operands[i]) for i in (2, 3))
    signed = int(instruction.type.startswith("s"))
    instruction.write(f"extract_bits({instruction.raw(1)}, {at}, {length}, {bits}, {signed})")


@translates("bfi")
def insert(instruction: Instruction) -> None:
    """Translate the insertion of a field of bits."""
    bits = 8 * instruction.element_bytes
    at, length = (instruction.raw_operand(instruction.operands[i]) for i in (3, 4))
    instruction.write(f"insert_bits({instruction.raw(1)}, {instruction.raw(2)}, {at}, {length}, {bits})")


@translates("popc", "clz", "brev")
def count(instruction: Instruction) -> None:
    """Translate counts of bits, and their reversal."""
    bits, raw = 8 * instruction.element_bytes, instruction.raw(1)
    instruction.write(
        {
            "popc": f"__builtin_popcountll((u64)({raw}))",
            "clz": f"({raw}) ? __builtin_clzll((u64)({raw})) - {64 - bits} : {bits}",
            "brev": f"reverse_bits({raw}, {bits})",
        }[instruction.opcode]
    )
