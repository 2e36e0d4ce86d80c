"""The training runs of the demo: several optimizers, step by step beside each other, on copies of one network."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

import fusedopt

from .digits import Digits, make_network

COMPARED_STEPS = 100
"""Weights are compared after this many steps."""
WARM_UP_STEPS = 10
"""First steps left out of the times: there kernels are compiled and states are allocated."""

LOOP, FOREACH, FUSED, OURS = "torch loop", "torch foreach", "torch fused", "fusedopt"
TORCH_OPTIONS: dict[str, dict[str, Any]] = {
    LOOP: {"foreach": False, "fused": False},
    FOREACH: {"foreach": True},
    FUSED: {"fused": True},
}


@dataclass(frozen=True)
class Recipe:
    """An optimizer class, known to torch.optim and to fusedopt by the same name, and its arguments."""

    title: str
    class_name: str
    arguments: dict[str, Any]

    def make(self, implementation: str, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        """Build the optimizer over `parameters` as `implementation` has it."""
        package = fusedopt if implementation == OURS else torch.optim
        optimizer_class: type[torch.optim.Optimizer] = getattr(package, self.class_name)
        return optimizer_class(parameters, **self.arguments, **TORCH_OPTIONS.get(implementation, {}))


RECIPES = (
    Recipe("SGD with momentum", "SGD", {"lr": 0.05, "momentum": 0.9}),
    Recipe("AdamW", "AdamW", {"lr": 1e-3, "weight_decay": 1e-2}),
)


@dataclass
class Run:
    """One copy of the network in training, and what was seen on the way."""

    implementation: str
    network: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler
    step_seconds: list[float] = field(default_factory=list)
    gradient_seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    compared_weights: Tensor = field(default_factory=lambda: torch.empty(0))
    final_loss: float = float("nan")
    test_accuracy: float = float("nan")

    @classmethod
    def start(cls, recipe: Recipe, implementation: str, steps: int, device: torch.device, dtype: torch.dtype) -> "Run":
        """Make a copy of the network with the common initial weights, and its optimizer with a cosine schedule."""
        network = make_network().to(device, dtype)
        optimizer = recipe.make(implementation, network.parameters())
        return cls(implementation, network, optimizer, CosineAnnealingLR(optimizer, steps))

    def train_step(self, images: Tensor, labels: Tensor) -> None:
        """Take one step of training; forward and backward are timed apart from the optimizer."""
        started = _now(images.device)
        self.optimizer.zero_grad()
        loss = cross_entropy(self.network(images), labels)
        loss.backward()
        differentiated = _now(images.device)
        self.optimizer.step()
        stepped = _now(images.device)
        self.schedule.step()
        self.gradient_seconds.append(differentiated - started)
        self.step_seconds.append(stepped - differentiated)
        self.losses.append(loss.item())
        if len(self.losses) == COMPARED_STEPS:
            self.compared_weights = self.weights()

    def weights(self) -> Tensor:
        """All weights in one new vector."""
        return torch.cat([parameter.detach().flatten() for parameter in self.network.parameters()])

    @torch.no_grad()
    def evaluate(self, digits: Digits) -> None:
        """Note the loss over all training images and the accuracy on the test images."""
        self.final_loss = cross_entropy(self.network(digits.train_images), digits.train_labels).item()
        predicted = self.network(digits.test_images).argmax(dim=1)
        self.test_accuracy = (predicted == digits.test_labels).float().mean().item()

    @property
    def step_milliseconds(self) -> float:
        """Median time of the optimizer's step, the first steps left out."""
        return 1e3 * median(self.step_seconds[WARM_UP_STEPS:])

    @property
    def gradient_milliseconds(self) -> float:
        """Median time of the forward and the backward pass, the first steps left out."""
        return 1e3 * median(self.gradient_seconds[WARM_UP_STEPS:])


@dataclass(frozen=True)
class Comparison:
    """What became of one recipe: the float32 runs, and how far float64 weights are from torch's for-loop."""

    recipe: Recipe
    runs: dict[str, Run]
    float64_difference: float

    def float32_difference(self, implementation: str) -> float:
        """Largest difference of any weight from torch's for-loop, in float32, after `COMPARED_STEPS` steps."""
        return _largest_difference(self.runs[implementation], self.runs[LOOP])

    def speed_ratio(self, implementation: str) -> float:
        """How many times as long as ours a step of `implementation` takes."""
        return self.runs[implementation].step_milliseconds / self.runs[OURS].step_milliseconds


def compare(recipe: Recipe, digits: Digits, steps: int, progress: Callable[[str], None]) -> Comparison:
    """Train with every implementation of `recipe` for `steps` steps, then compare weights in float64.

    Args:
        recipe: the optimizer and its arguments.
        digits: the images, on the device to train on.
        steps: of the float32 runs; at least `COMPARED_STEPS`.
        progress: called after each minibatch with a line on what is going on.
    """
    if steps < COMPARED_STEPS:
        raise ValueError(f"weights are compared after {COMPARED_STEPS} steps, got {steps=}: train longer")
    doing = f"{recipe.title}: {len(TORCH_OPTIONS) + 1} copies, float32"
    runs = _train(recipe, (*TORCH_OPTIONS, OURS), digits, steps, torch.float32, lambda: progress(doing))
    for run in runs:
        run.evaluate(digits)
    doing_exactly = f"{recipe.title}: 2 copies, float64"
    exact_runs = _train(recipe, (LOOP, OURS), digits, COMPARED_STEPS, torch.float64, lambda: progress(doing_exactly))
    return Comparison(recipe, {run.implementation: run for run in runs}, _largest_difference(*exact_runs))


def _train(
    recipe: Recipe,
    implementations: Iterable[str],
    digits: Digits,
    steps: int,
    dtype: torch.dtype,
    progress: Callable[[], None],
) -> list[Run]:
    runs = [Run.start(recipe, name, steps, digits.train_images.device, dtype) for name in implementations]
    for step, (images, labels) in enumerate(digits.minibatches(steps)):
        # Another one begins at each step, so that none always finds the caches as its neighbour left them.
        first = step % len(runs)
        for run in runs[first:] + runs[:first]:
            run.train_step(images.to(dtype), labels)
        progress()
    return runs


def _largest_difference(one: Run, other: Run) -> float:
    return (one.compared_weights - other.compared_weights).abs().max().item()


def _now(device: torch.device) -> float:
    """Seconds on the clock, once the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
