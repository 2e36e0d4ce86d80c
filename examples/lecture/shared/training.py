"""The training loop, and what is measured of a network."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .data import minibatches


def train(
    network: nn.Module,
    optimizer: Optimizer,
    images: Tensor,
    labels: Tensor,
    *,
    batch_size: int,
    epochs: int,
    schedule: LRScheduler | None = None,
    after_epoch: Callable[[], bool | None] = lambda: None,
    seed: int = 0,
) -> list[float]:
    """Train by minibatches and return the loss of each; ends early when `after_epoch` returns True.

    Args:
        network: left in training mode while it is trained, and in evaluation mode for `after_epoch` and afterwards.
        optimizer: of its parameters.
        images: what it takes.
        labels: what it should answer.
        batch_size: images in a minibatch.
        epochs: passes over all images.
        schedule: is stepped after each minibatch.
        after_epoch: called after each epoch.
        seed: of the order of the images.
    """
    batches = minibatches(len(labels), batch_size, seed)
    losses = []
    for _ in range(epochs):
        network.train()
        for chosen in islice(batches, len(labels) // batch_size):
            optimizer.zero_grad()
            loss = cross_entropy(network(images[chosen]), labels[chosen])
            loss.backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
            losses.append(loss.item())
        network.eval()
        if after_epoch():
            break
    return losses


@torch.no_grad()
def loss_of(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Mean cross-entropy in nats."""
    return cross_entropy(network(images), labels).item()


@torch.no_grad()
def error_of(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of the images that are answered wrongly, in per cent."""
    return 100 * (network(images).argmax(dim=1) != labels).double().mean().item()


def gradient_of(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Gradient of the mean loss by all parameters, as one vector; their ``grad`` is left alone."""
    gradients = torch.autograd.grad(cross_entropy(network(images), labels), list(network.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients])
