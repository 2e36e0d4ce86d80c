r"""Noise as a regulariser: small and large minibatches

Keskar et al. (2016) train the same network with small and with large minibatches, until both have learnt the training images
equally well, and walk straight from one solution to the other, and beyond:

$$ f((1 - x) \theta_{small} + x \theta_{large}) $$

Beyond the solution of the large minibatches the loss rises faster, and so it does when all weights are changed at random, by
about a fifth of each: its minimum is sharper. On test images it errs more. Keskar et al. see the reason in the noise of
small minibatches, which throws the weights out of narrow valleys. Here the images are few, and a tenth of their labels drawn
at random; large means all of them.
"""

import numpy as np
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import fusedopt as optim

from .shared import plotting
from .shared.networks import fully_connected
from .shared.topic import Result, Setting
from .shared.training import error_of, loss_of, train

SOLVED, MOST_EPOCHS, SHAKEN = 0.01, 2000, 0.2


def solution(data, size, seed):
    """A network trained until its loss is below `SOLVED`."""
    torch.manual_seed(seed)
    network = fully_connected([data.pixels, 64, 64, 10])
    solved = {"after_epoch": lambda: loss_of(network, data.train_images, data.train_labels) < SOLVED}
    optimizer = optim.Adam(network.parameters(), lr=3e-3)
    train(network, optimizer, data.train_images, data.train_labels, batch_size=size, epochs=MOST_EPOCHS, seed=seed, **solved)
    return network


def loss_at(network, weights, data):
    """The training loss with other weights."""
    own = parameters_to_vector(network.parameters()).detach()
    vector_to_parameters(weights, network.parameters())
    loss = loss_of(network, data.train_images, data.train_labels)
    vector_to_parameters(own, network.parameters())
    return loss


def run(setting: Setting) -> Result:
    data, seeds = setting.data.part(500).flat().with_wrong_labels(0.1), setting.choose(6, quick=2)
    places, sizes = np.linspace(-1, 2, 61), {"small": 10, "large": len(data.train_labels)}
    lines, found = [], {size: [] for size in sizes}
    for seed in range(seeds):
        networks = {name: solution(data, size, seed) for name, size in sizes.items()}
        weights = {name: parameters_to_vector(network.parameters()).detach().clone() for name, network in networks.items()}
        for name, network in networks.items():
            around = [weights[name] * (1 + SHAKEN * torch.randn_like(weights[name])) for _ in range(20)]
            found[name].append(
                (
                    loss_of(network, data.train_images, data.train_labels),
                    np.mean([loss_at(network, there, data) for there in around]),
                    error_of(network, data.test_images, data.test_labels),
                )
            )
        between = [(1 - x) * weights["small"] + x * weights["large"] for x in map(float, places)]
        lines.append([loss_at(networks["small"], there, data) for there in between])

    figure, (left, right) = plotting.panels(2)
    left.plot(places, np.transpose(lines), color="0.75", linewidth=1)
    left.plot(places, np.mean(lines, 0), **plotting.look("training", label=f"mean of {seeds} seeds"))
    left.set_xticks([-1, 0, 1, 2], ["-1", "0\nsmall", "1\nlarge", "2"])
    plotting.describe(left, "From one solution to the other", "$x$", "training loss, nats", log="y")
    for place, (name, style) in enumerate({"small": "SGD", "large": "constant"}.items()):
        errors = [error for *_, error in found[name]]
        spots = [place + 0.06 * (seed - (seeds - 1) / 2) for seed in range(seeds)]
        right.plot(spots, errors, **plotting.look(style, label=f"{sizes[name]} images", marked=True, linestyle=""))
    right.set_xlim(-0.5, 1.5)
    right.set_xticks([0, 1], ["small minibatches", "large minibatches"])
    plotting.describe(right, "Test error, each seed", "trained with", "test error, %")
    numbers: dict[str, float | str] = {}
    for name, x in (("small", -0.5), ("large", 1.5)):
        loss, sharpness, error = np.mean(found[name], 0)
        numbers[f"{name}: training loss, nats"] = loss
        numbers[f"{name}: training loss with weights changed by a fifth, nats"] = sharpness
        numbers[f"{name}: training loss beyond it, at x = {x}, nats"] = np.mean(lines, 0)[np.abs(places - x).argmin()]
        numbers[f"{name}: test error, %"] = error
    return Result(figure, numbers)
