"""Branches, barriers, and what the threads of a warp do together."""

from __future__ import annotations

from fusedopt.kernels.ptx.memory import address_of
from fusedopt.kernels.ptx.parse import UnknownInstructionError
from fusedopt.kernels.ptx.translate import AT_BARRIER, AT_WARP, Instruction, label, translates

_REDUCTIONS = {"add": "ADD", "and": "AND", "or": "OR", "xor": "XOR"}


def _together(instruction: Instruction, operation: str, *operands: tuple[str, str]) -> None:
    """Wait for the other threads of the warp; what they computed together is then in ``thread->result``."""
    for name, value in operands:
        instruction.emit(f"thread->{name} = {value};")
    instruction.emit(f"thread->operation = {operation};")
    instruction.translation.stop(AT_WARP)


@translates("ret", "exit")
def leave(instruction: Instruction) -> None:
    """Translate the end of a thread."""
    instruction.emit("return DONE;")


@translates("bra")
def branch(instruction: Instruction) -> None:
    """Translate jumps."""
    instruction.emit(f"goto {label(instruction.operands[0])};")


@translates("trap")
def trap(instruction: Instruction) -> None:
    """Translate the end of everything."""
    instruction.emit(f"report(launch, TRAP, {instruction.where}, thread->index, 0, 0, 0); launch->failed = 1; return DONE;")


@translates("call")
def call(instruction: Instruction) -> None:
    """Translate calls of what Triton calls: an assertion that has failed, and messages, which are left out."""
    if "__assertfail" in instruction.text:
        trap(instruction)
    elif "vprintf" not in instruction.text:
        raise UnknownInstructionError("a call")


@translates("bar", "barrier")
def barrier(instruction: Instruction) -> None:
    """Translate barriers of a warp and of a program."""
    if "warp" in instruction.modifiers:
        _together(instruction, "WAIT")
        return
    instruction.refuse("red", "arrive")
    if instruction.operands[:1] not in (["0"], []) or len(instruction.operands) > 1:
        raise UnknownInstructionError("a barrier of some threads only")
    instruction.translation.stop(AT_BARRIER)


@translates("shfl")
def shuffle(instruction: Instruction) -> None:
    """Translate the exchange of registers in a warp."""
    operation = "SHUFFLE_" + instruction.modifier("bfly", "idx", "up", "down").upper()
    target, *found = instruction.operands[0].split("|")
    _together(instruction, operation, *zip(("given", "lane", "segment"), map(instruction.raw, (1, 2, 3)), strict=True))
    instruction.assign(target, "thread->result")
    if found:
        instruction.assign(found[0], "thread->in_range")


@translates("vote")
def vote(instruction: Instruction) -> None:
    """Translate votes."""
    operation = "VOTE_" + instruction.modifier("ballot", "all", "any").upper()
    _together(instruction, operation, ("given", instruction.raw(1, "pred")))
    instruction.write("thread->result")


@translates("redux")
def reduce(instruction: Instruction) -> None:
    """Translate reductions over a warp."""
    instruction.refuse("abs", "NaN")
    operation = instruction.modifier(*_REDUCTIONS, "min", "max")
    if operation in _REDUCTIONS:
        name = _REDUCTIONS[operation]
    else:
        name = f"{operation.upper()}_{ {'u32': 'UNSIGNED', 's32': 'SIGNED', 'f32': 'FLOAT'}[instruction.type] }"
    _together(instruction, f"REDUCE_{name}", ("given", instruction.raw(1)))
    instruction.write("thread->result")


@translates("ldmatrix", "stmatrix")
def matrices(instruction: Instruction) -> None:
    """Translate the exchange of small matrices between registers and shared memory."""
    instruction.modifier("m8n8")
    instruction.modifier("b16")
    count = int(instruction.modifier("x1", "x2", "x4")[1:])
    stores = instruction.opcode == "stmatrix"
    registers = instruction.lanes(instruction.operands[1 if stores else 0])
    if stores:
        for place, register in enumerate(registers):
            instruction.emit(f"thread->matrix[{place}] = {instruction.raw_operand(register)};")
    line, source_line = instruction.where.split(", ")
    address = address_of(instruction, 0 if stores else 1)
    _together(
        instruction,
        "STORE_MATRIX" if stores else "LOAD_MATRIX",
        ("given", f"(u32){address}"),
        ("lane", str(count)),
        ("segment", str(int("trans" in instruction.modifiers))),
        ("line", line),
        ("source_line", source_line),
    )
    if not stores:
        for place, register in enumerate(registers):
            instruction.assign(register, f"thread->matrix[{place}]")


@translates("activemask")
def active(instruction: Instruction) -> None:
    """Translate the mask of threads that are here, which are all."""
    instruction.write("0xffffffffu")


@translates("elect")
def elect(instruction: Instruction) -> None:
    """Translate the choice of one thread of a warp: the first."""
    lane, chosen = instruction.operands[0].split("|")
    instruction.assign(chosen, "(thread->index & 31) == 0")
    instruction.assign(lane, "0")
