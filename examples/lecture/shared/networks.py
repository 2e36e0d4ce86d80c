"""Tiny networks; their initial weights follow torch's global seed, which every topic starts from."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn


def fully_connected(widths: Sequence[int], activation: type[nn.Module] = nn.ReLU, dropout: float = 0.0) -> nn.Sequential:
    """Linear layers between the given widths, with an activation, and dropout if asked for, after all but the last."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths[:-1]):
        layers += [nn.Linear(inputs, outputs), activation(), *([nn.Dropout(dropout)] if dropout else [])]
    return nn.Sequential(*layers, nn.Linear(*widths[-2:]))


class Block(nn.Module):
    """x + branch(x), or branch(x) alone, with branch = ReLU(Linear(x)); alone it keeps the scale of signals (He et al. 2015)."""

    def __init__(self, width: int, skip: bool) -> None:
        super().__init__()
        self.branch, self.skip = nn.Sequential(nn.Linear(width, width), nn.ReLU()), skip
        if not skip:
            nn.init.kaiming_normal_(self.branch[0].weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x) if self.skip else self.branch(x)


def deep(inputs: int, width: int, blocks: int, *, skips: bool, outputs: int = 10) -> nn.Sequential:
    """A chain of blocks between two linear layers, with or without skip connections."""
    return nn.Sequential(nn.Linear(inputs, width), *(Block(width, skips) for _ in range(blocks)), nn.Linear(width, outputs))
