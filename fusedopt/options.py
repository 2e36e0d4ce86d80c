"""Options that every fused optimizer takes beside those of torch's: what else happens in the pass of a step."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from typing_extensions import TypedDict

from fusedopt import low_bit


class StepOptions(TypedDict, total=False):
    """Options of every optimizer but Adafactor, keyword-only; each may stand in a parameter group as well.

    A group that says nothing of one, where the constructor does not either, does not have the key.

    Args:
        max_grad_norm: gradients enter the update times min(1, max_grad_norm / (norm + 1e-6)); > 0. Of the constructor: by the
            norm over all groups, as torch's ``clip_grad_norm_``; of a parameter group: that group by its own norm. Gradients
            themselves are not rewritten (default: None, which does not clip).
        skip_nonfinite: a step whose norm of all gradients is not finite changes nothing, and is counted in
            ``optimizer.skipped_steps``; the same in all groups (default: False).
        ema_decay: keep the exponential average ``ema`` of the parameters, in [0, 1) (default: None, which keeps none).
        zero_grad_in_step: have each step leave all gradients zero, as ``step(zero_grad=True)`` does; in any group (default: False).
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


def check_max_grad_norm(norm: Any) -> None:
    """Raise ValueError unless ``norm`` can be a ``max_grad_norm``."""
    if norm is not None and not (isinstance(norm, numbers.Real) and float(norm) > 0):
        raise ValueError(f"Invalid max_grad_norm: {norm}; it must be a number above 0, or None")


def check_options(options: Mapping[str, Any], of: str) -> None:
    """Raise TypeError or ValueError unless ``options``, those of a class named ``of`` or of a group, are known and in range."""
    unknown = sorted(set(options) - set(StepOptions.__annotations__))
    if unknown:
        # In Python's own words, which programs that probe for an argument look for.
        raise TypeError(f"{of}.__init__() got an unexpected keyword argument {unknown[0]!r}")
    check_max_grad_norm(options.get("max_grad_norm"))
    decay = options.get("ema_decay")
    if decay is not None and not (isinstance(decay, numbers.Real) and 0 <= float(decay) < 1):
        raise ValueError(f"Invalid ema_decay: {decay}; it must be a number in [0, 1), or None")
    low_bit.check(options)


class TakingOptions(torch.optim.Optimizer):
    """The part of an optimizer that takes options which torch's class does not have."""

    #: Options that torch's class does not have, with what they are in its checkpoints.
    _own_options: ClassVar[tuple[tuple[str, Any], ...]] = ()
    #: What else happens in a step, unless asked for otherwise; empty where nothing can.
    _step_defaults: ClassVar[Mapping[str, Any]] = STEP_DEFAULTS

    def _set_options(self, step_options: Mapping[str, Any], **options: Any) -> None:
        """Add options that torch's constructor does not take to all groups."""
        check_options(step_options, type(self).__name__)
        # What is as it would be anyway stays out of the groups, which so are torch's: its checkpoints are read by their keys.
        plain = dict(self.own_options())
        options = {name: value for name, value in {**step_options, **options}.items() if name not in plain or value != plain[name]}
        if options.get("fused"):
            if self.defaults.get("differentiable"):
                raise RuntimeError("`fused` does not support `differentiable`")
            if self.defaults.get("foreach"):
                raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        self.defaults.update(options)
        for group in self.param_groups:
            self._complete(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as torch.optim does."""
        if isinstance(param_group, dict):
            self._complete(param_group)
        super().add_param_group(param_group)

    def _complete(self, group: dict[str, Any]) -> None:
        """Give ``group`` the options of ours that it has not set for itself."""
        alone = group.get("max_grad_norm") is not None
        if alone and self.defaults.get("max_grad_norm") is not None:
            raise ValueError(
                f"max_grad_norm={self.defaults['max_grad_norm']} of the constructor clips by the norm over all groups, and a "
                f"group's own max_grad_norm={group['max_grad_norm']} by the norm of that group: give one or the other"
            )
        if alone:
            group["clips_alone"] = True
        own = {name: group[name] for name in StepOptions.__annotations__ if name in group}
        if own and not self._step_defaults:
            raise ValueError(f"{type(self).__name__} is no rule on elements, and cannot take {', '.join(own)}: leave them out")
        check_options(own, type(self).__name__)
        for name, _ in self.own_options():
            if name in self.defaults:
                group.setdefault(name, self.defaults[name])

    @classmethod
    def own_options(cls) -> tuple[tuple[str, Any], ...]:
        """Return the options that torch's class does not have, with what they are in its checkpoints."""
        return (*cls._own_options, *cls._step_defaults.items())
