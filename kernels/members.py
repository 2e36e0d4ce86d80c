"""Parameters that are to be planned for: whether a kernel can update them, and in what order if they share memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy
import torch

from fusedopt.kernels import layout
from fusedopt.kernels.blocks import blocks
from fusedopt.kernels.formats import FORMATS
from fusedopt.kernels.rule import Update
from fusedopt.kernels.tables import BY_ADDRESS, Kind, Member, kind_of

_PLAIN = FORMATS[torch.float32]


def check_member(member: Member, update: Update, name: str) -> Kind:
    """Return what ``member`` needs of the backend ``name``.

    Raises:
        RuntimeError: if a state is not of the parameter's shape or device, something has no memory or shares its own, or no
            backend can store its dtypes.
    """
    if member.extras and name == "tensor" and layout.is_sharded(member.parameter):
        raise RuntimeError(
            f"parameter {member.index} is sharded, and only kernels update its codes on each rank's part: install what "
            "explain() says is missing, or give it a group without state_format and master_weights"
        )
    _check_states(member, update)
    if name in BY_ADDRESS:
        _check_memory(member, update)
    kind = kind_of(update, member)
    if kind is None:
        raise RuntimeError(describe_dtypes(member, update))
    return kind


def _check_states(member: Member, update: Update) -> None:
    parameter = member.parameter
    for name in (*update.states, *(["master"] if member.formats.get("p", _PLAIN).master is not None else [])):
        state = member.tensor(name)
        if state.shape != parameter.shape or state.device != parameter.device or state.layout != torch.strided:
            raise RuntimeError(
                f"the state {name!r} of parameter {member.index} has shape {tuple(state.shape)} on {state.device} "
                f"({state.layout}), but the parameter has shape {tuple(parameter.shape)} on {parameter.device}: load a "
                "checkpoint of the same model, or delete this parameter's state"
            )
        if not layout.same_shards(state, parameter):
            raise RuntimeError(
                f"the state {name!r} of parameter {member.index} is not sharded as the parameter is: load it by "
                "torch.distributed.checkpoint, or delete this parameter's state"
            )
        if layout.overlaps_itself(state):
            raise RuntimeError(
                f"the state {name!r} of parameter {member.index} has strides {state.stride()}, so that elements share "
                "memory: replace it by a clone"
            )
    for name, form in member.formats.items():
        if not form.words:
            continue
        words, expected = member.tensor(f"{name}_words"), (blocks(layout.largest_part(parameter)), form.words)
        if layout.local(words).shape != expected or words.device != parameter.device or words.dtype != torch.int32:
            raise RuntimeError(
                f"the words of the state {name!r} of parameter {member.index} have shape {tuple(layout.local(words).shape)} and "
                f"dtype {words.dtype} on {words.device}, but its blocks need {expected} of torch.int32 on {parameter.device}: load "
                "a checkpoint of the same model, sharded in the same way, or delete this parameter's state"
            )


def _check_memory(member: Member, update: Update) -> None:
    tensors = {"parameter": member.parameter, "gradient of parameter": member.gradient}
    tensors |= {f"state {name!r} of parameter": member.tensor(name) for name in (*update.states, *member.extras)}
    for what, held in tensors.items():
        tensor = None if held is None else layout.local(held)
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
    extents = numpy.array([layout.extent(layout.local(member.parameter)) for member in members], numpy.int64).reshape(-1, 2)
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
