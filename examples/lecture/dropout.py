r"""Dropout and early stopping

Trained for long, a network goes on lowering the loss of its training images while that of images held out rises again: it
learns what is particular to the few it sees. Dropout turns a unit off with probability $q$ at each step and scales the
others up,

$$ \tilde h_j = \frac{m_j}{1 - q} h_j, \qquad m_j = 0 ~ \mathrm{with ~ probability} ~ q, ~ \mathrm{else} ~ 1 $$

so that none can rely on another being there. With it the held-out loss turns later here, and ends lower. Early stopping ends
the training when the held-out loss has not improved for some epochs, and goes back to the weights that were best:
`fusedopt.EarlyStopping`. A tenth of the training labels are drawn at random.
"""

import torch

import fusedopt as optim

from .shared import plotting
from .shared.networks import fully_connected
from .shared.topic import Result, Setting
from .shared.training import error_of, loss_of, train

PATIENCE, HELD_OUT = 10, 400


def learn(data, held_out, epochs, dropout, patience=None):
    """Train from the same weights each time; return the network, its losses after each epoch, and the stopping if asked for."""
    torch.manual_seed(0)
    network = fully_connected([data.pixels, 128, 128, 10], dropout=dropout)
    stopping = optim.EarlyStopping(network, patience=patience or epochs + 1)
    losses = []

    def watch():
        losses.append((loss_of(network, data.train_images, data.train_labels), loss_of(network, *held_out)))
        return stopping.step(losses[-1][1])

    optimizer = optim.Adam(network.parameters(), lr=1e-3)
    train(network, optimizer, data.train_images, data.train_labels, batch_size=20, epochs=epochs, after_epoch=watch)
    if patience:
        stopping.restore()
    return network, losses, stopping


def run(setting: Setting) -> Result:
    data, epochs = setting.data.part(1000).flat(), setting.choose(120, quick=50)
    held_out = data.train_images[-HELD_OUT:], data.train_labels[-HELD_OUT:]
    data = data.part(400).with_wrong_labels(0.1)
    figure, axes = plotting.panels(2)
    numbers: dict[str, float | str] = {}
    for axis, (title, dropout) in zip(axes, {"without dropout": 0.0, "with dropout": 0.5}.items(), strict=True):
        last, losses, _ = learn(data, held_out, epochs, dropout)
        best, _, stopping = learn(data, held_out, epochs, dropout, PATIENCE)
        steps = range(1, epochs + 1)
        axis.plot(steps, [training for training, _ in losses], **plotting.look("training"))
        axis.plot(steps, [other for _, other in losses], **plotting.look("test", label="held out"))
        axis.axvline(stopping.checks, **plotting.look("theory", label="stopped" if stopping.stopped else "not stopped"))
        axis.plot(stopping.best_check, stopping.best, "kD", label="weights put back")
        plotting.describe(axis, title.capitalize(), "epoch", "loss, nats", log="y")
        numbers |= {
            f"{title}: held-out loss at the end, nats": losses[-1][1],
            f"{title}: held-out loss of the weights put back, nats": loss_of(best, *held_out),
            f"{title}: best held-out loss on the way, nats": stopping.best,
            f"{title}: stopped after epoch": stopping.checks,
            f"{title}: test error at the end, %": error_of(last, data.test_images, data.test_labels),
            f"{title}: test error of the weights put back, %": error_of(best, data.test_images, data.test_labels),
        }
    return Result(figure, numbers)
