"""Try the library on every Python of this machine, with several versions of torch.

    python benchmarks/matrix.py --torch 2.13 --out results/matrix.json
    make matrix TORCH="2.6 2.8 2.10 2.13"

Each pair gets an environment of its own under .matrix/, kept for the next call. pip takes torch from wherever it is set
to look; where that holds no CPU build, one version of torch is some gigabytes. By default a share of the tests is run,
one for each room of the library; `--tests tests` runs all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from decay_pruning.lab import results

ROOT = Path(__file__).parents[1]
PYTHONS = ["3.11", "3.12", "3.13"]
TORCHES = ["2.6", "2.8", "2.10", "2.13"]
#: What is most likely to notice another torch: the tracer, surgery, hooks and state of optimizers, files.
TESTS = ["graph", "rules", "attributes", "surgery_optimizers", "several_optimizers", "amp", "files_models"]


def attempt(python: str, torch: str, tests: list[str]) -> dict[str, object]:
    """One pair: its row of the table."""
    row: dict[str, object] = {"python": python, "torch": torch}
    found = shutil.which(f"python{python}")
    runs = found and not subprocess.run([found, "-c", ""], capture_output=True).returncode  # no empty shim
    if not found or not runs:
        return {**row, "said": f"not tried: python{python} does not run here"}
    home = ROOT / ".matrix" / f"python{python}-torch{torch}"
    binary, started = home / "bin" / "python", time.monotonic()
    install = [str(binary), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    steps = [
        [found, "-m", "venv", str(home)],
        [*install, f"torch=={torch}.*"],
        [*install, "--editable", f"{ROOT}[lab,dev]", f"torch=={torch}.*"],
    ]
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True)
        if done.returncode:
            return {**row, "said": f"cannot be installed: {_last(done.stderr)}"}
    where = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    run = [str(binary), "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(run, cwd=ROOT, env=where, capture_output=True, text=True)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error)", done.stdout)}
    said = "passes" if done.returncode == 0 else f"fails: {_last(done.stdout)}"
    return {
        **row,
        "passed": counts.get("passed", 0),
        "seconds": round(time.monotonic() - started),
        "said": said,
    }


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason was given"


def main() -> int:
    """Tries all pairs; the exit code is 1 where one that could be tried fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", nargs="+", default=PYTHONS, help="versions, as in python3.12")
    parser.add_argument("--torch", nargs="+", default=TORCHES, help="versions, as in 2.10")
    parser.add_argument("--tests", nargs="+", help="files or folders for pytest")
    parser.add_argument("--out", type=Path, help="a file for the rows, as JSON")
    options = parser.parse_args()
    tests = options.tests or [f"tests/test_{name}.py" for name in TESTS]
    rows = []
    for python in options.python:
        for torch in options.torch:
            rows.append(attempt(python, torch, tests))
            print(f"Python {python}, torch {torch}: {rows[-1]['said']}", flush=True)
    if options.out:
        made = {"machine": results.machine("cpu"), "versions": results.versions()}
        command = " ".join(["python", "benchmarks/matrix.py", *sys.argv[1:]])
        values = {"command": results.without_paths(command), **made, "tests": tests, "rows": rows}
        results.write(options.out, json.dumps(values, indent=1, ensure_ascii=False) + "\n")
    return int(any(str(row["said"]).startswith("fails") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
