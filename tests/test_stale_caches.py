"""Whatever is swapped between two steps, the next step works on what is there now: tables of addresses never go stale."""

from __future__ import annotations

import copy
import gc
import pickle
from collections import defaultdict

import pytest
import torch

import fusedopt
from cases import copies, draw_gradients, make_parameters, named
from single_step import checked_step
from snapshot import Snapshot, same_bits

SHAPES = [(33,), (4, 6), (), (0,), (7,)]
cases = pytest.mark.parametrize(
    "case", [named(name) for name in ("sgd", "sgd-momentum-l2", "momentum", "adam-amsgrad-l2", "adamw")], ids=str
)


def prepared(case, dtype=torch.float32):
    """Return an optimizer that has planned and stepped twice."""
    optimizer = case.make_ours(make_parameters(SHAPES, dtype))
    for _ in range(2):
        step(case, optimizer)
    return optimizer


def parameters(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def step(case, optimizer):
    draw_gradients(parameters(optimizer))
    checked_step(case, optimizer)


# --- parameters --------------------------------------------------------------------------------------------------------------


@cases
def test_data_swapped(case):
    optimizer = prepared(case)
    param = parameters(optimizer)[0]
    old = param.data
    param.data = torch.randn(33)
    before = old.clone()
    step(case, optimizer)
    assert torch.equal(old, before)


@cases
def test_data_swapped_for_a_strided_view(case):
    optimizer = prepared(case)
    base = torch.randn(33, 3)
    gaps = base[:, 1:].clone()
    parameters(optimizer)[0].data = base[:, 0]
    step(case, optimizer)
    assert torch.equal(base[:, 1:], gaps)
    parameters(optimizer)[1].data = torch.randn(6, 4).t()
    step(case, optimizer)


@cases
def test_data_transposed_and_reshaped_in_place(case):
    """The same memory at the same address, of the same shape at first, in another order of elements."""
    params = make_parameters([(6, 6), (33,)])
    optimizer = case.make_ours(params)
    step(case, optimizer)
    params[0].data = params[0].data.t()
    for _ in range(2):
        step(case, optimizer)
    params[0].grad = None
    params[0].data = params[0].data.t().view(36)
    for state in [optimizer.state.get(params[0], {})]:
        for key, value in state.items():
            state[key] = value if key == "step" else value.reshape(36)
    step(case, optimizer)


@cases
def test_storage_set(case):
    optimizer = prepared(case)
    param = parameters(optimizer)[1]
    with torch.no_grad():
        param.set_(torch.randn(4, 6))
    step(case, optimizer)


@cases
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_module_converted(case, dtype):
    """``module.to(dtype)`` keeps the parameters and swaps their data; moments stay in the dtype that they have."""
    module = torch.nn.Linear(9, 5)
    optimizer = case.make_ours(list(module.parameters()))
    step(case, optimizer)
    module.to(dtype)
    moments = {key: value.dtype for state in optimizer.state.values() for key, value in state.items()}
    for p in module.parameters():
        p.grad = torch.randn_like(p)
    checked_step(case, optimizer)
    assert {key: value.dtype for state in optimizer.state.values() for key, value in state.items()} == moments


@cases
def test_parameter_replaced_in_its_group(case):
    optimizer = prepared(case)
    group = optimizer.param_groups[0]
    old, new = group["params"][0], torch.nn.Parameter(torch.randn(33))  # of the same kind: no table tells them apart
    before = old.detach().clone()
    group["params"][0] = new
    step(case, optimizer)
    assert torch.equal(old, before)


@cases
def test_group_edited(case):
    optimizer = prepared(case)
    group = optimizer.param_groups[0]
    group["params"].reverse()
    step(case, optimizer)
    removed = group["params"].pop()
    before = removed.detach().clone()
    step(case, optimizer)
    assert torch.equal(removed, before)
    group["params"].append(removed)
    step(case, optimizer)
    optimizer.param_groups.append({**group, "params": [group["params"].pop(0)], "lr": 0.5})
    step(case, optimizer)
    optimizer.param_groups = [{**optimizer.param_groups[1]}, {**optimizer.param_groups[0]}]
    step(case, optimizer)


@cases
def test_addresses_freed_and_used_again(case):
    """New tensors come to lie where old ones were, with another shape behind the same address."""
    optimizer = prepared(case)
    for size in (33, 35, 33, 31):
        for index in (0, 4):
            param = parameters(optimizer)[index]
            param.grad = None
            shape = param.shape if index else (size,)
            param.data = torch.zeros(0)
            param.data = torch.randn(shape)
            if not index:
                optimizer.state.pop(param, None)
        gc.collect()
        step(case, optimizer)


# --- gradients ---------------------------------------------------------------------------------------------------------------


@cases
def test_gradients_in_new_layouts_and_places(case):
    optimizer = prepared(case)
    param = parameters(optimizer)[1]
    kept = []
    for gradient in (
        torch.randn(6, 4).t(),
        torch.randn(1).expand(4, 6),
        torch.randn(8, 6)[::2],
        torch.randn(25)[1:].reshape(4, 6),
        torch.randn(4, 6),
    ):
        draw_gradients(parameters(optimizer))
        param.grad = gradient
        kept.append((gradient, gradient.clone()))
        checked_step(case, optimizer)
    assert all(torch.equal(gradient, before) for gradient, before in kept)


@cases
def test_gradients_kept_between_steps_and_written_in_place(case):
    optimizer = prepared(case)
    for _ in range(3):
        for p in parameters(optimizer):
            p.grad.copy_(torch.randn(p.shape))
        checked_step(case, optimizer)


# --- states ------------------------------------------------------------------------------------------------------------------


@cases
def test_states_replaced(case):
    """Users shard and offload states by putting other tensors in their place."""
    optimizer = prepared(case)
    for state in optimizer.state.values():
        for key, value in state.items():
            state[key] = value.clone()
    step(case, optimizer)
    param = parameters(optimizer)[1]
    for key, value in optimizer.state[param].items():
        if value.dim() == 2:
            optimizer.state[param][key] = torch.empty(6, 4).t().copy_(value)  # as a checkpoint may have it
    step(case, optimizer)


@cases
def test_states_changed_in_place(case):
    optimizer = prepared(case)
    for state in optimizer.state.values():
        for key, value in state.items():
            value.fill_(11.0) if key == "step" else value.mul_(2)
    step(case, optimizer)
    for state in optimizer.state.values():
        if "step" in state:
            assert state["step"] == 12


@cases
def test_states_cleared(case):
    optimizer = prepared(case)
    optimizer.state.clear()
    step(case, optimizer)
    optimizer.state = defaultdict(dict)
    step(case, optimizer)
    optimizer.state.pop(parameters(optimizer)[0], None)
    step(case, optimizer)


@pytest.mark.parametrize("name", ["adam", "adamw-amsgrad"])
def test_step_counts_replaced(name):
    case = named(name)
    optimizer = prepared(case)
    states = [optimizer.state[p] for p in parameters(optimizer)]
    states[0]["step"] = torch.tensor(7.0)
    states[1]["step"] = torch.tensor(9.0, dtype=torch.float64)
    states[2]["step"] = torch.tensor([3.0])[0]
    step(case, optimizer)
    assert [float(state["step"]) for state in states[:3]] == [8, 10, 4]


# --- whole optimizers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
@cases
def test_copies_work_on_tensors_of_their_own(case, copied):
    optimizer = prepared(case)
    other = copied(optimizer)
    before = Snapshot(optimizer)
    step(case, other)
    before.assert_unchanged()
    after = Snapshot(other)
    step(case, optimizer)
    after.assert_unchanged()


@cases
def test_state_dict_loaded_between_steps(case):
    optimizer, other = prepared(case), prepared(case)
    saved = copy.deepcopy(other.state_dict())
    optimizer.load_state_dict(saved)
    for p, q in zip(parameters(optimizer), parameters(other), strict=True):
        assert optimizer.state[p].keys() == other.state[q].keys()
        assert all(same_bits(optimizer.state[p][key], other.state[q][key]) for key in other.state[q])
    step(case, optimizer)


@cases
def test_many_short_lived_optimizers(case):
    """Optimizers die and others take their place, at the same addresses and identities."""
    for size in range(1, 40):
        params = make_parameters([(size,), (41 - size,)])
        optimizer = case.make_ours(params)
        step(case, optimizer)
        del optimizer, params


def test_optimizers_free_what_they_held():
    """No table keeps parameters, gradients or states alive when the optimizer is gone, nor gradients that were dropped."""
    import weakref

    param = torch.nn.Parameter(torch.randn(200_000))
    param.grad = torch.randn(200_000)
    gradient = weakref.ref(param.grad)
    optimizer = fusedopt.AdamW([param], lr=0.1)
    optimizer.step()
    param.grad = None
    optimizer.zero_grad()
    gc.collect()
    assert gradient() is None
    state = weakref.ref(optimizer.state[param]["exp_avg"])
    alive = weakref.ref(param)
    del optimizer, param
    gc.collect()
    assert alive() is None
    assert state() is None


def test_counts_that_somebody_writes_hold_for_their_parameter_alone():
    params = make_parameters([(9,), (9,), (9,)])
    plain = copies(params)
    optimizer, expected = fusedopt.Adam(params, lr=0.1), torch.optim.Adam(plain, lr=0.1, foreach=False)
    for step in range(4):
        draw_gradients(params, plain)
        if step == 2:
            optimizer.state[params[1]]["step"].fill_(7.0)
            expected.state[plain[1]]["step"].fill_(7.0)
        optimizer.step()
        expected.step()
    assert [state["step"].item() for state in optimizer.state.values()] == [4.0, 9.0, 4.0]
    for p, q in zip(params, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
