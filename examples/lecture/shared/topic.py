"""What a topic is: its docstring as the text of its section, and ``run(setting)``."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from matplotlib.figure import Figure

from .data import Data
from .plotting import styled

T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """What a topic runs on.

    Args:
        data: the images.
        quick: as short as its numbers allow, for tests.
    """

    data: Data
    quick: bool = False

    def choose(self, full: T, quick: T) -> T:
        """One of two: for a full run, or for a quick one."""
        return quick if self.quick else full


@dataclass(frozen=True)
class Result:
    """What a topic found.

    Args:
        figure: the picture.
        numbers: what was measured, by what it is; text where there is nothing to measure, saying why.
    """

    figure: Figure
    numbers: dict[str, float | str] = field(default_factory=dict)


def text_of(name: str) -> tuple[str, str]:
    """Title and text of a topic, in Markdown with formulas between dollar signs: its module's docstring."""
    title, _, text = (importlib.import_module(f"examples.lecture.{name}").__doc__ or "").partition("\n")
    return title.rstrip("."), text.strip()


def run(name: str, setting: Setting) -> Result:
    """Run a topic on one thread from a fixed seed: the same numbers at each run on one machine, alone or after others."""
    topic = importlib.import_module(f"examples.lecture.{name}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]), styled():
            torch.manual_seed(0)
            result: Result = topic.run(setting)
            return result
    finally:
        torch.set_num_threads(threads)
