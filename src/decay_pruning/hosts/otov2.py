"""OTOv2 (Chen et al., ICLR 2023): train once from scratch, and end with a compressed network.

Structures are seen from their producer side, the *zero-invariant group* x: filter row, bias, norm γ and β. DHSPG (dual
half-space projected gradient) partitions them once, into important ones and a redundant set, and drives the
redundant ones to the origin while everything trains. With g the direction in which the optimizer moves (momentum,
Adam's moments and weight decay included) and η the learning rate, each step is, for a redundant x,

    x̂ = x − η·g                                     the optimizer's own step
    λ_g = λ                                          where ⟨x, g⟩ ≥ 0: descent shrinks x anyway
        = clip(amplify·λ_min, λ, coeff·λ)            elsewhere, and (λ_min + λ_max)/2 if that is above λ_max, with
          λ_min = −⟨x, g⟩/‖x‖                        below it the norm would grow
          λ_max = −‖g‖²·‖x‖/⟨x, g⟩                   above it the step would no longer descend
    x̂ ← x̂ − η·λ_g·x/‖x‖                             shrink
    x goes when ⟨x̂, x⟩ < ε·‖x‖²                      half-space test

until the target is met. Going means zero at once in one-step pruning (DHSPG itself), or the start of a decay.

This is no optimizer: g is read off what the user's optimizer did, so it rides on any. For SGD without momentum, the
published setting, g is known before the step, and shrinking before it saves a copy of the weights; the result is the
same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from decay_pruning.checks import Count, Positive, Share, Whole, above, at_least, check
from decay_pruning.errors import BudgetError
from decay_pruning.graph import Graph
from decay_pruning.hosts.base import Goal, Ignored, OutputNames, Picker, Scene
from decay_pruning.hosts.ranking import choose
from decay_pruning.slices import Sums
from decay_pruning.structures import Picks, Place, Role, StructureSet

DecayFrom = Literal["half-space", "partition"]
Deadline = (
    Annotated[int, at_least(1, what="a number of optimizer steps")]
    | Annotated[float, above(0, most=1, what="a share of the training that is left")]
)

#: The producer side of a structure.
ZERO_INVARIANT = frozenset({Role.ROW, Role.BIAS, Role.SCALE, Role.SHIFT})


@dataclass(frozen=True)
class OTOv2:
    """OTOv2 as a host. The partition takes place at the pruner's `start`.

    Attributes:
        lam: λ, the pull on redundant structures; None for the published 1e-3, or 1e-2 under Adam and AdamW.
        amplify: factor on λ_min; None for the published 2, or 20 under Adam and AdamW.
        coeff: λ_g is at most coeff·λ; None for the published 10, or 1000 under Adam and AdamW.
        epsilon: ε of the half-space test, in [0, 1). Larger lets structures go earlier.
        tolerance: how much larger the redundant set is than the target asks, as a share of the whole network
            (of what the target counts). From it come others in place of released ones.
        decay_from: where a decay starts: "half-space", when the test says so, or "partition", at once, from the norm
            that the structure has then. One-step pruning always waits for the half-space test.
        deadline: when what has not passed the half-space test goes all the same, those that have shrunk most first: an
            int counts optimizer steps since the partition, a float in (0, 1] is a share of the training that is left
            then (without effect where `total_steps` is unknown), None waits for ever.
        remove_every: optimizer steps between two removals of what is zero; 0 for a single one when the target is met.
        ignored: modules that keep their width: dotted names.
        heads: layers whose outputs are attention heads → number of heads; a structure is then the same offset in
            every head.
        allow_inexact: also prune where removal changes the function by its nature (a width under LayerNorm).
        min_kept: structures of a layer group that always stay.
        outputs: see `DepGraph`.

    Raises:
        ConfigError: a value is out of range or unknown.
    """

    lam: Positive | None = None
    amplify: Positive | None = None
    coeff: Positive | None = None
    epsilon: Share = 0.95
    tolerance: Share = 0.2
    decay_from: DecayFrom = "half-space"
    deadline: Deadline | None = 0.5
    remove_every: Count = 1000
    ignored: Ignored = ()
    heads: Mapping[str, Whole] = field(default_factory=dict)
    allow_inexact: bool = False
    min_kept: Whole = 1
    outputs: OutputNames = ()
    rounds: ClassVar[int] = 0
    interval: ClassVar[int] = 0

    def __post_init__(self) -> None:
        check(self, "host")

    def graph(self, model: nn.Module, example_inputs: object) -> Graph:
        """Find the structures of a model that have a producer side; the others are listed as not prunable."""
        graph = Graph(
            model,
            example_inputs,
            ignored=self.ignored,
            heads=self.heads,
            allow_inexact=self.allow_inexact,
            outputs=self.outputs,
        )
        groups = graph.structures.groups
        without = [n for n, g in groups.items() if not any(c.role in ZERO_INVARIANT for c in g.couplings)]
        graph.structures = replace(
            graph.structures,
            groups={name: group for name, group in groups.items() if name not in without},
            unprunable={
                **graph.structures.unprunable,
                **dict.fromkeys(without, "has no weights that produce it, which OTOv2 would drive to zero"),
            },
        )
        return graph

    def begin(self) -> Picker:
        """Set to work on a network."""
        return _DHSPG(self)

    def pull(self, optimizer: Optimizer) -> tuple[float, float, float]:
        """λ, amplify and coeff for this optimizer."""
        published = (1e-2, 20.0, 1000.0) if isinstance(optimizer, Adam | AdamW) else (1e-3, 2.0, 10.0)
        own = (self.lam, self.amplify, self.coeff)
        lam, amplify, coeff = (p if o is None else o for o, p in zip(own, published, strict=True))
        return lam, amplify, coeff


@dataclass(frozen=True)
class Moments:
    """What a step knows of each structure, each of shape (S,).

    Attributes:
        xx, xg, gg: ⟨x, x⟩, ⟨x, g⟩ and ⟨g, g⟩.
        moved: ⟨x, x − x̂⟩, with each slice at its own learning rate: η·⟨x, g⟩.
        reach: Σ η·⟨x, x⟩ over slices: what one unit of pull per unit of norm takes from ⟨x, x̂⟩.
    """

    xx: Tensor
    xg: Tensor
    gg: Tensor
    moved: Tensor
    reach: Tensor

    def redundancy(self, numbers: Tensor) -> Tensor:
        """Half the cosine of −x and −g, half the inverse of ‖x‖/n, each over its L2 norm in the network.

        Args:
            numbers: parameters of each structure, shape (S,).
        """
        cosine = _ratio(self.xg, (self.xx * self.gg).sqrt())
        magnitude = self.xx.sqrt() / numbers
        inverse = 1 / magnitude.clamp_min(1e-12)
        score: Tensor = 0.5 * (_ratio(cosine, cosine.norm()) + inverse / inverse.norm())
        return score

    def pull(self, lam: float, amplify: float, coeff: float) -> Tensor:
        """λ_g, shape (S,)."""
        norm = self.xx.sqrt()
        least, most = -self.xg / norm, -self.gg * norm / self.xg
        pull = (amplify * least).clamp(lam, lam * coeff)
        pull = torch.where(pull > most, (least + most) / 2, pull)
        return torch.where(self.xg < 0, pull, lam)

    def leaves(self, shrink: Tensor, epsilon: float) -> Tensor:
        """Whether ⟨x̂, x⟩ ≤ ε‖x‖² after the shrinking, shape (S,), bool. What is zero leaves, too."""
        return self.xx - self.moved - shrink * self.reach <= epsilon * self.xx


class ZeroInvariantGroups:
    """The producer sides of all structures as rows of whole tensors, and dense arithmetic over them.

    A row is one position of one tensor along one dimension. Every step reads all rows, so nothing is gathered.

    Args:
        structures: the current structures.
        parameters: by name.
    """

    #: Elements that are read at a time on a CPU: few calls, and products that stay in its cache (measured).
    BLOCK = 2**18

    def __init__(self, structures: StructureSet, parameters: Mapping[str, Tensor]) -> None:
        count = len(structures)
        owners: dict[Place, Tensor] = {}
        first = 0
        for group in structures.groups.values():
            for c in group.couplings:
                if c.role in ZERO_INVARIANT and c.tensor in parameters:
                    size = parameters[c.tensor].shape[c.dim]
                    owner = owners.setdefault(c.place, torch.full((size,), -1))
                    owner[c.position] = c.owner + first
            first += len(group)
        #: those with one element a row first
        self.places = sorted(owners, key=lambda place: parameters[place[0]].ndim > 1)
        self.flat = sum(parameters[name].ndim == 1 for name, _ in self.places)
        self.sizes = [owners[place].numel() for place in self.places]
        self.device = parameters[self.places[0][0]].device
        double = any(parameters[name].dtype == torch.float64 for name, _ in self.places)
        self.dtype = torch.float64 if double else torch.float32
        owner = torch.cat([owners[place] for place in self.places])
        self.owner = owner.to(self.device)  #: (rows,): structure of each row, or -1
        self._sums = Sums(owner, count, self.device)
        sizes = torch.tensor(self.sizes)
        self._place = torch.arange(len(self.sizes)).repeat_interleave(sizes).to(self.device)
        each = [
            parameters[name].numel() // size for (name, _), size in zip(self.places, self.sizes, strict=True)
        ]
        #: (S,): parameters of each structure
        self.numbers = self.sums(self.by_place(each).unsqueeze(1)).squeeze(1)

    def by_place(self, values: Sequence[float]) -> Tensor:
        """One number per place → one per row."""
        return torch.tensor(values, dtype=self.dtype).to(self.device)[self._place]

    def sums(self, values: Tensor) -> Tensor:
        """Sum over the rows of each structure: (rows, n) → (S, n)."""
        return self._sums(values.to(self.dtype))

    def products(self, x: Mapping[str, Tensor], y: Mapping[str, Tensor | None]) -> Tensor:
        """⟨x, x⟩, ⟨x, y⟩ and ⟨y, y⟩ of every row, shape (rows, 3), at least float32; an absent y counts as zero."""
        norms: list[Tensor] = []  # of x and y in turns
        dots: list[Tensor] = []
        names = [name for name, _ in self.places]
        if self.flat:
            a = torch.cat([_wide(x[name]) for name in names[: self.flat]])
            b = torch.cat([_wide(_or_zero(y.get(name), x[name])) for name in names[: self.flat]])
            norms += [a.abs(), b.abs()]
            dots.append(a * b)
        for name, dim in self.places[self.flat :]:
            a = _rows(x[name], dim, x[name])
            b = _rows(_or_zero(y.get(name), x[name]), dim, x[name])
            whole = a.device.type != "cpu" or a.numel() <= self.BLOCK
            step = a.shape[0] if whole else max(1, self.BLOCK // a.shape[1])
            for i in range(0, a.shape[0], step):
                part, other = a[i : i + step], b[i : i + step]
                norms += [torch.linalg.vector_norm(each, dim=1) for each in (part, other)]
                dots.append(torch.linalg.vecdot(part, other))
        x_norm, xy, y_norm = (torch.cat(parts) for parts in (norms[::2], dots, norms[1::2]))
        return torch.stack([x_norm.square_(), xy, y_norm.square_()], dim=1).to(self.device)

    def views(self, factors: Tensor, parameters: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
        """One factor per row → (name, factors in the shape of that tensor) of each place."""
        found = []
        for (name, dim), part in zip(self.places, factors.split(self.sizes), strict=True):
            shape = [1] * parameters[name].ndim
            shape[dim] = -1
            found.append((name, part.view(shape).to(parameters[name])))
        return found


class _DHSPG(Picker):
    """At work on one network. Flat tensors run over all structures: of the original model where they are saved."""

    def __init__(self, host: OTOv2) -> None:
        self._host = host
        self._begun: int | None = None  # step of the partition
        self._removed_at = 0  # step of the last removal
        self._score = torch.zeros(
            0, dtype=torch.float64
        )  # redundancy at the partition, and the norm² that was
        self._start = torch.zeros(0, dtype=torch.float64)
        self._redundant = torch.zeros(0, dtype=torch.bool)
        self._marked = torch.zeros(0, dtype=torch.bool)  # picked by us
        self._released = torch.zeros(0, dtype=torch.bool)
        # worked out anew whenever structures or fading ones change
        self._structures: StructureSet | None = None
        self._zig: ZeroInvariantGroups
        self._seen: object = None
        self._recheck = False
        # between the two halves of a step
        self._before: dict[str, Tensor] = {}
        self._moments: Moments | None = None
        self._leaving: Tensor | None = None

    # -- a step ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def add_gradients(self, scene: Scene, scale: Tensor | None) -> None:
        if not scene.wanting():
            return
        self._refresh(scene)
        self._moments = self._leaving = None
        if self._begun is not None and self._at_once(scene):
            return
        parameters, zig = scene.parameters, self._zig
        if _is_heavy_ball(scene.optimizer):
            return
        if not _is_plain(scene.optimizer):
            for name, _ in zig.places:
                self._before.setdefault(name, torch.empty_like(parameters[name])).copy_(parameters[name])
            return
        rate, decay = self._rates(scene)
        products = zig.products(parameters, {name: parameters[name].grad for name, _ in zig.places})
        xx, xg, gg = products.unbind(1)
        if scale is not None:
            xg, gg = xg / scale, gg / scale**2
        xg, gg = xg + decay * xx, gg + 2 * decay * xg + decay**2 * xx
        self._moments = self._sum(xx, xg, gg, rate, rate * xg)
        shrink = self._shrink(scene)
        if shrink is not None:  # the step then multiplies by 1 − η·decay, and x − η·g − c·x comes out
            factor = 1 - rate * shrink[zig.owner] / (1 - rate * decay)
            names, factors = zip(*zig.views(factor, parameters), strict=True)
            torch._foreach_mul_([parameters[name] for name in names], factors)

    @torch.no_grad()
    def moved(self, scene: Scene, goal: Goal) -> Picks:
        self._refresh(scene)
        if self._moments is None and not (self._begun is not None and self._at_once(scene)):
            self._follow(scene)
        if self._begun is None:
            self._partition(scene, goal)
        if self._recheck:
            self._replace_released(scene, goal)
        picks = self._due(scene, goal)
        if picks:
            rows = [self._offset[name] + i for name, ids in picks.items() for i in ids]
            self._marked[rows] = True
        return picks

    def _follow(self, scene: Scene) -> None:
        """Read g off what the optimizer did, and shrink: x̂ − c·x with x = x̂ + scale·way, the way that x went."""
        parameters, zig = scene.parameters, self._zig
        rate, _ = self._rates(scene)
        way: dict[str, Tensor | None] = {}
        if _is_heavy_ball(scene.optimizer):  # it went along its momentum buffer, η long
            state, scale = scene.optimizer.state, rate
            for name, _ in zig.places:
                p = parameters[name]
                way[name] = state[p].get("momentum_buffer") if p.grad is not None and p in state else None
        else:
            scale = torch.ones_like(rate)
            for name, _ in zig.places:
                way[name] = self._before[name].sub_(parameters[name])
        now, along, length = zig.products(parameters, way).unbind(1)
        along, length = scale * along, scale**2 * length
        xm = along + length
        self._moments = self._sum(now + along + xm, _ratio(xm, rate), _ratio(length, rate**2), rate, xm)
        shrink = self._shrink(scene)
        if shrink is None:
            return
        cut = rate * shrink[zig.owner]
        for (name, kept), (_, back) in zip(
            zig.views(1 - cut, parameters), zig.views(-cut * scale, parameters), strict=True
        ):
            parameters[name].mul_(kept)
            if (m := way[name]) is not None:
                parameters[name].addcmul_(m, back)

    def _shrink(self, scene: Scene) -> Tensor | None:
        """λ_g/‖x‖ of what is to shrink, shape (S + 1,) with 0 at the end; None before the partition.

        What passes the half-space test goes as it is.
        """
        if self._begun is None:
            return None
        m = self._moments
        assert m is not None
        shrink = _ratio(m.pull(*self._host.pull(scene.optimizer)), m.xx.sqrt())
        self._leaving = m.leaves(shrink, self._host.epsilon) & self._active
        return torch.cat([torch.where(self._active & ~self._leaving, shrink, 0.0), shrink.new_zeros(1)])

    def _due(self, scene: Scene, goal: Goal) -> dict[str, list[int]]:
        """What goes in this step."""
        if self._at_once(scene):
            return self._choose(scene, self._order, goal, self._redundant)
        if self._late(scene):
            assert self._moments is not None
            left = self._start.clone()
            left[self._where] = (self._moments.xx.cpu() / self._start[self._where].clamp_min(1e-30)).to(left)
            return self._choose(scene, left, goal, self._redundant)
        if self._leaving is None or not bool(self._leaving.any()):
            return {}
        leaving = torch.zeros_like(self._redundant)
        leaving[self._where] = self._leaving.cpu()
        return self._choose(scene, self._order, goal, leaving)

    def _at_once(self, scene: Scene) -> bool:
        return self._host.decay_from == "partition" and not scene.one_step

    def _late(self, scene: Scene) -> bool:
        deadline = self._host.deadline
        assert self._begun is not None
        if isinstance(deadline, float):
            deadline = None if scene.total is None else deadline * (scene.total - self._begun)
        return deadline is not None and scene.step - self._begun >= deadline

    def may_remove(self, scene: Scene) -> bool:
        if not scene.wanting():
            now = not scene.decaying
        else:
            every = self._host.remove_every
            now = bool(every) and scene.step >= max(self._removed_at, self._begun or 0) + every
        if now:
            self._removed_at = scene.step
        return now

    # -- the redundant set -----------------------------------------------------------------------------------

    def _partition(self, scene: Scene, goal: Goal) -> None:
        m = self._moments
        assert m is not None
        self._begun = scene.step
        self._score[self._where] = m.redundancy(self._zig.numbers).cpu().double()
        self._start[self._where] = m.xx.cpu().double()
        self._gather(scene, goal)

    def _gather(self, scene: Scene, goal: Goal) -> None:
        """The redundant set: the highest scores, as many as goal and tolerance ask for; released ones come last."""
        wider = max(0.0, goal.at_most - self._host.tolerance * getattr(scene.costs.now, goal.of))
        everything = torch.ones_like(self._redundant)
        picks = self._choose(scene, self._order, replace(goal, at_most=wider), everything)
        self._redundant = torch.zeros_like(self._redundant)
        self._redundant[[self._offset[name] + i for name, ids in picks.items() for i in ids]] = True
        self._seen = None
        self._refresh(scene)

    def _replace_released(self, scene: Scene, goal: Goal) -> None:
        """Released structures have left the redundant set; what its tolerance cannot replace comes from outside."""
        self._recheck = False
        try:
            self._choose(scene, self._order, goal, self._redundant, strict=True)
        except BudgetError:
            self._gather(scene, goal)

    @property
    def _order(self) -> Tensor:
        return 10.0 * self._released - self._score

    def _choose(
        self, scene: Scene, order: Tensor, goal: Goal, among: Tensor, *, strict: bool = False
    ) -> dict[str, list[int]]:
        """The first of `order` among these, as far as the goal asks for them; flat tensors of the original model."""
        fading = scene.fading()
        free = {name: mask & ~fading[name] for name, mask in self._by_group(scene, among).items()}
        return choose(
            scene,
            self._by_group(scene, order),
            goal,
            min_kept=self._host.min_kept,
            round_to=1,  # they leave one by one
            among=free,
            strict=strict,
        )

    # -- outside of a step -----------------------------------------------------------------------------------

    def check(self, scene: Scene, goal: Goal) -> None:
        self._refresh(scene)
        choose(scene, self._by_group(scene, self._order), goal, min_kept=self._host.min_kept, round_to=1)

    @torch.no_grad()
    def pick(self, scene: Scene, goal: Goal) -> Picks:
        """What would go if the partition, or else the weights and gradients of now, had to decide alone."""
        self._refresh(scene)
        order = self._order
        if self._begun is None:
            gradients = {name: scene.parameters[name].grad for name, _ in self._zig.places}
            xx, xg, gg = self._zig.products(scene.parameters, gradients).unbind(1)
            moments = self._sum(xx, xg, gg, torch.zeros_like(xx), xg)
            order[self._where] = -moments.redundancy(self._zig.numbers).cpu().double()
        return choose(scene, self._by_group(scene, order), goal, min_kept=self._host.min_kept, round_to=1)

    def state_dict(self) -> dict[str, Any]:
        if self._begun is None:
            return {}
        names = ("begun", "removed_at", "score", "start", "redundant", "marked", "released")
        saved = {name: getattr(self, f"_{name}") for name in names}
        return {name: v.clone() if isinstance(v, Tensor) else v for name, v in saved.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, f"_{name}", value.clone() if isinstance(value, Tensor) else value)
        self._structures = self._seen = None

    # -- helpers ---------------------------------------------------------------------------------------------

    def _refresh(self, scene: Scene) -> None:
        """Keep up with surgery, and with what was picked and released."""
        fading = scene.fading()
        device = next(iter(scene.parameters.values())).device
        moved = self._structures is not None and self._zig.device != device
        if self._structures is not scene.structures or moved:
            self._structures = scene.structures
            original = scene.graph.structures.groups
            ends = torch.tensor([len(group) for group in original.values()]).cumsum(0).tolist()
            self._offset = dict(zip(original, [0, *ends], strict=False))
            groups = scene.structures.groups
            self._where = torch.cat([group.ids + self._offset[name] for name, group in groups.items()])
            self._zig = ZeroInvariantGroups(scene.structures, scene.parameters)
            self._before = {}
            if not self._score.numel():
                self._score, self._start = torch.zeros(2, ends[-1], dtype=torch.float64)
                self._redundant, self._marked, self._released = torch.zeros(3, ends[-1], dtype=torch.bool)
            self._seen = None
        if self._seen is fading:
            return
        self._seen = fading
        on_the_way = torch.cat([fading[name] for name in scene.structures.groups])
        let_go = self._marked[self._where] & ~on_the_way
        self._marked[self._where] &= on_the_way
        self._released[self._where] |= let_go
        self._redundant[self._where] &= ~let_go
        self._recheck |= bool(let_go.any())
        self._active = (self._redundant[self._where] & ~on_the_way).to(self._zig.device)

    def _by_group(self, scene: Scene, flat: Tensor) -> dict[str, Tensor]:
        groups = scene.structures.groups
        parts = flat[self._where].split([len(group) for group in groups.values()])
        return dict(zip(groups, parts, strict=True))

    def _sum(self, xx: Tensor, xg: Tensor, gg: Tensor, rate: Tensor, moved: Tensor) -> Moments:
        return Moments(*self._zig.sums(torch.stack([xx, xg, gg, moved, rate * xx], dim=1)).unbind(1))

    def _rates(self, scene: Scene) -> tuple[Tensor, Tensor]:
        """Learning rate and weight decay of every row; 0 where the optimizer does not train a parameter."""
        of = {
            id(p): (float(group["lr"]), float(group.get("weight_decay", 0.0)))
            for group in scene.optimizer.param_groups
            for p in group["params"]
        }
        each = [of.get(id(scene.parameters[name]), (0.0, 0.0)) for name, _ in self._zig.places]
        return self._zig.by_place([r for r, _ in each]), self._zig.by_place([d for _, d in each])


def _is_plain(optimizer: Optimizer) -> bool:
    """Whether a step is x − η(g + decay·x) and nothing else."""
    return type(optimizer) is SGD and not any(g["momentum"] or g["maximize"] for g in optimizer.param_groups)


def _is_heavy_ball(optimizer: Optimizer) -> bool:
    """Whether a step is x − η·(momentum buffer) and nothing else."""
    return type(optimizer) is SGD and all(
        g["momentum"] and not g["nesterov"] and not g["maximize"] for g in optimizer.param_groups
    )


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / b, 0.0)


def _or_zero(value: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if value is None else value


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _rows(tensor: Tensor, dim: int, like: Tensor) -> Tensor:
    """Shape (size of dim, rest), at least float32; no copy where `dim` is outermost in memory, in any format."""
    if dim == 0 and like.is_contiguous():
        return _wide(tensor.flatten(1))
    rest = sorted((d for d in range(like.ndim) if d != dim), key=like.stride, reverse=True)
    return _wide(tensor.permute(dim, *rest).flatten(1))
