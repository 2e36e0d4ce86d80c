"""Steps whose work is noted once and done many times, as CUDA graphs do it, steps under a gradient scaler, and launches counted.

On a GPU they are captured; elsewhere their launches and writes are noted, and executed at each replay.
"""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install triton (Linux), or fusedopt's extra [triton]")

from torch.amp import GradScaler

from amp_paths import scaling
from cases import CASES, named
from fusedopt.kernels import backends
from fusedopt.kernels.ptx import execute
from machines import each_machine
from test_backends import assert_equal_bits, draw, unaligned
from test_gpu_executed import found_of

pytestmark = [
    pytest.mark.triton,
    pytest.mark.compiled,
    pytest.mark.skipif(execute.obstacle() is not None, reason=str(execute.obstacle())),
]

SIZES = [1, 17, 1025, (3, 5), 0, ()]
REPLAYS = 4
each_capturable = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[] if case.name in ("adamw", "nadam-decoupled") else [pytest.mark.proof], id=case.name)
        for case in CASES
        if "capturable" in case.argument_names and not isinstance(case.kwargs["lr"], torch.Tensor)
    ],
)


def made_of(case, start, device, **options):
    params = [torch.nn.Parameter(values.to(device, copy=True)) for values in start]
    for p in params:
        p.grad = torch.zeros_like(p)
    return case.make_ours(params, **options), params


def set_gradients(params, gradients):
    """In place: a captured step reads them where they were."""
    for p, gradient in zip(params, gradients, strict=True):
        p.grad.copy_(gradient)


@each_machine
@each_capturable
def test_a_replayed_step_reads_the_learning_rate_and_counts(case, machine):
    start, gradients = draw(SIZES, torch.float32), [draw(SIZES, torch.float32) for _ in range(1 + REPLAYS)]
    rates = [0.01 / (1 + number) for number in range(1 + REPLAYS)]
    expected, right = made_of(case, start, "cpu")
    for rate, values in zip(rates, gradients, strict=True):
        set_gradients(right, values)
        expected.param_groups[0]["lr"] = rate
        with backends.use("numba"):
            expected.step()
    lr = torch.tensor(rates[0], dtype=torch.float64, device=machine.device)
    optimizer, params = made_of(case, start, machine.device, lr=lr, capturable=True)
    optimizer.param_groups[0]["lr"] = lr  # not a copy of it
    set_gradients(params, gradients[0])
    with machine.running():
        optimizer.step()  # the warm-up that capturing asks for
    with machine.capturing(optimizer.step) as replay:
        for rate, values in zip(rates[1:], gradients[1:], strict=True):
            lr.fill_(rate)
            set_gradients(params, values)
            replay()
    assert_equal_bits([found_of(optimizer, p) for p in params], [found_of(expected, p) for p in right])


@each_machine
def test_a_replayed_step_reads_what_the_scaler_found(machine):
    case, found_infs, scales = named("adamw"), [0.0, 1.0, 0.0, 2.0], [4.0, 4.0, 3.0, 3.0]
    start, gradients = draw(SIZES, torch.float32), [draw(SIZES, torch.float32) for _ in found_infs]
    made = []
    for device, captured in (("cpu", False), (machine.device, True)):
        optimizer, params = made_of(case, start, device, capturable=True)
        optimizer.grad_scale, optimizer.found_inf = torch.ones((), device=device), torch.zeros((), device=device)
        with machine.running() if captured else backends.use("numba"):
            optimizer.step()
        with machine.capturing(optimizer.step) if captured else backends.use("numba") as replay:
            for found_inf, scale, values in zip(found_infs, scales, gradients, strict=True):
                optimizer.grad_scale.fill_(scale)
                optimizer.found_inf.fill_(found_inf)
                set_gradients(params, values)
                replay() if captured else optimizer.step()
        made.append([found_of(optimizer, p) for p in params])
        assert optimizer.state[params[0]]["step"].item() == 3
    assert_equal_bits(made[1], made[0])


@each_machine
@pytest.mark.parametrize("unscale_first", [False, True], ids=["step alone", "unscale_ first"])
@pytest.mark.parametrize("name", ["adamw", "sgd-nesterov-l2"])
def test_training_with_torchs_grad_scaler(name, unscale_first, machine):
    """The loss overflows in the middle; weights and states are those of the same training by Numba."""
    start, slopes = draw(SIZES, torch.float32), [draw(SIZES, torch.float32) for _ in range(5)]
    made = []
    for device, running in (("cpu", backends.use("numba")), (machine.device, machine.running())):
        params = [torch.nn.Parameter(values.to(device, copy=True)) for values in start]
        optimizer, scaler = named(name).make_ours(params), GradScaler(device, init_scale=1024.0, growth_interval=2)
        with running:
            for number, values in enumerate(slopes):
                optimizer.zero_grad()
                loss = sum((p * slope.to(device)).sum() for p, slope in zip(params, values, strict=True))
                scaler.scale(loss * (torch.inf if number in (2, 3) else 1.0)).backward()
                if unscale_first:
                    scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
        made.append([found_of(optimizer, p) for p in params])
        assert scaler.get_scale() == 512.0
    assert_equal_bits(made[1], made[0])


@each_machine
@pytest.mark.parametrize("name", ["adamw", "sgd-nesterov-l2", "sgd-dampening", "nadam-decoupled", "rprop-bounds-maximize"])
def test_a_first_step_that_is_left_out_changes_nothing_that_follows(name, machine):
    """The host does not wait to learn that it is, so there are states; they begin as new ones do, in a checkpoint, too."""
    case, start, slopes = named(name), draw(SIZES, torch.float32), [draw(SIZES, torch.float32) for _ in range(3)]
    found = {}
    for device, running in (("cpu", backends.use("numba")), (machine.device, machine.running())):
        optimizer, params = made_of(case, start, device)
        with running:
            with scaling(optimizer, 1.0, 4.0, device):
                optimizer.step()
            checkpoint = copy.deepcopy(optimizer.state_dict())
            for values in slopes:
                set_gradients(params, values)
                optimizer.step()
        found[optimizer] = [found_of(optimizer, p) for p in params]
        resumed, others = made_of(case, start, "cpu")
        resumed.load_state_dict(checkpoint)
        with backends.use("numba"):
            for values in slopes:
                set_gradients(others, values)
                resumed.step()
        found[resumed] = [found_of(resumed, p) for p in others]
    right, *rest = found.values()
    for each in rest:
        assert_equal_bits(each, right)


@each_machine
@pytest.mark.parametrize("between", ["nothing", "a new plan", "a copy"])
@pytest.mark.parametrize("name", ["adamw", "sgd-dampening"])
def test_what_follows_a_first_step_that_is_left_out_is_a_first_step(name, between, machine):
    """Also where parameters are planned for anew: the states that are there by then tell nothing."""
    case, start, slopes = named(name), draw([5, 1030], torch.float32), [draw([5, 1030], torch.float32) for _ in range(3)]
    found = []
    for device, running in (("cpu", backends.use("numba")), (machine.device, machine.running())):
        optimizer, params = made_of(case, start, device)
        with running:
            if between == "a new plan":
                params[1].grad = None
            with scaling(optimizer, 1.0, 4.0, device):
                optimizer.step()
            if between == "a new plan":
                params[1].grad = torch.zeros_like(params[1])
            if between == "a copy":
                optimizer = copy.deepcopy(optimizer)
                params = optimizer.param_groups[0]["params"]
                for p in params:
                    p.grad = torch.zeros_like(p)
            for values in slopes:
                set_gradients(params, values)
                optimizer.step()
        found.append([found_of(optimizer, p) for p in params])
    assert_equal_bits(found[1], found[0])


# --- launches of a step -------------------------------------------------------------------------------------------------------


@each_machine
@pytest.mark.parametrize(
    ("name", "options", "dtypes", "unaligned_ones", "launches"),
    [
        pytest.param("adamw", {}, [torch.float32] * 100, 0, 1, id="one for 100 tensors"),
        pytest.param("sgd", {}, [torch.float32] * 100, 0, 1, id="one without states"),
        pytest.param("adamw", {"capturable": True}, [torch.float32] * 100, 0, 2, id="one more for coefficients"),
        pytest.param("adamw", {}, [torch.float32, torch.bfloat16, torch.float32], 0, 2, id="one for each dtype"),
        pytest.param("adamw", {}, [torch.float32] * 3, 1, 2, id="one more for unaligned tensors"),
    ],
)
def test_launches_of_a_step(name, options, dtypes, unaligned_ones, launches, machine):
    params = []
    for number, dtype in enumerate(dtypes):
        values = torch.randn(40, device=machine.device).to(dtype)
        params.append(torch.nn.Parameter(unaligned(values, 1) if number < unaligned_ones else values))
        params[-1].grad = torch.randn(40, device=machine.device).to(dtype)
    optimizer = named(name).make_ours(params, **options)
    with machine.running():
        optimizer.step()
    assert machine.count_launches(optimizer.step) == launches
