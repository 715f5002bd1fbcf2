"""The trace: run the model, and let the axes of its parameters flow through every operation.

The rules say how the axes of a result follow from those of the inputs. Several runs are united in one trace.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from decay_pruning import proof
from decay_pruning.errors import GraphError
from decay_pruning.graph import sites
from decay_pruning.graph.attributes import reads
from decay_pruning.graph.axes import INPUT, Atom, Axes, Axis, Product, Reason, Sum
from decay_pruning.graph.run import Attentions, Run
from decay_pruning.graph.scales import Norm, Scores
from decay_pruning.graph.wanted import Wanted
from decay_pruning.keeping import eager, unwritten
from decay_pruning.structures import Place, Role
from decay_pruning.valueless import NoValueError, Shapes, is_valueless

log = logging.getLogger(__name__)


def trace(model: nn.Module, example_inputs: Sequence[Any], outputs: Sequence[str | int] = ()) -> Trace:
    """Run a model on every example, in evaluation and in training mode. The model is left as it was.

    Args:
        outputs: names of the outputs that keep their shape; none for all.

    Raises:
        ConfigError: no such output.
        GraphError: the model does not run, or its output does not depend on its parameters.
    """
    found = Trace(model)
    found.outputs.asked = tuple(outputs)
    for example in example_inputs:
        try:
            found.run(example)
        except Exception as error:
            said = str(error) if isinstance(error, NoValueError) else f"{type(error).__name__}: {error}"
            meta = "on the meta device " * is_valueless(model)
            raise GraphError(
                f"the model cannot be traced {meta}with these example inputs{sites.at(sites.of(error))}: {said}"
            ) from error
    found.outputs.check()
    if not found.live & found.parameters.keys():
        raise GraphError(f"{found.silence}, so its layers cannot be traced")
    if any(True for _ in model.children()):
        for example in example_inputs:
            for batch in (example, proof.doubled(example, example)):  # a batch-norm may want more than one
                if found.runs_in_training(batch):
                    break
    return found


#: Products for each operation from which on a run on shapes is quicker than one on values.
_HEAVY = 15_000_000


@dataclass
class Dim:
    """One dimension of a parameter or buffer."""

    place: Place
    axis: Atom
    role: Role | None = None


class Trace:
    """Axes of all parameters and buffers of a model, and what one or several runs of it say about them.

    Attributes:
        dims: every dimension of every parameter and buffer, in the order of the model.
        attributes: module attributes that carry a width → its axis.
        used: names of parameters that an operation has read.
        live: names of parameters from which an output follows.
        outputs: which outputs may lose width.
        calls: layer → axes of its first input and first output.
        integers: own module → the numbers and tuples on it that a run has read.
        norms, scores: where the model divides by a width (see `scales`).
        standardised: names of modules that normalise their own weight.
        directions: names of what weights are divided by, and of what scales them beside (None where the model divides
            something else) → axes of the divisor.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = {module: name for name, module in model.named_modules()}
        self.parameters = dict(model.named_parameters())
        self.dims: dict[Place, Dim] = {}
        self.attributes: dict[Place, Axis] = {}
        self.groups: dict[nn.Module, Axis] = {}
        self.heads: list[Axis] = []
        self.calls: dict[nn.Module, tuple[Axes, Axes]] = {}
        self.used: set[str] = set()
        self.live: set[str] = set()
        self.silence = ""
        self.operations = self.products = 0  # of the last run
        self.outputs = Wanted()
        self.norms: list[Norm] = []
        self.scores: list[Scores] = []
        self.integers: dict[str, dict[str, Any]] = {}
        self.standardised: set[str] = set()
        self.directions: dict[tuple[frozenset[str], frozenset[str] | None], Axes] = {}
        self._of_axis: dict[int, Dim] = {}
        self._tensors: dict[int, tuple[str, Axes]] = {}
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            dims = [Dim((name, d), Atom(int(n))) for d, n in enumerate(tensor.shape)]
            self.dims |= {dim.place: dim for dim in dims}
            self._of_axis |= {id(dim.axis): dim for dim in dims}
            self._tensors[id(tensor)] = name, [dim.axis for dim in dims]

    def name(self, module: nn.Module | None) -> str:
        """Class and name of a module, in words for the user."""
        return (
            f"{type(module).__name__} {self.modules.get(module, '')!r}" if module is not None else "the model"
        )

    def note_role(self, axis: Axis, role: Role) -> None:
        """Say what the slices along the parameter dimensions in an axis do, unless that is known."""
        if isinstance(axis, Product | Sum):
            for each in axis.factors if isinstance(axis, Product) else axis.terms:
                self.note_role(each, role)
            return
        dim = self._of_axis.get(id(axis))
        if dim is not None and dim.role is None:
            dim.role = role

    def is_place(self, axis: Axis) -> bool:
        """Whether this is the axis of a parameter or buffer itself."""
        return id(axis) in self._of_axis

    def place_of(self, axis: Axis) -> Place | None:
        """The dimension of a parameter that this axis is of."""
        dim = self._of_axis.get(id(axis))
        return dim.place if dim is not None and dim.place[0] in self.parameters else None

    def is_layer(self, axes: Axes) -> bool:
        """Whether a matrix is a weight as torch's layers have it, (out, in), that is read the other way round."""
        places = [dim.place for axis in axes if (dim := self._of_axis.get(id(axis)))]
        return len(places) == 2 and places[0][0] == places[1][0] and places[0][1] > places[1][1]

    def is_parameter(self, axis: Axis) -> bool:
        """Whether this is the axis of a parameter itself."""
        dim = self._of_axis.get(id(axis))
        return dim is not None and dim.place[0] in self.parameters

    def runs_in_training(self, example_inputs: Any) -> bool:
        """Run the model in training mode, where it can: on shapes, where arithmetic is most of the work."""
        heavy = self.products > _HEAVY * self.operations and not is_valueless(self.model)
        for shapes in (Shapes(), None) if heavy else (None,):
            try:
                self.run(example_inputs, training=True, shapes=shapes)
                return True
            except Exception as error:  # wants targets, for example
                log.debug("not traced in training mode: %s", proof.first_line(error))
        return False

    @contextmanager
    def _on(self, shapes: Shapes | None) -> Iterator[None]:
        """Inside, what stands for parameters and buffers has their axes."""
        if shapes is None:
            yield
            return
        with proof.stand_ins(self.model, None, True, make=shapes.weight) as shapes.known:
            known = {id(new): self._tensors[key] for key, new in shapes.known.items() if key in self._tensors}
            self._tensors |= known
            try:
                yield
            finally:
                for key in known:
                    del self._tensors[key]

    def run(self, example_inputs: Any, *, training: bool = False, shapes: Shapes | None = None) -> None:
        """Run the model once and take note.

        Raises:
            Exception: whatever the model raises.
        """
        # A module that computes its weight leaves the last one on itself (weight norm, masks): put it back.
        kept = [(module, dict(module.__dict__)) for module in self.modules]
        run, example_inputs = Run(self), proof.copied(example_inputs)
        for leaf in proof.leaves(example_inputs):
            run.see(leaf, [Atom(int(n), Reason(INPUT, "is tied to the model's input")) for n in leaf.shape])
        try:
            with (
                proof.untouched(self.model),
                _no_fast_paths(),
                torch.no_grad(),
                run.hooks(),
                reads(self),
                Attentions(run),
            ):
                if training:
                    for module in self.modules:
                        module.training = True
                with self._on(shapes), eager(), unwritten(self.model, watch=False) as run.written, run:
                    output = proof.call(self.model, example_inputs, shapes)
        finally:
            for module, values in kept:
                for leaf, value in values.items():
                    if isinstance(value, Tensor):
                        module.__dict__[leaf] = value
        run.finish(output)
        self.operations, self.products = run.operations, run.products


@contextmanager
def _no_fast_paths() -> Iterator[None]:
    """Layers run operation by operation, not as one fused kernel."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
