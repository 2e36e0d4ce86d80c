"""What is measured: the shapes of models and the optimizers."""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import models

Shapes = tuple[models.Shape, ...]

#: Elements after which values repeat. It is a prime, so that no chunk, thread's share or vector begins where a period does.
PERIOD = 65_537
#: Bytes that an element takes in a contest of AdamW's large cases: parameter, gradient and two states of two optimizers,
#: and the four arrays of the memory limit.
CONTEST_BYTES = 3 * 16
#: And in each of the contest's other optimizers, with some room for what they allocate during a step.
OPTIMIZER_BYTES = 20


@dataclass(frozen=True)
class Case:
    """A model: the shapes of its parameters, which are contiguous."""

    name: str
    title: str
    shapes: Shapes

    @classmethod
    def equal(cls, tensors: int, elements: int) -> Case:
        """Tensors of one dimension and one size."""
        return cls(f"{tensors}x{short(elements)}", f"{tensors:,} x {elements:,}", tensors * ((elements,),))

    @property
    def tensors(self) -> int:
        return len(self.shapes)

    @property
    def elements(self) -> int:
        return sum(map(math.prod, self.shapes))

    def filled(self, period: Tensor, device: str = "cpu") -> list[Tensor]:
        """New tensors that hold the values of `period` over and over, each from where the one before ended."""
        found, first, twice = [], 0, torch.cat([period, period]).to(device)
        for shape in self.shapes:
            count = math.prod(shape)
            flat = torch.empty(count, dtype=period.dtype, device=device)
            for head, row in by_period(flat, twice, first):
                head.copy_(row)
            found.append(flat.view(shape))
            first = (first + count) % PERIOD
        return found


def by_period(flat: Tensor, twice: Tensor, first: int) -> list[tuple[Tensor, Tensor]]:
    """Views of `flat`, whole periods as rows of a matrix and then the rest, each with the values that belong there.

    Args:
        flat: of one dimension.
        twice: a period of values, two times.
        first: place in the period of the first element.
    """
    whole = flat.numel() // PERIOD * PERIOD
    parts = [(flat[:whole].view(-1, PERIOD), twice[first : first + PERIOD])] if whole else []
    return [*parts, (flat[whole:], twice[first : first + flat.numel() - whole])]


@functools.cache
def values(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A period of normal values, the same tensor at every call: not to be written."""
    return torch.randn(PERIOD, generator=torch.Generator().manual_seed(seed)).to(dtype)


def short(number: int) -> str:
    """A number with k or M in the place of its zeros."""
    for unit, letter in ((1_000_000, "M"), (1_000, "k")):
        if number >= unit and number % unit == 0:
            return f"{number // unit}{letter}"
    return str(number)


def available_bytes() -> int:
    """Memory that is free, or can be made so, on the host and on the GPU."""
    meminfo = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text(encoding="utf-8")) if meminfo.exists() else None
    on_host = int(found[1]) * 1024 if found else 8 * 2**30
    return min(on_host, torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else on_host


def llama_stack(available: int) -> Case:
    """As many layers of Llama-3.2-1B as one contest can hold in half of the `available` bytes."""
    layer = sum(map(math.prod, models.llama_1b(1, embedding=False)))
    layers = max(1, min(models.LLAMA_LAYERS, available // (2 * CONTEST_BYTES * layer)))
    shapes = tuple(models.llama_1b(layers, embedding=False))
    return Case("llama-1b", f"Llama 1B, {layers} of {models.LLAMA_LAYERS} layers", shapes)


SYNTHETIC = (
    Case.equal(1, 20_000_000),
    Case.equal(1, 10_000_000),
    Case.equal(1, 1_000_000),
    Case.equal(100, 50_000),
    Case.equal(1_000, 1_000),
    Case.equal(1_000, 100),
)
REAL = (
    Case("mobilenet-v2", "MobileNetV2", tuple(models.mobilenet_v2())),
    Case("resnet50", "ResNet-50", tuple(models.resnet50())),
    Case("vit-b-16", "ViT-B/16", tuple(models.vit_b_16())),
    Case("bert-base", "BERT-base", tuple(models.bert_base())),
    Case("gpt2-small", "GPT-2 small", tuple(models.gpt2_small())),
    llama_stack(available_bytes()),
)
CASES = {case.name: case for case in (*SYNTHETIC, *REAL)}


@dataclass(frozen=True)
class Optimizer:
    """A class of torch.optim and fusedopt, with the arguments that it is measured with."""

    name: str
    class_name: str
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def torch_class(self) -> type[torch.optim.Optimizer]:
        found: type[torch.optim.Optimizer] = getattr(torch.optim, self.class_name)
        return found

    @property
    def torch_fuses(self) -> bool:
        """Whether torch has a fused implementation on the CPU."""
        return "fused" in inspect.signature(self.torch_class).parameters

    def reference(self, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        """torch's for-loop."""
        options = {**self.arguments, "foreach": False, **({"fused": False} if self.torch_fuses else {})}
        return self.torch_class(parameters, **options)


OPTIMIZERS = {
    optimizer.name: optimizer
    for optimizer in (
        Optimizer("AdamW", "AdamW"),
        Optimizer("SGD momentum", "SGD", {"momentum": 0.9}),
        Optimizer("RMSprop", "RMSprop"),
        Optimizer("Adagrad", "Adagrad"),
        Optimizer("Adadelta", "Adadelta"),
        Optimizer("Adamax", "Adamax"),
        Optimizer("NAdam", "NAdam"),
        Optimizer("RAdam", "RAdam"),
        Optimizer("ASGD", "ASGD"),
        Optimizer("Rprop", "Rprop"),
    )
}
