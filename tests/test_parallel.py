"""Runs side by side: the same figures as one after the other, and errors as clear."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from decay_pruning.errors import BudgetError, ConfigError, DecayPruningError
from decay_pruning.lab import compare, parallel
from decay_pruning.lab.parallel import Chain

from .test_compare import _one_thread as _one_thread
from .test_compare import small

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def note(folder: Path, name: str, needs: str = "") -> str:
    if needs and not (folder / needs).exists():
        raise ConfigError(f"{needs} was not there")
    (folder / name).write_text(str(os.getpid()))
    return name


def fail() -> None:
    raise ConfigError("no start")


def test_what_comes_second_waits_and_a_failed_start_stops_only_its_own(tmp_path: Path) -> None:
    good = [partial(note, tmp_path, f"run{i}", needs="start") for i in range(3)]
    bad = [partial(note, tmp_path, "never")]
    chains = [Chain(partial(note, tmp_path, "start"), good), Chain(fail, bad), Chain(fail)]
    found = list(parallel.run(chains, 2))
    outcomes = {call: outcome for call, outcome in found}
    assert [outcomes[call] for call in good] == ["run0", "run1", "run2"]
    assert isinstance(outcomes[bad[0]], ConfigError) and str(outcomes[bad[0]]) == "no start"
    assert len(found) == 4 and not (tmp_path / "never").exists()
    assert str(os.getpid()) not in {(tmp_path / f"run{i}").read_text() for i in range(3)}


def test_a_process_that_dies_is_said(tmp_path: Path) -> None:
    chains = [Chain(partial(note, tmp_path, "start"), [partial(os._exit, 1), partial(note, tmp_path, "a")])]
    with pytest.raises(DecayPruningError, match=r"one of 1 processes died.*try fewer jobs"):
        list(parallel.run(chains, 1))


def note_and_wait(file: Path) -> None:
    file.write_text(str(os.getpid()))
    time.sleep(120)


def test_runs_end_with_whoever_started_them(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    call = partial(note_and_wait, tmp_path / "pid")
    starter = context.Process(target=exhaust, args=([Chain(partial(note, tmp_path, "start"), [call])],))
    starter.start()
    file = tmp_path / "pid"
    wait_until(lambda: file.exists() and bool(file.read_text()), 60)
    starter.kill()
    worker = int(file.read_text())
    wait_until(lambda: not alive(worker), 30)


def exhaust(chains: list[Chain]) -> None:
    list(parallel.run(chains, 1))


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z" if Path("/proc").is_dir() else True


def wait_until(holds: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.1)


def test_side_by_side_gives_what_one_after_the_other_gives(tmp_path: Path) -> None:
    arms, seeds = ["single", "sr"], [0, 1]
    seen: list[tuple[str, int]] = []
    beside = compare.compare(
        small(), arms, seeds, tmp_path / "a", jobs=2, on_run=lambda run: seen.append((run.arm, run.seed))
    )
    alone = compare.compare(small(), arms, seeds, tmp_path / "b")
    assert sorted(seen) == [("single", 0), ("single", 1), ("sr", 0), ("sr", 1)]
    assert (beside.machine["jobs"], alone.machine["jobs"]) == (2, 1)
    for ours, theirs in zip(beside.runs, alone.runs, strict=True):
        for name in (
            "arm",
            "seed",
            "accuracy",
            "accuracy_start",
            "macs",
            "rows",
            "events",
            "lines",
            "report",
        ):
            assert getattr(ours, name) == getattr(theirs, name), name


def test_errors_come_back_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BudgetError, match=r"^arm single, seed 0: "):
        compare.compare(small("prune.target.macs=0.0001"), ["single"], [0], tmp_path, jobs=2)
    with pytest.raises(ConfigError, match="jobs must be at least 1, not 0"):
        compare.compare(small(), ["single"], [0], tmp_path, jobs=0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="under torchrun"):
        compare.compare(small(), ["single"], [0], tmp_path, jobs=2)


def test_comparisons_share_their_dense_starts(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    compare.compare(small(), ["single"], [0], tmp_path / "a", starts=shared)
    (start,) = shared.iterdir()
    before = start.stat().st_mtime_ns
    compare.compare(small("prune.lr=0.04"), ["single"], [0], tmp_path / "b", starts=shared)
    assert [(file, file.stat().st_mtime_ns) for file in shared.iterdir()] == [(start, before)]
    assert not (tmp_path / "a" / "starts").exists()


def test_a_search_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import search

    monkeypatch.setitem(
        search.GRIDS, "two", {"single": ("single", []), "sp": ("sp", ["prune.smooth.steps=3"])}
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.toml").write_text(
        'device = "cpu"\ndata = { train_limit = 128, test_limit = 60 }\n'
        "dense = { epochs = 1, batch_size = 64 }\n"
        "prune = { epochs = 3, batch_size = 64, lr = 0.05, target = { macs = 0.6 } }\n"
    )
    words = ["search.py", "r.toml", "--grid", "two", "--out", "o.json", "--jobs", "2", "--seeds"]
    monkeypatch.setattr(sys, "argv", [*words, "7"])
    search.main()
    first = json.loads((tmp_path / "o.json").read_text())["rows"]
    assert sorted((row["variation"], row["seed"]) for row in first) == [("single", 7), ("sp", 7)]
    monkeypatch.setattr(sys, "argv", [*words, "7", "8"])
    search.main()
    rows = json.loads((tmp_path / "o.json").read_text())["rows"]
    assert rows[:2] == first and [row["seed"] for row in rows[2:]] == [8, 8]
    assert "single" in capsys.readouterr().out
