"""Pruned models in folders that the stock classes of Transformers load; used through `integrations.huggingface`."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from decay_pruning import configs
from decay_pruning.checks import as_inputs
from decay_pruning.errors import ConfigError, ManifestError
from decay_pruning.integrations._common import to_device
from decay_pruning.keeping import contents
from decay_pruning.state import unwrapped

logger = logging.getLogger("decay_pruning")

#: The largest difference that is rounding; on a CPU it is 0.
_ROUNDING = 1e-5
#: What another process does: the stock class, nothing of this library.
_LOADER = """
import importlib, sys, torch
torch.set_num_threads(int(sys.argv[5]))
folder, home, name, given = sys.argv[1:5]
kind = importlib.import_module(home)
for part in name.split("."):
    kind = getattr(kind, part)
x = torch.load(given + "/inputs.pt", weights_only=True)
model = kind.from_pretrained(folder, dtype=x["dtype"], attn_implementation=x["attention"]).to(x["device"]).eval()
with torch.no_grad():
    args, kwargs = x["inputs"]
    found = model(*args, **kwargs)
leaves = [t for t in torch.utils._pytree.tree_leaves(found.to_tuple()) if isinstance(t, torch.Tensor)]
torch.save(leaves, given + "/outputs.pt")
"""


def save(model: nn.Module, folder: str | os.PathLike[str], example_inputs: Any = None) -> float:
    """Write a pruned model so that stock `from_pretrained(folder)` loads it, and prove that in a new process.

    The changed sizes (`hidden_size`, `intermediate_size`, `num_attention_heads`, …) go into a copy of the config; the
    model keeps its own. What is written is first loaded by the stock class in a process without this library, and its
    outputs are compared. Only then does it appear in the folder.

    Args:
        model: a model of Transformers, pruned or not.
        folder: made where it is missing; other files in it, such as a tokenizer's, stay.
        example_inputs: as for `Pruner`, for the proof; None makes some up from the config, for text, images and audio.

    Returns:
        the largest difference of an output: 0.0 on a CPU.

    Raises:
        ConfigError: no config of this class describes the widths, which is so where those of layers differ
            (`DepGraph(uniform=True)` leaves them equal); or no inputs can be made up.
        ManifestError: the folder cannot be written, or what was loaded is another function; nothing was written.
    """
    import transformers

    model = unwrapped(model)
    if not isinstance(model, transformers.PreTrainedModel):
        raise ConfigError(
            f"save takes a model of Transformers, not {type(model).__name__}; see decay_pruning.save"
        )
    try:
        config = configs.with_scales(model, configs.fitted(model))
    except ValueError as error:
        raise ConfigError(
            f"stock {type(model).__name__} cannot load this model: {error}. Prune with DepGraph(uniform=True), which "
            "keeps the widths of all layers equal and leaves alone what no config names; or write it with "
            "decay_pruning.save(), for decay_pruning.load()"
        ) from None
    inputs = _inputs(model, as_inputs(example_inputs) if example_inputs is not None else _made_up(model))
    target = Path(folder)
    new_folder = not target.exists()
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target, prefix=".decay-pruning-") as scratch:
            new = Path(scratch) / "model"
            _write(model, config, new)
            difference = _proven(model, new, Path(scratch), inputs)
            _move(new, target)
    except BaseException as error:
        if new_folder:
            with suppress(OSError):
                target.rmdir()
        if isinstance(error, OSError):
            raise ManifestError(f"cannot write {target}: {error.strerror or error}") from error
        raise
    logger.info("%s: loads with stock %s, difference %g", target, type(model).__name__, difference)
    return difference


def push_to_hub(model: nn.Module, repo: str, example_inputs: Any = None, **options: Any) -> str:
    """`save`, and upload the folder with `huggingface_hub`.

    Args:
        model, example_inputs: as for `save`.
        repo: "owner/name"; made where it is missing.
        options: for `HfApi.create_repo` (`private`, …).

    Returns:
        the address of the commit.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as folder:
        save(model, folder, example_inputs)
        api = HfApi()
        api.create_repo(repo, exist_ok=True, **options)
        return str(
            api.upload_folder(repo_id=repo, folder_path=folder, commit_message="pruned with decay-pruning")
        )


def _write(model: Any, config: Any, folder: Path) -> None:
    own, model.config = model.config, config
    try:
        model.save_pretrained(folder)
    finally:
        model.config = own


def _proven(
    model: nn.Module, folder: Path, scratch: Path, inputs: tuple[tuple[Any, ...], dict[str, Any]]
) -> float:
    """The largest difference between the model and what the stock class makes of the folder.

    Raises:
        ManifestError: it does not load, or computes something else.
    """
    home, name = _home(model)
    first = next(model.parameters())
    attention = getattr(model.config, "_attn_implementation", None)
    given = {"inputs": inputs, "dtype": first.dtype, "device": str(first.device), "attention": attention}
    torch.save(given, scratch / "inputs.pt")
    threads = str(torch.get_num_threads())
    done = subprocess.run(
        [sys.executable, "-c", _LOADER, str(folder), home, name, str(scratch), threads],
        capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        raise ManifestError(f"stock {name} does not load the pruned model: {last}")
    theirs = torch.load(scratch / "outputs.pt", weights_only=True, map_location=first.device)
    ours = _outputs(model, inputs)
    if [t.shape for t in ours] != [t.shape for t in theirs]:
        raise ManifestError(f"stock {name} loads the pruned model, but its outputs have other shapes")
    differences = [_difference(a, b) for a, b in zip(ours, theirs, strict=True)]
    worst = max((absolute for absolute, _ in differences), default=0.0)
    if max((relative for _, relative in differences), default=0.0) > _ROUNDING:
        raise ManifestError(
            f"stock {name} loads the pruned model, but its outputs differ by {worst:.3g}: it computes with a number "
            "of its config beside the shapes (a scale, for example), which pruning has changed. Keep that width: the "
            "width of the model itself stays with DepGraph(ignored=[…]) that names its embedding"
        )
    return worst


def _difference(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Absolute, and over the largest value."""
    a, b = a.double(), b.double()
    if torch.equal(a, b) or not a.numel():
        return 0.0, 0.0
    worst = float((a - b).abs().max())
    return worst, worst / max(float(a.abs().max()), 1e-30)


def _home(model: nn.Module) -> tuple[str, str]:
    """Where the class is found in another process.

    Raises:
        ConfigError: nowhere.
    """
    kind = type(model)
    if kind.__module__.startswith("transformers."):
        return "transformers" if hasattr(
            sys.modules["transformers"], kind.__name__
        ) else kind.__module__, kind.__name__
    if kind.__module__ == "__main__" or "<locals>" in kind.__qualname__:
        raise ConfigError(
            f"{kind.__qualname__} is defined where another process cannot import it; put it into a module"
        )
    return kind.__module__, kind.__qualname__


@torch.no_grad()
def _outputs(model: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> list[Tensor]:
    modes = [(module, module.training) for module in model.modules()]
    put_back = contents(model.modules())
    try:
        model.eval()
        found = model(*inputs[0], **inputs[1])
    finally:
        put_back()
        for module, mode in modes:
            module.training = mode
    return [t for t in torch.utils._pytree.tree_leaves(found.to_tuple()) if isinstance(t, Tensor)]


def _inputs(model: nn.Module, given: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments for a call, without a cache, which would be an output of its own."""
    given = to_device(given, next(model.parameters()).device)
    args: tuple[Any, ...] = tuple(given) if isinstance(given, list | tuple) else ()
    args = (given,) if isinstance(given, Tensor) else args
    kwargs = dict(given) if isinstance(given, Mapping) else {}
    if getattr(model.config, "use_cache", None) is not None:
        kwargs.setdefault("use_cache", False)
    return args, kwargs


def _made_up(model: Any) -> dict[str, Tensor]:
    """Inputs as the config describes them.

    Raises:
        ConfigError: of a kind that is not known here.
    """
    config, name = model.config, model.main_input_name
    maker = torch.Generator().manual_seed(0)
    words = torch.randint(0, getattr(config, "vocab_size", 2), (2, 8), generator=maker)
    if name == "input_ids":
        inputs = {"input_ids": words}
    elif name == "pixel_values" and isinstance(getattr(config, "image_size", None), int):
        side = config.image_size
        inputs = {"pixel_values": torch.randn(2, config.num_channels, side, side, generator=maker)}
    elif name == "input_features" and hasattr(config, "max_source_positions"):
        frames = 2 * config.max_source_positions
        inputs = {"input_features": torch.randn(2, config.num_mel_bins, frames, generator=maker)}
    else:
        raise ConfigError(f"save cannot make up {name!r} for {type(model).__name__}: give example_inputs")
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = words
    dtype = next(model.parameters()).dtype
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}


def _move(new: Path, target: Path) -> None:
    """Put files where they belong, weights first; weights in other files that were there before are gone."""
    names = {path.name for path in new.iterdir()}
    for path in sorted(new.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(path, target / path.name)
    for old in [*target.glob("model*.safetensors*"), *target.glob("pytorch_model*.bin*")]:
        if old.name not in names:
            old.unlink()
