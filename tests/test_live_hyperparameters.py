"""Hyperparameters are read at every step: schedules, tensors, edits by hand; and none of them compiles anything anew."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch.optim import lr_scheduler as torch_schedulers

import fusedopt
from cases import RANGES, copies, draw_gradients, each_case, make_parameters, named
from compilations import compilations
from fusedopt import lr_scheduler
from single_step import checked_step

SHAPES = [(33,), (4, 6), ()]
cases = pytest.mark.parametrize(
    "case", [named(name) for name in ("sgd-nesterov-l2", "momentum", "adam-amsgrad-l2", "adamw")], ids=str
)


def step(case, optimizer):
    draw_gradients([p for group in optimizer.param_groups for p in group["params"]])
    checked_step(case, optimizer)


# --- edits by hand -----------------------------------------------------------------------------------------------------------


@each_case
def test_every_number_may_change_between_steps(case):
    optimizer = case.make_ours(make_parameters(SHAPES))
    (group,) = optimizer.param_groups
    step(case, optimizer)
    before = compilations()
    for name, (low, high) in RANGES.items():
        # What was zero stays zero: switching a term on may take another kernel.
        if name in group and not isinstance(group[name], torch.Tensor) and group[name]:
            for value in (low or high / 3, (low + high) / 2, high):
                group[name] = 0.0 if name == "dampening" and group.get("nesterov") else value
                step(case, optimizer)
    if "betas" in group:
        for betas in ((0.0, 0.9), (0.5, 0.5), (0.99, 0.9999)):
            group["betas"] = betas
            step(case, optimizer)
    assert compilations() == before


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("sgd", [{"weight_decay": 0.1}, {"momentum": 0.9}, {"nesterov": True}, {"maximize": True}, {"weight_decay": 0}]),
        ("adam", [{"weight_decay": 0.1}, {"decoupled_weight_decay": True}, {"maximize": True}, {"weight_decay": 0}]),
        ("adamw", [{"maximize": True}, {"weight_decay": 0}, {"lr": 0.0}, {"eps": 0.1}]),
    ],
)
def test_options_switched_in_mid_run(name, changes):
    case = named(name)
    optimizer = case.make_ours(make_parameters(SHAPES))
    step(case, optimizer)
    for change in changes:
        optimizer.param_groups[0].update(change)
        step(case, optimizer)


def test_amsgrad_switched_on_in_mid_run():
    """torch raises KeyError for the missing state; ours begins the maximum there."""
    optimizer = fusedopt.Adam(make_parameters(SHAPES), lr=0.1)
    step(named("adam"), optimizer)
    optimizer.param_groups[0]["amsgrad"] = True
    params = optimizer.param_groups[0]["params"]
    draw_gradients(params)
    optimizer.step()
    for p in params:
        assert torch.equal(optimizer.state[p]["max_exp_avg_sq"], optimizer.state[p]["exp_avg_sq"])
    step(named("adam-amsgrad"), optimizer)


@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"centered": True}], ids=str)
def test_states_of_rmsprop_switched_on_in_mid_run(options):
    """torch raises KeyError for the missing state; ours begins it at zero."""
    params = make_parameters(SHAPES)
    optimizer = fusedopt.RMSprop(params, lr=0.1)
    step(named("rmsprop"), optimizer)
    optimizer.param_groups[0].update(options)
    right = fusedopt.RMSprop(copies(params), lr=0.1, **options)
    draw_gradients(params, right.param_groups[0]["params"])
    for p, other in zip(params, right.param_groups[0]["params"], strict=True):
        zeros = {key: torch.zeros_like(p) for key in ("momentum_buffer" if "momentum" in options else "grad_avg",)}
        right.state[other] = {**copy.deepcopy(optimizer.state[p]), **zeros}
    optimizer.step()
    right.step()
    assert all(map(torch.equal, params, right.param_groups[0]["params"]))


@pytest.mark.parametrize("named_parameters", [False, True], ids=["parameters", "named parameters"])
def test_settings_are_read_again_only_where_they_have_changed(named_parameters):
    params = make_parameters(SHAPES)
    optimizer = fusedopt.AdamW([(f"p{i}", p) for i, p in enumerate(params)] if named_parameters else params)
    step(named("adamw"), optimizer)
    before = optimizer._settings
    step(named("adamw"), optimizer)
    assert optimizer._settings is before
    optimizer.param_groups[0]["lr"] = 0.5
    step(named("adamw"), optimizer)
    assert optimizer._settings is not before


@pytest.mark.parametrize("write", ["fill_", "data", "numpy"])
def test_a_step_count_may_be_written_in_any_way(write):
    """Of one parameter, whose coefficients are then other ones than those of its group."""
    case = named("adam")
    params = make_parameters(SHAPES)
    optimizer = case.make_ours(params)
    for _ in range(3):
        step(case, optimizer)
    count = optimizer.state[params[1]]["step"]
    {"fill_": count.fill_, "data": count.data.fill_, "numpy": count.numpy().fill}[write](0.0)
    step(case, optimizer)
    assert [float(optimizer.state[p]["step"]) for p in params] == [4.0, 1.0, 4.0]


@pytest.mark.parametrize("name", ["sgd-momentum", "adamw"])
def test_fused_switched_in_mid_run(name):
    """The states are the same ones, so any implementation can take over from any other."""
    case = named(name)
    optimizer = case.make_ours(make_parameters(SHAPES))
    (group,) = optimizer.param_groups
    for options in ({"fused": None}, {"fused": False}, {"fused": True}, {"fused": None, "foreach": True}, {"foreach": None}):
        group.update(options)
        path = "torch" if options.get("fused") is False or options.get("foreach") else "numba"
        assert path in optimizer.explain()
        step(case, optimizer)


def test_groups_may_take_different_paths():
    case = named("adamw")
    params = make_parameters(SHAPES)
    optimizer = fusedopt.AdamW(
        [
            {"params": params[:1], "fused": False},
            {"params": params[1:2], "fused": True},
            {"params": params[2:], "foreach": True},
        ]
    )
    lines = optimizer.explain()
    assert "torch" in lines
    assert "numba" in lines
    for _ in range(2):
        step(case, optimizer)


# --- tensors -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@cases
def test_tensor_lr_is_read_at_every_step(case, shape, dtype):
    lr = torch.full(shape, 0.25, dtype=dtype)  # exact in either dtype
    optimizer = case.ours(make_parameters(SHAPES), **{**case.kwargs, "lr": lr})
    assert optimizer.param_groups[0]["lr"] is lr
    for value in (0.25, 0.5, 0.125):
        lr.fill_(value)
        plain = case.ours(copy.deepcopy(optimizer.param_groups[0]["params"]), **{**case.kwargs, "lr": value})
        plain.load_state_dict({**copy.deepcopy(optimizer.state_dict()), "param_groups": plain.state_dict()["param_groups"]})
        draw_gradients(optimizer.param_groups[0]["params"], plain.param_groups[0]["params"])
        optimizer.step()
        plain.step()
        assert all(map(torch.equal, optimizer.param_groups[0]["params"], plain.param_groups[0]["params"]))
    assert lr.item() == 0.125
    assert lr.shape == shape


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_tensor_betas_are_read_at_every_step(shape):
    betas = torch.full(shape, 0.75), torch.full(shape, 0.875)
    optimizer = fusedopt.Adam(make_parameters(SHAPES), lr=0.1, betas=betas)
    plain = fusedopt.Adam(copy.deepcopy(optimizer.param_groups[0]["params"]), lr=0.1, betas=(0.75, 0.875))
    for value in (0.75, 0.5, 0.25):
        for beta in optimizer.param_groups[0]["betas"]:
            beta.fill_(value)
        plain.param_groups[0]["betas"] = (value, value)
        draw_gradients(optimizer.param_groups[0]["params"], plain.param_groups[0]["params"])
        optimizer.step()
        plain.step()
        assert all(map(torch.equal, optimizer.param_groups[0]["params"], plain.param_groups[0]["params"]))


@cases
def test_numbers_of_other_types(case):
    """NumPy's numbers and whole ones are what configuration files and sweeps hand over."""
    import numpy

    optimizer = case.make_ours(make_parameters(SHAPES))
    for lr in (numpy.float64(0.1), numpy.float32(0.25), 1, 0):
        optimizer.param_groups[0]["lr"] = lr
        step(case, optimizer)


# --- schedulers --------------------------------------------------------------------------------------------------------------

SCHEDULERS = {
    "LambdaLR": lambda module, o: module.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda module, o: module.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda module, o: module.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda module, o: module.MultiStepLR(o, [1, 3], 0.5),
    "ConstantLR": lambda module, o: module.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda module, o: module.LinearLR(o, 0.5, total_iters=4),
    "ExponentialLR": lambda module, o: module.ExponentialLR(o, 0.8),
    "SequentialLR": lambda module, o: module.SequentialLR(o, [module.ConstantLR(o, 0.5, 2), module.ExponentialLR(o, 0.8)], [2]),
    "CosineAnnealingLR": lambda module, o: module.CosineAnnealingLR(o, 5),
    "ChainedScheduler": lambda module, o: module.ChainedScheduler([module.ConstantLR(o, 0.5, 2), module.ExponentialLR(o, 0.8)]),
    "ReduceLROnPlateau": lambda module, o: module.ReduceLROnPlateau(o, patience=0),
    "CyclicLR": lambda module, o: module.CyclicLR(o, 0.01, 0.1, 2, base_momentum=0.5),
    "CosineAnnealingWarmRestarts": lambda module, o: module.CosineAnnealingWarmRestarts(o, 2),
    "OneCycleLR": lambda module, o: module.OneCycleLR(o, 0.1, total_steps=6),
    "PolynomialLR": lambda module, o: module.PolynomialLR(o, 5),
    "RobbinsMonroLR": lambda module, o: lr_scheduler.RobbinsMonroLR(o, 3.0),
}


def test_every_scheduler_of_torch_is_tried():
    classes = {
        name for name in torch_schedulers.__all__ if inspect.isclass(getattr(torch_schedulers, name)) and name != "LRScheduler"
    }
    assert classes <= SCHEDULERS.keys()


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float lr", "tensor lr"])
@pytest.mark.parametrize("name", ["sgd-momentum", "adamw"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers(scheduler, name, tensor_lr):
    """OneCycleLR and CyclicLR also change the momentum, or the betas."""
    case = named(name)
    lr = torch.tensor(0.1, dtype=torch.float64) if tensor_lr else 0.1
    optimizer = case.make_ours(make_parameters(SHAPES), lr=lr)
    schedule = SCHEDULERS[scheduler](lr_scheduler, optimizer)
    reference = case.make_truth(make_parameters([(1,)]), lr=copy.deepcopy(lr))
    expected = SCHEDULERS[scheduler](torch_schedulers, reference)
    for _ in range(5):
        step(case, optimizer)
        reference.step()
        for each in (schedule, expected):
            each.step(1.0) if scheduler == "ReduceLROnPlateau" else each.step()
        for key in ("lr", "momentum", "betas"):
            if key in reference.param_groups[0]:
                assert optimizer.param_groups[0][key] == reference.param_groups[0][key]


def test_robbins_monro_formula():
    optimizer = fusedopt.SGD([{"params": make_parameters([(3,)])}, {"params": make_parameters([(2,)]), "lr": 0.5}], lr=0.2)
    schedule = lr_scheduler.RobbinsMonroLR(optimizer, b=3.0)
    for t in range(6):
        assert schedule.get_last_lr() == pytest.approx([0.2 * 3 / (3 + t), 0.5 * 3 / (3 + t)], rel=1e-15)
        assert [group["lr"] for group in optimizer.param_groups] == schedule.get_last_lr()
        step(named("sgd"), optimizer)
        schedule.step()


def test_robbins_monro_state_dict_continues():
    optimizers = [fusedopt.SGD(make_parameters([(3,)]), lr=0.2) for _ in range(2)]
    first = lr_scheduler.RobbinsMonroLR(optimizers[0], b=3.0)
    for _ in range(4):
        step(named("sgd"), optimizers[0])
        first.step()
    second = lr_scheduler.RobbinsMonroLR(optimizers[1], b=1.0)
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    second.load_state_dict(first.state_dict())
    assert second.b == 3.0
    for _ in range(2):
        for optimizer, schedule in zip(optimizers, (first, second), strict=True):
            step(named("sgd"), optimizer)
            schedule.step()
        assert second.get_last_lr() == first.get_last_lr()
    assert first.get_last_lr() == pytest.approx([0.2 * 3 / (3 + 6)])


@pytest.mark.parametrize("b", [0.0, -1.0, float("nan")])
def test_robbins_monro_refuses_b(b):
    with pytest.raises(ValueError, match="b"):
        lr_scheduler.RobbinsMonroLR(fusedopt.SGD(make_parameters([(3,)]), lr=0.1), b=b)
