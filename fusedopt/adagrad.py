"""Adagrad, as torch.optim has it."""

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


class Adagrad(FusedOptimizer, torch.optim.Adagrad):
    r"""Adagrad, fused; in place of torch.optim.Adagrad.

    .. math::
        g \leftarrow g + \lambda \theta, \quad
        s \leftarrow s + g^2, \quad
        \theta \leftarrow \theta - \frac{\alpha}{1 + (t - 1) \eta} \frac{g}{\sqrt{s} + \epsilon}

    Parameters, ``sum`` (s) and ``step`` (t, of the parameter's own) are written in place, of any floating point or complex dtype
    and any shape and layout. States exist from the construction on.

    Args:
        params: parameters, named parameters, or dicts of parameter groups.
        lr: alpha, >= 0; a number or a tensor of one element (default: 1e-2).
        lr_decay: eta, >= 0 (default: 0).
        weight_decay: lambda, >= 0 (default: 0).
        initial_accumulator_value: what s starts from, >= 0 (default: 0).
        eps: epsilon, >= 0, added to the root (default: 1e-10).
        foreach: True asks for torch's own implementation by lists (default: None).
        maximize: climb instead of descending (default: False).
        differentiable: True asks for torch's own, through which autograd can pass (default: False).
        fused: None takes a kernel where one serves, True insists on it, False asks for torch's own (default: None).
        capturable: keep step counts on the GPU, so that a CUDA graph can capture a step (default: False).
        **options: what else happens in the pass of a step, :class:`~fusedopt.options.StepOptions`; nothing unless asked for.

    Raises:
        ValueError: for a hyperparameter out of range, with torch's message.
        RuntimeError: if options exclude each other.

    Differences from torch:
        - ``capturable`` is added.
        - bfloat16 and float16 are computed in float32, and each result is rounded once; torch's loops round each operation.
        - States keep their dtype through a checkpoint; torch casts them to the parameter's.

    Source: Duchi, Hazan and Singer 2011, "Adaptive subgradient methods for online learning and stochastic optimization",
    Figure 1.
    """

    _torch_class = torch.optim.Adagrad
    _own_options = (("capturable", False),)
    _sparse_message = None

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
        **options: Unpack[StepOptions],
    ) -> None:
        super().__init__(
            params,
            lr,
            lr_decay,
            weight_decay,
            initial_accumulator_value,
            eps,
            foreach,
            maximize=maximize,
            differentiable=differentiable,
            fused=fused,
        )
        self._set_options(options, capturable=capturable)

    def _initial(self, group: dict[str, Any], name: str) -> Any:  # noqa: ARG002  # there is one state
        return self.defaults["initial_accumulator_value"]  # and not the group's, as torch has it

    def _update(self, group: dict[str, Any], decays: bool) -> Update:  # noqa: ARG002  # of any group
        return decay_of(rules.adagrad, decays, decoupled=False)
