"""Options that every fused optimizer takes beside those of torch's: what else happens in the pass of a step."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

from typing_extensions import TypedDict

from fusedopt import low_bit


class StepOptions(TypedDict, total=False):
    """Options of every optimizer, keyword-only; each may stand in a parameter group as well.

    Args:
        max_grad_norm: gradients enter the update times min(1, max_grad_norm / (norm + 1e-6)); > 0. Of the constructor: by the
            norm over all groups, as torch's ``clip_grad_norm_``; of a parameter group: that group by its own norm. Gradients
            themselves are not rewritten (default: None, which does not clip).
        skip_nonfinite: a step whose norm of all gradients is not finite changes nothing, and is counted in
            ``optimizer.skipped_steps`` (default: False).
        ema_decay: keep the exponential average ``ema`` of the parameters, in [0, 1) (default: None, which keeps none).
        zero_grad_in_step: have each step leave the gradients zero, as ``step(zero_grad=True)`` does (default: False).
        state_format: how states are kept: "fp32"; "bf16", rounded by chance, so that slow averages still move; "8bit", in blocks
            of 256 codes; or a mapping from the names of states to these. Parameters of fewer than 4096 elements keep float32
            (default: None, the parameter's dtype). ``ema`` stays float32 unless a mapping names it.
        master_weights: what more is kept of bfloat16 parameters: "fp32", the whole number; "split16", the 16 bits that make it
            whole, which takes the same steps; "split8", 8 of them (default: None, nothing).
        stochastic_rounding: round bfloat16 parameters up or down by chance, so that small steps add up (default: False).
        rounding_seed: of all that is rounded by chance, from 0 to 2^64 - 1 (default: 0).
    """

    max_grad_norm: float | None
    skip_nonfinite: bool
    ema_decay: float | None
    zero_grad_in_step: bool
    state_format: str | Mapping[str, str] | None
    master_weights: str | None
    stochastic_rounding: bool
    rounding_seed: int


#: What the options are where nothing is said of them, and what groups hold of them beside.
STEP_DEFAULTS: dict[str, Any] = {
    "max_grad_norm": None,
    "skip_nonfinite": False,
    "ema_decay": None,
    "zero_grad_in_step": False,
    "clips_alone": False,
    "state_format": None,
    "master_weights": None,
    "stochastic_rounding": False,
    "rounding_seed": 0,
}


def check_options(options: Mapping[str, Any], of: str) -> None:
    """Raise TypeError or ValueError unless ``options``, those of a class named ``of`` or of a group, are known and in range."""
    unknown = sorted(set(options) - set(StepOptions.__annotations__))
    if unknown:
        # In Python's own words, which programs that probe for an argument look for.
        raise TypeError(f"{of}.__init__() got an unexpected keyword argument {unknown[0]!r}")
    norm, decay = options.get("max_grad_norm"), options.get("ema_decay")
    if norm is not None and not (isinstance(norm, numbers.Real) and float(norm) > 0):
        raise ValueError(f"Invalid max_grad_norm: {norm}; it must be a number above 0, or None")
    if decay is not None and not (isinstance(decay, numbers.Real) and 0 <= float(decay) < 1):
        raise ValueError(f"Invalid ema_decay: {decay}; it must be a number in [0, 1), or None")
    low_bit.check(options)


def without_defaults(text: str, defaults: Mapping[str, Any]) -> str:
    """Return what ``repr`` says of an optimizer, of these options only those that have been asked for."""
    for name, value in defaults.items():
        text = text.replace(f"    {name}: {value}\n", "")
    return text
