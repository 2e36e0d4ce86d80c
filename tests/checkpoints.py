"""Train, save, load and go on."""

from __future__ import annotations

import io

import torch

from cases import CASES, Case, draw_gradients
from single_step import checked_step

SHAPES = [(33,), (4, 6), (), (0,)]
#: The rows whose checkpoints torch.optim can load.
OF_TORCH = [case for case in CASES if case.truth.__module__.startswith("torch.optim")]


def trained(optimizer, steps=3):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for _ in range(steps):
        draw_gradients(params)
        optimizer.step()
    return optimizer


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def continues(case: Case, optimizer):
    """Step ``optimizer`` beside the truth twice."""
    for _ in range(2):
        draw_gradients([p for group in optimizer.param_groups for p in group["params"]])
        checked_step(case, optimizer)


def assert_equal_states(loaded, saved):
    assert loaded["state"].keys() == saved["state"].keys()
    for index, state in saved["state"].items():
        assert loaded["state"][index].keys() == state.keys()
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(loaded["state"][index][key]), torch.as_tensor(value)), key
