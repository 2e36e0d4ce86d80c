"""Formats by drawn examples: a training that is interrupted, copied, chunked otherwise or converted, against one that is not."""

from __future__ import annotations

import copy
import pickle
import tempfile
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fusedopt
from fusedopt import low_bit
from fusedopt.kernels import backends, tables
from test_formats import draw, equal, flattened, parameters, through_a_file, train

BFLOAT16 = torch.bfloat16
#: Classes by the number of their states and of what is rounded.
CLASSES = {"SGD": {"momentum": 0.9}, "AdamW": {}, "Adam": {"amsgrad": True}, "RMSprop": {"centered": True}, "Lion": {}, "NAdam": {}}

shapes = st.lists(
    st.one_of(
        st.tuples(st.integers(1, 90), st.integers(1, 90)),
        st.tuples(st.integers(1, 12), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
        st.tuples(st.integers(0, 9000)),
    ),
    min_size=1,
    max_size=3,
)
formats = st.one_of(st.sampled_from([None, "fp32", "bf16", "8bit"]))


@st.composite
def options(draw_from):
    """A class, a dtype and what is asked for; all of it is served."""
    name = draw_from(st.sampled_from(list(CLASSES)))
    dtype = draw_from(st.sampled_from([torch.float32, BFLOAT16]))
    asked = {"state_format": draw_from(formats), "rounding_seed": draw_from(st.integers(0, 2**64 - 1))}
    if dtype == BFLOAT16:
        rest = [{"master_weights": each} for each in (None, "fp32", "split16", "split8")]
        asked |= draw_from(st.sampled_from([*rest, {"stochastic_rounding": True}]))
    return name, dtype, {**CLASSES[name], **asked}


def make(row, sizes, channels_last=False):
    name, dtype, asked = row
    generator = torch.Generator().manual_seed(7)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in sizes]
    for param in params:
        if channels_last and param.dim() == 4:
            param.data = param.data.to(memory_format=torch.channels_last)
    return getattr(fusedopt, name)(params, lr=1e-2, **asked)


def with_values_of(optimizer, other):
    for p, q in zip(parameters(optimizer), parameters(other), strict=True):
        p.data.copy_(q.data)
    return optimizer


def by_dump(state_dict):
    return pickle.loads(pickle.dumps(state_dict))


WAYS = {"torch.save": through_a_file, "deepcopy": copy.deepcopy, "pickle": by_dump, "flat": flattened}


@pytest.fixture(autouse=True, scope="module")
def small_tensors_in_few_bits():
    """Else most examples would be of float32."""
    before, low_bit.SMALLEST = low_bit.SMALLEST, 300
    yield
    low_bit.SMALLEST = before


@given(row=options(), sizes=shapes, last=st.booleans(), steps=st.integers(1, 3), way=st.sampled_from(list(WAYS)))
def test_a_resumed_training_has_the_bits_of_one_that_went_on(row, sizes, last, steps, way):
    first = train(make(row, sizes, last), steps)
    second = with_values_of(make(row, sizes, last), first)
    second.load_state_dict(WAYS[way](first.state_dict()))
    assert equal(train(first, 2, first=steps), train(second, 2, first=steps))


@given(row=options(), sizes=shapes, last=st.booleans(), way=st.sampled_from([copy.deepcopy, by_dump]))
def test_a_copied_optimizer_goes_on_bit_for_bit(row, sizes, last, way):
    first = train(make(row, sizes, last), 2)
    second = way(first)
    assert equal(train(first, 2, first=2), train(second, 2, first=2))


@given(row=options(), sizes=shapes, chunk=st.sampled_from([256, 512, 4096]), threads=st.integers(1, 4))
def test_chunks_and_threads_change_nothing(row, sizes, chunk, threads):
    whole = train(make(row, sizes), 3)
    before = torch.get_num_threads(), tables.CHUNK
    torch.set_num_threads(threads)
    tables.CHUNK = chunk
    try:
        pieces = train(make(row, sizes), 3)
    finally:
        torch.set_num_threads(before[0])
        tables.CHUNK = before[1]
    assert equal(whole, pieces)


@settings(max_examples=15)
@given(row=options(), sizes=shapes)
def test_numba_has_the_bits_of_numpy(row, sizes):
    ours = train(make(row, sizes), 3)
    with backends.use("numpy"):
        assert equal(ours, train(make(row, sizes), 3))


@given(row=options(), sizes=shapes, other=formats)
def test_another_format_on_resume_starts_from_the_same_numbers_and_says_so(row, sizes, other):
    first = train(make(row, sizes), 2)
    name, dtype, asked = row
    second = with_values_of(make((name, dtype, {**asked, "state_format": other}), sizes), first)
    saved = through_a_file(first.state_dict())
    expected = copy.deepcopy(first.state_dict(format="torch")["state"])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        second.load_state_dict(saved)
        found = copy.deepcopy(second.state_dict(format="torch")["state"])
        draw(second, 2)
        dtypes = held(first)
        second.step()
    for index, state in expected.items():
        for key, value in state.items():
            if value.dim():  # the numbers themselves, but for the last digits that 16 bits do not have
                torch.testing.assert_close(found[index][key].float(), value.float(), rtol=2**-7, atol=0)
    converted = dtypes != held(second)
    assert any("had another format than state_format asks for" in str(each.message) for each in said) == converted
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(second, 1, first=3)


def held(optimizer):
    """The dtypes of states by parameter."""
    states = ((i, optimizer.state[param]) for i, param in enumerate(parameters(optimizer)))
    return {(i, name): value.dtype for i, state in states for name, value in state.items() if value.dim() and name != "master"}


@given(row=options(), sizes=shapes, last=st.booleans())
def test_safetensors_hold_a_training(row, sizes, last):
    """safetensors keeps contiguous tensors and text, and nothing else."""
    storage = pytest.importorskip("safetensors", reason="safetensors is not installed: pip install safetensors")
    from safetensors.torch import save_file

    first = train(make(row, sizes, last), 2)
    second = with_values_of(make(row, sizes, last), first)
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/optimizer.safetensors"
        tensors, metadata = fusedopt.flatten_state(first.state_dict())
        save_file(tensors, file, metadata)
        with storage.safe_open(file, "pt") as opened:
            read = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # it has no other way
            second.load_state_dict(fusedopt.unflatten_state(read, opened.metadata()))
    assert equal(train(first, 2, first=2), train(second, 2, first=2))
