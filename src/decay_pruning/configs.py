"""Configs: which sizes of a model the numbers in its config name, found by asking its class for other numbers.

For models that are built from a config object (`type(model)(model.config)`, as all of Transformers are). No table of
architectures: each number of the config is changed in turn, the class is built without memory (on the meta device), and
the dimensions that change are the places that the number names.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from decay_pruning import surgery
from decay_pruning.structures import NOT_PARAMETERS, LayerGroup, Place, StructureSet

Shapes = dict[str, tuple[int, ...]]
#: What a number that has no value is set to, to see what it names: divisible by much.
_PROBE = 1680


@dataclass(frozen=True)
class Number:
    """A number of a config.

    Attributes:
        name: dotted, where it stands in a config within the config.
        value: what it is, or stands for where it is None.
        places: what it names → positions there per unit.
    """

    name: str
    value: int
    places: Mapping[Place, int]

    @property
    def outer(self) -> bool:
        """Where a width is heads times their width: a unit is a block of positions (a head), not one of each block."""
        return "heads" in self.name or "n_head" in self.name


class Sizes:
    """The numbers of a model's config, as it was built.

    Raises:
        ValueError: the model is not built from a config.
    """

    def __init__(self, model: nn.Module) -> None:
        config = getattr(model, "config", None)
        if config is None or not hasattr(config, "to_dict"):
            raise ValueError(f"{type(model).__name__} has no config")
        self._class: Any = type(model)
        #: with a number for what the class would work out by itself
        self.config = copy.deepcopy(config)
        self.shapes = self.built(self.config)
        self._say_head_width()
        self.numbers = list(self._numbers())
        if said := {n.name: n.value for n in self.numbers if _inside(self.config, n.name) is None}:
            self.config = self.changed(said)  # so that it no longer follows another number
            self.numbers = list(self._numbers())
        self.at: dict[Place, list[Number]] = {}
        for number in self.numbers:
            for place in number.places:
                self.at.setdefault(place, []).append(number)

    def built(self, config: Any) -> Shapes:
        """Parameter → its shape in a model of this config.

        Raises:
            ValueError: the class takes no such config.
        """
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            try:
                model = self._class(copy.deepcopy(config))
            except Exception as error:
                raise ValueError(f"{self._class.__name__} does not take this config: {error}") from error
        return {name: tuple(p.shape) for name, p in model.named_parameters()}

    def changed(self, values: Mapping[str, Any]) -> Any:
        """A copy of the config with other numbers; some check them."""
        config = copy.deepcopy(self.config)
        for name, value in values.items():
            owner, _, leaf = name.rpartition(".")
            setattr(_inside(config, owner), leaf, value)
        if callable(validate := getattr(config, "validate", None)):
            validate()
        return config

    def accepts(self, values: Mapping[str, Any]) -> bool:
        """Whether the config itself has nothing against these numbers."""
        try:
            self.changed(values)
        except Exception:
            return False
        return True

    def _say_head_width(self) -> None:
        """Heads can only be told apart from the width of the model where the config says how wide they are."""
        config = self.config
        width, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
        if type(width) is int and type(heads) is int and not getattr(config, "head_dim", None):
            with suppress(ValueError, AttributeError, TypeError):
                said = self.changed({"head_dim": width // heads})
                if self.built(said) == self.shapes != self.built(self.changed({"head_dim": 2 * width})):
                    self.config = said

    def _numbers(self) -> Iterator[Number]:
        for name, value in list(_values(self.config)):
            other = _PROBE if value is None else 2 * value
            try:
                shapes = self.built(self.changed({name: other}))
            except Exception:  # the config or the class refuses it
                continue
            if (found := self._number(name, value, other, shapes)) is not None:
                yield found

    def _number(self, name: str, value: int | None, other: int, shapes: Shapes) -> Number | None:
        if shapes.keys() != self.shapes.keys():
            return None
        places, values = dict[Place, int](), set[int]()
        for parameter, before in self.shapes.items():
            after = shapes[parameter]
            if len(after) != len(before):
                return None
            for d, (old, new) in enumerate(zip(before, after, strict=True)):
                if old == new:
                    continue
                per_unit, rest = divmod(new, other) if value is None else divmod(new - old, value)
                if per_unit < 1 or rest or old % per_unit:
                    return None
                places[parameter, d] = per_unit
                values.add(old // per_unit if value is None else value)
        return Number(name, values.pop(), places) if len(values) == 1 else None


def kinds(sizes: Sizes, structures: StructureSet) -> dict[str, dict[str, int]]:
    """Layer groups that a config can describe, as long as all with the same numbers lose as many.

    Returns:
        layer group → the numbers that name its width → units of that number in one structure; what is absent must
        keep its width.
    """
    named = {name: units for name, group in structures.groups.items() if (units := _units(sizes, group))}
    numbers = {number.name: number for number in sizes.numbers}
    covered: dict[str, set[Place]] = {}
    users: dict[str, set[tuple[tuple[tuple[str, int], ...], int]]] = {}
    for name, units in named.items():
        group = structures.groups[name]
        for number in units:
            covered.setdefault(number, set()).update(c.place for c in group.couplings)
            users.setdefault(number, set()).add((tuple(sorted(units.items())), len(group)))
    whole = {n for n, places in covered.items() if places >= numbers[n].places.keys() and len(users[n]) == 1}
    return {name: units for name, units in named.items() if whole.issuperset(units)}


def _units(sizes: Sizes, group: LayerGroup) -> dict[str, int]:
    """Number → how many units of it one structure is; empty where the numbers do not describe this layer group."""
    found: dict[str, int] = {}
    for c in group.couplings:
        if c.role in NOT_PARAMETERS or c.place not in _places(sizes):
            continue
        size = sizes.shapes[c.tensor][c.dim]
        first = c.position[c.owner == 0]
        number = next((n for n in sizes.at.get(c.place, ()) if _fits(sizes, n, c.place, first, size)), None)
        if number is None:
            return {}
        units = first.numel() // number.places[c.place]
        if found.setdefault(number.name, units) != units or units * len(group) != number.value:
            return {}
    return found


def _places(sizes: Sizes) -> set[Place]:
    return {(name, d) for name, shape in sizes.shapes.items() for d in range(len(shape))}


def _fits(sizes: Sizes, number: Number, place: Place, positions: Tensor, size: int) -> bool:
    """Whether these positions are whole units of a number."""
    per_unit = number.places[place]
    if positions.numel() % per_unit:
        return False
    if len(sizes.at[place]) == 1:
        return True
    mask = torch.zeros(size, dtype=torch.bool)
    mask[positions] = True
    units = mask.view(-1, per_unit).T if number.outer else mask.view(per_unit, -1)
    return bool((units.all(0) | ~units.any(0)).all())


def fitted(model: nn.Module) -> Any:
    """A config of which the class builds a model of just these shapes.

    Raises:
        ValueError: there is none; the message says where it fails.
    """
    sizes = Sizes(model)
    mine = {name: tuple(p.shape) for name, p in model.named_parameters()}
    if mine.keys() != sizes.shapes.keys():
        raise ValueError(f"{type(model).__name__} has other parameters than its config says")
    if mine == sizes.shapes:
        return copy.deepcopy(model.config)
    past = surgery.history(model)
    values: dict[str, Any] = {}
    uneven: dict[str, dict[Place, int]] = {}
    for number in sizes.numbers:
        left = {place: _left(sizes, number, place, mine, past) for place in number.places}
        if len(set(left.values())) > 1:
            uneven[number.name] = left
        elif (value := next(iter(left.values()))) != number.value:
            values[number.name] = value
    return _of_layers(sizes, values, uneven, mine) if uneven else _proven(sizes, values, mine)


def with_scales(model: nn.Module, config: Any) -> Any:
    """The config with what removals have multiplied on modules (ε of a norm), where one number of it says it all."""
    changed: dict[str, list[tuple[float, float]]] = {}  # name of the attribute → values before and now
    for (name, _), factor in surgery.history(model).factors.items():
        owner, leaf = surgery.parent(model, name)
        now = getattr(owner, leaf, None)
        if isinstance(now, float):
            changed.setdefault(leaf, []).append((now / float(factor.values[0]), now))
    for leaf, pairs in changed.items():
        before, now = pairs[0]
        alike = all(math.isclose(b, before) and math.isclose(n, now) for b, n in pairs)
        numbers = [key for key, value in vars(config).items() if _is(value, before)]
        if alike and len(numbers) == 1 and not any(_is(vars(m).get(leaf), before) for m in model.modules()):
            setattr(config, numbers[0], now)
    return config


def told_apart(model: nn.Module, structures: StructureSet) -> set[str]:
    """Layer groups whose removal changes a number of a module that others have, too, and keep: no config says both."""
    found = set()
    for name, group in structures.groups.items():
        places = {c.place for c in group.couplings}
        mine = {
            each.tensor
            for fold in structures.folds
            if fold.place in places
            for each in fold.scaled
            if each.value is not None
        }
        for number in mine:
            owner, leaf = surgery.parent(model, number)
            value = getattr(owner, leaf, None)
            others = (f"{path}.{leaf}" for path, m in model.named_modules() if _is(vars(m).get(leaf), value))
            if any(other not in mine for other in others):
                found.add(name)
                break
    return found


def _is(value: Any, number: Any) -> bool:
    return isinstance(value, float) and isinstance(number, float) and math.isclose(value, number)


def _left(sizes: Sizes, number: Number, place: Place, mine: Shapes, past: surgery.History) -> int:
    """How many units of a number are left at a place."""
    size, before = mine[place[0]][place[1]], sizes.shapes[place[0]][place[1]]
    per_unit = number.places[place]
    if size == before:
        return number.value
    if len(sizes.at[place]) == 1:
        return size // per_unit
    mask = torch.zeros(before, dtype=torch.bool)
    kept = past.positions.get(place)
    mask[torch.arange(size) if kept is None or past.original[place] != before else kept] = True
    units = mask.view(-1, per_unit).T if number.outer else mask.view(per_unit, -1)
    return int(units.any(0).sum())


def _proven(sizes: Sizes, values: Mapping[str, Any], mine: Shapes) -> Any:
    try:
        config = sizes.changed(values)
    except Exception as error:
        why = str(error).strip().splitlines()[-1].strip()
        raise ValueError(f"{type(sizes.config).__name__} refuses {_said(values)} ({why})") from error
    shapes = sizes.built(config)
    for name, shape in mine.items():
        if shapes[name] != shape:
            raise ValueError(
                f"{name!r} has shape {list(shape)}, and with {_said(values)} the class would build "
                f"{list(shapes[name])}: no number of {type(config).__name__} describes this width"
            )
    return config


def _of_layers(
    sizes: Sizes, values: Mapping[str, Any], uneven: Mapping[str, Mapping[Place, int]], mine: Shapes
) -> Any:
    """Widths that differ by layer, where the class takes a list of numbers, or a config for each layer."""
    by_layer: dict[str, dict[int, int]] = {}
    for name, left in uneven.items():
        rows = by_layer[name] = {}
        for (parameter, _), units in left.items():
            layer = next((int(part) for part in parameter.split(".") if part.isdigit()), None)
            if layer is None or rows.setdefault(layer, units) != units:
                raise ValueError(_differ(sizes, name, left))
    lists = {name: [rows[k] for k in sorted(rows)] for name, rows in by_layer.items()}
    for more in (lists, {"per_layer_config": _per_layer(by_layer)}):
        with suppress(Exception):
            return _proven(sizes, {**values, **more}, mine)
    name, left = next(iter(uneven.items()))
    raise ValueError(_differ(sizes, name, left))


def _per_layer(by_layer: Mapping[str, Mapping[int, int]]) -> dict[int, dict[str, int]]:
    found: dict[int, dict[str, int]] = {}
    for name, rows in by_layer.items():
        for layer, units in rows.items():
            found.setdefault(layer, {})[name] = units
    return found


def _differ(sizes: Sizes, name: str, left: Mapping[Place, int]) -> str:
    (first, _), least = min(left.items(), key=lambda item: item[1])
    (last, _), most = max(left.items(), key=lambda item: item[1])
    return (
        f"{name} is one number for all layers in {type(sizes.config).__name__}, and it would be {least} for {first!r} "
        f"and {most} for {last!r}"
    )


def _said(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in values.items()) or "its config as it is"


def _inside(config: Any, name: str) -> Any:
    for part in name.split(".") if name else ():
        config = getattr(config, part)
    return config


def _values(config: Any, prefix: str = "") -> Iterator[tuple[str, int | None]]:
    """The numbers of a config and of those inside it, and what could be one."""
    for name in config.to_dict():
        value = getattr(config, name, 0)
        if (type(value) is int and value > 1) or (value is None and not name.endswith("_id")):
            yield prefix + name, value
        elif hasattr(value, "to_dict"):
            yield from _values(value, f"{prefix}{name}.")
