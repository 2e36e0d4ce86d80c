"""Whether training is as good in short formats: a small transformer on the text of Python's help, and the digits, several seeds.

``python -m bench.short_formats FOLDER`` writes short_formats.md and short_formats.png into FOLDER. The text has some 4,000
different words, most of them rare: their embeddings get a gradient once in hundreds of steps.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fusedopt
from bench.plots import STYLE
from fusedopt._demo.digits import Digits, ResidualBlock

CONTEXT, BATCH, WIDTH, LAYERS = 64, 8, 64, 2
#: What is compared: the dtype of parameters, and the options of AdamW.
FORMATS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "bf16 states": (torch.float32, {"state_format": "bf16"}),
    "8-bit states": (torch.float32, {"state_format": "8bit"}),
    "bfloat16, split16, 8-bit": (torch.bfloat16, {"state_format": "8bit", "master_weights": "split16"}),
    "bfloat16, split8, 8-bit": (torch.bfloat16, {"state_format": "8bit", "master_weights": "split8"}),
    "bfloat16 by chance, 8-bit": (torch.bfloat16, {"state_format": "8bit", "stochastic_rounding": True}),
    "bfloat16 to nearest, bf16": (torch.bfloat16, {}),
}


class Transformer(nn.Module):
    """A causal language model of whole words."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, WIDTH)
        self.places = nn.Parameter(torch.randn(CONTEXT, WIDTH) * 0.02)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True) for _ in range(LAYERS)
        )
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, words)
        self.register_buffer("mask", torch.full((CONTEXT, CONTEXT), float("-inf")).triu(1), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the scores of the next words."""
        x = self.embedding(tokens) + self.places
        for layer in self.layers:
            x = layer(x, src_mask=self.mask, is_causal=True)
        scores: Tensor = self.head(self.norm(x))
        return scores


def words_of_help() -> tuple[Tensor, Tensor, int]:
    """Return the words of Python's help as numbers, nine tenths to train and a tenth to test, and how many there are."""
    from pydoc_data import topics

    text = re.findall(r"\w+|[^\w\s]|\n", "\n".join(topics.topics.values()))
    known = {word: number for number, word in enumerate(sorted(set(text)))}
    tokens = torch.tensor([known[word] for word in text])
    cut = len(tokens) * 9 // 10
    return tokens[:cut], tokens[cut:], len(known)


def batches(tokens: Tensor, count: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ``count`` random pieces of the text, and the words that follow each of theirs."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        starts = torch.randint(len(tokens) - CONTEXT - 1, (BATCH,), generator=generator)
        pieces = torch.stack([tokens[start : start + CONTEXT + 1] for start in starts.tolist()])
        yield pieces[:, :-1], pieces[:, 1:]


def language_model(name: str, seed: int, steps: int) -> tuple[list[float], float]:
    """Return the losses on training text along the way, and the one on other text in the end."""
    train, test, words = words_of_help()
    torch.manual_seed(seed)
    dtype, options = FORMATS[name]
    model = Transformer(words).to(dtype)
    optimizer = fusedopt.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01, **options)
    schedule = fusedopt.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps, pct_start=0.1)
    losses = []

    def loss_of(pair: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(model(pair[0]).flatten(0, 1).float(), pair[1].flatten())

    for pair in batches(train, steps, seed):
        loss = loss_of(pair)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        return losses, statistics.fmean(loss_of(pair).item() for pair in batches(test, 40, 1_000_000))


def digits(name: str, seed: int, steps: int) -> tuple[list[float], float]:
    """Return the losses along the way, and the one on test images in the end."""
    data = Digits.load(torch.device("cpu"))
    torch.manual_seed(seed)
    dtype, options = FORMATS[name]
    width = 96
    model = nn.Sequential(nn.Linear(64, width), *(ResidualBlock(width) for _ in range(3)), nn.Linear(width, 10)).to(dtype)
    optimizer = fusedopt.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, **options)
    losses = []
    for images, labels in data.minibatches(steps):
        loss = cross_entropy(model(images.to(dtype)).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        return losses, float(cross_entropy(model(data.test_images.to(dtype)).float(), data.test_labels))


TASKS: dict[str, tuple[Callable[[str, int, int], tuple[list[float], float]], int]] = {
    "words": (language_model, 300),
    "digits": (digits, 300),
}


def main() -> None:
    """Train everything, and write what came of it."""
    parser = argparse.ArgumentParser(prog="python -m bench.short_formats", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    chosen = parser.parse_args()
    curves: dict[tuple[str, str], list[list[float]]] = {}
    finals: dict[tuple[str, str], list[float]] = {}
    for seed in range(chosen.seeds):
        for task, (train, steps) in TASKS.items():
            for name in FORMATS:
                began = time.perf_counter()
                losses, final = train(name, seed, steps)
                curves.setdefault((task, name), []).append(losses)
                finals.setdefault((task, name), []).append(final)
                print(f"{task}, seed {seed}, {name}: {final:.4f} ({time.perf_counter() - began:.0f} s)", flush=True)
    chosen.folder.mkdir(parents=True, exist_ok=True)
    (chosen.folder / "short_formats.md").write_text(table(finals), encoding="utf-8")
    with mpl.rc_context(STYLE):
        figure(curves).savefig(chosen.folder / "short_formats.png", dpi=120)


def table(finals: dict[tuple[str, str], list[float]]) -> str:
    """Return the losses on test data as Markdown: mean and spread over seeds."""
    lines = ["| formats | " + " | ".join(f"{task}, mean (least - most)" for task in TASKS) + " |", "|---|" + "---|" * len(TASKS)]
    for name in FORMATS:
        cells = [finals[task, name] for task in TASKS]
        lines.append(f"| {name} | " + " | ".join(f"{statistics.fmean(c):.4f} ({min(c):.4f} - {max(c):.4f})" for c in cells) + " |")
    return "\n".join(lines) + "\n"


def figure(curves: dict[tuple[str, str], list[list[float]]]) -> Figure:
    """Return the losses along the way, the mean over seeds, smoothed over 20 steps."""
    result = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, task in zip(result.subplots(1, len(TASKS)), TASKS, strict=True):
        for name in FORMATS:
            mean = torch.tensor(curves[task, name]).mean(0)
            smooth = nn.functional.avg_pool1d(mean[None], 20, 1)[0]
            axes.plot(range(10, 10 + len(smooth)), smooth, label=name)
        axes.set(title=f"{task}: training loss", xlabel="step", yscale="log" if task == "digits" else "linear")
        axes.legend(fontsize=7)
    return result


if __name__ == "__main__":
    main()
