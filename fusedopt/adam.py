"""Adam and AdamW, as torch.optim has them."""

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


class _AdamKernels(FusedOptimizer):
    _sparse_message = "Adam does not support sparse gradients, please consider SparseAdam instead"

    def _update(self, group: dict[str, Any], decays: bool) -> Update:
        rule = rules.amsgrad if group["amsgrad"] else rules.adam
        return decay_of(rule, decays, group["decoupled_weight_decay"])


class Adam(_AdamKernels, torch.optim.Adam):
    r"""Adam, fused; in place of torch.optim.Adam.

    .. math::
        g \leftarrow g + \lambda \theta, \quad
        m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
        \theta \leftarrow \theta - \alpha \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    Parameters, ``exp_avg`` (m), ``exp_avg_sq`` (v), ``max_exp_avg_sq`` (AMSGrad) and ``step`` (t, of the parameter's own)
    are written in place, of any floating point or complex dtype and any shape and layout.

    Args:
        params: parameters, named parameters, or dicts of parameter groups.
        lr: alpha, >= 0; a number or a tensor of one element (default: 1e-3).
        betas: beta_1 and beta_2, in [0, 1) (default: (0.9, 0.999)).
        eps: epsilon, >= 0, added to the root (default: 1e-8).
        weight_decay: lambda, >= 0 (default: 0).
        amsgrad: divide by the root of the largest v so far (default: False).
        foreach: True asks for torch's own implementation by lists (default: None).
        maximize: climb instead of descending (default: False).
        capturable: keep step counts on the GPU, so that a CUDA graph can capture a step (default: False).
        differentiable: True asks for torch's own, through which autograd can pass (default: False).
        fused: None takes a kernel where one serves, True insists on it, False asks for torch's own (default: None).
        decoupled_weight_decay: theta (1 - alpha lambda) in place of the sum with the gradient, as AdamW (default: False).
        **options: what else happens in the pass of a step, :class:`~fusedopt.options.StepOptions`; nothing unless asked for.

    Raises:
        ValueError: for a hyperparameter out of range, with torch's message.
        RuntimeError: if options exclude each other.

    Differences from torch:
        - None in the arguments but ``**options``, which torch lacks.
        - bfloat16 and float16 are computed in float32, and each result is rounded once; torch's loops round each operation.
        - States keep their dtype through a checkpoint; torch casts them to the parameter's.

    Source: Kingma and Ba 2015, "Adam: a method for stochastic optimization", Algorithm 1; Reddi et al. 2018, "On the
    convergence of Adam and beyond", Algorithm 2.
    """

    _torch_class = torch.optim.Adam

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **options: Unpack[StepOptions],
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        self._set_options(options)


class AdamW(_AdamKernels, torch.optim.AdamW):
    r"""Adam with decoupled weight decay, fused; in place of torch.optim.AdamW.

    .. math::
        \theta \leftarrow \theta - \alpha \lambda \theta, \quad
        m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
        \theta \leftarrow \theta - \alpha \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    Parameters and states as in :class:`Adam`.

    Args:
        params: parameters, named parameters, or dicts of parameter groups.
        lr: alpha, >= 0; a number or a tensor of one element (default: 1e-3).
        betas: beta_1 and beta_2, in [0, 1) (default: (0.9, 0.999)).
        eps: epsilon, >= 0, added to the root (default: 1e-8).
        weight_decay: lambda, >= 0 (default: 1e-2).
        amsgrad: divide by the root of the largest v so far (default: False).
        maximize: climb instead of descending (default: False).
        foreach: True asks for torch's own implementation by lists (default: None).
        capturable: keep step counts on the GPU, so that a CUDA graph can capture a step (default: False).
        differentiable: True asks for torch's own, through which autograd can pass (default: False).
        fused: None takes a kernel where one serves, True insists on it, False asks for torch's own (default: None).
        **options: what else happens in the pass of a step, :class:`~fusedopt.options.StepOptions`; nothing unless asked for.

    Raises:
        ValueError: for a hyperparameter out of range, with torch's message.
        RuntimeError: if options exclude each other.

    Differences from torch:
        - None in the arguments but ``**options``, which torch lacks.
        - bfloat16 and float16 are computed in float32, and each result is rounded once; torch's loops round each operation.
        - States keep their dtype through a checkpoint; torch casts them to the parameter's.

    Source: Loshchilov and Hutter 2019, "Decoupled weight decay regularization", Algorithm 2.
    """

    _torch_class = torch.optim.AdamW

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
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
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        self._set_options(options)
