"""Lion (Chen et al. 2023) as a rule of one's own, fused for CPUs and GPUs: a network learns the handwritten digits with it.

Run it with ``python examples/custom_rule.py``; it needs scikit-learn, which ``pip install "fusedopt[demo]"`` brings.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from fusedopt.custom import Rule, RuleOptimizer, sign


def lion(p, g, exp_avg, lr, beta1, one_minus_beta1, beta2, one_minus_beta2):
    direction = beta1 * exp_avg + one_minus_beta1 * g
    return p - lr * sign(direction), beta2 * exp_avg + one_minus_beta2 * g


def lion_coefficients(step, lr, beta1, beta2):
    return lr, beta1, 1.0 - beta1, beta2, 1.0 - beta2


class Lion(RuleOptimizer):
    rule = Rule(lion, lion_coefficients, states=("exp_avg",))
    hyperparameters = {"lr": 1e-3, "betas": (0.9, 0.99)}  # noqa: RUF012


torch.manual_seed(0)
images, labels = map(torch.tensor, load_digits(return_X_y=True))
network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = Lion(network.parameters(), weight_decay=0.1)
for step in range(201):
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(network(images.float() / 16), labels)
    loss.backward()
    optimizer.step()
    if step % 20 == 0:
        print(f"step {step:3}  loss {loss.item():.4f}")
print(optimizer.explain())
