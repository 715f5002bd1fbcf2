"""Two optimizers, and an average of the weights beside: python examples/two_optimizers.py"""

from __future__ import annotations

import torch
from digits import accuracy, example, loader, trained
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from decay_pruning import Pruner, Target

torch.manual_seed(0)
model, batches, epochs = trained(), loader(), 10
backbone = torch.optim.SGD(model[:6].parameters(), lr=0.05, momentum=0.9)
head = torch.optim.AdamW(model[6:].parameters(), lr=1e-3)
average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.95))

# All of them are given: the state of each is cut. The steps of the first are counted.
pruner = Pruner(model, example, [backbone, head], Target(macs=0.5), total_steps=len(batches) * epochs)
for _ in range(epochs):
    for inputs, targets in batches:
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        for optimizer in (backbone, head):
            optimizer.step()
            optimizer.zero_grad()
        average.update_parameters(model)  # follows by itself; other averages: Pruner(…, also=[ema])
print(pruner.finish())
print(f"model {accuracy(model):.2f} %, average {accuracy(average):.2f} %")
