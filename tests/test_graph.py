"""The graph: structures are what one would write down by hand, and the model is left as it was."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
import torch_pruning as tp
from torch import Tensor, nn

from decay_pruning import surgery
from decay_pruning.errors import ConfigError, GraphError
from decay_pruning.graph import Graph, axes, rules
from decay_pruning.structures import NOT_PARAMETERS, Role, StructureSet
from tests.nets import EXACT, INEXACT, Net, Residual, Vit, image, make

VIT_HEADS = {"blocks.0.attn.qkv": 3, "blocks.1.attn.qkv": 3}
#: name → (layer group → number of structures, unprunable layer groups), written down by hand.
EXPECTED: dict[str, tuple[dict[str, int], set[str]]] = {
    "plain": ({"0": 8, "3": 6}, {"7"}),
    "resnet": ({"0": 6, "3.conv1": 6, "4.conv1": 8, "4.conv2": 8, "5.conv1": 8}, {"8"}),
    "vgg": ({"0": 6, "4": 5, "7": 12}, {"10"}),
    "mobile": ({"0": 6, "6": 5}, {"10"}),
    "grouped": ({"0": 4, "2": 6, "5": 5}, {"7"}),
    "norms": ({"0": 4, "3": 9, "6": 6}, {"10"}),
    "transposed": ({"0": 6, "2": 6, "5": 4}, {"9"}),
    "sound": ({"0": 6, "3": 5, "6": 8}, {"8"}),
    "volume": ({"0": 6, "3": 4}, {"6"}),
    "concat": ({"a": 5, "b": 4, "c": 6}, {"out"}),
    "chunked": ({"a": 4, "b.0": 5, "c.0": 5, "d": 6}, {"out"}),
    "gated": ({"up": 7}, {"down"}),
    "words": ({"table": 8, "up": 10}, {"head"}),
    "shared": ({"enter": 6, "left": 9}, {"out", "more"}),
    "mha": ({"enter": 4}, {"out"}),
    "rms": ({"0": 12}, {"2"}),
    "vit": (
        {"blocks.0.attn.qkv": 4, "blocks.0.fc1": 24, "blocks.1.attn.qkv": 4, "blocks.1.fc1": 24},
        {"patch", "head", "token", *(f"blocks.{k}.{each}" for k in (0, 1) for each in ("attn.proj", "fc2"))},
    ),
}


def graph(name: str, **options: Any) -> tuple[nn.Module, Any, Graph]:
    model, x = make(name, torch.float64)
    options.setdefault("heads", VIT_HEADS if name == "vit" else {})
    return model, x, Graph(model, x, **options)


@pytest.mark.parametrize("name", EXACT)
def test_layer_groups_are_those_written_down_by_hand(name: str) -> None:
    groups, unprunable = EXPECTED[name]
    found = graph(name)[2].structures
    assert {key: len(group) for key, group in found.groups.items()} == groups
    assert set(found.unprunable) == unprunable
    assert all(group.inexact is None for group in found.groups.values())


@pytest.mark.parametrize("name", EXACT)
def test_every_position_belongs_to_one_structure(name: str) -> None:
    model, _, found = graph(name)
    structures = found.structures
    assert list(structures.groups) == [n for n, _ in model.named_modules() if n in structures.groups]
    for place, size in structures.sizes.items():
        assert surgery.size_of(model, place) == size
        owners = [
            (key, int(o), int(p))
            for key, group in structures.groups.items()
            for c in group.couplings
            if c.place == place
            for o, p in zip(c.owner, c.position, strict=True)
        ]
        positions = [p for _, _, p in owners]
        assert len(set(positions)) == len(positions) and max(positions) < size
    for group in structures.groups.values():
        assert group.ids.tolist() == list(range(len(group)))
        for c in group.couplings:
            assert sorted(set(c.owner.tolist())) == group.ids.tolist(), c


def test_the_slices_of_one_channel_written_out() -> None:
    structures = graph("vgg")[2].structures
    slices = {
        (c.tensor, c.dim, str(c.role)): c.position[c.owner == 2].tolist()
        for c in structures.groups["4"].couplings
    }
    assert slices == {
        ("4.weight", 0, "row"): [2],
        ("4.bias", 0, "bias"): [2],
        ("4.out_channels", 0, "attribute"): [2],
        ("7.weight", 1, "column"): list(range(18, 27)),
        ("7.in_features", 0, "attribute"): list(range(18, 27)),
    }


def test_roles_of_normalisation_layers() -> None:
    couplings = graph("mobile")[2].structures.groups["0"].couplings
    assert {c.tensor: c.role for c in couplings if c.tensor.startswith("1.")} == {
        "1.weight": Role.SCALE,
        "1.bias": Role.SHIFT,
        "1.running_mean": Role.BUFFER,
        "1.running_var": Role.BUFFER,
        "1.num_features": Role.ATTRIBUTE,
    }
    assert {c.tensor for c in couplings if c.tensor.startswith("3.")} == {
        "3.weight", "3.bias", "3.in_channels", "3.out_channels", "3.groups"
    }  # fmt: skip


@pytest.mark.parametrize("name", ["resnet", "vgg", "mobile", "sound", "volume"])
def test_cuts_agree_with_torch_prunings_own_removal(name: str) -> None:
    model, x, found = graph(name)
    for key in found.structures.groups:
        theirs = copy.deepcopy(model).eval()
        dependencies = tp.DependencyGraph().build_dependency(theirs, x)
        root = theirs.get_submodule(key)
        handler = dependencies.get_pruner_of_module(root).prune_out_channels
        dependencies.get_pruning_group(root, handler, [1, 3]).prune()
        ours = copy.deepcopy(model)
        surgery.shrink(ours, found.structures.kept({key: [1, 3]}))
        for (n, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
            assert torch.equal(a, b), (key, n)


# ------------------------------------------------------------------------------------ the model is left alone


@pytest.mark.parametrize("name", ["resnet", "norms", "words", "mha"])
def test_the_model_is_left_as_it_was(name: str) -> None:
    model, x = make(name)
    model.train()
    for k, module in enumerate(model.modules()):
        module.training = k % 3 != 0
    parameters = list(model.parameters())
    for k, p in enumerate(parameters):
        p.grad = torch.full_like(p, 0.5) if k % 2 else None
        p.requires_grad_(k % 3 != 1)
    before = copy.deepcopy(model)
    gradients = {n: (p.grad, None if p.grad is None else p.grad.clone()) for n, p in model.named_parameters()}
    addresses = [t.data_ptr() for t in [*model.parameters(), *model.buffers()]]
    attributes = {n: dict(m.__dict__) for n, m in model.named_modules()}
    random = torch.get_rng_state()
    with torch.no_grad():
        Graph(model, x, allow_inexact=True)
        assert not torch.is_grad_enabled()
    assert torch.equal(random, torch.get_rng_state())
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert [t.data_ptr() for t in [*model.parameters(), *model.buffers()]] == addresses
    for (n, a), b in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(a, b) and a.requires_grad == b.requires_grad, n
        gradient, value = gradients[n]
        assert a.grad is gradient and (gradient is None or torch.equal(gradient, value)), n
    for (n, a), b in zip(model.named_buffers(), before.buffers(), strict=True):
        assert torch.equal(a, b), n
    assert {n: dict(m.__dict__) for n, m in model.named_modules()} == attributes
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))


def test_no_activation_outlives_the_trace() -> None:
    def tensors() -> int:
        gc.collect()
        return sum(type(each) is Tensor and each.ndim == 4 for each in gc.get_objects())

    model, x = make("chunked", torch.float64)
    before = tensors()
    found = Graph(model, x)
    assert tensors() <= before
    assert found


@pytest.mark.parametrize("kind", ["tensor", "tuple", "list", "dict"])
def test_example_inputs_in_every_form(kind: str) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor, factor: Tensor | None = None) -> Tensor:
            return self.b(self.a(x) * (1 if factor is None else factor))

    x, factor = image(1, 4), torch.tensor(2.0)
    forms: dict[str, Any] = {
        "tensor": x, "tuple": (x, factor), "list": [x, factor], "dict": {"factor": factor, "x": x}
    }  # fmt: skip
    assert len(Graph(Two(), forms[kind]).structures.groups["a"]) == 6


# ------------------------------------------------------------------------------------------ what is not prunable


def reasons(model: nn.Module, x: Any, **options: Any) -> dict[str, str]:
    try:
        return dict(Graph(model, x, **options).structures.unprunable)
    except GraphError as error:
        lines = str(error).splitlines()
        assert lines[0] == "nothing in this model can be pruned:"
        return dict(line.strip().split(": ", 1) for line in lines[1:])


def test_output_layers() -> None:
    model, x = make("shared")
    assert reasons(model, x) == {"out": "feeds the model's output", "more": "feeds the model's output"}


def test_an_output_before_a_later_layer() -> None:
    model = Net(lambda m, x: (lambda y: (m.b(y), y))(m.a(x)), a=nn.Linear(3, 5), b=nn.Linear(5, 2))
    assert reasons(model, image(2, 3))["a"] == "feeds the model's output"


def test_frozen_layers() -> None:
    model, x = make("plain")
    model.requires_grad_(False)
    model[7].requires_grad_(True)
    model[4].requires_grad_(True)
    found = Graph(model, x).structures
    assert list(found.groups) == ["3"]
    assert found.unprunable["0"] == "all its parameters are frozen"
    assert not model[0].weight.requires_grad


@pytest.mark.parametrize(
    "wrap",
    [
        torch.nn.utils.parametrizations.weight_norm,
        torch.nn.utils.parametrizations.spectral_norm,
        torch.nn.utils.spectral_norm,
        lambda layer: torch.nn.utils.prune.random_unstructured(layer, "weight", 0.3),
    ],
    ids=["weight_norm", "spectral_norm", "old_spectral_norm", "mask"],
)
def test_weights_computed_from_others_are_cut_where_they_come_from(wrap: Any) -> None:
    """Also what they are computed with: buffers of a power iteration, masks."""
    model = nn.Sequential(wrap(nn.Linear(3, 5)), nn.ReLU(), wrap(nn.Linear(5, 4)), nn.ReLU(), nn.Linear(4, 2))
    x = image(2, 3)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    structures = Graph(model, x).structures
    assert {name: len(group) for name, group in structures.groups.items()} == {"0": 5, "2": 4}
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    surgery.remove(model, structures, {"0": [1, 3], "2": [0]}, example_inputs=x)
    assert (model[0].out_features, model[2].in_features, model[2].out_features) == (3, 3, 3)
    model.train()
    model(x).sum().backward()


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers(kind: Any) -> None:
    """All gates and directions share one hidden width."""
    layer = kind(5, 4, num_layers=2, bidirectional=True)
    model = Net(lambda m, x: m.c(m.b(m.a(x))[0]), a=nn.Linear(3, 5), b=layer, c=nn.Linear(8, 2))
    x = image(2, 6, 3)
    structures = Graph(model, x).structures
    assert {name: len(group) for name, group in structures.groups.items()} == {"a": 5, "b": 4}
    surgery.remove(model, structures, {"a": [1], "b": [0, 2]}, example_inputs=x)
    assert (layer.input_size, layer.hidden_size, model.c.in_features) == (4, 2, 4)


def test_grouped_convolutions_with_one_output_each() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 3, groups=4), nn.Flatten(), nn.Linear(16, 2))
    assert {n: len(g) for n, g in Graph(model, image(2, 3, 4, 4)).structures.groups.items()} == {"0": 2}


def test_depthwise_convolutions_with_a_multiplier() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 12, 3, groups=4), nn.Flatten(), nn.Linear(48, 2))
    assert {n: len(g) for n, g in Graph(model, image(2, 3, 4, 4)).structures.groups.items()} == {"0": 4}


def test_layers_that_are_not_reached() -> None:
    model = Net(lambda m, x: m.b(m.a(x)), a=nn.Linear(3, 5), b=nn.Linear(5, 2), unused=nn.Linear(2, 2))
    assert reasons(model, image(2, 3))["unused"] == "is not reached from the example inputs"


def test_a_single_structure() -> None:
    model = nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 4), nn.Linear(4, 2))
    assert "single structure" in reasons(model, image(2, 3))["0"]


@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: m.out(m.a(x).relu().mean(1, keepdim=True) * m.b(x)),  # mixes all channels of a
        lambda m, x: m.out(m.a(x).softmax(1) + m.b(x)),
        lambda m, x: m.out(m.a(x).view(-1, 3, 2).sum(2).repeat(1, 2) + m.b(x)),
        lambda m, x: m.out(m.a(x)[:, [1, 0, 2, 3, 4, 5]] + m.b(x)),
        lambda m, x: m.out(m.a(x).sort(1).values + m.b(x)),
    ],
)
def test_what_cannot_be_cut_is_found_out(run: Any) -> None:
    model = Net(run, a=nn.Linear(4, 6), b=nn.Linear(4, 6), out=nn.Linear(6, 3)).double()
    x = image(5, 4).double()
    before = copy.deepcopy(model.state_dict())
    found = reasons(model, x)
    assert any(
        words in found["a"]
        for words in (
            "changes what is left: the output changes by",
            "removing a structure fails",
            "is mixed by the mean (test_graph.py:",
            "is mixed by softmax (test_graph.py:",
            "is mixed by sort (test_graph.py:",
            "is read by position in index (test_graph.py:",
        )
    )
    assert all(torch.equal(a, before[n]) for n, a in model.state_dict().items())


def test_whole_heads_are_structures_where_the_model_follows() -> None:
    """The number of heads is an attribute of the user's own module, found by trying."""
    model, x = make("vit", torch.float64)
    structures = Graph(model, x).structures
    assert {name: len(group) for name, group in structures.groups.items() if "attn" in name} == {
        "blocks.0.attn.qkv": 3,
        "blocks.1.attn.qkv": 3,
    }
    surgery.remove(model, structures, {"blocks.0.attn.qkv": [1]}, example_inputs=x)
    attention = model.blocks[0].attn
    assert (attention.heads, attention.qkv.out_features, attention.proj.in_features) == (2, 24, 8)
    assert model.blocks[1].attn.heads == 3


@pytest.mark.parametrize(
    ("shape", "size"), [((3, 3, -1), 4), ((3, -1, 4), 3), ((-1, 3, 4), None), ((3, 3, 4), None)]
)
def test_of_heads_and_offsets_the_one_that_the_code_lets_go_is_offered(
    shape: tuple[int, ...], size: int | None
) -> None:
    """What stands in the code as a number cannot go; then it is the other family's turn."""

    def run(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).view(2, 6, *shape).permute(2, 0, 3, 1, 4)
        return m.out(((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).flatten(2))

    model = Net(run, enter=nn.Linear(5, 7), qkv=nn.Linear(5, 36), out=nn.Linear(12, 2))
    layers = Graph(nn.Sequential(nn.Linear(5, 5), model), image(2, 6, 5)).structures
    assert len(layers.groups.get("1.qkv", ())) == (size or 0)
    if size is None:
        assert "its width is split by view (test_graph.py:" in layers.unprunable["1.qkv"]


@pytest.mark.parametrize("name", INEXACT)
def test_inexact_layer_groups_are_declared(name: str) -> None:
    heads = VIT_HEADS if name == "vit" else {}
    model, x = make(name)
    found = Graph(model, x, allow_inexact=True, heads=heads).structures
    declared = {key: group.inexact for key, group in found.groups.items() if group.inexact}
    assert declared
    refused = reasons(model, x, heads=heads)
    assert all(refused[key].startswith(f"removal is not exact: {reason}") for key, reason in declared.items())


def test_scores_scaled_by_their_width_are_exact() -> None:
    model, x = Vit(by_width=True), image(2, 3, 8, 8)
    found = Graph(model, x, heads=VIT_HEADS).structures
    assert found.groups["blocks.0.attn.qkv"].inexact is None and found.folds


def test_a_wrong_trace_is_caught_even_behind_a_branch_that_starts_at_zero(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), Residual(6, 6), nn.Flatten(), nn.Linear(6 * 16, 2)).double()
    nn.init.zeros_(model[1].bn2.weight)
    x = image(2, 3, 6, 6).double()
    assert "1.conv1" in Graph(model, x).structures.groups
    right = rules.elementwise

    def shifted(op: Any) -> Any:
        batch, channels, *space = right(op)
        first, rest = axes.split(channels, 2)
        return [batch, axes.concatenation(rest, first), *space]

    monkeypatch.setitem(rules.RULES, "relu", shifted)
    assert "changes what is left" in reasons(model, x)["1.conv1"]
    assert "1.conv1" in Graph(model, x, verify=False).structures.groups


def test_one_bad_layer_group_does_not_spoil_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = make("resnet")
    convolution = rules.RULES["convolution"]

    def broken(op: Any) -> Any:
        if op.module is model[4].conv2:
            op.arguments["input"] = op["input"].clone()  # a tensor that nobody has seen
            op._run.see(op["input"], [axes.Atom(n) for n in op["input"].shape])
        return convolution(op)

    monkeypatch.setitem(rules.RULES, "convolution", broken)
    found = Graph(model, x).structures
    assert set(found.unprunable) == {"8", "4.conv1"}
    assert set(found.groups) == {"0", "3.conv1", "4.conv2", "5.conv1"}
    assert "does not run" in found.unprunable["4.conv1"]


# -------------------------------------------------------------------------------------------------- arguments


def test_ignored_by_name_module_and_type() -> None:
    for ignored in (["4"], [Residual], ["4.conv1", "4.conv2", "4.shortcut.0"]):
        model, x = make("resnet")
        options: list[Any] = list(ignored)
        if ignored == [Residual]:
            options = [model[4]]
        found = Graph(model, x, ignored=options).structures
        assert set(found.groups) == {"0", "3.conv1", "5.conv1"}
        assert found.unprunable["4.conv1"] == "ignored, as asked"
    model, x = make("vgg")
    assert list(Graph(model, x, ignored=[nn.Conv2d]).structures.groups) == ["7"]


def test_an_ignored_bare_parameter() -> None:
    model, x = make("words")
    assert Graph(model, x, ignored=["scale"]).structures.unprunable["table"] == "ignored, as asked"


def test_wrong_arguments_name_the_nearest_right_one() -> None:
    model, x = make("resnet")
    with pytest.raises(ConfigError, match=r"no layer '4\.conv11'; did you mean '4\.conv1'"):
        Graph(model, x, ignored=["4.conv11"])
    model, x = make("vit")
    with pytest.raises(
        ConfigError, match=r"heads: no prunable layer 'blocks\.0\.attn\.qk'.*'blocks\.0\.attn\.qkv'"
    ):
        Graph(model, x, heads={"blocks.0.attn.qk": 3})
    with pytest.raises(ConfigError, match="= 5 does not divide its 12 structures"):
        Graph(model, x, heads={"blocks.0.attn.qkv": 5})


def test_models_that_cannot_be_traced() -> None:
    with pytest.raises(GraphError, match="cannot be traced with these example inputs: RuntimeError"):
        Graph(nn.Linear(3, 2), image(2, 5))
    with pytest.raises(GraphError, match="output holds no floating tensor"):
        Graph(Net(lambda m, x: m.a(x).argmax(1), a=nn.Linear(3, 2)), image(2, 3))
    with pytest.raises(GraphError, match="run the model once"):
        Graph(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2)), image(2, 5))
    with pytest.raises(GraphError, match="has no prunable layer"):
        Graph(Net(lambda m, x: x * m.s, s=nn.Parameter(torch.ones(3))), image(2, 3))
    model, x = make("plain")
    torch.nn.init.constant_(model[0].weight, float("nan"))
    with pytest.raises(GraphError, match="is not finite"):
        Graph(model, x)


# ----------------------------------------------------------------------------------------------------- scores


def brute_force(model: nn.Module, structures: StructureSet) -> dict[str, Tensor]:
    """‖all parameter slices‖² of each structure, one by one."""
    return {
        name: torch.stack(
            [
                sum(
                    (surgery.lookup(model, c.tensor).index_select(c.dim, c.position[c.owner == row]).square().sum()
                    for c in group.couplings
                    if c.role not in NOT_PARAMETERS and c.role not in (Role.BIAS, Role.SHIFT, Role.OTHER)),
                    torch.zeros(()),
                )
                for row in range(len(group))
            ]
        )
        for name, group in structures.groups.items()
    }  # fmt: skip


def squares() -> Any:
    return tp.importance.GroupMagnitudeImportance(p=2, group_reduction="sum", normalizer=None)


@pytest.mark.parametrize("name", ["plain", "resnet", "vgg", "concat", "sound", "volume", "chunked"])
def test_scores_are_sums_over_the_slices_before_and_after_removal(name: str) -> None:
    model, x, found = graph(name)
    structures = found.structures
    for _ in range(3):
        scores = found.scores(squares(), structures)
        wanted = brute_force(model, structures)
        assert scores.keys() == structures.groups.keys()
        for key in structures.groups:
            roots = 2 if (name, key) == ("chunked", "a") else 1  # a structure of two channels gets their mean
            assert torch.allclose(scores[key].double() * roots, wanted[key], rtol=1e-5), key
        picks = {key: [int(group.ids[1])] for key, group in structures.groups.items() if len(group) > 2}
        structures = surgery.remove(model, structures, picks, example_inputs=x)


def test_scores_agree_with_torch_pruning_on_its_own_groups() -> None:
    model, x, found = graph("resnet")
    dependencies = tp.DependencyGraph().build_dependency(copy.deepcopy(model), x)
    names = {m: n for n, m in dependencies.model.named_modules()}
    for importance in (tp.importance.GroupMagnitudeImportance(), tp.importance.LAMPImportance(), squares()):
        ours = found.scores(importance, found.structures)
        theirs = {names[g[0].dep.target.module]: importance(g) for g in dependencies.get_all_groups()}
        for key, group in found.structures.groups.items():
            match = [v for n, v in theirs.items() if n in {c.tensor.rpartition(".")[0] for c in group.couplings
                     if c.role is Role.ROW}]  # fmt: skip
            assert any(torch.allclose(ours[key], value.float()) for value in match), key


@pytest.mark.parametrize("name", EXACT)
def test_every_importance_scores_every_group_after_removals(name: str) -> None:
    model, x, found = graph(name)
    structures = found.structures
    for _ in range(2):
        model.train()
        sum(t.square().sum() for t in surgery.leaves(surgery.call(model, x)) if t.requires_grad).backward()
        for importance in (
            squares(),
            tp.importance.GroupTaylorImportance(),
            tp.importance.RandomImportance(),
        ):
            for key, value in found.scores(importance, structures).items():
                assert value.shape == (len(structures.groups[key]),) and bool(value.isfinite().all()), key
        picks = {key: group.ids[:2].tolist() for key, group in structures.groups.items() if len(group) > 3}
        structures = surgery.remove(model, structures, picks, example_inputs=x)


def test_importances_without_an_opinion_or_with_a_wrong_one(caplog: pytest.LogCaptureFixture) -> None:
    _, _, found = graph("vgg")
    scores = found.scores(tp.importance.BNScaleImportance(), found.structures)
    assert set(scores) == {"0", "7"}
    assert "no score to layer group '4'" in caplog.text
    with pytest.raises(
        ConfigError, match=r"returned \(2,\) values for layer group '0', which has 6 channels"
    ):
        found.scores(lambda group: torch.ones(2), found.structures)
    with pytest.raises(GraphError, match="cannot score layer group '0': ZeroDivisionError"):
        found.scores(lambda group: 1 / 0, found.structures)


def test_scores_of_a_layer_group_without_any_importance_are_zero() -> None:
    model, _, found = graph("plain")
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    scores = found.scores(tp.importance.GroupTaylorImportance(), found.structures)  # 0 / 0 in its normaliser
    assert all(not bool(value.any()) for value in scores.values())
