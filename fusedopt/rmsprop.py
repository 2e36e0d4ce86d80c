"""RMSprop, as torch.optim has it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from fusedopt.kernels import rules
from fusedopt.kernels.rule import Update
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import StepOptions
from fusedopt.settings import decay_of


class RMSprop(FusedOptimizer, torch.optim.RMSprop):
    r"""RMSprop, fused; in place of torch.optim.RMSprop.

    .. math::
        g \leftarrow g + \lambda \theta, \quad
        v \leftarrow \rho v + (1 - \rho) g^2, \quad
        \theta \leftarrow \theta - \alpha \frac{g}{\sqrt{v} + \epsilon}

    With momentum mu: ``b = mu b + g / (sqrt(v) + epsilon)`` and ``theta - alpha b``; centered: ``v - a^2`` under the root, with
    ``a = rho a + (1 - rho) g``. Parameters, ``step``, ``square_avg`` (v), ``momentum_buffer`` (b, if momentum) and ``grad_avg``
    (a, if centered) are written in place, of any floating point or complex dtype and any shape and layout.

    Args:
        params: parameters, named parameters, or dicts of parameter groups.
        lr: alpha, >= 0; a number or a tensor of one element (default: 1e-2).
        alpha: rho, >= 0, weight of the past in the average (default: 0.99).
        eps: epsilon, >= 0, added to the root (default: 1e-8).
        weight_decay: lambda, >= 0 (default: 0).
        momentum: mu, >= 0 (default: 0).
        centered: divide by an estimate of the standard deviation (default: False).
        capturable: keep step counts on the GPU, so that a CUDA graph can capture a step (default: False).
        foreach: True asks for torch's own implementation by lists (default: None).
        maximize: climb instead of descending (default: False).
        differentiable: True asks for torch's own, through which autograd can pass (default: False).
        fused: None takes a kernel where one serves, True insists on it, False asks for torch's own (default: None).
        **options: what else happens in the pass of a step, :class:`~fusedopt.options.StepOptions`; nothing unless asked for.

    Raises:
        ValueError: for a hyperparameter out of range, with torch's message.
        RuntimeError: if options exclude each other.

    Differences from torch:
        - ``fused`` is added: torch 2.13 has no fused RMSprop.
        - bfloat16 and float16 are computed in float32, and each result is rounded once; torch's loops round each operation.
        - States keep their dtype through a checkpoint; torch casts them to the parameter's.
        - A centered variance that is negative by rounding counts as its magnitude; torch makes NaN of it.

    Source: Hinton 2012, "Neural networks for machine learning", lecture 6e; centered: Graves 2013, "Generating sequences with
    recurrent neural networks", section 4.2.
    """

    _torch_class = torch.optim.RMSprop
    _own_options = (("fused", None),)
    _sparse_message = "RMSprop does not support sparse gradients"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        fused: bool | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
        super().__init__(
            params,
            lr,
            alpha,
            eps,
            weight_decay,
            momentum,
            centered,
            capturable,
            foreach,
            maximize,
            differentiable,
        )
        self._set_options(options, fused=fused)

    def _update(self, group: dict[str, Any], decays: bool) -> Update:
        if group["momentum"] > 0:
            rule = rules.centered_rmsprop_momentum if group["centered"] else rules.rmsprop_momentum
        else:
            rule = rules.centered_rmsprop if group["centered"] else rules.rmsprop
        return decay_of(rule, decays, decoupled=False)
