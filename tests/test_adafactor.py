"""Adafactor's kernels against torch's for-loop in float64; tiles, threads, layouts, and who steps what no kernel serves."""

import contextlib
import copy
import math
import sys

import numpy
import pytest
import torch

import fusedopt
from cases import Case, copies, draw_gradients, make_parameters, tensor_lr
from checkpoints import assert_equal_states, through_a_file
from fusedopt.kernels import adafactor_tiles, backends, threads
from single_step import checked_step, one_thread
from snapshot import same_bits

OURS = fusedopt.Adafactor, torch.optim.Adafactor
CASES = [
    Case("default", *OURS, {}),
    Case("decay-maximize", *OURS, {"lr": 0.05, "weight_decay": 0.1, "maximize": True}),
    Case("beta2-decay", *OURS, {"lr": 0.1, "beta2_decay": -1.0}),
    Case("constant-average", *OURS, {"lr": 0.1, "beta2_decay": 0.0}),
    Case("no-clipping", *OURS, {"lr": 0.1, "d": 1e6}),
    Case("large-eps", *OURS, {"lr": 0.1, "eps": (0.5, 10.0)}),
    Case("small-eps", *OURS, {"lr": 0.1, "eps": (1e-15, 0.0)}),
    Case("tensor-lr", *OURS, {"lr": tensor_lr(0.1)}),
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
# A tile is 65,536 elements, a block of it 1,024 columns, a narrow matrix has less than 16.
SHAPES = {
    "number": (),
    "vector": (33,),
    "pieces of a vector": (65_536 + 7,),
    "matrix": (4, 6),
    "one row": (1, 5),
    "one column": (5, 1),
    "odd width": (9, 131),
    "matrix of one tile": (256, 256),
    "blocks of rows": (700, 100),
    "blocks of columns": (3, 24_000),
    "blocks of both": (130, 1030),
    "tall": (70_000, 3),
    "wide": (1, 66_000),
    "kernels of a convolution": (16, 8, 3, 3),
    "tiles of kernels": (130, 64, 3, 3),
    "kernels of one element": (260, 300, 1, 1),
    "wide matrices": (5, 100, 200),
    "large matrices": (2, 300, 400),
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def trained(params, steps=3, **options):
    """Parameters after some steps with gradients from torch's generator, and their optimizer."""
    optimizer = fusedopt.Adafactor(params, **options)
    for _ in range(steps):
        draw_gradients(params)
        optimizer.step()
    return optimizer


# --- the numbers --------------------------------------------------------------------------------------------------------------


@each_dtype
@each_case
def test_steps_are_torchs(case, dtype):
    params = make_parameters([(), (33,), (4, 6), (9, 131), (3, 2, 3, 3)], dtype)
    optimizer = case.make_ours(params)
    for _ in range(3):
        draw_gradients(params)
        checked_step(case, optimizer)


@each_shape
def test_every_shape_of_tiles(shape):
    params = make_parameters([shape])
    case = Case("shape", *OURS, {"lr": 0.1, "weight_decay": 0.1})
    optimizer = case.make_ours(params, fused=True)
    for _ in range(2):
        draw_gradients(params)
        checked_step(case, optimizer)


@pytest.mark.parametrize(
    ("gradients", "states"), [(torch.float32, torch.float32), (torch.float64, torch.float16)], ids=["master states", "all others"]
)
def test_any_mix_of_dtypes(gradients, states):
    params = make_parameters([(33,), (20, 30), (300, 300)], torch.bfloat16)
    case = Case("mixed", *OURS, {"lr": 0.1})
    optimizer = trained(params, steps=1)
    for p in params:
        own = optimizer.state[p]
        own.update({name: value.to(states) for name, value in own.items() if name != "step"})
        p.grad = None
        if hasattr(p, "grad_dtype"):  # which newer torch asks for
            p.grad_dtype = gradients
        p.grad = torch.randn(p.shape).to(gradients)
    optimizer.param_groups[0].update(lr=0.1)
    checked_step(case, optimizer)
    assert {value.dtype for p in params for name, value in optimizer.state[p].items() if name != "step"} == {states}


@pytest.mark.parametrize("exponent", [-30, -18, 0, 18], ids=lambda exponent: f"1e{exponent}")
def test_gradients_of_any_size(exponent):
    """Squares of 1e-30 are zero in float32, those of 1e18 nearly too large."""
    params = make_parameters([(50,), (50, 40)])
    optimizer = fusedopt.Adafactor(params, lr=0.1, eps=(1e-30, 1e-3))
    before = copies(params)
    for p in params:
        p.grad = torch.randn(p.shape) * 10.0**exponent
    optimizer.step()
    for p, old in zip(params, before, strict=True):
        assert p.isfinite().all()
        assert not torch.equal(p, old)


def test_zero_gradients_are_no_nan():
    """torch squares its epsilon in float32, where 1e-30 becomes zero, and divides zero by zero."""
    weight = torch.nn.Parameter(torch.ones(4, 6))
    weight.grad = torch.ones(4, 6)
    weight.grad[1] = 0
    theirs = torch.nn.Parameter(torch.ones(4, 6))
    theirs.grad = weight.grad.clone()
    fusedopt.Adafactor([weight], eps=(1e-30, 1e-3)).step()
    torch.optim.Adafactor([theirs], eps=(1e-30, 1e-3)).step()
    assert theirs[1].isnan().all()
    assert torch.equal(weight[1], torch.ones(6))
    assert (weight[0] < 1).all()


def test_the_norm_of_float16_does_not_overflow():
    values = torch.full((400, 400), 300.0)  # a norm of 120,000
    ours, exact = torch.nn.Parameter(values.half()), torch.nn.Parameter(values.double())
    for p in (ours, exact):
        p.grad = torch.ones_like(p)
    fusedopt.Adafactor([ours], lr=0.01).step()
    torch.optim.Adafactor([exact], lr=0.01, eps=(torch.finfo(torch.float16).eps, 1e-3)).step()
    assert same_bits(ours, exact.half())


def test_each_dtype_has_its_own_epsilon():
    """torch gives all parameters of a group that of the first."""
    params = [*make_parameters([(20, 30)], torch.bfloat16), *make_parameters([(20, 30)])]
    apart = [copy.deepcopy(p) for p in params]
    for p, other in zip(params, apart, strict=True):
        p.grad = (1e-4 * torch.randn(20, 30)).to(p.dtype)  # below the epsilon of bfloat16, above that of float32
        other.grad = p.grad.clone()
    fusedopt.Adafactor(params).step()
    for other in apart:
        fusedopt.Adafactor([other]).step()
    assert all(map(same_bits, params, apart))


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_what_is_not_finite_spreads_as_in_torch(value):
    ours = make_parameters([(33,), (20, 30), (300, 300)])
    theirs = copies(ours)
    draw_gradients(ours, theirs)
    for p in (*ours, *theirs):
        p.grad.view(-1)[7] = value
    fusedopt.Adafactor(ours).step()
    torch.optim.Adafactor(theirs).step()
    for p, other in zip(ours, theirs, strict=True):
        assert torch.equal(p.isnan(), other.isnan())


def test_a_parameter_without_elements_is_passed_over():
    params = make_parameters([(0,), (0, 3), (3, 0), (4, 6)])
    before = params[3].detach().clone()
    optimizer = trained(params, steps=1)
    assert not torch.equal(params[3], before)
    assert all(float(optimizer.state[p]["step"]) == 1 for p in params)


# --- tiles and threads --------------------------------------------------------------------------------------------------------


@each_shape
def test_tiles_cover_every_element_once(shape):
    tables = adafactor_tiles.cut([shape])
    counted = numpy.zeros(math.prod(shape), int)
    width = int(tables.tensors[0, adafactor_tiles.WIDTH])
    for tile in tables.tiles:
        first, matrices, rows, columns = (
            tile[place]
            for place in (adafactor_tiles.FIRST, adafactor_tiles.MATRICES, adafactor_tiles.ROWS, adafactor_tiles.COLUMNS)
        )
        for row in range(matrices * rows):
            counted[first + row * width : first + row * width + columns] += 1
        assert matrices * rows * columns <= adafactor_tiles.TILE_ELEMENTS
    assert (counted == 1).all()


@pytest.mark.parametrize("helpers", ["team", "pool"])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_results_do_not_depend_on_the_number_of_threads(count, helpers, monkeypatch):
    if helpers == "pool":
        monkeypatch.setattr(threads, "_team", threads._NoTeam())
    # Many of one tile, for all threads to have one at a time.
    alone = make_parameters([*SHAPES.values(), *20 * [(256, 256)]])
    together = copies(alone)
    state = torch.random.get_rng_state()
    with one_thread():
        first = trained(alone)
    before = torch.get_num_threads()
    torch.random.set_rng_state(state)
    torch.set_num_threads(count)
    try:
        second = trained(together)
    finally:
        torch.set_num_threads(before)
    assert all(map(same_bits, alone, together))
    assert_equal_states(second.state_dict(), first.state_dict())


def test_results_do_not_depend_on_other_parameters():
    alone, together = (make_parameters(SHAPES.values()) for _ in range(2))
    for p, other in zip(alone, together, strict=True):
        with torch.no_grad():
            other.copy_(p)
        p.grad = torch.randn(p.shape)
        other.grad = p.grad.clone()
    fusedopt.Adafactor(together).step()
    for p in alone:
        fusedopt.Adafactor([p]).step()
    assert all(map(same_bits, alone, together))


@each_dtype
@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 1000])
def test_sums_of_squares_are_exact_to_float64(count, dtype):
    from numba import njit

    from fusedopt.kernels import adafactor_runtime
    from fusedopt.kernels.cpu_runtime import JIT

    inner = getattr(adafactor_runtime, f"sum_of_squares_{str(dtype).removeprefix('torch.')}")
    values = torch.randn(count, dtype=torch.float64).to(dtype)
    found = njit(**JIT)(lambda address, count: inner(address, count))(values.data_ptr(), count)
    right = math.fsum(float(value) ** 2 for value in values)
    assert abs(found - right) <= 2**-50 * right


# --- memory -------------------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "transposed": lambda p: p.t().contiguous().t(),
    "every other column": lambda p: torch.stack([p, p], dim=-1).flatten(-2)[..., ::2],
    "unaligned": lambda p: torch.cat([p.new_zeros(1), p.flatten()])[1:].view_as(p),
}


@pytest.mark.parametrize("what", ["parameter", "gradient", "state"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_change_nothing(layout, what):
    plain = make_parameters([(70, 30), (300, 400)])
    others = copies(plain)
    if what == "parameter":
        others = [torch.nn.Parameter(LAYOUTS[layout](p.detach())) for p in others]
    optimizers = [fusedopt.Adafactor(params, weight_decay=0.1) for params in (plain, others)]
    for step in range(3):
        draw_gradients(plain, others)
        for p in others:
            if what == "gradient":
                p.grad = LAYOUTS[layout](p.grad)
            if what == "state" and step == 1:
                own = optimizers[1].state[p]
                own["row_var"] = torch.stack([own["row_var"]] * 2, dim=1)[:, 0]
                own["col_var"] = torch.stack([own["col_var"]] * 2, dim=-1)[..., 0]
                assert own["row_var"].stride() != (1, 1)
        for optimizer in optimizers:
            optimizer.step()
    assert all(same_bits(p, other.contiguous()) for p, other in zip(plain, others, strict=True))


def test_channels_last():
    plain = make_parameters([(8, 6, 3, 5)])
    others = [torch.nn.Parameter(p.detach().to(memory_format=torch.channels_last)) for p in plain]
    optimizers = [fusedopt.Adafactor(params) for params in (plain, others)]
    for _ in range(2):
        draw_gradients(plain, others)
        for optimizer in optimizers:
            optimizer.step()
    assert others[0].is_contiguous(memory_format=torch.channels_last)
    assert same_bits(plain[0], others[0].contiguous())


@pytest.mark.parametrize("gradient", ["itself", "ahead", "behind", "expanded", "negated"])
def test_gradients_that_are_no_memory_of_their_own(gradient):
    values, shifted = torch.randn(4097), torch.randn(4096)
    results = []
    for apart in (True, False):
        storage = values.clone()
        p = torch.nn.Parameter((storage[1:] if gradient == "behind" else storage[:4096]).view(64, 64))
        own = {
            "itself": lambda p=p: p.detach(),
            "ahead": lambda storage=storage: storage[1:].view(64, 64),
            "behind": lambda storage=storage: storage[:4096].view(64, 64),
            "expanded": lambda: shifted[:64].expand(64, 64),
            "negated": lambda: torch._neg_view(shifted.view(64, 64)),
        }[gradient]()
        p.grad = own.clone() if apart else own
        fusedopt.Adafactor([p]).step()
        results.append(p.detach().clone())
    assert same_bits(*results)


def test_a_gradient_whose_memory_was_freed_is_refused_before_anything_changes():
    params = make_parameters([(4, 6), (5, 7)])
    draw_gradients(params)
    params[1].grad.untyped_storage().resize_(0)
    before = copies(params)
    with pytest.raises(RuntimeError, match="the gradient of parameter 1 has no memory"):
        fusedopt.Adafactor(params).step()
    assert all(map(same_bits, params, before))


def test_a_state_of_another_shape_is_refused_before_anything_changes():
    params = make_parameters([(4, 6), (5, 7)])
    optimizer = trained(params, steps=1)
    optimizer.state[params[1]]["row_var"] = torch.zeros(4, 1)
    before = copies(params)
    draw_gradients(params)
    with pytest.raises(RuntimeError, match=r"the state 'row_var' of parameter 1 has shape \(4, 1\).*must have \(5, 1\)"):
        optimizer.step()
    assert all(map(same_bits, params, before))


def test_parameters_that_share_memory_step_one_after_the_other():
    results = []
    for cls in OURS:
        torch.manual_seed(1)
        storage = torch.randn(30, 10)
        params = [torch.nn.Parameter(part) for part in (storage[:20], storage[10:], storage[:5])]
        optimizer = cls(params, lr=0.1)
        for _ in range(3):
            draw_gradients(params)
            optimizer.step()
        results.append((storage, [float(optimizer.state[p]["step"]) for p in params]))
    torch.testing.assert_close(results[0], results[1])


def test_versions_count_what_a_step_writes():
    (p,) = make_parameters([(4, 6)])
    optimizer = trained([p])
    written = [p, *optimizer.state[p].values()]
    before = [tensor._version for tensor in written]
    optimizer.step()
    assert all(tensor._version > version for tensor, version in zip(written, before, strict=True))


# --- from step to step --------------------------------------------------------------------------------------------------------


def test_what_changes_between_steps_is_seen():
    """Gradients that come late or are missing, other data, other states, other hyperparameters."""
    case = Case("changes", *OURS, {"lr": 0.1})
    params = make_parameters([(33,), (4, 6), (300, 300)])
    optimizer = case.make_ours(params)

    def step(*missing):
        draw_gradients(params)
        for index in missing:
            params[index].grad = None
        checked_step(case, optimizer)

    step(1)
    step()
    step(0, 2)
    optimizer.param_groups[0].update(lr=0.5, d=1.5, eps=(1e-5, 0.1), weight_decay=0.3, beta2_decay=-0.5, maximize=True)
    step()
    params[1].data = torch.randn(7, 5)
    optimizer.state[params[1]] = {}
    step()
    optimizer.state[params[2]]["row_var"] = torch.rand(300, 1)
    step()
    optimizer.state[params[0]]["step"].fill_(10.0)
    step()
    assert [float(optimizer.state[p]["step"]) for p in params] == [11.0, 3.0, 6.0]


def test_a_parameter_that_rests_may_be_as_it_likes():
    params = make_parameters([(4, 6), (5, 7)])
    optimizer = trained(params, steps=1)
    params[1].data = torch.randn(2, 3)  # and its state is that of another shape
    params[1].grad = None
    params[0].grad = torch.randn(4, 6)
    before = params[0].detach().clone()
    optimizer.step()
    assert not torch.equal(params[0], before)
    params[1].grad = torch.randn(2, 3)
    with pytest.raises(RuntimeError, match="the state 'row_var' of parameter 1"):
        optimizer.step()


def test_a_group_that_is_added_steps_too():
    first, second = make_parameters([(4, 6), (5, 7)])
    optimizer = trained([first])
    optimizer.add_param_group({"params": [second], "lr": 0.5})
    draw_gradients([first, second])
    checked_step(Case("groups", *OURS, {}), optimizer)


def test_float32_states_of_bfloat16_survive_a_checkpoint():
    params = make_parameters([(33,), (4, 6)], torch.bfloat16)
    optimizer = trained(params)
    for p in params:
        own = optimizer.state[p]
        own.update({name: value.float() for name, value in own.items()})
    draw_gradients(params)
    optimizer.step()
    others = copies(params)
    loaded = fusedopt.Adafactor(others)
    loaded.load_state_dict(through_a_file(optimizer.state_dict()))
    draw_gradients(params, others)
    optimizer.step()
    loaded.step()
    assert all(map(same_bits, params, others))
    assert_equal_states(loaded.state_dict(), optimizer.state_dict())


def test_warmup_compiles_what_the_first_step_needs():
    params = make_parameters([(3, 4), (5,)], torch.float16)
    optimizer = fusedopt.Adafactor(params)
    fusedopt.warmup(optimizer, unscale=True)
    modules = set(sys.modules)
    assert any("cpu_adafactor_float16_float16_float16_float16" in name for name in modules)
    assert not optimizer.state
    draw_gradients(params)
    optimizer.step()
    assert set(sys.modules) == modules


@pytest.mark.parametrize("direct", [True, False], ids=["unscaled by the step", "unscaled before"])
def test_a_gradient_scaler_unscales_and_skips(direct):
    ours, plain = (make_parameters([(4, 6), (33,)]) for _ in range(2))
    for p, other in zip(ours, plain, strict=True):
        with torch.no_grad():
            other.copy_(p)
    optimizer, expected = fusedopt.Adafactor(ours, fused=True), fusedopt.Adafactor(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for value in (1.0, math.inf, 2.0):
        optimizer.zero_grad()
        expected.zero_grad()
        scale = scaler.get_scale()
        scaler.scale(sum((p**2).sum() * value for p in ours)).backward()
        sum((p**2).sum() * value for p in plain).backward()
        if not direct:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if math.isfinite(value):
            expected.step()
        else:
            assert scaler.get_scale() < scale
    assert all(map(same_bits, ours, plain))


# --- who steps what no kernel serves ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "variables", "path"),
    [
        ({}, {}, "numba (compiled kernel for CPUs)"),
        ({"fused": True}, {}, "numba (compiled kernel for CPUs)"),
        ({"fused": False}, {}, "torch (fused=False)"),
        ({"foreach": True}, {}, "torch (foreach=True)"),
        ({}, {"FUSEDOPT_DISABLE": "1"}, "torch (FUSEDOPT_DISABLE is set)"),
        ({"fused": True}, {"FUSEDOPT_DISABLE": "1"}, "torch (FUSEDOPT_DISABLE is set)"),
        ({}, {"NUMBA_DISABLE_JIT": "1"}, "torch (NUMBA_DISABLE_JIT is set)"),
    ],
    ids=["default", "fused", "not fused", "foreach", "disabled", "fused, disabled", "no compiler"],
)
def test_who_steps(options, variables, path, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    ours, theirs = (make_parameters([(4, 6), (33,)]) for _ in range(2))
    for p, other in zip(ours, theirs, strict=True):
        with torch.no_grad():
            other.copy_(p)
    optimizer = fusedopt.Adafactor(ours, **options)
    torchs = torch.optim.Adafactor(theirs, foreach=options.get("foreach"))
    warns = "NUMBA_DISABLE_JIT" in variables
    with pytest.warns(UserWarning, match="unfused, where NUMBA_DISABLE_JIT is set") if warns else contextlib.nullcontext():
        for _ in range(2):
            draw_gradients(ours, theirs)
            optimizer.step()
            torchs.step()
    assert all(line.endswith(f"-> {path}") for line in optimizer.explain().splitlines())
    if path.startswith("torch"):
        assert all(map(same_bits, ours, theirs))
    torch.testing.assert_close(ours, theirs)


def test_fused_insists_on_a_kernel(monkeypatch):
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    (p,) = make_parameters([(4, 6)])
    draw_gradients([p])
    optimizer = fusedopt.Adafactor([p], fused=True)
    with pytest.raises(RuntimeError, match=r"has no kernel: NUMBA_DISABLE_JIT is set; construct the optimizer with fused=None"):
        optimizer.step()
    assert "error" in optimizer.explain()


def test_on_a_gpu_torchs_own_steps():
    (p,) = make_parameters([(4, 6)])
    with backends.use("triton"):
        assert fusedopt.Adafactor([p]).explain().endswith("-> torch (Adafactor has no kernel for GPUs)")


def test_complex_parameters_are_refused_before_anything_changes():
    params = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))]
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=r"^Adafactor does not support complex parameters$"):
        fusedopt.Adafactor([{"params": [p]} for p in params]).step()
    assert torch.equal(params[0], torch.ones(3))


def test_what_it_cannot_do_in_a_step_is_refused():
    p = torch.nn.Parameter(torch.zeros(5))
    with pytest.raises(ValueError, match="Adafactor is no rule on elements, and cannot take max_grad_norm, ema_decay"):
        fusedopt.Adafactor([{"params": [p], "max_grad_norm": 1e-3, "ema_decay": 0.9}])


def test_its_state_in_torchs_format_is_its_state():
    p = torch.nn.Parameter(torch.randn(4, 4))
    optimizer = fusedopt.Adafactor([p])
    p.grad = torch.randn(4, 4)
    optimizer.step(zero_grad=True)
    assert not p.grad.any()
    plain = optimizer.state_dict(format="torch")
    torch.testing.assert_close(plain["state"], optimizer.state_dict()["state"], rtol=0, atol=0)
    assert "fused" not in plain["param_groups"][0]
