"""Widths that a model divides by: γ, ε and the queries take the change, so that a removal is exact."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from decay_pruning import (
    DepGraph,
    GraphError,
    ManifestError,
    Pruner,
    SmoothPruning,
    Target,
    archive,
    load,
    prune_like,
    save,
    surgery,
)
from decay_pruning.graph import Graph
from decay_pruning.structures import StructureSet
from tests.nets import image

EPSILON = 0.3  # so large that a wrong one shows


class Norm(nn.Module):
    """Written by hand: in single precision, as Llama and T5 have it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.rand(width) + 0.5), EPSILON

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.to(torch.float32)
        variance = wide.pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.variance_epsilon))


class OnePlus(nn.Module):
    """1 + γ (Gemma), and a division by the root."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale, self.eps = nn.Parameter(torch.rand(width) - 0.5), EPSILON

    def forward(self, x: Tensor) -> Tensor:
        y = x / ((x * x).mean(-1, keepdim=True) + self.eps).sqrt()
        return y * (1.0 + self.scale)


class Early(nn.Module):
    """The root times γ first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.g, self._eps = nn.Parameter(torch.rand(width) + 0.5), EPSILON

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rsqrt(x.square().mean(-1, keepdim=True) + self._eps) * self.g)


class ByLength(nn.Module):
    """The length over the root of the width that comes in, and ε outside of the root."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.g, self.eps = nn.Parameter(torch.rand(width) + 0.5), EPSILON

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.norm(dim=-1, keepdim=True) * x.shape[-1] ** -0.5 + self.eps) * self.g


class Fixed(nn.Module):
    """The root of the width is a number of its own: nothing changes with the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.g, self.scale = nn.Parameter(torch.rand(width) + 0.5), width**0.5

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * self.scale * self.g


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "by hand": Norm,
    "one plus": OnePlus,
    "early": Early,
    "by length": ByLength,
    "fixed": Fixed,
    "torch": lambda width: nn.RMSNorm(width, eps=EPSILON),
    "torch, no ε": nn.RMSNorm,
}


class Block(nn.Module):
    """Grouped queries over a residual width: 2 heads of keys, 2 queries for each, 4 offsets."""

    def __init__(self, norm: Callable[[int], nn.Module], scores: str) -> None:
        super().__init__()
        self.scores, self.scale, self.head = scores, 0.5, 4
        self.before, self.after = norm(12), norm(12)
        self.q, self.k, self.v = nn.Linear(12, 16), nn.Linear(12, 8, bias=False), nn.Linear(12, 8)
        self.out, self.up, self.down = nn.Linear(16, 12), nn.Linear(12, 10), nn.Linear(10, 12)
        self.near = norm(4) if scores == "normed" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        q, k, v = (f(y).unflatten(-1, (-1, self.head)).transpose(1, 2) for f in (self.q, self.k, self.v))
        q = self.near(q)
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        if self.scores == "stored":
            a = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        elif self.scores == "by hand":
            a = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        elif self.scores == "by number":
            a = (q @ k.mT / math.sqrt(self.head)).softmax(-1) @ v
        else:
            a = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(a.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.after(x))))


OFFSETS = {"1.q": 4, "1.k": 2, "1.v": 2}


def build(norm: str = "by hand", scores: str = "sdpa", dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    kind = NORMS[norm]
    return nn.Sequential(nn.Linear(5, 12), Block(kind, scores), kind(12), nn.Linear(12, 3)).to(dtype)


def some(structures: StructureSet, share: int = 2) -> dict[str, list[int]]:
    return {key: group.ids[::share].tolist()[: len(group) // 2] for key, group in structures.groups.items()}


def removed_twice(model: nn.Module, x: Tensor, **options: Any) -> tuple[float, StructureSet]:
    """How far two removals, one after the other, change a model in which the structures are zero."""
    structures = Graph(model, x, **options).structures
    assert all(group.inexact is None for group in structures.groups.values())
    worst = 0.0
    for share in (2, 3):
        picks = some(structures, share)
        surgery.zero_(model, structures, picks)
        before = model(x)
        structures = surgery.remove(model, structures, picks, example_inputs=x)
        worst = max(worst, float((model(x) - before).detach().abs().max()))
    return worst, structures


@pytest.mark.parametrize("norm", NORMS)
def test_the_width_of_a_root_mean_square_goes_exactly(norm: str) -> None:
    model, x = build(norm), image(2, 7, 5).double()
    worst, left = removed_twice(model, x)
    assert worst < 1e-10 and len(left.groups["0"]) == 4


@pytest.mark.parametrize("scores", ["sdpa", "by hand", "by number", "stored", "normed"])
def test_offsets_in_all_heads_go_exactly(scores: str) -> None:
    model, x = build(scores=scores), image(2, 7, 5).double()
    worst, left = removed_twice(model, x, heads=OFFSETS)
    assert worst < 1e-10 and model[1].head == 1  # 4 of each head, then 2
    assert model[1].q.out_features == 4 and model[1].scale == 0.5
    powers = {each.power for fold in left.folds for each in fold.scaled if fold.place[0].startswith("1.q")}
    assert powers == (set() if scores in ("stored", "normed") else {-0.5})


def test_queries_that_are_the_keys_share_the_change() -> None:
    class Same(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.out = nn.Linear(5, 12), nn.Linear(6, 2)
            self.v = nn.Linear(5, 6)

        def forward(self, x: Tensor) -> Tensor:
            q, v = (f(x).unflatten(-1, (3, -1)).transpose(1, 2) for f in (self.q, self.v))
            return self.out(F.scaled_dot_product_attention(q, q, v).transpose(1, 2).flatten(2))

    model = Same().double()
    worst, left = removed_twice(model, image(2, 7, 5).double(), heads={"q": 3})
    assert worst < 1e-10 and len(left.groups["q"]) == 1 and left.folds[0].scaled[0].power == -0.25


def test_a_norm_in_single_precision_in_a_model_in_double() -> None:
    class Single(Norm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float()).to(x.dtype)

    model = nn.Sequential(nn.Linear(5, 12), Single(12), nn.Linear(12, 3)).double()
    worst, left = removed_twice(model, image(2, 7, 5).double())
    assert worst < 1e-5 and len(left.groups["0"]) == 4


def test_beside_a_norm_that_has_no_fold() -> None:
    """The width is inexact by its nature; what does have a fold has it all the same."""
    norms = nn.Sequential(Norm(12), nn.RMSNorm(12, elementwise_affine=False), nn.LayerNorm(12))
    model = nn.Sequential(nn.Linear(5, 12), *norms, nn.Linear(12, 3)).double()
    x = image(2, 7, 5).double()
    structures = Graph(model, x, allow_inexact=True).structures
    assert structures.groups["0"].inexact
    surgery.remove(model, structures, {"0": [1, 5, 7]}, example_inputs=x)
    assert model[1].variance_epsilon == pytest.approx(EPSILON * 12 / 9)


def test_torch_s_own_attention_over_a_root_mean_square() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.attention = nn.RMSNorm(12), nn.MultiheadAttention(12, 3, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return x + self.attention(y, y, y)[0]

    model = nn.Sequential(nn.Linear(5, 12), Attention(), nn.Linear(12, 3)).double()
    worst, left = removed_twice(model, image(2, 7, 5).double())
    assert worst < 1e-10 and model[1].attention.head_dim == 1 == len(left.groups["0"])


@settings(max_examples=4, deadline=None)
@given(st.integers(4, 11), st.integers(1, 3), st.integers(0, 2**16), st.floats(1e-6, 2.0))
def test_any_width_and_any_epsilon(width: int, gone: int, seed: int, epsilon: float) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, width), nn.RMSNorm(width, eps=epsilon), nn.Linear(width, 2)).double()
    x = torch.randn(4, 3).double()
    structures = Graph(model, x).structures
    picks = {"0": torch.randperm(width)[:gone].tolist()}
    surgery.zero_(model, structures, picks)
    before, norm = model(x), model[1]
    surgery.remove(model, structures, picks, example_inputs=x)
    assert norm.eps == pytest.approx(epsilon * width / (width - gone))
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-10)


def test_without_the_fold_the_proof_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = build(), image(2, 7, 5).double()
    structures = Graph(model, x).structures
    monkeypatch.setattr(surgery, "scaled_by", lambda *given: {})
    with pytest.raises(surgery.SurgeryError, match="the output changes"):
        surgery.remove(model, structures, {"0": [1]}, example_inputs=x)


# ------------------------------------------------------------------------------------------------ what has no fold


class NoScale(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)


class Literal(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3))


class Elsewhere(Norm):
    """Its ε is on a config, which is no module."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.config, self.variance_epsilon = type("Config", (), {"eps": 1e-3})(), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config.eps))


class Shared(Norm):
    """Its γ is used once more."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x * self.weight


class TwiceUsed(Norm):
    """Its ε is used once more."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.variance_epsilon * x


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (lambda width: NoScale(), ""),
        (lambda width: nn.RMSNorm(width, elementwise_affine=False), "has no scale of its own behind it"),
        (Literal, "adds 0.001, which is no number on the module"),
        (Elsewhere, "adds 0.001, which is no number on the module"),
        (Shared, ""),
        (TwiceUsed, ""),
    ],
)
def test_what_cannot_take_the_change_is_refused(kind: Callable[[int], nn.Module], words: str) -> None:
    model = nn.Sequential(nn.Linear(5, 12), kind(12), nn.Linear(12, 3)).double()
    with pytest.raises(GraphError) as caught:
        Graph(model, image(2, 5).double())
    assert words in str(caught.value) and "\n  0: " in str(caught.value)


# ------------------------------------------------------------------------------------------------ training goes on


def trained(norm: str, **options: Any) -> tuple[nn.Module, nn.Module, nn.Module, Tensor]:
    """A model pruned while it trains, an average of it, and a fresh one."""
    model, x = build(norm, dtype=torch.float32), image(2, 7, 5)
    fresh, average = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    host = DepGraph(scope="local", heads=OFFSETS)
    smooth = SmoothPruning(steps=4)
    pruner = Pruner(
        model, x, optimizer, Target(macs=0.4), host=host, smooth=smooth, also=[average], **options
    )
    for _ in range(7):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            for mine, theirs in zip(average.parameters(), model.parameters(), strict=True):
                mine.lerp_(theirs, 0.5)
    pruner.finish()
    moments = [optimizer.state[p]["exp_avg"].shape == p.shape for p in model.parameters()]
    assert all(moments) and bool(model(x).isfinite().all())
    return model, average, fresh, x


def epsilons(model: nn.Module) -> list[Any]:
    names = ("variance_epsilon", "eps")
    return [vars(m)[name] for m in model.modules() for name in names if name in vars(m)]


@pytest.mark.parametrize("norm", ["by hand", "one plus", "torch, no ε"])
def test_a_file_and_a_copy_follow(norm: str, tmp_path: Path) -> None:
    model, average, fresh, x = trained(norm)
    assert epsilons(average) == epsilons(model) != epsilons(fresh)
    save(model, tmp_path / "model")
    loaded = load(copy.deepcopy(fresh), tmp_path / "model")
    assert epsilons(loaded) == epsilons(model) and torch.equal(loaded(x), model(x))
    late, later = copy.deepcopy(fresh), copy.deepcopy(fresh)
    prune_like(late, model)
    prune_like(later, loaded)
    bare = fresh.state_dict()
    prune_like(bare, model)
    assert all(torch.equal(bare[name], tensor) for name, tensor in late.state_dict().items())
    for a, b in zip(late.parameters(), later.parameters(), strict=True):
        assert torch.equal(a, b)
    assert epsilons(late) == epsilons(later) == epsilons(model)


def test_a_copy_that_has_followed_in_part_follows_the_rest() -> None:
    model, x = build(), image(2, 7, 5).double()
    behind, structures = copy.deepcopy(model), Graph(model, x).structures
    structures = surgery.remove(model, structures, {"0": [1, 5]}, example_inputs=x)
    prune_like(behind, model)
    surgery.remove(model, structures, {"0": [0, 2]}, example_inputs=x)
    prune_like(behind, model)
    gamma = [m[1].before.weight for m in (model, behind)]
    torch.testing.assert_close(*gamma, rtol=1e-12, atol=0)
    assert epsilons(behind) == pytest.approx(epsilons(model))


def test_at_finish_is_at_once() -> None:
    once, later = (trained("torch", removal=each)[0] for each in ("at once", "at finish"))
    assert [p.shape for p in once.parameters()] == [p.shape for p in later.parameters()]
    assert epsilons(once) == pytest.approx(epsilons(later))


def test_a_removal_that_is_undone_leaves_no_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = build(), image(2, 7, 5).double()
    structures = Graph(model, x).structures
    before = copy.deepcopy(model.state_dict())
    verdict = surgery.trial(model, structures, some(structures), x)
    undo = surgery.shrink(
        model,
        kept := structures.kept(some(structures)),
        scaled=surgery.scaled_by(model, structures, kept),
    )
    changed = epsilons(model)
    undo()
    assert verdict.problem is None and changed != epsilons(model) == [EPSILON] * 3
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not surgery.history(model).factors


def test_a_run_goes_on_from_its_state() -> None:
    model, x = build(dtype=torch.float32), image(2, 7, 5)
    fresh = copy.deepcopy(model)

    def pruner(model: nn.Module) -> Pruner:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        host = DepGraph(scope="local", rounds=2)
        return Pruner(model, x, optimizer, 0.4, host=host, smooth=SmoothPruning(steps=1))

    first = pruner(model)
    model(x).square().mean().backward()
    first._optimizer.step()
    second = pruner(fresh)
    second.load_state_dict(first.state_dict())
    fresh.load_state_dict(model.state_dict())
    assert epsilons(fresh) == epsilons(model) != [EPSILON] * 3
    assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize(
    "change",
    [
        {"tensor": "1.scale", "factors": [2.0]},
        {"tensor": "1.before.training", "factors": [2.0]},
        {"factors": [-1.0]},
        {"factors": [0]},
        {"dim": 3},
        {"size": 5},
        {"tensor": "1.before"},
        {"factors": ["x"]},
    ],
)
def test_a_damaged_file_multiplies_nothing(change: Mapping[str, Any], tmp_path: Path) -> None:
    model, x = build(), image(2, 7, 5).double()
    fresh, structures = copy.deepcopy(model), Graph(model, x).structures
    surgery.remove(model, structures, {"0": [1]}, example_inputs=x)
    save(model, tmp_path / "model")
    meta, tensors = archive.read(tmp_path / "model")
    row = next(row for row in meta["scaled"] if row["tensor"] == "1.before.variance_epsilon")
    row.update(change)
    archive.write(tmp_path / "model", tensors, meta)
    with pytest.raises(ManifestError):
        load(fresh, tmp_path / "model")
    assert epsilons(fresh) == [EPSILON] * 3 and fresh[0].out_features == 12
