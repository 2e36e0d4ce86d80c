"""What the parameter groups of an optimizer ask for: an update and its hyperparameters for each, read at every step."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fusedopt.kernels.norms import Clipping
from fusedopt.kernels.rule import Rule, Update, no_decay
from fusedopt.kernels.rules import decoupled_decay, l2_decay, weight_average
from fusedopt.kernels.source import RuleError
from fusedopt.kernels.tables import Hyperparameters
from fusedopt.low_bit import check_names
from fusedopt.options import check_max_grad_norm
from fusedopt.prepared import as_number, same_objects

if TYPE_CHECKING:
    from fusedopt.optimizer import FusedOptimizer

#: Options that choose an implementation. They are this optimizer's own, whatever checkpoint is loaded.
IMPLEMENTATION_OPTIONS = ("fused", "foreach", "differentiable", "capturable")
#: Options that choose formats; these as well.
FORMAT_OPTIONS = ("state_format", "master_weights", "stochastic_rounding")
# Types whose objects hold the same value for ever.
_CONSTANT = (float, int, bool, str, type(None))


def decay_of(rule: Rule, decays: bool, decoupled: bool) -> Update:
    """Return ``rule`` behind the decay of a group: none where no group ``decays``."""
    return _update(rule, no_decay if not decays else decoupled_decay if decoupled else l2_decay)


# One object for each combination, so that plans can compare updates by identity.
_update = functools.cache(Update)


@functools.cache
def averaging(update: Update) -> Update:
    """Return ``update`` with an average of the weights behind it."""
    clash = set(update.states) & set(weight_average.states)
    if clash:
        raise RuleError(
            f"ema_decay keeps the state {', '.join(clash)}, which the rule has for its own: give the rule's another name"
        )
    return _update(update.rule, update.decay, weight_average)


class Settings:
    """The settings of all groups at one step.

    Args:
        optimizer: whose ``param_groups`` are read.
    """

    def __init__(self, optimizer: FusedOptimizer) -> None:
        groups = optimizer.param_groups
        decays = any(isinstance(w := group.get("weight_decay", 0), Tensor) or w != 0 for group in groups)
        names = (*IMPLEMENTATION_OPTIONS, *FORMAT_OPTIONS, "rounding_seed")
        self.clipping = _clipping(groups)
        # Who updates a parameter follows from whether it is clipped, too: torch's own knows nothing of that.
        self.switches = [(*(_as_key(group.get(name)) for name in names), self.clipping is not None) for group in groups]
        updates = [optimizer._update(group, decays) for group in groups]
        self.updates = [
            update if group.get("ema_decay") is None else averaging(update) for update, group in zip(updates, groups, strict=True)
        ]
        for group, update in zip(groups, self.updates, strict=True):
            check_names(group.get("state_format"), update)
        self.hyperparameters = [
            Hyperparameters(
                tuple(live_number(optimizer._hyperparameter(group, name), group) for name in update.hyperparameters),
                bool(group["maximize"]),
            )
            for group, update in zip(groups, self.updates, strict=True)
        ]
        self.zero_grad = any(group.get("zero_grad_in_step") for group in groups)
        self._values = [list(group.values()) for group in groups]
        self._constant = all(
            _is_constant(value) for group in groups for name, value in group.items() if not name.startswith("param")
        )

    def hold(self, groups: list[dict[str, Any]]) -> bool:
        """Whether ``groups`` would be read to the same settings; False where only reading tells."""
        return (
            self._constant
            and len(groups) == len(self._values)
            and all(same_objects(own, list(group.values())) for own, group in zip(self._values, groups, strict=True))
        )


def _clipping(groups: list[dict[str, Any]]) -> Clipping | None:
    given = [group.get("max_grad_norm") for group in groups]
    max_norms = [None if norm is None else as_number(norm) for norm in given]
    for norm in max_norms:
        check_max_grad_norm(norm)
    skips = {bool(group.get("skip_nonfinite")) for group in groups}
    if len(skips) > 1:
        raise ValueError("skip_nonfinite must be the same in all groups: a step is left out wholly, or not at all")
    if not any(skips) and all(norm is None for norm in max_norms):
        return None
    if any(group.get("clips_alone") for group in groups):
        return Clipping(tuple(range(len(groups))), tuple(max_norms), any(skips))
    if len(set(max_norms)) > 1:
        raise ValueError(
            f"groups that are clipped together ask for different norms {max_norms}: change max_grad_norm in all of them, or give "
            "each group its own when the optimizer is made"
        )
    return Clipping((0,) * len(groups), (max_norms[0],), any(skips))


def _as_key(value: Any) -> Any:
    # A mapping may be changed in place.
    return tuple(sorted(value.items())) if isinstance(value, Mapping) else value


def _is_constant(value: Any) -> bool:
    return type(value) in _CONSTANT or (type(value) is tuple and all(type(part) in _CONSTANT for part in value))


def live_number(value: Any, group: dict[str, Any]) -> float | Tensor:
    """Return the number that ``value``, an option of ``group``, is at this moment."""
    # A captured step reads a tensor of its device when it is replayed.
    if isinstance(value, Tensor) and group.get("capturable") and value.device.type != "cpu":
        return value
    return as_number(value)
