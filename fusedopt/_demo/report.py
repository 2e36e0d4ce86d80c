"""What the demo shows at its end: a table for the terminal and a picture of the same facts."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from .training import COMPARED_STEPS, FUSED, LOOP, OURS, Comparison

# Orange and blue of Okabe and Ito's palette, which colour-blind readers tell apart too.
TORCH_COLOR, OUR_COLOR, OTHER_COLOR = "#e69f00", "#0072b2", "#bbbbbb"
SMOOTHED_STEPS = 22
"""About an epoch; the loss of single minibatches jumps by an order of magnitude."""
FIGURE_INCHES, DOTS_PER_INCH = (12.0, 7.5), 150


LEGEND = (
    "Loss over the training images and accuracy on the test images, at the end. ms/step: median time in "
    "optimizer.step(). Torch/ours: ratio of these times. Weights: the largest difference of any weight from "
    f"{LOOP}'s after {COMPARED_STEPS} steps, in float32 as trained, and in float64 in runs of their own."
)


def make_table(comparisons: Sequence[Comparison]) -> Table:
    """Lay out one row for each optimizer and implementation; it fits a terminal of 80 columns."""
    table = Table(box=box.HORIZONTALS, pad_edge=False, collapse_padding=True)
    table.add_column("\nOptimizer", no_wrap=True)
    for heading in (
        "Final\nloss",
        "Test\naccuracy",
        "Optimizer\nms/step",
        "Torch/\nours",
        "Weights,\nfloat32",
        "Weights,\nfloat64",
    ):
        table.add_column(heading, justify="right")
    for comparison in comparisons:
        table.add_section()
        table.add_row(f"[bold]{comparison.recipe.title}")
        for name, run in comparison.runs.items():
            ours = name == OURS
            table.add_row(
                f"  {name}",
                f"{run.final_loss:.4f}",
                f"{run.test_accuracy:.1%}",
                f"{run.step_milliseconds:.3f}",
                "" if ours else f"{comparison.speed_ratio(name):.2f}",
                "" if name == LOOP else f"{comparison.float32_difference(name):.1e}",
                f"{comparison.float64_difference:.1e}" if ours else "",
                style="bold" if ours else None,
            )
    return table


def draw(comparisons: Sequence[Comparison], caption: str, path: Path) -> None:
    """Write a PNG of the loss curves, ours over torch's, and of the times in the optimizer as bars."""
    # Without pyplot: no display is asked for, and no global state of matplotlib is touched.
    figure = Figure(figsize=FIGURE_INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    figure.suptitle(f"The same network trained by torch.optim and by fusedopt\n{caption}", fontsize=12)
    grid = figure.subplots(len(comparisons), 2, width_ratios=(3, 2), squeeze=False)
    for (curves, bars), comparison in zip(grid, comparisons, strict=True):
        _draw_losses(curves, comparison)
        _draw_times(bars, comparison)
    figure.savefig(path, format="png")


def _draw_losses(axes: Axes, comparison: Comparison) -> None:
    # Dashes over a broad line: where the curves coincide both are seen.
    styles = {FUSED: (TORCH_COLOR, 5.0, "solid"), OURS: (OUR_COLOR, 1.6, "dashed")}
    for name, (color, width, style) in styles.items():
        losses = comparison.runs[name].losses
        steps = range(SMOOTHED_STEPS, len(losses) + 1)
        means = np.convolve(losses, np.full(SMOOTHED_STEPS, 1 / SMOOTHED_STEPS), mode="valid")
        axes.plot(steps, means, color=color, linewidth=width, linestyle=style, label=name)
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss, mean of the last {SMOOTHED_STEPS} steps")
    axes.set_title(f"{comparison.recipe.title}: loss")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_times(axes: Axes, comparison: Comparison) -> None:
    names = list(comparison.runs)
    colors = [{FUSED: TORCH_COLOR, OURS: OUR_COLOR}.get(name, OTHER_COLOR) for name in names]
    bars = axes.barh(names, [run.step_milliseconds for run in comparison.runs.values()], color=colors)
    axes.bar_label(
        bars,
        [
            f"{run.step_milliseconds:.2f} ms" + ("" if name == OURS else f" ({comparison.speed_ratio(name):.1f} x)")
            for name, run in comparison.runs.items()
        ],
        padding=4,
    )
    axes.invert_yaxis()
    axes.margins(x=0.4)
    axes.set_xlabel("milliseconds per step")
    axes.set_title(f"{comparison.recipe.title}: time in the optimizer")
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
