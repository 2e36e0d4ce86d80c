"""Short formats on gradients that are hard on them: those of other packages, simulated as they are published, and ours.

What is measured is the relative L2 error of AdamW's updates against float32, in steps 51 to 300 of 4,096 elements, and the largest
update in learning rates. The formats of others are simulated in NumPy, for all of them to be there; packages that are installed
are run as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from numpy.typing import NDArray

from .cases import Optimizer
from .formats import BFLOAT16_STATES, BITSANDBYTES, EIGHT_BIT_STATES, TORCHAO
from .subjects import Subject

Array = NDArray[Any]
#: By name: what gradients are multiplied by, and eps.
STREAMS = {
    "gauss": (1e-3, 1e-8),
    "tiny 2e-8": (2e-8, 1e-30),
    "tiny 1e-12": (1e-12, 1e-30),
    "huge 1e6": (1e6, 1e-8),
    "sparse 5 %": (1e-3, 1e-8),
    "lognormal 1": (1e-4, 1e-8),
    "lognormal 2": (1e-4, 1e-8),
}
#: Run and not simulated, as far as installed.
RUN = (BITSANDBYTES, TORCHAO, BFLOAT16_STATES, EIGHT_BIT_STATES)
COUNT, STEPS, FIRST = 4096, 300, 50
BETA1, BETA2 = numpy.float32(0.9), numpy.float32(0.999)


def stream(name: str) -> Iterator[Array]:
    """Yield gradients with a mean of a tenth of their spread."""
    generator = numpy.random.default_rng(0)
    mean, spread = 0.1 * generator.standard_normal(COUNT), numpy.ones(COUNT)
    if name.startswith("lognormal"):
        spread = numpy.exp(int(name[-1]) * generator.standard_normal(COUNT))
    for _ in range(STEPS):
        gradient = (generator.standard_normal(COUNT) + mean) * spread * STREAMS[name][0]
        if name.startswith("sparse"):
            gradient *= generator.random(COUNT) < 0.05
        yield gradient.astype(numpy.float32)


def dynamic_map(signed: bool) -> Array:
    """Return the code book of bitsandbytes (functional.create_dynamic_map), which torchao has as well."""
    found = [0.0, 1.0]
    for i in range(7):
        ends = numpy.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1)
        values = 10.0 ** (i - 6) * (ends[:-1] + ends[1:]) / 2
        found += [*values, *(-values if signed else ())]
    return numpy.sort(numpy.array(found, numpy.float32))


def by_book(x: Array, book: Array, least: float) -> Array:
    """Return ``x`` in blocks of 256, as multiples of the largest magnitude (``least`` at least) from ``book``, the nearest ones."""
    blocks = x.reshape(-1, 256)
    scale = numpy.maximum(numpy.abs(blocks).max(1, keepdims=True), numpy.float32(least))
    quotients = numpy.where(scale > 0, blocks / scale, numpy.float32(0))
    found: Array = book[numpy.searchsorted((book[1:] + book[:-1]) / 2, quotients)] * scale
    return found.reshape(-1)


def dynamic(least: float) -> Callable[[Array, Array], tuple[Array, Array]]:
    """Return the format of bitsandbytes (0.50), or with a least scale of 1e-12 that of torchao (0.18)."""
    signed, unsigned = dynamic_map(True), dynamic_map(False)
    return lambda m, v: (by_book(m, signed, least), by_book(v, unsigned, least))


def flashoptim(m: Array, v: Array) -> tuple[Array, Array]:
    """Return what flashoptim (0.1.4) keeps: groups of 32 with scales in float16."""
    m, root = m.reshape(-1, 32), numpy.sqrt(v).reshape(-1, 32)
    scale = numpy.maximum(numpy.abs(m).max(1, keepdims=True), numpy.float32(1e-12))
    code = numpy.floor(127 * 2 * (m / scale) / (1 + numpy.abs(m / scale)) + 0.5) / 127
    kept = code / (2 - numpy.abs(code)) * scale.astype(numpy.float16).astype(numpy.float32)
    scale = numpy.maximum(root.max(1, keepdims=True), numpy.float32(1e-12))
    kept_root = numpy.floor(255 * root / scale + 0.5) / 255 * scale.astype(numpy.float16).astype(numpy.float32)
    return kept.astype(numpy.float32).reshape(-1), (kept_root**2).astype(numpy.float32).reshape(-1)


def simulated(keep: Callable[[Array, Array], tuple[Array, Array]]) -> Callable[[str], Iterator[Array]]:
    """Return a function that yields AdamW's updates where ``keep`` says what is left of both moments after each step."""

    def updates(name: str) -> Iterator[Array]:
        m = v = numpy.zeros(COUNT, numpy.float32)
        one, eps = numpy.float32(1), numpy.float32(STREAMS[name][1])
        for step, g in enumerate(stream(name), 1):
            m, v = BETA1 * m + (one - BETA1) * g, BETA2 * v + (one - BETA2) * g * g
            first, second = (numpy.float32(1 - beta**step) for beta in (0.9, 0.999))
            yield numpy.where(m == 0, numpy.float32(0), m / first / (numpy.sqrt(v / second) + eps))
            m, v = keep(m, v)

    return updates


def run(subject: Subject) -> Callable[[str], Iterator[Array]]:
    """Return a function that yields the updates of an optimizer that is run."""

    def updates(name: str) -> Iterator[Array]:
        parameter = torch.nn.Parameter(torch.zeros(COUNT))
        adamw = Optimizer("AdamW", "AdamW", {"lr": 1.0, "eps": STREAMS[name][1], "weight_decay": 0.0})
        optimizer = subject.build(adamw, [parameter])
        for gradient in stream(name):
            parameter.data.zero_()
            parameter.grad = torch.from_numpy(gradient)
            optimizer.step()
            yield -parameter.detach().numpy()

    return updates


@dataclass
class UpdateErrors:
    """Of one format, by stream: the relative L2 error of updates, and the largest update in learning rates."""

    subject: str
    errors: dict[str, float]
    largest: dict[str, float]


def update_errors() -> list[UpdateErrors]:
    """Measure published formats by simulation, and ours and whatever package is installed by running it."""
    formats = {
        "bitsandbytes, simulated": simulated(dynamic(0.0)),
        "torchao, simulated": simulated(dynamic(1e-12)),
        "flashoptim, simulated": simulated(flashoptim),
        **{subject.name: run(subject) for subject in RUN if subject.obstacle is None},
    }
    with numpy.errstate(all="ignore"):
        return [_errors_of(subject, updates) for subject, updates in formats.items()]


def _errors_of(subject: str, updates: Callable[[str], Iterator[Array]]) -> UpdateErrors:
    found = UpdateErrors(subject, {}, {})
    for name in STREAMS:
        difference = size = largest = 0.0
        pairs = zip(updates(name), simulated(lambda m, v: (m, v))(name), strict=True)
        for update, true in itertools.islice(pairs, FIRST, None):
            difference += float(((update - true).astype(float) ** 2).sum())
            size += float((true.astype(float) ** 2).sum())
            largest = max(largest, float(numpy.abs(update).max()))
        found.errors[name], found.largest[name] = (difference / size) ** 0.5, largest
    return found
