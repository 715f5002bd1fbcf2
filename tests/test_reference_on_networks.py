"""The engine agrees with the reference on real networks: residual, grouped, concat, tied, transposed."""

import pytest
import torch

from decay_pruning import SelfRectifying, SmoothPruning, reference
from decay_pruning import slices as slices_module
from decay_pruning.engine import Engine
from decay_pruning.graph import Graph
from decay_pruning.schedules import linear
from decay_pruning.structures import NOT_PARAMETERS, LayerGroup

from .nets import EXACT, make

N = 4


def slices_of(group: LayerGroup, row: int, smooth: SmoothPruning | None) -> list[reference.Slice]:
    """One structure as the reference wants it: rows before columns, each place once."""
    usable = [c for c in group.couplings if c.role not in NOT_PARAMETERS]
    chosen = [c for c in usable if smooth is None or c.role in smooth.roles] or usable
    places: dict[tuple[str, int], list[int]] = {}
    for c in chosen:
        if positions := c.position[c.owner == row].tolist():
            places.setdefault(c.place, []).extend(positions)
    return [(name, dim, positions) for (name, dim), positions in sorted(places.items())]


@pytest.mark.parametrize("name", list(EXACT))
@pytest.mark.parametrize("bound", ["slice", "joint"])
@pytest.mark.parametrize("projection", ["shorten", "exact"])
@pytest.mark.parametrize("small", [2**16, 0], ids=["flat", "blocks"])
def test_on_networks(name, bound, projection, small, monkeypatch):
    monkeypatch.setitem(slices_module._SMALL, "cpu", small)
    model, inputs = make(name, torch.float64)
    structures = Graph(model, inputs, verify=False).structures
    fast = dict(model.named_parameters())
    slow = {n: p.detach().clone().requires_grad_() for n, p in fast.items()}
    smooth = SmoothPruning(steps=N, bound=bound, projection=projection)
    rectify = SelfRectifying.paper(t_rate=0.013, t_len=0.97)
    optimizers = [torch.optim.SGD(list(p.values()), lr=0.1, momentum=0.9) for p in (fast, slow)]
    engine = Engine(structures, lambda: fast, optimizers[0], smooth, rectify)
    generator = torch.Generator().manual_seed(1)
    picks = {
        group.name: sorted(
            torch.randperm(len(group), generator=generator)[: max(1, len(group) // 3)].tolist()
        )
        for group in structures.groups.values()
    }
    picks = {group: structures.groups[group].ids[rows].tolist() for group, rows in picks.items()}
    engine.pick(picks, N)
    engine.attach()
    decaying = {}
    for group, ids in picks.items():
        for index, row in zip(ids, structures.groups[group].rows(ids).tolist(), strict=True):
            decaying[group, index] = (
                row,
                reference.pick(slices_of(structures.groups[group], row, smooth), N, slow),
            )
    for _ in range(N + 1):
        for n in fast:
            fast[n].grad = torch.randn(fast[n].shape, generator=generator, dtype=torch.float64)
            slow[n].grad = fast[n].grad.clone()
        for (group, _), (_, s) in decaying.items():
            if s.alive == "decaying":
                gone = {r for (g, _), (r, t) in decaying.items() if g == group and t.alive != "released"}
                rows = set(range(len(structures.groups[group]))) - gone
                live = [slices_of(structures.groups[group], r, smooth) for r in rows]
                reference.before_step(s, slow, 0.1, warmup=0.0, parallel=live)
        for optimizer in optimizers:
            optimizer.step()
        states = [s for _, s in decaying.values()]
        for s in states:
            reference.after_step(s, slow)
        reference.step(
            states, slow, linear, bound=bound, projection=projection, t_rate=0.013, t_len=0.97
        )  # fmt: skip
        for (group, _), (row, s) in decaying.items():
            if s.alive == "zero":
                with torch.no_grad():
                    for n, mask in reference.masks(slices_of(structures.groups[group], row, None), slow):
                        slow[n][mask] = 0.0
        for n in fast:
            torch.testing.assert_close(fast[n], slow[n], rtol=1e-9, atol=1e-9, msg=n)
    assert sorted(i for i in engine.held.items()) == sorted(
        (group, [i for (g, i), (_, s) in decaying.items() if g == group and s.alive == "zero"])
        for group in {g for (g, _), (_, s) in decaying.items() if s.alive == "zero"}
    )
