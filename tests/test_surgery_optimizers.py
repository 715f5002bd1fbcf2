"""Surgery keeps the training alive: parameters, gradients, optimizer state, ties, formats and hooks follow the cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from decay_pruning import surgery
from decay_pruning.errors import SurgeryError
from decay_pruning.graph import Graph
from tests.nets import image, make


class Lion(Optimizer):
    """A custom optimizer with one moment (Chen et al. 2023)."""

    def __init__(self, params: Iterable[Tensor], lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                moment = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.add_((0.9 * moment + 0.1 * p.grad).sign(), alpha=-group["lr"])
                moment.lerp_(p.grad, 0.01)


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.01),
    "sgd momentum": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, nesterov=True, weight_decay=1e-4),
    "sgd foreach": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, foreach=True),
    "sgd fused": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, 1e-3),
    "adamw amsgrad": lambda p: torch.optim.AdamW(p, 1e-3, amsgrad=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, 1e-3, fused=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, 1e-3, foreach=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.9, centered=True),
    "nadam": lambda p: torch.optim.NAdam(p, 1e-3),
    "radam": lambda p: torch.optim.RAdam(p, 1e-3),
    "adamax": lambda p: torch.optim.Adamax(p, 1e-3),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "asgd": lambda p: torch.optim.ASGD(p, 1e-2),
    "rprop": lambda p: torch.optim.Rprop(p, 1e-3),
    "adafactor": lambda p: torch.optim.Adafactor(p, 1e-2),
    "lion": lambda p: Lion(p, 1e-3),
}


def train(model: nn.Module, x: Any, optimizer: Optimizer, steps: int = 1) -> None:
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


def kept_of(model: nn.Module, name: str, shape: torch.Size) -> list[Tensor]:
    """Original positions that are left of a parameter, dimension by dimension."""
    past = surgery.history(model)
    return [past.positions.get((name, dim), torch.arange(size)) for dim, size in enumerate(shape)]


def cut(value: Tensor, kept: list[Tensor]) -> Tensor:
    """The oracle: index dimension by dimension, where the dimension has not been reduced to 1."""
    for dim, keep in enumerate(kept):
        if value.shape[dim] > 1:
            value = value[(slice(None),) * dim + (keep,)]
    return value


@pytest.mark.parametrize("net", ["resnet", "vgg", "grouped"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_follows_and_training_goes_on(name: str, net: str) -> None:
    model, x = make(net)
    optimizer = OPTIMIZERS[name](model.parameters())
    parameters = dict(model.named_parameters())
    structures = Graph(model, x).structures
    train(model, x, optimizer, 3)
    shapes = {n: p.shape for n, p in parameters.items()}
    state = {n: {k: v.clone() if isinstance(v, Tensor) else v for k, v in optimizer.state[p].items()}
             for n, p in parameters.items()}  # fmt: skip
    gradients = {n: p.grad.clone() for n, p in parameters.items()}
    picks = {key: group.ids[1::2].tolist() for key, group in structures.groups.items()}
    surgery.remove(model, structures, picks, example_inputs=x, optimizer=optimizer)

    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
        id(p) for p in parameters.values()
    }
    smaller = 0
    for n, p in model.named_parameters():
        assert p is parameters[n] and p.requires_grad
        kept = kept_of(model, n, shapes[n])
        smaller += p.numel() < shapes[n].numel()
        assert p.grad is not None and torch.equal(p.grad, cut(gradients[n], kept)), n
        assert optimizer.state[p].keys() == state[n].keys()
        for key, value in optimizer.state[p].items():
            old = state[n][key]
            if isinstance(old, Tensor) and old.ndim == p.ndim and old.numel() > 1:
                assert torch.equal(value, cut(old, kept)), (n, key)
            else:
                assert torch.equal(value, old) if isinstance(old, Tensor) else value == old, (n, key)
    assert smaller >= len(parameters) // 2

    before = [p.detach().clone() for p in model.parameters()]
    train(model, x, optimizer, 2)
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert sum(moved) >= len(moved) - 2  # a bias in front of batch-norm has no gradient
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("name", ["sgd momentum", "adam", "rmsprop"])
def test_training_after_the_cut_is_that_of_the_zeroed_network(name: str) -> None:
    """Elementwise optimizers: what stays moves exactly as it would have moved beside dead structures."""
    trained = []
    for shrink in (False, True):
        model, x = make("resnet", torch.float64)
        optimizer = OPTIMIZERS[name](model.parameters())
        structures = Graph(model, x).structures
        train(model, x, optimizer, 3)
        picks = {key: group.ids[::3].tolist() for key, group in structures.groups.items()}
        if shrink:
            surgery.remove(model, structures, picks, example_inputs=x, optimizer=optimizer)
            train(model, x, optimizer, 3)
        else:
            surgery.zero_(model, structures, picks)
            for _ in range(3):
                train(model, x, optimizer)
                surgery.zero_(model, structures, picks)  # held at zero
            surgery.shrink(model, structures.kept(picks))
        trained.append(model.state_dict())
    for n, a in trained[0].items():
        assert torch.allclose(a, trained[1][n], rtol=1e-9, atol=1e-9), n


def test_adafactor_keeps_rows_and_columns_of_its_factors() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    optimizer = torch.optim.Adafactor(model.parameters(), 1e-2)
    x = image(5, 4)
    structures = Graph(model, x).structures
    train(model, x, optimizer, 2)
    state = optimizer.state[model[0].weight]
    row, col = state["row_var"].clone(), state["col_var"].clone()
    assert row.shape == (6, 1) and col.shape == (1, 4)
    surgery.remove(model, structures, {"0": [1, 2]}, example_inputs=x, optimizer=optimizer)
    assert torch.equal(state["row_var"], row[[0, 3, 4, 5]]) and torch.equal(state["col_var"], col)
    assert optimizer.state[model[2].weight]["col_var"].shape == (1, 4)
    assert optimizer.state[model[0].bias]["variance"].shape == (4,)
    train(model, x, optimizer)


# ---------------------------------------------------------------------------------------- refused beforehand


class Odd(Optimizer):
    """Keeps whatever it is given as state."""

    def __init__(self, params: Iterable[Tensor], value: Callable[[Tensor], Any]) -> None:
        super().__init__(params, {})
        for p in self.param_groups[0]["params"]:
            self.state[p]["odd"] = value(p)

    def step(self, closure: Any = None) -> None: ...


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (lambda p: [torch.zeros_like(p)], "keeps 'odd' of '0.weight' as a list"),
        (
            lambda p: torch.zeros(p.numel()),
            r"in shape \(24,\), which does not follow the parameter's \(6, 4\)",
        ),
        (lambda p: torch.zeros(*p.shape, 2), "does not follow"),
        (lambda p: torch.zeros(p.shape[0], 3) if p.ndim > 1 else torch.zeros(3), "does not follow"),
    ],
)
def test_state_that_cannot_be_cut_is_refused_before_anything_is_touched(value: Any, words: str) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    structures = Graph(model, image(5, 4)).structures
    optimizer = Odd(model.parameters(), value)
    before = {n: (t.data_ptr(), t.clone()) for n, t in model.state_dict().items()}
    with pytest.raises(SurgeryError, match=words):
        surgery.remove(model, structures, {"0": [1]}, example_inputs=image(5, 4), optimizer=optimizer)
    for n, t in model.state_dict().items():
        assert t.data_ptr() == before[n][0] and torch.equal(t, before[n][1])
    assert model[0].out_features == 6


def test_harmless_state_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    structures = Graph(model, image(5, 4)).structures
    for value in (3, None, "text", torch.tensor(2.0), torch.ones(1), torch.ones(1, 1)):
        optimizer = Odd(model.parameters(), lambda p, value=value: value)
        undo = surgery.shrink(model, structures.kept({"0": [1]}), optimizer)
        assert all(state["odd"] is value for state in optimizer.state.values())
        undo()


def test_lbfgs_is_refused() -> None:
    model, x = make("plain")
    structures = Graph(model, x).structures
    with pytest.raises(SurgeryError, match="LBFGS keeps one flat history"):
        surgery.remove(
            model, structures, {"0": [1]}, example_inputs=x, optimizer=torch.optim.LBFGS(model.parameters())
        )


def test_bad_positions_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    for kept, words in (
        ({("0.weight", 0): torch.tensor([0, 6])}, r"must ascend within 0 … 5"),
        ({("0.weight", 0): torch.tensor([2, 1])}, "must ascend"),
        ({("0.weight", 0): torch.tensor([1, 1])}, "must ascend"),
        ({("0.weight", 0): torch.tensor([], dtype=torch.int64)}, "nothing would be left of '0.weight'"),
        ({("0.weight", 0): torch.tensor([0.0])}, "must be a 1-d int64 tensor"),
        ({("0.weight", 2): torch.tensor([0])}, "has no dimension 2"),
        ({("0.wait", 0): torch.tensor([0])}, "no parameter, buffer or attribute '0.wait'"),
        ({("7.weight", 0): torch.tensor([0])}, "has no module '7'"),
        ({("0.training", 0): torch.tensor([0])}, "has no dimension 0 to cut"),
    ):
        with pytest.raises(SurgeryError, match=words):
            surgery.shrink(model, kept)
    assert model[0].weight.shape == (6, 4)


def test_parametrized_weights_are_refused() -> None:
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), nn.Linear(6, 3))
    with pytest.raises(SurgeryError, match=r"'0\.weight' is computed from other tensors"):
        surgery.shrink(model, {("0.weight", 0): torch.arange(5)})


# ------------------------------------------------------------------------------------------ what else is kept


def test_backward_works_while_an_old_loss_is_held() -> None:
    """A held graph keeps gradient accumulators of the old shape alive; the cut must reset them."""
    model, x = make("resnet")
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    structures = Graph(model, x).structures
    fired: list[str] = []
    for n, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, n=n: fired.append(n))
    loss = model(x).square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    surgery.remove(
        model,
        structures,
        {key: group.ids[:2].tolist() for key, group in structures.groups.items()},
        example_inputs=x,
        optimizer=optimizer,
    )
    fired.clear()
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()
    assert sorted(fired) == sorted(n for n, _ in model.named_parameters())
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
    assert loss.grad_fn is not None


def test_without_the_detour_the_held_loss_breaks_backward() -> None:
    """Why `_set_data` passes through another dtype; where torch no longer needs that, this test says so."""
    layer = nn.Linear(4, 6)
    loss = layer(image(3, 4)).sum()
    layer.weight.data = layer.weight.data[:5]
    layer.bias.data = layer.bias.data[:5]
    with pytest.raises(RuntimeError, match="invalid gradient"):
        layer(image(3, 4)).sum().backward()
    assert loss.requires_grad


@pytest.mark.parametrize(
    ("net", "fmt"), [("mobile", torch.channels_last), ("volume", torch.channels_last_3d)]
)
def test_memory_format_stays(net: str, fmt: torch.memory_format) -> None:
    # Not "resnet": torch 2.13 corrupts the heap in the backward of its 1×1, stride 2, 6 → 8 channels_last shortcut.
    model, x = make(net)
    model, x = model.to(memory_format=fmt), x.to(memory_format=fmt)
    optimizer = torch.optim.Adam(model.parameters())
    structures = Graph(model, x).structures
    train(model, x, optimizer)
    picks = {key: group.ids[:2].tolist() for key, group in structures.groups.items()}
    surgery.remove(model, structures, picks, example_inputs=x, optimizer=optimizer)
    ndim = {torch.channels_last: 4, torch.channels_last_3d: 5}[fmt]
    weights = [p for p in model.parameters() if p.ndim == ndim]
    for p in weights:
        assert p.grad is not None
        assert p.shape[1] == 1 or p.stride(1) == 1  # also where a 1×1 kernel is contiguous either way
        for t in (p, p.grad, optimizer.state[p]["exp_avg"]):
            assert t.is_contiguous(memory_format=fmt)
    plain, x = make(net)
    surgery.remove(plain, Graph(plain, x).structures, picks, example_inputs=x)
    assert all(p.is_contiguous() for p in plain.parameters())


def test_ties_flags_modes_and_missing_gradients_stay() -> None:
    model, x = make("words")
    model.up.eval()
    model.scale.requires_grad_(False)
    structures = Graph(model, x).structures
    model(x).sum().backward()
    model.down.weight.grad = None
    surgery.remove(model, structures, {"table": [0, 3], "up": [5]}, example_inputs=x)
    assert model.head.weight is model.table.weight and model.table.weight.shape == (11, 6)
    assert (model.table.embedding_dim, model.head.in_features, model.head.out_features) == (6, 6, 11)
    assert not model.scale.requires_grad and model.up.weight.requires_grad
    assert [model.training, model.up.training, model.down.training] == [True, False, True]
    assert model.down.weight.grad is None and model.scale.grad is None
    assert model.up.weight.grad is not None and model.up.weight.grad.shape == model.up.weight.shape == (9, 6)


def test_undo_restores_the_very_same_tensors() -> None:
    model, x = make("norms")
    optimizer = torch.optim.AdamW(model.parameters())
    structures = Graph(model, x).structures
    train(model, x, optimizer)

    def addresses() -> list[Any]:
        tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
        tensors += [v for p in model.parameters() for v in optimizer.state[p].values()]
        return [(t.data_ptr(), t.shape) for t in tensors if t is not None]

    before, repr_before = addresses(), repr(model)
    undo = surgery.shrink(model, structures.kept({"0": [1], "3": [2, 5]}), optimizer)
    assert addresses() != before and repr(model) != repr_before
    undo()
    assert addresses() == before and repr(model) == repr_before
    assert not surgery.history(model).positions
    train(model, x, optimizer)


def test_several_optimizers_and_parameters_in_none() -> None:
    model, x = make("vgg")
    first = torch.optim.SGD(model[0].parameters(), 0.01, momentum=0.9)
    second = torch.optim.Adam([{"params": model[4].parameters()}, {"params": [model[7].weight], "lr": 1e-4}])
    structures = Graph(model, x).structures
    for optimizer in (first, second):
        train(model, x, optimizer)
    picks = {key: [0] for key in structures.groups}
    surgery.remove(model, structures, picks, example_inputs=x, optimizer=[first, second])
    assert first.state[model[0].weight]["momentum_buffer"].shape == model[0].weight.shape == (5, 3, 3, 3)
    assert second.state[model[7].weight]["exp_avg"].shape == model[7].weight.shape == (11, 36)
    for optimizer in (first, second):
        train(model, x, optimizer)
    restored = torch.optim.SGD(model[0].parameters(), 0.01, momentum=0.9)
    restored.load_state_dict(first.state_dict())
    train(model, x, restored)


def test_a_failure_in_the_middle_leaves_nothing_half_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = make("vgg")
    structures = Graph(model, x).structures
    before = {n: (t.data_ptr(), t.shape) for n, t in model.state_dict().items()}
    take, calls = surgery._take, []

    def exhausted(*args: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("out of memory")
        return take(*args)

    monkeypatch.setattr(surgery, "_take", exhausted)
    with pytest.raises(torch.OutOfMemoryError):
        surgery.shrink(model, structures.kept({"4": [0], "0": [0]}))
    assert {n: (t.data_ptr(), t.shape) for n, t in model.state_dict().items()} == before
    assert model[0].out_channels == 6 and not surgery.history(model).positions
