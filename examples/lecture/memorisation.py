r"""Networks can learn anything by heart

Zhang et al. (2017) train one network, unchanged, on true labels, on labels drawn at random, and on images whose pixels are
shuffled, each image in its own way. The training error

$$ \frac{1}{n} \sum_{i=1}^n [\hat y_i \neq y_i] $$

reaches zero on all three. So nothing in the network itself keeps it from learning by heart, and what it does on new images
(here: with true labels, their pixels shuffled where those of the training images are) has to be explained otherwise. Random
labels take more epochs. After random labels or pixels its answers to new images are guesses: about nine in ten are wrong.
"""

from dataclasses import replace

import torch

import fusedopt as optim

from .shared import plotting
from .shared.networks import fully_connected
from .shared.topic import Result, Setting
from .shared.training import error_of, train

LOOKS = {"true labels": "SGD", "random labels": "Nesterov", "random pixels": "momentum"}


def shuffled(images):
    """Each image with its pixels in an order of its own."""
    return images.gather(1, torch.rand_like(images).argsort(dim=1))


def run(setting: Setting) -> Result:
    data = setting.data.part(setting.choose(1000, quick=500)).flat()
    variants = {
        "true labels": data,
        "random labels": data.with_wrong_labels(1.0),
        "random pixels": replace(data, train_images=shuffled(data.train_images), test_images=shuffled(data.test_images)),
    }
    figure, (left, right) = plotting.panels(2)
    numbers: dict[str, float | str] = {}
    for name, learnt in variants.items():
        torch.manual_seed(0)
        network = fully_connected([data.pixels, 512, 10])
        optimizer = optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
        errors = [error_of(network, learnt.train_images, learnt.train_labels)]

        def learnt_by_heart(network=network, learnt=learnt, errors=errors):
            errors.append(error_of(network, learnt.train_images, learnt.train_labels))
            return errors[-1] == 0

        losses = train(
            network, optimizer, learnt.train_images, learnt.train_labels, batch_size=50, epochs=500, after_epoch=learnt_by_heart
        )
        left.plot(losses, **plotting.look(LOOKS[name], label=name, linewidth=1.2))
        right.plot(errors, **plotting.look(LOOKS[name], label=name))
        numbers[f"{name}: training error at the end, %"] = errors[-1]
        numbers[f"{name}: epochs until then"] = len(errors) - 1
        numbers[f"{name}: test error, %"] = error_of(network, learnt.test_images, learnt.test_labels)
    plotting.describe(left, "Loss of each minibatch", "step", "training loss, nats", log="xy")
    plotting.describe(right, "Training error, until it is zero", "epoch", "training error, %")
    right.set_xscale("symlog", linthresh=10)
    return Result(figure, numbers)
