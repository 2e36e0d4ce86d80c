r"""Robbins and Monro: steps that decrease, but not too fast

$$ \alpha_t = \frac{a}{b + t}, \qquad \sum_t \alpha_t = \infty, \qquad \sum_t \alpha_t^2 < \infty $$

The first sum lets it arrive from anywhere, the second averages the noise away. Take $f(\theta) = \frac{h}{2} \theta^2$ with
the optimum at zero, and gradients with noise of variance $\sigma^2$. With a constant step the squared error stalls at a
floor that can be computed,

$$ \mathrm{E} ~ \theta^2 \rightarrow \frac{\alpha \sigma^2}{h (2 - \alpha h)}, $$

while with decreasing steps it goes on falling as $1 / t$. The noise is zero in the mean and the gradient linear, so the mean
of many paths is the path of gradient descent without noise.
"""

import numpy as np
import torch

import fusedopt as optim

from .shared import plotting
from .shared.topic import Result, Setting

CURVATURE, NOISE, START = 1.0, 1.0, 3.0
STEP, HALVING = 0.5, 10.0  # alpha_0, and b: a = alpha_0 b = 5


def paths(steps, chains, decreasing, noise):
    """Squared error and mean at each step, over independent chains that are the elements of one parameter."""
    theta = torch.nn.Parameter(torch.full((chains,), START, dtype=torch.float64))
    optimizer = optim.SGD([theta], lr=STEP)
    schedule = optim.lr_scheduler.RobbinsMonroLR(optimizer, b=HALVING)
    random, squares, means = torch.Generator().manual_seed(0), [], []
    for _ in range(steps):
        squares.append(theta.detach().square().mean().item())
        means.append(theta.detach().mean().item())
        theta.grad = CURVATURE * theta.detach() + noise * torch.randn(chains, generator=random, dtype=torch.float64)
        optimizer.step()
        if decreasing:
            schedule.step()
    return np.array(squares), np.array(means)


def run(setting: Setting) -> Result:
    steps, chains = setting.choose(10_000, quick=2_000), 2_000
    constant, _ = paths(steps, chains, False, NOISE)
    decreasing, mean = paths(steps, chains, True, NOISE)
    _, noiseless = paths(steps, 1, True, 0.0)
    floor = STEP * NOISE**2 / (CURVATURE * (2 - STEP * CURVATURE))
    times = np.arange(1, steps + 1)
    late = times > steps // 20
    rates = STEP * HALVING / (HALVING + times - 1)
    # How far a mean of that many chains strays by chance, from the spread of the chains themselves.
    spread = np.sqrt(decreasing - mean**2)
    strays = np.abs(mean - noiseless)[1:] / spread[1:] * np.sqrt(chains)

    figure, (left, right) = plotting.panels(2)
    left.plot(times, constant, **plotting.look("constant", label=r"constant $\alpha$"))
    left.plot(times, decreasing, **plotting.look("Robbins-Monro"))
    left.axhline(floor, **plotting.look("theory", label="floor, computed"))
    plotting.describe(left, "Distance from the optimum", "step $t$", r"mean squared error $E\,\theta_t^2$", log="xy")
    first = 30
    band = [(mean + sign * spread)[:first] for sign in (-1, 1)]
    right.fill_between(times[:first], *band, color="0.85", label="standard deviation of a path")
    right.plot(times[:first], noiseless[:first], **plotting.look("SGD", label="gradient descent"))
    right.plot(times[:first], mean[:first], **plotting.look("Robbins-Monro", label=f"SGD, mean of {chains:,} paths", linewidth=3))
    plotting.describe(right, "The mean path", "step $t$", r"$\theta_t$")
    return Result(
        figure,
        {
            "constant: mean squared error, last half": constant[steps // 2 :].mean(),
            "constant: the floor, computed": floor,
            "Robbins-Monro: mean squared error at the end": decreasing[-1],
            "Robbins-Monro: slope of log error by log t": np.polyfit(np.log(times[late]), np.log(decreasing[late]), 1)[0],
            "mean path against gradient descent: root mean square of standard errors": float(np.sqrt(np.mean(strays**2))),
            "sum of alpha": rates.sum(),
            "what its second half adds to the sum of alpha": rates[steps // 2 :].sum(),
            "what its second half adds to the sum of alpha squared": (rates[steps // 2 :] ** 2).sum(),
        },
    )
