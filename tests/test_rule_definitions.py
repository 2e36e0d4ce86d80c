"""Rules that not every backend could compile, or that ask for what they do not declare, are refused where they are defined."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from cases import copies, draw_gradients, make_parameters
from fusedopt.kernels import backends
from fusedopt.kernels.math import where
from fusedopt.kernels.rule import Rule, Update
from fusedopt.kernels.source import RuleError
from fusedopt.optimizer import FusedOptimizer
from snapshot import refused, same_bits


def lr_alone(step, lr):
    return (lr,)


def state_not_declared(p, g, velocity, lr):
    velocity = velocity + g
    return p - lr * velocity, velocity


def state_not_declared_nor_returned(p, g, velocity, lr):
    return (p - lr * velocity,)


def state_of_another_name(p, g, speed, lr):
    speed = speed + g
    return p - lr * speed, speed


def state_not_returned(p, g, velocity, lr):
    return (p - lr * velocity,)


def no_tuple(p, g, lr):
    return p - lr * g


def no_return(p, g, lr):
    p = p - lr * g


def literal(p, g, lr):
    return (p - lr * (g + 1.0),)


def branch(p, g, lr):
    if g > p:
        g = p
    return (p - lr * g,)


def loop(p, g, lr):
    for _ in range(3):
        p = p - lr * g
    return (p,)


def conditional(p, g, lr):
    return (p - lr * (g if g > p else p),)


def powers(p, g, lr):
    return (p - lr * g**lr,)


def methods(p, g, lr):
    return (p - lr * g.sqrt(),)


def foreign_function(p, g, lr):
    return (p - lr * torch.sqrt(g),)


def inverted(p, g, lr):
    return (where(~(g > p), p, g),)


def negated(p, g, lr):
    return (lr * -g,)


SCALE = 0.5


def reads_a_global(p, g, lr):
    return (p - lr * SCALE * g,)


def in_place(p, g, lr):
    p -= lr * g
    return (p,)


@pytest.mark.parametrize(
    ("update", "states", "message"),
    [
        (state_not_declared, (), "returns 2, not 1 results"),
        (state_not_returned, ("velocity",), "returns 1, not 2 results"),
        (state_of_another_name, ("velocity",), "must take p, g, velocity first"),
        (no_tuple, (), "return a tuple of 1"),
        (no_return, (), "return p"),
        (literal, (), "literal 1.0"),
        (branch, (), "where"),
        (loop, (), "branches or loops"),
        (conditional, (), "where"),
        (powers, (), "products"),
        (methods, (), "calls `g.sqrt`"),
        (foreign_function, (), "calls `torch.sqrt`"),
        (inverted, (), "turn the comparison around"),
        (reads_a_global, (), "reads `SCALE`"),
        (in_place, (), "plain assignments"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_rule_is_refused_where_it_is_defined(update, states, message):
    with pytest.raises(RuleError, match=message) as raised:
        Rule(update, lr_alone, states=states)
    assert update.__name__ in str(raised.value)


def descent(p, g, lr):
    return (p - lr * g,)


def branching(step, lr):
    if step > 3:
        lr = 0.5 * lr
    return (lr,)


def of_another_module(step, lr):
    return (math.exp(-step) * lr,)


def enclosing(rate):
    def coefficients(step, lr):
        return (rate * lr,)

    return coefficients


@pytest.mark.parametrize(
    ("coefficients", "message"),
    [(branching, "branches or loops"), (of_another_module, "calls `math.exp`"), (enclosing(0.5), "reads `rate` of the function")],
    ids=["branch", "function of another module", "closure"],
)
def test_coefficients_that_no_gpu_could_compute_are_refused_where_they_are_defined(coefficients, message):
    with pytest.raises(RuleError, match=message):
        Rule(descent, coefficients)


def test_message_names_the_line():
    with pytest.raises(RuleError, match=rf"test_rule_definitions.py:{literal.__code__.co_firstlineno + 1}:"):
        Rule(literal, lr_alone)


def test_rule_that_asks_for_a_coefficient_it_does_not_get():
    """An undeclared state that is not returned looks like a coefficient, which its function must return then."""
    try:
        update = Update(Rule(state_not_declared_nor_returned, lr_alone))
    except RuleError as error:
        message = str(error)
    else:
        params = make_parameters([(5,)])
        draw_gradients(params)
        message = refused(optimizer_of(update)(params, lr=0.1), (RuleError, RuntimeError, TypeError, ValueError))
    assert "velocity" in message
    assert "coefficient" in message or "state" in message


# --- and rules that are right work from anywhere -------------------------------------------------------------------------------


def optimizer_of(update):
    class Own(FusedOptimizer):
        _counts_steps = False

        def __init__(self, params, lr):
            super().__init__(params, {"lr": lr, "weight_decay": 0, "maximize": False, "fused": None, "differentiable": False})

        def _update(self, group, decays):
            return update

        def _torch_lacks(self, group):
            return "torch has no such optimizer"

    return Own


def halved(x, half):
    return x * half


def own(p, g, velocity, lr, half):
    velocity = halved(velocity, half) + g
    return p - lr * velocity, velocity


def own_coefficients(step, lr):
    return lr, 0.5


@pytest.mark.parametrize("backend", ["numba", "numpy", "tensor", pytest.param("triton", marks=pytest.mark.triton)])
def test_a_sign_before_zero(backend):
    """0 - x is not -x there."""
    params = [torch.nn.Parameter(torch.ones(4))]
    optimizer = optimizer_of(Update(Rule(negated, lr_alone)))(params, lr=1.0)
    params[0].grad = torch.tensor([0.0, -0.0, 1.0, torch.inf])
    with backends.use(backend):
        optimizer.step()
    assert same_bits(params[0], -params[0].grad)


@pytest.mark.parametrize("backend", ["numba", "tensor", pytest.param("triton", marks=pytest.mark.triton)])
def test_rule_of_a_users_own_with_a_helper(backend):
    update = Update(Rule(own, own_coefficients, states=("velocity",)))
    params = make_parameters([(33,), (4, 6)])
    plain = copies(params)
    optimizer, reference = optimizer_of(update)(params, lr=0.1), optimizer_of(update)(plain, lr=0.1)
    velocities = [torch.zeros_like(p) for p in params]
    for _ in range(3):
        draw_gradients(params, plain)
        expected = []
        for p, velocity in zip(params, velocities, strict=True):
            velocity.mul_(0.5).add_(p.grad)
            expected.append(p.detach() - torch.tensor(0.1) * velocity)
        with backends.use(backend):
            optimizer.step()
        with backends.use("numpy"):
            reference.step()
        assert all(map(same_bits, params, plain))
        assert all(map(torch.equal, params, expected))
    saved = copy.deepcopy(optimizer.state_dict())
    assert list(saved["state"][0]) == ["velocity"]
