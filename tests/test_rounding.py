"""The order of operations and what is rounded where: decay, bias corrections, eps, infinities, subnormals, short formats."""

from __future__ import annotations

import numpy
import pytest
import torch

import fusedopt
from cases import draw_gradients, each_case, make_parameters, named
from fusedopt.kernels import backends
from single_step import checked_step

# --- decay -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SGD", {"decoupled_weight_decay": True}),
        ("SGD", {"decoupled_weight_decay": True, "momentum": 0.9}),
        ("Momentum", {}),
        ("AdamW", {}),
    ],
    ids=["SGD", "SGD with momentum", "Momentum", "AdamW"],
)
def test_small_decay_is_not_lost_in_the_factor(name, options):
    """1 - 1e-6 rounded to float32 is a decay of 1.0133e-6: wrong by 1.3 %, in every element alike."""
    values = torch.linspace(1, 2, 20_001)
    param = torch.nn.Parameter(values.clone())
    param.grad = torch.zeros_like(values)
    getattr(fusedopt, name)([param], lr=1e-4, weight_decay=1e-2, **options).step()
    # The mean over many elements leaves out the rounding of each.
    decay = ((values.double() - param.detach().double()) / values.double()).mean().item()
    assert decay == pytest.approx(1e-6, rel=2e-3)


@each_case
def test_large_decay_and_eps_show_the_order_of_operations(case):
    params = make_parameters([(65,), (4, 6)])
    optimizer = case.make_ours(params)
    (group,) = optimizer.param_groups
    for options in ({"weight_decay": 0.9, "lr": 0.5}, {"eps": 1.0}, {"eps": 1e-3}, {"lr": 2.0}):
        group.update({key: value for key, value in options.items() if key in group and (key != "weight_decay" or group[key])})
        draw_gradients(params)
        checked_step(case, optimizer)


# --- moments and their corrections -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta1", [0.0, 0.1])
@pytest.mark.parametrize("name", ["adam", "adamw-amsgrad"])
def test_small_beta1_forgets_a_large_gradient(name, beta1):
    """With beta1 = 0, usual for adversarial networks, the moment is the gradient, whatever came before it."""
    param = torch.nn.Parameter(torch.zeros(3))
    optimizer = named(name).make_ours([param], betas=(beta1, 0.9))
    param.grad = torch.full((3,), 1e9)
    optimizer.step()
    param.grad = torch.tensor([1.0, 0.1, 3e-5])
    checked_step(named(name), optimizer)
    if beta1 == 0:
        assert torch.equal(optimizer.state[param]["exp_avg"], param.grad)


@pytest.mark.parametrize("step", [0, 1, 10, 1000, 10**5, 2**24 - 2])
@pytest.mark.parametrize("name", ["adam", "adamw-amsgrad"])
def test_bias_corrections_at_any_step(name, step):
    """1 - 0.999 in float32 has lost four digits; a running product drifts; powers must not underflow."""
    params = make_parameters([(65,)])
    optimizer = named(name).make_ours(params)
    draw_gradients(params)
    optimizer.step()
    optimizer.state[params[0]]["step"].fill_(float(step))
    for number in (1, 2):
        draw_gradients(params)
        checked_step(named(name), optimizer)
        assert optimizer.state[params[0]]["step"] == step + number


def test_first_step_of_adam_is_the_learning_rate():
    for gradient in (1e-3, 1.0, 1e3):
        param = torch.nn.Parameter(torch.zeros(8))
        param.grad = torch.full((8,), gradient)
        fusedopt.Adam([param], lr=1e-3, eps=0.0).step()
        assert (param.detach().double() / -1e-3 - 1).abs().max() < 4 * 2**-24


# --- infinities, NaN, subnormals ---------------------------------------------------------------------------------------------

SPECIAL = torch.tensor(
    [0.0, -0.0, 1.0, torch.inf, -torch.inf, torch.nan, 1e-40, -1e-45, 3e38, -3e38, 1e-20, 1e19, 1e20, 1e-23, 2.0, -1.0]
)


@pytest.mark.parametrize("backend", ["numba", "numpy", "tensor", pytest.param("triton", marks=pytest.mark.triton)])
@each_case
def test_special_gradients(case, backend):
    """NaN stays NaN and infinities are what the formulas make of them, in full vectors and in tails."""
    params = [torch.nn.Parameter(torch.ones(37)), torch.nn.Parameter(SPECIAL.repeat(3)[:37])]
    optimizer = case.make_ours(params)
    for shift in range(3):
        for p in params:
            p.grad = SPECIAL.repeat(3)[:37].roll(shift)
        before = torch.stack([p.detach().clone() for p in params])
        with backends.use(backend):
            optimizer.step()
        touched = before.isnan()
        if case.ours is not fusedopt.Rprop:  # which takes nothing but signs from a gradient, and none from NaN, as torch's
            touched |= torch.stack([p.grad for p in params]).isnan()
        now = torch.stack([p.detach() for p in params])
        assert now[touched].isnan().all()
    # A gradient of one does not come to see its neighbours' infinities.
    ones = torch.nn.Parameter(torch.ones(37)), torch.nn.Parameter(torch.ones(37))
    one, mixed = case.make_ours([ones[0]]), case.make_ours([ones[1]])
    ones[0].grad, ones[1].grad = torch.ones(37), SPECIAL.repeat(3)[:37]
    with backends.use(backend):
        one.step()
        mixed.step()
    assert torch.equal(ones[0][ones[1].grad == 1], ones[1][ones[1].grad == 1])


@each_case
def test_infinite_and_nan_gradients_do_what_they_do_in_torch(case):
    """By single steps from equal numbers, in float64, where no intermediate result overflows on one side only."""
    special = torch.tensor([0.0, 1.0, -2.0, torch.inf, -torch.inf, torch.nan, 1e-300, 1e-200], dtype=torch.float64)
    param = torch.nn.Parameter(torch.linspace(-2, 2, 67, dtype=torch.float64))
    optimizer = case.make_ours([param])
    draw_gradients([param])
    checked_step(case, optimizer)
    param.grad = special.repeat(9)[:67]
    checked_step(case, optimizer)
    finite = param.isfinite()
    # What takes nothing but a sign is not moved further by infinity, and Rprop's sign of NaN is zero, as torch's.
    lost = {fusedopt.Lion: param.grad.isnan(), fusedopt.Rprop: torch.zeros_like(finite)}.get(case.ours, ~param.grad.isfinite())
    assert torch.equal(finite, ~lost)
    draw_gradients([param])
    optimizer.step()
    assert torch.equal(param.isfinite(), finite)


@pytest.mark.parametrize("backend", ["numba", "numpy", "tensor", pytest.param("triton", marks=pytest.mark.triton)])
def test_amsgrad_keeps_nan(backend):
    """Comparisons with NaN are false: a maximum by comparison alone would forget it, as whichever argument it came."""
    param = torch.nn.Parameter(torch.ones(40))
    optimizer = fusedopt.Adam([param], lr=0.1, amsgrad=True)
    param.grad = torch.ones(40)
    with backends.use(backend):
        optimizer.step()
        state = optimizer.state[param]
        state["max_exp_avg_sq"][::3] = torch.nan
        state["exp_avg_sq"][1::3] = torch.nan
        optimizer.step()
    largest = state["max_exp_avg_sq"]
    assert largest[::3].isnan().all()
    assert largest[1::3].isnan().all()
    assert largest[2::3].isfinite().all()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_centered_rmsprop_survives_equal_gradients(momentum):
    """Their variance is zero, and negative by rounding here and there: the root of that is NaN, in torch too."""
    param = torch.nn.Parameter(torch.ones(2000))
    optimizer = fusedopt.RMSprop([param], lr=1e-4, centered=True, momentum=momentum)
    param.grad = torch.randn(2000)
    for _ in range(1500):
        optimizer.step()
    assert param.isfinite().all()


def test_radam_with_a_learning_rate_of_zero_leaves_all_as_it_is():
    """Also where the root and eps are zero: the first steps do not divide by them."""
    param = torch.nn.Parameter(torch.ones(9))
    param.grad = torch.zeros(9)
    fusedopt.RAdam([param], lr=0.0, eps=0.0).step()
    assert (param == 1).all()


def test_no_gradient_and_no_eps_is_zero_by_zero():
    """As torch has it: 0 / 0 is NaN, and nobody's eps is put in unasked."""
    param = torch.nn.Parameter(torch.ones(9))
    param.grad = torch.zeros(9)
    fusedopt.Adam([param], lr=0.1, eps=0.0).step()
    assert param.isnan().all()


@pytest.mark.parametrize("backend", ["numba", "tensor", pytest.param("triton", marks=pytest.mark.triton)])
@pytest.mark.parametrize("name", ["sgd", "sgd-momentum-l2", "momentum-decoupled", "adam", "adam-amsgrad-l2"])
def test_subnormals_are_not_flushed(name, backend):
    """NumPy keeps them; so must every backend."""
    results = []
    for each in ("numpy", backend):
        param = torch.nn.Parameter(torch.full((33,), 3e-40))
        optimizer = named(name).make_ours([param], lr=0.3)
        for _ in range(2):
            param.grad = torch.full((33,), 1e-20 if "adam" in name else 2e-40)  # its square is subnormal, or itself
            with backends.use(each):
                optimizer.step()
        results.append([param.detach(), *(value for key, value in optimizer.state[param].items() if key != "step")])
    assert all(torch.count_nonzero(value) == 33 for value in results[0])
    assert all(map(torch.equal, *results))


# --- short formats -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_eps_below_the_formats_range_still_works(dtype):
    """1e-8 is 0 in float16; torch's loop then divides by zero, and the parameter is infinite after three steps."""
    param = torch.nn.Parameter(torch.ones(33, dtype=dtype))
    optimizer = fusedopt.AdamW([param], lr=1e-3, eps=1e-8)
    for _ in range(3):
        param.grad = torch.full((33,), 1e-3, dtype=dtype)
        optimizer.step()
    assert param.isfinite().all()
    assert (param.float() - 1).abs().max() < 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_short_states_are_rounded_once_and_the_step_uses_them_unrounded(dtype):
    """Momentum in float32 arithmetic: the parameter moves by the moment as computed, not by the moment as stored."""
    lr, beta, one_minus_beta = (numpy.float32(x) for x in (0.1, 0.9, 1 - 0.9))
    start, gradients = torch.linspace(-1, 1, 67).to(dtype), torch.linspace(0.3, 1.7, 67).to(dtype)
    param = torch.nn.Parameter(start.clone())
    optimizer = fusedopt.Momentum([param], lr=0.1)
    p, stored = start.float().numpy(), numpy.zeros(67, numpy.float32)
    for _ in range(4):
        param.grad = gradients
        optimizer.step()
        moment = beta * stored + one_minus_beta * gradients.float().numpy()
        p = torch.from_numpy(p - lr * moment).to(dtype).float().numpy()  # to nearest, ties to even
        stored = torch.from_numpy(moment).to(dtype).float().numpy()
        assert numpy.array_equal(param.detach().float().numpy(), p)
        assert numpy.array_equal(optimizer.state[param]["momentum_buffer"].float().numpy(), stored)
