"""Masters of parameters: whether somebody else has written a parameter, so that what is kept beside it is of another number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fusedopt import low_bit
from fusedopt.prepared import Prepared

if TYPE_CHECKING:
    from fusedopt.optimizer import FusedOptimizer


def _with_masters(optimizer: FusedOptimizer, prepared: Prepared) -> Iterator[tuple[Tensor, Tensor]]:
    for part in prepared.plan.parts if prepared.plan is not None else ():
        bucket = part.bucket
        if bucket.kind.formats[0].master is not None:
            yield from zip(bucket.held_parameters, bucket.held_states[bucket.kind.tensors.index("master")], strict=True)
    # The plans of later waves are made when those before have been run, which write what they share with others.
    group_of = [group for group in optimizer.param_groups for _ in group["params"]] if prepared.waves else []
    for index in (index for wave in prepared.waves for index in wave):
        parameter = prepared.parameters[index]
        state = optimizer.state.get(parameter) or {}
        if low_bit.keeps_master(optimizer._update(group_of[index], False).rule, state):
            yield parameter, state["master"]


@torch.no_grad()
def rebuild(optimizer: FusedOptimizer, prepared: Prepared) -> None:
    """Have masters of parameters that somebody else has written since their last step begin anew."""
    known = optimizer._versions
    if known is None:
        return
    for parameter, master in _with_masters(optimizer, prepared):
        if not parameter.is_inference() and known.get(parameter, parameter._version) != parameter._version:
            # Kernels compare a master of float32 with its parameter as well, for writes past autograd's eyes.
            _ = master.copy_(parameter) if master.is_floating_point() else master.zero_()


def remember(optimizer: FusedOptimizer, prepared: Prepared) -> None:
    """Note the versions of parameters after a step."""
    for parameter, _ in _with_masters(optimizer, prepared):
        if not parameter.is_inference():
            if optimizer._versions is None:
                optimizer._versions = {}
            optimizer._versions[parameter] = parameter._version
