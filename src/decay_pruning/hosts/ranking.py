"""From scores to picks: the lowest scores go, until the goal is met."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from decay_pruning.budget import Cost
from decay_pruning.checks import Whole, at_least, checked, did_you_mean, shown
from decay_pruning.errors import BudgetError, ConfigError
from decay_pruning.hosts.base import Goal, Scene
from decay_pruning.hosts.uniform import Kinds
from decay_pruning.structures import StructureSet

logger = logging.getLogger("decay_pruning")

Scope = Literal["global", "local"]
Per = Literal["structure", "macs", "params"]
MinKept = (
    Annotated[int, at_least(0, what="a number of structures")]
    | Annotated[float, at_least(0, below=1, what="a share of a layer group")]
)


def choose(
    scene: Scene,
    scores: Mapping[str, Tensor],
    goal: Goal,
    *,
    scope: Scope = "global",
    per: Per = "structure",
    min_kept: int | float = 1,
    round_to: int = 1,
    among: Mapping[str, Tensor] | None = None,
    strict: bool = True,
    kinds: Kinds | None = None,
) -> dict[str, list[int]]:
    """The fewest lowest-scored structures whose removal, beside that of what is fading, meets the goal.

    Args:
        scene: what there is, and what can be picked.
        scores: layer group → one float per structure, parallel to its ids. What is absent is not picked.
        goal: what has to be reached.
        scope: "global" compares scores over all layer groups; "local" takes the same share of each, so that equal
            widths stay equal.
        min_kept: structures (int) or share (float) of each layer group that always stays; never less than one.
        round_to: what stays of a layer group is a multiple of this, rounded *up*, so a layer group of 16 asked to lose
            a tenth at a multiple of 8 loses nothing, and the log says so.
        among: what may be picked, as `scene.eligible()` has it, which is the default.
        strict: raise where the goal cannot be met; otherwise return all that may go.
        kinds: layer groups of a kind come to the same width, and are ranked by the mean of their scores; those without
            one are not picked. None: each is its own.

    Raises:
        ConfigError: a value is out of range, or scores that do not fit the structures.
        BudgetError: not even all that may go would meet the goal.
    """
    checked(scene, Scene, "scene"), checked(goal, Goal, "goal")
    scope, round_to = checked(scope, Scope, "scope"), checked(round_to, Whole, "round_to")
    per = checked(per, Per, "per")
    min_kept, strict = checked(min_kept, MinKept, "min_kept"), checked(strict, bool, "strict")
    scores = _as_scores(scores, scene.structures)
    if per != "structure":
        fading = scene.fading()
        scores = {name: score / scene.costs.price(name, per, fading) for name, score in scores.items()}
    order: dict[str, Tensor] = {}
    eligible = scene.eligible() if among is None else among
    fading = scene.fading()
    names = [name for name in scene.structures.groups if name in scores]
    if kinds is not None:
        whole = set(kinds.of.values()) - {kind for name, kind in kinds.of.items() if name not in scores}
        names = [name for name in names if kinds.of.get(name) in whole]
    there = {name: len(scene.structures.groups[name]) - int(fading[name].sum()) for name in names}
    sets = _together(names, kinds)
    ranks, owners, widths = [], [], []
    for number, members in enumerate(sets):
        ranked = []
        width = min(there[name] for name in members)
        if kinds is not None:
            width = kinds.down(kinds.of[members[0]], width)
        for name in members:
            size = len(scene.structures.groups[name])
            stays = max(1, math.ceil(min_kept * size) if isinstance(min_kept, float) else min_kept)
            candidates = eligible[name].nonzero().flatten()
            score = scores[name].detach().double().cpu()[candidates]
            order[name] = candidates[torch.argsort(score, stable=True)][: max(0, there[name] - stays)]
            ranked.append(score.sort().values[: order[name].numel()][there[name] - width :])
        if any(order[name].numel() < there[name] - width for name in members):
            raise BudgetError(f"{members} cannot come to the same width now: what would have to go may not")
        steps = min(each.numel() for each in ranked)
        mean = torch.stack([each[:steps] for each in ranked]).mean(0)
        size = len(scene.structures.groups[members[0]])
        ranks.append(mean if scope == "global" else (torch.arange(steps) + 1) / size)
        owners.append(torch.full((steps,), number))
        widths.append(width)
    rank, turn = torch.cat([torch.empty(0), *ranks]).double().sort(stable=True)
    owner = torch.cat([torch.empty(0, dtype=torch.int64), *owners])[turn]
    # Where to stop: after any structure, or in local scope after all of one share, so that equal widths stay equal.
    stops = torch.arange(rank.numel() + 1)
    if scope == "local":
        ends = rank.diff(append=rank.new_tensor([torch.inf])).gt(0)
        stops = torch.cat([stops[:1], stops[1:][ends]])

    def counts(k: int) -> dict[str, int]:
        """How many of each layer group go when the k lowest are chosen."""
        asked = torch.bincount(owner[:k], minlength=len(sets)).tolist()
        taken = {}
        for members, number, width in zip(sets, asked, widths, strict=True):
            left = min(width, math.ceil((width - number) / round_to) * round_to) if number else width
            if kinds is not None:
                left = kinds.up(kinds.of[members[0]], left, width)
            for name in members:
                taken[name] = max(0, there[name] - left)
        return taken

    def cost(k: int) -> Cost:
        masks = dict(fading)
        for name, number in counts(k).items():
            masks[name] = fading[name].clone()
            masks[name][order[name][:number]] = True
        return scene.costs.after(masks)

    if strict and not goal.met(cost(owner.numel())):
        least = getattr(cost(owner.numel()), goal.of)
        raise BudgetError(
            f"the target of {goal.at_most:,.0f} {goal.of} cannot be met: now {getattr(scene.costs.now, goal.of):,}, "
            f"and {least:,} if all {owner.numel()} structures that may go went (min_kept = {min_kept}, round_to = "
            f"{round_to}; {len(scene.structures.unprunable)} layers are not prunable). Keep more, or allow more to go."
        )
    first, last = 0, stops.numel() - 1
    while first < last:
        middle = (first + last) // 2
        if goal.met(cost(int(stops[middle]))):
            last = middle
        else:
            first = middle + 1
    low = int(stops[first])
    if round_to > 1:
        asked = torch.bincount(owner[:low], minlength=len(sets)).tolist()
        taken = counts(low)
        for name, wanted in ((name, n) for members, n in zip(sets, asked, strict=True) for name in members):
            if taken[name] != wanted:
                logger.info("%s: %d of %d picked, not %d: what stays is a multiple of %d",
                            name, taken[name], len(scene.structures.groups[name]), wanted, round_to)  # fmt: skip
    return {
        name: sorted(scene.structures.groups[name].ids[order[name][:number]].tolist())
        for name, number in counts(low).items()
        if number
    }


def _together(names: Sequence[str], kinds: Kinds | None) -> list[list[str]]:
    """Layer groups that come to the same width."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name if kinds is None else kinds.of[name], []).append(name)
    return list(found.values())


def _as_scores(scores: object, structures: StructureSet) -> dict[str, Tensor]:
    """One float per structure of each layer group.

    Raises:
        ConfigError: they are not.
    """
    if not isinstance(scores, Mapping):
        raise ConfigError(f"scores are a mapping, layer group -> one per structure; got {shown(scores)}")
    found = {}
    for name, values in scores.items():
        if name not in structures.groups:
            hint = did_you_mean(name, structures.groups)
            raise ConfigError(f"scores: there is no layer group {shown(name)}{hint}")
        found[name] = score = _as_floats(values, name)
        size = len(structures.groups[name])
        if score.shape != (size,):
            raise ConfigError(
                f"scores of layer group {name!r} must be {size}, one per structure; got shape {tuple(score.shape)}"
            )
        if bool(score.isnan().any()):
            raise ConfigError(f"scores of layer group {name!r} contain NaN, which has no rank")
    return found


def _as_floats(values: Any, name: str) -> Tensor:
    try:
        score = torch.as_tensor(values).detach()
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError(f"scores of layer group {name!r} must be numbers, got {shown(values)}") from None
    if score.is_complex():
        raise ConfigError(f"scores of layer group {name!r} must be real numbers, got {score.dtype}")
    return score
