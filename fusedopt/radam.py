"""RAdam, as torch.optim has it."""

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


class RAdam(FusedOptimizer, torch.optim.RAdam):
    r"""Rectified Adam, fused; in place of torch.optim.RAdam.

    .. math::
        g \leftarrow g + \lambda \theta, \quad
        m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
        \theta \leftarrow \theta - \frac{\alpha m}{1 - \beta_1^t} \cdot
            \begin{cases} r_t \sqrt{1 - \beta_2^t} / (\sqrt{v} + \epsilon) & \rho_t > 5 \\ 1 & \text{else} \end{cases}

    with ``rho_inf = 2 / (1 - beta_2) - 1``, ``rho_t = rho_inf - 2 t beta_2^t / (1 - beta_2^t)`` and
    ``r_t^2 = (rho_t - 4) (rho_t - 2) rho_inf / ((rho_inf - 4) (rho_inf - 2) rho_t)``.

    Parameters, ``step`` (t, of the parameter's own), ``exp_avg`` (m) and ``exp_avg_sq`` (v) are written in place, of any
    floating point or complex dtype and any shape and layout.

    Args:
        params: parameters, named parameters, or dicts of parameter groups.
        lr: alpha, >= 0; a number or a tensor of one element (default: 1e-3).
        betas: beta_1 and beta_2, in [0, 1) (default: (0.9, 0.999)).
        eps: epsilon, >= 0, added to the root (default: 1e-8).
        weight_decay: lambda, >= 0 (default: 0).
        decoupled_weight_decay: theta (1 - alpha lambda) in place of the sum with the gradient (default: False).
        foreach: True asks for torch's own implementation by lists (default: None).
        maximize: climb instead of descending (default: False).
        capturable: keep step counts on the GPU, so that a CUDA graph can capture a step (default: False).
        differentiable: True asks for torch's own, through which autograd can pass (default: False).
        fused: None takes a kernel where one serves, True insists on it, False asks for torch's own (default: None).
        **options: what else happens in the pass of a step, :class:`~fusedopt.options.StepOptions`; nothing unless asked for.

    Raises:
        ValueError: for a hyperparameter out of range, with torch's message.
        RuntimeError: if options exclude each other.

    Differences from torch:
        - ``fused`` is added: torch 2.13 has no fused RAdam.
        - bfloat16 and float16 are computed in float32, and each result is rounded once; torch's loops round each operation.
        - States keep their dtype through a checkpoint; torch casts them to the parameter's.

    Source: Liu et al. 2020, "On the variance of the adaptive learning rate and beyond", Algorithm 2.
    """

    _torch_class = torch.optim.RAdam
    _own_options = (("fused", None),)
    _sparse_message = "RAdam does not support sparse gradients"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            decoupled_weight_decay,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
        )
        self._set_options(options, fused=fused)

    def _update(self, group: dict[str, Any], decays: bool) -> Update:
        return decay_of(rules.radam, decays, group["decoupled_weight_decay"])
