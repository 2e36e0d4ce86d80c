"""Backend against backend, bit for bit: NumPy, Numba, and Triton (on a GPU, or in its interpreter on CPU tensors)."""

import pytest
import torch

from cases import CASES, device_of, each_case, named
from fusedopt.kernels import backends
from fusedopt.kernels.tables import CHUNK
from single_step import checked_step, outputs
from test_against_torch import FLOATS, MIXTURES, mixture_name, short

STEPS = 2
# The interpreter takes milliseconds for a program, so there are few; the last is not aligned.
SIZES = [1, 17, 1023, 1025, (3, 5)]
LARGE_SIZES = [CHUNK - 1, CHUNK + 1, 2**18 + 3]
SPECIAL = [0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan, 1e-40, -1e-45, 1e-23, 6e-8, 1e19, -3e38, 65504.0]

each_compiled = pytest.mark.parametrize("backend", ["numba", pytest.param("triton", marks=pytest.mark.triton)])


def unaligned(values, offset):
    """A copy of `values` that begins `offset` elements after an aligned address."""
    buffer = torch.empty(values.numel() + offset, dtype=values.dtype, device=values.device)
    return buffer[offset:].view(values.shape).copy_(values)


def draw(sizes, dtype):
    return [torch.randn(size if isinstance(size, tuple) else (size,)).to(dtype) for size in sizes]


def run(case, backend, start, gradients, change_state=lambda key, state: state, **options):
    """The parameters and states after a step with each of `gradients`, from `start`, on the CPU.

    Between steps, `change_state` makes of each state another.
    """
    device = device_of(backend)
    # Every second tensor is unaligned, and its gradient otherwise than itself.
    params = [torch.nn.Parameter(unaligned(values.to(device), (0, 1, 0, 3, 1)[i % 5])) for i, values in enumerate(start)]
    optimizer = case.make_ours(params, **options)
    with backends.use(backend):
        for number, values in enumerate(gradients):
            for p in params if number else ():
                for key in optimizer.state.get(p, {}).keys() - {"step"}:
                    optimizer.state[p][key] = change_state(key, optimizer.state[p][key])
            for i, (p, gradient) in enumerate(zip(params, values, strict=True)):
                p.grad_dtype = gradient.dtype
                p.grad = unaligned(gradient.to(device), (0, 3, 1, 0, 1)[i % 5])
            optimizer.step()
    return [{name: tensor.cpu() for name, tensor in outputs(optimizer, p).items()} for p in params]


def assert_equal_bits(ours, right):
    """Bits, but that one NaN is as good as another: their payloads are nobody's promise."""
    for index, (mine, yours) in enumerate(zip(ours, right, strict=True)):
        assert mine.keys() == yours.keys()
        for name, tensor in mine.items():
            assert tensor.dtype == yours[name].dtype
            differs = (tensor != yours[name]) | (tensor.signbit() != yours[name].signbit())
            differs &= ~(tensor.isnan() & yours[name].isnan())
            where = differs.nonzero()[:5].tolist()
            assert not differs.any(), (
                f"{name} of parameter {index}: {int(differs.sum())} of {differs.numel()} elements differ, at {where}: "
                f"{tensor[differs][:5].tolist()} and {yours[name][differs][:5].tolist()}"
            )


def check_against_numpy(case, backend, start, gradients, *change_state):
    right = run(case, "numpy", start, gradients, *change_state)
    assert_equal_bits(run(case, backend, start, gradients, *change_state), right)


@each_compiled
@pytest.mark.parametrize("dtype", FLOATS, ids=short)
@each_case
def test_equal_bits(case, dtype, backend):
    gradients = [draw(SIZES, dtype) for _ in range(STEPS)]
    check_against_numpy(case, backend, draw(SIZES, dtype), gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@each_case
def test_equal_bits_in_many_chunks_on_many_threads(case, dtype):
    gradients = [draw(LARGE_SIZES, dtype) for _ in range(STEPS)]
    check_against_numpy(case, "numba", draw(LARGE_SIZES, dtype), gradients)


@each_compiled
@pytest.mark.parametrize("mixture", MIXTURES, ids=mixture_name)
@pytest.mark.parametrize("name", ["sgd-momentum-l2", "adamw-amsgrad"])
def test_equal_bits_of_mixed_dtypes(name, mixture, backend):
    of_parameter, of_gradient, of_state = mixture
    gradients = [draw(SIZES, of_gradient) for _ in range(STEPS)]
    check_against_numpy(named(name), backend, draw(SIZES, of_parameter), gradients, lambda _, state: state.to(of_state))


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=short)
@pytest.mark.parametrize("case", [case for case in CASES if "capturable" in case.argument_names], ids=str)
def test_equal_bits_of_coefficients_from_the_device(case, dtype):
    """With capturable=True the device counts steps, and computes in float64 what the host computes else."""
    start, gradients = draw([3, 5], dtype), [draw([3, 5], dtype) for _ in range(20)]
    right = run(case, "numpy", start, gradients)
    assert_equal_bits(run(case, "triton", start, gradients, capturable=True), right)


@each_compiled
@pytest.mark.parametrize("dtype", FLOATS, ids=short)
@each_case
def test_equal_bits_of_special_numbers(case, dtype, backend):
    """Each special gradient meets each special parameter, and in the second step states that others have left."""
    special = torch.tensor(SPECIAL, dtype=torch.float64)
    parameters, first = (numbers.flatten().to(dtype) for numbers in torch.meshgrid(special, special, indexing="ij"))
    second = parameters.flip(0)

    def change_state(key, state):
        # By another distance for each: a NaN in one stands beside a number in the others.
        return state.roll(len(key))

    check_against_numpy(case, backend, [parameters], [[first], [second]], change_state)


@pytest.mark.parametrize("backend", ["tensor", "numpy"])
@pytest.mark.parametrize("dtype", FLOATS, ids=short)
@each_case
def test_rule_on_arrays_and_tensors_against_torch(case, dtype, backend):
    """torch's square root is not always correctly rounded, so that tensors are held to the tolerance and not to bits."""
    params = [torch.nn.Parameter(values) for values in draw(SIZES, dtype)]
    optimizer = case.make_ours(params)
    with backends.use(backend):
        for _ in range(STEPS):
            for p, gradient in zip(params, draw(SIZES, dtype), strict=True):
                p.grad = gradient
            checked_step(case, optimizer)
