"""A bucket between steps: what must not have changed for its tables to hold, and what one step of it needs."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusedopt.kernels import backends, layout, tensor_objects
from fusedopt.kernels.tables import Bucket, Hyperparameters, Kind, Launch, LossScale

#: Most patterns of missing gradients that a bucket remembers as checked.
_PATTERNS = 16


class _Pattern(NamedTuple):
    """Which tensors of a bucket have gradients, and what follows from that."""

    active: NDArray[numpy.bool_]
    chunks: NDArray[numpy.int64]
    elements: int
    metadata: layout.Metadata


class Part:
    """A bucket, and what must not have changed for it to hold."""

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        self.indices = [member.index for member in bucket.members]
        self._whole = self.indices == list(range(len(self.indices)))
        self._state_dicts = [member.state for member in bucket.members]
        # States are told apart by identity and address alone: nothing changes the shape of one in place.
        self._metadata = layout.Metadata(bucket.parameters)
        self._patterns: dict[bytes, _Pattern] = {}
        self._pattern: _Pattern | None = None
        #: What has been noted of all tensors, and whether that still holds in this step.
        self._watch: tensor_objects.Watch | None = None
        self._unchanged = False
        self._settled: _Pattern | None = None
        planned = [
            torch.empty_like(parameter, device="meta") if member.gradient is None else bucket.part(member.gradient)
            for parameter, member in zip(bucket.parameters, bucket.members, strict=True)
        ]
        self._planned = [_description(tensor) for tensor in planned]
        for member in bucket.members:
            member.gradient = None  # a plan outlives gradients, and must not keep their memory
        self._ready: set[Kind] = set()
        #: By whether gradients are unscaled, and whether they are made zero.
        self._kinds = {(u, z): replace(bucket.kind, unscale=u, zero_grad=z) for u in (False, True) for z in (False, True)}
        # Kernels write past autograd's eyes; without this it would use what is no longer there. Tensors made in inference
        # mode have no version.
        held = [*bucket.held_parameters, *(tensor for column in bucket.held_states for tensor in column)] if bucket.sharded else []
        self._versioned = [tensor for tensor in (*bucket.written, *held) if not tensor.is_inference()]

    def attach(self) -> None:
        """Complete the states of all members; their step counts become views of the bucket's."""
        self._place_scalars()  # first, as in torch's states
        for member in self.bucket.members:
            member.attach()

    def _place_scalars(self) -> None:
        for name, views in self.bucket.scalar_views.items():
            for state, view in zip(self._state_dicts, views, strict=True):
                state[name] = view

    def count_on_device(self) -> None:
        """Have the device count steps, and compute coefficients, from now on."""
        if not self.bucket.on_device:
            self.bucket.count_on_device()
            self._place_scalars()

    def _holds_states(self) -> bool:
        bucket = self.bucket
        columns = [*zip(bucket.kind.tensors, bucket.held_states, strict=True), *bucket.scalar_views.items()]
        try:
            return all(all(map(operator.is_, map(operator.itemgetter(name), self._state_dicts), own)) for name, own in columns)
        except KeyError:
            return False

    def unchanged(self) -> bool:
        """Whether all that a step depends on is surely as it was, gradients' addresses aside."""
        self._unchanged = self._watch is not None and self._watch.watches_dicts and self._watch.unchanged()
        return self._unchanged

    def gradients(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None] | None:
        """Return this bucket's gradients, or None where the bucket does not hold.

        It holds while parameters, gradients and states are tensors of the kinds, and all but gradients in the places, that
        it has noted.
        """
        bucket = self.bucket
        own = list(gradients) if self._whole and len(gradients) == len(self.indices) else [gradients[i] for i in self.indices]
        if bucket.sharded and not self._holds_parts(own):
            return None
        own = [None if gradient is None else bucket.part(gradient) for gradient in own] if bucket.sharded else own
        self._unchanged = self._watch is not None and self._watch.unchanged()
        if not (self._unchanged and self._watch is not None and self._watch.watches_dicts) and not self._holds_states():
            return None
        if self._unchanged:
            return own
        if not (self._metadata.matches(bucket.parameters) and bucket.addresses_hold()):
            return None
        return own if self._finds_pattern(own) else None

    def _holds_parts(self, gradients: list[Tensor | None]) -> bool:
        """Whether sharded tensors have the parts that are known, and gradients are sharded as their parameters."""
        bucket = self.bucket
        columns = zip((bucket.held_parameters, *bucket.held_states), (bucket.parameters, *bucket.states), strict=True)
        return all(all(map(operator.is_, map(layout.local, held), parts)) for held, parts in columns) and all(
            gradient is None or layout.same_shards(gradient, parameter)
            for gradient, parameter in zip(gradients, bucket.held_parameters, strict=True)
        )

    def _finds_pattern(self, own: list[Tensor | None]) -> bool:
        """Find out which gradients are there; return whether they are of the kind that was planned for."""
        bucket = self.bucket
        present = [gradient for gradient in own if gradient is not None]
        key = b"" if len(present) == len(own) else bytes(gradient is not None for gradient in own)
        pattern = self._patterns.get(key)
        if pattern is not None:
            if self._pattern is not pattern:
                self._pattern, self._watch = pattern, None
            return pattern.metadata.matches(present)
        for gradient, parameter, planned in zip(own, bucket.parameters, self._planned, strict=True):
            if gradient is not None and (_description(gradient) != planned or gradient.device != parameter.device):
                return False
        if len(self._patterns) >= _PATTERNS:
            self._patterns.clear()
        active, chunks = bucket.everyone, bucket.chunks
        if key:
            active = numpy.array([gradient is not None for gradient in own])
            chunks = numpy.ascontiguousarray(bucket.chunks[active[bucket.chunks[:, 0]]])
        self._patterns[key] = self._pattern = _Pattern(active, chunks, int(chunks[:, 2].sum()), layout.Metadata(present))
        self._watch = None
        return True

    def launch(
        self,
        gradients: list[Tensor | None] | None,
        hyperparameters: Sequence[Hyperparameters],
        loss_scale: LossScale | None,
        inverse_scale: float | None,
        zero_grad: bool,
    ) -> Launch | None:
        """Return what the backend needs for a step; None where no gradient is there.

        Args:
            gradients: None where nothing has changed.
            hyperparameters: by group.
            loss_scale: for the device to read.
            inverse_scale: for the host to multiply by.
            zero_grad: whether gradients are zero in the end.
        """
        bucket, pattern = self.bucket, self._pattern
        assert pattern is not None
        if not pattern.elements and not pattern.active.any():
            return None
        # A kernel makes zero what it has read alone: of copies, and of what another tensor has yet to read, it does not.
        in_kernel = zero_grad and bucket.by_address and not bucket.stands_in
        kind = self._kinds[loss_scale is not None and loss_scale.grad_scale is not None, in_kernel]
        if gradients is None:
            # Their addresses are known; who copies them needs themselves.
            gradients = [parameter.grad for parameter in bucket.parameters] if bucket.stands_in else []
        if bucket.by_address and not self._unchanged:
            self._read_gradient_addresses(gradients, pattern)
        # Where copies stand in for tensors, their addresses are this step's alone.
        addresses = bucket.addresses.copy() if bucket.stands_in else bucket.addresses
        group_of_row = rows = numpy.zeros(0, numpy.int64)
        if bucket.on_device:
            coefficients, scalars = None, numpy.zeros((0, 0))
        else:
            representatives, rows = bucket.rows(pattern.active)
            group_of_row = numpy.array([group for group, _ in representatives], numpy.int64)
            coefficients, scalars = coefficient_rows(bucket, kind, representatives, hyperparameters, inverse_scale)
            loss_scale = None
        return Launch(
            kind,
            gradients,
            pattern.active,
            addresses,
            pattern.chunks,
            pattern.elements,
            rows,
            group_of_row,
            coefficients,
            scalars,
            hyperparameters,
            loss_scale,
            zero_grad and not in_kernel,
        )

    def _read_gradient_addresses(self, gradients: list[Tensor | None], pattern: _Pattern) -> None:
        """Raise for gradients without memory; put copies in place of those that lie across their parameter."""
        bucket, active = self.bucket, pattern.active
        addresses = bucket.addresses
        addresses[1] = [0 if gradient is None else gradient.data_ptr() for gradient in gradients]
        for index in numpy.flatnonzero((addresses[1] == 0) & active & (bucket.sizes > 0)).tolist():
            raise RuntimeError(f"the gradient of parameter {self.indices[index]} has no memory: its storage was freed")
        # Written element by element, a step would read there what it has already changed.
        distance = addresses[1] - addresses[0]
        across = numpy.flatnonzero((numpy.abs(distance) < bucket.bytes) & (distance != 0) & active).tolist()
        for index in across:
            copy = gradients[index].clone()  # type: ignore[union-attr]
            gradients[index], addresses[1, index] = copy, copy.data_ptr()
            if not bucket.sharded:
                bucket.parameters[index].grad = copy  # which may be written as well, to unscale it
        # From the second step of a kind on, as a plan may be made for a single one.
        if not across and pattern is self._settled and not bucket.sharded:
            self._watch = tensor_objects.watch(bucket, self._state_dicts, gradients)
        self._settled = pattern

    def prepare(self, launch: Launch) -> None:
        """Have the kernel ready that ``launch`` needs."""
        if launch.kind not in self._ready:
            backends.prepare(self.bucket.backend, launch.kind)
            self._ready.add(launch.kind)

    def zero_later(self, launch: Launch) -> None:
        """Have gradients made zero when all kernels have read them."""
        kind = self._kinds[launch.kind.unscale, False]
        launch.kind, launch.zero_grad = kind, True

    def gradient_extents(self, launch: Launch) -> NDArray[numpy.int64]:
        """Return [2, tensors], where the memory of each active gradient begins and ends."""
        bucket, active = self.bucket, launch.active & (self.bucket.sizes > 0)
        starts = launch.addresses[1, active]
        return numpy.stack([starts, starts + bucket.sizes[active] * bucket.kind.formats[1].itemsize])

    def clip(self, launch: Launch, factors: Tensor | NDArray[numpy.float64]) -> None:
        """Have the gradients of each group multiplied by its factor."""
        if launch.coefficients is None:
            launch.factors = factors if isinstance(factors, Tensor) else torch.from_numpy(factors)
        else:
            # The sign of the gradient is a factor of it already.
            own = (factors.cpu().numpy() if isinstance(factors, Tensor) else factors)[launch.group_of_row]
            launch.coefficients[:, 1] *= own.astype(launch.coefficients.dtype)

    def run(self, launch: Launch) -> None:
        """Take the step."""
        bucket = self.bucket
        backends.run(bucket, launch)
        if launch.stand_ins:
            bucket.give_back(launch.stand_ins, launch.kind.unscale)
        if not bucket.on_device:
            bucket.advance(launch)
        if bucket.by_address:
            if self._watch is not None:
                self._watch.count_versions()
            else:
                torch.autograd.graph.increment_version(self._versioned)
            writes_gradients = launch.kind.unscale or launch.kind.zero_grad
            if writes_gradients and self._watch is not None:
                self._watch.count_gradient_versions()
            elif writes_gradients:
                torch.autograd.graph.increment_version([g for g in launch.gradients if g is not None])


def _description(gradient: Tensor) -> tuple[object, ...]:
    strides = gradient.stride() if gradient.layout == torch.strided else None
    return gradient.dtype, gradient.layout, gradient.shape, strides, layout.is_literal(gradient)


def coefficient_rows(
    bucket: Bucket,
    kind: Kind,
    rows: Sequence[tuple[int, int]],
    hyperparameters: Sequence[Hyperparameters],
    inverse_scale: float | None,
) -> tuple[NDArray[Any], NDArray[numpy.float64]]:
    """Return the coefficients of the (group, representative) ``rows``, computed in float64 and rounded once, and new scalars."""
    scale = 1.0 if inverse_scale is None else inverse_scale
    # Groups that agree share what is computed, be they thousands.
    known: dict[tuple[Hyperparameters, tuple[float, ...]], tuple[tuple[float, ...], tuple[float, ...]]] = {}
    table, scalars = [], []
    for group, representative in rows:
        own = hyperparameters[group]
        numbers = tuple(bucket.numbers[:, representative].tolist())
        row = known.get((own, numbers)) if len(rows) > 1 else None
        if row is None:
            values = [float(value) for value in own.values]
            row = kind.update.coefficients(numbers[0] + 1.0, numbers[1:], own.maximize, values)
            if len(rows) > 1:
                known[own, numbers] = row
        table.append((scale, *row[0], numbers[0] + 1.0) if kind.chance else (scale, *row[0]))
        scalars.append(row[1])
    return numpy.array(table, kind.compute.name), numpy.array(scalars, numpy.float64)
