"""A step in three parts: plan (sort parameters into buckets), validate (that the plan still holds), run (launch)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusedopt.kernels import backends, layout
from fusedopt.kernels.members import check_member
from fusedopt.kernels.norms import Clip, Clipping, Slots, clip
from fusedopt.kernels.part import Part
from fusedopt.kernels.rule import Update
from fusedopt.kernels.tables import Bucket, Hyperparameters, Launch, LossScale, Member


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
        self._slots: tuple[Clipping, Slots] | None = None
        #: Addresses of gradients, and whether no two of them share memory.
        self._apart: tuple[list[NDArray[numpy.int64]], bool] | None = None
        self.parts = [
            Part(Bucket(name, kind, group))  # type: ignore[arg-type]
            for (name, _, kind, *_), group in sorted_members.items()
        ]

    def attach(self) -> None:
        """Complete the states of all members; until then nothing has been written to them."""
        for part in self.parts:
            part.attach()

    def unchanged(self) -> bool:
        """Whether the plan surely holds, and each bucket has the gradients that it had, at whatever addresses."""
        return all(part.unchanged() for part in self.parts)

    def gradients(self, gradients: Sequence[Tensor | None]) -> list[list[Tensor | None]] | None:
        """Return the gradients by bucket, or None where the plan no longer holds."""
        by_part = []
        for part in self.parts:
            own = part.gradients(gradients)
            if own is None:
                return None
            by_part.append(own)
        return by_part

    def launches(
        self,
        gradients: Sequence[list[Tensor | None] | None],
        hyperparameters: Sequence[Hyperparameters],
        loss_scale: LossScale | None = None,
        zero_grad: bool = False,
        clips: bool = False,
    ) -> list[Launch | None]:
        """Return all that a step needs, checked; nothing is left to run if a scaler has found infinities.

        Args:
            gradients: as :meth:`gradients` returned them; None for each bucket where the plan is :meth:`unchanged`.
            hyperparameters: by group.
            loss_scale: what a gradient scaler asks for (default: None).
            zero_grad: whether gradients are zero in the end (default: False).
            clips: whether :meth:`clip` is called next (default: False).

        Raises:
            RuntimeError: if a gradient has no memory.
        """
        for part in self.parts:
            # A host that reads what the scaler found, or the norm, would wait for the device.
            on_device = loss_scale is not None or clips or part.bucket.members[0].capturable
            if part.bucket.backend == "triton" and on_device:
                part.count_on_device()
        inverse_scale = None
        if loss_scale is not None and not all(part.bucket.on_device for part in self.parts):
            if loss_scale.skips():
                return [None] * len(self.parts)
            inverse_scale = loss_scale.inverse()
        launches = [
            part.launch(own, hyperparameters, loss_scale, inverse_scale, zero_grad)
            for part, own in zip(self.parts, gradients, strict=True)
        ]
        pairs = [(part, launch) for part, launch in zip(self.parts, launches, strict=True) if launch is not None]
        if zero_grad and not self._gradients_apart(pairs):
            for part, launch in pairs:
                part.zero_later(launch)
        for part, launch in pairs:
            part.prepare(launch)
        for part, launch in pairs:
            if part.bucket.stands_in:
                launch.stand_ins = part.bucket.stand_in(launch)
        return launches

    def _gradients_apart(self, pairs: list[tuple[Part, Launch]]) -> bool:
        """Whether no two gradients share memory."""
        addresses = [launch.addresses[1] for _, launch in pairs]
        known = self._apart
        if known is not None and len(known[0]) == len(pairs) and all(map(numpy.array_equal, known[0], addresses)):
            return known[1]
        extents = [part.gradient_extents(launch) for part, launch in pairs if part.bucket.by_address]
        starts, ends = numpy.concatenate([numpy.zeros((2, 0), numpy.int64), *extents], axis=1)
        order = numpy.argsort(starts)
        apart = bool((starts[order][1:] >= ends[order][:-1]).all())
        self._apart = [each.copy() for each in addresses], apart
        return apart

    @property
    def decides_on_device(self) -> bool:
        """Whether devices decide by themselves whether a step is left out."""
        return all(part.bucket.on_device for part in self.parts)

    def clip(self, launches: Sequence[Launch | None], clipping: Clipping) -> Clip:
        """Measure the norms of all gradients, without the loss scale, and have ``launches`` clip them.

        Only where some parameters are updated by the host does it wait for devices.

        Args:
            launches: as :meth:`launches` returned them.
            clipping: what groups ask for.
        """
        if self._slots is None or self._slots[0] is not clipping:
            buckets = [part.bucket for part in self.parts]
            self._slots = clipping, Slots([(bucket.held_parameters, bucket.groups.tolist()) for bucket in buckets], clipping)
        slots = self._slots[1]
        host = numpy.zeros(slots.count)
        by_device: dict[torch.device, Tensor] = {}
        pairs = [
            (part, launch, own)
            for part, launch, own in zip(self.parts, launches, slots.of_tensors, strict=True)
            if launch is not None
        ]
        for part, launch, own in pairs:
            totals: Any = host
            if part.bucket.on_device:
                device = part.bucket.parameters[0].device
                if device not in by_device:
                    by_device[device] = torch.zeros(slots.count, dtype=torch.float64, device=device)
                totals = by_device[device]
            backends.add_sums_of_squares(part.bucket, launch, own, totals)
        total = torch.from_numpy(host)
        if by_device:
            first, *others = by_device.values()
            on_host = not all(part.bucket.on_device for part, _, _ in pairs)
            for other in ([total] if on_host else []) + others:
                first = first + other.to(first.device)
            total = first
        outcome = clip(slots.norms(total), clipping)
        for part, launch, _ in pairs:
            part.clip(launch, outcome.factors)
            if clipping.skip_nonfinite and part.bucket.on_device:
                scale = launch.loss_scale or LossScale(None, None)
                launch.loss_scale = LossScale(outcome.joined(scale.found_inf), scale.grad_scale)
        return outcome

    def run(self, launches: Sequence[Launch | None]) -> None:
        """Take the step."""
        pairs = [(part, launch) for part, launch in zip(self.parts, launches, strict=True) if launch is not None]
        for part, launch in pairs:
            part.run(launch)
        for part, launch in pairs:
            if launch.zero_grad:
                layout.zero_gradients([part.bucket.held_parameters[i] for i in numpy.flatnonzero(launch.active)])
