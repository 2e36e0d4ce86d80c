"""Parameters, gradients and states in any layout give the numbers of contiguous ones, and nothing beside them is touched."""

import itertools

import pytest
import torch

from cases import SCALARS, device_of, draw_gradients, each_case, make_parameters, named
from fusedopt.kernels import backends
from layouts import LAYOUTS, READ_LAYOUTS, is_untouched
from single_step import checked_step, outputs
from snapshot import same_bits

# Neither channels nor columns are one, so that transposed, channels_last and contiguous tensors all differ.
SHAPE = (3, 4, 1, 5)
STEPS = 3
SOME_CASES = ["sgd-l2", "sgd-nesterov-decoupled", "adamw-amsgrad"]
KERNELS = ["numba", pytest.param("triton", marks=pytest.mark.triton)]

each_parameter_layout = pytest.mark.parametrize("layout", LAYOUTS)


def gradient_values(dtype):
    """Gradients for every step that can be expanded along the first dimension."""
    return [torch.randn(1, *SHAPE[1:]).to(dtype).expand(SHAPE).contiguous() for _ in range(STEPS)]


def lay_states_out(optimizer, p, lay_out):
    """Replace the states of `p` by equal ones in another layout."""
    state = optimizer.state.get(p, {})
    for key in state.keys() - set(SCALARS):
        state[key] = lay_out(state[key])


def run_contiguous(case, start, gradients):
    """What the parameter and its states are at last, checked against torch's for-loop."""
    p = torch.nn.Parameter(start.clone())
    optimizer = case.make_ours([p])
    for gradient in gradients:
        p.grad = gradient.clone()
        checked_step(case, optimizer)
    return outputs(optimizer, p)


def check_layouts(case, layout, gradient_layouts, state_layouts, dtype=torch.float32, device="cpu"):
    """All gradient and state layouts under one parameter layout, in one optimizer."""
    start = torch.randn(SHAPE).to(device, dtype)
    gradients = [gradient.to(device) for gradient in gradient_values(dtype)]
    right = run_contiguous(case, start, gradients)
    combinations = list(itertools.product(gradient_layouts, state_layouts))
    params = [torch.nn.Parameter(LAYOUTS[layout](start)) for _ in combinations]
    optimizer = case.make_ours(params)
    for number, gradient in enumerate(gradients):
        for p, (of_gradient, _) in zip(params, combinations, strict=True):
            # A step with another layout stands between two of this one.
            p.grad = gradient.clone() if number == 1 else READ_LAYOUTS[of_gradient](gradient)
        optimizer.step()
        assert all(same_bits(p.grad, gradient) and (number == 1 or is_untouched(p.grad)) for p in params)
        if number == 0:
            for p, (_, of_state) in zip(params, combinations, strict=True):
                lay_states_out(optimizer, p, LAYOUTS[of_state])
    for p, (of_gradient, of_state) in zip(params, combinations, strict=True):
        what = f"{layout} parameter, {of_gradient} gradient, {of_state} states"
        for name, tensor in outputs(optimizer, p).items():
            assert same_bits(tensor, right[name]), f"{what}: wrong {name}"
            assert name in SCALARS or is_untouched(tensor), f"{what}: written beside the {name}"


@each_parameter_layout
@each_case
def test_every_layout_of_parameter_gradient_and_states(case, layout):
    check_layouts(case, layout, READ_LAYOUTS, LAYOUTS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@each_parameter_layout
@pytest.mark.parametrize("name", SOME_CASES)
def test_layouts_of_other_dtypes(name, layout, dtype):
    check_layouts(named(name), layout, READ_LAYOUTS, LAYOUTS, dtype)


@pytest.mark.parametrize("backend", ["numpy", "tensor", pytest.param("triton", marks=pytest.mark.triton)])
@each_parameter_layout
def test_layouts_on_other_backends(layout, backend):
    with backends.use(backend):
        some = ["channels_last", "every_second_column", "unaligned_by_1"]
        check_layouts(named("adam-amsgrad-l2"), layout, [*some, "expanded"], some, device=device_of(backend))


@each_parameter_layout
@pytest.mark.parametrize("name", SOME_CASES)
def test_states_loaded_with_other_strides(name, layout):
    case, start, gradients = named(name), torch.randn(SHAPE), gradient_values(torch.float32)
    right = run_contiguous(case, start, gradients)
    p = torch.nn.Parameter(start.clone())
    optimizer = case.make_ours([p])
    for number, gradient in enumerate(gradients):
        p.grad = gradient
        optimizer.step()
        if number == 0:
            saved = optimizer.state_dict()
            for state in saved["state"].values():
                for key in state.keys() - set(SCALARS):
                    state[key] = LAYOUTS[layout](state[key])
            loaded = {key: value.clone() for state in saved["state"].values() for key, value in state.items()}
            optimizer = case.make_ours([p])
            optimizer.load_state_dict(saved)
    assert all(same_bits(tensor, right[name]) for name, tensor in outputs(optimizer, p).items())
    # Loading is by copy: the caller's tensors are not ours to step on.
    for state in saved["state"].values():
        assert all(same_bits(value, loaded[key]) and is_untouched(value) for key, value in state.items() if key not in SCALARS)


@pytest.mark.parametrize("backend", KERNELS)
@each_case
def test_sizes_of_zero_and_dimensions_of_zero(case, backend):
    """Alone, many in a row, first, last and between others: none consumes a place in the tables."""
    for shapes in ([()], [(0,)], [(0,), (3, 0, 2), (0,), (), (5,), (0,), (1, 1, 1), (2, 3), (0, 4)]):
        params = make_parameters(shapes, device=device_of(backend))
        optimizer = case.make_ours(params)
        with backends.use(backend):
            for _ in range(2):
                draw_gradients(params)
                checked_step(case, optimizer)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@each_case
def test_complex_numbers_are_pairs(case, dtype):
    """A complex parameter steps as its real and imaginary parts do, as in torch."""
    params = [torch.nn.Parameter(torch.randn(5, 7, dtype=dtype)), torch.nn.Parameter(torch.randn(6, 9, dtype=dtype)[:, ::3])]
    pairs = [torch.nn.Parameter(torch.view_as_real(p.detach()).clone()) for p in params]
    optimizer, right = case.make_ours(params), case.make_ours(pairs)
    for _ in range(STEPS):
        for p, pair in zip(params, pairs, strict=True):
            p.grad = torch.randn(p.shape, dtype=dtype)
            pair.grad = torch.view_as_real(p.grad).clone()
        optimizer.step()
        checked_step(case, right)
    for p, pair in zip(params, pairs, strict=True):
        for name, tensor in outputs(optimizer, p).items():
            real = tensor if name in SCALARS else torch.view_as_real(tensor)
            assert same_bits(real, outputs(right, pair)[name]), name
