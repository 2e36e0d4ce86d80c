"""Whatever cannot be done is refused by a clear error, and then nothing has changed in any tensor."""

from __future__ import annotations

import pytest
import torch

import fusedopt
from cases import draw_gradients, make_parameters, named
from child import run
from single_step import checked_step
from snapshot import bits, refused, same_bits

CLASSES = ["SGD", "Momentum", "Adam", "AdamW"]
every_class = pytest.mark.parametrize("name", CLASSES)
cases = pytest.mark.parametrize(
    "case", [named(name) for name in ("sgd", "sgd-momentum-l2", "momentum", "adam-amsgrad-l2", "adamw")], ids=str
)
# torch's own implementations find out while they go, when good parameters have changed.
implementations = pytest.mark.parametrize(
    "implementation", [{"fused": None}, {"fused": True}, {"fused": False}], ids=["fused=None", "fused=True", "fused=False"]
)
before_and_after = pytest.mark.parametrize("steps", [0, 2], ids=["first step", "later step"])


def good_and_bad(case, bad, gradient, steps=0):
    """Return an optimizer with one bad parameter between good ones, after ``steps`` steps of the good ones."""
    good = make_parameters([(33,), (4, 6), (5,)])
    good[2] = torch.nn.Parameter(torch.randn(5, dtype=torch.float64))  # in another bucket
    optimizer = case.make_ours([*good[:2], bad, good[2]])
    for _ in range(steps):
        draw_gradients(good)
        checked_step(case, optimizer)
    draw_gradients(good)
    bad.grad = gradient
    return optimizer


def recovers(case, optimizer):
    """Step once the bad parameter has lost its gradient."""
    optimizer.param_groups[0]["params"][2].grad = None
    checked_step(case, optimizer)


# --- gradients ---------------------------------------------------------------------------------------------------------------


@before_and_after
@implementations
@pytest.mark.parametrize("shape", [(6,), (3,), (1,), (4, 1), (), (0,)], ids=str)
@cases
def test_gradient_of_another_shape(case, shape, implementation, steps):
    """Some of these shapes broadcast: torch's loop takes them, and a kernel would read past the gradient's end."""
    bad = torch.nn.Parameter(torch.ones(4))
    optimizer = good_and_bad(case, bad, torch.ones(4), steps)
    bad.grad.data = torch.ones(shape)  # assigning it would be refused by torch
    optimizer.param_groups[0].update(implementation)
    message = refused(optimizer)
    assert "shape" in message
    assert "4" in message
    recovers(case, optimizer)


@cases
def test_parameter_swapped_for_another_shape_than_its_states(case):
    params = [*make_parameters([(33,)], torch.float64), *make_parameters([(4,)])]  # the good one in a bucket of its own
    optimizer = case.make_ours(params)
    draw_gradients(params)
    checked_step(case, optimizer)
    params[1].grad = None
    params[1].data = torch.ones(6)
    draw_gradients(params)
    if optimizer.state.get(params[1]):
        assert "shape" in refused(optimizer)
    else:
        checked_step(case, optimizer)


@before_and_after
@pytest.mark.parametrize("name", ["momentum", "adam", "adamw"])
def test_sparse_gradient_is_refused_where_torch_refuses_it(name, steps):
    case = named(name)
    bad = torch.nn.Parameter(torch.ones(4, 2))
    gradient = torch.sparse_coo_tensor([[1]], [[1.0, 2.0]], (4, 2), check_invariants=True)
    optimizer = good_and_bad(case, bad, gradient, steps)
    message = refused(optimizer)
    assert "sparse" in message
    if name != "momentum":
        assert message == "Adam does not support sparse gradients, please consider SparseAdam instead"
    recovers(case, optimizer)


@pytest.mark.gpu
@cases
def test_gradient_on_another_device(case):
    bad = torch.nn.Parameter(torch.ones(4))
    optimizer = good_and_bad(case, bad, torch.ones(4))
    bad.data = bad.data.cuda()
    assert "device" in refused(optimizer)


@before_and_after
@cases
def test_integer_parameter(case, steps):
    bad = torch.ones(4, dtype=torch.int64)
    optimizer = good_and_bad(case, bad, torch.ones(4, dtype=torch.int64), steps)
    assert "int64" in refused(optimizer, (RuntimeError, TypeError))
    recovers(case, optimizer)


# --- memory ------------------------------------------------------------------------------------------------------------------


@before_and_after
@implementations
@cases
def test_parameter_whose_elements_share_memory(case, implementation, steps):
    bad = torch.zeros(1).expand(4).requires_grad_()
    optimizer = good_and_bad(case, bad, torch.ones(4), steps)
    optimizer.param_groups[0].update(implementation)
    # As torch says it.
    message = refused(optimizer, match="more than one element of the written-to tensor refers to a single memory location")
    assert "clone()" in message
    recovers(case, optimizer)


@cases
@pytest.mark.parametrize("overlap", [1, 3])
def test_gradient_that_overlaps_its_parameter(case, overlap):
    """A step written element by element would read what it has already changed."""
    buffer = torch.linspace(1, 2, 100_000)
    param = buffer[overlap:].detach()
    param.grad = buffer[:-overlap].detach()
    optimizer = case.make_ours([param])
    separate = param.clone()
    separate.grad = param.grad.clone()
    expected = case.make_ours([separate])
    expected.step()
    before = bits(buffer)
    try:
        optimizer.step()
    except RuntimeError:
        assert torch.equal(bits(buffer), before)
    else:
        assert same_bits(param, separate)


@cases
def test_gradient_that_is_its_parameter(case):
    param, other = torch.linspace(1, 2, 1000), torch.linspace(1, 2, 1000)
    param.grad, other.grad = param.detach(), other.clone()
    for each in (param, other):
        case.make_ours([each]).step()
    assert same_bits(param, other)


@pytest.mark.parametrize("steps", [0, 2], ids=["first step", "later step"])
def test_one_bad_dense_gradient_beside_a_sparse_one(steps):
    """Torch's implementation takes the sparse ones: it must not have begun when a kernel refuses."""
    sparse, dense = make_parameters([(6, 3), (33,)])
    optimizer = fusedopt.SGD([sparse, dense], lr=0.1, momentum=0.9)
    for _ in range(steps + 1):
        sparse.grad = torch.sparse_coo_tensor([[4, 0]], torch.randn(2, 3), (6, 3), check_invariants=True)
        draw_gradients([dense])
        if steps:
            optimizer.step()
    gradient = dense.grad
    before = sparse.detach().clone(), dense.detach().clone()
    storage = gradient.untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    with pytest.raises(RuntimeError, match="memory"):
        optimizer.step()
    assert torch.equal(sparse, before[0])
    assert torch.equal(dense, before[1])
    storage.resize_(size)
    gradient.fill_(1.0)
    optimizer.step()
    assert not torch.equal(sparse, before[0])
    assert not torch.equal(dense, before[1])


def test_parameters_without_storage_do_not_crash_the_process():
    """Sharding frees storages in place and leaves the shapes: there is no memory behind the address zero."""
    program = """
        import sys
        import torch
        import fusedopt
        for name in ("SGD", "Momentum", "Adam", "AdamW"):
            for freed in ("parameter", "gradient", "state"):
                param, other = torch.nn.Parameter(torch.ones(40)), torch.nn.Parameter(torch.ones(3))
                optimizer = getattr(fusedopt, name)([other, param], lr=0.1, **({"momentum": 0.9} if name == "SGD" else {}))
                for p in (param, other):
                    p.grad = torch.ones_like(p)
                optimizer.step()
                states = [value for value in optimizer.state[param].values() if value.dim()]
                before = other.detach().clone()
                {"parameter": param.data, "gradient": param.grad, "state": states[0]}[freed].untyped_storage().resize_(0)
                try:
                    optimizer.step()
                except RuntimeError as error:
                    assert "storage" in str(error) or "memory" in str(error), error
                    assert torch.equal(other, before)
                else:
                    sys.exit(f"{name}: no error for a {freed} without storage")
        print("refused")
    """
    finished = run(program)
    assert finished.stdout.strip() == "refused", (finished.returncode, finished.stderr)


# --- meta --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [None, True], ids=["fused=None", "fused=True"])
@every_class
def test_meta_parameters_wait_until_they_are_materialised(name, fused):
    model = torch.nn.Linear(3, 2, device="meta")
    optimizer = getattr(fusedopt, name)(model.parameters(), lr=0.1, fused=fused)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    message = refused(optimizer)
    assert "meta" in message
    assert optimizer.state_dict()["state"] == {}
    optimizer.zero_grad()
    torch.__future__.set_swap_module_params_on_conversion(True)  # so that the parameters stay the same objects
    try:
        model.to_empty(device="cpu")
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all((p < 1).all() for p in model.parameters())


@before_and_after
@cases
def test_one_meta_parameter_among_others(case, steps):
    bad = torch.nn.Parameter(torch.ones(4, device="meta"))
    optimizer = good_and_bad(case, bad, torch.ones(4, device="meta"), steps)
    assert "meta" in refused(optimizer)
    recovers(case, optimizer)
