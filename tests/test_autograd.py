"""What autograd must see of a step, and what a step must leave alone: versions, graphs, modes, closures, shared parameters."""

from __future__ import annotations

import pytest
import torch

import fusedopt
from cases import copies, draw_gradients, each_case, make_parameters, named
from single_step import checked_step
from snapshot import same_bits

SHAPES = [(33,), (4, 6), ()]
CLASSES = ["SGD", "Momentum", "Adam", "AdamW"]
every_class = pytest.mark.parametrize("name", CLASSES)
cases = pytest.mark.parametrize(
    "case", [named(name) for name in ("sgd", "sgd-momentum-l2", "momentum", "adam-amsgrad-l2", "adamw")], ids=str
)


# --- version counters --------------------------------------------------------------------------------------------------------


@each_case
def test_versions_of_what_is_written_rise_and_of_gradients_do_not(case):
    params = make_parameters(SHAPES)
    optimizer = case.make_ours(params)
    draw_gradients(params)
    optimizer.step()
    written = [*params, *(value for state in optimizer.state.values() for value in state.values())]
    versions = [tensor._version for tensor in written]
    gradients = [p.grad._version for p in params]
    optimizer.step()
    assert all(tensor._version > version for tensor, version in zip(written, versions, strict=True))
    assert [p.grad._version for p in params] == gradients


@each_case
def test_version_rises_at_the_first_step(case):
    params = make_parameters(SHAPES)
    optimizer = case.make_ours(params)
    draw_gradients(params)
    versions = [p._version for p in params]
    optimizer.step()
    assert all(p._version > version for p, version in zip(params, versions, strict=True))


@every_class
def test_unscaled_gradients_rise_too(name):
    param = torch.nn.Parameter(torch.ones(5))
    param.grad = torch.ones(5)
    optimizer = getattr(fusedopt, name)([param], lr=0.1)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    version = param.grad._version
    optimizer.step()
    assert param.grad._version > version


@every_class
def test_backward_through_a_changed_view_is_refused(name):
    """The step changes a view's base: a graph that saved the view must know as well."""
    param = torch.nn.Parameter(torch.ones(4, 4))
    loss = (param.t()[1:] ** 2).sum()
    param.grad = torch.ones(4, 4)
    getattr(fusedopt, name)([param], lr=0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- no graph, every mode ----------------------------------------------------------------------------------------------------


@each_case
def test_a_step_records_no_graph(case):
    params = make_parameters(SHAPES)
    optimizer = case.make_ours(params)
    draw_gradients(params)
    with torch.enable_grad():
        optimizer.step()
    assert all(p.is_leaf and p.requires_grad and p.grad_fn is None for p in params)
    assert not any(value.requires_grad for state in optimizer.state.values() for value in state.values())


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
@each_case
def test_gradients_with_a_graph_of_their_own(case):
    """``backward(create_graph=True)`` leaves gradients that require gradients."""
    params = make_parameters([(5,), (3,)])
    optimizer = case.make_ours(params)
    for _ in range(2):
        optimizer.zero_grad()
        sum((p**3).sum() for p in params).backward(create_graph=True)
        assert all(p.grad.requires_grad for p in params)
        checked_step(case, optimizer)
        assert not any(value.requires_grad for state in optimizer.state.values() for value in state.values())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode], ids=lambda mode: mode.__name__)
@each_case
def test_step_under_every_mode(case, mode):
    params = make_parameters(SHAPES)
    plain = copies(params)
    optimizer, expected = case.make_ours(params), case.make_ours(plain)
    for _ in range(2):
        draw_gradients(params, plain)
        enabled = torch.is_grad_enabled()
        with mode():
            optimizer.step()
        assert torch.is_grad_enabled() == enabled
        expected.step()
    assert all(map(same_bits, params, plain))


@every_class
def test_states_made_under_inference_mode_serve_outside(name):
    params = make_parameters(SHAPES)
    optimizer = getattr(fusedopt, name)(params, lr=0.1)
    draw_gradients(params)
    with torch.inference_mode():
        optimizer.step()
    for _ in range(2):
        draw_gradients(params)
        optimizer.step()
    with torch.no_grad():
        for state in optimizer.state.values():
            for value in state.values():
                value.mul_(1)


@every_class
def test_parameters_made_under_inference_mode(name):
    """Inference tensors have no version counter; torch refuses to write them outside of inference mode."""
    with torch.inference_mode():
        param = torch.ones(5)
        param.grad = torch.ones(5)
        optimizer = getattr(fusedopt, name)([param], lr=0.1)
        optimizer.step()
        assert (param < 1).all()


@every_class
def test_parameters_that_require_no_gradient(name):
    param = torch.ones(5)
    param.grad = torch.ones(5)
    getattr(fusedopt, name)([param], lr=0.1).step()
    assert (param < 1).all()
    assert not param.requires_grad


@every_class
def test_a_retained_non_leaf_parameter_is_taken_as_torch_takes_it(name):
    leaf = torch.ones(5, requires_grad=True)
    inner = leaf * 2
    with pytest.raises(ValueError, match="can't optimize a non-leaf Tensor"):
        getattr(fusedopt, name)([inner], lr=0.1)
    inner.retain_grad()
    optimizer = getattr(fusedopt, name)([inner], lr=0.1)
    inner.square().sum().backward()
    before = inner.detach().clone()
    optimizer.step()
    assert (inner < before).all()


# --- closures ----------------------------------------------------------------------------------------------------------------


@every_class
@pytest.mark.parametrize("options", [{}, {"fused": False}], ids=["kernel", "fused=False"])
def test_closure_runs_once_with_gradients_and_its_loss_is_returned(name, options):
    param = torch.nn.Parameter(torch.ones(5))
    optimizer = getattr(fusedopt, name)([param], lr=0.1, **options)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == 5.0
        assert optimizer.step(closure=closure).item() < 5.0
    assert calls == [True, True]
    assert optimizer.step() is None


@every_class
def test_an_error_in_the_closure_changes_nothing(name):
    param = torch.nn.Parameter(torch.ones(5))
    param.grad = torch.ones(5)
    optimizer = getattr(fusedopt, name)([param], lr=0.1)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert torch.equal(param, torch.ones(5))
    assert torch.is_grad_enabled()


# --- parameters that share memory ----------------------------------------------------------------------------------------------


@each_case
def test_views_of_one_flat_buffer(case):
    flat = torch.randn(100)
    gap = flat[40:43].clone()
    params = [flat[:7].detach(), flat[7:40].detach().reshape(3, 11), flat[43:].detach()]
    for p in params:
        p.requires_grad_()
    optimizer = case.make_ours(params)
    for _ in range(2):
        draw_gradients(params)
        checked_step(case, optimizer)
    assert torch.equal(flat[40:43], gap)


@cases
def test_tied_weights_in_two_modules(case):
    embedding, head = torch.nn.Embedding(7, 5), torch.nn.Linear(5, 7, bias=False)
    head.weight = embedding.weight
    optimizer = case.make_ours(list(torch.nn.ModuleList([embedding, head]).parameters()))
    assert len(optimizer.param_groups[0]["params"]) == 1
    for _ in range(2):
        optimizer.zero_grad()
        head(embedding(torch.arange(7))).square().sum().backward()
        checked_step(case, optimizer)


@cases
@pytest.mark.parametrize("size", [7, 300_000], ids=str)
def test_duplicates_are_updated_twice_one_after_the_other(case, size):
    """Which is what two steps of an optimizer that has the parameter once do."""
    params = make_parameters([(size,)])
    plain = copies(params)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = case.make_ours([params[0], params[0]])
    expected = case.make_ours(plain)
    for _ in range(2):
        draw_gradients(params, plain)
        optimizer.step()
        expected.step()
        expected.step()
    assert same_bits(params[0], plain[0])


@cases
def test_overlapping_parameters_are_updated_one_after_the_other(case):
    """Which is what optimizers of one parameter each do, when they step in that order."""
    bases = [torch.linspace(-1, 1, 300_000) for _ in range(2)]
    params, plain = ([base[:200_000].detach(), base[100_000:].detach(), base.detach()] for base in bases)
    optimizer, expected = case.make_ours(params), [case.make_ours([p]) for p in plain]
    for _ in range(2):
        draw_gradients(params, plain)
        optimizer.step()
        for each in expected:
            each.step()
    assert same_bits(*bases)


@cases
def test_one_gradient_for_two_parameters(case):
    params = make_parameters([(9,), (9,)])
    optimizer = case.make_ours(params)
    for _ in range(2):
        params[0].grad = params[1].grad = torch.randn(9)
        checked_step(case, optimizer)
