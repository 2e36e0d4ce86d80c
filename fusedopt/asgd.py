"""Averaged stochastic gradient descent, as torch.optim has it."""

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


class ASGD(FusedOptimizer, torch.optim.ASGD):
    r"""Averaged stochastic gradient descent, fused; in place of torch.optim.ASGD.

    .. math::
        g \leftarrow g + \lambda \theta, \quad
        \theta \leftarrow \theta - \eta_t \kappa \theta - \eta_t g, \quad
        a \leftarrow a + \mu_t (\theta - a), \quad
        \eta_{t+1} = \frac{\alpha}{(1 + \kappa \alpha t)^\gamma}, \quad
        \mu_{t+1} = \frac{1}{\max(1, t - t_0)}

    with ``eta_1 = alpha`` and ``mu_1 = 1``. The average (a) stands in ``state[p]["ax"]``. Parameters, ``step`` (t, of the
    parameter's own), ``eta``, ``mu`` and ``ax`` are written in place, of any floating point or complex dtype and any shape
    and layout.

    Args:
        params: parameters, named parameters, or dicts of parameter groups.
        lr: alpha, >= 0; a number or a tensor of one element (default: 1e-2).
        lambd: kappa, a decay of the parameter (default: 1e-4).
        alpha: gamma, the power by which steps shrink (default: 0.75).
        t0: step from which on to average (default: 1e6).
        weight_decay: lambda, >= 0 (default: 0).
        foreach: True asks for torch's own implementation by lists (default: None).
        maximize: climb instead of descending (default: False).
        differentiable: True asks for torch's own, through which autograd can pass (default: False).
        capturable: keep step counts on the GPU, so that a CUDA graph can capture a step (default: False).
        fused: None takes a kernel where one serves, True insists on it, False asks for torch's own (default: None).
        **options: what else happens in the pass of a step, :class:`~fusedopt.options.StepOptions`; nothing unless asked for.

    Raises:
        ValueError: for a hyperparameter out of range, with torch's message.
        RuntimeError: if options exclude each other.

    Differences from torch:
        - ``fused`` is added: torch 2.13 has no fused ASGD.
        - bfloat16 and float16 are computed in float32, and each result is rounded once; torch's loops round each operation.
        - States, ``eta`` and ``mu`` keep their dtype through a checkpoint; torch casts them to the parameter's.

    Source: Polyak and Juditsky 1992, "Acceleration of stochastic approximation by averaging".
    """

    _torch_class = torch.optim.ASGD
    _own_options = (("fused", None),)
    _sparse_message = "ASGD does not support sparse gradients"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lambd: float = 1e-4,
        alpha: float = 0.75,
        t0: float = 1e6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        *,
        fused: bool | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
        super().__init__(
            params,
            lr,
            lambd,
            alpha,
            t0,
            weight_decay,
            foreach,
            maximize,
            differentiable,
            capturable,
        )
        self._set_options(options, fused=fused)

    def _initial(self, group: dict[str, Any], name: str) -> Any:
        return {"eta": group["lr"], "mu": 1.0}.get(name, 0.0)

    def _update(self, group: dict[str, Any], decays: bool) -> Update:  # noqa: ARG002  # of any group
        return decay_of(rules.averaged_descent, decays, decoupled=False)
