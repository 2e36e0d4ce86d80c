"""Streams of gradients that are hard on short formats, and what an optimizer's updates are compared with."""

from collections.abc import Iterator

import numpy as np
import torch

#: By name: what gradients are multiplied by, and the eps of the optimizer.
STREAMS = {
    "gauss": (1e-3, 1e-8),
    "lognormal 1": (1e-4, 1e-8),
    "lognormal 2": (1e-4, 1e-8),
    "sparse": (1e-3, 1e-8),
    "tiny 2e-8": (2e-8, 1e-30),
    "tiny 1e-12": (1e-12, 1e-30),
    "huge": (1e6, 1e-8),
}


def stream(name: str, count: int, steps: int, seed: int) -> Iterator[torch.Tensor]:
    """Gradients with a mean of a tenth of their spread, which differs by coordinate where the name says so."""
    generator = np.random.default_rng(seed)
    mean, spread = 0.1 * generator.standard_normal(count), np.ones(count)
    if name.startswith("lognormal"):
        spread = np.exp(int(name[-1]) * generator.standard_normal(count))
    for _ in range(steps):
        gradient = (generator.standard_normal(count) + mean) * spread * STREAMS[name][0]
        if name == "sparse":
            gradient *= generator.random(count) < 0.05
        yield torch.from_numpy(gradient.astype(np.float32))


def updates(optimizer: torch.optim.Optimizer, gradients) -> Iterator[torch.Tensor]:
    """What each step adds to a parameter of zeros, in learning rates."""
    (group,) = optimizer.param_groups
    (parameter,) = group["params"]
    for gradient in gradients:
        with torch.no_grad():
            parameter.zero_()
        parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
        yield parameter.detach().float() / group["lr"]


def distance(ours: torch.optim.Optimizer, truth: torch.optim.Optimizer, name: str, steps: int, seed: int) -> tuple[float, float]:
    """The relative L2 distance of our updates from the true ones, after 50 steps, and our largest one."""
    count = ours.param_groups[0]["params"][0].numel()
    difference = size = largest = 0.0
    pairs = zip(updates(ours, stream(name, count, steps, seed)), updates(truth, stream(name, count, steps, seed)), strict=True)
    for step, (update, true) in enumerate(pairs):
        if step >= 50:
            difference += float((update - true).double().square().sum())
            size += float(true.double().square().sum())
            largest = max(largest, float(update.abs().max()))
    return (difference / size) ** 0.5, largest
