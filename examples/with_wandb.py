"""Weights & Biases in a loop of your own, without an account: WANDB_MODE=offline python examples/with_wandb.py"""

from __future__ import annotations

from dataclasses import asdict

import torch
import wandb
from digits import accuracy, example, loader, trained
from torch import nn

from decay_pruning import Event, Pruner, SelfRectifying, Target

torch.manual_seed(0)
model, batches, epochs = trained(), loader(), 10
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
run = wandb.init(project="decay-pruning", config={"macs": 0.5})
seen: dict[str, int] = {}


def on_event(event: Event) -> None:
    """Collected until the step is logged, since W&B wants all of a step at once."""
    seen[f"{event.kind}/{event.group}"] = len(event.indices)


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
        now = asdict(pruner.progress())
        run.log({"loss": loss.item(), **{f"pruning/{name}": value for name, value in now.items()}, **seen})
        seen.clear()
report = pruner.finish()
run.summary.update({"macs": report.macs[1], "params": report.params[1], "accuracy": accuracy(model)})
run.finish()
print(report)
print(f"{accuracy(model):.2f} %")
