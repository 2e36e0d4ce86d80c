"""Loss scaling (torch.amp.GradScaler): unscaled once, skipped wholly on any non-zero found_inf, on every path of ours."""

from __future__ import annotations

import contextlib
import copy
import pickle

import pytest
import torch
from torch.amp import GradScaler

import fusedopt
from cases import CASES, copies, draw_gradients, make_parameters, named
from fusedopt.kernels import backends
from snapshot import Snapshot, same_bits

SHAPES = [(33,), (3, 5), (), (0,), (130,)]
# A few rows, with states of each kind; all of them would repeat the same code.
SOME = ["sgd", "sgd-dampening", "momentum", "adam-amsgrad-l2", "adamw"]
found_infs = pytest.mark.parametrize("found_inf", [1.0, 2.0, torch.inf, torch.nan], ids=str)


class Path:
    """One way that a step of ours can take: a forced backend, or options of the constructor."""

    def __init__(self, name, backend=None, **options):
        self.name, self.backend, self.options = name, backend, options

    def __str__(self):
        return self.name

    def using(self):
        return backends.use(self.backend) if self.backend else contextlib.nullcontext()

    def make(self, case, params):
        return case.make_ours(params, **self.options)

    def exists_for(self, case):
        """Whether the class has the options of this path, and torch's foreach takes what they are combined with."""
        if not self.options.get("foreach"):
            return True
        return case.truth.__module__.startswith("torch.optim") and not isinstance(case.kwargs["lr"], torch.Tensor)


PATHS = [
    Path("default"),
    Path("numpy", "numpy"),
    Path("tensor", "tensor"),
    Path("fused=False", fused=False),
    Path("foreach=True", foreach=True),
    Path("triton", "triton"),
]


def on_every_path(names=None):
    """Parametrize by the rows of these names, or all, with every path that they have."""
    rows = CASES if names is None else [named(name) for name in names]
    return pytest.mark.parametrize(
        ("case", "path"),
        [
            pytest.param(case, path, id=f"{case}-{path}", marks=[pytest.mark.triton] if path.backend == "triton" else [])
            for case in rows
            for path in PATHS
            if path.exists_for(case)
        ],
    )


@contextlib.contextmanager
def scaling(optimizer, found_inf, grad_scale=None):
    """Set what GradScaler.step sets on an optimizer that scales by itself, and take it away again."""
    optimizer.grad_scale = None if grad_scale is None else torch.tensor(grad_scale)
    optimizer.found_inf = torch.tensor(found_inf)
    yield
    del optimizer.grad_scale, optimizer.found_inf


def scale_gradients(params, scale):
    for p in params:
        p.grad.mul_(scale)


def assert_same(ours, expected):
    """Assert equal bits of parameters and states; a state that only one has must be as new."""
    for group, other_group in zip(ours.param_groups, expected.param_groups, strict=True):
        for p, q in zip(group["params"], other_group["params"], strict=True):
            assert same_bits(p, q)
            for key in ours.state.get(p, {}) | expected.state.get(q, {}):
                assert same_bits(ours.state[p][key], expected.state[q][key]), key


def assert_as_new(optimizer):
    """Assert that no parameter has counted a step, nor has a state other than zeros."""
    for state in optimizer.state.values():
        for key, value in state.items():
            assert torch.count_nonzero(value) == 0, key


# --- skipping ----------------------------------------------------------------------------------------------------------------


@found_infs
@on_every_path(SOME)
@pytest.mark.parametrize("grad_scale", [None, 4.0], ids=["unscaled before", "scaled"])
def test_first_step_is_skipped(case, path, found_inf, grad_scale):
    params = make_parameters(SHAPES)
    untouched = copies(params)
    optimizer, expected = path.make(case, params), path.make(case, untouched)
    draw_gradients(params, untouched)
    params[0].grad[:5] = torch.inf
    before = [p.detach().clone() for p in params]
    with path.using(), scaling(optimizer, found_inf, grad_scale):
        optimizer.step()
    assert all(map(same_bits, params, before))
    assert_as_new(optimizer)
    # The steps after it are those of an optimizer that has never seen it.
    for _ in range(2):
        draw_gradients(params, untouched)
        with path.using():
            optimizer.step()
            expected.step()
    assert_same(optimizer, expected)


@found_infs
@on_every_path(SOME)
def test_later_step_is_skipped(case, path, found_inf):
    params = make_parameters(SHAPES)
    untouched = copies(params)
    optimizer, expected = path.make(case, params), path.make(case, untouched)
    for _ in range(2):
        draw_gradients(params, untouched)
        with path.using():
            optimizer.step()
            expected.step()
    before = Snapshot(optimizer, grads=False)
    draw_gradients(params)
    params[1].grad[:] = torch.nan
    with path.using(), scaling(optimizer, found_inf, 4.0):
        optimizer.step()
    before.assert_unchanged()
    draw_gradients(params, untouched)
    with path.using():
        optimizer.step()
        expected.step()
    assert_same(optimizer, expected)


def test_a_skipped_step_leaves_a_late_parameter_as_new():
    first, late = make_parameters([(7,), (9,)])
    optimizer = fusedopt.SGD([first, late], lr=0.1, momentum=0.9, dampening=0.5)
    first.grad = torch.randn(7)
    optimizer.step()
    late.grad = torch.full((9,), torch.inf)
    with scaling(optimizer, 1.0, 4.0):
        optimizer.step()
    late.grad = torch.ones(9)
    optimizer.step()
    assert torch.equal(optimizer.state[late]["momentum_buffer"], torch.ones(9))  # its first gradient, undampened


# --- unscaling ---------------------------------------------------------------------------------------------------------------


@on_every_path()
def test_scaled_step_is_the_step_of_unscaled_gradients(case, path):
    params = make_parameters(SHAPES)
    plain = copies(params)
    optimizer, expected = path.make(case, params), path.make(case, plain)
    for scale in (4.0, 65536.0, 0.5):  # powers of two: their division is exact
        draw_gradients(params, plain)
        scale_gradients(params, scale)
        with path.using(), scaling(optimizer, 0.0, scale):
            optimizer.step()
        # Written back, and once: torch's clipping and logging after the step see true gradients. Before the step of the
        # other one, since torch's foreach changes gradients in place with Nesterov's momentum.
        if not (case.kwargs.get("nesterov") and path.options.get("foreach")):
            assert all(same_bits(p.grad, q.grad) for p, q in zip(params, plain, strict=True))
        with path.using():
            expected.step()
        assert_same(optimizer, expected)


@on_every_path(SOME)
def test_gradients_unscaled_before_the_step_are_left_alone(case, path):
    params = make_parameters(SHAPES)
    plain = copies(params)
    optimizer, expected = path.make(case, params), path.make(case, plain)
    draw_gradients(params, plain)
    with path.using(), scaling(optimizer, 0.0):
        optimizer.step()
    with path.using():
        expected.step()
    assert all(same_bits(p.grad, q.grad) for p, q in zip(params, plain, strict=True))
    assert_same(optimizer, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@on_every_path(["adamw"])
def test_scaled_gradients_of_every_dtype(dtype, case, path):
    params = make_parameters(SHAPES, dtype)
    plain = copies(params)
    optimizer, expected = path.make(case, params), path.make(case, plain)
    draw_gradients(params, plain)
    scale_gradients(params, 16.0)
    with path.using(), scaling(optimizer, 0.0, 16.0):
        optimizer.step()
    with path.using():
        expected.step()
    assert all(same_bits(p.grad, q.grad) for p, q in zip(params, plain, strict=True))
    assert_same(optimizer, expected)


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scale_tensors_of_other_shapes_and_dtypes(shape, dtype):
    params = make_parameters([(20,)])
    plain = copies(params)
    optimizer, expected = (fusedopt.AdamW(each, lr=0.1) for each in (params, plain))
    draw_gradients(params, plain)
    scale_gradients(params, 8.0)
    optimizer.grad_scale, optimizer.found_inf = torch.full(shape, 8.0, dtype=dtype), torch.zeros(shape, dtype=dtype)
    optimizer.step()
    expected.step()
    assert_same(optimizer, expected)


@pytest.mark.parametrize("found_inf", [0.0, 1.0])
@pytest.mark.parametrize("options", [{}, {"fused": False}, {"foreach": True}], ids=str)
def test_sparse_gradients_are_unscaled_and_skipped(found_inf, options):
    params = make_parameters([(6, 3), (5,)])
    plain = copies(params)
    optimizer, expected = fusedopt.SGD(params, lr=0.1, **options), torch.optim.SGD(plain, lr=0.1)
    values, indices = torch.randn(2, 3), torch.tensor([[1, 4]])
    plain[0].grad = torch.sparse_coo_tensor(indices, values, (6, 3), check_invariants=True)
    params[0].grad = torch.sparse_coo_tensor(indices, values * 4, (6, 3), check_invariants=True)
    plain[1].grad = torch.ones(5)
    params[1].grad = torch.full((5,), 4.0)
    with scaling(optimizer, found_inf, 4.0):
        optimizer.step()
    if not found_inf:
        expected.step()
        assert torch.equal(params[0].grad.to_dense(), plain[0].grad.to_dense())
    assert_same(optimizer, expected)


# --- with torch's GradScaler -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unscale_first", [False, True], ids=["step alone", "unscale_ first"])
@on_every_path(SOME)
def test_training_with_grad_scaler(case, path, unscale_first):
    """Overflows at the first and at later steps: the same weights as the truth, which torch's scaler unscales and skips."""
    inputs = torch.randn(6, 8, 4, dtype=torch.float64)
    models, optimizers, scalers = [], [], []
    for make in (lambda params: path.make(case, params), case.make_truth):
        torch.manual_seed(1)
        models.append(torch.nn.Sequential(torch.nn.Linear(4, 9), torch.nn.Tanh(), torch.nn.Linear(9, 1)).double())
        optimizers.append(make(list(models[-1].parameters())))
        scalers.append(GradScaler("cpu", init_scale=1024.0, growth_interval=2))
    for number, batch in enumerate(inputs):
        for model, optimizer, scaler in zip(models, optimizers, scalers, strict=True):
            optimizer.zero_grad()
            loss = model(batch).square().mean() * (torch.inf if number in (0, 3) else 1.0)
            scaler.scale(loss).backward()
            with path.using():
                if unscale_first:
                    scaler.unscale_(optimizer)
                scaler.step(optimizer)
            scaler.update()
            assert not hasattr(optimizer, "found_inf")
    assert scalers[0].get_scale() == scalers[1].get_scale()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12)


def test_grad_scaler_steps_float16_parameters():
    # GradScaler refuses to unscale float16 gradients by itself; an optimizer that scales takes them, as torch's fused does.
    param = torch.nn.Parameter(torch.ones(40, dtype=torch.float16))
    optimizer, scaler = fusedopt.AdamW([param], lr=0.1), GradScaler("cpu", init_scale=8.0)
    scaler.scale(param.float().sum()).backward()
    scaler.step(optimizer)
    assert torch.equal(param.grad, torch.ones_like(param))
    assert (param < 1).all()


def test_grad_scaler_without_any_gradient():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer, scaler = fusedopt.AdamW([param], lr=0.1), GradScaler("cpu")
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)  # sets found_inf to the number 0, the sum of no tensors
    assert torch.equal(param, torch.ones(3))


# --- the class says that it scales -------------------------------------------------------------------------------------------

CLASSES = sorted({case.ours for case in CASES}, key=lambda each: each.__name__)


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "deepcopy", "pickle"]
)
@pytest.mark.parametrize("optimizer_class", CLASSES)
def test_copies_support_amp_scaling(optimizer_class, copied):
    optimizer = optimizer_class([torch.nn.Parameter(torch.ones(3))], lr=0.1)
    assert optimizer_class._step_supports_amp_scaling is True
    assert "_step_supports_amp_scaling" not in vars(optimizer)
    assert copied(optimizer)._step_supports_amp_scaling is True


@pytest.mark.parametrize("optimizer_class", CLASSES)
@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_disabled_kernels_still_scale(optimizer_class, found_inf, monkeypatch):
    monkeypatch.setenv("FUSEDOPT_DISABLE", "1")
    params = make_parameters([(12,)])
    plain = copies(params)
    optimizer, expected = (optimizer_class(each, lr=0.1) for each in (params, plain))
    draw_gradients(params, plain)
    scale_gradients(params, 4.0)
    with scaling(optimizer, found_inf, 4.0):
        optimizer.step()
    if not found_inf:
        expected.step()
    assert_same(optimizer, expected)


# --- what only a GPU can show ------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("found_inf", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("case", [named(name) for name in SOME], ids=str)
def test_scaled_steps_on_a_gpu_do_not_wait_for_it(case, found_inf):
    params = [p.detach().cuda().requires_grad_() for p in make_parameters(SHAPES)]
    plain = copies(params)
    optimizer, expected = case.make_ours(params), case.make_ours(plain)
    for each in (params, plain):  # the first step compiles and fills tables
        for p in each:
            p.grad = torch.ones_like(p)
    optimizer.step()
    expected.step()
    optimizer.grad_scale = torch.tensor(4.0, device="cuda")
    optimizer.found_inf = torch.tensor(found_inf, device="cuda")
    for p in params:
        p.grad = torch.full_like(p, 4.0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    del optimizer.grad_scale, optimizer.found_inf
    if not found_inf:
        expected.step()
    for p in (*params, *plain):
        p.grad = torch.ones_like(p)
    optimizer.step()
    expected.step()
    for p, q in zip(params, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    if "step" in optimizer.state[params[0]]:
        assert optimizer.state[params[0]]["step"].item() == expected.state[plain[0]]["step"].item()


@pytest.mark.gpu
def test_scale_on_a_gpu_for_parameters_on_the_cpu():
    params = make_parameters([(20,)])
    plain = copies(params)
    optimizer, expected = (fusedopt.AdamW(each, lr=0.1) for each in (params, plain))
    draw_gradients(params, plain)
    scale_gradients(params, 4.0)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0, device="cuda"), torch.tensor(0.0, device="cuda")
    optimizer.step()
    expected.step()
    assert_same(optimizer, expected)
    optimizer.found_inf = torch.tensor(1.0, device="cuda")
    before = Snapshot(optimizer, grads=False)
    optimizer.step()
    before.assert_unchanged()
