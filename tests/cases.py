"""The table of cases: one row for each optimizer and variant. Every general test runs over all of it.

A new optimizer is one new row: our class, the class it must agree with, and its arguments.
"""

import copy
import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import fusedopt
import reference

# Numbers that a parameter keeps: 0-dim float32 tensors in its state, whatever its own shape and type.
SCALARS = ("step", "mu_product", "eta", "mu")


@dataclass(frozen=True)
class Case:
    """One optimizer with one choice of options, and what it is measured against."""

    name: str
    ours: type[torch.optim.Optimizer]
    truth: type[torch.optim.Optimizer]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    @property
    def argument_names(self) -> Iterable[str]:
        """The names of the arguments that our class takes."""
        return inspect.signature(self.ours).parameters.keys()

    def make_ours(self, params: Iterable, **overrides: Any) -> torch.optim.Optimizer:
        """Our optimizer; its arguments are copied, so that a tensor `lr` is nobody else's."""
        return self.ours(params, **copy.deepcopy({**self.kwargs, **overrides}))

    def make_truth(self, params: Iterable, **overrides: Any) -> torch.optim.Optimizer:
        """What ours must agree with: torch's for-loop, or the plain implementation in reference.py."""
        for_loop = {name: False for name in ("foreach", "fused") if name in inspect.signature(self.truth).parameters}
        return self.truth(params, **copy.deepcopy({**self.kwargs, **for_loop, **overrides}))


def tensor_lr(value: float) -> torch.Tensor:
    # torch computes lr / bias_correction in the dtype of a tensor lr: in float64 it costs no accuracy.
    return torch.tensor(value, dtype=torch.float64)


SGD = fusedopt.SGD, torch.optim.SGD
DECOUPLED_SGD = fusedopt.SGD, reference.DecoupledSGD
MOMENTUM = fusedopt.Momentum, reference.Momentum
ADAM = fusedopt.Adam, torch.optim.Adam
ADAMW = fusedopt.AdamW, torch.optim.AdamW
RMSPROP = fusedopt.RMSprop, torch.optim.RMSprop
ADAGRAD = fusedopt.Adagrad, torch.optim.Adagrad
ADADELTA = fusedopt.Adadelta, torch.optim.Adadelta
ADAMAX = fusedopt.Adamax, torch.optim.Adamax
NADAM = fusedopt.NAdam, torch.optim.NAdam
RADAM = fusedopt.RAdam, torch.optim.RAdam
ASGD = fusedopt.ASGD, torch.optim.ASGD
LION = fusedopt.Lion, reference.Lion
RPROP = fusedopt.Rprop, torch.optim.Rprop

CASES = [
    Case("sgd", *SGD, {"lr": 0.1}),
    Case("sgd-l2", *SGD, {"lr": 0.1, "weight_decay": 0.01}),
    Case("sgd-maximize", *SGD, {"lr": 0.1, "weight_decay": 0.01, "maximize": True}),
    Case("sgd-tensor-lr", *SGD, {"lr": tensor_lr(0.1)}),
    Case("sgd-decoupled", *DECOUPLED_SGD, {"lr": 0.1, "weight_decay": 0.01, "decoupled_weight_decay": True}),
    Case("sgd-momentum", *SGD, {"lr": 0.1, "momentum": 0.9}),
    Case("sgd-momentum-l2", *SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    Case("sgd-momentum-maximize", *SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "maximize": True}),
    Case("sgd-momentum-tensor-lr", *SGD, {"lr": tensor_lr(0.1), "momentum": 0.9}),
    Case(
        "sgd-momentum-decoupled",
        *DECOUPLED_SGD,
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01, "decoupled_weight_decay": True},
    ),
    Case("sgd-dampening", *SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    Case("sgd-nesterov", *SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    Case("sgd-nesterov-l2", *SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    Case(
        "sgd-nesterov-decoupled",
        *DECOUPLED_SGD,
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "decoupled_weight_decay": True},
    ),
    Case("momentum", *MOMENTUM, {"lr": 0.1, "beta": 0.9}),
    Case("momentum-decoupled", *MOMENTUM, {"lr": 0.1, "beta": 0.9, "weight_decay": 0.01}),
    Case("momentum-l2", *MOMENTUM, {"lr": 0.1, "beta": 0.9, "weight_decay": 0.01, "decoupled_weight_decay": False}),
    Case("momentum-maximize", *MOMENTUM, {"lr": 0.1, "beta": 0.9, "weight_decay": 0.01, "maximize": True}),
    Case("adam", *ADAM, {"lr": 0.01}),
    Case("adam-l2", *ADAM, {"lr": 0.01, "weight_decay": 0.01}),
    Case("adam-amsgrad", *ADAM, {"lr": 0.01, "amsgrad": True}),
    Case("adam-amsgrad-l2", *ADAM, {"lr": 0.01, "amsgrad": True, "weight_decay": 0.01}),
    Case("adam-maximize", *ADAM, {"lr": 0.01, "weight_decay": 0.01, "maximize": True}),
    Case("adam-tensor-lr", *ADAM, {"lr": tensor_lr(0.01)}),
    Case("adamw", *ADAMW, {"lr": 0.01, "weight_decay": 0.1}),
    Case("adamw-amsgrad", *ADAMW, {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True}),
    Case("adamw-maximize", *ADAMW, {"lr": 0.01, "weight_decay": 0.1, "maximize": True}),
    Case("adamw-tensor-lr", *ADAMW, {"lr": tensor_lr(0.01), "weight_decay": 0.1}),
    Case("rmsprop", *RMSPROP, {"lr": 0.01}),
    Case("rmsprop-l2-maximize", *RMSPROP, {"lr": 0.01, "weight_decay": 0.01, "maximize": True}),
    Case("rmsprop-momentum", *RMSPROP, {"lr": 0.01, "momentum": 0.9, "alpha": 0.9}),
    Case("rmsprop-centered", *RMSPROP, {"lr": 0.01, "centered": True}),
    Case("rmsprop-centered-momentum-l2", *RMSPROP, {"lr": 0.01, "centered": True, "momentum": 0.9, "weight_decay": 0.01}),
    Case("adagrad", *ADAGRAD, {"lr": 0.1}),
    Case("adagrad-l2", *ADAGRAD, {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.3, "weight_decay": 0.01}),
    Case("adagrad-tensor-lr", *ADAGRAD, {"lr": tensor_lr(0.1), "maximize": True}),
    Case("adadelta", *ADADELTA, {"lr": 1.0}),
    Case("adadelta-l2-maximize", *ADADELTA, {"lr": 0.5, "rho": 0.8, "weight_decay": 0.01, "maximize": True}),
    Case("adamax", *ADAMAX, {"lr": 0.01}),
    Case("adamax-l2-maximize", *ADAMAX, {"lr": 0.01, "weight_decay": 0.01, "maximize": True}),
    Case("nadam", *NADAM, {"lr": 0.01}),
    Case("nadam-l2-maximize", *NADAM, {"lr": 0.01, "weight_decay": 0.01, "momentum_decay": 0.02, "maximize": True}),
    Case("nadam-decoupled", *NADAM, {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    Case("radam", *RADAM, {"lr": 0.01}),
    Case("radam-rectified", *RADAM, {"lr": 0.01, "betas": (0.8, 0.9), "weight_decay": 0.01}),
    Case("radam-decoupled", *RADAM, {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True}),
    Case("asgd", *ASGD, {"lr": 0.01}),
    Case("asgd-averaging-l2", *ASGD, {"lr": 0.1, "lambd": 0.01, "alpha": 0.6, "t0": 1, "weight_decay": 0.01}),
    Case("lion", *LION, {"lr": 0.01}),
    Case("lion-decoupled-maximize", *LION, {"lr": 0.01, "betas": (0.8, 0.9), "weight_decay": 0.1, "maximize": True}),
    Case("rprop", *RPROP, {"lr": 0.01}),
    Case("rprop-bounds-maximize", *RPROP, {"lr": 0.01, "etas": (0.6, 1.3), "step_sizes": (0.005, 0.02), "maximize": True}),
]

# Hyperparameters that may be drawn at random, or changed between two steps, with their range.
RANGES = {
    "lr": (1e-4, 0.5),
    "momentum": (0.05, 0.99),
    "dampening": (0.0, 0.9),
    "beta": (0.0, 0.99),
    "weight_decay": (0.0, 0.5),
    "eps": (1e-10, 1e-2),
}

each_case = pytest.mark.parametrize("case", CASES, ids=str)

#: The last row of each class, which is not its plainest: for what no rule has a say in, as compiling takes a second a row.
ONE_OF_EACH = list({case.ours: case for case in CASES}.values())
each_class = pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)


def named(name: str) -> Case:
    """The row of this name."""
    return next(case for case in CASES if case.name == name)


def device_of(backend: str) -> str:
    """Where a backend is tried: Triton's kernels on the GPU, or in the interpreter on CPU tensors."""
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def make_parameters(shapes: Sequence[int | tuple[int, ...]], dtype: torch.dtype = torch.float32, device: str = "cpu") -> list:
    """Standard normal parameters of these shapes, from torch's seeded generator."""
    return [torch.nn.Parameter(torch.randn(shape, dtype=torch.float64).to(device, dtype)) for shape in shapes]


def copies(params: Iterable[torch.Tensor], dtype: torch.dtype | None = None) -> list:
    """Contiguous parameters of equal values that share no memory with `params`."""
    return [torch.nn.Parameter(p.detach().to(dtype or p.dtype, copy=True, memory_format=torch.contiguous_format)) for p in params]


def draw_gradients(*parameter_lists: Sequence[torch.Tensor]) -> None:
    """Give the k-th parameter of every list the same standard normal gradient (in its own dtype)."""
    for params in zip(*parameter_lists, strict=True):
        values = torch.randn(params[0].shape, dtype=torch.float64).to(params[0].dtype)
        for p in params:
            p.grad = values.to(p, copy=True)
