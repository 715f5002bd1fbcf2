"""The Hugging Face Hub for models of any package: a file of `decay_pruning.save`, loaded into a fresh model.

    push_to_hub(model, "me/small-resnet")
    model = from_hub(timm.create_model("resnet50"), "me/small-resnet")

For models of Transformers that stock classes are to load: `integrations.huggingface.push_to_hub`.
`pip install huggingface_hub`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from decay_pruning import manifest

try:
    import huggingface_hub
except ImportError as error:
    raise ImportError(
        "decay_pruning.integrations.hub needs huggingface_hub: pip install huggingface_hub"
    ) from error

FILE = "model.safetensors"


def push_to_hub(model: nn.Module, repo: str, **options: Any) -> str:
    """`decay_pruning.save`, and upload the file.

    Args:
        model: a pruned model.
        repo: "owner/name"; made where it is missing.
        options: for `HfApi.create_repo` (`private`, …).

    Returns:
        the address of the commit.

    Raises:
        ManifestError: as `decay_pruning.save`; nothing was uploaded.
    """
    with tempfile.TemporaryDirectory() as folder:
        manifest.save(model, Path(folder) / FILE)
        api = huggingface_hub.HfApi()
        api.create_repo(repo, exist_ok=True, **options)
        return str(
            api.upload_folder(repo_id=repo, folder_path=folder, commit_message="pruned with decay-pruning")
        )


def from_hub(model: nn.Module, repo: str, **options: Any) -> nn.Module:
    """Download the file, and `decay_pruning.load` it.

    Args:
        model: built like the original one, before pruning.
        repo: "owner/name".
        options: for `hf_hub_download` (`revision`, …).

    Returns:
        the same model.

    Raises:
        ManifestError: as `decay_pruning.load`; the model is as it was.
    """
    return manifest.load(model, huggingface_hub.hf_hub_download(repo_id=repo, filename=FILE, **options))
