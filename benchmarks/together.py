"""Is what a pick costs the sum of what its structures cost? Removed from the dense start one by one, and together.

    python benchmarks/together.py recipes/cifar10-small-depgraph.toml --seeds 100 101 102 \\
        --set data.validation=0.1 --out results/together-depgraph.json

For each layer group: the loss increase (batch statistics, nothing trained) when all of its structures that the host
picks for the whole target go at once, and the sum over the same structures of the increase when one alone goes.
"""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from trials import made, options

from decay_pruning import Pruner
from decay_pruning.lab import compare, parallel, recipe, results
from decay_pruning.lab.data import Batches
from decay_pruning.lab.parallel import Chain
from decay_pruning.slices import SliceBatch
from decay_pruning.structures import Picks, Role


def job(path: str, assignments: list[str], seed: int, starts: Path, images: int) -> list[dict[str, Any]]:
    """One seed, in a process of its own."""
    settings = recipe.load(path, assignments)
    data = settings.data.load()
    start = compare.dense_start(settings, data, seed, starts)
    batches = list(Batches(data, 250, train=False))[: images // 250]
    of = data.loss or F.cross_entropy
    optimizer = torch.optim.SGD(start.parameters(), lr=0.1)
    pruner = Pruner(
        start, batches[0][0][:1], optimizer, settings.prune.target, host=settings.prune.host, total_steps=1
    )
    structures, picks = pruner.structures, pruner.plan().picks

    @torch.no_grad()
    def loss(gone: Picks) -> float:
        model = copy.deepcopy(start).train()
        parameters = dict(model.named_parameters())
        if gone:
            SliceBatch(structures, gone, parameters, Role).zero_(parameters)
        return sum(float(of(model(x), y)) for x, y in batches) / len(batches)

    before = loss({})
    return [
        {
            "seed": seed,
            "group": name,
            "structures": len(structures.groups[name]),
            "picked": len(ids),
            "together": loss({name: ids}) - before,
            "one_by_one": sum(loss({name: [i]}) - before for i in ids),
        }
        for name, ids in picks.items()
    ]


def main() -> None:
    """Run all, write, print."""
    parser = options(__doc__)
    parser.add_argument("--images", type=int, default=1000, help="held-out images")
    args = parser.parse_args()
    settings, starts = recipe.load(args.recipe, args.assignments), args.work / "starts"
    chains = [
        Chain(
            partial(compare.make_start, settings, seed, starts),
            [partial(job, args.recipe, args.assignments, seed, starts, args.images)],
        )
        for seed in args.seeds
    ]
    rows: list[dict[str, Any]] = []
    for _, outcome in parallel.run(chains, args.jobs):
        if isinstance(outcome, BaseException):
            raise outcome
        rows += outcome
    rows.sort(key=lambda row: row["seed"])
    results.write(
        args.out, json.dumps({**made(args, settings, "images", device="cpu"), "rows": rows}, indent=1)
    )
    for name in dict.fromkeys(row["group"] for row in rows):
        mine = [row for row in rows if row["group"] == name]
        means = [sum(row[key] for row in mine) / len(mine) for key in ("picked", "together", "one_by_one")]
        print(f"{name:<20} picked {means[0]:5.1f}  together {means[1]:7.4f}  one by one {means[2]:7.4f}")


if __name__ == "__main__":
    main()
