"""Whole optimizer steps by the PTX of their kernels, executed on the CPU: the bits of Numba, every access sound, bytes counted.

Where there is a GPU the same tests run on it: `pytest -m gpu`.
"""

from __future__ import annotations

import itertools

import numpy
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install triton (Linux), or fusedopt's extra [triton]")

from amp_paths import scaling
from cases import CASES, Case, named
from fusedopt.kernels import backends, gpu_kernels
from fusedopt.kernels.formats import FORMATS
from fusedopt.kernels.ptx import execute, steps
from fusedopt.kernels.ptx.driver import memory
from fusedopt.kernels.rule import Rule, Update
from fusedopt.kernels.rules import adam
from fusedopt.kernels.tables import Kind
from layouts import LAYOUTS
from machines import EXECUTED, GPU, Executed, Machine, each_machine
from single_step import outputs
from snapshot import same_bits
from test_against_torch import FLOATS, MIXTURES, mixture_name, short
from test_backends import SPECIAL, assert_equal_bits, draw, unaligned
from test_rule_definitions import lr_alone, negated, optimizer_of

pytestmark = [
    pytest.mark.triton,
    pytest.mark.compiled,
    pytest.mark.skipif(execute.obstacle() is not None, reason=str(execute.obstacle())),
]

SIZES = [1, 17, gpu_kernels.BLOCK - 1, gpu_kernels.BLOCK, 3 * gpu_kernels.BLOCK + 5, (3, 5), 0, ()]
STEPS = 3
#: One of each kind; the others are in the whole proof.
QUICK = ["sgd", "sgd-nesterov-l2", "adam-amsgrad", "adamw", "nadam-decoupled", "rprop-bounds-maximize"]


def rows(values, quick):
    """All of ``values``; those that ``quick`` does not hold for are left to the whole proof."""
    return [value if quick(value) else pytest.param(value, marks=pytest.mark.proof) for value in values]


each_case = pytest.mark.parametrize("case", rows(CASES, lambda case: case.name in QUICK), ids=str)
some_cases = pytest.mark.parametrize("case", [named(name) for name in ("adamw", "sgd-nesterov-l2")], ids=str)
each_dtype = pytest.mark.parametrize("dtype", rows(FLOATS, lambda dtype: dtype == torch.float32), ids=short)


def take_steps(
    case: Case,
    start,
    gradients,
    machine: Machine | None = None,
    lay_out=lambda values: values.clone(),
    change_state=None,
    **options,
):
    """Parameters and states after a step with each of `gradients`; by Numba, unless there is a machine."""
    device = "cpu" if machine is None else machine.device
    params = [torch.nn.Parameter(lay_out(values.to(device))) for values in start]
    optimizer = case.make_ours(params, **options)
    with backends.use("numba") if machine is None else machine.running() as session:
        for number, values in enumerate(gradients):
            for p, gradient in zip(params, values, strict=True):
                if gradient is not None:
                    p.grad_dtype = gradient.dtype
                p.grad = None if gradient is None else lay_out(gradient.to(device))
                if number and change_state is not None:
                    for key in optimizer.state.get(p, {}).keys() - {"step"}:
                        optimizer.state[p][key] = change_state(key, optimizer.state[p][key])
            optimizer.step()
    return [found_of(optimizer, p) for p in params], session


def found_of(optimizer, p):
    """The parameter and its states, on the CPU and as real numbers."""
    on_cpu = {key: tensor.cpu() for key, tensor in outputs(optimizer, p).items()}
    return {key: torch.view_as_real(x) if x.is_complex() else x for key, x in on_cpu.items()}


def check(case, start, gradients, machine: Machine = EXECUTED, own=None, **options):
    """See that the machine makes of these what Numba makes of them; return what was launched."""
    right, _ = take_steps(case, start, gradients, **options)
    found, session = take_steps(case, start, gradients, machine, **options, **(own or {}))
    assert_equal_bits(found, right)
    assert session.launches
    return session


@each_machine
@each_dtype
@each_case
def test_equal_bits(case, dtype, machine):
    check(case, draw(SIZES[:-2], dtype), [draw(SIZES[:-2], dtype) for _ in range(STEPS)], machine)


@pytest.mark.parametrize("order", ["reversed", "shuffled"])
@pytest.mark.parametrize("case", rows(CASES, lambda case: case.name == "adamw"), ids=str)
def test_order_of_programs_and_threads_changes_nothing(case, order):
    machine = Executed(execute.Settings(order=order))
    check(case, draw(SIZES[:-2], torch.float32), [draw(SIZES[:-2], torch.float32)] * 2, machine)


@pytest.mark.parametrize("target", rows(["sm_75", "sm_80", "sm_100", "sm_120"], lambda _: False))
@pytest.mark.parametrize("dtype", FLOATS, ids=short)
@each_case
def test_equal_bits_on_other_targets(case, dtype, target):
    check(case, draw(SIZES[:4], dtype), [draw(SIZES[:4], dtype) for _ in range(2)], Executed(target=target))


@each_machine
@pytest.mark.parametrize("mixture", rows(MIXTURES, lambda mixture: mixture == MIXTURES[0]), ids=mixture_name)
@some_cases
def test_equal_bits_of_mixed_dtypes(case, mixture, machine):
    of_parameter, of_gradient, of_state = mixture
    gradients = [draw(SIZES[:4], of_gradient) for _ in range(2)]
    check(case, draw(SIZES[:4], of_parameter), gradients, machine, change_state=lambda _, state: state.to(of_state))


@each_machine
@each_dtype
@each_case
def test_equal_bits_of_special_numbers(case, dtype, machine):
    special = torch.tensor(SPECIAL, dtype=torch.float64)
    parameters, first = (numbers.flatten().to(dtype) for numbers in torch.meshgrid(special, special, indexing="ij"))
    check(case, [parameters], [[first], [parameters.flip(0)]], machine, change_state=lambda key, state: state.roll(len(key)))


@each_machine
@pytest.mark.parametrize("offset", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@some_cases
def test_unaligned_memory(case, dtype, offset, machine):
    """None of it is promised an alignment that it has not, beside aligned tensors in the same step."""
    numbers = itertools.count()

    def lay_out(values):
        return unaligned(values, offset if next(numbers) % 3 else 0)

    check(case, draw(SIZES, dtype), [draw(SIZES, dtype) for _ in range(2)], machine, lay_out=lay_out)


@each_machine
@pytest.mark.parametrize("layout", rows(LAYOUTS, lambda name: name in ("transposed", "every_second_column")))
@some_cases
def test_layouts(case, layout, machine):
    """Dense copies stand in for what is not dense; nothing between the elements is touched."""
    shapes = [(3, 4, 1, 5), (2, 3, 5, 4)]
    check(case, draw(shapes, torch.float32), [draw(shapes, torch.float32) for _ in range(2)], machine, lay_out=LAYOUTS[layout])


@each_machine
@some_cases
def test_gradients_that_are_missing(case, machine):
    """A parameter that rests is not even read."""
    presence = ["101", "110", "111", "001"]
    gradients = [
        [values if has == "1" else None for values, has in zip(draw([5, 1500, 40], torch.float32), pattern, strict=True)]
        for pattern in presence
    ]
    check(case, draw([5, 1500, 40], torch.float32), gradients, machine)


@each_machine
@some_cases
def test_complex_parameters(case, machine):
    values = [[torch.view_as_complex(each.unflatten(0, (-1, 2))) for each in draw([2, 2048], torch.float32)] for _ in range(3)]
    check(case, values[0], values[1:], machine)


# --- decided on the device ----------------------------------------------------------------------------------------------------


@each_machine
@pytest.mark.parametrize("dtype", rows([torch.float32, torch.float64], lambda dtype: dtype == torch.float32), ids=short)
@pytest.mark.parametrize(
    "case",
    rows([case for case in CASES if "capturable" in case.argument_names], lambda case: case.name in ("adamw", "nadam-decoupled")),
    ids=str,
)
def test_coefficients_from_the_device(case, dtype, machine):
    """With capturable=True a kernel counts steps and computes in float64 what the host computes else."""
    sizes = [3, 5, *[2] * 40]
    session = check(case, draw(sizes, dtype), [draw(sizes, dtype) for _ in range(12)], machine, own={"capturable": True})
    assert [name for name, _ in session.launches].count("prepare") == 12


@each_machine
@pytest.mark.parametrize("found_inf", [0.0, 1.0])
@pytest.mark.parametrize("grad_scale", [None, 1024.0, 3.0])
@some_cases
def test_what_a_gradient_scaler_found(case, grad_scale, found_inf, machine):
    start, gradients = draw(SIZES, torch.float32), draw(SIZES, torch.float32)
    made = []
    for device, running in (("cpu", backends.use("numba")), (machine.device, machine.running())):
        params = [torch.nn.Parameter(values.to(device, copy=True)) for values in start]
        optimizer = case.make_ours(params)
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = gradient.to(device, copy=True)
        with running:
            optimizer.step()
            with scaling(optimizer, found_inf, grad_scale, device):
                optimizer.step()
        made.append([{**found_of(optimizer, p), "gradient": p.grad.cpu()} for p in params])
    for ours, right in zip(*made, strict=True):
        if found_inf:  # whether gradients of a step that is left out are unscaled is nobody's promise
            ours.pop("gradient")
            right.pop("gradient")
    assert_equal_bits(made[1], made[0])


# --- what it costs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", rows(FLOATS, lambda dtype: dtype == torch.float32), ids=short)
@pytest.mark.parametrize("case", rows(CASES, lambda case: case.name in ("adamw", "sgd")), ids=str)
def test_bytes_of_a_step(case, dtype):
    """Each number is loaded once and stored once; for a program the tables add less than a kilobyte's quarter."""
    size = 200 * gpu_kernels.BLOCK + 8
    p = torch.nn.Parameter(torch.randn(size).to(dtype))
    p.grad = torch.randn(size).to(dtype)
    optimizer = case.make_ours([p])
    with steps.executing("sm_90", execute.Settings(races=False)) as session:
        optimizer.step()
    states = sum(value.shape == p.shape for value in optimizer.state[p].values())
    counts = session.counts("run")
    assert counts.bytes_stored == (1 + states) * dtype.itemsize * size
    loaded = (2 + states) * dtype.itemsize * size
    assert loaded < counts.bytes_loaded
    tables = counts.bytes_loaded - loaded
    assert tables < 256 * -(-size // gpu_kernels.BLOCK)
    if case.name == "adamw" and dtype == torch.float32:
        assert (loaded + counts.bytes_stored) / size == 28.0
        assert tables < 0.01 * (loaded + counts.bytes_stored)


@each_machine
def test_a_changing_schedule_compiles_once(machine):
    """Learning rates, step counts, addresses of gradients and the number of tensors are no part of a kernel."""
    with machine.running() as session:
        for number in (1, 2, 3, 16):
            params = [torch.nn.Parameter(values.to(machine.device)) for values in draw([5] * number, torch.float32)]
            optimizer = named("adamw").make_ours(params)
            for step in range(50 if number == 3 else 3):
                optimizer.param_groups[0].update(lr=0.01 / (1 + step), weight_decay=0.1 + step)
                for p in params:
                    p.grad = torch.randn(5, device=machine.device)
                optimizer.step()
    assert session.compilations == 1 or (machine is GPU and session.compilations == 0)  # an earlier test may have compiled it
    assert [name for name, _ in session.launches] == ["run"] * 59


@each_machine
def test_a_sign_before_zero(machine):
    params = [torch.nn.Parameter(torch.ones(4, device=machine.device))]
    optimizer = optimizer_of(Update(Rule(negated, lr_alone)))(params, lr=1.0)
    params[0].grad = torch.tensor([0.0, -0.0, 1.0, torch.inf], device=machine.device)
    with machine.running():
        optimizer.step()
    assert same_bits(params[0], -params[0].grad)


@each_machine
def test_many_tensors_are_one_launch(machine):
    session = check(named("adamw"), draw([7] * 300, torch.float32), [draw([7] * 300, torch.float32)], machine)
    assert [name for name, _ in session.launches] == ["run"]


# --- far away -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("elements", [2**31, 2**31 + 5 * gpu_kernels.BLOCK, 2**33], ids=["2^31", "beyond 2^31", "2^33"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_elements_beyond_32_bits(elements, dtype):
    """The last block of a tensor so large that it is not there: only the memory of that block is."""
    far_block(elements, dtype)


def far_block(elements, dtype):
    kind = Kind(Update(adam), (FORMATS[dtype],) * 4)
    block = [torch.randn(gpu_kernels.BLOCK).abs().to(dtype) for _ in range(4)]
    before = [values.clone() for values in block]
    by_position, by_name = gpu_kernels.run_arguments(
        kind,
        # Of the whole tensor, which begins far below.
        addresses=torch.tensor([values.data_ptr() - (elements - gpu_kernels.BLOCK) * dtype.itemsize for values in block]),
        sizes=torch.tensor([elements]),
        chunks=torch.tensor([0, elements // gpu_kernels.BLOCK - 1], dtype=torch.int32),
        row_of_tensor=torch.tensor([0]),
        coefficients=torch.tensor([1.0, 1.0, 0.125, 0.5, 0.5, 0.5, 0.5, 1.0]),
        found_inf=None,
        tensors=1,
        aligned=True,
        lanes=32,
    )
    with steps.executing("sm_90"), memory(*block):
        gpu_kernels.kernel(kind).run[(1,)](*by_position, **by_name)
    p, g, m, v = (values.float().numpy() for values in before)
    half = numpy.float32(0.5)
    m, v = half * m + half * g, half * v + half * g * g
    right = p - numpy.float32(0.125) * (m / (numpy.sqrt(v) + numpy.float32(1))), before[1].float().numpy(), m, v
    for found, values in zip(block, right, strict=True):
        assert torch.equal(found, torch.from_numpy(values).to(dtype))
