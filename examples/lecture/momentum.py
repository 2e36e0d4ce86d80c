r"""Momentum crosses a narrow valley

A quadratic whose curvature is $L$ across and $\mu$ along, $\kappa = L / \mu = 100$. Gradient descent has to take steps
shorter than $2 / L$, and crawls along. Momentum remembers: what alternates cancels, what persists adds up. In torch's form,
in the lecture's averaged form (where a step is $1 - \beta$ times as long for the same $\alpha$), and in Nesterov's form:

$$ b \leftarrow \beta b + g, \quad \theta \leftarrow \theta - \alpha b $$

$$ d \leftarrow \beta d + (1 - \beta) g, \quad \theta \leftarrow \theta - \alpha d $$

$$ b \leftarrow \beta b + g, \quad \theta \leftarrow \theta - \alpha (g + \beta b) $$

Each converges up to a learning rate of its own, which a bisection finds and a formula confirms: momentum survives larger
ones than plain descent, in the averaged form much larger ones, and Nesterov's form smaller ones. In this order:

$$ \frac{2}{L}, \qquad \frac{2 (1 + \beta)}{L}, \qquad
\frac{2 (1 + \beta)}{(1 - \beta) L}, \qquad \frac{2 (1 + \beta)}{(1 + 2 \beta) L} $$
"""

import numpy as np
import torch

import fusedopt as optim

from .shared import plotting
from .shared.topic import Result, Setting

BETA, CURVATURES, START = 0.8, (1.0, 100.0), (-1.0, 0.3)
LARGEST = CURVATURES[1]
# How each is made from a learning rate, the one it walks with below, and the largest it converges with.
METHODS = {
    "SGD": (lambda p, lr: optim.SGD(p, lr=lr), 2 / sum(CURVATURES), 2 / LARGEST),
    "momentum": (lambda p, lr: optim.SGD(p, lr=lr, momentum=BETA), 2 / LARGEST, 2 * (1 + BETA) / LARGEST),
    "averaged momentum": (lambda p, lr: optim.Momentum(p, lr=lr, beta=BETA), 10 / LARGEST, 2 * (1 + BETA) / (1 - BETA) / LARGEST),
    "Nesterov": (
        lambda p, lr: optim.SGD(p, lr=lr, momentum=BETA, nesterov=True),
        1 / LARGEST,
        2 * (1 + BETA) / (1 + 2 * BETA) / LARGEST,
    ),
}


def walk(make, lr, steps):
    theta = torch.nn.Parameter(torch.tensor(START, dtype=torch.float64))
    optimizer, curvatures = make([theta], lr), torch.tensor(CURVATURES, dtype=torch.float64)
    path = [theta.detach().clone()]
    for _ in range(steps):
        theta.grad = curvatures * theta.detach()
        optimizer.step()
        path.append(theta.detach().clone())
    return torch.stack(path)


def largest_rate(make, steps):
    low, high = 1e-3, 1.0
    for _ in range(16):
        middle = (low + high) / 2
        low, high = (middle, high) if walk(make, middle, steps)[-1].norm() < 1 else (low, middle)
    return low


def run(setting: Setting) -> Result:
    figure, (left, right) = plotting.panels(2, height=4.2)
    grid = np.meshgrid(np.linspace(-1.1, 0.3, 200), np.linspace(-0.35, 0.35, 200))
    left.contour(*grid, sum(h / 2 * x**2 for h, x in zip(CURVATURES, grid, strict=True)), np.geomspace(0.01, 5, 12), colors="0.8")
    numbers: dict[str, float | str] = {}
    for name, (make, lr, limit) in METHODS.items():
        path = walk(make, lr, 800)
        distances = path.norm(dim=1)
        if name != "averaged momentum":  # the same path as momentum's
            left.plot(*path[:40].T, **plotting.look(name, marked=True, linewidth=1, markersize=3))
        right.plot(distances[:400], **plotting.look(name, label=rf"{name}, $\alpha$ = {lr:.3f}"))
        numbers[f"{name}: steps to a distance of 1e-6"] = int((distances > 1e-6).sum())
        numbers[f"{name}: largest learning rate that converges"] = largest_rate(make, setting.choose(1000, quick=300))
        numbers[f"{name}: the same by the formula"] = limit
    plotting.describe(left, "The first 40 steps", r"$\theta_1$, along the valley", r"$\theta_2$, across it")
    plotting.describe(right, "Distance from the optimum", "step", r"$\Vert\theta\Vert$", log="y", legend=False)
    right.set_ylim(1e-16, 3)
    right.legend(loc="lower left")
    return Result(figure, numbers)
