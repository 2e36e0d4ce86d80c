"""Mixed precision, accumulation, clipping and an average of the weights: all of it in the one pass of a step.

Run it with ``python examples/whole_step.py``; it needs scikit-learn, which ``pip install "fusedopt[demo]"`` brings.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import fusedopt

EPOCHS, PARTS = 12, 2

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
pixels, labels = load_digits(return_X_y=True)
images, labels = torch.tensor(pixels / 16, dtype=torch.float32, device=device), torch.tensor(labels, device=device)
network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).to(device)


def accuracy() -> float:
    """The share of the last 360 digits, which are not trained on, that are told right."""
    with torch.no_grad():
        return float((network(images[-360:]).argmax(dim=1) == labels[-360:]).float().mean())


optimizer = fusedopt.AdamW(network.parameters(), lr=1e-2, max_grad_norm=0.5, ema_decay=0.97)
scaler = torch.amp.GradScaler(device)

for epoch in range(EPOCHS):
    for batch in torch.randperm(len(images) - 360).split(128):
        for part in batch.to(device).chunk(PARTS):
            with torch.autocast(device, dtype=torch.float16):
                loss = cross_entropy(network(images[part]), labels[part]) / PARTS
            scaler.scale(loss).backward()
        scaler.step(optimizer, zero_grad=True)  # unscales, clips, updates, averages, makes gradients zero
        scaler.update()
    with optimizer.swap_ema():
        averaged = accuracy()
    print(f"epoch {epoch + 1:2}  norm {float(optimizer.grad_norm):.2f}  accuracy {accuracy():.1%}  averaged {averaged:.1%}")
