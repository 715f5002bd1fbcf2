"""Removal is exact: cutting zeroed structures out does not change the function, whatever the network."""

from __future__ import annotations

import copy
import random
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from decay_pruning import surgery
from decay_pruning.errors import SurgeryError
from decay_pruning.graph import Graph
from decay_pruning.lab.models import build, names
from decay_pruning.structures import Role, StructureSet
from tests.nets import EXACT, INEXACT, Chain, Net, chains, image, lively, make

LIMIT = {torch.float32: 1e-5, torch.float64: 1e-10}
VIT_HEADS = {"blocks.0.attn.qkv": 3, "blocks.1.attn.qkv": 3}


def output(model: nn.Module, x: Any) -> Tensor:
    """All floating outputs in evaluation mode as one float64 vector, by our own means."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        result = model(*x) if isinstance(x, tuple) else model(x)
    flat: list[Tensor] = []

    def collect(value: Any) -> None:
        if isinstance(value, Tensor):
            flat.append(value.double().flatten())
        else:
            for each in value.values() if isinstance(value, dict) else value:
                collect(each)

    collect(result)
    return torch.cat(flat)


def random_picks(structures: StructureSet, seed: int) -> dict[str, list[int]]:
    rng = random.Random(seed)
    return {
        name: rng.sample(group.ids.tolist(), rng.randint(1, len(group) // 2))
        for name, group in structures.groups.items()
        if len(group) > 1
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", EXACT)
def test_hand_made_networks(name: str, dtype: torch.dtype) -> None:
    model, x = make(name, dtype)
    structures = Graph(model, x, heads=VIT_HEADS if name == "vit" else {}).structures
    for seed in range(2):
        picks = random_picks(structures, seed)
        if not picks:
            break
        dense = output(model, x)
        surgery.zero_(model, structures, picks)
        before = output(model, x)
        assert seed or not torch.allclose(before, dense)
        structures = surgery.remove(model, structures, picks, example_inputs=x)
        after = output(model, x)
        assert (after - before).norm() <= LIMIT[dtype] * before.norm()
        for name_, group in structures.groups.items():
            assert not set(group.ids.tolist()) & set(picks.get(name_, ()))
            for c in group.couplings:
                assert surgery.size_of(model, c.place) == structures.sizes[c.place]


@pytest.mark.parametrize("name", names())
def test_the_zoo(name: str) -> None:
    """Every model by name, built as small as it can be, with half of every layer group removed."""
    small: dict[str, Any] = {
        "vit-b": {"size": 16, "patch": 8, "width": 24, "depth": 2, "heads": 3, "hidden": 32}
    }
    small["resnet50"] = {"stem": "cifar"}
    options = small.get(name, {})
    torch.manual_seed(0)
    digits = name.endswith("-digits")
    channels, size = (1, 8) if name == "vit-digits" else (1 if digits else 3, options.get("size", 32))
    model = build(name, classes=10, channels=channels, **options)
    x = image(2, channels, size, size)
    structures = Graph(lively(model), x).structures
    reasons = structures.unprunable.values()
    own = [r for r in reasons if not r.startswith(("shares its width with", "is part of attention"))]
    assert "feeds the model's output" in reasons and len(own) <= 2
    picks = {key: group.ids[::2].tolist() for key, group in structures.groups.items()}
    surgery.zero_(model, structures, picks)
    before = output(model, x)
    surgery.remove(model, structures, picks, example_inputs=x)
    assert (output(model, x) - before).norm() <= 1e-5 * before.norm()


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(chains(), st.sampled_from([torch.float32, torch.float64]), st.integers(0, 2**16))
def test_random_networks(model: Chain, dtype: torch.dtype, seed: int) -> None:
    model, x = model.to(dtype), image(2, 3, 4, 4).to(dtype)
    structures = Graph(model, x, verify=False).structures
    assert set(structures.unprunable) == {"fc2"}, structures.unprunable
    names = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.ndim > 1}
    cut = {
        c.tensor.rpartition(".")[0]
        for g in structures.groups.values()
        for c in g.couplings
        if c.role is Role.ROW
    }
    assert names - cut == {"fc2"}
    picks = random_picks(structures, seed)
    surgery.zero_(model, structures, picks)
    before = output(model, x)
    structures = surgery.remove(model, structures, picks, example_inputs=x)
    assert (output(model, x) - before).norm() <= LIMIT[dtype] * before.norm()
    model.train()
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(chains())
def test_verification_accepts_all_layer_groups_of_random_networks(model: Chain) -> None:
    structures = Graph(model.double(), image(2, 3, 4, 4).double()).structures
    # a gate of dead units says nothing on these inputs, and is refused with that reason
    refused = {n: why for n, why in structures.unprunable.items() if "does not react" not in why}
    assert set(refused) == {"fc2"}, structures.unprunable


@pytest.mark.parametrize("name", INEXACT)
def test_inexact_layer_groups_are_cut_when_allowed(name: str) -> None:
    model, x = make(name)
    structures = Graph(model, x, allow_inexact=True, heads=VIT_HEADS if name == "vit" else {}).structures
    picks = {key: group.ids[:1].tolist() for key, group in structures.groups.items() if group.inexact}
    left = surgery.remove(model, structures, picks, example_inputs=x)
    assert picks and all(len(left.groups[key]) == len(structures.groups[key]) - 1 for key in picks)
    assert bool(output(model, x).isfinite().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model, x = make("resnet", dtype)
    structures = Graph(model, x).structures
    surgery.remove(model, structures, random_picks(structures, 0), example_inputs=x)
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_autocast_inside_the_model_widens_the_tolerance() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 64), nn.Linear(64, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.b(self.a(x).relu()).float()

    assert surgery.observe(Mixed(), image(8, 16)).coarsest is torch.bfloat16
    assert surgery.observe(nn.Linear(16, 4), image(8, 16)).coarsest is torch.float32
    assert surgery.observe(nn.Linear(16, 4).double(), image(8, 16).double()).coarsest is torch.float64


# ------------------------------------------------------------------------------------------- refused and undone


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    return {
        "state": {n: t.clone() for n, t in model.state_dict().items()},
        "grads": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        "modes": [m.training for m in model.modules()],
        "attributes": {
            (n, k): v
            for n, m in model.named_modules()
            for k, v in m.__dict__.items()
            if isinstance(v, int | tuple)
        },
        "optimizer": copy.deepcopy(optimizer.state_dict()) if optimizer else None,
        "history": surgery.history(model).state_dict(),
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def trained(name: str) -> tuple[nn.Module, Any, torch.optim.Optimizer]:
    model, x = make(name, torch.float64)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    model(x).square().sum().backward()
    optimizer.step()
    return model, x, optimizer


def shifted(structures: StructureSet, name: str, tensor: str) -> StructureSet:
    """Structures with the positions of one coupling off by one: a wrong trace."""
    group = structures.groups[name]
    couplings = tuple(
        replace(c, position=(c.position + 1) % structures.sizes[c.place]) if c.tensor == tensor else c
        for c in group.couplings
    )
    return replace(structures, groups={**structures.groups, name: replace(group, couplings=couplings)})


def test_a_removal_that_changes_the_output_is_undone() -> None:
    model, x, optimizer = trained("resnet")
    structures = Graph(model, x).structures
    wrong = shifted(structures, "4.conv1", "4.conv2.weight")
    before = snapshot(model, optimizer)
    picks = {"0": [1], "3.conv1": [2], "4.conv1": [3]}
    with pytest.raises(
        SurgeryError, match=r"as it was: layer group '4\.conv1': the output changes by"
    ) as info:
        surgery.remove(model, wrong, picks, example_inputs=x, optimizer=optimizer)
    assert "3.conv1" not in str(info.value)
    assert same(before, snapshot(model, optimizer))
    surgery.remove(model, structures, picks, example_inputs=x, optimizer=optimizer)


def test_a_removal_after_which_the_model_does_not_run_is_undone() -> None:
    model, x, optimizer = trained("vgg")
    structures = Graph(model, x).structures
    group = structures.groups["4"]
    short = replace(group, couplings=tuple(c for c in group.couplings if not c.tensor.startswith("7.")))
    before = snapshot(model, optimizer)
    with pytest.raises(SurgeryError, match=r"layer group '4': the smaller model does not run \(RuntimeError"):
        surgery.remove(
            model,
            replace(structures, groups={**structures.groups, "4": short}),
            {"4": [0]},
            example_inputs=x,
            optimizer=optimizer,
        )
    assert same(before, snapshot(model, optimizer))


def test_the_tolerance_is_the_callers_if_given() -> None:
    model, x, _ = trained("resnet")
    structures = Graph(model, x).structures
    wrong = shifted(structures, "4.conv1", "4.conv2.weight")
    surgery.remove(model, wrong, {"4.conv1": [3]}, example_inputs=x, tolerance=10.0)


def test_outputs_that_are_not_finite_are_refused() -> None:
    model, x, _ = trained("plain")
    structures = Graph(model, x).structures
    with torch.no_grad():
        model[7].bias.fill_(float("inf"))
    with pytest.raises(SurgeryError, match="was not finite before anything was cut"):
        surgery.remove(model, structures, {"0": [0]}, example_inputs=x)


def test_last_structures_and_unknown_ones_are_refused() -> None:
    model, x, _ = trained("vgg")
    structures = Graph(model, x).structures
    before = snapshot(model)
    for picks, words in (
        ({"4": range(5)}, "layer group '4' would lose its last structure"),
        ({"5": [0]}, "layer group '5' cannot be pruned: there is no such layer group"),
        ({"10": [0]}, "layer group '10' cannot be pruned: feeds the model's output"),
        ({"4": [7]}, r"layer group '4' has no structure \[7\]"),
    ):
        with pytest.raises(SurgeryError, match=words):
            surgery.remove(model, structures, picks, example_inputs=x)
    assert same(before, snapshot(model))
    assert surgery.remove(model, structures, {"4": []}, example_inputs=x) is structures


def test_a_part_of_a_split_never_becomes_empty() -> None:
    """Parts that are produced apart are layer groups of their own, so each keeps a last structure."""
    model = Net(
        lambda m, x: m.out(m.wide(x) + torch.cat([m.a(x), m.b(x)], 1)),
        wide=nn.Linear(4, 6), a=nn.Linear(4, 2), b=nn.Linear(4, 4), out=nn.Linear(6, 3),
    ).double()  # fmt: skip
    x = image(3, 4).double()
    structures = Graph(model, x).structures
    assert {name: len(group) for name, group in structures.groups.items()} == {"wide": 2, "b": 4}
    with pytest.raises(SurgeryError, match=r"'wide' would lose its last structure"):
        surgery.remove(model, structures, {"wide": [0, 1]}, example_inputs=x)
    surgery.remove(model, structures, {"wide": [1], "b": [0, 1]}, example_inputs=x)
    assert (model.a.out_features, model.b.out_features, model.out.in_features) == (1, 2, 3)


def test_the_proof_leaves_no_trace() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.drop = nn.Linear(4, 6), nn.Linear(6, 2), nn.Dropout(0.5)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls = self.calls + 1
            noise = torch.rand(())  # also in evaluation mode
            return self.b(self.drop(self.a(x))) * noise

    model, x = Counting(), image(3, 4)
    model.b.eval()
    calls = model.calls
    structures = Graph(model, x).structures
    state = torch.get_rng_state()
    surgery.remove(model, structures, {"a": [1, 4]}, example_inputs=x)
    assert model.calls is calls and float(calls) == 0
    assert torch.equal(state, torch.get_rng_state())
    assert [m.training for m in (model, model.a, model.b, model.drop)] == [True, True, False, True]


def test_history_counts_in_original_positions() -> None:
    model, x, _ = trained("vgg")
    structures = Graph(model, x).structures
    structures = surgery.remove(model, structures, {"0": [1, 4]}, example_inputs=x)
    surgery.remove(model, structures, {"0": [0, 5], "4": [2]}, example_inputs=x)
    past = surgery.history(model)
    assert past.positions["0.weight", 0].tolist() == [2, 3] == past.positions["4.weight", 1].tolist()
    assert past.original["0.weight", 0] == 6
    assert past.positions["7.weight", 1].tolist() == [*range(18), *range(27, 45)]
    assert past.positions["7.in_features", 0].numel() == model[7].in_features == 36
    twin = surgery.history(copy.deepcopy(model))
    assert same(twin.state_dict(), past.state_dict())
    other = surgery.History()
    other.load_state_dict(past.state_dict())
    assert same(other.positions, past.positions) and other.original == past.original


@pytest.mark.parametrize(
    "setting",
    [
        "torch.backends.cuda.matmul.allow_tf32 = True",
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    ],
)
def test_the_proof_runs_without_tf32_and_puts_the_switches_back(setting: str) -> None:
    """In a process of its own: torch refuses to read its old switches once a new one was set."""
    code = f"""
import torch
from torch.backends import cuda, cudnn
from decay_pruning import surgery

def read():
    found = []
    for owner in (cuda.matmul, cudnn, *((cudnn.conv, cudnn.rnn) if hasattr(cuda.matmul, "fp32_precision") else ())):
        for name in ("allow_tf32", "fp32_precision"):
            try:
                found.append(getattr(owner, name, None))
            except RuntimeError:
                found.append("refused")
    return found

if "fp32_precision" not in {setting!r} or hasattr(cuda.matmul, "fp32_precision"):
    {setting}
before = read()
with surgery.untouched(torch.nn.Linear(2, 2)):
    inside = read()
assert not any(value in (True, "tf32") for value in inside[:1] + inside[4:]), inside
assert read() == before, (before, read())
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)
