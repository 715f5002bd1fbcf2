"""timm: what its training script needs for pruning, and loading what was pruned: python examples/with_timm.py

The loop is that of timm's train.py in short: optimizer, scheduler, EMA and checkpoints are timm's own. What pruning
adds is marked.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn

import decay_pruning
from decay_pruning import Pruner, Target  # (1)

NAME = sys.argv[1] if len(sys.argv) > 1 else "resnet10t"
SHAPE, CLASSES, EPOCHS, UPDATES = (3, 64, 64), 4, 4, 4
folder = Path(tempfile.mkdtemp())


def start() -> tuple[nn.Module, torch.optim.Optimizer, ModelEmaV3, Pruner]:
    """As at the beginning."""
    torch.manual_seed(0)
    model = timm.create_model(NAME, num_classes=CLASSES)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    ema = ModelEmaV3(model, decay=0.9)
    # (2) The average is cut along; shapes stay until finish(), so that timm's checkpoints and its EMA stay valid.
    pruner = Pruner(
        model, torch.randn(1, *SHAPE), optimizer, Target(macs=0.5), total_steps=EPOCHS * UPDATES,
        removal="at finish", also=[ema],
    )  # fmt: skip
    return model, optimizer, ema, pruner


def train(first: int) -> None:
    """train.py's epochs."""
    scheduler, _ = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=EPOCHS, updates_per_epoch=UPDATES
    )
    for epoch in range(first, EPOCHS):
        scheduler.step(epoch)
        for update in range(UPDATES):
            torch.manual_seed(epoch * UPDATES + update)
            images, targets = torch.randn(8, *SHAPE), torch.randint(0, CLASSES, (8,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), targets).backward()
            optimizer.step()
            ema.update(model)
        checkpoint = {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}
        checkpoint |= {"state_dict_ema": ema.module.state_dict(), "pruner": pruner.state_dict()}  # (3)
        torch.save(checkpoint, folder / f"checkpoint-{epoch}.pth.tar")


model, optimizer, ema, pruner = start()
train(0)

model, optimizer, ema, pruner = start()  # stopped after an epoch, and resumed: timm's --resume
saved = torch.load(folder / "checkpoint-0.pth.tar", weights_only=True)
pruner.load_state_dict(saved["pruner"])  # (3)
model.load_state_dict(saved["state_dict"])
optimizer.load_state_dict(saved["optimizer"])
ema.module.load_state_dict(saved["state_dict_ema"])
train(saved["epoch"] + 1)
print(pruner.finish())  # (4)

decay_pruning.save(ema.module, folder / "model.safetensors")  # (5) weights, and beside them what was kept
again = decay_pruning.load(timm.create_model(NAME, num_classes=CLASSES), folder / "model.safetensors").eval()
images = torch.randn(2, *SHAPE)
print(f"difference {(again(images) - ema.module.eval()(images)).abs().max().item()}")
