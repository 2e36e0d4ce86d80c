"""The ways that a step of ours can take, and what a loss scaler does to each."""

from __future__ import annotations

import contextlib

import pytest
import torch

from cases import CASES, named
from fusedopt.kernels import backends
from snapshot import same_bits

SHAPES = [(33,), (3, 5), (), (0,), (130,)]
# A few rows, with states of each kind; all of them would repeat the same code.
SOME = ["sgd", "sgd-dampening", "momentum", "adam-amsgrad-l2", "adamw"]


class Path:
    """One way that a step of ours can take: a forced backend, or options of the constructor."""

    def __init__(self, name, backend=None, **options):
        self.name, self.backend, self.options = name, backend, options

    def __str__(self):
        return self.name

    def using(self):
        return backends.use(self.backend) if self.backend else contextlib.nullcontext()

    def make(self, case, params):
        return case.make_ours(params, **self.options)

    def exists_for(self, case):
        """Whether the class has the options of this path, and torch's foreach takes what they are combined with."""
        if not self.options.get("foreach"):
            return True
        return case.truth.__module__.startswith("torch.optim") and not isinstance(case.kwargs["lr"], torch.Tensor)


PATHS = [
    Path("default"),
    Path("numpy", "numpy"),
    Path("tensor", "tensor"),
    Path("fused=False", fused=False),
    Path("foreach=True", foreach=True),
    Path("triton", "triton"),
]


def on_every_path(names=None):
    """Parametrize by the rows of these names, or all, with every path that they have."""
    rows = CASES if names is None else [named(name) for name in names]
    return pytest.mark.parametrize(
        ("case", "path"),
        [
            pytest.param(case, path, id=f"{case}-{path}", marks=[pytest.mark.triton] if path.backend == "triton" else [])
            for case in rows
            for path in PATHS
            if path.exists_for(case)
        ],
    )


@contextlib.contextmanager
def scaling(optimizer, found_inf, grad_scale=None, device="cpu"):
    """Set what GradScaler.step sets on an optimizer that scales by itself, and take it away again."""
    optimizer.grad_scale = None if grad_scale is None else torch.tensor(grad_scale, device=device)
    optimizer.found_inf = torch.tensor(found_inf, device=device)
    try:
        yield
    finally:
        del optimizer.grad_scale, optimizer.found_inf


def scale_gradients(params, scale):
    for p in params:
        p.grad.mul_(scale)


def assert_same(ours, expected):
    """Assert equal bits of parameters and states."""
    for group, other_group in zip(ours.param_groups, expected.param_groups, strict=True):
        for p, q in zip(group["params"], other_group["params"], strict=True):
            assert same_bits(p, q)
            for key in ours.state.get(p, {}) | expected.state.get(q, {}):
                assert same_bits(ours.state[p][key], expected.state[q][key]), key


def assert_as_new(optimizer):
    """Assert that no parameter has counted a step, nor has a state other than zeros."""
    for state in optimizer.state.values():
        for key, value in state.items():
            assert torch.count_nonzero(value) == 0, key
