"""Which tensors a kernel can walk as flat memory, and tensors that stand in for the others."""

from __future__ import annotations

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


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether elements of ``tensor`` surely share memory, as those of an expanded tensor do."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


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
