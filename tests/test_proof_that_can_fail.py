"""A layer group is offered only if the proof could have failed and did not; nothing in the output hides a change."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decay_pruning import proof
from decay_pruning.errors import GraphError, SurgeryError
from decay_pruning.graph import Graph
from tests.nets import Net, image


def net(run: Callable[..., Any], **layers: Any) -> Net:
    torch.manual_seed(0)
    given = {"a": nn.Linear(6, 12), "b": nn.Linear(12, 10), "out": nn.Linear(10, 7)}
    return Net(run, **(given | layers))


def mixed(m: Net, x: Tensor) -> Tensor:
    """`a` cannot be cut exactly (every channel hangs on how many there are, which no operation says); `b` can."""
    y = m.a(x).relu()
    return m.out(m.b(y - y.sum(-1, keepdim=True) / y.shape[-1]).relu())


def masked(value: float) -> Callable[..., Any]:
    return lambda m, x: mixed(m, x).masked_fill(torch.arange(7) > 4, value)


#: What stands in or beside the output and must not hide that `a` mixes its channels.
HIDING: dict[str, Callable[..., Any]] = {
    "nothing": mixed,
    "a mask of -1e9": masked(-1e9),
    "a mask of -inf": masked(-torch.inf),
    "NaN where there was NaN": masked(torch.nan),
    "a large tensor beside": lambda m, x: (mixed(m, x), x * 1e8),
    "a large constant beside in one tensor": lambda m, x: torch.cat([mixed(m, x), torch.full((len(x), 90), 1e7)], 1),
    "a constant that comes first": lambda m, x: {"zero": torch.zeros(3), "y": mixed(m, x)},
    "an offset added": lambda m, x: mixed(m, x) * torch.tensor([1.0, *[1e-6] * 6]),
    "an object": lambda m, x: torch.distributions.Categorical(logits=mixed(m, x)),
    "integers beside": lambda m, x: (mixed(m, x).argmax(-1), mixed(m, x)),
    "one branch of two": lambda m, x: torch.stack([mixed(m, x) * 1e-4, m.extra(x) * 1e4]),
}  # fmt: skip


@pytest.mark.parametrize("name", HIDING)
def test_nothing_hides_a_change(name: str) -> None:
    model = net(HIDING[name], **({"extra": nn.Linear(6, 7)} if "branch" in name else {}))
    found = Graph(model, image(4, 6)).structures
    assert "b" in found.groups
    assert "changes what is left" in found.unprunable["a"]
    # no switch opens what is found to change the output
    assert "a" not in Graph(model, image(4, 6), allow_inexact=True).structures.groups


@pytest.mark.parametrize("zero", [torch.zeros(4, 6), torch.full((2, 6), 3.0)])
def test_constant_examples_prove_nothing_by_themselves(zero: Tensor) -> None:
    layers = {"a": nn.Linear(6, 12, bias=False), "b": nn.Linear(12, 10, bias=False), "out": nn.Linear(10, 7)}
    found = Graph(net(mixed, **layers), zero).structures
    assert set(found.groups) == {"b"} and "a" in found.unprunable


def test_an_output_that_does_not_react_proves_nothing() -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        return m.out(m.b(m.a(x)).relu()) + 0 * m.far(m.near(x))

    model = net(run, near=nn.Linear(6, 8), far=nn.Linear(8, 7))
    found = Graph(model, image(4, 6)).structures
    assert {"a", "b"} <= set(found.groups)
    assert "does not react to it" in found.unprunable["near"]


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (lambda m, x: mixed(m, x).topk(2).indices, "holds no floating tensor.*backbone and head"),
        (lambda m, x: mixed(m, x) > 0, "holds no floating tensor.*backbone and head"),
        (lambda m, x: mixed(m, x)[:0], "is empty on the example inputs"),
        (lambda m, x: mixed(m, x) + torch.inf, "is not finite anywhere"),
        (lambda m, x: "a word", r"returns no tensor \(a str\)"),
        (lambda m, x: x * 2, "no output of the model depends on"),
    ],
)
def test_an_output_that_says_nothing_is_refused_with_the_way_out(run: Any, words: str) -> None:
    with pytest.raises(GraphError, match=words):
        Graph(net(run), image(4, 6))


def test_diverged_weights_are_told_from_masks() -> None:
    model = net(mixed)
    nn.init.constant_(model.b.weight, torch.nan)  # type: ignore[union-attr,arg-type]
    with pytest.raises(GraphError, match=r"'b\.weight' is not finite .*diverged"):
        Graph(model, image(4, 6))


# ----------------------------------------------------------------------------------- modes, inputs, picks


def aux(m: Net, x: Tensor) -> Any:
    y = m.a(x).relu()
    out = m.out(m.b(y).relu())
    return (out, m.aux(y)) if m.training else out


def noisy(m: Net, x: Tensor) -> Any:
    y = m.a(x).relu()
    if m.training:  # a reader of the mean that only training has
        y = y - y.mean(-1, keepdim=True)
    return m.out(m.b(y).relu())


def split_statistics(m: Net, x: Tensor) -> Any:
    y = m.a(x)
    return m.out(m.b((m.other(y) if m.training else m.norm(y)).relu()).relu())


#: What training has besides → layers, and tensors that are cut with `a` (none where it cannot be).
TRAINING: dict[str, tuple[Callable[..., Any], dict[str, nn.Module], set[str]]] = {
    "a head of its own": (aux, {"aux": nn.Linear(12, 3)}, {"aux.weight"}),
    "a mean": (noisy, {}, set()),
    "a batch-norm": (
        split_statistics,
        {"norm": nn.BatchNorm1d(12), "other": nn.BatchNorm1d(12)},
        {"norm.weight", "other.weight"},
    ),
}


@pytest.mark.parametrize("name", TRAINING)
@pytest.mark.parametrize("batch", [1, 4])
def test_readers_that_only_training_shows_are_found(name: str, batch: int) -> None:
    run, layers, along = TRAINING[name]
    found = Graph(net(run, **layers), image(batch, 6)).structures
    assert "b" in found.groups
    if along:
        assert along < {c.tensor for c in found.groups["a"].couplings}
    else:
        assert "a" in found.unprunable


def test_widths_that_only_a_shape_ties_do_not_pass() -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        left, right = m.a(x).relu(), m.c(x).relu()
        return m.out(
            m.b((left.unsqueeze(-1) * right.detach().unsqueeze(-2)).diagonal(dim1=-2, dim2=-1)).relu()
        )

    found = Graph(net(run, c=nn.Linear(6, 12)), image(4, 6)).structures
    assert "a" not in found.groups and "c" not in found.groups


DROPPING: dict[str, Callable[..., Any]] = {
    "dropout": lambda x: F.dropout(x, 0.3),
    "channels dropped": lambda x: F.dropout1d(x.unsqueeze(0), 0.3).squeeze(0),
    "alpha dropout": lambda x: F.alpha_dropout(x, 0.3, training=True),
    "noise": lambda x: x + 0.1 * torch.randn_like(x),
    "uniform noise": lambda x: x * torch.rand(x.shape),
    "a mask of one's own": lambda x: x * torch.bernoulli(torch.full_like(x, 0.7)),
}


@pytest.mark.parametrize("name", DROPPING)
def test_chance_is_not_taken_for_a_change(name: str) -> None:
    drop = DROPPING[name]
    model = net(lambda m, x: m.out(m.b(drop(m.a(x).relu())).relu()))
    before = torch.get_rng_state()
    assert set(Graph(model, image(4, 6)).structures.groups) == {"a", "b"}
    assert torch.equal(before, torch.get_rng_state())


# ---------------------------------------------------------------------------------------- dtypes and state


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_narrow_dtype_hides_no_small_change(dtype: torch.dtype) -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.out(m.b(y + 1e-3 * y.mean(-1, keepdim=True)).relu())

    model = net(run).to(dtype)
    weights = {name: (t, t.data_ptr(), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    found = Graph(model, image(4, 6).to(dtype)).structures
    assert "b" in found.groups and "a" in found.unprunable
    for name, t in model.state_dict(keep_vars=True).items():
        same, pointer, value = weights[name]
        assert t is same and t.data_ptr() == pointer and t.dtype == dtype and torch.equal(t, value)


class Merges(nn.Linear):
    """An adapter that is merged into the weight while evaluating, as LoRA layers do."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o)
        self.up, self.down = nn.Parameter(torch.randn(o, 2)), nn.Parameter(torch.randn(2, i))

    def train(self, mode: bool = True) -> Merges:
        if mode != self.training:
            self.weight.data += (1 if self.training else -1) * (self.up @ self.down).data
        return super().train(mode)  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + x @ self.down.T @ self.up.T if self.training else y


def remembers(m: Net, x: Tensor) -> Tensor:
    m.calls = m.calls + 1
    m.last = m.a(x)
    return m.out(m.b(m.last.relu()).relu())


@pytest.mark.parametrize("kind", ["merges", "remembers", "spectral", "normed"])
def test_the_model_is_left_as_it_was(kind: str) -> None:
    layers: dict[str, nn.Module] = {"b": Merges(12, 10)} if kind == "merges" else {}
    if kind == "spectral":
        layers["extra"] = nn.utils.spectral_norm(nn.Linear(6, 6))
    if kind == "normed":
        layers["extra"] = nn.BatchNorm1d(6)
    run: Any = (
        remembers if kind == "remembers" else lambda m, x: mixed(m, m.extra(x) if hasattr(m, "extra") else x)
    )
    model = net(run, **layers)
    model.calls = 0  # type: ignore[assignment]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    with suppress(GraphError):
        Graph(model, image(4, 6))
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert model.calls == 0 and not hasattr(model, "last")
    assert all(p.grad is None for p in model.parameters())


# ----------------------------------------------------------------------------------------------- comparing


def output(*tensors: Tensor) -> proof.Output:
    return proof.Output(tensors, torch.float64)


@pytest.mark.parametrize(
    ("before", "after", "least"),
    [
        ([[1.0, 2.0, 1e9]], [[1.1, 2.0, 1e9]], 0.04),
        ([[1.0, 2.0], [1e6, 1e6]], [[1.0, 2.2], [1e6, 1e6]], 0.04),
        ([[0.0, 0.0]], [[0.0, 1e-9]], 1.0),
        ([[1.0, -torch.inf]], [[1.5, -torch.inf]], 0.3),
    ],
)
def test_each_element_has_its_own_scale(
    before: list[list[float]], after: list[list[float]], least: float
) -> None:
    a, b = (output(*(torch.tensor(row, dtype=torch.float64) for row in rows)) for rows in (before, after))
    assert proof.change_of(a, b) >= least
    assert proof.change_of(a, a) == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_was_finite_stays_finite(value: float) -> None:
    with pytest.raises(SurgeryError, match="not finite after the cut"):
        proof.change_of(output(torch.tensor([1.0, 2.0])), output(torch.tensor([1.0, value])))
