"""Comparison of arms: paired, resumable, and written down."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from decay_pruning import load
from decay_pruning.engine import Event
from decay_pruning.errors import BudgetError, ConfigError, ManifestError
from decay_pruning.lab import compare, recipe, results, settings
from decay_pruning.lab.recipe import Prune, Recipe
from decay_pruning.lab.results import Line, Result, Run


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


SMALL = {
    "name": "small",
    "device": "cpu",
    "data": {"train_limit": 256, "test_limit": 100},
    "dense": {"epochs": 3, "batch_size": 64, "lr": 0.1},
    "prune": {"epochs": 4, "batch_size": 64, "lr": 0.05, "smooth": {"steps": 6}, "target": {"macs": 0.5}},
    "report": {"latency_batch": 4},
}


def small(*assignments: str) -> Recipe:
    return Recipe.from_dict(settings.override(SMALL, assignments))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("finished")
    command = "decay-pruning compare small.toml"
    recipe = small("report.save_models=true")
    return out, compare.compare(recipe, ["sr", "dense", "sp", "single"], [0], out, command=command)


def test_arms_differ_by_two_settings() -> None:
    prune = Prune()
    assert compare.settings_of("dense", prune) is None
    single, sp, sr = (compare.settings_of(arm, prune) for arm in ("single", "sp", "sr"))
    assert single == (replace(prune.smooth, steps=1), None)
    assert sp == (prune.smooth, None)
    assert sr == (prune.smooth, prune.rectify)
    off = replace(prune, rectify=None)
    assert compare.settings_of("sr", off)[1] is not None, (
        "the arm sr rectifies even if the recipe's own run does not"
    )
    with pytest.raises(ConfigError, match=r"no arm is called 'signle'.*did you mean 'single'\?"):
        compare.settings_of("signle", prune)


def test_the_arm_of_a_recipe() -> None:
    prune = Prune()
    assert compare.arm_of(prune) == "sr"
    assert compare.arm_of(replace(prune, rectify=None)) == "sp"
    assert compare.arm_of(replace(prune, smooth=replace(prune.smooth, steps=1))) == "single"


def test_runs_are_paired(finished: tuple[Path, Result]) -> None:
    _, result = finished
    assert [run.arm for run in result.runs] == ["dense", "single", "sp", "sr"]
    assert len({run.accuracy_start for run in result.runs}) == 1
    assert len({run.steps for run in result.runs}) == 1
    dense, single, sp, _ = result.runs
    assert dense.macs[0] == dense.macs[1] and dense.report is None and dense.accuracy_removed is None
    for run in result.runs[1:]:
        assert run.macs[0] == dense.macs[0]
        assert run.macs[1] <= 0.5 * run.macs[0]
        assert run.accuracy_removed is not None
        assert run.report is not None and run.report["macs"] == run.macs
        assert all(latency > 0 for latency in run.latency)
    assert single.macs == sp.macs, "both prune what the host picks from the same start"


def test_lines_fade_to_zero(finished: tuple[Path, Result]) -> None:
    _, result = finished
    single, sp = result.of("single")[0], result.of("sp")[0]
    assert single.lines and sp.lines
    for run, length in ((single, 1), (sp, 6)):
        for line in run.lines:
            steps, values = zip(*line.points, strict=True)
            assert line.end == "removed" and values[0] == 1 and values[-1] == 0
            assert steps[-1] - steps[0] == length
            assert list(steps) == sorted(set(steps)) and list(values) == sorted(values, reverse=True)
    assert max(len(line.points) for line in sp.lines) > 3, "the fall itself is recorded"
    assert sum(e["count"] for e in sp.events if e["kind"] == "removed") == sp.report["removed"]


def test_the_result_file_is_whole(finished: tuple[Path, Result]) -> None:
    out, result = finished
    assert _same(results.load(out / "result.json"), result)
    values = json.loads((out / "result.json").read_text())
    assert values["command"] == "decay-pruning compare small.toml"
    assert {"python", "torch", "torch-pruning", "decay-pruning"} <= set(values["versions"])
    assert {"processor", "cores", "threads", "device"} <= set(values["machine"])
    assert not list(out.glob(".*")), "no temporary files stay"


def _same(a: Result, b: Result) -> bool:
    return json.dumps(settings.plain(a)) == json.dumps(settings.plain(b))


def test_saved_models_load_into_a_fresh_one(finished: tuple[Path, Result]) -> None:
    out, result = finished
    recipe = small()
    model = recipe.model.build(recipe.data.load(), seed=9)
    load(model, out / "models" / "sr-0.safetensors")
    assert sum(p.numel() for p in model.parameters()) == result.of("sr")[0].params[1]


def test_resuming_runs_only_what_is_missing(tmp_path: Path) -> None:
    done: list[tuple[str, int]] = []

    def note(run: Run) -> None:
        done.append((run.arm, run.seed))

    first = compare.compare(small(), ["sp"], [0], tmp_path, on_run=note)
    stamp = next((tmp_path / "starts").iterdir()).stat().st_mtime_ns
    second = compare.compare(small(), ["single", "sp"], [0], tmp_path, on_run=note)
    assert done == [("sp", 0), ("single", 0)]
    assert [s.stat().st_mtime_ns for s in (tmp_path / "starts").iterdir()] == [stamp], (
        "the dense start is kept"
    )
    assert _same(replace(second, runs=(second.of("sp")[0],)), replace(first, created=second.created))

    # Stopped and resumed or in one go: the same figures.
    whole = compare.compare(small(), ["single", "sp"], [0], tmp_path / "whole")
    assert [(r.arm, r.accuracy, r.rows, r.lines) for r in whole.runs] == [
        (r.arm, r.accuracy, r.rows, r.lines) for r in second.runs
    ]


def test_arms_of_a_seed_share_one_dense_start_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    original = compare.dense_start

    def counted(recipe: Recipe, data: Any, seed: int, *rest: Any) -> Any:
        asked.append(seed)
        return original(recipe, data, seed, *rest)

    monkeypatch.setattr(compare, "dense_start", counted)
    compare.compare(small(), ["single", "dense"], [0, 1], tmp_path)
    assert asked == [0, 1]


def test_another_recipe_does_not_mix_in(tmp_path: Path, finished: tuple[Path, Result]) -> None:
    _, result = finished
    result.save(tmp_path / "result.json")
    before = (tmp_path / "result.json").read_bytes()
    with pytest.raises(ConfigError, match=r"another recipe \(prune\.lr: 0\.05 there, 0\.06 now\)"):
        compare.compare(small("prune.lr=0.06"), ["sp"], [1], tmp_path)
    assert (tmp_path / "result.json").read_bytes() == before
    assert _same(compare.compare(small("title=New"), ["sp"], [0], tmp_path), result), (
        "a title changes no figure"
    )


def test_how_arms_rectify_can_be_settled_when_the_others_have_run(
    tmp_path: Path, finished: tuple[Path, Result]
) -> None:
    _, result = finished
    others = replace(result, runs=tuple(run for run in result.runs if run.arm != "sr"))
    others.save(tmp_path / "result.json")
    recipe = small("prune.rectify.max_share=0.2")
    more = compare.compare(recipe, ["sr"], [0], tmp_path)
    assert {run.arm for run in more.runs} == {"sr", *(run.arm for run in others.runs)}
    assert more.recipe["prune"]["rectify"]["max_share"] == 0.2
    with pytest.raises(ConfigError, match=r"prune\.rectify\.max_share: 0\.2 there, 0\.3 now"):
        compare.compare(small("prune.rectify.max_share=0.3"), ["sp"], [5], tmp_path)


def test_paths_of_this_machine_stay_out_of_the_result() -> None:
    values = small("data.root=/home/someone/cifar10", "dense.weights=/home/someone/w.pt").to_dict()
    hidden = results.anonymous(values)
    assert hidden["data"]["root"] == "cifar10" and hidden["dense"]["weights"] == "w.pt"
    assert values["data"]["root"] == "/home/someone/cifar10"


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("decay-pruning run a.toml --out /tmp/x/y", "decay-pruning run a.toml --out y"),
        ("decay-pruning run recipes/a.toml --set data.root=/home/me/cifar10", None),
        ("decay-pruning run a.toml --set 'data.root=/my data'", None),
        ("decay-pruning run a.toml --out ~/x", "decay-pruning run a.toml --out x"),
    ],
)
def test_absolute_paths_stay_out_of_the_command(command: str, shown: str | None) -> None:
    found = results.without_paths(command)
    assert "/home" not in found and "=/" not in found and " /" not in found
    assert "recipes/a.toml" in found or "recipes/a.toml" not in command
    assert shown is None or found == shown


def test_errors_name_arm_and_seed(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"^arm single, seed 0: "):
        compare.compare(small("prune.target.macs=0.0001"), ["single"], [0], tmp_path)
    with pytest.raises(ConfigError, match="at least one arm"):
        compare.compare(small(), [], [0], tmp_path)
    with pytest.raises(ManifestError, match="there is no file"):
        compare.compare(small("dense.weights=/no/such/file.pt"), ["sp"], [0], tmp_path)


def test_given_weights_replace_the_dense_training(tmp_path: Path) -> None:
    data = small().data.load()
    torch.save(small().model.build(data, seed=5).state_dict(), tmp_path / "w.pt")
    phases: set[str] = set()
    recipe = small(f"dense.weights={tmp_path / 'w.pt'}", "prune.epochs=2")
    model = compare.dense_start(recipe, data, 0, tmp_path / "starts", lambda job, step: phases.add(job.phase))
    assert not phases
    for ours, theirs in zip(model.parameters(), recipe.model.build(data, seed=5).parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_sparse_learning_is_done_once_before_pruning(tmp_path: Path) -> None:
    data = small().data.load()
    sections = ("sparse.epochs=2", "sparse.batch_size=64", "sparse.lr=0.05", "sparse.weight_decay=0")
    norms = {}
    for strength in (0.0, 0.05):
        phases: list[str] = []
        recipe = small(*sections, f"sparse.strength={strength}")
        model = compare.dense_start(
            recipe, data, 0, tmp_path, lambda job, step, p=phases: p.append(job.phase)
        )
        once = ["dense", "sparse"] if strength == 0 else ["sparse"]
        assert list(dict.fromkeys(phases)) == once, "the dense training is shared by all sparse ones"
        norms[strength] = sum(float(p.detach().square().sum()) for p in model.parameters())
        phases.clear()
        again = compare.dense_start(
            recipe, data, 0, tmp_path, lambda job, step, p=phases: p.append(job.phase)
        )
        assert not phases
        for ours, theirs in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
            assert torch.equal(ours, theirs)
    assert norms[0.05] < 0.9 * norms[0.0], "the regulariser pulls weights down"


def test_recorder_joins_events_and_samples() -> None:
    recorder = compare._Recorder()
    recorder(Event("picked", 0, "a", (0, 1)))
    recorder(Event("released", 6, "a", (1,)))
    recorder(Event("removed", 10, "a", (0,)))
    recorder(Event("picked", 10, "a", (1,)))
    rows: list[dict[str, Any]] = [
        {"step": 2, "norms": {"a:0": 0.8, "a:1": 0.8}},
        {"step": 4, "norms": {"a:0": 0.6, "a:1": 0.7}},
        {"step": 8, "norms": {"a:0": 0.2}},
        {"step": 12, "norms": {"a:1": 0.5}},
        {"step": 14},
    ]
    assert recorder.lines(rows) == (
        Line("a:0", "removed", ((0, 1.0), (2, 0.8), (4, 0.6), (8, 0.2), (10, 0.0))),
        Line("a:1", "released", ((0, 1.0), (2, 0.8), (4, 0.7), (6, 0.7))),
        Line("a:1", "", ((10, 1.0), (12, 0.5))),
    )
    assert recorder.counts()[0] == {"step": 0, "kind": "picked", "group": "a", "count": 2}


def test_the_demo_needs_nothing_that_has_to_be_fetched() -> None:
    root = Path(__file__).parents[1]
    assert '"recipes/digits-short.toml"' in (root / "examples" / "demo.py").read_text()
    loaded = recipe.load(root / "recipes" / "digits-short.toml")
    assert loaded.data.name == "digits" and loaded.dense.weights is None


# -- result files --------------------------------------------------------------------------


def run_of(arm: str, seed: int, accuracy: float, **more: Any) -> Run:
    given: dict[str, Any] = {
        "accuracy_start": 90.0,
        "accuracy_removed": None if arm == "dense" else 50.0,
        "macs": (100, 100 if arm == "dense" else 40),
        "params": (10, 5),
        "latency": (0.004, 0.002),
        "steps": 10,
        "seconds": 1.0,
    }
    return Run(arm, seed, accuracy, **{**given, **more})


def result_of(*runs: Run) -> Result:
    result = Result.new(small().to_dict(), {"name": "digits"}, "command", "cpu")
    for run in runs:
        result = result.with_run(run)
    return result


def test_summary_pairs_by_seed() -> None:
    result = result_of(
        run_of("single", 0, 90.0),
        run_of("single", 1, 80.0),
        run_of("sp", 0, 91.0),
        run_of("sp", 1, 82.0),
        run_of("sp", 2, 50.0),
    )
    single, sp = results.summarise(result)
    assert single.difference is None and single.accuracy.mean == 85
    assert sp.difference is not None and (sp.difference.mean, sp.difference.n) == (1.5, 2)
    assert sp.macs.mean == 40 and sp.latency.mean == 2 and sp.speedup == 2


def test_a_run_takes_the_place_of_an_earlier_one() -> None:
    result = result_of(
        run_of("sr", 1, 1.0), run_of("dense", 1, 2.0), run_of("sr", 0, 3.0), run_of("sr", 1, 4.0)
    )
    assert [(r.arm, r.seed, r.accuracy) for r in result.runs] == [("sr", 0, 3), ("dense", 1, 2), ("sr", 1, 4)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a readable result file"),
        ("[]", "not a result of"),
        ('{"runs": [], "recipe": {}, "format": 99}', "has format 99"),
        ('{"runs": [{"arm": 3}], "recipe": {}, "data": {}, "format": 1}', r"is damaged: .*runs\[0\]"),
    ],
)
def test_foreign_and_damaged_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        results.load(tmp_path / "result.json")


def test_a_missing_file_has_a_hint(tmp_path: Path) -> None:
    result_of(run_of("sp", 0, 1.0)).save(tmp_path / "result.json")
    with pytest.raises(ConfigError, match=r"no result file .*reslt\.json; did you mean .*result\.json\?"):
        results.load(tmp_path / "reslt.json")


def test_writing_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.txt"
    results.write(file, "old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        results.write(file, "new")
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_infinite_figures_become_null(tmp_path: Path) -> None:
    run = run_of("sp", 0, 1.0, rows=[{"step": 1, "loss": float("nan")}])
    result_of(run).save(tmp_path / "result.json")
    assert results.load(tmp_path / "result.json").runs[0].rows == [{"step": 1, "loss": None}]
