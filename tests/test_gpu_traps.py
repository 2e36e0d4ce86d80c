"""Traps that only a GPU has: graphs, streams, waits of the host, several devices, addresses that the allocator gives again.

The executing driver cannot show these: it has one device, whose memory is the host's and which is done when a launch returns. What
it can show of them, bits, captured steps, scalers and offsets beyond 32 bits, is in test_gpu_executed.py and test_gpu_captured.py.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch

import fusedopt
from cases import copies, draw_gradients, each_case, make_parameters, named
from snapshot import same_bits

pytestmark = pytest.mark.gpu

SHAPES = [(33,), (4, 6), (0,), (), (70_000,)]
capturable_cases = pytest.mark.parametrize("case", [named(name) for name in ("adam-l2", "adam-amsgrad", "adamw")], ids=str)


def on_gpu(params, device="cuda"):
    return [torch.nn.Parameter(p.detach().to(device)) for p in params]


def set_gradients(params, value):
    for p in params:
        if p.grad is None:
            p.grad = torch.empty_like(p)
        p.grad.copy_(torch.linspace(-value, value, p.numel(), device=p.device).reshape(p.shape))


@each_case
def test_gpu_and_cpu_agree_bit_for_bit(case):
    params = make_parameters(SHAPES)
    others = on_gpu(params)
    optimizers = case.make_ours(params), case.make_ours(others)
    for _ in range(3):
        draw_gradients(params)
        for p, q in zip(params, others, strict=True):
            q.grad = p.grad.cuda()
        for optimizer in optimizers:
            optimizer.step()
    assert all(same_bits(p, q.cpu()) for p, q in zip(params, others, strict=True))


# --- graphs ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float lr", "tensor lr"])
@capturable_cases
def test_captured_step_replays(case, tensor_lr):
    """Steps are counted, and a tensor lr is read, at each replay; nothing is baked into the graph."""
    params = on_gpu(make_parameters(SHAPES))
    plain = copies(params)
    lr = torch.tensor(0.01, device="cuda") if tensor_lr else 0.01
    optimizer = case.ours(params, **{**case.kwargs, "lr": lr, "capturable": True})
    expected = case.make_truth(plain, lr=0.01)
    for each in (params, plain):
        set_gradients(each, 1.0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        optimizer.step()  # as torch asks for it: a warm-up outside of the graph
    torch.cuda.current_stream().wait_stream(stream)
    expected.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for number in range(1, 6):
        for each in (params, plain):
            set_gradients(each, 1.0 + number)
        if tensor_lr:
            lr.fill_(0.01 * number)
            expected.param_groups[0]["lr"] = 0.01 * number
        graph.replay()
        expected.step()
    torch.cuda.synchronize()
    for p, q in zip(params, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert optimizer.state[p]["step"].item() == 6
        assert optimizer.state[p]["step"].device.type == "cuda"


@pytest.mark.parametrize("found_inf", [0.0, 1.0, 2.0])
def test_captured_step_reads_the_scaler_at_each_replay(found_inf):
    params = on_gpu(make_parameters(SHAPES))
    optimizer = fusedopt.AdamW(params, lr=0.01, capturable=True)
    set_gradients(params, 1.0)
    optimizer.step()
    optimizer.grad_scale, optimizer.found_inf = torch.ones((), device="cuda"), torch.zeros((), device="cuda")
    optimizer.step()  # compiles the kernel that unscales, which no graph could hold
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    before = [p.detach().clone() for p in params]
    optimizer.found_inf.fill_(found_inf)
    graph.replay()
    torch.cuda.synchronize()
    skipped = all(map(torch.equal, params, before))
    assert skipped == bool(found_inf)
    assert optimizer.state[params[0]]["step"].item() == (2 if found_inf else 3)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_capture_without_capturable_is_refused_as_torch_does(name):
    params = on_gpu(make_parameters([(33,)]))
    optimizer = getattr(fusedopt, name)(params, lr=0.01)
    set_gradients(params, 1.0)
    optimizer.step()
    before = params[0].detach().clone()
    scratch = torch.zeros(1, device="cuda")
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        scratch.add_(1)  # an empty graph would be warned of
        with pytest.raises(RuntimeError, match="capturable is False"):
            optimizer.step()
    torch.cuda.synchronize()
    assert torch.equal(params[0], before)
    optimizer.step()


# --- waits of the host -------------------------------------------------------------------------------------------------------


@each_case
def test_a_step_does_not_wait_for_the_gpu(case):
    if isinstance(case.kwargs["lr"], torch.Tensor):
        pytest.skip("a learning rate on the CPU")
    params = on_gpu(make_parameters(SHAPES))
    optimizer = case.make_ours(params)
    set_gradients(params, 1.0)
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            for p in params:
                p.grad = torch.ones_like(p)  # gradients move, so tables are sent anew
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_case
def test_tables_outlive_the_launch(case):
    """A table that the allocator gave away while the kernel has not begun would be overwritten."""
    params = on_gpu(make_parameters(SHAPES))
    plain = copies(params)
    optimizer, expected = case.make_ours(params), case.make_ours(plain)
    for each in (params, plain):
        set_gradients(each, 1.0)
    torch.cuda._sleep(50_000_000)
    for _ in range(4):
        optimizer.step()
        for p in params:
            p.grad = p.grad.clone()
        for _ in range(50):
            torch.full((1024,), 12345, device="cuda", dtype=torch.int64)
    torch.cuda.synchronize()
    for _ in range(4):
        expected.step()
    assert all(map(same_bits, params, plain))


# --- streams and devices -----------------------------------------------------------------------------------------------------


@each_case
def test_step_runs_in_the_current_stream(case):
    params = on_gpu(make_parameters(SHAPES))
    plain = copies(params)
    optimizer, expected = case.make_ours(params), case.make_ours(plain)
    for each in (params, plain):
        set_gradients(each, 1.0)
    optimizer.step()
    expected.step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # a step in another stream would not see the gradients below
        set_gradients(params, 3.0)
        optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    set_gradients(plain, 3.0)
    expected.step()
    assert all(map(same_bits, params, plain))


@each_case
def test_parameters_on_a_device_that_is_not_the_current_one(case):
    if torch.cuda.device_count() < 2:
        pytest.skip("a second GPU is needed")
    params = make_parameters(SHAPES)
    others = on_gpu(params, "cuda:1")
    optimizers = case.make_ours(params), case.make_ours(others)
    for _ in range(2):
        set_gradients(params, 2.0)
        for p, q in zip(params, others, strict=True):
            q.grad = p.grad.to("cuda:1")
        for optimizer in optimizers:
            optimizer.step()
    assert torch.cuda.current_device() == 0
    assert all(same_bits(p, q.cpu()) for p, q in zip(params, others, strict=True))


@each_case
def test_module_moved_between_devices_in_mid_run(case):
    """``module.to(device)`` keeps the parameters; their states stay where they are until somebody moves them."""
    params = make_parameters(SHAPES)
    plain = copies(params)
    optimizer, expected = case.make_ours(params), case.make_ours(plain)
    for number in range(4):
        if number == 2:
            for p in params:
                p.grad = None
                p.data = p.data.cuda()
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # which moves them
        set_gradients(plain, 1.0 + number)
        for p, q in zip(params, plain, strict=True):
            p.grad = q.grad.to(p.device)
        optimizer.step()
        expected.step()
    assert all(same_bits(p.cpu(), q) for p, q in zip(params, plain, strict=True))


@capturable_cases
def test_checkpoint_moves_between_cpu_and_gpu(case):
    cpu = make_parameters(SHAPES)
    first = case.make_ours(cpu)
    set_gradients(cpu, 1.0)
    first.step()
    gpu = on_gpu(cpu)
    second = case.make_ours(gpu, capturable=True)
    second.load_state_dict(first.state_dict())
    set_gradients(gpu, 2.0)
    set_gradients(cpu, 2.0)
    first.step()
    second.step()
    for p, q in zip(cpu, gpu, strict=True):
        torch.testing.assert_close(p, q.cpu(), rtol=1e-6, atol=1e-7)
        assert second.state[q]["step"].item() == 2
        assert second.state[q]["exp_avg"].device.type == "cuda"


# --- sizes -------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_offsets_beyond_32_bits():
    size = 2**31 + 33
    free, _ = torch.cuda.mem_get_info()
    if free < 5 * size:
        pytest.skip(f"{5 * size / 2**30:.0f} GiB of GPU memory are needed, {free / 2**30:.0f} are free")
    param = torch.nn.Parameter(torch.zeros(size, dtype=torch.bfloat16, device="cuda"))
    param.grad = torch.ones(size, dtype=torch.bfloat16, device="cuda")
    fusedopt.SGD([param], lr=0.5).step()
    assert (param == -0.5).all().item()
    assert math.isclose(param[-1].item(), -0.5)
