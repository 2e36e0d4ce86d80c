"""The benchmarks' own logic, on tiny cases: wrong subjects are found out, turns alternate, reports hold what was measured."""

import contextlib
import dataclasses
import itertools
import json
import math
import platform
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

import fusedopt
from bench import __main__ as command
from bench import (
    compare,
    compiled,
    costs,
    formats,
    measure,
    models,
    plots,
    prediction,
    published_formats,
    readme,
    report,
    roofline,
    run,
    surroundings,
)
from bench.cases import CASES, OPTIMIZERS, PERIOD, Case, llama_stack, values
from bench.first_step import CHECKOUT, FirstStep, measure_first_step
from bench.measure import CHECKED_STEPS, Entrant, Spread, Timing
from bench.report import cells
from bench.run import MAIN_OPTIMIZERS
from bench.subjects import FOREACH, FUSED, FUSED_FLOAT32, LOOP, ON_CPU, ON_GPU, OURS, OURS_BFLOAT16, SUBJECTS, Subject

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
TINY = Case("3x5", "3 x 5", ((5,), (1, 5), (5,)))
ADAMW = OPTIMIZERS["AdamW"]
INSTALLED = [subject for subject in ON_CPU if subject.obstacle is None]


@pytest.fixture(autouse=True)
def one_thread():
    """Many small operations on all threads wait for each other where other programs run."""
    with costs.threads_set(1):
        yield


# --- cases ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "tensors", "elements"),
    [
        # As len(list(model.parameters())) and the totals that torchvision and the model cards publish.
        pytest.param(models.resnet50(), 161, 25_557_032, id="ResNet-50"),
        pytest.param(models.mobilenet_v2(), 158, 3_504_872, id="MobileNetV2"),
        pytest.param(models.vit_b_16(), 152, 86_567_656, id="ViT-B/16"),
        pytest.param(models.bert_base(), 199, 109_482_240, id="BERT-base"),
        pytest.param(models.gpt2_small(), 148, 124_439_808, id="GPT-2 small"),
        pytest.param(models.llama_1b(), 146, 1_235_814_400, id="Llama 1B"),
    ],
)
def test_models_have_as_many_parameters_as_published(shapes, tensors, elements):
    assert (len(shapes), sum(map(math.prod, shapes))) == (tensors, elements)


@pytest.mark.parametrize(("gibibytes", "layers"), [(1, 1), (20, 3), (1000, 16)])
def test_layers_of_llama_fit_into_half_of_the_memory(gibibytes, layers):
    case = llama_stack(gibibytes * 2**30)
    assert case.title == f"Llama 1B, {layers} of 16 layers"
    assert (case.tensors, case.elements) == (9 * layers, 60_821_504 * layers)


@pytest.mark.parametrize(
    ("name", "tensors", "elements"),
    [
        ("1x20M", 1, 20_000_000),
        ("1x10M", 1, 10_000_000),
        ("1x1M", 1, 1_000_000),
        ("100x50k", 100, 50_000),
        ("1000x1k", 1000, 1000),
        ("1000x100", 1000, 100),
    ],
)
def test_synthetic_cases_are_what_their_names_say(name, tensors, elements):
    assert CASES[name].shapes == tensors * ((elements,),)


def test_values_repeat_with_their_period_through_all_tensors():
    period = values(7)
    shapes = ((3,), (PERIOD - 1,), (2, PERIOD), (5,))
    tensors = Case("four", "four", shapes).filled(period)
    assert tuple(tuple(tensor.shape) for tensor in tensors) == shapes
    flat = torch.cat([tensor.view(-1) for tensor in tensors])
    assert torch.equal(flat, period.repeat(4)[: len(flat)])
    assert all(tensor.untyped_storage().nbytes() == 4 * tensor.numel() for tensor in tensors)


# --- right or wrong ---------------------------------------------------------------------------------------------------------


class Recorder:
    """In an optimizer's place: notes its name and where the gradients are at every step, then lets `inner` step."""

    def __init__(self, name, log, parameters, inner=None):
        self.name, self.log, self.parameters, self.inner = name, log, parameters, inner
        self.state = inner.state if inner else {parameter: {} for parameter in parameters}

    def step(self):
        self.log.append((self.name, [parameter.grad.data_ptr() for parameter in self.parameters]))
        if self.inner is not None:
            self.inner.step()


def no_decay(optimizer, parameters):
    return torch.optim.AdamW(parameters, weight_decay=0.0)


def other_rate(optimizer, parameters):
    return torch.optim.AdamW(parameters, lr=1.001e-3)


def nothing(optimizer, parameters):
    return Recorder("nothing", [], parameters)


class NanInTheLastElement:
    def __init__(self, optimizer, parameters):
        self.parameters, self.inner = parameters, torch.optim.AdamW(parameters)

    def step(self):
        self.inner.step()
        with torch.no_grad():
            self.parameters[-1].view(-1)[-1] = math.nan


class SkipsAnElement:
    """One element in the middle of a tensor of several periods stays what it was."""

    def __init__(self, optimizer, parameters):
        self.parameters, self.inner = parameters, torch.optim.AdamW(parameters)

    def step(self):
        kept = [parameter.detach().view(-1)[len(parameter) // 2].item() for parameter in self.parameters]
        self.inner.step()
        with torch.no_grad():
            for parameter, number in zip(self.parameters, kept, strict=True):
                parameter.view(-1)[len(parameter) // 2] = number


def tiny(optimizer, *subjects, **options):
    return measure.measure(optimizer, TINY, subjects, 0.0, turn_seconds=0.0, **options)


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_right_subjects_are_timed(optimizer):
    subjects = [subject for subject in INSTALLED if subject.serves(optimizer)]
    result = tiny(optimizer, *subjects)
    assert [timing.wrong for timing in result.timings] == [None] * len(subjects)
    assert result.bytes_per_element == (28 if optimizer.name in ("AdamW", "Adadelta", "Adamax", "NAdam", "RAdam", "Rprop") else 20)
    expected = {FUSED.name} if optimizer.torch_fuses else {LOOP.name, FOREACH.name}
    assert result.baseline in expected
    for timing in result.timings:
        spreads = [timing.milliseconds, timing.ratio, timing.share_of_limit]
        if timing.subject in (OURS.name, result.baseline):
            spreads += [timing.moved_milliseconds, timing.moved_ratio]
        for spread in spreads:
            assert 0 < spread.lower_quartile <= spread.median <= spread.upper_quartile
        assert timing.gigabytes_per_second == pytest.approx(
            result.bytes_per_element * 15 / timing.milliseconds.median / 1e6, rel=1e-6
        )
    assert next(t for t in result.timings if t.subject == result.baseline).ratio == Spread(1.0, 1.0, 1.0)


@pytest.mark.parametrize("name", ["AdamW", "SGD momentum"])
def test_bfloat16_parameters_keep_float32_states(name):
    entrant = Entrant(OURS_BFLOAT16, OPTIMIZERS[name], TINY)
    entrant.step_with_gradients(1)
    assert entrant.itemsizes() == ([2, 2, 4, 4] if name == "AdamW" else [2, 2, 4])
    result = tiny(OPTIMIZERS[name], FUSED_FLOAT32, OURS_BFLOAT16, baseline_names=[FUSED_FLOAT32.name])
    assert result.baseline == FUSED_FLOAT32.name
    assert [timing.wrong for timing in result.timings] == [None, None]


@pytest.mark.parametrize("build", [no_decay, other_rate, nothing, NanInTheLastElement], ids=lambda build: build.__name__)
@pytest.mark.parametrize("place", [0, 1], ids=["before ours", "after ours"])
def test_wrong_subject_is_reported_and_not_timed(build, place):
    log = []
    wrong = Subject("the wrong one", lambda optimizer, parameters: Recorder("wrong", log, parameters, build(optimizer, parameters)))
    subjects = [FUSED, OURS]
    subjects.insert(place, wrong)
    if build is NanInTheLastElement or build is nothing:
        subjects[place] = wrong = Subject("the wrong one", build)
    timing = next(t for t in tiny(ADAMW, *subjects).timings if t.subject == "the wrong one")
    assert "ulps from torch's for-loop" in timing.wrong
    errors = {name: pytest.approx(getattr(timing, name), nan_ok=True) for name in ("error_ulps", "error")}
    assert timing == Timing("the wrong one", wrong=timing.wrong, **errors)
    assert len(log) in (0, CHECKED_STEPS), "steps beyond the check were taken"


def test_one_element_of_many_periods_is_missed_by_none():
    case = Case("long", "long", ((3 * PERIOD + 5,),))
    assert measure.checked(Subject("right", FUSED.build), ADAMW, case)[1].ulps <= 8
    assert measure.checked(Subject("skips", SkipsAnElement), ADAMW, case)[1].ulps > 8


def test_where_the_baseline_is_wrong_there_is_no_ratio():
    result = tiny(ADAMW, dataclasses.replace(FUSED, build=no_decay), OURS)
    ours = result.timings[1]
    assert result.baseline is ours.ratio is ours.moved_ratio is None
    assert ours.milliseconds.median > 0


def test_a_failing_subject_is_reported_without_paths():
    def fails(optimizer, parameters):
        raise RuntimeError("no compiler at /some/where/cc\nand more")

    result = tiny(ADAMW, Subject("broken", fails), OURS)
    assert result.timings[0].wrong == "fails: RuntimeError: no compiler at ..."
    assert result.timings[1].milliseconds.median > 0


def test_other_packages_are_measured_where_they_are_installed():
    assert Subject("x", nothing, package="a_package_that_nobody_has").obstacle == "not installed"
    _, errors = measure.checked(Subject("no decay", no_decay), ADAMW, Case.equal(1, PERIOD))
    assert SUBJECTS["optimi"].allowed_ulps < errors.ulps
    assert {"DeepSpeed CPUAdam", "bitsandbytes", "optimi", "optimi foreach"} <= set(SUBJECTS)


def test_other_packages_are_left_out_where_memory_does_not_hold_them(monkeypatch):
    other = Subject("another package", FUSED.build, package="torch")
    measured = []
    monkeypatch.setattr(run, "measure", lambda optimizer, case, subjects, seconds: measured.append([s.name for s in subjects]))
    for elements_that_fit in (15, 14):
        monkeypatch.setattr(run, "available_bytes", lambda fit=elements_that_fit: fit * (3 * 16 + 20) / 0.75)
        ((_, _, work),) = run._contest(ADAMW, TINY, (FUSED, OURS, other), 0.0, run.Choice())
        work()
    assert measured == [["torch fused", "fusedopt", "another package"], ["torch fused", "fusedopt"]]


def test_times_of_others_are_compared_with_ours():
    result = tiny(ADAMW, FUSED, OURS)
    theirs, ours = result.timings
    assert result.ours == "fusedopt"
    assert ours.ratio_to_ours == Spread(1.0, 1.0, 1.0)
    assert theirs.ratio_to_ours == ours.ratio


# --- short formats ----------------------------------------------------------------------------------------------------------

#: Above the size from which states are short, and no multiple of a block.
LONG = Case.equal(2, 5_000)
OF_PACKAGES = [subject for subject in formats.SUBJECTS if subject.package is not None]


def formats_on(case, *subjects):
    return measure.measure(formats.ADAMW, case, subjects, 0.0, 0.0, [FUSED_FLOAT32.name], formats.EIGHT_BIT_STATES.name)


def test_short_formats_are_right_and_timed():
    subjects = [FUSED_FLOAT32, *formats.OURS]
    result = formats_on(LONG, *subjects)
    assert {timing.subject: timing.wrong for timing in result.timings} == {subject.name: None for subject in subjects}
    assert (result.baseline, result.ours) == (FUSED_FLOAT32.name, formats.EIGHT_BIT_STATES.name)
    kept = [timing.kept_bytes for timing in result.timings]
    words = 2 * 20 * 3 * 4 / LONG.elements  # of 20 blocks of each tensor
    assert kept == pytest.approx([8, 8, 4, 2 + words, 6, 4 + words, 2 + words])
    for subject, timing in zip(subjects, result.timings, strict=True):
        assert timing.moved_bytes == 2 * timing.kept_bytes + 3 * subject.dtype.itemsize
        rate = timing.moved_bytes * LONG.elements / timing.milliseconds.median / 1e6
        assert timing.gigabytes_per_second == pytest.approx(rate, rel=1e-6)


@pytest.mark.parametrize("subject", formats.OURS, ids=lambda subject: subject.name)
def test_kept_bytes_are_those_of_the_library(subject):
    entrant = Entrant(subject, formats.ADAMW, LONG)
    entrant.step_with_gradients(1)
    found = fusedopt.memory(entrant._built)
    assert entrant.kept_bytes() * LONG.elements == found.states - found.bytes["numbers"]


def test_bytes_of_a_tensor_made_of_others_are_theirs():
    assert measure._nbytes(TwoTensor(torch.zeros(8), torch.zeros(8))) == 64


def rate_too_large(optimizer, parameters):
    return torch.optim.AdamW(parameters, **{**optimizer.arguments, "lr": 1.1 * optimizer.arguments["lr"]})


def decay_left_out(optimizer, parameters):
    return torch.optim.AdamW(parameters, **{**optimizer.arguments, "weight_decay": 0.0})


@pytest.mark.parametrize("build", [decay_left_out, rate_too_large, nothing, NanInTheLastElement], ids=lambda build: build.__name__)
def test_wrong_short_format_is_reported_and_not_timed(build):
    result = formats_on(LONG, FUSED_FLOAT32, Subject("the wrong one", build, allowed_error=formats.ALLOWED_ERROR))
    timing = result.timings[1]
    assert "of the way from torch's for-loop" in timing.wrong
    assert "3% are allowed" in timing.wrong
    assert timing.milliseconds is None


def test_error_is_the_distance_over_the_way():
    """Parameters that stay where they began are off by all of it."""
    assert measure.checked(Subject("nothing", nothing), formats.ADAMW, LONG)[1].relative == pytest.approx(1)
    assert measure.checked(FUSED_FLOAT32, formats.ADAMW, LONG)[1].relative < 1e-6


@pytest.mark.parametrize("subject", OF_PACKAGES, ids=lambda subject: subject.name)
def test_short_formats_of_others_are_right_where_they_are_installed(subject):
    if subject.obstacle is not None:
        pytest.skip(f"{subject.name}: {subject.obstacle}")
    case = Case.equal(1, 8_192)  # torchao's blocks are whole, or it keeps float32
    with warnings.catch_warnings(action="ignore"):  # theirs
        timing = formats_on(case, FUSED_FLOAT32, subject).timings[1]
    assert timing.wrong is None
    assert timing.milliseconds.median > 0
    assert timing.kept_bytes < 2.5


def test_short_formats_are_left_out_where_memory_does_not_hold_them(monkeypatch):
    monkeypatch.setattr(formats, "available_bytes", lambda: 2**30)
    result = formats.measure_formats(Case.equal(1, 64_000_000), "cpu", 0.0)
    assert result.timings == []
    assert result.left_out.endswith("GiB of memory are needed, and 1.0 are free")


def test_subject_that_refuses_the_cpu_says_so():
    assert Subject("x", nothing, only_on_gpu=True).obstacle == "needs a GPU"


def test_arithmetic_is_what_more_elements_add(monkeypatch):
    """A fixed cost drops out."""
    monkeypatch.setattr(formats, "interleaved", lambda turns, *_: {name: [7 + seconds(name)] * 3 for name in turns})

    def seconds(name):
        return int(name.rpartition(", ")[2]) * (2e-9 if "8-bit" in name else 1e-9)

    found = {each.subject: each for each in formats.arithmetic(0.0)}
    assert found[FUSED_FLOAT32.name].nanoseconds.median == pytest.approx(1)
    assert found[formats.EIGHT_BIT_STATES.name].nanoseconds.median == pytest.approx(2)
    assert found[FUSED_FLOAT32.name].moved_bytes == 28


@pytest.mark.parametrize("share", [1.0, 0.5], ids=["exact", "half of the first moment is lost"])
def test_errors_of_updates_are_those_of_what_is_kept(share, monkeypatch):
    """Kept by half, a first moment of 0.9 m + 0.1 g has 0.45 m + 0.1 g in the next step."""
    monkeypatch.setattr(published_formats, "STREAMS", {"gauss": (1e-3, 1e-8)})
    monkeypatch.setattr(published_formats, "stream", lambda name: iter([published_formats.numpy.ones(256, "float32")] * 300))
    monkeypatch.setattr(published_formats, "COUNT", 256)
    updates = published_formats.simulated(lambda m, v: (published_formats.numpy.float32(share) * m, v))
    found = published_formats._errors_of("some", updates)
    # In the end 0.1 / (1 - 0.45) of the gradient in the place of all of it; the correction of its start ends later.
    expected = 0.0 if share == 1 else 1 - 0.1 / 0.55
    assert found.errors["gauss"] == pytest.approx(expected, abs=1e-4)
    assert found.largest["gauss"] == pytest.approx((1 - expected) / (1 - (0.9**51 if share < 1 else 0)), abs=1e-4)


# --- turns and rounds -------------------------------------------------------------------------------------------------------


def test_rounds_alternate_and_slow_subjects_leave_early():
    log = []
    turns = {name: lambda seconds, name=name: log.append(name) or 1.0 for name in "abc"}
    times = measure.interleaved(turns, {"a", "b"}, 1e9, 0.0)
    assert {name: len(own) for name, own in times.items()} == {"a": 31, "b": 31, "c": 5}
    assert "".join(log).startswith("abc" + "abccbaabccbaabc" + "baabbaab")


def test_measuring_ends_when_its_time_is_over():
    times = measure.interleaved({"a": lambda seconds: 1.0}, {"a"}, 0.0, 0.0)
    assert len(times["a"]) == 5


@pytest.mark.parametrize("moved", [False, True], ids=["same addresses", "moved"])
def test_gradients_move_at_every_step_where_asked(moved):
    log = []
    entrant = Entrant(Subject("a", lambda optimizer, parameters: Recorder("a", log, parameters)), ADAMW, TINY)
    entrant.step_with_gradients(1)
    for _ in range(4):
        (entrant.take_moved if moved else entrant.take)(0.0)
    for (_, before), (_, after) in itertools.pairwise(log):
        assert [old != new for old, new in zip(before, after, strict=True)] == [moved] * TINY.tensors


def test_spread_of_rounds():
    assert Spread.of([4.0, 1.0, 2.0, 5.0, 3.0]) == Spread(median=3.0, lower_quartile=2.0, upper_quartile=4.0)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("itemsizes", [[4, 4, 4, 4], [4, 4], [2, 2, 4, 4], [8, 8, 8]], ids=str)
def test_memory_limit_passes_over_every_number_of_every_stream(itemsizes, threads):
    limit = roofline.CpuLimit(10_001, itemsizes, threads)
    limit._walk_all(2)  # and once when it was made
    assert sum(p.size for p, _, _ in limit._shares) == 10_001
    for p, g, states in limit._shares:
        assert states.shape == (len(itemsizes) - 2, p.size)
        assert (p == 0).all() and (g == 1).all() and (states == ~1).all()
    assert roofline.bytes_moved(itemsizes) == 2 * sum(itemsizes) - itemsizes[1]


@pytest.mark.parametrize("way", ["_copy_by_driver", "_copy_by_kernel"])
@pytest.mark.parametrize("itemsizes", [[4, 4, 4, 4], [2, 2, 4, 4]], ids=str)
def test_memory_limit_of_a_gpu_moves_the_bytes_of_a_step(itemsizes, way, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    limit = roofline.CudaLimit(10_001, itemsizes, 1, device="cpu")
    least = 10_001 * roofline.bytes_moved(itemsizes)
    assert least <= limit._source.nbytes + limit._target.nbytes < least + 8
    limit._source.fill_(5)
    getattr(limit, way)()
    assert (limit._target == (5 if way == "_copy_by_driver" else ~5)).all()
    assert limit.take(0.0) > 0


def test_on_a_gpu_its_implementations_take_part(monkeypatch):
    """What a package lacks is said in the report, and not left out of it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(run, "available_bytes", lambda: 2**40)
    found = run.tasks(run.QUICK, run.Choice(parts=("steps",)))
    assert sum(name.endswith(", GPU") for name, _, _ in found) == sum(not name.endswith(", GPU") for name, _, _ in found) > 0
    names = [name for name, kind, _ in run.tasks(run.QUICK, run.Choice(parts=("formats",))) if kind == "formats"]
    assert names == ["short formats, 1 x 10,000,000, cpu", "short formats, 1 x 10,000,000, cuda"]
    on_gpu = {"torch foreach", "torch fused", "fusedopt", "bitsandbytes", "optimi", "apex FusedAdam", "apex FusedSGD"}
    assert {f"{name}, CUDA" for name in (*on_gpu, "DeepSpeed FusedAdam")} <= set(SUBJECTS)
    assert not {"apex FusedAdam", "torch loop, CUDA", "DeepSpeed CPUAdam, CUDA"} & set(SUBJECTS)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["AdamW", "SGD momentum"])
def test_steps_on_a_gpu_are_right_and_timed(name):
    subjects = [subject for subject in ON_GPU if subject.package is None and subject.serves(OPTIMIZERS[name])]
    result = measure.measure(OPTIMIZERS[name], TINY, subjects, 0.0, 0.0)
    assert {timing.subject: timing.wrong for timing in result.timings} == {subject.name: None for subject in subjects}
    assert all(timing.milliseconds.median > 0 for timing in result.timings)
    assert costs.launches(OPTIMIZERS[name], TINY).profiled["fusedopt, CUDA"] == 1


# --- costs and surroundings -------------------------------------------------------------------------------------------------


def test_parts_of_a_step_add_up_to_it():
    found = costs.breakdown(ADAMW, Case.equal(10, 1), True, 0.05)
    assert sum(part.microseconds for part in found.parts) == pytest.approx(found.profiled_microseconds)
    names = {part.function: part.purpose for part in found.parts}
    assert names["fusedopt.kernels.plan.Plan.launches"].startswith("Return all that a step needs")
    assert not any("move_gradients" in name for name in names), "what is outside of the step was profiled"
    assert not any("/" in name for name in names)


@pytest.mark.parametrize(("name", "per_tensor"), [("AdamW", 8), ("SGD momentum", 2)])
def test_launches_are_counted(name, per_tensor):
    found = costs.launches(OPTIMIZERS[name], Case.equal(7, 100))
    assert (found.tensors, found.buckets, found.fused_operations) == (7, 1, 1)
    assert found.loop_operations >= 7 * per_tensor
    assert found.foreach_operations < 7 * per_tensor


needs_compiler = pytest.mark.skipif(compiled.obstacle() is not None, reason=str(compiled.obstacle()))


def steps_that_compile():
    """For a process that compiles: traffic and launches of the main optimizers, and what an unlaunched step leaves."""
    from fusedopt.kernels import backends
    from fusedopt.kernels.ptx import driver, execute, steps

    traffic, launched = [], []
    for name in MAIN_OPTIMIZERS:
        traffic.append(prediction.count_traffic(name))
        entrant = Entrant(OURS, OPTIMIZERS[name], MIXED)
        with steps.executing("sm_90", execute.Settings(races=False)) as session:
            entrant.step_with_gradients(1)
            session.launches.clear()
            entrant.step_with_gradients(2)
        launched.append([counts for _, counts in session.launches])
    entrant = Entrant(OURS, ADAMW, TINY)
    with driver.driver("sm_90", execute=False) as session, backends.use("triton"):
        entrant.step_with_gradients(1)
    parameters = [parameter.detach().numpy() for parameter in entrant.parameters]
    return traffic, launched, (parameters, session.compilations, session.launches)


#: Full blocks, ragged ones, and tensors shorter than one.
MIXED = Case("mixed", "mixed", ((3000,), (1,), (2, 1024), (700,), (5, 5, 5)))


@needs_compiler
def test_predicted_bytes_are_those_of_an_executed_step_and_an_unlaunched_step_does_nothing():
    every_traffic, every_launch, (parameters, compilations, launches) = compiled.in_child(steps_that_compile)
    for traffic, launched, per_element in zip(every_traffic, every_launch, (28, 20), strict=True):
        assert len(launched) == traffic.launches == 1
        assert traffic.bytes(MIXED) == sum(counts.bytes_loaded + counts.bytes_stored for counts in launched)
        assert traffic.bytes_per_element == per_element
    for parameter, start in zip(parameters, TINY.filled(values(0)), strict=True):
        assert torch.equal(torch.from_numpy(parameter), start)
    assert (compilations, launches) == (1, [])


H100 = next(gpu for gpu in prediction.GPUS if gpu.name == "H100")
TRAFFIC = prediction.Traffic("AdamW", 1024, 1, 28, 88, {"sm_80": 127.0, "sm_90": 127.0, "gfx942": 113.0})


@pytest.mark.parametrize(
    ("traffic", "case", "microseconds"),
    [
        # (28 x 10,240,000 + 88 x 10,000) bytes at 87 % of 3.35 TB/s, and 0.9 for a launch.
        pytest.param(TRAFFIC, Case.equal(1, 10_240_000), 99.58, id="memory"),
        # 1,000 programs of 1,024 elements, ragged or not, of 4,000 instructions each, 16,896 a cycle at 1.98 GHz.
        pytest.param(
            dataclasses.replace(TRAFFIC, instructions_per_element={"sm_90": 4000.0}), Case.equal(1000, 1), 123.3, id="instructions"
        ),
        pytest.param(dataclasses.replace(TRAFFIC, launches=100), Case.equal(1, 1), 90.0, id="launches"),
    ],
)
def test_predictions_follow_what_takes_longest(traffic, case, microseconds):
    found = prediction.predict(traffic, case, H100)
    assert 1e3 * found.milliseconds == pytest.approx(microseconds, rel=1e-3)
    longest = max(found.memory_milliseconds, found.instruction_milliseconds)
    assert found.milliseconds == pytest.approx(longest + found.launch_milliseconds)


def test_thread_counts_are_put_back():
    with costs.threads_set(3):
        found = surroundings.scaling(ADAMW, [TINY], 0.0)
        assert torch.get_num_threads() == 3
        with pytest.raises(ZeroDivisionError), costs.threads_set(2):
            _ = 1 / 0
        assert torch.get_num_threads() == 3
    assert [each.threads for each in found] == [1, 2, 3]


def test_the_busy_process_ends(monkeypatch):
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *arguments: started.append(popen(*arguments)) or started[0])
    monkeypatch.setattr(surroundings, "_START_SECONDS", 0.0)

    def interrupted():
        with surroundings.busy_core():
            assert started[0].poll() is None
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert started[0].poll() is not None


def test_first_step_of_a_second_process_compiles_nothing():
    step = measure_first_step("SGD momentum")
    assert step.fresh_files > 0
    assert step.warm_files == 0
    assert min(step.fresh_seconds, step.warm_seconds, step.numba_seconds) > 0


# --- the command and its reports --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A run of all parts on tiny cases: its folder, with the report, and its record."""
    folder = tmp_path_factory.mktemp("results")
    cases = {"3x5": TINY, "2x4": Case.equal(2, 4), "resnet50": TINY, "gpt2-small": TINY}
    extent = run.Extent(0.0, ("3x5", "2x4"), ("3x5",), ("3x5",), (5_000,), ("3x5", "2x4"), ("3x5", "2x4"), ("AdamW",))
    absent = Subject("of another package", nothing, package="a_package_that_nobody_has")
    with pytest.MonkeyPatch.context() as patch, costs.threads_set(1):
        patch.setattr(run, "CASES", cases)
        patch.setattr(run, "SYNTHETIC", [TINY] * 5)
        patch.setattr(run, "ON_CPU", tuple(subject for subject in ON_CPU if subject.package is None))
        patch.setattr(formats, "SUBJECTS", (FUSED_FLOAT32, *formats.OURS, absent))
        patch.setattr(published_formats, "STREAMS", {"gauss": (1e-3, 1e-8), "lognormal 2": (1e-4, 1e-8)})
        patch.setattr(published_formats, "RUN", (formats.EIGHT_BIT_STATES,))
        patch.setattr(run, "FULL", extent)
        patch.setattr(command, "FULL", extent)
        patch.setattr(costs, "HOST_TENSORS", (1, 2))
        patch.setattr(costs.host_costs, "__defaults__", ((1, 2), (FUSED, OURS)))
        patch.setattr(costs.gpu_host_costs, "__defaults__", ((1, 2),))
        patch.setattr(costs, "PAUSE_SECONDS", 0.0)
        patch.setattr(costs, "THREADED_CASE", TINY)
        patch.setattr(surroundings, "_START_SECONDS", 0.0)
        patch.setattr(measure.interleaved, "__defaults__", (0.0,))
        patch.setattr(measure.measure, "__defaults__", (0.0, None, None))
        patch.setattr(run, "measure_first_step", lambda name: FirstStep(name, 2.5, 0.125, 0.1, 4, 0))
        assert command.main(["--output", str(folder)]) == 0
    (record,) = folder.glob("*.json")
    return folder, record


def recorded():
    """What a whole run records here."""
    return {*run.RECORDED} - ({"gpu_host_costs", "predictions"} if compiled.obstacle() else set())


def texts(folder):
    return {path.suffix: path.read_text(encoding="utf-8") for path in folder.iterdir()}


def test_a_run_writes_one_record_and_its_reports(whole_run):
    folder, record = whole_run
    assert sorted(path.suffix for path in folder.iterdir()) == [".html", ".json", ".md"]
    assert {path.stem for path in folder.iterdir()} == {record.stem}
    held = run.read(record)
    assert held.whole
    assert held.command == "python -m bench"
    assert [(r.optimizer, r.case) for r in held.results if r.device == "cpu"] == [
        *itertools.product(["AdamW", "SGD momentum"], ["3x5", "2x4"]),
        *((name, "3x5") for name in OPTIMIZERS if name not in ("AdamW", "SGD momentum")),
    ]
    for name in recorded():
        assert getattr(held, name), f"nothing was recorded of {name}"
    unlaunched = {cost.subject for cost in held.gpu_host_costs if min(cost.same.median, cost.moved.median) > 0}
    assert compiled.obstacle() or unlaunched >= {costs.UNLAUNCHED, costs.UNLAUNCHED_CAPTURABLE}


@pytest.mark.parametrize("suffix", [".md", ".html"])
def test_reports_hold_what_was_measured(whole_run, suffix):
    folder, path = whole_run
    record, text = run.read(path), texts(folder)[suffix]
    for section in (
        "In short",
        "AdamW, float32, on the CPU",
        "SGD momentum, float32, on the CPU",
        "Other optimizers",
        "bfloat16",
        "Short formats",
        "What a step costs apart from its kernel",
        "First step",
        "Threads, and a busy core beside",
        "CPU against GPU",
        "Who took part",
        "How it was measured",
    ):
        assert section in text
    for timing in record.formats[0].timings:
        assert timing.subject in text
        assert cells.spread(timing.ratio) in text
        assert cells.number(timing.milliseconds.median) in text
    for result in [*record.results, *record.bfloat16]:
        ours = next(timing for timing in result.timings if timing.subject.startswith("fusedopt"))
        if result.device == "cpu":
            assert cells.number(ours.milliseconds.median) in text
            assert cells.spread(ours.ratio) in text
    for expected in (torch.__version__, record.machine.cpu, "python -m bench", "not installed", "make bench-compare"):
        assert expected in text


def test_ratios_stand_beside_what_memory_allows(whole_run):
    record = run.read(whole_run[1])
    result = next(r for r in record.results if r.optimizer == "NAdam")
    ours = next(t for t in result.timings if t.subject == "fusedopt")
    ours.ratio.median, ours.share_of_limit.median = 3.0, 0.5
    text = report.as_markdown("", report.document(record))
    (row,) = (line for line in text.splitlines() if line.startswith("| NAdam | 3 x 5 |"))
    assert row.endswith("| 50 % | 6 |")
    assert "*Ratio at the limit*" in text


def test_other_packages_stand_beside_ours(whole_run):
    record = run.read(whole_run[1])
    other = next(t for t in record.results[0].timings if t.subject == "torch foreach")
    other.subject, other.ratio_to_ours.median = "DeepSpeed CPUAdam", 6.25
    text = report.as_markdown("", report.document(record))
    part = text[text.index("## Other packages") : text.index("## Other optimizers")]
    assert "DeepSpeed CPUAdam / ours" in part
    ours = cells.timing_of(record.results[0], "fusedopt").milliseconds
    assert f"| AdamW | 3 x 5 | {cells.number(ours.median)} | {cells.number(other.milliseconds.median)} | 6.25 (" in part
    assert "C++ that it compiles at its first use" in part
    assert "there was no memory beside them on 2 x 4." in text


def test_short_formats_in_the_report(whole_run):
    record = run.read(whole_run[1])
    for each, nanoseconds in zip(record.format_arithmetic, (0.5, 0.5, 1.0, 2.0, 1.0, 2.0, 2.0), strict=True):
        each.nanoseconds.median = nanoseconds
    vars(record.format_errors[0].errors)["gauss"] = math.nan
    record.formats.append(run.read(whole_run[1]).formats[0])
    record.formats[1].left_out, record.formats[1].title, record.formats[1].baseline = "9 GiB are needed", "huge", None
    text = report.as_markdown("", report.document(record))
    part = text[text.index("## Short formats") : text.index("## The whole end")]
    rows = {line.split(" | ")[0].strip("| "): line for line in part.splitlines() if line.startswith("| fusedopt, 8-bit")}
    assert "| 28 |  | 1.00 |" in part
    assert "| 20 | 28 | 1.40 |" in part
    assert "16.1" in part and list(rows) == ["fusedopt, 8-bit states"]
    assert "**huge: not measured.** 9 GiB are needed." in part
    assert "| bitsandbytes, simulated | NaN |" in part
    assert "docs/short_formats.rst" in part
    assert "| of another package | not installed |" in text


def test_without_a_gpu_the_report_says_so_and_shows_no_time(whole_run):
    record = run.read(whole_run[1])
    record.machine.gpu = None
    record.results = [result for result in record.results if result.device == "cpu"]
    text = report.as_markdown("", report.document(record))
    gpu = text[
        text.index("## CPU against GPU") : text.index("## Predicted times" if compiled.obstacle() is None else "## Who took")
    ]
    assert "no time on one was measured" in gpu
    assert " ms |" not in gpu
    assert "| AdamW | 3 x 5 | 3 | 28 | 1 | 1 | 8 | 24 |" in gpu


def test_with_a_gpu_both_stand_in_one_table(whole_run):
    _, path = whole_run
    record = run.read(path)
    on_gpu = run.read(path).results[0]
    on_gpu.device, on_gpu.baseline = "cuda", "torch fused, CUDA"
    for timing in on_gpu.timings:
        timing.subject += ", CUDA"
        timing.milliseconds.median = 0.0625
    ours = next(timing for timing in on_gpu.timings if timing.subject == "fusedopt, CUDA")
    record.machine.gpu = "Some GPU"
    for each in record.launches:
        vars(each.profiled)["fusedopt, CUDA"] = 17
    record.results = [*(r for r in record.results if r.device == "cpu"), on_gpu]
    text = report.as_markdown("", report.document(record))
    gpu = text[text.index("## CPU against GPU") : text.index("## Who took part")]
    assert "profiled: fusedopt, CUDA |" in gpu
    assert "| AdamW | 3 x 5 | 3 | 28 | 1 | 1 | 8 | 24 | 17 |" in gpu
    assert "GPU torch, ms | GPU fusedopt, ms" in gpu
    assert "| 0.0625 | 0.0625 |" in gpu
    assert f"| 0.0625 ({ours.gigabytes_per_second:.0f}) |" in gpu
    assert f"| {on_gpu.limit_gigabytes_per_second.median:.0f} |" in gpu
    assert "no time on one was measured" not in gpu


def predicted_table(record):
    text = report.as_markdown("", report.document(record))
    part = text[text.index("## Predicted times on GPUs") : text.index("## Who took part")]
    lines = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("|")]
    return part, lines[0], next(line for line in lines if line[:2] == ["AdamW", "3 x 5"])


@needs_compiler
def test_predictions_stand_beside_what_was_measured_and_say_what_they_are(whole_run):
    record = run.read(whole_run[1])
    record.machine.gpu = None
    text, heading, row = predicted_table(record)
    ours = next(t for t in record.results[0].timings if t.subject == "fusedopt")
    assert "**Predicted, and not measured:**" in text
    assert heading[3:] == ["CPU, measured, ms", *(f"{gpu.name}, predicted, ms" for gpu in prediction.GPUS)]
    assert row[3] == cells.number(ours.milliseconds.median)
    assert all(float(cell) > 0 for cell in row[4:])


@needs_compiler
def test_on_one_of_the_gpus_the_prediction_stands_beside_the_measurement(whole_run):
    _, path = whole_run
    record, on_gpu = run.read(path), run.read(path).results[0]
    on_gpu.device = "cuda"
    for timing in on_gpu.timings:
        timing.subject += ", CUDA"
        timing.milliseconds.median = 0.0625
    record.machine.gpu = "NVIDIA H100 80GB HBM3"
    record.results = [*(r for r in record.results if r.device == "cpu"), on_gpu]
    predicted = next(p for p in record.predictions if (p.optimizer, p.case, p.gpu) == ("AdamW", "3x5", "H100"))
    _, heading, row = predicted_table(record)
    assert heading[-2:] == ["H100, measured, ms", "measured / predicted"]
    assert row[-2:] == ["0.0625", cells.number(0.0625 / predicted.milliseconds)]


def test_records_from_before_there_were_predictions_are_read(whole_run, tmp_path):
    held = json.loads(whole_run[1].read_text(encoding="utf-8"))
    del held["predictions"], held["gpu_host_costs"], held["formats"]
    for timing in (timing for result in held["results"] for timing in result["timings"]):
        del timing["ratio_to_ours"], timing["error"]
    for subject in held["subjects"]:
        del subject["remark"]
    older = tmp_path / "older.json"
    older.write_text(json.dumps(held), encoding="utf-8")
    text = report.as_markdown("", report.document(run.read(older)))
    assert "Predicted" not in text
    assert "## Who took part" in text


def test_the_page_needs_nothing_else(whole_run):
    page = texts(whole_run[0])[".html"]
    assert page.count("<svg") == len(plots.FIGURES)
    assert "<script" not in page
    assert not [part for part in ("src=", "<link", "@import", "url(http") if part in page]
    assert "width=" not in page[page.index("<svg") : page.index(">", page.index("<svg"))]


def test_reports_name_no_machine(whole_run):
    folder, _ = whole_run
    home, host = str(Path.home()), platform.node()
    for suffix, text in texts(folder).items():
        for private in (str(folder), str(CHECKOUT), home, host, sys.prefix):
            assert len(private) < 2 or private not in text, f"{suffix} holds {private}"


def test_a_report_can_be_written_again(whole_run, tmp_path):
    folder, path = whole_run
    copy = tmp_path / path.name
    copy.write_bytes(path.read_bytes())
    assert command.main(["--report", str(copy)]) == 0
    assert texts(tmp_path) == texts(folder)


def test_a_wrong_subject_is_in_the_report_and_in_the_exit_status(tmp_path, monkeypatch, capsys):
    wrong = dataclasses.replace(OURS, build=no_decay)
    monkeypatch.setattr(run, "ON_CPU", (FUSED, wrong))
    monkeypatch.setattr(run, "CASES", {**CASES, "1000x100": TINY})
    arguments = ["--quick", "--case", "1000x100", "--optimizer", "AdamW", "--output", str(tmp_path)]
    assert command.main(arguments) == 1
    assert "WRONG, so not timed: fusedopt, AdamW, 3 x 5: off by" in capsys.readouterr().out.replace("\n", " ")
    for suffix, text in texts(tmp_path).items():
        assert "ulps from torch" in text, suffix
    (record,) = tmp_path.glob("*-part.json")
    held = run.read(record)
    assert not held.whole
    assert held.command == "python -m bench --quick --case 1000x100 --optimizer AdamW"
    assert held.results[0].timings[1].milliseconds is None


@pytest.mark.parametrize(
    ("choice", "kinds", "number"),
    [
        (run.Choice(cases=("1x1M",), optimizers=("AdamW",)), {"results"}, 1),
        (run.Choice(subjects=("fusedopt",)), {"results"}, 2 * len(run.QUICK.cases) + 8),
        (run.Choice(parts=("busy",)), {"busy"}, 2),
        (run.Choice(parts=("bfloat16", "first-step")), {"bfloat16", "first_steps"}, 3),
        (run.Choice(cases=("1x1M",)), recorded(), None),
        (run.Choice(), recorded(), None),
    ],
    ids=["one case and optimizer", "one subject", "one part", "two parts", "one case", "all"],
)
def test_choices(choice, kinds, number, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = run.tasks(run.QUICK, choice)
    assert {kind for _, kind, _ in found} == kinds
    assert number is None or len(found) == number


def test_names_are_listed(capsys):
    assert command.main(["--list"]) == 0
    listed = capsys.readouterr().out
    for name in (*CASES, *OPTIMIZERS, *SUBJECTS):
        assert name in listed


# --- the README -------------------------------------------------------------------------------------------------------------


def test_readme_and_its_picture_come_from_a_record(whole_run, tmp_path, monkeypatch):
    _, path = whole_run
    results = tmp_path / "bench" / "results"
    results.mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    (results / path.name).write_bytes(path.read_bytes())
    text = f"# Title\n\n{BEGIN}\nold\n{END}\n\n<!-- bench-picture:begin -->\n<!-- bench-picture:end -->\nrest\n"
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    monkeypatch.setattr(readme, "CHECKOUT", tmp_path)
    monkeypatch.setattr(readme, "CASES", ("3x5", "2x4"))
    for _ in range(2):
        assert readme.main([]) == 0
    written = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert written.count("| AdamW | 3 x 5 |") == written.count("| SGD momentum | 2 x 4 |") == 1
    assert "old" not in written and written.endswith("rest\n")
    assert f"(bench/results/{path.stem}.md)" in written
    assert "AdamW 2.5 s after installation, 0.1 s in a later process" in written
    assert (tmp_path / "docs" / "benchmark.png").read_bytes().startswith(b"\x89PNG")


def test_readme_says_how_fast_other_optimizers_are_and_could_be():
    def contest(optimizer, case, ratio, share):
        timing = SimpleNamespace(
            subject="fusedopt", ratio=SimpleNamespace(median=ratio), share_of_limit=SimpleNamespace(median=share)
        )
        return SimpleNamespace(device="cpu", optimizer=optimizer, case=case, timings=[timing])

    results = [contest("RMSprop", "1x10M", 3.0, 0.8), contest("RMSprop", "1000x1k", 25.0, 0.2)]
    results += [contest("Adamax", "1x10M", 2.5, 1.1), contest("Adamax", "1000x1k", 22.0, 0.2), contest("AdamW", "1x10M", 1.0, 0.9)]
    said = readme.other_optimizers(SimpleNamespace(results=results))
    assert said.endswith("and at 1,000 x 1,000: RMSprop 3 (3.75), 25; Adamax 2.5, 22.")
    assert readme.other_optimizers(SimpleNamespace(results=results[-1:])) == ""


def test_readme_says_what_steps_of_other_packages_take():
    def timing(subject, ratio=None):
        return SimpleNamespace(subject=subject, ratio_to_ours=None if ratio is None else SimpleNamespace(median=ratio))

    def contest(optimizer, title, **ratios):
        timings = [timing("fusedopt"), timing("torch fused"), *(timing(name, ratio) for name, ratio in ratios.items())]
        return SimpleNamespace(device="cpu", optimizer=optimizer, title=title, timings=timings)

    large, small = contest("AdamW", "1 x 5", apex=1.25, optimi=6.0), contest("AdamW", "9 x 9", apex=142.0, optimi=None)
    said = readme.packages(SimpleNamespace(results=[large, small, contest("SGD momentum", "1 x 5", apex=0.5)]))
    assert said.endswith(": apex 1.25 (1 x 5) to 142 (9 x 9); optimi 6 (1 x 5) to 6 (1 x 5).")
    assert readme.packages(SimpleNamespace(results=[contest("AdamW", "1 x 5")])) == ""


def test_readme_takes_the_newest_whole_run(tmp_path):
    for name, date, whole in (("a", "2026-01-02", True), ("b", "2026-01-01", True), ("c", "2026-01-03", False)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"whole": whole, "machine": {"date": date}}), encoding="utf-8")
    assert readme.newest(tmp_path).name == "a.json"
    assert readme.newest(tmp_path / "none") is None


@pytest.mark.parametrize("held", [{"whole": False}, None], ids=["part of a run", "no run"])
def test_readme_is_for_whole_runs(tmp_path, monkeypatch, capsys, held):
    monkeypatch.setattr(readme, "CHECKOUT", tmp_path)
    arguments = []
    if held is not None:
        (tmp_path / "some.json").write_text(json.dumps(held), encoding="utf-8")
        arguments = [str(tmp_path / "some.json")]
    with pytest.raises(SystemExit) as stopped:
        readme.main(arguments)
    assert stopped.value.code == 2
    assert "make one by python -m bench" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["nothing", BEGIN, END, f"{END}\n{BEGIN}", f"{BEGIN}\n{BEGIN}\n{END}"], ids=repr)
def test_readme_without_two_markers_is_refused(text):
    with pytest.raises(ValueError, match=r"README\.md: expected one line"):
        readme.replace_between(text, "bench", "new")


@pytest.mark.parametrize("name", [readme.TABLE, readme.PICTURE])
def test_readme_of_the_project_has_the_markers(name):
    text = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    assert "\n| new |\n" in readme.replace_between(text, name, "| new |")


# --- two revisions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "regression"),
    [
        pytest.param([1.0, 1.01, 0.99], [1.0, 1.02, 0.98], False, id="same"),
        pytest.param([1.0, 1.01, 0.99], [1.3, 1.31, 1.29], True, id="slower"),
        pytest.param([1.0, 1.01, 0.99], [0.7, 0.71, 0.69], False, id="faster"),
        pytest.param([1.0, 1.01, 0.99], [1.08, 1.09, 1.07], False, id="within the threshold"),
        pytest.param([1.0, 2.0, 0.5], [1.3, 2.6, 0.65], False, id="within the noise"),
        pytest.param([1.0, 1.0, 1.0, 1.0, 9.0], [1.3, 1.3, 1.3, 1.3, 1.3], True, id="slower, beside an outlier"),
    ],
)
def test_regressions_are_beyond_threshold_and_noise(old, new, regression):
    rounds = [({"case": a, "gone": a}, {"case": b}) for a, b in zip(old, new, strict=True)]
    (found,) = compare.compared(rounds)
    assert found.name == "case"
    assert found.is_regression(0.1) is regression
    text = "\n".join(compare.described([found], 0.1))
    assert ("SLOWER" in text) is regression


@pytest.mark.parametrize(("factor", "status"), [(1.0, 0), (1.5, 1)], ids=["same", "slower"])
def test_comparison_sets_the_exit_status(factor, status, monkeypatch, tmp_path, capsys):
    turns = []

    def times_of(checkout, names, caches):
        turns.append(checkout == CHECKOUT)
        return {"case": factor if checkout == CHECKOUT else 1.0}

    monkeypatch.setattr(compare, "_times_of", times_of)
    monkeypatch.setattr(compare, "worktree", lambda base: contextlib.nullcontext(tmp_path))
    monkeypatch.setattr(compare, "_git", lambda *arguments: subprocess.CompletedProcess(arguments, 0))
    assert compare.main(["HEAD", "--rounds", "4"]) == status
    assert turns == [False, True, True, False, False, True, True, False]
    assert ("SLOWER" in capsys.readouterr().out) is bool(status)


def test_another_revision_is_measured_in_a_checkout_of_its_own():
    if not (CHECKOUT / ".git").exists():
        pytest.skip("not a git checkout: there is no other revision")
    with compare.worktree("HEAD") as base:
        assert (base / "fusedopt" / "__init__.py").is_file()
        times = compare._times_of(base, [["SGD momentum"], ["1000x100"]], base.parent)
    assert not base.exists()
    assert str(base) not in compare._git("worktree", "list").stdout
    assert list(times) == ["SGD momentum, 1,000 x 100", "SGD momentum, 1,000 x 100, moved gradients"]
    assert min(times.values()) > 0


@pytest.mark.parametrize("base", ["", "no-such-revision"], ids=repr)
def test_an_unknown_revision_is_refused(base, capsys):
    with pytest.raises(SystemExit) as stopped:
        compare.main([base])
    assert stopped.value.code == 2
    assert "names no revision" in capsys.readouterr().err


def test_single_steps_run_under_pytest_benchmark():
    selected = "bench/test_step.py::test_step[AdamW-fusedopt-1000x100]"
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-disable", selected],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "1 passed" in finished.stdout


def test_no_thread_stays_behind():
    before = threading.active_count()
    tiny(ADAMW, FUSED, OURS)
    assert threading.active_count() <= before
