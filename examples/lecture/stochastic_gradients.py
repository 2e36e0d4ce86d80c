r"""Stochastic gradients are unbiased, and cheap

A minibatch $B$ of images gives an estimate of the gradient over all of them:

$$ \hat g_B = \frac{1}{|B|} \sum_{i \in B} \nabla f_i(\theta), \qquad \mathrm{E} ~ \hat g_B = \nabla f(\theta), \qquad \mathrm{E}
~ \Vert \hat g_B - \nabla f(\theta) \Vert^2 = \frac{\sigma^2}{|B|} $$

Averaged over the minibatches of an epoch it is the full gradient, to rounding. Its variance falls as one over the size of
the minibatch (here drawn with replacement), so a ten times smaller error costs a hundred times the images. To the right, the
same learning rate with several sizes: small minibatches make more progress from the same number of images.
"""

import numpy as np
import torch
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

import fusedopt as optim

from .shared import plotting
from .shared.networks import fully_connected
from .shared.topic import Result, Setting
from .shared.training import gradient_of, train

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def gradients_of_each(network, images, labels):
    """A row for each image, in float64."""

    def loss(parameters, image, label):
        return cross_entropy(functional_call(network, parameters, image), label)

    parameters = {name: parameter.detach() for name, parameter in network.named_parameters()}
    gradients = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, images, labels)
    return torch.cat([gradient.flatten(1) for gradient in gradients.values()], dim=1)


def run(setting: Setting) -> Result:
    data = setting.data.part(1024).flat()
    images, labels = data.train_images.double(), data.train_labels
    network = fully_connected([data.pixels, 16, 10]).double()
    full = gradient_of(network, images, labels)
    batches = torch.randperm(len(labels)).split(64)
    mean = torch.stack([gradient_of(network, images[batch], labels[batch]) for batch in batches]).mean(0)

    each = gradients_of_each(network, images, labels)
    draws = setting.choose(1000, quick=300)
    variances = []
    for size in SIZES:
        drawn = torch.randint(len(each), (draws, size))
        # A row for each minibatch: how much each image counts in its mean.
        shares = torch.zeros(draws, len(each), dtype=torch.float64).scatter_add_(
            1, drawn, torch.full(drawn.shape, 1 / size).double()
        )
        variances.append((shares @ each - full).square().sum(1).mean().item())
    slope = np.polyfit(np.log(SIZES), np.log(variances), 1)[0]
    predicted = (each - full).square().sum(1).mean().item() / np.array(SIZES)

    figure, (left, right) = plotting.panels(2)
    left.plot(SIZES, variances, **plotting.look("SGD", label="measured", marked=True, linestyle=""))
    left.plot(SIZES, predicted, **plotting.look("theory", label=r"$\sigma^2/|B|$"))
    plotting.describe(left, "Variance of the gradient", "images in a minibatch", r"$E\,\Vert\hat g_B-\nabla f\Vert^2$", log="xy")
    epochs, losses = setting.choose(20, quick=5), {}
    for size, style, grey in ((8, "-", "0"), (64, "--", "0.35"), (1024, ":", "0.55")):
        torch.manual_seed(0)
        learner = fully_connected([data.pixels, 16, 10])
        optimizer = optim.SGD(learner.parameters(), lr=0.1)
        curve = train(learner, optimizer, data.train_images, data.train_labels, batch_size=size, epochs=epochs)
        losses[size] = np.mean(curve[-(len(labels) // size) :])
        means = np.reshape(curve, (epochs, -1)).mean(1)
        right.plot(range(1, epochs + 1), means, color=grey, linestyle=style, label=f"{size} in a minibatch")
    plotting.describe(right, "Progress by cost, learning rate 0.1", "images seen / 1,024", "training loss, nats", log="y")
    numbers = {"largest difference of the epoch's mean from the full gradient": (mean - full).abs().max().item()}
    numbers |= {"fitted slope of log variance by log size": float(slope)}
    numbers |= {"largest ratio of the variance to the predicted one": float(max(variances / predicted))}
    numbers |= {f"loss in the last epoch, {size} in a minibatch": float(loss) for size, loss in losses.items()}
    return Result(figure, numbers)
