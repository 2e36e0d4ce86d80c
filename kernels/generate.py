"""What the generated kernels of all backends have in common: the lines that take one element through an update."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from typing import Any

from fusedopt.kernels import codes, source
from fusedopt.kernels.formats import Format
from fusedopt.kernels.rule import Update


def functions(each: Sequence[Callable[..., Any]], decorator: str, rewrite: ast.NodeTransformer | None = None) -> str:
    """Return the source of functions and of all their helpers, each once, under ``decorator``."""
    return "\n\n\n".join(dict.fromkeys(text for function in each for text in source.texts(function, decorator, rewrite)))


def coefficient_names(update: Update) -> list[str]:
    """Return the variables that hold a row of coefficients, in the order of the row."""
    return [
        "c_inverse_scale",
        "c_sign",
        *(f"c_decay_{name}" for name in update.decay_names),
        *(f"c_{name}" for name in update.rule_names),
        *(f"c_average_{name}" for name in update.average_names),
    ]


def arrays(update: Update) -> list[str]:
    """Return the names of the arrays that a kernel reads and writes, in the order of a bucket's addresses."""
    return ["p", "g", *(f"s_{state}" for state in update.states)]


def element(update: Update) -> list[str]:
    """Return the lines that turn ``p``, ``g``, the states and the coefficients into ``new_p`` and the new states."""
    names = coefficient_names(update)
    first = 2 + len(update.decay_names)
    last = first + len(update.rule_names)
    states = arrays(update)[2:]
    of_rule, of_average = states[: len(update.rule.states)], states[len(update.rule.states) :]
    new = [f"new_{name}" for name in ("p", *of_rule)]
    lines = [
        "g = c_sign * g",
        f"p, g = {update.decay.update.__name__}({', '.join(['p', 'g', *names[2:first]])})",
        f"{', '.join(new)}, = {update.rule.update.__name__}({', '.join(['p', 'g', *of_rule, *names[first:last]])})",
    ]
    if of_average:
        kept = ", ".join(f"new_{name}" for name in of_average)
        lines.append(f"{kept}, = {update.average.update.__name__}({', '.join(['new_p', *of_average, *names[last:]])})")
    return lines


def functions_of_elements(update: Update) -> list[Callable[..., Any]]:
    """Return the functions that :func:`element` calls."""
    return [update.decay.update, update.rule.update, *([update.average.update] if update.average.states else [])]


def draw(slot: int, form: Format) -> str:
    """Return the expression for the random bits of the ``slot``-th number of an element that is rounded by chance."""
    places, mask = codes.bits_drawn(slot, form.chance)
    return f"word((random_{slot // 2} >> {places}) & {mask})"


def indent(lines: Sequence[str], spaces: int) -> str:
    """Join ``lines`` for a place in a template that is indented by ``spaces``."""
    return ("\n" + " " * spaces).join(lines)
