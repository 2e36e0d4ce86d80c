"""Arithmetic on floating point numbers, and comparisons and selections of any type.

Results are the correctly rounded ones; a NaN comes out as 0x7fffffff, as NVIDIA's units have it. Instructions that are
approximate by their definition give the correctly rounded result too, or by the launch's choice one that is off by the documented
bound: see ``approximate`` in ``runtime.c``.
"""

from __future__ import annotations

from fusedopt.kernels.ptx.integers import integer
from fusedopt.kernels.ptx.parse import STORAGE, UnknownInstructionError
from fusedopt.kernels.ptx.translate import FLOATS, PACKED, Instruction, translates

_INFIX = {"add": "({0} + {1})", "sub": "({0} - {1})", "mul": "({0} * {1})"}
_ORDERED = {"eq": "==", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_INTEGER_COMPARISONS = {**_ORDERED, "ne": "!=", "lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
# Largest errors in units in the last place, from the tables of the PTX manual.
_APPROXIMATE = {
    "div": ("({0} / {1})", 2),
    "sqrt": ("sqrtf({0})", 1),
    "rcp": ("(1.0f / {0})", 1),
    "rsqrt": ("(float)(1.0 / sqrt((double){0}))", 2),
    "ex2": ("(float)exp2((double){0})", 2),
    "lg2": ("(float)log2((double){0})", 2),
    "sin": ("(float)sin((double){0})", 4),
    "cos": ("(float)cos((double){0})", 4),
    "tanh": ("(float)tanh((double){0})", 8),
}


def _is_float(kind: str) -> bool:
    return kind in FLOATS or kind in PACKED


def _operation(opcode: str, kind: str, values: list[str], nan: bool) -> str:
    """Return the number that ``opcode`` makes of ``values``, before it is rounded to ``kind``."""
    if opcode in _INFIX:
        return _INFIX[opcode].format(*values)
    if opcode == "fma":
        # In float64 products of the short types are exact.
        return f"fma{'f' if kind == 'f32' else ''}({', '.join(values)})"
    if opcode in ("min", "max"):
        function = f"{opcode}imum{'_or_nan' if nan else ''}"
        result = values[0]
        for value in values[1:]:  # three operands on the newest targets
            result = f"{function}({result}, {value})"
        return result
    raise UnknownInstructionError(f"{opcode} on {kind}")


@translates("add", "sub", "mul", "fma", "mad", "min", "max")
def arithmetic(instruction: Instruction) -> None:
    """Translate what integers and floats share the names of."""
    if not _is_float(instruction.type):
        integer(instruction)
        return
    instruction.refuse("rz", "rm", "rp", "sat", "relu", "abs", "xorsign")
    opcode = "fma" if instruction.opcode == "mad" else instruction.opcode
    nan = "NaN" in instruction.modifiers
    if instruction.type in PACKED:
        lane, bits = PACKED[instruction.type]
        parts = []
        for place in range(2):
            values = [
                instruction.number(f"(({STORAGE[lane]})({instruction.raw(i)} >> {place * bits}))", lane)
                for i in range(1, len(instruction.operands))
            ]
            result = instruction.bits(_operation(opcode, lane, values, nan), lane)
            parts.append(f"(({STORAGE[instruction.type]}){result} << {place * bits})")
        instruction.write(" | ".join(parts))
        return
    # add.f32.bf16 and its like: a short type for all but the last operand, which has the type of the result.
    result_type, short = instruction.types[0], instruction.types[-1]
    kinds = [short] * (len(instruction.operands) - 2) + [result_type]
    values = [instruction.value(i, kind) for i, kind in enumerate(kinds, 1)]
    instruction.write(instruction.bits(_operation(opcode, result_type, values, nan), result_type))


@translates("neg", "abs")
def sign(instruction: Instruction) -> None:
    """Translate what changes the sign alone; of a float its bit, of a NaN too."""
    kind = instruction.type
    if not _is_float(kind):
        integer(instruction)
        return
    _, bits = PACKED.get(kind, (kind, 8 * instruction.element_bytes))
    mask = sum(1 << (bits * place + bits - 1) for place in range(2 if kind in PACKED else 1))
    if instruction.opcode == "neg":
        instruction.write(f"({instruction.raw(1)}) ^ {mask:#x}ull")
    else:
        instruction.write(f"({instruction.raw(1)}) & ~{mask:#x}ull")


@translates(*_APPROXIMATE)
def division_or_function(instruction: Instruction) -> None:
    """Translate divisions, roots and functions, the exact and the approximate."""
    kind = instruction.type
    if not _is_float(kind):
        integer(instruction)
        return
    opcode = instruction.opcode
    values = [instruction.value(i) for i in range(1, len(instruction.operands))]
    if kind == "f64" and opcode in ("div", "sqrt", "rcp") and "rn" in instruction.modifiers:
        formula = {"div": "({0} / {1})", "sqrt": "sqrt({0})", "rcp": "(1.0 / {0})"}[opcode]
        instruction.write(instruction.bits(formula.format(*values), kind))
    elif kind == "f32":
        instruction.refuse("rz", "rm", "rp")
        formula, ulps = _APPROXIMATE[opcode]
        result = instruction.bits(formula.format(*values), kind)
        exact = "rn" in instruction.modifiers
        instruction.write(result if exact else f"approximate(launch, {result}, {ulps})")
    else:
        raise UnknownInstructionError(f"{opcode} on {kind}")


@translates("copysign")
def copysign(instruction: Instruction) -> None:
    """Translate copysign: the sign of the first operand, the magnitude of the second."""
    mask = 1 << (8 * instruction.element_bytes - 1)
    instruction.write(f"(({instruction.raw(1)}) & {mask:#x}ull) | (({instruction.raw(2)}) & ~{mask:#x}ull)")


@translates("testp")
def classify(instruction: Instruction) -> None:
    """Translate tests of one number."""
    function = {"finite": "isfinite", "infinite": "isinf", "notanumber": "isnan", "number": "!isnan", "normal": "isnormal"}
    instruction.write(f"{function[instruction.modifiers[0]]}({instruction.value(1)})")


@translates("setp")
def compare(instruction: Instruction) -> None:
    """Translate comparisons; of packed numbers each lane has a predicate of its own."""
    comparison = instruction.modifiers[0]
    combine = {"and": "&", "or": "|", "xor": "^"}.get(instruction.modifiers[1])
    kind = instruction.type
    targets = instruction.operands[0].split("|")
    lane, bits = PACKED.get(kind, (kind, 0))
    results = []
    for place in range(2 if kind in PACKED else 1):
        raw = [f"(({STORAGE[lane]})({instruction.raw(i)} >> {place * bits}))" for i in (1, 2)]
        result = _comparison(comparison, lane, *(instruction.number(each, lane) for each in raw))
        results.append(f"({result} {combine} {instruction.raw(3, 'pred')})" if combine else result)
    if len(results) < len(targets):
        if combine:
            raise UnknownInstructionError("the opposite of a combined comparison")
        results.append(f"!{results[0]}")
    # Into temporaries first: a target may be an operand.
    instruction.emit("{ " + " ".join(f"u8 result{i} = {result};" for i, result in enumerate(results)))
    for i, target in enumerate(targets):
        instruction.assign(target, f"result{i}")
    instruction.emit("}")


def _comparison(name: str, kind: str, a: str, b: str) -> str:
    if kind not in FLOATS:
        return f"({a} {_INTEGER_COMPARISONS[name]} {b})"
    unordered = f"(isnan({a}) || isnan({b}))"
    if name == "nan":
        return unordered
    if name == "num":
        return f"(!{unordered})"
    if name == "ne":
        return f"({a} < {b} || {a} > {b})"
    if name == "neu":
        return f"({a} != {b})"
    if name in _ORDERED:
        return f"({a} {_ORDERED[name]} {b})"
    return f"({a} {_ORDERED[name.removesuffix('u')]} {b} || {unordered})"


@translates("selp")
def select(instruction: Instruction) -> None:
    """Translate the choice between two operands by a predicate."""
    instruction.write(f"{instruction.raw(3, 'pred')} ? {instruction.raw(1)} : {instruction.raw(2)}")
