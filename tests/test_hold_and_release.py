"""Zeros are held; released structures stay and cool down, and others take their place."""

from dataclasses import replace

import pytest
import torch

from decay_pruning import ConfigError, Custom, DepGraph, SelfRectifying, SmoothPruning, Target
from decay_pruning.engine import Engine
from decay_pruning.hosts import Picker
from decay_pruning.slices import SliceBatch

from .registry import build_model, every_arm, everywhere, example, start
from .test_reference import make


def test_zeros_are_held_while_others_still_decay():
    parameters, structures = make(0)
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1, momentum=0.9, weight_decay=0.1)
    engine = Engine(structures, lambda: parameters, optimizer, SmoothPruning(steps=2))
    engine.attach()
    engine.pick({"hidden": [1, 3]}, 2)
    engine.pick({"stream": [0]}, 6)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 6):
        for p in parameters.values():
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        optimizer.step()
        if step >= 2:
            assert engine.held == {"hidden": [1, 3]}
            for name in ("up", "up_bias", "gamma", "beta"):
                assert not parameters[name][[1, 3]].any()
            assert not parameters["head"].view(4, 5, 3)[:, [1, 3]].any()
    assert engine.decaying == [("stream", 0)]


def test_released_structures_keep_their_strength_and_are_free():
    always = SelfRectifying(t_rate=-1.0, t_len=-1e9, max_share=1.0, judge_from=0.5, retries=0)
    run = start("residual", "depgraph", "sr", rectify=always)
    events = []
    run.pruner.engine._on_event = events.append
    for _ in range(2):
        run.step()
    assert run.pruner.progress().released > 0
    assert run.pruner.progress().decaying == 0
    released = {(e.group, i) for e in events if e.kind == "released" for i in e.indices}
    for group, index in released:
        batch = SliceBatch(
            run.pruner.structures, {group: [index]}, dict(run.model.named_parameters()), SmoothPruning().roles
        )
        assert float(batch.norms(dict(run.model.named_parameters())).norm()) > 0.1


def test_cooldown_picks_others_and_the_target_still_holds():
    always = SelfRectifying(t_rate=-1.0, t_len=-1e9, max_share=1.0, judge_from=0.25, retries=1, cooldown=1)
    events = []
    run = start("residual", "depgraph", rectify=always, on_event=events.append, target=0.75)
    for _ in range(20):
        run.step()
    picks: dict[int, set[tuple[str, int]]] = {}
    for e in events:
        if e.kind == "picked":
            picks.setdefault(e.step, set()).update((e.group, i) for i in e.indices)
    first, second, third = (picks[step] for step in sorted(picks))
    assert not first & second, "what was just released was picked again at once"
    report = run.pruner.finish()
    assert report.released == len(first) + len(second)
    assert report.picked_again == len(third & (first | second))
    assert report.macs[1] <= 0.75 * report.macs[0]


def test_a_cooldown_never_makes_the_target_unreachable():
    """With nearly everything cooling down, the cooldown gives way, not the target."""
    always = SelfRectifying(t_rate=-1.0, t_len=-1e9, max_share=1.0, judge_from=0.25, retries=2, cooldown=10)
    run = start("residual", "depgraph", rectify=always, smooth=SmoothPruning(steps=3), target=0.1)
    for _ in range(20):
        run.step()
    assert run.pruner.finish().macs[1] <= 0.1 * run.pruner.before.macs


@everywhere
@every_arm
def test_events_tell_the_whole_story(model_name, host_name, arm):
    events = []
    run = start(model_name, host_name, arm, on_event=events.append)
    for _ in range(30):
        run.step()
    report = run.pruner.finish()
    told = {
        kind: sum(len(e.indices) for e in events if e.kind == kind)
        for kind in ("picked", "released", "removed")
    }
    assert told == {"picked": report.picked, "released": report.released, "removed": report.removed}
    for e in events:
        for values in e.values.values():
            assert len(values) == len(e.indices)
        if e.kind == "picked":
            assert all(norm > 0 for norm in e.values["norm"])
    removed = [(e.group, i) for e in events if e.kind == "removed" for i in e.indices]
    assert len(set(removed)) == len(removed), "an original index was removed twice"
    for group, (before, _) in report.widths.items():
        assert all(0 <= i < before for g, i in removed if g == group)


def test_one_step_is_what_the_host_alone_does():
    """N = 1 without SR: the weights after the step, less the picked structures."""
    run, plain = start("residual", "depgraph", "single"), start("residual", "depgraph", "sp")
    plain.pruner.engine.detach()
    x, y = next(run.batches)
    picks = plain.pruner.plan().picks
    for r in (run, plain):
        torch.nn.functional.cross_entropy(r.model(x), y).backward()
        r.optimizer.step()
    from decay_pruning import surgery

    surgery.remove(plain.model, plain.pruner.structures, picks, example_inputs=example())
    for (name, a), b in zip(run.model.named_parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_bad_custom_picks_change_nothing():
    import pytest

    from decay_pruning import BudgetError, ConfigError

    for wrong, message in (
        ({"nowhere": [0]}, "picked from 'nowhere', which is no layer group"),
        ({"conv2": [99]}, "'conv2' has no structure 99"),
        ({"conv2": list(range(12))}, "one has to stay"),
        ({}, "picked nothing"),
    ):
        run = start("residual", "custom", host=lambda scene, goal, wrong=wrong: wrong)
        state = {
            k: v.clone() for k, v in run.model.state_dict().items() if "running" not in k and "num" not in k
        }
        with pytest.raises((ConfigError, BudgetError), match=message):
            run.step()
        assert all(torch.equal(run.model.state_dict()[k], v) for k, v in state.items())


def test_the_same_seed_gives_the_same_network():
    ends = []
    for _ in range(2):
        run = start("plain", "depgraph", "sr", host=DepGraph(rounds=2))
        for _ in range(20):
            run.step()
        ends.append(run.model.state_dict())
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])
    assert build_model("plain").fc1.weight.shape != ends[0]["fc1.weight"].shape


def test_no_more_than_a_share_of_a_pick_is_released():
    """With thresholds that everything passes, the most resistant go, up to the share, and never more later on."""
    lenient = SelfRectifying(t_rate=-1.0, t_len=-1e9, judge_from=0.2, max_share=0.3, retries=0)
    events = []
    run = start("plain", "depgraph", rectify=lenient, smooth=SmoothPruning(steps=10), on_event=events.append)
    run.step()
    picked = run.pruner.progress().decaying
    while not any(e.kind == "released" for e in events):
        before = run.pruner.engine.resistance()
        run.step()
    released = {(e.group, i): c for e in events if e.kind == "released"
                for i, c in zip(e.indices, e.values["c_len"], strict=True)}  # fmt: skip
    assert len(released) == int(0.3 * picked)
    stayed = run.pruner.engine.resistance()
    assert min(released.values()) >= max(values["c_len"] for values in stayed.values())
    assert set(released) | set(stayed) == set(before)
    run.step()
    assert run.pruner.progress().released == len(released)


def test_a_criterion_that_is_a_figure_releases_the_largest():
    """Without thresholds: of each pick the share with the largest |⟨g, w⟩|, at the first verdict."""
    by_first_order = SelfRectifying(criterion="first_order", judge_from=0.5, max_share=0.3, retries=0)
    events = []
    smooth = SmoothPruning(steps=10)
    run = start("plain", "depgraph", rectify=by_first_order, smooth=smooth, on_event=events.append)
    for _ in range(5):
        run.step()
    picked = sum(len(e.indices) for e in events if e.kind == "picked")
    released = [v for e in events if e.kind == "released" for v in e.values["first_order"]]
    stayed = [values["first_order"] for values in run.pruner.engine.resistance().values()]
    assert len(released) == int(0.3 * picked) == picked - len(stayed)
    assert min(released) >= max(stayed)
    alike, events = (
        replace(by_first_order, criterion=lambda seen, _: seen.first_order),
        [],
    )  # measures all figures
    run = start("plain", "depgraph", rectify=alike, smooth=smooth, on_event=events.append)
    for _ in range(5):
        run.step()
    assert [v for e in events if e.kind == "released" for v in e.values["first_order"]] == pytest.approx(
        released
    )
    by_length = [v for e in events if e.kind == "released" for v in e.values["regrowth"]]
    assert min(by_length) < max(values["regrowth"] for values in run.pruner.engine.resistance().values())


class OneByOne(Picker):
    """Times itself: one structure of a layer group in every second step."""

    def moved(self, scene, goal):
        return {"conv2": [scene.step // 2]} if scene.step % 2 == 0 else {}


class Staggered(DepGraph):
    def __post_init__(self):
        """Without DepGraph's checks: no rounds."""

    def begin(self):
        return OneByOne()


def test_nothing_is_removed_while_something_decays():
    events = []
    host = Staggered(rounds=0)
    run = start("plain", "depgraph", host=host, target=Target(structures=0.8), on_event=events.append)
    for _ in range(30):
        run.step()
    picked = [e.step for e in events if e.kind == "picked"]
    assert len(picked) > 2, "several decays overlap"
    assert [e.step for e in events if e.kind == "removed"] == [picked[-1] + 4], "all at once, after the last"


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"interval": -1}])
def test_a_function_as_host_with_wrong_settings(wrong):
    with pytest.raises(ConfigError, match="must be at least"):
        Custom(lambda scene, goal: {}, **wrong)
