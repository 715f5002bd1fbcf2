"""The pruner: puts a host, the engine and surgery together inside the user's own training loop.

pruner = Pruner(model, example_inputs, optimizer, Target(macs=0.5), total_steps=len(loader) * epochs)
...                      # the loop as it was; optimizer.step() drives everything
report = pruner.finish()
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Annotated, Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from decay_pruning import copies, optimizers, processes, proof, sharding, shards, surgery
from decay_pruning.budget import WITHIN, Cost, CostModel, Target, amount, as_target
from decay_pruning.checks import Count, Whole, as_inputs, checked
from decay_pruning.decay import SmoothPruning
from decay_pruning.engine import Engine, Event
from decay_pruning.errors import BudgetError, ConfigError, DecayPruningError, SurgeryError
from decay_pruning.exchange import Replacements
from decay_pruning.fading import Key, as_keys
from decay_pruning.hosts import Goal, Host, Phase, Picker, Scene, as_host
from decay_pruning.plan import Plan
from decay_pruning.progress import Progress, PruningReport
from decay_pruning.rectify import SelfRectifying
from decay_pruning.state import unwrapped
from decay_pruning.structures import Picks, StructureSet
from decay_pruning.valueless import is_valueless

logger = logging.getLogger("decay_pruning")

T = TypeVar("T")
_Smooth = Annotated[SmoothPruning | None, "SmoothPruning(), or None for its defaults"]
_Rectify = Annotated[SelfRectifying | None, "SelfRectifying(), or None for never"]
_OnEvent = Annotated[Callable[[Event], None] | None, "a function that takes an Event, or None"]
#: When what has faded is cut.
Removal = Literal["at once", "at finish"]
_Also = Annotated[tuple[Any, ...], "a list of copies of the model"]
#: Containers that pickers change in place.
_PLAIN = (dict, list, set)
#: Below this share of its structures a layer group is close to nothing.
_NARROW = 0.05
#: Rounds after which picks that do not lead to the target are an error.
_EXTRA_ROUNDS = 20
#: What is asked for in place of released structures: shares of what the target leaves, each beyond the one before.
_REPLACED = (0.02, 0.05, 0.1, 0.2, 0.4)


class Pruner:
    """Prunes a model while it trains.

    Args:
        model: the model, plain or in the wrapper that trains it (`torch.compile`, DistributedDataParallel): what is
            inside is pruned, `pruner.model`. Its parameters keep their identity.
        example_inputs: a tensor, a tuple for `model(*inputs)`, or a dict for `model(**inputs)`, on the model's device.
            A batch of one is enough, and makes MACs comparable with papers.
        optimizer: the optimizer of the training loop; any from `torch.optim`, or made like those. Where several train
            the model (Muon beside AdamW, backbone beside head), a list of all: the state of each is cut, and the steps
            of the first are counted.
        target: what is to be left. A bare float is the fraction of MACs.
        host: the method that picks; a function (scene, goal) → picks is one, too.
        smooth: how picked structures fade; `SmoothPruning.one_step()` prunes at once, as the host alone would.
        rectify: when picks are let go again, or None for never. The arms of a comparison differ by these two settings.
        total_steps: optimizer steps that the training will take from here; needed where N is a fraction.
        start: optimizer steps before the first pick (for sparse learning).
        removal: "at once" cuts what has come to the end of its decay in that very step; "at finish" holds it at zero,
            and `finish()` cuts everything in one go: no shape changes while training goes on. None for "at finish"
            where the model is wrapped or sharded, and "at once" otherwise.
        also: copies of the model that are cut along with it: averages of the weights, momentum encoders. torch's own
            `AveragedModel` need not be named; it follows when it is updated next.
        on_event: called with every `Event`.
        group: the processes that train this model together, as a torch process group; None for all that there are.
            Each of them builds the pruner.

    A model that is sharded (`fully_shard`) is pruned through a plain copy, `pruner.model`, which every process keeps on
    the device of the example inputs; `finish()` fills it and cuts it.

    Raises:
        ConfigError: settings that contradict each other.
        GraphError: the model cannot be traced, or nothing in it can be pruned.
        BudgetError: the target is out of reach even if all that can go goes.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        optimizer: Optimizer | Sequence[Optimizer],
        target: Target | float,
        *,
        host: Host | Callable[[Scene, Goal], Picks] | None = None,
        smooth: SmoothPruning | None = None,
        rectify: SelfRectifying | None = None,
        total_steps: int | None = None,
        start: int = 0,
        removal: Removal | None = None,
        also: Sequence[Any] = (),
        on_event: Callable[[Event], None] | None = None,
        group: Any = None,
    ) -> None:
        trained = self.model = unwrapped(checked(model, nn.Module, "model"))
        self.target = as_target(target)
        if group is not None and self.target.of == "latency":  # times are agreed upon by all that there are
            raise ConfigError(
                "a latency target takes all processes: leave group out, or give a target of MACs, parameters or memory"
            )
        self.host = as_host(host)
        self.smooth: SmoothPruning = checked(smooth, _Smooth, "smooth") or SmoothPruning()
        self.rectify: SelfRectifying | None = checked(rectify, _Rectify, "rectify")
        self.start: int = checked(start, Count, "start")
        self.total_steps: int | None = checked(total_steps, Whole | None, "total_steps")
        wrapper = None if self.model is model else type(model).__name__
        removal = checked(removal, Removal | None, "removal")
        self._shards = shards.shards_of(trained)
        self.removal: Removal = removal or ("at finish" if wrapper or self._shards is not None else "at once")
        if self.removal == "at once" and wrapper not in (None, "OptimizedModule"):
            raise ConfigError(
                f"the model is wrapped in {wrapper}, which keeps the shapes of its parameters: removal='at once' would "
                "need a new wrapper after each removal; leave it out, or give the plain model and wrap it afterwards"
            )
        on_event, example_inputs = checked(on_event, _OnEvent, "on_event"), as_inputs(example_inputs)
        self.example_inputs = example_inputs
        self._ranks = processes.Ranks.of(model, group)
        if self._shards is not None:
            sharding.check_use(self.removal, self.host, also)
            self.model = sharding.plain(trained, proof.device_of(example_inputs))
            self._ranks = processes.Ranks(self._shards.groups, self._shards.mesh.device_type)
        model = self.model
        chains = [optimizers.chain(each) for each in optimizers.given(optimizer)]
        self._chain = [each for chain in chains for each in chain]
        self._place = proof.place_of(model)
        self._optimizer = chains[0][-1]
        self._parameters = dict(trained.named_parameters()) if self._shards is None else self._shards
        self._check(model)
        optimizers.check(self._chain, trained)
        optimizers.check_free(self._parameters.values())
        self._also = copies.given(checked(also, _Also, "also"), model)

        self.graph = self.host.graph(model, example_inputs)
        self.original: StructureSet = self.graph.structures
        self._goals: dict[tuple[Cost, float, bool], Goal] = {}
        self._costs = CostModel(model, example_inputs, self.original, self.target)
        self.before: Cost = self._costs.now
        self._ranks.check(self.original, self.before, self.target, self.start, self.total_steps)
        if self._shards is not None:
            self._shards.check(self.original)
        self.engine = Engine(
            self.original,
            lambda: self._parameters,
            self._optimizer,
            self.smooth,
            rectify,
            on_event,
            self._ranks.alike if self._shards is None else None,
        )
        self._picker = self.host.begin()
        self._picker.check(self._scene(), self._goal(1.0))
        self._picker.attach(self._scene())
        self._round = 0  # picks made
        self._due = self.start  # step of the next pick
        self._finished_at = 0
        self._left: tuple[Mapping[str, Tensor], Cost] = {}, self.before
        self._attached_at = 0
        self._given_up: str | None = None
        self._still: list[surgery.Still] = []  # of the step that is being made
        self._check_state()
        if self.removal == "at once":
            optimizers.check_kept(optimizers.given(optimizer), self._touched())
        self.engine.attach(self)
        self._others = optimizers.Others(self._chain, self._optimizer, self._touched(), self.engine.keep_zero)
        optimizers.claim(self._touched().values(), self)
        self._links = optimizers.links(trained, self._touched())

    # -- for the user ----------------------------------------------------------------------------------------

    @property
    def structures(self) -> StructureSet:
        """What can still be pruned, in current positions."""
        return self.engine.structures

    @property
    def done(self) -> bool:
        """The target is met and nothing is decaying or waiting for its removal, other than that of `finish()`."""
        return not self.engine.decaying and not self._waiting and self._met(self._goal(1.0))

    def progress(self) -> Progress:
        """Where the pruner is; cheap."""
        return Progress(
            step=self.engine.step,
            round=self._round,
            macs=self._costs.now.macs,
            params=self._costs.now.params,
            macs_start=self.before.macs,
            params_start=self.before.params,
            decaying=len(self.engine.decaying),
            held=_count(self.engine.held),
            released=self.engine.counts.released,
            removed=self.engine.counts.removed,
            macs_left=self._cost_left().macs,
        )

    def norms(self) -> dict[str, float]:
        """ "layer group:index" → norm now over norm at the pick, for what is decaying."""
        return {f"{name}:{index}": value for (name, index), value in self.engine.norms().items()}

    def phase(self) -> Phase | None:
        """What the host wants the next step to be, for loops that follow it; None for hosts without phases.

        >>> if (phase := pruner.phase()) and phase.lr is not None:  # doctest: +SKIP
        ...     optimizer.param_groups[0]["lr"] = phase.lr
        """
        return self._picker.phase(self._scene())

    def plan(self) -> Plan:
        """What the host would pick for the whole target now; nothing is touched."""
        self._gather()
        picks = self._ranks.first(self._picker.pick(self._scene(), self._goal(1.0, try_out=True)))
        by = f"by {type(self.host).__name__}"
        return Plan.of(self.structures, picks, self._costs, verified=self.graph.verified, picked=by)

    def finish(self, *, force: bool = False) -> PruningReport:
        """End pruning: check the target, take the hooks off the optimizer, and report.

        Args:
            force: end decays that are still on their way at once, and prune what is missing in one step.

        Raises:
            BudgetError: the target is not met yet. Nothing is lost: the hooks stay, and training can go on.
        """
        if self._given_up is not None:
            raise BudgetError(f"pruning was given up at step {self.engine.step}: {self._given_up}")
        if force and not self.done:
            self._force()
        if not self.done:
            raise BudgetError(self._how_far())
        if self.engine.held:
            self._told(self._remove)
            if not self.done:  # measured, it is not what was predicted
                raise BudgetError(self._how_far())
        self._detach()
        return self.report()

    def cancel(self) -> PruningReport:
        """Stop pruning for good: take the hooks off, and leave the network as it is.

        What has been removed stays removed. What decays or has come to zero stays in the network, and is free to grow
        again.
        """
        self._given_up = self._given_up or "it was cancelled"
        self.engine.let_go()
        self._detach()
        return self.report()

    def __repr__(self) -> str:
        given_up = f"; given up: {self._given_up}" if self._given_up else ""
        return f"Pruner({type(self.host).__name__}, {self.target}: {self.progress()}{given_up})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ConfigError(
            "a pruner cannot be copied or pickled, since it rides on the hooks of its optimizer: save "
            "pruner.state_dict(), and load it into a pruner on a copy of the original model"
        )

    def _detach(self) -> None:
        optimizers.let_go(self)
        self.engine.detach()
        self._others.detach()
        self._picker.detach(self._scene())

    def report(self) -> PruningReport:
        """What has been done so far."""
        counts = self.engine.counts
        widths = {
            name: (len(group), len(self.structures.groups[name]))
            for name, group in self.original.groups.items()
        }
        return PruningReport(
            macs=(self.before.macs, self._costs.now.macs),
            params=(self.before.params, self._costs.now.params),
            structures=(len(self.original), len(self.structures)),
            latency=_pair(self.before.latency, self._costs.now.latency),
            memory=_pair(self.before.memory, self._costs.now.memory),
            picked=counts.picked,
            decayed=counts.decayed,
            released=counts.released,
            picked_again=counts.picked_again,
            removed=counts.removed,
            rounds=self._round,
            steps=self._finished_at or self.engine.step,
            widths=widths,
            unprunable=dict(self.original.unprunable),
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bit for bit, in plain containers and tensors (`torch.load(weights_only=True)`)."""
        removed = {
            name: sorted(set(group.ids.tolist()) - set(self.structures.groups[name].ids.tolist()))
            for name, group in self.original.groups.items()
        }
        return {
            "version": 2,
            "host": type(self.host).__name__,
            "structures": {name: len(group) for name, group in self.original.groups.items()},
            "removed": {name: ids for name, ids in removed.items() if ids},
            "round": self._round,
            "due": self._due,
            "finished_at": self._finished_at,
            "before": asdict(self.before),
            "engine": self.engine.state_dict(),
            "picker": self._picker.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`, in a pruner on the *original* model.

        The model and its optimizer are first made as narrow as they were, so load *their* states after this one.

        Raises:
            ConfigError: the state belongs to another model, or this pruner has already removed something.
        """
        own = {name: len(group) for name, group in self.original.groups.items()}
        if not isinstance(state, Mapping) or not _equal(state.get("version"), 2):
            raise ConfigError("this is no state of a pruner, or one of another version of this library")
        if not _equal(state.get("structures"), own):
            raise ConfigError("this state was saved for another model: its layer groups or widths differ")
        if not _equal(state.get("host"), type(self.host).__name__):
            raise ConfigError(
                f"this state was saved with the host {state.get('host')!r}, and this pruner has "
                f"{type(self.host).__name__}"
            )
        if self.structures is not self.original or self.engine.step:
            raise ConfigError(
                "load the state into a fresh pruner on the original model, before any training step"
            )
        still = surgery.Still([self.model, *self._also], self._chain)
        put_back = self.snapshot()
        engine = self.engine.book()
        try:
            self._load(state)
        except BaseException as error:
            still.put_back()
            put_back()
            self.engine.restore(engine)
            if isinstance(error, Exception):
                why = error if isinstance(error, DecayPruningError) else f"{type(error).__name__}: {error}"
                raise ConfigError(
                    f"this state is damaged or was saved with other settings; nothing was loaded ({why})"
                ) from error
            raise

    def _load(self, state: Mapping[str, Any]) -> None:
        if state["removed"] and self._shards is not None:
            raise ConfigError("its structures are removed, and the model is sharded at their width")
        if state["removed"]:
            surgery.check_picks(self.original, state["removed"])
            kept = self.original.kept(state["removed"])
            scaled = surgery.scaled_by(self.model, self.original, kept)
            surgery.shrink(self.model, kept, self._chain, scaled)
            for each in self._also:
                copies.prune_like(each, self.model)
        structures = self.original.without(state["removed"])
        self.engine.structures = structures
        self._costs = CostModel(self.model, self._inputs(), structures, self.target, self._costs)
        self.before = Cost(**state["before"])
        self._round = checked(state["round"], Count, "round")
        self._due = checked(state["due"], Count, "due")
        self._finished_at = checked(state["finished_at"], Count, "finished_at")
        self.engine.load_state_dict(state["engine"])
        self._picker.load_state_dict(state["picker"])

    # -- the engine's driver ---------------------------------------------------------------------------------

    def rests(self) -> bool:
        """Whether there is nothing to do in this step: nothing to pick yet or any more, for a host that only picks."""
        if not self._picker.rests or self._waiting or self.engine.step - self._attached_at < 3:
            return False
        return self.engine.step < self._due or (
            self._goal(1.0).met(self._costs.now) and self._met(self._goal(1.0))
        )

    def before_step(self) -> None:
        """Pick, when it is time; hosts that time themselves pick in `moved`."""
        self._check_parameters()
        idle = not self.engine.decaying and not self._waiting
        due = bool(self.host.rounds) and self.engine.step >= self._due
        if idle and due and not self._met(self._goal(1.0)):
            self._pick()

    def add_gradients(self, scale: Tensor | None) -> None:
        """The host's own part in training, before the optimizer moves."""
        self._picker.add_gradients(self._scene(), scale)

    def moved(self) -> bool:
        """What a host that times itself picks starts to fade in this very step.

        No structure is released twice, so there is always a way to the target; and the share that may be released is
        one of all picks so far, since single picks can be as small as one structure.
        """
        if self.host.rounds or not self._wanting():
            return False
        picks = self._ask(self._picker.moved, self._goal(1.0, try_out=True))
        if not any(len(ids) for ids in picks.values()):
            return True
        self._check_widths(picks)
        self._round += 1
        again = self.engine.released(picks)
        released, picked = self.engine.counts.released, self.engine.counts.picked
        share = self.rectify is not None and released < self.rectify.most(picked + _count(picks))
        for part, rectified in ((_less(picks, again), share), (_only(picks, again), False)):
            if part:
                self.engine.pick(part, self._steps(), rectified=rectified)
        return True

    def after_step(self) -> None:
        """Remove what has come to the end of its decay, when the host agrees."""
        if self.engine.step - self._attached_at in (1, 2):  # others may step after the one that is counted
            self._check_state()
        if self._waiting or self._goal(1.0).met(self._costs.now):
            self._still.append(surgery.Still([self.model, *self._also], self._chain))
        if self._waiting and self._picker.may_remove(self._scene()):
            self._remove()
            self._due = self.engine.step + self.host.interval
        if self.removal == "at finish" and self.engine.decaying:
            self._due = self.engine.step + self.host.interval
        self._picker.after_step(self._scene())

    def replacements(self) -> Replacements:
        """What the host would pick next, for a goal that is closer and closer."""
        self._gather()
        scene, left = self._scene(), getattr(self._cost_left(), self.target.of)
        fading, parts = scene.fading(), list[Picks]()
        with torch.random.fork_rng(devices=[]):  # an importance can be random: training must not notice
            for share in _REPLACED:
                try:
                    picks = self._picker.pick(scene, replace(self._goal(1.0), at_most=(1 - share) * left))
                except BudgetError:
                    break
                parts.append(_less(picks, {key for part in parts for key in as_keys(part)}))
        parts = self._ranks.first(parts)
        return Replacements(parts, {name: self._costs.price(name, self.target.of, fading) for name in fading})

    def snapshot(self) -> Callable[[], None]:
        """What puts the pruner, and the model where it was about to be cut, back as they are now."""
        names = ("_round", "_due", "_finished_at", "_costs", "_left", "_picker", "before")
        before = {name: getattr(self, name) for name in names}
        picker = _copied(self._picker)
        still = self._still = []

        def put_back() -> None:
            for each in still:
                each.put_back()
            self.__dict__.update(before)
            self._picker.__dict__.clear()
            self._picker.__dict__.update(picker)

        return put_back

    def failed(self, error: DecayPruningError) -> None:
        """What was refused is said once: the pruner lets go, and training can go on."""
        self._given_up = str(error)
        self.cancel()
        logger.warning("pruning is given up at step %d: %s", self.engine.step, error)

    @property
    def _waiting(self) -> bool:
        """Whether something is to be removed as soon as the host agrees."""
        return bool(self.engine.held) and self.removal == "at once"

    def _wanting(self) -> bool:
        """Whether more has to be picked: training has come to `start`, and what is fading does not meet the target."""
        return self.engine.step >= self.start and not self._goal(1.0).met(self._cost_left())

    def _met(self, goal: Goal) -> bool:
        """Whether what is fading is all that has to go."""
        return goal.met(self._cost_left()) and self._picker.settled(self._scene())

    def _cost_left(self) -> Cost:
        """Cost when everything that is fading is gone."""
        fading = self.engine.fading()
        if self._left[0] is not fading:
            self._left = fading, self._costs.after(fading)
        return self._left[1]

    # -- inside ----------------------------------------------------------------------------------------------

    def _pick(self) -> None:
        extra = (
            self._round - self.host.rounds
        )  # rounds beyond the planned ones: others in place of released ones
        retries = self.rectify.retries if self.rectify is not None else 0
        goal = self._goal(min(1.0, (self._round + 1) / self.host.rounds))
        self._round += 1
        if self._met(goal):  # an earlier round overshot this one's part of the way
            return
        if extra > retries + _EXTRA_ROUNDS:
            raise BudgetError(f"the host's picks do not lead to the target. {self._how_far()}")
        self.engine.pick(self._choose(goal), self._steps(), rectified=extra < retries)

    def _ask(self, ask: Callable[[Scene, Goal], Picks], goal: Goal) -> Picks:
        """Ask the host for picks; where there are none but structures that cool down, these are eligible again."""
        self._gather()
        try:
            picks = ask(self._scene(), goal)
        except BudgetError:
            if not self.engine.end_cooldown():
                raise
            picks = ask(self._scene(), goal)
        return self._ranks.first(picks)

    def _gather(self) -> None:
        """The plain copy of a sharded model as the model is by now."""
        if self._shards is not None:
            self._shards.fill(self.model)

    def _choose(self, goal: Goal) -> Picks:
        picks = self._ask(self._picker.pick, replace(goal, try_out=True))
        if not any(len(ids) for ids in picks.values()):
            raise BudgetError(f"the host picked nothing. {self._how_far()}")
        self._check_widths(picks)
        return picks

    def _check_widths(self, picks: Picks) -> None:
        for name, ids in picks.items():
            group = self.structures.groups.get(name)
            if group is None:
                continue
            left, whole = len(group) - len(set(ids)), len(self.original.groups[name])
            if left <= 0:
                raise ConfigError(f"the host picked all {len(group)} structures of {name!r}; one has to stay")
            if left < _NARROW * whole:
                logger.warning(
                    "%r keeps only %d of %d structures; with min_kept=0.1 the host leaves a tenth of every layer group",
                    name,
                    left,
                    whole,
                )

    def _remove(self) -> None:
        self._gather()
        left = self._cut()
        for each in self._also:
            copies.prune_like(each, self.model)
        copies.let_averages_follow(self.model)
        self.engine.removed(left)
        self._costs = CostModel(self.model, self._inputs(), left, self.target, self._costs)
        self._finished_at = self.engine.step

    def _cut(self) -> StructureSet:
        """Cut what is held, in all processes or in none."""
        still = surgery.Still([self.model], self._chain) if self._ranks.several else None
        left, problem = self.structures, None
        try:
            left = surgery.remove(
                self.model, left, self.engine.held, example_inputs=self._inputs(), optimizer=self._chain
            )
        except SurgeryError as error:
            problem = error
        if still is not None:
            processes.outdate(self.model)
            there = next((each for each in self._ranks.every(problem) if each is not None), None)
            if there is not None and problem is None:
                still.put_back()
            problem = problem or there
        if problem is not None:
            raise problem
        return left

    def _inputs(self) -> Any:
        """The example inputs, where and in which dtype the model is by now."""
        return proof.follow(self.example_inputs, self._place, proof.place_of(self.model))

    def _force(self) -> None:
        self._told(self._remove_the_rest)

    def _told(self, work: Callable[[], None]) -> None:
        try:
            work()
        finally:
            self.engine.tell()

    def _remove_the_rest(self) -> None:
        self.engine.fade_out()
        if self.engine.held and self.removal == "at once":
            self._remove()
        for _ in range(_EXTRA_ROUNDS):
            if self.done:
                return
            self.engine.pick(self._choose(self._goal(1.0)), 1, rectified=False)
            self.engine.fade_out()
            if self.removal == "at once":
                self._remove()

    def _steps(self) -> int:
        """N of the next decay."""
        left = None if self.total_steps is None else self.total_steps - self.engine.step
        if isinstance(self.smooth.steps, int):
            return self.smooth.steps if left is None else max(1, min(self.smooth.steps, left))
        assert self.total_steps is not None and left is not None
        if not self.host.rounds and self.host.interval:  # a share of the way from one pick to the next
            return max(1, round(self.smooth.steps * min(self.host.interval, left)))
        whole = self.smooth.steps * (self.total_steps - self.start)
        of_round = round(whole / max(1, self.host.rounds))
        return max(1, min(of_round, round(self.smooth.steps * max(left, 0)) or 1))

    def _goal(self, way: float, *, try_out: bool = False) -> Goal:
        """The absolute figure to reach after this part of the way (0 … 1) to the target."""
        key = self.before, way, try_out
        if (known := self._goals.get(key)) is not None:
            return known
        before = getattr(self.before, self.target.of)
        within = WITHIN if self.target.of == "latency" else 0.0
        at_most = self.target.at_most(before) * way + before * (1 - way)
        goal = self._goals[key] = Goal(self.target.of, at_most, self.target.weighs, within, try_out)
        return goal

    def _scene(self) -> Scene:
        return Scene(
            model=self.model,
            optimizer=self._optimizer,
            graph=self.graph,
            structures=self.structures,
            parameters=self._parameters if self._shards is None else dict(self.model.named_parameters()),
            costs=self._costs,
            step=self.engine.step,
            start=self.start,
            total=self.total_steps,
            goal=self._goal(1.0),
            decaying=len(self.engine.decaying),
            held=_count(self.engine.held) if self._waiting else 0,
            find_eligible=self.engine.eligible,
            find_fading=self.engine.fading,
            find_wanting=self._wanting,
            one_step=self.smooth.steps == 1,
        )

    def _how_far(self) -> str:
        left = self._costs.now if self.removal == "at once" else self._cost_left()
        now, before = (getattr(c, self.target.of) for c in (left, self.before))
        wanted = self.target.at_most(before)
        share = f"{100 * now / before:.1f} % of {self.target.of} are left, the target is {100 * wanted / before:.1f} %"
        if self.target.of in ("latency", "memory"):
            share = f"{share}: {amount(self.target.of, now)}, not {amount(self.target.of, wanted)}"
        if self.engine.decaying:
            return (
                f"{len(self.engine.decaying)} structures are still decaying at step {self.engine.step} ({share}): "
                "train on, choose fewer smooth.steps, or call finish(force=True) to end their decay at once"
            )
        return f"the target is not met after {self.engine.step} steps: {share}; train on or call finish(force=True)"

    def _check_state(self) -> None:
        """Optimizer state that cannot be cut is said before anything fades."""
        if self._shards is None:  # of shards nothing is cut
            optimizers.check_state(self._chain, self._touched())

    def _check_parameters(self) -> None:
        """The model still has the parameters that the pruner was built with."""
        for names, leaf, thing, name in self._links:
            if leaf not in names or names[leaf] is not thing:
                raise ConfigError(
                    f"{name!r} is not what it was when the pruner was built (a layer or weight was replaced, or the "
                    "model moved in a way that makes new ones): build another pruner"
                )

    def _touched(self) -> dict[str, Tensor]:
        """The parameters that a removal cuts."""
        touched = {c.tensor for group in self.structures.groups.values() for c in group.couplings}
        return {name: p for name, p in self._parameters.items() if name in touched}

    def _check(self, model: nn.Module) -> None:
        if is_valueless(model):
            raise ConfigError(
                "the model is on the meta device (all or parts of it), so it has no weights to train; "
                "inspect(model, inputs, target=…) makes a plan without them, and a pruner needs the model itself"
            )
        if isinstance(self.smooth.steps, float) and self.total_steps is None:
            raise ConfigError(
                f"smooth.steps = {self.smooth.steps:.3g} is a share of the training that is left: pass total_steps "
                "(e.g. len(loader) * epochs), or give smooth.steps as an int"
            )
        if self.total_steps is not None:
            planned = self.smooth.steps * self.host.rounds if isinstance(self.smooth.steps, int) else 0
            if self.start + planned > self.total_steps:
                raise ConfigError(
                    f"{self.host.rounds} rounds of {self.smooth.steps} steps after a start at {self.start} do not fit "
                    f"into total_steps = {self.total_steps}"
                )


def _pair(before: T | None, after: T | None) -> tuple[T, T] | None:
    return None if before is None or after is None else (before, after)


def _count(picks: Picks) -> int:
    return sum(len(ids) for ids in picks.values())


def _only(picks: Picks, keys: set[Key]) -> Picks:
    chosen = {name: [i for i in ids if (name, i) in keys] for name, ids in picks.items()}
    return {name: ids for name, ids in chosen.items() if ids}


def _less(picks: Picks, keys: set[Key]) -> Picks:
    return _only(picks, {(name, i) for name, ids in picks.items() for i in ids} - keys)


def _equal(found: object, expected: object) -> bool:
    """Equal, of what can be anything."""
    try:
        return bool(found == expected)
    except Exception:
        return False


def _copied(picker: Picker) -> dict[str, Any]:
    """What a picker knows, so that nothing it changes afterwards shows."""
    return {
        name: value.clone()
        if isinstance(value, Tensor)
        else copy.copy(value)
        if isinstance(value, _PLAIN)
        else value
        for name, value in vars(picker).items()
    }
