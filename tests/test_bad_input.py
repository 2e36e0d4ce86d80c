"""Whatever cannot be done is refused by a clear error, and then nothing has changed in any tensor."""

from __future__ import annotations

import pytest
import torch

import fusedopt
from cases import draw_gradients, make_parameters, named
from child import run
from single_step import checked_step
from snapshot import Snapshot, bits, same_bits
from wrapped import WrappedTensor

CLASSES = ["SGD", "Momentum", "Adam", "AdamW"]
every_class = pytest.mark.parametrize("name", CLASSES)
cases = pytest.mark.parametrize(
    "case", [named(name) for name in ("sgd", "sgd-momentum-l2", "momentum", "adam-amsgrad-l2", "adamw")], ids=str
)
before_and_after = pytest.mark.parametrize("steps", [0, 2], ids=["first step", "later step"])


def refused(optimizer, errors=RuntimeError, match=None):
    """Assert that the step raises and changes nothing, twice; return the message."""
    before = Snapshot(optimizer)
    for _ in range(2):
        with pytest.raises(errors, match=match) as raised:
            optimizer.step()
        before.assert_unchanged()
    return str(raised.value)


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
@pytest.mark.parametrize("shape", [(6,), (3,), (1,), (4, 1), (), (0,)], ids=str)
@cases
def test_gradient_of_another_shape(case, shape, steps):
    """Some of these shapes broadcast: torch's loop takes them, and a kernel would read past the gradient's end."""
    bad = torch.nn.Parameter(torch.ones(4))
    optimizer = good_and_bad(case, bad, torch.ones(4), steps)
    bad.grad.data = torch.ones(shape)  # assigning it would be refused by torch
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
@pytest.mark.parametrize("fused", [None, True], ids=["fused=None", "fused=True"])
@cases
def test_parameter_whose_elements_share_memory(case, fused, steps):
    bad = torch.zeros(1).expand(4).requires_grad_()
    optimizer = good_and_bad(case, bad, torch.ones(4), steps)
    optimizer.param_groups[0]["fused"] = fused
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


# --- fused=True where it cannot be -------------------------------------------------------------------------------------------


def asked_for_fused(name, param, match, **options):
    """Assert that ``fused=True`` is refused, by the constructor or the step, with a reason and a remedy."""
    good = make_parameters([(5,)])
    draw_gradients(good)
    before = [same.detach().clone() for same in (*good, param)]
    with pytest.raises(RuntimeError, match=match) as raised:  # noqa: PT012: either line may raise
        optimizer = getattr(fusedopt, name)([*good, param], lr=0.1, fused=True, **options)
        optimizer.step()
    assert "fused" in str(raised.value)
    assert all(map(torch.equal, (*good, param), before))
    return str(raised.value)


@every_class
def test_fused_parameter_that_is_no_plain_memory(name):
    param = torch.nn.Parameter(WrappedTensor(torch.ones(3)))
    param.grad = WrappedTensor(torch.ones(3))
    message = asked_for_fused(name, param, "WrappedTensor")
    assert "fused=None" in message  # what to do


@every_class
def test_fused_integer_parameter(name):
    param = torch.ones(3, dtype=torch.int32)
    param.grad = torch.ones(3, dtype=torch.int32)
    asked_for_fused(name, param, "int32")


def test_fused_sparse_gradient():
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.sparse_coo_tensor([[1]], [1.0], (3,), check_invariants=True)
    message = asked_for_fused("SGD", param, "sparse")
    assert "fused=None" in message


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_fused_and_another_implementation_by_groups(name):
    """A group may ask for what the constructor would refuse."""
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = getattr(fusedopt, name)([{"params": [param], "foreach": True}], lr=0.1, fused=True)
    try:
        optimizer.step()
    except RuntimeError as error:
        assert "fused" in str(error)
        assert "foreach" in str(error)
        assert torch.equal(param, torch.ones(3))
    else:
        assert (param < 1).all()


@before_and_after
@every_class
def test_fused_error_comes_before_any_change(name, steps):
    good = make_parameters([(5,), (300,)])
    bad = torch.nn.Parameter(WrappedTensor(torch.ones(3)))
    optimizer = getattr(fusedopt, name)([good[0], bad, good[1]], lr=0.1, fused=True)
    for _ in range(steps):
        draw_gradients(good)
        optimizer.step()
    draw_gradients(good)
    bad.grad = WrappedTensor(torch.ones(3))
    refused(optimizer, match="WrappedTensor")


# --- states and hyperparameters that the user has put there ------------------------------------------------------------------


@pytest.mark.parametrize(
    "state",
    [torch.zeros(5), torch.zeros(1), torch.zeros(4, dtype=torch.int32), torch.zeros(4, device="meta"), torch.zeros(1).expand(4),
     torch.sparse_coo_tensor([[1]], [1.0], (4,), check_invariants=True)],
    ids=["longer", "shorter", "int32", "meta", "expanded", "sparse"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["sgd-momentum", "momentum", "adam", "adamw-amsgrad"])
def test_state_that_does_not_fit(name, state):
    case = named(name)
    params = [*make_parameters([(33,)], torch.float64), *make_parameters([(4,)])]  # the good one in a bucket of its own
    optimizer = case.make_ours(params)
    draw_gradients(params)
    checked_step(case, optimizer)
    key = next(key for key in optimizer.state[params[1]] if key != "step")
    right = optimizer.state[params[1]][key]
    optimizer.state[params[1]][key] = state
    message = refused(optimizer, (RuntimeError, TypeError, ValueError))
    assert key in message or "more than one element" in message
    optimizer.state[params[1]][key] = right
    checked_step(case, optimizer)


@pytest.mark.parametrize(
    ("key", "value"),
    [("lr", torch.tensor([0.1, 0.2])), ("lr", "fast"), ("lr", None), ("weight_decay", "some")],
    ids=str,
)
@every_class
def test_hyperparameter_that_is_no_number(name, key, value):
    params = make_parameters([(5,), (4, 6)])
    optimizer = getattr(fusedopt, name)(params, lr=0.1)
    draw_gradients(params)
    optimizer.step()
    optimizer.param_groups[0][key] = value
    refused(optimizer, (RuntimeError, TypeError, ValueError))
    optimizer.param_groups[0][key] = 0.1
    optimizer.step()


@pytest.mark.parametrize(("name", "key"), [("SGD", "momentum"), ("AdamW", "betas"), ("Momentum", "beta"), ("Adam", "eps")])
def test_hyperparameter_that_is_missing(name, key):
    params = make_parameters([(5,)])
    optimizer = getattr(fusedopt, name)(params, lr=0.1)
    draw_gradients(params)
    optimizer.step()
    (group,) = optimizer.param_groups
    value = group.pop(key)
    refused(optimizer, KeyError, match=key.removesuffix("s"))
    group[key] = value
    optimizer.step()
