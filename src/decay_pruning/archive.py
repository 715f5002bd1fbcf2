"""Archive: tensors and a description in one safetensors file that appears whole or not at all and notices damage.

The same content gives the same bytes. The description is JSON in a single entry of the file's metadata; in it stands
the SHA-256 of the whole file, taken with zeros in its own place.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from decay_pruning.errors import ManifestError

#: The entry of the metadata that holds the description.
KEY = "decay-pruning"
VERSION = 2
_ZEROS = "0" * 64
_CHECKSUM = re.compile(rb'\\"checksum\\":\\"([0-9a-f]{64})\\"')


def write(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], description: Mapping[str, Any]
) -> None:
    """Write tensors and description to `path`, atomically: what was there stays whole if anything fails.

    Args:
        path: the file; its folder must exist.
        tensors: by name, on any device.
        description: plain values.

    Raises:
        ManifestError: it cannot be written, or a tensor is of a kind that safetensors does not know.
    """
    target = Path(path)
    text = json.dumps(
        {**description, "version": VERSION, "checksum": _ZEROS},
        sort_keys=True,
        separators=(",", ":"),
        allow_nan=False,
    )
    plain = _plain(tensors)
    try:
        handle, scratch = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        os.close(handle)
        try:
            save_file(plain, scratch, {KEY: text})
            sign(scratch)
            os.chmod(scratch, 0o666 & ~_umask())
            os.replace(scratch, target)
        except BaseException:
            Path(scratch).unlink(missing_ok=True)
            raise
    except (OSError, SafetensorError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ManifestError(f"cannot write {target}: {reason}") from error


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and tensors of a file. Files of version 1, which have no checksum, are read as well.

    Raises:
        ManifestError: the file is missing, truncated, damaged, foreign or of a newer version.
    """
    path = Path(path)
    if not path.is_file():
        raise ManifestError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ManifestError(f"{path} is truncated or no safetensors file: {short(error)}") from error
    first = metadata.get("format") == KEY  # version 1 had an entry for each of these
    text = metadata.get("manifest" if first else KEY)
    if text is None and not first:
        raise ManifestError(f"{path} was not written by decay-pruning (a plain safetensors file?)")
    try:
        values = json.loads(text or "", parse_constant=_refuse)
        if not isinstance(values, dict):
            raise ValueError("it is not a mapping")
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path} has a damaged description: {short(error)}") from error
    version = metadata.get("version") if first else values.get("version")
    if version != ("1" if first else VERSION):
        raise ManifestError(
            f"{path} has format version {short(version)}, this library reads 1 and {VERSION}; update decay-pruning"
        )
    if not first and not _intact(path):
        raise ManifestError(f"{path} is damaged: its checksum does not fit its content")
    return values, tensors


def sign(path: str | os.PathLike[str]) -> None:
    """Put the checksum of a file into it, and see to it that it is on the disk."""
    with open(path, "r+b") as file:
        at = _place(file)
        assert at is not None
        digest = _digest(file, at)
        file.seek(at)
        file.write(digest)
        file.flush()
        os.fsync(file.fileno())


def _intact(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            at = _place(file)
            if at is None:
                return False
            file.seek(at)
            return file.read(len(_ZEROS)) == _digest(file, at)
    except OSError:
        return False


def _place(file: BinaryIO) -> int | None:
    """Where the checksum stands in a file."""
    file.seek(0)
    found = _CHECKSUM.search(file.read(int.from_bytes(file.read(8), "little")))
    return None if found is None else 8 + found.start(1)


def _digest(file: BinaryIO, at: int) -> bytes:
    """The checksum that a file should have."""
    file.seek(0)
    digest = hashlib.sha256(file.read(at) + _ZEROS.encode())
    file.seek(at + len(_ZEROS))
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest().encode()


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors wants them: in main memory, contiguous, none of them a view of another."""
    found: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ManifestError(f"{name!r} is a {type(tensor).__name__}, and only tensors are saved")
        if hasattr(tensor, "full_tensor"):
            raise ManifestError(f"{name!r} is distributed over several processes; gather the model first")
        if tensor.layout != torch.strided or tensor.device.type == "meta" or tensor.is_quantized:
            kind = "quantized" if tensor.is_quantized else tensor.device.type
            kind = str(tensor.layout).removeprefix("torch.") if tensor.layout != torch.strided else kind
            raise ManifestError(f"{name!r} is a {kind} tensor, and only plain ones with values are saved")
        value = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        if value.untyped_storage().data_ptr() in storages or value.untyped_storage().nbytes() > value.nbytes:
            value = value.clone()
        storages.add(value.untyped_storage().data_ptr())
        found[name] = value
    return found


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not a number")


def short(value: object) -> str:
    """On one line of bounded length, for messages."""
    text = " ".join(str(value).split())
    return text if len(text) <= 200 else text[:200] + " …"
