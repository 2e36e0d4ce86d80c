"""torch's tools around an optimizer: schedulers, averaged weights, loss scaling under autocast, compiled models and steps."""

from __future__ import annotations

import copy
import inspect
import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.amp import GradScaler

import fusedopt
from fusedopt import lr_scheduler, swa_utils
from fusedopt.optimizer import FusedOptimizer
from snapshot import Snapshot
from training import (
    NAMES,
    OPTIONS,
    TOLERANCES,
    assert_same_weights,
    backward,
    each_name,
    make_batches,
    make_model,
    make_ours,
    make_truth,
    some_names,
)


def test_every_class_of_ours_is_trained():
    ours = {name for name, value in vars(fusedopt).items() if inspect.isclass(value) and issubclass(value, FusedOptimizer)}
    assert ours == set(NAMES)


# --- schedulers --------------------------------------------------------------------------------------------------------------


def cycles(optimizer):
    """Whether schedulers can cycle the momentum of `optimizer`, or its first beta."""
    return "momentum" in optimizer.defaults or "betas" in optimizer.defaults


def chained(optimizer):
    warmup = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
    return lr_scheduler.ChainedScheduler([warmup, lr_scheduler.ExponentialLR(optimizer, 0.8), lr_scheduler.StepLR(optimizer, 2)])


def sequential(optimizer):
    parts = [
        lr_scheduler.ConstantLR(optimizer, 0.5, 2),
        lr_scheduler.CosineAnnealingLR(optimizer, 3),
        lr_scheduler.ExponentialLR(optimizer, 0.8),
    ]
    return lr_scheduler.SequentialLR(optimizer, parts, [2, 5])


def cyclic(optimizer, **options):
    momenta = {"base_momentum": 0.5, "max_momentum": 0.95} if cycles(optimizer) else {"cycle_momentum": False}
    return lr_scheduler.CyclicLR(optimizer, 0.001, [0.1, 0.02], step_size_up=2, step_size_down=3, **momenta, **options)


def one_cycle(optimizer, **options):
    momenta = {"base_momentum": 0.5, "max_momentum": 0.95} if cycles(optimizer) else {"cycle_momentum": False}
    return lr_scheduler.OneCycleLR(optimizer, [0.1, 0.02], total_steps=9, **momenta, **options)


# Each makes a schedule for an optimizer of two groups.
SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda epoch: 0.9**epoch, lambda epoch: 1 / (1 + epoch)]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.5, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5, eta_min=0.001),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2, T_mult=2),
    "SequentialLR": sequential,
    "ChainedScheduler": chained,
    # Any loss but the first is worse than this threshold allows: the rate falls at each second step.
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1, threshold=0.9),
    "CyclicLR": cyclic,
    "CyclicLR exp_range": lambda o: cyclic(o, mode="exp_range", gamma=0.9),
    "OneCycleLR": one_cycle,
    "OneCycleLR three phases": lambda o: one_cycle(o, three_phase=True, anneal_strategy="linear"),
    "RobbinsMonroLR": lambda o: lr_scheduler.RobbinsMonroLR(o, 3.0),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=[0.05, 0.01], anneal_epochs=4),
}


def test_every_scheduler_of_torch_is_tried():
    classes = {name for name in torch.optim.lr_scheduler.__all__ if inspect.isclass(getattr(torch.optim.lr_scheduler, name))}
    assert classes - {"LRScheduler"} <= SCHEDULERS.keys()


class Scheduled:
    """A model whose first layer is a group of its own, an optimizer and a schedule."""

    def __init__(self, make, name, scheduler):
        self.model = make_model()
        first, *others = self.model.children()
        rest = [p for layer in others for p in layer.parameters()]
        self.optimizer = make(name, [{"params": list(first.parameters())}, {"params": rest, "lr": OPTIONS[name]["lr"] / 2}])
        self.schedule = SCHEDULERS[scheduler](self.optimizer)

    def step(self, batch):
        loss = backward(self.model, batch)
        self.optimizer.step()
        takes_loss = isinstance(self.schedule, lr_scheduler.ReduceLROnPlateau)
        self.schedule.step(loss) if takes_loss else self.schedule.step()

    def scheduled(self):
        """All that a schedule changes."""
        keys = [key for key in ("lr", "momentum", "betas") if key in self.optimizer.defaults]
        return [float(x) for group in self.optimizer.param_groups for key in keys for x in numbers(group[key])]


def numbers(value):
    return value if isinstance(value, tuple) else (value,)


@each_name
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedules_step_for_step(scheduler, name):
    """The same rates, momenta and weights after every step; half-way both go on from what they have saved."""
    if scheduler.startswith(("OneCycleLR", "CyclicLR")) and name == "Momentum":
        assert not cycles(make_truth(name, make_model().parameters()))  # its only momentum is called beta
    ours, theirs = (Scheduled(make, name, scheduler) for make in (make_ours, make_truth))
    seen = set()
    for number, batch in enumerate(make_batches(8)):
        if number == 4:
            for side, make in ((ours, make_ours), (theirs, make_truth)):
                saved = [copy.deepcopy(each.state_dict()) for each in (side.model, side.optimizer, side.schedule)]
                side.__init__(make, name, scheduler)
                for each, state in zip((side.model, side.optimizer, side.schedule), saved, strict=True):
                    each.load_state_dict(state)
        for side in (ours, theirs):
            side.step(batch)
        # The rates of ReduceLROnPlateau follow from losses, and so from weights, but only by comparisons.
        assert ours.scheduled() == theirs.scheduled()
        assert_same_weights(name, ours.model, theirs.model)
        seen.add(tuple(ours.scheduled()))
    assert len(seen) > 1


@pytest.mark.parametrize("scheduler", ["CyclicLR", "OneCycleLR"])
@pytest.mark.parametrize(("name", "key"), [("SGD", "momentum"), ("Adam", "betas"), ("AdamW", "betas")])
def test_momentum_is_cycled(name, key, scheduler):
    ours = Scheduled(make_ours, name, scheduler)
    seen = set()
    for batch in make_batches(4):
        ours.step(batch)
        seen.add(numbers(ours.optimizer.param_groups[0][key])[0])
    assert len(seen) == 4
    assert all(0.5 <= value <= 0.95 for value in seen)


# --- averaged weights --------------------------------------------------------------------------------------------------------

AVERAGES = {
    "mean": {},
    "exponential": {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9)},
    "exponential with buffers": {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9), "use_buffers": True},
    "one by one": {"avg_fn": lambda averaged, value, _: 0.7 * averaged + 0.3 * value},
}


@some_names
@pytest.mark.parametrize("average", AVERAGES)
def test_averaged_weights(average, name):
    """AveragedModel, SWALR and update_bn in torch's own recipe, with a model that keeps running statistics."""
    batches = make_batches(9)
    averaged = []
    for make in (make_ours, make_truth):
        layers = list(make_model())
        model = torch.nn.Sequential(*layers[:2], torch.nn.BatchNorm1d(7).double(), *layers[2:])
        mean = swa_utils.AveragedModel(model, **AVERAGES[average])
        optimizer = make(name, model.parameters())
        schedule = lr_scheduler.ExponentialLR(optimizer, 0.9)
        averaging = swa_utils.SWALR(optimizer, swa_lr=0.05, anneal_epochs=3)
        for number, batch in enumerate(batches):
            backward(model, batch)
            optimizer.step()
            if number >= 3:
                mean.update_parameters(model)
                averaging.step()
            else:
                schedule.step()
        swa_utils.update_bn(batches, mean)
        assert mean.n_averaged == 6
        assert not torch.equal(mean.module[0].weight, model[0].weight)
        averaged.append(mean)
    assert_same_weights(name, *averaged)
    for mine, right in zip(*(each.module[2].buffers() for each in averaged), strict=True):
        torch.testing.assert_close(mine, right, **TOLERANCES[name])


# --- loss scaling under autocast ---------------------------------------------------------------------------------------------


@each_name
@pytest.mark.parametrize("clips", [False, True], ids=["step alone", "unscaled and clipped"])
def test_scaled_training_under_float16_autocast(clips, name):
    """A scale that is too large at first: the scaler skips the first steps, finds its scale, and the rest are torch's."""
    results = []
    for make in (make_ours, make_truth):
        model = make_model(torch.float32)
        optimizer = make(name, model.parameters())
        scaler = GradScaler("cpu", init_scale=2.0**21, growth_interval=6)
        scales = []
        for batch in make_batches(16, dtype=torch.float32):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                loss = torch.nn.functional.mse_loss(model(batch[0]).float(), batch[1])
            scaler.scale(loss).backward()
            if clips:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        assert scales[0] < 2.0**21  # the first step was skipped
        assert max(scales) > scales[-1] or scales[-1] > min(scales)
        results.append((model, scales))
    (mine, my_scales), (right, right_scales) = results
    assert my_scales == right_scales
    # float32 weights that differ by a rounding may round to neighbouring float16 numbers in the forward pass, so that the
    # gradients differ by 2**-11 of themselves: far less than a step that is skipped or taken twice, of 1e-2.
    assert_same_weights(name, mine, right, rtol=2.0**-11, atol=2.0**-11 * OPTIONS[name]["lr"])


@each_name
@pytest.mark.parametrize("infinities", [(0.0, 0.0), (1.0, 0.0), (1.0, 1.0)], ids=str)
def test_scaler_that_asked_two_devices(infinities, name):
    """The scaler hands over the sum of what it found on each device: 2 is no less an overflow than 1."""
    models = []
    for make in (make_ours, make_truth):
        model, batches = make_model(), make_batches(3)
        optimizer, scaler = make(name, model.parameters()), GradScaler("cpu", init_scale=16.0)
        for number, (inputs, targets) in enumerate(batches):
            optimizer.zero_grad()
            scaler.scale(torch.nn.functional.mse_loss(model(inputs), targets)).backward()
            scaler.unscale_(optimizer)
            if number == 1:
                found = dict(zip((torch.device("cpu", 0), torch.device("cpu", 1)), map(torch.tensor, infinities), strict=True))
                scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = found
            before = Snapshot(optimizer, grads=False)
            scaler.step(optimizer)
            assert bool(before.differences()) == (number != 1 or not any(infinities))
            scaler.update()
        models.append(model)
    assert_same_weights(name, *models)


# --- compiled models and compiled steps --------------------------------------------------------------------------------------


@pytest.fixture
def fresh_dynamo():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.unpoisoned
@pytest.mark.usefixtures("fresh_dynamo")
@some_names
def test_compiled_models(name):
    """Compiled forward and backward passes; the optimizer is made of the compiled model's parameters."""
    models = []
    for make in (make_ours, make_truth):
        model = make_model()
        compiled = torch.compile(model, backend="aot_eager")
        optimizer = make(name, compiled.parameters())
        for batch in make_batches(4):
            backward(compiled, batch)
            optimizer.step()
        models.append(model)
    assert_same_weights(name, *models)


def compiled_step(optimizer, model, counter):
    return torch.compile(optimizer.step, backend=counter)


def compiled_call(optimizer, model, counter):
    return torch.compile(lambda: optimizer.step(), backend=counter)


def compiled_with_zero_grad(optimizer, model, counter):
    @torch.compile(backend=counter)
    def step():
        optimizer.step()
        for p in model.parameters():
            p.grad = None

    return step


@pytest.mark.unpoisoned
@pytest.mark.usefixtures("fresh_dynamo")
@some_names
@pytest.mark.parametrize("compiled", [compiled_step, compiled_call, compiled_with_zero_grad], ids=lambda each: each.__name__)
def test_compiled_steps_are_eager_steps(compiled, name):
    """Dynamo leaves the step alone: no graph holds a part of it, and a rate that a schedule changes compiles nothing."""
    models = [make_model(), make_model()]
    optimizer, expected = make_ours(name, models[0].parameters()), make_truth(name, models[1].parameters())
    schedules = [lr_scheduler.ExponentialLR(each, 0.8) for each in (optimizer, expected)]
    counter = CompileCounter()
    step = compiled(optimizer, models[0], counter)
    for batch in make_batches(5):
        for model in models:
            backward(model, batch)
        step()
        expected.step()
        for schedule in schedules:
            schedule.step()
    assert counter.op_count == 0
    assert_same_weights(name, *models)


# Dynamo looks at the gradient of whatever crosses a break of the graph.
broken_graphs = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")


@broken_graphs
@pytest.mark.unpoisoned
@pytest.mark.usefixtures("fresh_dynamo")
@some_names
def test_compiled_training_step(name):
    """Forward pass, loss, backward pass and step in one compiled function: what can be compiled is, and the step is taken."""
    model, expected = make_model(), make_model()
    optimizer, truth = make_ours(name, model.parameters()), make_truth(name, expected.parameters())
    counter = CompileCounter()

    @torch.compile(backend=counter)
    def train(inputs, targets):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
        return loss

    for batch in make_batches(4):
        loss = train(*batch)
        assert float(loss.detach()) == pytest.approx(float(backward(expected, batch)), rel=1e-7)
        truth.step()
    assert counter.op_count > 0
    assert_same_weights(name, model, expected)


@broken_graphs
@pytest.mark.unpoisoned
@pytest.mark.usefixtures("fresh_dynamo")
@some_names
def test_compiled_step_with_closure_and_hooks(name):
    model, expected = make_model(), make_model()
    optimizer, truth = make_ours(name, model.parameters()), make_truth(name, expected.parameters())
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    step = torch.compile(optimizer.step, backend="eager")
    for batch in make_batches(3):
        loss = step(lambda batch=batch: backward(model, batch))
        assert float(loss) == pytest.approx(float(backward(expected, batch)), rel=1e-7)
        truth.step()
    assert calls == ["before", "after"] * 3
    assert_same_weights(name, model, expected)


@pytest.mark.unpoisoned
@pytest.mark.usefixtures("fresh_dynamo")
@some_names
def test_step_in_one_whole_graph_is_refused(name):
    """Who asks for one graph hears that there is none, and nothing has changed."""
    model = make_model()
    optimizer = make_ours(name, model.parameters())
    backward(model, make_batches(1)[0])
    optimizer.step()
    before = Snapshot(optimizer)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(lambda: optimizer.step(), backend="eager", fullgraph=True)()
    before.assert_unchanged()
    optimizer.step()
    assert before.differences()


@pytest.mark.slow  # a compiler of C++ runs for half a minute
@pytest.mark.unpoisoned
@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about itself
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's own compiler for CPUs needs g++")
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_compiled_by_inductor(name, tmp_path, monkeypatch):
    """The default backend, for the model and for the step."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    models = [make_model(), make_model()]
    optimizer, expected = make_ours(name, models[0].parameters()), make_truth(name, models[1].parameters())
    compiled, step = torch.compile(models[0]), torch.compile(optimizer.step)
    for batch in make_batches(4):
        backward(compiled, batch)
        backward(models[1], batch)
        step()
        expected.step()
    assert_same_weights(name, *models)
