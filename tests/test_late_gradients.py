"""Gradients come late, stay away and return; parameters and momentum join in mid-run: everything is counted by parameter."""

from __future__ import annotations

import pytest
import torch

import fusedopt
from cases import each_case, make_parameters, named
from single_step import checked_step
from snapshot import same_bits

SHAPES = [(5,), (2, 3), (), (40,)]
# For each step, which of the parameters have a gradient.
PRESENCE = {
    "late": ["1000", "1100", "1100", "1111", "1111"],
    "vanishing": ["1111", "1011", "0000", "1110", "1111"],
    "in turns": ["1010", "0101", "1010", "0101", "1100"],
    "never": ["0000", "0000"],
}


def step(case, optimizer, presence):
    """Step with gradients where ``presence`` has a 1, and see that the others' parameters and states stay as they were."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    absent = []
    for p, present in zip(params, presence, strict=True):
        p.grad = torch.randn(p.shape, dtype=torch.float64).to(p.dtype) if present == "1" else None
        if present == "0":
            states = {key: value.clone() for key, value in optimizer.state.get(p, {}).items()}
            absent.append((p, p.detach().clone(), states))
    checked_step(case, optimizer)
    for p, value, states in absent:
        assert same_bits(p, value)
        now = optimizer.state.get(p, {})
        assert states.keys() == now.keys()
        assert all(same_bits(now[key], states[key]) for key in states)


@pytest.mark.parametrize("presence", PRESENCE.values(), ids=PRESENCE.keys())
@each_case
def test_gradients_come_and_go(case, presence):
    params = make_parameters(SHAPES)
    optimizer = case.make_ours(params)
    for pattern in presence:
        step(case, optimizer, pattern)
    for index, p in enumerate(params):
        if "step" in optimizer.state.get(p, {}):
            assert optimizer.state[p]["step"] == sum(pattern[index] == "1" for pattern in presence)


@each_case
def test_frozen_parameters_stay_and_thaw(case):
    params = make_parameters(SHAPES)
    optimizer = case.make_ours(params)
    step(case, optimizer, "1111")
    params[1].requires_grad_(False)
    step(case, optimizer, "1011")
    params[1].requires_grad_(True)
    step(case, optimizer, "1111")


@each_case
def test_group_added_after_steps(case):
    params = make_parameters([*SHAPES, (6,), (3,)])
    optimizer = case.make_ours(params[:4])
    step(case, optimizer, "1111")
    step(case, optimizer, "1111")
    optimizer.add_param_group({"params": params[4:], "lr": 0.02})
    for pattern in ("111111", "110101", "111111"):
        step(case, optimizer, pattern)


@pytest.mark.parametrize("nesterov", [False, True], ids=["plain", "nesterov"])
def test_momentum_switched_on_and_off(nesterov):
    """The first gradient under momentum enters undampened, whenever it comes; the buffer waits while momentum is off."""
    optimizer = fusedopt.SGD(make_parameters(SHAPES), lr=0.1)
    (group,) = optimizer.param_groups
    for number, momentum in enumerate((0, 0, 0.9, 0.9, 0.8, 0, 0, 0.7, 0.7)):
        group.update(momentum=momentum, nesterov=nesterov and momentum > 0, dampening=0.0 if nesterov else 0.3)
        step(named("sgd"), optimizer, "1111" if number % 3 else "1011")


@pytest.mark.parametrize("options", [{}, {"fused": False}], ids=["kernel", "fused=False"])
def test_momentum_starts_anew_when_its_buffer_is_deleted(options):
    (param,) = make_parameters([(5,)])
    optimizer = fusedopt.SGD([param], lr=0.1, momentum=0.9, dampening=0.5, **options)
    case = named("sgd-dampening")
    step(case, optimizer, "1")
    step(case, optimizer, "1")
    del optimizer.state[param]["momentum_buffer"]
    step(case, optimizer, "1")
    assert torch.equal(optimizer.state[param]["momentum_buffer"], param.grad)
    step(case, optimizer, "1")


def test_each_parameter_is_corrected_for_its_own_steps():
    """With a constant gradient and no eps Adam's step is lr, whatever number of steps other parameters took."""
    early, late = (torch.nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(2))
    optimizer = fusedopt.Adam([early, late], lr=0.1, eps=0.0)
    early.grad = torch.ones_like(early)
    for _ in range(5):
        optimizer.step()
    late.grad = torch.full_like(late, 7.0)
    optimizer.step()
    assert optimizer.state[early]["step"] == 6
    assert optimizer.state[late]["step"] == 1
    assert (late + 0.1).abs().max() < 1e-15


@pytest.mark.parametrize("name", ["sgd", "sgd-momentum", "momentum", "adam", "adamw-amsgrad"])
def test_state_dict_before_the_first_step_is_empty(name):
    assert named(name).make_ours(make_parameters([(3,)])).state_dict()["state"] == {}


def test_sgd_without_momentum_keeps_no_state():
    params = make_parameters([(3,)])
    optimizer = fusedopt.SGD(params, lr=0.1)
    step(named("sgd"), optimizer, "1")
    assert optimizer.state_dict()["state"] == {}
