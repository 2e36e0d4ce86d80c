"""One row for each optimizer class of ours, a small model to train, and the optimizer of torch that must train it alike."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch

import fusedopt
import reference

# Options with which a class keeps all the states that it can keep, and a small model learns.
OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01},
    "Momentum": {"lr": 0.1, "beta": 0.9, "weight_decay": 0.01},
    "Adam": {"lr": 0.01, "amsgrad": True, "weight_decay": 0.01},
    "AdamW": {"lr": 0.01, "weight_decay": 0.1},
    "RMSprop": {"lr": 0.01, "momentum": 0.5, "centered": True, "weight_decay": 0.01},
    "Adagrad": {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.01},
    "Adadelta": {"lr": 1.0, "weight_decay": 0.01},
    "Adamax": {"lr": 0.01, "weight_decay": 0.01},
    "NAdam": {"lr": 0.01, "weight_decay": 0.01},
    "RAdam": {"lr": 0.01, "weight_decay": 0.01},
    "ASGD": {"lr": 0.1, "t0": 2.0, "weight_decay": 0.01},
    "Rprop": {"lr": 0.01},
    "Lion": {"lr": 0.01, "weight_decay": 0.1},
    "Adafactor": {"lr": 0.1, "weight_decay": 0.01},
}

# Those that are no longer torch's own under another name.
NAMES = [name for name in OPTIONS if getattr(fusedopt, name) is not getattr(torch.optim, name, None)]

# All, and for what costs more than a tenth of a second each: those that differ most in what they keep.
each_name = pytest.mark.parametrize("name", NAMES)
some_names = pytest.mark.parametrize("name", [name for name in ("SGD", "Momentum", "AdamW", "NAdam") if name in NAMES])

# In float64 two correct implementations part by roundings alone: 1e-16 each, over some dozen steps whose gradients follow
# from the weights before. Only NAdam's product of momenta is float32 in torch, whatever the parameters are: each step is off
# by 2**-24 of itself, which with rates up to 0.1 makes less than 1e-8 a step, and 1e-2 if a step is left out.
TOLERANCES = {name: {"rtol": 1e-10, "atol": 1e-11} for name in NAMES} | {"NAdam": {"rtol": 1e-7, "atol": 1e-8}}


def make_ours(name: str, params: Iterable, **overrides: Any) -> torch.optim.Optimizer:
    """Our optimizer of this name, with the options of its row."""
    return getattr(fusedopt, name)(params, **copy.deepcopy({**OPTIONS[name], **overrides}))


def make_truth(name: str, params: Iterable, **overrides: Any) -> torch.optim.Optimizer:
    """torch's for-loop of this name, or the plain implementation in reference.py."""
    return truth_class(name)(params, **copy.deepcopy({**truth_options(name), **overrides}))


def truth_class(name: str) -> type[torch.optim.Optimizer]:
    """What our class of this name must agree with."""
    return getattr(torch.optim, name, None) or getattr(reference, name)


def truth_options(name: str) -> dict[str, Any]:
    """The options of the row, and those that ask torch for its for-loop."""
    return {**OPTIONS[name], "foreach": False} if hasattr(torch.optim, name) else OPTIONS[name]


MAKERS = {"ours": make_ours, "truth": make_truth}


def make_model(dtype: torch.dtype = torch.float64) -> torch.nn.Sequential:
    """A model of 5 inputs and one output, always with the same weights; 7 and 1 divide into unequal halves."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(17)
        layers = torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 7), torch.nn.Tanh(), torch.nn.Linear(7, 1)
        return torch.nn.Sequential(*layers).to(dtype)


def make_batches(count: int, rows: int = 8, dtype: torch.dtype = torch.float64) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and targets to learn, always the same."""
    generator = torch.Generator().manual_seed(23)
    inputs = [torch.randn(rows, 5, dtype=torch.float64, generator=generator).to(dtype) for _ in range(count)]
    return [(x, x.sin().sum(1, keepdim=True)) for x in inputs]


def backward(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Set new gradients of the mean squared error on the batch, and return it."""
    model.zero_grad()
    loss = torch.nn.functional.mse_loss(model(batch[0]), batch[1])
    loss.backward()
    return loss.detach()


def assert_same_weights(name: str, model: torch.nn.Module, expected: torch.nn.Module, **tolerance: float) -> None:
    """Assert that two models were trained alike, and that they were trained: their weights are not the first ones."""
    untrained = make_model()
    found, right, first = (list(each.parameters()) for each in (model, expected, untrained))
    for index, (p, q) in enumerate(zip(found, right, strict=True)):
        torch.testing.assert_close(p, q, **(tolerance or TOLERANCES[name]), msg=lambda text, i=index: f"parameter {i}: {text}")
    if [p.shape for p in found] == [p.shape for p in first]:
        assert any(not torch.equal(p, q.to(p.dtype)) for p, q in zip(found, first, strict=True)), "nothing was trained"
