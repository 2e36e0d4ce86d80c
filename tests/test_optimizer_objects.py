"""What users do with an optimizer of ours beside stepping: copy, print, extend, group, explain, put into training loops."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import fusedopt
import fusedopt as optim
from cases import CASES, draw_gradients, make_parameters, named
from single_step import checked_step
from snapshot import same_bits

OURS = ["SGD", "Adam", "AdamW"]
ours_of_torch = pytest.mark.parametrize("name", OURS)
every_class = pytest.mark.parametrize("name", [*OURS, "Momentum"])


def parameter(size=3):
    return torch.nn.Parameter(torch.ones(size))


# --- copies, printing, subclasses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("name", ["sgd-nesterov-l2", "sgd-momentum-decoupled", "momentum", "adam-amsgrad", "adamw"])
@pytest.mark.parametrize("steps", [0, 2], ids=["before the first step", "after steps"])
def test_copies_go_on_bit_for_bit(name, copied, steps):
    params = make_parameters([(33,), (4, 6)])
    optimizer = named(name).make_ours(params)
    for _ in range(steps):
        draw_gradients(params)
        optimizer.step()
    other = copied(optimizer)
    assert type(other) is type(optimizer)
    public = [key for key in vars(optimizer) if not key.startswith("_")]
    assert [key for key in vars(other) if not key.startswith("_")] == public
    others = other.param_groups[0]["params"]
    for _ in range(2):
        draw_gradients(params, others)
        optimizer.step()
        other.step()
    assert all(map(same_bits, params, others))


@ours_of_torch
def test_repr_is_torchs(name):
    ours, theirs = (repr(getattr(module, name)([parameter()], lr=0.1)) for module in (optim, torch.optim))
    assert ours == theirs


@every_class
def test_repr_after_a_step_shows_no_more(name):
    param = parameter()
    optimizer = getattr(optim, name)([param], lr=0.1)
    before = repr(optimizer)
    param.grad = torch.ones(3)
    optimizer.step()
    assert repr(optimizer) == before


@every_class
def test_users_subclass(name):
    """A subclass may add arguments, override ``step`` and call ours."""

    class Logged(getattr(optim, name)):
        def __init__(self, params, lr, *, log):
            super().__init__(params, lr=lr)
            self.log = log

        def step(self, closure=None):
            self.log.append("step")
            return super().step(closure)

    param, log = parameter(), []
    getattr(optim, name)([parameter()], lr=0.1)
    optimizer = Logged([param], 0.1, log=log)
    optimizer.register_step_post_hook(lambda *_: log.append("hook"))
    param.grad = torch.ones(3)
    optimizer.step()
    assert log[0] == "step"
    assert (param < 1).all()
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert "numba" in optimizer.explain()


@every_class
def test_users_subclass_without_step_runs_hooks_once(name):
    class Renamed(getattr(optim, name)):
        pass

    param, log = parameter(), []
    getattr(optim, name)([parameter()], lr=0.1)
    optimizer = Renamed([param], lr=0.1)
    optimizer.register_step_post_hook(lambda *_: log.append("hook"))
    param.grad = torch.ones(3)
    optimizer.step()
    assert log == ["hook"]


# --- groups, zero_grad, explain ----------------------------------------------------------------------------------------------


@every_class
@pytest.mark.parametrize("set_to_none", [None, True, False])
def test_zero_grad(name, set_to_none):
    params = make_parameters([(3,), (4, 2), ()])
    optimizer = getattr(optim, name)(params, lr=0.1, fused=True)
    draw_gradients(params[:2])
    optimizer.step()
    optimizer.zero_grad() if set_to_none is None else optimizer.zero_grad(set_to_none=set_to_none)
    if set_to_none is False:
        assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in params[:2])
        assert params[2].grad is None
    else:
        assert all(p.grad is None for p in params)


@pytest.mark.parametrize("case", [case for case in CASES if "tensor" not in case.name], ids=str)
def test_groups_with_options_of_their_own(case):
    params = make_parameters([(3,), (4, 2), (), (33,)])
    optimizer = case.make_ours([{"params": params[:2], "lr": 0.3}, {"params": params[2:], "weight_decay": 0.2}])
    for _ in range(2):
        draw_gradients(params)
        checked_step(case, optimizer)


def test_explain_has_a_line_for_each_parameter():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1, dtype=torch.complex64))
    optimizer = optim.AdamW(model.named_parameters())
    lines = optimizer.explain().splitlines()
    for name, p in model.named_parameters():
        (line,) = (line for line in lines if name in line)
        assert str(tuple(p.shape)) in line or str(list(p.shape)) in line
        assert str(p.dtype).removeprefix("torch.") in line
        assert "numba" in line


@pytest.mark.parametrize(
    ("options", "path"),
    [({}, "numba"), ({"fused": True}, "numba"), ({"fused": False}, "torch"), ({"foreach": True}, "torch")],
    ids=str,
)
@ours_of_torch
def test_explain_names_the_path_and_the_reason(name, options, path):
    explanation = getattr(optim, name)([parameter()], **options).explain()
    assert path in explanation
    for key, value in options.items():
        if path == "torch":
            assert f"{key}={value}" in explanation


@every_class
def test_explain_changes_nothing(name):
    param = parameter()
    param.grad = torch.ones(3)
    optimizer = getattr(optim, name)([param], lr=0.1)
    optimizer.explain()
    assert optimizer.state_dict()["state"] == {}
    assert torch.equal(param, torch.ones(3))


def test_no_decay_groups():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Flatten(), torch.nn.Linear(8, 4), torch.nn.LayerNorm(4)
    )
    model[3].weight.requires_grad_(True)
    groups = optim.no_decay_groups(model, 0.1)
    decayed, spared = ({id(p) for p in group["params"]} for group in sorted(groups, key=lambda g: -g["weight_decay"]))
    assert decayed == {id(model[0].weight), id(model[3].weight)}
    assert spared == {id(p) for p in model.parameters()} - decayed
    assert sorted(group["weight_decay"] for group in groups) == [0.0, 0.1]
    optimizer = optim.AdamW(groups, lr=0.1)
    draw_gradients(list(model.parameters()))
    checked_step(named("adamw"), optimizer)


def test_no_decay_groups_takes_a_shared_parameter_once():
    model = torch.nn.ModuleDict({"embedding": torch.nn.Embedding(5, 3), "head": torch.nn.Linear(3, 5)})
    model["head"].weight = model["embedding"].weight
    found = [p for group in optim.no_decay_groups(model, 0.1) for p in group["params"]]
    assert {id(p) for p in found} == {id(p) for p in model.parameters()}
    assert len(found) == 2


# --- within training loops ---------------------------------------------------------------------------------------------------


def test_swa_and_ema_work_with_ours():
    model = torch.nn.Linear(4, 2)
    averaged = optim.swa_utils.AveragedModel(model)
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = optim.swa_utils.SWALR(optimizer, swa_lr=0.05, anneal_epochs=2)
    weights = []
    for _ in range(3):
        draw_gradients(list(model.parameters()))
        optimizer.step()
        averaged.update_parameters(model)
        scheduler.step()
        weights.append(model.weight.detach().clone())
    torch.testing.assert_close(averaged.module.weight.detach(), torch.stack(weights).mean(0))


def test_two_optimizers_over_one_model():
    model = torch.nn.Linear(4, 2)
    optimizers = optim.SGD([model.weight], lr=0.1), optim.AdamW([model.bias], lr=0.1)
    for _ in range(2):
        draw_gradients(list(model.parameters()))
        checked_step(named("sgd"), optimizers[0])
        checked_step(named("adamw"), optimizers[1])


def test_profiler_names_the_step():
    param = parameter()
    optimizer = fusedopt.AdamW([param])
    param.grad = torch.ones(3)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
        optimizer.zero_grad()
    names = {event.name for event in profile.events()}
    assert {"Optimizer.step#AdamW.step", "Optimizer.zero_grad#AdamW.zero_grad"} <= names
