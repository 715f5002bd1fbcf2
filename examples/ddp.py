"""Several processes, each with the whole model: torchrun --nproc_per_node 2 examples/ddp.py"""

from __future__ import annotations

import torch
import torch.distributed as dist
from digits import accuracy, example, trained, x, y
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from decay_pruning import Pruner, Target


def main() -> None:
    """The same in all processes; each has its part of the data."""
    torch.manual_seed(0)
    data = TensorDataset(x[:1400], y[:1400])
    sampler: DistributedSampler[tuple[torch.Tensor, ...]] = DistributedSampler(data)
    batches, epochs = DataLoader(data, batch_size=64, sampler=sampler), 5
    model = DistributedDataParallel(trained())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    # The wrapper keeps the shapes of its parameters: what has faded is held at zero, and cut by finish().
    pruner = Pruner(model, example, optimizer, Target(macs=0.5), total_steps=len(batches) * epochs)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for inputs, targets in batches:
            loss = nn.functional.cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    report = pruner.finish()  # to train on: DistributedDataParallel(pruner.model), a new one
    if dist.get_rank() == 0:
        print(report)
        print(f"{accuracy(pruner.model):.2f} %")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    dist.destroy_process_group()
