"""How figures look: a method has the same colour, dashes and marker on all of them, and they differ in grey, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

STYLE: dict[Any, Any] = {
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "font.size": 10,
    "grid.color": "#e2e2e2",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
}

# From Okabe and Ito's palette, which colour-blind readers tell apart; dark and light, whole and dashed, where they meet.
LOOKS: dict[str, dict[str, Any]] = {
    "SGD": {"color": "#000000", "linestyle": "-", "marker": "o"},
    "momentum": {"color": "#0072b2", "linestyle": "--", "marker": "s"},
    "averaged momentum": {"color": "#56b4e9", "linestyle": ":", "marker": "^"},
    "Nesterov": {"color": "#d55e00", "linestyle": "-.", "marker": "D"},
    "Adam": {"color": "#009e73", "linestyle": "-", "marker": "v"},
    "AdamW": {"color": "#cc79a7", "linestyle": "--", "marker": "P"},
    "constant": {"color": "#e69f00", "linestyle": "-", "marker": "o"},
    "Robbins-Monro": {"color": "#0072b2", "linestyle": "--", "marker": "s"},
    "drops": {"color": "#000000", "linestyle": "-", "marker": "D"},
    "training": {"color": "#0072b2", "linestyle": "--", "marker": "s"},
    "test": {"color": "#d55e00", "linestyle": "-", "marker": "o"},
    "theory": {"color": "#777777", "linestyle": ":", "marker": ""},
}


def look(method: str, *, label: str | None = None, marked: bool = False, **changes: Any) -> dict[str, Any]:
    """Arguments of ``Axes.plot`` for a method, its name as the label unless another is given; markers only if asked for."""
    chosen = {"label": method if label is None else label, **LOOKS[method]}
    if not marked:
        del chosen["marker"]
    return chosen | changes


def panels(count: int, *, height: float = 3.6, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure with that many panels side by side, in one row or more."""
    # Without pyplot: no display is asked for, and no global state of matplotlib is touched.
    figure = Figure(figsize=(5.2 * max(2, count // rows), height * rows), layout="constrained")
    return figure, list(figure.subplots(rows, count // rows, squeeze=False).flat)


def describe(axes: Axes, title: str, x: str, y: str, *, log: str = "", legend: bool = True) -> None:
    """Title, labels of both axes, logarithmic scales (``"x"``, ``"y"`` or ``"xy"``) and the legend."""
    axes.set(title=title, xlabel=x, ylabel=y)
    if "x" in log:
        axes.set_xscale("log")
    if "y" in log:
        axes.set_yscale("log")
    if legend:
        axes.legend()


def save(figure: Figure, path: Path) -> None:
    """Write a PNG of few colours' worth of bytes, the same ones for the same figure."""
    figure.savefig(path, dpi=100, metadata={"Software": None}, pil_kwargs={"optimize": True})


def styled() -> Any:
    """The context in which figures are drawn."""
    return mpl.rc_context(STYLE)
