"""Reading tensors' objects: nothing that matters to a kernel changes unnoticed, and Python asks where they cannot be read."""

from __future__ import annotations

from dataclasses import replace

import numpy
import pytest
import torch

import fusedopt
from cases import copies, draw_gradients, each_case, make_parameters
from fusedopt.kernels import object_layout, tensor_objects
from snapshot import same_bits

SHAPES = [(12,), (6, 8), (2, 3, 4), ()]


@pytest.fixture
def watched():
    """An optimizer with AdamW's states and the watch over its tensors."""
    params = make_parameters(SHAPES)
    draw_gradients(params)
    optimizer = fusedopt.AdamW(params)
    for _ in range(2):
        optimizer.step()
    (part,) = optimizer._prepared.plan.parts
    assert part._watch.unchanged()
    return optimizer, params, part


def test_layout_is_found_time_and_again():
    kept = []
    for size in range(200):
        assert object_layout._find_layout() == tensor_objects.layout()
        kept = [torch.ones(size + 1, requires_grad=True), *kept[: size % 7]]  # freed memory with other contents


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_layout_does_not_depend_on_the_default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        assert object_layout._find_layout() == tensor_objects.layout()
    finally:
        torch.set_default_dtype(torch.float32)


def set_data(tensor, data):
    tensor.data = data


def set_gradient(param, gradient):
    param.grad = None  # a gradient of another kind is taken in the place of none alone
    param.grad = gradient


others = []


def swap(tensor, other, gradient=None):
    other.grad = gradient
    others.append(other)  # lives on, so that all that is noted is still there
    torch.utils.swap_tensors(tensor, other)


CHANGES = {
    "parameter's data": lambda o, p: set_data(p[0], torch.zeros(12)),
    "parameter transposed": lambda o, p: set_data(p[1], p[1].data.view(8, 6).t()),
    "parameter reshaped": lambda o, p: set_data(p[0], p[0].data.view(3, 4)),
    "parameter shortened": lambda o, p: set_data(p[0], p[0].data[:11]),
    "parameter moved within its storage": lambda o, p: p[1].set_(p[1].untyped_storage(), 8, (5, 8), (8, 1)),
    "parameter cast": lambda o, p: set_data(p[0], p[0].data.double()),
    "parameter's storage freed": lambda o, p: p[0].untyped_storage().resize_(0),
    "parameter's storage copied on writing": lambda o, p: torch._lazy_clone(p[0]),
    "parameter swapped": lambda o, p: swap(p[0], torch.nn.Parameter(torch.zeros(12)), torch.ones(12)),
    "state swapped": lambda o, p: swap(o.state[p[1]]["exp_avg_sq"], torch.zeros(6, 8)),
    "state's data": lambda o, p: set_data(o.state[p[1]]["exp_avg_sq"], torch.zeros(6, 8)),
    "state's storage freed": lambda o, p: o.state[p[1]]["exp_avg_sq"].untyped_storage().resize_(0),
    "state replaced": lambda o, p: o.state[p[2]].update(exp_avg=torch.zeros(2, 3, 4)),
    "state replaced by an equal one": lambda o, p: o.state[p[3]].update(exp_avg=o.state[p[3]]["exp_avg"].clone()),
    "state deleted": lambda o, p: o.state[p[2]].pop("exp_avg"),
    "step count replaced": lambda o, p: o.state[p[2]].update(step=torch.tensor(7.0)),
    "gradient missing": lambda o, p: set_gradient(p[0], None),
    "gradient of another dtype": lambda o, p: (
        setattr(p[0], "data", p[0].data.double()) or set_gradient(p[0], torch.ones(12).double())
    ),
    "gradient in another layout": lambda o, p: set_gradient(p[1], torch.ones(8, 6).t()),
    "gradient expanded": lambda o, p: set_gradient(p[1], torch.ones(()).expand(6, 8)),
    "gradient negated lazily": lambda o, p: set_gradient(p[1], torch._neg_view(torch.ones(6, 8))),
    "gradient sparse": lambda o, p: set_gradient(p[1], torch.ones(6, 8).to_sparse()),
    "gradient's storage freed": lambda o, p: p[1].grad.untyped_storage().resize_(0),
    "gradient's memory that of others": lambda o, p: set_gradient(p[1], torch.from_numpy(numpy.ones((6, 8), numpy.float32))),
    "gradient copied on writing": lambda o, p: set_gradient(p[1], torch._lazy_clone(p[1].grad)),
    "gradient across its parameter": lambda o, p: set_gradient(
        p[0], torch.empty(0).set_(p[0].untyped_storage().resize_(64) or p[0].untyped_storage(), 4, (12,))
    ),
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda name: name.replace(" ", "-"))
def test_what_matters_is_noticed(watched, change):
    optimizer, params, part = watched
    with torch.no_grad():
        CHANGES[change](optimizer, params)
    assert not part._watch.unchanged()


def test_a_parameter_transposed_in_place_is_noticed(watched):
    _, params, part = watched
    with torch.no_grad():
        params[1].t_()
    assert not part._watch.unchanged()


def test_a_missing_gradient_that_comes_is_noticed():
    params = make_parameters(SHAPES)
    draw_gradients(params)
    optimizer = fusedopt.AdamW(params)
    optimizer.step()
    params[1].grad = None
    for _ in range(2):
        optimizer.step()
    (part,) = optimizer._prepared.plan.parts
    assert part._watch.unchanged()
    params[1].grad = torch.ones(6, 8)
    assert not part._watch.unchanged()


def test_new_gradients_of_the_same_kind_are_read(watched):
    _, params, part = watched
    for offset in (0, 3):
        for param in params:
            param.grad = torch.ones(offset + param.numel())[offset:].view(param.shape)
        assert part._watch.unchanged()
        assert part.bucket.addresses[1].tolist() == [param.grad.data_ptr() for param in params]


def test_reading_states_changes_nothing(watched):
    optimizer, params, part = watched
    optimizer.state_dict()
    assert [optimizer.state[p]["step"].item() for p in params] == [2.0] * len(params)
    assert part._watch.unchanged()


def test_versions_are_counted(watched):
    optimizer, params, part = watched
    tensors = [*params, *(optimizer.state[p][name] for p in params for name in ("exp_avg", "exp_avg_sq"))]
    before = [tensor._version for tensor in tensors]
    part._watch.count_versions()
    assert [tensor._version for tensor in tensors] == [version + 1 for version in before]


def test_tensors_without_versions_are_left_alone():
    with torch.inference_mode():
        params = [torch.ones(5), torch.ones(7)]
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer = fusedopt.SGD(params, lr=0.5)
        for step in range(1, 4):
            optimizer.step()
            assert all((param == 1 - 0.5 * step).all() for param in params)
        assert optimizer._prepared.plan.parts[0]._watch is not None


def test_more_dimensions_than_an_object_holds_are_not_watched():
    params = make_parameters([(1, 2, 1, 2, 1, 3)])
    draw_gradients(params)
    optimizer = fusedopt.AdamW(params)
    for _ in range(3):
        optimizer.step()
    assert optimizer._prepared.plan.parts[0]._watch is None


def set_state(optimizer):
    optimizer.state = type(optimizer.state)(dict, optimizer.state)


LIST_CHANGES = {
    "parameter replaced": lambda o: o.param_groups[0]["params"].__setitem__(1, torch.nn.Parameter(torch.zeros(6, 8))),
    "parameters exchanged": lambda o: o.param_groups[0]["params"].reverse(),
    "parameter added": lambda o: o.param_groups[0]["params"].append(torch.nn.Parameter(torch.zeros(3))),
    "parameter removed": lambda o: o.param_groups[0]["params"].pop(),
    "list replaced by an equal one": lambda o: o.param_groups[0].update(params=list(o.param_groups[0]["params"])),
    "group added": lambda o: o.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))]}),
    "state replaced by an equal one": lambda o: o.state.update({o.param_groups[0]["params"][0]: {}}),
    "state deleted": lambda o: o.state.popitem(),
    "states replaced by equal ones": set_state,
}


@pytest.mark.parametrize("change", LIST_CHANGES, ids=lambda name: name.replace(" ", "-"))
def test_changes_of_lists_are_noticed(watched, change):
    optimizer, params, _ = watched
    listed = optimizer._prepared.listed(optimizer.param_groups, optimizer.state)
    assert list(map(id, listed)) == list(map(id, params))
    LIST_CHANGES[change](optimizer)
    assert optimizer._prepared.listed(optimizer.param_groups, optimizer.state) is None


def test_lists_are_noted_again_once_all_is_found_as_it_was(watched):
    optimizer, *_ = watched
    prepared = optimizer._prepared
    stray = torch.zeros(1)
    optimizer.state[stray] = {}
    del optimizer.state[stray]
    assert prepared.listed(optimizer.param_groups, optimizer.state) is None
    optimizer.step()
    assert optimizer._prepared is prepared
    assert prepared.listed(optimizer.param_groups, optimizer.state) is prepared.parameters


@each_case
@pytest.mark.parametrize("known", ["nothing", "all but dicts"])
def test_steps_are_the_same_where_objects_cannot_be_read(case, known, monkeypatch):
    found = tensor_objects.layout()
    params = make_parameters(SHAPES)
    others = copies(params)
    watching, asking = case.make_ours(params), case.make_ours(others)
    for step in range(5):
        draw_gradients(params, others)
        watching.step()
        with monkeypatch.context() as patch:
            patch.setattr(tensor_objects, "layout", lambda: None if known == "nothing" else replace(found, dict_version=None))
            asking.step()
        assert all(map(same_bits, params, others))
        if step == 2:
            assert watching._prepared.plan.parts[0]._watch is not None
            assert (asking._prepared.plan.parts[0]._watch is None) == (known == "nothing")
        if step == 3:
            for optimizer, own in ((watching, params), (asking, others)):
                if "exp_avg" in optimizer.state[own[0]]:
                    optimizer.state[own[0]]["exp_avg"] = torch.zeros(12)


@pytest.mark.parametrize("lie", ["_tensor_words", "_storage_words"])
def test_an_unexpected_layout_is_refused(lie, monkeypatch):
    """As if another release of torch had put everything elsewhere."""
    honest = getattr(object_layout, lie)
    monkeypatch.setattr(object_layout, lie, lambda tensor: [0, *honest(tensor)[:-1]])
    tensor_objects.layout.cache_clear()
    try:
        assert tensor_objects.layout() is None
    finally:
        tensor_objects.layout.cache_clear()


def test_a_layout_that_misses_a_difference_is_refused():
    found = tensor_objects.layout()
    object_layout._try(found)
    for place in (found.offset + 2, found.offset + 3):  # dtype and device; keys
        kind = tuple((each, mask) for each, mask in found.kind if each != place)
        with pytest.raises(object_layout._UnexpectedError, match="alike"):
            object_layout._try(replace(found, kind=kind))
