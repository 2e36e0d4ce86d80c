"""Gradients that join the first moment before the step, where that is their sum: no memory is kept for them between passes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._compile import _disable_dynamo

from fusedopt import low_bit, paths
from fusedopt.kernels import backends
from fusedopt.kernels.members import waves
from fusedopt.kernels.plan import Plan
from fusedopt.kernels.rule import Rule, Update
from fusedopt.kernels.rules import gradient_into_averaged_momentum, gradient_into_momentum
from fusedopt.kernels.tables import BY_ADDRESS, Hyperparameters, Member
from fusedopt.prepared import new_state, same_objects
from fusedopt.settings import live_number

#: The state that gradients join.
MOMENT = "momentum_buffer"

_updates = {rule: Update(rule) for rule in (gradient_into_momentum, gradient_into_averaged_momentum)}


class _Joining:
    """A plan that adds gradients to moments, and the tensors that it was made for."""

    def __init__(self, plan: Plan, moments: list[Tensor | None], key: object) -> None:
        self.plan, self.moments, self.key = plan, moments, key


class Accumulated:
    """What has joined first moments since the last step."""

    def __init__(self) -> None:
        #: By group, the hyperparameters with which the step goes on.
        self.hyperparameters: dict[int, tuple[Any, ...]] = {}
        self.parameters: dict[Tensor, None] = {}
        #: Parameters whose moment began with it: their next step is the first.
        self.begun: set[Tensor] = set()


class Accumulating(torch.optim.Optimizer):
    """The part of an optimizer that adds gradients to first moments."""

    _accumulated: Accumulated | None = None
    _joining: _Joining | None = None

    if TYPE_CHECKING:

        def _update(self, group: dict[str, Any], decays: bool) -> Update: ...

    def _accumulation(self, group: dict[str, Any]) -> Rule:  # noqa: ARG002  # for subclasses
        """Return how the gradients of ``group`` join the moment, or raise RuntimeError with the reason why they cannot."""
        raise RuntimeError(
            f"{type(self).__name__}.accumulate() would not be exact: an update is no function of the sum of gradients and one "
            "moment that holds it (a second moment needs the square of the sum); leave gradients to add up in .grad"
        )

    def accumulate(self) -> None:
        """Add all gradients to the first moments and drop them; for all passes of a step but the last, in place of ``step()``.

        The next ``step()`` takes the sum of all gradients, as if they had been added up in ``.grad``, but for rounding: with k
        passes each of its terms is rounded at most 2 k + 6 times more or less often. Weight decay enters once, in the step.
        ``SGD`` with momentum, but without Nesterov's and without dampening, and ``Momentum`` can.

        Raises:
            RuntimeError: if it would not be exact; nothing has been changed then.
        """
        if torch.compiler.is_compiling() or get_eval_frame_callback() is not None:
            self._accumulate_uncompiled()
        else:
            self._accumulate()

    @_disable_dynamo
    def _accumulate_uncompiled(self) -> None:
        self._accumulate()

    @torch.no_grad()
    def _accumulate(self) -> None:
        groups = self.param_groups
        for group in groups:
            _refuse_options(group)
        updates = [_updates[self._accumulation(group)] for group in groups]
        parameters: list[Tensor] = [p for group in groups for p in group["params"]]
        gradients = [parameter.grad for parameter in parameters]
        if all(gradient is None for gradient in gradients):
            return
        hyperparameters = [
            Hyperparameters(tuple(live_number(group[name], group) for name in update.hyperparameters), bool(group["maximize"]))
            for group, update in zip(groups, updates, strict=True)
        ]
        moments = [self._moment(parameter) for parameter in parameters]
        key = (updates, [len(group["params"]) for group in groups], backends.state())
        joining, by_part = self._joining, None
        covered = all(gradient is None or moment is not None for gradient, moment in zip(gradients, moments, strict=True))
        if joining is not None and covered and joining.key == key and same_objects(joining.moments, moments):
            by_part = joining.plan.gradients(gradients)
        begun: list[int] = []
        if by_part is None or joining is None:
            joining, begun = self._plan_accumulation(updates, gradients, moments, key)
            by_part = joining.plan.gradients(gradients)
            assert by_part is not None
        launches = joining.plan.launches(by_part, hyperparameters)
        self._joining = joining
        accumulated = self._accumulated = self._accumulated or Accumulated()
        for index in begun:
            moment = joining.moments[index]
            assert moment is not None
            self.state[parameters[index]][MOMENT] = moment
            accumulated.begun.add(parameters[index])
        joining.plan.run(launches)
        for number, own in enumerate(hyperparameters):
            accumulated.hyperparameters[number] = own.values
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                accumulated.parameters[parameter] = None
                parameter.grad = None

    def _moment(self, parameter: Tensor) -> Tensor | None:
        moment = (self.state.get(parameter) or {}).get(MOMENT)
        return moment if isinstance(moment, Tensor) else None

    def _moment_dtype(self, group: dict[str, Any], parameter: Tensor, index: int) -> torch.dtype:
        """Return the dtype of a moment that is begun; raise RuntimeError if moments are kept in fewer bits than gradients are."""
        form = low_bit.formats(self._update(group, False), group, parameter, index).get(MOMENT)
        coded = f"{MOMENT}_words" in (self.state.get(parameter) or {})
        if coded or (form is not None and (form.chance or form.words)):
            raise RuntimeError(
                f"accumulate() would round moments, which state_format={group['state_format']!r} keeps in few bits, in each pass: "
                "leave gradients to add up in .grad, or keep the moments in float32"
            )
        return parameter.dtype if form is None else form.dtype

    def _plan_accumulation(
        self, updates: list[Update], gradients: list[Tensor | None], moments: list[Tensor | None], key: object
    ) -> tuple[_Joining, list[int]]:
        """Return a plan for all parameters with gradients or moments, and the indices of moments that it has made."""
        members, names, begun, held, index = [], [], [], list(moments), -1
        for number, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                index += 1
                gradient, moment = gradients[index], moments[index]
                if gradient is None and moment is None:
                    continue
                if gradient is not None and gradient.layout != torch.strided:
                    raise RuntimeError("accumulate() takes no sparse gradients: leave them to add up in .grad")
                path, _ = paths.choose(self, parameter, gradient, group)  # type: ignore[arg-type]
                paths.check(index, parameter, gradient, group, path)
                if path == "torch":  # which has no such thing: what was asked for is to go without a kernel
                    name, _ = backends.choose(parameter, gradient)
                    path = "tensor" if name in BY_ADDRESS else name
                dtype = self._moment_dtype(group, parameter, index)
                if moment is None:
                    with torch.inference_mode(False):
                        held[index] = moment = new_state(parameter, 0.0).to(dtype)
                    begun.append(index)
                members.append(Member(moment, index, gradient, number, 0.0, (), False, bool(group.get("capturable")), {}, {}))
                names.append(path)
        if len({parameter for group in self.param_groups for parameter in group["params"]}) < index + 1 or len(waves(members)) > 1:
            raise RuntimeError("accumulate() adds to each moment once, but a parameter is listed twice: leave the doubles out")
        return _Joining(Plan(members, updates, names), held, key), begun

    def _begins(self, parameter: Tensor) -> bool:
        """Whether the next step of ``parameter``, which has a moment, is its first."""
        return self._accumulated is not None and parameter in self._accumulated.begun

    def _check_accumulated(self) -> None:
        """Raise RuntimeError if the step could not go on from what has joined the moments."""
        accumulated = self._accumulated
        if accumulated is None:
            return
        if getattr(self, "found_inf", None) is not None or getattr(self, "grad_scale", None) is not None:
            raise RuntimeError(
                "accumulate() has added gradients that a gradient scaler had scaled to the moments, which only the scaler could "
                "make right: leave gradients to add up in .grad where a scaler is used"
            )
        for number, values in accumulated.hyperparameters.items():
            group = self.param_groups[number]
            update = _updates[self._accumulation(group)]
            now = tuple(live_number(group[name], group) for name in update.hyperparameters)
            if now != values:
                raise RuntimeError(
                    f"{', '.join(update.hyperparameters)} of group {number} was {values} when accumulate() added gradients to the "
                    f"moments, and is {now} in the step: it must not change in between"
                )

    def _complete_gradients(self) -> None:
        """Give parameters whose gradients have all joined the moment a gradient of zero, for they step as well."""
        for parameter in self._accumulated.parameters if self._accumulated is not None else ():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)


def _refuse_options(group: dict[str, Any]) -> None:
    for name in ("max_grad_norm", "skip_nonfinite", "differentiable"):
        if group.get(name) not in (None, False):
            raise RuntimeError(
                f"accumulate() keeps no gradients, and {name}={group[name]} asks for the sum of all: leave them to add up in .grad"
            )
