"""Why an arm wins or not: does the function change smoothly, and are batch-norm's running statistics stale?

    python benchmarks/causes.py recipes/cifar10-small-depgraph.toml --seeds 100 101 102 \\
        --set data.validation=0.1 --out results/causes-depgraph.json

Per arm and seed, on the images that accuracy is measured on:

- *jump*: the largest rise of the loss in one optimizer step, from the first pick to the last removal, on 500 images
  with batch statistics, so that stale running statistics have no part in it; and the loss before and at its highest;
- accuracy just after the last removal and after the last step, with the running statistics as they are, and
  *refreshed*: measured anew on 5,000 training images, in a copy.
"""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from trials import made, options

from decay_pruning import Pruner
from decay_pruning.lab import compare, parallel, recipe, results
from decay_pruning.lab.data import Batches, Data
from decay_pruning.lab.parallel import Chain
from decay_pruning.lab.stats import paired, spread
from decay_pruning.lab.trainer import Step, evaluate, train


def refreshed(model: nn.Module, data: Data) -> nn.Module:
    """A copy whose running statistics are those of 5,000 training images."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None  # a plain mean
    model.train()
    with torch.no_grad():
        for i, (x, _) in enumerate(Batches(data, 250, train=False, split="train")):
            if i < 20:
                model(x)
    return model


class Watch:
    """Rides on one run."""

    def __init__(self, data: Data) -> None:
        self._data, self._of = data, data.loss or F.cross_entropy
        self._few = next(iter(Batches(data, 500, train=False)))
        self.figures: dict[str, Any] = {}
        self._losses: list[float] = []
        self._pruner: Pruner | None = None

    def attach(
        self,
        settings: recipe.Recipe,
        arm: str,
        model: nn.Module,
        example: Tensor,
        optimizer: Optimizer,
        total: int,
    ) -> Pruner:
        """A factory for the trainer."""
        chosen = compare.settings_of(arm, settings.prune)
        assert chosen is not None, "an arm that prunes"
        self._model = model
        self._losses.append(self._loss())
        self._pruner = Pruner(
            model, example[:1], optimizer, settings.prune.target, host=settings.prune.host, smooth=chosen[0],
            rectify=chosen[1], total_steps=total,
        )  # fmt: skip
        return self._pruner

    def _loss(self) -> float:
        x, y = self._few
        with torch.no_grad():
            return float(self._of(copy.deepcopy(self._model).train()(x), y))

    def on_step(self, step: Step) -> None:
        """Follow the loss until the target is met, then weigh what is left."""
        assert self._pruner is not None
        if "removed" not in self.figures:
            self._losses.append(self._loss())
            if self._pruner.done:
                rises = [b - a for a, b in zip(self._losses, self._losses[1:], strict=False)]
                self.figures |= {
                    "loss_before": self._losses[0], "jump": max(rises), "loss_highest": max(self._losses),
                    "step": step.step,
                }  # fmt: skip
                self._weigh("removed")
        if step.step == step.total:
            self._weigh("end")

    def _weigh(self, when: str) -> None:
        self.figures[when] = evaluate(self._model, self._data)
        self.figures[f"{when}_refreshed"] = evaluate(refreshed(self._model, self._data), self._data)


def job(path: str, assignments: list[str], arm: str, seed: int, starts: Path) -> dict[str, Any]:
    """One run, in a process of its own."""
    settings = recipe.load(path, assignments)
    data = settings.data.load()
    watch = Watch(data)
    model = copy.deepcopy(compare.dense_start(settings, data, seed, starts))
    train(
        model, data, settings.prune, seed=seed, pruner_factory=partial(watch.attach, settings, arm),
        on_step=watch.on_step, eval_every=None, cpu=True,
    )  # fmt: skip
    return {"arm": arm, "seed": seed, **watch.figures}


def table(rows: list[dict[str, Any]]) -> str:
    """Mean ± standard deviation of every figure by arm, and the paired difference of the last two to `single`."""
    lines = []
    by = {
        arm: {r["seed"]: r for r in rows if r["arm"] == arm} for arm in dict.fromkeys(r["arm"] for r in rows)
    }
    for arm, runs in by.items():
        words = [f"{arm:<7}"]
        for name in [name for name in rows[0] if name not in ("arm", "seed")]:
            words.append(f"{name} {spread([r[name] for r in runs.values()]).show()}")
        common = [seed for seed in runs if seed in by.get("single", {})]
        if arm != "single" and common:
            for name in ("end", "end_refreshed"):
                before, after = ([of[s][name] for s in common] for of in (by["single"], runs))
                words.append(f"{name} against single {paired(before, after).show()}")
        lines.append("  ".join(words))
    return "\n".join(lines)


def main() -> None:
    """Run all, write, print."""
    parser = options(__doc__)
    parser.add_argument("--arms", nargs="+", default=["single", "sp"])
    args = parser.parse_args()
    settings, starts = recipe.load(args.recipe, args.assignments), args.work / "starts"
    chains = [
        Chain(
            partial(compare.make_start, settings, seed, starts),
            [partial(job, args.recipe, args.assignments, arm, seed, starts) for arm in args.arms],
        )
        for seed in args.seeds
    ]
    rows = []
    for _, outcome in parallel.run(chains, args.jobs):
        if isinstance(outcome, BaseException):
            raise outcome
        rows.append(outcome)
    rows.sort(key=lambda row: (args.arms.index(row["arm"]), row["seed"]))
    results.write(
        args.out, json.dumps({**made(args, settings, "arms", device="cpu"), "rows": rows}, indent=1)
    )
    print(table(rows))


if __name__ == "__main__":
    main()
