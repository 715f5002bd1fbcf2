"""From scores to picks: the lowest scores go, until the goal is met."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from decay_pruning.budget import Cost, amount
from decay_pruning.checks import Whole, at_least, checked, did_you_mean, shown
from decay_pruning.errors import BudgetError, ConfigError
from decay_pruning.hosts.base import Goal, Scene
from decay_pruning.hosts.uniform import Kinds
from decay_pruning.structures import StructureSet

logger = logging.getLogger("decay_pruning")

Scope = Literal["global", "local"]
Per = Literal["structure", "macs", "params", "latency", "memory"]
MinKept = (
    Annotated[int, at_least(0, what="a number of structures")]
    | Annotated[float, at_least(0, below=1, what="a share of a layer group")]
)


#: Picks that are tried out on the clock before one is taken, and how close to the prediction is good enough.
_TRIALS, _CLOSE = 4, 0.01


def choose(
    scene: Scene,
    scores: Mapping[str, Tensor],
    goal: Goal,
    *,
    scope: Scope = "global",
    per: Per = "structure",
    min_kept: int | float = 1,
    round_to: int | None = None,
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
        per: what a score is divided by: one structure's cost. "structure" leaves that to the goal (`Target.per_cost`).
        round_to: what stays of a layer group is a multiple of this, rounded *up*, so a layer group of 16 asked to lose
            a tenth at a multiple of 8 loses nothing, and the log says so. None for 1, and with a goal of latency for
            the steps in which each layer group's width makes a difference on this machine.
        among: what may be picked, as `scene.eligible()` has it, which is the default.
        strict: raise where the goal cannot be met; otherwise return all that may go.
        kinds: layer groups of a kind come to the same width, and are ranked by the mean of their scores; those without
            one are not picked. None: each is its own.

    Raises:
        ConfigError: a value is out of range, or scores that do not fit the structures.
        BudgetError: not even all that may go would meet the goal.
    """
    checked(scene, Scene, "scene"), checked(goal, Goal, "goal")
    scope, round_to = checked(scope, Scope, "scope"), checked(round_to, Whole | None, "round_to")
    min_kept, strict = checked(min_kept, MinKept, "min_kept"), checked(strict, bool, "strict")
    scores = weighed(scene, _as_scores(scores, scene.structures), goal, checked(per, Per, "per"))
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
        most = min(each.numel() for each in ranked)
        mean = torch.stack([each[:most] for each in ranked]).mean(0)
        size = len(scene.structures.groups[members[0]])
        ranks.append(mean if scope == "global" else (torch.arange(most) + 1) / size)
        owners.append(torch.full((most,), number))
        widths.append(width)
    rank, turn = torch.cat([torch.empty(0), *ranks]).double().sort(stable=True)
    owner = torch.cat([torch.empty(0, dtype=torch.int64), *owners])[turn]
    # Where to stop: after any structure, or in local scope after all of one share, so that equal widths stay equal.
    stops = torch.arange(rank.numel() + 1)
    if scope == "local":
        ends = rank.diff(append=rank.new_tensor([torch.inf])).gt(0)
        stops = torch.cat([stops[:1], stops[1:][ends]])

    steps = {name: round_to or (scene.costs.step(name) if goal.of == "latency" else 1) for name in names}

    def counts(k: int) -> dict[str, int]:
        """How many of each layer group go when the k lowest are chosen."""
        asked = torch.bincount(owner[:k], minlength=len(sets)).tolist()
        taken = {}
        for members, number, width in zip(sets, asked, widths, strict=True):
            step = max(steps[name] for name in members)
            left = min(width, math.ceil((width - number) / step) * step) if number else width
            if kinds is not None:
                left = kinds.up(kinds.of[members[0]], left, width)
            for name in members:
                taken[name] = max(0, there[name] - left)
        return taken

    def gone(k: int) -> dict[str, Tensor]:
        masks = dict(fading)
        for name, number in counts(k).items():
            masks[name] = fading[name].clone()
            masks[name][order[name][:number]] = True
        return masks

    def cost(k: int) -> Cost:
        return scene.costs.after(gone(k))

    def least() -> int:
        """The fewest that meet the goal, or all."""
        first, last = 0, stops.numel() - 1
        while first < last:
            middle = (first + last) // 2
            if goal.met(cost(int(stops[middle]))):
                last = middle
            else:
                first = middle + 1
        return int(stops[first])

    while not goal.met(cost(owner.numel())) and not round_to and max(steps.values(), default=1) > 1:
        steps = {name: max(1, step // 2) for name, step in steps.items()}  # in such steps it is out of reach
    low = least()
    for _ in range(_TRIALS if goal.try_out and goal.of == "latency" and goal.met(cost(low)) else 0):
        predicted, tried = cost(low), scene.costs.try_out(gone(low))
        if tried is None or _alike(predicted, tried):
            break
        low = least()
    if strict and not goal.met(cost(owner.numel())):
        now, reached = (getattr(c, goal.of) for c in (scene.costs.now, cost(owner.numel())))
        raise BudgetError(
            f"the target of {amount(goal.of, goal.at_most)} cannot be met: now {amount(goal.of, now)}, and "
            f"{amount(goal.of, reached)} if all {owner.numel()} structures that may go went (min_kept = {min_kept}, "
            f"round_to = {max(steps.values(), default=1)}; {len(scene.structures.unprunable)} layers are not "
            "prunable). Keep more, or allow more to go."
        )
    asked = torch.bincount(owner[:low], minlength=len(sets)).tolist()
    taken = counts(low)
    for name, wanted in ((name, n) for members, n in zip(sets, asked, strict=True) for name in members):
        if taken[name] != wanted and steps[name] > 1:
            logger.info("%s: %d of %d picked, not %d: what stays is a multiple of %d",
                        name, taken[name], len(scene.structures.groups[name]), wanted, steps[name])  # fmt: skip
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


def weighed(
    scene: Scene, scores: Mapping[str, Tensor], goal: Goal, per: Per = "structure"
) -> dict[str, Tensor]:
    """Scores by what a structure costs, for every host: of two that score alike, the dearer goes first.

    A score below zero asks for the structure to go, so a dearer one lies further below.
    """
    of = goal.of if per == "structure" and goal.weighs else per
    if of == "structure" or of == "structures":
        return dict(scores)
    fading = scene.fading()
    prices = {name: scene.costs.price(name, of, fading) for name in scores}
    if of in ("macs", "params") and per == of:
        return {name: score / prices[name] for name, score in scores.items()}
    mean = sum(prices.values()) / max(1, len(prices))
    relative = {name: price / mean for name, price in prices.items()}
    return {
        name: torch.where(score < 0, score * relative[name], score / relative[name])
        for name, score in scores.items()
    }


def _alike(predicted: Cost, tried: Cost) -> bool:
    assert predicted.latency is not None and tried.latency is not None
    return abs(tried.latency / predicted.latency - 1) <= _CLOSE


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
