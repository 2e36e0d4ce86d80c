"""Finds out where the words lie that tell of a tensor in the objects of Python and C++ behind it.

That is not written down anywhere, so tensors are made to differ in one property each, and what was found is tried on others.
Where anything is not as expected, which another release of torch may bring, nothing is taken for found.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

#: Bytes.
WORD = 8
#: Words that are looked at: both objects are larger than this (22 and 10 words in torch 2.13).
_TENSOR_WORDS, _STORAGE_WORDS, _AUTOGRAD_WORDS = 22, 8, 12
#: Words of the object of Python, which is longer.
_OBJECT_WORDS = 4


@dataclass(frozen=True)
class Layout:
    """Where words lie in the objects of tensors, counted in words unless said otherwise.

    Args:
        handle: in the object of Python, the pointer to that of C++; two tensors may swap theirs.
        storage: the pointer to the storage.
        autograd: the pointer to what autograd keeps of the tensor, null if it keeps nothing.
        version: the pointer to the version counter.
        offset: the storage offset, in elements.
        kind: the words that tell class, shape, strides, dtype, device and dispatch keys, each with a mask of the bits that do.
        data: in a storage, the pointer to its memory.
        storage_end: in a storage, behind the last word of what tells whose and how long its memory is.
        deleter: in a storage, who frees its memory.
        gradient: in what autograd keeps, the pointer to the gradient.
        no_gradient: what stands there if there is none.
        count: in a version counter, the byte at which the count stands.
        dict_version: in a dict of Python, what changes whenever the dict does; None where there is no such word.
        lists: whether the length of a list of Python, and the pointer to its items, are where they are known to be.
    """

    handle: int
    storage: int
    autograd: int
    version: int
    offset: int
    kind: tuple[tuple[int, int], ...]
    data: int
    storage_end: int
    deleter: int
    gradient: int
    no_gradient: int
    count: int
    dict_version: int | None
    lists: bool


class _UnexpectedError(Exception):
    pass


def words_at(address: int, count: int) -> list[int]:
    """Return the 64-bit integers from ``address`` on."""
    return list((ctypes.c_int64 * count).from_address(address))


def _tensor_words(tensor: Tensor) -> list[int]:
    return words_at(tensor._cdata, _TENSOR_WORDS)


def _storage_words(tensor: Tensor) -> list[int]:
    return words_at(tensor.untyped_storage()._cdata, _STORAGE_WORDS)


def _only(places: Sequence[int], what: str) -> int:
    if len(places) != 1:
        raise _UnexpectedError(f"{what} was found at {len(places)} places")
    return places[0]


@functools.cache
def layout() -> Layout | None:
    """Return where words lie in this process, or None if that could not be found out."""
    if sys.maxsize < 2**63 - 1 or sys.byteorder != "little":
        return None
    try:
        with torch.inference_mode(False), torch.enable_grad():
            return _find_layout()
    except (_UnexpectedError, RuntimeError, AttributeError, TypeError, IndexError):
        return None


def _find_layout() -> Layout:
    # Whatever dtype is the default at present.
    empty = functools.partial(torch.empty, dtype=torch.float32, device="cpu")
    tensor, other = empty(1013), empty(1013)
    part = empty(5003)[1009:2022]
    handle = _only([i for i, word in enumerate(words_at(id(tensor), _OBJECT_WORDS)) if word == tensor._cdata], "the object of C++")
    words, more, part_words = _tensor_words(tensor), _tensor_words(other), _tensor_words(part)
    storage = _only([i for i, word in enumerate(words) if word == tensor.untyped_storage()._cdata], "the storage")
    offset = _only([i for i, word in enumerate(part_words) if word == 1009], "the storage offset")
    alias = _tensor_words(tensor.detach())
    shared = [i for i in range(storage + 1, offset) if alias[i] == words[i] != more[i]]
    version = _only(shared, "the version counter")
    # Only a pointer that was null before can be that to what has come with requires_grad.
    leaf = empty(1013)
    before = _tensor_words(leaf)
    leaf.requires_grad_()
    autograd = _only([i for i, w in enumerate(_tensor_words(leaf)) if before[i] == 0 != w and i < offset], "autograd's part")
    none = words_at(_tensor_words(leaf)[autograd], _AUTOGRAD_WORDS)
    leaf.grad = tensor
    some = words_at(_tensor_words(leaf)[autograd], _AUTOGRAD_WORDS)
    gradient = _only([i for i, word in enumerate(some) if word == tensor._cdata != none[i]], "the gradient")
    counter = _tensor_words(other)[version]
    count = _only(_tracking(other, counter), "the count of versions")
    # Behind the version counter and the pointer to Python's object: sizes and strides, offset, numel, dtype and device, keys.
    # Behind dtype and device follow flags, which are consequences of the rest, and bits that nobody has set.
    places = (0, *(i for i in range(version + 2, offset + 4) if i != offset))
    kind = tuple((i, (1 << 40) - 1 if i == offset + 2 else -1) for i in places)
    held = _storage_words(tensor)
    data = min(i for i, word in enumerate(held) if word == tensor.data_ptr())
    length = _only([i for i, word in enumerate(held) if word == tensor.untyped_storage().nbytes()], "the length of a storage")
    foreign = _storage_words(torch.from_numpy(numpy.empty(1013, numpy.float32)))
    twin = _storage_words(other)
    # A c10::DataPtr: the memory, then what is deleted, the memory or its owner, and by whom, in either order.
    deleter = _only([i for i in (data + 1, data + 2) if held[i] == twin[i] != foreign[i]], "the deleter")
    found = Layout(
        handle,
        storage,
        autograd,
        version,
        offset,
        kind,
        data,
        length + 1,
        deleter,
        gradient,
        none[gradient],
        count,
        _dict_version(),
        _lists_are_known(),
    )
    _try(found)
    return found


def _tracking(tensor: Tensor, counter: int) -> list[int]:
    """Return the bytes of a version counter at which the version of ``tensor`` stands."""
    places = set(range(WORD, 3 * WORD, 4))
    for _ in range(5):
        tensor.zero_()
        found = (ctypes.c_uint32 * 6).from_address(counter)
        places = {place for place in places if found[place // 4] == tensor._version}
    return sorted(places)


#: The word behind the number of entries in CPython's dict (PEP 509), up to 3.13.
DICT_VERSION = 3


def _dict_version() -> int | None:
    """Return the word of a dict that changes whenever the dict does, or None."""
    if sys.implementation.name != "cpython" or sys.version_info >= (3, 14):
        return None
    held: dict[str, object] = {"step": object(), "exp_avg": object(), "exp_avg_sq": object()}
    replacement = object()
    changes = [
        lambda: held.__setitem__("exp_avg", replacement),
        lambda: held.update(step=replacement),
        lambda: held.pop("exp_avg_sq"),
        lambda: held.__setitem__("exp_avg_sq", replacement),
        lambda: held.setdefault("max_exp_avg_sq", replacement),
        held.popitem,
        held.clear,
    ]
    for change in changes:
        before = words_at(id(held), DICT_VERSION + 1)[DICT_VERSION]
        change()
        if words_at(id(held), DICT_VERSION + 1)[DICT_VERSION] == before:
            return None
    before = words_at(id(held), DICT_VERSION + 1)[DICT_VERSION]
    _ = held.get("step"), list(held.items()), held.copy(), len(held)
    return DICT_VERSION if words_at(id(held), DICT_VERSION + 1)[DICT_VERSION] == before else None


#: The words of CPython's list, where a lock for all threads guards it.
LIST_LENGTH, LIST_ITEMS = 2, 3


def _lists_are_known() -> bool:
    """Whether a list has its length and the pointer to its items at their places."""
    if sys.implementation.name != "cpython" or sysconfig.get_config_var("Py_GIL_DISABLED"):
        return False
    for length in (1, 1013):
        held = [object() for _ in range(length)]
        words = words_at(id(held), LIST_ITEMS + 1)
        if words[LIST_LENGTH] != length or words_at(words[LIST_ITEMS], length) != list(map(id, held)):
            return False
    return True


def _try(found: Layout) -> None:
    """Raise if ``found`` cannot tell tensors apart, or takes for different what is alike."""

    def kind(tensor: Tensor) -> list[int]:
        words = _tensor_words(tensor)
        return [words[i] & mask for i, mask in found.kind]

    empty = functools.partial(torch.empty, dtype=torch.float32, device="cpu")
    plain, leaf = empty(6, 10), torch.nn.Parameter(empty(6, 10))
    leaf.sum().backward()
    assert leaf.grad is not None
    alike = [leaf, leaf.detach(), empty(100)[7:67].view(6, 10), empty(6, 10).zero_(), leaf * 2]
    if any(kind(each) != kind(plain) for each in [*alike, leaf.grad.clone()]):
        raise _UnexpectedError("tensors of one kind differ")
    different = [
        plain.t(),
        plain[:, :9],
        plain[:, ::2],
        plain[:5],
        plain.view(10, 6),
        plain.view(60),
        plain.double(),
        plain.half(),
        plain.to(torch.int32),
        plain.to(torch.complex64),
        plain.to("meta"),
        plain.to_sparse(),
        torch._neg_view(plain),
        plain[:1].expand(6, 10),
    ]
    numbers = torch.empty(6, 10, dtype=torch.complex64, device="cpu")
    if any(kind(each) == kind(plain) for each in different) or kind(numbers) == kind(numbers.conj()):
        raise _UnexpectedError("tensors of different kinds are alike")
    for tensor in (leaf, alike[2], leaf.grad):
        words = _tensor_words(tensor)
        start = words_at(words[found.storage], _STORAGE_WORDS)[found.data] + 4 * words[found.offset]
        if start != tensor.data_ptr():
            raise _UnexpectedError("a tensor lies elsewhere")
    if words_at(_tensor_words(leaf)[found.autograd], _AUTOGRAD_WORDS)[found.gradient] != leaf.grad._cdata:
        raise _UnexpectedError("the gradient of a tensor stands elsewhere")
    leaf.grad = None
    if words_at(_tensor_words(leaf)[found.autograd], _AUTOGRAD_WORDS)[found.gradient] != found.no_gradient:
        raise _UnexpectedError("no gradient looks like one")
