"""Gradient descent and momentum, as torch.optim.SGD has them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from fusedopt.kernels import rules
from fusedopt.kernels.rule import Rule, Update
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import StepOptions
from fusedopt.settings import decay_of


class SGD(FusedOptimizer, torch.optim.SGD):
    r"""Stochastic gradient descent, with momentum if asked for, fused; in place of torch.optim.SGD.

    .. math::
        g \leftarrow g + \lambda \theta, \quad
        b \leftarrow \mu b + (1 - \tau) g, \quad
        \theta \leftarrow \theta - \alpha b
        \quad (\text{Nesterov: } \theta \leftarrow \theta - \alpha (g + \mu b))

    The first gradient enters b undampened. Parameters and ``momentum_buffer`` (kept only where momentum is not 0) are
    written in place, of any floating point or complex dtype and any shape and layout.

    Args:
        params: parameters, named parameters, or dicts of parameter groups.
        lr: alpha, >= 0; a number or a tensor of one element (default: 1e-3).
        momentum: mu, >= 0 (default: 0).
        dampening: tau (default: 0).
        weight_decay: lambda, >= 0 (default: 0).
        nesterov: use Nesterov's momentum; needs a momentum and no dampening (default: False).
        maximize: climb instead of descending (default: False).
        foreach: True asks for torch's own implementation by lists (default: None).
        differentiable: True asks for torch's own, through which autograd can pass (default: False).
        fused: None takes a kernel where one serves, True insists on it, False asks for torch's own (default: None).
        decoupled_weight_decay: theta (1 - alpha lambda) in place of the sum with the gradient (default: False).
        capturable: read a tensor lr on the GPU when a CUDA graph is replayed (default: False).
        **options: what else happens in the pass of a step, :class:`~fusedopt.options.StepOptions`; nothing unless asked for.

    Raises:
        ValueError: for a hyperparameter out of range, with torch's message.
        RuntimeError: if options exclude each other.

    Differences from torch:
        - ``decoupled_weight_decay`` and ``capturable`` are added.
        - bfloat16 and float16 are computed in float32, and each result is rounded once; torch's loops round each operation.
        - States keep their dtype through a checkpoint; torch casts them to the parameter's.

    Source: Robbins and Monro 1951; Sutskever et al. 2013, "On the importance of initialization and momentum in deep
    learning", section 2; Loshchilov and Hutter 2019, "Decoupled weight decay regularization", Algorithm 1.
    """

    _torch_class = torch.optim.SGD
    _own_options = (("decoupled_weight_decay", False), ("capturable", False))
    _counts_steps = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        capturable: bool = False,
        **options: Unpack[StepOptions],
    ) -> None:
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        self._set_options(options, decoupled_weight_decay=decoupled_weight_decay, capturable=capturable)

    def _torch_lacks(self, group: dict[str, Any]) -> str | None:
        return "decoupled_weight_decay=True" if group.get("decoupled_weight_decay", False) and group["weight_decay"] != 0 else None

    def _accumulation(self, group: dict[str, Any]) -> Rule:
        if group["momentum"] == 0:
            reason = (
                "without momentum there is no moment that gradients could join, and a step taken early would move the later ones"
            )
        elif group["nesterov"]:
            reason = "Nesterov's step adds the sum of gradients to the parameters by itself, and the moment does not tell it"
        elif group["dampening"] != 0:
            reason = f"with dampening={group['dampening']} the first step's gradients weigh otherwise"
        else:
            return rules.gradient_into_momentum
        raise RuntimeError(f"SGD.accumulate() would not be exact: {reason}; leave gradients to add up in .grad")

    def _update(self, group: dict[str, Any], decays: bool) -> Update:
        if group["momentum"] == 0:
            rule = rules.gradient_descent
        else:
            rule = rules.nesterov_momentum if group["nesterov"] else rules.momentum
        return decay_of(rule, decays, group.get("decoupled_weight_decay", False))
