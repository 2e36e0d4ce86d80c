"""Steps in the middle of what else a program does: other default devices and dtypes, lazy modules, autograd's hooks, traces."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import fusedopt
from cases import copies, draw_gradients, make_parameters, named
from single_step import checked_step
from snapshot import same_bits

cases = pytest.mark.parametrize(
    "case", [named(name) for name in ("sgd", "sgd-momentum-l2", "momentum", "adam-amsgrad-l2", "adamw")], ids=str
)
every_class = pytest.mark.parametrize("name", ["SGD", "Momentum", "Adam", "AdamW"])


@cases
def test_default_device(case):
    """Scripts set it to the GPU, or to meta while they build a model: nothing of ours may land there unasked."""
    params = make_parameters([(33,), (4, 6)])
    optimizer = case.make_ours(params)
    for _ in range(2):
        draw_gradients(params)
        plain = copies(params)
        expected = case.make_ours(plain)
        expected.load_state_dict(optimizer.state_dict())
        for p, q in zip(params, plain, strict=True):
            q.grad = p.grad.clone()
        expected.step()
        with torch.device("meta"):
            optimizer.step()
            saved = optimizer.state_dict()
            optimizer.load_state_dict(saved)
        assert all(map(same_bits, params, plain))
        assert all(value.device.type == "cpu" for state in optimizer.state.values() for value in state.values())


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_default_dtype(name):
    """torch counts steps in float64 where that is the default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        dtypes = []
        for make in (named(name).make_ours, named(name).make_truth):
            params = make_parameters([(5,)])
            optimizer = make(params)
            draw_gradients(params)
            optimizer.step()
            dtypes.append({key: value.dtype for key, value in optimizer.state[params[0]].items()})
        assert dtypes[0] == dtypes[1]
    finally:
        torch.set_default_dtype(before)


@every_class
def test_lazy_modules(name):
    """Parameters without a shape wait for their first forward pass."""
    model = torch.nn.LazyLinear(3)
    optimizer = getattr(fusedopt, name)(model.parameters(), lr=0.1)
    optimizer.step()
    assert len(optimizer.explain().splitlines()) == 2
    model(torch.ones(2, 4)).sum().backward()
    before = model.weight.detach().clone()
    optimizer.step()
    assert (model.weight < before).all()
    assert "(3, 4)" in optimizer.explain()


@cases
def test_step_within_the_backward_pass(case):
    """One optimizer a parameter, stepping as soon as its gradient is there, saves the memory of gradients."""
    torch.manual_seed(0)
    models = [torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    within = {p: case.make_ours([p]) for p in models[0].parameters()}

    def step(param):
        within[param].step()
        within[param].zero_grad()

    for p in models[0].parameters():
        p.register_post_accumulate_grad_hook(step)
    after = case.make_ours(list(models[1].parameters()))
    for inputs in torch.randn(4, 8, 4):
        for model in models:
            model(inputs).square().sum().backward()
        after.step()
        after.zero_grad()
    assert all(map(same_bits, models[0].parameters(), models[1].parameters()))


@pytest.mark.unpoisoned
@pytest.mark.filterwarnings("ignore")
@every_class
def test_step_called_by_compiled_code(name):
    params = make_parameters([(33,), (4, 6)])
    plain = copies(params)
    optimizer, expected = (getattr(fusedopt, name)(each, lr=0.1) for each in (params, plain))
    compiled = torch.compile(lambda: optimizer.step(), backend="eager")
    for _ in range(2):
        draw_gradients(params, plain)
        compiled()
        expected.step()
    assert all(map(same_bits, params, plain))


@every_class
def test_autocast_does_not_reach_the_step(name):
    params = make_parameters([(33,)])
    plain = copies(params)
    optimizer, expected = (getattr(fusedopt, name)(each, lr=0.1) for each in (params, plain))
    draw_gradients(params, plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        optimizer.step()
    expected.step()
    assert all(map(same_bits, params, plain))
    assert all(value.dtype == torch.float32 for state in optimizer.state.values() for value in state.values())


# --- numbers that torch keeps otherwise than their memory reads ----------------------------------------------------------------


# One element has no strides to speak of, so that nothing but the flag tells.
@pytest.mark.parametrize("size", [67, 1])
@pytest.mark.parametrize("which", ["parameter", "gradient", "both"])
@pytest.mark.parametrize("kind", ["conjugate", "negative"])
@cases
def test_conjugate_and_negative_views(case, kind, which, size):
    """``conj()`` and the imaginary part of it change no memory, only a flag; autograd hands out such gradients."""
    numbers = [torch.randn(size, dtype=torch.complex64) for _ in range(4)]

    def view(number, lazily):
        shown = number.clone().conj() if lazily else number.conj().resolve_conj()
        if kind == "negative":
            shown = shown.imag if lazily else shown.imag.clone()
            assert shown.is_neg() == lazily
        else:
            assert shown.is_conj() == lazily
        return shown

    results = []
    for lazily in (True, False):
        param = view(numbers[0], lazily and which != "gradient")
        optimizer = case.make_ours([param])
        for number in numbers[1:]:
            param.grad = view(number, lazily and which != "parameter")
            optimizer.step()
        results.append(param.resolve_conj().resolve_neg())
    assert torch.equal(*results)


# --- memory ------------------------------------------------------------------------------------------------------------------


@cases
def test_steps_leave_no_tensors_behind(case):
    """Views, copies that stood in for other layouts, and tables of late gradients are gone after each step."""
    params = [*make_parameters([(33,), (4, 6)]), torch.nn.Parameter(torch.randn(6, 4).t())]
    optimizer = case.make_ours(params)

    def rounds(count):
        for number in range(count):
            draw_gradients(params)
            params[1].grad = torch.randn(6, 4).t()
            params[number % 3].grad = None
            optimizer.step()
            optimizer.zero_grad()
        gc.collect()
        return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())

    first = rounds(6)
    assert rounds(12) <= first


@cases
def test_group_without_parameters(case):
    params = make_parameters([(5,)])
    optimizer = case.make_ours([{"params": []}, {"params": params}])
    draw_gradients(params)
    checked_step(case, optimizer)
    assert len(optimizer.explain().splitlines()) == 1


def test_hooks_of_steps_run_whenever_they_are_there():
    params = make_parameters([(3,)])
    draw_gradients(params)
    optimizer, calls = fusedopt.AdamW(params), []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("global, before")),
        optimizer.register_step_pre_hook(lambda *_: calls.append("own, before")),
        optimizer.register_step_post_hook(lambda *_: calls.append("own, after")),
        register_optimizer_step_post_hook(lambda *_: calls.append("global, after")),
    ]
    every = ["global, before", "own, before", "own, after", "global, after"]
    try:
        for name, handle in zip(every, handles, strict=True):
            optimizer.step()
            assert calls == every[every.index(name) :]
            calls.clear()
            handle.remove()
    finally:
        for handle in handles:
            handle.remove()
    optimizer.step()
    assert calls == []


def test_hooks_that_a_closure_adds_run_after_its_step():
    params = make_parameters([(3,)])
    draw_gradients(params)
    optimizer, calls = fusedopt.AdamW(params), []
    optimizer.step(lambda: optimizer.register_step_post_hook(lambda *_: calls.append("after")))
    assert calls == ["after"]


def test_profilers_see_steps_by_their_class():
    params = make_parameters([(3,)])
    draw_gradients(params)
    optimizer = fusedopt.AdamW(params)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        optimizer.step()
    assert [event.name for event in seen.events()].count("Optimizer.step#AdamW.step") == 1
