"""fused=True where it cannot be, states and hyperparameters that do not fit: refused, and nothing has changed."""

from __future__ import annotations

import pytest
import torch

import fusedopt
from cases import draw_gradients, make_parameters, named
from single_step import checked_step
from snapshot import refused
from wrapped import WrappedTensor

CLASSES = ["SGD", "Momentum", "Adam", "AdamW"]
every_class = pytest.mark.parametrize("name", CLASSES)
before_and_after = pytest.mark.parametrize("steps", [0, 2], ids=["first step", "later step"])


# --- fused=True where it cannot be -------------------------------------------------------------------------------------------


def asked_for_fused(name, param, match):
    """Assert that the first step with ``fused=True`` is refused, and return the reason and remedy."""
    good = make_parameters([(5,)])
    draw_gradients(good)
    optimizer = getattr(fusedopt, name)([*good, param], lr=0.1, fused=True)
    message = refused(optimizer, match=match)
    assert "fused" in message
    return message


@every_class
def test_fused_parameter_that_is_no_plain_memory(name):
    param = torch.nn.Parameter(WrappedTensor(torch.ones(3)))
    param.grad = WrappedTensor(torch.ones(3))
    message = asked_for_fused(name, param, "WrappedTensor")
    assert "fused=None" in message  # what to do


@every_class
def test_fused_integer_parameter(name):
    param = torch.ones(3, dtype=torch.int32)
    param.grad = torch.ones(3, dtype=torch.int32)
    asked_for_fused(name, param, "int32")


def test_fused_sparse_gradient():
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.sparse_coo_tensor([[1]], [1.0], (3,), check_invariants=True)
    message = asked_for_fused("SGD", param, "sparse")
    assert "fused=None" in message


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_what_a_group_asks_for_comes_before_fused(name):
    """As in torch, where a group may ask for what the constructor would refuse."""
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = getattr(fusedopt, name)([{"params": [param], "foreach": True}], lr=0.1, fused=True)
    assert "torch (foreach=True)" in optimizer.explain()
    optimizer.step()
    assert (param < 1).all()


@before_and_after
@every_class
def test_fused_error_comes_before_any_change(name, steps):
    good = make_parameters([(5,), (300,)])
    bad = torch.nn.Parameter(WrappedTensor(torch.ones(3)))
    optimizer = getattr(fusedopt, name)([good[0], bad, good[1]], lr=0.1, fused=True)
    for _ in range(steps):
        draw_gradients(good)
        optimizer.step()
    draw_gradients(good)
    bad.grad = WrappedTensor(torch.ones(3))
    refused(optimizer, match="WrappedTensor")


# --- states and hyperparameters that the user has put there ------------------------------------------------------------------


@pytest.mark.parametrize(
    "state",
    [torch.zeros(5), torch.zeros(1), torch.zeros(4, dtype=torch.int32), torch.zeros(4, device="meta"), torch.zeros(1).expand(4),
     torch.sparse_coo_tensor([[1]], [1.0], (4,), check_invariants=True)],
    ids=["longer", "shorter", "int32", "meta", "expanded", "sparse"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["sgd-momentum", "momentum", "adam", "adamw-amsgrad"])
def test_state_that_does_not_fit(name, state):
    case = named(name)
    params = [*make_parameters([(33,)], torch.float64), *make_parameters([(4,)])]  # the good one in a bucket of its own
    optimizer = case.make_ours(params)
    draw_gradients(params)
    checked_step(case, optimizer)
    key = next(key for key in optimizer.state[params[1]] if key != "step")
    right = optimizer.state[params[1]][key]
    optimizer.state[params[1]][key] = state
    message = refused(optimizer, (RuntimeError, TypeError, ValueError))
    assert key in message or "more than one element" in message
    optimizer.state[params[1]][key] = right
    checked_step(case, optimizer)


@pytest.mark.parametrize(
    ("key", "value"),
    [("lr", torch.tensor([0.1, 0.2])), ("lr", "fast"), ("lr", None), ("weight_decay", "some")],
    ids=str,
)
@before_and_after
@every_class
def test_hyperparameter_that_is_no_number(name, key, value, steps):
    params = make_parameters([(5,), (4, 6)])
    optimizer = getattr(fusedopt, name)(params, lr=0.1)
    draw_gradients(params)
    for _ in range(steps):
        optimizer.step()
    optimizer.param_groups[0][key] = value
    refused(optimizer, (RuntimeError, TypeError, ValueError))
    optimizer.param_groups[0][key] = 0.1
    optimizer.step()


@pytest.mark.parametrize(("name", "key"), [("SGD", "momentum"), ("AdamW", "betas"), ("Momentum", "beta"), ("Adam", "eps")])
def test_hyperparameter_that_is_missing(name, key):
    params = make_parameters([(5,)])
    optimizer = getattr(fusedopt, name)(params, lr=0.1)
    draw_gradients(params)
    optimizer.step()
    (group,) = optimizer.param_groups
    value = group.pop(key)
    refused(optimizer, KeyError, match=key.removesuffix("s"))
    group[key] = value
    optimizer.step()
