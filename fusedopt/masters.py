"""Masters of parameters: whether somebody else has written a parameter, so that what is kept beside it is of another number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fusedopt.kernels.plan import Plan

if TYPE_CHECKING:
    from fusedopt.optimizer import FusedOptimizer


def _with_masters(plan: Plan) -> Iterator[tuple[Tensor, Tensor]]:
    for part in plan.parts:
        bucket = part.bucket
        if bucket.kind.formats[0].master is not None:
            yield from zip(bucket.held_parameters, bucket.held_states[bucket.kind.tensors.index("master")], strict=True)


@torch.no_grad()
def rebuild(optimizer: FusedOptimizer, plan: Plan) -> None:
    """Have masters of parameters that somebody else has written since their last step begin anew."""
    known = optimizer._versions
    for parameter, master in _with_masters(plan):
        if known is not None and not parameter.is_inference() and known.get(parameter, parameter._version) != parameter._version:
            # Kernels compare a master of float32 with its parameter as well, for writes past autograd's eyes.
            _ = master.copy_(parameter) if master.is_floating_point() else master.zero_()


def remember(optimizer: FusedOptimizer, plan: Plan) -> None:
    """Note the versions of parameters after a step."""
    for parameter, _ in _with_masters(plan):
        if not parameter.is_inference():
            if optimizer._versions is None:
                optimizer._versions = {}
            optimizer._versions[parameter] = parameter._version
