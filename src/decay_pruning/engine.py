"""The life of every structure, driven by the hooks of an optimizer.

    alive ──pick──▶ decaying ──N steps──▶ held at zero ──surgery──▶ removed
      ▲                │
      └────release─────┘

The engine knows structures, decay and rectifying. It does not know models, layers, hosts or surgery: whoever drives it
(`Pruner`) decides what is picked and takes away what is held.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from decay_pruning.decay import SmoothPruning, joint, project_
from decay_pruning.errors import ConfigError
from decay_pruning.rectify import Resistance, SelfRectifying, measure
from decay_pruning.structures import Picks, Place, Role, SliceBatch, StructureSet

logger = logging.getLogger("decay_pruning")

Key = tuple[str, int]


@dataclass(frozen=True)
class Event:
    """Something that happened to structures of one layer group.

    Attributes:
        kind: what happened.
        step: optimizer steps done since the pruner was attached.
        group: name of the layer group.
        indices: original indices.
        values: the figures that decided, parallel to `indices`: "norm" at the pick; "c_rate" and "c_len" at a release.
    """

    kind: Literal["picked", "released", "removed"]
    step: int
    group: str
    indices: tuple[int, ...]
    values: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


class Driver(Protocol):
    """Who decides what the engine works on."""

    def before_step(self) -> None:
        """Gradients are ready, nothing has moved: the time to pick."""

    def add_gradients(self, scale: Tensor | None) -> None:
        """Resistance has been measured: the time to add to gradients (which are `scale` times too large)."""

    def moved(self) -> None:
        """The optimizer has moved the weights, nothing has decayed: the time to change weights, and to pick."""

    def after_step(self) -> None:
        """Everything has moved and decayed: the time to remove."""


@dataclass
class _Fading:
    """All decaying structures, as flat arrays parallel to the slots or slices of `batch`."""

    batch: SliceBatch
    begun: Tensor  # (slots,) int64, CPU: engine step before the first step of the decay
    steps: Tensor  # (slots,) int64, CPU: N
    start: Tensor  # (slices,): norm at the pick
    mean: Tensor  # (4, slots): running averages, in the order of Resistance
    seen: Tensor  # (slots,) int64, CPU: observations in the averages
    rectified: Tensor  # (slots,) bool, CPU: whether the structure can be released

    @property
    def cohorts(self) -> tuple[list[tuple[int, int]], Tensor]:
        """Distinct (begun, N), and each slot's number among them."""
        pairs, number = torch.unique(torch.stack([self.begun, self.steps]), dim=1, return_inverse=True)
        return [(int(b), int(n)) for b, n in pairs.T.tolist()], number


@dataclass
class Counts:
    """How many structures things happened to, since the start."""

    picked: int = 0
    picked_again: int = 0
    decayed: int = 0
    released: int = 0
    removed: int = 0


class Engine:
    """Fades picked structures, one optimizer step at a time.

    Args:
        structures: what there is.
        parameters: returns the parameters by name; asked again after anything changed.
        optimizer: any `torch.optim` optimizer; `attach` puts two hooks on it.
        smooth: how structures fade.
        rectify: when they are released, or None for never.
        on_event: called with each `Event`.
    """

    def __init__(
        self,
        structures: StructureSet,
        parameters: Callable[[], Mapping[str, Tensor]],
        optimizer: Optimizer,
        smooth: SmoothPruning,
        rectify: SelfRectifying | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        self.structures = structures
        self.smooth = smooth
        self.rectify = rectify
        self.step = 0
        self.counts = Counts()
        self.held: dict[str, list[int]] = {}
        self._optimizer = optimizer
        self._parameters = parameters
        self._on_event = on_event
        self._fading: _Fading | None = None
        self._cohorts: tuple[list[tuple[int, int]], Tensor] = ([], torch.zeros(0, dtype=torch.int64))
        self._holding: SliceBatch | None = None
        self._picks_made = 0
        self._pick_sizes: dict[
            int, list[int]
        ] = {}  # step of a pick with structures on their way → [picked, released]
        self._free_again: dict[Key, int] = {}  # released → number of the pick from which on it is eligible
        self._on_the_way: tuple[tuple[int, int, int], dict[str, Tensor]] | None = None
        self._skipped = False
        self._driver: Driver | None = None
        self._handles: list[Any] = []
        # One running number per structure and per place, to carry figures over when membership changes.
        sizes = [int(group.ids.max()) + 1 if len(group) else 0 for group in structures.groups.values()]
        offsets = torch.tensor([0, *sizes]).cumsum(0).tolist()
        self._offset = dict(zip(structures.groups, offsets, strict=False))
        self._place_number: dict[Place, int] = {place: i for i, place in enumerate(structures.sizes)}

    # -- the optimizer's hooks -------------------------------------------------------------------------------

    def attach(self, driver: Driver | None = None) -> None:
        """Ride on the optimizer: everything below happens inside `optimizer.step()`."""
        self._driver = driver
        self._handles = [
            self._optimizer.register_step_pre_hook(lambda *_: self.before_step()),
            self._optimizer.register_step_post_hook(lambda *_: self.after_step()),
        ]

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def before_step(self) -> None:
        """Measure resistance on the gradients that the step is about to use."""
        # A fused optimizer under a gradient scaler runs its hooks also when the scaler found an infinity and
        # nothing will move; it then carries `found_inf`, and gradients are still scaled.
        found_inf = getattr(self._optimizer, "found_inf", None)
        self._skipped = found_inf is not None and bool(found_inf.item())
        if self._skipped:
            return
        scale = getattr(self._optimizer, "grad_scale", None)
        if self._fading is not None and self._fading.batch.moved(self._parameters()):
            self._regroup([self._fading])
        if self._driver is not None:
            self._driver.before_step()
        if self._fading is not None and self.rectify is not None:
            self._observe(self._fading, self.rectify, scale)
        if self._driver is not None:
            self._driver.add_gradients(scale)

    def after_step(self) -> None:
        """Judge, decay, hold."""
        if self._skipped:
            return
        if self._driver is not None:
            self._driver.moved()
        self.step += 1
        if self._fading is not None and self.rectify is not None:
            self._judge(self._fading, self.rectify)
        if self._fading is not None:
            self._decay(self._fading)
        if self._holding is not None:
            self._holding.zero_(self._parameters())
        if self._driver is not None:
            self._driver.after_step()

    # -- what the driver asks for ----------------------------------------------------------------------------

    def pick(self, picks: Picks, steps: int, *, rectified: bool = True) -> None:
        """Let these structures fade over the next `steps` optimizer steps.

        Raises:
            ConfigError: a structure does not exist (any more), decays already, or is held; nothing was picked.
        """
        if steps < 1:
            raise ConfigError(f"a decay takes at least 1 step, not {steps}")
        picks = {name: sorted({int(i) for i in ids}) for name, ids in picks.items() if len(ids)}
        busy = set(self.decaying) | set(_keys(self.held))
        for name, ids in picks.items():
            if name not in self.structures.groups:
                raise ConfigError(
                    f"no layer group is called {name!r}; there are: {', '.join(self.structures.groups)}"
                )
            missing = sorted(set(ids) - set(self.structures.groups[name].ids.tolist()))
            if missing:
                raise ConfigError(f"layer group {name!r} has no structures {missing} (any more)")
            twice = [i for i in ids if (name, i) in busy]
            if twice:
                raise ConfigError(f"structures {twice} of layer group {name!r} decay already")
        self._picks_made += 1
        if not picks:
            return
        new = self._batch(picks)
        norms = new.norms(self._parameters())
        fresh = _Fading(
            batch=new,
            begun=torch.full((new.slots,), self.step),
            steps=torch.full((new.slots,), steps),
            start=norms,
            mean=torch.zeros(4, new.slots, device=new.device, dtype=new.dtype),
            seen=torch.zeros(new.slots, dtype=torch.int64),
            rectified=torch.full((new.slots,), rectified and steps > 1),
        )
        self.counts.picked += new.slots
        self.counts.picked_again += sum(key in self._free_again for key in new.keys)
        self._regroup([*([self._fading] if self._fading else []), fresh])
        self._pick_sizes.setdefault(self.step, [0, 0])[0] += new.slots
        self._emit("picked", new.keys, {"norm": joint(new, norms)})

    def removed(self, structures: StructureSet) -> None:
        """Surgery has removed what was held; `structures` is what is left."""
        keys = _keys(self.held)
        self.structures = structures
        self.held = {}
        self._holding = None
        self.counts.removed += len(keys)
        if self._fading is not None:
            self._regroup([self._fading])
        self._emit("removed", keys, {})

    def fade_out(self) -> None:
        """End every decay at once: what decays is set to zero and held."""
        if self._fading is not None:
            self._finish(self._fading, torch.ones(self._fading.batch.slots, dtype=torch.bool))

    # -- what can be seen ------------------------------------------------------------------------------------

    @property
    def decaying(self) -> list[Key]:
        """(layer group, original index) of each decaying structure."""
        return list(self._fading.batch.keys) if self._fading else []

    def eligible(self) -> dict[str, Tensor]:
        """Which structures can be picked now: layer group → bool, parallel to its `ids`."""
        barred = {key for key, free in self._free_again.items() if free > self._picks_made}
        masks = {name: ~fading for name, fading in self.fading().items()}
        for name, index in barred:
            masks[name] &= self.structures.groups[name].ids.ne(index)
        return masks

    def fading(self) -> dict[str, Tensor]:
        """What decays or is held: layer group → bool, parallel to its `ids`. One object until that changes."""
        stamp = self.counts.picked, self.counts.released, self.counts.removed
        if self._on_the_way is None or self._on_the_way[0] != stamp:
            masks = {
                name: torch.zeros(len(g), dtype=torch.bool) for name, g in self.structures.groups.items()
            }
            for name, ids in _picks([*self.decaying, *_keys(self.held)]).items():
                masks[name][self.structures.groups[name].rows(ids)] = True
            self._on_the_way = stamp, masks
        return self._on_the_way[1]

    def released(self, picks: Picks) -> set[Key]:
        """Those of `picks` that have been released before."""
        return set(_keys(picks)) & self._free_again.keys()

    def end_cooldown(self) -> bool:
        """Make released structures eligible at once; whether there were any."""
        waiting = [key for key, free in self._free_again.items() if free > self._picks_made]
        self._free_again.update(dict.fromkeys(waiting, self._picks_made))
        return bool(waiting)

    def norms(self) -> dict[Key, float]:
        """Norm over norm at the pick, of each decaying structure."""
        fading = self._fading
        if fading is None:
            return {}
        now = joint(fading.batch, fading.batch.norms(self._parameters()))
        start = joint(fading.batch, fading.start)
        return dict(zip(fading.batch.keys, (now / start.clamp_min(1e-30)).tolist(), strict=True))

    def resistance(self) -> dict[Key, dict[str, float]]:
        """Averages so far of each decaying structure, by the names of `Resistance`."""
        if self._fading is None:
            return {}
        rows = self._fading.mean.T.tolist()
        return {
            k: dict(zip(Resistance._fields, r, strict=True)) for k, r in zip(self.decaying, rows, strict=True)
        }

    # -- saving ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bit for bit, in plain containers and tensors."""
        fading = None
        if self._fading is not None:
            f = self._fading
            names = ("begun", "steps", "start", "mean", "seen", "rectified")
            fading = {name: getattr(f, name).detach().cpu().clone() for name in names}
            fading["picks"] = _picks(f.batch.keys)
        return {
            "step": self.step,
            "counts": vars(self.counts).copy(),
            "held": {name: list(ids) for name, ids in self.held.items()},
            "picks_made": self._picks_made,
            "pick_sizes": [[begun, *sizes] for begun, sizes in self._pick_sizes.items()],
            "free_again": [[name, index, free] for (name, index), free in self._free_again.items()],
            "fading": fading,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`; the structures must be those of the moment when it was made."""
        self._on_the_way = None
        self.step = state["step"]
        self.counts = Counts(**state["counts"])
        self._picks_made = state["picks_made"]
        self._free_again = {(name, index): free for name, index, free in state["free_again"]}
        self._pick_sizes = {begun: [picked, released] for begun, picked, released in state["pick_sizes"]}
        self.held = {name: list(ids) for name, ids in state["held"].items()}
        self._holding = self._batch(self.held, Role) if self.held else None
        self._fading = None
        if state["fading"] is not None:
            saved = dict(state["fading"])
            batch = self._batch(saved.pop("picks"))
            for name in ("start", "mean"):
                saved[name] = saved[name].to(batch.device, batch.dtype)
            self._regroup([_Fading(batch=batch, **saved)])

    # -- one step --------------------------------------------------------------------------------------------

    def _observe(self, fading: _Fading, rectify: SelfRectifying, scale: Tensor | None) -> None:
        cohorts, number = self._cohorts
        watched = [rectify.observes(self.step + 1 - begun, steps) for begun, steps in cohorts]
        if not any(watched):
            return
        batch = fading.batch
        parameters = self._parameters()
        ww, wg, gg = batch.moments(parameters, {name: p.grad for name, p in parameters.items()})
        if scale is not None:
            wg, gg = wg / scale, gg / scale**2
        now = measure(
            batch.per_slot(ww),
            batch.per_slot(wg),
            batch.per_slot(gg),
            batch.per_slot(wg * self._learning_rates(batch, parameters)),
            joint(batch, fading.start),
            fading.steps.to(batch.device),
        )
        watching = torch.tensor(watched)[number]
        fading.seen += watching
        weight = torch.tensor(
            [rectify.weight(max(int(s), 1)) for s in fading.seen.unique()], dtype=batch.dtype
        )
        weight = weight[torch.unique(fading.seen, return_inverse=True)[1]] * watching
        fading.mean += weight.to(batch.device) * (torch.stack(now) - fading.mean)

    def _judge(self, fading: _Fading, rectify: SelfRectifying) -> None:
        cohorts, number = self._cohorts
        judged = torch.tensor([rectify.judges(self.step - begun, steps) for begun, steps in cohorts])[number]
        judged &= fading.rectified & fading.seen.gt(0)
        if not bool(judged.any()):
            return
        strength = rectify.strength(Resistance(*fading.mean)).cpu()
        out = judged & strength.gt(-torch.inf)
        if not bool(out.any()):
            return
        out = self._most_resistant(fading, out, strength, rectify)
        if not bool(out.any()):
            return
        chosen = out.nonzero().flatten().tolist()
        keys = [fading.batch.keys[i] for i in chosen]
        for key in keys:
            self._free_again[key] = self._picks_made + rectify.cooldown
        self.counts.released += len(keys)
        values = {
            name: fading.mean[i][out.to(fading.mean.device)] for i, name in enumerate(Resistance._fields)
        }
        self._regroup([fading], leave=out)
        self._emit("released", keys, values)

    def _most_resistant(
        self, fading: _Fading, out: Tensor, strength: Tensor, rectify: SelfRectifying
    ) -> Tensor:
        """Of those to be released, the most resistant of each pick, as many as may still go."""
        chosen = torch.zeros_like(out)
        for begun in fading.begun[out].unique().tolist():
            sizes = self._pick_sizes[begun]
            mine = (out & fading.begun.eq(begun)).nonzero().flatten()
            order = torch.argsort(strength[mine], descending=True, stable=True)
            going = mine[order][: rectify.most(sizes[0]) - sizes[1]]
            sizes[1] += going.numel()
            chosen[going] = True
        return chosen

    def _decay(self, fading: _Fading) -> None:
        cohorts, number = self._cohorts
        left = [self.smooth.left(self.step - begun, steps) for begun, steps in cohorts]
        per_slot = torch.tensor(left, dtype=fading.batch.dtype)[number].to(fading.batch.device)
        project_(fading.batch, self._parameters(), fading.start, per_slot, self.smooth.bound)
        ended = torch.tensor([self.step - begun >= steps for begun, steps in cohorts])[number]
        if bool(ended.any()):
            self._finish(fading, ended)

    def _finish(self, fading: _Fading, ended: Tensor) -> None:
        keys = [fading.batch.keys[i] for i in ended.nonzero().flatten().tolist()]
        self.counts.decayed += len(keys)
        self.held = _picks([*_keys(self.held), *keys])
        self._holding = self._batch(self.held, Role)
        self._holding.zero_(self._parameters())
        self._regroup([fading], leave=ended)

    # -- helpers ---------------------------------------------------------------------------------------------

    def _batch(self, picks: Picks, roles: Iterable[Role] | None = None) -> SliceBatch:
        return SliceBatch(
            self.structures, picks, self._parameters(), self.smooth.roles if roles is None else roles
        )

    def _regroup(self, parts: list[_Fading], leave: Tensor | None = None) -> None:
        """Put decaying structures together anew, less those of `leave`, and carry their figures over."""
        keep = torch.ones(sum(p.batch.slots for p in parts), dtype=torch.bool) if leave is None else ~leave
        keys = [key for part in parts for key in part.batch.keys]
        stay = [key for key, k in zip(keys, keep.tolist(), strict=True) if k]
        if not stay:
            self._fading = None
            self._pick_sizes = {}
            return
        batch = self._batch(_picks(stay))
        slot = _match(self._slot_numbers(keys), self._slot_numbers(batch.keys))
        at_slice = _match(
            torch.cat([self._slice_numbers(part.batch) for part in parts]), self._slice_numbers(batch)
        )
        self._fading = _Fading(
            batch=batch,
            begun=torch.cat([p.begun for p in parts])[slot],
            steps=torch.cat([p.steps for p in parts])[slot],
            start=torch.cat([p.start.to(batch.device) for p in parts])[at_slice.to(batch.device)],
            mean=torch.cat([p.mean.to(batch.device) for p in parts], dim=1)[:, slot.to(batch.device)],
            seen=torch.cat([p.seen for p in parts])[slot],
            rectified=torch.cat([p.rectified for p in parts])[slot],
        )
        self._cohorts = self._fading.cohorts

    def _slot_numbers(self, keys: Iterable[Key]) -> Tensor:
        return torch.tensor([self._offset[name] + index for name, index in keys])

    def _slice_numbers(self, batch: SliceBatch) -> Tensor:
        place = torch.tensor([self._place_number[p] for p in batch.places])
        structure = self._slot_numbers(batch.keys)[batch.slice_slot.cpu()]
        return structure * len(self._place_number) + place[batch.slice_place.cpu()]

    def _learning_rates(self, batch: SliceBatch, parameters: Mapping[str, Tensor]) -> Tensor | float:
        """η of each slice, shape (slices,), or one number where all are the same."""
        groups = self._optimizer.param_groups
        if len(groups) == 1 and not isinstance(groups[0]["lr"], Tensor):
            return float(groups[0]["lr"])
        rate = {id(p): float(group["lr"]) for group in groups for p in group["params"]}
        at_place = [rate.get(id(parameters[name]), 0.0) for name, _ in batch.places]
        return torch.tensor(at_place, dtype=batch.dtype, device=batch.device)[batch.slice_place]

    def _emit(
        self, kind: Literal["picked", "released", "removed"], keys: list[Key], values: dict[str, Tensor]
    ) -> None:
        if not keys:
            return
        columns = {name: value.tolist() for name, value in values.items()}
        rows: dict[str, list[int]] = {}
        for row, (group, _) in enumerate(keys):
            rows.setdefault(group, []).append(row)
        for group, mine in rows.items():
            event = Event(
                kind=kind,
                step=self.step,
                group=group,
                indices=tuple(keys[r][1] for r in mine),
                values={name: tuple(column[r] for r in mine) for name, column in columns.items()},
            )
            logger.info("step %d: %s %d of %s: %s", event.step, kind, len(mine), group, event.indices)
            if self._on_event is not None:
                self._on_event(event)


def _keys(picks: Picks) -> list[Key]:
    return [(name, index) for name, ids in picks.items() for index in ids]


def _picks(keys: Iterable[Key]) -> dict[str, list[int]]:
    picks: dict[str, list[int]] = {}
    for name, index in sorted(keys):
        picks.setdefault(name, []).append(index)
    return picks


def _match(have: Tensor, want: Tensor) -> Tensor:
    """For each number wanted, its position in `have` (every one is there)."""
    sorted_have, order = have.sort()
    return order[torch.searchsorted(sorted_have, want)]
