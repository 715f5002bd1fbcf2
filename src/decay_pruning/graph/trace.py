"""The trace: run the model once, and let the axes of its parameters flow through every operation.

A dispatch mode sees each operation that really happens, whatever Python wrote it: control flow, functional calls,
parametrizations, einsum. The rules say how the axes of its results follow from those of its inputs.
"""

from __future__ import annotations

import logging
import os
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from decay_pruning import proof
from decay_pruning.errors import GraphError
from decay_pruning.graph.axes import (
    Atom,
    Axis,
    Misaligned,
    Product,
    Reason,
    Sum,
    fix,
    is_fixed,
    leaves,
    unify,
)
from decay_pruning.keeping import unwritten
from decay_pruning.structures import Place, Role

log = logging.getLogger(__name__)

Axes = list[Axis]

#: Ranks of reasons: of several, the user is told the last.
UNIT, CONSTANT, INPUT, CROSSING, OPERATION, OUTPUT, IGNORED = range(7)
_TORCH = os.path.dirname(torch.__file__)
_HERE = os.path.dirname(__file__)


def site() -> str | None:
    """File and line of the user's code that is running, if any of the model's is."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not proof.call.__code__:
        name = frame.f_code.co_filename
        if not name.startswith((_TORCH, _HERE, "<")) and not name.endswith("keeping.py"):
            return f"{os.path.basename(name)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return None


def by_hand() -> bool:
    """Whether the user's own code asked for the operation that is running, not a layer or function of torch."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_HERE):
        frame = frame.f_back
    return not frame.f_code.co_filename.startswith(_TORCH)


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
        calls: layer → axes of its first input and first output.
        integers: own module → the integers and tuples on it that a run has read.
        standardised: names of modules that normalise their own weight.
        directions: names of what weights are divided by, axes of the divisor, and names of what scales them beside
            (None where the model divides something else).
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
        self.integers: dict[str, dict[str, Any]] = {}
        self.standardised: set[str] = set()
        self.directions: list[tuple[set[str], set[str] | None, Axes]] = []
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

    def is_layer(self, axes: Axes) -> bool:
        """Whether a matrix is a weight as torch's layers have it, (out, in), that is read the other way round."""
        places = [dim.place for axis in axes if (dim := self._of_axis.get(id(axis)))]
        return len(places) == 2 and places[0][0] == places[1][0] and places[0][1] > places[1][1]

    def is_parameter(self, axis: Axis) -> bool:
        """Whether this is the axis of a parameter itself."""
        dim = self._of_axis.get(id(axis))
        return dim is not None and dim.place[0] in self.parameters

    def run(self, example_inputs: Any, *, training: bool = False) -> None:
        """Run the model once and take note.

        Raises:
            Exception: whatever the model raises.
        """
        # A module that computes its weight leaves the last one on itself (weight norm, masks): put it back.
        kept = [(module, dict(module.__dict__)) for module in self.modules]
        run, example_inputs = _Run(self), proof.copied(example_inputs)
        for leaf in proof.leaves(example_inputs):
            run.see(leaf, [Atom(int(n), Reason(INPUT, "is tied to the model's input")) for n in leaf.shape])
        try:
            with proof.untouched(self.model), _no_fast_paths(), torch.no_grad(), run.hooks(), reads(self):
                if training:
                    for module in self.modules:
                        module.training = True
                with unwritten(self.model), run:
                    output = proof.call(self.model, example_inputs)
        finally:
            for module, values in kept:
                for leaf, value in values.items():
                    if isinstance(value, Tensor):
                        module.__dict__[leaf] = value
        run.finish(output)


@contextmanager
def reads(trace: Trace) -> Iterator[None]:
    """Note which integers (and tuples) on a user's own modules the code reads.

    For that they are not where Python looks first, so that it asks `nn.Module.__getattr__` for them.
    """
    hidden: dict[int, dict[str, Any]] = {}
    original = nn.Module.__getattr__

    def look(module: nn.Module, leaf: str) -> Any:
        mine = hidden.get(id(module), {})
        if leaf not in mine:
            return original(module, leaf)
        trace.integers.setdefault(trace.modules[module], {})[leaf] = mine[leaf]
        return mine[leaf]

    for module in trace.modules:
        if not _of_torch(module):
            own = vars(module)
            mine = {k: v for k, v in own.items() if type(v) in (int, tuple) and not hasattr(type(module), k)}
            hidden[id(module)] = mine
            for leaf in mine:
                del own[leaf]
    nn.Module.__getattr__ = look  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__getattr__ = original  # type: ignore[method-assign]
        for module in trace.modules:
            for leaf, value in hidden.get(id(module), {}).items():
                vars(module).setdefault(leaf, value)


def _of_torch(module: nn.Module) -> bool:
    """Layers of torch, whose attributes are known; but not those that only carry a user's numbers."""
    known = type(module).__module__.startswith("torch.nn.modules") and not isinstance(module, nn.Unflatten)
    return known or isinstance(module, torch.jit.ScriptModule)


@contextmanager
def _no_fast_paths() -> Iterator[None]:
    """Layers run operation by operation, not as one fused kernel."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@dataclass
class _Value:
    """What is known of one tensor of a run."""

    axes: Axes
    parents: list[_Value]
    base: _Value | None = None
    derived: bool = False  # from parameters and buffers alone
    parameter: str | None = None
    divisors: tuple[_Value, ...] = ()  # what it was divided by, derived as well

    def names(self) -> set[str]:
        """The parameters and buffers that a derived value comes from."""
        found: set[str] = set()
        todo, seen = [self], set()
        while todo:
            value = todo.pop()
            if id(value) not in seen:
                seen.add(id(value))
                found |= {value.parameter} if value.parameter else set()
                todo += value.parents
        return found


class _Run(TorchDispatchMode):
    """One run of the model."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace
        self.stack: list[nn.Module] = []
        self._seen: dict[int, tuple[Any, _Value]] = {}

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Know which module is running, and what goes into layers and comes out."""

        def enter(module: nn.Module, args: Any) -> None:
            self.stack.append(module)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            while self.stack and self.stack.pop() is not module:
                pass
            first = next(proof.leaves(args), None)
            result = next(proof.leaves(output), None)
            if first is not None and result is not None and module not in self.trace.calls:
                self.trace.calls[module] = self.axes(first), self.axes(result)

        handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def value(self, tensor: Tensor) -> _Value:
        """What is known of a tensor: a parameter, a result, or a constant."""
        found = self._seen.get(id(tensor))
        if found is not None and found[0]() is tensor:
            return found[1]
        known = self.trace._tensors.get(id(tensor))
        if known is not None:
            self.trace.used.add(known[0])
            return self.see(tensor, known[1], parameter=known[0])
        why = Reason(CONSTANT, f"meets a tensor that is no parameter or buffer{at(self._site())}")
        return self.see(tensor, [Atom(int(n), why) for n in tensor.shape])

    def axes(self, tensor: Tensor) -> Axes:
        return self.value(tensor).axes

    def _site(self) -> str:
        return site() or self.trace.name(self.stack[-1] if self.stack else None)

    def see(self, tensor: Tensor, axes: Axes, *, parameter: str | None = None) -> _Value:
        value = _Value(axes, [], derived=parameter is not None, parameter=parameter)
        self._seen[id(tensor)] = weakref.ref(tensor), value
        return value

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = [t for t in _tensors([result])]
        if outputs:
            self._follow(Op(self, func, args, kwargs or {}, outputs))
        return result

    def _follow(self, op: Op) -> None:
        inputs = [self.value(t) for t in op.inputs]
        found = op.results()
        derived = bool(inputs) and all(v.derived for v in inputs)
        if not derived:
            found = [[_anonymous(self.trace, axis) for axis in axes] for axes in found]
        divisors = self._divisors(op, inputs)
        mutates, aliases = _effects(op.function)
        for tensor, axes in zip(op.outputs, found, strict=True):
            if mutates and any(tensor is t for t in op.inputs):
                value = self.value(tensor)
                value.parents += [v for v in inputs if v is not value]
                if torch.Tag.inplace_view in op.function.tags:  # transpose_, squeeze_
                    value.axes = axes
                while value.base is not None:
                    value = value.base
                    value.parents += [v for v in inputs if v is not value]
                value.divisors = divisors if derived else value.divisors
                continue
            value = self.see(tensor, axes)
            value.parents, value.derived = inputs, derived
            value.base = inputs[0] if aliases and inputs else None
            value.divisors = divisors if derived else ()

    def _divisors(self, op: Op, inputs: Sequence[_Value]) -> tuple[_Value, ...]:
        """Weights that this divides by. Noted where the quotient, or the divisor itself, meets an activation."""
        own = tuple(self.value(t) for t in _divisor(op))
        before = tuple(d for v in inputs for d in v.divisors)
        if not all(v.derived for v in inputs):
            for value in inputs:
                if value.divisors:
                    rest = value.names() - {name for d in value.divisors for name in d.names()}
                    self.trace.directions += [(d.names(), rest, d.axes) for d in value.divisors]
            self.trace.directions += [(d.names(), None, d.axes) for d in own if d.derived]
        return (*before, *own)

    def finish(self, output: Any) -> None:
        """Outputs keep their shape; what leads to them is alive."""
        why = Reason(OUTPUT, "feeds the model's output")
        todo: list[_Value] = []
        given = list(proof.leaves(output))
        self.trace.silence = _silence(output, given)
        for leaf in given:
            value = self.value(leaf)
            for axis in value.axes:
                fix(axis, why)
            if leaf.is_floating_point() or leaf.is_complex():
                todo.append(value)
        reached: set[int] = set()
        while todo:
            value = todo.pop()
            if id(value) in reached:
                continue
            reached.add(id(value))
            if value.parameter is not None:
                self.trace.live.add(value.parameter)
            todo += value.parents
        self._seen.clear()


def _divisor(op: Op) -> Iterator[Tensor]:
    """What an operation divides by: it must not be zero."""
    negative = op.name == "pow" and isinstance(op["exponent"], int | float) and op["exponent"] < 0
    name = {"div": "other", "reciprocal": "self", "rsqrt": "self", "_weight_norm_interface": "v"}.get(op.name)
    mine = op["self"] if negative else op.get(name) if name else None
    if isinstance(mine, Tensor):
        yield mine


def _anonymous(trace: Trace, axis: Axis) -> Axis:
    """The same axis, no longer known as that of a parameter: what an activation is used for says nothing of it."""
    if isinstance(axis, Atom) and not trace.is_place(axis):
        return axis
    alias = Atom(axis.size)
    alias.bound = axis
    return alias


def _silence(output: Any, given: Sequence[Tensor]) -> str:
    """Why a model's output says nothing of its parameters, in words."""
    if not given:
        return f"the model returns no tensor (a {type(output).__name__})"
    if not any(leaf.is_floating_point() or leaf.is_complex() for leaf in given):
        return f"the model's output holds no floating tensor ({proof.WAY_OUT})"
    return "no output of the model depends on its parameters"


def _tensors(values: Any) -> Iterator[Tensor]:
    for each in values:
        if isinstance(each, Tensor):
            yield each
        elif isinstance(each, list | tuple):
            yield from _tensors(each)


@cache
def _effects(function: Any) -> tuple[bool, bool]:
    """Whether an operator changes its first input, and whether its result is a view of it."""
    infos = [a.alias_info for a in function._schema.arguments if a.alias_info is not None]
    return any(info.is_write for info in infos), any(not info.is_write for info in infos)


@cache
def _parameters(function: Any) -> tuple[tuple[str, Any], ...]:
    return tuple((a.name, a.default_value) for a in function._schema.arguments)


def at(where: str | None) -> str:
    return f" ({where})" if where else ""


class Op:
    """One operation that has just run, as the rules see it: `op["dim"]` is an argument, by its name."""

    def __init__(
        self, run: _Run, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], outputs: list[Tensor]
    ) -> None:
        self.function = function
        name: str = function._schema.name.removeprefix("aten::")
        self.name = (
            name if name.endswith("__") else name.removesuffix("_")
        )  # as its form that is not in place
        self.arguments = dict(_parameters(function))
        self.arguments.update(zip(self.arguments, args, strict=False))
        self.arguments.update(kwargs)
        self.inputs = list(_tensors(self.arguments.values()))
        self.outputs = outputs
        self.trace = run.trace
        self.module = run.stack[-1] if run.stack else None
        self._run = run

    def __getitem__(self, argument: str) -> Any:
        return self.arguments[argument]

    def get(self, argument: str, default: Any = None) -> Any:
        return self.arguments.get(argument, default)

    @property
    def derived(self) -> bool:
        """Whether all that goes in is made of parameters and buffers alone."""
        return all(self._run.value(t).derived for t in self.inputs)

    @property
    def output(self) -> Tensor:
        return self.outputs[0]

    def axes(self, argument: str | Tensor) -> Axes:
        """Axes of a tensor, or of the tensor that is given for an argument."""
        tensor = self.arguments[argument] if isinstance(argument, str) else argument
        return list(self._run.axes(tensor))

    def tie(self, a: Axis, b: Axis) -> None:
        """Two axes are one. Where they cannot be, both are fixed."""
        try:
            unify(a, b)
        except Misaligned:
            self.refuse([a, b], "is seen in two ways that do not fit together by")

    def refuse(self, axes: Sequence[Axis], text: str, *, name: str | None = None) -> None:
        """Fix axes, in words that end in the name of the operation."""
        if not all(is_fixed(axis) for axis in axes):
            why = Reason(OPERATION, f"{text} {name or self.name}{at(self.site())}")
            for axis in axes:
                fix(axis, why)

    def fixed(self, size: int) -> Axis:
        """A new axis that never loses a position."""
        return Atom(size, Reason(UNIT, f"is a size that {self.name} makes{at(self.site())}"))

    def made(self, tensor: Tensor) -> Axes:
        """A new tensor: as wide as the code says."""
        axes: Axes = [Atom(int(n)) for n in tensor.shape]
        self.mark(axes)
        return axes

    def mark(self, axes: Sequence[Axis]) -> None:
        """Remember where the code splits or sizes these axes, to be named where a removal fails, and the module."""
        where = None
        user = None if self.module is None else self.trace.modules.get(self.module)
        for atom in (atom for axis in axes for atom in leaves(axis)):
            if user is not None:
                atom.users.add(user)
            if atom.reason is None and atom.site is None and atom.size > 1:
                where = where or self.site()
                atom.site = f"{self.name.strip('_')}{at(where)}"

    def site(self) -> str:
        """Where in the user's code this is, or in which of torch's layers."""
        return self._run._site()

    def role(self, axis: Axis, role: Role) -> None:
        self.trace.note_role(axis, role)

    def _unknown(self, text: str) -> list[Axes]:
        every = [axis for t in self.inputs for axis in self.axes(t)]
        self.refuse(every, text, name=str(self.function))
        return [[self.fixed(int(n)) for n in t.shape] for t in self.outputs]

    def results(self) -> list[Axes]:
        """Axes of every output, by the rule of this operation."""
        from decay_pruning.graph.rules import rule_of

        rule = rule_of(self.function)
        if rule is None:
            if not self.inputs:
                return [self.made(t) for t in self.outputs]
            return self._unknown("goes through an operation without a rule,")
        try:
            found = rule(self)
        except Exception as error:  # costs what goes through this operation, and nothing else
            log.debug("the rule of %s fails", self.function, exc_info=True)
            return self._unknown(f"goes through an operation whose rule fails ({proof.first_line(error)}),")
        lists: list[Axes] = found if found and isinstance(found[0], list) else [found] * len(self.outputs)  # type: ignore[list-item]
        lists = lists + [[]] * (len(self.outputs) - len(lists))
        return [
            axes if [a.size for a in axes] == list(t.shape) else [self.fixed(int(n)) for n in t.shape]
            for t, axes in zip(self.outputs, lists, strict=True)
        ]


Rule = Callable[[Op], "Axes | list[Axes]"]


def trace(model: nn.Module, example_inputs: Sequence[Any]) -> Trace:
    """Run a model on every example, in evaluation and in training mode. The model is left as it was.

    Raises:
        GraphError: the model does not run, or its output does not depend on its parameters.
    """
    found = Trace(model)
    for example in example_inputs:
        try:
            found.run(example)
        except Exception as error:
            raise GraphError(
                f"the model cannot be traced with these example inputs: {type(error).__name__}: {error}"
            ) from error
    if not found.live & found.parameters.keys():
        raise GraphError(f"{found.silence}, so its layers cannot be traced")
    if any(True for _ in model.children()):
        for example in example_inputs:
            for batch in (example, proof.doubled(example, example)):  # a batch-norm may want more than one
                try:
                    found.run(batch, training=True)
                    break
                except Exception as error:  # wants targets, for example
                    log.debug("not traced in training mode: %s", proof.first_line(error))
    return found
