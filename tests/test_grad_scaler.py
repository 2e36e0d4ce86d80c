"""torch.amp.GradScaler drives our optimizers, which say by their class that they scale, with kernels and without."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.amp import GradScaler

import fusedopt
from amp_paths import SHAPES, SOME, assert_same, on_every_path, scale_gradients, scaling
from cases import CASES, copies, draw_gradients, make_parameters, named
from snapshot import Snapshot

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
    for each in (params, plain):
        for p in each:
            p.grad = torch.ones_like(p)
    optimizer.grad_scale, optimizer.found_inf = torch.ones((), device="cuda"), torch.zeros((), device="cuda")
    optimizer.step()  # compiles, fills tables, and begins to count on the device
    expected.step()
    optimizer.grad_scale.fill_(4.0)
    optimizer.found_inf.fill_(found_inf)
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
