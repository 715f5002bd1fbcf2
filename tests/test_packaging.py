"""What is handed out: the wheel, the source distribution, the command, and how long the import takes."""

from __future__ import annotations

import configparser
import importlib.util
import re
import runpy
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import decay_pruning

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling, which builds the distributions, is not installed (extra `dev`)")
    folder = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_the_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    (file,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(file).namelist())
    sources = {
        str(p.relative_to(ROOT / "src")) for p in (ROOT / "src").rglob("*") if p.suffix in (".py", ".typed")
    }
    assert "decay_pruning/py.typed" in sources, "type checkers of users read the hints"
    info = f"decay_pruning-{decay_pruning.__version__}.dist-info"
    own = {name for name in names if not name.startswith(f"{info}/")}
    assert own >= sources and {name.partition("/")[0] for name in own} == {"decay_pruning"}
    assert f"{info}/licenses/LICENSE" in names


def test_the_metadata_is_true(built: Path) -> None:
    (file,) = built.glob("*.whl")
    wheel = zipfile.ZipFile(file)
    info = f"decay_pruning-{decay_pruning.__version__}.dist-info"
    about = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
    assert about["Name"] == "decay-pruning" and about["Version"] == decay_pruning.__version__
    assert about["License-Expression"] == "MIT" and about["Requires-Python"] == ">=3.11"
    assert any("arxiv.org/abs/2406.03879" in url for url in about.get_all("Project-URL"))
    assert {"lab", "docs", "dev"} <= set(about.get_all("Provides-Extra"))
    needed = [line for line in about.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(re.split(r"[^\w-]", line)[0] for line in needed) == [
        "numpy", "rich", "safetensors", "torch", "tyro",
    ]  # fmt: skip
    commands = configparser.ConfigParser()
    commands.read_string(wheel.read(f"{info}/entry_points.txt").decode())
    assert dict(commands["console_scripts"]) == {"decay-pruning": "decay_pruning.cli:main"}


def test_the_source_distribution_can_be_read_tested_and_documented(built: Path) -> None:
    (file,) = built.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in (
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "Makefile",
        "mkdocs.yml",
        "src/decay_pruning/py.typed",
    ):
        assert name in names
    for name in (
        "tests/test_packaging.py",
        "examples/own_loop.py",
        "recipes/digits.toml",
        "results/digits.json",
    ):
        assert name in names
    assert {"docs/index.md", "docs/hooks.py", "benchmarks/tables.py"} <= names
    assert not {name for name in names if name.startswith(("site/", "runs/", ".venv/"))}


def test_the_import_is_quick_and_asks_for_no_extra() -> None:
    code = """
import sys, time
import torch
for name in ("accelerate", "sklearn", "pyarrow", "PIL", "torch_pruning"):
    sys.modules[name] = None
start = time.perf_counter()
import decay_pruning
print(time.perf_counter() - start)
print("tyro" in sys.modules, "rich" in sys.modules)
try:
    import decay_pruning.lab.trainer
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, command_line, said = done.stdout.splitlines()
    assert float(seconds) < 1.0
    assert command_line == "False False", "what only the command line needs is imported by it alone"
    assert said == "the lab trains by accelerate: pip install 'decay-pruning[lab]'"


def test_the_module_is_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["decay_pruning", "--version"])
    runpy.run_module("decay_pruning", run_name="__main__")
    assert capsys.readouterr().out.startswith(f"decay-pruning {decay_pruning.__version__} (Python 3.")


def test_one_version_everywhere() -> None:
    version = decay_pruning.__version__
    assert f"version: {version}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
