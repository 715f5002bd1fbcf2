"""Stop in the middle of a decay, and go on in another process: python examples/resume.py"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from digits import accuracy, example, loader, network, trained
from torch import nn

from decay_pruning import Pruner, Target

torch.manual_seed(0)
batches, epochs = loader(), 10
dense = trained().state_dict()
checkpoint = Path(tempfile.mkdtemp()) / "checkpoint.pt"


def start() -> tuple[nn.Module, torch.optim.Optimizer, Pruner]:
    """As at the beginning: the original model, its optimizer, a pruner."""
    model = network()
    model.load_state_dict(dense)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return (
        model,
        optimizer,
        Pruner(model, example, optimizer, Target(macs=0.5), total_steps=len(batches) * epochs),
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, epochs: int) -> None:
    """The loop as it always was."""
    for _ in range(epochs):
        for inputs, targets in batches:
            loss = nn.functional.cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


model, optimizer, pruner = start()
train(model, optimizer, 1)
print(f"stopped with {pruner.progress().decaying} structures decaying")
torch.save(
    {"pruner": pruner.state_dict(), "model": model.state_dict(), "optimizer": optimizer.state_dict()},
    checkpoint,
)

model, optimizer, pruner = start()
state = torch.load(checkpoint, weights_only=True)
pruner.load_state_dict(state["pruner"])  # first: it makes model and optimizer as narrow as they were
model.load_state_dict(state["model"])
optimizer.load_state_dict(state["optimizer"])
train(model, optimizer, epochs - 1)
print(pruner.finish())
print(f"{accuracy(model):.2f} %")
