"""Some parameters of an optimizer that step together, before the others: by an optimizer of their own that shares all else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch.nn.parameter import is_lazy

from fusedopt.kernels import layout
from fusedopt.kernels.norms import Clip, Clipping, clip
from fusedopt.kernels.plan import Plan
from fusedopt.kernels.tables import Launch, LossScale
from fusedopt.optimizer import FusedOptimizer


class Norm:
    """The norm of the gradients of all units, measured one unit after the other before any of them steps."""

    def __init__(self) -> None:
        self._squares: Tensor | None = None
        self._clipping: Clipping | None = None
        #: What follows from the norm, once all units are measured.
        self.outcome: Clip | None = None
        #: Whether all gradients are finite.
        self.finite = True

    def add(self, plan: Plan, launches: Sequence[Launch | None], clipping: Clipping) -> None:
        """Add the gradients of ``launches`` to the norm."""
        squares = plan.clip(launches, clipping).norms.square()
        self._squares = squares if self._squares is None else self._squares + squares.to(self._squares.device)
        self._clipping = clipping

    def close(self) -> None:
        """Decide how the step clips, and whether it is left out; waits for the device."""
        if self._squares is not None and self._clipping is not None:
            self.outcome = clip(self._squares.sqrt(), self._clipping)
            self.finite = bool(self.outcome.finite)

    @property
    def norms(self) -> Tensor | None:
        """The norms by scope; None where no gradient was there."""
        return None if self.outcome is None else self.outcome.norms


class _Part(FusedOptimizer):
    """An optimizer of some of the parameters; how it clips follows from the gradients of all."""

    found_inf: Tensor | float | None = None
    grad_scale: Tensor | float | None = None
    _norm: Norm | None = None
    _measures = False
    #: Of the parameters of the whole optimizer.
    _numbers: dict[Tensor, int] | None = None

    def _number_of(self, parameter: Tensor, index: int) -> int:
        return index if self._numbers is None else self._numbers[parameter]

    @torch.no_grad()
    def _take_step(self) -> None:
        # As FusedOptimizer.step does.
        if torch.compiler.is_compiling() or get_eval_frame_callback() is not None:
            self._step_uncompiled(False)
        else:
            self._step()

    def _clip(self, plan: Plan, launches: Sequence[Launch | None], clipping: Clipping) -> bool:
        assert self._norm is not None
        if self._measures:
            self._norm.add(plan, launches, clipping)
            return False
        # What was not measured is not clipped: these gradients are all empty.
        if self._norm.outcome is not None:
            for part, launch in zip(plan.parts, launches, strict=True):
                if launch is not None:
                    part.clip(launch, self._norm.outcome.factors)
        return True


_part_classes: dict[type[FusedOptimizer], type[_Part]] = {}


def _part_class(kind: type[FusedOptimizer]) -> type[_Part]:
    if kind not in _part_classes:
        _part_classes[kind] = type(kind.__name__, (_Part, kind), {})
    return _part_classes[kind]


def _size_of(parameter: Tensor) -> int:
    """Return the bytes of a gradient of ``parameter`` on this rank."""
    own = layout.local(parameter)
    return own.numel() * own.element_size()


class Unit:
    """Parameters of one device that step together.

    Hyperparameters are those of the whole optimizer at that moment, and states are the very same.

    Args:
        optimizer: the whole one.
    """

    def __init__(self, optimizer: FusedOptimizer) -> None:
        self._whole = optimizer
        kind = _part_class(type(optimizer))
        self._part = kind.__new__(kind)
        # Whatever else its class keeps for itself.
        own = set(vars(FusedOptimizer)) | {"state", "param_groups"}
        vars(self._part).update({name: value for name, value in vars(optimizer).items() if name not in own})
        self._part.state = defaultdict(dict)
        self.parameters: list[Tensor] = []
        #: Those whose gradients wait for this unit's step.
        self._ready: dict[int, Tensor] = {}
        self.ready_bytes = 0
        #: Of gradients, by id() of the parameter.
        self._sizes: dict[int, int] = {}
        self.bytes = 0
        #: Whether parameters may still join.
        self.open = True
        self._members: list[list[Tensor]] = []
        #: On which gradients were computed.
        self._streams: set[torch.cuda.Stream] = set()

    def add(self, parameter: Tensor) -> None:
        """Have ``parameter`` step with this unit from now on."""
        self.parameters.append(parameter)
        self._sizes[id(parameter)] = _size_of(parameter)
        self.bytes += self._sizes[id(parameter)]
        self._members = []

    def leave(self, parameter: Tensor) -> None:
        """Have ``parameter`` step without this unit from now on."""
        self.parameters = [each for each in self.parameters if each is not parameter]
        self.bytes -= self._sizes.pop(id(parameter))
        self._members = []

    def wait(self, parameter: Tensor) -> None:
        """Have the gradient of ``parameter`` wait for this unit's step."""
        key = id(parameter)
        if key not in self._ready:
            self._ready[key] = parameter
            self.ready_bytes += self._sizes[key]
            if parameter.is_cuda:
                self._streams.add(torch.cuda.current_stream(parameter.device))

    def regroup(self) -> None:
        """Find out anew which groups the parameters are in."""
        self._members = []

    @property
    def complete(self) -> bool:
        """Whether all gradients are there."""
        return not self.open and len(self._ready) == len(self.parameters)

    @property
    def plan(self) -> Plan | None:
        """What it has planned last."""
        return None if self._part._prepared is None else self._part._prepared.plan

    def measure(self, norm: Norm, loss_scale: LossScale | None) -> None:
        """Add the gradients that are ready to ``norm``."""
        self._run(self._part._take_step, norm, loss_scale, measures=True)

    def step(self, norm: Norm | None, loss_scale: LossScale | None) -> None:
        """Update the parameters that are ready; wholly, or not at all if an error is raised.

        Args:
            norm: what clips, or None.
            loss_scale: what a gradient scaler asks for, or None.
        """
        self._run(self._part._take_step, norm, loss_scale)

    def accumulate(self) -> None:
        """Add the gradients that are ready to the first moments."""
        self._run(self._part.accumulate)

    def free(self) -> None:
        """Drop the gradients that are ready."""
        for parameter in self._ready.values():
            parameter.grad = None
        self._ready.clear()
        self.ready_bytes = 0

    def _run(
        self, act: Callable[[], None], norm: Norm | None = None, loss_scale: LossScale | None = None, measures: bool = False
    ) -> None:
        part, whole = self._part, self._whole
        part.param_groups = self._groups(norm is not None)
        part._norm, part._measures = norm, measures
        shared = ("_warned", "_accumulated", "_versions")
        for name in shared:
            setattr(part, name, getattr(whole, name))
        part.found_inf = None if loss_scale is None else loss_scale.found_inf
        part.grad_scale = None if loss_scale is None else loss_scale.grad_scale
        self._share_state()
        self._join_streams()
        # Of an earlier pass; more is to come in this one.
        unfinished = []
        if len(self._ready) < len(self.parameters):
            unfinished = [(p, p.grad) for p in self.parameters if id(p) not in self._ready]
        for parameter, _ in unfinished:
            parameter.grad = None
        try:
            act()
        finally:
            for parameter, gradient in unfinished:
                parameter.grad = gradient
            for name in shared:
                setattr(whole, name, getattr(part, name))
            whole.state.update(part.state)

    def _groups(self, measured: bool) -> list[dict[str, Any]]:
        groups = self._whole.param_groups
        if not self._members:
            group_of = {parameter: number for number, group in enumerate(groups) for parameter in group["params"]}
            self._part._numbers = {parameter: number for number, parameter in enumerate(group_of)}
            self._members = [[] for _ in groups]
            for parameter in self.parameters:
                self._members[group_of[parameter]].append(parameter)
        # Freed gradients need not be zero; and what a scaler or a norm leaves out is known by the norm alone.
        own = {"zero_grad_in_step": False, **({"skip_nonfinite": True} if measured else {})}
        return [{**group, **own, "params": members} for group, members in zip(groups, self._members, strict=True)]

    def _join_streams(self) -> None:
        """Have the current stream wait for those on which gradients were computed."""
        if self._streams:
            current = torch.cuda.current_stream(self.parameters[0].device)
            for stream in self._streams - {current}:
                current.wait_stream(stream)
                for parameter in self._ready.values():
                    if parameter.grad is not None:
                        layout.local(parameter.grad).record_stream(current)
            self._streams.clear()

    def _share_state(self) -> None:
        """Take up the states as they are in the whole optimizer, which may have loaded others."""
        own, shared = self._part.state, self._whole.state
        for parameter in self.parameters:
            state = shared.get(parameter)
            if state:
                own[parameter] = state
            else:
                own.pop(parameter, None)


def check_apart(parameters: list[Tensor]) -> None:
    """Raise ValueError if parameters share memory, which must step in the order of the groups."""
    held = [layout.local(parameter) for parameter in parameters if not is_lazy(parameter)]
    extents = numpy.array([layout.extent(each) for each in held], numpy.int64).reshape(-1, 2)
    starts, ends = extents[numpy.lexsort((extents[:, 1], extents[:, 0]))].T
    if (starts[1:] < numpy.maximum.accumulate(ends)[:-1]).any() or len(set(parameters)) < len(parameters):
        raise ValueError(
            "parameters share memory, or one is listed twice: they would step in the order of their gradients, and not in that of "
            "the groups; leave the doubles out"
        )
