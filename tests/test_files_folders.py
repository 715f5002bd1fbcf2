"""Folders: one process at a time, and whatever keeps a file from being written is said in one sentence."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from decay_pruning import cli, save
from decay_pruning.errors import ManifestError, WriteError
from decay_pruning.lab import compare, results

from .nets import make
from .test_cli import RECIPE
from .test_compare import _one_thread as _one_thread
from .test_compare import small

QUICK = RECIPE.replace("epochs = 3", "epochs = 1").replace("steps = 3", "steps = 1")


@pytest.fixture(autouse=True)
def _there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "quick.toml").write_text(QUICK)
    monkeypatch.chdir(tmp_path)


def one_line(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(command)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("decay-pruning: ") and said.count("\n") == 1
    return said


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


# ------------------------------------------------------------------------------------------ one process at a time


HOLD = "import sys; from pathlib import Path; from decay_pruning.lab import results\n" + (
    "with results.alone(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
)


def test_a_folder_that_another_process_works_on_is_refused_until_it_dies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", "quick.toml", "--arms", "single", "--seeds", "1", "--out", "out"]
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, "out"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        assert "another process works on out: wait until it is done, or" in one_line(capsys, *command)
        assert files(tmp_path / "out") == {}
    finally:
        other.kill()
        other.communicate()
    cli.main(command)
    assert len(results.load("out/result.json").runs) == 1 and not list(Path("out").rglob(".*"))


def test_a_folder_is_free_again_and_where_there_are_no_locks_it_goes_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with results.alone(tmp_path / "a"):
        with pytest.raises(WriteError, match="another process"), results.alone(tmp_path / "a"):
            raise AssertionError
        with results.alone(tmp_path / "b"):
            pass
    with results.alone(tmp_path / "a"):
        pass

    def unknown(*args: Any) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(results.fcntl, "flock", unknown)
    with results.alone(tmp_path / "a"), results.alone(tmp_path / "a"):
        pass
    monkeypatch.setattr(results, "fcntl", None)
    with results.alone(tmp_path / "a"):
        pass


# ---------------------------------------------------------------------------------------------- what cannot be written


LIMITED = """
import resource, sys
from decay_pruning import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
cli.main(sys.argv[2:])
"""


@pytest.mark.parametrize("limit", [1_000, 60_000], ids=["no start fits", "no result fits"])
def test_a_limit_on_the_size_of_files(limit: int, tmp_path: Path) -> None:
    """The real thing: a process that may not write larger files."""
    command = ["compare", "quick.toml", "--arms", "single", "--seeds", "1", "--out", "out"]
    if limit > 1_000:  # the start is there already, and an older result that stays
        cli.main(command)
        limit = (tmp_path / "out" / "result.json").stat().st_size // 2
        (tmp_path / "out" / "report.html").unlink()
        command[3:6] = ["sp", "--seeds", "1"]
    before = files(tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), *command], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("decay-pruning: cannot write ") and done.stderr.count("\n") == 1
    assert "large" in done.stderr
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO, errno.EFBIG])
@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
def test_errors_of_the_disk(
    number: int,
    call: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """At any moment of a write: one sentence, what was there is whole, and no scratch file stays."""
    model, _ = make("vgg")
    path = tmp_path / "here" / "model"
    path.parent.mkdir()
    save(model, path)
    results.write(path.parent / "page", "old")
    before = files(path.parent)
    true = getattr(os, call)

    def fail(*args: Any, **more: Any) -> Any:
        if call == "open" and not args[1] & os.O_CREAT:
            return true(*args, **more)
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(ManifestError, match=f"cannot write .*: {os.strerror(number)}"):
            save(model, path)
        with pytest.raises(WriteError, match=f"cannot write .*: {os.strerror(number)}"):
            results.write(path.parent / "page", "new")
    assert files(path.parent) == before


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir(mode=0o555)
    command = ["compare", "quick.toml", "--arms", "single", "--seeds", "1", "--out", "out"]
    assert "Permission denied" in one_line(capsys, *command)


def test_a_file_where_a_folder_should_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    command = ["compare", "quick.toml", "--arms", "single", "--seeds", "1", "--out"]
    assert "cannot write file: File exists" in one_line(capsys, *command, "file")
    assert "cannot write file/below: Not a directory" in one_line(capsys, *command, "file/below")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "starts").write_text("mine")
    assert "cannot save the dense start to out/starts/seed0-" in one_line(capsys, *command, "out")
    assert (tmp_path / "file").read_text() == "mine"


# ---------------------------------------------------------------------------------------- models, asked for later


def test_models_that_were_not_kept_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    compare.compare(small("dense.epochs=1"), ["single", "dense"], [0], tmp_path / "out")
    assert not caplog.messages
    keep = small("dense.epochs=1", "report.save_models=true")
    compare.compare(keep, ["single", "dense", "sp"], [0], tmp_path / "out")
    assert caplog.messages == [
        "no models of dense-0, single-0: these runs are from an earlier call that did not keep them; "
        "choose another --out to have them made"
    ]
    assert [f.name for f in (tmp_path / "out" / "models").iterdir()] == ["sp-0.safetensors"]
