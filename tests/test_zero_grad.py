"""Gradients that a step leaves zero, in its own pass."""

from __future__ import annotations

import math

import pytest
import torch

import fusedopt
from cases import copies, device_of, draw_gradients, each_class, make_parameters, named
from fusedopt.kernels import backends
from layouts import ODD_GRADIENTS

SHAPES = [1, 7, (3, 5), 1000, (), 0, 20_000]


def assert_zero(params) -> None:
    for p in params:
        assert p.grad is not None
        assert p.grad.shape == p.shape
        assert not p.grad.any()


@each_class
@pytest.mark.parametrize("backend", ["numba", "numpy", "tensor", pytest.param("triton", marks=pytest.mark.triton)])
def test_the_step_is_the_same_and_gradients_are_zero(case, backend):
    torch.manual_seed(0)
    params = make_parameters(SHAPES, device=device_of(backend))
    others = copies(params)
    ours, plain = case.make_ours(params), case.make_ours(others)
    for _ in range(3):
        draw_gradients(params, others)
        addresses = [p.grad.data_ptr() for p in params]
        versions = [p.grad._version for p in params]
        with backends.use(backend):
            ours.step(zero_grad=True)
            plain.step()
        assert_zero(params)
        assert [p.grad.data_ptr() for p in params] == addresses, "kept where they were"
        assert all(p.grad._version > version for p, version in zip(params, versions, strict=True) if p.numel())
        assert all(q.grad.any() for q in others if q.numel())
        for p, q in zip(params, others, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.complex64], ids=str)
def test_in_every_dtype(dtype):
    params = make_parameters(SHAPES, dtype)
    draw_gradients(params)
    fusedopt.AdamW(params).step(zero_grad=True)
    assert_zero(params)


def test_the_option_of_a_group_does_the_same():
    params = make_parameters([3, 4])
    optimizer = fusedopt.SGD(params, lr=0.1, zero_grad_in_step=True)
    draw_gradients(params)
    optimizer.step()
    assert_zero(params)
    optimizer.param_groups[0]["zero_grad_in_step"] = False
    draw_gradients(params)
    optimizer.step()
    assert all(p.grad.any() for p in params)


def test_it_accumulates_anew():
    """What a next backward pass adds to is zero."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = fusedopt.SGD([p], lr=0.1, momentum=0.9)
    for _ in range(3):
        (p * torch.arange(3.0)).sum().backward()
        assert torch.equal(p.grad, torch.arange(3.0))
        optimizer.step(zero_grad=True)


def test_autograd_notices():
    x = torch.ones(3, requires_grad=True)
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    product = (x * p.grad).sum()
    fusedopt.SGD([p], lr=0.1).step(zero_grad=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_a_closure_may_be_given_too():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = fusedopt.SGD([p], lr=0.1)

    def closure():
        loss = (p * p).sum()
        loss.backward()
        return loss.detach()

    assert float(optimizer.step(closure, zero_grad=True)) == 3.0
    assert_zero([p])


@pytest.mark.parametrize("kind", ["one tensor", "overlapping", "across dtypes"])
def test_gradients_that_share_memory_are_read_by_all_first(kind):
    torch.manual_seed(0)
    params = make_parameters([20, 20])
    base = torch.randn(30)
    if kind == "across dtypes":
        params[1] = torch.nn.Parameter(torch.randn(10, dtype=torch.float64))
    params[0].grad = base[:20]
    params[1].grad = {
        "one tensor": lambda: params[0].grad,
        "overlapping": lambda: base[10:],
        "across dtypes": lambda: base[:20].view(torch.float64),
    }[kind]()
    others = copies(params)
    for p, q in zip(params, others, strict=True):
        q.grad = p.grad.clone()
    ours, plain = fusedopt.SGD(params, lr=0.1), fusedopt.SGD(others, lr=0.1)
    for _ in range(3):  # from the second step on the plan is known
        base.copy_(torch.randn(30))
        for p, q in zip(params, others, strict=True):
            q.grad.copy_(p.grad)
        ours.step(zero_grad=True)
        plain.step()
        torch.testing.assert_close([p.detach() for p in params], [q.detach() for q in others], rtol=0, atol=0)
        assert_zero(params)


def test_parameters_listed_twice_step_twice():
    torch.manual_seed(0)
    base = torch.randn(8)
    params = [torch.nn.Parameter(base), torch.nn.Parameter(base)]
    other = torch.nn.Parameter(base.clone())
    gradient = torch.randn(8)
    for p in params:
        p.grad = gradient.clone()
    fusedopt.SGD(params, lr=0.1).step(zero_grad=True)
    for _ in range(2):
        other.grad = gradient.clone()
        fusedopt.SGD([other], lr=0.1).step()
    assert torch.equal(params[0], other)
    assert_zero(params)


@pytest.mark.parametrize("layout", ODD_GRADIENTS)
def test_gradients_in_other_layouts(layout):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(6, 4))
    p.grad = ODD_GRADIENTS[layout]()
    other = torch.nn.Parameter(p.detach().clone())
    other.grad = p.grad.clone()
    fusedopt.AdamW([p]).step(zero_grad=True)
    fusedopt.AdamW([other]).step()
    assert torch.equal(p, other)
    assert_zero([p])


def test_sparse_gradients_are_emptied():
    embedding = torch.nn.Embedding(10, 3, sparse=True)
    embedding(torch.tensor([1, 4])).sum().backward()
    optimizer = fusedopt.SGD(embedding.parameters(), lr=0.1)
    optimizer.step(zero_grad=True)
    assert not embedding.weight.grad.to_dense().any()


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": False}], ids=str)
def test_torchs_own_implementation_too(options):
    params = make_parameters([3, 4])
    draw_gradients(params)
    fusedopt.SGD(params, lr=0.1, **options).step(zero_grad=True)
    assert_zero(params)


@pytest.mark.parametrize("backend", ["numba", "numpy", "tensor"])
@pytest.mark.parametrize("value", [math.inf, 2.0])
def test_under_a_scaler_also_where_the_step_is_left_out(backend, value):
    torch.manual_seed(0)
    params = make_parameters([3, 4])
    optimizer = named("adamw").make_ours(params)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.ones(()))
    draw_gradients(params)
    params[0].grad[0] = value
    before = params[1].detach().clone()
    with backends.use(backend):
        scaler.step(optimizer, zero_grad=True)
    assert_zero(params)
    assert torch.equal(params[1], before) == math.isinf(value)


def test_where_a_norm_is_not_finite_too():
    params = make_parameters([3, 4])
    optimizer = fusedopt.AdamW(params, skip_nonfinite=True, zero_grad_in_step=True)
    draw_gradients(params)
    params[0].grad[0] = math.nan
    optimizer.step()
    assert int(optimizer.skipped_steps) == 1
    assert_zero(params)
