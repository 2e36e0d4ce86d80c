"""Rprop, as torch.optim has it."""

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


class Rprop(FusedOptimizer, torch.optim.Rprop):
    r"""Resilient backpropagation, fused; in place of torch.optim.Rprop.

    .. math::
        s \leftarrow \operatorname{clamp}(s \cdot (\eta_+ \text{ if } g g' > 0, \; \eta_- \text{ if } g g' < 0),
            s_{min}, s_{max}), \quad
        g \leftarrow 0 \text{ if } g g' < 0, \quad
        \theta \leftarrow \theta - s \operatorname{sign}(g), \quad
        g' \leftarrow g

    Parameters, ``step``, ``prev`` (g') and ``step_size`` (s, alpha at first) are written in place, of any floating point or complex
    dtype and any shape and layout.

    Args:
        params: parameters, named parameters, or dicts of parameter groups.
        lr: alpha, >= 0, the step size at first; a number or a tensor of one element (default: 1e-2).
        etas: ``eta_-`` and ``eta_+``, ``0 < eta_- < 1 < eta_+`` (default: (0.5, 1.2)).
        step_sizes: s_min and s_max (default: (1e-6, 50)).
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
        - ``fused`` is added: torch 2.13 has no fused Rprop.
        - bfloat16 and float16 are computed in float32, and each result is rounded once; torch's loops round each operation.
        - States keep their dtype through a checkpoint; torch casts them to the parameter's.

    Source: Riedmiller and Braun 1993, "A direct adaptive method for faster backpropagation learning: the RPROP algorithm"; in the
    form iRprop- of Igel and Huesken 2000.
    """

    _torch_class = torch.optim.Rprop
    _own_options = (("fused", None),)
    _sparse_message = "Rprop does not support sparse gradients"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-6, 50),
        *,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
        super().__init__(
            params,
            lr,
            etas,
            step_sizes,
            capturable=capturable,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
        )
        self._set_options(options, fused=fused)

    def _initial(self, group: dict[str, Any], name: str) -> Any:
        return float(group["lr"]) if name == "step_size" else 0.0

    def _hyperparameter(self, group: dict[str, Any], name: str) -> Any:
        options = {
            "etaminus": ("etas", 0),
            "etaplus": ("etas", 1),
            "step_size_min": ("step_sizes", 0),
            "step_size_max": ("step_sizes", 1),
        }
        if name not in options:
            return super()._hyperparameter(group, name)
        option, place = options[name]
        return group[option][place]

    def _update(self, group: dict[str, Any], decays: bool) -> Update:  # noqa: ARG002  # it has no weight decay
        return decay_of(rules.rprop, False, decoupled=False)
