"""What the benchmarks that train share: their options, and what a result says of how it was made."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from decay_pruning.lab import results
from decay_pruning.lab.recipe import Recipe


def options(about: str | None, jobs: int | None = 2) -> argparse.ArgumentParser:
    """A recipe with changes, seeds, and where results and dense starts go."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--set", dest="assignments", nargs="+", action="extend", default=[])
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101, 102])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/search"), help="folder for dense starts")
    if jobs is not None:
        parser.add_argument("--jobs", type=int, default=jobs, help="runs side by side")
    return parser


def made(args: argparse.Namespace, settings: Recipe, *own: str, device: str = "") -> dict[str, Any]:
    """Command, versions, machine and recipe.

    Args:
        args: of `options`; where the data and the dense starts lie is left out of the command.
        settings: the recipe as it was changed.
        own: names of further options that belong into the command.
        device: where it ran, if not where the recipe says.
    """
    words = ["python", f"benchmarks/{Path(sys.argv[0]).name}", args.recipe]
    words += [f"--set {a}" for a in args.assignments if not a.startswith("data.root")]
    for name in ("seeds", *own, *(["jobs"] if "jobs" in args else []), "out"):
        value = getattr(args, name)
        words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    if not device:
        device = "cuda" if torch.cuda.is_available() and settings.device == "auto" else "cpu"
    return {
        "command": " ".join(words),
        "versions": results.versions(),
        "machine": results.machine(device, getattr(args, "jobs", 1)),
        "recipe": results.anonymous(settings.to_dict()),
    }
