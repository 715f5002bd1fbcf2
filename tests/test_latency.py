"""A latency target is met on the clock, in the steps of the hardware. The clock is a fake one: a staircase."""

import copy
import dataclasses
import json
import math

import pytest
import torch
from torch import nn

from decay_pruning import (
    BudgetError,
    ConfigError,
    Custom,
    DepGraph,
    GateDecorator,
    OTOv2,
    Pruner,
    SmoothPruning,
    Target,
    choose,
    measure,
)
from decay_pruning.budget import CostModel
from decay_pruning.speed import Table, Work, uses
from decay_pruning.speed import _table as tables
from decay_pruning.speed._works import doing

STEP = 8


def up(size):
    return math.ceil(size / STEP) * STEP


class Staircase:
    """Widths cost what the next multiple of 8 costs; a whole model has overheads that no single work shows."""

    name = "staircase"

    def __init__(self, overhead=5e-6, faults=0.0):
        self.works, self.wholes, self.overhead, self.faults = 0, 0, overhead, faults

    def work(self, work, device):
        self.works += 1
        if work.kind in ("convolution", "matmul"):
            return 1e-9 * math.prod(map(up, work.sizes))
        return 1e-12 * work.sizes[0]

    def whole(self, model, inputs):
        self.wholes += 1
        layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        return (
            self.overhead
            + sum(1e-9 * up(m.weight.shape[0]) * up(m.weight.shape[1]) for m in layers)
            + self.faults
        )


def net():
    torch.manual_seed(0)
    conv = lambda a, b: nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU())  # noqa: E731
    return nn.Sequential(
        conv(3, 32), conv(32, 64), conv(64, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
    )


X = torch.randn(2, 3, 6, 6)
LABELS = torch.tensor([1, 3])


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "decay-pruning" / "latency"


def pruned(target, host=None, steps=30, **more):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    more = {"smooth": SmoothPruning(steps=2), "total_steps": steps} | more
    pruner = Pruner(model, X, optimizer, target, host=host, **more)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), LABELS).backward()
        optimizer.step()
        if pruner.done:
            break
    return pruner


def by_rank(scene, goal):
    scores = {name: torch.arange(len(group)) + 1.0 for name, group in scene.structures.groups.items()}
    return choose(scene, scores, goal)


HOSTS = {
    "depgraph": lambda: DepGraph(),
    "rounds": lambda: DepGraph(rounds=3),
    "otov2": lambda: OTOv2(deadline=4),
    "gates": lambda: GateDecorator(tick=1, tock=0, share=0.15, min_kept=0.1),
    "custom": lambda: Custom(by_rank),
}


@pytest.mark.parametrize("host", HOSTS)
def test_every_host_meets_it_on_the_clock(host):
    clock = Staircase()
    pruner = pruned(Target(latency=0.6, runtime=clock), HOSTS[host]())
    before, after = pruner.finish().latency
    assert after == clock.whole(pruner.model, X)
    assert 0.45 * before < after <= 1.05 * 0.6 * before


@pytest.mark.parametrize("host", ["depgraph", "rounds", "custom"])
def test_no_width_lies_between_two_steps(host):
    widths = pruned(Target(latency=0.6, runtime=Staircase()), HOSTS[host]()).finish().widths
    assert all(after % STEP == 0 for _, after in widths.values())
    assert any(after < before for before, after in widths.values())


def test_an_amount():
    pruner = pruned(Target(latency="0.009 ms", runtime=Staircase()))
    assert 0.007e-3 < pruner.finish().latency[1] <= 1.05 * 0.009e-3


def test_the_table_cannot_know_overheads_but_the_trial_does():
    """Half of the time is overhead: a prediction in proportion to the table would prune far too little."""
    clock = Staircase(overhead=8e-6)
    pruner = pruned(Target(latency=0.7, runtime=clock))
    before, after = pruner.finish().latency
    assert 0.6 * before < after <= 0.735 * before
    assert pruner.report().rounds == 1


def test_a_plan_tries_out_and_leaves_no_trace():
    model, clock = net(), Staircase()
    want = {name: value.clone() for name, value in model.state_dict().items()}
    pruner = Pruner(model, X, torch.optim.SGD(model.parameters(), lr=0.1), Target(latency=0.6, runtime=clock),
                    smooth=SmoothPruning(steps=2), total_steps=9)  # fmt: skip
    seen = clock.wholes
    plan = pruner.plan()
    assert clock.wholes > seen and plan.after.latency <= 0.6 * plan.now.latency
    assert all(torch.equal(want[name], value) for name, value in model.state_dict().items())


def test_what_the_clock_says_in_the_end_counts():
    clock = Staircase()
    pruner = pruned(Target(latency=0.6, runtime=clock), removal="at finish")
    clock.faults = 1e-5  # something else runs on the machine from now on
    with pytest.raises(
        BudgetError, match=r"of latency are left, the target is 60.0 %: .* ms of latency, not"
    ):
        pruner.finish()
    clock.faults = 0.0
    optimizer = pruner._optimizer  # nothing is lost: training goes on, and more is pruned
    for _ in range(8):
        optimizer.step()
    assert pruner.done and pruner.finish().latency[1] <= 0.63 * pruner.before.latency


def test_out_of_reach_is_told_before_training():
    with pytest.raises(BudgetError, match=r"target of 0\.00\d+ ms of latency cannot be met: now"):
        pruned(Target(latency=0.05, runtime=Staircase(overhead=1e-4)), DepGraph(min_kept=0.5))


@pytest.mark.parametrize("step", [1, 4, 16])
def test_the_steps_of_a_staircase(step, folder):
    class Clock(Staircase):
        def work(self, work, device):
            return 1e-6 * (1 + math.ceil(work.sizes[0] / step) * step)

    work = Work("matmul", (256,), (("dtype", "float32"),))
    assert Table(Clock(), torch.device("cpu")).step(work, 0) in ({2} if step == 1 else {step})


CPU = torch.device("cpu")
WORK = Work("matmul", (256, 64), (("dtype", "float32"),))


def test_times_are_measured_once_for_all_runs(folder):
    clocks = [Staircase(), Staircase()]
    for clock in clocks:
        table = Table(clock, CPU)
        table.seconds(WORK, (100, 50)), table.step(WORK, 0)
        table.save()
    assert clocks[0].works > 4 and clocks[1].works == 0
    assert [path.suffix for path in folder.iterdir()] == [".json"]  # and no scratch file


def test_tables_of_several_runs_add_up():
    tables = [Table(Staircase(), CPU), Table(Staircase(), CPU)]
    for table, sizes in zip(tables, [(64, 64), (128, 64)], strict=True):
        table.seconds(WORK, sizes)
        table.save()
    assert len(Table(Staircase(), CPU)) == 2


@pytest.mark.parametrize("damage", ["", "{", "[1]", '{"a": "b"}', '{"a": NaN, "b": -1}', "\0"])
def test_a_damaged_table_is_made_again(damage, folder):
    path = Table(Staircase(), CPU).path
    path.parent.mkdir(parents=True)
    path.write_text(damage)
    table = Table(Staircase(), CPU)
    assert len(table) == 0
    table.seconds(WORK, (64, 64))
    table.save()
    assert len(json.loads(path.read_text())) == 1


def test_a_folder_that_refuses_is_no_fault(folder):
    folder.parent.mkdir(parents=True)
    folder.write_text("a file where the folder should be")
    table = Table(Staircase(), CPU)
    assert table.seconds(WORK, (64, 64)) > 0
    table.save()


def test_the_grid():
    for size in (1, 2, 3, 5, 17, 48, 63.5, 64, 100, 2048):
        sides = tables._around(size, 2)
        assert sum(w for _, w in sides) == pytest.approx(1) and sum(n * w for n, w in sides) == pytest.approx(
            size
        )
        assert all(n in (1, 2, 3) or n % 2 == 0 for n, _ in sides)


def test_dearer_structures_go_first_where_scores_are_equal():
    """One layer is a hundred times as dear as its scores tell: with a target of latency it is the one that shrinks."""

    class Clock(Staircase):
        def work(self, work, device):
            return super().work(work, device) * (
                100 if work.sizes == (64, 64) or work.sizes[:1] == (48,) else 1
            )

    def equal(scene, goal):
        return choose(scene, {n: torch.ones(len(g)) for n, g in scene.structures.groups.items()}, goal)

    model, target = net(), Target(structures=0.9)
    pruner = Pruner(model, X, torch.optim.SGD(model.parameters(), lr=0.1), target, host=equal, total_steps=9,
                    smooth=SmoothPruning(steps=2))  # fmt: skip
    costs = CostModel(model, X, pruner.original, Target(latency=0.9, runtime=Staircase()))
    nothing = {name: torch.zeros(len(g), dtype=torch.bool) for name, g in pruner.original.groups.items()}
    prices = {name: costs.price(name, "latency", nothing) for name in nothing}
    assert max(prices, key=prices.get) == "1.0" and min(prices, key=prices.get) == "0.0"


@pytest.mark.parametrize(
    "target", [Target(macs=0.7, per_cost=True), Target(memory=0.8), Target(latency=0.7, runtime=Staircase())]
)
def test_cost_decides_between_equal_scores(target):
    def equal(scene, goal):
        return choose(scene, {n: torch.ones(len(g)) for n, g in scene.structures.groups.items()}, goal)

    widths = pruned(target, Custom(equal)).finish().widths
    plain = pruned(Target(structures=0.9), Custom(equal)).finish().widths
    lost = {name: before - after for name, (before, after) in widths.items()}
    assert next(
        before > after for before, after in plain.values()
    )  # in the order of the model, the first goes first
    assert max(lost, key=lost.get) != "0.0" or target.of == "memory"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"latency": 12}, r"target\.latency must be between 0 and 1 .* '12 ms'; got 12"),
        ({"latency": "12"}, r"an amount such as '12 ms' \(in us,.*not '12'"),
        ({"latency": "12 MiB"}, "not '12 MiB'"),
        ({"latency": "-1 ms"}, "not '-1 ms'"),
        ({"latency": "0 ms"}, "not '0 ms'"),
        ({"latency": "nan ms"}, "not 'nan ms'"),
        ({"memory": "many"}, "not 'many'"),
        ({"memory": 1.0}, "'300 MiB'; got 1"),
        ({"latency": 0.5, "macs": 0.5}, "give one target"),
        ({"macs": 0.5, "batch": 4}, "batch is for latency and memory"),
        ({"memory": 0.5, "runtime": "compiled"}, "runtime is for latency"),
        ({"latency": 0.5, "runtime": "tensorrt"}, "eager"),
    ],
)
def test_wrong_targets(wrong, message):
    with pytest.raises(ConfigError, match=message):
        Target(**wrong)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("12 ms", 0.012), ("12ms", 0.012), ("850us", 850e-6), (".5 S", 0.5), ("3e-2 s", 0.03)],
)
def test_amounts(text, seconds):
    assert Target(latency=text).at_most(1.0) == pytest.approx(seconds)


def test_amounts_of_memory():
    assert Target(memory="1.5 MiB").at_most(1) == 1.5 * 2**20 and Target(memory="2 MB").at_most(1) == 2e6


@pytest.mark.parametrize(("round_to", "told"), [(None, True), (8, False)])
def test_a_plan_of_macs_says_what_odd_widths_waste(round_to, told):
    """A third of each of two widths of 64 and one of 32 goes: 43 costs what 48 costs."""
    model = net()
    host = DepGraph(scope="local", round_to=round_to)
    pruner = Pruner(model, X, torch.optim.SGD(model.parameters(), lr=0.1), Target(macs=0.45), host=host,
                    smooth=SmoothPruning(steps=2), total_steps=9)  # fmt: skip
    plan = pruner.plan()
    assert ("odd widths" in str(plan)) == told == (plan.wasted > 0.15)


def test_a_run_goes_on_where_it_was_saved():
    def steps(model, optimizer, number):
        for _ in range(number):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(X), LABELS).backward()
            optimizer.step()

    def fresh():
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        target = Target(latency=0.6, runtime=Staircase())
        return (
            model,
            optimizer,
            Pruner(model, X, optimizer, target, smooth=SmoothPruning(steps=6), total_steps=9),
        )

    model, optimizer, pruner = fresh()
    steps(model, optimizer, 3)
    saved = [copy.deepcopy(each.state_dict()) for each in (pruner, model, optimizer)]
    steps(model, optimizer, 4)
    other, its, resumed = fresh()
    for each, state in zip((resumed, other, its), saved, strict=True):
        each.load_state_dict(state)
    steps(other, its, 4)
    assert resumed.finish() == pruner.finish()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.LSTM(4, 6, 2, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        return self.out(self.rnn(x)[0])


class Does(nn.Module):
    def __init__(self, work):
        super().__init__()
        self.work = work

    def forward(self, _):
        return self.work()


@pytest.mark.parametrize(
    ("model", "x", "macs"),
    [
        (nn.Conv2d(4, 16, 3, padding=1), torch.randn(2, 4, 5, 5), 2 * 25 * 4 * 16 * 9),
        (nn.Conv2d(6, 6, 3, groups=6), torch.randn(1, 6, 5, 5), 9 * 6 * 9),
        (nn.ConvTranspose2d(4, 8, 3, groups=2), torch.randn(1, 4, 5, 5), 25 * 4 * 4 * 9),
        (nn.Linear(4, 8), torch.randn(2, 7, 4), 2 * 7 * 4 * 8),
        (Recurrent(), torch.randn(2, 5, 4), 10 * 24 * (4 + 6 + 6 + 6) + 10 * 18),
    ],
    ids=["conv", "depthwise", "grouped-transposed", "linear", "lstm"],
)
def test_every_product_is_a_work_that_can_be_done_alone(model, x, macs):
    """And at other widths; what is done has as many multiply-accumulates as the layer."""
    found = uses(model, x)
    for use in found:
        for factor in (0.5, 1, 1.5):
            sizes = tuple(max(1, int(size * factor)) for size in use.work.sizes)
            doing(dataclasses.replace(use.work, sizes=sizes), CPU)()
    counted = 0
    for use in found:
        if use.work.kind == "products":
            counted += use.times * use.work.sizes[0]
        elif use.work.kind != "elements":
            counted += use.times * measure(Does(doing(use.work, CPU)), x).macs
    assert counted == macs


def test_times_are_agreed_upon_by_all_processes():
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="a latency target takes all processes"):
        Pruner(model, torch.randn(1, 4), optimizer, Target(latency=0.5), total_steps=3, group=object())
