r"""Gradient descent reaches a stationary point

Step against the gradient of the loss over all images, with a step size that decreases but sums to infinity:

$$ \theta_{t+1} = \theta_t - \alpha_t \nabla f(\theta_t), \qquad \alpha_t = \alpha_0 \frac{b}{b + t} $$

Where the gradient changes at most by $L$ per unit of length, and no step is longer than $1 / L$, each step lowers the loss
by at least half of $\alpha_t$ times the squared norm of the gradient. The loss cannot fall below zero, so the smallest
gradient so far obeys

$$ \min_{s < t} \Vert \nabla f(\theta_s) \Vert^2 \leq 2 f(\theta_0) / \sum_{s < t} \alpha_s $$

For softmax regression half the largest eigenvalue of the inputs' second moment is such an $L$: the curve has to stay below
the bound. The bound holds for any shape of loss; for the network with a hidden layer no $L$ is known, but its gradient falls
as well.
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fusedopt as optim

from .shared import plotting
from .shared.networks import fully_connected
from .shared.topic import Result, Setting


def descend(network, data, steps, lr):
    optimizer = optim.SGD(network.parameters(), lr=lr)
    schedule = optim.lr_scheduler.RobbinsMonroLR(optimizer, b=1000)
    losses, norms, rates = [], [], []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = cross_entropy(network(data.train_images), data.train_labels)
        loss.backward()
        losses.append(loss.item())
        norms.append(nn.utils.get_total_norm([parameter.grad for parameter in network.parameters()]).item())
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return torch.tensor(losses), torch.tensor(norms), torch.tensor(rates)


def run(setting: Setting) -> Result:
    data, steps = setting.data.part(1000).flat(), setting.choose(4000, quick=1000)
    inputs = nn.functional.pad(data.train_images, (0, 1), value=1.0)  # a column of ones, for the bias
    smoothness = 0.5 * torch.linalg.matrix_norm(inputs, 2).item() ** 2 / len(inputs)
    losses, norms, rates = descend(nn.Linear(data.pixels, 10), data, steps, 1 / smoothness)
    bounds = (2 * losses[0] / rates.cumsum(0)).sqrt()
    smallest = norms.cummin(0).values
    _, network_norms, _ = descend(fully_connected([data.pixels, 32, 10], nn.Tanh), data, steps, 0.2)

    figure, (left, right) = plotting.panels(2)
    left.plot(smallest, **plotting.look("SGD", label="smallest gradient so far"))
    left.plot(bounds, **plotting.look("theory", label="bound"))
    plotting.describe(left, "Softmax regression", "step $t$", r"gradient norm $\Vert\nabla f\Vert$, nats per unit", log="xy")
    right.plot(network_norms, **plotting.look("SGD", label="gradient"))
    plotting.describe(right, "A hidden layer of 32", "step $t$", r"gradient norm $\Vert\nabla f\Vert$, nats per unit", log="xy")
    return Result(
        figure,
        {
            "smoothness L of softmax regression": smoothness,
            "softmax regression: gradient norm at first": norms[0].item(),
            "softmax regression: smallest gradient norm": smallest[-1].item(),
            "softmax regression: bound on it": bounds[-1].item(),
            "softmax regression: largest ratio to the bound": (smallest / bounds).max().item(),
            "hidden layer: gradient norm at first": network_norms[0].item(),
            "hidden layer: gradient norm at the end": network_norms[-1].item(),
        },
    )
