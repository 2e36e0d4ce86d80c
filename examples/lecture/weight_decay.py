r"""Weight decay in two forms

L2 regularisation adds $\lambda \theta$ to the gradient; decoupled decay shrinks the weights beside the step. For plain SGD
they are one:

$$ \theta - \alpha (g + \lambda \theta) = \theta (1 - \lambda \alpha) - \alpha g $$

Momentum accumulates $\lambda \theta$ with the gradients, and Adam divides it by the root of their squares: there the two
forms differ. Below, a network learns few digits with some wrong labels from Adam with L2 (`Adam`) and with decoupled decay
(`AdamW`). Both shrink the weights, and both, in the right amount, lower the test error; the same $\lambda$ means other
things to each.
"""

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fusedopt as optim

from .shared import plotting
from .shared.networks import fully_connected
from .shared.topic import Result, Setting
from .shared.training import error_of, train

DECAY = 0.1
PAIRS = {
    "SGD": lambda p, apart: optim.SGD(p, lr=0.1, weight_decay=DECAY, decoupled_weight_decay=apart),
    "momentum": lambda p, apart: optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=DECAY, decoupled_weight_decay=apart),
    "Adam": lambda p, apart: (optim.AdamW if apart else optim.Adam)(p, lr=0.01, weight_decay=DECAY),
}
STRENGTHS = {"Adam": 10.0 ** np.arange(-4, -0.9, 0.5), "AdamW": 10.0 ** np.arange(-2, 1.1, 0.5)}


def difference(make, data, steps):
    """Largest difference of any weight between the two forms, in float64 from the same weights."""
    networks = [fully_connected([data.pixels, 16, 10]).double() for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    for network, apart in zip(networks, (False, True), strict=True):
        optimizer = make(network.parameters(), apart)
        for _ in range(steps):
            optimizer.zero_grad()
            cross_entropy(network(data.train_images.double()), data.train_labels).backward()
            optimizer.step()
    vectors = [nn.utils.parameters_to_vector(network.parameters()) for network in networks]
    return (vectors[0] - vectors[1]).abs().max().item()


def run(setting: Setting) -> Result:
    data, epochs = setting.data.part(300).flat().with_wrong_labels(0.1), setting.choose(100, quick=60)
    seeds = range(setting.choose(3, quick=1))
    numbers: dict[str, float | str] = {
        f"{name}: largest difference between the forms, 100 steps": difference(make, data, 100) for name, make in PAIRS.items()
    }
    figure, (left, right) = plotting.panels(2)
    for name, strengths in STRENGTHS.items():
        norms, errors = [], []
        for strength in [0.0, *strengths]:
            found = []
            for seed in seeds:
                torch.manual_seed(seed)
                network = fully_connected([data.pixels, 64, 10])
                optimizer = getattr(optim, name)(network.parameters(), lr=0.01, weight_decay=float(strength))
                train(network, optimizer, data.train_images, data.train_labels, batch_size=30, epochs=epochs, seed=seed)
                norm = nn.utils.parameters_to_vector(network.parameters()).norm().item()
                found.append((norm, error_of(network, data.test_images, data.test_labels)))
            norms.append(np.mean([norm for norm, _ in found]))
            errors.append(np.mean([error for _, error in found]))
        for axis, curve in ((left, norms), (right, errors)):
            axis.plot(strengths, curve[1:], **plotting.look(name, marked=True))
            axis.axhline(curve[0], **plotting.look("theory", label="no decay" if name == "Adam" else ""))
        numbers[f"{name}: norm of the weights, no decay"] = norms[0]
        numbers[f"{name}: norm of the weights, most decay"] = norms[-1]
        numbers[f"{name}: test error, no decay, %"] = errors[0]
        numbers[f"{name}: test error, best decay, %"] = min(errors)
    plotting.describe(left, "Norm of all weights", r"weight decay $\lambda$", r"$\Vert\theta\Vert$", log="xy")
    plotting.describe(right, "Test error", r"weight decay $\lambda$", "test error, %", log="x")
    return Result(figure, numbers)
