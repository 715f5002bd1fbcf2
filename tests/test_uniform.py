"""DepGraph(uniform=True): layer groups of a kind come to the same width, whatever is picked and released."""

import copy
from dataclasses import asdict, dataclass

import pytest
import torch
from torch import nn

from decay_pruning import BudgetError, DepGraph, Pruner, SelfRectifying, SmoothPruning, Target, configs
from decay_pruning.hosts import uniform


class Block(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.up, self.gate = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.down(self.up(x) * torch.sigmoid(self.gate(x)))


class Net(nn.Module):
    """Three blocks on a stream, and a pooler outside of all blocks."""

    def __init__(self, width=12, hidden=16, blocks=3):
        super().__init__()
        self.stem = nn.Linear(6, width)
        self.blocks = nn.ModuleList([Block(width, hidden) for _ in range(blocks)])
        self.pooler = nn.Linear(width, 20)
        self.head = nn.Linear(20, 3)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(torch.tanh(self.pooler(x)))


@dataclass
class Config:
    width: int = 12
    hidden: int = 16
    blocks: int = 3
    steps: int = 12  # as large as the width, and no width
    rest: int | None = None

    def to_dict(self):
        return asdict(self)

    def validate(self):
        if self.hidden % 4:
            raise ValueError("hidden must be a multiple of 4")


class Configured(Net):
    def __init__(self, config):
        super().__init__(config.width, config.hidden if config.rest is None else config.rest, config.blocks)
        self.config = config


def net(kind=Net, *args):
    torch.manual_seed(0)
    return kind(*args)


def train(model, steps=40, keep=0.6, rectify=None, **host):
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    pruner = Pruner(
        model, x[:1], optimizer, Target(macs=keep), host=DepGraph(uniform=True, **host),
        smooth=SmoothPruning(steps=6), rectify=rectify,
    )  # fmt: skip
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
        if pruner.done:
            break
    return pruner.finish()


def widths(model):
    return [block.up.out_features for block in model.blocks]


@pytest.mark.parametrize("settings", [
    {}, {"scope": "local"}, {"round_to": 4}, {"rounds": 3}, {"per": "macs"}, {"importance": "magnitude"},
])  # fmt: skip
def test_blocks_stay_equal_and_the_rest_keeps_its_width(settings):
    model = net()
    report = train(model, **settings)
    assert len(set(widths(model))) == 1
    assert model.pooler.out_features == 20, "it stands outside of all blocks"
    assert report.macs[1] <= 0.6 * report.macs[0]
    assert all(width % settings.get("round_to", 1) == 0 for width in widths(model))


def test_without_it_they_differ():
    """What makes the test above one that can fail."""
    model = net()
    x = torch.randn(1, 6)
    plan = Pruner(
        model, x, torch.optim.SGD(model.parameters(), 0.1), 0.6, host=DepGraph(), total_steps=10
    ).plan()
    assert len({plan.widths[f"blocks.{k}.up"][1] for k in range(3)}) > 1


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_equal_also_where_single_structures_were_released(share):
    """Also where the goal is met all the same, since rounding had gone beyond it."""
    model = net()
    rectify = SelfRectifying(criterion="rate_and_len", t_rate=-1, t_len=-9, max_share=share)
    report = train(model, keep=0.75, rectify=rectify, round_to=4, ignored=("stem",))
    assert report.released, "the example is to release some"
    assert len(set(widths(model))) == 1 and widths(model)[0] % 4 == 0


def test_kinds_are_what_the_numbers_of_a_config_name():
    model = net(Configured, Config())
    found = configs.Sizes(model)
    named = {number.name: number for number in found.numbers}
    assert set(named) == {"width", "rest"}, (
        "a number that stood for another one is said, and alone names its places"
    )
    structures = DepGraph().graph(model, torch.randn(1, 6)).structures
    kinds = uniform.kinds(model, structures)
    assert {name for name, kind in kinds.of.items() if kind != "width"} == {
        f"blocks.{k}.up" for k in range(3)
    }
    assert "pooler" not in kinds.of


def test_widths_that_the_config_refuses_are_passed_over():
    class Strict(Configured):
        def __init__(self, config):
            Net.__init__(self, config.width, config.hidden, config.blocks)
            self.config = config

    model = net(Strict, Config())
    train(model, keep=0.7)
    assert set(widths(model)) <= {12, 8, 4} and len(set(widths(model))) == 1
    config = configs.fitted(model)
    assert config.hidden == widths(model)[0] and model.config.hidden == 16
    assert [p.shape for p in Strict(config).parameters()] == [p.shape for p in model.parameters()]


def test_a_model_that_is_no_longer_what_its_config_says_goes_by_names():
    model = net(Configured, Config())
    model.config = Config(hidden=32)
    structures = DepGraph().graph(model, torch.randn(1, 6)).structures
    kinds = uniform.kinds(model, structures)
    assert {kinds.of[f"blocks.{k}.up"] for k in range(3)} == {"blocks.*.up of 16"}


def test_asking_for_sizes_moves_no_random_numbers():
    model = net(Configured, Config())
    state = torch.random.get_rng_state()
    before = copy.deepcopy(model.state_dict())
    configs.Sizes(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_out_of_reach_is_said_at_once():
    with pytest.raises(BudgetError, match="cannot be met"):
        train(net(), keep=0.001)
