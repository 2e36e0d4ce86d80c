"""The public interface: ``import fusedopt as optim`` stands in for ``torch.optim``, name by name and message by message."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from torch.optim import swa_utils

import fusedopt
import fusedopt as optim
from cases import CASES, draw_gradients, make_parameters, named
from single_step import checked_step
from snapshot import same_bits

OURS = ["SGD", "Adam", "AdamW"]
ours_of_torch = pytest.mark.parametrize("name", OURS)
every_class = pytest.mark.parametrize("name", [*OURS, "Momentum"])
#: Options of ours beside torch's: keyword-only, with their defaults.
EXTRA = {"SGD": {"decoupled_weight_decay": False}, "Adam": {}, "AdamW": {}}


def parameter(size=3):
    return torch.nn.Parameter(torch.ones(size))


# --- names -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(torch.optim.__all__))
def test_every_public_name_of_torch_optim_is_here(name):
    assert name in optim.__all__
    value, theirs = getattr(optim, name), getattr(torch.optim, name)
    if name in OURS:
        assert issubclass(value, theirs)
        assert value is not theirs
        assert value.__name__ == value.__qualname__ == name
    elif name in ("lr_scheduler", "swa_utils"):
        assert all(getattr(value, each) is getattr(theirs, each) for each in theirs.__all__)
    else:
        assert value is theirs


@pytest.mark.parametrize("name", ["Momentum", "lr_scheduler", "swa_utils", "no_decay_groups", "__version__"])
def test_names_of_ours(name):
    assert hasattr(optim, name)


def test_all_names_exist():
    namespace = {}
    exec("from fusedopt import *", namespace)
    assert set(optim.__all__) <= namespace.keys()
    assert len(set(optim.__all__)) == len(optim.__all__)


def test_modules_can_be_imported_by_name():
    from fusedopt.lr_scheduler import LambdaLR, RobbinsMonroLR
    from fusedopt.swa_utils import AveragedModel

    assert LambdaLR is torch.optim.lr_scheduler.LambdaLR
    assert issubclass(RobbinsMonroLR, torch.optim.lr_scheduler.LRScheduler)
    assert AveragedModel is swa_utils.AveragedModel


# --- signatures and messages -------------------------------------------------------------------------------------------------


@ours_of_torch
def test_signature_is_torchs_and_keywords_of_ours(name):
    ours, theirs = (list(inspect.signature(getattr(module, name)).parameters.values()) for module in (optim, torch.optim))
    added = ours[len(theirs) :]
    assert [(p.name, p.kind, p.default) for p in ours[: len(theirs)]] == [(p.name, p.kind, p.default) for p in theirs]
    assert {p.name: p.default for p in added} == EXTRA[name]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in added)


def test_signature_of_momentum():
    parameters = inspect.signature(optim.Momentum).parameters
    expected = {
        "params": inspect.Parameter.empty,
        "lr": inspect.Parameter.empty,
        "beta": 0.9,
        "weight_decay": 0,
        "decoupled_weight_decay": True,
        "maximize": False,
        "fused": None,
    }
    assert {name: p.default for name, p in parameters.items()} == expected
    keyword_only = [name for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    assert keyword_only == ["decoupled_weight_decay", "maximize", "fused"]


@every_class
def test_step_has_torchs_signature(name):
    # GradScaler looks for a parameter `grad_scaler`, and takes the deprecated way if there is one.
    assert list(inspect.signature(getattr(optim, name)([parameter()], lr=0.1).step).parameters) == ["closure"]


@ours_of_torch
def test_defaults_are_torchs(name):
    ours, theirs = (getattr(module, name)([parameter()]).defaults for module in (optim, torch.optim))
    assert {key: ours[key] for key in theirs} == theirs
    assert {key: ours[key] for key in ours.keys() - theirs.keys()} == EXTRA[name]


TENSOR = torch.tensor
WRONG = {
    "SGD": [
        {"lr": -1.0}, {"momentum": -0.5}, {"weight_decay": -0.1}, {"nesterov": True}, {"lr": TENSOR([0.1, 0.2])},
        {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, {"lr": TENSOR(-1.0)}, {"fused": True, "foreach": True},
        {"fused": True, "differentiable": True},
    ],
    "Adam": [
        {"lr": -1.0}, {"eps": -1e-8}, {"betas": (1.0, 0.999)}, {"betas": (0.9, 1.0)}, {"betas": (-0.1, 0.5)},
        {"weight_decay": -0.1}, {"lr": TENSOR([0.1, 0.2])}, {"betas": (TENSOR(0.9), 0.999)}, {"lr": TENSOR(-1.0)},
        {"betas": (TENSOR([0.9, 0.9]), TENSOR(0.999))}, {"betas": (TENSOR(0.9), TENSOR([0.9, 0.9]))},
        {"lr": TENSOR(0.1), "foreach": True}, {"betas": (TENSOR(0.9), TENSOR(0.999)), "foreach": True},
        {"fused": True, "foreach": True}, {"fused": True, "differentiable": True}, {"betas": (0, 0.9)},
    ],
}  # fmt: skip
WRONG["AdamW"] = WRONG["Adam"]


@pytest.mark.parametrize(
    ("name", "options"), [pytest.param(n, o, id=f"{n}-{o}") for n, all_wrong in WRONG.items() for o in all_wrong]
)
def test_wrong_arguments_raise_what_torch_raises(name, options):
    with pytest.raises((ValueError, RuntimeError, TypeError)) as theirs:
        getattr(torch.optim, name)([parameter()], **options)
    with pytest.raises(theirs.type) as ours:
        getattr(optim, name)([parameter()], **options)
    assert str(ours.value) == str(theirs.value)


PARAMS = {
    "empty": lambda: [],
    "a tensor": lambda: torch.ones(3),
    "a set": lambda: [{"params": {parameter()}}],
    "no tensor": lambda: ["weight"],
    "non-leaf": lambda: [parameter() * 2],
    "named and not": lambda: [("weight", parameter()), parameter()],
    "in two groups": lambda: (lambda p: [{"params": [p]}, {"params": [p]}])(parameter()),
    "names in one group": lambda: [{"params": [("weight", parameter())]}, {"params": [parameter()]}],
}


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS.keys())
@every_class
def test_wrong_parameters_raise_what_torch_raises(name, params):
    with pytest.raises((ValueError, TypeError)) as theirs:
        torch.optim.SGD(params(), lr=0.1)
    with pytest.raises(theirs.type) as ours:
        getattr(optim, name)(params(), lr=0.1)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"lr": 0.1, "beta": 1.0}, "Invalid beta"),
        ({"lr": 0.1, "beta": -0.1}, "Invalid beta"),
        ({"lr": 0.1, "weight_decay": -0.5}, "Invalid weight_decay value: -0.5"),
        ({"lr": TENSOR([0.1, 0.2])}, "Tensor lr must be 1-element"),
    ],
    ids=str,
)
def test_wrong_arguments_of_momentum(options, message):
    with pytest.raises(ValueError, match=message):
        optim.Momentum([parameter()], **options)


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
    extra = [f"    {key}: {value}\n" for key, value in EXTRA[name].items()]
    for line in extra:
        assert line in ours
        ours = ours.replace(line, "")
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
