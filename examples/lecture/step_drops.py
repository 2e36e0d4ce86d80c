r"""Hold a high step size, then drop it

The schedules that trained the well-known image networks keep a high $\alpha$ for long and then divide it by ten, twice,
against

$$ \alpha_t = \alpha_0 \frac{b}{b + t} $$

of Robbins and Monro. At a high step size the noise of the minibatches keeps the weights jumping, and the accuracy on test
images low; at the first drop the jumping stops, and the accuracy rises at once. A constant step never gets there. Means over
several seeds, with a fifth of the training labels drawn at random and weight decay; both schedules start from the same rate.
"""

import numpy as np
import torch

import fusedopt as optim

from .shared import plotting
from .shared.networks import fully_connected
from .shared.topic import Result, Setting
from .shared.training import error_of, train

RATE, BATCH, DECAY = 0.2, 10, 0.01


def accuracies(data, epochs, seed, make_schedule):
    """Test accuracy in per cent and learning rate after each epoch."""
    torch.manual_seed(seed)
    network = fully_connected([data.pixels, 32, 10])
    optimizer = optim.SGD(network.parameters(), lr=RATE, weight_decay=DECAY)
    seen, rates = [], []

    def note():
        seen.append(100 - error_of(network, data.test_images, data.test_labels))
        rates.append(optimizer.param_groups[0]["lr"])

    options = {"batch_size": BATCH, "epochs": epochs, "schedule": make_schedule(optimizer), "after_epoch": note, "seed": seed}
    train(network, optimizer, data.train_images, data.train_labels, **options)
    return seen, rates


def run(setting: Setting) -> Result:
    data, epochs = setting.data.part(1000).flat().with_wrong_labels(0.2), setting.choose(40, quick=16)
    seeds, per_epoch = setting.choose(5, quick=2), len(data.train_labels) // BATCH
    drops = [epochs // 2, epochs * 3 // 4]
    schedules = {
        "constant": lambda optimizer: None,
        "Robbins-Monro": lambda optimizer: optim.lr_scheduler.RobbinsMonroLR(optimizer, b=per_epoch * epochs / 10),
        "drops": lambda optimizer: optim.lr_scheduler.MultiStepLR(optimizer, [drop * per_epoch for drop in drops], gamma=0.1),
    }
    numbers: dict[str, float | str] = {}
    figure, (left, right) = plotting.panels(2)
    for name, make_schedule in schedules.items():
        runs = [accuracies(data, epochs, seed, make_schedule) for seed in range(seeds)]
        curves, rates = np.array([seen for seen, _ in runs]), runs[0][1]
        left.plot(range(1, epochs + 1), rates, **plotting.look(name), drawstyle="steps-mid")
        right.plot(range(1, epochs + 1), curves.mean(0), **plotting.look(name))
        numbers[f"{name}: test accuracy, last three epochs, %"] = curves[:, -3:].mean()
        if name == "drops":
            numbers["drops: test accuracy, three epochs before the first drop, %"] = curves[:, drops[0] - 3 : drops[0]].mean()
            numbers["drops: test accuracy, three epochs after it, %"] = curves[:, drops[0] : drops[0] + 3].mean()
    plotting.describe(left, "Schedules", "epoch", r"learning rate $\alpha$", log="y")
    plotting.describe(right, f"Test accuracy, mean of {seeds} seeds", "epoch", "test accuracy, %")
    return Result(figure, numbers)
