r"""The loss landscape, with and without skip connections

A slice through the loss around trained weights $\theta^*$, along two random directions,

$$ f(\theta^* + x d_1 + y d_2), \qquad \Vert d_i^{(j)} \Vert = \Vert \theta^{*(j)} \Vert ~ \mathrm{for ~ each ~ filter} ~ j $$

each scaled to the norm of the weights that it changes (filter normalisation, Li et al. 2018; here a filter is the row of a
matrix, and biases stay), so that networks of different scale can be compared. Deep networks of the same width and depth, one
with skip connections and one without: around the solution without them the loss rises sooner. Random directions in many
dimensions see nothing of the optimizer's path, so it is drawn below, in the plane of the two directions that hold most of
it.
"""

import numpy as np
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import fusedopt as optim

from .shared import plotting
from .shared.networks import deep
from .shared.topic import Result, Setting
from .shared.training import error_of, loss_of, train

WIDTH, BLOCKS = 32, 20


def filter_normalised(network):
    direction = []
    for weight in network.parameters():
        drawn = torch.randn_like(weight)
        along = weight.detach().norm(dim=1, keepdim=True) / drawn.norm(dim=1, keepdim=True) if weight.dim() == 2 else 0.0
        direction.append((drawn * along).flatten())
    return torch.cat(direction)


def slice_of(network, center, directions, xs, ys, data):
    losses = np.empty((len(ys), len(xs)))
    for row, y in enumerate(ys):
        for column, x in enumerate(xs):
            vector_to_parameters(center + float(x) * directions[0] + float(y) * directions[1], network.parameters())
            losses[row, column] = loss_of(network, data.train_images, data.train_labels)
    vector_to_parameters(center, network.parameters())
    return losses


def trained(data, skips, epochs):
    """A network, and all its weights as one vector before training and after each epoch."""
    torch.manual_seed(0)
    network = deep(data.pixels, WIDTH, BLOCKS, skips=skips)
    path = [parameters_to_vector(network.parameters()).detach().clone()]

    def note():
        path.append(parameters_to_vector(network.parameters()).detach().clone())

    optimizer = optim.Adam(network.parameters(), lr=1e-3)
    train(network, optimizer, data.train_images, data.train_labels, batch_size=50, epochs=epochs, after_epoch=note)
    return network, torch.stack(path)


def draw(axis, xs, ys, losses):
    drawn = axis.contourf(xs, ys, np.log10(losses).clip(-4, 3), np.linspace(-4, 3, 15), cmap="cividis")
    axis.contour(xs, ys, np.log10(losses), [0.0], colors="white", linewidths=1)
    axis.grid(visible=False)
    return drawn


def run(setting: Setting) -> Result:
    data, points = setting.data.part(500).flat(), setting.choose(31, quick=11)
    figure, axes = plotting.panels(4, rows=2, height=4)
    numbers: dict[str, float | str] = {}
    for title, skips, above, below in (("with skips", True, *axes[::2]), ("without skips", False, *axes[1::2])):
        network, path = trained(data, skips, setting.choose(60, quick=30))
        xs = np.linspace(-0.5, 0.5, points)
        losses = slice_of(network, path[-1], [filter_normalised(network) for _ in range(2)], xs, xs, data)
        draw(above, xs, xs, losses)
        _, sizes, rows = torch.linalg.svd(path - path[-1], full_matrices=False)
        coordinates = ((path - path[-1]) @ rows[:2].T).numpy()
        middle, reach = (coordinates.max(0) + coordinates.min(0)) / 2, 0.7 * np.ptp(coordinates, axis=0)
        plane = [np.linspace(m - r, m + r, points) for m, r in zip(middle, reach, strict=True)]
        drawn = draw(below, *plane, slice_of(network, path[-1], rows[:2], *plane, data))
        below.plot(*coordinates.T, color="white", marker="o", markersize=3, markeredgecolor="black", markeredgewidth=0.5)
        plotting.describe(above, title.capitalize(), "$x$, in norms of a filter", "$y$, in norms of a filter", legend=False)
        plotting.describe(below, "The path of Adam", "first direction, units of weights", "second direction", legend=False)
        numbers[f"{title}: training loss, nats"] = losses[points // 2, points // 2]
        numbers[f"{title}: test error, %"] = error_of(network, data.test_images, data.test_labels)
        numbers[f"{title}: median loss over the slice, nats"] = float(np.median(losses))
        numbers[f"{title}: part of the slice with a loss below 1, %"] = 100 * float((losses < 1).mean())
        numbers[f"{title}: share of the path in its plane, %"] = 100 * (sizes[:2].norm() / sizes.norm()).square().item()
    figure.colorbar(drawn, ax=axes, label="log10 of training loss in nats; white line: 1 nat", shrink=0.7)
    return Result(figure, numbers)
