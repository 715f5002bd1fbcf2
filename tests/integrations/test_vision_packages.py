"""timm and torchvision: a manifest beside the weights, loaded into a fresh model of the same name."""

import pytest
import torch

from decay_pruning import DepGraph, Pruner, SmoothPruning, Target, load, save


def pruned(model, x, **host):
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    host = DepGraph(importance="magnitude", **host)
    pruner = Pruner(model, x, optimizer, Target(macs=0.6), host=host, smooth=SmoothPruning(steps=1))
    model(torch.cat([x, x])).square().mean().backward()
    optimizer.step()
    pruner.finish()
    return model.eval()


@pytest.mark.parametrize(
    "name", ["resnet10t", "vit_tiny_patch16_224", "mobilenetv3_small_050", "convnext_atto"]
)
def test_timm(tmp_path, name):
    timm = pytest.importorskip("timm")
    size = {"img_size": 32} if name.startswith("vit") else {}
    x = torch.randn(1, 3, 32 if size else 64, 32 if size else 64)
    model = pruned(timm.create_model(name, num_classes=10, **size), x)
    save(model, tmp_path / "model.safetensors")
    again = load(timm.create_model(name, num_classes=10, **size), tmp_path / "model.safetensors").eval()
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "vit_b_16", "densenet121"])
def test_torchvision(tmp_path, name):
    models = pytest.importorskip("torchvision").models
    size = {"image_size": 32} if name.startswith("vit") else {}
    x = torch.randn(1, 3, 32, 32)
    model = pruned(models.get_model(name, num_classes=10, **size), x)
    save(model, tmp_path / "model.safetensors")
    again = load(models.get_model(name, num_classes=10, **size), tmp_path / "model.safetensors").eval()
    assert torch.equal(again(x), model(x))


def test_uniform_without_a_config():
    timm = pytest.importorskip("timm")
    x = torch.randn(1, 3, 32, 32)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=32)
    pruned(model, x, uniform=True, per="macs")
    widths = {block.mlp.fc1.out_features for block in model.blocks}
    heads = {block.attn.num_heads for block in model.blocks}
    assert len(widths) == 1 and len(heads) == 1 and (widths != {768} or heads != {3})


def test_push_to_hub(monkeypatch):
    """By the interface of huggingface_hub alone."""
    hub = pytest.importorskip("huggingface_hub")
    timm = pytest.importorskip("timm")
    from decay_pruning.integrations import hub as ours

    calls, files = [], []

    class Api:
        def create_repo(self, repo, **options):
            calls.append((repo, options))

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            from pathlib import Path

            files.extend(path.name for path in Path(folder_path).iterdir())
            return f"https://hub/{repo_id}/commit/1"

    monkeypatch.setattr(hub, "HfApi", Api)
    x = torch.randn(1, 3, 64, 64)
    model = pruned(timm.create_model("resnet10t", num_classes=10), x)
    assert ours.push_to_hub(model, "me/small", private=True) == "https://hub/me/small/commit/1"
    assert calls == [("me/small", {"exist_ok": True, "private": True})] and files == ["model.safetensors"]
    folder = {}

    def download(repo_id, filename, **options):
        save(model, folder["path"])
        return folder["path"]

    import tempfile

    with tempfile.TemporaryDirectory() as path:
        folder["path"] = f"{path}/model.safetensors"
        monkeypatch.setattr(hub, "hf_hub_download", download)
        again = ours.from_hub(timm.create_model("resnet10t", num_classes=10), "me/small").eval()
    assert torch.equal(again(x), model(x))
