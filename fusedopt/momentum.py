"""Momentum as an average of gradients."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from fusedopt.kernels import rules
from fusedopt.kernels.rule import Update
from fusedopt.optimizer import FusedOptimizer, decay_of


class Momentum(FusedOptimizer):
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

    Raises:
        ValueError: for a hyperparameter out of range.

    Source: Polyak 1964, "Some methods of speeding up the convergence of iteration methods", in the averaged form.
    """

    _counts_steps = False
    _sparse_message = "Momentum does not support sparse gradients: use SGD with momentum, or dense gradients"

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
    ) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if not lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta value: {beta}")
        if not weight_decay >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        defaults = {
            "lr": lr,
            "beta": beta,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
            "differentiable": False,
            "fused": fused,
        }
        super().__init__(params, defaults)

    def _torch_lacks(self, group: dict[str, Any]) -> str | None:  # noqa: ARG002  # of any group
        return "torch has no optimizer of this form"

    def _update(self, group: dict[str, Any], decays: bool) -> Update:
        return decay_of(rules.averaged_momentum, decays, group["decoupled_weight_decay"])
