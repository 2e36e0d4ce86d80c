r"""Initialisation: the scale of signals by depth

A layer $z^{(k)} = W \phi(z^{(k-1)})$ of $d$ inputs with independent weights of variance $\sigma^2$ multiplies the variance
of what it is given by $d \sigma^2$. Without an activation that makes, after $k$ layers,

$$ \mathrm{std} ~ z^{(k)} = (\sigma \sqrt{d})^k ~ \mathrm{std} ~ z^{(0)} $$

With $\sigma^2 = 1 / d$ (Xavier) the scale stays; a little less and it vanishes, a little more and it explodes, exponentially
in the depth. With tanh the small ones vanish as well, and the large ones saturate: many units sit close to $\pm 1$, where
the gradient is small.

With all weights equal, all units of a layer compute the same and get the same gradient. Symmetry never breaks: however long
it is trained, the layer acts as one unit, and learns only what one unit can. (Only roundings that differ from unit to unit
could break it.)
"""

import torch
from torch import nn

import fusedopt as optim

from .shared import plotting
from .shared.networks import fully_connected
from .shared.topic import Result, Setting
from .shared.training import error_of, train

DEPTH, WIDTH = 30, 256
SCALES = {"too small, 0.25 / d": (0.25, "Robbins-Monro"), "Xavier, 1 / d": (1.0, "SGD"), "too large, 4 / d": (4.0, "constant")}


def scales_by_depth(inputs, variance, activation):
    """Standard deviation of the pre-activations of each layer."""
    signal, scales = inputs, []
    for _ in range(DEPTH):
        weight = torch.randn(WIDTH, WIDTH) * (variance / WIDTH) ** 0.5
        before = signal @ weight.T
        scales.append(before.std().item())
        signal = activation(before)
    return scales, signal


def all_equal(data, epochs):
    """For weights all equal, then random: the largest difference between hidden units after training, and the error."""
    found = []
    for equal in (True, False):
        network = fully_connected([data.pixels, 32, 10], nn.Tanh)
        if equal:
            for parameter in network[0].parameters():
                nn.init.constant_(parameter, 0.01)
            nn.init.constant_(network[2].weight, 0.01)
        images, labels = data.train_images, data.train_labels
        train(network, optim.SGD(network.parameters(), lr=0.1), images, labels, batch_size=50, epochs=epochs)
        weight = network[0].weight.detach()
        found += [(weight - weight[0]).abs().max().item(), error_of(network, images, labels)]
    return found


def run(setting: Setting) -> Result:
    data = setting.data.part(1000).flat()
    inputs = torch.randn(1000, WIDTH)
    figure, axes = plotting.panels(2)
    numbers: dict[str, float | str] = {}
    layers = range(1, DEPTH + 1)
    for axis, (title, activation) in zip(axes, {"no activation": lambda z: z, "tanh": torch.tanh}.items(), strict=True):
        for name, (variance, style) in SCALES.items():
            scales, signal = scales_by_depth(inputs, variance, activation)
            axis.plot(layers, scales, **plotting.look(style, label=rf"$\sigma^2$ {name}", marked=True, markersize=3))
            numbers[f"{title}, {name}: scale at layer {DEPTH}"] = scales[-1]
            if title == "tanh":
                numbers[f"tanh, {name}: units beyond 0.9 at layer {DEPTH}, %"] = 100 * (signal.abs() > 0.9).float().mean().item()
            else:
                axis.plot(layers, [variance ** (layer / 2) for layer in layers], **plotting.look("theory", label=""))
                numbers[f"{title}, {name}: the same by the formula"] = variance ** (DEPTH / 2)
        plotting.describe(axis, title.capitalize(), "layer", "standard deviation of pre-activations", log="y")
    spread, error, other_spread, other_error = all_equal(data, setting.choose(30, quick=10))
    return Result(
        figure,
        numbers
        | {
            "all equal: largest difference between units after training": spread,
            "random: largest difference between units after training": other_spread,
            "all equal: training error, %": error,
            "random: training error, %": other_error,
        },
    )
