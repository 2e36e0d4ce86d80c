"""Formats in the pipeline: equal bits on every backend, masters, checkpoints in and out of formats, memory."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import pickle
import warnings

import pytest
import torch

import fusedopt
from fusedopt import low_bit
from fusedopt.kernels import backends, tables
from snapshot import same_bits

BFLOAT16 = torch.bfloat16


def make(name="AdamW", dtype=torch.float32, shapes=((70, 67), (10,)), device="cpu", **options):
    generator = torch.Generator().manual_seed(1)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in shapes]
    return getattr(fusedopt, name)(params, **{"lr": 1e-2, **options})


def parameters(optimizer):
    return [param for group in optimizer.param_groups for param in group["params"]]


def draw(optimizer, step):
    generator = torch.Generator().manual_seed(step)
    for param in parameters(optimizer):
        gradient = torch.randn(param.shape, generator=generator) * torch.exp(2 * torch.randn(param.shape, generator=generator))
        gradient.view(-1)[200:900] = 0  # whole blocks and parts of some
        param.grad = (1e-3 * gradient).to(param.device, param.dtype)


def train(optimizer, steps=4, first=0):
    for step in range(first, first + steps):
        draw(optimizer, step)
        optimizer.step()
    return optimizer


def equal(a, b):
    pairs = zip(parameters(a), parameters(b), strict=True)
    return all(
        same_bits(p.cpu(), q.cpu())
        and a.state[p].keys() == b.state[q].keys()
        and all(same_bits(value.cpu(), b.state[q][name].cpu()) for name, value in a.state[p].items())
        for p, q in pairs
    )


# --- backends ----------------------------------------------------------------------------------------------------------------

VARIANTS = {
    "8bit": ("AdamW", torch.float32, {"state_format": "8bit"}),
    "bf16": ("AdamW", torch.float32, {"state_format": "bf16"}),
    "moment alone": ("AdamW", torch.float32, {"state_format": {"exp_avg": "8bit"}}),
    "mixed": ("AdamW", torch.float32, {"state_format": {"exp_avg": "bf16", "exp_avg_sq": "8bit"}}),
    "amsgrad": ("Adam", torch.float32, {"state_format": "8bit", "amsgrad": True}),
    "float16": ("AdamW", torch.float16, {"state_format": "8bit"}),
    "split16": ("AdamW", BFLOAT16, {"state_format": "8bit", "master_weights": "split16"}),
    "split8": ("AdamW", BFLOAT16, {"state_format": "bf16", "master_weights": "split8"}),
    "fp32 master": ("AdamW", BFLOAT16, {"master_weights": "fp32"}),
    "by chance": ("AdamW", BFLOAT16, {"state_format": "8bit", "stochastic_rounding": True}),
    "SGD": ("SGD", torch.float32, {"state_format": "8bit", "momentum": 0.9}),
    "Lion": ("Lion", BFLOAT16, {"state_format": "8bit", "stochastic_rounding": True}),
    "Momentum": ("Momentum", torch.float32, {"state_format": "8bit"}),
    "RMSprop": ("RMSprop", torch.float32, {"state_format": "8bit", "centered": True, "momentum": 0.9}),
    "Adamax": ("Adamax", torch.float32, {"state_format": "8bit"}),
    "Adagrad": ("Adagrad", torch.float32, {"state_format": "8bit"}),
    "Adadelta": ("Adadelta", torch.float32, {"state_format": "8bit"}),
    "NAdam": ("NAdam", torch.float32, {"state_format": "8bit"}),
    "RAdam": ("RAdam", torch.float32, {"state_format": "8bit"}),
    "Rprop": ("Rprop", torch.float32, {"state_format": "8bit"}),
    "ASGD": ("ASGD", torch.float32, {"state_format": {"ax": "8bit"}}),
    "average": ("AdamW", BFLOAT16, {"state_format": "8bit", "master_weights": "split16", "ema_decay": 0.9}),
    "clipped": ("AdamW", torch.float32, {"state_format": "8bit", "max_grad_norm": 1e-3}),
}
variants = pytest.mark.parametrize(("name", "dtype", "options"), VARIANTS.values(), ids=VARIANTS)


def by(backend, name, dtype, options, shapes=((70, 67), (10,))):
    with backends.use(backend):
        return train(make(name, dtype, shapes, **options))


@variants
def test_numba_has_the_bits_of_numpy(name, dtype, options):
    assert equal(by("numba", name, dtype, options), by("numpy", name, dtype, options))


TRITON = ["8bit", "mixed", "moment alone", "split16", "split8", "fp32 master", "by chance", "Adamax"]


@pytest.mark.triton
@pytest.mark.parametrize(("name", "dtype", "options"), [pytest.param(*VARIANTS[each], id=each) for each in TRITON])
def test_triton_has_the_bits_of_numpy(name, dtype, options, monkeypatch):
    monkeypatch.setattr(low_bit, "SMALLEST", 300)
    shapes = [(331,)]
    assert equal(by("triton", name, dtype, options, shapes), by("numpy", name, dtype, options, shapes))


@pytest.mark.parametrize("variant", ["8bit", "split8", "by chance", "SGD"])
def test_tensors_have_the_codes_of_numpy(variant):
    """torch's own root may be off by its last digit, but not beside codes."""
    assert equal(by("tensor", *VARIANTS[variant], [(70, 67)]), by("numpy", *VARIANTS[variant], [(70, 67)]))


@pytest.mark.parametrize("variant", ["8bit", "bf16", "by chance"])
def test_threads_and_chunks_change_nothing(variant, monkeypatch):
    name, dtype, options = VARIANTS[variant]
    shapes = [(500, 401)]
    whole = train(make(name, dtype, shapes, **options))
    monkeypatch.setattr(tables, "CHUNK", 4096)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        pieces = train(make(name, dtype, shapes, **options))
    finally:
        torch.set_num_threads(before)
    assert equal(whole, pieces)


def test_layouts_have_the_codes_of_memory():
    """Blocks are of neighbours in memory, whatever the strides."""
    plain, last = (make(shapes=[(8, 16, 7, 9)], state_format="8bit") for _ in range(2))
    (param,) = parameters(last)
    param.data = param.data.to(memory_format=torch.channels_last)
    for optimizer in (plain, last):
        train(optimizer)
    codes = last.state[param]["exp_avg"]
    assert codes.stride() == param.stride()
    memory = torch.nn.Parameter(torch.zeros(8 * 7 * 9 * 16))
    with torch.no_grad():
        memory.copy_(make(shapes=[(8, 16, 7, 9)]).param_groups[0]["params"][0].permute(0, 2, 3, 1).reshape(-1))
    flat = fusedopt.AdamW([memory], lr=1e-2, state_format="8bit")
    for step in range(4):
        draw(plain, step)
        memory.grad = parameters(plain)[0].grad.permute(0, 2, 3, 1).reshape(-1)
        flat.step()
    assert torch.equal(codes.permute(0, 2, 3, 1).reshape(-1), flat.state[memory]["exp_avg"])
    assert torch.equal(param.permute(0, 2, 3, 1).reshape(-1), memory)


def test_seeds_differ_and_repeat():
    runs = [train(make(state_format="8bit", rounding_seed=seed)) for seed in (0, 0, 1)]
    assert equal(runs[0], runs[1])
    assert not equal(runs[0], runs[2])


def test_a_step_left_out_by_a_scaler_changes_nothing():
    optimizer = train(make(dtype=BFLOAT16, state_format="8bit", master_weights="split16"))
    before = copy.deepcopy(optimizer.state_dict())
    held = [param.detach().clone() for param in parameters(optimizer)]
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(1.0)
    optimizer.step()
    assert all(map(same_bits, held, parameters(optimizer)))
    after = optimizer.state_dict()["state"]
    assert all(same_bits(value, after[i][name]) for i, state in before["state"].items() for name, value in state.items())


def test_gradients_are_unscaled_and_made_zero():
    pair = [make(state_format="8bit") for _ in range(2)]
    for step in range(3):
        for optimizer in pair:
            draw(optimizer, step)
        for param in parameters(pair[1]):
            param.grad *= 4.0
        pair[1].grad_scale, pair[1].found_inf = torch.tensor(4.0), torch.tensor(0.0)
        pair[0].step()
        pair[1].step(zero_grad=True)
        assert all(not param.grad.any() for param in parameters(pair[1]))
    assert equal(*pair)


# --- which formats -----------------------------------------------------------------------------------------------------------


def test_small_parameters_and_averages_of_parameters_keep_float32():
    optimizer = train(make("ASGD", shapes=[(4096,), (4095,)], state_format="8bit"))
    assert [optimizer.state[p]["ax"].dtype for p in parameters(optimizer)] == [torch.float32] * 2
    optimizer = train(make(shapes=[(4096,), (4095,)], state_format="8bit"))
    assert [optimizer.state[p]["exp_avg"].dtype for p in parameters(optimizer)] == [torch.uint8, torch.float32]


def test_groups_have_formats_of_their_own():
    params = [torch.nn.Parameter(torch.randn(5000)) for _ in range(3)]
    groups = [{"params": params[:1]}, {"params": params[1:2], "state_format": "bf16"}, {"params": params[2:], "state_format": None}]
    optimizer = train(fusedopt.AdamW(groups, state_format="8bit"))
    assert [optimizer.state[p]["exp_avg"].dtype for p in params] == [torch.uint8, torch.bfloat16, torch.float32]


def test_explain_names_formats():
    text = make(dtype=BFLOAT16, state_format="8bit", master_weights="split16").explain()
    assert "bfloat16, exp_avg 8bit, exp_avg_sq 8bit, master split16, cpu -> numba" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_format": "4bit"}, "Invalid state_format: '4bit'"),
        ({"state_format": {"exp_avg": "int8"}}, "Invalid state_format"),
        ({"master_weights": "fp16"}, "Invalid master_weights: 'fp16'"),
        ({"master_weights": "fp32", "stochastic_rounding": True}, "ask for one"),
        ({"rounding_seed": -1}, "Invalid rounding_seed: -1"),
    ],
    ids=["format", "mapping", "master", "both", "seed"],
)
def test_unknown_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_unknown_states_are_refused():
    optimizer = make(state_format={"exp_average": "8bit"})
    with pytest.raises(ValueError, match=r"names the states \['exp_average'\], but there are \['exp_avg', 'exp_avg_sq'\]"):
        train(optimizer)


@pytest.mark.parametrize("count", [5000, 5], ids=["large", "small"])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float64, {"state_format": "8bit"}),
        (torch.float64, {"state_format": "fp32"}),
        (torch.complex64, {"state_format": "bf16"}),
        (torch.complex64, {"state_format": {"exp_avg": "fp32"}}),
        (torch.complex128, {"state_format": "8bit"}),
        (torch.float16, {"master_weights": "fp32"}),
        (torch.float64, {"master_weights": "split16"}),
        (torch.float16, {"stochastic_rounding": True}),
    ],
    ids=[
        "float64",
        "float64, fp32",
        "complex64",
        "complex64, one state in fp32",
        "complex128",
        "master of float16",
        "master of float64",
        "float16 by chance",
    ],
)
def test_parameters_that_formats_do_not_serve_are_refused(dtype, options, count):
    """Of whatever size, though a small one would not be kept in fewer bits."""
    served, other = torch.nn.Parameter(torch.zeros(5000)), torch.nn.Parameter(torch.zeros(count, dtype=dtype))
    groups = [{"params": [served]}, {"params": [other]}]
    optimizer = fusedopt.AdamW(groups, **options)
    for param in (served, other):
        param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match=rf"parameter 1 \(shape \({count},\), {dtype}\).*give it a group"):
        optimizer.step()
    assert not optimizer.state
    optimizer.param_groups[1].update(dict.fromkeys(options, None))
    optimizer.step()
    assert other.detach().abs().min() > 0


@pytest.mark.parametrize("has", ["no states", "states", "states of a checkpoint"])
def test_warmup_prepares_the_kernels_of_short_formats(has, monkeypatch):
    optimizer = make(dtype=BFLOAT16, state_format="8bit", master_weights="split16")
    if has != "no states":
        train(optimizer, 1)
    if has == "states of a checkpoint":
        optimizer.load_state_dict(optimizer.state_dict())
    prepared, prepare = [], backends.prepare
    monkeypatch.setattr(backends, "prepare", lambda backend, kind: (prepared.append(kind), prepare(backend, kind)))
    fusedopt.warmup(optimizer)
    ahead = set(prepared)
    prepared.clear()
    train(optimizer, 2)
    assert set(prepared) <= ahead
    assert any(kind.chance for kind in ahead)


# --- masters -----------------------------------------------------------------------------------------------------------------


def test_split16_takes_the_steps_of_fp32():
    """And both take those of a float32 parameter, which the forward pass sees rounded."""
    whole = make()
    halves = [make(dtype=BFLOAT16, master_weights=master, state_format="fp32") for master in ("fp32", "split16")]
    for optimizer in halves:
        for p, q in zip(parameters(optimizer), parameters(whole), strict=True):
            q.data.copy_(p)
    for step in range(20):
        for optimizer in (halves[0], halves[1], whole):
            draw(optimizer, step)
            for param in parameters(optimizer):
                param.grad.copy_(param.grad.bfloat16())
            optimizer.step()
    for fp32, split, param in zip(*map(parameters, (*halves, whole)), strict=True):
        assert same_bits(halves[0].state[fp32]["master"], param)
        assert same_bits(low_bit.resolved(split, halves[1].state[split]["master"]), param)
        assert same_bits(fp32, split)
        assert halves[1].state[split]["master"].dtype == torch.int16


def test_parameters_with_a_master_are_rounded_to_nearest_and_ties_upward():
    numbers = torch.tensor([1.0 + 2**-8, 1.0 + 3 * 2**-8, -(1.0 + 2**-8), 3.4e38, 1.0 + 2**-9, float("inf")]).repeat(1000)
    param = torch.nn.Parameter(torch.zeros(6000, dtype=BFLOAT16))
    optimizer = fusedopt.SGD([param], lr=1.0, master_weights="fp32")
    param.grad = torch.zeros_like(param)
    optimizer.step()
    optimizer.state[param]["master"].copy_(numbers)
    param.data.copy_(torch.tensor([1 + 2**-7, 1 + 2**-6, -(1 + 2**-7), float("inf"), 1.0, float("inf")]).repeat(1000))
    before = param.detach().clone()
    optimizer.step()
    assert same_bits(param, before)
    assert same_bits(optimizer.state[param]["master"], numbers)


@pytest.mark.parametrize("options", [{"master_weights": "split8"}, {"stochastic_rounding": True}], ids=["split8", "by chance"])
def test_small_steps_add_up(options):
    """A thousand steps, each a fiftieth of what bfloat16 can tell apart."""
    param = torch.nn.Parameter(torch.ones(8192, dtype=BFLOAT16))
    optimizer = fusedopt.SGD([param], lr=2**-7 / 50, **options)
    for _ in range(1000):
        param.grad = -torch.ones_like(param)
        optimizer.step()
    assert float(param.detach().double().mean()) == pytest.approx(1 + 1000 * 2**-7 / 50, rel=2e-3)


@pytest.mark.parametrize("master", ["fp32", "split16", "split8"])
def test_a_parameter_that_somebody_else_writes_is_noticed(master):
    optimizer = train(make(dtype=BFLOAT16, master_weights=master))
    param = parameters(optimizer)[0]
    with torch.no_grad():
        param.fill_(1.0)
    optimizer.param_groups[0]["lr"] = 0.0
    train(optimizer, 1)
    held = optimizer.state[param]["master"]
    assert torch.equal(param.detach(), torch.ones_like(param))
    assert torch.equal(low_bit.resolved(param, held), torch.ones(param.shape))


@pytest.mark.parametrize("master", ["fp32", "split16", "split8"])
def test_a_write_to_parameters_that_share_memory_is_noticed(master):
    """The second of them steps after the first, by a plan that is made anew each time."""
    whole = torch.nn.Parameter(torch.randn(64).to(BFLOAT16))
    part = torch.nn.Parameter(whole.detach()[16:48])
    optimizer = train(fusedopt.SGD([whole, part], lr=1e-3, master_weights=master))
    assert optimizer.state[part]["master"].any()
    with torch.no_grad():
        part.fill_(1.0)
    optimizer.param_groups[0]["lr"] = 0.0
    train(optimizer, 1)
    assert torch.equal(low_bit.resolved(part, optimizer.state[part]["master"]), torch.ones(32))
    assert torch.equal(low_bit.resolved(whole, optimizer.state[whole]["master"])[16:48], torch.ones(32))


def test_swapped_averages_leave_masters_alone():
    pair = [train(make(dtype=BFLOAT16, master_weights="split16", ema_decay=0.5)) for _ in range(2)]
    with pair[0].swap_ema():
        pass
    for optimizer in pair:
        train(optimizer, 2, first=4)
    assert equal(*pair)


# --- checkpoints -------------------------------------------------------------------------------------------------------------


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def flattened(state_dict):
    return fusedopt.unflatten_state(*fusedopt.flatten_state(state_dict))


@pytest.mark.parametrize("via", [through_a_file, copy.deepcopy, flattened], ids=["torch.save", "in memory", "flat"])
@variants
def test_resumes_bit_for_bit(name, dtype, options, via):
    first = train(make(name, dtype, **options))
    second = make(name, dtype, **options)
    for p, q in zip(parameters(second), parameters(first), strict=True):
        p.data.copy_(q.data)
    second.load_state_dict(via(first.state_dict()))
    for optimizer in (first, second):
        train(optimizer, 3, first=4)
    assert equal(first, second)


def test_a_state_dict_keeps_its_codes_while_training_goes_on():
    """Codes of now beside words of then would mean neither."""
    first = train(make(state_format="8bit"))
    saved, expected = first.state_dict(), copy.deepcopy(first.state_dict(format="torch")["state"][0])
    train(first, 2, first=4)
    second = make(state_format="8bit")
    second.load_state_dict(saved)
    found = second.state_dict(format="torch")["state"][0]
    assert all(same_bits(found[name], expected[name]) for name in ("exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("variant", ["8bit", "split16"])
def test_states_that_somebody_else_puts_into_place_are_read(variant):
    """As ZeroRedundancyOptimizer does, past load_state_dict."""
    name, dtype, options = VARIANTS[variant]
    first, second = train(make(name, dtype, **options)), make(name, dtype, **options)
    for state, p, q in zip(first.state_dict()["state"].values(), parameters(first), parameters(second), strict=True):
        q.data.copy_(p.data)
        second.state[q] = copy.deepcopy(state)
    assert equal(train(first, 2, first=4), train(second, 2, first=4))


@pytest.mark.parametrize("via", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_go_on_bit_for_bit(via):
    first = train(make(dtype=BFLOAT16, state_format="8bit", master_weights="split16"))
    second = via(first)
    for optimizer in (first, second):
        train(optimizer, 3, first=4)
    assert equal(first, second)


@pytest.mark.parametrize("name", ["AdamW", "SGD", "RMSprop", "Adagrad"])
def test_torch_loads_plain_states(name):
    options = {"momentum": 0.9} if name == "SGD" else {}
    ours = train(make(name, state_format="8bit", ema_decay=0.9, **options))
    theirs = getattr(torch.optim, name)([torch.nn.Parameter(p.detach().clone()) for p in parameters(ours)], lr=1e-2, **options)
    saved = ours.state_dict(format="torch")
    expected = getattr(torch.optim, name)([torch.nn.Parameter(torch.ones(3))], lr=1e-2, **options)
    parameters(expected)[0].grad = torch.ones(3)
    expected.step()
    assert set(saved["state"][0]) == set(expected.state_dict()["state"][0])
    theirs.load_state_dict(saved)
    train(theirs, 1, first=4)
    for param in parameters(theirs):
        assert all(value.dtype == torch.float32 for value in theirs.state[param].values() if isinstance(value, torch.Tensor))
        assert param.isfinite().all()


def test_checkpoint_of_torch_loads_into_8_bits():
    theirs = torch.optim.AdamW([torch.nn.Parameter(torch.randn(8192))])
    for step in range(4):
        draw(theirs, step)
        parameters(theirs)[0].grad[::3] = 0  # which leaves states of zero
        theirs.step()
    ours = fusedopt.AdamW([torch.nn.Parameter(parameters(theirs)[0].detach().clone())], state_format="8bit")
    ours.load_state_dict(theirs.state_dict())
    kept = theirs.state_dict()["state"][0]
    draw(ours, 4)
    parameters(ours)[0].grad.zero_()
    with pytest.warns(UserWarning, match="the states exp_avg, exp_avg_sq, .* another format than state_format asks for"):
        ours.step()
    state = ours.state_dict(format="torch")["state"][0]
    assert torch.allclose(state["exp_avg"] / 0.9, kept["exp_avg"], rtol=0.05, atol=float(kept["exp_avg"].abs().max()) * 0.01)
    assert torch.allclose(state["exp_avg_sq"] / 0.999, kept["exp_avg_sq"], rtol=0.2)
    assert state["step"] == 5


@pytest.mark.parametrize("new", [None, "fp32", "bf16", {"exp_avg": "8bit"}], ids=str)
def test_formats_change_on_resume(new):
    first = train(make(state_format="8bit"))
    second = make(state_format=new)
    second.load_state_dict(through_a_file(first.state_dict()))
    assert second.param_groups[0].get("state_format") == new
    before = first.state_dict(format="torch")["state"][0]
    for param in parameters(second):
        param.grad = torch.zeros_like(param)
    with pytest.warns(UserWarning, match="another format than state_format"):
        second.step()
    after = second.state_dict(format="torch")["state"][0]
    assert torch.allclose(after["exp_avg_sq"].float() / 0.999, before["exp_avg_sq"], rtol=0.01)
    tolerance = {"rtol": 0.1, "atol": float(before["exp_avg"].abs().max()) * 0.02}
    assert torch.allclose(after["exp_avg"].float() / 0.9, before["exp_avg"], **tolerance)
    coded = {"exp_avg_words"} if isinstance(new, dict) else set()
    assert {name for name in second.state[parameters(second)[0]] if name.endswith("_words")} == coded
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(second, 2)


def test_masters_change_on_resume():
    first = train(make(dtype=BFLOAT16, master_weights="fp32"))
    second = make(dtype=BFLOAT16, master_weights="split16", lr=0.0)
    for p, q in zip(parameters(second), parameters(first), strict=True):
        p.data.copy_(q.data)
    second.load_state_dict(first.state_dict())
    second.param_groups[0]["lr"] = 0.0
    draw(second, 0)
    with pytest.warns(UserWarning, match="master"):
        second.step()
    for p, q in zip(parameters(second), parameters(first), strict=True):
        assert same_bits(low_bit.resolved(p, second.state[p]["master"]), first.state[q]["master"])


def test_codes_of_another_version_are_refused():
    saved = train(make(state_format="8bit")).state_dict()
    assert saved["param_groups"][0]["codes_version"] == 1
    saved["param_groups"][0]["codes_version"] = 2
    with pytest.raises(ValueError, match="codes of version 2, and this fusedopt knows version 1"):
        make(state_format="8bit").load_state_dict(saved)
    assert "codes_version" not in train(make()).state_dict()["param_groups"][0]


# --- memory ------------------------------------------------------------------------------------------------------------------


def test_memory_is_what_is_allocated():
    optimizer = train(make(shapes=[(1000, 1024)], state_format="8bit"), 1)
    found = fusedopt.memory(optimizer)
    (param,) = parameters(optimizer)
    tensors = [value for value in optimizer.state[param].values() if value.dim()]
    assert found.states - found.bytes["numbers"] == sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    assert found.bytes["parameters"] == found.bytes["gradients"] == 4 * 1024_000
    assert found.bytes_per_parameter <= 2.07
    assert "exp_avg_words" in str(found)


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, 4.0),
        ({"state_format": "fp32"}, 8.0),
        ({"state_format": "bf16"}, 4.0),
        ({"state_format": "8bit", "master_weights": "split16"}, 4.047),
        ({"state_format": "8bit", "master_weights": "split8"}, 3.047),
        ({"state_format": "8bit", "master_weights": "fp32"}, 6.047),
    ],
    ids=str,
)
def test_bytes_a_parameter(options, size):
    optimizer = train(make(dtype=BFLOAT16, shapes=[(1000, 1024)], **options), 1)
    assert fusedopt.memory(optimizer).bytes_per_parameter == pytest.approx(size, abs=1e-3)


# --- layouts, checkpoints and names ------------------------------------------------------------------------------------------


def error_after_a_change_of_layout(change) -> float:
    """The relative error of an update by 8-bit states, whose coordinates have very different sizes, against float32's."""
    updates = []
    for options in ({}, {"state_format": "8bit"}):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(128, 128))
        optimizer = fusedopt.AdamW([p], lr=1e-2, weight_decay=0, **options)
        sizes = torch.logspace(-6, 2, 128).view(128, 1)
        for _ in range(5):
            p.grad = torch.randn(128, 128) * sizes
            optimizer.step()
        optimizer, p = change(optimizer, p, options)
        before, p.grad = p.detach().clone(), torch.randn(128, 128) * sizes
        optimizer.step()
        updates.append(p.detach() - before)
    return float((updates[1] - updates[0]).norm() / updates[0].norm())


def transposed(p):
    return p.detach().t().contiguous().t()


def in_place(optimizer, p, options):
    p.data = transposed(p)
    return optimizer, p


def by_a_checkpoint(optimizer, p, options):
    other = torch.nn.Parameter(transposed(p))
    loaded = fusedopt.AdamW([other], lr=1e-2, weight_decay=0, **options)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return loaded, other


@pytest.mark.parametrize("change", [in_place, by_a_checkpoint])
def test_blocks_follow_the_memory_that_they_were_cut_from(change):
    """Else the words of one block would decode the codes of another; coding anew costs another rounding."""
    assert error_after_a_change_of_layout(change) < 0.03 < 0.5


@pytest.mark.filterwarnings("ignore:the states:UserWarning")
def test_states_in_bf16_become_plain_where_no_format_is_asked_for():
    """Rounded to nearest, slow averages would stay where they are."""
    p = torch.nn.Parameter(torch.randn(8192))
    optimizer = fusedopt.AdamW([p], state_format="bf16")
    p.grad = torch.randn(8192)
    optimizer.step()
    plain = fusedopt.AdamW([p])
    with pytest.warns(UserWarning, match="had another format than state_format asks for"):
        plain.load_state_dict(optimizer.state_dict())
    assert {value.dtype for value in plain.state[p].values()} == {torch.float32}
    assert "state_format" not in plain.param_groups[0]
    saved = optimizer.state_dict(format="torch")["state"][0]
    assert {value.dtype for value in saved.values()} == {torch.float32}


def test_a_master_that_is_not_asked_for_is_dropped():
    p = torch.nn.Parameter(torch.randn(8192).bfloat16())
    optimizer = fusedopt.AdamW([p], master_weights="split16")
    p.grad = torch.randn(8192).bfloat16()
    optimizer.step()
    plain = fusedopt.AdamW([p])
    plain.load_state_dict(optimizer.state_dict())
    with pytest.warns(UserWarning, match="the master of a parameter"):
        plain.step()
    assert "master" not in plain.state[p]


@pytest.mark.parametrize("variant", ["8bit", "split16"])
def test_states_can_be_swapped_in(variant):
    """They are written in place, as torch's are, and go on from there."""
    name, dtype, options = VARIANTS[variant]
    optimizer, other, expected = (train(make(name, dtype, **options)) for _ in range(3))
    train(other, 2, first=4)
    train(expected, 1, first=6)
    state = copy.deepcopy(optimizer.state_dict())
    values = {str(i): param.detach().clone() for i, param in enumerate(parameters(optimizer))}
    with fusedopt.swap_in_optimizer_params_and_state(other, values, state):
        train(other, 1, first=6)
    optimizer.load_state_dict(state)
    for param, value in zip(parameters(optimizer), values.values(), strict=True):
        param.data.copy_(value)
    assert equal(train(optimizer, 1, first=7), train(expected, 1, first=7))


def test_a_mapping_that_is_changed_in_place_is_noticed():
    p = torch.nn.Parameter(torch.ones(8192))
    formats = {"exp_avg": "8bit"}
    optimizer = fusedopt.AdamW([p], state_format=formats)
    p.grad = torch.ones(8192)
    optimizer.step()
    formats["exp_avg_sq"] = "8bit"
    with pytest.warns(UserWarning, match="had another format"):
        optimizer.step()
    assert optimizer.state[p]["exp_avg_sq"].dtype == torch.uint8


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters:UserWarning")
def test_masters_of_a_parameter_that_is_listed_twice_are_kept():
    p = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    optimizer = fusedopt.SGD([p, p], lr=1e-4, master_weights="split16")
    for _ in range(200):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert float(p.detach()[0]) == pytest.approx(0.96, abs=0.004)


@pytest.mark.filterwarnings("ignore:the (states|master):UserWarning")
@pytest.mark.parametrize("backend", ["numba", "tensor"])
@pytest.mark.parametrize("variant", ["8bit", "split16", "split8", "by chance", "SGD", "bf16"])
@pytest.mark.parametrize("default", ["meta device", "float64"])
def test_defaults_of_new_tensors_change_nothing(default, variant, backend):
    """A script may have set them for a model that it is about to make."""
    name, dtype, options = VARIANTS[variant]
    plain = {key: value for key, value in options.items() if key == "momentum"}

    def steps_and_conversions(context):
        optimizer = make(name, dtype, **options)
        for step in range(3):
            draw(optimizer, step)
            with context():
                optimizer.step()
        for other in (plain, options):  # out of the formats, and into them again
            loaded = make(name, dtype, **other)
            for p, q in zip(parameters(loaded), parameters(optimizer), strict=True):
                p.data.copy_(q.data)
            draw(loaded, 3)
            with context():
                loaded.load_state_dict(flattened(optimizer.state_dict()))
                loaded.step()
                assert loaded.state_dict(format="torch")["state"].keys() == loaded.state_dict()["state"].keys()
                assert fusedopt.memory(loaded).states > 0
                assert "numba" in loaded.explain() or backend == "tensor"
            optimizer = loaded
        return optimizer

    with backends.use(backend):
        expected, found = steps_and_conversions(contextlib.nullcontext), steps_and_conversions(functools.partial(changed, default))
    assert all(map(same_bits, parameters(found), parameters(expected)))
    for p, q in zip(parameters(found), parameters(expected), strict=True):
        for key, value in expected.state[q].items():
            assert found.state[p][key].device == value.device
            assert same_bits(found.state[p][key], value) or key == "step"


@contextlib.contextmanager
def changed(default):
    before = torch.get_default_dtype()
    if default == "float64":
        torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta") if default == "meta device" else contextlib.nullcontext():
            yield
    finally:
        torch.set_default_dtype(before)
