"""Reasons: every layer that is not prunable is named, and what is said of it is true.

What the trace says of its own layer groups is known. Of the rest, plain runs of the model tell: which layers ran, which
parameters were read, and which ones a gradient leads to, in evaluation and in training mode.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from decay_pruning import proof
from decay_pruning.structures import Role, StructureSet

log = logging.getLogger(__name__)

OUTPUT = "feeds the model's output"
UNREACHED = "is not reached from the example inputs"
TRAINING_ONLY = "runs in training mode only, and the trace follows evaluation mode"
NO_GRADIENT = "runs, but under detach(), no_grad() or a checkpoint, so that no gradient leads to it"
ELSEWHERE = (
    "its weight is used outside of its own forward (F.linear and the like), where the trace cannot follow it"
)
HEADS = "; if these are attention heads, give their number in heads={layer: number}"


def named(
    model: nn.Module,
    structures: StructureSet,
    example_inputs: Any,
    shared: Mapping[str, str],
    known: set[str],
) -> dict[str, str]:
    """`unprunable` with every layer in it whose weight of two or more dimensions no layer group covers.

    Args:
        shared: name of a layer → the layer group (prunable or not) that its width belongs to.
        known: names of the layers of a class that the trace supports.
    """
    said = dict(structures.unprunable)
    covered = {
        c.tensor for group in structures.groups.values() for c in group.couplings if c.role is not Role.COLUMN
    }
    names = {id(p): name for name, p in model.named_parameters()}
    runs = _Runs(model, example_inputs)
    for name, module in model.named_modules():
        weights = [p for p in module.parameters(recurse=False) if p.ndim > 1]
        if not weights or any(names[id(p)] in covered for p in weights):
            continue
        key = name or names[id(weights[0])]
        whole, head = _attention_above(model, name), shared.get(name, key)
        if key in said or whole in structures.groups:
            continue
        if whole in said:
            said[key] = f"is part of attention {whole!r}, which is not prunable"
        elif head != key and head in said and (name in known or not name or any(module.children())):
            same = said[head] == OUTPUT
            said[key] = OUTPUT if same else f"shares its width with {head!r}: {said[head]}"
        else:
            said[key] = runs.reason(name, module, weights, name in known)
    return said


def scored(model: nn.Module, example_inputs: Any) -> set[str]:
    """Layers whose outputs meet in attention scores, with no other layer between: they may have heads."""
    run = _run(model, example_inputs, training=False)
    owners = {id(p): name.rpartition(".")[0] for name, p in model.named_parameters()}
    return {owners[key] for key in run.scored} if run else set()


def _attention_above(model: nn.Module, name: str) -> str | None:
    while name:
        name = name.rpartition(".")[0]
        if isinstance(model.get_submodule(name), nn.MultiheadAttention):
            return name
    return None


@dataclass
class _Run:
    """What one forward pass showed: names of the modules that ran; identities of parameters."""

    ran: set[str] = field(default_factory=set)
    read: set[int] = field(default_factory=set)
    reached: set[int] = field(default_factory=set)  # by a gradient
    scored: set[int] = field(default_factory=set)


class _Runs:
    """Runs the model when a reason is first asked for."""

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        self._model, self._inputs = model, example_inputs
        self._found: list[_Run | None] | None = None

    def reason(self, name: str, module: nn.Module, weights: list[nn.Parameter], known: bool) -> str:
        """Why this layer is in no layer group."""
        if self._found is None:
            self._found = [_run(self._model, self._inputs, training) for training in (False, True)]
        evaluation, training = self._found
        what = f"layer class {type(module).__name__} is not supported"
        if evaluation is None:
            return what
        mine = {id(p) for p in weights}
        if not (mine & evaluation.read or name in evaluation.ran):
            later = training is not None and (mine & training.read or name in training.ran)
            return TRAINING_ONLY if later else UNREACHED
        if not mine & evaluation.reached:
            return NO_GRADIENT
        return ELSEWHERE if known else what


def _run(model: nn.Module, example_inputs: Any, training: bool) -> _Run | None:
    """One forward pass; the model is left as it was. None where it does not run."""
    run = _Run()
    with proof.seeded(model), torch.inference_mode(False), torch.enable_grad(), ExitStack() as stack:
        copies = stack.enter_context(proof.stand_ins(model, None, training, grad=True))
        original = {id(copy): key for key, copy in copies.items()}

        def note(name: str) -> Any:
            return lambda *_: run.ran.add(name)

        for name, module in model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                stack.callback(module.register_forward_pre_hook(note(name)).remove)
        stack.enter_context(_Reads(original, run.read))
        try:
            output = proof.call(model, proof.copied(example_inputs))
        except Exception as error:
            log.debug("no reasons from a run with training=%s: %s", training, proof.first_line(error))
            return None
        ends = [leaf.grad_fn for leaf in proof.leaves(output) if leaf.grad_fn is not None]
        for function in _behind(ends):
            variable = getattr(function, "variable", None)
            if variable is not None:
                run.reached.add(original.get(id(variable), 0))
        run.scored = {original.get(id(v), 0) for v in _meet_in_scores(ends)} - {0}
    return run


class _Reads(TorchFunctionMode):
    """Notes which parameters are arguments of any function."""

    def __init__(self, original: Mapping[int, int], read: set[int]) -> None:
        super().__init__()
        self._original, self._read = original, read

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        stack: list[Any] = [args, dict(kwargs or {})]
        while stack:
            each = stack.pop()
            if isinstance(each, Tensor):
                if id(each) in self._original:
                    self._read.add(self._original[id(each)])
            elif isinstance(each, list | tuple):
                stack.extend(each)
            elif isinstance(each, dict):
                stack.extend(each.values())
        return func(*args, **(kwargs or {}))


def _behind(ends: list[Any], stop_at_layers: bool = False) -> Iterator[Any]:
    """The autograd nodes behind these; or those up to and with the first layers."""
    seen: set[Any] = set()
    todo = list(ends)
    while todo:
        function = todo.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        yield function
        following = [each for each, _ in function.next_functions]
        own = [each for each in following if _variables(each)]
        todo.extend(own if stop_at_layers and own else following)


def _variables(function: Any) -> list[Any]:
    """The parameter of a leaf, also where a layer reads it transposed."""
    if function is None:
        return []
    if hasattr(function, "variable"):
        return [function.variable]
    if function.name() in ("TBackward0", "TransposeBackward0", "PermuteBackward0"):
        return _variables(function.next_functions[0][0])
    return []


def _meet_in_scores(ends: list[Any]) -> list[Any]:
    """Parameters of the layers whose outputs are multiplied with each other before a softmax."""
    found: list[Any] = []
    nodes = list(_behind(ends))
    products = [f for f in nodes if "ScaledDotProduct" in f.name()]
    for softmax in (f for f in nodes if f.name() == "SoftmaxBackward0"):
        products += [
            f for f in _behind([softmax], stop_at_layers=True) if f.name() in ("BmmBackward0", "MmBackward0")
            and not any(_variables(each) for each, _ in f.next_functions)
        ]  # fmt: skip
    for product in products:
        for function in _behind([product], stop_at_layers=True):
            found += _variables(function)
    return found
