"""Accelerate: checkpoints by its save_state and load_state, in mid-decay: python examples/with_accelerate.py"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from digits import accuracy, example, loader, network, trained
from torch import nn

from decay_pruning import Pruner, Target

EPOCHS = 10
folder = tempfile.mkdtemp()


def start() -> tuple[Accelerator, nn.Module, torch.optim.Optimizer, Any, Pruner]:
    """As at the beginning: the original model, prepared, and a pruner that is in the checkpoints."""
    set_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    plain = network()
    plain.load_state_dict(trained().state_dict())
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    model, optimizer, batches = accelerator.prepare(plain, optimizer, loader())
    steps = len(batches) // 2 * EPOCHS
    # All shapes stay until finish(): that is why the order in which load_state() loads does not matter.
    pruner = Pruner(plain, example, optimizer, Target(macs=0.5), total_steps=steps, removal="at finish")
    accelerator.register_for_checkpointing(pruner)
    return accelerator, model, optimizer, batches, pruner


def train(epochs: int) -> None:
    """The loop as it always was."""
    for _ in range(epochs):
        for inputs, targets in batches:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(inputs), targets)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()


accelerator, model, optimizer, batches, pruner = start()
train(1)
print(f"stopped with {pruner.progress().decaying} structures decaying")
accelerator.save_state(folder)

accelerator, model, optimizer, batches, pruner = start()
accelerator.load_state(folder)
train(EPOCHS - 1)
print(pruner.finish())
print(f"{accuracy(accelerator.unwrap_model(model)):.2f} %")
