"""Verification: every layer group is tried on the model before it is offered.

It does not matter how the structures were found: what comes in is a `StructureSet`, and so is what goes out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from decay_pruning import proof, surgery
from decay_pruning.errors import GraphError
from decay_pruning.graph.verification._shrunken import twin
from decay_pruning.graph.verification._trials import Trials
from decay_pruning.proof import Settings
from decay_pruning.structures import LayerGroup, Role, StructureSet
from decay_pruning.valueless import is_valueless

#: How most models are verified.
TRIALS = "verified by trials"
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


#: Layer groups that have failed, each with the reason (None: all others have passed) → what to try in their place.
Second = Callable[[Mapping[str, str] | None], StructureSet | None]


def verified(
    model: nn.Module,
    structures: StructureSet,
    example_inputs: Any,
    allow_inexact: bool,
    second: Second = lambda failed: None,
) -> tuple[StructureSet, str]:
    """Try every layer group. What does not run, or changes the output other than by its nature, becomes unprunable.

    A model without values is tried on its shapes, and its small twin on values.

    Returns:
        What can be pruned, and in words how that was verified.

    Raises:
        GraphError: the model says nothing on the example inputs.
    """
    if is_valueless(model):
        settings = Settings(example_inputs, [proof.Setting(example_inputs, False, "")], [None])
        small = _OnTwin(example_inputs, allow_inexact)
        run = _Verification(Trials(model, structures, settings), small)
        return run.through(structures, second), small.how
    before = _checked_output(model, example_inputs)
    if not structures.groups:
        return structures, TRIALS
    with proof.stand_ins(model, None, False), _random_values(model, structures) as put_back:
        settings = Settings.of(model, example_inputs, thorough=True, other=before)
        if not _is_finite(settings.first):  # too large for a narrow dtype: the values as they are
            put_back()
            settings = Settings.of(model, example_inputs, thorough=True)
        judge = partial(_judged, allow_inexact=allow_inexact)
        run = _Verification(Trials(model, structures, settings), judge)
        return run.through(structures, second), TRIALS


#: Some layer groups → those that can be pruned, and why the others cannot.
_Judge = Callable[[Trials, Sequence[str]], tuple[dict[str, LayerGroup], dict[str, str]]]


class _OnTwin:
    """Judges layer groups of a model without values by its small twin.

    Attributes:
        how: how they were verified, in words.
    """

    def __init__(self, example_inputs: Any, allow_inexact: bool) -> None:
        self._example_inputs = example_inputs
        self._allow_inexact = allow_inexact
        self.how = "not verified: there is nothing to try"

    def __call__(self, trials: Trials, names: Sequence[str]) -> tuple[dict[str, LayerGroup], dict[str, str]]:
        groups = trials.structures.groups
        good = {name: groups[name] for name in names}
        if not names:
            return {}, {}
        small = twin(trials.model, trials.structures, self._example_inputs)
        if isinstance(small, str):
            self.how = f"not verified by trials: the model is on the meta device, and {small}"
            return good, {}
        try:
            found, _ = verified(small.model, small.structures, small.inputs, self._allow_inexact)
        except GraphError as error:
            self.how = f"not verified by trials: the model is on the meta device, and of its twin {error}"
            return good, {}
        self.how = "verified by trials on a shrunken twin: the model is on the meta device"
        bad = {name: found.unprunable[name] for name in names if name not in found.groups}
        good = {
            name: replace(group, inexact=found.groups[name].inexact)
            for name, group in good.items()
            if name not in bad
        }
        return good, bad


class _Verification:
    """What has been tried so far.

    Args:
        trials: what tries.
        judge: what proves.

    Attributes:
        passed: layer groups that are proven.
        open: layer groups whose shapes fit, and that are still to be proven.
        unprunable: what is not offered, each with the first reason that there was.
    """

    def __init__(self, trials: Trials, judge: _Judge) -> None:
        self._trials, self._judge = trials, judge
        self.structures = trials.structures
        self.passed: dict[str, LayerGroup] = {}
        self.open: dict[str, LayerGroup] = {}
        self.unprunable: dict[str, str] = {}

    def through(self, structures: StructureSet, second: Second) -> StructureSet:
        """Try these, and what is proposed in the place of those that fail."""
        todo: StructureSet | None = structures
        while todo is not None:
            todo = second(self.fit(todo))
            if todo is None:
                todo = second(self.prove())
            if todo is None:
                todo = second(None)
        unprunable = {name: why for name, why in self.unprunable.items() if name not in self.passed}
        return replace(self.structures, groups=self.passed, unprunable=unprunable)

    def fit(self, todo: StructureSet) -> dict[str, str]:
        """Take on more layer groups whose shapes fit. Returns the others, each with the reason."""
        self.structures = replace(todo, sizes={**self.structures.sizes, **todo.sizes})
        self.unprunable = {**todo.unprunable, **self.unprunable}
        self.open |= todo.groups
        self._prepare()
        return self._out(self._trials.misshapen(list(todo.groups)))

    def prove(self) -> dict[str, str]:
        """Prove all that is open. Returns what has failed, with reasons."""
        self._prepare()
        good, failed = self._judge(self._trials, list(self.open))
        self.passed |= good
        self.open = {}
        return self._out(failed)

    def _prepare(self) -> None:
        self._trials.structures = replace(self.structures, groups={**self.passed, **self.open})
        self._trials.passed = dict(self.passed)

    def _out(self, failed: dict[str, str]) -> dict[str, str]:
        self.open = {name: group for name, group in self.open.items() if name not in failed}
        self.unprunable = {**failed, **self.unprunable}
        return failed


def _judged(
    trials: Trials, names: Sequence[str], allow_inexact: bool
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
    dumb, steps = trials.silent(list(good))
    steps = [name for name in steps if good[name].inexact is None]
    for name, verdict in trials.failures_in_steps(steps, natural=False).items():
        del good[name]
        bad[name] = f"removing a structure changes what is left: {verdict.problem}"
    for name in dumb:
        del good[name]
        bad[name] = (
            "the output does not react to it, so a removal cannot be proven; give example inputs on which it "
            f"matters (longer ones, or values other than zeros), and {proof.WAY_OUT}"
        )
    return good, bad


def _checked_output(model: nn.Module, example_inputs: Any) -> proof.Output:
    """What the model returns, if a removal could be proven by it."""
    diverged = [name for name, p in model.named_parameters() if not bool(p.isfinite().all())]
    if diverged:
        raise GraphError(
            f"the parameter {diverged[0]!r} is not finite ({len(diverged)} in all); has the training diverged?"
        )
    output = proof.observe(model, example_inputs)
    floating = [leaf for leaf in output.leaves if leaf.is_floating_point() or leaf.is_complex()]
    if not any(leaf.numel() for leaf in floating):
        what = "is empty on the example inputs" if floating else "holds no floating tensor"
        raise GraphError(f"the model's output {what}, so no removal can be proven; {proof.WAY_OUT}")
    if not any(bool(leaf.isfinite().any()) for leaf in floating):
        raise GraphError("the model's output on the example inputs is not finite anywhere")
    return output


def _nature(model: nn.Module, group: LayerGroup) -> str:
    """What explains that a removal changes the output, in words."""
    for c in group.couplings:
        owner, _ = surgery.parent(model, c.tensor)
        norm = "norm" in type(owner).__name__.lower() and not isinstance(
            owner, nn.modules.batchnorm._NormBase
        )
        if norm and c.role is not Role.COLUMN:
            return f"{type(owner).__name__} {c.tensor.rpartition('.')[0]!r} normalises over this width"
    for c in group.couplings:
        name = surgery.mixer(model, c.tensor)
        if name is not None:
            return f"{type(model.get_submodule(name)).__name__} {name!r} mixes its whole width"
    return "attention scales its scores by the head width"


@contextmanager
def _random_values(model: nn.Module, structures: StructureSet) -> Iterator[Callable[[], None]]:
    """Perturb all weights and running statistics for a while, so that no zero hides a wrong trace.

    A branch that starts at zero (γ = 0, LoRA, adaLN-zero) would make any removal in it look exact.

    Yields:
        what ends it early.
    """
    buffers = {
        c.tensor for group in structures.groups.values() for c in group.couplings if c.role is Role.BUFFER
    }
    tensors: list[Tensor] = [p for p in model.parameters() if p.is_floating_point()]
    tensors += [b for name, b in model.named_buffers() if name in buffers and b.is_floating_point()]
    saved = [(tensor, tensor.data) for tensor in tensors]
    scaled = {
        each.tensor: each for fold in structures.folds for each in fold.scaled if each.level is not None
    }
    numbers = [(*surgery.parent(model, name), each.level) for name, each in scaled.items()]
    before = [(module, leaf, getattr(module, leaf)) for module, leaf, _ in numbers]
    generator = torch.Generator().manual_seed(0)

    def put_back() -> None:
        for tensor, data in saved:
            tensor.data = data

    try:
        for module, leaf, level in numbers:  # an ε so large that the output shows whether it follows
            setattr(module, leaf, level)
        for tensor, data in saved:
            tensor.data = _perturbed(data, generator)
        yield put_back
    finally:
        put_back()
        for module, leaf, value in before:
            setattr(module, leaf, value)


def _is_finite(output: proof.Output | None) -> bool:
    """Whether any floating value is finite."""
    leaves = output.leaves if output is not None else ()
    return any(bool(leaf.isfinite().any()) for leaf in leaves if leaf.is_floating_point())


def _perturbed(data: Tensor, generator: torch.Generator) -> Tensor:
    """Every value scaled by 1 ± 0.2, and a zero tensor filled with small values. Signs stay (variances)."""
    noise = torch.empty(data.shape).uniform_(-0.2, 0.2, generator=generator).to(data.device, data.dtype)
    if bool((data.abs() < 1e-3).all()):  # a branch that starts at almost nothing (layer scale)
        return torch.where(data == 0, noise.sign(), data.sign()) * noise.abs() * 2.5
    small = data.abs().mean() * 0.5
    return torch.where(data == 0, noise * 5 * small, data * (1 + noise))
