r"""The full example: PyTorch's CIFAR-10 tutorial

The network and the loop of the tutorial "Training a classifier", line by line, with one line of its imports changed:

    import fusedopt as optim  # instead of: import torch.optim as optim

$$ v \leftarrow 0.9 v + g, \qquad \theta \leftarrow \theta - \alpha v $$

Trained with `torch.optim` and with `fusedopt`, from the same weights and with the same minibatches of four. In float64 the
losses agree to rounding, to the end. In float32 roundings in another order grow in training until single losses differ
visibly, as they do between two of torch's own implementations, its loop and its fused one; the curves stay together. Digits
stand in for CIFAR-10 where `--cifar` does not name its folder: enlarged to 32 x 32 pixels of three equal colours, for eight
epochs instead of two.
"""

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  # as the tutorial has it
from torch import nn

import fusedopt

from .shared import plotting
from .shared.data import minibatches
from .shared.topic import Result, Setting
from .shared.training import error_of


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x):
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = torch.flatten(x, 1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


def train(optim, data, steps, dtype=torch.float32, **options):
    torch.manual_seed(0)
    net = Net().to(dtype)
    criterion = nn.CrossEntropyLoss()
    optimizer = optim.SGD(net.parameters(), lr=0.001, momentum=0.9, **options)
    losses = []
    for _, chosen in zip(range(steps), minibatches(len(data.train_labels), 4, seed=0), strict=False):
        inputs, labels = data.train_images[chosen].to(dtype), data.train_labels[chosen]
        optimizer.zero_grad()
        outputs = net(inputs)
        loss = criterion(outputs, labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses), error_of(net, data.test_images.to(dtype), data.test_labels)


def enlarged(images):
    return images.expand(-1, 3, -1, -1).repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)


def run(setting: Setting) -> Result:
    data, epochs = setting.data, 2
    if data.name == "digits":
        data, epochs = replace(data, train_images=enlarged(data.train_images), test_images=enlarged(data.test_images)), 8
    steps = setting.choose(epochs * len(data.train_labels) // 4, quick=800)
    ours, our_error = train(fusedopt, data, steps)
    loop, loop_error = train(torch.optim, data, steps, foreach=False, fused=False)
    fused, _ = train(torch.optim, data, steps, fused=True)
    exact = [train(optim, data, min(steps, 2600), torch.float64)[0] for optim in (fusedopt, torch.optim)]

    window = steps // 13
    figure, (left, right) = plotting.panels(2)
    looks = {"torch.optim": {"color": "#e69f00", "linewidth": 5}, "fusedopt": {"color": "#0072b2", "linestyle": "--"}}
    for curve, (name, style) in zip((loop, ours), looks.items(), strict=True):
        means = np.convolve(curve, np.full(window, 1 / window), mode="valid")
        left.plot(range(window, steps + 1), means, label=name, **style)
    plotting.describe(left, f"The tutorial's network on {data.name}", "step", f"loss, mean of {window} steps, nats")
    differences = {
        "torch's fused from its loop, float32": (fused - loop, {"color": "#e69f00"}),
        "fusedopt from torch's loop, float32": (ours - loop, {"color": "#0072b2", "linestyle": "--"}),
        "fusedopt from torch.optim, float64": (exact[0] - exact[1], {"color": "black"}),
    }
    for name, (difference, style) in differences.items():
        right.plot(np.maximum.accumulate(np.abs(difference)), label=name, **style)
    plotting.describe(right, "Largest difference of a loss so far", "step", "difference, nats", log="y")
    right.set_ylim(1e-17, 1e7)
    return Result(
        figure,
        {
            "loss of the first steps, nats": ours[:window].mean(),
            "fusedopt: loss of the last steps, nats": ours[-window:].mean(),
            "torch.optim: loss of the last steps, nats": loop[-window:].mean(),
            "fusedopt: test error, %": our_error,
            "torch.optim: test error, %": loop_error,
            **{f"{name}: largest difference of a loss": np.abs(difference).max() for name, (difference, _) in differences.items()},
        },
    )
