"""Settings are checked where they are made, by their type hints, and errors are in the user's words.

A dataclass of settings says in its hints what each field takes, ranges included, and calls `check` when it is made:

    @dataclass(frozen=True)
    class Host:
        rounds: Annotated[int, at_least(1)] = 1
        share: Annotated[float, at_least(0, below=1)] = 0.5

        def __post_init__(self) -> None:
            check(self, "host")

A field without a range still has its type checked. `True` is no number, nor are NaN and infinities. Numbers of numpy
are taken, and become Python's; tensors are not, because they may live on another device or require gradients.
"""

from __future__ import annotations

import functools
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from difflib import SequenceMatcher
from numbers import Integral, Real
from typing import Annotated, Any, Literal, cast

import numpy as np
from torch import Tensor

from decay_pruning.errors import ConfigError


@dataclass(frozen=True)
class Range:
    """Bounds of a number, and what it stands for where a field takes several kinds of numbers."""

    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf
    below: float = math.inf
    what: str = ""

    def __contains__(self, value: float) -> bool:
        return self.least <= value <= self.most and self.above < value < self.below

    def __str__(self) -> str:
        if math.isfinite(self.above) and math.isfinite(self.below):
            return f"between {self.above:g} and {self.below:g}"
        bounds = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return " and ".join(f"{words} {bound:g}" for words, bound in bounds.items() if math.isfinite(bound))


def at_least(least: float, *, most: float = math.inf, below: float = math.inf, what: str = "") -> Range:
    """A number from `least` on."""
    return Range(least=least, most=most, below=below, what=what)


def above(bound: float, *, most: float = math.inf, below: float = math.inf, what: str = "") -> Range:
    """A number larger than `bound`."""
    return Range(above=bound, most=most, below=below, what=what)


@dataclass(frozen=True, eq=False)
class OneOf:
    """Names that a text must be one of, such as the keys of a registry."""

    names: Iterable[str]


#: A number of things, of which there must be one.
Whole = Annotated[int, at_least(1)]
#: A number of things, or none.
Count = Annotated[int, at_least(0)]
Positive = Annotated[float, above(0)]
NotNegative = Annotated[float, at_least(0)]
#: A share of something that is never all of it.
Share = Annotated[float, at_least(0, below=1)]


def check(settings: Any, where: str = "") -> None:
    """Check all fields of a dataclass of settings; call it in `__post_init__`.

    Lists become tuples, and numbers of numpy become Python's.

    Args:
        settings: the new object.
        where: put before the names of fields in messages: "host" makes "host.rounds".

    Raises:
        ConfigError: a field holds what its hint does not allow.
    """
    hints = _hints(cast(Any, type(settings)))
    for f in fields(settings):
        name = f"{where}.{f.name}" if where else f.name
        value = getattr(settings, f.name)
        right = checked(value, hints[f.name], name)
        if right is not value:
            object.__setattr__(settings, f.name, right)


def checked(value: Any, hint: Any, name: str) -> Any:
    """A value as its type hint asks for, for arguments of functions.

    Raises:
        ConfigError: it is something else; `name` is what the user calls it.
    """
    options = list(_options(hint))
    for kind, notes in options:
        found = _as(value, kind, name)
        if found is _NOT:
            continue
        for note in notes:
            if isinstance(note, Range) and found not in note:
                meant = f" as {note.what}" if note.what else ""
                raise ConfigError(f"{name} must be {note}{meant}, got {shown(found)}")
            if isinstance(note, OneOf):
                choose(found, note.names, name)
        return found
    for kind, _ in options:  # for its own, more exact message
        if isinstance(value, str) and typing.get_origin(kind) is Literal:
            choose(value, typing.get_args(kind), name)
    words = dict.fromkeys(_words(kind, notes) for kind, notes in options)
    raise ConfigError(f"{name} must be {' or '.join(words)}, got {shown(value)}")


def choose(value: str, names: Iterable[str], name: str) -> str:
    """A text that is one of these names.

    Raises:
        ConfigError: it is not; the message has the most similar one.
    """
    known = list(names)
    if value not in known:
        raise ConfigError(
            f"{name} must be one of {', '.join(known)}, got {value!r}{did_you_mean(value, known)}"
        )
    return value


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """A hint to end a message with, or nothing where no known word is like this one."""
    near = nearest(str(word), known)
    return f"; did you mean {near!r}?" if near else ""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that is most like `word`, if any is like it."""
    scored = [(SequenceMatcher(None, word.lower(), k.lower()).ratio(), k) for k in known]
    score, best = max(scored, default=(0.0, ""))
    return best if score >= 0.6 else None


def shown(value: object) -> str:
    """A value in a message, on one short line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    try:
        text = " ".join(repr(value).split())
    except Exception:  # a whole number of too many digits, or whatever a user's class does
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


# -- inside --------------------------------------------------------------------------

_NOT = object()
#: Whole numbers stay within what a tensor can hold.
_LARGEST = 2**63 - 1
_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "none"}


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def _options(hint: Any, notes: tuple[Any, ...] = ()) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """The kinds that a hint allows, each with what is noted about it."""
    if typing.get_origin(hint) is Annotated:
        inner, *more = typing.get_args(hint)
        yield from _options(inner, (*notes, *more))
    elif typing.get_origin(hint) in (typing.Union, types.UnionType):
        for option in typing.get_args(hint):
            yield from _options(option, notes)
    else:
        yield hint, notes


def _as(value: Any, kind: Any, name: str) -> Any:
    """The value as this kind, or `_NOT`."""
    origin = typing.get_origin(kind)
    if kind is Any or kind is object:
        return value
    if kind is bool:
        return bool(value) if isinstance(value, bool | np.bool_) else _NOT
    if kind in (int, float):
        return _number(value, kind)
    if origin is Literal:
        return value if isinstance(value, str) and value in typing.get_args(kind) else _NOT
    if origin is Callable or kind is Callable:
        return value if callable(value) else _NOT
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _mapping(value, typing.get_args(kind), name)
    if origin is tuple:
        return _tuple(value, typing.get_args(kind), name)
    if getattr(kind, "_is_protocol", False):
        return value if all(hasattr(value, n) for n in vars(kind) if not n.startswith("_")) else _NOT
    return value if isinstance(value, origin or kind) else _NOT


def _number(value: Any, kind: type) -> Any:
    if isinstance(value, bool) or not isinstance(value, Integral if kind is int else Real):
        return _NOT
    if isinstance(value, Integral):
        return int(value) if abs(int(value)) <= _LARGEST else _NOT
    return float(value) if math.isfinite(value) else _NOT


def _mapping(value: Any, hints: tuple[Any, ...], name: str) -> Any:
    if not isinstance(value, Mapping):
        return _NOT
    keys, values = hints
    return {
        checked(key, keys, f"a name in {name}"): checked(each, values, f"{name}[{key!r}]")
        for key, each in value.items()
    }


def _tuple(value: Any, hints: tuple[Any, ...], name: str) -> Any:
    if isinstance(value, str | bytes | Mapping | Tensor) or not isinstance(value, Iterable):
        return _NOT
    values = list(value)
    each = [hints[0]] * len(values) if hints[-1] is Ellipsis else list(hints)
    if len(each) != len(values):
        raise ConfigError(f"{name} must have {len(each)} entries, got {len(values)}")
    return tuple(
        checked(v, hint, f"{name}[{i}]") for i, (v, hint) in enumerate(zip(values, each, strict=True))
    )


def _words(kind: Any, notes: tuple[Any, ...]) -> str:
    """What a kind is called in messages."""
    for note in notes:
        if isinstance(note, OneOf):
            return f"one of {', '.join(note.names)}"
        if isinstance(note, Range) and note.what:
            return note.what
        if isinstance(note, str):
            return note
    origin = typing.get_origin(kind)
    if origin is Literal:
        return f"one of {', '.join(map(str, typing.get_args(kind)))}"
    if origin is Callable or kind is Callable:
        return "a function"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "a mapping"
    if origin is tuple:
        return "a list"
    return _WORDS.get(kind) or f"a {getattr(cast(Any, kind), '__name__', kind)}"
