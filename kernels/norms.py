"""The norm of all gradients: one sum of squares in a fixed order, and what follows from it for a step.

The order is the same for any number of threads and on every device. Pieces of ``CHUNK`` elements of one tensor are summed by
themselves: element i of a piece goes to lane i % ``LANES``, each lane sums in float64, in which the square of a float32
number is exact and cannot overflow, and then the upper half of the lanes is added to the lower one until one is left. The sums
of pieces, in the order of a bucket's chunks, are summed likewise by ``PIECE_LANES`` lanes, and buckets one after the other.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusedopt.kernels import layout

#: Of a piece: 4 for each of the 128 threads that sum it on a GPU.
LANES = 512
#: Of the sums of pieces.
PIECE_LANES = 1024
#: torch.nn.utils.clip_grad_norm_ adds it to the norm before it divides by it.
EPSILON = 1e-6


@dataclass(frozen=True)
class Clipping:
    """What groups ask to be clipped to.

    Args:
        scope_of_group: which groups are clipped together, by a number from 0.
        max_norms: by scope; None for one that is not clipped.
        skip_nonfinite: whether a step is left out where a norm is not finite.
    """

    scope_of_group: tuple[int, ...]
    max_norms: tuple[float | None, ...]
    skip_nonfinite: bool = False


def tree(lanes: NDArray[numpy.float64]) -> NDArray[numpy.float64]:
    """Return the sum over the last axis, whose length is a power of two, by halves."""
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


def _by_lanes(values: NDArray[numpy.float64], lanes: int) -> float:
    rows = numpy.zeros((-(-max(1, len(values)) // lanes), lanes))
    rows.reshape(-1)[: len(values)] = values
    total = rows[0]
    for row in rows[1:]:
        total = total + row
    return float(tree(total))


def sum_of_squares(piece: NDArray[Any]) -> float:
    """Return the sum of squares of a ``piece`` of gradients: the definition, in NumPy."""
    numbers = piece.astype(numpy.float64)
    return _by_lanes(numbers * numbers, LANES)


def totals(sums: NDArray[numpy.float64], slot_of_piece: NDArray[numpy.int64], slots: int) -> NDArray[numpy.float64]:
    """Return the sum over the pieces of each slot, of ``sums`` of all pieces."""
    if slots == 1:
        return numpy.array([_by_lanes(sums, PIECE_LANES)])
    return numpy.array([_by_lanes(numpy.where(slot_of_piece == slot, sums, 0.0), PIECE_LANES) for slot in range(slots)])


class Slots:
    """Which tensors are summed together: those of one scope whose parts lie on the same ranks.

    Args:
        buckets: the parameters of each, and the group of each of these.
        clipping: what groups ask for.
    """

    def __init__(self, buckets: Sequence[tuple[Sequence[Tensor], Sequence[int]]], clipping: Clipping) -> None:
        self.scopes = len(clipping.max_norms)
        #: The ranks that have other parts of the same tensors: None, or a mesh and its dimensions.
        self.shardings: list[Any] = [None]
        #: By bucket and tensor.
        self.of_tensors = []
        for parameters, groups in buckets:
            own = []
            for parameter, group in zip(parameters, groups, strict=True):
                sharding = layout.sharding(parameter)
                if sharding not in self.shardings:
                    self.shardings.append(sharding)
                own.append(self.shardings.index(sharding) * self.scopes + clipping.scope_of_group[group])
            self.of_tensors.append(numpy.array(own, numpy.int64))
        self.count = len(self.shardings) * self.scopes

    def norms(self, squares: Tensor) -> Tensor:
        """Return the norm of each scope, from sums of squares by slot; ranks that share tensors exchange theirs."""
        if self.shardings == [None]:
            return squares.sqrt()
        total = torch.zeros(self.scopes, dtype=torch.float64, device=squares.device)
        for sharding, own in zip(self.shardings, squares.view(-1, self.scopes), strict=True):
            if sharding is not None:
                mesh, dimensions = sharding
                own = own.to(mesh.device_type, copy=True)
                for dimension in dimensions:
                    torch.distributed.all_reduce(own, group=mesh.get_group(dimension))
                own = own.to(squares.device)
            total = total + own
        return total.sqrt()


@dataclass
class Clip:
    """The outcome of a norm.

    Args:
        norms: by scope, in float64.
        all_finite: whether all are; of Python where the host knows it.
        factors: by group, what its gradients are multiplied by, in float64; an array where the host knows it.
    """

    norms: Tensor
    all_finite: Tensor | bool
    factors: Tensor | NDArray[numpy.float64]

    @property
    def finite(self) -> Tensor:
        """Whether all norms are finite, one bool."""
        return self.all_finite if isinstance(self.all_finite, Tensor) else torch.tensor(self.all_finite, device="cpu")

    def joined(self, found_inf: Tensor | float | None) -> Tensor:
        """Return a number that is not zero where ``found_inf`` is not, and where a norm is not finite."""
        own = 1.0 - self.finite.float()
        return own if found_inf is None else own + (found_inf.to(own.device) if isinstance(found_inf, Tensor) else found_inf)


def clip(norms: Tensor, clipping: Clipping) -> Clip:
    """Return what follows from ``norms`` by scope, on their device and without waiting for it."""
    if norms.device.type == "cpu":  # on so few numbers operations of torch take longer than Python
        values = norms.tolist()
        pairs = zip(values, clipping.max_norms, strict=True)
        # What is not clipped is left alone, also by a norm that is not a number.
        own = [1.0 if most is None or most == math.inf else factor(norm, float(most)) for norm, most in pairs]
        return Clip(norms, all(map(math.isfinite, values)), numpy.array([own[scope] for scope in clipping.scope_of_group]))
    largest, scopes = _on_device(clipping, norms.device)
    factors = torch.where(largest == torch.inf, 1.0, (largest / (norms + EPSILON)).clamp(max=1.0))
    return Clip(norms, norms.isfinite().all(), factors[scopes])


def factor(norm: float, most: float) -> float:
    """Return what clips gradients of ``norm`` to ``most``."""
    found = most / (norm + EPSILON)
    return 1.0 if found > 1.0 else found  # and what is not a number stays so


@functools.lru_cache(maxsize=64)
def _on_device(clipping: Clipping, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the largest norm by scope, infinite where nothing is clipped, and the scope of each group."""
    norms = [torch.inf if norm is None else float(norm) for norm in clipping.max_norms]
    with torch.inference_mode(False):  # they outlive the mode
        largest = torch.tensor(norms, dtype=torch.float64, device=device)
        return largest, torch.tensor(clipping.scope_of_group, dtype=torch.int64, device=device)
