"""The weight averages that ``ema_decay`` keeps: for evaluation, and from and to torch's AveragedModel."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from fusedopt.kernels.formats import average_dtype

_NAME = "ema"


def _averages(optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, Tensor]]:
    """Return each parameter that has an average, and the average."""
    groups = [group for group in optimizer.param_groups if group.get("ema_decay") is not None]
    parameters = [parameter for group in groups for parameter in group["params"]]
    states = [optimizer.state.get(parameter) or {} for parameter in parameters]
    return [(parameter, state[_NAME]) for parameter, state in zip(parameters, states, strict=True) if _NAME in state]


def _copies(model: torch.nn.Module, averaged: AveragedModel) -> dict[Tensor, Tensor]:
    """Return the parameter in ``averaged`` that belongs to each of ``model``."""
    copies = dict(averaged.module.named_parameters())
    missing = [name for name, own in model.named_parameters() if name not in copies or copies[name].shape != own.shape]
    if missing:
        raise ValueError(f"the averaged model has no parameter {missing[0]!r} of the same shape: make it of the same model")
    return {parameter: copies[name] for name, parameter in model.named_parameters()}


class Averaging(torch.optim.Optimizer):
    """The part of an optimizer that hands out the averages of its weights."""

    _swapped: bool = False

    def _parameters_are_back(self) -> None:
        """Take no notice of the writes that :meth:`swap_ema` has done."""

    @contextlib.contextmanager
    def swap_ema(self) -> Iterator[None]:
        """Have the parameters hold their averages for the time of a ``with`` block, to evaluate or save them.

        Raises:
            RuntimeError: if there are none, as ``ema_decay`` was not given or no step has been taken.

        Example:
            >>> with optimizer.swap_ema():
            ...     validate(model)
        """
        if self._swapped:
            raise RuntimeError("the parameters hold their averages already: end one swap_ema() before the next")
        pairs = _averages(self)
        if not pairs:
            raise RuntimeError(
                f"no parameter of this {type(self).__name__} has an average: construct it with ema_decay, and take a step first"
            )
        with torch.no_grad():
            kept = [parameter.detach().clone() for parameter, _ in pairs]
            for parameter, average in pairs:
                parameter.copy_(average)
        self._swapped = True
        try:
            yield
        finally:
            self._swapped = False
            with torch.no_grad():
                for (parameter, _), own in zip(pairs, kept, strict=True):
                    parameter.copy_(own)
            self._parameters_are_back()

    @torch.no_grad()
    def store_ema(self, model: torch.nn.Module, averaged: AveragedModel) -> None:
        """Write the averages into ``averaged``, a ``torch.optim.swa_utils.AveragedModel`` of ``model``.

        Raises:
            ValueError: if it is of another model.
        """
        copies = _copies(model, averaged)
        for parameter, average in _averages(self):
            if parameter in copies:
                copies[parameter].copy_(average)
        # What it counts tells it only whether it has averaged anything yet.
        averaged.n_averaged.fill_(max(1, int(averaged.n_averaged)))

    @torch.no_grad()
    def load_ema(self, model: torch.nn.Module, averaged: AveragedModel) -> None:
        """Go on from the averages in ``averaged``, a ``torch.optim.swa_utils.AveragedModel`` of ``model``.

        Load the state of the optimizer first: at a parameter's first step the average starts anew.

        Raises:
            ValueError: if it is of another model.
        """
        copies = _copies(model, averaged)
        for group in self.param_groups:
            for parameter in group["params"]:
                if group.get("ema_decay") is not None and parameter in copies:
                    state = self.state[parameter]
                    if _NAME not in state:
                        state[_NAME] = torch.empty_like(parameter, dtype=average_dtype(parameter.dtype), requires_grad=False)
                    state[_NAME].copy_(copies[parameter])
