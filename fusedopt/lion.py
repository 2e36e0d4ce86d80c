"""Lion, which torch.optim does not have."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from fusedopt.custom import RuleOptimizer
from fusedopt.kernels import rules
from fusedopt.options import StepOptions


class Lion(RuleOptimizer):
    r"""Steps of one length along the sign of an average of gradients, fused.

    .. math::
        \theta \leftarrow \theta - \alpha \lambda \theta, \quad
        \theta \leftarrow \theta - \alpha \operatorname{sign}(\beta_1 m + (1 - \beta_1) g), \quad
        m \leftarrow \beta_2 m + (1 - \beta_2) g, \quad m_0 = 0

    Every element moves by ``lr``: the authors advise a learning rate 3 to 10 times smaller than Adam's, and a weight decay as
    many times larger. Parameters and ``exp_avg`` (m) are written in place, of any floating point or complex dtype and any
    shape and layout.

    Args:
        params: parameters, named parameters, or dicts of parameter groups.
        lr: alpha, >= 0; a number or a tensor of one element (default: 1e-4).
        betas: beta_1 and beta_2, in [0, 1) (default: (0.9, 0.99)).
        weight_decay: lambda, >= 0 (default: 0).
        decoupled_weight_decay: decay as above; False adds lambda theta to g instead (default: True).
        maximize: climb instead of descending (default: False).
        fused: None takes a kernel where one serves, True insists on it, False has operations of torch run the rule
            (default: None).
        **options: what else happens in the pass of a step, :class:`~fusedopt.options.StepOptions`; nothing unless asked for.

    Raises:
        ValueError: for a hyperparameter out of range.

    Differences from torch:
        - It is not in torch.

    Source: Chen et al. 2023, "Symbolic discovery of optimization algorithms", Algorithm 2.
    """

    rule = rules.lion
    hyperparameters: ClassVar[dict[str, Any]] = {"lr": 1e-4, "betas": (0.9, 0.99)}
    _counts_steps = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0,
        *,
        decoupled_weight_decay: bool = True,
        maximize: bool = False,
        fused: bool | None = None,
        **options: Unpack[StepOptions],
    ) -> None:
        super().__init__(
            params,
            lr,
            betas=betas,
            weight_decay=weight_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            maximize=maximize,
            fused=fused,
            **options,
        )
        for index, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
