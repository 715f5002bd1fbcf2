"""Several processes train one network: it stays one, is what one process learns, or all of them say why not."""

import functools
import itertools
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from decay_pruning import ConfigError, DepGraph, OTOv2, Pruner, SelfRectifying, SmoothPruning

from .ranks import together
from .registry import ARMS, batches, build_model, example

STEPS = 9
BATCH = 12


def network(norms=False):
    """Without batch statistics, so that parts of a batch are one batch."""
    model = build_model("residual")
    for name, module in list(model.named_children()):
        if isinstance(module, nn.BatchNorm2d) and not norms:
            setattr(model, name, nn.GroupNorm(module.num_features, module.num_features, affine=True))
    return model.double()


HOSTS = {
    None: None,
    "OTOv2": OTOv2(lam=0.8, epsilon=0.97, tolerance=0.1, deadline=8, remove_every=3),
    "taylor": DepGraph(importance="taylor", rounds=2),
}


def prepared(model, removal="at finish", host=None, rectify=None, **settings):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    settings = {"smooth": SmoothPruning(steps=4), "total_steps": STEPS} | settings
    return optimizer, Pruner(
        model, example(torch.float64), optimizer, 0.6,
        host=host, removal=removal, rectify=rectify or SelfRectifying(), **settings,
    )  # fmt: skip


def stream():
    return itertools.islice(batches(1, torch.float64), STEPS)


def part(rank, world):
    return slice(rank * BATCH // world, (rank + 1) * BATCH // world)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def backward(model, x, y):
    nn.functional.cross_entropy(model(x), y).backward()


def train(model, optimizer, pruner, mine, passes=backward):
    """The weights after every step, and the report."""
    seen = []
    for x, y in stream():
        optimizer.zero_grad()
        passes(model, x[mine], y[mine])
        optimizer.step()
        seen.append(weights(pruner.model))
    return seen, str(pruner.finish()), dict(pruner.model.state_dict())


@functools.cache
def alone(removal="at finish", host=None, arm=None):
    model = network()
    return train(model, *prepared(model, removal, HOSTS[host], arm and ARMS[arm][1]), slice(0, BATCH))


# ------------------------------------------------------------------------------------- what the processes run


def pruner_last(rank, world, folder, **options):
    model = DistributedDataParallel(network(), **options)
    return train(model, *prepared(model), part(rank, world))


def inner_model(rank, world, folder):
    """The pruner is given what is inside of a wrapper that is there already."""
    model = DistributedDataParallel(network(), find_unused_parameters=True)
    return train(model, *prepared(model.module), part(rank, world))


def new_wrappers(rank, world, folder, host=None, arm=None):
    model = network()
    optimizer, pruner = prepared(model, "at once", HOSTS[host], arm and ARMS[arm][1])
    seen, removed, wrapper = [], 0, DistributedDataParallel(model)
    for x, y in stream():
        optimizer.zero_grad()
        backward(wrapper, x[part(rank, world)], y[part(rank, world)])
        optimizer.step()
        if pruner.progress().removed > removed:
            removed, wrapper = pruner.progress().removed, DistributedDataParallel(model)
        seen.append(weights(model))
    return seen, str(pruner.finish()), dict(model.state_dict())


def accumulated(rank, world, folder):
    """Half of the own part without synchronisation, and then the other half."""

    def passes(model, x, y):
        middle = len(x) // 2
        with model.no_sync():
            (nn.functional.cross_entropy(model(x[:middle]), y[:middle]) / 2).backward()
        (nn.functional.cross_entropy(model(x[middle:]), y[middle:]) / 2).backward()

    model = DistributedDataParallel(network(), gradient_as_bucket_view=True)
    return train(model, *prepared(model), part(rank, world), passes)


def by_hand(rank, world, folder):
    def passes(model, x, y):
        backward(model, x, y)
        for p in model.parameters():
            dist.all_reduce(p.grad)
            p.grad /= world

    model = network()
    return train(model, *prepared(model, "at once"), part(rank, world), passes)


def otov2(rank, world, folder):
    model = DistributedDataParallel(network())
    return train(model, *prepared(model, host=HOSTS["OTOv2"]), part(rank, world))


def forgotten(rank, world, folder, **options):
    model = network()
    optimizer, pruner = prepared(model, "at once")
    return fails(DistributedDataParallel(model, **options), optimizer, pruner, part(rank, world))


def apart(rank, world, folder):
    model = network()
    return fails(model, *prepared(model), part(rank, world))


def fails(model, optimizer, pruner, mine):
    """What is said, in which step, and the weights by then."""
    for step, (x, y) in enumerate(stream()):
        try:
            optimizer.zero_grad()
            backward(model, x[mine], y[mine])
            optimizer.step()
        except ConfigError as error:
            return str(error), step, pruner.progress().removed, weights(pruner.model)
    return "nothing", 0, 0, weights(pruner.model)


def after_the_end(rank, world, folder):
    model = DistributedDataParallel(network())
    train(model, *prepared(model), part(rank, world))
    with pytest.raises(ConfigError, match="make a new one"):
        model(example(torch.float64))
    DistributedDataParallel(model.module)(example(torch.float64))


def ranks_differ(rank, world, folder, importance):
    """In the seeds of the importance and in the batches that it sees; batch-norms see their own parts, too."""
    model = DistributedDataParallel(network(norms=True))
    host = DepGraph(importance=importance, rounds=2)
    optimizer, pruner = prepared(model, host=host, smooth=SmoothPruning(steps=2), start=2)
    torch.manual_seed(rank)
    return train(model, optimizer, pruner, part(rank, world))


def different(rank, world, folder):
    """What is said where processes do not build the same pruner."""
    said = []
    for model, inputs, target in (
        (network(), example(torch.float64), 0.5 + 0.1 * rank),
        (network(), torch.ones(1 + rank, 3, 8, 8, dtype=torch.float64), 0.5),
        (build_model("residual" if rank else "plain"), example(), 0.5),
    ):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(ConfigError) as error:
            Pruner(model, inputs, optimizer, target, total_steps=9)
        said.append(str(error.value))
    return said


def each_its_own(rank, world, folder):
    model = network()
    mine = dist.new_subgroups(1)[0]
    optimizer, pruner = prepared(model, "at once", group=mine)
    return train(model, optimizer, pruner, part(rank, world))


def synchronised(rank, world, folder):
    """Such norms train on a GPU only; that structures are found and cut does not need one."""
    found = []
    for convert in (nn.SyncBatchNorm.convert_sync_batchnorm, lambda model: model):
        model = convert(network(norms=True))
        _, pruner = prepared(model)
        found.append((str(pruner.finish(force=True)), dict(model.state_dict())))
    return found


def zero(rank, world, folder):
    with warnings.catch_warnings():  # torch's own, on import
        warnings.simplefilter("ignore")
        from torch.distributed.optim import ZeroRedundancyOptimizer
    model = network()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(ConfigError, match="ZeroRedundancyOptimizer"):
        Pruner(model, example(torch.float64), optimizer, 0.5, total_steps=9)


#: Scenario → what one process does.
AS_ONE = {
    "wrapped": (pruner_last, alone),
    "unused": (functools.partial(pruner_last, find_unused_parameters=True), alone),
    "static": (functools.partial(pruner_last, static_graph=True, gradient_as_bucket_view=True), alone),
    "inner": (inner_model, alone),
    "at once": (new_wrappers, functools.partial(alone, "at once")),
    "rounds": (
        functools.partial(new_wrappers, host="taylor", arm="sr"),
        functools.partial(alone, "at once", "taylor", "sr"),
    ),
    "accumulated": (accumulated, alone),
    "by hand": (by_hand, functools.partial(alone, "at once")),
    "OTOv2": (otov2, functools.partial(alone, "at finish", "OTOv2")),
}
FAILS = {
    "forgotten": (forgotten, "make a new one"),
    "forgotten, unused": (functools.partial(forgotten, find_unused_parameters=True), "make a new one"),
    "forgotten, static": (functools.partial(forgotten, static_graph=True), "make a new one"),
    "apart": (apart, "DistributedDataParallel"),
}
IMPORTANCES = ("random", "activation")
SCENARIOS = {
    **{name: scenario for name, (scenario, _) in AS_ONE.items()},
    **{name: scenario for name, (scenario, _) in FAILS.items()},
    **{name: functools.partial(ranks_differ, importance=name) for name in IMPORTANCES},
    "after the end": after_the_end,
    "different": different,
    "each": each_its_own,
    "ZeRO": zero,
    "synchronised": synchronised,
}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return together(2, tmp_path_factory.mktemp("two"), SCENARIOS)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    few = {name: SCENARIOS[name] for name in ("wrapped", "at once", "forgotten, unused")}
    return together(3, tmp_path_factory.mktemp("three"), few)


def equal(ranks):
    """All have the same weights after every step."""
    for seen, said, _ in ranks:
        assert said == ranks[0][1]
        for step, (here, there) in enumerate(zip(seen, ranks[0][0], strict=True)):
            assert torch.equal(here, there), f"ranks drift apart in step {step}"


def close(ranks, one):
    """They are what one process learns from the whole batch."""
    expected, report, state = one
    for seen, said, small in ranks:
        assert said == report
        for step, (here, there) in enumerate(zip(seen, expected, strict=True)):
            assert here.shape == there.shape, f"another width in step {step}"
            assert torch.allclose(here, there, rtol=1e-7, atol=1e-9), f"not one process's, step {step}"
        for name, value in state.items():
            assert torch.allclose(small[name], value, rtol=1e-7, atol=1e-9), name


@pytest.mark.parametrize("name", AS_ONE)
def test_two_processes_learn_what_one_does(two, name):
    equal(two(name))
    close(two(name), AS_ONE[name][1]())


@pytest.mark.parametrize("name", ["wrapped", "at once"])
def test_so_do_three(three, name):
    equal(three(name))
    close(three(name), AS_ONE[name][1]())


@pytest.mark.parametrize("name", FAILS)
def test_falling_apart_is_an_error_in_all_of_them(two, name):
    falls_apart(two(name), name)


def test_so_it_is_in_three(three):
    falls_apart(three("forgotten, unused"), "forgotten, unused")


def falls_apart(ranks, name):
    for said, step, removed, there in ranks:
        assert FAILS[name][1] in said
        assert step == ranks[0][1]
        if name == "apart":
            assert step < 2
        else:
            assert removed and torch.equal(there, ranks[0][3])


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_picks_are_the_same_where_importances_differ(two, importance):
    equal(two(importance))


def test_a_wrapper_from_before_the_end_is_an_error(two):
    two("after the end")


def test_different_pruners_are_refused_in_all_of_them(two):
    for said in two("different"):
        assert all("different models, example inputs or settings" in each for each in said)


def test_a_group_of_one_trains_alone(two):
    first, second = two("each")
    assert not torch.equal(first[0][0], second[0][0])


def test_what_is_no_group_of_processes_is_refused():
    for group in ("world", 2, object()):
        with pytest.raises(ConfigError, match="group must be a torch process group"):
            prepared(network(), group=group)


def test_zero_is_refused_by_name(two):
    two("ZeRO")


def test_synchronised_norms_are_cut_as_others(two):
    for (report, state), (other, expected) in two("synchronised"):
        assert report == other
        assert all(torch.equal(state[name], value) for name, value in expected.items())


def on_gpus(rank, world, folder):
    torch.cuda.set_device(rank)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(network(norms=True)).cuda()
    model = DistributedDataParallel(model, device_ids=[rank])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    pruner = Pruner(
        model, example(torch.float64).cuda(), optimizer, 0.6,
        smooth=SmoothPruning(steps=4), rectify=SelfRectifying(), total_steps=STEPS,
    )  # fmt: skip
    seen = []
    for x, y in stream():
        optimizer.zero_grad()
        backward(model, x[part(rank, world)].cuda(), y[part(rank, world)].cuda())
        optimizer.step()
        seen.append(weights(pruner.model).cpu())
    return seen, str(pruner.finish()), {}


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_synchronised_norms_on_gpus(tmp_path):
    ranks = together(2, tmp_path, {"on GPUs": on_gpus}, backend="nccl")("on GPUs")
    equal(ranks)
    model = network(norms=True)
    close(ranks, (*train(model, *prepared(model), slice(0, BATCH))[:2], {}))
