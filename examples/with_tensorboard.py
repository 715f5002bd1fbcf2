"""TensorBoard in a loop of your own: figures by progress(), picks and releases by on_event.

python examples/with_tensorboard.py [folder]
"""

from __future__ import annotations

import sys
import tempfile

import torch
from digits import accuracy, example, loader, trained
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from decay_pruning import Event, Pruner, SelfRectifying, Target

torch.manual_seed(0)
model, batches, epochs = trained(), loader(), 10
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
writer = SummaryWriter(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())


def on_event(event: Event) -> None:
    """How many structures of a layer group were picked, released or removed in this step."""
    writer.add_scalar(f"{event.kind}/{event.group}", len(event.indices), event.step)


pruner = Pruner(
    model, example, optimizer, Target(macs=0.5), total_steps=len(batches) * epochs, rectify=SelfRectifying(),
    on_event=on_event,
)  # fmt: skip
for _ in range(epochs):
    for inputs, targets in batches:
        loss = nn.functional.cross_entropy(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        now = pruner.progress()
        for name in ("macs", "macs_left", "decaying", "released", "removed"):
            writer.add_scalar(f"pruning/{name}", getattr(now, name), now.step)
print(pruner.finish())
writer.close()
print(f"{accuracy(model):.2f} %")
