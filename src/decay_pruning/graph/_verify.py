"""Verification: every layer group is tried on the model before it is offered.

It does not matter how the structures were found: what comes in is a `StructureSet`, and so is what goes out.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from decay_pruning import proof, surgery
from decay_pruning.errors import GraphError, SurgeryError
from decay_pruning.proof import Settings
from decay_pruning.structures import NOT_PARAMETERS, LayerGroup, Picks, Role, StructureSet

#: A cut that moves no element of the output by this much (relative) could not be told from none.
_REACTION = 1e-6


def demote(structures: StructureSet) -> StructureSet:
    """Inexact layer groups become unprunable."""
    inexact = {
        name: f"removal is not exact: {group.inexact} (allow_inexact=True prunes it all the same)"
        for name, group in structures.groups.items()
        if group.inexact is not None
    }
    groups = {name: group for name, group in structures.groups.items() if name not in inexact}
    return replace(structures, groups=groups, unprunable={**structures.unprunable, **inexact})


#: Layer groups that have failed, each with the reason → others to be tried in their place, or None.
Second = Callable[[Mapping[str, str]], StructureSet | None]


def verified(
    model: nn.Module,
    structures: StructureSet,
    example_inputs: Any,
    allow_inexact: bool,
    second: Second = lambda failed: None,
) -> StructureSet:
    """Try every layer group. What does not run, or changes the output other than by its nature, becomes unprunable.

    Raises:
        GraphError: the model says nothing on the example inputs.
    """
    _check_output(model, example_inputs)
    if not structures.groups:
        return structures
    passed: dict[str, LayerGroup] = {}
    todo: StructureSet | None = structures
    unprunable: dict[str, str] = {}
    with _random_values(model, structures, example_inputs):
        trials = _Trials(model, structures, Settings.of(model, example_inputs, thorough=True), {})
        while todo is not None and todo.groups:
            structures = replace(structures, sizes={**structures.sizes, **todo.sizes})
            trials.structures = replace(structures, groups={**passed, **todo.groups})
            trials.passed = dict(passed)
            good, failed = _judged(trials, list(todo.groups), allow_inexact)
            passed |= good
            unprunable = {**todo.unprunable, **failed, **unprunable}
            todo = second(failed)
    unprunable = {name: why for name, why in unprunable.items() if name not in passed}
    order = [name for name in structures.groups if name in passed]
    groups = {name: passed[name] for name in dict.fromkeys([*order, *passed])}
    return replace(structures, groups=groups, unprunable=unprunable)


def _judged(
    trials: _Trials, names: Sequence[str], allow_inexact: bool
) -> tuple[dict[str, LayerGroup], dict[str, str]]:
    """Of these layer groups, what can be pruned, and why the others cannot."""
    groups = trials.structures.groups
    good = {name: groups[name] for name in names}
    exact = [name for name in names if groups[name].inexact is None]
    declared = [name for name in names if name not in exact] if allow_inexact else []
    failed = trials.failures(exact, natural=False)
    changed = [name for name, verdict in failed.items() if verdict.change is not None]
    explained = set(changed) - trials.failures(changed, natural=True).keys()
    failed |= trials.failures(declared, natural=True)
    bad: dict[str, str] = {}
    for name, verdict in failed.items():
        if name in explained:
            good[name] = replace(groups[name], inexact=_nature(trials.model, groups[name]))
            continue
        del good[name]
        if verdict.change is None:
            bad[name] = f"removing a structure fails: {verdict.problem}"
        elif name in declared:
            nature = groups[name].inexact
            bad[name] = f"removing a structure changes more than its nature ({nature}): {verdict.problem}"
        else:
            bad[name] = f"removing a structure changes what is left: {verdict.problem}"
    for name in trials.dumb(list(good)):
        del good[name]
        bad[name] = (
            "the output does not react to it, so a removal cannot be proven; give example inputs on which it "
            f"matters (longer ones, or values other than zeros), and {proof.WAY_OUT}"
        )
    return good, bad


def _check_output(model: nn.Module, example_inputs: Any) -> None:
    """The model says something that a removal could be proven by."""
    diverged = [name for name, p in model.named_parameters() if not bool(p.isfinite().all())]
    if diverged:
        raise GraphError(
            f"the parameter {diverged[0]!r} is not finite ({len(diverged)} in all); has the training diverged?"
        )
    leaves = proof.observe(model, example_inputs).leaves
    floating = [leaf for leaf in leaves if leaf.is_floating_point() or leaf.is_complex()]
    if not any(leaf.numel() for leaf in floating):
        what = "is empty on the example inputs" if floating else "holds no floating tensor"
        raise GraphError(f"the model's output {what}, so no removal can be proven; {proof.WAY_OUT}")
    if not any(bool(leaf.isfinite().any()) for leaf in floating):
        raise GraphError("the model's output on the example inputs is not finite anywhere")


def _nature(model: nn.Module, group: LayerGroup) -> str:
    """What explains that a removal changes the output, in words."""
    for c in group.couplings:
        owner, _ = surgery.parent(model, c.tensor)
        norm = "norm" in type(owner).__name__.lower() and not isinstance(
            owner, nn.modules.batchnorm._NormBase
        )
        if norm and c.role is not Role.COLUMN:
            return f"{type(owner).__name__} {c.tensor.rpartition('.')[0]!r} normalises over this width"
    return "attention scales its scores by the head width"


def kind_of(model: nn.Module, group: LayerGroup) -> Hashable:
    """What is equal for layer groups that stand in the same way in blocks of the same classes."""
    places = []
    for c in group.couplings:
        owner, leaf = surgery.parent(model, c.tensor)
        first = c.position[c.owner == 0][:3].tolist()
        places.append((type(owner), leaf, c.dim, c.role, c.position.numel(), *first))
    return len(group), group.inexact is None, *places


@dataclass
class _Trials:
    """Tries layer groups of one model, together with those that have passed."""

    model: nn.Module
    structures: StructureSet
    settings: Settings
    passed: Mapping[str, LayerGroup]

    def failures(self, names: Sequence[str], natural: bool) -> dict[str, surgery.Verdict]:
        """The layer groups among `names` whose removal fails. All at once first, then by halves of their kinds."""
        kinds: dict[Hashable, list[str]] = {}
        for name in names:
            kinds.setdefault(kind_of(self.model, self.structures.groups[name]), []).append(name)
        return self._among(list(kinds.values()), natural)

    def _among(self, kinds: Sequence[Sequence[str]], natural: bool) -> dict[str, surgery.Verdict]:
        if not kinds:
            return {}
        names = [name for kind in kinds for name in kind]
        verdict = self._try(names, natural)
        if verdict.problem is None:
            return {}
        if len(names) == 1:
            return {names[0]: verdict}
        if len(kinds) == 1:
            first = self._try(names[:1], natural)
            if first.problem is not None:  # so it is with the others of its kind
                return dict.fromkeys(names, first)
            kinds = [[name] for name in names]
        half = len(kinds) // 2
        found = self._among(kinds[:half], natural)
        found |= self._among(kinds[half:], natural)
        if not found:  # each half works alone and both together do not: give up the second
            return {name: verdict for kind in kinds[half:] for name in kind}
        return found

    def _try(self, names: Sequence[str], natural: bool) -> surgery.Verdict:
        """Remove a few structures of every layer group, then up to half: other numbers in each, or two widths that
        only a shape ties would pass."""
        verdict = surgery.Verdict(0.0, None)
        beside = (n for n, group in self.passed.items() if group.inexact is None and n not in names)
        names = [*names, *beside]
        for picks, only in (
            (self._few(names), (0, 1)),
            (self._many(names), (len(self.settings.settings) - 1,)),
        ):
            try:
                surgery.check_picks(self.structures, picks)
                verdict = surgery.trial(
                    self.model, self.structures, picks, self.settings, natural=natural, only=only
                )
            except SurgeryError as error:
                verdict = surgery.Verdict(None, str(error))
            if verdict.problem is not None:
                break
        return verdict

    def _few(self, names: Sequence[str]) -> Picks:
        picks = {}
        for k, name in enumerate(names):
            size = len(self.structures.groups[name])
            count = min(1 + k % 3, max(1, size // 3))
            picks[name] = sorted({(size // 3 + j * max(1, size // 3)) % size for j in range(count)})
        return self._originals(picks)

    def _many(self, names: Sequence[str]) -> Picks:
        draw = random.Random(len(names))
        picks = {}
        for name in names:
            size = len(self.structures.groups[name])
            picks[name] = sorted(draw.sample(range(size), draw.randint(1, max(1, size // 2))))
        return self._originals(picks)

    def _originals(self, rows: Picks) -> Picks:
        return {name: self.structures.groups[name].ids[list(row)].tolist() for name, row in rows.items()}

    # ------------------------------------------------------------------------------------------ the control

    def dumb(self, names: Sequence[str]) -> list[str]:
        """The layer groups that the output says nothing about: cut or not, it would be the same.

        The gradient of the output tells for all of them at once. Where it is silent (`detach`, a step function), the
        layer group is set to zero and the model is run.
        """
        moved = self._sensitivity()
        silent = [name for name in names if not moved.get(name, 0.0) > _REACTION]
        if not silent:
            return []
        dtype = self.settings.dtypes[0]
        before = self.settings.observe(self.model, dtype)
        return [name for name in silent if not self._reacts(name, before)]

    def _reacts(self, name: str, before: list[proof.Output]) -> bool:
        undo = surgery._zero(self.model, self.structures, self._many([name]))
        try:
            after = self.settings.observe(self.model, self.settings.dtypes[0])
            return self.settings.change(before, after)[0] > _REACTION
        except SurgeryError:
            return True  # it cannot even be compared
        finally:
            undo()

    def _sensitivity(self) -> dict[str, float]:
        """Layer group → how far the output moves with the values of its parameters, to first order."""
        found: dict[str, float] = {}
        for gradients in self.settings.gradients(self.model):
            for name, group in self.structures.groups.items():
                for c in group.couplings:
                    if c.role in NOT_PARAMETERS or c.tensor not in gradients:
                        continue
                    moved = gradients[c.tensor].index_select(c.dim, c.position.to(gradients[c.tensor].device))
                    value = float(moved.abs().max()) if moved.numel() else 0.0
                    found[name] = max(found.get(name, 0.0), value)
            if all(found.get(name, 0.0) > _REACTION for name in self.structures.groups):
                break
        return found


@contextmanager
def _random_values(model: nn.Module, structures: StructureSet, example_inputs: Any) -> Iterator[None]:
    """Perturb all weights and running statistics for a while, so that no zero hides a wrong trace.

    A branch that starts at zero (γ = 0, LoRA, adaLN-zero) would make any removal in it look exact.
    """
    buffers = {
        c.tensor for group in structures.groups.values() for c in group.couplings if c.role is Role.BUFFER
    }
    tensors: list[Tensor] = [p for p in model.parameters() if p.is_floating_point()]
    tensors += [buffer for name, buffer in model.named_buffers() if name in buffers]
    saved = [(tensor, tensor.data) for tensor in tensors]
    generator = torch.Generator().manual_seed(0)
    try:
        for tensor, data in saved:
            tensor.data = _perturbed(data, generator)
        leaves = proof.observe(model, example_inputs).leaves
        if not any(bool(leaf.isfinite().any()) for leaf in leaves if leaf.is_floating_point()):
            for tensor, data in saved:  # overflow of a narrow dtype: the values as they are
                tensor.data = data
        yield
    finally:
        for tensor, data in saved:
            tensor.data = data


def _perturbed(data: Tensor, generator: torch.Generator) -> Tensor:
    """Every value scaled by 1 ± 0.2, and a zero tensor filled with small values. Signs stay (variances)."""
    noise = torch.empty(data.shape).uniform_(-0.2, 0.2, generator=generator).to(data.device, data.dtype)
    small = data.abs().mean() * 0.5 if bool(data.any()) else 0.1
    return torch.where(data == 0, noise * 5 * small, data * (1 + noise))
