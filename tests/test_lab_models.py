"""The zoo: sizes as published, names as elsewhere, weights that fit or are refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from decay_pruning.errors import ConfigError, ManifestError
from decay_pruning.lab import models


def macs(model: nn.Module, shape: tuple[int, int, int]) -> int:
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), torch.device("meta"):
        model.to("meta").eval()(torch.empty(1, *shape))
    return int(counter.get_total_flops()) // 2


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def small(name: str) -> nn.Module:
    """The model, cut down where it is large."""
    options = {"width": 32, "depth": 2, "heads": 4} if name == "vit-b" else {}
    size = 64 if models.example_shape(name)[1] == 224 else None
    return models.build(name, classes=7, size=size, seed=0, **options)


@pytest.mark.parametrize(
    ("name", "options", "shape", "million_parameters", "million_macs"),
    [
        ("resnet20", {}, (3, 32, 32), 0.27, 40.8),
        ("resnet32", {}, (3, 32, 32), 0.47, 69.1),
        ("resnet56", {}, (3, 32, 32), 0.86, 125.7),
        ("resnet110", {}, (3, 32, 32), 1.73, 253.1),
        ("vgg16-bn", {}, (3, 32, 32), 15.25, 313.7),
        ("resnet50", {"classes": 10, "stem": "cifar"}, (3, 32, 32), 23.52, 1297.8),
        ("resnet50", {}, (3, 224, 224), 25.56, 4089.2),
        ("vit-b", {}, (3, 224, 224), 86.57, None),
    ],
)
def test_sizes_as_published(
    name: str,
    options: dict[str, object],
    shape: tuple[int, int, int],
    million_parameters: float,
    million_macs: float | None,
) -> None:
    with torch.device("meta"):
        model = models.build(name, **options)
    assert parameters(model) / 1e6 == pytest.approx(million_parameters, abs=0.006)
    if million_macs is not None:
        assert macs(model, shape) / 1e6 == pytest.approx(million_macs, abs=0.06)


def test_vgg_has_the_structures_of_the_otov2_paper() -> None:
    model = models.build("vgg16-bn")
    convolutions = [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]
    linear = [m.out_features for m in model.modules() if isinstance(m, nn.Linear)][:-1]
    assert (len(convolutions), len(linear), sum(convolutions + linear)) == (13, 2, 5248)


def test_the_digits_model_is_small() -> None:
    model = models.build("resnet-digits")
    assert parameters(model) < 50_000
    assert model(torch.randn(2, *models.example_shape("resnet-digits"))).shape == (2, 10)


@pytest.mark.parametrize("name", models.names())
def test_forward_and_backward(name: str) -> None:
    model = small(name)
    channels, size, _ = models.example_shape(name)
    output = model(torch.randn(2, channels, min(size, 64), min(size, 64)))
    assert output.shape == (2, 7)
    output.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_names_are_those_of_torchvision() -> None:
    names = set(models.build("resnet50").state_dict())
    assert {
        "conv1.weight",
        "bn1.running_mean",
        "layer1.0.conv3.weight",
        "layer1.0.downsample.0.weight",
        "layer1.0.downsample.1.bias",
        "layer4.2.bn2.num_batches_tracked",
        "fc.bias",
    } <= names
    assert len(names) == 320  # as in torchvision's resnet50


class TestBuild:
    def test_the_seed_decides_and_leaves_the_global_state_alone(self) -> None:
        state = torch.get_rng_state()
        first, again, other = (models.build("resnet-digits", seed=s) for s in (0, 0, 1))
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(first.conv1.weight, again.conv1.weight)
        assert not torch.equal(first.conv1.weight, other.conv1.weight)

    def test_without_a_seed_the_global_state_decides(self) -> None:
        torch.manual_seed(5)
        first = models.build("resnet-digits")
        torch.manual_seed(5)
        assert torch.equal(models.build("resnet-digits").fc.weight, first.fc.weight)

    @pytest.mark.parametrize(
        ("name", "options", "words"),
        [
            ("resnet65", {}, "did you mean 'resnet56'"),
            ("resnet50", {"stemm": "cifar"}, "did you mean 'stem'"),
            ("resnet50", {"stem": "cipher"}, "stem must be"),
            ("resnet20", {"classes": 0}, "classes must be at least 1"),
            ("vgg16-bn", {"size": 33}, "must divide by 32"),
            ("vit-b", {"size": 30}, "multiple of patch"),
            ("no_such_module_anywhere:make", {}, "cannot import"),
            ("json:make", {}, "no function 'make'"),
            ("json:dumps", {}, "cannot be built"),
            ("fractions:Fraction", {}, "returned Fraction"),
            ("builtins:dict", {}, "cannot be read"),
        ],
    )
    def test_mistakes(self, name: str, options: dict[str, object], words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            models.build(name, **options)

    def test_a_function_of_the_user(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "a_users_nets.py").write_text(
            "from torch import nn\ndef make(classes, hidden=3):\n    return nn.Linear(hidden, classes)\n"
        )
        monkeypatch.chdir(tmp_path)
        model = models.build("a_users_nets:make", classes=4, channels=1, size=8, hidden=6)
        assert isinstance(model, nn.Linear) and model.weight.shape == (4, 6)


class TestLoadWeights:
    def fresh(self, seed: int = 0) -> nn.Module:
        return models.build("resnet-digits", seed=seed)

    @pytest.mark.parametrize("form", ["safetensors", "plain", "nested", "ddp", "old"])
    def test_formats(self, tmp_path: Path, form: str) -> None:
        source, target = self.fresh(1), self.fresh(2)
        weights = source.state_dict()
        file = tmp_path / "weights.any"
        if form == "safetensors":
            save_file(weights, file)
        elif form == "nested":
            torch.save({"epoch": 3, "state_dict": weights}, file)
        elif form == "ddp":
            torch.save({f"module.{key}": value for key, value in weights.items()}, file)
        elif form == "old":
            torch.save({k: v for k, v in weights.items() if "num_batches" not in k}, file)
        else:
            torch.save(weights, file)
        models.load_weights(target, file)
        for key, value in target.state_dict().items():
            assert torch.equal(value, weights[key]), key

    def refuse(self, file: Path, words: str) -> None:
        model = self.fresh(2)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(ManifestError, match=words):
            models.load_weights(model, file)
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key]), key

    def test_weights_of_another_model(self, tmp_path: Path) -> None:
        weights = self.fresh(1).state_dict()
        weights["fc.weight"] = torch.zeros(3, 24)
        weights["extra"] = weights.pop("fc.bias")
        torch.save(weights, tmp_path / "w.pt")
        words = r"1 missing: fc\.bias; 1 not in the model: extra; 1 of another shape: fc\.weight \(3, 24\)"
        self.refuse(tmp_path / "w.pt", words)

    def test_no_file(self, tmp_path: Path) -> None:
        self.refuse(tmp_path / "w.pt", "there is no file")

    def test_a_truncated_file(self, tmp_path: Path) -> None:
        for save in (save_file, torch.save):
            save(self.fresh().state_dict(), tmp_path / "w")
            data = (tmp_path / "w").read_bytes()
            (tmp_path / "w").write_bytes(data[: len(data) // 2])
            self.refuse(tmp_path / "w", "damaged")

    def test_a_pickled_module_is_not_executed(self, tmp_path: Path) -> None:
        torch.save(self.fresh(), tmp_path / "w.pt")
        self.refuse(tmp_path / "w.pt", "plain tensors")

    def test_something_else(self, tmp_path: Path) -> None:
        torch.save([1, 2], tmp_path / "w.pt")
        self.refuse(tmp_path / "w.pt", "does not hold a state dict")
        (tmp_path / "w.pt").write_text("text")
        self.refuse(tmp_path / "w.pt", "neither safetensors")
