"""Everything in one group: dtypes, shapes, sizes of zero and one, dense and sparse, real and complex, as it comes."""

from __future__ import annotations

import itertools

import pytest
import torch

import fusedopt
from cases import copies, draw_gradients, each_case, make_parameters, named
from single_step import checked_step
from snapshot import same_bits

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
SHAPES = [(0,), (33,), (0,), (0, 4), (), (4, 6), (1,), (0,), (0,)]


def mixed_parameters():
    """Return parameters of every dtype in turns; zero-size ones at the start, in a row and at the end."""
    dtypes = itertools.cycle(DTYPES)
    return [make_parameters([shape], next(dtypes))[0] for _ in range(4) for shape in SHAPES]


@each_case
def test_dtypes_and_sizes_in_one_group(case):
    params = mixed_parameters()
    optimizer = case.make_ours(params)
    for _ in range(3):
        draw_gradients(params)
        checked_step(case, optimizer)


@each_case
def test_order_of_parameters_does_not_matter(case):
    params = mixed_parameters()
    others = copies(params)
    shuffled = [others[i] for i in torch.randperm(len(others)).tolist()]
    optimizers = case.make_ours(params), case.make_ours(shuffled)
    for _ in range(2):
        draw_gradients(params, others)
        for optimizer in optimizers:
            optimizer.step()
    assert all(map(same_bits, params, others))


@each_case
def test_each_parameter_alone_gives_the_same_bits(case):
    params = mixed_parameters()
    others = copies(params)
    together, alone = case.make_ours(params), [case.make_ours([p]) for p in others]
    for _ in range(2):
        draw_gradients(params, others)
        together.step()
        for optimizer in alone:
            optimizer.step()
    assert all(map(same_bits, params, others))


@each_case
def test_nothing_but_empty_parameters(case):
    params = make_parameters([(0,), (3, 0)])
    optimizer = case.make_ours(params)
    draw_gradients(params)
    checked_step(case, optimizer)
    checked_step(case, optimizer)


@pytest.mark.parametrize("name", ["sgd-momentum-l2", "momentum", "adamw"])
def test_complex_beside_real(name):
    """A complex parameter is its real and imaginary parts, as torch's optimizers have it."""
    case = named(name)
    real = make_parameters([(33,), (4, 6)])
    alone = copies(real)
    complex_ones = [torch.nn.Parameter(torch.randn(5, dtype=torch.complex64))]
    as_real = [torch.nn.Parameter(torch.view_as_real(complex_ones[0].detach()).clone())]
    optimizers = case.make_ours([real[0], *complex_ones, real[1]]), case.make_ours([*alone, *as_real])
    for _ in range(3):
        draw_gradients(real, alone)
        complex_ones[0].grad = torch.randn(5, dtype=torch.complex64)
        as_real[0].grad = torch.view_as_real(complex_ones[0].grad).clone()
        for optimizer in optimizers:
            optimizer.step()
    assert all(map(same_bits, real, alone))
    assert same_bits(torch.view_as_real(complex_ones[0].detach()), as_real[0])


@pytest.mark.parametrize("momentum", [0, 0.9])
def test_sparse_beside_dense(momentum):
    dense, sparse = make_parameters([(33,), (6, 3)])
    plain = copies([dense, sparse])
    ours = fusedopt.SGD([dense, sparse], lr=0.1, momentum=momentum)
    theirs = torch.optim.SGD(plain, lr=0.1, momentum=momentum)
    for _ in range(2):
        draw_gradients([dense], plain[:1])
        values = torch.randn(2, 3)
        for p in (sparse, plain[1]):
            p.grad = torch.sparse_coo_tensor([[4, 0]], values, (6, 3), check_invariants=True)
        ours.step()
        theirs.step()
        torch.testing.assert_close(dense, plain[0])
        assert same_bits(sparse, plain[1])  # torch's own code
    assert "sparse" in ours.explain()


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["sgd-momentum-l2", "adamw"])
def test_gradients_of_a_dtype_of_their_own(name, dtype, grad_dtype):
    """``Parameter.grad_dtype`` allows it since torch 2.10; the parameter's dtype decides what is computed in."""
    params = make_parameters([(33,), ()], dtype)
    if not hasattr(params[0], "grad_dtype"):
        pytest.skip(f"torch {torch.__version__} has no Parameter.grad_dtype")
    optimizer = named(name).make_ours(params)
    for _ in range(2):
        for p in params:
            p.grad_dtype = grad_dtype
            p.grad = torch.randn(p.shape).to(grad_dtype)
        checked_step(named(name), optimizer)


@pytest.mark.gpu
@each_case
def test_cpu_and_gpu_in_one_group(case):
    params = make_parameters([(33,), (4, 6), (0,), ()])
    mixed = [p.detach().to("cuda" if i % 2 else "cpu").requires_grad_() for i, p in enumerate(params)]
    optimizers = case.make_ours(params), case.make_ours(mixed)
    for _ in range(3):
        draw_gradients(params)
        for p, q in zip(params, mixed, strict=True):
            q.grad = p.grad.to(q.device)
        for optimizer in optimizers:
            optimizer.step()
    assert all(same_bits(p, q.cpu()) for p, q in zip(params, mixed, strict=True))


@pytest.mark.gpu
@each_case
def test_two_gpus_in_one_group(case):
    if torch.cuda.device_count() < 2:
        pytest.skip("a second GPU is needed")
    params = make_parameters([(33,), (4, 6), (0,), ()])
    mixed = [p.detach().to(f"cuda:{i % 2}").requires_grad_() for i, p in enumerate(params)]
    optimizers = case.make_ours(params), case.make_ours(mixed)
    for _ in range(3):
        draw_gradients(params)
        for p, q in zip(params, mixed, strict=True):
            q.grad = p.grad.to(q.device)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.cuda.current_device() == 0
    assert all(same_bits(p, q.cpu()) for p, q in zip(params, mixed, strict=True))
