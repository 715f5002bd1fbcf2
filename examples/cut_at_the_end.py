"""One cut at the end, under torch.compile: no shape changes in training. python examples/cut_at_the_end.py"""

from __future__ import annotations

import torch
from digits import accuracy, example, loader, trained
from torch import nn

from decay_pruning import Pruner, Target

torch.manual_seed(0)
model, batches, epochs = trained(), loader(), 10
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

# The pruner gets the plain model. What has faded is held at zero, so that nothing is compiled anew.
pruner = Pruner(
    model, example, optimizer, Target(macs=0.5), removal="at finish", total_steps=len(batches) * epochs
)
compiled = torch.compile(model, backend="aot_eager")  # leave the backend out where there is a C++ compiler
for _ in range(epochs):
    for inputs, targets in batches:
        loss = nn.functional.cross_entropy(compiled(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
before = accuracy(model)
print(pruner.finish())
print(f"held at zero {before:.2f} %, cut {accuracy(model):.2f} %")
