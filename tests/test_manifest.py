"""Saving and loading: the same function comes back, and a bad file changes nothing."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from decay_pruning import archive, manifest, surgery
from decay_pruning.errors import ManifestError
from decay_pruning.graph import Graph
from tests.nets import EXACT, make

VIT_HEADS = {"blocks.0.attn.qkv": 3, "blocks.1.attn.qkv": 3}


def pruned(name: str, rounds: int = 2) -> tuple[nn.Module, Any]:
    model, x = make(name)
    structures = Graph(model, x, heads=VIT_HEADS if name == "vit" else {}).structures
    for _ in range(rounds):
        picks = {key: [int(group.ids[1])] for key, group in structures.groups.items() if len(group) > 2}
        structures = surgery.remove(model, structures, picks, example_inputs=x)
    return model, x


def outputs(model: nn.Module, x: Any) -> tuple[torch.Tensor, ...]:
    return surgery.observe(model, x).leaves


def rewrite(path: Path, change: Any) -> None:
    """Change description and tensors inside a file, and sign it anew."""
    meta, tensors = archive.read(path)
    change(meta, tensors)
    text = json.dumps({**meta, "checksum": "0" * 64}, separators=(",", ":"), sort_keys=True)
    save_file(tensors, path, {archive.KEY: text})
    archive.sign(path)


@pytest.mark.parametrize("name", EXACT)
def test_the_same_function_comes_back(name: str, tmp_path: Path) -> None:
    model, x = pruned(name)
    manifest.save(model, tmp_path / "model.safetensors")
    fresh, _ = make(name, seed=7)
    flags = [m.training for m in fresh.modules()]
    parameters = list(fresh.parameters())
    assert manifest.load(fresh, tmp_path / "model.safetensors") is fresh
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, x), outputs(fresh, x), strict=True))
    assert repr(fresh) == repr(model)
    assert [m.training for m in fresh.modules()] == flags
    assert all(a is b for a, b in zip(parameters, fresh.parameters(), strict=True))
    assert surgery.history(fresh).state_dict() == surgery.history(model).state_dict()
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_loaded_model_can_be_pruned_and_saved_again(tmp_path: Path) -> None:
    model, x = pruned("resnet", 1)
    manifest.save(model, tmp_path / "one")
    fresh, _ = make("resnet", seed=7)
    manifest.load(fresh, tmp_path / "one")
    structures = Graph(fresh, x).structures
    surgery.remove(fresh, structures, {"0": [0], "4.conv1": [2, 3]}, example_inputs=x)
    manifest.save(fresh, tmp_path / "two")
    again, _ = make("resnet", seed=8)
    manifest.load(again, tmp_path / "two")
    assert all(torch.equal(a, b) for a, b in zip(outputs(fresh, x), outputs(again, x), strict=True))


def test_an_unpruned_model_and_other_formats(tmp_path: Path) -> None:
    model, x = make("resnet")
    model = model.to(memory_format=torch.channels_last)
    manifest.save(model, tmp_path / "dense")
    fresh, _ = make("resnet", seed=7)
    manifest.load(fresh.to(memory_format=torch.channels_last), tmp_path / "dense")
    assert fresh[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, x), outputs(fresh, x), strict=True))


def test_the_file_says_what_was_kept(tmp_path: Path) -> None:
    model, _ = pruned("vgg")
    manifest.save(model, str(tmp_path / "model"))
    with safe_open(tmp_path / "model", "pt") as file:
        header = file.metadata()
        assert list(file.get_tensor("4.weight").shape) == [3, 4, 3, 3]
    meta = json.loads(header["decay-pruning"])
    assert (list(header), meta["version"]) == (["decay-pruning"], 2)
    assert meta["class"] == "torch.nn.modules.container.Sequential"
    assert meta["tensors"]["4.weight"] == {"shape": [3, 4, 3, 3], "original": [5, 6, 3, 3]}
    assert {"tensor": "4.out_channels", "dim": 0, "original": 5, "kept": [0, 3, 4]} in meta["kept"]


# ------------------------------------------------------------------------------------------------- bad files


def fails(model: nn.Module, path: Path, words: str) -> None:
    """Loading raises, and the model is as it was."""
    before = {n: t.clone() for n, t in model.state_dict().items()}
    text = repr(model)
    with pytest.raises(ManifestError, match=words):
        manifest.load(model, path)
    assert repr(model) == text
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.9999])
def test_truncated_files(share: float, tmp_path: Path) -> None:
    model, _ = pruned("vgg")
    manifest.save(model, tmp_path / "model")
    data = (tmp_path / "model").read_bytes()
    (tmp_path / "model").write_bytes(data[: int(share * len(data))])
    fails(make("vgg")[0], tmp_path / "model", "is truncated or no safetensors file")


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    fails(make("vgg")[0], tmp_path / "nothing", "there is no file")
    fails(make("vgg")[0], tmp_path, "there is no file")
    save_file({"0.weight": torch.zeros(3)}, tmp_path / "plain")
    fails(make("vgg")[0], tmp_path / "plain", "was not written by decay-pruning")
    (tmp_path / "pickle").write_bytes(pickle.dumps({"0.weight": [1, 2, 3]}))
    fails(make("vgg")[0], tmp_path / "pickle", "is truncated or no safetensors file")
    torch.save(make("vgg")[0].state_dict(), tmp_path / "torch")
    fails(make("vgg")[0], tmp_path / "torch", "is truncated or no safetensors file")


def test_models_that_do_not_fit(tmp_path: Path) -> None:
    model, _ = pruned("vgg")
    manifest.save(model, tmp_path / "model")
    fails(make("mobile")[0], tmp_path / "model", r"does not fit this .*: the (model|file) has no '")
    wider, _ = make("vgg")
    wider[0] = nn.Conv2d(3, 7, 3, padding=1)
    fails(wider, tmp_path / "model", r"'0\.weight' is \[7, 3, 3, 3\], the original was \[6, 3, 3, 3\]")
    fails(pruned("vgg", 1)[0], tmp_path / "model", "load into a fresh model, not a pruned one")
    attribute, _ = make("vgg")
    attribute[0].out_channels = 5
    fails(attribute, tmp_path / "model", r"'0\.out_channels' is 5, the original was 6")


def drop(meta: dict[str, Any], key: str) -> None:
    del meta[key]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda meta, tensors: meta.update(version=3), "format version 3, this library reads 1 and 2"),
        (lambda meta, tensors: drop(meta, "kept"), "damaged description: 'kept'"),
        (lambda meta, tensors: meta.update(tensors=[1]), "damaged description"),
        (lambda meta, tensors: meta["kept"][0].update(dim="x"), "damaged description"),
        (lambda meta, tensors: meta["kept"][0].update(kept=["x"]), "damaged description"),
        (lambda meta, tensors: meta.update(aliases={"a": "b"}), "damaged description"),
        (lambda meta, tensors: tensors.pop("4.weight"), r"incomplete: '4\.weight' is missing"),
        (
            lambda meta, tensors: tensors.update({"4.weight": torch.zeros(3)}),
            r"incomplete: '4\.weight'",
        ),
        (lambda meta, tensors: meta["kept"].pop(0), r"inconsistent: '0\.bias'"),
        (lambda meta, tensors: meta["kept"][0]["kept"].reverse(), "must ascend"),
        (lambda meta, tensors: meta["kept"][0]["kept"].__setitem__(-1, 99), "must ascend within"),
        (lambda meta, tensors: meta["kept"][0].update(kept=[]), "inconsistent"),
    ],
)
def test_damaged_descriptions(change: Any, words: str, tmp_path: Path) -> None:
    model, _ = pruned("vgg")
    manifest.save(model, tmp_path / "model")
    rewrite(tmp_path / "model", change)
    fails(make("vgg")[0], tmp_path / "model", words)


def test_a_model_that_refuses_its_state_is_put_back(tmp_path: Path) -> None:
    model, _ = pruned("vgg")
    manifest.save(model, tmp_path / "model")
    fresh, _ = make("vgg")

    def refuse(*args: Any) -> None:
        raise RuntimeError("not today")

    fresh.register_load_state_dict_pre_hook(refuse)
    fails(fresh, tmp_path / "model", "does not fit this model: not today")


# ---------------------------------------------------------------------------------------------------- writing


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pruned("vgg")
    path = tmp_path / "model"
    manifest.save(model, path)
    before = path.read_bytes()

    def full(tensors: Any, name: str, header: Any) -> None:
        Path(name).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(archive, "save_file", full)
    with pytest.raises(ManifestError, match=r"cannot write .*model: No space left on device"):
        manifest.save(model, path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["model"]


def test_folders_that_do_not_exist_and_state_that_is_no_tensor(tmp_path: Path) -> None:
    model, _ = make("vgg")
    with pytest.raises(ManifestError, match="cannot write"):
        manifest.save(model, tmp_path / "nowhere" / "model")

    class Extra(nn.Linear):
        def get_extra_state(self) -> dict[str, Any]:
            return {"calls": (3, object)}

    with pytest.raises(ManifestError, match="'_extra_state' in the model's state is a dict"):
        manifest.save(Extra(2, 2), tmp_path / "model")
    assert not list(tmp_path.iterdir())
