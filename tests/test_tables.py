"""The pages with results say what the files in results/ say."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from decay_pruning.errors import ConfigError
from decay_pruning.lab import results
from decay_pruning.lab.stats import Difference

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
tables: Any = importlib.import_module("tables")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("digits.json", "search-starts-digits.json", "step-cost-cpu.json"):
        (tmp_path / "results").mkdir(exist_ok=True)
        shutil.copy(ROOT / "results" / name, tmp_path / "results")
    (tmp_path / "recipes").mkdir()
    for name in ("digits.toml", "digits-otov2.toml", "cifar10-resnet56-depgraph.toml"):
        shutil.copy(ROOT / "recipes" / name, tmp_path / "recipes")
    (tmp_path / "README.md").write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    return tmp_path


def test_the_pages_are_in_step_with_the_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert tables.main(["--check"]) == 0, capsys.readouterr().out


def test_check_writes_nothing_and_writing_satisfies_it(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = (root / "README.md").read_text()
    assert tables.main(["--check"], root) == 1
    assert "README.md is stale" in capsys.readouterr().out and (root / "README.md").read_text() == readme
    assert tables.main([], root) == 0 and tables.main(["--check"], root) == 0
    new = (root / "README.md").read_text()
    assert new.startswith("before\n") and new.endswith("\nafter\n") and "old" not in new

    values = json.loads((root / "results" / "digits.json").read_text())
    values["runs"][0]["accuracy"] -= 50
    (root / "results" / "digits.json").write_text(json.dumps(values))
    assert tables.main(["--check"], root) == 1, "a changed figure makes the pages stale"


def test_figures_are_those_of_the_summary(root: Path) -> None:
    page, readme = tables.pages(root).values()
    for s in results.summarise(results.load(root / "results" / "digits.json")):
        for text in (page, readme):
            row = next(line for line in text.splitlines() if f"| `{s.arm}` |" in line)
            assert s.accuracy.show() in row
            assert s.difference is None or s.difference.show() in row
            assert s.removed is None or f"{s.removed.mean:.1f}" in row


def test_final_comparisons_come_first_and_into_the_readme(root: Path) -> None:
    digits = results.load(root / "results" / "digits.json")
    sparse = {**digits.recipe, "title": "Sparse", "sparse": {"strength": 1e-4}}
    peers = tuple(replace(run, arm="tp-one-shot") for run in digits.of("single"))
    final = replace(digits, recipe=sparse, runs=digits.runs + peers)
    final.save(root / "results" / "final-sparse.json")
    page, readme = tables.pages(root).values()
    assert page.index("### final-sparse: Sparse") < page.index(f"### digits: {digits.recipe['title']}")
    assert "| DepGraph, sparse learning | `dense` |" in readme and "results/digits.json" not in readme
    assert [line.split(" | ")[1] for line in readme.splitlines() if line.startswith("| ")][2:] == [
        "`dense`", "`single`", "`sp`", "`sr`", "`tp-one-shot`"
    ]  # fmt: skip


def test_lengths_of_one_recipe_make_the_readmes_table_and_picture(root: Path) -> None:
    digits = results.load(root / "results" / "digits.json")
    for steps, more in ((250, 0.0), (1000, 0.5)):
        runs = tuple(replace(run, steps=steps, accuracy=run.accuracy + more) for run in digits.runs)
        replace(digits, runs=runs).save(root / "results" / f"crepe-{steps}.json")
    pages = {path.name: text for path, text in tables.pages(root).items()}
    rows = [line.split(" | ") for line in pages["README.md"].splitlines() if line.startswith("| ")][2:]
    assert [row[0].strip("| ") for row in rows] == ["250", "", "", "1,000", "", ""]
    assert [row[1] for row in rows] == ["one step", "SP", "SP + SR"] * 2
    for arm, row in zip(("single", "sp", "sr"), rows, strict=False):
        mean = sum(run.accuracy for run in digits.of(arm)) / len(digits.of(arm))
        assert row[2].startswith(f"{mean:.2f} ")
    assert pages["longer.svg"].startswith("<svg") and pages["longer.svg"].count("<polygon") == 3


def test_searches_are_paired_with_single(root: Path) -> None:
    page, _ = tables.pages(root).values()
    rows = json.loads((root / "results" / "search-starts-digits.json").read_text())["rows"]
    by = {(row["variation"], row["seed"]): row["accuracy"] for row in rows}
    gains = [by["sr, half-space", seed] - by["single", seed] for seed in range(100, 105)]
    line = next(line for line in page.splitlines() if line.startswith("| sr, half-space |"))
    assert f"| −{-sum(gains) / 5:.2f} [" in line and "not distinguishable" not in line
    order = [float(line.split(" | ")[1].split()[0]) for line in page.splitlines() if line.endswith("| 5 |")]
    assert len(order) == 5 and order == sorted(order, reverse=True)


def test_variations_are_compared_with_one_step_in_their_own_setting() -> None:
    names = ["single", "sp", "single, 2 rounds", "sp, 2 rounds", "sp, 4 rounds", "a, b, 2 rounds"]
    assert [tables.alone(name, names) for name in names] == [
        "", "single", "single", "single, 2 rounds", "single", "single, 2 rounds",
    ]  # fmt: skip


def row_of(page: str, section: str, first: str) -> list[str]:
    """Cells of the first row that starts so, below a heading."""
    lines = page[page.index(f"### {section}\n") :].splitlines()
    return next(line for line in lines if line.startswith(f"| {first} |")).strip("| ").split(" | ")


def test_a_diagnosis_is_the_mean_of_its_rows(root: Path) -> None:
    values = json.loads((ROOT / "results" / "diagnose-global.json").read_text())
    (root / "results" / "diagnose-global.json").write_text(json.dumps(values))
    page, _ = tables.pages(root).values()
    rows = [r for r in values["rows"] if r["criterion"] == "C_rate" and r["truth"] == "start"]
    means = [
        sum(r["spearman"] for r in rows if r["stage"] == stage) / len({r["seed"] for r in rows})
        for stage in (0.1, 0.25, 0.5, 0.75, 0.9)
    ]
    assert row_of(page, "diagnose-global", "outward")[1:6] == [f"{mean:.2f}" for mean in means]


def test_what_goes_together_is_a_mean_over_seeds(root: Path) -> None:
    values = json.loads((ROOT / "results" / "together-depgraph.json").read_text())
    (root / "results" / "together-depgraph.json").write_text(json.dumps(values))
    page, _ = tables.pages(root).values()
    mine = [row for row in values["rows"] if row["group"] == "conv1"]
    shown = row_of(page, "together-depgraph", "`conv1`")
    assert shown[1:3] == ["16", f"{sum(row['picked'] for row in mine) / len(mine):.1f}"]
    assert shown[3].startswith(f"{sum(row['together'] for row in mine) / len(mine):.3f} ± ")


def test_causes_show_every_figure(root: Path) -> None:
    names = ("loss_before", "loss_highest", "jump", "removed", "removed_refreshed", "end", "end_refreshed")
    rows = [
        {"arm": arm, "seed": seed, **{name: 10.0 * i + seed for i, name in enumerate(names)}}
        for arm in ("single", "sp")
        for seed in (1, 3)
    ]
    made = {
        k: results.machine("cpu") if k == "machine" else results.versions() for k in ("machine", "versions")
    }
    recipe = {"title": "T", "data": {"validation": 0.1}}
    values = {"command": "python benchmarks/causes.py", **made, "recipe": recipe, "rows": rows}
    (root / "results" / "causes-x.json").write_text(json.dumps(values))
    page, _ = tables.pages(root).values()
    shown = [f"{10 * i + 2}.00 ± 1.41" for i in range(len(names))]
    assert row_of(page, "causes-x", "`sp`") == ["`sp`", *shown, "2"]


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (-0.2, 0.4, "+0.10 [−0.20, +0.40], not distinguishable"),
        (0.05, 0.15, "+0.10 [+0.05, +0.15]"),
        (None, None, "+0.10 (one seed)"),
    ],
)
def test_what_a_difference_shows(low: float | None, high: float | None, said: str) -> None:
    assert tables.against(Difference(0.1, low, high, 5, 0.95)) == said


def test_recipes_say_whether_they_were_run(root: Path) -> None:
    shutil.copy(ROOT / "results" / "final-depgraph.json", root / "results")
    shutil.copy(ROOT / "recipes" / "cifar10-small-depgraph.toml", root / "recipes")
    page, _ = tables.pages(root).values()
    recipes = {
        line.partition("]")[0].partition("[")[2]: line
        for line in page[page.index("## Recipes") :].splitlines()
    }
    assert recipes["cifar10-resnet56-depgraph.toml"].endswith("| not yet run |")
    same = "[final-depgraph.json](../results/final-depgraph.json) (AMD EPYC, 1 thread)"
    assert recipes["cifar10-small-depgraph.toml"].endswith(f"{same} |")
    assert "with another `prune.rectify.t_rate`" in recipes["digits.toml"]
    assert "with settings that are gone" in recipes["digits-otov2.toml"]


def test_a_readme_without_markers_is_an_error(root: Path) -> None:
    (root / "README.md").write_text("no table")
    with pytest.raises(ConfigError, match=r"README\.md has no lines"):
        tables.pages(root)
