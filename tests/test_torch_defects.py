"""The six defects of torch 2.13's ``fused=True`` on a CPU: ours has none of them, and what torch does is on record."""

from __future__ import annotations

import pytest
import torch

import fusedopt
from child import run

of_torch_2_13 = pytest.mark.skipif(
    not torch.__version__.startswith("2.13."),
    reason=f"documents torch 2.13's fused=True; this is torch {torch.__version__}",
)
low_precision = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


def trained(optimizer_class, values, gradients, **options):
    """Return a parameter of ``values`` after one step for each of ``gradients``, and the optimizer."""
    param = torch.nn.Parameter(values.clone())
    optimizer = optimizer_class([param], lr=0.1, **options)
    for gradient in gradients:
        param.grad = gradient.clone()
        optimizer.step()
    return param.detach(), optimizer


# --- A: SGD with parameters of 16 bits: full vectors of elements are never updated, momentum is read as another type --------


@low_precision
def test_ours_updates_every_element_of_16_bit_parameters(dtype):
    values, gradient = torch.linspace(-1, 1, 100).to(dtype), torch.linspace(0.5, 1.5, 100).to(dtype)
    param, optimizer = trained(fusedopt.SGD, values, [gradient] * 3, momentum=0.9, fused=True)
    _, exact = trained(torch.optim.SGD, values.double(), [gradient.double()] * 3, momentum=0.9)
    assert not (param == values).any()
    (state,), (expected,) = optimizer.state.values(), exact.state.values()
    # Two steps rounded to nearest, each by half a unit in the last place at most, the first one's carried on.
    half_unit = torch.finfo(dtype).eps / 2
    difference = (state["momentum_buffer"].double() / expected["momentum_buffer"] - 1).abs().max()
    assert difference <= 2 * half_unit


@of_torch_2_13
@low_precision
def test_torch_leaves_full_vectors_of_16_bit_parameters_alone(dtype):
    values, gradient = torch.linspace(-1, 1, 100).to(dtype), torch.linspace(0.5, 1.5, 100).to(dtype)
    param, _ = trained(torch.optim.SGD, values, [gradient] * 3, momentum=0.9, fused=True)
    assert (param == values).sum() == 96  # the four of the tail alone have moved


# --- B: strides are ignored --------------------------------------------------------------------------------------------------

LAYOUTS = {
    "transposed gradient": lambda: (torch.randn(32, 32), torch.randn(32, 32).t()),
    "channels_last gradient": lambda: (
        torch.randn(4, 8, 5, 5),
        torch.randn(4, 8, 5, 5).to(memory_format=torch.channels_last),
    ),
    "expanded gradient": lambda: (torch.randn(32, 32), torch.ones(1).expand(32, 32)),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
fused_classes = pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])


@layouts
@fused_classes
def test_ours_follows_the_strides_of_gradients(name, layout):
    values, gradient = layout()
    results = []
    for given in (gradient, gradient.contiguous()):
        param = torch.nn.Parameter(values.clone())
        param.grad = given
        optimizer = getattr(fusedopt, name)([param], lr=0.1, fused=True)
        optimizer.step()
        results.append(param.detach())
    assert torch.equal(*results)
    assert not torch.equal(results[0], values)


@fused_classes
def test_ours_writes_the_elements_of_a_strided_parameter_and_nothing_between(name):
    base = torch.zeros(32, 20)
    param = base[:, ::2].detach().requires_grad_(True)
    param.grad = torch.ones(32, 10)
    getattr(fusedopt, name)([param], lr=0.1, fused=True).step()
    assert (base[:, ::2] != 0).all()
    assert (base[:, 1::2] == 0).all()


@of_torch_2_13
def test_torch_reads_and_writes_elements_that_are_not_the_parameters():
    # In a process of its own: torch writes outside the tensor, and may abort at any later allocation.
    program = """
        import torch
        for name in ("SGD", "Adam", "AdamW"):
            results = []
            for fused in (True, False):
                param = torch.nn.Parameter(torch.arange(1024.0).reshape(32, 32) / 1024)
                param.grad = torch.arange(1024.0).sub_(511.5).reshape(32, 32).t()
                getattr(torch.optim, name)([param], lr=0.1, fused=fused).step()
                results.append(param.detach())
            assert not torch.allclose(*results, atol=0.01), name
        print("transposed gradients: wrong", flush=True)
        base = torch.zeros(32, 20)
        param = base[:, ::2].detach().requires_grad_(True)
        param.grad = torch.ones(32, 10)
        torch.optim.SGD([param], lr=0.1, fused=True).step()
        assert (base[:, 1::2] != 0).sum() == 160 and (base[:, ::2] != 0).sum() == 160
        print("strided parameters: wrong", flush=True)
    """
    finished = run(program)
    assert finished.stdout.splitlines() == ["transposed gradients: wrong", "strided parameters: wrong"], finished.stderr


# --- C: a parameter whose first gradient comes later than others' -------------------------------------------------------------


def late_gradient(optimizer_class, dtype=torch.float32, **options):
    """Return two parameters after three steps, where the second one gets its first gradient at the second step."""
    first, second = (torch.nn.Parameter(torch.ones(5, dtype=dtype)) for _ in range(2))
    optimizer = optimizer_class([first, second], lr=0.1, momentum=0.9, dampening=0.5, **options)
    for step in range(3):
        first.grad = torch.full((5,), 0.3 + step, dtype=dtype)
        second.grad = None if step == 0 else torch.full((5,), 0.7 - step, dtype=dtype)
        optimizer.step()
    return torch.stack([first.detach(), second.detach()])


def test_ours_takes_a_late_first_gradient():
    exact = late_gradient(torch.optim.SGD, torch.float64)
    assert (late_gradient(fusedopt.SGD, torch.float64, fused=True) - exact).abs().max() < 1e-14
    assert (late_gradient(fusedopt.SGD, fused=True) - exact).abs().max() < 1e-6


@of_torch_2_13
def test_torch_refuses_a_late_first_gradient():
    with pytest.raises(TypeError, match="expected Tensor as element 1 in argument 2, but got NoneType"):
        late_gradient(torch.optim.SGD, fused=True)


# --- D: an overflow at the very first step: momentum from uninitialised memory ------------------------------------------------


def overflow_first(optimizer_class, **options):
    """Return an optimizer with momentum after one step that the loss scaler skipped."""
    param = torch.nn.Parameter(torch.ones(64))
    param.grad = torch.full((64,), torch.inf)
    optimizer = optimizer_class([param], lr=0.1, momentum=0.9, **options)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(1.0)
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf
    return optimizer


def test_ours_makes_no_momentum_of_a_skipped_step(uninitialised_memory_is_nan):
    optimizer = overflow_first(fusedopt.SGD, fused=True)
    (param,) = optimizer.param_groups[0]["params"]
    assert all(torch.count_nonzero(value) == 0 for value in optimizer.state[param].values())
    param.grad = torch.full((64,), 2.0)
    optimizer.step()
    assert torch.equal(optimizer.state[param]["momentum_buffer"], param.grad)
    assert torch.equal(param, torch.ones(64) - torch.tensor(0.1) * 2)


@of_torch_2_13
def test_torch_keeps_uninitialised_memory_as_the_momentum_of_a_skipped_step(uninitialised_memory_is_nan):
    (state,) = overflow_first(torch.optim.SGD, fused=True).state.values()
    assert state["momentum_buffer"].isnan().all()


@pytest.fixture
def uninitialised_memory_is_nan():
    """Let ``torch.empty`` and its like return NaN, so that reading what nobody wrote is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


# --- E: two devices overflow: the scaler's sum is 2, which is not 1 -----------------------------------------------------------


def overflow_of_two_devices(optimizer_class):
    """Return a parameter of ones and its optimizer after one step that two devices found to overflow."""
    param = torch.nn.Parameter(torch.ones(64))
    param.grad = torch.ones(64)
    optimizer = optimizer_class([param], lr=0.1, fused=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(2.0)
    optimizer.step()
    return param.detach(), optimizer.state[param]


def test_ours_skips_when_two_devices_overflow():
    param, state = overflow_of_two_devices(fusedopt.AdamW)
    assert torch.equal(param, torch.ones(64))
    assert state.get("step", 0) == 0


@of_torch_2_13
def test_torch_steps_and_counts_back_when_two_devices_overflow():
    param, state = overflow_of_two_devices(torch.optim.AdamW)
    assert not torch.equal(param, torch.ones(64))
    assert state["step"] == -1


# --- F: autograd is not told that parameters changed --------------------------------------------------------------------------


def backward_after_step(optimizer_class):
    """Change a parameter between the forward and the backward pass that needs its old values."""
    param = torch.nn.Parameter(torch.ones(8))
    loss = (param * param).sum()
    param.grad = torch.ones(8)
    optimizer_class([param], lr=0.1, fused=True).step()
    param.grad = None
    loss.backward()
    return param.grad


@fused_classes
def test_ours_tells_autograd_that_parameters_changed(name):
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        backward_after_step(getattr(fusedopt, name))


@of_torch_2_13
@fused_classes
def test_torch_returns_a_gradient_of_changed_parameters(name):
    gradient = backward_after_step(getattr(torch.optim, name))
    assert not torch.equal(gradient, torch.full((8,), 2.0))  # 2 is right for the ones of the forward pass
