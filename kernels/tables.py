"""Buckets: parameters of one device, update and set of formats, with the tables that one launch walks."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusedopt.kernels import layout
from fusedopt.kernels.formats import FORMATS, Format, compute_dtype, real_dtype
from fusedopt.kernels.rule import Update

#: Elements a chunk: a CPU thread claims one at a time, and the four float32 arrays of Adam (256 KiB) stay in its L2 cache.
CHUNK = 16_384

#: Backends that are given the addresses of tensors; the others take tensors.
BY_ADDRESS = ("numba", "triton")


@dataclass(frozen=True)
class Kind:
    """What one kernel is compiled for.

    Args:
        update: the rule behind its decay.
        formats: of the parameter, its gradient and its states.
        unscale: whether gradients are multiplied by the inverse loss scale, and stored so, before the update.
        zero_grad: whether zeros are stored to gradients.
    """

    update: Update
    formats: tuple[Format, ...]
    unscale: bool = False
    zero_grad: bool = False

    @functools.cached_property
    def chance(self) -> bool:
        """Whether something is rounded by chance; each tensor then has a key and a first index among its addresses."""
        return any(form.chance for form in self.formats)

    @functools.cached_property
    def coded(self) -> bool:
        """Whether elements are more, or less, than numbers of one dtype."""
        return self.chance or any(form.master is not None for form in self.formats)

    @functools.cached_property
    def tensors(self) -> tuple[str, ...]:
        """The names of a parameter's tensors in its state: the update's, its master, and the words of blocks of codes."""
        master = ("master",) if self.formats[0].master is not None else ()
        coded = (name for name, form in zip(self.update.states, self.formats[2:], strict=True) if form.words)
        return (*self.update.states, *master, *(f"{name}_words" for name in coded))

    @functools.cached_property
    def row_length(self) -> int:
        """How many numbers a row of coefficients has: the inverse loss scale, the update's, and the step if chance needs it."""
        return 1 + self.update.coefficient_count + self.chance

    @functools.cached_property
    def compute(self) -> Format:
        """The format of the arithmetic."""
        return FORMATS[compute_dtype(self.formats[0].dtype)]

    @property
    def name(self) -> str:
        """A readable name, not unique: rules of different modules may share one."""
        formats = "_".join(form.name for form in self.formats)
        return f"{self.update.name}_{formats}{'_unscale' if self.unscale else ''}{'_zero_grad' if self.zero_grad else ''}"


@dataclass(frozen=True)
class Hyperparameters:
    """The hyperparameters of one group at one step.

    Args:
        values: in the order of ``Update.hyperparameters``; a tensor only where the device computes coefficients.
        maximize: whether to climb.
    """

    values: tuple[float | Tensor, ...]
    maximize: bool = False


@dataclass(frozen=True)
class LossScale:
    """What a gradient scaler asks of a step.

    Args:
        found_inf: one number, in a tensor or not; the step is left out where it is not zero. A scaler sums it over devices,
            and the sum over none is a plain 0.
        grad_scale: one number, which gradients are divided by first; None where they are unscaled already.
    """

    found_inf: Tensor | float | None
    grad_scale: Tensor | float | None

    def skips(self) -> bool:
        """Whether the step is left out; waits for the device."""
        return self.found_inf is not None and float(self.found_inf) != 0

    def inverse(self) -> float | None:
        """Return the inverse of the scale as torch's ``unscale_`` has it: in float64, rounded to float32; or None."""
        return None if self.grad_scale is None else float(numpy.float32(1.0 / float(self.grad_scale)))

    def unscale(self, parameters: Sequence[Tensor]) -> None:
        """Multiply the gradients of ``parameters`` by the inverse scale, in place where they can hold it."""
        inverse = self.inverse()
        if inverse is None:
            return
        for parameter in parameters:
            gradient = parameter.grad
            if gradient is not None and gradient.layout == torch.strided and layout.overlaps_itself(gradient):
                parameter.grad = gradient * inverse
            elif gradient is not None:
                gradient.mul_(inverse)


@dataclass
class Member:
    """One parameter of a bucket.

    Args:
        parameter: written in place.
        index: of the parameter in the caller's lists.
        gradient: of the parameter's shape; as it is when the bucket is made, or None.
        group: index of the group whose hyperparameters hold.
        step: how many steps the parameter has taken.
        scalars: the rule's other numbers of the parameter.
        counted: whether the count stands in ``state["step"]``.
        capturable: whether the count must stand on the parameter's device.
        state: the parameter's state, by name; its tensors are written in place.
        new: parts of the state that :meth:`attach` adds to it.
    """

    parameter: Tensor
    index: int
    gradient: Tensor | None
    group: int
    step: float
    scalars: tuple[float, ...]
    counted: bool
    capturable: bool
    state: dict[str, Any]
    new: dict[str, Tensor]
    #: Parts of the state that :meth:`attach` takes out.
    dropped: Sequence[str] = ()
    #: Formats that dtypes do not tell: of states by name, of the parameter as "p".
    formats: Mapping[str, Format] = field(default_factory=dict)
    #: Where the random bits of its elements come from, and the index of the first among those of all ranks.
    key: int = 0
    first: int = 0

    def tensor(self, name: str) -> Tensor:
        """Return a part of the state, attached or not."""
        tensor: Tensor = self.new[name] if name in self.new else self.state[name]
        return tensor

    @property
    def extras(self) -> list[str]:
        """The names of the tensors that formats have beside those of the update's states."""
        master = any(form.master is not None for form in self.formats.values())
        return [*(["master"] if master else []), *(f"{name}_words" for name, form in self.formats.items() if form.words)]

    def attach(self) -> None:
        """Complete the state."""
        self.state.update(self.new)
        for name in self.dropped:
            self.state.pop(name, None)
        self.new, self.dropped = {}, ()


@dataclass
class Launch:
    """What a backend needs for one step of a bucket; arrays of NumPy.

    Args:
        kind: what the kernel is compiled for.
        gradients: by tensor; None where there is none and the tensor rests. Empty where their addresses suffice.
        active: whether each tensor takes part.
        addresses: [2 + states, tensors], of parameters, gradients, states.
        chunks: [chunks, 3], of tensor, first element and length.
        elements: in all chunks.
        row_of_tensor: [tensors], the row of coefficients of each.
        group_of_row: [rows], the group of each.
        coefficients: [rows, 1 + coefficients], in the dtype of the arithmetic; the inverse loss scale stands first. None
            where the device computes them, from what follows.
        scalars: [rows, scalars], those after the step, in float64.
        hyperparameters: by group.
        loss_scale: what a gradient scaler asks for, or None.
        zero_grad: whether gradients must be zero in the end and the kernel does not make them so.
        stand_ins: what :meth:`Bucket.stand_in` has put into the addresses.
        factors: by group, what gradients are clipped by where the device computes coefficients; or None.
        placed: the tables of this step on the device, kept by the backend.
    """

    kind: Kind
    gradients: Sequence[Tensor | None]
    active: NDArray[numpy.bool_]
    addresses: NDArray[numpy.int64]
    chunks: NDArray[numpy.int64]
    elements: int
    row_of_tensor: NDArray[numpy.int64]
    group_of_row: NDArray[numpy.int64]
    coefficients: NDArray[Any] | None
    scalars: NDArray[numpy.float64]
    hyperparameters: Sequence[Hyperparameters]
    loss_scale: LossScale | None
    zero_grad: bool = False
    stand_ins: list[tuple[Tensor, Tensor, int, int]] = field(default_factory=list)
    factors: Tensor | None = None
    placed: Any = None


def kind_of(update: Update, member: Member) -> Kind | None:
    """Return what ``member`` needs a kernel for, or None where its dtypes are not ones that kernels store."""
    gradient = member.parameter if member.gradient is None else member.gradient
    tensors = {"p": member.parameter, "g": gradient, **{name: member.tensor(name) for name in update.states}}
    formats = tuple(member.formats.get(name, FORMATS.get(real_dtype(tensor.dtype))) for name, tensor in tensors.items())
    if any(form is None for form in formats) or len({tensor.is_complex() for tensor in tensors.values()}) > 1:
        return None
    return Kind(update, formats)  # type: ignore[arg-type]


def chunk_table(sizes: NDArray[numpy.int64], length: int) -> NDArray[numpy.int64]:
    """Return [chunks, 3]: tensor, first element and count, of tensors of ``sizes`` cut into pieces of ``length``."""
    pieces = -(-sizes // length)
    tensor = numpy.repeat(numpy.arange(len(sizes)), pieces)
    start = (numpy.arange(len(tensor)) - numpy.repeat(numpy.cumsum(pieces) - pieces, pieces)) * length
    return numpy.ascontiguousarray(numpy.stack([tensor, start, numpy.minimum(sizes[tensor] - start, length)], axis=1))


class Bucket:
    """Parameters that one launch updates, and its tables.

    Args:
        backend: name of the backend that runs it.
        kind: what its kernel is compiled for.
        members: the parameters.
    """

    def __init__(self, backend: str, kind: Kind, members: Sequence[Member]) -> None:
        self.backend, self.kind = backend, kind
        self.members = list(members)
        #: What the optimizer holds, and what of it is on this rank: kernels walk memory, operations of torch take the whole.
        self.held_parameters = [member.parameter for member in members]
        self.held_states = [[member.tensor(name) for member in members] for name in kind.tensors]
        self.sharded = backend != "tensor" and any(map(layout.is_sharded, self.held_parameters))
        self.parameters = [self.part(tensor) for tensor in self.held_parameters]
        self.states = [[self.part(tensor) for tensor in column] for column in self.held_states]
        self.groups = numpy.array([member.group for member in members], numpy.int64)
        self.written = [*self.parameters, *(tensor for column in self.states for tensor in column)]
        # A complex element is two numbers.
        self.sizes = numpy.array([p.numel() * (2 if p.is_complex() else 1) for p in self.parameters], numpy.int64)
        # How far apart a gradient and its parameter lie if they do not overlap.
        self.bytes = self.sizes * max(form.itemsize for form in kind.formats[:2])
        self.chunks = chunk_table(self.sizes, CHUNK)
        self.everyone = numpy.ones(len(self.members), bool)
        rows = 2 + len(self.states)
        self.addresses = numpy.zeros((rows + 2 * kind.chance, len(self.members)), numpy.int64)
        if kind.chance:
            self.addresses[rows:] = [[member.key for member in members], [member.first for member in members]]
        self.by_address = backend in BY_ADDRESS
        self.written_addresses: list[int] = []
        self.stands_in: list[tuple[int, int]] = []
        if self.by_address:
            self._read_addresses()
            self.stands_in = self._find_stand_ins()
        # One vector of step counts, which a single addition advances, and one of each other scalar.
        with torch.inference_mode(False), torch.no_grad():  # they outlive the mode, and are written outside of it
            columns = [(member.step, *member.scalars) for member in members]
            self._set_scalars(torch.tensor(columns, dtype=self._step_dtype(), device="cpu").t().contiguous())
        #: Whether the device counts steps and computes coefficients by itself.
        self.on_device = False
        #: What the backend keeps for this bucket.
        self.tables: Any = None
        self._rows: list[tuple[int, int]] | None = None
        #: For which tensors, and for which numbers, the rows hold.
        self._rows_active: NDArray[numpy.bool_] | None = None
        self._rows_numbers = b""
        self._row_of_tensor: NDArray[numpy.int64] = numpy.zeros(0, numpy.int64)

    def _set_scalars(self, scalars: Tensor) -> None:
        #: [1 + scalars, tensors]; step counts first.
        self.scalars = scalars
        #: The same numbers where the host counts.
        self.numbers = scalars.numpy() if scalars.device.type == "cpu" else numpy.zeros((0, 0))
        #: What stands in the parameters' states: the numbers of each tensor, by name.
        names = ("step", *self.kind.update.scalars) if self.members[0].counted else self.kind.update.scalars
        first = len(scalars) - len(names)
        self.scalar_views = {name: list(row.unbind()) for name, row in zip(names, scalars[first:], strict=True)}

    def part(self, tensor: Tensor) -> Tensor:
        """Return what of ``tensor`` is given to the backend."""
        return layout.local(tensor) if self.sharded else tensor

    def _step_dtype(self) -> torch.dtype:
        held = [member.state.get("step") for member in self.members]
        if any(isinstance(step, Tensor) and step.dtype == torch.float64 for step in held):
            return torch.float64
        return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32

    def _read_addresses(self) -> None:
        self.written_addresses = list(map(Tensor.data_ptr, self.written))
        count = len(self.members)
        self.addresses[0] = self.written_addresses[:count]
        self.addresses[1] = 0
        for row in range(len(self.states)):
            self.addresses[2 + row] = self.written_addresses[(1 + row) * count : (2 + row) * count]

    def addresses_hold(self) -> bool:
        """Whether parameters and states lie where they lay."""
        return not self.by_address or list(map(Tensor.data_ptr, self.written)) == self.written_addresses

    def _find_stand_ins(self) -> list[tuple[int, int]]:
        # A kernel walks all arrays of a tensor by one offset. Where one of them is laid out otherwise than
        # torch.empty_like(parameter), a dense copy in that layout stands in for it during the step.
        found = []
        for index, member in enumerate(self.members):
            parameter, gradient = self.parameters[index], member.gradient
            dense = torch.empty_like(parameter, device="meta")
            # The words of blocks, which come last, are laid out as they are made.
            states = [column[index] for name, column in zip(self.kind.tensors, self.states, strict=True) if self._walks(name)]
            arrays = (parameter, None if gradient is None else self.part(gradient), *states)
            for row, tensor in enumerate(arrays):
                if tensor is not None and not (layout.same_layout(tensor, dense) and layout.is_literal(tensor)):
                    found.append((row, index))
        return found

    def _walks(self, name: str) -> bool:
        """Whether the tensor ``name`` of a state is of its parameter's elements."""
        return name in self.kind.update.states or name == "master"

    def count_on_device(self) -> None:
        """Move the step counts to the device of the parameters, for good."""
        with torch.inference_mode(False), torch.no_grad():
            self._set_scalars(self.scalars.to(self.parameters[0].device))
        self.on_device = True

    def stand_in(self, launch: Launch) -> list[tuple[Tensor, Tensor, int, int]]:
        """Put dense copies into the launch's addresses where layouts differ; return (original, copy, row, tensor)."""
        pairs = []
        for row, index in self.stands_in:
            columns = (self.parameters, launch.gradients, *self.states)
            original = columns[row][index]
            if original is None or not launch.active[index]:
                continue
            copy = torch.empty_like(self.parameters[index], dtype=original.dtype).copy_(original)
            launch.addresses[row, index] = copy.data_ptr()
            pairs.append((original, copy, row, index))
        return pairs

    def give_back(self, pairs: Sequence[tuple[Tensor, Tensor, int, int]], unscaled: bool) -> None:
        """Write what stood in for others back to them, for gradients if they were ``unscaled``."""
        for original, copy, row, index in pairs:
            if row != 1:
                original.copy_(copy)
            elif unscaled:
                if layout.overlaps_itself(original):
                    self.parameters[index].grad = copy  # an expanded gradient cannot hold it
                else:
                    original.copy_(copy)

    def advance(self, launch: Launch) -> None:
        """Count a step of the active tensors of ``launch``, and give them their new scalars."""
        active = launch.active
        if self.kind.update.scalars:
            rows = launch.row_of_tensor[active]
            self.numbers[1:, active] = launch.scalars[rows].T
        self.numbers[0] += 1 if active is self.everyone else active
        torch.autograd.graph.increment_version([self.scalars])
        self._rows_numbers = self.numbers.tobytes()  # those that advance together stay together

    def rows(self, active: NDArray[numpy.bool_]) -> tuple[list[tuple[int, int]], NDArray[numpy.int64]]:
        """Return the distinct (group, tensor that represents it) of active tensors, and each tensor's index into them.

        Tensors of a group that have taken equally many steps, and agree in other scalars, share a row of coefficients.
        """
        # Rows hold until other tensors advance, or somebody writes a number.
        if self._rows is not None and self._rows_active is active and self.numbers.tobytes() == self._rows_numbers:
            return self._rows, self._row_of_tensor
        keys = numpy.concatenate([self.groups[None], self.numbers.astype(numpy.float64)])[:, active]
        _, first, inverse = numpy.unique(keys, axis=1, return_index=True, return_inverse=True)
        representatives = numpy.flatnonzero(active)[first]
        self._rows = [(int(self.groups[index]), int(index)) for index in representatives]
        self._row_of_tensor = numpy.zeros(len(self.members), numpy.int64)
        self._row_of_tensor[active] = inverse.reshape(-1)
        self._rows_active = active
        return self._rows, self._row_of_tensor
