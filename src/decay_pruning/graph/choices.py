"""Choices: which of the widths that a trace has found are offered.

Where two families of structures share positions (heads, and offsets in a head), at most one of them is: whole heads,
unless the user has named the heads, or the part that a group counts. The other one is the second choice, for when the
first turns out not to work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from decay_pruning.errors import ConfigError
from decay_pruning.graph.axes import (
    CROSSING,
    IGNORED,
    OPERATION,
    Atom,
    Axis,
    Misaligned,
    Reason,
    divide,
    factors,
    find,
    fix,
    is_fixed,
    leaves,
    product,
    terms,
)
from decay_pruning.graph.names import owner_of
from decay_pruning.graph.positions import crossings
from decay_pruning.graph.trace import Trace
from decay_pruning.structures import Place, Role


def ignore(trace: Trace, skipped: set[int]) -> None:
    """Fix the widths that ignored modules and parameters produce."""
    parameters = trace.parameters
    owners = {name: trace.model.get_submodule(name.rpartition(".")[0]) for name in parameters}
    for (name, _), dim in trace.dims.items():
        if name not in parameters:
            continue
        inside = id(owners[name]) in skipped and dim.role is not Role.COLUMN
        if inside or (id(parameters[name]) in skipped and dim.role is not Role.COLUMN):
            fix(dim.axis, Reason(IGNORED, "ignored, as asked"))


def name_heads(trace: Trace, heads: Mapping[str, int], unknown: Callable[[str], str]) -> None:
    """Read the outputs of layers as heads: the heads stay, and the same offset of every head is a structure.

    Raises:
        ConfigError: no such layer, or a number of heads that does not divide its structures.
    """
    for name, count in heads.items():
        axes = [
            dim.axis
            for (tensor, _), dim in trace.dims.items()
            if dim.role is Role.ROW and owner_of(tensor) == name and not is_fixed(dim.axis)
        ]
        if not axes:
            raise ConfigError(unknown(name))
        for term in {id(find(t)): t for axis in axes for t in terms(axis)}.values():
            free = [f for f in factors(term) if not is_fixed(f)]
            if free:
                _count(name, product(*free), count)


def _count(name: str, width: Axis, count: int) -> None:
    try:
        if count < 1:
            raise Misaligned
        number, _ = divide(width, count)
    except Misaligned:
        raise ConfigError(f"heads[{name!r}] = {count} does not divide its {width.size} structures") from None
    for atom in leaves(number):
        atom.count = True


class Choices:
    """What is offered of each two families that share positions."""

    def __init__(self, trace: Trace) -> None:
        for axis in trace.heads:
            for atom in leaves(axis):
                atom.head = True
        self._reasons: dict[int, Reason] = {}  # of atoms that are out for the sake of another one only
        self._pairs: list[tuple[Atom, Atom]] = []
        found: dict[tuple[int, int], tuple[Atom, Atom]] = {}
        places: dict[tuple[int, int], str] = {}
        for place, axis in _every_axis(trace):
            for a, b in crossings(axis):
                found[id(a), id(b)] = a, b
                places.setdefault((id(a), id(b)), f" in {place[0]!r}")
        pairs = list(found.values())
        made = _made(trace)
        for a, b in pairs:
            if a is b:
                fix(a, Reason(OPERATION, f"meets itself{_at(a)}"))
        for a, b in pairs:
            if a.reason is None and b.reason is None and (a.count or b.count):
                self._drop(*((b, a) if a.count else (a, b)), f"counts equal parts{_at(a)}")
        for a, b in pairs:
            if a.reason is None and b.reason is None:  # whole heads; otherwise what the outer one counts
                outer = a.head or (id(a) in made and id(b) not in made)  # the inner one only repeats it
                where = _at(a) or _at(b) or places[id(a), id(b)]
                self._drop(*((a, b) if outer else (b, a)), f"is seen as {a.size} × {b.size}{where}")
            elif a.reason is None or b.reason is None:
                self._pairs.append((b, a) if a.reason is not None else (a, b))
            elif a is not b:  # both are out for the sake of a third one: only one of them may come in for it
                self._pairs += [(a, b), (b, a)]

    def _drop(self, kept: Atom, less: Atom, text: str) -> None:
        less.reason = self._reasons[id(less)] = Reason(CROSSING, text)
        self._pairs.append((kept, less))

    def second(self, failed: Mapping[int, tuple[Atom, str]], allow_inexact: bool) -> list[Atom]:
        """Give up atoms, and free those that were out for their sake only."""
        for atom, why in failed.values():
            fix(atom, Reason(OPERATION, why))
        freed = []
        for kept, less in self._pairs:
            if id(kept) not in failed or less.reason is not self._reasons.get(id(less), ()):
                continue
            others = [a for a in self._rivals(less) if a.reason is None]
            if not allow_inexact and all(a.mixed for a in others):
                others = self._step_aside(others)
            if not others:
                less.reason = None
                freed.append(less)
        return freed

    def _rivals(self, atom: Atom) -> Iterable[Atom]:
        for a, b in self._pairs:
            if atom is a or atom is b:
                yield b if atom is a else a

    def _step_aside(self, atoms: list[Atom]) -> list[Atom]:
        for atom in atoms:
            atom.reason = Reason(CROSSING, f"shares its positions with whole heads{_at(atom)}")
        return []


def _at(atom: Atom) -> str:
    return f" by {atom.site}" if atom.site else ""


def _every_axis(trace: Trace) -> Iterator[tuple[Place, Axis]]:
    for place, dim in trace.dims.items():
        yield place, dim.axis
    yield from trace.attributes.items()


def _made(trace: Trace) -> set[int]:
    """Atoms (by identity) that a parameter makes; the others stand where something reads only."""
    dims = [d for d in trace.dims.values() if d.role in (Role.ROW, None) and d.place[0] in trace.parameters]
    return {id(atom) for dim in dims for atom in leaves(dim.axis)}
