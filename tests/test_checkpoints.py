"""Checkpoints: torch.optim's load here and ours load there, nothing is cast, shared or made large by it."""

from __future__ import annotations

import copy
import inspect
import io

import pytest
import torch

import fusedopt
from cases import CASES, Case, copies, draw_gradients, make_parameters, named
from single_step import checked_step
from snapshot import same_bits

SHAPES = [(33,), (4, 6), (), (0,)]
OF_TORCH = [case for case in CASES if case.truth.__module__.startswith("torch.optim")]
of_torch = pytest.mark.parametrize("case", OF_TORCH, ids=str)
every_case = pytest.mark.parametrize("case", CASES, ids=str)
cases = pytest.mark.parametrize(
    "case", [named(name) for name in ("sgd-momentum-l2", "momentum", "adam-amsgrad-l2", "adamw")], ids=str
)


def trained(optimizer, steps=3):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for _ in range(steps):
        draw_gradients(params)
        optimizer.step()
    return optimizer


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def continues(case: Case, optimizer):
    """Step ``optimizer`` beside the truth twice."""
    for _ in range(2):
        draw_gradients([p for group in optimizer.param_groups for p in group["params"]])
        checked_step(case, optimizer)


def assert_equal_states(loaded, saved):
    assert loaded["state"].keys() == saved["state"].keys()
    for index, state in saved["state"].items():
        assert loaded["state"][index].keys() == state.keys()
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(loaded["state"][index][key]), torch.as_tensor(value)), key


# --- both ways with torch.optim ------------------------------------------------------------------------------------------------


@of_torch
def test_state_dict_has_the_keys_of_torchs(case):
    ours, theirs = (trained(make(make_parameters(SHAPES))).state_dict() for make in (case.make_ours, case.make_truth))
    assert ours.keys() == theirs.keys()
    assert {i: list(state) for i, state in ours["state"].items()} == {i: list(state) for i, state in theirs["state"].items()}
    for index, state in theirs["state"].items():
        for key, value in state.items():
            assert ours["state"][index][key].dtype == value.dtype
            assert ours["state"][index][key].shape == value.shape
    extra = {"decoupled_weight_decay"}  # SGD's one option more than torch's
    assert set(ours["param_groups"][0]) - extra == set(theirs["param_groups"][0]) - extra


@pytest.mark.parametrize("via", [copy.deepcopy, through_a_file], ids=["in memory", "torch.save"])
@of_torch
def test_checkpoint_of_torch_continues_here(case, via):
    theirs = trained(case.make_truth(make_parameters(SHAPES)))
    saved = via(theirs.state_dict())
    ours = case.make_ours(copies(theirs.param_groups[0]["params"]), lr=0.5)
    ours.load_state_dict(saved)
    assert_equal_states(ours.state_dict(), theirs.state_dict())
    assert float(ours.param_groups[0]["lr"]) == float(case.kwargs["lr"])
    continues(case, ours)


@pytest.mark.parametrize("via", [copy.deepcopy, through_a_file], ids=["in memory", "torch.save"])
@of_torch
def test_checkpoint_of_ours_continues_in_torch(case, via):
    ours = trained(case.make_ours(make_parameters(SHAPES)))
    theirs = case.make_truth(copies(ours.param_groups[0]["params"]))
    theirs.load_state_dict(via(ours.state_dict()))
    assert_equal_states(theirs.state_dict(), ours.state_dict())
    theirs_params = theirs.param_groups[0]["params"]
    draw_gradients(theirs_params)
    theirs.step()
    assert all(p.isfinite().all() for p in theirs_params)


@every_case
def test_checkpoint_of_ours_resumes_bit_for_bit(case):
    first = trained(case.make_ours(make_parameters(SHAPES)))
    second = case.make_ours(copies(first.param_groups[0]["params"]))
    second.load_state_dict(through_a_file(first.state_dict()))
    params = [optimizer.param_groups[0]["params"] for optimizer in (first, second)]
    for _ in range(2):
        draw_gradients(*params)
        first.step()
        second.step()
    assert all(map(same_bits, *params))
    assert_equal_states(second.state_dict(), first.state_dict())


@of_torch
def test_checkpoint_with_names(case):
    """Named parameters: the names are saved, loaded, and do not get in the way of a checkpoint without."""

    def named_parameters():
        return [(f"layer.{i}", p) for i, p in enumerate(make_parameters(SHAPES))]

    theirs, ours = trained(case.make_truth(named_parameters())), case.make_ours(named_parameters())
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert ours.state_dict()["param_groups"][0]["param_names"] == [f"layer.{i}" for i in range(len(SHAPES))]
    assert_equal_states(ours.state_dict(), theirs.state_dict())
    continues(case, ours)
    unnamed = case.make_truth(make_parameters(SHAPES))
    unnamed.load_state_dict(ours.state_dict())
    ours.load_state_dict(copy.deepcopy(trained(case.make_ours(make_parameters(SHAPES))).state_dict()))
    assert ours.param_groups[0]["param_names"] == [f"layer.{i}" for i in range(len(SHAPES))]


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


# --- loading and saving share no memory and drag none along ----------------------------------------------------------------------


@cases
def test_loading_does_not_alias_the_callers_tensors(case):
    saved = trained(case.make_ours(make_parameters(SHAPES))).state_dict()
    kept = copy.deepcopy(saved)
    optimizers = [case.make_ours(make_parameters(SHAPES)) for _ in range(2)]
    for optimizer in optimizers:
        optimizer.load_state_dict(saved)
    continues(case, optimizers[0])
    assert_equal_states(saved, kept)
    assert_equal_states(optimizers[1].state_dict(), kept)


@pytest.mark.parametrize("name", ["adam", "adamw-amsgrad"])
def test_a_step_count_saved_alone_is_small(name):
    """Step counts may be views of one vector for all parameters; saving a view would save all of it."""
    optimizer = trained(named(name).make_ours(make_parameters([(2,)] * 2000)), 1)
    file = io.BytesIO()
    torch.save(optimizer.state_dict()["state"][0]["step"], file)
    plain = io.BytesIO()
    torch.save(torch.tensor(1.0), plain)
    assert len(file.getvalue()) <= len(plain.getvalue()) + 64
    whole, expected = io.BytesIO(), io.BytesIO()
    torch.save(optimizer.state_dict(), whole)
    theirs = trained(named(name).make_truth(make_parameters([(2,)] * 2000)), 1)
    torch.save(theirs.state_dict(), expected)
    assert len(whole.getvalue()) <= 1.1 * len(expected.getvalue())


@cases
def test_state_dict_holds_the_live_moments(case):
    """As torch's does: nothing is copied, so a training state of many gigabytes can be saved."""
    optimizer = trained(case.make_ours(make_parameters(SHAPES)))
    saved = optimizer.state_dict()["state"][0]
    live = optimizer.state[optimizer.param_groups[0]["params"][0]]
    assert all(saved[key].data_ptr() == value.data_ptr() for key, value in live.items() if key != "step")


# --- errors, as torch has them ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shapes", [[(3,)], [(3,), (2,), (4,)]], ids=["fewer", "more"])
def test_checkpoint_of_another_number_of_parameters_is_refused(shapes):
    saved = trained(torch.optim.AdamW(make_parameters([(3,), (2,)]))).state_dict()
    optimizer = trained(fusedopt.AdamW(make_parameters(shapes)))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        optimizer.load_state_dict(saved)
    assert_equal_states(optimizer.state_dict(), before)


def test_load_hooks_run_once():
    optimizer = trained(fusedopt.AdamW(make_parameters(SHAPES)))
    calls = []
    optimizer.register_state_dict_pre_hook(lambda _: calls.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda _, saved: calls.append("after saving"))
    optimizer.register_load_state_dict_pre_hook(lambda _, saved: calls.append("before loading"))
    optimizer.register_load_state_dict_post_hook(lambda _: calls.append("after loading"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["before saving", "after saving", "before loading", "after loading"]


def test_load_hooks_may_replace_the_checkpoint():
    optimizer = trained(fusedopt.AdamW(make_parameters(SHAPES)))
    other = copy.deepcopy(trained(optimizer).state_dict())
    trained(optimizer)
    optimizer.register_load_state_dict_pre_hook(lambda _, saved: other)
    optimizer.load_state_dict(optimizer.state_dict())
    assert_equal_states(optimizer.state_dict(), other)


def test_signatures_of_saving_and_loading_are_torchs():
    for method in ("state_dict", "load_state_dict", "zero_grad", "add_param_group"):
        ours, theirs = (inspect.signature(getattr(cls, method)) for cls in (fusedopt.AdamW, torch.optim.AdamW))
        assert list(ours.parameters) == list(theirs.parameters)
