"""AdamW's step in short formats: milliseconds, bytes and gigabytes a second, against torch fused in float32.

``python -m bench.short_formats_speed --elements 20000000`` prints a table in Markdown. All take turns, step by step, so that what
else a machine does meets all alike; ratios are medians of the ratios of neighbouring steps. Packages that have 8-bit states for
CPUs take part where they are installed.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import fusedopt

BASELINE = "torch fused, float32"


def subjects(elements: int) -> Iterator[tuple[str, torch.dtype, Callable[[Tensor], Any]]]:
    """Yield names, dtypes of parameters, and functions that make optimizers of one parameter of ``elements``."""
    float32, bfloat16 = torch.float32, torch.bfloat16
    yield BASELINE, float32, lambda p: torch.optim.AdamW([p], fused=True)
    formats: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
        "float32": (float32, {}),
        "bf16 states": (float32, {"state_format": "bf16"}),
        "8-bit states": (float32, {"state_format": "8bit"}),
        "bfloat16, split16, bf16 states": (bfloat16, {"state_format": "bf16", "master_weights": "split16"}),
        "bfloat16, split16, 8-bit states": (bfloat16, {"state_format": "8bit", "master_weights": "split16"}),
        "bfloat16 by chance, 8-bit states": (bfloat16, {"state_format": "8bit", "stochastic_rounding": True}),
    }
    for name, (dtype, options) in formats.items():
        yield f"fusedopt, {name}", dtype, lambda p, options=options: fusedopt.AdamW([p], **options)  # type: ignore[misc]
    for package, module in (("bitsandbytes", "bitsandbytes.optim"), ("torchao", "torchao.optim")):
        if importlib.util.find_spec(package) is not None:
            made = importlib.import_module(module).AdamW8bit
            yield f"{package}, 8-bit states", float32, lambda p, made=made: made([p])  # type: ignore[misc]


def moved_bytes(optimizer: Any) -> int:
    """Return the bytes that one step reads and writes at least: parameters and states both ways, gradients one."""
    found = fusedopt.memory(optimizer)
    return 2 * (found.bytes["parameters"] + found.states) + found.bytes["gradients"]


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.short_formats_speed", description=__doc__)
    parser.add_argument("--elements", type=int, default=20_000_000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    optimizers = {}
    for name, dtype, make in subjects(chosen.elements):
        parameter = torch.nn.Parameter(torch.randn(chosen.elements).to(dtype))
        parameter.grad = (1e-3 * torch.randn(chosen.elements)).to(dtype)
        optimizers[name] = make(parameter)
        for _ in range(3):
            optimizers[name].step()
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(chosen.rounds):
        for name, optimizer in optimizers.items():
            began = time.perf_counter()
            optimizer.step()
            times[name].append(time.perf_counter() - began)
    print(f"{chosen.elements:,} elements, {chosen.threads} threads, medians of {chosen.rounds} interleaved steps\n")
    print(
        "| implementation | state bytes a parameter | bytes moved | ms | GB/s | ns x threads an element | times as fast as torch |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, optimizer in optimizers.items():
        seconds = statistics.median(times[name])
        ratio = statistics.median(base / own for base, own in zip(times[BASELINE], times[name], strict=True))
        moved, memory = moved_bytes(optimizer), fusedopt.memory(optimizer)
        each = moved / chosen.elements
        print(
            f"| {name} | {memory.bytes_per_parameter:.3f} | {each:.1f} | {1e3 * seconds:.2f} | {moved / seconds / 1e9:.1f} | "
            f"{1e9 * seconds * chosen.threads / chosen.elements:.2f} | {ratio:.2f} |"
        )


if __name__ == "__main__":
    main()
