"""Where torch's implementation, or the rule on torch tensors, runs in place of a kernel: right, said so, hooks run once."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import fusedopt
from cases import CASES, copies, draw_gradients, make_parameters, named
from fusedopt.kernels import backends
from snapshot import refused, same_bits
from wrapped import WrappedTensor

CLASSES = ["SGD", "Adam", "AdamW", "Momentum"]


def sparse_gradient(p):
    p.grad = torch.sparse_coo_tensor([[0, 2]], [1.0, 2.0], p.shape, check_invariants=True)


def dense_gradient(p):
    p.grad = torch.ones_like(p)


def kernel():
    return torch.nn.Parameter(torch.ones(5)), dense_gradient


def no_plain_memory():
    return torch.nn.Parameter(WrappedTensor(torch.ones(5))), dense_gradient


def constant():
    # A parameter without a graph: torch's differentiable step works in place on it.
    return torch.ones(5), dense_gradient


def sparse():
    return torch.nn.Parameter(torch.ones(5)), sparse_gradient


WAYS = {
    "kernel": (CLASSES, kernel, {}),
    "fused=True": (CLASSES, kernel, {"fused": True}),
    "fused=False": (CLASSES, kernel, {"fused": False}),
    "foreach=True": (CLASSES[:3], kernel, {"foreach": True}),
    "differentiable=True": (CLASSES[:3], constant, {"differentiable": True}),
    "operations of torch": (CLASSES, no_plain_memory, {}),
    "sparse": (["SGD"], sparse, {}),
}


@pytest.mark.filterwarnings("ignore:.*runs by operations of torch:UserWarning")
@pytest.mark.parametrize(
    ("name", "make", "options"),
    [pytest.param(name, make, options, id=f"{name}-{way}") for way, (names, make, options) in WAYS.items() for name in names],
)
def test_hooks_run_once(name, make, options):
    # torch wraps the `step` of a class in the hooks when the first optimizer of exactly that class is built: from then on
    # a subclass that called it would run them twice.
    if hasattr(torch.optim, name):
        getattr(torch.optim, name)([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    calls = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("every optimizer's before")),
        register_optimizer_step_post_hook(lambda *_: calls.append("every optimizer's after")),
    ]
    try:
        param, set_gradient = make()
        optimizer = getattr(fusedopt, name)([param], lr=0.1, **options)
        optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
        optimizer.register_step_post_hook(lambda *_: calls.append("after"))
        set_gradient(param)
        before = param.detach().clone()
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert calls == ["every optimizer's before", "before", "after", "every optimizer's after"]
    assert not torch.equal(param, before)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("options", [{}, {"fused": False}], ids=["kernel", "fused=False"])
def test_pre_hooks_may_replace_the_closure(name, options):
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = getattr(fusedopt, name)([param], lr=0.1, **options)
    optimizer.register_step_pre_hook(lambda _, args, kwargs: ((args[0], lambda: "replaced"), kwargs))
    param.grad = torch.ones(3)
    assert optimizer.step(lambda: "given") == "replaced"


# --- torch's own implementations, by our classes ------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"fused": False}, {"foreach": False, "fused": False}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case.truth.__module__.startswith("torch.optim")], ids=str)
def test_torch_runs_when_asked_for(case, options):
    """Bit for bit what torch.optim computes with the same arguments: it is torch's code that runs."""
    if options.get("foreach") and isinstance(case.kwargs["lr"], torch.Tensor) and "adam" in case.name:
        pytest.skip("torch's foreach Adam takes no tensor lr")
    ours, theirs = make_parameters([(33,), (4, 7), ()]), []
    theirs = copies(ours)
    known = {name: value for name, value in options.items() if name in inspect.signature(case.truth).parameters}
    optimizers = (
        case.make_ours(ours, **options),
        case.truth(theirs, **{**case.kwargs, **known, "foreach": options.get("foreach", False)}),
    )
    for _ in range(3):
        draw_gradients(ours, theirs)
        for optimizer in optimizers:
            optimizer.step()
    assert all(map(torch.equal, ours, theirs))
    for p, q in zip(ours, theirs, strict=True):
        states = optimizers[0].state[p], optimizers[1].state[q]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("name", ["sgd-nesterov-l2", "adam-amsgrad-l2", "adamw"])
def test_differentiable_step_has_a_graph(name):
    """The gradient of what follows a step, by the step's own learning rate, is torch's."""
    case, results = named(name), []
    for make in (case.make_ours, case.truth):
        lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        start = torch.linspace(-1, 1, 8, dtype=torch.float64).requires_grad_()
        param = start.clone()
        param.grad = torch.linspace(0.5, 2, 8, dtype=torch.float64).requires_grad_()
        options = {**case.kwargs, "lr": lr, "differentiable": True}
        (make([param], **options) if make is case.truth else case.ours([param], **options)).step()
        param.square().sum().backward()
        results.append((lr.grad, start.grad))
    assert all(map(torch.equal, *results))
    assert results[0][0] != 0


@pytest.mark.parametrize("found_inf", [0.0, 2.0])
@pytest.mark.parametrize("name", CLASSES[:3])
def test_differentiable_step_unscales_and_skips(name, found_inf):
    results = []
    for scale in (1.0, 4.0):
        param = torch.ones(8)
        param.grad = torch.linspace(1, 2, 8) * scale
        optimizer = getattr(fusedopt, name)([param], lr=0.1, differentiable=True)
        if scale != 1:
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(found_inf)
        if scale != 1 or not found_inf:
            optimizer.step()
        results.append(param)
    assert torch.equal(*results)


# --- the rule on torch tensors: warned of once, asked for by the environment ---------------------------------------------------


def test_falling_back_is_warned_of_once_for_an_optimizer():
    params = [torch.nn.Parameter(WrappedTensor(torch.ones(size))) for size in (4, 5)]
    optimizer = fusedopt.AdamW(params, lr=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.warns(UserWarning, match="WrappedTensor") as warned:
        optimizer.step()
    assert len(warned) == 1
    assert warned[0].filename == __file__  # the line that called step
    optimizer.step()  # a warning would be an error here
    params[1].grad = None  # and another plan gives no other one
    optimizer.step()


def test_no_warning_where_a_kernel_runs_or_torch_was_asked_for():
    for options in ({}, {"fused": True}, {"fused": False}, {"foreach": True}):
        params = make_parameters([(5,)])
        draw_gradients(params)
        fusedopt.AdamW(params, lr=0.1, **options).step()


@pytest.mark.filterwarnings("ignore:.*runs by operations of torch:UserWarning")
@pytest.mark.parametrize("name", ["sgd-nesterov-l2", "sgd-momentum-decoupled", "momentum", "adam-amsgrad-l2", "adamw"])
def test_parameters_that_are_no_plain_memory(name):
    """The rule runs on them by operations of torch: equal to the rule on plain tensors, bit for bit."""
    case = named(name)
    plain = make_parameters([(7,), (3, 2), ()])
    params = [torch.nn.Parameter(WrappedTensor(p.detach().clone())) for p in plain]
    optimizer, expected = case.make_ours(params), case.make_ours(plain)
    for _ in range(3):
        draw_gradients(plain)
        for p, q in zip(params, plain, strict=True):
            p.grad = WrappedTensor(q.grad.clone())
        optimizer.step()
        with backends.use("tensor"):
            expected.step()
    for p, q in zip(params, plain, strict=True):
        assert same_bits(p.inner, q)
        assert all(isinstance(value, WrappedTensor) for key, value in optimizer.state[p].items() if key != "step")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("case", [named(name) for name in ("sgd-nesterov-l2", "adam-amsgrad-l2", "adamw")], ids=str)
def test_complex_parameters_agree_with_torch(case, dtype):
    ours = [torch.nn.Parameter(torch.randn(7, dtype=dtype)), torch.nn.Parameter(torch.randn(3, 2, dtype=torch.float64))]
    theirs = copies(ours)
    optimizers = case.make_ours(ours), case.make_truth(theirs)
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("name", CLASSES)
def test_environment_turns_kernels_off(name, monkeypatch):
    param, optimizer = torch.nn.Parameter(torch.ones(3)), None
    param.grad = torch.ones(3)
    optimizer = getattr(fusedopt, name)([param], lr=0.1)
    assert "numba" in optimizer.explain()
    monkeypatch.setenv("FUSEDOPT_DISABLE", "1")
    other = getattr(fusedopt, name)([param], lr=0.1)
    explanation = other.explain()
    assert "numba" not in explanation
    assert "tensor" in explanation
    assert "FUSEDOPT_DISABLE" in explanation
    other.step()
    assert (param < 1).all()
    monkeypatch.setenv("FUSEDOPT_DISABLE", "0")
    assert "numba" in getattr(fusedopt, name)([param], lr=0.1).explain()


@pytest.mark.parametrize("name", CLASSES)
def test_environment_turns_kernels_off_for_fused_too(name, monkeypatch):
    """A script that asks for kernels must run without them when its user turns them off."""
    monkeypatch.setenv("FUSEDOPT_DISABLE", "1")
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = getattr(fusedopt, name)([param], lr=0.1, fused=True)
    assert "FUSEDOPT_DISABLE" in optimizer.explain()
    optimizer.step()
    assert (param < 1).all()


@pytest.mark.parametrize("name", CLASSES)
def test_every_way_can_be_forced(name):
    results = {}
    for way in ("numpy", "numba", "tensor"):
        param = torch.nn.Parameter(torch.linspace(-2, 2, 100))
        param.grad = torch.linspace(1, -3, 100)
        optimizer = getattr(fusedopt, name)([param], lr=0.1)
        with backends.use(way):
            assert way in optimizer.explain()
            optimizer.step()
        results[way] = param.detach()
    assert torch.equal(results["numpy"], results["numba"])
    torch.testing.assert_close(results["tensor"], results["numba"])


def test_halves_on_a_processor_without_conversions(monkeypatch):
    """LLVM would call a function that is not there, and end the process."""
    monkeypatch.setattr(backends, "half_obstacle", lambda: "no F16C")
    half, single = (torch.nn.Parameter(torch.ones(20, dtype=dtype)) for dtype in (torch.float16, torch.float32))
    optimizer = fusedopt.AdamW([half, single], lr=0.1)
    for p in (half, single):
        p.grad = torch.ones_like(p)
    with pytest.warns(UserWarning, match="no F16C"):
        optimizer.step()
    assert ["-> tensor" in line for line in optimizer.explain().splitlines()] == [True, False]
    assert half[0].item() == single[0].half().item() != 1
    # Halves among the states alone.
    optimizer.state[single]["exp_avg"] = optimizer.state[single]["exp_avg"].half()
    before = single.detach().clone()
    optimizer.step()
    assert (single != before).all()


@pytest.mark.parametrize("name", CLASSES)
def test_steps_that_a_graph_cannot_capture_are_refused(name, monkeypatch):
    """A graph would replay frozen bias corrections, or addresses that were never uploaded. The device is pretended."""
    params = make_parameters([(5,)])
    draw_gradients(params)
    optimizer = getattr(fusedopt, name)(params, lr=0.1)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    refused(optimizer, match="capturable" if name in ("Adam", "AdamW") else "outside of the capture first")
