"""Checkpoints that lack something or hold it otherwise: nothing is cast, and no option of this optimizer is lost."""

from __future__ import annotations

import copy

import pytest
import torch

import fusedopt
from cases import copies, draw_gradients, make_parameters, named
from checkpoints import OF_TORCH, SHAPES, assert_equal_states, continues, through_a_file, trained
from single_step import checked_step

of_torch = pytest.mark.parametrize("case", OF_TORCH, ids=str)
cases = pytest.mark.parametrize(
    "case", [named(name) for name in ("sgd-momentum-l2", "momentum", "adam-amsgrad-l2", "adamw")], ids=str
)


# --- what a checkpoint may lack, or hold otherwise ------------------------------------------------------------------------------

OPTIONS = ["foreach", "fused", "maximize", "differentiable", "capturable", "decoupled_weight_decay", "nesterov", "amsgrad"]


@pytest.mark.parametrize("values", [{}, {"fused": True}], ids=["defaults", "fused=True"])
@of_torch
def test_keys_that_a_checkpoint_lacks_keep_their_values(case, values):
    optimizer = trained(case.make_ours(make_parameters(SHAPES), **values))
    saved, before = copy.deepcopy(optimizer.state_dict()), dict(optimizer.param_groups[0])
    for key in OPTIONS:
        saved["param_groups"][0].pop(key, None)
    optimizer.load_state_dict(saved)
    after = optimizer.param_groups[0]
    assert {key: after[key] for key in OPTIONS if key in before} == {key: before[key] for key in OPTIONS if key in before}
    continues(case, optimizer)


def test_sgd_of_torch_does_not_turn_decoupled_decay_off():
    case = named("sgd-momentum-decoupled")
    theirs = trained(torch.optim.SGD(make_parameters(SHAPES), lr=0.1, momentum=0.9))
    ours = case.make_ours(copies(theirs.param_groups[0]["params"]))
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["decoupled_weight_decay"] is True
    continues(case, ours)


@pytest.mark.parametrize("implementation", [{"foreach": True}, {"fused": True}, {"fused": False}], ids=str)
@pytest.mark.parametrize("name", ["sgd-momentum", "adam", "adamw"])
def test_implementation_that_wrote_a_checkpoint_does_not_turn_ours_off(name, implementation):
    case = named(name)
    theirs = trained(case.truth(make_parameters(SHAPES), **case.kwargs, **implementation))
    ours = case.make_ours(copies(theirs.param_groups[0]["params"]))
    ours.load_state_dict(theirs.state_dict())
    assert "numba" in ours.explain()
    continues(case, ours)


def test_adamw_stays_adamw_and_adam_takes_what_was_saved():
    """As torch has it: the option is a part of Adam's state, and AdamW is always decoupled."""
    saved = trained(torch.optim.Adam(make_parameters(SHAPES), weight_decay=0.1)).state_dict()
    adamw = fusedopt.AdamW(make_parameters(SHAPES))
    adamw.load_state_dict(saved)
    assert adamw.param_groups[0]["decoupled_weight_decay"] is True
    adam = fusedopt.Adam(make_parameters(SHAPES))
    adam.load_state_dict(trained(torch.optim.AdamW(make_parameters(SHAPES))).state_dict())
    assert adam.param_groups[0]["decoupled_weight_decay"] is True
    continues(named("adamw"), adam)


@pytest.mark.parametrize("step", [3, 3.0, torch.tensor(3.0, dtype=torch.float64), torch.tensor(3)], ids=repr)
def test_step_counts_of_other_kinds(step):
    """Old checkpoints hold plain numbers."""
    optimizer = trained(fusedopt.AdamW(make_parameters(SHAPES), lr=0.01, weight_decay=0.1))
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = step
    optimizer.load_state_dict(saved)
    draw_gradients(optimizer.param_groups[0]["params"])
    checked_step(named("adamw"), optimizer)
    assert [float(state["step"]) for state in optimizer.state.values()] == [4.0] * len(SHAPES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["sgd-momentum", "momentum", "adam-amsgrad", "adamw"])
def test_states_in_float32_of_16_bit_parameters_survive(name, dtype):
    """torch casts every floating-point state to the parameter's dtype when it loads."""
    optimizer = trained(named(name).make_ours(make_parameters(SHAPES, dtype)), 1)
    for state in optimizer.state.values():
        for key, value in state.items():
            if key != "step":
                state[key] = value.float() + 1e-4
    continues(named(name), optimizer)
    saved = through_a_file(optimizer.state_dict())
    other = named(name).make_ours(copies(optimizer.param_groups[0]["params"]))
    other.load_state_dict(saved)
    assert_equal_states(other.state_dict(), optimizer.state_dict())
    assert all(value.dtype == torch.float32 for state in other.state.values() for value in state.values())
    continues(named(name), other)


def test_states_of_the_users_own_survive():
    param = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = trained(fusedopt.AdamW([param]))
    own = {
        "codes": torch.tensor([1007, -3], dtype=torch.int16),
        "seen": torch.tensor(2**40 + 1),
        "mask": torch.tensor([True]),
    }
    optimizer.state[param].update(own, loss=0.25)
    other = fusedopt.AdamW([torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    (state,) = other.state.values()
    for key, value in own.items():
        assert state[key].dtype == value.dtype
        assert torch.equal(state[key], value)
    assert state["loss"] == 0.25


@cases
def test_states_in_other_strides_than_the_parameter(case):
    optimizer = trained(case.make_ours(make_parameters([(4, 6)])))
    saved = copy.deepcopy(optimizer.state_dict())
    for key, value in saved["state"][0].items():
        if value.dim() == 2:
            saved["state"][0][key] = value.t().contiguous().t()
    optimizer.load_state_dict(saved)
    continues(case, optimizer)
