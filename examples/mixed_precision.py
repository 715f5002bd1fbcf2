"""Mixed precision, accumulation and clipping: python examples/mixed_precision.py"""

from __future__ import annotations

import torch
from digits import accuracy, example, loader, trained
from torch import nn

from decay_pruning import Pruner, Target

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
model, batches, epochs, every = trained().to(device), loader(32), 8, 2
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
scaler = torch.amp.GradScaler(device)

# Steps are optimizer steps: with accumulation there are fewer of them than batches.
steps = len(batches) * epochs // every
pruner = Pruner(model, example.to(device), optimizer, Target(macs=0.5), total_steps=steps)
for _ in range(epochs):
    for k, (inputs, targets) in enumerate(batches):
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(model(inputs.to(device)), targets.to(device)) / every
        scaler.scale(loss).backward()
        if k % every == every - 1:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)  # a step that the scaler skips is none
            scaler.update()
            optimizer.zero_grad()
print(pruner.finish())
print(f"{accuracy(model.cpu()):.2f} %")
