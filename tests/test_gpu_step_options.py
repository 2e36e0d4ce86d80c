"""Clipping, averages and zeroing by the PTX of the kernels, executed on the CPU: the bits of Numba, every access sound.

Where there is a GPU the same tests run on it: `pytest -m gpu`.
"""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install triton (Linux), or fusedopt's extra [triton]")

from amp_paths import scaling
from cases import ONE_OF_EACH, named
from fusedopt.kernels import backends, gpu_kernels, norms
from fusedopt.kernels.ptx import execute, steps
from fusedopt.kernels.tables import CHUNK
from layouts import LAYOUTS
from machines import EXECUTED, Executed, Machine, each_machine
from single_step import outputs
from test_against_torch import FLOATS, short
from test_backends import assert_equal_bits, draw, unaligned
from test_gpu_executed import found_of, rows

pytestmark = [
    pytest.mark.triton,
    pytest.mark.compiled,
    pytest.mark.skipif(execute.obstacle() is not None, reason=str(execute.obstacle())),
]

SIZES = [1, 17, gpu_kernels.BLOCK, CHUNK + 5, (3, 5), 0, ()]
OPTIONS = {
    "clip": {"max_grad_norm": 1.0},
    "skip": {"skip_nonfinite": True},
    "average": {"ema_decay": 0.9},
    "zero": {"zero_grad_in_step": True},
    "all": {"max_grad_norm": 1.0, "skip_nonfinite": True, "ema_decay": 0.9, "zero_grad_in_step": True},
}
QUICK = ("sgd-nesterov-decoupled", "adamw-tensor-lr", "nadam-decoupled")


def take_steps(case, start, gradients, machine=None, lay_out=lambda values: values.clone(), **options):
    """Parameters, states, gradients and the norm after a step with each of `gradients`; by Numba, unless there is a machine."""
    device = "cpu" if machine is None else machine.device
    params = [torch.nn.Parameter(lay_out(values.to(device))) for values in start]
    optimizer = case.make_ours(params, **options)
    with backends.use("numba") if machine is None else machine.running() as session:
        for values in gradients:
            for p, gradient in zip(params, values, strict=True):
                p.grad = lay_out(gradient.to(device))
            optimizer.step()
    found = [{**found_of(optimizer, p), "gradient": p.grad.cpu()} for p in params]
    norm = None if optimizer.grad_norm is None else optimizer.grad_norm.tolist()
    return found, (norm, int(optimizer.skipped_steps)), session


def check(case, start, gradients, machine: Machine = EXECUTED, **options):
    """See that the machine makes of these what Numba makes of them."""
    right, numbers, _ = take_steps(case, start, gradients, **options)
    found, machine_numbers, session = take_steps(case, start, gradients, machine, **options)
    assert_equal_bits(found, right)
    torch.testing.assert_close(machine_numbers, numbers, rtol=0, atol=0, equal_nan=True)
    return session


@each_machine
@pytest.mark.parametrize("dtype", rows(FLOATS, lambda dtype: dtype == torch.float32), ids=short)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("case", rows(ONE_OF_EACH, lambda case: case.name in QUICK), ids=str)
def test_equal_bits(case, options, dtype, machine):
    check(case, draw(SIZES, dtype), [draw(SIZES, dtype) for _ in range(3)], machine, **options)


@each_machine
@pytest.mark.parametrize(
    ("dtype", "formats"),
    [
        (torch.float32, {"state_format": "8bit"}),
        (torch.float32, {"state_format": "bf16"}),
        (torch.bfloat16, {"state_format": "8bit", "master_weights": "split16"}),
        (torch.bfloat16, {"stochastic_rounding": True}),
    ],
    ids=["8bit", "bf16", "8bit-split16", "stochastic"],
)
def test_equal_bits_in_fewer_bytes(dtype, formats, machine):
    """The one pipeline: what is read and written beside the rule does not know how states are kept."""
    start, gradients = draw(SIZES[:4], dtype), [draw(SIZES[:4], dtype) for _ in range(2)]
    check(named("adamw"), start, gradients, machine, **OPTIONS["all"], **formats)


@pytest.mark.parametrize("order", ["reversed", "shuffled"])
def test_order_of_programs_and_threads_changes_nothing(order):
    machine = Executed(execute.Settings(order=order))
    check(named("adamw"), draw(SIZES, torch.float32), [draw(SIZES, torch.float32)] * 2, machine, **OPTIONS["all"])


@each_machine
@pytest.mark.parametrize("dtype", rows([torch.float32, torch.bfloat16], lambda dtype: dtype == torch.float32), ids=short)
def test_unaligned_memory(dtype, machine):
    start, gradients = draw(SIZES, dtype), [draw(SIZES, dtype) for _ in range(2)]
    check(named("adamw"), start, gradients, machine, lay_out=lambda values: unaligned(values, 1), **OPTIONS["all"])


@each_machine
@pytest.mark.parametrize("layout", ["transposed", "every_second_column"])
def test_layouts(layout, machine):
    shapes = [(3, 4, 1, 5), (2, 3, 5, 4)]
    start, gradients = draw(shapes, torch.float32), [draw(shapes, torch.float32) for _ in range(2)]
    check(named("adamw"), start, gradients, machine, lay_out=LAYOUTS[layout], **OPTIONS["all"])


@each_machine
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("options", ["clip", "skip", "all"])
def test_a_norm_that_is_not_finite(options, value, machine):
    """The device itself leaves the step out, and still makes gradients zero."""
    start, gradients = draw(SIZES, torch.float32), [draw(SIZES, torch.float32) for _ in range(3)]
    gradients[1][3][CHUNK] = value
    check(named("adamw"), start, gradients, machine, **OPTIONS[options])


@pytest.mark.parametrize("found_inf", [0.0, 1.0])
@pytest.mark.parametrize("grad_scale", [None, 1024.0, 3.0])
def test_under_a_gradient_scaler(grad_scale, found_inf):
    start, gradients = draw(SIZES, torch.float32), [draw(SIZES, torch.float32) for _ in range(2)]
    options = {"ema_decay": 0.9, "zero_grad_in_step": True, "max_grad_norm": 1.0}
    if found_inf:  # a scaler's first step that is left out leaves zero states on a device, none on a host
        options.pop("ema_decay")
    made = []
    for executed in (False, True):
        params = [torch.nn.Parameter(values.clone()) for values in start]
        optimizer = named("adamw").make_ours(params, **options)
        with steps.executing() if executed else backends.use("numba"):
            for number, values in enumerate(gradients):
                for p, gradient in zip(params, values, strict=True):
                    p.grad = gradient.clone()
                with scaling(optimizer, found_inf if number else 0.0, grad_scale):
                    optimizer.step()
        made.append([{**outputs(optimizer, p), "gradient": p.grad} for p in params])
    assert_equal_bits(made[1], made[0])


def test_one_launch_for_all_tensors_and_one_for_their_sum():
    session = check(named("adamw"), draw([7] * 300, torch.float32), [draw([7] * 300, torch.float32)], **OPTIONS["all"])
    assert [name for name, _ in session.launches] == ["sums_of_squares", "add_totals", "prepare", "run"]


def test_bytes_of_a_clipped_step():
    """The norm reads each gradient once more; zeros are stored once."""
    size = 20 * CHUNK
    p = torch.nn.Parameter(torch.randn(size))
    p.grad = torch.randn(size)
    optimizer = named("adamw").make_ours([p], **OPTIONS["all"])
    with steps.executing("sm_90", execute.Settings(races=False)) as session:
        optimizer.step()
    sums, update = session.counts("sums_of_squares"), session.counts("run")
    assert 0 <= sums.bytes_loaded - 4 * size < 0.01 * 4 * size
    assert sums.bytes_stored <= 64 * -(-size // CHUNK)
    assert update.bytes_stored == (4 + 1) * 4 * size  # parameter, two moments, average; gradient


def test_many_pieces_and_several_scopes():
    """More pieces than lanes, of tensors in groups that are clipped alone."""
    case = named("sgd")
    made = []
    for executed in (False, True):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(3)) for _ in range(norms.PIECE_LANES + 100)]
        groups = [{"params": params[::2], "max_grad_norm": 1.0}, {"params": params[1::2], "max_grad_norm": 2.0}]
        optimizer = case.make_ours(groups)
        for p in params:
            p.grad = torch.randn(3)
        with steps.executing("sm_90", execute.Settings(races=False)) if executed else backends.use("numba"):
            optimizer.step()
        made.append((torch.cat([p.detach() for p in params]), optimizer.grad_norm))
    torch.testing.assert_close(made[1], made[0], rtol=0, atol=0)
