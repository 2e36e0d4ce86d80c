"""What is measured: the shapes of models, the optimizers, and the implementations of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fusedopt

Build = Callable[[Sequence[Tensor]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Case:
    """A model of `tensors` parameters of `elements` elements each, float32, contiguous, on the CPU."""

    tensors: int
    elements: int

    @property
    def name(self) -> str:
        return f"{self.tensors}x{self.elements}"

    @property
    def title(self) -> str:
        return f"{self.tensors:,} x {self.elements:,}"

    def parameters(self) -> list[Tensor]:
        """The same parameters at every call."""
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(self.elements, generator=generator).requires_grad_() for _ in range(self.tensors)]

    def gradients(self, seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1 + seed)
        return [torch.randn(self.elements, generator=generator) for _ in range(self.tensors)]


CASES = (
    Case(1, 20_000_000),
    Case(1, 1_000_000),
    Case(100, 50_000),
    Case(1_000, 1_000),
    Case(1_000, 100),
)


@dataclass(frozen=True)
class Subject:
    """One implementation of an optimizer."""

    name: str
    build: Build


@dataclass(frozen=True)
class Contest:
    """An optimizer with its arguments: torch's fused implementation against ours, and torch's for-loop as the judge."""

    name: str
    baseline: Subject
    ours: Subject
    reference: Build

    @classmethod
    def of(cls, class_name: str, **arguments: Any) -> Contest:
        """Take the class `class_name` of torch.optim and of fusedopt."""
        torch_class, our_class = getattr(torch.optim, class_name), getattr(fusedopt, class_name)
        return cls(
            name=", ".join([class_name, *(f"{key}={value}" for key, value in arguments.items())]),
            baseline=Subject("torch fused", lambda parameters: torch_class(parameters, **arguments, fused=True)),
            ours=Subject("fusedopt", lambda parameters: our_class(parameters, **arguments, fused=True)),
            reference=lambda parameters: torch_class(parameters, **arguments, foreach=False, fused=False),
        )


def contests() -> tuple[Contest, ...]:
    return Contest.of("AdamW"), Contest.of("SGD", momentum=0.9)
