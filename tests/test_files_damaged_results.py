"""A damaged result file ends in one sentence, in `report` and in `compare`, wherever the damage is."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from decay_pruning import cli
from decay_pruning.errors import ConfigError, DecayPruningError
from decay_pruning.lab import compare, report, results

from .test_compare import _one_thread as _one_thread
from .test_compare import small


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("whole")
    compare.compare(small("dense.epochs=1"), ["single", "sr"], [0], out)
    values: dict[str, Any] = json.loads((out / results.FILE).read_text())
    for run in values["runs"]:  # small, so that damage meets every kind of place
        run["rows"], run["events"], run["lines"] = run["rows"][:2], run["events"][:2], run["lines"][:1]
    return values


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


DAMAGE = [None, True, "x", "", -1, 0, 0.5, 10**30, 10**400, 1e308, [], {}, [1], {"a": 1}, [[]]]


def test_no_damage_is_a_traceback(whole: dict[str, Any], tmp_path: Path) -> None:
    """Each of many places, changed or taken out: what is read either fails in one sentence or can be shown."""
    rng = random.Random(0)
    file, data, recipe = tmp_path / results.FILE, small().data.load(), small("dense.epochs=1")
    file.write_text(json.dumps(whole))
    report.render(results.load(file))
    refused = 0
    for place in places(whole):
        for damage in [*rng.sample(DAMAGE, 4), "gone"]:
            values = copy.deepcopy(whole)
            inside: Any = values
            for key in place[:-1]:
                inside = inside[key]
            if damage == "gone":
                del inside[place[-1]]
            else:
                inside[place[-1]] = damage
            file.write_text(json.dumps(values))
            try:
                result = results.load(file)
                report.render(result)
                report.figure(result)
                cli._table(result)
                compare._result(file, recipe, data, "", 1)
            except ConfigError:
                refused += 1
            except Exception as error:
                raise AssertionError(f"{place} = {damage!r}: {error!r}") from error
    assert refused > 100


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (lambda t: t[: len(t) // 2], "not a readable result file"),
        (lambda t: "", "not a readable result file"),
        (lambda t: "\x00" + t, "not a readable result file"),
        (lambda t: "[" * 200_000, "nested too deeply"),
        (lambda t: t.replace('"seed":0', '"seed":' + "9" * 5000, 1), "not a readable result file"),
        (lambda t: t.replace('"accuracy":', '"accuracy":NaN,"accuracy":', 1), "NaN is not a number"),
        (lambda t: t.replace('"seconds":', '"seconds":1e400,"accuracy":', 1), "must be a finite number"),
        (lambda t: "[]", "not a result of"),
    ],
)
def test_in_one_line_on_the_terminal(
    whole: dict[str, Any],
    text: Any,
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.toml").write_text('device = "cpu"\ndata = { train_limit = 128, test_limit = 60 }\n')
    damaged = text(json.dumps(whole, separators=(",", ":")))
    Path("result.json").write_text(damaged)
    for command in (["report", "result.json"], ["compare", "r.toml", "--out", "."]):
        with pytest.raises(SystemExit) as stop:
            cli.main(command)
        assert stop.value.code == 2
        said = capsys.readouterr().err
        assert words in said and said.startswith("decay-pruning: ") and said.count("\n") == 1
        assert len(said) < 400
    assert Path("result.json").read_text() == damaged


def test_what_a_removal_cannot_leave(whole: dict[str, Any], tmp_path: Path) -> None:
    whole = copy.deepcopy(whole)
    whole["runs"][0]["macs"][0] = 0
    (tmp_path / "result.json").write_text(json.dumps(whole))
    with pytest.raises(
        ConfigError, match=r"damaged: runs\[0\]\.macs\[0\] must be a whole number of at least 1"
    ):
        results.load(tmp_path / "result.json")
    with pytest.raises(ConfigError, match="larger than"):
        with open(tmp_path / "result.json", "wb") as file:
            file.truncate(3 << 30)  # nothing of it is on the disk
        results.load(tmp_path / "result.json")


def test_a_metric_that_is_not_finite_never_makes_a_file_that_cannot_be_read(
    whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "r.json").write_text(json.dumps(whole))
    result = results.load(tmp_path / "r.json")
    result.runs[0].rows.insert(0, {"step": 1, "accuracy": float("nan")})  # for a while
    result.save(tmp_path / "r.json")
    assert "nan" not in report.render(results.load(tmp_path / "r.json")).lower().replace("nano", "")

    monkeypatch.setattr(compare, "evaluate", lambda *_: float("inf"))
    with pytest.raises(
        DecayPruningError, match=r"arm single, seed 0: the metric went from inf to .* diverged"
    ):
        compare.compare(small("dense.epochs=1"), ["single"], [0], tmp_path / "out")
    assert not (tmp_path / "out" / results.FILE).exists()
