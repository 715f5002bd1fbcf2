"""Several processes, each with a part of every weight (FSDP2): torchrun --nproc_per_node 2 examples/fsdp.py"""

from __future__ import annotations

import torch
import torch.distributed as dist
from digits import accuracy, example, trained, x, y
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from decay_pruning import Pruner, Target, save


def main() -> None:
    """The same in all processes; each has its part of the data."""
    torch.manual_seed(0)
    data = TensorDataset(x[:1400], y[:1400])
    sampler: DistributedSampler[tuple[torch.Tensor, ...]] = DistributedSampler(data)
    batches, epochs = DataLoader(data, batch_size=64, sampler=sampler), 5
    model = trained()
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

    # Structures are found on a plain copy, on the device of the example inputs; what fades are the shards.
    pruner = Pruner(model, example, optimizer, Target(macs=0.5), total_steps=len(batches) * epochs)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for inputs, targets in batches:
            loss = nn.functional.cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    report = pruner.finish()  # in all processes: it gathers the weights into the copy, and cuts that
    if dist.get_rank() == 0:
        print(report)
        save(pruner.model, "digits-fsdp.safetensors")
        print(f"{accuracy(pruner.model):.2f} %")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    dist.destroy_process_group()
