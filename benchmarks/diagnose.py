"""Does resistance tell valuable structures from worthless ones? Criteria against the true loss increase of a removal.

    python benchmarks/diagnose.py recipes/cifar10-small-depgraph.toml --seeds 100 101 102 \\
        --set data.validation=0.1 --set prune.host.scope=local --out results/diagnose-local.json

The network is pruned by SP inside real training (SR off). What SR could average is written down in every step. At some
stages of the decay, every structure on its way (and the next in the host's ranking, which would be picked in its
place) is weighed on held-out images:

- *start*: loss of the dense start without this structure, less its loss (batch-norm on batch statistics);
- *start, eval*: the same with batch-norm on running statistics;
- *stage*: loss of the network at this stage without the structure, less its loss as it is;
- *stage, restored*: the same, less its loss with the structure back at its norm of the pick (a replacement: as it is).

Each criterion then says which structures it would release. A larger figure means: keep.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from trials import made, options

from decay_pruning import Pruner
from decay_pruning.budget import CostModel
from decay_pruning.engine import Event
from decay_pruning.hosts import DepGraph
from decay_pruning.lab import compare, recipe, results
from decay_pruning.lab.data import Batches, Data
from decay_pruning.lab.models import BasicBlock, Bottleneck
from decay_pruning.lab.task import Loss
from decay_pruning.lab.trainer import Step, train
from decay_pruning.rectify import SelfRectifying
from decay_pruning.resistance import Parallel
from decay_pruning.slices import SliceBatch
from decay_pruning.structures import Role, StructureSet

STAGES = (0.1, 0.25, 0.5, 0.75, 0.9)
WEIGHED = (0.25, 0.5, 0.75)  # of them, where structures are weighed in the network as it is then
SHARES = (0.05, 0.15)
DRAWS = 20  # of what chance does
FUNCTION = frozenset({Role.SCALE, Role.SHIFT, Role.COLUMN})
Key = tuple[str, int]


class Losses:
    """Loss of each batch. What lies in front of the first block that is touched is taken from the last `base`."""

    def __init__(self, model: nn.Module, batches: list[tuple[Tensor, Tensor]], loss: Loss) -> None:
        self.model, self._batches, self._loss = model, batches, loss
        self._blocks = [
            (name, m) for name, m in model.named_modules() if isinstance(m, BasicBlock | Bottleneck)
        ]
        self._kept: list[list[Tensor]] = []

    @torch.no_grad()
    def base(self) -> Tensor:
        """Loss of the network as it is, shape (batches,)."""
        seen: list[Tensor] = []
        hooks = [b.register_forward_hook(lambda _, __, out: seen.append(out)) for _, b in self._blocks]
        losses, self._kept = [], []
        for x, y in self._batches:
            seen.clear()
            losses.append(self._loss(self.model(x), y))
            self._kept.append(list(seen))
        for hook in hooks:
            hook.remove()
        return torch.stack(losses)

    @torch.no_grad()
    def touched(self, tensors: Iterable[str]) -> Tensor:
        """Loss now that these tensors have changed since `base`, shape (batches,)."""
        first = min(self._block_of(name) for name in tensors)
        losses = []
        for kept, (x, y) in zip(self._kept, self._batches, strict=True):
            for (_, block), out in zip(self._blocks[:first], kept, strict=False):
                block.forward = _constant(out)  # type: ignore[assignment,method-assign]
            losses.append(self._loss(self.model(x), y))
        for _, block in self._blocks[:first]:
            del block.forward
        return torch.stack(losses)

    def _block_of(self, tensor: str) -> int:
        inside = [i for i, (name, _) in enumerate(self._blocks) if tensor.startswith(f"{name}.")]
        return inside[0] if inside else len(self._blocks) if tensor.startswith("fc.") else 0


def _constant(out: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda _: out


class Diary:
    """Rides on one SP run: writes down each step, weighs structures at the stages."""

    def __init__(
        self,
        settings: recipe.Recipe,
        batches: list[tuple[Tensor, Tensor]],
        loss: Loss,
        images: int,
        sample: int,
    ) -> None:
        self._settings, self._batches, self._loss, self._sample = settings, batches, loss, sample
        self._few = batches[: max(1, images // len(batches[0][1]))]
        self._picked: list[Key] = []
        self._series: dict[str, list[Tensor]] = {}
        self._before: dict[str, Tensor] = {}
        self._single: dict[Key, tuple[SliceBatch, Tensor]] = {}
        self.raw: dict[str, Any] = {"stages": {}}

    def attach(self, model: nn.Module, example: Tensor, optimizer: Optimizer, total: int) -> Pruner:
        """A factory for the trainer. Hooks: gradients after the pick, moves before the projection."""
        prune = self._settings.prune
        assert isinstance(prune.host, DepGraph)
        self._model, self._parameters = model, dict(model.named_parameters())
        self._optimizer = optimizer
        self._costs: CostModel | None = None
        optimizer.register_step_post_hook(lambda *_: self._moved())
        self._pruner = Pruner(
            model, example[:1], optimizer, prune.target, host=prune.host, smooth=prune.smooth,
            total_steps=total, on_event=self._event,
        )  # fmt: skip
        optimizer.register_step_pre_hook(lambda *_: self._gradients())
        self._costs = CostModel(model, example[:1], self._pruner.original)
        self._scores = prune.host.scores(model, self._pruner.graph, self._pruner.structures)
        self._losses = Losses(copy.deepcopy(model), self._few, self._loss)
        self._copied = dict(self._losses.model.named_parameters())
        self._N = int(self._pruner._steps())
        self._stages = {max(1, round(share * self._N)): share for share in WEIGHED}
        return self._pruner

    # -- each step -------------------------------------------------------------------------------------------

    def _event(self, event: Event) -> None:
        if event.kind == "picked":
            self._picked += [(event.group, i) for i in event.indices]

    def _begin(self) -> None:
        structures = self._pruner.structures
        self._batch = _batch(structures, self._picked, self._parameters)
        self._start = self._batch.norms(self._parameters)
        gone = self._pruner.engine.fading()
        self._parallel = Parallel(structures, self._batch, gone, self._parameters, frozenset(Role))
        role = {c.place: c.role for g in structures.groups.values() for c in g.couplings}
        works = torch.tensor([role[place] in FUNCTION for place in self._batch.places])
        self._works = works[self._batch.slice_place].to(self._batch.dtype)
        keys, batch = self._batch.keys, self._batch
        generator = torch.Generator().manual_seed(0)
        chosen = torch.randperm(len(keys), generator=generator)[: self._sample].sort().values
        self._weighed = [keys[i] for i in chosen]
        self._others = self._replacements()
        for key in [*self._weighed, *self._others]:
            single = _batch(structures, [key], self._parameters)
            self._single[key] = single, single.norms(self._parameters)
        squares = self._start.square()
        self.raw |= {
            "N": self._N,
            "keys": keys,
            "weighed": chosen,
            "others": self._others,
            "norm": batch.per_slot(squares).sqrt(),
            "norm_function": batch.per_slot(squares * self._works).sqrt(),
            "score": self._score(keys),
            "score_others": self._score(self._others),
            "macs": self._macs(keys),
            "macs_others": self._macs(self._others),
            "momentum": float(self._optimizer.param_groups[0].get("momentum", 0.0)),
            "weight_decay": float(self._optimizer.param_groups[0]["weight_decay"]),
        }
        self._weigh_start()

    def _gradients(self) -> None:
        if not self._picked or len(self._series.get("lr", [])) >= self._N:
            return
        if "keys" not in self.raw:
            self._begin()
        gradients = {name: p.grad for name, p in self._parameters.items()}
        self._note(("ww", "wg", "gg"), self._batch.moments(self._parameters, gradients))
        self._series.setdefault("parallel", []).append(self._parallel.c_len(gradients))
        rate = self._optimizer.param_groups[0]["lr"]
        self._series.setdefault("lr", []).append(torch.tensor(float(rate)))
        self._before = {name: p.detach().clone() for name, p in self._parameters.items()}

    def _moved(self) -> None:
        if self._before:
            moves: dict[str, Tensor | None] = {
                name: p.detach() - self._before[name] for name, p in self._parameters.items()
            }
            _, wd, dd = self._batch.moments(self._before, moves)
            self._note(("wd", "dd"), (wd, dd))
            self._before = {}

    def _note(self, names: tuple[str, ...], moments: tuple[Tensor, ...]) -> None:
        for name, values in zip(names, moments, strict=True):
            self._series.setdefault(name, []).append(self._batch.per_slot(values))
            self._series.setdefault(f"{name}_function", []).append(self._batch.per_slot(values * self._works))

    # -- at a stage ------------------------------------------------------------------------------------------

    def on_step(self, step: Step) -> None:
        """Weigh, where a stage has come."""
        if step.step in self._stages and "keys" in self.raw:
            self.raw["stages"][self._stages[step.step]] = self._weigh_stage()
        if step.step == self._N:
            self.raw["series"] = {name: torch.stack(v) for name, v in self._series.items() if v}
            raise _Enough

    def _weigh_start(self) -> None:
        for mode, batches in (("train", self._batches), ("eval", self._few)):
            self._losses = Losses(self._losses.model.train(mode == "train"), batches, self._loss)
            base = self._losses.base()
            self.raw[f"start_{mode}"] = torch.stack([self._without(k) - base for k in self._weighed])
            self.raw[f"start_{mode}_others"] = torch.stack([self._without(k) - base for k in self._others])
        self._losses = Losses(self._losses.model.train(), self._few, self._loss)

    def _weigh_stage(self) -> dict[str, Tensor]:
        with torch.no_grad():
            for name, p in self._copied.items():
                p.copy_(self._parameters[name])
        base = self._losses.base()
        gone = torch.stack([self._without(k) for k in self._weighed])
        back = torch.stack([self._restored(k) for k in self._weighed])
        others = torch.stack([self._without(k) for k in self._others]) - base
        return {"value": gone - back, "now": gone - base, "others": others, "base": base}

    def _without(self, key: Key) -> Tensor:
        batch, _ = self._single[key]
        return self._changed(batch, lambda: batch.zero_(self._copied))

    def _restored(self, key: Key) -> Tensor:
        batch, start = self._single[key]
        return self._changed(
            batch, lambda: batch.rescale_(self._copied, lambda now: start / now.clamp_min(1e-30))
        )

    def _changed(self, batch: SliceBatch, change: Callable[[], None]) -> Tensor:
        names = {name for name, _ in batch.places}
        saved = {name: self._copied[name].detach().clone() for name in names}
        change()
        loss = self._losses.touched(names)
        with torch.no_grad():
            for name, value in saved.items():
                self._copied[name].copy_(value)
        return loss

    # -- what the host thinks --------------------------------------------------------------------------------

    def _score(self, keys: list[Key]) -> Tensor:
        groups = self._pruner.structures.groups
        return torch.stack([self._scores[name][groups[name].rows([i])][0] for name, i in keys])

    def _replacements(self) -> list[Key]:
        """The next in the host's ranking: of each layer group (local), or of the network (global)."""
        host = self._settings.prune.host
        assert isinstance(host, DepGraph)
        left: list[tuple[float, Key]] = []
        for name, group in self._pruner.structures.groups.items():
            keys = [(name, int(i)) for i in group.ids if (name, int(i)) not in set(self._picked)]
            ranked = sorted(zip(self._score(keys).tolist(), keys, strict=True))[:-1]  # one always stays
            picked = sum(k[0] == name for k in self._picked)
            left += ranked if host.scope == "global" else ranked[: max(2, math.ceil(0.2 * picked))]
        return [key for _, key in sorted(left)[: 30 if host.scope == "global" else None]]

    def _macs(self, keys: list[Key]) -> Tensor:
        """MACs that each of them costs in the network that is left when all picks are gone."""
        assert self._costs is not None
        groups = self._pruner.structures.groups
        fading = {name: torch.zeros(len(g), dtype=torch.bool) for name, g in groups.items()}
        for name, i in self._picked:
            fading[name][groups[name].rows([i])] = True
        whole = self._costs.after(fading).macs
        found = []
        for name, i in keys:
            row = groups[name].rows([i])
            fading[name][row] ^= True
            found.append(abs(self._costs.after(fading).macs - whole))
            fading[name][row] ^= True
        return torch.tensor(found, dtype=torch.float32)


class _Enough(Exception):
    """The decay is over, and with it the diagnosis."""


def _batch(structures: StructureSet, keys: list[Key], parameters: Mapping[str, Tensor]) -> SliceBatch:
    picks: dict[str, list[int]] = {}
    for name, i in keys:
        picks.setdefault(name, []).append(i)
    return SliceBatch(structures, picks, parameters, Role)


def gather(settings: recipe.Recipe, data: Data, seed: int, work: Path, images: int, sample: int) -> Any:
    """One SP run with its diary, kept in a file."""
    start = compare.dense_start(settings, data, seed, work / "starts")
    loss = data.loss or F.cross_entropy
    diary = Diary(settings, list(Batches(data, 250, train=False)), loss, images, sample)
    try:
        train(
            copy.deepcopy(start), data, settings.prune, seed=seed, pruner_factory=diary.attach,
            on_step=diary.on_step, eval_every=None, cpu=True,
        )  # fmt: skip
    except _Enough:
        return diary.raw
    raise RuntimeError("the training ended before the decay")


# -- criteria ------------------------------------------------------------------------------------------------


def averages(series: Tensor, upto: int, warmup: int, beta: float | None) -> Tensor:
    """Mean over steps warmup … upto − 1, plain or exponential: (steps, slots) → (slots,)."""
    part = series[warmup:upto]
    if beta is None:
        return part.mean(0)
    weight = beta ** torch.arange(len(part) - 1, -1, -1.0)
    return (part * (weight / weight.sum())[:, None]).sum(0)


def ranks(values: Tensor) -> Tensor:
    """Ranks from 1, ties in order."""
    return torch.argsort(torch.argsort(values, stable=True), stable=True).double() + 1


def within(values: Tensor, groups: Tensor) -> Tensor:
    """z-score among the decaying structures of each layer group."""
    out = torch.zeros_like(values, dtype=torch.float64)
    for g in groups.unique():
        mine = groups == g
        v = values[mine].double()
        out[mine] = (v - v.mean()) / v.std().clamp_min(1e-30) if len(v) > 1 else 0.0
    return out


def criteria(raw: Mapping[str, Any], stage: float, beta: float | None) -> dict[str, Tensor]:
    """Criterion → one figure per decaying structure; larger means keep."""
    s, N = raw["series"], raw["N"]
    n, skip = max(1, round(stage * N)), int(SelfRectifying().warmup * N)
    skip = min(skip, n - 1)  # at the first stage the warm-up has only just ended
    lr = s["lr"][: len(s["wg"]), None]
    w, w_f = s["ww"].sqrt(), s["ww_function"].sqrt()
    m, m_f = raw["norm"], raw["norm_function"]
    out, left = -s["wg"], w / m
    # Weight decay in the optimizer's move, as momentum has summed it up: along w, and known.
    drag, total = torch.zeros_like(s["ww"]), raw["weight_decay"] * w[0] / (1 - raw["momentum"])
    for t in range(len(drag)):
        total = raw["momentum"] * total + raw["weight_decay"] * w[t]
        drag[t] = lr[t] * total

    def mean(x: Tensor) -> Tensor:
        return averages(x.double(), n, skip, beta)

    moved = s["wd"] / w
    groups = torch.tensor([sorted({k[0] for k in raw["keys"]}).index(k[0]) for k in raw["keys"]])
    score = raw["score"].double()
    outward, regrowth = mean(out / w / s["gg"].sqrt()), mean(lr * out / w) / (m / N)
    signed, magnitude = mean(out), mean(out.abs())
    f = -s["wg_function"]
    outward_f = mean(f / w_f / s["gg_function"].sqrt().clamp_min(1e-30))
    regrowth_f = mean(lr * f / w_f) / (m_f / N)
    update = mean(moved) / (m / N)
    gain = (s["ww"] + 2 * s["wd"] + s["dd"]).clamp_min(0).sqrt() - w
    escape = mean(gain / s["dd"].sqrt().clamp_min(1e-30))
    deviation = (mean(out.square()) - signed.square()).clamp_min(1e-30).sqrt()
    found = {
        "host score at the pick": score,
        "norm at the pick": m,
        "norm at the pick, norm and columns": m_f,
        "C_rate": escape,
        "C_rate, per decay": mean(gain) / (m / N),
        "C_len": mean(s["parallel"]),
        "outward": outward,
        "regrowth": regrowth,
        "growth ρ": mean(out / w),
        "|⟨g, w⟩|": magnitude,
        "−⟨g, w⟩": signed,
        "mean of ⟨g, w⟩²": mean(out.square()),
        "−⟨g, w⟩ over its deviation": signed / deviation,
        "−⟨g, w⟩ per lost length": mean(out / left.clamp_min(1e-9) * (1 - left)),
        "ρ · norm at the pick": mean(out / w) * m,
        "regrowth by the optimizer's own move": update,
        "outward, of the optimizer's own move": mean(moved / s["dd"].sqrt().clamp_min(1e-30)),
        "update without weight decay, ⟨Δ, w⟩": mean(s["wd"] + drag * w),
        "outward of norm and columns": outward_f,
        "regrowth of norm and columns": regrowth_f,
        "outward, z in its layer": within(outward, groups),
        "regrowth, z in its layer": within(regrowth, groups),
        "−⟨g, w⟩, z in its layer": within(signed, groups),
        "|⟨g, w⟩|, z in its layer": within(magnitude, groups),
        "|⟨g, w⟩| per MAC": magnitude / raw["macs"],
        "−⟨g, w⟩ per MAC": signed / raw["macs"],
        "host score per MAC": score / raw["macs"],
    }
    for name in ("outward", "regrowth", "growth ρ", "−⟨g, w⟩", "|⟨g, w⟩|", "regrowth of norm and columns"):
        found[f"rank of host score × rank of {name}"] = ranks(score) * ranks(found[name])
    for name in ("C_rate", "C_len"):  # does it know something that |⟨g, w⟩| does not?
        found[f"rank of |⟨g, w⟩| × rank of {name}"] = ranks(magnitude) * ranks(found[name])
    found["rank of C_rate × rank of C_len"] = ranks(escape) * ranks(found["C_len"])
    found["rank of norm × rank of |⟨g, w⟩|"] = ranks(m) * ranks(magnitude)
    found["rank of norm × rank of update, regrowth"] = ranks(m) * ranks(update)
    found["norm at the pick, z in its layer"] = within(m, groups)
    return found


# -- figures -------------------------------------------------------------------------------------------------


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation."""
    return float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1])


def beyond(a: Tensor, b: Tensor, known: Tensor) -> float:
    """Rank correlation of a and b that `known` does not explain (partial correlation of the ranks)."""
    ab, ak, bk = spearman(a, b), spearman(a, known), spearman(b, known)
    return (ab - ak * bk) / math.sqrt(max(1e-12, (1 - ak**2) * (1 - bk**2)))


def swap(chosen: Tensor, value: Tensor, raw: Mapping[str, Any], others: Tensor, local: bool) -> Any:
    """What is saved by releasing `chosen` and removing the next in the host's ranking in their place.

    Local scope: one for one within each layer group. Global: as many of the next as cost the same MACs, in parts.

    Returns:
        loss saved by the releases, loss that the replacements cost, and the share of the releases that are worth more
        than what replaces them (global: per MAC, against the replacements' mean).
    """
    keys = [raw["keys"][i] for i in raw["weighed"]]
    rows = chosen.nonzero().flatten().tolist()
    pairs: list[tuple[float, float]] = []
    if local:
        for name in {keys[r][0] for r in rows}:
            mine = sorted((float(value[r]) for r in rows if keys[r][0] == name), reverse=True)
            theirs = [float(others[i]) for i, k in enumerate(raw["others"]) if k[0] == name]
            pairs += list(zip(mine, theirs, strict=False))
        saved, cost = sum(p[0] for p in pairs), sum(p[1] for p in pairs)
        won = sum(a > b for a, b in pairs)
        return saved, cost, won / max(1, len(pairs))
    need = float(raw["macs"][raw["weighed"]][chosen].sum())
    reach = raw["macs_others"].cumsum(0)
    spent = torch.cat([torch.zeros(1), reach])
    share = ((need - spent[:-1]) / raw["macs_others"]).clamp(0, 1)
    saved, cost = float(value[chosen].sum()), float((share * others).sum())
    cost *= max(1.0, need / float(reach[-1]))  # more than was weighed: at the same price
    per_mac = value / raw["macs"][raw["weighed"]]
    typical = cost / max(need, 1e-30)
    return saved, cost, float((per_mac[chosen] > typical).double().mean()) if rows else 0.0


def truths(raw: Mapping[str, Any], stage: float) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Truth → value of each weighed structure, of each replacement, and of the former in each batch."""
    found = {
        "start": (raw["start_train"].mean(1), raw["start_train_others"].mean(1), raw["start_train"]),
        "start, eval": (raw["start_eval"].mean(1), raw["start_eval_others"].mean(1), raw["start_eval"]),
    }
    at = raw["stages"].get(stage)
    if at is not None:
        found["stage"] = at["now"].mean(1), at["others"].mean(1), at["now"]
        found["stage, restored"] = at["value"].mean(1), at["others"].mean(1), at["value"]
    return found


def thresholds(rates: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    """What the paper's criteria let go at the default thresholds, and under the cap."""
    paper = SelfRectifying.paper()
    t_rate, t_len = paper.thresholds
    rate, length = rates > t_rate, lengths > t_len
    most = SelfRectifying().most(len(rates))
    first = ranks(-torch.where(rate & length, lengths, -torch.inf)) <= most
    return {
        f"C_rate > {t_rate}": rate,
        f"C_len > {t_len}": length,
        f"C_rate > {t_rate} and C_len > {t_len}": rate & length,
        "the same, at most 5 %": rate & length & first,
    }


def judged(
    figure: Tensor, value: Tensor, others: Tensor, raw: Mapping[str, Any], local: bool
) -> dict[str, float]:
    """One criterion against one truth."""
    found = {
        "spearman": spearman(figure, value),
        "beyond_norm": beyond(figure, value, raw["norm"][raw["weighed"]]),
    }
    for q in SHARES:
        count = max(1, round(q * len(value)))
        chosen, best = ranks(-figure.double()) <= count, ranks(-value) <= count
        saved, cost, won = swap(chosen, value, raw, others, local)
        found |= {
            f"precision_{q}": float((chosen & best).sum()) / count,
            f"saved_{q}": saved, f"cost_{q}": cost, f"won_{q}": won,
        }  # fmt: skip
    return found


def figures(raw: Mapping[str, Any], local: bool) -> list[dict[str, Any]]:
    """Every criterion at every stage against every truth."""
    rows: list[dict[str, Any]] = []
    index = raw["weighed"]
    generator = torch.Generator().manual_seed(0)
    by_chance = [torch.rand(len(index), generator=generator) for _ in range(DRAWS)]
    for stage in STAGES:
        plain = {name: v[index] for name, v in criteria(raw, stage, None).items()}
        exponential = {name: v[index] for name, v in criteria(raw, stage, 0.9).items()}
        for truth, (value, others, each) in truths(raw, stage).items():
            half = each.shape[1] // 2
            row = {"stage": stage, "truth": truth}
            rows.append({
                **row, "criterion": "half of the images against the other half",
                "spearman": spearman(each[:, :half].mean(1), each[:, half:].mean(1)),
                "mean_of_picks": float(value.mean()), "mean_of_replacements": float(others.mean()),
            })  # fmt: skip

            def of(figure: Tensor, value: Tensor = value, others: Tensor = others) -> dict[str, float]:
                return judged(figure, value, others, raw, local)

            draws = [of(figure) for figure in by_chance]
            chance = {name: sum(d[name] for d in draws) / len(draws) for name in draws[0]}
            rows.append({**row, "criterion": "chance", **chance})
            rows.append({**row, "criterion": "the truth itself", **of(value)})
            rows.append({**row, "criterion": "the truth itself, per MAC", **of(value / raw["macs"][index])})
            rows += [{**row, "criterion": name, **of(figure)} for name, figure in plain.items()]
            rows += [
                {**row, "criterion": f"{name}, exponential average", **of(exponential[name])}
                for name in ("C_rate", "C_len", "outward", "regrowth", "−⟨g, w⟩", "|⟨g, w⟩|")
            ]
            good = ranks(-value) <= max(1, round(SHARES[-1] * len(index)))
            for name, chosen in thresholds(plain["C_rate"], plain["C_len"]).items():
                number, hits = int(chosen.sum()), float((chosen & good).sum())
                saved, cost, won = swap(chosen, value, raw, others, local)
                rows.append({
                    **row, "criterion": name, "released": number, "of": len(index),
                    "precision": hits / number if number else None, "recall": hits / float(good.sum()),
                    "saved": saved, "cost": cost, "won": won,
                })  # fmt: skip
    return rows


def mean_of(rows: list[dict[str, Any]], field: str, **which: Any) -> float:
    """Mean over seeds of one figure."""
    found = [
        r[field] for r in rows if all(r.get(k) == v for k, v in which.items()) and r.get(field) is not None
    ]
    return sum(found) / len(found) if found else float("nan")


def table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds: Spearman at each stage; at half the decay what it adds to the norm, precision, swaps."""
    lines = []
    names = list(dict.fromkeys(r["criterion"] for r in rows))
    for truth in dict.fromkeys(r["truth"] for r in rows):
        lines.append(
            f"\n{truth:<44}"
            + "".join(f"{s:>7}" for s in STAGES)
            + "   at 0.5: beyond  P5   P15  net5   net15  won5  won15"
        )
        for name in names:
            which = {"truth": truth, "criterion": name}
            values = [mean_of(rows, "spearman", stage=s, **which) for s in STAGES]
            if all(math.isnan(v) for v in values):
                continue
            half = {**which, "stage": 0.5}
            nets = [mean_of(rows, f"saved_{q}", **half) - mean_of(rows, f"cost_{q}", **half) for q in SHARES]
            precise = [mean_of(rows, f"precision_{q}", **half) for q in SHARES]
            lines.append(
                f"{name:<44}" + "".join(f"{v:7.2f}" for v in values)
                + f"        {mean_of(rows, 'beyond_norm', **half):6.2f} {precise[0]:6.2f} {precise[1]:5.2f} "
                f"{nets[0]:6.3f} {nets[1]:6.3f} "
                f"{mean_of(rows, 'won_0.05', **half):5.2f} {mean_of(rows, 'won_0.15', **half):5.2f}"
            )  # fmt: skip
        for name in names:
            which = {"truth": truth, "criterion": name, "stage": 0.5}
            if math.isnan(mean_of(rows, "released", **which)):
                continue
            words = [
                f"{f} {mean_of(rows, f, **which):.2f}"
                for f in ("released", "of", "precision", "recall", "saved", "cost", "won")
            ]
            lines.append(f"{name:<44} {'  '.join(words)}")
    return "\n".join(lines)


def main() -> None:
    """Diagnose seeds that are not done yet, score all, write, print."""
    parser = options(__doc__, jobs=None)
    parser.add_argument(
        "--images", type=int, default=750, help="held-out images at the stages; the dense start has all"
    )
    parser.add_argument(
        "--sample", type=int, default=100, help="decaying structures that are weighed, at most"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = recipe.load(args.recipe, args.assignments)
    host = settings.prune.host
    assert isinstance(host, DepGraph)
    data = settings.data.load()
    rows = []
    for seed in args.seeds:
        file = args.work / f"{args.out.stem}-{seed}.pt"
        if not file.exists():
            begin = time.perf_counter()
            raw = gather(settings, data, seed, args.work, args.images, args.sample)
            raw["seconds"] = round(time.perf_counter() - begin)
            torch.save(raw, file)
            print(f"seed {seed}: {raw['seconds']} s", flush=True)
        raw = torch.load(file, weights_only=True)
        rows += [{"seed": seed, **row} for row in figures(raw, host.scope == "local")]
    short = [{k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    body = ",\n".join(json.dumps(row, ensure_ascii=False) for row in short)
    text = (
        json.dumps(made(args, settings, "images", "sample", device="cpu"), indent=1)[:-2]
        + f',\n "rows": [\n{body}\n]\n}}\n'
    )
    results.write(args.out, text)
    print(table(rows))


if __name__ == "__main__":
    main()
