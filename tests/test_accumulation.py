"""Gradients that join the first moment: the sum that they make, what it rounds otherwise, and who cannot."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import fusedopt
from cases import CASES, MOMENTUM, SGD, Case, copies, device_of, make_parameters, tensor_lr
from fusedopt.kernels import backends
from tolerances import unit_roundoff
from training import make_batches, make_model

WHO_CAN = [
    Case("sgd", *SGD, {"lr": 0.1, "momentum": 0.9}),
    Case("sgd-small-momentum", *SGD, {"lr": 0.1, "momentum": 0.05}),
    Case("sgd-l2-maximize", *SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "maximize": True}),
    Case("sgd-decoupled", *SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    Case("sgd-tensor-lr", *SGD, {"lr": tensor_lr(0.1), "momentum": 0.9}),
    Case("momentum", *MOMENTUM, {"lr": 0.1, "beta": 0.9}),
    Case("momentum-small-beta", *MOMENTUM, {"lr": 0.1, "beta": 0.1}),
    Case("momentum-l2", *MOMENTUM, {"lr": 0.1, "beta": 0.9, "weight_decay": 0.1, "decoupled_weight_decay": False}),
    Case("momentum-decoupled-maximize", *MOMENTUM, {"lr": 0.1, "beta": 0.9, "weight_decay": 0.1, "maximize": True}),
]
each_who_can = pytest.mark.parametrize("case", WHO_CAN, ids=str)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
SHAPES = [(3, 5), (1,), (40,), (20_000,), (0,)]


def draw(params, dtype=None):
    return [torch.randn(p.shape, dtype=torch.float64).to(p.device, dtype or p.dtype) for p in params]


def give(params, gradients):
    for p, gradient in zip(params, gradients, strict=True):
        p.grad = None if gradient is None else gradient.clone()


def add(params, gradients):
    for p, gradient in zip(params, gradients, strict=True):
        if gradient is not None:
            p.grad = gradient.clone() if p.grad is None else p.grad + gradient


def step_by_joining(optimizer, params, passes):
    """A step by the gradients of all passes; all but those of the last join the moments."""
    for number, gradients in enumerate(passes):
        give(params, gradients)
        if number < len(passes) - 1:
            optimizer.accumulate()
            assert all(p.grad is None for p in params)
    optimizer.step()
    optimizer.zero_grad()


def step_by_adding(optimizer, params, passes):
    for gradients in passes:
        add(params, gradients)
    optimizer.step()
    optimizer.zero_grad()


def weights_of(case):
    """What the past, and a gradient, weigh in the moment."""
    momentum = case.kwargs.get("momentum", case.kwargs.get("beta"))
    return momentum, 1.0 if "momentum" in case.kwargs else 1.0 - momentum


@pytest.mark.parametrize("count", [1, 2, 5])
@each_dtype
@each_who_can
def test_rounding_alone_differs(case, dtype, count):
    """Within what follows from another order of sums.

    The moment is a sum of terms: the past times the momentum, each of k gradients times its weight, the decay. Rounding a
    coefficient, the products with it, and the sums that a term takes part in change it by a factor of 1 + u each, at most
    k + 4 of these here and k + 2 where gradients are added up first; so the results differ by at most (2 k + 6) u times the sum
    of the magnitudes of the terms, and as much times lr, and two roundings of the last difference, are what the parameter does.
    """
    params = make_parameters(SHAPES, dtype)
    optimizer = case.make_ours(params)
    for _ in range(2):  # there is a past
        step_by_adding(optimizer, params, [draw(params)])
    right_params = copies(params)
    right = case.make_ours(right_params)
    right.load_state_dict(optimizer.state_dict())
    start = [p.detach().double() for p in params]
    past = [optimizer.state[p]["momentum_buffer"].double() for p in params]
    passes = [draw(params) for _ in range(count)]
    step_by_joining(optimizer, params, passes)
    step_by_adding(right, right_params, passes)

    u = unit_roundoff(dtype)
    momentum, weight = weights_of(case)
    l2 = 0.0 if case.kwargs.get("decoupled_weight_decay", "momentum" not in case.kwargs) else case.kwargs.get("weight_decay", 0.0)
    differ = False
    for index, (p, q) in enumerate(zip(params, right_params, strict=True)):
        gradients = sum(each[index].double().abs() for each in passes)
        terms = momentum * past[index].abs() + weight * (gradients + l2 * start[index].abs())
        bound = (2 * count + 6) * u * terms
        moments = (each.state[own]["momentum_buffer"].double() for each, own in ((optimizer, p), (right, q)))
        differ |= not torch.equal(p, q)
        assert (next(moments) - next(moments)).abs().le(bound).all()
        lr = float(case.kwargs["lr"])
        assert (p.double() - q.double()).abs().le(lr * bound * (1 + 4 * u) + 4 * u * (start[index].abs() + lr * terms)).all()
    assert differ == (count > 1), "nothing has joined a moment, or rounding differs where nothing has"


@each_who_can
def test_many_steps(case):
    """From the first one on, whose moments begin with a gradient."""
    params = make_parameters(SHAPES, torch.float64)
    right_params = copies(params)
    optimizer, right = case.make_ours(params, ema_decay=0.5), case.make_ours(right_params, ema_decay=0.5)
    for _ in range(4):
        passes = [draw(params) for _ in range(3)]
        step_by_joining(optimizer, params, passes)
        step_by_adding(right, right_params, passes)
    for p, q in zip(params, right_params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)
        for name, value in right.state[q].items():
            torch.testing.assert_close(optimizer.state[p][name], value, rtol=1e-12, atol=1e-13)


PATTERNS = {
    "first pass alone": [True, False, False],
    "last pass alone": [False, False, True],
    "in between": [False, True, False],
    "never": [False, False, False],
    "not the last": [True, True, False],
}


@each_who_can
def test_gradients_that_are_not_there_in_each_pass(case):
    params = make_parameters([(7,)] * len(PATTERNS), torch.float64)
    right_params = copies(params)
    optimizer, right = case.make_ours(params), case.make_ours(right_params)
    for _ in range(3):
        passes = [
            [gradient if pattern[number] else None for gradient, pattern in zip(draw(params), PATTERNS.values(), strict=True)]
            for number in range(3)
        ]
        step_by_joining(optimizer, params, passes)
        step_by_adding(right, right_params, passes)
    for pattern, p, q in zip(PATTERNS, params, right_params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13, msg=lambda text, pattern=pattern: f"{pattern}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex64], ids=str)
@pytest.mark.parametrize("backend", ["tensor", "numba", pytest.param("triton", marks=pytest.mark.triton)])
def test_equal_bits_of_all_backends(backend, dtype):
    """The gradients of some parameters lie otherwise than they."""
    start = [torch.randn(shape).to(dtype) for shape in ((3, 5), (1025,), (17,))]
    passes = [[torch.randn(values.shape).to(dtype) for values in start] for _ in range(3)]
    found = []
    for name in ("numpy", backend):
        device = device_of(name)
        params = [torch.nn.Parameter(values.to(device, copy=True)) for values in start]
        optimizer = fusedopt.SGD(params, lr=0.1, momentum=0.9)
        with backends.use(name):
            step_by_joining(
                optimizer,
                params,
                [[g.to(device) if g.dim() == 1 else g.to(device).t().contiguous().t() for g in e] for e in passes],
            )
        found.append([(p.detach().cpu(), optimizer.state[p]["momentum_buffer"].cpu()) for p in params])
    for ours, right in zip(*found, strict=True):
        for a, b in zip(ours, right, strict=True):
            assert torch.equal(a, b)


def test_one_launch_for_all_parameters(monkeypatch):
    params = make_parameters([10] * 50)
    optimizer = fusedopt.SGD(params, momentum=0.9)
    launches = []
    run = backends.run
    monkeypatch.setattr(backends, "run", lambda bucket, launch: (launches.append(bucket.kind.name), run(bucket, launch)))
    for _ in range(2):
        launches.clear()
        step_by_joining(optimizer, params, [draw(params) for _ in range(3)])
        assert launches == ["joining_gradient_float32_float32"] * 2 + ["momentum_float32_float32_float32"]


@pytest.mark.parametrize("option", [{"fused": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_implementations(option):
    params = make_parameters([5, 6], torch.float64)
    right_params = copies(params)
    optimizer = fusedopt.SGD(params, momentum=0.9, **option)
    right = fusedopt.SGD(right_params, momentum=0.9, **option)
    for _ in range(3):
        passes = [draw(params) for _ in range(3)]
        step_by_joining(optimizer, params, passes)
        step_by_adding(right, right_params, passes)
    for p, q in zip(params, right_params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_a_checkpoint_between_passes(way):
    params = make_parameters([5, 6], torch.float64)
    optimizer = fusedopt.SGD(params, lr=0.1, momentum=0.9)
    first, second, third = (draw(params) for _ in range(3))
    step_by_adding(optimizer, params, [first])
    give(params, second)
    optimizer.accumulate()
    if way == "state_dict":
        copied_params = copies(params)
        copied = fusedopt.SGD(copied_params, lr=0.1, momentum=0.9)
        copied.load_state_dict(optimizer.state_dict())
    else:
        copied_params, copied = (
            copy.deepcopy((params, optimizer)) if way == "deepcopy" else pickle.loads(pickle.dumps((params, optimizer)))
        )
    for each, own in ((optimizer, params), (copied, copied_params)):
        give(own, third)
        each.step()
    assert all(torch.equal(p, q) for p, q in zip(params, copied_params, strict=True))


def test_accumulate_without_gradients_changes_nothing():
    params = make_parameters([5])
    optimizer = fusedopt.SGD(params, momentum=0.9)
    optimizer.accumulate()
    optimizer.step()
    assert not optimizer.state


# --- inside backward -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit_bytes", [0, 200, 1 << 20])
def test_inside_backward(unit_bytes):
    """Gradients are gone after each pass, and joined the moments."""
    model, right = make_model(), make_model()
    extra = [torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2)]
    optimizers = [fusedopt.SGD([*m.parameters(), p], lr=0.1, momentum=0.9) for m, p in zip((model, right), extra, strict=True)]
    handle = fusedopt.step_in_backward(model, optimizers[0], unit_bytes=unit_bytes)
    for start in range(0, 9, 3):
        for number, (x, y) in enumerate(make_batches(9)[start : start + 3]):
            losses = [torch.nn.functional.mse_loss(each(x), y) for each in (model, right)]
            if number == 1:  # it takes no part in the last pass
                losses = [loss + p.square().sum() for loss, p in zip(losses, extra, strict=True)]
            with handle.accumulating(number < 2, into_momentum=True):
                losses[0].backward()
            if number < 2:
                assert all(p.grad is None for p in (*model.parameters(), extra[0]))
            losses[1].backward()
        for optimizer in optimizers:
            optimizer.step()
        assert all(p.grad is None for p in (*model.parameters(), extra[0]))
        optimizers[1].zero_grad()
    for p, q in zip((*model.parameters(), extra[0]), (*right.parameters(), extra[1]), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)
    assert not torch.equal(extra[0], torch.ones(3, dtype=torch.float64))


def test_inside_backward_refused_for_others():
    model = make_model()
    optimizer = fusedopt.AdamW(model.parameters())
    handle = fusedopt.step_in_backward(model, optimizer, unit_bytes=0)
    x, y = make_batches(1)[0]
    before = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match=r"AdamW.accumulate\(\) would not be exact"), handle.accumulating(into_momentum=True):
        torch.nn.functional.mse_loss(model(x), y).backward()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))


# --- who cannot ------------------------------------------------------------------------------------------------------------------


def cannot():
    """The variants of all optimizers that have no moment which is a sum of gradients."""
    for case in CASES:
        plain = {"nesterov", "dampening"}.isdisjoint(case.kwargs)
        if not (case.ours is fusedopt.Momentum or (case.ours is fusedopt.SGD and case.kwargs.get("momentum") and plain)):
            yield pytest.param(case.ours, case.kwargs, "would not be exact", id=case.name)
    sgd = {"lr": 0.1, "momentum": 0.9}
    yield pytest.param(fusedopt.Momentum, {"lr": 0.1, "beta": 0.0}, "would not be exact", id="momentum-without-memory")
    yield pytest.param(fusedopt.SGD, {**sgd, "max_grad_norm": 1.0}, "max_grad_norm=1.0 asks for the sum", id="max_grad_norm")
    yield pytest.param(fusedopt.SGD, {**sgd, "skip_nonfinite": True}, "skip_nonfinite=True asks for the sum", id="skip_nonfinite")
    yield pytest.param(fusedopt.SGD, {**sgd, "differentiable": True}, "differentiable=True asks for the sum", id="differentiable")


@pytest.mark.parametrize(("kind", "options", "message"), list(cannot()))
def test_refused(kind, options, message):
    params = make_parameters([5, 6])
    optimizer = kind(params, **copy.deepcopy(options))
    give(params, draw(params))
    gradients, values = [p.grad for p in params], [p.detach().clone() for p in params]
    states = copy.deepcopy(list(optimizer.state.values()))
    with pytest.raises(RuntimeError, match=message):
        optimizer.accumulate()
    assert all(p.grad is g and torch.equal(p, q) for p, g, q in zip(params, gradients, values, strict=True))
    for state, before in zip(optimizer.state.values(), states, strict=True):  # some begin with their parameters
        assert state.keys() == before.keys() and all(torch.equal(state[name], before[name]) for name in state)


@pytest.mark.parametrize("state_format", ["bf16", "8bit"])
def test_moments_in_few_bits_are_refused(state_format):
    params = make_parameters([5000], torch.bfloat16)
    optimizer = fusedopt.SGD(params, lr=0.1, momentum=0.9, state_format=state_format)
    for _ in range(2):  # before there is a moment, and after
        give(params, draw(params))
        with pytest.raises(RuntimeError, match=f"state_format='{state_format}'"):
            optimizer.accumulate()
        optimizer.step()


def test_moments_of_their_own_format():
    params = make_parameters([5000], torch.bfloat16)
    copied = copies(params)
    optimizers = [fusedopt.SGD(own, lr=0.1, momentum=0.9, state_format="fp32") for own in (params, copied)]
    passes = [draw(params) for _ in range(2)]
    step_by_joining(optimizers[0], params, passes)
    assert optimizers[0].state[params[0]]["momentum_buffer"].dtype == torch.float32
    # Gradients that are added in float32: joining rounds none of their sums to bfloat16.
    copied[0].grad_dtype = torch.float32
    copied[0].grad = passes[0][0].float() + passes[1][0].float()
    optimizers[1].step()
    torch.testing.assert_close(*(o.state[own[0]]["momentum_buffer"] for o, own in zip(optimizers, (params, copied), strict=True)))


def test_sparse_gradients_are_refused():
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    optimizer = fusedopt.SGD(embedding.parameters(), momentum=0.9)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="takes no sparse gradients"):
        optimizer.accumulate()


def test_a_parameter_listed_twice_is_refused():
    p = torch.nn.Parameter(torch.ones(3))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = fusedopt.SGD([p, p], momentum=0.9)
    p.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="listed twice"):
        optimizer.accumulate()


def test_a_momentum_that_changes_within_a_step_is_refused():
    params = make_parameters([5])
    optimizer = fusedopt.SGD(params, lr=0.1, momentum=0.9)
    give(params, draw(params))
    optimizer.accumulate()
    give(params, draw(params))
    optimizer.param_groups[0]["momentum"] = 0.8
    with pytest.raises(RuntimeError, match=r"momentum of group 0 was \(0.9,\).*and is \(0.8,\)"):
        optimizer.step()
    optimizer.param_groups[0]["momentum"] = 0.9
    optimizer.step()


def test_a_gradient_scaler_is_refused():
    params = make_parameters([5])
    optimizer, scaler = fusedopt.SGD(params, lr=0.1, momentum=0.9), torch.amp.GradScaler("cpu")
    scaler.scale(params[0].sum()).backward()
    optimizer.accumulate()
    scaler.scale(params[0].sum()).backward()
    with pytest.raises(RuntimeError, match="a gradient scaler had scaled"):
        scaler.step(optimizer)
