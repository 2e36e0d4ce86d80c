"""Every optimizer against torch's for-loop in float64, step by step: sizes, dtypes and mixtures, hyperparameters."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fusedopt
from cases import RANGES, copies, draw_gradients, each_case, make_parameters, named
from fusedopt.kernels.tables import CHUNK
from single_step import SCALARS, checked_step
from tolerances import half_ulp

STEPS = 3
# Around the widths of vectors, the blocks of Triton's kernels and the chunks of both.
SIZES = [0, 1, 7, 8, *range(15, 18), *range(31, 34), *range(63, 66), *range(127, 130), *range(1023, 1026)]
CHUNK_SIZES = [CHUNK - 1, CHUNK, CHUNK + 1]
LARGE = 2**20 + 3

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Parameter, gradient, states.
MIXTURES = [
    (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.float16, torch.float16, torch.float32),
    (torch.float32, torch.bfloat16, torch.float32),
    (torch.float32, torch.float16, torch.float32),
    (torch.float32, torch.float32, torch.bfloat16),
    (torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32, torch.float16),
    (torch.float64, torch.float32, torch.float64),
]


def short(dtype):
    return {torch.bfloat16: "bf16"}.get(dtype, f"fp{dtype.itemsize * 8}")


def mixture_name(mixture):
    return "-".join(map(short, mixture))


each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=short)


@each_dtype
@each_case
def test_all_sizes_in_one_optimizer(case, dtype):
    params = make_parameters([*SIZES, *CHUNK_SIZES, 0], dtype)
    optimizer = case.make_ours(params)
    for _ in range(STEPS):
        draw_gradients(params)
        checked_step(case, optimizer)


@each_dtype
@pytest.mark.parametrize("size", [*SIZES, *CHUNK_SIZES])
@pytest.mark.parametrize("name", ["sgd-nesterov-l2", "adamw-amsgrad"])
def test_one_size_alone(name, size, dtype):
    case, params = named(name), make_parameters([size], dtype)
    optimizer = case.make_ours(params)
    for _ in range(STEPS):
        draw_gradients(params)
        checked_step(case, optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("name", ["sgd-momentum", "adamw"])
def test_a_large_tensor(name, dtype):
    case, params = named(name), make_parameters([LARGE], dtype)
    optimizer = case.make_ours(params)
    for _ in range(2):
        draw_gradients(params)
        checked_step(case, optimizer)


@pytest.mark.parametrize("mixture", MIXTURES, ids=mixture_name)
@pytest.mark.parametrize("name", ["sgd-l2", "sgd-nesterov-decoupled", "momentum", "adam-amsgrad-l2", "adamw"])
def test_mixed_dtypes(name, mixture):
    case, (of_parameter, of_gradient, of_state) = named(name), mixture
    params = make_parameters([1, 17, 64, 1000, CHUNK + 1], of_parameter)
    optimizer = case.make_ours(params)
    for _ in range(STEPS):
        set_gradients(params, of_gradient)
        checked_step(case, optimizer)
        for p in params:
            for key, value in optimizer.state.get(p, {}).items():
                if key not in SCALARS:
                    optimizer.state[p][key] = value.to(of_state)
    assert {value.dtype for p in params for key, value in optimizer.state.get(p, {}).items() if key not in SCALARS} <= {of_state}


def set_gradients(params, dtype):
    for p in params:
        p.grad_dtype = dtype
        p.grad = torch.randn(p.shape).to(dtype)


def drawn_arguments(case):
    """A strategy for the constructor's arguments: those of `case` that are numbers are drawn from their ranges."""
    strategies = {}
    for key, value in case.kwargs.items():
        if isinstance(value, float) and key in RANGES:
            strategies[key] = st.floats(*RANGES[key])
    if "betas" in case.argument_names:
        strategies["betas"] = st.tuples(st.floats(0, 0.99), st.floats(0, 0.9999))
    if "eps" in case.argument_names:
        strategies["eps"] = st.floats(*RANGES["eps"])
    return st.fixed_dictionaries(strategies)


@each_case
@given(data=st.data())
def test_random_hyperparameters(case, data):
    arguments = data.draw(drawn_arguments(case))
    dtype = data.draw(st.sampled_from(FLOATS))
    torch.manual_seed(data.draw(st.integers(0, 2**32 - 1), label="seed"))
    params = make_parameters([5, 67], dtype)
    optimizer = case.make_ours(params, **arguments)
    for _ in range(STEPS):
        draw_gradients(params)
        checked_step(case, optimizer)


#: The square of 1e20 overflows float32, but not (1 - beta2) times it, as torch computes it. Others weigh a square by more.
LARGE_GRADIENTS = {"RMSprop": 1e18, "Adagrad": 1e18, "Adadelta": 1e18}


@pytest.mark.parametrize("scale", ["small", "large"])
@each_case
def test_very_small_and_very_large_gradients(case, scale):
    params = make_parameters([67])
    scale = LARGE_GRADIENTS.get(case.ours.__name__, 1e20) if scale == "large" else 1e-15
    optimizer = case.make_ours(params)
    for _ in range(2):
        draw_gradients(params)
        params[0].grad.clamp_(-3, 3).mul_(scale)
        checked_step(case, optimizer)


@each_case
def test_float64_stays_with_torch_over_many_steps(case):
    """No drift: what is allowed in one step does not add up in one direction."""
    ours = make_parameters([100], torch.float64)
    theirs = copies(ours)
    optimizer, truth = case.make_ours(ours), case.make_truth(theirs)
    for _ in range(100):
        draw_gradients(ours, theirs)
        optimizer.step()
        truth.step()
    # torch rounds NAdam's product of momenta to float32 before it uses it.
    rounded = case.ours is fusedopt.NAdam
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9 if rounded else 1e-13)


@pytest.mark.parametrize("decay", [1e-5, 1e-6, 2e-7])
@pytest.mark.parametrize("name", ["sgd-decoupled", "momentum-decoupled", "adamw"])
def test_a_small_decay_rounds_once(name, decay):
    """In float32 the factor 1 - decay is off by up to half an ulp of 1: by 1.3 % of a decay of 1e-6."""
    p = torch.nn.Parameter(torch.rand(10**5) + 0.5)
    p.grad = torch.zeros_like(p)
    before = p.detach().double()
    named(name).make_ours([p], lr=1e-3, weight_decay=decay / 1e-3).step()
    right = before - decay * before
    rounded_product = decay * before * 2**-22
    error = (p.detach().double() - right).abs()
    assert (error <= half_ulp(right, torch.float32) + rounded_product).all()
