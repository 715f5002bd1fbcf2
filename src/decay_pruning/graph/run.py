"""Run: one forward pass, with the axes of every tensor in it.

A dispatch mode sees each operation that really happens, whatever Python wrote it: control flow, functional calls,
parametrizations, einsum.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from decay_pruning import proof
from decay_pruning.graph import scales, sites
from decay_pruning.graph.axes import (
    CONSTANT,
    OPERATION,
    OUTPUT,
    Atom,
    Axes,
    Axis,
    Misaligned,
    Reason,
    fix,
    unify,
)
from decay_pruning.graph.op import Op, is_whole, name_of, tensors
from decay_pruning.keeping import Written
from decay_pruning.valueless import on_shapes

if TYPE_CHECKING:
    from decay_pruning.graph.trace import Trace


#: Names of parameters → axes of what was made of them and divides something.
Divisors = dict[frozenset[str], Axes]


@dataclass
class Value:
    """What is known of one tensor of a run."""

    axes: Axes
    parents: list[Value]
    base: Value | None = None
    derived: bool = False  # from parameters and buffers alone
    parameter: str | None = None
    divisors: Divisors = field(default_factory=dict)  # what it was divided by, derived as well
    shift: float = 0.0  # derived: a number that was added
    stage: scales.Stage | None = None
    rows: scales.Rows | None = None

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


class Attentions(TorchFunctionMode):
    """Tells a run that an attention begins whose scale follows the width: its products can come one by one."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self._run = run

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        attention = func is torch.nn.functional.scaled_dot_product_attention
        self._run.scaled |= attention and given.get("scale") is None and len(args) < 7
        try:
            return func(*args, **given)
        finally:
            if attention:
                self._run.scaled = False


class Run(TorchDispatchMode):
    """One run of the model."""

    supports_higher_order_operators = True

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace
        self.stack: list[nn.Module] = []
        self.written: Written
        self.operations = self.products = 0
        self.scaled = False  # an attention begins that divides by the root of its width
        self._seen: dict[int, tuple[Any, Value]] = {}

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Know which module is running, and what goes into layers and comes out."""

        def enter(module: nn.Module, args: Any) -> None:
            self.stack.append(module)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            while self.stack and self.stack.pop() is not module:
                pass
            if module in self.trace.calls:
                return
            first = next(proof.leaves(args), None)
            result = next(proof.leaves(output), None)
            if first is not None and result is not None:
                self.trace.calls[module] = self.axes(first), self.axes(result)

        handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def value(self, tensor: Tensor) -> Value:
        """What is known of a tensor: a parameter, a result, or a constant."""
        found = self._seen.get(id(tensor))
        if found is not None and found[0]() is tensor:
            return found[1]
        known = self.trace._tensors.get(id(tensor))
        if known is not None:
            self.trace.used.add(known[0])
            return self.see(tensor, known[1], parameter=known[0])
        why = Reason(CONSTANT, f"meets a tensor that is no parameter or buffer{sites.at(self.site())}")
        return self.see(tensor, [Atom(int(n), why) for n in tensor.shape])

    def axes(self, tensor: Tensor) -> Axes:
        return self.value(tensor).axes

    def site(self) -> str:
        return sites.site() or self.trace.name(self.stack[-1] if self.stack else None)

    def see(self, tensor: Tensor, axes: Axes, *, parameter: str | None = None) -> Value:
        value = Value(axes, [], derived=parameter is not None, parameter=parameter)
        self._seen[id(tensor)] = weakref.ref(tensor), value
        return value

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if name_of(func) == "cond":
            return self._both(*args)
        if is_whole(func):  # in inference mode
            with self:
                parts = func.decompose(*args, **(kwargs or {}))
            if parts is not NotImplemented:
                return parts
        given = kwargs or {}
        self.written.before(func, args, given)
        result = on_shapes(func, args, given)
        outputs = list(tensors([result]))
        if outputs:
            self._weigh(args, outputs[0])
            self._follow(Op(self, func, args, given, outputs), args)
        return result

    def _weigh(self, args: Sequence[Any], output: Tensor) -> None:
        """How much arithmetic there is in an operation with a weight, roughly."""
        self.operations += 1
        for each in args[:3]:
            if isinstance(each, Tensor) and each.ndim > 1 and id(each) in self.trace._tensors:
                self.products += output.numel() * each.numel() // max(1, each.shape[0])

    def _both(self, holds: Tensor, yes: Any, no: Any, operands: Sequence[Tensor]) -> Any:
        """The branches of `torch.cond`: what they return is one, whichever is taken."""
        with self:
            taken, other = (branch(*operands) for branch in ((yes, no) if holds else (no, yes)))
        for a, b in zip(tensors([taken]), tensors([other]), strict=True):
            value = self.value(a)
            value.parents.append(self.value(b))
            for one, another in zip(value.axes, self.axes(b), strict=True):
                try:
                    unify(one, another)
                except Misaligned:
                    for axis in (one, another):
                        fix(axis, Reason(OPERATION, f"is seen in two ways by cond{sites.at(self.site())}"))
        return taken

    def _follow(self, op: Op, args: Sequence[Any]) -> None:
        inputs = [self.value(t) for t in op.inputs]
        before = [replace(value) for value in inputs]  # what it changes in place
        found = op.results()
        derived = bool(inputs) and all(v.derived for v in inputs)
        if not derived:
            found = [[_anonymous(self.trace, axis) for axis in axes] for axes in found]
        divisors = self._divisors(op, inputs)
        mutates, aliases = _effects(op.function)
        for tensor, axes in zip(op.outputs, found, strict=True):
            if mutates and any(tensor is t for t in op.inputs):
                value = self.value(tensor)
                value.divisors = divisors if derived else {}
                value.parents += [v for v in inputs if v is not value]
                value.derived &= derived
                if torch.Tag.inplace_view in getattr(op.function, "tags", ()):  # transpose_, squeeze_
                    value.axes = axes
                while value.base is not None:
                    value = value.base
                    value.parents += [v for v in inputs if v is not value]
                    value.derived &= derived
                continue
            value = self.see(tensor, axes)
            value.parents, value.derived = inputs, derived
            value.base = inputs[0] if aliases and inputs else None
            value.divisors = divisors if derived else {}
        scales.follow(op, before, [self.value(tensor) for tensor in op.outputs], args)

    def _divisors(self, op: Op, inputs: Sequence[Value]) -> Divisors:
        """Weights that this divides by. Noted where the quotient, or the divisor itself, meets an activation."""
        before: Divisors = {}
        for value in inputs:
            before = {**value.divisors, **before}
        divisors = [value for t in _divisor(op) if (value := self.value(t)).derived]
        own: Divisors = {frozenset(value.names()): value.axes for value in divisors}
        if not all(value.derived for value in inputs):
            for value in inputs:
                rest = frozenset(value.names()).difference(*value.divisors) if value.divisors else None
                for names, axes in value.divisors.items():
                    self.trace.directions.setdefault((names, rest), axes)
            for names, axes in own.items():
                self.trace.directions.setdefault((names, None), axes)
        return {**before, **own}

    def finish(self, output: Any) -> None:
        """Outputs keep their shape; what leads to them is alive."""
        why = Reason(OUTPUT, "feeds the model's output")
        todo: list[Value] = []
        given = list(proof.leaves(output))
        self.trace.silence = _silence(output, given)
        names = self.trace.outputs.names(output, len(given))
        for name, leaf in zip(names, given, strict=True):
            value = self.value(leaf)
            if name is None:
                for axis in value.axes:
                    fix(axis, why)
            else:
                self._may_lose(name, value.axes)
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

    def _may_lose(self, name: str, axes: Axes) -> None:
        """An output that need not keep its shape: in every run it has the same axes."""
        before = self.trace.outputs.axes.setdefault(name, axes)
        for mine, axis in zip(before, axes, strict=False):
            try:
                unify(mine, axis)
            except Misaligned:  # another batch
                for each in (mine, axis):
                    fix(each, Reason(OUTPUT, f"feeds the output {name!r} in two ways"))


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


@cache
def _effects(function: Any) -> tuple[bool, bool]:
    """Whether an operator changes its first input, and whether its result is a view of it."""
    if not hasattr(function, "_schema"):
        return False, False
    infos = [a.alias_info for a in function._schema.arguments if a.alias_info is not None]
    return any(info.is_write for info in infos), any(not info.is_write for info in infos)
