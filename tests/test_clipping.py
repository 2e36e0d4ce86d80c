"""Clipping in the step, and the function: against torch's, backend against backend, whatever the threads."""

from __future__ import annotations

import copy
import math

import numpy
import pytest
import torch
from torch.nn.utils import clip_grad_norm_

import fusedopt
from cases import Case, copies, device_of, draw_gradients, each_class, make_parameters, named
from fusedopt.kernels import backends, norms
from fusedopt.kernels.tables import CHUNK
from layouts import ODD_GRADIENTS

SHAPES = [1, 7, (3, 5), 1000, (), 0, CHUNK + 3]
MAX_NORMS = [0.5, 1.0, 1e3]  # the last clips nothing
# The sums of ours are rounded in float64, torch's in float32: over 20,000 numbers a few units of the last place.
NORM_ULPS = 64


def norm_tolerance(dtype: torch.dtype) -> float:
    return NORM_ULPS * torch.finfo(dtype).eps


def exact_norm(params) -> float:
    return math.sqrt(sum(float(p.grad.double().square().sum()) for p in params if p.grad is not None))


def stepped(case: Case, backend: str, dtype: torch.dtype = torch.float32, steps: int = 3, **options):
    """Parameters after some steps, and the optimizer."""
    torch.manual_seed(0)
    params = make_parameters(SHAPES, dtype, device_of(backend))
    optimizer = case.make_ours(params, **options)
    with backends.use(backend):
        for _ in range(steps):
            draw_gradients(params)
            optimizer.step()
    return params, optimizer


# --- the definition ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 511, 512, 513, 1024, 5000, CHUNK])
@pytest.mark.parametrize("backend", ["numba", "numpy"])
def test_a_norm_has_the_bits_of_its_definition(count, backend):
    torch.manual_seed(count)
    params = make_parameters([count, 3 * CHUNK + count])
    draw_gradients(params)
    sums = []
    for p in params:
        numbers = p.grad.numpy()
        sums += [norms.sum_of_squares(numbers[first : first + CHUNK]) for first in range(0, len(numbers), CHUNK)]
    expected = math.sqrt(norms.totals(numpy.array(sums), numpy.zeros(len(sums), int), 1)[0])
    optimizer = fusedopt.SGD(params, lr=0.1, max_grad_norm=1.0)
    with backends.use(backend):
        optimizer.step()
    assert float(optimizer.grad_norm) == expected
    assert expected == pytest.approx(exact_norm(params), rel=1e-14)


def test_the_tree_adds_all_lanes():
    lanes = torch.arange(1, 65, dtype=torch.float64).numpy()
    assert norms.tree(lanes) == 64 * 65 / 2


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1.0, 1e18, 1e30], ids="{:.0e}".format)
def test_squares_neither_overflow_nor_vanish(size):
    p = torch.nn.Parameter(torch.zeros(1000))
    p.grad = torch.full((1000,), size)
    optimizer = fusedopt.SGD([p], lr=1.0, max_grad_norm=1.0)
    optimizer.step()
    expected = float(p.grad[0].double()) * math.sqrt(1000)
    assert float(optimizer.grad_norm) == pytest.approx(expected, rel=1e-12)
    if size >= 1:
        torch.testing.assert_close(p.detach(), torch.full((1000,), -1 / math.sqrt(1000)), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_a_norm_is_the_same_for_any_number_of_threads(threads):
    torch.manual_seed(0)
    params = make_parameters([2**20 + 17, 300_000, 5])
    draw_gradients(params)
    found = set()
    before = torch.get_num_threads()
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            other = copies(params)
            for p, q in zip(params, other, strict=True):
                q.grad = p.grad
            optimizer = fusedopt.AdamW(other, max_grad_norm=1.0)
            optimizer.step()
            found.add(float(optimizer.grad_norm))
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


# --- the step ----------------------------------------------------------------------------------------------------------------


@each_class
@pytest.mark.parametrize("backend", ["numba", pytest.param("triton", marks=pytest.mark.triton)])
def test_backends_clip_to_the_same_bits(case, backend):
    (ours, first), (reference, second) = (stepped(case, each, max_grad_norm=1.0) for each in (backend, "numpy"))
    assert float(first.grad_norm) == float(second.grad_norm) > 1.0
    for p, q in zip(ours, reference, strict=True):
        torch.testing.assert_close(p.cpu(), q, rtol=0, atol=0)


@each_class
@pytest.mark.parametrize("max_norm", MAX_NORMS)
def test_a_step_is_that_of_scaled_gradients(case, max_norm):
    """Multiplied by our factor beforehand, gradients lead to the same bits: in the step they are, and are not rewritten."""
    torch.manual_seed(0)
    params = make_parameters(SHAPES)
    others = copies(params)
    clipped, plain = case.make_ours(params, max_grad_norm=max_norm), case.make_ours(others)
    for _ in range(3):
        draw_gradients(params, others)
        given = [p.grad.clone() for p in params]
        clipped.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(params, given, strict=True))
        factor = torch.tensor(min(1.0, max_norm / (float(clipped.grad_norm) + 1e-6)), dtype=torch.float64).float()
        for q in others:
            q.grad *= factor
        plain.step()
        assert float(clipped.grad_norm) == pytest.approx(exact_norm(params), rel=1e-14)
        for p, q in zip(params, others, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("max_norm", MAX_NORMS)
def test_a_step_of_descent_is_torchs_after_torchs_clipping(dtype, max_norm):
    torch.manual_seed(0)
    params = make_parameters(SHAPES, dtype)
    others = copies(params)
    ours, theirs = fusedopt.SGD(params, lr=0.1, max_grad_norm=max_norm), torch.optim.SGD(others, lr=0.1)
    draw_gradients(params, others)
    before = [p.detach().clone() for p in params]
    ours.step()
    norm = clip_grad_norm_(others, max_norm)
    theirs.step()
    assert float(ours.grad_norm) == pytest.approx(float(norm), rel=norm_tolerance(dtype))
    for p, q, start in zip(params, others, before, strict=True):
        # A rounding of the parameter, and what the factors differ in.
        size = start.abs().max() if start.numel() else 0.0
        torch.testing.assert_close(p, q, rtol=0, atol=float(size) * torch.finfo(dtype).eps + 0.5 * norm_tolerance(dtype))


def test_half_precision_gradients_are_not_rounded_again():
    """torch rounds clipped gradients to their dtype; in the step they stay float32."""
    torch.manual_seed(0)
    params = make_parameters([1000], torch.bfloat16)
    draw_gradients(params)
    other = torch.nn.Parameter(params[0].detach().float())
    optimizer = fusedopt.AdamW(params, lr=0.1, max_grad_norm=1.0)
    optimizer.step()
    factor = torch.tensor(1.0 / (float(optimizer.grad_norm) + 1e-6), dtype=torch.float64).float()
    other.grad = params[0].grad.float() * factor
    fusedopt.AdamW([other], lr=0.1).step()
    assert torch.equal(params[0], other.to(torch.bfloat16))


def test_a_group_of_its_own_norm_is_clipped_alone():
    torch.manual_seed(0)
    first, second = make_parameters([100, 100])
    optimizer = fusedopt.SGD([{"params": [first], "max_grad_norm": 0.5}, {"params": [second]}], lr=1.0)
    draw_gradients([first, second])
    before = first.detach().clone(), second.detach().clone()
    optimizer.step()
    torch.testing.assert_close(optimizer.grad_norm, torch.stack([first.grad, second.grad]).double().norm(dim=1))
    torch.testing.assert_close((before[0] - first).norm(), torch.tensor(0.5), rtol=1e-5, atol=0)
    torch.testing.assert_close(before[1] - second, second.grad, rtol=1e-5, atol=1e-6)


def test_all_groups_are_clipped_by_the_norm_over_all():
    torch.manual_seed(0)
    first, second = make_parameters([100, 50])
    optimizer = fusedopt.SGD([{"params": [first], "lr": 0.1}, {"params": [second]}], lr=1.0, max_grad_norm=2.0)
    draw_gradients([first, second])
    optimizer.step()
    assert float(optimizer.grad_norm) == pytest.approx(exact_norm([first, second]), rel=1e-14)


@pytest.mark.parametrize("inside", [False, True], ids=["in a step", "inside backward"])
@pytest.mark.parametrize("between", ["nothing", "a checkpoint", "a copy", "a new plan"])
def test_a_first_step_that_is_left_out_is_none(between, inside):
    """Dampening is for all steps but the first."""

    def make():
        model = torch.nn.Linear(3, 1, bias=False)
        torch.nn.init.zeros_(model.weight)
        optimizer = fusedopt.SGD(model.parameters(), lr=1.0, momentum=0.9, dampening=0.5, skip_nonfinite=True)
        return model, optimizer, fusedopt.step_in_backward(model, optimizer) if inside else None

    def train(model, optimizer, within, size):
        loss = size * model(torch.ones(1, 3)).sum()
        if within is not None:
            with within.measuring():
                loss.backward(retain_graph=True)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer, within = make()
    train(model, optimizer, within, torch.inf)
    assert int(optimizer.skipped_steps) == 1
    if between == "a checkpoint":
        saved = optimizer.state_dict()
        assert not saved["state"]
        model, optimizer, within = make()
        optimizer.load_state_dict(saved)
    elif between == "a copy":
        assert not copy.deepcopy(optimizer).state
    elif between == "a new plan":
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    train(model, optimizer, within, 1.0)
    assert model.weight.tolist() == [[-1.0, -1.0, -1.0]]


def test_a_group_may_be_added_and_a_number_changed():
    torch.manual_seed(0)
    first, second = make_parameters([10, 10])
    optimizer = fusedopt.SGD([first], lr=1.0, max_grad_norm=1.0)
    optimizer.add_param_group({"params": [second]})
    assert [group["max_grad_norm"] for group in optimizer.param_groups] == [1.0, 1.0]
    for max_norm in (1.0, 0.25):
        for group in optimizer.param_groups:
            group["max_grad_norm"] = max_norm
        draw_gradients([first, second])
        before = torch.cat([first, second]).detach().clone()
        optimizer.step()
        torch.testing.assert_close((before - torch.cat([first, second])).norm(), torch.tensor(max_norm), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: fusedopt.SGD([{"params": [p], "max_grad_norm": 1.0}], lr=0.1, max_grad_norm=2.0), "give one or the other"),
        (lambda p: fusedopt.Adam([p], max_grad_norm=0.0), "Invalid max_grad_norm: 0.0"),
        (lambda p: fusedopt.Adam([p], max_grad_norm=-1), "Invalid max_grad_norm: -1"),
        (lambda p: fusedopt.Adam([p], max_grad_norm="big"), "Invalid max_grad_norm: big"),
        (lambda p: fusedopt.Adam([{"params": [p], "max_grad_norm": -2.0}]), "Invalid max_grad_norm: -2.0"),
        (lambda p: fusedopt.Adam([p], ema_decay=1.0), "Invalid ema_decay: 1.0"),
    ],
    ids=["both", "zero", "negative", "no number", "of a group", "average that never moves"],
)
def test_what_cannot_be_is_refused_at_once(make, message):
    with pytest.raises(ValueError, match=message):
        make(torch.nn.Parameter(torch.ones(1)))


def test_an_unknown_option_is_refused_as_python_does():
    with pytest.raises(TypeError, match=r"AdamW.__init__\(\) got an unexpected keyword argument 'max_grad_nrom'"):
        fusedopt.AdamW([torch.nn.Parameter(torch.ones(1))], max_grad_nrom=1.0)


def test_groups_that_disagree_are_refused_before_anything_changes():
    params = make_parameters([3, 3])
    optimizer = fusedopt.SGD([{"params": [p]} for p in params], lr=0.1, max_grad_norm=1.0)
    optimizer.param_groups[1]["max_grad_norm"] = 2.0
    draw_gradients(params)
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match="ask for different norms"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


def test_parameters_that_share_memory_are_refused():
    base = torch.randn(10)
    params = [torch.nn.Parameter(base[:6]), torch.nn.Parameter(base[4:])]
    draw_gradients(params)
    before = base.clone()
    with pytest.raises(RuntimeError, match="share memory"):
        fusedopt.SGD(params, lr=0.1, max_grad_norm=1.0).step()
    assert torch.equal(base, before)


@pytest.mark.parametrize("layout", ODD_GRADIENTS)
def test_gradients_in_other_layouts_count(layout):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(6, 4))
    p.grad = ODD_GRADIENTS[layout]()
    norm, before = exact_norm([p]), p.detach().clone()
    optimizer = fusedopt.SGD([p], lr=1.0, max_grad_norm=0.5)
    optimizer.step()
    assert float(optimizer.grad_norm) == pytest.approx(norm, rel=1e-14)
    torch.testing.assert_close((before - p).norm(), torch.tensor(0.5), rtol=1e-5, atol=0)


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": False}], ids=str)
def test_an_option_that_torch_lacks_is_not_dropped(options):
    torch.manual_seed(0)
    params = make_parameters([10, 20])
    optimizer = fusedopt.SGD(params, lr=1.0, max_grad_norm=0.5, **options)
    draw_gradients(params)
    before = torch.cat([p.detach().clone() for p in params])
    optimizer.step()
    assert "max_grad_norm=0.5" in optimizer.explain()
    torch.testing.assert_close((before - torch.cat([p.detach() for p in params])).norm(), torch.tensor(0.5), rtol=1e-5, atol=0)


def test_the_norm_spans_kernels_of_several_dtypes():
    torch.manual_seed(0)
    params = [*make_parameters([10]), *make_parameters([20], torch.float64), *make_parameters([30], torch.bfloat16)]
    draw_gradients(params)
    optimizer = fusedopt.SGD(params, lr=1.0, max_grad_norm=1.0)
    optimizer.step()
    assert float(optimizer.grad_norm) == pytest.approx(exact_norm(params), rel=1e-14)


def test_parameters_without_gradients_count_nothing():
    torch.manual_seed(0)
    params = make_parameters([10, 20, 30])
    optimizer = fusedopt.AdamW(params, max_grad_norm=1.0)
    for missing in (0, 2, 1):
        draw_gradients(params)
        params[missing].grad = None
        optimizer.step()
        assert float(optimizer.grad_norm) == pytest.approx(exact_norm(params), rel=1e-14)


# --- steps that are left out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["numba", "numpy", "tensor"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_step_that_is_not_finite_changes_nothing(backend, value):
    params, optimizer = stepped(named("adamw"), backend, skip_nonfinite=True)
    draw_gradients(params)
    params[3].grad[500] = value
    before = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in params]
    with backends.use(backend):
        optimizer.step()
    assert int(optimizer.skipped_steps) == 1
    assert not optimizer.grad_norm.isfinite()
    torch.testing.assert_close([p.detach() for p in params], before[1], rtol=0, atol=0)
    torch.testing.assert_close(optimizer.state_dict(), before[0], rtol=0, atol=0)
    draw_gradients(params)
    with backends.use(backend):
        optimizer.step()
    assert int(optimizer.skipped_steps) == 1
    assert not torch.equal(params[0], before[1][0])


def test_without_being_asked_a_step_is_not_left_out():
    params, optimizer = stepped(named("sgd"), "numba", max_grad_norm=1.0)
    draw_gradients(params)
    params[3].grad[500] = math.nan
    optimizer.step()
    assert params[0].isnan().all()
    assert int(optimizer.skipped_steps) == 0


@pytest.mark.parametrize("unscaled_before", [False, True])
def test_under_a_scaler_the_norm_is_that_of_unscaled_gradients(unscaled_before):
    torch.manual_seed(0)
    params = make_parameters([100, 200])
    others = copies(params)
    draw_gradients(params, others)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    for p in params:
        p.grad *= 1024.0
    ours, plain = fusedopt.AdamW(params, max_grad_norm=1.0), fusedopt.AdamW(others, max_grad_norm=1.0)
    if unscaled_before:
        scaler.unscale_(ours)
    scaler.step(ours)
    plain.step()
    assert float(ours.grad_norm) == float(plain.grad_norm)
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0)  # written back unscaled, and not clipped


# --- checkpoints -------------------------------------------------------------------------------------------------------------


def test_the_options_travel_in_a_checkpoint():
    params, optimizer = stepped(named("adam"), "numba", max_grad_norm=1.0, skip_nonfinite=True)
    other = fusedopt.Adam(copies(params))
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["max_grad_norm"] == 1.0
    assert other.param_groups[0]["skip_nonfinite"]
    torch.optim.Adam(copies(params)).load_state_dict(optimizer.state_dict())


def test_at_their_defaults_they_do_not():
    optimizer = fusedopt.AdamW(make_parameters([3]))
    theirs = torch.optim.AdamW(make_parameters([3]))
    assert optimizer.state_dict()["param_groups"][0].keys() == theirs.state_dict()["param_groups"][0].keys()


# --- the function ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.5, math.inf])
@pytest.mark.parametrize("max_norm", MAX_NORMS)
def test_the_function_is_torchs(dtype, norm_type, max_norm):
    torch.manual_seed(0)
    params = make_parameters([shape for shape in SHAPES if shape != 0], dtype)  # of which torch has no largest number
    others = copies(params)
    draw_gradients(params, others)
    norm = fusedopt.clip_grad_norm_(params, max_norm, norm_type)
    right = clip_grad_norm_(others, max_norm, norm_type)
    assert (norm.shape, norm.device) == (right.shape, right.device)
    torch.testing.assert_close(norm.to(dtype), right.to(dtype), rtol=norm_tolerance(dtype), atol=0)
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=norm_tolerance(dtype), atol=torch.finfo(dtype).tiny)


def test_the_function_takes_one_parameter_and_generators_and_none():
    p = torch.nn.Parameter(torch.ones(4))
    p.grad = torch.full((4,), 3.0)
    assert float(fusedopt.clip_grad_norm_(p, 1.0)) == 6.0
    p.grad = torch.full((4,), 3.0)
    assert float(fusedopt.clip_grad_norm_((each for each in [p]), 1.0)) == 6.0
    torch.testing.assert_close(p.grad, torch.full((4,), 0.5))
    assert float(fusedopt.clip_grad_norm_([torch.nn.Parameter(torch.ones(1))], 1.0)) == 0.0


def test_the_function_leaves_small_gradients_unwritten():
    p = torch.nn.Parameter(torch.ones(4))
    p.grad = torch.full((4,), 0.1)
    version = p.grad._version
    fusedopt.clip_grad_norm_([p], 1.0)
    assert p.grad._version == version


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_function_raises_as_torchs(value):
    p = torch.nn.Parameter(torch.ones(4))
    p.grad = torch.full((4,), value)
    messages = []
    for function in (fusedopt.clip_grad_norm_, clip_grad_norm_):
        with pytest.raises(RuntimeError) as caught:
            function([p], 1.0, error_if_nonfinite=True)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    fusedopt.clip_grad_norm_([p], 1.0)
    assert p.grad.isnan().all() or (p.grad == 0).all()


def test_the_function_takes_mixed_and_odd_gradients():
    torch.manual_seed(0)
    params = [*make_parameters([(6, 4)]), *make_parameters([5], torch.float64)]
    params[0].grad = torch.randn(6, 8)[:, ::2]
    params[1].grad = torch.randn(5, dtype=torch.float64)
    norm = exact_norm(params)
    assert float(fusedopt.clip_grad_norm_(params, 1.0)) == pytest.approx(norm, rel=1e-6)
    assert exact_norm(params) == pytest.approx(1.0, rel=1e-5)


# --- asked for while it runs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"fused": False}, {"foreach": True}], ids=str)
def test_a_group_may_ask_for_it_later(options):
    """Also where torch's own implementation, which cannot clip, has stepped so far."""
    p = torch.nn.Parameter(torch.zeros(10))
    optimizer = fusedopt.SGD([p], lr=1.0, **options)
    p.grad = torch.full((10,), 100.0)
    optimizer.step()
    before = p.detach().clone()
    optimizer.param_groups[0]["max_grad_norm"] = 1.0
    optimizer.step()
    torch.testing.assert_close((before - p).norm(), torch.tensor(1.0), rtol=1e-5, atol=0)


def test_a_norm_in_a_tensor_is_read_at_every_step():
    p = torch.nn.Parameter(torch.zeros(4))
    optimizer = fusedopt.SGD([p], lr=1.0)
    most = optimizer.param_groups[0]["max_grad_norm"] = torch.tensor(1.0)
    for value in (1.0, 0.25):
        most.fill_(value)
        before, p.grad = p.detach().clone(), torch.full((4,), 100.0)
        optimizer.step()
        torch.testing.assert_close((before - p).norm(), torch.tensor(value), rtol=1e-5, atol=0)


def test_a_negative_norm_is_refused_whenever_it_comes():
    p = torch.nn.Parameter(torch.zeros(4))
    optimizer = fusedopt.SGD([p], lr=1.0)
    optimizer.param_groups[0]["max_grad_norm"], p.grad = -1.0, torch.ones(4)
    with pytest.raises(ValueError, match="Invalid max_grad_norm: -1"):
        optimizer.step()
    assert not p.any()


def test_steps_left_out_are_counted_in_and_out_of_inference_mode():
    p = torch.nn.Parameter(torch.randn(8))
    optimizer = fusedopt.AdamW([p], skip_nonfinite=True)
    p.grad = torch.full((8,), math.nan)
    with torch.inference_mode():
        optimizer.step()
    optimizer.step()
    assert int(optimizer.skipped_steps) == 2
