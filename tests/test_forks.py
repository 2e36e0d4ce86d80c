"""Other processes: forked children step too, data loaders work after a step, and busy cores do no harm."""

from __future__ import annotations

import sys

import pytest

from child import output

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere processes are not forked, or not safely")

FORKS = """
    import os, sys, threading
    import torch
    import fusedopt

    def train(steps=3):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(n)) for n in (400_000, 33)]
        optimizer = fusedopt.AdamW(params, lr=0.1)
        for _ in range(steps):
            for p in params:
                p.grad = torch.randn(p.shape)
            optimizer.step()
        return torch.cat([p.detach() for p in params])

    torch.set_num_threads(2)
    expected = train()  # other threads are here now, and will not be in the child
"""


def test_a_forked_child_steps_and_ends_cleanly():
    program = (
        FORKS
        + """
    def steps_of_a_child():
        param = torch.nn.Parameter(expected.clone())
        param.grad = expected
        optimizer = fusedopt.AdamW([param], lr=0.1)
        optimizer.step()
        # Here on two threads, where torch's own operations would wait for OpenMP's threads, which no fork brings along.
        torch.set_num_threads(2)
        optimizer.step()
        optimizer.step()
        torch.set_num_threads(1)
        fusedopt.Adam([param], lr=0.1, amsgrad=True).step()  # a kernel that the parent has not loaded
        return param.detach()

    torch.set_num_threads(1)
    statuses = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            found = steps_of_a_child()
            assert any(thread.name.startswith("fusedopt") for thread in threading.enumerate())  # a pool of its own
            sys.exit(7 if found.isfinite().all() and not torch.equal(found, expected) else 1)
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        torch.set_num_threads(2)
        assert torch.equal(train(), expected)
        torch.set_num_threads(1)
    assert torch.equal(steps_of_a_child(), steps_of_a_child())  # amsgrad's kernel, from where the child may have put it
    print(statuses)
    """
    )
    # A folder that cannot be made: kernels go to a temporary one, which the child's end must leave alone.
    assert output(program, FUSEDOPT_CACHE_DIR="/dev/null/none").strip() == "[7, 7]"


def test_data_loader_workers_after_a_step():
    program = (
        FORKS
        + """
    import warnings
    from torch.utils.data import DataLoader, Dataset

    class Stepping(Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, index):
            param = torch.nn.Parameter(torch.full((200_000,), float(index)))
            param.grad = torch.ones(200_000)
            fusedopt.SGD([param], lr=0.5).step()
            return param.detach()[:2].clone()

    for batch, loaded in enumerate(DataLoader(Stepping(), batch_size=2, num_workers=2)):
        assert torch.equal(loaded[:, 0], torch.tensor([2.0 * batch, 2.0 * batch + 1]) - 0.5), loaded
        assert torch.equal(train(), expected)
    print("done")
    """
    )
    assert output(program).strip() == "done"


def test_busy_cores_beside_us():
    """With every core taken by others a step still ends, and is right."""
    program = (
        FORKS
        + """
    import multiprocessing, time

    def spin(stop):
        while not stop.is_set():
            sum(range(1000))

    if __name__ == "__main__":
        context = multiprocessing.get_context("fork")
        stop = context.Event()
        others = [context.Process(target=spin, args=(stop,), daemon=True) for _ in range(2 * os.cpu_count())]
        [other.start() for other in others]
        for _ in range(5):
            assert torch.equal(train(), expected)
        stop.set()
        [other.join() for other in others]
        print("done")
    """
    )
    assert output(program).strip() == "done"
