"""Adafactor: its mathematics, and the plan of its steps; a step needs sums over whole tensors, which no rule can express.

With factors ``a`` of rows and ``b`` of columns, whose product is one over the root of the estimated second moment, the update
of an element takes two products and a comparison; the divisions and roots are those of rows and columns, in float64.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusedopt.kernels import adafactor_tiles, layout
from fusedopt.kernels.formats import FORMATS, Format, compute_dtype
from fusedopt.kernels.math import nonzero, power, sqrt, where
from fusedopt.kernels.tables import Member

# --- the mathematics: on one element each, compiled as rules are ---------------------------------------------------------


def averaged(old, new, weight, rest):  # type: ignore[no-untyped-def]
    """Return the running average, which ``new`` enters with ``weight``, and ``old`` with the ``rest``; from the nearer end."""
    return where(weight < rest, old + weight * (new - old), new - rest * (new - old))


def averaged_square(variance, g, beta2, one_minus_beta2):  # type: ignore[no-untyped-def]
    """Return the running average of squared gradients of an element of a vector."""
    return beta2 * variance + one_minus_beta2 * g * g


def factored_update(g, row, column, largest):  # type: ignore[no-untyped-def]
    """Return the gradient of an element of a matrix over the root of its second moment, which is at least ``1 / largest``."""
    factor = row * column
    return g * where(factor > largest, largest, factor)


def divided_update(g, variance, smallest):  # type: ignore[no-untyped-def]
    """Return the gradient of an element of a vector over the root of its second moment, which is at least ``smallest``."""
    root = sqrt(variance)
    return g / where(root < smallest, smallest, root)


def moved(p, update, decay, step_size):  # type: ignore[no-untyped-def]
    """Return the element of a parameter, decayed and updated."""
    p = where(nonzero(decay), p - decay * p, p)
    return p - step_size * update


FUNCTIONS = (averaged, averaged_square, factored_update, divided_update, moved)


class Options(NamedTuple):
    """The hyperparameters of one group at one step; ``eps1`` None stands for the machine epsilon of the parameter's dtype."""

    lr: float
    beta2_decay: float
    eps1: float | None
    eps2: float
    d: float
    weight_decay: float
    maximize: bool

    def coefficients(self, step: float, dtype: torch.dtype) -> tuple[float, ...]:
        """Return the row of coefficients, in the order of ``adafactor_tiles``, at the parameter's ``step``, 1 at its first."""
        limit = min(self.lr, 1.0 / math.sqrt(step))
        eps1 = torch.finfo(dtype).eps if self.eps1 is None else self.eps1
        return (
            power(step, self.beta2_decay),
            self.lr * self.weight_decay,
            -limit if self.maximize else limit,
            eps1,
            self.eps2,
            self.d,
        )


# --- states --------------------------------------------------------------------------------------------------------------


def state_shapes(shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each state, by name, of a parameter of ``shape``."""
    if len(shape) < 2:
        return {"variance": tuple(shape)}
    return {"row_var": (*shape[:-1], 1), "col_var": (*shape[:-2], 1, shape[-1])}


@dataclass(frozen=True)
class Kind:
    """What one kernel is compiled for.

    Args:
        formats: of the parameter, its gradient and its states; a vector's one state counts twice.
    """

    formats: tuple[Format, Format, Format, Format]

    @property
    def compute(self) -> Format:
        """The format of the arithmetic on elements."""
        return FORMATS[compute_dtype(self.formats[0].dtype)]

    @property
    def name(self) -> str:
        """What the kernel's file is called."""
        return "adafactor_" + "_".join(form.name for form in self.formats)


def kind_of(member: Member) -> Kind:
    """Return what ``member`` needs a kernel for.

    Raises:
        RuntimeError: if a state is not of the shape or on the device that it must be, or a dtype is not one that kernels store.
    """
    parameter, states = member.parameter, []
    for name, shape in state_shapes(parameter.shape).items():
        state = member.tensor(name)
        if tuple(state.shape) != shape or state.device != parameter.device or state.layout != torch.strided:
            raise RuntimeError(
                f"the state {name!r} of parameter {member.index} has shape {tuple(state.shape)} on {state.device} "
                f"({state.layout}), but must have {shape} on {parameter.device}: load a checkpoint of the same model, or delete "
                "this parameter's state"
            )
        if layout.overlaps_itself(state):
            raise RuntimeError(
                f"the state {name!r} of parameter {member.index} has strides {state.stride()}, so that elements share "
                "memory: replace it by a clone"
            )
        states.append(state)
    gradient = parameter if member.gradient is None else member.gradient
    tensors = (parameter, gradient, states[0], states[-1])
    formats = tuple(FORMATS.get(tensor.dtype) for tensor in tensors)
    if any(form is None for form in formats):
        raise RuntimeError(
            f"parameter {member.index} has dtype {parameter.dtype}, its gradient {gradient.dtype}, its states "
            f"{[state.dtype for state in states]}; fusedopt updates float32, float64, bfloat16 and float16 in any mix: convert "
            "the parameter, or the state"
        )
    return Kind(formats)  # type: ignore[arg-type]


# --- the plan ------------------------------------------------------------------------------------------------------------


@dataclass
class Launch:
    """What a backend needs for one step of a bucket.

    Args:
        gradients: by tensor; None where there is none and the tensor rests.
        active: whether each tensor takes part.
        addresses: [4, tensors], of parameters, gradients and states.
        tiles: the tiles of each of the three launches, by their numbers.
        elements: in all of them.
        row_of_tensor: [tensors], the row of coefficients of each.
        coefficients: [rows, COEFFICIENT_ROW], in float64.
        stand_ins: (original, dense copy) of parameters and states whose layout is no kernel's.
    """

    gradients: list[Tensor | None]
    active: NDArray[numpy.bool_]
    addresses: NDArray[numpy.int64]
    tiles: tuple[NDArray[numpy.int64], ...]
    elements: int
    row_of_tensor: NDArray[numpy.int64]
    coefficients: NDArray[numpy.float64]
    stand_ins: list[tuple[Tensor, Tensor]]


class _Pattern(NamedTuple):
    """Which tensors of a bucket have gradients, and what follows from that."""

    active: NDArray[numpy.bool_]
    metadata: layout.Metadata
    #: Whether each gradient is of the layout that kernels walk.
    dense: bool
    tiles: tuple[NDArray[numpy.int64], ...]
    elements: int


class Bucket:
    """Parameters of one kind, and their tables.

    Args:
        kind: what the kernel is compiled for.
        members: the parameters.
    """

    def __init__(self, kind: Kind, members: Sequence[Member]) -> None:
        self.kind = kind
        self.members = list(members)
        self.indices = [member.index for member in members]
        self.parameters = [member.parameter for member in members]
        self.groups = [member.group for member in members]
        self._one_group = len(set(self.groups)) == 1
        self.names = [tuple(state_shapes(parameter.shape)) for parameter in self.parameters]
        self.states = [[member.tensor(name) for name in own] for member, own in zip(members, self.names, strict=True)]
        self.written = [*self.parameters, *(state for own in self.states for state in own)]
        self.tables = adafactor_tiles.cut([tuple(parameter.shape) for parameter in self.parameters])
        self.addresses = numpy.zeros((4, len(members)), numpy.int64)
        # How far apart a gradient and its parameter lie if they do not overlap.
        self.bytes = self.tables.tensors[:, adafactor_tiles.SIZE] * max(form.itemsize for form in kind.formats[:2])
        self.written_addresses = list(map(Tensor.data_ptr, self.written))
        self.addresses[0] = self.written_addresses[: len(members)]
        self.addresses[2] = [own[0].data_ptr() for own in self.states]
        self.addresses[3] = [own[-1].data_ptr() for own in self.states]
        #: (row, tensor) of what must be copied for a step.
        self.across = [
            (row, index)
            for index in range(len(members))
            for row, tensor in ((0, self.parameters[index]), (2, self.states[index][0]), (3, self.states[index][-1]))
            if not _is_dense(tensor) and not (row == 3 and len(self.states[index]) == 1)
        ]
        self._metadata = layout.Metadata(self.parameters)
        self._patterns: dict[bytes, _Pattern] = {}
        self._state_dicts = [member.state for member in members]
        with torch.inference_mode(False), torch.no_grad():  # they outlive the mode, and are written outside of it
            self.steps = torch.tensor([member.step for member in members], dtype=self._step_dtype(), device="cpu")
            self.step_views = list(self.steps.unbind())
        self.counts = self.steps.numpy()
        self._held: list[tuple[str, list[dict[str, Any]], list[Tensor]]] = [("step", self._state_dicts, self.step_views)]
        for name in ("row_var", "col_var", "variance"):
            places = [(i, own.index(name)) for i, own in enumerate(self.names) if name in own]
            dicts = [self._state_dicts[i] for i, _ in places]
            self._held.append((name, dicts, [self.states[i][place] for i, place in places]))
        self._versioned = [tensor for tensor in self.written if not tensor.is_inference()]
        self._planned = [None if m.gradient is None else (m.gradient.dtype, m.gradient.device) for m in members]
        for member in members:
            member.gradient = None  # a plan outlives gradients, and must not keep their memory
        #: What the backend keeps for this bucket.
        self.kept: Any = None

    def _step_dtype(self) -> torch.dtype:
        held = [member.state.get("step") for member in self.members]
        if any(isinstance(step, Tensor) and step.dtype == torch.float64 for step in held):
            return torch.float64
        return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32

    def attach(self) -> None:
        """Complete the states of all members; their step counts become views of the bucket's."""
        for member, view in zip(self.members, self.step_views, strict=True):
            member.state["step"] = view
            member.attach()

    def gradients(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None] | None:
        """Return this bucket's gradients, or None where the bucket does not hold."""
        own = [gradients[i] for i in self.indices]
        try:
            if not all(all(map(operator.is_, map(operator.itemgetter(name), dicts), held)) for name, dicts, held in self._held):
                return None
        except KeyError:
            return None
        if not self._metadata.matches(self.parameters) or list(map(Tensor.data_ptr, self.written)) != self.written_addresses:
            return None
        return own if self._pattern(own).metadata.matches([g for g in own if g is not None]) else None

    def _pattern(self, own: Sequence[Tensor | None]) -> _Pattern:
        key = bytes(gradient is not None for gradient in own)
        known = self._patterns.get(key)
        if known is not None:
            return known
        if len(self._patterns) >= 16:
            self._patterns.clear()
        active = numpy.array([gradient is not None for gradient in own], bool)
        present = [gradient for gradient in own if gradient is not None]
        table = self.tables.tiles
        taken = active[table[:, adafactor_tiles.TENSOR]]
        blocks = table[:, adafactor_tiles.SHAPE] == adafactor_tiles.BLOCK
        chosen = (taken, taken & blocks, taken & (table[:, adafactor_tiles.WHOLE] == 0))
        elements = sum(p.numel() for p, there in zip(self.parameters, active, strict=True) if there)
        tiles = tuple(numpy.flatnonzero(each) for each in chosen)
        self._patterns[key] = _Pattern(active, layout.Metadata(present), all(map(_is_dense, present)), tiles, elements)
        return self._patterns[key]

    def launch(self, own: list[Tensor | None], options: Sequence[Options]) -> Launch | None:
        """Return what a step needs; None where no gradient is there.

        Raises:
            RuntimeError: if a gradient has no memory.
        """
        pattern = self._pattern(own)
        if not pattern.active.any():
            return None
        if not pattern.dense:
            own = [None if gradient is None else _dense(gradient) for gradient in own]
        addresses = self.addresses.copy()
        addresses[1] = [0 if gradient is None else gradient.data_ptr() for gradient in own]
        for index in numpy.flatnonzero((addresses[1] == 0) & pattern.active & (self.bytes > 0)).tolist():
            raise RuntimeError(f"the gradient of parameter {self.indices[index]} has no memory: its storage was freed")
        # Written element by element, a step would read there what it has already changed.
        distances = addresses[1] - addresses[0]
        for index in numpy.flatnonzero((numpy.abs(distances) < self.bytes) & (distances != 0) & pattern.active).tolist():
            own[index] = copy = own[index].clone(memory_format=torch.contiguous_format)  # type: ignore[union-attr]
            addresses[1, index] = copy.data_ptr()
        stand_ins = []
        for row, index in self.across:
            if pattern.active[index]:
                original = self.parameters[index] if row == 0 else self.states[index][0 if row == 2 else -1]
                stand_ins.append((original, _dense(original.detach())))
                addresses[row, index] = stand_ins[-1][1].data_ptr()
        row_of_tensor, coefficients = self._coefficients(options)
        return Launch(own, pattern.active, addresses, pattern.tiles, pattern.elements, row_of_tensor, coefficients, stand_ins)

    def _coefficients(self, options: Sequence[Options]) -> tuple[NDArray[numpy.int64], NDArray[numpy.float64]]:
        rows: dict[tuple[int, float], int] = {}
        if self._one_group and (self.counts == self.counts[0]).all():
            rows, of_tensor = {(self.groups[0], float(self.counts[0])): 0}, [0] * len(self.groups)
        else:
            of_tensor = [rows.setdefault(key, len(rows)) for key in zip(self.groups, self.counts.tolist(), strict=True)]
        dtype = self.kind.formats[0].dtype
        table = [options[group].coefficients(step + 1.0, dtype) for group, step in rows]
        return numpy.array(of_tensor, numpy.int64), numpy.array(table, numpy.float64)

    def run(self, launch: Launch) -> None:
        """Take the step."""
        from fusedopt.kernels import adafactor_cpu

        adafactor_cpu.run(self, launch)
        for original, copy in launch.stand_ins:
            original.copy_(copy)
        self.counts += launch.active
        # Kernels write past autograd's eyes; without this it would use what is no longer there.
        torch.autograd.graph.increment_version([self.steps, *self._versioned])


def _is_dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and layout.is_literal(tensor)


def _dense(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_neg().clone(memory_format=torch.contiguous_format)


class Plan:
    """The buckets of an optimizer's parameters.

    Args:
        members: parameters with whole states; no two of them share memory.

    Raises:
        RuntimeError: if a kernel cannot update one.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        sorted_members: dict[Kind, list[Member]] = {}
        for member in members:
            sorted_members.setdefault(kind_of(member), []).append(member)
        self.buckets = [Bucket(kind, own) for kind, own in sorted_members.items()]

    def attach(self) -> None:
        """Complete the states of all members; until then nothing has been written to them."""
        for bucket in self.buckets:
            bucket.attach()

    def gradients(self, gradients: Sequence[Tensor | None]) -> list[list[Tensor | None]] | None:
        """Return the gradients by bucket, or None where the plan no longer holds."""
        by_bucket = []
        for bucket in self.buckets:
            own = bucket.gradients(gradients)
            if own is None:
                return None
            by_bucket.append(own)
        return by_bucket

    def launches(self, gradients: Sequence[list[Tensor | None]], options: Sequence[Options]) -> list[Launch | None]:
        """Return all that a step needs, checked.

        Args:
            gradients: as :meth:`gradients` returned them.
            options: by group.

        Raises:
            RuntimeError: if a gradient has no memory.
        """
        from fusedopt.kernels import adafactor_cpu

        launches = [bucket.launch(own, options) for bucket, own in zip(self.buckets, gradients, strict=True)]
        for bucket in self.buckets:
            adafactor_cpu.prepare(bucket.kind)
        return launches

    def run(self, launches: Sequence[Launch | None]) -> None:
        """Take the step."""
        for bucket, launch in zip(self.buckets, launches, strict=True):
            if launch is not None:
                bucket.run(launch)
