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

from decay_pruning import shards
from decay_pruning.checks import Count, checked
from decay_pruning.decay import SmoothPruning, factors, joint
from decay_pruning.errors import ConfigError, DecayPruningError
from decay_pruning.exchange import Exchange, Replacements
from decay_pruning.fading import Fading, Key, Numbers, as_keys, as_picks
from decay_pruning.optimizers import with_closure
from decay_pruning.rectify import SelfRectifying
from decay_pruning.slices import Gradients, Reading, SliceBatch
from decay_pruning.structures import Picks, Role, StructureSet
from decay_pruning.watch import Network, Watch

logger = logging.getLogger("decay_pruning")


@dataclass(frozen=True)
class Event:
    """Something that happened to structures of one layer group.

    Attributes:
        kind: what happened.
        step: optimizer steps done since the pruner was attached.
        group: name of the layer group.
        indices: original indices.
        values: figures parallel to `indices`: "norm" at the pick; at a release the averages that self-rectifying has
            measured, by the names of `Resistance`.
    """

    kind: Literal["picked", "released", "removed"]
    step: int
    group: str
    indices: tuple[int, ...]
    values: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


class Driver(Protocol):
    """Who decides what the engine works on."""

    def rests(self) -> bool:
        """Whether it has nothing to do in a step in which nothing decays."""

    def before_step(self) -> None:
        """Gradients are ready, nothing has moved: the time to pick."""

    def add_gradients(self, scale: Tensor | None) -> None:
        """Resistance has been measured: the time to add to gradients (which are `scale` times too large)."""

    def moved(self) -> bool:
        """The optimizer has moved the weights, nothing has decayed: the time to change weights, and to pick.

        Returns:
            whether weights may have changed.
        """

    def after_step(self) -> None:
        """Everything has moved and decayed: the time to remove."""

    def replacements(self) -> Replacements:
        """What would be picked next, in place of what is released."""

    def snapshot(self) -> Callable[[], None]:
        """Called before a part of a step; returns what puts everything back if that part fails."""

    def failed(self, error: DecayPruningError) -> None:
        """A part of a step was refused and put back; the error is raised to the user after this."""


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
        agree: makes figures the same in all processes that train the model, or refuses; None where they are anyway.
    """

    def __init__(
        self,
        structures: StructureSet,
        parameters: Callable[[], Mapping[str, Tensor]],
        optimizer: Optimizer,
        smooth: SmoothPruning,
        rectify: SelfRectifying | None = None,
        on_event: Callable[[Event], None] | None = None,
        agree: Callable[[Tensor], Tensor] | None = None,
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
        self._agree = agree or (lambda figures: figures)
        self._fading: Fading | None = None
        self._holding: SliceBatch | None = None
        self._picks_made = 0
        # step of a pick with structures on their way → (picked, released)
        self._pick_sizes: dict[int, tuple[int, int]] = {}
        self._free_again: dict[Key, int] = {}  # released → number of the pick from which on it is eligible
        self._on_the_way: tuple[tuple[int, int, int], dict[str, Tensor]] | None = None
        self._untold: list[Event] = []
        self._ready = False  # gradients have been seen, and the step moves
        self._driver: Driver | None = None
        self._handles: list[Any] = []
        self._numbers = Numbers(structures)
        self._watch = None if rectify is None else Watch(rectify)
        self._exchange: Exchange | None = None
        self._weighed: Callable[[], Exchange] | None = None  # the exchange with the gradients of this step

    # -- the optimizer's hooks -------------------------------------------------------------------------------

    def attach(self, driver: Driver | None = None) -> None:
        """Ride on the optimizer: everything below happens inside `optimizer.step()`."""
        self._driver = driver
        self._handles = [
            self._optimizer.register_step_pre_hook(self._pre),
            self._optimizer.register_step_post_hook(lambda *_: self.after_step()),
        ]

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _pre(self, optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> Any:
        self._ready = False
        wrapped = with_closure(args, kwargs, self.before_step)
        if wrapped is None:
            self.before_step()
        return wrapped

    def before_step(self) -> None:
        """Measure resistance on the gradients that the step is about to use."""
        if torch._C._current_graph_task_id() != -1:
            raise ConfigError(
                "the optimizer steps inside of backward(), where other gradients still need the weights as they are: "
                "step when backward() is done"
            )
        # A fused optimizer under a gradient scaler runs its hooks also when the scaler found an infinity and
        # nothing will move; it then carries `found_inf`, and gradients are still scaled.
        found_inf = getattr(self._optimizer, "found_inf", None)
        self._ready = found_inf is None or not bool(found_inf.item())
        self._ready = self._ready and not self._only_for_state()
        if self._ready and not self._rests():
            self._whole(self._before_step)
            self.tell()

    def _only_for_state(self) -> bool:
        """A step of learning rate 0 on gradients of 0: `torch.distributed.checkpoint` makes one to have a state."""
        if not all(_is_zero(group.get("lr")) for group in self._optimizer.param_groups):
            return False
        return shards.are_zero({name: p.grad for name, p in self._parameters().items()}, self._parameters())

    def _before_step(self) -> None:
        scale = getattr(self._optimizer, "grad_scale", None)
        if self._fading is not None and self._fading.batch.moved(self._parameters()):
            self._regroup([self._fading])
        if self._driver is not None:
            self._driver.before_step()
        watch = self._watch
        if self._fading is not None and watch is not None and watch.wants(self._fading, self.step) is None:
            watch.rest()
            self._exchange = None
        elif self._fading is not None and watch is not None:
            parameters = self._parameters()
            gradients = Gradients(parameters)
            network = Network(self.structures, parameters, self._optimizer, self.smooth.roles, gradients)
            watch.before(self._fading, self.step, network, self.fading(), scale)
            if self.rectify is not None and self.rectify.exchanges:
                self._compare(self._fading, watch, gradients, scale)
        if self._driver is not None:
            self._driver.add_gradients(scale)

    def after_step(self) -> None:
        """Judge, decay, hold."""
        if not self._ready:
            return
        self._ready = False
        if self._rests():
            self.step += 1
            return
        self._whole(self._after_step)
        self.tell()

    def _rests(self) -> bool:
        return (
            self._fading is None
            and self._holding is None
            and self._driver is not None
            and self._driver.rests()
        )

    def _after_step(self) -> None:
        reading = None
        if self._fading is not None and self._watch is not None:
            self._fading, reading = self._watch.after(self._fading, self._parameters())
            if self._weighed is not None:
                self._exchange, self._weighed = self._weighed(), None
        batch = self._fading.batch if self._fading is not None else None
        if self._driver is not None and self._driver.moved():
            reading = None
        self.step += 1
        if self._fading is not None:
            self._fade(self._fading, reading if self._fading.batch is batch else None)
        self.keep_zero()
        if self._driver is not None:
            self._driver.after_step()

    def _whole(self, part: Callable[[], None]) -> None:
        """All of a part of a step, or none of it: an exception anywhere in it puts everything back.

        What the driver cannot do is said once: an error of ours that leaves it is the end of pruning.
        """
        before, gradients = self.book(), torch.is_grad_enabled()
        put_back = None if self._driver is None else self._driver.snapshot()
        try:
            part()
        except BaseException as error:
            torch.set_grad_enabled(
                gradients
            )  # torch's own contexts do not survive an interrupt on their way out
            self.restore(before)
            if put_back is not None:
                put_back()
            if self._driver is not None and isinstance(error, DecayPruningError):
                self._driver.failed(error)
            raise

    def book(self) -> dict[str, Any]:
        """The book-keeping as it is, for `restore`."""
        names = ("structures", "step", "counts", "held", "_fading", "_holding", "_picks_made", "_pick_sizes",
                 "_free_again", "_on_the_way", "_untold", "_exchange", "_weighed")  # fmt: skip
        book = {name: getattr(self, name) for name in names}
        copies = {n: v.copy() for n, v in book.items() if isinstance(v, dict | list)}
        return book | copies | {"counts": Counts(**vars(self.counts))}

    def restore(self, book: Mapping[str, Any]) -> None:
        """The book-keeping as it was; what is watched is read anew."""
        self.__dict__.update(book)
        if self._watch is not None:
            self._watch.forget()

    def tell(self) -> None:
        """Pass on what has happened, now that all of it has."""
        while self._untold:
            event = self._untold.pop(0)
            if self._on_event is not None:
                self._on_event(event)

    # -- what the driver asks for ----------------------------------------------------------------------------

    def pick(self, picks: Picks, steps: int, *, rectified: bool = True) -> None:
        """Let these structures fade over the next `steps` optimizer steps.

        Raises:
            ConfigError: a structure does not exist (any more), decays already, or is held; nothing was picked.
        """
        if steps < 1:
            raise ConfigError(f"a decay takes at least 1 step, not {steps}")
        picks = {name: sorted({int(i) for i in ids}) for name, ids in picks.items() if len(ids)}
        busy = set(self.decaying) | set(as_keys(self.held))
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
        norms = self._agree(new.norms(self._parameters()))
        figures = len(self._figures)
        fresh = Fading.of_pick(new, norms, self.step, steps, figures, rectified and steps > 1)
        self.counts.picked += new.slots
        self.counts.picked_again += sum(key in self._free_again for key in new.keys)
        self._regroup([*([self._fading] if self._fading else []), fresh])
        picked, released = self._pick_sizes.get(self.step, (0, 0))
        self._pick_sizes[self.step] = picked + new.slots, released
        self._emit("picked", new.keys, {"norm": joint(new, norms)})

    def removed(self, structures: StructureSet) -> None:
        """Surgery has removed what was held; `structures` is what is left."""
        keys = as_keys(self.held)
        self.structures = structures
        self.held = {}
        self._holding = None
        self.counts.removed += len(keys)
        if self._fading is not None:
            self._regroup([self._fading])
        self._emit("removed", keys, {})

    def keep_zero(self) -> None:
        """Zero what is held, after somebody else has moved the weights."""
        if self._holding is not None:
            self._holding.zero_(self._parameters())

    def let_go(self) -> None:
        """End everything: what decays stays as it is, and what is held at zero is free to grow again."""
        self.held, self._holding, self._fading, self._pick_sizes = {}, None, None, {}
        self._on_the_way = self._exchange = self._weighed = None

    def fade_out(self) -> None:
        """End every decay at once: what decays is set to zero and held."""
        if self._fading is not None:
            everything = torch.ones(self._fading.batch.slots, dtype=torch.bool)
            self._hold(self._fading, everything)
            self._regroup([self._fading], leave=everything)

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
            for name, ids in as_picks([*self.decaying, *as_keys(self.held)]).items():
                masks[name][self.structures.groups[name].rows(ids)] = True
            self._on_the_way = stamp, masks
        return self._on_the_way[1]

    def released(self, picks: Picks) -> set[Key]:
        """Those of `picks` that have been released before."""
        return set(as_keys(picks)) & self._free_again.keys()

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
        """Averages so far of each decaying structure, by the names of `Resistance`, as far as they are measured."""
        if self._fading is None or self.rectify is None:
            return {}
        rows = self._fading.mean.T.tolist()
        figures = self.rectify.figures
        return {k: dict(zip(figures, r, strict=True)) for k, r in zip(self.decaying, rows, strict=True)}

    # -- saving ----------------------------------------------------------------------------------------------

    @property
    def _figures(self) -> list[str]:
        """What SR averages of each decaying structure."""
        return [] if self.rectify is None else list(self.rectify.figures)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bit for bit, in plain containers and tensors."""
        return {
            "step": self.step,
            "counts": vars(self.counts).copy(),
            "held": {name: list(ids) for name, ids in self.held.items()},
            "picks_made": self._picks_made,
            "pick_sizes": [[begun, *sizes] for begun, sizes in self._pick_sizes.items()],
            "free_again": [[name, index, free] for (name, index), free in self._free_again.items()],
            "fading": None if self._fading is None else self._fading.state_dict(),
            "figures": self._figures,
            "kept": self._saved_weights(),
            "exchange": None if self._exchange is None else self._exchange.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`; the structures must be those of the moment when it was made."""
        self._on_the_way = None
        self.step = checked(state["step"], Count, "step")
        self.counts = Counts(**{name: checked(n, Count, name) for name, n in state["counts"].items()})
        self._picks_made = checked(state["picks_made"], Count, "picks_made")
        self._free_again = {(name, index): free for name, index, free in state["free_again"]}
        self._pick_sizes = {begun: (picked, released) for begun, picked, released in state["pick_sizes"]}
        self.held = {name: list(ids) for name, ids in state["held"].items()}
        self._holding = self._batch(self.held, Role) if self.held else None
        self._fading = None
        if state["fading"] is not None:
            measured = list(state.get("figures", self._figures))
            if not set(self._figures) <= set(measured) or (measured and not self._figures):
                raise ConfigError(
                    f"SR had measured {state['figures'] or 'nothing'} there, and measures "
                    f"{self._figures or 'nothing'} here"
                )
            batch = self._batch(state["fading"]["picks"])
            fading = Fading.from_state(batch, state["fading"], len(measured))
            rows = [measured.index(name) for name in self._figures]
            self._fading = fading.with_averages(fading.mean[rows], fading.seen)
            if set(self.decaying) & set(as_keys(self.held)):
                raise ConfigError("a structure both decays and is held")
            self._load_weights(self._fading.batch, state["kept"])
        self._exchange = None
        if (exchange := state.get("exchange")) is not None:  # older states have none
            self._exchange = Exchange.from_state(
                exchange, self.structures, self._parameters(), self.smooth.roles
            )

    def _saved_weights(self) -> dict[str, Any] | None:
        """The decaying weights as they were left, where the next step is measured from them."""
        kept = self._watch and self._fading and self._watch.kept_of(self._fading.batch)
        if not kept or self._fading is None or not self._fading.batch.whole:
            return None
        copies = [None if v is None else v.cpu().clone() for v in (kept.flat, *kept.blocks)]
        return {"flat": copies[0], "blocks": copies[1:]}

    def _load_weights(self, batch: SliceBatch, saved: Mapping[str, Any] | None) -> None:
        if self._watch is not None and saved is not None:
            self._watch.keep(batch, batch.as_values(saved["flat"], saved["blocks"]))

    # -- one step --------------------------------------------------------------------------------------------

    def _fade(self, fading: Fading, reading: Reading | None) -> None:
        """Judge, and shrink what is not released."""
        batch, parameters = fading.batch, self._parameters()
        released = self._judge(fading)
        cohorts, number = fading.cohorts
        left = fading.of_cohorts([self.smooth.left(self.step - begun, steps) for begun, steps in cohorts])
        reading = batch.read(parameters) if reading is None else reading
        if any(self.step - begun in (1, steps) for begun, steps in cohorts):
            reading = reading._replace(norms=self._agree(reading.norms))
        shrink = factors(batch, reading.norms, fading.start, left, self.smooth)
        if released is not None:
            shrink = torch.where(released.to(batch.device)[batch.slice_slot], 1.0, shrink)
        keep = self._watch is not None and self._watch.needs_weights(fading, self.step)
        values = batch.scale_(parameters, reading, shrink, keep=keep)
        if self._watch is not None:
            self._watch.keep(batch, values)
        over = [self.step - begun >= steps for begun, steps in cohorts]
        ended = torch.tensor(over)[number] if any(over) else None
        if released is not None:
            self._release(fading, released)
        if ended is not None:
            self._hold(fading, ended)
        leave = [each for each in (released, ended) if each is not None]
        if leave:
            self._regroup([fading], leave=torch.stack(leave).any(0))

    def _judge(self, fading: Fading) -> Tensor | None:
        """Which structures are released now, shape (slots,), on the CPU; None for none. The last step never judges."""
        if self.rectify is None or self._watch is None:
            return None
        cohorts, number = fading.cohorts
        judged = [
            self.rectify.judges(self.step - begun, steps) and self._may_release(begun)
            for begun, steps in cohorts
        ]
        if not any(judged):  # nothing is asked of the device in such a step
            return None
        candidates = torch.tensor(judged)[number] & fading.rectified & fading.seen.gt(0)
        if not bool(candidates.any()):
            return None
        strength = self._agree(self.rectify.strength(self._watch.averages(fading))).cpu()
        candidates &= strength.gt(-torch.inf)
        if self.rectify.exchanges:
            candidates = self._exchanged(fading, candidates, strength)
        released = self._most_resistant(fading, candidates, strength, self.rectify)
        return released if bool(released.any()) else None

    def _may_release(self, begun: int) -> bool:
        """Whether the pick that was made in this step may lose more of its structures."""
        picked, released = self._pick_sizes[begun]
        return self.rectify is not None and released < self.rectify.most(picked)

    def _compare(self, fading: Fading, watch: Watch, gradients: Gradients, scale: Tensor | None) -> None:
        """Weigh what the host would take in place of what decays, while a verdict on that is coming."""
        self._weighed = None
        watched = watch.wants(fading, self.step)
        if watched is None or self._driver is None or not self._is_rectified(fading, watched):
            self._exchange = None
            return
        parameters = self._parameters()
        if self._exchange is None or self._exchange.structures is not self.structures:
            offer = self._driver.replacements()
            self._exchange = Exchange.of(self.structures, offer, parameters, self.smooth.roles)
        self._weighed = self._exchange.later(parameters, gradients, scale)

    def _is_rectified(self, fading: Fading, watched: list[bool]) -> bool:
        """Whether any structure of these cohorts can be released."""
        rectified = fading.rectified.numpy()
        return any(w and rectified[fading.cohorts[1].numpy() == c].any() for c, w in enumerate(watched))

    def _exchanged(self, fading: Fading, candidates: Tensor, worth: Tensor) -> Tensor:
        """Those of the candidates that are worth more than what would go in their place."""
        chosen, mine = torch.zeros_like(candidates), candidates.nonzero().flatten()
        if self._exchange is not None and self.rectify is not None and mine.numel():
            keys = [fading.batch.keys[i] for i in mine.tolist()]
            rows, self._exchange = self._exchange.releases(
                keys, worth[mine].tolist(), self.fading(), self.rectify.margin
            )
            chosen[mine[rows]] = True
        return chosen

    def _most_resistant(
        self, fading: Fading, out: Tensor, strength: Tensor, rectify: SelfRectifying
    ) -> Tensor:
        """Of those to be released, the most resistant of each pick, as many as may still go."""
        chosen = torch.zeros_like(out)
        for begun in fading.begun[out].unique().tolist():
            picked, released = self._pick_sizes[begun]
            mine = (out & fading.begun.eq(begun)).nonzero().flatten()
            order = torch.argsort(strength[mine], descending=True, stable=True)
            chosen[mine[order][: rectify.most(picked) - released]] = True
        return chosen

    def _release(self, fading: Fading, released: Tensor) -> None:
        assert self.rectify is not None
        keys = [fading.batch.keys[i] for i in released.nonzero().flatten().tolist()]
        for key in keys:
            self._free_again[key] = self._picks_made + self.rectify.cooldown
        for begun in fading.begun[released].tolist():
            picked, before = self._pick_sizes[begun]
            self._pick_sizes[begun] = picked, before + 1
        self.counts.released += len(keys)
        mean = fading.mean[:, released.to(fading.mean.device)]
        self._emit("released", keys, dict(zip(self.rectify.figures, mean, strict=True)))

    def _hold(self, fading: Fading, ended: Tensor) -> None:
        keys = [fading.batch.keys[i] for i in ended.nonzero().flatten().tolist()]
        self.counts.decayed += len(keys)
        self.held = as_picks([*as_keys(self.held), *keys])
        self._holding = self._batch(self.held, Role)
        self._holding.zero_(self._parameters())

    # -- helpers ---------------------------------------------------------------------------------------------

    def _batch(self, picks: Picks, roles: Iterable[Role] | None = None) -> SliceBatch:
        return shards.batch(
            self.structures, picks, self._parameters(), self.smooth.roles if roles is None else roles
        )

    def _regroup(self, parts: list[Fading], leave: Tensor | None = None) -> None:
        """Put decaying structures together anew, less those of `leave`, and carry their figures over."""
        keys = [key for part in parts for key in part.batch.keys]
        keep = [True] * len(keys) if leave is None else (~leave).tolist()
        stay = [key for key, k in zip(keys, keep, strict=True) if k]
        if not stay:
            self._fading = None
            self._pick_sizes = {}
            return
        self._fading = self._numbers.carry(parts, self._batch(as_picks(stay)))

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
            self._untold.append(event)


def _is_zero(rate: Any) -> bool:
    """Whether a learning rate is zero, as far as that can be seen without waiting for a device."""
    if isinstance(rate, Tensor):
        return rate.device.type == "cpu" and not bool(rate.any())
    return isinstance(rate, int | float) and rate == 0
