"""Several processes: the wrapper can come before the pruner, and all ranks stay one network."""

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from decay_pruning import Pruner, SelfRectifying, SmoothPruning

from .registry import batches, build_model, example

STEPS = 9


def network():
    """Without batch statistics, so that two halves of a batch are one batch."""
    model = build_model("residual")
    for name, module in list(model.named_children()):
        if isinstance(module, nn.BatchNorm2d):
            setattr(model, name, nn.GroupNorm(module.num_features, module.num_features, affine=True))
    return model.double()


def train(model, pruner_of, parts):
    """Trains on its part of each batch; the weights after every step, and the report."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    pruner = pruner_of(model, optimizer)
    seen = []
    for x, y in itertools.islice(batches(1, torch.float64), STEPS):
        mine = slice(*parts)
        loss = nn.functional.cross_entropy(model(x[mine]), y[mine])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(torch.cat([p.detach().flatten() for p in pruner.model.parameters()]))
    report = pruner.finish()
    return seen, report, pruner.model.state_dict()


def pruner_of(model, optimizer):
    settings = {"smooth": SmoothPruning(steps=4), "rectify": SelfRectifying(), "total_steps": STEPS}
    return Pruner(model, example(torch.float64), optimizer, 0.6, removal="at finish", **settings)


def work(rank, world, folder, options):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    size = 16 // world
    model = DistributedDataParallel(network(), **options)
    found = train(model, pruner_of, (rank * size, (rank + 1) * size))
    torch.save((found[0], str(found[1]), found[2]), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("world", "options"),
    [
        (2, {}),
        (2, {"find_unused_parameters": True}),
        (2, {"static_graph": True}),
        (4, {"gradient_as_bucket_view": True}),
    ],
    ids=["plain", "unused", "static", "four"],
)
def test_ranks_stay_one_network_with_the_pruner_made_last(tmp_path, world, options):
    mp.spawn(work, args=(world, str(tmp_path), options), nprocs=world)
    ranks = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in range(world)]
    alone, report, state = train(network(), pruner_of, (0, 16))
    assert report.removed > 0
    for seen, said, _ in ranks:
        assert said == str(report)
        for step, (here, there) in enumerate(zip(seen, ranks[0][0], strict=True)):
            assert torch.equal(here, there), f"ranks drift apart in step {step}"
    for step, (here, there) in enumerate(zip(ranks[0][0], alone, strict=True)):
        assert torch.allclose(here, there, rtol=1e-7, atol=1e-9), f"not what one process learns, step {step}"
    for name, value in state.items():
        assert torch.allclose(value, ranks[0][2][name], rtol=1e-7, atol=1e-9), name
