"""Which tensors a kernel can walk as flat memory, and tensors that stand in for the others."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

try:
    # One C++ call that compares type, dtype, device, sizes and strides of many tensors: 46 microseconds for 1000
    # tensors, where reading them in Python takes 260.
    from torch._C._dynamo.guards import TensorGuards as _TensorGuards
except ImportError:
    _guards: Any = None
else:
    _guards = _TensorGuards


def is_plain_memory(tensor: Tensor) -> bool:
    """Whether ``tensor`` is memory that a kernel may walk: subclasses that dispatch, as DTensor does, are not."""
    kind = type(tensor)
    return kind in (Tensor, torch.nn.Parameter) or kind.__torch_dispatch__ is Tensor.__torch_dispatch__


def is_sharded(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor, of which each rank has a part."""
    # Nobody has one who has not imported it, and that takes a second.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and type(tensor) is getattr(module, "DTensor", None)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded ``tensor``, or the tensor that is whole."""
    # Not to_local(), which makes another tensor each time.
    return tensor._local_tensor if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def same_shards(a: Tensor, b: Tensor) -> bool:
    """Whether each rank has the same part of ``a`` and ``b``, tensors of one shape."""
    if not (is_sharded(a) and is_sharded(b)):
        return is_sharded(a) == is_sharded(b)
    placements: Any = a.placements, b.placements  # type: ignore[attr-defined]
    return placements[0] == placements[1] and a.device_mesh == b.device_mesh  # type: ignore[attr-defined, no-any-return]


def sharded_as(tensor: Any, like: Any) -> Tensor:
    """Return ``tensor``, a DTensor, with the parts that ``like`` has; ranks exchange theirs if those are others."""
    result: Tensor = tensor if same_shards(tensor, like) else tensor.redistribute(like.device_mesh, like.placements)
    return result


def as_part(tensor: Tensor, like: Any, shape: tuple[int, ...] | None = None) -> Tensor:
    """Return ``tensor``, this rank's part, as ``like`` is: sharded in the same way, or whole.

    Args:
        tensor: the part.
        like: a tensor.
        shape: of the whole result (default: that of ``like``, and its strides).
    """
    if not is_sharded(like):
        return tensor
    own: Any = type(like)
    strides = like.stride()
    if shape is not None:
        strides = tuple(math.prod(shape[dimension + 1 :]) for dimension in range(len(shape)))
    whole: Tensor = own.from_local(
        tensor, like.device_mesh, like.placements, run_check=False, shape=torch.Size(shape or like.shape), stride=strides
    )
    return whole


def is_cut(placement: Any) -> bool:
    """Whether ``placement`` cuts a tensor: that of FSDP2 beside tensor parallelism, ``_StridedShard``, says that it is no shard."""
    return not (placement.is_replicate() or placement.is_partial())


def cuts(tensor: Any) -> tuple[int, ...]:
    """Return into how many parts each dimension of ``tensor`` is cut."""
    found = [1] * tensor.dim()
    for dimension, placement in enumerate(tensor.placements if is_sharded(tensor) else ()):
        if is_cut(placement):
            found[placement.dim] *= tensor.device_mesh.size(dimension)
    return tuple(found)


def rows_as_part(rows: Tensor, like: Any) -> Tensor:
    """Return ``rows``, as many on each rank, as the parts of one tensor, on the ranks that have the parts of ``like``."""
    if not is_sharded(like):
        return rows
    from torch.distributed.tensor import Shard

    placements = [Shard(0) if is_cut(placement) else placement for placement in like.placements]
    count = len(rows)
    for dimension, placement in enumerate(like.placements):
        count *= like.device_mesh.size(dimension) if is_cut(placement) else 1
    own: Any = type(like)
    whole: Tensor = own.from_local(
        rows, like.device_mesh, placements, run_check=False, shape=(count, *rows.shape[1:]), stride=rows.stride()
    )
    return whole


def largest_part(tensor: Any) -> int:
    """Return how many elements the largest part of ``tensor`` has on any rank."""
    if not is_sharded(tensor):
        return int(tensor.numel())
    return math.prod(-(-size // parts) for size, parts in zip(tensor.shape, cuts(tensor), strict=True))


def first_index(tensor: Any) -> int:
    """Return which element of the whole ``tensor`` is the first of this rank's part; the others follow where rows are cut."""
    if not is_sharded(tensor):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return sum(offset * math.prod(tensor.shape[dimension + 1 :]) for dimension, offset in enumerate(offsets))


def sharding(tensor: Tensor) -> tuple[Any, tuple[int, ...]] | None:
    """Return the mesh over whose dimensions (beside it) ``tensor`` is cut into parts; None where this rank has all of it."""
    if not is_sharded(tensor):
        return None
    placements: Any = tensor.placements  # type: ignore[attr-defined]
    cut = tuple(dimension for dimension, placement in enumerate(placements) if is_cut(placement))
    return (tensor.device_mesh, cut) if cut else None  # type: ignore[attr-defined]


def is_unfinished_sum(tensor: Tensor) -> bool:
    """Whether ``tensor`` is the sum of what ranks have, which no step on the parts of one rank can update."""
    return is_sharded(tensor) and any(each.is_partial() for each in tensor.placements)  # type: ignore[attr-defined]


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether equal indices lie at equal offsets in ``a`` and ``b``, tensors of one shape."""
    if a.shape != b.shape:
        return False
    strides = zip(a.shape, a.stride(), b.stride(), strict=True)
    return a.numel() == 0 or all(s == t for n, s, t in strides if n != 1)


def is_literal(tensor: Tensor) -> bool:
    """Whether the memory of ``tensor`` holds its numbers, and not their conjugates or negatives."""
    return not (tensor.is_neg() or tensor.is_conj())


def real(tensor: Tensor) -> Tensor:
    """Return the numbers of ``tensor``, of a complex one its real and imaginary parts; a view where its memory holds them."""
    literal = tensor.resolve_conj().resolve_neg()
    return torch.view_as_real(literal) if literal.is_complex() else literal


def is_dense(tensor: Tensor) -> bool:
    """Whether ``tensor`` has all numbers in one piece of memory, in whatever order, each once."""
    return tensor.is_contiguous() or torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether elements of ``tensor`` surely share memory, as those of an expanded tensor do."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


@torch.no_grad()
def zero_gradients(parameters: Sequence[Tensor]) -> None:
    """Make the gradients of ``parameters`` zero, in place where their memory can be written element by element."""
    plain = []
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        if gradient.layout == torch.strided and overlaps_itself(gradient):
            parameter.grad = torch.zeros_like(parameter)
        elif gradient.layout == torch.strided and is_plain_memory(gradient):
            plain.append(gradient)
        else:
            gradient.zero_()
    if plain:
        torch._foreach_zero_(plain)


def extent(tensor: Tensor) -> tuple[int, int]:
    """Return the first address of ``tensor`` and the one behind its last byte; nothing for what is not plain memory."""
    if not is_plain_memory(tensor):
        return 0, 0
    start = tensor.data_ptr()
    if tensor.numel() == 0:
        return start, start
    reach = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return start, start + (reach + 1) * tensor.element_size()


class Metadata:
    """Remembers the dtype, device, shape and strides of tensors, to tell cheaply whether others have the same."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._count = len(tensors)
        self._guards: Any = None
        if _guards is not None and tensors:
            self._guards = _guards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        else:
            self._described = [self._describe(tensor) for tensor in tensors]

    @staticmethod
    def _describe(tensor: Tensor) -> tuple[object, ...]:
        return type(tensor), tensor.dtype, tensor.device, tensor.layout, tensor.shape, tensor.stride()

    def matches(self, tensors: Sequence[Tensor]) -> bool:
        """Whether each of ``tensors`` is like the remembered one at its place."""
        if len(tensors) != self._count:
            return False
        if self._guards is not None:
            return bool(self._guards.check(*tensors))
        return all(self._describe(tensor) == known for tensor, known in zip(tensors, self._described, strict=True))
