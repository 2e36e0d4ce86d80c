"""Stopping before a network learns its training data by heart."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class EarlyStopping:
    """Say when a measure on held-out data no longer improves, and put back the weights that it was best with.

    After each check by :meth:`step`, the model's ``state_dict`` (parameters and buffers) is copied if the value is the best so far.
    Once ``patience`` checks in a row have brought nothing better, ``step`` writes the best weights back in place and returns True.
    The optimizer's states are left as they are. A value that is not a number is no improvement. Ranks of a distributed training
    have to hand in the same value, or they stop at different times.

    Args:
        model: whose weights are kept and put back.
        patience: number of checks in a row without improvement that end the training, >= 1 (default: 10).
        least_improvement: by how much a value has to be better than the best, to count as such, >= 0 (default: 0.0).
        maximize: larger values are better, as of an accuracy; False takes smaller ones, as of a loss (default: False).

    Raises:
        ValueError: for an argument out of range.

    Example:
        >>> stopping = fusedopt.EarlyStopping(model, patience=5)
        >>> for epoch in range(1000):
        ...     train_epoch(model, optimizer)
        ...     if stopping.step(validation_loss(model)):
        ...         break
        >>> stopping.restore()  # for a loop that came to its end without stopping

    Source: Prechelt 1998, "Early stopping - but when?", section 2, the criterion UP.
    """

    def __init__(self, model: nn.Module, patience: int = 10, least_improvement: float = 0.0, *, maximize: bool = False) -> None:
        if patience < 1:
            raise ValueError(f"Invalid patience: {patience}; it must be at least 1, the number of checks without improvement")
        if not 0.0 <= least_improvement < math.inf:
            raise ValueError(f"Invalid least_improvement: {least_improvement}; it must be a finite number, at least 0")
        self.model = model
        self.patience = patience
        self.least_improvement = least_improvement
        self.maximize = maximize
        self.checks = 0
        """How many values have been handed in."""
        self.best: float | None = None
        """The best value so far, None before there is one."""
        self.best_check = 0
        """At which check it was, from 1 on; 0 before there is one."""
        self._best_weights: dict[str, Any] = {}

    @property
    def stopped(self) -> bool:
        """Whether the last ``patience`` checks brought no improvement."""
        return self.checks - self.best_check >= self.patience

    def step(self, value: float | Tensor) -> bool:
        """Take the measure of the model as it is now; return True, with the best weights put back, when it is time to stop.

        Args:
            value: a number or a tensor of one element.
        """
        value = float(value.detach() if isinstance(value, Tensor) else value)
        self.checks += 1
        if self._improves(value):
            self.best, self.best_check = value, self.checks
            self._keep_weights()
        if self.stopped and self.best is not None:
            self.restore()
        return self.stopped

    def restore(self) -> None:
        """Write the best weights into the model, in place.

        Raises:
            RuntimeError: if no value that is a number has been handed in.
        """
        if self.best is None:
            raise RuntimeError(
                f"restore: no weights are kept, for none of {self.checks} values was a number; check what step() is given"
            )
        # Tensors are copied into the model's own; extra state is handed over, and would then be the model's to change.
        kept = self._best_weights.items()
        self.model.load_state_dict({name: value if isinstance(value, Tensor) else copy.deepcopy(value) for name, value in kept})

    def state_dict(self) -> dict[str, Any]:
        """Return all that a checkpoint needs to go on from here; the best weights in it are not copies."""
        return {"checks": self.checks, "best": self.best, "best_check": self.best_check, "best_weights": self._best_weights}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned.

        Args:
            state_dict: its result; patience and the other arguments stay those of this object.
        """
        self.checks, self.best, self.best_check = (state_dict[name] for name in ("checks", "best", "best_check"))
        self._best_weights = copy.deepcopy(state_dict["best_weights"])

    def _improves(self, value: float) -> bool:
        # Comparisons with NaN are false, so NaN is no improvement, not even on nothing.
        if self.best is None:
            return not math.isnan(value)
        gain = value - self.best if self.maximize else self.best - value
        return gain > self.least_improvement

    @torch.no_grad()
    def _keep_weights(self) -> None:
        # Copies of their own: a state_dict holds the very memory that training goes on writing to.
        self._best_weights = {
            name: value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)
            for name, value in self.model.state_dict().items()
        }
