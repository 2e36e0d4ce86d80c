"""How far a result may be from the exact one: the one table of tolerances, and what its numbers are numbers of.

A step is compared with torch's for-loop in float64 that starts from the very same numbers. No relative error can be
stated for it: a first moment may cancel to nearly nothing, and a gradient with the decay added to it likewise, and then
every correct float32 implementation is many ulps away. What a correct one keeps is a small *backward* error: its result
is the exact one for inputs that are a few roundings off. So the tolerance is how far the reference itself moves when

- the parameter, the gradient, each state, the learning rate and the weight decay, one at a time, are made larger and
  smaller by ROUNDINGS unit roundoffs (half ulps) of the type that is computed in;
- the other hyperparameters likewise, but by unit roundoffs of float64, and betas by those of one: 1 - beta is to be
  computed in float64, always;
- and the result by as much once more, plus half an ulp of the type in which it is stored, if that is a shorter one.
"""

import math

import torch

# Counted on the longest way from an input to a result, AdamW's from the second moment to the parameter: its product
# with beta2, which is rounded itself, a sum, a root (halves what came before), a sum with the rounded eps, a quotient,
# its product with the rounded step size, the subtraction.
ROUNDINGS = {
    torch.float32: 8,
    # The reference rounds as often as we do.
    torch.float64: 16,
}


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """The type of the arithmetic on parameters of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit_roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of one rounding to nearest."""
    return torch.finfo(dtype).eps / 2


def relative_tolerance(dtype: torch.dtype) -> float:
    """ROUNDINGS as a relative error."""
    return ROUNDINGS[computed_in(dtype)] * unit_roundoff(computed_in(dtype))


def half_ulp(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Half the distance of neighbouring numbers of `dtype` at float64 `values`; constant below the normal range."""
    information = torch.finfo(dtype)
    exponent = torch.frexp(values.abs().clamp(information.smallest_normal, information.max)).exponent - 1
    return torch.ldexp(torch.full_like(values, information.eps / 2), exponent)


def storage_tolerance(values: torch.Tensor, stored: torch.dtype, computed: torch.dtype) -> torch.Tensor:
    """What storing float64 `values` in a shorter type than they were computed in may change."""
    if torch.finfo(stored).bits >= torch.finfo(computed).bits:
        return torch.zeros_like(values)
    return half_ulp(values, stored)


def in_ulps(error: float, value: float, dtype: torch.dtype) -> float:
    """An error in ulps of `dtype` at `value`, for messages."""
    return error / (2 * float(half_ulp(torch.tensor(value, dtype=torch.float64), dtype))) if math.isfinite(error) else error
