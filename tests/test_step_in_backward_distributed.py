"""Stepping inside backward by two processes: with DDP by the reduced gradients, and with FSDP2 by those of shards."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import fusedopt
from test_distributed import halves, processes, pytestmark, sharded, started  # noqa: F401  # fixtures, and where gloo is
from training import make_model, make_ours, some_names


def loss_of(model, batch):
    return torch.nn.functional.mse_loss(model(batch[0]), batch[1])


def assert_same_bits(model, expected):
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        p, q = (each.to_local() if hasattr(each, "to_local") else each for each in (p, q))
        assert torch.equal(p, q), f"{name}: {(p != q).sum()} of {p.numel()} elements differ"


def assert_close(model, expected):
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        p, q = (each.to_local() if hasattr(each, "to_local") else each for each in (p, q))
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


def assert_joined(model):
    """All ranks have the same parameters."""
    for p in model.parameters():
        first = p.detach().clone()
        dist.broadcast(first, 0)
        assert torch.equal(p, first), "the ranks have parted"


def parallel_twins(name, ddp_options, unit_bytes=100, **options):
    """Two models with the same weights, the first of which steps inside backward; their optimizers, and its handle."""
    from torch.nn.parallel import DistributedDataParallel

    models = [DistributedDataParallel(make_model(), **ddp_options) for _ in range(2)]
    optimizers = [make_ours(name, model.parameters(), **options) for model in models]
    return models, optimizers, fusedopt.step_in_backward(models[0], optimizers[0], unit_bytes=unit_bytes)


# Buckets of some parameters each, where the option is there.
DDP = {
    "plain": {},
    "many buckets": {"bucket_cap_mb": 0.0002},
    "gradients are views of buckets": {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.0002},
}
each_ddp = pytest.mark.parametrize("ddp_options", DDP.values(), ids=DDP)


def ddp(rank, name, ddp_options, unit_bytes):
    models, optimizers, handle = parallel_twins(name, ddp_options, unit_bytes)
    for batch in halves(rank, 5):
        for model, optimizer in zip(models, optimizers, strict=True):
            loss_of(model, batch).backward()
            optimizer.step()
            if optimizer is optimizers[0]:
                assert all(p.grad is None for p in model.parameters())
            optimizer.zero_grad()
    assert_same_bits(*models)
    assert_joined(models[0])
    assert sum(map(len, handle.units)) == 6


@pytest.mark.parametrize("unit_bytes", [0, 1 << 20])
@each_ddp
@some_names
def test_ddp(processes, name, ddp_options, unit_bytes):  # noqa: F811
    processes.run(ddp, name, ddp_options, unit_bytes)


def gradients_of_ddp(rank):
    """What steps is the mean over ranks, and not the gradient that this rank has computed."""
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(torch.nn.Linear(3, 1, bias=False, dtype=torch.float64))
    start = model.module.weight.detach().clone()
    optimizer = fusedopt.SGD(model.parameters(), lr=1.0)
    fusedopt.step_in_backward(model, optimizer)
    model(torch.full((1, 3), 1.0 + 2 * rank, dtype=torch.float64)).sum().backward()  # gradients 1 and 3
    optimizer.step()
    torch.testing.assert_close(start - model.module.weight, torch.full((1, 3), 2.0, dtype=torch.float64))


def test_ddp_steps_by_the_reduced_gradient(processes):  # noqa: F811
    processes.run(gradients_of_ddp)


def ddp_accumulation(rank, name, ddp_options, no_sync):
    import contextlib

    models, optimizers, handle = parallel_twins(name, ddp_options)
    batches = halves(rank, 9)
    for number, batch in enumerate(batches):
        last = number % 3 == 2
        for model, optimizer in zip(models, optimizers, strict=True):
            with (
                handle.accumulating(not last and optimizer is optimizers[0]),
                model.no_sync() if no_sync and not last else contextlib.nullcontext(),
            ):
                loss_of(model, batch).backward()
            if last:
                optimizer.step()
                optimizer.zero_grad()
    assert_same_bits(*models)
    assert_joined(models[0])


@pytest.mark.parametrize("no_sync", [True, False], ids=["no_sync", "reduced in each pass"])
@each_ddp
def test_ddp_with_accumulation(processes, ddp_options, no_sync):  # noqa: F811
    processes.run(ddp_accumulation, "AdamW", ddp_options, no_sync)


def ddp_clipped(rank, name, ddp_options):
    """DDP reduces once for each forward: the pass that steps comes after a second one."""
    models, optimizers, handle = parallel_twins(name, ddp_options, max_grad_norm=0.1)
    for batch in halves(rank, 4):
        with handle.measuring():
            loss_of(models[0], batch).backward()
        for model, optimizer in zip(models, optimizers, strict=True):
            loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_close(*models)
    assert_joined(models[0])
    assert optimizers[0].grad_norm > 0.1


@each_ddp
def test_ddp_clipped_in_two_passes(processes, ddp_options):  # noqa: F811
    processes.run(ddp_clipped, "AdamW", ddp_options)


def ddp_into_momentum(rank, ddp_options):
    """What has joined the moments is what ranks have reduced."""
    from torch.nn.parallel import DistributedDataParallel

    models = [DistributedDataParallel(make_model(), **ddp_options) for _ in range(2)]
    optimizers = [fusedopt.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in models]
    handle = fusedopt.step_in_backward(models[0], optimizers[0], unit_bytes=100)
    for number, batch in enumerate(halves(rank, 6)):
        last = number % 3 == 2
        with handle.accumulating(not last, into_momentum=True):
            loss_of(models[0], batch).backward()
        assert last or all(p.grad is None for p in models[0].parameters())
        loss_of(models[1], batch).backward()
        if last:
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    assert_close(*models)
    assert_joined(models[0])


@each_ddp
def test_ddp_with_gradients_that_join_the_moment(processes, ddp_options):  # noqa: F811
    processes.run(ddp_into_momentum, ddp_options)


def ddp_removed(rank, name, ddp_options):
    models, optimizers, handle = parallel_twins(name, ddp_options)
    for number, batch in enumerate(halves(rank, 6)):
        if number == 2:
            handle.remove()
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            assert number < 2 or all(p.grad is not None for p in model.parameters())
            optimizer.step()
    assert_same_bits(*models)
    assert_joined(models[0])


@each_ddp
def test_ddp_after_remove(processes, ddp_options):  # noqa: F811
    processes.run(ddp_removed, "AdamW", ddp_options)


def ddp_refused(rank):
    from torch.nn.parallel import DistributedDataParallel

    for option in ("find_unused_parameters", "static_graph"):
        model = DistributedDataParallel(make_model(), **{option: True})
        optimizer = make_ours("AdamW", model.parameters())
        with pytest.raises(ValueError, match=f"{option}=True"):
            fusedopt.step_in_backward(model, optimizer)
        loss_of(model, halves(rank, 1)[0]).backward()
        optimizer.step()


def test_ddp_options_that_are_refused(processes):  # noqa: F811
    processes.run(ddp_refused)


def fsdp1_refused(rank):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(make_model(), device_id=torch.device("cpu"), use_orig_params=True)
    with pytest.raises(ValueError, match="fully_shard"):
        fusedopt.step_in_backward(model, fusedopt.AdamW(model.parameters()))


def test_flat_parameters_are_refused(processes):  # noqa: F811
    processes.run(fsdp1_refused)


# --- FSDP2 -------------------------------------------------------------------------------------------------------------------


def fsdp2(rank, name, unit_bytes, passes):
    models = [sharded(make_model()) for _ in range(2)]
    optimizers = [make_ours(name, model.parameters()) for model in models]
    handle = fusedopt.step_in_backward(models[0], optimizers[0], unit_bytes=unit_bytes)
    for number, batch in enumerate(halves(rank, 6)):
        last = number % passes == passes - 1
        for model, optimizer in zip(models, optimizers, strict=True):
            model.set_requires_gradient_sync(last)
            with handle.accumulating(not last and optimizer is optimizers[0]):
                loss_of(model, batch).backward()
            if last:
                if optimizer is optimizers[0] and unit_bytes == 0:
                    assert all(p.grad is None for p in model.parameters())
                optimizer.step()
                optimizer.zero_grad()
    assert_same_bits(*models)


@pytest.mark.parametrize("passes", [1, 3], ids=["one pass", "three passes"])
@pytest.mark.parametrize("unit_bytes", [0, 1 << 20])
@some_names
def test_fsdp2(processes, name, unit_bytes, passes):  # noqa: F811
    processes.run(fsdp2, name, unit_bytes, passes)


def fsdp2_clipped(rank, unit_bytes):
    models = [sharded(make_model()) for _ in range(2)]
    optimizers = [make_ours("AdamW", model.parameters(), max_grad_norm=0.1) for model in models]
    handle = fusedopt.step_in_backward(models[0], optimizers[0], unit_bytes=unit_bytes)
    for batch in halves(rank, 4):
        with handle.measuring():
            loss_of(models[0], batch).backward()
        for model, optimizer in zip(models, optimizers, strict=True):
            loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(optimizers[0].grad_norm, optimizers[1].grad_norm, rtol=1e-14, atol=0)
    assert_close(*models)
    assert optimizers[0].grad_norm > 0.1


@pytest.mark.parametrize("unit_bytes", [0, 1 << 20])
def test_fsdp2_clipped_in_two_passes(processes, unit_bytes):  # noqa: F811
    processes.run(fsdp2_clipped, unit_bytes)
