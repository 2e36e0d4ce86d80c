"""Train a small network on handwritten digits: a script for torch.optim, but for one line of its imports.

Run it with ``python examples/train_digits.py``; it needs scikit-learn, which ``pip install "fusedopt[demo]"`` brings.
"""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import fusedopt as optim  # instead of: from torch import optim

EPOCHS = 10

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"

pixels, labels = load_digits(return_X_y=True)
images = torch.tensor(pixels / 16, dtype=torch.float32)
train_images, test_images, train_labels, test_labels = train_test_split(images, torch.tensor(labels), test_size=0.2, random_state=0)
batches = DataLoader(TensorDataset(train_images, train_labels), batch_size=64, shuffle=True)

network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)).to(device)
optimizer = optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.01)
scheduler = optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS)

for epoch in range(1, EPOCHS + 1):
    for x, y in batches:
        optimizer.zero_grad()
        loss = cross_entropy(network(x.to(device)), y.to(device))
        loss.backward()
        optimizer.step()
    scheduler.step()
    with torch.no_grad():
        right = network(test_images.to(device)).argmax(dim=1).cpu() == test_labels
    print(f"epoch {epoch:2}  loss {loss.item():.4f}  test accuracy {right.float().mean():.1%}")

print(optimizer.explain())
