r"""Double descent: past the point where everything fits

Least squares on $p$ random features of the images, $\phi(x) = \mathrm{ReLU}(W x)$ with $W$ drawn once, for $n$ images, a
tenth of whose labels are drawn at random. Where many weights fit all labels, the smallest ones are taken,

$$ \hat w = \Phi^{+} y, \qquad \Phi^{+} = \lim_{\lambda \to 0} (\Phi^T \Phi + \lambda I)^{-1} \Phi^T $$

which is where gradient descent from zero arrives, too. At $p = n$ there is just one way to fit, wrong labels and all, and
its weights are huge: the test error peaks (Belkin et al. 2019). With more features there are more ways, and the smallest
gets smaller: the error falls again, here to about the best of the other side.
"""

import numpy as np
import torch
from torch import nn

import fusedopt as optim

from .shared import plotting
from .shared.topic import Result, Setting

IMAGES = 300
WIDTHS = (10, 20, 40, 75, 120, 180, 230, 270, 300, 330, 380, 450, 600, 900, 1500, 3000)


def features(images, width):
    random = torch.Generator().manual_seed(width)
    weight = torch.randn(width, images.shape[1], generator=random, dtype=torch.float64) / images.shape[1] ** 0.5
    return torch.relu(images.double() @ weight.T) / width**0.5


def by_gradient_descent(inputs, targets, steps):
    weight = nn.Parameter(torch.zeros(inputs.shape[1], 10, dtype=torch.float64))
    largest = torch.linalg.matrix_norm(inputs, 2).item() ** 2
    optimizer = optim.SGD([weight], lr=1 / largest, momentum=0.99, nesterov=True)
    for _ in range(steps):
        weight.grad = inputs.T @ (inputs @ weight.detach() - targets)
        optimizer.step()
    return weight.detach()


def run(setting: Setting) -> Result:
    seeds = setting.choose(5, quick=2)
    errors, train_errors, norms = (np.zeros((seeds, len(WIDTHS))) for _ in range(3))
    for seed in range(seeds):
        data = setting.data.part(IMAGES).flat().with_wrong_labels(0.1, seed)
        targets = nn.functional.one_hot(data.train_labels, 10).double()
        for place, width in enumerate(WIDTHS):
            both = features(torch.cat([data.train_images, data.test_images]), width + seed)[:, :width]
            inputs, unseen = both.split([IMAGES, len(data.test_labels)])
            weight = torch.linalg.pinv(inputs, rtol=1e-12) @ targets
            norms[seed, place] = weight.norm().item()
            train_errors[seed, place] = 100 * ((inputs @ weight).argmax(1) != data.train_labels).double().mean().item()
            errors[seed, place] = 100 * ((unseen @ weight).argmax(1) != data.test_labels).double().mean().item()
    descended = by_gradient_descent(inputs, targets, setting.choose(3000, quick=1000))
    means = errors.mean(0)
    peak = WIDTHS.index(IMAGES)

    figure, (left, right) = plotting.panels(2)
    left.plot(WIDTHS, means, **plotting.look("test", marked=True))
    left.plot(WIDTHS, train_errors.mean(0), **plotting.look("training", marked=True))
    right.plot(WIDTHS, np.median(norms, 0), **plotting.look("SGD", label=f"median of {seeds} seeds", marked=True))
    for axis in (left, right):
        axis.axvline(IMAGES, **plotting.look("theory", label="as many features as images"))
    plotting.describe(left, f"Error, mean of {seeds} seeds", "features $p$", "error, %", log="x")
    plotting.describe(right, "Size of the solution", "features $p$", r"$\Vert\hat w\Vert$", log="xy")
    return Result(
        figure,
        {
            "test error, best of fewer features than images, %": means[:peak].min(),
            "test error, as many features as images, %": means[peak],
            f"test error, {WIDTHS[-1]:,} features, %": means[-1],
            "training error from as many features as images on, %": train_errors[:, peak:].max(),
            "widest: relative difference of gradient descent's outputs on test images": (
                (unseen @ (descended - weight)).norm() / (unseen @ weight).norm()
            ).item(),
        },
    )
