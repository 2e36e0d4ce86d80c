"""Ways to lay the same numbers out in memory, each in a buffer of its own whose other elements are known."""

import math

import torch

#: What stands between, before and behind the elements of a tensor.
FILLING = 7.0
BEHIND = 5


def place(values: torch.Tensor, strides: tuple[int, ...], offset: int = 0) -> torch.Tensor:
    """A view with these strides that holds `values`, in a new buffer of FILLING."""
    reach = sum((size - 1) * stride for size, stride in zip(values.shape, strides, strict=True)) + 1
    buffer = torch.full((offset + reach + BEHIND,), FILLING, dtype=values.dtype, device=values.device)
    view = buffer.as_strided(values.shape, strides, offset)
    return view.copy_(values)


def dense(shape: tuple[int, ...], order: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of elements without gaps, the last dimension in `order` running fastest."""
    return tuple(math.prod(shape[d] for d in order[order.index(dimension) + 1 :]) for dimension in range(len(shape)))


def rows(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    return dense(shape, tuple(range(len(shape))))


# Of four dimensions, as images have them.
LAYOUTS = {
    "contiguous": lambda v: place(v, rows(v.shape)),
    "transposed": lambda v: place(v, dense(v.shape, (3, 2, 1, 0))),
    "channels_last": lambda v: place(v, dense(v.shape, (0, 2, 3, 1))),
    "every_second_column": lambda v: place(v, tuple(2 * stride for stride in rows(v.shape))),
    "part_of_wider_rows": lambda v: place(v, rows((*v.shape[:-1], v.shape[-1] + 3))),
    "odd_strides_of_size_1": lambda v: place(v, tuple(s if n > 1 else 7919 for n, s in zip(v.shape, rows(v.shape), strict=True))),
    "storage_offset": lambda v: place(v, rows(v.shape), offset=64),
    "unaligned_by_1": lambda v: place(v, rows(v.shape), offset=1),
    "unaligned_by_3": lambda v: place(v, dense(v.shape, (1, 0, 3, 2)), offset=3),
}
# Only what is read may have elements that share memory; its values repeat along the first dimension.
READ_LAYOUTS = {**LAYOUTS, "expanded": lambda v: LAYOUTS["unaligned_by_1"](v[:1]).expand(v.shape)}


def surroundings(tensor: torch.Tensor) -> torch.Tensor:
    """All elements of the buffer that `tensor` is a view of which are not its own."""
    buffer = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
    own = torch.zeros(buffer.shape, dtype=torch.bool)
    own.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
    return buffer[~own.to(buffer.device)]


def is_untouched(tensor: torch.Tensor) -> bool:
    """Whether everything around the elements of `tensor` is as `place` left it."""
    return bool((surroundings(tensor) == FILLING).all())


#: Gradients of a parameter of shape (6, 4) that do not lie as it does.
ODD_GRADIENTS = {
    "transposed": lambda: torch.randn(4, 6).t(),
    "expanded": lambda: torch.randn(1, 4).expand(6, 4),
    "strided": lambda: torch.randn(6, 8)[:, ::2],
}
