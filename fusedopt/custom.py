"""Optimizers of one's own: a rule, its states and its hyperparameters make a fused optimizer for CPUs and GPUs.

.. code-block:: python

    from fusedopt.custom import Rule, RuleOptimizer, sign


    def update(p, g, exp_avg, lr, beta, one_minus_beta):
        exp_avg = beta * exp_avg + one_minus_beta * g
        return p - lr * sign(exp_avg), exp_avg


    def coefficients(step, lr, beta):
        return lr, beta, 1.0 - beta


    class SignMomentum(RuleOptimizer):
        rule = Rule(update, coefficients, states=("exp_avg",))
        hyperparameters = {"lr": 1e-3, "beta": 0.9}
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from fusedopt import options
from fusedopt.kernels.math import absolute, maximum, nonzero, power, sign, sqrt, where
from fusedopt.kernels.rule import Rule, Update
from fusedopt.kernels.source import RuleError
from fusedopt.optimizer import FusedOptimizer
from fusedopt.settings import decay_of

__all__ = ["Rule", "RuleError", "RuleOptimizer", "absolute", "maximum", "nonzero", "power", "sign", "sqrt", "where"]


#: What the constructor takes beside hyperparameters, and groups hold.
_OPTIONS = {"params", "weight_decay", "decoupled_weight_decay", "maximize", "capturable", "differentiable", "foreach", "fused"}
_OPTIONS |= set(options.STEP_DEFAULTS)


class RuleOptimizer(FusedOptimizer):
    r"""Base class of an optimizer whose rule is given, with all that fused optimizers have.

    .. math::
        \theta \leftarrow \theta - \alpha \lambda \theta, \quad
        \theta, s_1, \dots \leftarrow \text{update}(\theta, g, s_1, \dots, c_1, \dots), \quad
        c_1, \dots = \text{coefficients}(t, \alpha, \dots)

    A subclass sets three attributes:

    - ``rule``: a :class:`Rule`, that is ``update`` and ``coefficients``, and the names of states;
    - ``hyperparameters``: the default of each hyperparameter that ``coefficients`` takes, ``lr`` among them; ``betas``
      stands for ``beta1`` and ``beta2``;
    - ``initial``: the numbers that states and scalars start from, where it is not zero (default: none).

    Parameters, the rule's states and ``step`` (t, of the parameter's own) are written in place, of any floating point or
    complex dtype and any shape and layout.

    Args:
        params: parameters, named parameters, or dicts of parameter groups.
        lr: alpha, >= 0; a number or a tensor of one element (default: the class's).
        weight_decay: lambda, >= 0 (default: 0).
        decoupled_weight_decay: decay as above; False adds lambda theta to g instead (default: True).
        maximize: climb instead of descending (default: False).
        capturable: keep step counts on the GPU, so that a CUDA graph can capture a step (default: False).
        fused: None takes a kernel where one serves, True insists on it, False has operations of torch run the rule
            (default: None).
        hyperparameters: the others by name (default: the class's), and what else happens in the pass of a step,
            :class:`~fusedopt.options.StepOptions`; nothing unless asked for.

    Raises:
        TypeError: for a hyperparameter that the class does not have, or one that is no number.
        ValueError: for a negative learning rate or weight decay.
        RuleError: when the class is defined, if its hyperparameters are not those that its rule takes.
    """

    rule: ClassVar[Rule]
    hyperparameters: ClassVar[Mapping[str, Any]]
    initial: ClassVar[Mapping[str, float]] = {}

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if not isinstance(getattr(cls, "rule", None), Rule) or "lr" not in getattr(cls, "hyperparameters", {}):
            raise RuleError(
                f"{cls.__name__} must set `rule`, a fusedopt.custom.Rule, and `hyperparameters`, a dict of defaults with 'lr'"
            )
        taken_already = sorted(_OPTIONS & set(cls.hyperparameters))
        if taken_already:
            raise RuleError(
                f"{cls.__name__}.hyperparameters names {', '.join(taken_already)}, which every optimizer has as an option: "
                "give the rule's own another name"
            )
        known = {name for name in cls.hyperparameters if name != "betas"}
        if "betas" in cls.hyperparameters:
            known |= {"beta1", "beta2"}
        taken = set(Update(cls.rule).hyperparameters)
        if taken - known or known - taken - {"lr"}:
            raise RuleError(
                f"the coefficients of {cls.__name__}'s rule take the hyperparameters {sorted(taken)}, but the class declares "
                f"{sorted(known)}: give each a default in `hyperparameters`, or take it in `coefficients`"
            )
        unknown = set(cls.initial) - {*cls.rule.states, *cls.rule.scalars}
        if unknown:
            raise RuleError(
                f"{cls.__name__}.initial names {sorted(unknown)}, but its rule has the states {list(cls.rule.states)} and the "
                f"scalars {list(cls.rule.scalars)}"
            )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | None = None,
        *,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = True,
        maximize: bool = False,
        capturable: bool = False,
        fused: bool | None = None,
        **hyperparameters: Any,
    ) -> None:
        chosen = {name: hyperparameters.pop(name) for name in options.StepOptions.__annotations__ if name in hyperparameters}
        unknown = sorted(set(hyperparameters) - set(self.hyperparameters))
        if unknown:
            raise TypeError(
                f"{type(self).__name__} has no hyperparameter {', '.join(unknown)}: it has {', '.join(self.hyperparameters)}"
            )
        own = {**self.hyperparameters, **hyperparameters, "lr": self.hyperparameters["lr"] if lr is None else lr}
        for name, value in own.items():
            pair = isinstance(value, tuple | list) and len(value) == 2
            if pair != (name == "betas"):
                raise TypeError(f"Invalid {name}: {value!r}; it must be {'two numbers' if name == 'betas' else 'a number'}")
            for number in value if pair else (value,):
                if not isinstance(number, Tensor | numbers.Real):
                    raise TypeError(f"Invalid {name}: {value!r}; it must be a number")
                if isinstance(number, Tensor) and number.numel() != 1:
                    raise ValueError(f"Tensor {name} must be 1-element")
        if not own["lr"] >= 0.0:
            raise ValueError(f"Invalid learning rate: {own['lr']}")
        if not weight_decay >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        common = {
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
            "capturable": capturable,
            "differentiable": False,
            "fused": fused,
        }
        super().__init__(params, {**own, **common})
        self._set_options(chosen)

    @property
    def _sparse_message(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__} does not support sparse gradients: use dense ones, or torch's SGD or SparseAdam"

    def _torch_lacks(self, group: dict[str, Any]) -> str | None:  # noqa: ARG002  # of any group
        return "torch has no optimizer of this form"

    def _initial(self, group: dict[str, Any], name: str) -> Any:  # noqa: ARG002  # of any group
        return self.initial.get(name, 0.0)

    def _update(self, group: dict[str, Any], decays: bool) -> Update:
        return decay_of(self.rule, decays, group["decoupled_weight_decay"])
