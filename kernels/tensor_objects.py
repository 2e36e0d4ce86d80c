"""Asks thousands of tensors at once whether they are what they were, by reading the C++ objects behind them.

Python asks one tensor after the other, for each of its properties: 1.1 milliseconds a step for the 4,000 tensors that AdamW
meets with 1,000 parameters, twice as long as the update of their million elements. Compiled code that compares the
words of ``c10::TensorImpl`` and ``c10::StorageImpl`` with those noted earlier takes a twentieth. It decides nothing but
"unchanged": whatever differs, however harmless, is looked at anew by Python.

Where the words lie is not written down anywhere, so it is found out, by tensors made to differ in one property each, and
then tried on others. Where anything is not as expected, which another release of torch may bring, Python asks as before.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor

from fusedopt.kernels import source

if TYPE_CHECKING:
    from fusedopt.kernels.tables import Bucket

_WORD = 8
#: Words that are looked at: both objects are larger than this (22 and 10 words in torch 2.13).
_TENSOR_WORDS, _STORAGE_WORDS, _AUTOGRAD_WORDS = 22, 8, 12
#: Words of the object of Python, which is longer.
_OBJECT_WORDS = 4
#: Dimensions up to which an object holds its sizes and strides itself.
_MOST_DIMENSIONS = 5


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


class _UnexpectedError(Exception):
    pass


def _words(address: int, count: int) -> list[int]:
    return list((ctypes.c_int64 * count).from_address(address))


def _tensor_words(tensor: Tensor) -> list[int]:
    return _words(tensor._cdata, _TENSOR_WORDS)


def _storage_words(tensor: Tensor) -> list[int]:
    return _words(tensor.untyped_storage()._cdata, _STORAGE_WORDS)


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
    handle = _only([i for i, word in enumerate(_words(id(tensor), _OBJECT_WORDS)) if word == tensor._cdata], "the object of C++")
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
    none = _words(_tensor_words(leaf)[autograd], _AUTOGRAD_WORDS)
    leaf.grad = tensor
    some = _words(_tensor_words(leaf)[autograd], _AUTOGRAD_WORDS)
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
    )
    _try(found)
    return found


def _tracking(tensor: Tensor, counter: int) -> list[int]:
    """Return the bytes of a version counter at which the version of ``tensor`` stands."""
    places = set(range(_WORD, 3 * _WORD, 4))
    for _ in range(5):
        tensor.zero_()
        found = (ctypes.c_uint32 * 6).from_address(counter)
        places = {place for place in places if found[place // 4] == tensor._version}
    return sorted(places)


#: The word behind the number of entries in CPython's dict (PEP 509), up to 3.13.
_DICT_VERSION = 3


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
        before = _words(id(held), _DICT_VERSION + 1)[_DICT_VERSION]
        change()
        if _words(id(held), _DICT_VERSION + 1)[_DICT_VERSION] == before:
            return None
    before = _words(id(held), _DICT_VERSION + 1)[_DICT_VERSION]
    _ = held.get("step"), list(held.items()), held.copy(), len(held)
    return _DICT_VERSION if _words(id(held), _DICT_VERSION + 1)[_DICT_VERSION] == before else None


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
        start = _words(words[found.storage], _STORAGE_WORDS)[found.data] + 4 * words[found.offset]
        if start != tensor.data_ptr():
            raise _UnexpectedError("a tensor lies elsewhere")
    if _words(_tensor_words(leaf)[found.autograd], _AUTOGRAD_WORDS)[found.gradient] != leaf.grad._cdata:
        raise _UnexpectedError("the gradient of a tensor stands elsewhere")
    leaf.grad = None
    if _words(_tensor_words(leaf)[found.autograd], _AUTOGRAD_WORDS)[found.gradient] != found.no_gradient:
        raise _UnexpectedError("no gradient looks like one")


_TEMPLATE = '''\
"""Generated by fusedopt.kernels.tensor_objects for torch {torch} (runtime {runtime})."""

from numba import njit

from fusedopt.kernels.cpu_runtime import JIT, add_to_count, word


@njit(**JIT)
def same_kind(tensor, row):
    difference = 0
    for i, (place, mask) in enumerate({kind}):
        difference |= (word(tensor, place) ^ row[i]) & mask
    return difference == 0


@njit(**JIT)
def same_place(tensor, row):
    storage = word(tensor, {storage})
    if storage != row[0]:
        return False
    difference = word(tensor, {offset}) ^ row[1]
    for i, place in enumerate({memory}):
        difference |= word(storage, place) ^ row[2 + i]
    return difference == 0


@njit("void(int64[:, ::1], int64[::1], int64[:, ::1], int64[:, ::1], int64[:, ::1])", cache=True, **JIT)
def note(tensors, gradients, places, kinds, gradient_kinds):
    for row in range(tensors.shape[0]):
        for i in range(tensors.shape[1]):
            storage = word(tensors[row, i], {storage})
            noted = places[row * tensors.shape[1] + i]
            noted[0], noted[1] = storage, word(tensors[row, i], {offset})
            for j, place in enumerate({memory}):
                noted[2 + j] = word(storage, place)
    for i in range(tensors.shape[1]):
        for j, (place, mask) in enumerate({kind}):
            kinds[i, j] = word(tensors[0, i], place) & mask
        if gradients[i] != 0:
            for j, (place, mask) in enumerate({kind}):
                gradient_kinds[i, j] = word(gradients[i], place) & mask
            gradient_kinds[i, {deleter_place}] = word(word(gradients[i], {storage}), {deleter})


@njit(
    "boolean(int64[:, ::1], int64[:, ::1], int64[:, ::1], int64[:, ::1], int64[:, ::1], int64[::1], int64[:, ::1], int64, int64, "
    "int64[::1], int64[::1])",
    cache=True,
    **JIT
)
def unchanged(objects, tensors, places, kinds, gradient_kinds, lengths, addresses, itemsize, no_gradient, dicts, versions):
    for i in range(dicts.size):
        if word(dicts[i], {dict_place}) != versions[i]:
            return False
    for row in range(tensors.shape[0]):
        for i in range(tensors.shape[1]):
            if word(objects[row, i], {handle}) != tensors[row, i]:  # and the old one may be gone
                return False
            if not same_place(tensors[row, i], places[row * tensors.shape[1] + i]):
                return False
    for i in range(tensors.shape[1]):
        tensor = tensors[0, i]
        if not same_kind(tensor, kinds[i]):
            return False
        autograd = word(tensor, {autograd})
        gradient = no_gradient if autograd == 0 else word(autograd, {gradient})
        if gradient == no_gradient or gradient == 0:
            if gradient_kinds[i, 0] != 0:  # the class of a gradient that was there
                return False
            continue
        if not same_kind(gradient, gradient_kinds[i]):
            return False
        storage = word(gradient, {storage})
        if word(storage, {deleter}) != gradient_kinds[i, {deleter_place}]:
            return False
        start = word(storage, {data})
        address = start + itemsize * word(gradient, {offset})
        distance = address - addresses[0, i]
        if lengths[i] > 0 and (start == 0 or (distance != 0 and -lengths[i] < distance < lengths[i])):
            return False
        addresses[1, i] = address
    return True


@njit("void(int64[:, ::1])", cache=True, **JIT)
def count_versions(tensors):
    for row in range(tensors.shape[0]):
        for i in range(tensors.shape[1]):
            counter = word(tensors[row, i], {version})
            if counter != 0:
                add_to_count(counter + {count})
'''


@functools.cache
def _functions() -> Any:
    from fusedopt.kernels import cpu_runtime

    found = layout()
    assert found is not None
    text = _TEMPLATE.format(
        **vars(found),
        torch=torch.__version__,
        runtime=source.fingerprint([cpu_runtime]),
        memory=tuple(range(found.data, found.storage_end)),
        deleter_place=len(found.kind),
        dict_place=found.dict_version or 0,
    )
    return source.load("tensor_objects", text)


class Watch:
    """What was noted of a bucket's tensors when all had been looked at.

    Args:
        bucket: its parameters and states must outlive the watch.
        dicts: which hold the states; where they have versions, they are watched as well.
        gradients: by parameter, with memory apart from their parameters'; None where there is none.
    """

    def __init__(self, bucket: Bucket, dicts: Sequence[dict[str, Any]], gradients: Sequence[Tensor | None]) -> None:
        found = layout()
        assert found is not None
        functions = _functions()
        columns = [bucket.parameters, *bucket.states]
        self._tensors = numpy.array([[tensor._cdata for tensor in column] for column in columns], numpy.int64)
        self._places = numpy.zeros((self._tensors.size, 2 + found.storage_end - found.data), numpy.int64)
        self._kinds = numpy.zeros((len(gradients), len(found.kind)), numpy.int64)
        self._gradient_kinds = numpy.zeros((len(gradients), len(found.kind) + 1), numpy.int64)
        objects = numpy.array([0 if gradient is None else gradient._cdata for gradient in gradients], numpy.int64)
        functions.note(self._tensors, objects, self._places, self._kinds, self._gradient_kinds)
        itemsizes = [gradient.element_size() for gradient in gradients if gradient is not None]
        #: Whether the watch knows also that the dicts hold what they held.
        self.watches_dicts = found.dict_version is not None
        self._dicts = list(dicts) if self.watches_dicts else []
        places = numpy.array([id(each) for each in self._dicts], numpy.int64)
        versions = [_words(id(each) + _WORD * _DICT_VERSION, 1)[0] for each in self._dicts]
        self._arguments = (
            numpy.array([[id(tensor) for tensor in column] for column in columns], numpy.int64),
            self._tensors,
            self._places,
            self._kinds,
            self._gradient_kinds,
            bucket.bytes,
            bucket.addresses,
            max(itemsizes, default=1),  # all of one format
            found.no_gradient,
            places,
            numpy.array(versions, numpy.int64),
        )
        self._unchanged, self._count_versions = functions.unchanged, functions.count_versions

    def unchanged(self) -> bool:
        """Whether all is as it was but for the addresses of gradients, which are written into the bucket's.

        After False they may be anything.
        """
        return bool(self._unchanged(*self._arguments))

    def count_versions(self) -> None:
        """Tell autograd that parameters and states have been written."""
        self._count_versions(self._tensors)


def watch(bucket: Bucket, dicts: Sequence[dict[str, Any]], gradients: Sequence[Tensor | None]) -> Watch | None:
    """Return a watch over the tensors of ``bucket``, or None where their objects cannot be read."""
    present = [gradient for gradient in gradients if gradient is not None]
    if layout() is None or any(tensor.dim() > _MOST_DIMENSIONS for tensor in (*bucket.written, *present)):
        return None
    return Watch(bucket, dicts, gradients)
