"""A model sharded by `fully_shard` is pruned as one process would prune it."""

import contextlib
import functools
import io
import itertools
import os
import re
import runpy
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from decay_pruning import (
    ConfigError,
    Custom,
    DepGraph,
    OTOv2,
    Pruner,
    SelfRectifying,
    SmoothPruning,
    SparseLearning,
    Stateful,
    slices,
)

from .ranks import together
from .registry import ARMS, batches, build_model, example, smallest_rows

STEPS = 9
SETTINGS = {
    "exchange": ("residual", DepGraph(), SmoothPruning(steps=4), SelfRectifying(), torch.optim.SGD),
    "paper": ("perceptron", DepGraph(importance="taylor"), *ARMS["paper"], torch.optim.Adam),
    "thin": ("thin", DepGraph(), SmoothPruning(steps=3), SelfRectifying(), torch.optim.SGD),
    "outward": ("plain", Custom(smallest_rows), *ARMS["sr"], torch.optim.SGD),
}


class Thin(nn.Module):
    """A layer with one row, of which other processes than the first have none."""

    def __init__(self):
        super().__init__()
        self.wide, self.inner, self.out = nn.Linear(192, 7), nn.Linear(7, 5), nn.Linear(5, 1)

    def forward(self, x):
        return self.out(self.inner(self.wide(x.flatten(1)).relu()).relu()) * torch.arange(5)


def network(name):
    """Without batch statistics, so that two halves of a batch are one batch."""
    torch.manual_seed(0)
    model = Thin() if name == "thin" else build_model(name)
    for leaf, module in list(model.named_children()):
        if isinstance(module, nn.BatchNorm2d):
            setattr(model, leaf, nn.GroupNorm(module.num_features, module.num_features, affine=True))
    return model.double()


def prepared(model, kind, host, smooth, rectify, removal="at finish"):
    optimizer = kind(model.parameters(), lr=0.02)
    pruner = Pruner(
        model, example(torch.float64), optimizer, 0.6, host=host, smooth=smooth, rectify=rectify,
        total_steps=STEPS, removal=removal,
    )  # fmt: skip
    return optimizer, pruner


def whole(model):
    return torch.cat(
        [(p.full_tensor() if hasattr(p, "full_tensor") else p).detach().flatten() for p in model.parameters()]
    )


def train(model, optimizer, steps, part=slice(0, 16)):
    """The weights after each of these steps."""
    seen, device = [], next(model.parameters()).device
    for x, y in itertools.islice(batches(1, torch.float64), *steps):
        loss = nn.functional.cross_entropy(model(x[part].to(device)), y[part].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(whole(model).cpu())
    return seen


def run(model, settings, part=slice(0, 16)):
    optimizer, pruner = prepared(model, *settings)
    seen = train(model, optimizer, (STEPS,), part)
    report = pruner.finish()
    x = example(torch.float64)
    return seen, str(report), dict(pruner.model.state_dict()), pruner.model.eval()(x).detach()


def half(rank, world):
    return slice(rank * 16 // world, (rank + 1) * 16 // world)


def sharded(name, device="cpu", **options):
    model = network(name).to(device)
    for layer in list(model.children())[::2]:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def as_one(setting, rank, world, folder, **options):
    name, *rest = SETTINGS[setting]
    host, smooth, rectify, kind = rest
    return run(sharded(name, **options), (kind, host, smooth, rectify), half(rank, world))


def grid(rank, world, folder):
    mesh = init_device_mesh("cpu", (world, 1), mesh_dim_names=("copies", "shards"))
    return as_one("exchange", rank, world, folder, mesh=mesh)


def messages(rank, world, folder):
    """How many sums are exchanged in each step, and how many picks are made, by setting."""
    found = {}
    for name in SETTINGS:
        network, host, smooth, rectify, kind = SETTINGS[name]
        model = sharded(network)
        optimizer, pruner = prepared(model, kind, host, smooth, rectify)
        found[name] = []
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as sent:
            for step in range(STEPS):
                before, rounds = sent.call_count, pruner.progress().round
                train(model, optimizer, (step, step + 1), half(rank, world))
                found[name].append((sent.call_count - before, pruner.progress().round - rounds))
    return found


def large(rank, world, folder):
    """With most tensors handled one by one, as large ones are."""
    with mock.patch.dict(slices._SMALL, cpu=100):
        return as_one("exchange", rank, world, folder)


def refused(rank, world, folder):
    """What is said of each thing that does not work, and that the model still learns afterwards."""
    said = {}

    def ask(name, model=None, **settings):
        own = model is None
        model = sharded("perceptron") if own else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        try:
            Pruner(model, example(torch.float64), optimizer, 0.6, total_steps=STEPS, **settings)
        except ConfigError as error:
            said[name] = str(error)
        if own:
            train(model, optimizer, (1,), half(rank, world))

    ask("at once", removal="at once")
    ask("OTOv2", host=OTOv2())
    ask("sparse", host=DepGraph(sparse=SparseLearning()), start=2)
    ask("activation", host=DepGraph(importance="activation"), start=2)
    ask("also", also=[network("perceptron")])
    model = network("perceptron")
    left_out = {model.hidden.weight, model.hidden.bias}
    ask("ignored_params", fully_shard(model, ignored_params=left_out))
    mesh = init_device_mesh("cpu", (world,))
    ask("FSDP1", FullyShardedDataParallel(network("perceptron"), device_id=torch.device("cpu")))
    ask("meta", fully_shard(network("perceptron").to("meta")))
    ask("tensor parallel", parallelize_module(network("perceptron"), mesh, {"hidden": ColwiseParallel()}))
    mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("data", "tensor"))
    both = parallelize_module(network("perceptron"), mesh["tensor"], {"inner": ColwiseParallel()})
    ask("both", fully_shard(both, mesh=mesh["data"]))
    return said


def works(rank, world, folder):
    """Sharded models of other kinds: how many of the weights are left in each."""
    kinds = {
        "bfloat16": {
            "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        },
        "offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
        "whole after forward": {"reshard_after_forward": False},
        "checkpointed": {},
        "from meta": {},
    }
    found = {}
    for name, options in kinds.items():
        torch.manual_seed(rank)  # an importance that draws lots
        model = network("perceptron").float()
        model.use_fsdp = True  # an attribute of its own
        if name == "from meta":
            model.to("meta")
        if name == "checkpointed":  # a wrapper with hooks of its own, inside
            model.hidden = checkpoint_wrapper(model.hidden)
        fully_shard(model, **options)
        if name == "from meta":
            model.to_empty(device="cpu")
            for p in model.parameters():
                p.detach().to_local().normal_(std=0.1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        with torch.no_grad():
            model(example())  # which leaves the parameters of the whole in one piece
        host = DepGraph(importance="random")
        pruner = Pruner(model, example(), optimizer, 0.5, host=host, rectify=SelfRectifying(), total_steps=99)
        for _, (x, y) in zip(range(3), batches(rank), strict=False):
            nn.functional.cross_entropy(model(x).float(), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        pruner.plan()
        report = pruner.finish(force=True)
        pruner.model(example())
        assert pruner.model.use_fsdp and not hasattr(pruner.model, "reshard")
        assert pruner.model.state_dict().keys() == network("perceptron").state_dict().keys()
        found[name] = (report.macs[1] / report.macs[0], whole(pruner.model))
    return found


def load(model, optimizer, pruner, path, **how):
    dcp.load({"pruner": Stateful(pruner)}, checkpoint_id=path, **how)
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(states, checkpoint_id=path, **how)
    set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])


def resumed(rank, world, folder):
    """The weights and the report of a run that stops in mid-decay, and goes on in other objects."""
    found = {}
    for name in ("exchange", "paper"):
        network, host, smooth, rectify, kind = SETTINGS[name]
        mine, settings = half(rank, world), (kind, host, smooth, rectify)
        model = sharded(network)
        optimizer, pruner = prepared(model, *settings)
        train(model, optimizer, (3,), mine)
        states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.save({"pruner": Stateful(pruner), **states}, checkpoint_id=folder / name)
        states = None

        model = sharded(network)
        optimizer, pruner = prepared(model, *settings)
        load(model, optimizer, pruner, folder / name)
        seen = train(model, optimizer, (3, STEPS), mine)
        found[name] = seen, str(pruner.finish())
    return found


def example_script(name, rank, world, folder):
    """What a script of `examples/` prints, in the processes that are there instead of torchrun's."""
    scripts = Path(__file__).parent.parent / "examples"
    os.chdir(folder)
    sys.path.insert(0, str(scripts))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(str(scripts / f"{name}.py"))["main"]()
    return printed.getvalue()


EXAMPLES = ("ddp", "fsdp")
SCENARIOS = {
    **{f"{name}.py": functools.partial(example_script, name) for name in EXAMPLES},
    "resumed": resumed,
    "refused": refused,
    "works": works,
    **{name: functools.partial(as_one, name) for name in SETTINGS},
    "grid": grid,
    "large": large,
    "messages": messages,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def found(folder):
    return together(2, folder, SCENARIOS)


@functools.cache
def alone(setting):
    name, host, smooth, rectify, kind = SETTINGS[setting]
    return run(network(name), (kind, host, smooth, rectify))


@pytest.mark.parametrize("setting", [*SETTINGS, "grid", "large"])
def test_the_same_as_one_process(found, setting):
    same(found(setting), setting)


def on_gpus(rank, world, folder):
    """The plain copy is on the CPU, where the example inputs are."""
    torch.cuda.set_device(rank)
    return as_one("exchange", rank, world, folder, device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_same_on_gpus(tmp_path):
    same(together(2, tmp_path, {"exchange": on_gpus}, backend="nccl")("exchange"), "exchange")


def same(ranks, setting):
    weights, report, state, output = alone(setting if setting in SETTINGS else "exchange")
    for seen, said, small, there in ranks:
        assert said == report
        for step, (here, expected) in enumerate(zip(seen, weights, strict=True)):
            assert torch.allclose(here, expected, rtol=1e-9, atol=1e-11), f"step {step}"
        assert small.keys() == state.keys()
        for name, value in state.items():
            assert small[name].shape == value.shape, name
            assert torch.allclose(small[name], value, rtol=1e-9, atol=1e-11), name
        assert torch.allclose(there, output, rtol=1e-9, atol=1e-11)


def test_one_message_in_each_step(found):
    """And a second one where structures are picked; none where nothing decays."""
    for counts in found("messages"):
        for name, steps in counts.items():
            assert all(sums <= 1 + picks for sums, picks in steps), (name, steps)
        assert counts["exchange"][-1] == (0, 0)  # all is held


def test_structures_are_released_in_one_of_them():
    assert any("released" in report and " 0 released" not in report for _, report, *_ in map(alone, SETTINGS))


def test_what_does_not_work_is_refused_by_name(found):
    words = {
        "at once": "removal='at once'",
        "OTOv2": "OTOv2",
        "sparse": "sparse learning",
        "activation": "importance 'activation'",
        "also": "also:",
        "ignored_params": "ignored_params",
        "FSDP1": "fully_shard",
        "meta": "to_empty",
        "tensor parallel": "parallelize_module",
        "both": "parallelize_module",
    }
    for said in found("refused"):
        assert said.keys() == words.keys()
        for name, text in words.items():
            assert text in said[name], said[name]


def test_a_run_goes_on_bit_for_bit_from_a_distributed_checkpoint(found):
    for rank, runs in enumerate(found("resumed")):
        for name, (seen, report) in runs.items():
            expected, said, *_ = found(name)[rank]
            assert report == said
            for here, there in zip(seen, expected[3:], strict=True):
                assert torch.equal(here, there), name


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_of_two_processes_goes_on_in_one(found, folder):
    for name in found("resumed")[0]:
        model, host, smooth, rectify, kind = SETTINGS[name]
        model = network(model)
        optimizer, pruner = prepared(model, kind, host, smooth, rectify)
        load(model, optimizer, pruner, folder / "resumed" / name, no_dist=True)
        weights, report, *_ = alone(name)
        for here, there in zip(train(model, optimizer, (3, STEPS)), weights[3:], strict=True):
            assert torch.allclose(here, there, rtol=1e-9, atol=1e-11), name
        assert str(pruner.finish()) == report


def test_other_kinds_of_sharding_work(found):
    first, *others = found("works")
    assert len(first) == 5
    for name, (left, weights) in first.items():
        assert left <= 0.5, name
        for other in others:
            assert torch.equal(other[name][1], weights), name


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples(found, name):
    """Half of the MACs at most are left, and it is far above chance; the other process is silent."""
    printed, *others = found(f"{name}.py")
    macs = re.search(r"MACs +([\d,]+) -> ([\d,]+)", printed)
    assert macs, printed
    before, after = (int(figure.replace(",", "")) for figure in macs.groups())
    assert after <= 0.5 * before
    assert float(printed.splitlines()[-1].split()[0]) > 80, printed
    assert not any(others)
