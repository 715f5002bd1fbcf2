"""Trials: layer groups are cut out of the model, alone and together, and put back."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Mapping, Sequence

from torch import nn

from decay_pruning import proof, surgery
from decay_pruning.errors import SurgeryError
from decay_pruning.graph.verification._shapes import Shapes
from decay_pruning.proof import Settings
from decay_pruning.structures import NOT_PARAMETERS, LayerGroup, Picks, Role, StructureSet

#: A cut that moves no element of the output by this much (relative) could not be told from none.
_REACTION = 1e-6


def kind_of(model: nn.Module, group: LayerGroup) -> Hashable:
    """What is equal for layer groups that stand in the same way in blocks of the same classes, wide or narrow."""
    places = set()
    for c in group.couplings:
        owner, leaf = surgery.parent(model, c.tensor)
        places.add((type(owner), leaf, c.dim, c.role, c.position.numel() > len(group)))
    return group.inexact is None, frozenset(places)


class Trials:
    """Tries layer groups of one model, together with those that have passed.

    Attributes:
        structures: all of them.
        passed: those that have passed.
    """

    def __init__(self, model: nn.Module, structures: StructureSet, settings: Settings) -> None:
        self.model = model
        self.structures = structures
        self.passed: Mapping[str, LayerGroup] = {}
        self._settings = settings
        self._shapes = Shapes(model, settings)

    def misshapen(self, names: Sequence[str]) -> dict[str, str]:
        """The layer groups among `names` without which the model does not run, as far as shapes tell."""

        def attempt(names: Sequence[str]) -> surgery.Verdict:
            picks, _ = self._picks(names)
            try:
                surgery.check_picks(self.structures, picks)
                return surgery.Verdict(None, self._shapes.problem(self.structures, picks))
            except SurgeryError as error:
                return surgery.Verdict(None, str(error))

        if not self._shapes.usable or not names:
            return {}
        found = _failures(self._kinds(names), attempt, self._blamed)
        return {name: f"removing a structure fails: {verdict.problem}" for name, verdict in found.items()}

    def _blamed(self, kinds: Sequence[Sequence[str]]) -> list[Sequence[str]]:
        """The kinds that reach into the module in which the last problem showed."""
        where = self._shapes.failed_in
        if not where:
            return []
        groups = self.structures.groups
        inside = {n for n, g in groups.items() if any(c.tensor.startswith(f"{where}.") for c in g.couplings)}
        return [kind for kind in kinds if not inside.isdisjoint(kind)]

    def failures(self, names: Sequence[str], natural: bool) -> dict[str, surgery.Verdict]:
        """The layer groups among `names` whose removal fails, or changes what is left."""

        def attempt(names: Sequence[str]) -> surgery.Verdict:
            few, many = self._picks(names)
            return self._tried([(few, (0, 1)), (many, (self._last,))], natural)

        return _failures(self._kinds(names), attempt) if names else {}

    def failures_in_steps(self, names: Sequence[str], natural: bool) -> dict[str, surgery.Verdict]:
        """The same of layer groups that the output follows in steps (a comparison) only: most picks do not show it."""

        def attempt(names: Sequence[str]) -> surgery.Verdict:
            return self._tried([(self._many(names, seed), None) for seed in range(4)], natural)

        return _failures(self._kinds(names), attempt) if names else {}

    def _tried(self, picks: Sequence[tuple[Picks, Sequence[int] | None]], natural: bool) -> surgery.Verdict:
        """The first problem of several picks, each in some of the settings."""
        verdict = surgery.Verdict(0.0, None)
        for each, only in picks:
            try:
                surgery.check_picks(self.structures, each)
                verdict = surgery.trial(
                    self.model, self.structures, each, self._settings, natural=natural, only=only
                )
            except SurgeryError as error:
                verdict = surgery.Verdict(None, str(error))
            if verdict.problem is not None:
                break
        return verdict

    @property
    def _last(self) -> int:
        return len(self._settings.settings) - 1

    def _kinds(self, names: Sequence[str]) -> list[list[str]]:
        kinds: dict[Hashable, list[str]] = {}
        for name in names:
            kinds.setdefault(kind_of(self.model, self.structures.groups[name]), []).append(name)
        return list(kinds.values())

    def _picks(self, names: Sequence[str]) -> tuple[Picks, Picks]:
        """A few structures of every layer group, and up to half: other numbers in each, or two widths that only a
        shape ties would pass."""
        beside = (n for n, group in self.passed.items() if group.inexact is None and n not in names)
        names = [*names, *beside]
        return self._few(names), self._many(names)

    def _few(self, names: Sequence[str]) -> Picks:
        picks = {}
        for k, name in enumerate(names):
            size = len(self.structures.groups[name])
            count = min(1 + k % 3, max(1, size // 3))
            picks[name] = sorted({(size // 3 + j * max(1, size // 3)) % size for j in range(count)})
        return self._originals(picks)

    def _many(self, names: Sequence[str], seed: int = 0) -> Picks:
        draw = random.Random(len(names) + 1000 * seed)
        picks = {}
        for name in names:
            size = len(self.structures.groups[name])
            picks[name] = sorted(draw.sample(range(size), draw.randint(1, max(1, size // 2))))
        return self._originals(picks)

    def _originals(self, rows: Picks) -> Picks:
        return {name: self.structures.groups[name].ids[list(row)].tolist() for name, row in rows.items()}

    # ------------------------------------------------------------------------------------------ the control

    def silent(self, names: Sequence[str]) -> tuple[list[str], list[str]]:
        """The layer groups that the output says nothing about, and those that it follows in steps only.

        The gradient of the output tells for all of them at once. Where it is silent (`detach`, a step function), the
        layer group is set to zero and the model is run.
        """
        moved, made = self._sensitivity()
        quiet = [name for name in names if not moved.get(name, 0.0) > _REACTION]
        before = [self._seen(k) for k in range(len(self._settings.settings))] if quiet else []
        dumb = self._without_reaction(quiet, before)
        return dumb, [name for name in names if name not in dumb and not made.get(name, 0.0)]

    def _seen(self, k: int) -> list[proof.Output]:
        return self._settings.observe(self.model, self._settings.dtypes[0], [k])

    def _without_reaction(self, names: Sequence[str], before: Sequence[list[proof.Output]]) -> list[str]:
        """Where nothing shows with all of them at zero, nothing shows with one of them; otherwise by halves."""
        if not names or not self._reacts(names, before):
            return list(names)
        if len(names) == 1:
            return []
        half = len(names) // 2
        return [n for part in (names[:half], names[half:]) for n in self._without_reaction(part, before)]

    def _reacts(self, names: Sequence[str], before: Sequence[list[proof.Output]]) -> bool:
        every = {name: self.structures.groups[name].ids.tolist() for name in names}
        undo = surgery._zero(self.model, self.structures, every)
        try:
            return any(
                self._settings.change(seen, self._seen(k), [k])[0] > _REACTION
                for k, seen in enumerate(before)
            )
        except SurgeryError:
            return True  # it cannot even be compared
        finally:
            undo()

    def _sensitivity(self) -> tuple[dict[str, float], dict[str, float]]:
        """Layer group → how far the output moves with its parameters, to first order; and with those that make it.

        The latter in evaluation mode only: in training the gradient may go straight through a step.
        """
        moved: dict[str, float] = {}
        made: dict[str, float] = {}
        for training, gradients in self._settings.gradients(self.model):
            for name, group in self.structures.groups.items():
                for c in group.couplings:
                    if c.role in NOT_PARAMETERS or c.tensor not in gradients:
                        continue
                    rows = gradients[c.tensor].index_select(c.dim, c.position.to(gradients[c.tensor].device))
                    value = float(rows.abs().max()) if rows.numel() else 0.0
                    moved[name] = max(moved.get(name, 0.0), value)
                    if c.role is not Role.COLUMN and not training:
                        made[name] = max(made.get(name, 0.0), value)
            if all(moved.get(n, 0.0) > _REACTION and made.get(n, 0.0) for n in self.structures.groups):
                break
        return moved, made


def _failures(
    kinds: Sequence[Sequence[str]],
    attempt: Callable[[Sequence[str]], surgery.Verdict],
    blamed: Callable[[Sequence[Sequence[str]]], list[Sequence[str]]] = lambda kinds: [],
) -> dict[str, surgery.Verdict]:
    """Which layer groups fail. All at once first; then those that can be blamed, if it works without them; then by
    halves of their kinds."""
    names = [name for kind in kinds for name in kind]
    verdict = attempt(names)
    if verdict.problem is None:
        return {}
    suspects: list[Sequence[str]] = []
    while more := [kind for kind in blamed(kinds) if kind not in suspects]:
        suspects += more
        rest = [name for kind in kinds if kind not in suspects for name in kind]
        if not rest:
            break
        if attempt(rest).problem is None:
            found = _failures(suspects, attempt)
            if found:
                return found
            break
    return _by_halves(kinds, attempt, verdict)


def _by_halves(
    kinds: Sequence[Sequence[str]],
    attempt: Callable[[Sequence[str]], surgery.Verdict],
    verdict: surgery.Verdict,
) -> dict[str, surgery.Verdict]:
    """The same, of layer groups that fail together."""
    names = [name for kind in kinds for name in kind]
    if len(names) == 1:
        return {names[0]: verdict}
    if len(kinds) == 1:
        first = attempt(names[:1])
        if first.problem is not None:  # so it is with the others of its kind, or with none of them
            others = attempt(names[1:])
            return dict.fromkeys(names[:1] if others.problem is None else names, first)
        kinds = [[name] for name in names]
    half = len(kinds) // 2
    found = _failures(kinds[:half], attempt)
    found |= _failures(kinds[half:], attempt)
    if not found:  # each half works alone and both together do not: give up the second
        return {name: verdict for kind in kinds[half:] for name in kind}
    return found
