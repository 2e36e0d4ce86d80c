"""Training by two processes: DDP, FSDP2, ZeroRedundancyOptimizer and distributed checkpoints, over gloo on this machine.

Both processes are started once and then run one scenario after the other, so that nobody waits for their imports twice.
"""

from __future__ import annotations

import functools
import multiprocessing
import tempfile
import traceback
import warnings

import pytest
import torch
import torch.distributed as dist

import fusedopt
from fusedopt.kernels import backends
from training import (
    MAKERS,
    NAMES,
    OPTIONS,
    TOLERANCES,
    assert_same_weights,
    backward,
    each_name,
    make_batches,
    make_model,
    make_ours,
    make_truth,
    some_names,
    truth_class,
    truth_options,
)

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch is built without gloo, which joins the processes"
)

RANKS = 2
# Adafactor takes torch's own implementation for shards, which squares a norm over ranks in place, and torch 2.13 refuses that.
NAMES_THAT_SHARD = [name for name in NAMES if name != "Adafactor"]
each_name_that_shards = pytest.mark.parametrize("name", NAMES_THAT_SHARD)
# Protects from hanging for good, as where one process waits for another that has failed; no test takes as long.
SECONDS = 120


class Processes:
    """Two processes, or more, that run functions of test files together, as ranks 0, 1 and so on of a group."""

    def __init__(self, ranks=RANKS):
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        pipes = [context.Pipe() for _ in range(ranks)]
        self._ends = [ours for ours, _ in pipes]
        meeting = f"file://{self._folder.name}/meeting"
        self._processes = [
            context.Process(target=serve, args=(rank, ranks, meeting, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self._processes:
            process.start()

    def run(self, function, *arguments):
        """Call `function(rank, *arguments)` in all, and raise what any of them raised."""
        for end in self._ends:
            end.send((function, arguments))
        failures = []
        for rank, end in enumerate(self._ends):
            try:
                failure = end.recv() if end.poll(SECONDS) else "no answer"
            except EOFError:
                failure = "the process ended"
            if failure is not None:
                failures.append(f"rank {rank}: {failure}")
        if failures:
            self.end()
            pytest.fail("\n".join(failures), pytrace=False)

    @property
    def ended(self):
        return not all(process.is_alive() for process in self._processes)

    def end(self):
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def serve(rank, ranks, meeting, end):
    """In a process of its own: run what the pipe names until it is closed."""
    torch.set_num_threads(1)  # two processes share what this machine has
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks)
    while True:
        function, arguments = end.recv()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                ignore_warnings_of_torch()
                torch.manual_seed(0)
                function(rank, *arguments)
            dist.barrier()
            end.send(None)
        except BaseException:
            end.send(traceback.format_exc())


def ignore_warnings_of_torch():
    """What torch 2.13 says of itself, whoever the optimizer is."""
    warnings.filterwarnings("ignore", message=".*torch\\.jit\\..* is deprecated", category=DeprecationWarning)


@pytest.fixture(scope="module")
def started():
    running = []
    yield running
    for each in running:
        each.end()


@pytest.fixture
def processes(started):
    if not started or started[-1].ended:
        started.append(Processes())
    return started[-1]


def halves(rank, count):
    """This rank's rows of each batch; gradients are averaged over ranks, so both together see the batch of one process."""
    return [(x[rank::RANKS], y[rank::RANKS]) for x, y in make_batches(count)]


def alone(name, count=5, most=None):
    """A model that one process trains with the reference, on whole batches; gradients are clipped to the norm `most`."""
    model = make_model()
    optimizer = make_truth(name, model.parameters())
    for batch in make_batches(count):
        backward(model, batch)
        if most is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), most)
        optimizer.step()
    return model


# --- DDP ---------------------------------------------------------------------------------------------------------------------


def ddp(rank, name, options):
    from torch.nn.parallel import DistributedDataParallel

    models = []
    for make in MAKERS.values():
        models.append(make_model())
        parallel = DistributedDataParallel(models[-1], **options)
        optimizer = make(name, parallel.parameters())
        for number, (inputs, targets) in enumerate(halves(rank, 5)):
            # Gradients that are views of buckets stay at their places, are zeroed there, or come anew.
            optimizer.zero_grad(set_to_none=number % 2 == 0)
            torch.nn.functional.mse_loss(parallel(inputs), targets).backward()
            optimizer.step()
    assert_same_weights(name, *models)
    assert_same_weights(name, models[0], alone(name))
    for p in models[0].parameters():
        first = p.detach().clone()
        dist.broadcast(first, 0)
        assert torch.equal(p, first), "the ranks have parted"


@pytest.mark.parametrize(
    "options", [{}, {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.0001}], ids=["plain", "gradients are views of buckets"]
)
@each_name
def test_ddp(processes, name, options):
    processes.run(ddp, name, options)


class Branching(torch.nn.Module):
    """A model with a layer that is not used at first, so that its gradients come late."""

    def __init__(self):
        super().__init__()
        self.trained, self.late = make_model(), make_model()
        self.calls = 0

    def forward(self, inputs):
        self.calls += 1
        return self.trained(inputs) + (self.late(inputs) if self.calls > 2 else 0.0)


def ddp_with_late_gradients(rank, name):
    from torch.nn.parallel import DistributedDataParallel

    models = []
    for make in MAKERS.values():
        models.append(Branching())
        parallel = DistributedDataParallel(models[-1], find_unused_parameters=True)
        optimizer = make(name, parallel.parameters())
        for batch in halves(rank, 5):
            backward(parallel, batch)
            optimizer.step()
    assert_same_weights(name, *(each.trained for each in models))
    assert_same_weights(name, *(each.late for each in models))


@each_name
def test_ddp_with_late_gradients(processes, name):
    processes.run(ddp_with_late_gradients, name)


# --- ZeroRedundancyOptimizer -------------------------------------------------------------------------------------------------


def zero_redundancy(rank, name, as_bucket_view):
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    models, saved = [], []
    for optimizer_class, options in ((getattr(fusedopt, name), OPTIONS[name]), (truth_class(name), truth_options(name))):

        def make(model, optimizer_class=optimizer_class, options=options):
            return ZeroRedundancyOptimizer(
                model.parameters(), optimizer_class=optimizer_class, parameters_as_bucket_view=as_bucket_view, **options
            )

        models.append(make_model())
        parallel = DistributedDataParallel(models[-1])
        optimizer = make(parallel)
        assert type(optimizer.optim) is optimizer_class
        for number, batch in enumerate(halves(rank, 5)):
            if number == 3:  # a checkpoint, gathered from the ranks that have parts of it, continues
                optimizer.consolidate_state_dict(to=0)
                states = [optimizer.state_dict() if rank == 0 else None]
                dist.broadcast_object_list(states, 0)
                optimizer = make(parallel)
                optimizer.load_state_dict(states[0])
                saved.append(states[0])
            optimizer.param_groups[0]["lr"] = OPTIONS[name]["lr"] / (1 + number)
            backward(parallel, batch)
            optimizer.step()
        owned = {index for index, p in enumerate(parallel.parameters()) if p in optimizer.optim.state}
        assert 0 < len(owned) < len(list(parallel.parameters())), "each rank keeps the states of its own parameters alone"
    assert_same_weights(name, *models)
    assert saved[0]["state"].keys() == saved[1]["state"].keys()


@pytest.mark.parametrize("as_bucket_view", [False, True], ids=["plain", "parameters are views of buckets"])
@each_name
def test_zero_redundancy_optimizer(processes, name, as_bucket_view):
    processes.run(zero_redundancy, name, as_bucket_view)


# --- FSDP2 -------------------------------------------------------------------------------------------------------------------


def sharded(model, **options):
    """Shard each layer over both ranks: 7 rows as 4 and 3, and the one row of the last layer as 1 and 0."""
    from torch.distributed.fsdp import fully_shard

    mesh = a_mesh()
    for layer in model:
        if isinstance(layer, torch.nn.Linear):
            fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


@functools.cache
def a_mesh():
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (RANKS,))


def whole(model):
    """A model that is not sharded, with the weights of one that is."""
    result = make_model()
    with torch.no_grad():
        for p, q in zip(result.parameters(), model.parameters(), strict=True):
            p.copy_(q.full_tensor())
    return result


def shards(rank, name, most):
    model = sharded(make_model())
    rows = [p.to_local().shape[0] for p in model.parameters()]
    assert rows == ([4, 4, 4, 4, 1, 1] if rank == 0 else [3, 3, 3, 3, 0, 0])
    optimizer = make_ours(name, model.parameters())
    for batch in halves(rank, 5):
        backward(model, batch)
        if most is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), most)
        optimizer.step()
    for p, state in optimizer.state.items():
        for key, value in state.items():
            assert value.dim() == 0 or (type(value) is type(p) and value.placements == p.placements), key
    # Not with torch's on shards: its Rprop cannot step on them.
    assert_same_weights(name, whole(model), alone(name, most=most))


@pytest.mark.parametrize("most", [None, 0.3], ids=["plain", "clipped"])
@each_name_that_shards
def test_fsdp2_with_unequal_shards(processes, name, most):
    processes.run(shards, name, most)


def clipped_in_the_step(rank, name, backend):
    """The norm is that of whole gradients, on both ranks; replicated tensors count once."""
    model = sharded(make_model())
    optimizer = make_ours(name, model.parameters(), max_grad_norm=0.3, ema_decay=0.5)
    for batch in halves(rank, 5):
        backward(model, batch)
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).full_tensor()
        with backends.use(backend):
            optimizer.step(zero_grad=True)
        torch.testing.assert_close(optimizer.grad_norm, norm.double(), rtol=1e-5, atol=0)
        assert not any(p.grad.to_local().any() for p in model.parameters())
    assert_same_weights(name, whole(model), alone(name, most=0.3))
    with optimizer.swap_ema():
        averages = whole(model)
    assert not torch.equal(averages[0].weight, whole(model)[0].weight)


@pytest.mark.parametrize("backend", ["numba", "tensor"])
@some_names
def test_clipping_in_the_step_by_the_norm_over_all_ranks(processes, name, backend):
    processes.run(clipped_in_the_step, name, backend)


def clipped_beside_tensor_parallelism(rank):
    """FSDP2 cuts what is cut already, by placements of a kind of their own."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = torch.nn.Sequential(torch.nn.Linear(130, 100, bias=False), torch.nn.Tanh())
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    optimizer = fusedopt.AdamW(model.parameters(), max_grad_norm=1.0)
    torch.manual_seed(10 + rank // 2)
    model(torch.randn(5, 130)).square().sum().backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).full_tensor()
    optimizer.step()
    torch.testing.assert_close(optimizer.grad_norm, norm.double(), rtol=1e-5, atol=0)


def test_clipping_beside_tensor_parallelism():
    four = Processes(4)
    try:
        four.run(clipped_beside_tensor_parallelism)
    finally:
        four.end()


def skipped_by_one_rank(rank):
    """An infinity in the shard of one rank keeps both from stepping."""
    model = sharded(make_model())
    optimizer = make_ours("AdamW", model.parameters(), skip_nonfinite=True)
    before = whole(model)
    backward(model, halves(rank, 1)[0])
    if rank == 0:
        list(model.parameters())[-1].grad.to_local().fill_(torch.inf)
    optimizer.step()
    assert int(optimizer.skipped_steps) == 1
    assert all(torch.equal(p, q) for p, q in zip(whole(model).parameters(), before.parameters(), strict=True))


def test_a_norm_that_is_infinite_on_one_rank(processes):
    processes.run(skipped_by_one_rank)


def explained_shards(rank):
    model = sharded(make_model())
    optimizer = make_ours("AdamW", model.parameters())
    backward(model, halves(rank, 1)[0])
    optimizer.step()
    lines = optimizer.explain().splitlines()
    assert len(lines) == 6 and all("-> numba (compiled kernel for CPUs, on this rank's part)" in line for line in lines), lines


def test_who_updates_shards_is_explained(processes):
    processes.run(explained_shards)


def gradients_of_another_sharding(rank, name):
    """Gradients that are whole on every rank, between steps on gradients that are sharded."""
    from torch.distributed.tensor import Replicate

    model, right = sharded(make_model()), make_model()
    optimizer, right_optimizer = make_ours(name, model.parameters()), make_truth(name, right.parameters())
    for number, (batch, whole_batch) in enumerate(zip(halves(rank, 4), make_batches(4), strict=True)):
        backward(model, batch)
        backward(right, whole_batch)
        if number == 2:
            for p in model.parameters():
                p.grad = p.grad.redistribute(placements=[Replicate()])
            with pytest.warns(UserWarning, match="its gradient is sharded otherwise"):
                optimizer.step()
        else:
            optimizer.step()
        right_optimizer.step()
    assert_same_weights(name, whole(model), right)


@some_names
def test_gradients_of_another_sharding(processes, name):
    processes.run(gradients_of_another_sharding, name)


def shards_in_other_memory(rank, name):
    """What .to() and checkpoints do: the DTensors stay, and the parts that they have are others."""
    from torch.distributed.tensor import Shard, distribute_tensor

    def shard(tensor):
        return distribute_tensor(tensor, a_mesh(), [Shard(0)])

    start = torch.randn(7, 3, dtype=torch.float64)
    p, right = torch.nn.Parameter(shard(start)), torch.nn.Parameter(start.clone())
    optimizer, right_optimizer = make_ours(name, [p]), make_truth(name, [right])
    for number in range(6):
        if number > 2:
            for tensor in (p, *optimizer.state[p].values()):
                if tensor.dim() > 0:
                    tensor._local_tensor = tensor._local_tensor.detach().clone()
        right.grad = torch.randn(7, 3, dtype=torch.float64)
        p.grad = shard(right.grad)
        optimizer.step()
        right_optimizer.step()
    torch.testing.assert_close(p.full_tensor(), right, **TOLERANCES[name])


@some_names
def test_shards_in_other_memory(processes, name):
    processes.run(shards_in_other_memory, name)


def overflow_on_one_rank(rank, name, makes):
    """Only rank 0 has shards of the last layer with an infinite gradient; the step is left out by both."""
    from torch.amp import GradScaler

    model = sharded(make_model())
    optimizer = MAKERS[makes](name, model.parameters())
    scaler = GradScaler("cpu", init_scale=16.0)
    before = whole(model)
    inputs, targets = halves(rank, 1)[0]
    scaler.scale(torch.nn.functional.mse_loss(model(inputs), targets)).backward()
    if rank == 0:
        list(model.parameters())[-1].grad.to_local().fill_(torch.inf)
    scaler.step(optimizer)
    scaler.update()
    changed = [not torch.equal(p, q) for p, q in zip(whole(model).parameters(), before.parameters(), strict=True)]
    assert not any(changed), changed
    assert scaler.get_scale() == 8.0


@pytest.mark.parametrize("makes", MAKERS)
def test_overflow_in_a_shard_of_one_rank(processes, makes):
    processes.run(overflow_on_one_rank, "SGD", makes)


# --- distributed checkpoints -------------------------------------------------------------------------------------------------


def wrapped(model, kind):
    from torch.nn.parallel import DistributedDataParallel

    return {"plain": lambda m: m, "ddp": DistributedDataParallel, "fsdp2": sharded}[kind](model)


def checkpoint(rank, name, kind, folder, writer, reader):
    """Train, save, load into a new model and a new optimizer, and train on: as one that was never interrupted."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    def train(model, optimizer, batches):
        for batch in batches:
            backward(model, batch)
            optimizer.step()

    # Without a wrapper nobody averages gradients: both ranks train the same model.
    batches = make_batches(6) if kind == "plain" else halves(rank, 6)
    models = [wrapped(make_model(), kind) for _ in range(2)]
    first = MAKERS[writer](name, models[0].parameters())
    train(models[0], first, batches[:3])
    state = {"model": get_model_state_dict(models[0]), "optimizer": get_optimizer_state_dict(models[0], first)}
    dcp.save(state, checkpoint_id=folder)

    with torch.no_grad():
        for p in models[1].parameters():
            p.zero_()
    second = MAKERS[reader](name, models[1].parameters())
    state = {"model": get_model_state_dict(models[1]), "optimizer": get_optimizer_state_dict(models[1], second)}
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(models[1], state["model"])
    set_optimizer_state_dict(models[1], second, state["optimizer"])
    train(models[1], second, batches[3:])

    assert_same_weights(name, whole(models[1]) if kind == "fsdp2" else models[1], alone(name, 6))


@pytest.mark.parametrize("kind", ["plain", "ddp", "fsdp2"])
@some_names
def test_distributed_checkpoint(processes, tmp_path, name, kind):
    processes.run(checkpoint, name, kind, str(tmp_path), "ours", "ours")


def exchanges():
    """Our classes and torch's of the same name, which save for one another; torch's Rprop cannot step on shards either."""
    for name in NAMES_THAT_SHARD:
        if hasattr(torch.optim, name) and name != "Rprop":
            yield pytest.param(name, "ours", "truth", id=f"{name}-read by torch's")
            yield pytest.param(name, "truth", "ours", id=f"{name}-written by torch's")


@pytest.mark.parametrize(("name", "writer", "reader"), list(exchanges()))
def test_exchanged_distributed_checkpoint(processes, tmp_path, name, writer, reader):
    processes.run(checkpoint, name, "fsdp2", str(tmp_path), writer, reader)


# --- short formats -----------------------------------------------------------------------------------------------------------


def numbers(step):
    return torch.randn(67, 80, generator=torch.Generator().manual_seed(step))


def step_short(optimizer, steps, share):
    (param,) = optimizer.param_groups[0]["params"]
    for step in steps:
        param.grad = share((1e-3 * numbers(step)).to(param.dtype))
        optimizer.step()


def shared(tensor):
    from torch.distributed.tensor import Shard, distribute_tensor

    return distribute_tensor(tensor, a_mesh(), [Shard(0)])


def short_formats(rank, options, dtype):
    """Random bits belong to the element, and not to the rank that has it: 67 rows are 34 and 33."""
    start = numbers(100).to(dtype)
    param, alone = torch.nn.Parameter(shared(start)), torch.nn.Parameter(start.clone())
    for p, share in ((param, shared), (alone, torch.clone)):
        optimizer = fusedopt.AdamW([p], lr=1e-2, **options)
        step_short(optimizer, range(5), share)
        if p is param:
            # gloo gathers no int16.
            state = {key: value.double().full_tensor() for key, value in optimizer.state[p].items() if value.dim()}
    assert torch.equal(param.full_tensor(), alone)
    assert all(torch.equal(value, optimizer.state[alone][key].double()) for key, value in state.items())


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"state_format": "bf16"}, torch.float32),
        ({"state_format": "bf16", "stochastic_rounding": True}, torch.bfloat16),
        ({"master_weights": "split8", "state_format": "fp32"}, torch.bfloat16),
        ({"master_weights": "split16", "state_format": "fp32"}, torch.bfloat16),
    ],
    ids=str,
)
def test_sharded_parameters_are_rounded_as_whole_ones(processes, options, dtype):
    processes.run(short_formats, options, dtype)


def short_checkpoint(rank, folder):
    """Codes of 8 bits are saved and loaded exactly at the same sharding."""
    import torch.distributed.checkpoint as dcp

    params = [torch.nn.Parameter(shared(numbers(100))) for _ in range(2)]
    first, second = (fusedopt.AdamW([param], lr=1e-2, state_format="8bit") for param in params)
    step_short(first, range(3), shared)
    words = first.state[params[0]]["exp_avg_sq_words"]
    assert (words.shape, words.to_local().shape) == ((22, 2), (11, 2))
    dcp.save({"p": params[0].detach(), "optimizer": first.state_dict()["state"][0]}, checkpoint_id=folder)
    step_short(second, range(1), shared)
    loaded = {"p": params[1].detach(), "optimizer": second.state_dict()["state"][0]}
    dcp.load(loaded, checkpoint_id=folder)
    saved = second.state_dict()
    second.load_state_dict({**saved, "state": {0: loaded["optimizer"]}})
    for optimizer in (first, second):
        step_short(optimizer, range(3, 6), shared)
    assert torch.equal(*(param.to_local() for param in params))
    plain = first.state_dict(format="torch")["state"][0]
    assert plain["exp_avg"].full_tensor().shape == (67, 80)


def test_short_formats_through_a_distributed_checkpoint(processes, tmp_path):
    processes.run(short_checkpoint, str(tmp_path))
