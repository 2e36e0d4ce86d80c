"""The public interface: ``import fusedopt as optim`` stands in for ``torch.optim``, name by name and message by message."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.optim import swa_utils

import fusedopt as optim

OURS = ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam", "ASGD", "Rprop", "Adafactor"]
ours_of_torch = pytest.mark.parametrize("name", OURS)
every_class = pytest.mark.parametrize("name", [*OURS, "Momentum"])
#: Options of ours beside torch's: keyword-only, with their defaults.
EXTRA = {"SGD": {"decoupled_weight_decay": False, "capturable": False}, "Adam": {}, "AdamW": {}, "Adagrad": {"capturable": False}}
EXTRA |= {name: {"fused": None} for name in ("RMSprop", "Adadelta", "Adamax", "NAdam", "RAdam", "ASGD", "Rprop", "Adafactor")}
#: Whose update needs sums over whole tensors, and is no rule on elements.
WITHOUT_STEP_OPTIONS = ("Adafactor",)


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
    elif name == "swap_in_optimizer_params_and_state":  # which ours calls: see test_swapping
        assert inspect.signature(value).parameters.keys() == inspect.signature(theirs).parameters.keys()
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
    if name not in WITHOUT_STEP_OPTIONS:
        options = added.pop()
        assert (options.kind, options.annotation) == (inspect.Parameter.VAR_KEYWORD, "Unpack[StepOptions]")
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
        "options": inspect.Parameter.empty,
    }
    assert {name: p.default for name, p in parameters.items()} == expected
    keyword_only = [name for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    assert keyword_only == ["decoupled_weight_decay", "maximize", "fused"]


@every_class
def test_step_has_torchs_signature(name):
    # GradScaler looks for a parameter `grad_scaler`, and takes the deprecated way if there is one.
    assert list(inspect.signature(getattr(optim, name)([parameter()], lr=0.1).step).parameters) == ["closure", "zero_grad"]


@ours_of_torch
def test_defaults_are_torchs(name):
    ours, theirs = (getattr(module, name)([parameter()]).defaults for module in (optim, torch.optim))
    assert {key: ours[key] for key in theirs} == theirs
    # What torch lacks is no key of groups unless it is asked for: a checkpoint of torch's, read by their keys, does not have it.
    assert ours.keys() == theirs.keys()
    arguments = inspect.signature(getattr(optim, name)).parameters
    assert {key: arguments[key].default for key in EXTRA[name]} == EXTRA[name]
    for key, value in {"fused": True, "capturable": True, "decoupled_weight_decay": True}.items():
        if key in EXTRA[name]:
            optimizer = getattr(optim, name)([parameter()], **{key: value})
            assert optimizer.param_groups[0][key] is optimizer.defaults[key] is True


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
    "empty": list,
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
