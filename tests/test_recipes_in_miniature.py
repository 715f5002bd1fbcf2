"""Every recipe of the repository runs from end to end: few images, few steps, its own model, host and target."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from decay_pruning import SelfRectifying, SmoothPruning
from decay_pruning.lab import compare, recipe

from .test_compare import _one_thread as _one_thread
from .test_lab_data import toy

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("cifar10-*.toml"))
BY_HOST = {
    "depgraph": [],
    "otov2": ["prune.host.deadline=2", "prune.host.remove_every=2"],
    "gate-decorator": ["prune.host.tick=1", "prune.host.tock=1", "prune.host.share=0.6"],
}


@pytest.mark.parametrize("host", ["depgraph", "otov2", "gate-decorator"])
def test_a_recipe_of_the_papers_rule(host: str) -> None:
    """It is the rule of the constructors, and nothing else than the recipe without it."""
    whole = recipe.load(RECIPES[0].parent / f"cifar10-small-{host}-paper.toml").prune
    ours = recipe.load(RECIPES[0].parent / f"cifar10-small-{host}.toml").prune
    smooth = SmoothPruning.paper(ours.smooth.steps, slices=ours.smooth.slices)
    assert whole == replace(ours, smooth=smooth, rectify=SelfRectifying.paper(t_rate=0.0, t_len=1.0))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_meets_its_target(path: Path, tmp_path: Path) -> None:
    whole = recipe.load(path)
    changes = ["device=cpu", "dense.epochs=1", "dense.batch_size=8", "prune.epochs=5", "prune.batch_size=8"]
    changes += ["prune.smooth.steps=2", "report.latency_batch=1", "report.eval_every=10"]
    changes += [f"{part}.milestones=[1]" for part in ("dense", "prune") if getattr(whole, part).milestones]
    if whole.sparse is not None:
        changes += ["sparse.epochs=1", "sparse.batch_size=8"]
        changes += ["sparse.milestones=[1]"] if whole.sparse.milestones else []
    kind = next(kind for kind, host in recipe.HOSTS.items() if isinstance(whole.prune.host, host))
    small = recipe.load(path, changes + BY_HOST[kind])
    assert (small.model, small.prune.target) == (whole.model, whole.prune.target)

    data = toy(32, size=small.data.size or 32, tests=8)
    start = compare.dense_start(small, data, 0, tmp_path)
    run = compare.run_arm(small, "sr", 0, data, start)
    target = small.prune.target
    assert run.report is not None
    before, after = run.report[target.of]
    assert after <= target.keep * before
    assert run.steps == 20 and run.accuracy_removed is not None
