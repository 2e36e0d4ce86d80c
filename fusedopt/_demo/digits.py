"""The data and the network of the demo: handwritten digits and a residual network of fully connected layers."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

TEST_IMAGES = 360
BATCH_SIZE = 64


@dataclass(frozen=True)
class Digits:
    """scikit-learn's 1,797 images of 8 x 8 pixels, split into a training and a test part."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @classmethod
    def load(cls, device: torch.device) -> "Digits":
        """Read the images from scikit-learn, scale them to [-1, 1] and split them, the same way every time."""
        pixels, labels = load_digits(return_X_y=True)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        images = torch.tensor(pixels / 8 - 1, dtype=torch.float32)[order].to(device)
        targets = torch.tensor(labels)[order].to(device)
        return cls(images[TEST_IMAGES:], targets[TEST_IMAGES:], images[:TEST_IMAGES], targets[:TEST_IMAGES])

    @property
    def steps_per_epoch(self) -> int:
        """Whole minibatches in one pass over the training images."""
        return len(self.train_labels) // BATCH_SIZE

    def minibatches(self, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield `steps` minibatches, reshuffled for every epoch: the same sequence at every call."""
        shuffle = torch.Generator().manual_seed(1)
        for step in range(steps):
            position = step % self.steps_per_epoch
            if position == 0:
                order = torch.randperm(len(self.train_labels), generator=shuffle).to(self.train_images.device)
            chosen = order[position * BATCH_SIZE : (position + 1) * BATCH_SIZE]
            yield self.train_images[chosen], self.train_labels[chosen]


class ResidualBlock(nn.Module):
    """x + Linear(GELU(Linear(LayerNorm(x)))): the feed-forward half of a transformer's layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch's output to `x`, of shape (images, width)."""
        added: Tensor = self.branch(x)
        return x + added


def make_network(width: int = 48, blocks: int = 24) -> nn.Module:
    """Build the network with the same initial weights every time; torch's global random state is left alone.

    It has as many parameter tensors as a ResNet-50 or a BERT-base (150; they have 161 and 199), most of them small as
    theirs are, but fewer weights (231,000): what a step costs is visiting tensors more than computing on them.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(64, width),
            *[ResidualBlock(width) for _ in range(blocks)],
            nn.LayerNorm(width),
            nn.Linear(width, 10),
        )
