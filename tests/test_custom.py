"""Optimizers of one's own: what a class declares becomes a fused optimizer with all that one has, or an error with a remedy."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch

import fusedopt
from cases import copies, draw_gradients, make_parameters
from fusedopt.custom import Rule, RuleError, RuleOptimizer, maximum, power, sign, sqrt, where
from fusedopt.kernels import backends
from snapshot import same_bits


def averaged_signs(p, g, exp_avg, largest, lr, beta, one_minus_beta, eps):
    exp_avg = beta * exp_avg + one_minus_beta * sign(g)
    largest = maximum(largest, exp_avg * exp_avg)
    return p - lr * (exp_avg / (sqrt(largest) + eps)), exp_avg, largest


def averaged_signs_coefficients(step, warmth, lr, beta1, eps, power_of_step):
    warmth = warmth * beta1
    return lr * (1.0 - warmth) / power(step, power_of_step), beta1, 1.0 - beta1, eps, warmth


class Signs(RuleOptimizer):
    """With everything: two states, one with a start of its own, a scalar, a power."""

    rule = Rule(averaged_signs, averaged_signs_coefficients, states=("exp_avg", "largest"), scalars=("warmth",))
    hyperparameters = {"lr": 0.1, "beta1": 0.5, "eps": 1e-3, "power_of_step": 0.5}  # noqa: RUF012
    initial = {"largest": 0.25, "warmth": 1.0}  # noqa: RUF012


def by_hand(params, gradients, lr=0.1, beta=0.5, eps=1e-3, exponent=0.5, weight_decay=0.0):
    """The same in float64, written out."""
    params = [p.detach().double() for p in params]
    exp_avgs, largests, warmth = [0.0 * p for p in params], [0.25 + 0.0 * p for p in params], 1.0
    for step, own in enumerate(gradients, 1):
        warmth *= beta
        for i, g in enumerate(own):
            params[i] = params[i] * (1 - lr * weight_decay)
            exp_avgs[i] = beta * exp_avgs[i] + (1 - beta) * g.double().sign()
            largests[i] = torch.maximum(largests[i], exp_avgs[i] ** 2)
            params[i] = params[i] - lr * (1 - warmth) / step**exponent * exp_avgs[i] / (largests[i].sqrt() + eps)
    return params


@pytest.mark.parametrize("backend", ["numba", "numpy", "tensor"])
def test_steps_are_those_of_the_formula(backend):
    params = make_parameters([(33,), (4, 5), ()])
    optimizer = Signs(params, weight_decay=0.1)
    start, gradients = copies(params), []
    with backends.use(backend):
        for _ in range(6):
            draw_gradients(params)
            gradients.append([p.grad.clone() for p in params])
            optimizer.step()
    for p, right in zip(params, by_hand(start, gradients, weight_decay=0.1), strict=True):
        torch.testing.assert_close(p.detach().double(), right, rtol=1e-6, atol=1e-6)


def test_groups_schedulers_and_late_gradients():
    params = make_parameters([(9,), (7,)])
    optimizer = Signs([{"params": params[:1], "lr": 0.01}, {"params": params[1:], "beta1": 0.9}])
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.1]
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    start, gradients = copies(params), []
    for step in range(4):
        draw_gradients(params)
        if step == 0:
            params[1].grad = None
        gradients.append([p.grad for p in params])
        optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in params] == [4, 3]
    assert [float(optimizer.state[p]["warmth"]) for p in params] == [0.5**4, pytest.approx(0.9**3)]
    (right,) = by_hand(start[:1], [own[:1] for own in gradients], lr=0.01)
    torch.testing.assert_close(params[0].detach().double(), right, rtol=1e-6, atol=1e-6)
    (right,) = by_hand(start[1:], [own[1:] for own in gradients[1:]], beta=0.9)
    torch.testing.assert_close(params[1].detach().double(), right, rtol=1e-6, atol=1e-6)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.005


@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_a_checkpoint_goes_on_where_it_was_taken(way):
    params = make_parameters([(33,), (4, 5)])
    optimizer = Signs(params)
    for _ in range(3):
        draw_gradients(params)
        optimizer.step()
    if way == "state_dict":
        others = copies(params)
        other = Signs(others, lr=0.7)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        both = (params, optimizer)
        others, other = copy.deepcopy(both) if way == "deepcopy" else pickle.loads(pickle.dumps(both))
    for _ in range(3):
        draw_gradients(params, others)
        optimizer.step()
        other.step()
    assert all(map(same_bits, params, others))


def test_what_it_says_of_itself():
    params = make_parameters([(3,)])
    assert "lr: 0.1" in repr(Signs(params))
    assert "-> numba" in Signs(params).explain()
    assert "-> tensor (fused=False, but torch has no optimizer of this form)" in Signs(params, fused=False).explain()


def declare(**attributes):
    return type("Mine", (RuleOptimizer,), attributes)


def plain(p, g, lr):
    return (p - lr * g,)


def plain_coefficients(step, lr):
    return (lr,)


RULE = Rule(plain, plain_coefficients)
BAD_CLASSES = {
    "no rule": ({"hyperparameters": {"lr": 0.1}}, "must set `rule`"),
    "no hyperparameters": ({"rule": RULE}, "must set `rule`, a fusedopt.custom.Rule, and `hyperparameters`"),
    "no learning rate": ({"rule": RULE, "hyperparameters": {"beta": 0.1}}, "with 'lr'"),
    "a hyperparameter too many": ({"rule": RULE, "hyperparameters": {"lr": 0.1, "beta": 0.1}}, "take it in `coefficients`"),
    "a hyperparameter missing": ({"rule": Signs.rule, "hyperparameters": {"lr": 0.1, "beta1": 0.1}}, "give each a default"),
    "an option of every optimizer": (
        {"rule": RULE, "hyperparameters": {"lr": 0.1, "weight_decay": 0.5}},
        "names weight_decay, which every optimizer has as an option",
    ),
    "a start of no state": ({"rule": RULE, "hyperparameters": {"lr": 0.1}, "initial": {"sum": 1.0}}, "names \\['sum'\\]"),
}


@pytest.mark.parametrize(("attributes", "message"), BAD_CLASSES.values(), ids=BAD_CLASSES.keys())
def test_a_class_that_cannot_work_is_refused_when_it_is_defined(attributes, message):
    with pytest.raises(RuleError, match=message):
        declare(**attributes)


def of_coefficients_alone(p, g, lr, floor):
    return (p - maximum(lr, sqrt(floor)) * where(lr > floor, g, lr) * sign(floor),)


def of_coefficients_alone_coefficients(step, average, lr, floor):
    # Divides by zero where the average is one, and it starts at zero.
    return lr / (1.0 - average), floor, average


def test_functions_of_coefficients_alone():
    """On numbers, in a rule that operations of torch run; and tried with the scalars that parameters have."""
    one = declare(
        rule=Rule(of_coefficients_alone, of_coefficients_alone_coefficients, scalars=("average",)),
        hyperparameters={"lr": 0.1, "floor": 0.0625},
    )
    results = []
    for backend in ("numba", "numpy", "tensor"):
        param = torch.nn.Parameter(torch.ones(5))
        optimizer = one([param])
        param.grad = torch.arange(5.0)
        with backends.use(backend):
            optimizer.step()
        results.append(param.detach())
    assert torch.equal(results[0], results[1])
    torch.testing.assert_close(results[2], results[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": 0.9}, "it must be two numbers"),
        ({"betas": (0.9,)}, "it must be two numbers"),
        ({"lr": (0.1, 0.2)}, "must be a number"),
    ],
    ids=str,
)
def test_pairs_and_numbers_are_told_apart(options, message):
    with pytest.raises(TypeError, match=message):
        fusedopt.Lion(make_parameters([(3,)]), **options)


def branches(p, g, lr):
    if lr > p:
        p = g
    return (p,)


def literal(p, g, lr):
    return (p - 2.0 * lr * g,)


def calls(p, g, lr):
    return (p - lr * torch.tanh(g),)


def forgets(p, g, exp_avg, lr):
    return (p - lr * exp_avg,)


BAD_RULES = {
    "an if": (branches, (), 1, "branches or loops: use where"),
    "a literal": (literal, (), 1, "holds the literal 2.0: make it a coefficient"),
    "a foreign function": (calls, (), 1, "calls `torch.tanh`"),
    "a state not returned": (forgets, ("exp_avg",), 1, "returns 1, not 2 results"),
    "a state not declared": (forgets, (), 0, "takes the coefficients exp_avg, lr"),
}


@pytest.mark.parametrize(("rule", "states", "line", "message"), BAD_RULES.values(), ids=BAD_RULES.keys())
def test_a_bad_rule_names_the_line_and_the_remedy(rule, states, line, message):
    at = inspect.getsourcelines(rule)[1] + line if line else inspect.getsourcelines(plain_coefficients)[1] + 1
    with pytest.raises(RuleError, match=message) as error:
        Rule(rule, plain_coefficients, states=states)
    assert f"{__file__}:{at}" in str(error.value)


def test_a_rule_without_source_is_refused_with_words():
    scope = {}
    exec("def update(p, g, lr):\n    return (p - lr * g,)", scope)
    with pytest.raises(RuleError, match="define the rule in a file or a notebook's cell"):
        Rule(scope["update"], plain_coefficients)


BAD_ARGUMENTS = {
    "an unknown one": ({"beta": 0.9}, TypeError, "Signs has no hyperparameter beta: it has lr, beta1, eps, power_of_step"),
    "no number": ({"beta1": "0.9"}, TypeError, "Invalid beta1: '0.9'"),
    "a negative rate": ({"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
    "a negative decay": ({"weight_decay": -1.0}, ValueError, "Invalid weight_decay value: -1.0"),
    "a long tensor": ({"lr": torch.ones(2)}, ValueError, "Tensor lr must be 1-element"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys())
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        Signs(make_parameters([3]), **arguments)


def test_sparse_gradients_are_refused():
    params = make_parameters([(3, 4)])
    params[0].grad = torch.ones(3, 4).to_sparse()
    with pytest.raises(RuntimeError, match="Signs does not support sparse gradients"):
        Signs(params).step()


def test_sign_is_the_same_everywhere():
    def update(p, g, lr):
        return (p - lr * where(g != g, p, sign(g)),)

    rule = Rule(update, plain_coefficients)
    mine = declare(rule=rule, hyperparameters={"lr": 1.0})
    values = torch.tensor([3.0, -2.0, 0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45])
    found = {}
    for backend in ("numba", "numpy", "tensor"):
        p = torch.nn.Parameter(torch.zeros(9))
        p.grad = values.clone()
        with backends.use(backend):
            mine([p]).step()
        found[backend] = p.detach()
    assert found["numba"].tolist() == [-1, 1, 0, 0, -1, 1, 0, -1, 1]
    assert same_bits(found["numba"], found["numpy"])
    assert same_bits(found["numba"], found["tensor"])
