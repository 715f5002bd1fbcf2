"""The fast path does what the reference says, over random structures with overlapping rows and columns."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from decay_pruning import reference, schedules
from decay_pruning import structures as structures_module
from decay_pruning.decay import SLICES, SmoothPruning
from decay_pruning.engine import Engine
from decay_pruning.rectify import SelfRectifying
from decay_pruning.structures import Coupling, LayerGroup, Role, StructureSet

# A stream of width 6 that a square layer both reads and writes (rows and columns of one structure cross), a hidden
# width of 5 with batch-norm, and a flatten: three positions of the head for each hidden structure.
STREAM, HIDDEN = 6, 5


@pytest.fixture(autouse=True, params=["flat", "blocks"])
def path(request, monkeypatch):
    """Both ways through the tensors: all together, and one by one."""
    monkeypatch.setitem(structures_module._SMALL, "cpu", 2**16 if request.param == "flat" else 0)


def make(seed: int) -> tuple[dict[str, nn.Parameter], StructureSet]:
    generator = torch.Generator().manual_seed(seed)

    def p(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))

    parameters = {
        "embed": p(STREAM, 3),
        "square": p(STREAM, STREAM),
        "up": p(HIDDEN, STREAM, 3, 1),
        "up_bias": p(HIDDEN),
        "gamma": p(HIDDEN),
        "beta": p(HIDDEN),
        "head": p(4, HIDDEN * 3),
    }

    def coupling(name: str, dim: int, role: Role, size: int, repeat: int = 1) -> Coupling:
        position = torch.arange(size * repeat)
        return Coupling(name, dim, role, position // repeat, position)

    stream = (
        coupling("embed", 0, Role.ROW, STREAM),
        coupling("square", 0, Role.ROW, STREAM),
        coupling("square", 1, Role.COLUMN, STREAM),
        coupling("up", 1, Role.COLUMN, STREAM),
    )
    hidden = (
        coupling("up", 0, Role.ROW, HIDDEN),
        coupling("up_bias", 0, Role.BIAS, HIDDEN),
        coupling("gamma", 0, Role.SCALE, HIDDEN),
        coupling("beta", 0, Role.SHIFT, HIDDEN),
        coupling("head", 1, Role.COLUMN, HIDDEN, 3),
    )
    groups = {
        "stream": LayerGroup("stream", torch.arange(STREAM), stream),
        "hidden": LayerGroup("hidden", torch.arange(HIDDEN), hidden),
    }
    sizes = {c.place: parameters[c.tensor].shape[c.dim] for g in groups.values() for c in g.couplings}
    return parameters, StructureSet(groups, sizes)


def slices_of(
    structures: StructureSet, group: str, index: int, roles: frozenset[Role]
) -> list[reference.Slice]:
    couplings = structures.groups[group].couplings
    chosen = [c for c in couplings if c.role in roles] or list(couplings)
    return [(c.tensor, c.dim, c.position[c.owner == index].tolist()) for c in chosen]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10_000),
    schedule=st.sampled_from(sorted(schedules.SCHEDULES)),
    bound=st.sampled_from(["slice", "joint"]),
    slices=st.sampled_from(sorted(SLICES)),
    picked=st.lists(
        st.tuples(st.sampled_from(["stream", "hidden"]), st.integers(0, HIDDEN - 2)), min_size=1, unique=True
    ),
    late=st.tuples(st.sampled_from(["stream", "hidden"]), st.just(HIDDEN - 1)),
    N=st.integers(1, 8),
    # no threshold that a mean of +1 and -1 can meet exactly: the C_rate of a lone gate is one of these in each step
    t_rate=st.none() | st.sampled_from([-0.987, 0.013, 0.213]),
    momentum=st.sampled_from([0.0, 0.9]),
)
def test_engine_agrees_with_reference(seed, schedule, bound, slices, picked, late, N, t_rate, momentum):
    smooth = SmoothPruning(steps=N, schedule=schedule, bound=bound, slices=slices)
    rectify = (
        None
        if t_rate is None
        else SelfRectifying(t_rate=t_rate, t_len=-0.1, warmup=0.2, judge_from=0.3, max_share=1.0)
    )
    fast, structures = make(seed)
    slow, _ = make(seed)
    lr = 0.05
    fast_sgd = torch.optim.SGD(fast.values(), lr=lr, momentum=momentum)
    slow_sgd = torch.optim.SGD(slow.values(), lr=lr, momentum=momentum)
    engine = Engine(structures, lambda: fast, fast_sgd, smooth, rectify)
    engine.attach()
    decaying: dict[tuple[str, int], reference.Decaying] = {}

    def pick(keys):
        engine.pick({g: [i for h, i in keys if h == g] for g in ("stream", "hidden")}, N)
        for g, i in keys:
            decaying[g, i] = reference.pick(slices_of(structures, g, i, smooth.roles), N, slow)

    generator = torch.Generator().manual_seed(seed + 1)
    pick(picked)
    for number in range(N + 3):
        if number == 2:
            pick([late])
        for name in fast:
            gradient = torch.randn(fast[name].shape, generator=generator, dtype=torch.float64)
            fast[name].grad, slow[name].grad = gradient.clone(), gradient.clone()
        if t_rate is not None:
            for s in decaying.values():
                if s.alive == "decaying":
                    reference.observe(s, slow, lr, warmup=0.2)
        fast_sgd.step()
        slow_sgd.step()
        reference.step(
            list(decaying.values()), slow, schedules.SCHEDULES[schedule], bound=bound,
            t_rate=t_rate, t_len=-0.1, judge_from=0.3,
        )  # fmt: skip
        for (
            key,
            s,
        ) in decaying.items():  # the reference fades the chosen slices only: zero the rest as the engine does
            if s.alive == "zero":
                every = slices_of(structures, *key, frozenset(Role))
                with torch.no_grad():
                    for name, mask in reference.masks(every, slow):
                        slow[name][mask] = 0.0
        for name in fast:
            torch.testing.assert_close(fast[name], slow[name], rtol=1e-9, atol=1e-9)
        assert sorted(engine.decaying) == sorted(k for k, s in decaying.items() if s.alive == "decaying")


@pytest.mark.parametrize("bound", ["slice", "joint"])
def test_a_crossing_is_scaled_once(bound):
    """The element where a structure's row and column meet shrinks like the rest of the row, not squared."""
    parameters, structures = make(0)
    optimizer = torch.optim.SGD(parameters.values(), lr=0.0)
    engine = Engine(structures, lambda: parameters, optimizer, SmoothPruning(steps=4, bound=bound))
    before = parameters["square"].detach().clone()
    engine.pick({"stream": [2]}, 4)
    engine.attach()
    optimizer.step()
    expected = before.clone()
    expected[2, :] *= 0.75
    expected[:, 2] *= 0.75
    expected[2, 2] = before[2, 2] * 0.75
    torch.testing.assert_close(parameters["square"].detach(), expected)
