"""A step in three parts: plan (sort parameters into buckets), validate (that the plan still holds), run (launch)."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusedopt.kernels import backends, layout
from fusedopt.kernels.rule import Update
from fusedopt.kernels.tables import BY_ADDRESS, Bucket, Hyperparameters, Kind, Launch, LossScale, Member, kind_of

#: Most patterns of missing gradients that a bucket remembers as checked.
_PATTERNS = 16


class _Part:
    """A bucket, and what must not have changed for it to hold."""

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        self.indices = [member.index for member in bucket.members]
        self._whole = self.indices == list(range(len(self.indices)))
        self._state_dicts = [member.state for member in bucket.members]
        self._counted = bucket.members[0].counted
        # States are told apart by identity and address alone: nothing changes the shape of one in place.
        self._metadata = layout.Metadata(bucket.parameters)
        self._gradient_patterns: dict[bytes, layout.Metadata] = {}
        self._gradient_addresses: list[int] = []
        planned = [torch.empty_like(m.parameter, device="meta") if m.gradient is None else m.gradient for m in bucket.members]
        self._planned = [_description(tensor) for tensor in planned]
        for member in bucket.members:
            member.gradient = None  # a plan outlives gradients, and must not keep their memory
        self._ready: set[Kind] = set()
        self._kinds = (bucket.kind, replace(bucket.kind, unscale=True))
        self._everyone = numpy.ones(len(bucket.members), bool)
        # Kernels write past autograd's eyes; without this it would use what is no longer there. Tensors made in inference
        # mode have no version.
        self._versioned = [tensor for tensor in bucket.written if not tensor.is_inference()]

    def attach(self) -> None:
        """Complete the states of all members; their step counts become views of the bucket's."""
        self._place_steps()  # first, as in torch's states
        for member in self.bucket.members:
            member.attach()

    def _place_steps(self) -> None:
        if self._counted:
            for state, view in zip(self._state_dicts, self.bucket.step_views, strict=True):
                state["step"] = view

    def count_on_device(self) -> None:
        """Have the device count steps, and compute coefficients, from now on."""
        if not self.bucket.on_device:
            self.bucket.count_on_device()
            self._place_steps()

    def holds(self) -> bool:
        """Whether parameters and states are the tensors, of the kinds and in the places, that the bucket has noted."""
        bucket = self.bucket
        try:
            for name, column in zip(bucket.kind.update.states, bucket.states, strict=True):
                if not all(map(operator.is_, map(operator.itemgetter(name), self._state_dicts), column)):
                    return False
            if self._counted and not all(map(operator.is_, map(operator.itemgetter("step"), self._state_dicts), bucket.step_views)):
                return False
        except KeyError:
            return False
        return self._metadata.matches(bucket.parameters) and bucket.addresses_hold()

    def gradients(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None] | None:
        """Return this bucket's gradients, or None where one is not of the kind that was planned for."""
        own = list(gradients) if self._whole and len(gradients) == len(self.indices) else [gradients[i] for i in self.indices]
        present = own if _all_present(own) else [gradient for gradient in own if gradient is not None]
        pattern = b"" if present is own else bytes(gradient is not None for gradient in own)
        known = self._gradient_patterns.get(pattern)
        if known is not None:
            return own if known.matches(present) else None  # type: ignore[arg-type]
        for gradient, parameter, planned in zip(own, self.bucket.parameters, self._planned, strict=True):
            if gradient is not None and (_description(gradient) != planned or gradient.device != parameter.device):
                return None
        if len(self._gradient_patterns) >= _PATTERNS:
            self._gradient_patterns.clear()
        self._gradient_patterns[pattern] = layout.Metadata(present)  # type: ignore[arg-type]
        return own

    def launch(
        self,
        gradients: list[Tensor | None],
        hyperparameters: Sequence[Hyperparameters],
        loss_scale: LossScale | None,
        inverse_scale: float | None,
    ) -> Launch:
        """Return what the backend needs for a step."""
        bucket = self.bucket
        kind = self._kinds[loss_scale is not None and loss_scale.grad_scale is not None]
        active, chunks, elements = self._everyone, bucket.chunks, bucket.elements
        if not _all_present(gradients):
            active = numpy.array([gradient is not None for gradient in gradients])
            chunks = numpy.ascontiguousarray(bucket.chunks[active[bucket.chunks[:, 0]]])
            elements = int(chunks[:, 2].sum())
        if bucket.by_address:
            self._read_gradient_addresses(gradients, active)
        # Where copies stand in for tensors, their addresses are this step's alone.
        addresses = bucket.addresses.copy() if bucket.stands_in else bucket.addresses
        if bucket.on_device:
            rows, coefficients = numpy.zeros(0, numpy.int64), None
        else:
            representatives, rows = bucket.rows(active)
            coefficients = coefficient_rows(bucket, kind, representatives, hyperparameters, inverse_scale)
            loss_scale = None
        return Launch(kind, gradients, active, addresses, chunks, elements, rows, coefficients, hyperparameters, loss_scale)

    def _read_gradient_addresses(self, gradients: list[Tensor | None], active: NDArray[numpy.bool_]) -> None:
        """Raise for gradients without memory; put copies in place of those that lie across their parameter."""
        bucket = self.bucket
        if active is self._everyone:
            found = list(map(Tensor.data_ptr, gradients))  # type: ignore[arg-type]
        else:
            found = [0 if gradient is None else gradient.data_ptr() for gradient in gradients]
        if found == self._gradient_addresses:
            return  # looked at before
        self._gradient_addresses = []
        addresses = bucket.addresses
        addresses[1] = found
        if 0 in found:
            for index in numpy.flatnonzero((addresses[1] == 0) & active & (bucket.sizes > 0)).tolist():
                raise RuntimeError(f"the gradient of parameter {self.indices[index]} has no memory: its storage was freed")
        # Written element by element, a step would read there what it has already changed.
        distance = addresses[1] - addresses[0]
        across = numpy.flatnonzero(numpy.abs(distance) < bucket.bytes).tolist()
        for index in across:
            if distance[index] != 0 and active[index]:
                copy = gradients[index].clone()  # type: ignore[union-attr]
                gradients[index], addresses[1, index] = copy, copy.data_ptr()
                bucket.parameters[index].grad = copy  # which may be written as well, to unscale it
        if not across:
            self._gradient_addresses = found

    def prepare(self, launch: Launch) -> None:
        """Have the kernel ready that ``launch`` needs."""
        if launch.kind not in self._ready:
            backends.prepare(self.bucket.backend, launch.kind)
            self._ready.add(launch.kind)

    def run(self, launch: Launch) -> None:
        """Take the step."""
        bucket = self.bucket
        stand_ins = bucket.stand_in(launch) if bucket.stands_in else []
        backends.run(bucket, launch)
        if stand_ins:
            bucket.give_back(stand_ins, launch.kind.unscale)
        if not bucket.on_device:
            bucket.advance(launch.active)
        if bucket.by_address:
            torch.autograd.graph.increment_version(self._versioned)
            if launch.kind.unscale:
                torch.autograd.graph.increment_version([g for g in launch.gradients if g is not None])


def _description(gradient: Tensor) -> tuple[object, ...]:
    strides = gradient.stride() if gradient.layout == torch.strided else None
    return gradient.dtype, gradient.layout, gradient.shape, strides, layout.is_literal(gradient)


def _all_present(gradients: Sequence[Tensor | None]) -> bool:
    return all(map(operator.is_not, gradients, itertools.repeat(None)))


def coefficient_rows(
    bucket: Bucket,
    kind: Kind,
    rows: Sequence[tuple[int, int]],
    hyperparameters: Sequence[Hyperparameters],
    inverse_scale: float | None,
) -> NDArray[Any]:
    """Return the coefficients of the (group, representative) ``rows``: computed in float64, rounded once."""
    update, counts = kind.update, bucket.steps.numpy()
    scale = 1.0 if inverse_scale is None else inverse_scale
    known: dict[tuple[Hyperparameters, float], tuple[float, ...]] = {}
    table = []
    for group, representative in rows:
        own = hyperparameters[group]
        step = counts.item(representative) + 1.0
        row = known.get((own, step))
        if row is None:
            row = known[own, step] = (scale, *update.coefficients(step, own.maximize, [float(value) for value in own.values]))
        table.append(row)
    return numpy.array(table, numpy.float64 if kind.compute.dtype == torch.float64 else numpy.float32)


class Plan:
    """The buckets of an optimizer's parameters.

    Args:
        members: parameters with whole states; no two of them share memory.
        updates: by group.
        names: the name of the backend for each member.
    """

    def __init__(self, members: Sequence[Member], updates: Sequence[Update], names: Sequence[str]) -> None:
        sorted_members: dict[tuple[object, ...], list[Member]] = {}
        for member, name in zip(members, names, strict=True):
            update = updates[member.group]
            kind = check_member(member, update, name)
            if name == "numba" and any(form.dtype == torch.float16 for form in kind.formats) and backends.half_obstacle():
                name = "tensor"
            sorted_members.setdefault((name, member.parameter.device, kind, member.counted, member.capturable), []).append(member)
        self.parts = [
            _Part(Bucket(name, kind, group))  # type: ignore[arg-type]
            for (name, _, kind, *_), group in sorted_members.items()
        ]

    def attach(self) -> None:
        """Complete the states of all members; until then nothing has been written to them."""
        for part in self.parts:
            part.attach()

    def gradients(self, gradients: Sequence[Tensor | None]) -> list[list[Tensor | None]] | None:
        """Return the gradients by bucket, or None where the plan no longer holds."""
        by_part = []
        for part in self.parts:
            own = part.gradients(gradients)
            if own is None or not part.holds():
                return None
            by_part.append(own)
        return by_part

    def launches(
        self,
        gradients: Sequence[list[Tensor | None]],
        hyperparameters: Sequence[Hyperparameters],
        loss_scale: LossScale | None = None,
    ) -> list[Launch | None]:
        """Return all that a step needs, checked; nothing is left to run if a scaler has found infinities.

        Args:
            gradients: as :meth:`gradients` returned them.
            hyperparameters: by group.
            loss_scale: what a gradient scaler asks for (default: None).

        Raises:
            RuntimeError: if a gradient has no memory.
        """
        for part in self.parts:
            # A host that reads what the scaler found would wait for the device.
            if part.bucket.backend == "triton" and (loss_scale is not None or part.bucket.members[0].capturable):
                part.count_on_device()
        inverse_scale = None
        if loss_scale is not None and not all(part.bucket.on_device for part in self.parts):
            if loss_scale.skips():
                return [None] * len(self.parts)
            inverse_scale = loss_scale.inverse()
        launches = [
            part.launch(own, hyperparameters, loss_scale, inverse_scale) if any(g is not None for g in own) else None
            for part, own in zip(self.parts, gradients, strict=True)
        ]
        for part, launch in zip(self.parts, launches, strict=True):
            if launch is not None:
                part.prepare(launch)
        return launches

    def run(self, launches: Sequence[Launch | None]) -> None:
        """Take the step."""
        for part, launch in zip(self.parts, launches, strict=True):
            if launch is not None:
                part.run(launch)


def check_member(member: Member, update: Update, name: str) -> Kind:
    """Return what ``member`` needs of the backend ``name``.

    Raises:
        RuntimeError: if a state is not of the parameter's shape or device, something has no memory or shares its own, or no
            backend can store its dtypes.
    """
    _check_states(member, update)
    if name in BY_ADDRESS:
        _check_memory(member, update)
    kind = kind_of(update, member)
    if kind is None:
        raise RuntimeError(describe_dtypes(member, update))
    return kind


def _check_states(member: Member, update: Update) -> None:
    parameter = member.parameter
    for name in update.states:
        state = member.tensor(name)
        if state.shape != parameter.shape or state.device != parameter.device or state.layout != torch.strided:
            raise RuntimeError(
                f"the state {name!r} of parameter {member.index} has shape {tuple(state.shape)} on {state.device} "
                f"({state.layout}), but the parameter has shape {tuple(parameter.shape)} on {parameter.device}: load a "
                "checkpoint of the same model, or delete this parameter's state"
            )
        if layout.overlaps_itself(state):
            raise RuntimeError(
                f"the state {name!r} of parameter {member.index} has strides {state.stride()}, so that elements share "
                "memory: replace it by a clone"
            )


def _check_memory(member: Member, update: Update) -> None:
    tensors = {"parameter": member.parameter, "gradient of parameter": member.gradient}
    tensors |= {f"state {name!r} of parameter": member.tensor(name) for name in update.states}
    for what, tensor in tensors.items():
        if tensor is not None and layout.is_plain_memory(tensor) and tensor.numel() > 0:
            end = layout.extent(tensor)[1] - tensor.untyped_storage().data_ptr()
            if tensor.data_ptr() == 0 or end > tensor.untyped_storage().nbytes():
                raise RuntimeError(
                    f"the {what} {member.index}, of shape {tuple(tensor.shape)}, has no memory: its storage was freed or made "
                    "smaller; restore it before the step"
                )


def describe_dtypes(member: Member, update: Update) -> str:
    """Return why no backend can store the dtypes of ``member``."""
    gradient = None if member.gradient is None else member.gradient.dtype
    states = {name: member.tensor(name).dtype for name in update.states}
    return (
        f"parameter {member.index} has dtype {member.parameter.dtype}, its gradient {gradient}, its states {states}; "
        "fusedopt updates float32, float64, bfloat16 and float16 in any mix, and complex64 and complex128 unmixed: "
        "convert the parameter, or the state"
    )


def waves(members: Sequence[Member]) -> list[list[Member]]:
    """Return ``members`` in waves: those that share memory or a state with an earlier one step after it, as in torch's loop.

    Args:
        members: in the order in which they step.
    """
    extents = numpy.array([layout.extent(member.parameter) for member in members], numpy.int64).reshape(-1, 2)
    distinct = {id(member.parameter) for member in members}, {id(member.state) for member in members}
    order = numpy.lexsort((extents[:, 1], extents[:, 0]))
    starts, ends = extents[order].T
    apart = len(members) < 2 or not (starts[1:] < numpy.maximum.accumulate(ends)[:-1]).any()
    if apart and all(len(each) == len(members) for each in distinct):
        return [list(members)]
    wave_of: list[int] = []
    for index, (start, end) in enumerate(extents.tolist()):
        touching = [
            wave_of[earlier]
            for earlier in range(index)
            if (start < extents[earlier, 1] and extents[earlier, 0] < end)
            or members[earlier].parameter is members[index].parameter
            or members[earlier].state is members[index].state
        ]
        wave_of.append(1 + max(touching, default=-1))
    return [[m for m, own in zip(members, wave_of, strict=True) if own == wave] for wave in range(max(wave_of) + 1)]
