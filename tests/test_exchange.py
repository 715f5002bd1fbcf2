"""SR by worth: what is released is worth more, per unit of the target, than what the host takes in its place."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from decay_pruning import BudgetError, DepGraph, SelfRectifying, SmoothPruning, Target, reference
from decay_pruning.exchange import Exchange, Replacements
from decay_pruning.slices import Gradients
from decay_pruning.structures import Role

from .registry import start
from .test_reference import make


def exchange_of(parts, fading=None):
    """An exchange over a made-up layer group per price, with these worths."""
    parameters, structures = make(0)
    offer, worth, taken = [], {}, {"stream": 0, "hidden": 0}
    for part in parts:
        picks = {"stream": [], "hidden": []}
        for value, price in part:
            name = "stream" if price == 1 else "hidden"
            picks[name].append(taken[name])
            worth[name, taken[name]] = value
            taken[name] += 1
        offer.append(picks)
    found = Exchange.of(
        structures, Replacements(offer, {"stream": 1.0, "hidden": 2.0}), parameters, frozenset(Role)
    )
    if found.batch is not None:
        values = torch.tensor([worth[key] for key in found.batch.keys], dtype=found.worth.dtype)
        found = type(found)(found.structures, found.offer, found.batch, values, seen=1)
    return found, {name: torch.zeros(len(g), dtype=torch.bool) for name, g in structures.groups.items()}


#: (worth, price): whole numbers, whose sums are the same in any order
few = st.tuples(st.integers(0, 50).map(float), st.sampled_from([1.0, 2.0]))


@given(
    st.lists(few, max_size=8), st.lists(st.lists(few, max_size=2), max_size=2), st.sampled_from([1.0, 4.0])
)
def test_the_fast_path_agrees_with_the_reference(decaying, parts, margin):
    fast, fading = exchange_of(parts)
    keys = [("stream" if price == 1 else "hidden", i) for i, (_, price) in enumerate(decaying)]
    rows, rest = fast.releases(keys, [worth for worth, _ in decaying], fading, margin)
    assert rows == reference.exchange(decaying, parts, margin)
    assert rest.spent == sum(decaying[i][1] for i in rows)


def test_what_was_spent_is_not_spent_again():
    fast, fading = exchange_of([[(1.0, 1.0)], [(10.0, 1.0)]])
    first, rest = fast.releases([("stream", 4)], [5.0], fading)
    again, _ = rest.releases([("stream", 4)], [5.0], fading)
    assert (first, again) == ([0], []), "the second would cost 10"


def test_what_fades_meanwhile_replaces_nothing():
    fast, fading = exchange_of([[(1.0, 1.0)], [(10.0, 1.0)]])
    fading["stream"][0] = True
    assert fast.releases([("stream", 4)], [5.0], fading)[0] == []
    assert fast.releases([("stream", 4)], [15.0], fading)[0] == [0]


@pytest.mark.parametrize(
    "host", [DepGraph(), DepGraph(scope="local"), DepGraph(per="macs"), DepGraph(importance="random")]
)
def test_a_release_pays(host):
    """At the verdict, what stays is worth four times what would go, and nothing else could be gained by."""
    verdicts = []
    run = start(
        "residual", "depgraph", host=host, rectify=SelfRectifying.exchange(), smooth=SmoothPruning(steps=20)
    )
    releases = Exchange.releases

    def noted(self, keys, worth, fading, margin):
        rows, rest = releases(self, keys, worth, fading, margin)
        values = dict(zip(self.batch.keys, self.worth.tolist(), strict=True))
        parts = [
            [(values[n, i], self.offer.price[n]) for n, ids in part.items() for i in ids]
            for part in self.offer.parts
        ]
        decaying = [(w, self.offer.price[n]) for w, (n, _) in zip(worth, keys, strict=True)]
        verdicts.append((rows, reference.exchange(decaying, parts, 4.0), self.seen, [keys[r] for r in rows]))
        return rows, rest

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Exchange, "releases", noted)
        for _ in range(60):
            run.step()
    assert verdicts, "there was a verdict"
    for rows, expected, seen, _ in verdicts:
        assert rows == expected and seen == math.ceil(0.25 * 20) - int(0.1 * 20)
    assert run.pruner.report().released == sum(len(rows) for rows, *_ in verdicts)


def test_a_live_structure_is_worth_what_its_gradient_says():
    """Mean of ⟨g, w⟩² over the steps that are observed, whatever the scale of a gradient scaler."""
    parameters, structures = make(0)
    offer = Replacements([{"stream": [1]}, {"hidden": [0, 2]}], {"stream": 1.0, "hidden": 1.0})
    for scale in (None, torch.tensor(8.0, dtype=torch.float64)):
        seen = Exchange.of(structures, offer, parameters, frozenset(Role))
        expected = dict.fromkeys(seen.batch.keys, 0.0)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            for p in parameters.values():
                p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            for name, index in expected:
                slices = [
                    (c.tensor, c.dim, c.position[c.owner == index].tolist())
                    for c in structures.groups[name].couplings
                    if c.role in Role
                ]
                x = reference.vector(slices, parameters)
                g = reference.vector(slices, {n: p.grad for n, p in parameters.items()})
                expected[name, index] += float(g @ x) ** 2 / 3
            if scale is not None:
                for p in parameters.values():
                    p.grad *= scale
            seen = seen.read(parameters, Gradients(parameters), scale)
        assert seen.worth.tolist() == pytest.approx(list(expected.values()))


def test_training_does_not_notice_a_random_host():
    """To ask the host what it would take next costs no random number of the loop."""
    ends = []
    for rectify in (None, SelfRectifying(criterion="worth", max_share=1e-9)):
        torch.manual_seed(0)
        run = start(
            "residual",
            "depgraph",
            host=DepGraph(importance="random"),
            rectify=rectify,
            smooth=SmoothPruning(steps=40),
        )
        for _ in range(9):
            run.step()
        ends.append(torch.rand(3))
    assert torch.equal(*ends)


def test_a_host_without_anything_else_to_give_releases_nothing():
    """A function that picks what it was told, whatever the goal: there is nothing that could go instead."""

    def always(scene, goal):
        name, mask = next(iter(scene.eligible().items()))
        rows = scene.structures.groups[name].ids[mask][:2].tolist()
        if not rows or scene.decaying:
            raise BudgetError("nothing else")
        return {name: rows}

    run = start(
        "residual",
        "depgraph",
        host=always,
        target=Target(structures=0.95),
        rectify=SelfRectifying.exchange(),
        smooth=SmoothPruning(steps=8),
    )
    for _ in range(40):
        run.step()
    assert run.pruner.report().released == 0


@pytest.mark.parametrize("host", ["depgraph", "otov2-partition", "gates-own"])
def test_every_host_says_what_it_would_take_next(host):
    """Live structures, in disjoint parts, the next of its own ranking."""
    run = start("residual", host, rectify=SelfRectifying.exchange(), smooth=SmoothPruning(steps=10))
    for _ in range(40):
        run.step()
        if run.pruner.engine.decaying:
            break
    offer = run.pruner.replacements()
    keys = [(name, i) for part in offer.parts for name, ids in part.items() for i in ids]
    assert keys and len(keys) == len(set(keys))
    assert not set(keys) & set(run.pruner.engine.decaying)
    assert offer.price.keys() == run.pruner.structures.groups.keys()
