"""Checkpoints: torch.optim's load here and ours load there, nothing is cast, shared or made large by it."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch

import fusedopt
from cases import CASES, copies, draw_gradients, make_parameters, named
from checkpoints import OF_TORCH, SHAPES, assert_equal_states, continues, through_a_file, trained
from snapshot import same_bits

of_torch = pytest.mark.parametrize("case", OF_TORCH, ids=str)
every_case = pytest.mark.parametrize("case", CASES, ids=str)
cases = pytest.mark.parametrize(
    "case", [named(name) for name in ("sgd-momentum-l2", "momentum", "adam-amsgrad-l2", "adamw")], ids=str
)


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


@pytest.mark.parametrize("name", ["adam", "adamw-amsgrad"])
def test_a_pickled_optimizer_is_not_larger_than_torchs(name):
    """Pickle writes the storage of each view anew: a shared vector of step counts would come as often as it is long."""
    ours, theirs = (trained(make(make_parameters([(2,)] * 1000)), 1) for make in (named(name).make_ours, named(name).make_truth))
    assert len(pickle.dumps(ours)) <= 1.1 * len(pickle.dumps(theirs))


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
        assert list(ours.parameters)[: len(theirs.parameters)] == list(theirs.parameters)
        added = list(ours.parameters.values())[len(theirs.parameters) :]
        assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in added)


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0, "ema_decay": 0.9}], ids=["plain", "options"])
def test_distributed_checkpoints_may_be_flat(options):
    """Their reader asks for each key of the live groups, and for no other."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    model = torch.nn.Linear(8, 8)
    optimizer, other = (fusedopt.AdamW(model.parameters(), **options) for _ in range(2))
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step(zero_grad=True)
    optimizer.zero_grad()
    set_optimizer_state_dict(model, other, optim_state_dict=get_optimizer_state_dict(model, optimizer, options=flat), options=flat)
    for p in model.parameters():
        torch.testing.assert_close(other.state[p], optimizer.state[p], rtol=0, atol=0)


def test_groups_have_no_options_that_nobody_asked_for():
    ours, theirs = (module.AdamW([torch.nn.Parameter(torch.ones(1))]) for module in (fusedopt, torch.optim))
    assert ours.param_groups[0].keys() == theirs.param_groups[0].keys()
    assert ours.defaults == theirs.defaults
