"""Your own model, your own loop, three more lines: python examples/own_loop.py"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn

from decay_pruning import Pruner, Target, save

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
y = torch.tensor(labels)
train = torch.utils.data.TensorDataset(x[:1400], y[:1400])
loader = torch.utils.data.DataLoader(train, batch_size=64, shuffle=True)

model = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
    nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
    nn.Flatten(), nn.Linear(64 * 16, 64), nn.ReLU(), nn.Linear(64, 10),
)  # fmt: skip
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
epochs = 15


def accuracy() -> float:
    """On the digits that were not trained on, in percent."""
    model.eval()
    with torch.no_grad():
        right = model(x[1400:]).argmax(1).eq(y[1400:]).float().mean()
    model.train()
    return 100 * float(right)


def train_for(epochs: int) -> None:
    """The loop as it always was."""
    for _ in range(epochs):
        for inputs, targets in loader:
            loss = nn.functional.cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


train_for(epochs)
print(f"dense: {accuracy():.2f} %")

pruner = Pruner(model, x[:1], optimizer, Target(macs=0.3), total_steps=len(loader) * epochs)
train_for(epochs)
report = pruner.finish()
print(report)
print(f"pruned: {accuracy():.2f} %")
save(model, "digits-pruned.safetensors")
