"""A loop that hands its gradients over in a closure: python examples/closure.py"""

from __future__ import annotations

import torch
from digits import accuracy, example, loader, trained
from torch import Tensor, nn

from decay_pruning import Pruner, SelfRectifying, Target

torch.manual_seed(0)
model, batches, epochs = trained(), loader(), 10
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
pruner = Pruner(
    model, example, optimizer, Target(macs=0.5), rectify=SelfRectifying(), total_steps=len(batches) * epochs
)
for _ in range(epochs):
    for inputs, targets in batches:

        def closure(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            return loss

        optimizer.step(closure)  # gradients are read when it returns
print(pruner.finish())
print(f"{accuracy(model):.2f} %")
