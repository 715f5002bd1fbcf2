"""Scales: where a model divides by a width, and which parameters can take the change when the width becomes smaller.

Two things are followed through a run, each as a note on the values that pass:

- a root mean square, from the mean of squares to the product with γ (`Norm`). What it needs is one γ that nothing else
  uses, and an ε that is zero or a number on the module;
- rows: which rows of a parameter a value comes from, such that it is twice as large where they are (`Rows`). Where such
  a value is the query of an attention, these rows can take the change of its scale (`Scores`).

What is found here is a proposal, as all else: verification tries it on the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from decay_pruning.folds import Fold, Place, Scaled
from decay_pruning.graph.axes import Axis, is_fixed, leaves

if TYPE_CHECKING:
    from decay_pruning.graph.op import Op
    from decay_pruning.graph.run import Value
    from decay_pruning.graph.trace import Trace

#: The same values, in another dtype or place.
_SAME = {"_to_copy", "alias", "clone", "contiguous", "detach", "lift_fresh", "to"}
#: The same values in another shape: done to the numbers of rows as well.
_SHAPED = {
    *("view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t", "unsqueeze", "squeeze"),
    *("select", "slice", "split", "split_with_sizes", "unsafe_split", "chunk", "unbind", "expand", "flatten"),
    *("view_as_complex", "view_as_real"),
}  # fmt: skip
_LINEAR = {*_SAME, "neg", "dropout", "native_dropout", "masked_fill"}


@dataclass
class Norm:
    """A root mean square over an axis.

    Attributes:
        axis: what it goes over.
        module: name of the module whose code it is in.
        surely: the scale is known to follow the width; otherwise it is tried where the removal changes the output.
        unfit: says what is to be said where no fold is possible, for a reason.
        epsilon: what is added, or None.
        epsilon_power: of the ratio of the widths, for ε.
        level: size of what ε is added to.
        gammas: what the result is multiplied with → what the model adds to that before.
        broken: why no fold is possible.
        stage: how far it has come.
    """

    axis: Axis
    module: str | None
    surely: bool
    unfit: Callable[[str], None] = lambda why: None
    epsilon: float | None = None
    epsilon_power: float = 1.0
    level: float | None = None
    gammas: dict[str, float] = field(default_factory=dict)
    broken: str = ""

    def numbers(self, trace: Trace) -> list[str]:
        """Numbers on the module that ε can be, by name; raises what is wrong in words."""
        if not self.epsilon:
            return []
        module = None if self.module is None else trace.model.get_submodule(self.module)
        prefix = f"{self.module}." if self.module else ""
        if isinstance(module, nn.RMSNorm):
            return [f"{prefix}eps"]
        read = trace.integers.get(self.module or "", {}) if module is not None else {}
        return [
            prefix + leaf for leaf, value in read.items() if type(value) is float and value == self.epsilon
        ]


@dataclass
class Stage:
    """What a value is on the way of a norm: "square", "mean", "root", "inverse" or "normed"."""

    kind: str
    norm: Norm | None = None


@dataclass
class Rows:
    """The rows that a value comes from.

    Attributes:
        places: the parameters and their dimensions; along all of them the rows have the same numbers.
        labels: in the shape of the value: the number of the row behind each element.
        offset: what the model adds to the parameter.
    """

    places: frozenset[Place]
    labels: Tensor
    offset: float = 0.0

    def lines(self) -> Tensor:
        """The numbers of the rows behind each vector of the last dimension, where those of one head differ."""
        first = self.labels.select(-2, 0).to(torch.int64)
        lines: Tensor = torch.unique(first.reshape(-1, first.shape[-1]), dim=0)
        return lines


@dataclass
class Scores:
    """Products of queries and keys along an axis.

    Attributes:
        axis: what is summed over.
        rows: where the queries come from; or None.
        keys: where the keys come from; the same rows where queries and keys are one.
        module: name of the module whose code this is in.
        surely: the scale is known to follow the width.
    """

    axis: Axis
    rows: Rows | None
    keys: Rows | None
    module: str | None
    surely: bool

    def fold(self) -> Fold | None:
        """What takes the change of the scale."""
        if self.rows is None:
            return None
        lines, keys = self.rows.lines(), self.keys
        one = keys is not None and keys.places == self.rows.places and torch.equal(keys.lines(), lines)
        power = -0.25 if one else -0.5
        position = lines.flatten()
        if position.unique().numel() != position.numel():
            return None
        line = torch.arange(len(lines)).repeat_interleave(lines.shape[1])
        places = sorted(self.rows.places)
        scaled = tuple(Scaled(*place, position, power, self.rows.offset) for place in places)
        return Fold(places[0], line, position, scaled)


# ------------------------------------------------------------------------------------------- through a run


def follow(op: Op, inputs: Sequence[Value], outputs: Sequence[Value], args: Sequence[Any]) -> None:
    """Note on the outputs of an operation what follows from the notes on its inputs."""
    if all(value.derived for value in inputs):
        _shift(op, inputs, outputs)
        return
    stage, rows = _stage(op, inputs), _rows(op, inputs, args)
    for k, value in enumerate(outputs):
        value.stage = stage
        value.rows = rows[k] if rows is not None and k < len(rows) else None


def _shift(op: Op, inputs: Sequence[Value], outputs: Sequence[Value]) -> None:
    """Weights to which the model adds a number."""
    shift = next((value.shift for value in inputs if value.shift), 0.0)
    if op.name == "add" and len(inputs) == 1 and isinstance(op["other"], int | float):
        shift += float(op["other"]) * float(op.get("alpha", 1))
    elif op.name == "rsub" or (op.name not in _SAME | _SHAPED and shift):
        shift = 0.0
    for value in outputs:
        value.shift = shift


def _stage(op: Op, inputs: Sequence[Value]) -> Stage | None:
    if _is_square(op, inputs):
        return Stage("square")
    if op.norm is not None:
        return Stage("root" if op.name == "linalg_vector_norm" else "mean", op.norm)
    staged = [value.stage for value in inputs if value.stage is not None and value.stage.norm is not None]
    if len(staged) != 1:
        for stage in staged:
            _break(stage, "")
        return None
    stage, norm = staged[0], staged[0].norm
    assert norm is not None
    given = (op.get("other"), op.get("exponent"))
    number = next((value for value in given if isinstance(value, int | float)), None)
    if op.name in _SAME | _SHAPED or op.name in ("clamp_min", "clamp", "expand_as"):
        return stage
    kind = stage.kind
    if kind == "normed":
        return _scaled(op, stage, inputs, number)
    if op.name == "add" and number is not None and len(inputs) == 1 and kind in ("mean", "root"):
        if norm.epsilon is not None:
            _break(stage, "")
        norm.epsilon = float(number) * float(op.get("alpha", 1))
        norm.epsilon_power = 1.0 if kind == "mean" else 0.5
        norm.level = _level(op.inputs[0])
        return stage
    if op.name in ("mul", "div") and number is not None and not norm.surely:
        return stage  # by the width, or its root
    if kind == "mean" and (op.name == "rsqrt" or (op.name == "pow" and number == -0.5)):
        return Stage("inverse", norm)
    if kind == "mean" and (op.name == "sqrt" or (op.name == "pow" and number == 0.5)):
        return Stage("root", norm)
    if kind == "root" and op.name == "reciprocal":
        return Stage("inverse", norm)
    other = [value for value in inputs if value.stage is not stage]
    divides = op.name == "div" and len(inputs) == 2 and inputs[1].stage is stage
    if kind == "inverse" and op.name == "mul" and len(other) == 1 and other[0].derived and not norm.gammas:
        _scaled(op, stage, inputs, number)  # the root times γ comes before what is divided by it
        return stage
    whole = (kind == "root" and divides) or (kind == "inverse" and op.name == "mul")
    if whole and len(other) == 1 and not other[0].derived:
        return None if norm.gammas else Stage("normed", norm)
    _break(stage, "")
    return None


def _scaled(op: Op, stage: Stage, inputs: Sequence[Value], number: float | None) -> Stage | None:
    """The product with γ, which is where a norm ends."""
    norm = stage.norm
    assert norm is not None
    if op.name in ("mul", "div") and number is not None and not norm.surely:
        return stage
    weights = [value for value in inputs if value.derived]
    names = weights[0].names() if len(weights) == 1 and len(inputs) == 2 else set()
    if op.name == "mul" and len(names) == 1 and names <= op.trace.parameters.keys():
        norm.gammas[names.pop()] = weights[0].shift
        return None
    _break(stage, "has no scale of its own behind it")
    return None


def _break(stage: Stage, why: str) -> None:
    if stage.norm is not None:
        stage.norm.broken = stage.norm.broken or why or "is used in another way, too"


def _is_square(op: Op, inputs: Sequence[Value]) -> bool:
    if op.name == "pow":
        exponent = op["exponent"]
        return len(inputs) == 1 and isinstance(exponent, int | float) and exponent == 2
    return op.name == "square" or (op.name == "mul" and len(inputs) == 2 and op.inputs[0] is op.inputs[1])


def _level(tensor: Tensor) -> float | None:
    if tensor.is_meta or not tensor.numel():
        return None
    found = float(tensor.detach().double().mean())
    return found if 0 < found < 1e30 else None


def _rows(op: Op, inputs: Sequence[Value], args: Sequence[Any]) -> list[Rows | None] | None:
    made = _made(op, inputs)
    if made is not None:
        return [made]
    known = [value.rows for value in inputs if value.rows is not None]
    if not known:
        return None
    rows = known[0]
    if op.name == "add" and len(inputs) == 2 and inputs[1].derived:
        return [_with_bias(op, rows)]
    alike = all(each.places == rows.places and each.offset == rows.offset for each in known)
    if op.name in _SHAPED and len(inputs) == 1:
        return [Rows(rows.places, labels, rows.offset) for labels in _shaped(op, rows.labels, args)]
    if op.name in ("cat", "stack") and len(known) == len(inputs) and alike:
        function = torch.cat if op.name == "cat" else torch.stack
        return [Rows(rows.places, function([each.labels for each in known], op["dim"]), rows.offset)]
    product = (
        op.name in ("mul", "div") and len(known) == 1 and not (op.name == "div" and inputs[0].rows is None)
    )
    total = op.name in ("add", "sub") and len(known) == len(inputs) == 2 and alike
    same = rows.labels.shape == op.output.shape
    return [rows] if same and (op.name in _LINEAR or product or total) else None


def _with_bias(op: Op, rows: Rows) -> Rows | None:
    """Rows, and a bias that is added to them one by one."""
    bias = op["other"]
    place = op.trace.place_of(op.axes(bias)[-1]) if bias.ndim == 1 else None
    size, labels = bias.shape[-1] if bias.ndim else 0, rows.labels
    in_order = labels.shape[-1] == size and bool((labels == torch.arange(size, dtype=labels.dtype)).all())
    good = place is not None and in_order and labels.shape == op.output.shape and op.get("alpha", 1) == 1
    return Rows(rows.places | {place}, labels, rows.offset) if good and place is not None else None


def _shaped(op: Op, labels: Tensor, args: Sequence[Any]) -> Iterable[Tensor]:
    if op.name in ("view", "_unsafe_view", "reshape", "_reshape_alias"):
        return [labels.reshape(op.output.shape)]
    found = op.function(labels, *args[1:])
    return found if isinstance(found, list | tuple) else [found]


def _made(op: Op, inputs: Sequence[Value]) -> Rows | None:
    """Rows that an operation reads from a parameter: a product with it, or with the γ of a norm."""
    weight, bias = {
        "mm": ("mat2", None),
        "addmm": ("mat2", "self"),
        "linear": ("weight", "bias"),
        "convolution": ("weight", "bias"),
        "_convolution": ("weight", "bias"),
        "native_layer_norm": ("weight", "bias"),
        "_fused_rms_norm": ("weight", None),
        "mul": (None, None),
    }.get(op.name, (None, None))
    offset = 0.0
    if op.name == "mul" and len(inputs) == 2 and sum(value.derived for value in inputs) == 1:
        weight = "self" if inputs[0].derived else "other"
        value = inputs[0] if inputs[0].derived else inputs[1]
        offset = value.shift
        if op.output.ndim == 0 or value.axes[-1:] == [] or value.axes[-1].size != op.output.shape[-1]:
            return None
    if weight is None or not isinstance(op.get(weight), Tensor) or not op.value(op[weight]).derived:
        return None
    axes = op.axes(weight)
    d = 1 if "convolution" in op.name else op.output.ndim - 1
    first = "convolution" in op.name or op.name == "linear"
    places = {op.trace.place_of(axes[0 if first else -1])}
    if bias is not None and isinstance(op.get(bias), Tensor):
        places.add(op.trace.place_of(op.axes(bias)[-1]))
    names = {name for name in op.value(op[weight]).names()}
    if None in places or len(names) != 1 or op.get("transposed"):
        return None
    shape = [1] * op.output.ndim
    shape[d] = -1
    labels = torch.arange(op.output.shape[d], dtype=torch.float64).view(shape).expand(op.output.shape)
    return Rows(frozenset(p for p in places if p is not None), labels, offset)


# ------------------------------------------------------------------------------------------- what comes of it


@dataclass(frozen=True, eq=False)
class Option:
    """A fold that is tried, too, since it is not known whether the model divides by the width.

    Attributes:
        axis: the width.
        fold: what takes its change.
        first: it is tried before the removal without it.
    """

    axis: Axis
    fold: Fold
    first: bool


class Scales:
    """The folds of a model.

    Attributes:
        sure: of widths that are known to be divided by.
        options: of widths that may be.
    """

    def __init__(self, trace: Trace) -> None:
        self.sure: list[Fold] = []
        self.options: list[Option] = []
        self._known: set[Any] = set()
        norms: dict[tuple[str, ...], list[Norm]] = {}
        for norm in trace.norms:
            norms.setdefault(tuple(sorted(norm.gammas)), []).append(norm)
        for gammas, some in norms.items():
            self._norms(trace, gammas, some)
        for scores in sorted(trace.scores, key=lambda each: not each.surely):
            fold = None if is_fixed(scores.axis) else scores.fold()
            if fold is not None:
                self._add(scores.axis, fold, scores.surely)
            elif scores.surely:
                _mixed(trace, scores)

    def _norms(self, trace: Trace, gammas: tuple[str, ...], norms: list[Norm]) -> None:
        """One γ, and the norms (or several runs of one) that end in it."""
        numbers: dict[str, Norm] = {}
        why = next((norm.broken for norm in norms if norm.broken), "")
        if not why and len(gammas) != 1:
            why = "has several scales behind it" if gammas else "has no scale of its own behind it"
        if not why and trace.parameters[gammas[0]].ndim != 1:
            why = "has a scale of several dimensions"
        for norm in norms if not why else ():
            found = norm.numbers(trace)
            if gammas[0].rpartition(".")[0] != (norm.module or ""):
                found = []
            if norm.epsilon and len(found) != 1:
                why = (
                    f"adds {norm.epsilon:g}, which is no number on the module"
                    if not found
                    else "adds a number that the module has twice"
                )
            numbers |= dict.fromkeys(found, norm)
        if why:
            for norm in norms:
                norm.unfit(f", and {why}" if norm.gammas or norm.epsilon else "")
            return
        place = gammas[0], 0
        every = torch.arange(trace.parameters[gammas[0]].shape[0])
        scaled = [Scaled(*place, every, 0.5, norms[0].gammas[gammas[0]])]
        for name, norm in numbers.items():
            one = torch.zeros(1, dtype=torch.int64)
            scaled.append(Scaled(name, 0, one, norm.epsilon_power, value=norm.epsilon, level=norm.level))
        fold = Fold(place, torch.zeros_like(every), every, tuple(scaled))
        self._add(norms[0].axis, fold, all(norm.surely for norm in norms))

    def _add(self, axis: Axis, fold: Fold, surely: bool) -> None:
        key = fold.place, tuple(fold.position.tolist()), fold.scaled[0].power
        if key in self._known:
            return
        self._known.add(key)
        if surely:
            self.sure.append(fold)
        else:
            self.options.append(Option(axis, fold, fold.scaled[0].power > 0))


def _mixed(trace: Trace, scores: Scores) -> None:
    """A scale that follows the width and that nothing takes back."""
    module = None if scores.module is None else trace.model.get_submodule(scores.module)
    for atom in leaves(scores.axis):
        if atom.reason is None and atom.size > 1:
            atom.mixed = atom.mixed or f"{trace.name(module)} scales its scores by the head width"
