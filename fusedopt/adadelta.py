"""Adadelta, as torch.optim has it."""

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


class Adadelta(FusedOptimizer, torch.optim.Adadelta):
    r"""Adadelta, fused; in place of torch.optim.Adadelta.

    .. math::
        g \leftarrow g + \lambda \theta, \quad
        v \leftarrow \rho v + (1 - \rho) g^2, \quad
        \delta = \frac{\sqrt{u + \epsilon}}{\sqrt{v + \epsilon}} g, \quad
        u \leftarrow \rho u + (1 - \rho) \delta^2, \quad
        \theta \leftarrow \theta - \alpha \delta

    Parameters, ``step``, ``square_avg`` (v) and ``acc_delta`` (u) are written in place, of any floating point or complex dtype and
    any shape and layout.

    Args:
        params: parameters, named parameters, or dicts of parameter groups.
        lr: alpha, >= 0; a number or a tensor of one element (default: 1.0).
        rho: weight of the past in both averages, in [0, 1] (default: 0.9).
        eps: epsilon, >= 0 (default: 1e-6).
        weight_decay: lambda, >= 0 (default: 0).
        foreach: True asks for torch's own implementation by lists (default: None).
        capturable: keep step counts on the GPU, so that a CUDA graph can capture a step (default: False).
        maximize: climb instead of descending (default: False).
        differentiable: True asks for torch's own, through which autograd can pass (default: False).
        fused: None takes a kernel where one serves, True insists on it, False asks for torch's own (default: None).
        **options: what else happens in the pass of a step, :class:`~fusedopt.options.StepOptions`; nothing unless asked for.

    Raises:
        ValueError: for a hyperparameter out of range, with torch's message.
        RuntimeError: if options exclude each other.

    Differences from torch:
        - ``fused`` is added: torch 2.13 has no fused Adadelta.
        - bfloat16 and float16 are computed in float32, and each result is rounded once; torch's loops round each operation.
        - States keep their dtype through a checkpoint; torch casts them to the parameter's.

    Source: Zeiler 2012, "ADADELTA: an adaptive learning rate method", Algorithm 1.
    """

    _torch_class = torch.optim.Adadelta
    _own_options = (("fused", None),)
    _sparse_message = "Adadelta does not support sparse gradients"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
        super().__init__(
            params,
            lr,
            rho,
            eps,
            weight_decay,
            foreach,
            capturable=capturable,
            maximize=maximize,
            differentiable=differentiable,
        )
        self._set_options(options, fused=fused)

    def _update(self, group: dict[str, Any], decays: bool) -> Update:  # noqa: ARG002  # of any group
        return decay_of(rules.adadelta, decays, decoupled=False)
