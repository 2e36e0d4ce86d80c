r"""What the optimizer costs

A step of training is forward, backward and the optimizer's part, whose share is

$$ t_{optimizer} / (t_{forward} + t_{backward} + t_{optimizer}) $$

torch's for-loop visits one tensor after the other with a dozen small operations each; its lists of tensors (`foreach`) share
the overhead; its fused kernel and `fusedopt.AdamW` read and write each element once. The network is small and deep, of 42
small tensors, and runs on one thread. Times are medians; the implementations take turns at each step, on copies of one
network, so that other programs on the machine disturb all alike. They differ from machine to machine and from run to run.
All four get to the same weights: in float64 they differ by roundings alone.
"""

import time
from statistics import median

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector

import fusedopt

from .shared import plotting
from .shared.networks import deep
from .shared.topic import Result, Setting

IMPLEMENTATIONS = {
    "torch loop": lambda parameters: torch.optim.AdamW(parameters, foreach=False, fused=False),
    "torch foreach": lambda parameters: torch.optim.AdamW(parameters, foreach=True),
    "torch fused": lambda parameters: torch.optim.AdamW(parameters, fused=True),
    "fusedopt": lambda parameters: fusedopt.AdamW(parameters, fused=True),
}
GREYS = {"torch loop": "#bbbbbb", "torch foreach": "#888888", "torch fused": "#e69f00", "fusedopt": "#0072b2"}


def now(device):
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(data, device, steps, dtype=torch.float32):
    """Median milliseconds of the gradient and of the optimizer, and the largest difference of weights from the loop's."""
    images, labels = data.train_images[:64].to(device, dtype), data.train_labels[:64].to(device)
    networks, optimizers, times = {}, {}, {name: ([], []) for name in IMPLEMENTATIONS}
    for name, make in IMPLEMENTATIONS.items():
        torch.manual_seed(0)
        networks[name] = deep(data.pixels, 64, 19, skips=True).to(device, dtype)
        optimizers[name] = make(networks[name].parameters())
    names = list(IMPLEMENTATIONS)
    for step in range(steps):
        # Another one begins at each step, so that none always finds the caches as its neighbour left them.
        for name in names[step % len(names) :] + names[: step % len(names)]:
            began = now(device)
            optimizers[name].zero_grad()
            cross_entropy(networks[name](images), labels).backward()
            differentiated = now(device)
            optimizers[name].step()
            stepped = now(device)
            times[name][0].append(1e3 * (differentiated - began))
            times[name][1].append(1e3 * (stepped - differentiated))
    weights = {name: parameters_to_vector(network.parameters()).detach() for name, network in networks.items()}
    differences = [(each - weights["torch loop"]).abs().max().item() for each in weights.values()]
    # First steps compile kernels and make states.
    return {name: [median(each[10:]) for each in times[name]] for name in names}, max(differences)


def run(setting: Setting) -> Result:
    data, steps = setting.data.flat(), setting.choose(400, quick=40)
    devices = {"CPU": "cpu"} | ({"GPU": "cuda"} if torch.cuda.is_available() else {})
    figure, axes = plotting.panels(len(devices), height=3)
    numbers: dict[str, float | str] = {}
    for axis, (title, device) in zip(axes, devices.items(), strict=True):
        found, _ = measure(data, device, steps)
        shares = {name: 100 * step / (gradient + step) for name, (gradient, step) in found.items()}
        bars = axis.barh(list(shares), list(shares.values()), color=list(GREYS.values()))
        axis.bar_label(bars, [f"{share:.0f} %, {found[name][1]:.2f} ms" for name, share in shares.items()], padding=4)
        axis.set_xlim(0, 100)
        axis.invert_yaxis()
        plotting.describe(
            axis, f"AdamW, {title}: share of a training step", "share of a training step, %", "implementation", legend=False
        )
        numbers |= {f"{title}, {name}: share of the optimizer, %": share for name, share in shares.items()}
        numbers |= {f"{title}, {name}: optimizer step, ms": found[name][1] for name in shares}
        _, difference = measure(data, device, 40, torch.float64)
        numbers[f"{title}: largest difference of any weight from the loop's, 40 steps in float64"] = difference
    if "GPU" not in devices:
        numbers["GPU"] = "not measured: torch finds no GPU here"
    return Result(figure, numbers)
