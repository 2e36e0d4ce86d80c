"""Momentum as an average of gradients."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from fusedopt.custom import RuleOptimizer
from fusedopt.kernels import rules
from fusedopt.kernels.rule import Rule
from fusedopt.options import StepOptions


class Momentum(RuleOptimizer):
    r"""Descent along an exponential average of gradients, fused.

    .. math::
        \theta \leftarrow \theta - \alpha \lambda \theta, \quad
        d \leftarrow \beta d + (1 - \beta) g, \quad
        \theta \leftarrow \theta - \alpha d, \quad d_0 = 0

    Without weight decay it walks the path of ``SGD(lr=alpha * (1 - beta), momentum=beta)``. Parameters and
    ``momentum_buffer`` (d) are written in place, of any floating point or complex dtype and any shape and layout.

    Args:
        params: parameters, named parameters, or dicts of parameter groups.
        lr: alpha, >= 0; a number or a tensor of one element.
        beta: weight of the past in the average, in [0, 1) (default: 0.9).
        weight_decay: lambda, >= 0 (default: 0).
        decoupled_weight_decay: decay as above; False adds lambda theta to g instead (default: True).
        maximize: climb instead of descending (default: False).
        fused: None takes a kernel where one serves, True insists on it, False has operations of torch run the rule
            (default: None).
        **options: what else happens in the pass of a step, :class:`~fusedopt.options.StepOptions`; nothing unless asked for.

    Raises:
        ValueError: for a hyperparameter out of range.

    Differences from torch:
        - It is not in torch, whose SGD takes a gradient in whole: ``b = mu b + g``.

    Source: Polyak 1964, "Some methods of speeding up the convergence of iteration methods", in the averaged form.
    """

    rule = rules.averaged_momentum
    hyperparameters: ClassVar[dict[str, Any]] = {"lr": None, "beta": 0.9}
    _counts_steps = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        beta: float = 0.9,
        weight_decay: float = 0,
        *,
        decoupled_weight_decay: bool = True,
        maximize: bool = False,
        fused: bool | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta value: {beta}")
        super().__init__(
            params,
            lr,
            beta=beta,
            weight_decay=weight_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            maximize=maximize,
            fused=fused,
            **options,
        )

    def _accumulation(self, group: dict[str, Any]) -> Rule:
        if group["beta"] == 0:
            raise RuntimeError(
                "Momentum.accumulate() would not be exact: with beta=0 the moment forgets all but the last gradient; leave "
                "gradients to add up in .grad"
            )
        return rules.gradient_into_averaged_momentum
