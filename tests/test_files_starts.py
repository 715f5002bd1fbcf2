"""Dense starts say what they are, and a recipe's name stays in its folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from decay_pruning.errors import ConfigError, ManifestError
from decay_pruning.lab import compare, recipe
from decay_pruning.lab.recipe import Recipe

from .test_compare import _one_thread as _one_thread
from .test_compare import small


def brief(*assignments: str) -> Recipe:
    return small("dense.epochs=1", *assignments)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    compare.dense_start(brief(), brief().data.load(), 0, folder)
    (file,) = folder.iterdir()
    return file


def refused(asked: Recipe, content: bytes, folder: Path, words: str, seed: int = 0) -> None:
    """This file is not taken for the start of that recipe, and stays as it is."""
    data = asked.data.load()
    file = folder / f"seed{seed}-{asked.key_of_start(data, seed)}.safetensors"
    file.write_bytes(content)
    with pytest.raises(ManifestError, match=words) as error:
        compare.dense_start(asked, data, seed, folder)
    assert "move it away" in str(error.value) and file.read_bytes() == content


@pytest.mark.parametrize(
    ("assignments", "words"),
    [
        (["dense.lr=0.2"], r"recipe\.dense\.lr: 0\.1 there, 0\.2 now"),
        (["data.train_limit=128"], r"recipe\.data\.train_limit: 256 there, 128 now"),
        (["sparse=true"], r"recipe\.sparse"),
    ],
)
def test_the_start_of_another_recipe(assignments: list[str], words: str, start: Path, tmp_path: Path) -> None:
    refused(brief(*assignments), start.read_bytes(), tmp_path, words)


def test_the_start_of_another_seed(start: Path, tmp_path: Path) -> None:
    refused(brief(), start.read_bytes(), tmp_path, "seed: 0 there, 1 now", seed=1)


def test_damaged_starts_and_those_that_say_nothing(start: Path, tmp_path: Path) -> None:
    data = bytearray(start.read_bytes())
    refused(brief(), data[:-100], tmp_path, "truncated")
    data[-50] ^= 8
    refused(brief(), bytes(data), tmp_path, "its checksum does not fit")
    save_file(load_file(start), tmp_path / "plain")
    refused(brief(), (tmp_path / "plain").read_bytes(), tmp_path, "was not written by decay-pruning")


def test_the_right_one_is_taken(start: Path) -> None:
    before = start.stat().st_mtime_ns
    trained: list[Any] = []
    model = compare.dense_start(
        brief(), brief().data.load(), 0, start.parent, lambda job, step: trained.append(job)
    )
    assert not trained and start.stat().st_mtime_ns == before
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in load_file(start).items())


def test_a_start_that_cannot_be_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ManifestError, match=r"cannot save the dense start to .*file"):
        compare.dense_start(brief(), brief().data.load(), 0, tmp_path / "file" / "starts")


# ------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    "name",
    [
        *("../x", "..", ".", "", " ", "a/b", "/etc/x", "\\x", "C:", "C:\\x", "a\0b", "a\nb", "x.", " x"),
        *("con", "NUL.txt", "com1", "x" * 201, "é" * 101, "a*", "\u202ex"),
        os.sep,
    ],
)
def test_names_that_would_leave_their_folder(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^name must be that of one plain folder") as error:
        Recipe.from_dict({"name": name})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a", "digits-2.5", "größe 7", "..x", "console", "模型"])
def test_names_that_stay_there(name: str, tmp_path: Path) -> None:
    assert Recipe.from_dict({"name": name}).name == name
    (tmp_path / name).mkdir()
    assert (tmp_path / name).parent == tmp_path


def test_the_name_of_a_recipe_file_is_one(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("")
    assert recipe.load(tmp_path / "mine.toml").name == "mine"
    (tmp_path / "bad.toml").write_text('name = "../../bad"')
    with pytest.raises(ConfigError, match="name must be"):
        recipe.load(tmp_path / "bad.toml")
