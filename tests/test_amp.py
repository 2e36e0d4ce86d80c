"""Loss scaling: gradients are unscaled once, and any non-zero found_inf leaves the whole step out, on every path of ours."""

from __future__ import annotations

import pytest
import torch

import fusedopt
from amp_paths import SHAPES, SOME, assert_as_new, assert_same, on_every_path, scale_gradients, scaling
from cases import copies, draw_gradients, make_parameters
from snapshot import Snapshot, same_bits

found_infs = pytest.mark.parametrize("found_inf", [1.0, 2.0, torch.inf, torch.nan], ids=str)


# --- skipping ----------------------------------------------------------------------------------------------------------------


@found_infs
@on_every_path(SOME)
@pytest.mark.parametrize("grad_scale", [None, 4.0], ids=["unscaled before", "scaled"])
def test_first_step_is_skipped(case, path, found_inf, grad_scale):
    params = make_parameters(SHAPES)
    untouched = copies(params)
    optimizer, expected = path.make(case, params), path.make(case, untouched)
    draw_gradients(params, untouched)
    params[0].grad[:5] = torch.inf
    before = [p.detach().clone() for p in params]
    with path.using(), scaling(optimizer, found_inf, grad_scale):
        optimizer.step()
    assert all(map(same_bits, params, before))
    assert_as_new(optimizer)
    # The steps after it are those of an optimizer that has never seen it.
    for _ in range(2):
        draw_gradients(params, untouched)
        with path.using():
            optimizer.step()
            expected.step()
    assert_same(optimizer, expected)


@found_infs
@on_every_path(SOME)
def test_later_step_is_skipped(case, path, found_inf):
    params = make_parameters(SHAPES)
    untouched = copies(params)
    optimizer, expected = path.make(case, params), path.make(case, untouched)
    for _ in range(2):
        draw_gradients(params, untouched)
        with path.using():
            optimizer.step()
            expected.step()
    before = Snapshot(optimizer, grads=False)
    draw_gradients(params)
    params[1].grad[:] = torch.nan
    with path.using(), scaling(optimizer, found_inf, 4.0):
        optimizer.step()
    before.assert_unchanged()
    draw_gradients(params, untouched)
    with path.using():
        optimizer.step()
        expected.step()
    assert_same(optimizer, expected)


def test_a_skipped_step_leaves_a_late_parameter_as_new():
    first, late = make_parameters([(7,), (9,)])
    optimizer = fusedopt.SGD([first, late], lr=0.1, momentum=0.9, dampening=0.5)
    first.grad = torch.randn(7)
    optimizer.step()
    late.grad = torch.full((9,), torch.inf)
    with scaling(optimizer, 1.0, 4.0):
        optimizer.step()
    late.grad = torch.ones(9)
    optimizer.step()
    assert torch.equal(optimizer.state[late]["momentum_buffer"], torch.ones(9))  # its first gradient, undampened


# --- unscaling ---------------------------------------------------------------------------------------------------------------


@on_every_path()
def test_scaled_step_is_the_step_of_unscaled_gradients(case, path):
    params = make_parameters(SHAPES)
    plain = copies(params)
    optimizer, expected = path.make(case, params), path.make(case, plain)
    for scale in (4.0, 65536.0, 0.5):  # powers of two: their division is exact
        draw_gradients(params, plain)
        scale_gradients(params, scale)
        with path.using(), scaling(optimizer, 0.0, scale):
            optimizer.step()
        # Written back, and once: torch's clipping and logging after the step see true gradients. Before the step of the
        # other one, since torch's foreach changes gradients in place with Nesterov's momentum.
        if not (case.kwargs.get("nesterov") and path.options.get("foreach")):
            assert all(same_bits(p.grad, q.grad) for p, q in zip(params, plain, strict=True))
        with path.using():
            expected.step()
        assert_same(optimizer, expected)


@on_every_path(SOME)
def test_gradients_unscaled_before_the_step_are_left_alone(case, path):
    params = make_parameters(SHAPES)
    plain = copies(params)
    optimizer, expected = path.make(case, params), path.make(case, plain)
    draw_gradients(params, plain)
    with path.using(), scaling(optimizer, 0.0):
        optimizer.step()
    with path.using():
        expected.step()
    assert all(same_bits(p.grad, q.grad) for p, q in zip(params, plain, strict=True))
    assert_same(optimizer, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@on_every_path(["adamw"])
def test_scaled_gradients_of_every_dtype(dtype, case, path):
    params = make_parameters(SHAPES, dtype)
    plain = copies(params)
    optimizer, expected = path.make(case, params), path.make(case, plain)
    draw_gradients(params, plain)
    scale_gradients(params, 16.0)
    with path.using(), scaling(optimizer, 0.0, 16.0):
        optimizer.step()
    with path.using():
        expected.step()
    assert all(same_bits(p.grad, q.grad) for p, q in zip(params, plain, strict=True))
    assert_same(optimizer, expected)


@on_every_path(SOME)
def test_expanded_gradients_are_unscaled_once(case, path):
    """One number in memory cannot be divided as often as it is seen: the parameter gets a gradient that can."""
    params = make_parameters([(5,), (4, 6)])
    plain = copies(params)
    optimizer, expected = path.make(case, params), path.make(case, plain)
    draw_gradients(params, plain)
    params[0].grad.mul_(4.0)
    params[1].grad, plain[1].grad = torch.full((1,), 4.0).expand(4, 6), torch.ones(4, 6)
    with path.using(), scaling(optimizer, 0.0, 4.0):
        optimizer.step()
    with path.using():
        expected.step()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(params, plain, strict=True))
    assert_same(optimizer, expected)


@on_every_path(SOME)
def test_gradients_of_other_layouts_are_unscaled(case, path):
    params = [*make_parameters([(4, 6)]), torch.nn.Parameter(torch.randn(6, 4).t()), torch.nn.Parameter(torch.randn(5, 3)[:, 0])]
    optimizer = path.make(case, params)
    plain = copies(params)
    expected = path.make(case, plain)
    base = torch.full((6, 8), 4.0)
    for p, gradient in zip(params, (base[:, ::2].t(), torch.full((4, 6), 4.0), torch.full((10,), 4.0)[::2]), strict=True):
        p.grad = gradient
    for q in plain:
        q.grad = torch.ones_like(q)
    with path.using(), scaling(optimizer, 0.0, 4.0):
        optimizer.step()
    with path.using():
        expected.step()
    assert all(torch.equal(p, q) for p, q in zip(params, plain, strict=True))
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in params)
    assert (base[:, 1::2] == 4.0).all()


def test_duplicate_parameters_are_unscaled_once():
    (param,) = make_parameters([(5,)])
    (plain,) = copies([param])
    optimizers = []
    for p in (param, plain):
        with pytest.warns(UserWarning, match="duplicate parameters"):
            optimizers.append(fusedopt.SGD([p, p], lr=0.1, momentum=0.9))
    param.grad, plain.grad = torch.full((5,), 4.0), torch.ones(5)
    with scaling(optimizers[0], 0.0, 4.0):
        optimizers[0].step()
    optimizers[1].step()
    assert torch.equal(param.grad, torch.ones(5))
    assert same_bits(param, plain)


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scale_tensors_of_other_shapes_and_dtypes(shape, dtype):
    params = make_parameters([(20,)])
    plain = copies(params)
    optimizer, expected = (fusedopt.AdamW(each, lr=0.1) for each in (params, plain))
    draw_gradients(params, plain)
    scale_gradients(params, 8.0)
    optimizer.grad_scale, optimizer.found_inf = torch.full(shape, 8.0, dtype=dtype), torch.zeros(shape, dtype=dtype)
    optimizer.step()
    expected.step()
    assert_same(optimizer, expected)


@pytest.mark.parametrize("found_inf", [0.0, 1.0])
@pytest.mark.parametrize("options", [{}, {"fused": False}, {"foreach": True}], ids=str)
def test_sparse_gradients_are_unscaled_and_skipped(found_inf, options):
    params = make_parameters([(6, 3), (5,)])
    plain = copies(params)
    optimizer, expected = fusedopt.SGD(params, lr=0.1, **options), torch.optim.SGD(plain, lr=0.1)
    values, indices = torch.randn(2, 3), torch.tensor([[1, 4]])
    plain[0].grad = torch.sparse_coo_tensor(indices, values, (6, 3), check_invariants=True)
    params[0].grad = torch.sparse_coo_tensor(indices, values * 4, (6, 3), check_invariants=True)
    plain[1].grad = torch.ones(5)
    params[1].grad = torch.full((5,), 4.0)
    with scaling(optimizer, found_inf, 4.0):
        optimizer.step()
    if not found_inf:
        expected.step()
        assert torch.equal(params[0].grad.to_dense(), plain[0].grad.to_dense())
    assert_same(optimizer, expected)
