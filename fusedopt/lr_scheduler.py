"""torch.optim.lr_scheduler, and the schedule of Robbins and Monro."""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import *  # noqa: F403
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.lr_scheduler import __all__ as _torch_names

__all__ = [*_torch_names, "RobbinsMonroLR"]


class RobbinsMonroLR(LRScheduler):
    r"""Steps that are long enough to arrive anywhere and short enough to average the noise away.

    .. math:: \alpha_t = \alpha_0 \frac{b}{b + t}

    With a = alpha_0 b that is a / (b + t): the sum of all steps is infinite, the sum of their squares is not.

    Args:
        optimizer: whose groups' ``lr`` is written at each ``step()``, from their ``initial_lr`` (alpha_0).
        b: number of steps after which the rate has halved, > 0.
        last_epoch: t to go on from; -1 starts anew (default: -1).

    Raises:
        ValueError: if ``b`` is not positive.

    Source: Robbins and Monro 1951, "A stochastic approximation method", equations (6) and (26).
    """

    def __init__(self, optimizer: Optimizer, b: float, last_epoch: int = -1) -> None:
        if not b > 0:
            raise ValueError(f"Invalid b: {b}; it must be positive, the number of steps that halve the learning rate")
        self.b = b
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """Return the learning rate of each group at ``last_epoch``."""
        return [base * self.b / (self.b + self.last_epoch) for base in self.base_lrs]
