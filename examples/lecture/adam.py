r"""Adam: every parameter its own step size

The lecture's equations, for each element, from $m_0 = v_0 = 0$:

$$ m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 $$

$$ \hat m_t = \frac{m_t}{1 - \beta_1^t}, \qquad \hat v_t = \frac{v_t}{1 - \beta_2^t}, \qquad
\theta_t = \theta_{t-1} - \alpha \frac{\hat m_t}{\sqrt{\hat v_t} + \epsilon} $$

Written out term by term in float64 they give the same parameters as `fusedopt.Adam`, to rounding. A gradient that is
multiplied by a constant leaves $\hat m / \sqrt{\hat v}$ as it is. So when the inputs of softmax regression are scaled badly,
each pixel by a factor of its own between 0.01 and 10, Adam leaves SGD behind, each with the learning rate of a wide grid that
brings the lowest mean loss on the way. On the pixels as they are the two end closer together.
"""

import numpy as np
import torch
from torch import nn

import fusedopt as optim

from .shared import plotting
from .shared.topic import Result, Setting
from .shared.training import loss_of, train

ALPHA, BETA1, BETA2, EPSILON = 1e-2, 0.9, 0.999, 1e-8
RATES = {"SGD": (optim.SGD, 10.0 ** np.arange(-3, 2.1, 0.5)), "Adam": (optim.Adam, 10.0 ** np.arange(-4, 0.1, 0.5))}


def difference_from_the_equations(steps):
    theta = torch.randn(1000, dtype=torch.float64)
    parameter = nn.Parameter(theta.clone())
    optimizer = optim.Adam([parameter], lr=ALPHA, betas=(BETA1, BETA2), eps=EPSILON, fused=True)
    m = v = torch.zeros_like(theta)
    for t in range(1, steps + 1):
        g = torch.randn_like(theta)
        m = BETA1 * m + (1 - BETA1) * g
        v = BETA2 * v + (1 - BETA2) * g**2
        m_hat = m / (1 - BETA1**t)
        v_hat = v / (1 - BETA2**t)
        theta = theta - ALPHA * m_hat / (v_hat.sqrt() + EPSILON)
        parameter.grad = g
        optimizer.step()
    return (parameter.detach() - theta).abs().max().item()


def best_of_the_grid(optimizer_class, rates, images, labels, epochs):
    """The learning rate with the lowest mean of the losses after each epoch, and these losses."""
    found = []
    for rate in rates:
        network, losses = nn.Linear(images.shape[1], 10), []
        nn.init.zeros_(network.weight)
        nn.init.zeros_(network.bias)

        def note(network=network, losses=losses):
            losses.append(loss_of(network, images, labels))

        train(
            network, optimizer_class(network.parameters(), lr=rate), images, labels, batch_size=50, epochs=epochs, after_epoch=note
        )
        found.append((np.mean(losses), rate, losses))
    return min(found)[1:]


def run(setting: Setting) -> Result:
    data, epochs = setting.data.part(1000).flat(), setting.choose(30, quick=8)
    numbers: dict[str, float | str] = {"largest difference from the equations, 1,000 steps": difference_from_the_equations(1000)}
    scales = {"inputs as they are": torch.ones(data.pixels), "badly scaled inputs": 10 ** (3 * torch.rand(data.pixels) - 2)}
    figure, axes = plotting.panels(2)
    for axis, (title, scale) in zip(axes, scales.items(), strict=True):
        for name, (optimizer_class, rates) in RATES.items():
            rate, losses = best_of_the_grid(optimizer_class, rates, data.train_images * scale, data.train_labels, epochs)
            numbers[f"{title}, {name}: loss at the end"] = losses[-1]
            numbers[f"{title}, {name}: best learning rate"] = float(rate)
            axis.plot(range(1, epochs + 1), losses, **plotting.look(name, label=f"{name}, best $\\alpha$ = {rate:.2g}"))
        plotting.describe(axis, title.capitalize(), "epoch", "training loss, nats", log="y")
    low, high = (extreme(axis.get_ylim()[place] for axis in axes) for place, extreme in ((0, min), (1, max)))
    for axis in axes:
        axis.set_ylim(low, high)
    return Result(figure, numbers)
