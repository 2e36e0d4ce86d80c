"""Stepping inside backward: the same bits as a step after it, gradients that are gone, and words for what cannot be."""

from __future__ import annotations

import copy
import itertools
import pickle
import re
import warnings

import pytest
import torch

import fusedopt
from cases import SGD, Case, device_of, each_case
from fusedopt.kernels import backends
from training import make_batches, make_model

FLOAT32 = torch.float32


def loss_of(model, batch):
    return torch.nn.functional.mse_loss(model(batch[0]), batch[1])


def twins(dtype=FLOAT32, make=make_model):
    """Two models with the same weights."""
    return make(dtype), make(dtype)


def assert_same_bits(model, expected):
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(p, q), f"{name}: {(p != q).sum()} of {p.numel()} elements differ"


def assert_same_state(optimizer, expected):
    states, right = optimizer.state_dict()["state"], expected.state_dict()["state"]
    assert states.keys() == right.keys()
    for index in states:
        assert states[index].keys() == right[index].keys()
        for name, value in states[index].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(right[index][name])), f"{name} of parameter {index}"


def train(model, optimizer, batches, between=lambda: None):
    for batch in batches:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        between()


# --- the same bits -----------------------------------------------------------------------------------------------------------

# Gradients of the model have 140, 28, 196, 28, 28 and 4 bytes.
UNIT_BYTES = {"each alone": 0, "some units": 100, "one unit": 1 << 20}


@pytest.mark.parametrize("unit_bytes", UNIT_BYTES.values(), ids=UNIT_BYTES)
@each_case
def test_same_bits_as_a_step_after_backward(case, unit_bytes):
    model, right = twins()
    optimizer, right_optimizer = case.make_ours(model.parameters()), case.make_ours(right.parameters())
    fusedopt.step_in_backward(model, optimizer, unit_bytes=unit_bytes)
    batches = make_batches(4, dtype=FLOAT32)
    train(right, right_optimizer, batches)
    train(model, optimizer, batches)
    assert_same_bits(model, right)
    assert_same_state(optimizer, right_optimizer)


PLAIN = [Case("adamw", fusedopt.AdamW, torch.optim.AdamW, {"lr": 0.01}), Case("sgd", *SGD, {"lr": 0.1, "momentum": 0.9})]
each_plain = pytest.mark.parametrize("case", PLAIN, ids=str)


@pytest.mark.parametrize("unit_bytes", UNIT_BYTES.values(), ids=UNIT_BYTES)
@pytest.mark.parametrize("recompute", ["whole", "reentrant"])
def test_activations_that_are_computed_anew(recompute, unit_bytes):
    from torch.utils.checkpoint import checkpoint

    model, right = twins()
    optimizers = [fusedopt.AdamW(each.parameters(), lr=0.01) for each in (model, right)]
    fusedopt.step_in_backward(model, optimizers[0], unit_bytes=unit_bytes)
    for each, optimizer in zip((model, right), optimizers, strict=True):
        for x, y in make_batches(3, dtype=FLOAT32):
            hidden = x.requires_grad_()
            for layers in (each[:2], each[2:]):
                hidden = checkpoint(layers, hidden, use_reentrant=recompute == "reentrant")
            torch.nn.functional.mse_loss(hidden, y).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same_bits(model, right)
    assert_same_state(*optimizers)


@pytest.mark.parametrize("unit_bytes", UNIT_BYTES.values(), ids=UNIT_BYTES)
def test_adafactor(unit_bytes):
    """A step of its own, with sums over whole tensors."""
    model, right = twins()
    optimizers = [fusedopt.Adafactor(each.parameters(), lr=0.01) for each in (model, right)]
    handle = fusedopt.step_in_backward(model, optimizers[0], unit_bytes=unit_bytes)
    for each, optimizer in zip((model, right), optimizers, strict=True):
        train(each, optimizer, make_batches(4, dtype=FLOAT32))
    assert_same_bits(model, right)
    assert_same_state(*optimizers)
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(RuntimeError, match="measures no norm"), handle.measuring():
        pass


class Tied(torch.nn.Module):
    """Two layers that share a weight, one that is frozen, and one that takes part in no pass."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = torch.nn.Linear(5, 5), torch.nn.Linear(5, 5), torch.nn.Linear(5, 1)
        self.second.weight = self.first.weight
        self.frozen, self.unused = torch.nn.Linear(5, 5).requires_grad_(False), torch.nn.Linear(5, 5)

    def forward(self, x):
        return self.last(self.frozen(torch.tanh(self.second(torch.tanh(self.first(x))))))


def make_tied(dtype=FLOAT32):
    torch.manual_seed(5)
    return Tied().to(dtype)


@each_plain
def test_shared_frozen_and_unused_weights(case):
    model, right = twins(make=make_tied)
    optimizer, right_optimizer = case.make_ours(model.parameters()), case.make_ours(right.parameters())
    fusedopt.step_in_backward(model, optimizer, unit_bytes=0)
    batches = make_batches(6, dtype=FLOAT32)
    train(model, optimizer, batches[:3])
    train(right, right_optimizer, batches[:3])
    for each in (model, right):  # from here on it is trained as well
        each.frozen.requires_grad_(True)
    train(model, optimizer, batches[3:])
    train(right, right_optimizer, batches[3:])
    assert_same_bits(model, right)
    assert_same_state(optimizer, right_optimizer)
    assert not torch.equal(model.frozen.weight, make_tied().frozen.weight)


class Skipping(torch.nn.Module):
    """A model that leaves out another layer in each pass."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(5, 5) for _ in range(6))
        self.last, self.passes = torch.nn.Linear(5, 1), 0

    def forward(self, x):
        self.passes += 1
        for number, layer in enumerate(self.layers):
            x = x if number == self.passes % 6 else torch.tanh(layer(x))
        return self.last(x)


def make_skipping(dtype=FLOAT32):
    torch.manual_seed(5)
    return Skipping().to(dtype)


@pytest.mark.parametrize("unit_bytes", [0, 250, 1 << 20])
@each_plain
def test_layers_that_come_and_go(case, unit_bytes):
    model, right = twins(make=make_skipping)
    optimizer, right_optimizer = case.make_ours(model.parameters()), case.make_ours(right.parameters())
    fusedopt.step_in_backward(model, optimizer, unit_bytes=unit_bytes)
    batches = make_batches(13, dtype=FLOAT32)
    train(model, optimizer, batches)
    train(right, right_optimizer, batches)
    assert_same_bits(model, right)
    assert_same_state(optimizer, right_optimizer)


@each_plain
def test_groups_schedulers_and_averages(case):
    model, right = twins()
    optimizers = []
    for each in (model, right):
        groups = fusedopt.no_decay_groups(each, weight_decay=0.1)
        groups[1]["lr"] = 0.003
        optimizers.append(case.make_ours(groups, ema_decay=0.5, zero_grad_in_step=True))
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) for optimizer in optimizers]
    fusedopt.step_in_backward(model, optimizers[0], unit_bytes=100)
    batches = make_batches(4, dtype=FLOAT32)
    for each, optimizer, scheduler in zip((model, right), optimizers, schedulers, strict=True):
        train(each, optimizer, batches, scheduler.step)
    assert_same_bits(model, right)
    assert_same_state(*optimizers)
    assert all(p.grad is None for p in model.parameters())


FORMATS = {
    "8 bits": {"state_format": "8bit"},
    "bf16, rounded by chance": {"state_format": "bf16", "stochastic_rounding": True, "rounding_seed": 7},
    "masters": {"master_weights": "split16"},
    "float32 masters": {"master_weights": "fp32", "ema_decay": 0.9},
    "averages, rounded by chance": {"ema_decay": 0.9, "state_format": {"ema": "bf16"}},
}


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_formats(options):
    """What is rounded by chance is rounded alike; masters that are loaded beside other weights stay."""
    model, right = (make_deep(layers=4, width=72).bfloat16() for _ in range(2))
    optimizers = [fusedopt.AdamW(each.parameters(), lr=0.01, **options) for each in (model, right)]
    fusedopt.step_in_backward(model, optimizers[0], unit_bytes=12_000)
    x = torch.randn(4, 72).bfloat16()

    def step_both(count):
        for each, optimizer in zip((model, right), optimizers, strict=True):
            for _ in range(count):
                each(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        assert_same_bits(model, right)
        assert_same_state(*optimizers)

    step_both(3)
    weights, states = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizers[0].state_dict())
    step_both(2)
    for each, optimizer in zip((model, right), optimizers, strict=True):
        each.load_state_dict(weights)
        optimizer.load_state_dict(states)
    step_both(2)
    with torch.no_grad():
        for each in (model, right):
            each[1].weight.mul_(2.0)  # somebody else writes: masters begin anew
    step_both(2)


def test_a_group_that_joins_later():
    model, right = twins()
    optimizers = [fusedopt.AdamW(each[:3].parameters(), lr=0.01) for each in (model, right)]
    fusedopt.step_in_backward(model, optimizers[0], unit_bytes=0)
    batches = make_batches(4, dtype=FLOAT32)
    for each, optimizer in zip((model, right), optimizers, strict=True):
        train(each, optimizer, batches[:2])
        each.zero_grad()
        optimizer.add_param_group({"params": list(each[3:].parameters()), "lr": 0.1})
        train(each, optimizer, batches[2:])
    assert_same_bits(model, right)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("option", [{"fused": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_implementations(option):
    model, right = twins()
    optimizers = [fusedopt.AdamW(each.parameters(), lr=0.01, **option) for each in (model, right)]
    fusedopt.step_in_backward(model, optimizers[0], unit_bytes=100)
    for each, optimizer in zip((model, right), optimizers, strict=True):
        train(each, optimizer, make_batches(3, dtype=FLOAT32))
    assert_same_bits(model, right)


def test_sparse_gradients():
    def make(dtype=FLOAT32):
        torch.manual_seed(1)
        return torch.nn.Sequential(torch.nn.Embedding(9, 5, sparse=True), torch.nn.Linear(5, 1))

    model, right = twins(make=make)
    optimizers = [fusedopt.SGD(each.parameters(), lr=0.1) for each in (model, right)]
    fusedopt.step_in_backward(model, optimizers[0], unit_bytes=0)
    for each, optimizer in zip((model, right), optimizers, strict=True):
        for start in range(3):
            each(torch.arange(start, start + 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same_bits(model, right)


def test_the_warning_of_a_slow_path_comes_once(monkeypatch):
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    model = make_model(FLOAT32)
    optimizer = fusedopt.AdamW(model.parameters(), lr=0.01)
    fusedopt.step_in_backward(model, optimizer, unit_bytes=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, optimizer, make_batches(2, dtype=FLOAT32))
    assert len(caught) == 1
    assert "NUMBA_DISABLE_JIT" in str(caught[0].message)


# --- one step, seen from outside -----------------------------------------------------------------------------------------------


def test_hooks_and_closures_see_one_step():
    model, right = twins()
    optimizers = [fusedopt.AdamW(each.parameters(), lr=0.01) for each in (model, right)]
    fusedopt.step_in_backward(model, optimizers[0], unit_bytes=0)
    calls = []
    optimizers[0].register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizers[0].register_step_post_hook(lambda *_: calls.append("post"))
    for each, optimizer in zip((model, right), optimizers, strict=True):
        for batch in make_batches(3, dtype=FLOAT32):

            def closure(each=each, optimizer=optimizer, batch=batch):
                optimizer.zero_grad()
                loss = loss_of(each, batch)
                loss.backward()
                return loss

            assert optimizer.step(closure) > 0
    assert calls == ["pre", "post"] * 3
    assert_same_bits(model, right)


def test_checkpoints_and_copies_are_those_of_a_plain_optimizer():
    model, right = twins()
    optimizers = [fusedopt.AdamW(each.parameters(), lr=0.01) for each in (model, right)]
    fusedopt.step_in_backward(model, optimizers[0], unit_bytes=100)
    batches = make_batches(6, dtype=FLOAT32)
    for each, optimizer in zip((model, right), optimizers, strict=True):
        train(each, optimizer, batches[:3])
    saved = copy.deepcopy(optimizers[0].state_dict())
    copied_model, copied = copy.deepcopy((model, optimizers[0]))
    pickled_model, pickled = pickle.loads(pickle.dumps((model, optimizers[0])))
    train(right, optimizers[1], batches[3:])
    for each, optimizer in ((copied_model, copied), (pickled_model, pickled)):
        loss_of(each, batches[3]).backward()
        assert all(p.grad is not None for p in each.parameters()), "a copy steps inside backward"
        optimizer.step()
        train(each, optimizer, batches[4:])
        assert_same_bits(each, right)
    # Other states in the places of those that units have planned for.
    weights = copy.deepcopy(model.state_dict())
    train(model, optimizers[0], batches[3:])
    optimizers[0].load_state_dict(saved)
    model.load_state_dict(weights)
    train(model, optimizers[0], batches[3:])
    assert_same_bits(model, right)


def test_removed():
    model, right = twins()
    optimizers = [fusedopt.AdamW(each.parameters(), lr=0.01) for each in (model, right)]
    handle = fusedopt.step_in_backward(model, optimizers[0], unit_bytes=100)
    batches = make_batches(6, dtype=FLOAT32)
    train(model, optimizers[0], batches[:2])
    handle.remove()
    loss_of(model, batches[2]).backward()
    assert all(p.grad is not None for p in model.parameters())
    train(model, optimizers[0], batches[2:4])
    fusedopt.step_in_backward(model, optimizers[0], unit_bytes=100)
    train(model, optimizers[0], batches[4:])
    train(right, optimizers[1], batches)
    assert_same_bits(model, right)


@pytest.mark.unpoisoned
@pytest.mark.slow
def test_compiled_model():
    """The gradients of a compiled graph come all at once, when it has run backward: nothing is saved, and nothing differs."""
    torch._dynamo.reset()
    model, right = twins()
    compiled = [torch.compile(each, backend="aot_eager") for each in (model, right)]
    optimizers = [fusedopt.AdamW(each.parameters(), lr=0.01) for each in compiled]
    fusedopt.step_in_backward(compiled[0], optimizers[0], unit_bytes=100)
    for each, optimizer in zip(compiled, optimizers, strict=True):
        train(each, optimizer, make_batches(3, dtype=FLOAT32))
    assert_same_bits(model, right)
    assert all(p.grad is None for p in model.parameters())


# --- memory and launches -------------------------------------------------------------------------------------------------------


def make_deep(layers=16, width=64):
    torch.manual_seed(3)
    return torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(layers)))


def most_gradient_bytes(model, run):
    """The most bytes that gradients of `model` have at one time while `run` runs, seen whenever one becomes ready."""
    peak = 0

    def look(_):
        nonlocal peak
        peak = max(peak, sum(p.grad.nbytes for p in model.parameters() if p.grad is not None))

    hooks = [p.register_post_accumulate_grad_hook(look) for p in model.parameters()]
    run()
    for hook in hooks:
        hook.remove()
    return peak


@pytest.mark.parametrize("unit_bytes", [0, 30_000])
def test_gradients_are_freed(unit_bytes):
    model = make_deep()
    optimizer = fusedopt.AdamW(model.parameters())
    whole = sum(p.nbytes for p in model.parameters())
    largest = max(p.nbytes for p in model.parameters())
    x = torch.randn(4, 64)
    # The hooks that look come before those that step: the gradient that completes a unit is still there.
    looked = most_gradient_bytes(model, lambda: model(x).sum().backward())
    assert looked == whole
    optimizer.zero_grad()
    peaks = []

    def steps():
        handle = fusedopt.step_in_backward(model, optimizer, unit_bytes=unit_bytes)
        for _ in range(3):
            model(x).sum().backward()
            optimizer.step()
        handle.remove()

    peaks.append(most_gradient_bytes(model, steps))
    assert peaks[0] <= unit_bytes + largest < whole / 4


def peak_of_allocations(run):
    """By how many bytes the memory that torch has allocated rises while `run` runs, at most; seen by torch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def test_peak_memory():
    """In wide layers on few rows gradients are all that is large: nearly as much is saved as they have bytes."""
    peaks = {}
    for inside in (False, True):
        model = make_deep(width=256)
        optimizer = fusedopt.AdamW(model.parameters())
        if inside:
            fusedopt.step_in_backward(model, optimizer, unit_bytes=1 << 19)
        x = torch.randn(2, 256)

        def step(model=model, optimizer=optimizer, x=x):
            model(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

        for _ in range(3):  # states and plans are made
            step()
        peaks[inside] = peak_of_allocations(step)
    gradients = sum(p.nbytes for p in model.parameters())
    assert peaks[False] >= gradients
    assert peaks[True] < 0.25 * gradients
    assert peaks[False] - peaks[True] > 0.8 * gradients


@pytest.mark.gpu
def test_peak_memory_on_a_gpu():
    peaks = {}
    for inside in (False, True):
        model = make_deep(width=1024).cuda()
        optimizer = fusedopt.AdamW(model.parameters())
        if inside:
            fusedopt.step_in_backward(model, optimizer, unit_bytes=1 << 22)
        x = torch.randn(4, 1024, device="cuda")
        for number in range(3):
            if number == 2:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            model(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        peaks[inside] = torch.cuda.max_memory_allocated() - before
    gradients = sum(p.nbytes for p in model.parameters())
    assert peaks[False] - peaks[True] > 0.7 * gradients


@pytest.mark.parametrize(("unit_bytes", "most"), [(0, 32), (30_000, 10), (1 << 20, 1)])
def test_launches_are_as_many_as_units(monkeypatch, unit_bytes, most):
    model = make_deep()
    optimizer = fusedopt.AdamW(model.parameters(), zero_grad_in_step=True)
    handle = fusedopt.step_in_backward(model, optimizer, unit_bytes=unit_bytes)
    launches = []
    run = backends.run
    monkeypatch.setattr(backends, "run", lambda bucket, launch: (launches.append(launch), run(bucket, launch)))
    for _ in range(3):
        launches.clear()
        model(torch.randn(4, 64)).sum().backward()
        optimizer.step()
        assert len(launches) == len(handle.units) <= most
        assert not any(launch.kind.zero_grad for launch in launches), "zeros are stored to what is freed"
    assert sum(map(len, handle.units)) == 32


# --- several passes ------------------------------------------------------------------------------------------------------------


@each_plain
@pytest.mark.parametrize("unit_bytes", [0, 1 << 20])
def test_accumulation(case, unit_bytes):
    """A layer takes part in the first pass of a step alone: its gradient steps when the step is closed."""
    model, right = twins()
    extra = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizers = [case.make_ours([*each.parameters(), p]) for each, p in zip((model, right), extra, strict=True)]
    handle = fusedopt.step_in_backward(model, optimizers[0], unit_bytes=unit_bytes)
    for start in range(0, 9, 3):
        for number, batch in enumerate(make_batches(9, dtype=FLOAT32)[start : start + 3]):
            first = 1.0 if number == 0 else 0.0
            with handle.accumulating(number < 2):
                (loss_of(model, batch) + (first * extra[0].sum() if first else 0)).backward()
            (loss_of(right, batch) + (first * extra[1].sum() if first else 0)).backward()
            if number < 2:
                assert all(p.grad is not None for p in model.parameters())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_same_bits(model, right)
    assert torch.equal(*extra)


@pytest.mark.parametrize("unit_bytes", [0, 130, 250, 1 << 20])
@each_plain
def test_accumulation_with_layers_that_come_and_go(case, unit_bytes):
    """A unit that cannot wait for all of its parameters does not touch those whose last gradient is yet to come."""
    model, right = twins(make=make_skipping)
    optimizers = [case.make_ours(each.parameters()) for each in (model, right)]
    handle = fusedopt.step_in_backward(model, optimizers[0], unit_bytes=unit_bytes)
    for number, batch in enumerate(make_batches(14, dtype=FLOAT32)):
        with handle.accumulating(number % 2 == 0):
            loss_of(model, batch).backward()
        loss_of(right, batch).backward()
        if number % 2:
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    assert_same_bits(model, right)
    assert_same_state(*optimizers)


def test_units_that_are_not_complete_do_not_pile_up():
    """Each unit has a layer that takes no part any more: memory falls all the same."""
    model = make_deep()
    optimizer = fusedopt.SGD(model.parameters())
    # Three weights, each with the bias of the layer before.
    unit_bytes = 3 * 64 * 64 * 4
    fusedopt.step_in_backward(model, optimizer, unit_bytes=unit_bytes)
    x = torch.randn(4, 64)
    model(x).sum().backward()
    optimizer.step()
    some = torch.nn.Sequential(*(layer for number, layer in enumerate(model) if number % 3))
    peak = most_gradient_bytes(model, lambda: some(x).sum().backward())
    assert peak < 3 * unit_bytes < 10 * 64 * 64 * 4
    optimizer.step()
    assert all(p.grad is None for p in model.parameters())


def test_memory_falls_in_the_last_pass():
    model = make_deep()
    optimizer = fusedopt.AdamW(model.parameters())
    handle = fusedopt.step_in_backward(model, optimizer, unit_bytes=0)
    whole, x = sum(p.nbytes for p in model.parameters()), torch.randn(4, 64)
    with handle.accumulating():
        model(x).sum().backward()
    assert sum(p.grad.nbytes for p in model.parameters()) == whole
    model(x).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    optimizer.step()


def test_a_second_backward_is_refused():
    model = make_model(FLOAT32)
    optimizer = fusedopt.AdamW(model.parameters())
    handle = fusedopt.step_in_backward(model, optimizer, unit_bytes=0)
    first, second = make_batches(2, dtype=FLOAT32)
    loss_of(model, first).backward()
    with pytest.raises(RuntimeError, match=r"call optimizer.step\(\) after each backward"):
        loss_of(model, second).backward()
    with pytest.raises(RuntimeError, match="is the last of its step"), handle.accumulating():
        pass


# --- clipping, and gradients that are not finite ---------------------------------------------------------------------------------

CLIPS = {
    "all groups": {"max_grad_norm": 0.05},
    "all groups, far above": {"max_grad_norm": 1e6},
    "skip_nonfinite": {"skip_nonfinite": True},
}


def two_groups(model, alone):
    first, second = list(model[:1].parameters()), list(model[1:].parameters())
    options = [{"max_grad_norm": 0.02}, {"max_grad_norm": 0.5}] if alone else [{}, {}]
    return [{"params": own, **option} for own, option in zip((first, second), options, strict=True)]


@pytest.mark.parametrize("clip", [*CLIPS, "each group alone"])
@each_plain
def test_clipping_in_two_passes(case, clip):
    """The norm of units is added up in another order than that of all gradients: a rounding or two of float64."""
    model, right = twins(torch.float64)
    alone = clip == "each group alone"
    optimizers = [case.make_ours(two_groups(each, alone), **CLIPS.get(clip, {})) for each in (model, right)]
    handle = fusedopt.step_in_backward(model, optimizers[0], unit_bytes=100)
    for batch in make_batches(4):
        loss = loss_of(model, batch)
        with handle.measuring():
            loss.backward(retain_graph=True)
        assert all(p.grad is None for p in model.parameters())
        loss.backward()
        optimizers[0].step()
        assert all(p.grad is None for p in model.parameters())
        optimizers[1].zero_grad()
        loss_of(right, batch).backward()
        optimizers[1].step()
        torch.testing.assert_close(optimizers[0].grad_norm, optimizers[1].grad_norm, rtol=1e-14, atol=0)
    for p, q in zip(model.parameters(), right.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


def test_clipping_of_accumulated_gradients():
    """Gradients that are all kept are measured when the step is closed."""
    model, right = twins(torch.float64)
    optimizers = [fusedopt.AdamW(each.parameters(), lr=0.01, max_grad_norm=0.05) for each in (model, right)]
    handle = fusedopt.step_in_backward(model, optimizers[0], unit_bytes=100)
    for batch in make_batches(3):
        with handle.accumulating():
            loss_of(model, batch).backward()
        loss_of(right, batch).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(optimizers[0].grad_norm, optimizers[1].grad_norm, rtol=1e-14, atol=0)
    for p, q in zip(model.parameters(), right.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("last", [False, True], ids=["first gradient", "last gradient"])
def test_a_step_that_is_not_finite_changes_nothing(last):
    model = make_model(FLOAT32)
    optimizer = fusedopt.AdamW(model.parameters(), lr=0.01, skip_nonfinite=True)
    handle = fusedopt.step_in_backward(model, optimizer, unit_bytes=0)
    batches = make_batches(2, dtype=FLOAT32)

    def step(batch, spoil):
        loss = loss_of(model, batch)
        with handle.measuring():
            spoiled = list(model.parameters())[0 if last else -1].register_hook(lambda g: g * torch.inf) if spoil else None
            loss.backward(retain_graph=True)
        loss.backward()
        if spoiled is not None:
            spoiled.remove()
        optimizer.step()

    step(batches[0], False)
    before, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict()["state"])
    step(batches[1], True)
    assert_same_bits(model, before)
    assert all(torch.equal(optimizer.state_dict()["state"][i][name], v) for i in state for name, v in state[i].items())
    assert optimizer.skipped_steps == 1
    assert all(p.grad is None for p in model.parameters())
    step(batches[1], False)
    assert not torch.equal(model[0].weight, before[0].weight)


@pytest.mark.parametrize("options", [{"max_grad_norm": 1.0}, {"skip_nonfinite": True}], ids=str)
def test_one_pass_is_refused_where_all_gradients_must_be_known(options):
    model = make_model(FLOAT32)
    optimizer = fusedopt.AdamW(model.parameters(), **options)
    fusedopt.step_in_backward(model, optimizer, unit_bytes=0)
    before = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match=r"within measuring\(\)"):
        loss_of(model, make_batches(1, dtype=FLOAT32)[0]).backward()
    assert_same_bits(model, before)


def test_measuring_refuses_gradients_that_are_there():
    model = make_model(FLOAT32)
    optimizer = fusedopt.AdamW(model.parameters(), max_grad_norm=1.0)
    handle = fusedopt.step_in_backward(model, optimizer)
    with handle.accumulating():
        loss_of(model, make_batches(1, dtype=FLOAT32)[0]).backward()
    with pytest.raises(RuntimeError, match="some have been accumulated"), handle.measuring():
        pass


def test_passes_that_disagree_are_refused():
    model = make_model(FLOAT32)
    optimizer = fusedopt.AdamW(model.parameters(), max_grad_norm=1.0)
    handle = fusedopt.step_in_backward(model, optimizer, unit_bytes=0)
    batch = make_batches(1, dtype=FLOAT32)[0]
    with handle.measuring():
        model[-1](torch.ones(7)).sum().backward()
    with pytest.raises(RuntimeError, match="both passes must agree"):
        loss_of(model, batch).backward()


# --- gradient scalers ------------------------------------------------------------------------------------------------------------


def make_scaler(**options):
    return torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2, **options)


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.05}], ids=str)
@each_plain
def test_gradient_scaler_in_two_passes(case, options):
    """Infinities in one step: it is left out, and the scale falls, as without stepping inside backward."""
    model, right = twins(torch.float64)
    optimizers = [case.make_ours(each.parameters(), **options) for each in (model, right)]
    scalers = [make_scaler(), make_scaler()]
    handle = fusedopt.step_in_backward(model, optimizers[0], unit_bytes=0, scaler=scalers[0])
    scales = []
    for number, batch in enumerate(make_batches(6)):
        # Infinite is the gradient of one weight alone.
        spoiled = [each[2].weight.register_hook(lambda g: g * torch.inf) for each in (model, right) if number == 2]
        loss = scalers[0].scale(loss_of(model, batch))
        with handle.measuring():
            loss.backward(retain_graph=True)
        loss.backward()
        optimizers[1].zero_grad()
        scalers[1].scale(loss_of(right, batch)).backward()
        for hook in spoiled:
            hook.remove()
        for scaler, optimizer in zip(scalers, optimizers, strict=True):
            scaler.step(optimizer)
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
        scales.append(scalers[0].get_scale())
    assert sorted(set(scales)) == [1024.0, 2048.0]
    for p, q in zip(model.parameters(), right.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)
    assert not torch.equal(model[0].weight, make_model()[0].weight)


def test_gradient_scaler_in_one_pass_is_refused():
    model, scaler = make_model(FLOAT32), make_scaler()
    optimizer = fusedopt.AdamW(model.parameters())
    fusedopt.step_in_backward(model, optimizer, unit_bytes=0, scaler=scaler)
    before = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="a gradient scaler must know all gradients"):
        scaler.scale(loss_of(model, make_batches(1, dtype=FLOAT32)[0])).backward()
    assert_same_bits(model, before)


def test_gradient_scaler_that_is_off():
    model, right = twins()
    optimizers, scaler = [fusedopt.AdamW(each.parameters()) for each in (model, right)], make_scaler(enabled=False)
    fusedopt.step_in_backward(model, optimizers[0], scaler=scaler)
    for each, optimizer in zip((model, right), optimizers, strict=True):
        scaler.scale(loss_of(each, make_batches(1, dtype=FLOAT32)[0])).backward()
        scaler.step(optimizer)
        scaler.update()
    assert_same_bits(model, right)


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=str)
def test_gradient_scaler_that_nobody_spoke_of_is_refused(options):
    model, scaler = make_model(FLOAT32), make_scaler()
    optimizer = fusedopt.AdamW(model.parameters(), **options)
    handle = fusedopt.step_in_backward(model, optimizer, unit_bytes=0)
    loss = scaler.scale(loss_of(model, make_batches(1, dtype=FLOAT32)[0]))
    if options:
        with handle.measuring():
            loss.backward(retain_graph=True)
    loss.backward()
    with pytest.raises(RuntimeError, match="scaler=scaler"):
        scaler.step(optimizer)


def test_gradient_scaler_of_accumulated_gradients():
    model, right = twins()
    optimizers, scalers = [fusedopt.AdamW(each.parameters()) for each in (model, right)], [make_scaler(), make_scaler()]
    handle = fusedopt.step_in_backward(model, optimizers[0], unit_bytes=0)
    for each, optimizer, scaler in zip((model, right), optimizers, scalers, strict=True):
        for batch in make_batches(3, dtype=FLOAT32):
            with handle.accumulating():
                scaler.scale(loss_of(each, batch)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert_same_bits(model, right)


# --- errors ----------------------------------------------------------------------------------------------------------------------


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ValueError("a fault in the model")


@pytest.mark.parametrize("goes_on", ["discard", "step"])
def test_an_error_inside_backward(goes_on):
    """What came before the error has been updated, once; the rest is as it was, and training goes on."""
    model, right = twins()
    optimizers = [fusedopt.AdamW(each.parameters(), lr=0.01) for each in (model, right)]
    handle = fusedopt.step_in_backward(model, optimizers[0], unit_bytes=200)
    batches = make_batches(5, dtype=FLOAT32)
    for each, optimizer in zip((model, right), optimizers, strict=True):
        train(each, optimizer, batches[:2])
    x, y = batches[2]
    with pytest.raises(ValueError, match="a fault in the model"):
        torch.nn.functional.mse_loss(model[2:](Failing.apply(model[:2](x))), y).backward()
    assert all(p.grad is None for p in model.parameters())
    # The same: the layers in front of the fault have no gradients in the third step.
    optimizers[1].zero_grad()
    torch.nn.functional.mse_loss(right[2:](right[:2](x).detach()), y).backward()
    optimizers[1].step()
    assert_same_bits(model, right)
    if goes_on == "discard":
        handle.discard()
    else:
        optimizers[0].step()
    assert_same_bits(model, right)
    assert_same_state(*optimizers)
    for each, optimizer in zip((model, right), optimizers, strict=True):
        train(each, optimizer, batches[3:])
    assert_same_bits(model, right)
    assert_same_state(*optimizers)


@pytest.mark.parametrize("goes_on", ["discard", "step"])
def test_gradients_that_wait_when_an_error_comes(goes_on):
    """One unit that is never whole: nothing has been updated; step() takes the gradients that are there."""
    model = make_model(FLOAT32)
    optimizer = fusedopt.AdamW(model.parameters(), lr=0.01)
    handle = fusedopt.step_in_backward(model, optimizer)
    before = copy.deepcopy(model)
    x, y = make_batches(1, dtype=FLOAT32)[0]
    with pytest.raises(ValueError, match="a fault in the model"):
        torch.nn.functional.mse_loss(model[2:](Failing.apply(model[:2](x))), y).backward()
    assert [p.grad is not None for p in model.parameters()] == [False, False, True, True, True, True]
    assert_same_bits(model, before)
    if goes_on == "discard":
        handle.discard()
    else:
        optimizer.step()
    assert [not torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True)] == (
        [False] * 6 if goes_on == "discard" else [False, False, True, True, True, True]
    )
    assert all(p.grad is None for p in model.parameters())


def test_an_error_of_the_step_itself():
    model = make_model(FLOAT32)
    optimizer = fusedopt.AdamW(model.parameters(), fused=True)
    handle = fusedopt.step_in_backward(model, optimizer, unit_bytes=0)
    batch = make_batches(1, dtype=FLOAT32)[0]
    model[0].weight.data = model[0].weight.data[:, :1].expand(7, 5)
    with pytest.raises(RuntimeError, match="single memory location"):
        loss_of(model, batch).backward()
    assert model[0].weight.grad is not None
    handle.discard()
    model[0].weight.data = model[0].weight.data.clone()
    train(model, optimizer, [batch])


REFUSED = {
    "an optimizer of torch": (TypeError, "takes an optimizer of fusedopt", lambda m: (m, torch.optim.SGD(m.parameters()), {})),
    "another model's parameters": (
        ValueError,
        "none of the model's parameters",
        lambda m: (m, fusedopt.SGD(make_model().parameters()), {}),
    ),
    "differentiable": (ValueError, "differentiable=True", lambda m: (m, fusedopt.SGD(m.parameters(), differentiable=True), {})),
    "negative unit_bytes": (ValueError, "unit_bytes: -1", lambda m: (m, fusedopt.SGD(m.parameters()), {"unit_bytes": -1})),
    "shared memory": (
        ValueError,
        "parameters share memory",
        lambda m: (m, fusedopt.SGD([*m.parameters(), torch.nn.Parameter(m[0].weight.data[0])]), {}),
    ),
}


@pytest.mark.parametrize(("kind", "message", "make"), REFUSED.values(), ids=REFUSED)
def test_refused(kind, message, make):
    model, optimizer, options = make(make_model(FLOAT32))
    with pytest.raises(kind, match=re.escape(message)):
        fusedopt.step_in_backward(model, optimizer, **options)
    # Nothing is left behind.
    loss_of(model, make_batches(1, dtype=FLOAT32)[0]).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_backward_while_the_parameters_are_averages_is_refused():
    model = make_model(FLOAT32)
    optimizer = fusedopt.SGD(model.parameters(), lr=0.1, ema_decay=0.9)
    fusedopt.step_in_backward(model, optimizer, unit_bytes=0)
    batch = make_batches(1, dtype=FLOAT32)[0]
    train(model, optimizer, [batch])
    with optimizer.swap_ema(), pytest.raises(RuntimeError, match=r"swap_ema\(\)"):
        loss_of(model, batch).backward()


def test_a_second_handle_is_refused():
    model = make_model(FLOAT32)
    optimizer = fusedopt.SGD(model.parameters())
    handle = fusedopt.step_in_backward(model, optimizer)
    with pytest.raises(RuntimeError, match="steps inside backward already"):
        fusedopt.step_in_backward(model, optimizer)
    handle.remove()
    fusedopt.step_in_backward(model, optimizer)


@pytest.mark.triton
@pytest.mark.parametrize("unit_bytes", [0, 1 << 20])
@each_plain
def test_kernels_for_gpus(case, unit_bytes):
    """In Triton's interpreter, or on a GPU: plain steps to the bit, and clipped ones, whose coefficients the device computes."""
    device = device_of("triton")
    for options in ({}, {"max_grad_norm": 0.05, "skip_nonfinite": True}):
        model, right = (each.to(device) for each in twins())
        optimizers = [case.make_ours(each.parameters(), **options) for each in (model, right)]
        handle = fusedopt.step_in_backward(model, optimizers[0], unit_bytes=unit_bytes)
        with backends.use("triton"):
            for batch in make_batches(3, dtype=FLOAT32):
                x, y = (part.to(device) for part in batch)
                loss = loss_of(model, (x, y))
                if options:
                    with handle.measuring():
                        loss.backward(retain_graph=True)
                loss.backward()
                optimizers[0].step()
                optimizers[1].zero_grad()
                loss_of(right, (x, y)).backward()
                optimizers[1].step()
        if options:  # the norm's last bits, in float64, are rounded away in float32 coefficients, or nearly so
            for p, q in zip(model.parameters(), right.parameters(), strict=True):
                torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        else:
            assert_same_bits(model, right)
            assert_same_state(*optimizers)


# --- masters, and norms that are not finite ----------------------------------------------------------------------------------


@pytest.mark.parametrize("master", ["fp32", "split16", "split8"])
def test_masters_outlive_an_evaluation_of_averages(master):
    torch.manual_seed(0)
    model = torch.nn.Linear(80, 80).bfloat16()
    models = [model, copy.deepcopy(model)]
    ours, plain = (fusedopt.AdamW(m.parameters(), lr=1e-4, ema_decay=0.9, master_weights=master) for m in models)
    fusedopt.step_in_backward(model, ours)
    for _ in range(4):
        x = torch.randn(4, 80).bfloat16()
        for each, optimizer in zip(models, (ours, plain), strict=True):
            each(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            with optimizer.swap_ema():
                pass
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(ours.state[p]["master"], plain.state[q]["master"])


@pytest.mark.parametrize("skips", [False, True])
def test_a_norm_that_is_not_finite_is_treated_as_in_a_step_after_backward(skips):
    results = []
    for inside in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(8, 8)
        optimizer = fusedopt.AdamW(model.parameters(), max_grad_norm=1.0, skip_nonfinite=skips)
        x = torch.ones(2, 8)
        x[0, 0] = torch.inf
        if inside:
            handle = fusedopt.step_in_backward(model, optimizer)
            loss = model(x).square().sum()
            with handle.measuring():
                loss.backward(retain_graph=True)
            loss.backward()
        else:
            model(x).square().sum().backward()
        optimizer.step()
        results.append(([p.detach().clone() for p in model.parameters()], int(optimizer.skipped_steps)))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0, equal_nan=True)
    assert results[0][1] == skips


def test_a_scaler_that_is_off_asks_for_one_pass():
    model = torch.nn.Linear(8, 8)
    optimizer = fusedopt.AdamW(model.parameters())
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    fusedopt.step_in_backward(model, optimizer, scaler=scaler)
    before = model.weight.detach().clone()
    scaler.scale(model(torch.ones(2, 8)).sum()).backward()
    scaler.step(optimizer)
    assert not torch.equal(model.weight, before)
