"""How far a result may be from the exact one: the one table of tolerances, and what its numbers are numbers of.

A step is compared with torch's for-loop in float64 that starts from the very same numbers. No relative error can be
stated for it: a first moment may cancel to nearly nothing, and a gradient with the decay added to it likewise, and then
every correct float32 implementation is many ulps away. What a correct one keeps is a small *backward* error: its result
is the exact one for inputs that are a few roundings off. So the tolerance is the sum of how far the reference itself moves
when one input after the other is made larger and smaller by as many unit roundoffs (half ulps) as the table says, and of
what the rounding of the result may do to it, in the type of the arithmetic and, if that is shorter, in that of the storage.
"""

import math

import torch

#: How many roundings, at most, an input passes through on its way into a result.
ROUNDINGS = {
    # The subtraction of the decay.
    "parameter": 1,
    # Its sum with the decay, and the product with a rounded coefficient such as 1 - beta.
    "gradient": 3,
    # The product with a rounded coefficient, twice for Nesterov's.
    "state": 4,
    # All that becomes of the moments afterwards: the sum of the second one, its root (which halves what came before), the sum
    # with the rounded eps, the quotient, the product with the rounded step size.
    "lr": 8,
    # As for lr, where what becomes of the moments is kept in a state, from which lr is away: the buffer of RMSprop's momentum
    # and Adadelta's average, a square of it.
    "quotient": 8,
    # It is rounded, and multiplied by the parameter, and by lr.
    "weight_decay": 3,
    # Those that are never rounded to float32 by themselves: 1 - beta and 1 - beta**step are to be computed in float64,
    # whatever the parameter's type. A product or two for the power of one of the first steps.
    "hyperparameter": 4,
    # The last sum or difference.
    "result": 1,
}


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """The type of the arithmetic on parameters of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit_roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of one rounding to nearest."""
    return torch.finfo(dtype).eps / 2


def relative_tolerance(role: str, dtype: torch.dtype) -> float:
    """The roundings of the table as a relative error, for parameters of `dtype`."""
    computed = torch.float64 if role == "hyperparameter" else computed_in(dtype)
    # In float64 the reference rounds as often as we do.
    implementations = 2 if computed == torch.float64 else 1
    return implementations * ROUNDINGS[role] * unit_roundoff(computed)


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
