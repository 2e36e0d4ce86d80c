"""Threads: as many as torch has, nothing of the process changed, safe beside other threads, forks and busy cores."""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
import time
from pathlib import Path

import numpy
import pytest
import torch

import fusedopt
from cases import copies, draw_gradients, each_case, make_parameters, named
from child import output
from fusedopt.kernels import cpu, cpu_runtime, threads
from snapshot import same_bits

#: Enough for every thread to get chunks of its own.
LARGE = 600_001


@pytest.fixture
def torch_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=["team", "pool"])
def helpers(request, monkeypatch):
    """Steps run on torch's own threads, or on ours."""
    if request.param == "pool":
        monkeypatch.setattr(threads, "_team", threads._NoTeam())
    elif threads._openmp() is None:
        pytest.skip("torch has no OpenMP threads here")
    else:
        monkeypatch.setattr(threads._Team, "runs", functools.partialmethod(always, threads._Team.runs))
    return request.param


def always(team, runs, kernel, launch, count):
    """Run on the team, however late it was."""
    team._rest = 0
    return runs(team, kernel, launch, count)


def nanoseconds_by_thread():
    """Return how long each thread of the process has run."""
    tasks = Path("/proc/self/task")
    return {task.name: int((task / "schedstat").read_text().split()[0]) for task in tasks.iterdir()}


def working_threads(optimizer, rounds=20, enough=None):
    """Return how many threads a step comes to run on: those that have used processor time in it, at most."""
    most = 0
    for _ in range(rounds):
        time.sleep(0.02)  # OpenMP's threads look for work for some time after a parallel region
        before = nanoseconds_by_thread()
        optimizer.step()
        # The clock of a thread that waits stands still, but for the waking up.
        used = [after - before.get(name, 0) for name, after in nanoseconds_by_thread().items()]
        most = max(most, sum(nanoseconds > 1e6 for nanoseconds in used))
        if most == enough:
            break
    return most


@pytest.mark.parametrize("count", [2, 3, 4])
@each_case
def test_results_do_not_depend_on_the_number_of_threads(case, count, torch_threads, helpers):
    params = make_parameters([(LARGE,), (33,), (70_000,)])
    others = copies(params)
    alone, many = case.make_ours(params), case.make_ours(others)
    for _ in range(2):
        draw_gradients(params, others)
        torch_threads(1)
        alone.step()
        torch_threads(count)
        many.step()
    assert all(map(same_bits, params, others))
    for p, q in zip(params, others, strict=True):
        assert all(same_bits(alone.state[p][key], many.state[q][key]) for key in alone.state[p])


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="this system does not tell what its threads do")
def test_number_of_threads_follows_torch(torch_threads, helpers):
    params = make_parameters([(4_000_000,)])
    optimizer = fusedopt.AdamW(params)
    draw_gradients(params)
    torch_threads(2)
    optimizer.step()
    own = {thread for thread in threading.enumerate() if thread.name.startswith("fusedopt")}
    assert own or helpers == "team"
    assert all(thread.daemon for thread in own)
    assert working_threads(optimizer, rounds=300, enough=2) == 2  # a busy machine may keep the second away for long
    torch_threads(1)
    assert working_threads(optimizer) == 1
    torch_threads(2)
    assert working_threads(optimizer, rounds=300, enough=2) == 2
    assert {thread for thread in threading.enumerate() if thread.name.startswith("fusedopt")} == own


#: Of one region.
LAUNCH_LENGTH = cpu_runtime.CLAIMED + cpu_runtime.LINE


def launch(team):
    """Return the launch of a kernel with nothing to do, as a member of a ``team`` that large would see it."""
    header = numpy.zeros(LAUNCH_LENGTH, numpy.int64)
    header[[cpu_runtime.BATCH, cpu_runtime.REGIONS, cpu_runtime.TEAM]] = 1, 1, team
    return header


def some_kernel():
    params = make_parameters([(5,)])
    optimizer = fusedopt.SGD(params, lr=0.1)
    draw_gradients(params)
    optimizer.step()
    return cpu._kernel(optimizer._prepared.plan.parts[0].bucket.kind)


@pytest.mark.parametrize(("team", "late"), [(0, 0), (1, 0), (2, 1)])
def test_a_thread_notes_that_others_are_late(team, late):
    header = launch(team)
    some_kernel().ctypes(header.ctypes.data)
    assert header[cpu_runtime.LEFT] == 1
    assert header[cpu_runtime.LATE] == late


def test_the_pool_takes_over_where_the_team_was_late(monkeypatch):
    """For longer and longer, and for a short time again after the team has been in time for long."""
    late = [1]

    def parallel(function, address, count, flags):
        assert (count, flags) == (2, 0)
        numpy.ctypeslib.as_array((ctypes.c_int64 * LAUNCH_LENGTH).from_address(address))[cpu_runtime.LATE] = late[0]

    monkeypatch.setattr(threads, "_openmp", lambda: (parallel, 0))
    team, kernel = threads._Team(), some_kernel()

    def rests():
        assert team.runs(kernel, launch(0), 2)
        count = 0
        while team._rest:
            assert not team.runs(kernel, launch(0), 2)
            count += 1
        return count

    assert [rests() for _ in range(9)] == [8, 16, 32, 64, 128, 256, 512, 1024, 1024]
    late[0] = 0
    assert [rests() for _ in range(2000)] == [0] * 2000
    late[0] = 1
    assert rests() == 8


@pytest.mark.skipif(sys.platform == "win32", reason="asks for settings that POSIX systems have")
def test_nothing_of_the_process_is_changed():
    program = """
        import locale, os, signal, sys, threading, warnings
        import numba
        import numpy
        import torch

        def settings():
            configuration = {key: value for key, value in vars(numba.config).items() if key.isupper()}
            return {
                "torch threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
                "numba configuration": configuration,
                "environment": dict(os.environ),
                "default dtype": torch.get_default_dtype(),
                "gradients": torch.is_grad_enabled(),
                "deterministic": torch.are_deterministic_algorithms_enabled(),
                "denormals": (torch.tensor([1e-310], dtype=torch.float64) * 1).item(),
                "float32 denormals": (torch.tensor([1e-40]) * 1).item(),
                "random numbers": torch.random.get_rng_state().tolist(),
                "numpy random numbers": str(numpy.random.get_state()),
                "numpy errors": numpy.geterr(),
                "switch interval": sys.getswitchinterval(),
                "recursion limit": sys.getrecursionlimit(),
                "warnings": list(warnings.filters),
                "directory": os.getcwd(),
                "umask": (lambda mask: os.umask(mask) or mask)(os.umask(0o22)),
                "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)],
                "path": list(sys.path),
                "hooks": (sys.excepthook, threading.excepthook, sys.gettrace(), sys.getprofile()),
                "affinity": os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None,
                "locale": locale.setlocale(locale.LC_ALL),
            }

        import fusedopt
        # What torch's own optimizers change is theirs: their first step imports the compiler, which filters warnings.
        param = torch.nn.Parameter(torch.ones(3))
        param.grad = torch.ones(3)
        torch.optim.AdamW([param]).step()
        before = settings()
        for name in ("SGD", "Momentum", "Adam", "AdamW"):
            for dtype in (torch.float32, torch.bfloat16):
                param = torch.nn.Parameter(torch.ones(600_000, dtype=dtype))
                param.grad = torch.ones_like(param)
                optimizer = getattr(fusedopt, name)([param], lr=0.1)
                for _ in range(3):
                    optimizer.step()
        after = settings()
        for key, value in before.items():
            if value != after[key]:
                sys.exit(f"{key}: {value} became {after[key]}")
        try:
            numba.threading_layer()
        except ValueError:  # Numba has not started threads of its own
            assert numba.get_num_threads() == numba.config.NUMBA_NUM_THREADS
            print("unchanged")
    """
    assert output(program).strip() == "unchanged"


def test_two_threads_step_two_optimizers_at_once(helpers):
    """Large and small, new plans and old ones, in turns: the same bits as one after the other."""

    def train(results, name, barrier=None):
        generator = torch.Generator().manual_seed(name)
        case = named(("adamw", "sgd-momentum-l2", "adam-amsgrad", "momentum")[name])
        for size in (200_000, 33, 150_000, 1000):
            params = [torch.nn.Parameter(torch.randn(n, generator=generator)) for n in (size, 7, size // 3)]
            optimizer = case.make_ours(params)
            if barrier is not None:
                barrier.wait()
            for _ in range(12):
                for p in params:
                    p.grad = torch.randn(p.shape, generator=generator)
                optimizer.step()
            results.setdefault(name, []).extend(p.detach() for p in params)

    serial, parallel = {}, {}
    for name in range(4):
        train(serial, name)
    barrier = threading.Barrier(4)
    errors = []

    def guarded(name):
        try:
            train(parallel, name, barrier)
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    workers = [threading.Thread(target=guarded, args=(name,)) for name in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors
    for name, expected in serial.items():
        assert all(map(same_bits, parallel[name], expected))


def test_first_steps_at_once_in_many_threads():
    """Kernels are compiled, loaded and looked up by threads that come at the same moment, on an empty cache."""
    program = """
        import threading
        import torch
        import fusedopt
        results, barrier = {}, threading.Barrier(6)

        def train(number):
            param = torch.nn.Parameter(torch.linspace(-1, 1, 1000))
            param.grad = torch.linspace(1, 3, 1000)
            optimizer = (fusedopt.AdamW if number % 2 else fusedopt.SGD)([param], lr=0.1)
            barrier.wait()
            optimizer.step()
            results[number] = param.detach()

        workers = [threading.Thread(target=train, args=(number,)) for number in range(6)]
        [worker.start() for worker in workers]
        [worker.join() for worker in workers]
        assert all(torch.equal(results[number], results[number % 2]) for number in range(6))
        assert not torch.equal(results[0], results[1])
        print("done")
    """
    import tempfile

    with tempfile.TemporaryDirectory() as empty:
        assert output(program, FUSEDOPT_CACHE_DIR=empty).strip() == "done"


def test_hooks_and_closures_may_step_other_optimizers(helpers):
    """A step within a step, of the same pool."""
    inner_params, outer_params = make_parameters([(LARGE,)]), make_parameters([(LARGE,)])
    inner, outer = fusedopt.SGD(inner_params, lr=0.1), fusedopt.AdamW(outer_params, lr=0.1)
    draw_gradients(inner_params)
    draw_gradients(outer_params)
    before = inner_params[0].detach().clone()
    outer.step(lambda: inner.step())
    outer.register_step_post_hook(lambda *_: inner.step())
    outer.step()
    expected = before - torch.tensor(0.1) * inner_params[0].grad
    expected = expected - torch.tensor(0.1) * inner_params[0].grad
    assert torch.equal(inner_params[0], expected)
