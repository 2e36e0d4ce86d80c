"""What a rule is: its function, its states and its coefficients, checked when it is defined; and rules put together."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fusedopt.kernels import math as kernel_math
from fusedopt.kernels import source


def bind(function: Callable[..., Any], names: Mapping[str, Any]) -> Callable[..., Any]:
    """Copy ``function`` with other globals, its helpers likewise; its source file and lines survive."""
    namespace = {**function.__globals__, **names}
    for helper in source.helpers(function):
        namespace[helper.__name__] = bind(helper, names)
    return types.FunctionType(function.__code__, namespace, function.__name__, function.__defaults__)


@dataclass(frozen=True, eq=False)
class Decay:
    """Weight decay as a step before a rule: ``update(p, g, *coefficients) -> (p, g)``.

    Args:
        update: straight-line function on one element.
        coefficients: function of hyperparameters (its argument names) that returns the coefficients of ``update`` in order.
    """

    update: Callable[..., Any]
    coefficients: Callable[..., tuple[float, ...]]

    def __post_init__(self) -> None:
        source.check(self.update, results=2)
        source.check_coefficients(self.coefficients, source.parameters(self.update)[2:], self.update.__name__)


@dataclass(frozen=True, eq=False)
class Average:
    """What is kept of the new parameters: ``update(p, *states, *coefficients) -> (*states,)``, after a rule.

    Args:
        update: straight-line function on one element; its arguments are the new ``p``, the states by name, the coefficients.
        coefficients: function of ``step`` and hyperparameters (its argument names) that returns the coefficients in order.
        states: names of the states, which start as the parameter is.
    """

    update: Callable[..., Any]
    coefficients: Callable[..., tuple[float, ...]]
    states: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        source.check(self.update, results=len(self.states))
        source.check_coefficients(self.coefficients, source.parameters(self.update)[1 + len(self.states) :], self.update.__name__)


@dataclass(frozen=True, eq=False)
class Rule:
    """An optimizer's mathematics: ``update(p, g, *states, *coefficients) -> (p, *states)``.

    Args:
        update: straight-line function on one element; its arguments are ``p``, ``g``, the states by name, the coefficients.
        coefficients: function of ``step`` (1 at the parameter's first step), the scalars and hyperparameters (its argument
            names) that returns the coefficients of ``update`` in order, computed in float64, then the new scalars.
        states: names of the states, of the parameter's shape each.
        scalars: names of the numbers that each parameter keeps beside its step count, in state as 0-dim tensors.
        nonnegative: names of the states that are never negative; where they are kept in 8 bits they have no sign.
        relative: moments by name, with the state that bounds them: the average of squares of what they average, or of
            magnitudes. In 8 bits they are kept as quotients.
        squares: names of the states that are averages of squares, or sums.
        precise: names of the states that are as fine as parameters, and in short formats only where they are named.

    Raises:
        RuleError: if ``update`` is not what every backend can compile, or asks for what it is not given; names the line and
            the remedy.
    """

    update: Callable[..., Any]
    coefficients: Callable[..., tuple[float, ...]]
    states: tuple[str, ...] = ()
    scalars: tuple[str, ...] = ()
    nonnegative: tuple[str, ...] = ()
    relative: Mapping[str, str] = field(default_factory=dict)
    squares: tuple[str, ...] = ()
    precise: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        unknown = {*self.nonnegative, *self.squares, *self.precise, *self.relative, *self.relative.values()} - set(self.states)
        if unknown or not set(self.relative.values()) <= {*self.nonnegative, *self.squares}:
            raise source.RuleError(
                f"the rule {self.update.__name__!r} says of the states {list(self.states)} that {list(self.nonnegative)} are not "
                f"negative, {list(self.squares)} are squares and {dict(self.relative)} are relative: name its own states, and as "
                "what others are relative to those that are never negative"
            )
        source.check(self.update, results=1 + len(self.states))
        expected = ("p", "g", *self.states)
        if source.parameters(self.update)[: len(expected)] != expected:
            raise source.RuleError(
                f"the rule {self.update.__name__!r} must take {', '.join(expected)} first, as it declares the states "
                f"{list(self.states)}, but takes {', '.join(source.parameters(self.update))}: name each state that it needs "
                "in `states=`"
            )
        taken = source.parameters(self.coefficients)
        if taken[: 1 + len(self.scalars)] != ("step", *self.scalars):
            raise source.RuleError(
                f"the coefficients of the rule {self.update.__name__!r} must take {', '.join(('step', *self.scalars))} first, as "
                f"it declares the scalars {list(self.scalars)}, but {self.coefficients.__name__!r} takes {', '.join(taken)}"
            )
        returned = (*source.parameters(self.update)[len(expected) :], *(f"new {name}" for name in self.scalars))
        source.check_coefficients(self.coefficients, returned, self.update.__name__)


def _no_decay(p, g):  # type: ignore[no-untyped-def]
    return p, g


def _no_coefficients() -> tuple[float, ...]:
    return ()


#: No weight decay.
no_decay = Decay(_no_decay, _no_coefficients)


def _no_average(p):  # type: ignore[no-untyped-def]  # noqa: ARG001  # as the others
    return ()


def _no_step_coefficients(step: float) -> tuple[float, ...]:  # noqa: ARG001  # as the others
    return ()


#: Nothing is kept of the parameters.
no_average = Average(_no_average, _no_step_coefficients)


@dataclass(frozen=True, eq=False)
class Update:
    """A decay, a rule, an average: what one element of a parameter goes through in a step, in any backend.

    The coefficients of an update are the factor of the gradient (1, -1 to maximize, times what clips it), the decay's, the
    rule's and the average's.
    """

    rule: Rule
    decay: Decay = no_decay
    average: Average = no_average

    @functools.cached_property
    def _scalar(self) -> tuple[tuple[Callable[..., Any], tuple[int, ...]], ...]:
        """The functions of coefficients, bound for Python's numbers, each with the places of its hyperparameters."""
        functions = (
            (self.decay.coefficients, 0),
            (self.rule.coefficients, 1 + len(self.rule.scalars)),
            (self.average.coefficients, 1),
        )
        return tuple(
            (
                bind(function, kernel_math.SCALARS),
                tuple(self.hyperparameters.index(name) for name in source.parameters(function)[skipped:]),
            )
            for function, skipped in functions
        )

    @functools.cached_property
    def name(self) -> str:
        """What the update is called in generated files and in explanations."""
        parts = (self.decay.update, self.rule.update, self.average.update)
        return "_".join(f.__name__.strip("_") for f in parts if f not in (_no_decay, _no_average))

    @functools.cached_property
    def states(self) -> tuple[str, ...]:
        """The names of the states, the average's last."""
        return (*self.rule.states, *self.average.states)

    @functools.cached_property
    def scalars(self) -> tuple[str, ...]:
        """The names of the numbers that each parameter keeps beside its step count."""
        return self.rule.scalars

    @functools.cached_property
    def decay_names(self) -> tuple[str, ...]:
        """The names of the decay's coefficients."""
        return source.parameters(self.decay.update)[2:]

    @functools.cached_property
    def rule_names(self) -> tuple[str, ...]:
        """The names of the rule's coefficients."""
        return source.parameters(self.rule.update)[2 + len(self.rule.states) :]

    @functools.cached_property
    def average_names(self) -> tuple[str, ...]:
        """The names of the average's coefficients."""
        return source.parameters(self.average.update)[1 + len(self.average.states) :]

    @functools.cached_property
    def coefficient_count(self) -> int:
        """How many coefficients an element takes; in a kernel's row the inverse loss scale stands before them."""
        return 1 + len(self.decay_names) + len(self.rule_names) + len(self.average_names)

    @functools.cached_property
    def hyperparameters(self) -> tuple[str, ...]:
        """The names of the hyperparameters that the coefficients are computed from."""
        taken = source.parameters(self.rule.coefficients)[1 + len(self.rule.scalars) :]
        names = (*source.parameters(self.decay.coefficients), *taken, *source.parameters(self.average.coefficients)[1:])
        return tuple(dict.fromkeys(names))

    def coefficients(
        self, step: float, scalars: Sequence[float], maximize: bool, values: Sequence[float]
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return one row of coefficients, and the new scalars, in float64.

        Args:
            step: 1 at the parameter's first step.
            scalars: in the rule's order.
            maximize: whether to climb.
            values: of the hyperparameters, in the order of ``hyperparameters``.
        """
        (decay, decay_places), (rule, rule_places), (average, average_places) = self._scalar
        sign = -1.0 if maximize else 1.0
        own = rule(step, *scalars, *[values[i] for i in rule_places])
        count = len(own) - len(scalars)
        kept = average(step, *[values[i] for i in average_places])
        return (sign, *decay(*[values[i] for i in decay_places]), *own[:count], *kept), own[count:]

    def apply(
        self, names: Mapping[str, Any], p: Any, g: Any, states: Sequence[Any], coefficients: Sequence[Any]
    ) -> tuple[Any, ...]:
        """Run the update on whole arrays or tensors whose functions are ``names``; return the new ``p`` and states."""
        decay, rule, average = (bind(part.update, names) for part in (self.decay, self.rule, self.average))
        first = 1 + len(self.decay_names)
        last = first + len(self.rule_names)
        own = len(self.rule.states)
        p, g = decay(p, coefficients[0] * g, *coefficients[1:first])
        new = tuple(rule(p, g, *states[:own], *coefficients[first:last]))
        return (*new, *average(new[0], *states[own:], *coefficients[last:]))
