"""swap_in_optimizer_params_and_state(): ours does what torch's does to the same optimizer of torch."""

import copy

import pytest
import torch

import fusedopt
from cases import CASES
from single_step import exact

pytestmark = pytest.mark.skipif(
    not hasattr(torch.optim, "swap_in_optimizer_params_and_state"), reason="this torch has no swap_in_optimizer_params_and_state"
)

# torch takes optimizers that have states alone.
OF_TORCH = [
    case
    for case in CASES
    if case.truth.__module__.startswith("torch.optim") and (case.ours is not fusedopt.SGD or "momentum" in case.kwargs)
]


def swapped_steps(optimizer, params, swap):
    """Steps on other parameters and states, between steps on one's own; what all are in the end."""

    def step(targets, value):
        for p in targets:
            p.grad = torch.full_like(p, value)
        optimizer.step()

    for value in (1.0, 2.0, -1.0):
        step(params, value)
    others = {"a": torch.full((5,), 3.0, dtype=torch.float64), "b": torch.full((3,), 4.0, dtype=torch.float64)}
    state = copy.deepcopy(optimizer.state_dict())
    before = [p.detach().clone() for p in params]
    for value in (0.5, -2.0, 1.5):
        with swap(optimizer, others, state):
            step(others.values(), value)
    assert all(map(torch.equal, params, before))
    step(params, -3.0)
    numbers = [exact(value) for values in state["state"].values() for _, value in sorted(values.items()) if value is not None]
    return [exact(p) for p in (*params, *others.values())], numbers


@pytest.mark.parametrize("case", OF_TORCH, ids=str)
def test_steps_on_what_was_swapped_in(case):
    results = []
    for make, swap in (
        (case.make_ours, fusedopt.swap_in_optimizer_params_and_state),
        (case.make_truth, torch.optim.swap_in_optimizer_params_and_state),
    ):
        params = [torch.nn.Parameter(torch.ones(size, dtype=torch.float64)) for size in (5, 3)]
        results.append(swapped_steps(make(params), params, swap))
    # The numbers of NAdam and ASGD are float32.
    scalars = case.ours in (fusedopt.NAdam, fusedopt.ASGD)
    torch.testing.assert_close(*results, rtol=1e-6 if scalars else 1e-12, atol=1e-7 if scalars else 1e-13)


def test_optimizers_of_torch_are_served_as_by_torch():
    p, other = torch.nn.Parameter(torch.ones(3)), torch.zeros(3)
    optimizer = torch.optim.SGD([p], lr=0.5, momentum=0.5)
    p.grad = other.grad = torch.ones(3)
    optimizer.step()
    with fusedopt.swap_in_optimizer_params_and_state(optimizer, {"p": other}, copy.deepcopy(optimizer.state_dict())):
        optimizer.step()
    assert torch.equal(p.detach(), torch.full((3,), 0.5))
    assert torch.equal(other, torch.full((3,), -0.75))
