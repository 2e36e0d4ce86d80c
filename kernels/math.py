"""The few functions that rules may call, each in plain Python for every place where rules run.

A rule names them as bare globals; :mod:`fusedopt.kernels.source` binds the names anew for Numba and for Triton. What they
mean is the same everywhere: correctly rounded, NaN propagates, no approximation.

| name | meaning |
|---|---|
| ``sqrt(x)`` | the square root, correctly rounded |
| ``absolute(x)`` | the magnitude |
| ``where(condition, a, b)`` | ``a`` where the condition holds, else ``b``; both are evaluated |
| ``maximum(a, b)`` | the larger one; NaN if either is NaN |
| ``sign(x)`` | 1 above zero, -1 below, else ``x`` itself: zero or NaN |
| ``nonzero(x)`` | whether ``x`` differs from zero |
| ``power(base, exponent)`` | ``base`` >= 0 to the ``exponent``; in coefficient functions only |
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy
import torch

#: Names that rules may call.
RULE_NAMES = ("sqrt", "absolute", "where", "maximum", "sign", "nonzero")
#: Names that coefficient functions may call.
COEFFICIENT_NAMES = (*RULE_NAMES, "power")


def power(base: float, exponent: float) -> float:
    """Return ``base ** exponent``, ``base`` >= 0, by repeated squaring, and repeated roots for what is left of ``exponent``.

    Products and correctly rounded roots, in one fixed order, give the same bits on every processor; ``pow`` of a C library
    does not. The relative error stays below ``2 * (exponent + 60) * 2**-53``, for a whole exponent ``2 * exponent * 2**-53``.
    """
    magnitude = abs(exponent)
    result, square, root, remaining = 1.0, base, base, int(magnitude)
    while remaining > 0:
        if remaining & 1:
            result *= square
        square *= square
        remaining >>= 1
    fraction = magnitude - int(magnitude)
    while fraction > 0.0:
        root, fraction = math.sqrt(root), 2.0 * fraction
        if fraction >= 1.0:
            result *= root
            fraction -= 1.0
    return 1.0 / result if exponent < 0 else result


#: Bindings for Python floats: the coefficients that the host computes.
SCALARS: dict[str, Callable[..., Any]] = {
    "sqrt": math.sqrt,
    "absolute": abs,
    "where": lambda condition, a, b: a if condition else b,
    "maximum": lambda a, b: a if (a > b or a != a) else b,
    "sign": lambda x: 1.0 if x > 0 else -1.0 if x < 0 else x,
    "nonzero": lambda x: x != 0,
    "power": power,
}

#: Bindings for NumPy arrays: the reference.
ARRAYS: dict[str, Callable[..., Any]] = {
    "sqrt": numpy.sqrt,
    "absolute": numpy.abs,
    "where": numpy.where,
    "maximum": lambda a, b: numpy.where((a > b) | (a != a), a, b),
    "sign": lambda x: numpy.where(x > 0, x.dtype.type(1), numpy.where(x < 0, x.dtype.type(-1), x)),
    "nonzero": lambda x: x != 0,
}

# What the names mean in a rule that is called as it stands: on NumPy arrays.
sqrt, absolute, where, maximum, sign, nonzero = (ARRAYS[name] for name in RULE_NAMES)


def _of_tensors_or_numbers(of_tensors: Callable[..., Any], of_numbers: Callable[..., Any]) -> Callable[..., Any]:
    def function(first: Any, *others: Any) -> Any:
        of_tensor = isinstance(first, torch.Tensor) or (not isinstance(first, bool) and any(map(torch.is_tensor, others)))
        return (of_tensors if of_tensor else of_numbers)(first, *others)

    return function


#: Bindings for torch tensors: every device and layout that torch serves.
TENSORS: dict[str, Callable[..., Any]] = {
    "sqrt": torch.sqrt,
    "absolute": torch.abs,
    "where": torch.where,
    "maximum": lambda a, b: torch.where((a > b) | (a != a), a, b),
    "sign": lambda x: torch.where(x > 0, 1.0, torch.where(x < 0, -1.0, x)),
    "nonzero": lambda x: x != 0,
}
# Coefficients are plain numbers there, and a condition on them alone is a plain bool.
TENSORS = {name: _of_tensors_or_numbers(function, SCALARS[name]) for name, function in TENSORS.items()}
