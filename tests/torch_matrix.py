"""torch's own table of optimizers and their inputs, our classes in the place of torch's.

The table comes with torch (torch.testing._internal.common_optimizers.optim_db). A class is taken in as soon as fusedopt has
one of its own under the name of torch's.
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import hypothesis
import pytest
import torch

import fusedopt


def _imported_alone():
    """Import torch's table, and undo what importing it does to everybody else in the process."""
    environment, profile = dict(os.environ), hypothesis.settings.get_current_profile_name()
    try:
        with mock.patch.object(torch.backends, "disable_global_flags"):
            from torch.testing._internal import common_optimizers
    finally:
        hypothesis.settings.load_profile(profile)
        os.environ.clear()
        os.environ.update(environment)
    return common_optimizers


pytest.importorskip("expecttest", reason="torch's table of optimizers needs expecttest: pip install expecttest")
table = _imported_alone()

#: How a class can be asked for: by default, by torch's options for one implementation or the other, and ours.
IMPLEMENTATIONS = {
    "automatic": {},
    "fused": {"fused": True},
    "loop": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "differentiable": {"differentiable": True},
}
KERNELS, TORCHS = ("automatic", "fused"), ("loop", "foreach")


def _has_a_class_of_its_own(name: str) -> bool:
    return getattr(fusedopt, name, None) not in (None, getattr(torch.optim, name))


def _with_our_class(entry):
    entry = copy.copy(entry)
    entry.optim_cls = getattr(fusedopt, entry.name)
    return entry


ENTRIES = [_with_our_class(entry) for entry in table.optim_db if _has_a_class_of_its_own(entry.name)]


def accepted(cls: type, options: dict[str, Any]) -> dict[str, Any]:
    """Those of ``options`` that ``cls`` takes."""
    return {name: value for name, value in options.items() if name in inspect.signature(cls).parameters}


@dataclass(frozen=True)
class Configuration:
    """One input of one entry, asked for in one way."""

    entry: Any
    number: int
    description: str
    implementation: str

    def __str__(self) -> str:
        return f"{self.entry.name}-{self.description}-{self.implementation}"

    @property
    def theirs(self) -> type[torch.optim.Optimizer]:
        return getattr(torch.optim, self.entry.name)

    def kwargs(self, dtype: torch.dtype | None = None) -> dict[str, Any]:
        """The arguments of the input, made anew, because schedulers write to a tensor ``lr``."""
        return dict(self.entry.optim_inputs_func(device="cpu", dtype=dtype)[self.number].kwargs)

    def make_ours(self, params: Iterable, dtype: torch.dtype | None = None, **overrides: Any) -> torch.optim.Optimizer:
        """Ours, as it is asked for."""
        cls = self.entry.optim_cls
        options = accepted(cls, IMPLEMENTATIONS[self.implementation])
        return cls(params, **{**self.kwargs(dtype), **options, **overrides})

    def make_torchs(self, params: Iterable, dtype: torch.dtype | None = None, **overrides: Any) -> torch.optim.Optimizer:
        """torch's, asked for in the same way as far as torch knows the way; its for-loop where ours takes a kernel."""
        implementation = "loop" if self.implementation in KERNELS else self.implementation
        options = accepted(self.theirs, IMPLEMENTATIONS[implementation])
        return self.theirs(params, **{**self.kwargs(dtype), **options, **overrides})


def _configurations() -> Iterator[Configuration]:
    for entry in ENTRIES:
        arguments = inspect.signature(entry.optim_cls).parameters
        for implementation, options in IMPLEMENTATIONS.items():
            if implementation in ("automatic", "loop") or options.keys() <= arguments.keys():
                for number, given in enumerate(entry.optim_inputs_func(device="cpu")):
                    yield Configuration(entry, number, given.desc, implementation)


CONFIGURATIONS = list(_configurations())


def each_configuration(
    *implementations: str, where: Callable[[Any], bool] = lambda entry: True, inputs: Iterable[str] = ()
) -> pytest.MarkDecorator:
    """Run a test with every input (or these) of every entry (or those), asked for in each of these ways (or in all)."""
    chosen = [
        c
        for c in CONFIGURATIONS
        if c.implementation in (implementations or IMPLEMENTATIONS) and where(c.entry) and (not inputs or c.description in inputs)
    ]
    return pytest.mark.parametrize("configuration", chosen, ids=str)


#: Without steps through which autograd can pass: those cannot write to leaves.
each_stepping_configuration = each_configuration(*KERNELS, *TORCHS)
each_entry = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)


class Regression:
    """A parameter of two dimensions and one of one, and a loss that is quadratic in them."""

    def __init__(self, dtype: torch.dtype = torch.float32, contiguous: bool = True) -> None:
        extra = () if contiguous else (2,)
        weight, bias = torch.randn(10, 5, *extra, dtype=dtype), torch.randn(10, *extra, dtype=dtype)
        self.weight = torch.nn.Parameter(weight if contiguous else weight[..., 0])
        self.bias = torch.nn.Parameter(bias if contiguous else bias[..., 0])
        self.inputs = torch.randn(5, dtype=dtype)

    @property
    def params(self) -> list[torch.nn.Parameter]:
        return [self.weight, self.bias]

    def named(self, with_names: bool) -> list:
        """The parameters, with their names or without."""
        return [("weight", self.weight), ("bias", self.bias)] if with_names else self.params

    def copy(self) -> Regression:
        return copy.deepcopy(self)

    def loss(self) -> torch.Tensor:
        """The loss; the gradients are those of this call alone."""
        self.weight.grad = self.bias.grad = None
        loss = (self.weight.mv(self.inputs) + self.bias).pow(2).sum()
        loss.backward()
        return loss.detach()

    def train(self, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            self.loss()
            optimizer.step()


class Network:
    """torch's network for this comparison, its numbers too: torch's tolerances for 16 bits hold for them, and not for any."""

    def __init__(self, dtype: torch.dtype) -> None:
        torch.manual_seed(1)
        first, second = torch.nn.Linear(2, 3), torch.nn.Linear(3, 1)
        self.model = torch.nn.Sequential(first, torch.nn.Sigmoid(), second, torch.nn.Sigmoid()).to(dtype)
        self.inputs = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], dtype=dtype).reshape(3, 2)
        scalar = torch.nn.Parameter(torch.tensor(0.5, dtype=dtype))
        self.scalar_gradient = torch.rand((), dtype=dtype)
        self.params = [*self.model.parameters(), scalar]

    def copy(self) -> Network:
        return copy.deepcopy(self)

    def draw_gradients(self, iteration: int) -> None:
        """Gradients as training has them: at iteration 2 of none, at 3 and 4 not of the second layer."""
        for p in self.params:
            p.grad = None
        if iteration == 2:
            return
        self.model[2].requires_grad_(iteration not in (3, 4))
        self.model(self.inputs).sum().backward()
        self.params[-1].grad = self.scalar_gradient.clone()


def states(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The states of the parameters, in their order; without a parameter's becoming known by being looked up."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [dict(optimizer.state[p]) if p in optimizer.state else {} for p in params]


def assert_same_states(ours: list, theirs: list, **tolerances: float) -> None:
    """Equal names, and equal values within torch's tolerances for their dtypes; step counts equal altogether."""
    assert len(ours) == len(theirs)
    for our_state, their_state in zip(ours, theirs, strict=True):
        assert set(our_state) == set(their_state)
        for name, value in their_state.items():
            exactly = {"rtol": 0, "atol": 0} if name == "step" else tolerances
            torch.testing.assert_close(our_state[name], value, msg=lambda text, name=name: f"{name}: {text}", **exactly)
