"""The average of the weights that a step keeps: against torch's AveragedModel, and through checkpoints."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fusedopt
from cases import Case, copies, device_of, draw_gradients, each_case, each_class, make_parameters, named
from fusedopt.custom import Rule, RuleError, RuleOptimizer
from fusedopt.kernels import backends

SHAPES = [1, 7, (3, 5), 1000, (), 0]
STEPS = 4


def trained(case: Case, backend: str = "numba", dtype: torch.dtype = torch.float32, steps: int = STEPS, **options):
    """Parameters after some steps, and the optimizer."""
    torch.manual_seed(0)
    params = make_parameters(SHAPES, dtype, device_of(backend))
    optimizer = case.make_ours(params, ema_decay=0.9, **options)
    with backends.use(backend):
        for _ in range(steps):
            draw_gradients(params)
            optimizer.step()
    return params, optimizer


def averages(params, optimizer) -> list:
    return [optimizer.state[p]["ema"] for p in params]


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_it_is_that_of_averaged_model(case, dtype):
    """By NumPy, whose bits the kernels have: see below."""
    torch.manual_seed(0)
    params = make_parameters(SHAPES, dtype)
    others = torch.nn.ParameterList(copies(params))
    ours, theirs = case.make_ours(params, ema_decay=0.9), case.make_ours(others)
    averaged = AveragedModel(others, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for step in range(1, STEPS + 1):
        draw_gradients(params, others)
        with backends.use("numpy"):
            ours.step()
            theirs.step()
        averaged.update_parameters(others)
        for p, q, expected in zip(params, others, averaged.module, strict=True):
            assert torch.equal(p, q), "an average changes nothing of the step"
            # Both round a difference, a product and a sum; from the decay on the weights may differ by a rounding.
            size = max(float(p.detach().abs().max()), float(expected.detach().abs().max())) if p.numel() else 0.0
            found = ours.state[p]["ema"]
            torch.testing.assert_close(found, expected.detach(), rtol=0, atol=2 * step * size * torch.finfo(dtype).eps)
            assert step > 1 or torch.equal(found, p)


@each_class
@pytest.mark.parametrize("backend", ["numba", pytest.param("triton", marks=pytest.mark.triton)])
def test_backends_agree_to_the_bit(case, backend):
    first, second = (averages(*trained(case, each)) for each in (backend, "numpy"))
    torch.testing.assert_close([average.cpu() for average in first], second, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_of_half_precision_it_is_float32(dtype):
    """In 16 bits an average of decay 0.999 would never move."""
    params, optimizer = trained(named("adamw"), dtype=dtype)
    assert {average.dtype for average in averages(params, optimizer)} == {torch.float32}
    for p, average in zip(params, averages(params, optimizer), strict=True):
        assert p.numel() == 0 or not torch.equal(average, p.float())


@pytest.mark.parametrize("backend", ["numba", pytest.param("triton", marks=pytest.mark.triton)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_bfloat16_it_still_moves(backend, dtype):
    """Rounded by chance: to nearest, an average of this decay would stay where it began."""
    decay, steps = 0.999, 300
    found = {}
    for each in (backend, "numpy"):
        p = torch.nn.Parameter(torch.ones(5000, dtype=dtype, device=device_of(each)))
        optimizer = fusedopt.SGD([p], lr=1.0, ema_decay=decay, state_format={"ema": "bf16"})
        with backends.use(each):
            for step in range(steps if each == "numpy" else 20):
                p.grad = torch.full_like(p, 1.0 if step == 1 else 0.0)
                optimizer.step()
                if step == 19:
                    found[each] = optimizer.state[p]["ema"].cpu().clone()
    assert found[backend].dtype == torch.bfloat16
    assert torch.equal(found[backend], found["numpy"])
    expected = decay ** (steps - 1)
    # The rounding of an element is off by an ulp of bfloat16 at most, of the mean of 5,000 by far less.
    assert float(optimizer.state[p]["ema"].float().mean()) == pytest.approx(expected, rel=2e-3)
    with optimizer.swap_ema():
        assert float(p.detach().float().mean()) == pytest.approx(expected, rel=4e-3)


def test_eight_bits_are_too_few_for_it():
    params = make_parameters([5000])
    draw_gradients(params)
    with pytest.raises(ValueError, match="weights have more digits: ask for 'bf16' or 'fp32'"):
        fusedopt.SGD(params, lr=0.1, ema_decay=0.9, state_format={"ema": "8bit"}).step()


def test_groups_may_have_decays_of_their_own_and_change_them():
    torch.manual_seed(0)
    first, second, third = params = make_parameters([5, 5, 5])
    groups = [{"params": [first], "ema_decay": 0.5}, {"params": [second], "ema_decay": 0.0}, {"params": [third]}]
    optimizer = fusedopt.SGD(groups, lr=0.1)
    draw_gradients(params)
    optimizer.step()
    expected = first.detach().clone()
    for decay in (0.5, 0.25):
        optimizer.param_groups[0]["ema_decay"] = decay
        draw_gradients(params)
        optimizer.step()
        expected = decay * expected + (1 - decay) * first.detach()
    torch.testing.assert_close(optimizer.state[first]["ema"], expected)
    assert torch.equal(optimizer.state[second]["ema"], second)
    assert "ema" not in optimizer.state[third]


@pytest.mark.parametrize("case", ["sgd", "sgd-momentum", "adamw"])
def test_asked_for_later_it_begins_with_the_parameter(case):
    """Momentum and step counts go on as they were."""
    torch.manual_seed(0)
    params = make_parameters([20])
    others = copies(params)
    ours, plain = named(case).make_ours(params), named(case).make_ours(others)
    for step in range(4):
        if step == 2:
            ours.param_groups[0]["ema_decay"] = 0.75
            start = params[0].detach().clone()
        draw_gradients(params, others)
        ours.step()
        plain.step()
        if step == 2:
            follows = named(case).name == "sgd"  # which keeps nothing that would tell a first step
            expected = params[0] if follows else 0.75 * start + 0.25 * params[0]
            torch.testing.assert_close(ours.state[params[0]]["ema"], expected.detach())
    assert torch.equal(params[0], others[0])


def test_for_evaluation_the_parameters_hold_it():
    params, optimizer = trained(named("adamw"))
    weights, kept = [p.detach().clone() for p in params], [average.clone() for average in averages(params, optimizer)]
    with optimizer.swap_ema():
        assert all(torch.equal(p, average) for p, average in zip(params, kept, strict=True))
        with pytest.raises(RuntimeError, match="step after the block"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="already"), optimizer.swap_ema():
            pass
    assert all(torch.equal(p, weight) for p, weight in zip(params, weights, strict=True))
    assert all(map(torch.equal, averages(params, optimizer), kept))
    draw_gradients(params)
    optimizer.step()
    assert not torch.equal(params[0], weights[0])


def test_after_an_error_the_parameters_are_back():
    params, optimizer = trained(named("sgd"))
    weights = [p.detach().clone() for p in params]
    with pytest.raises(ZeroDivisionError), optimizer.swap_ema():
        1 / 0  # noqa: B018
    assert all(torch.equal(p, weight) for p, weight in zip(params, weights, strict=True))
    optimizer.step()


def test_without_an_average_there_is_nothing_to_hold():
    optimizer = fusedopt.AdamW(make_parameters([3]))
    with pytest.raises(RuntimeError, match="construct it with ema_decay"), optimizer.swap_ema():
        pass


@pytest.mark.parametrize("case", ["sgd", "sgd-momentum", "adamw", "lion"])
def test_a_checkpoint_goes_on_to_the_same_bits(case, tmp_path):
    params, optimizer = trained(named(case))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    others = copies(params)
    other = named(case).make_ours(others, ema_decay=0.5)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.param_groups[0]["ema_decay"] == 0.9
    for _ in range(2):
        draw_gradients(params, others)
        optimizer.step()
        other.step()
    torch.testing.assert_close(averages(others, other), averages(params, optimizer), rtol=0, atol=0)


def test_torch_loads_a_checkpoint_with_averages():
    params, optimizer = trained(named("adamw"))
    others = copies(params)
    theirs = torch.optim.AdamW(others)
    theirs.load_state_dict(optimizer.state_dict())
    draw_gradients(others)
    theirs.step()


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)

    def forward(self, x):
        return self.second(self.first(x).relu())


def test_from_and_to_averaged_model():
    torch.manual_seed(0)
    model = Net()
    optimizer = fusedopt.AdamW(model.parameters(), ema_decay=0.9)
    for _ in range(3):
        draw_gradients(list(model.parameters()))
        optimizer.step()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer.store_ema(model, averaged)
    for p, expected in zip(model.parameters(), averaged.module.parameters(), strict=True):
        assert torch.equal(optimizer.state[p]["ema"], expected)
    assert int(averaged.n_averaged) > 0
    draw_gradients(list(model.parameters()))
    optimizer.step()
    averaged.update_parameters(model)
    for p, expected in zip(model.parameters(), averaged.module.parameters(), strict=True):
        torch.testing.assert_close(optimizer.state[p]["ema"], expected.detach(), rtol=0, atol=1e-6)

    plain = fusedopt.AdamW(model.parameters())  # has not kept one so far
    plain.load_state_dict(optimizer.state_dict() | {"state": torch_state(optimizer)})
    plain.param_groups[0]["ema_decay"] = 0.9
    plain.load_ema(model, averaged)
    draw_gradients(list(model.parameters()))
    plain.step()
    averaged.update_parameters(model)
    for p, expected in zip(model.parameters(), averaged.module.parameters(), strict=True):
        torch.testing.assert_close(plain.state[p]["ema"], expected.detach(), rtol=0, atol=1e-6)


def torch_state(optimizer) -> dict:
    """The state as torch's class would have it."""
    return {
        key: {name: value for name, value in state.items() if name != "ema"}
        for key, state in optimizer.state_dict()["state"].items()
    }


def test_an_averaged_model_of_another_model_is_refused():
    model = Net()
    optimizer = fusedopt.AdamW(model.parameters(), ema_decay=0.9)
    other = AveragedModel(torch.nn.Linear(3, 4))
    for exchange in (optimizer.store_ema, optimizer.load_ema):
        with pytest.raises(ValueError, match=r"has no parameter 'first.weight' of the same shape"):
            exchange(model, other)


def test_deepcopy_keeps_it():
    params, optimizer = trained(named("adam"))
    other = copy.deepcopy(optimizer)
    found = [state["ema"] for state in other.state.values()]
    torch.testing.assert_close(found, averages(params, optimizer), rtol=0, atol=0)


def own_update(p, g, ema, lr):
    return p - lr * g, ema + g


def own_coefficients(step, lr):
    return (lr,)


class OwnAverage(RuleOptimizer):
    rule = Rule(own_update, own_coefficients, states=("ema",))
    hyperparameters = {"lr": 0.1}  # noqa: RUF012


def test_a_rule_whose_own_state_has_the_name_is_refused():
    params = make_parameters([3])
    optimizer = OwnAverage(params, ema_decay=0.9)
    draw_gradients(params)
    with pytest.raises(RuleError, match="ema_decay keeps the state ema, which the rule has for its own"):
        optimizer.step()
    OwnAverage(params).step()
