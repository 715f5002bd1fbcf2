"""What the other examples share: handwritten digits, a small trained network, accuracy on digits not seen before."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

images, labels = load_digits(return_X_y=True)
x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
y = torch.tensor(labels)
example = x[:1]


def loader(batch_size: int = 64) -> DataLoader[tuple[Tensor, ...]]:
    """The first 1,400 digits, in another order each time."""
    return DataLoader(TensorDataset(x[:1400], y[:1400]), batch_size=batch_size, shuffle=True)


def trained(epochs: int = 4) -> nn.Sequential:
    """Two convolutions and a small classifier, trained for a while: what there is to prune."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(epochs):
        for inputs, targets in loader():
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    return model


def network() -> nn.Sequential:
    """The same, untrained."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Flatten(), nn.Linear(64 * 16, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """On the digits that were not trained on, in percent."""
    training = model.training
    model.eval()
    right = model(x[1400:]).argmax(1).eq(y[1400:]).float().mean()
    model.train(training)
    return 100 * float(right)
