"""Op: one operation, as the rules see it, and what they can do with its axes."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from torch import Tensor

from decay_pruning import proof
from decay_pruning.graph import sites
from decay_pruning.graph.axes import (
    OPERATION,
    UNIT,
    Atom,
    Axes,
    Axis,
    Misaligned,
    Reason,
    fix,
    is_fixed,
    leaves,
    unify,
)
from decay_pruning.structures import Role

if TYPE_CHECKING:
    from decay_pruning.graph.run import Run, Value
    from decay_pruning.graph.scales import Norm

log = logging.getLogger(__name__)


class Op:
    """One operation that has just run, as the rules see it: `op["dim"]` is an argument, by its name."""

    def __init__(
        self, run: Run, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], outputs: list[Tensor]
    ) -> None:
        self.function = function
        name = name_of(function)
        self.name = name if name.endswith("__") else name.removesuffix("_")  # its form that is not in place
        self.arguments = dict(_parameters(function))
        self.arguments.update(zip(self.arguments, args, strict=False))
        self.arguments.update(kwargs)
        self.inputs = list(tensors(self.arguments.values()))
        self.outputs = outputs
        self.trace = run.trace
        self.module = run.stack[-1] if run.stack else None
        self._run = run
        self.scaled, run.scaled = run.scaled, run.scaled and not name.endswith("bmm")
        self.norm: Norm | None = None  # that begins here
        self._site: str | None = None
        self._made: Reason | None = None

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

    def value(self, tensor: Tensor) -> Value:
        """What is known of a tensor."""
        return self._run.value(tensor)

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
            why = Reason(OPERATION, f"{text} {name or self.name}{sites.at(self.site())}")
            for axis in axes:
                fix(axis, why)

    def fixed(self, size: int) -> Axis:
        """A new axis that never loses a position."""
        if self._made is None:
            self._made = Reason(UNIT, f"is a size that {self.name} makes{sites.at(self.site())}")
        return Atom(size, self._made)

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
                atom.site = f"{self.name.strip('_')}{sites.at(where)}"

    def site(self) -> str:
        """Where in the user's code this is, or in which of torch's layers."""
        self._site = self._site or self._run.site()
        return self._site

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


def tensors(values: Any) -> Iterator[Tensor]:
    for each in values:
        if isinstance(each, Tensor):
            yield each
        elif isinstance(each, list | tuple):
            yield from tensors(each)


def name_of(function: Any) -> str:
    """The name of an operator in ATen; or of one of torch's operators on functions, which have no schema."""
    name: str = function._schema.name if hasattr(function, "_schema") else function.name()
    return name.removeprefix("aten::")


@cache
def is_whole(function: Any) -> bool:
    """Whether an operator has no rule and may be made of others."""
    from decay_pruning.graph.rules import rule_of

    return hasattr(function, "decompose") and rule_of(function) is None


@cache
def _parameters(function: Any) -> tuple[tuple[str, Any], ...]:
    if not hasattr(function, "_schema"):
        return tuple((name, None) for name in inspect.signature(function.__call__).parameters)
    return tuple((a.name, a.default_value) for a in function._schema.arguments)
