"""Plain values (TOML, JSON) ↔ trees of dataclasses, by their type hints.

What a recipe may say is what the dataclasses say: a field that is added to one of them appears in recipes
without a line here. Errors name the dotted key, and the nearest right one.
"""

from __future__ import annotations

import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from decay_pruning.checks import nearest as nearest
from decay_pruning.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Kinds:
    """Field metadata for a section whose class is chosen by its key `kind`.

    >>> field(metadata=Kinds(lambda: HOSTS, "depgraph").metadata)  # doctest: +SKIP
    """

    registry: Callable[[], Mapping[str, type]]
    default: str

    @property
    def metadata(self) -> dict[str, Kinds]:
        """What to hand to `dataclasses.field`."""
        return {"kinds": self}

    def of(self, chosen: object, key: str) -> type:
        """The class of this kind.

        Raises:
            ConfigError: no such kind.
        """
        known = self.registry()
        if not isinstance(chosen, str) or chosen not in known:
            raise ConfigError(f"{key}.kind: {_expected_one_of(known, chosen)}")
        return known[chosen]

    def name(self, value: object) -> str:
        """The kind of a value."""
        return next((name for name, cls in self.registry().items() if cls is type(value)), self.default)


def build(cls: type[T], values: Mapping[str, Any], *, at: str = "") -> T:
    """A dataclass from plain values.

    Args:
        cls: the dataclass; fields that are dataclasses are built in turn.
        values: field name → value; fields that are left out keep their default.
        at: dotted key of this section, for messages.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, one that the dataclass refuses, or none.
    """
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in fields(cast(Any, cls)) if f.init}
    for name in values:
        if name not in known:
            raise ConfigError(f"unknown setting {_join(at, name)}{_nearest(cls, at, name)}")
    missing = [n for n, f in known.items() if n not in values and f.default is f.default_factory is MISSING]
    if missing:
        raise ConfigError(f"setting {_join(at, missing[0])} is missing")
    built = {name: _field(known[name], hints[name], value, _join(at, name)) for name, value in values.items()}
    try:
        return cls(**built)
    except ConfigError as error:
        raise ConfigError(f"[{at}] {error}" if at else str(error)) from None


def plain(value: object) -> Any:
    """The inverse of `build`: mappings, lists, strings, numbers, booleans and None.

    Functions (schedules, criteria) become their names, a section with kinds gets its `kind` back.
    """
    if is_dataclass(value) and not isinstance(value, type):
        result = {}
        for f in fields(value):
            inner = plain(getattr(value, f.name))
            kinds = f.metadata.get("kinds")
            result[f.name] = {"kind": kinds.name(getattr(value, f.name)), **inner} if kinds else inner
        return result
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in (sorted(value, key=str) if isinstance(value, set | frozenset) else value)]
    if value is None or isinstance(value, str | int | float):
        return value
    return getattr(value, "__name__", str(value))


def override(values: Mapping[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """A copy of nested `values` with "dotted.key=value" assignments applied.

    A value is read as TOML (`5`, `0.1`, `true`, `[1, 2]`, `"text"`); what is not TOML is text, so that paths
    and names need no quotes.

    Raises:
        ConfigError: an assignment without "=", or through something that is not a section.
    """
    result = _copy(values)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise ConfigError(f"--set takes key=value, for example prune.epochs=20; got {assignment!r}")
        section: MutableMapping[str, Any] = result
        for depth, part in enumerate(parts[:-1]):
            inner = section.setdefault(part, {})
            if inner is None or isinstance(inner, bool):  # `rectify = false`, and now one of its settings
                inner = section[part] = {}
            if not isinstance(inner, MutableMapping):
                raise ConfigError(
                    f"{'.'.join(parts[: depth + 1])} is {inner!r}, not a section: {key} cannot be set"
                )
            section = inner
        section[parts[-1]] = _value(text.strip())
    return result


def read(path: str | Path) -> dict[str, Any]:
    """The values of a TOML file.

    Raises:
        ConfigError: no such file, or not TOML; the message gives the line.
    """
    path = Path(path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        others = sorted(p.name for p in path.parent.glob("*.toml")) if path.parent.is_dir() else []
        near = nearest(path.name, others)
        hint = f"; did you mean {path.parent / near}?" if near else ""
        raise ConfigError(f"there is no recipe {path}{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the recipe {path}: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


# -- inside --------------------------------------------------------------------------


def _field(f: Field[Any], hint: Any, value: object, key: str) -> Any:
    kinds = f.metadata.get("kinds")
    if not isinstance(kinds, Kinds):
        return _convert(value, hint, key)
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key} must be a section, got {_show(value)}")
    rest = {name: v for name, v in value.items() if name != "kind"}
    return build(kinds.of(value.get("kind", kinds.default), key), rest, at=key)


def _convert(value: Any, hint: Any, key: str) -> Any:
    """`value` as what `hint` asks for."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or hint is object:
        return value
    if origin in (typing.Union, types.UnionType):
        return _union(value, args, key)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{key}: {_expected_one_of(args, value)}")
        return value
    if is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key} must be a section, got {_show(value)}")
        return build(hint, value, at=key)
    if isinstance(hint, type) and issubclass(hint, Enum):
        known = {member.value: member for member in hint}
        if value not in known:
            raise ConfigError(f"{key}: {_expected_one_of(known, value)}")
        return known[value]
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key} must be a section, got {_show(value)}")
        return {name: _convert(v, args[1], _join(key, name)) for name, v in value.items()}
    if origin in (tuple, list, set, frozenset, Sequence):
        return _sequence(value, origin, args, key)
    return _scalar(value, hint, key)


def _union(value: Any, options: tuple[Any, ...], key: str) -> Any:
    sections = [o for o in options if is_dataclass(o)]
    if type(None) in options:
        a_choice = any("none" in typing.get_args(o) for o in options)  # "none" is a value of its own there
        if value is None or (value == "none" and not a_choice) or (value is False and bool not in options):
            return None
        if value is True and sections:
            return build(cast(type, sections[0]), {}, at=key)
    if isinstance(value, Mapping) and len(sections) == 1:
        return _convert(value, sections[0], key)  # for its own, more exact message
    for option in options:
        if option is not type(None) and _fits(value, option):
            return _convert(value, option, key)
    for option in options:
        try:
            return _convert(value, option, key)
        except ConfigError:
            continue
    raise ConfigError(f"{key} must be {' or '.join(_name(o) for o in options)}, got {_show(value)}")


def _fits(value: Any, option: Any) -> bool:
    """Whether the value is of this type as it stands, so that 3 stays an int in `int | float`."""
    return isinstance(option, type) and type(value) is option


def _sequence(value: Any, origin: Any, args: tuple[Any, ...], key: str) -> Any:
    if isinstance(value, str) or not isinstance(value, Iterable) or isinstance(value, Mapping):
        raise ConfigError(f"{key} must be a list, got {_show(value)}")
    values = list(value)
    each = [args[0]] * len(values)
    if origin is tuple and args[-1] is not Ellipsis:
        if len(values) != len(args):
            raise ConfigError(f"{key} must have {len(args)} entries, got {len(values)}")
        each = list(args)
    converted = [_convert(v, t, f"{key}[{i}]") for i, (v, t) in enumerate(zip(values, each, strict=True))]
    return converted if origin is list else (tuple if origin is Sequence else origin)(converted)


def _scalar(value: Any, hint: Any, key: str) -> Any:
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    wanted = hint if isinstance(hint, type) else typing.get_origin(hint)
    if (
        isinstance(wanted, type)
        and isinstance(value, wanted)
        and not (wanted is int and isinstance(value, bool))
    ):
        return value
    raise ConfigError(f"{key} must be {_name(hint)}, got {_show(value)}")


def _name(hint: Any) -> str:
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "none"}
    if is_dataclass(hint):
        return "a section"
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) in (tuple, list, Sequence):
        return "a list"
    return words.get(hint, getattr(hint, "__name__", str(hint)))


def _show(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "a section" if isinstance(value, Mapping) else repr(value)


def _expected_one_of(known: Iterable[Any], value: object) -> str:
    names = [str(k) for k in known]
    near = nearest(str(value), names)
    hint = f"; did you mean {near!r}?" if near else ""
    return f"must be one of {', '.join(names)}, got {_show(value)}{hint}"


def _nearest(cls: type, at: str, name: str) -> str:
    """A hint: the same name deeper down, else the most similar key, else all keys of this section."""
    keys = list(_keys(cls, at))
    deeper = [key for key in keys if key.rpartition(".")[2] == name]
    near = deeper[0] if deeper else nearest(_join(at, name), keys) or _by_leaf(name, keys)
    if near:
        return f"; did you mean {near}?"
    return f"; known here: {', '.join(f.name for f in fields(cast(Any, cls)))}"


def _by_leaf(name: str, keys: Iterable[str]) -> str | None:
    leaves: dict[str, str] = {}
    for key in keys:
        leaves.setdefault(key.rpartition(".")[2], key)
    near = nearest(name, leaves)
    return leaves[near] if near else None


def _keys(cls: type, at: str) -> Iterable[str]:
    """All dotted keys below a dataclass, level by level."""
    hints = typing.get_type_hints(cls)
    below: list[tuple[type, str]] = []
    for f in fields(cast(Any, cls)):
        key = _join(at, f.name)
        yield key
        kinds = f.metadata.get("kinds")
        options = kinds.registry().values() if kinds else (hints[f.name], *typing.get_args(hints[f.name]))
        below += [(option, key) for option in options if is_dataclass(option) and isinstance(option, type)]
    for inner, key in below:
        yield from _keys(inner, key)


def _join(at: str, name: str) -> str:
    return f"{at}.{name}" if at else name


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _copy(v) if isinstance(v, Mapping) else v for k, v in values.items()}
