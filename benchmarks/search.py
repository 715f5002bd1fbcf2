"""Try settings on a recipe: variations × seeds from the same dense starts, several processes side by side.

    python benchmarks/search.py recipes/digits.toml --grid smooth --seeds 0 1 2 --jobs 2 --out search.json

Seeds and data of a search are not those of a final table: search on a validation split
(`--set data.validation=0.1`) and report on other seeds. Finished runs are kept, so a stopped search goes on.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from decay_pruning import rectify
from decay_pruning.lab import compare, recipe, results

#: variation → (arm, assignments)
Grid = dict[str, tuple[str, list[str]]]

GRIDS: dict[str, Grid] = {
    "arms": {arm: (arm, []) for arm in results.ARMS},
    "smooth": {
        "single": ("single", []),
        **{
            f"{bound}, {slices}": ("sp", [f"prune.smooth.bound={bound}", f"prune.smooth.slices={slices}"])
            for bound in ("slice", "joint")
            for slices in ("all", "norm", "columns", "norm+columns")
        },
        "slice, rows": ("sp", ["prune.smooth.slices=rows"]),
        **{f"N = {n}": ("sp", [f"prune.smooth.steps={n}"]) for n in (0.1, 0.2, 0.5)},
        **{s: ("sp", [f"prune.smooth.schedule={s}"]) for s in ("cosine", "exponential", "polynomial")},
    },
    "rectify": {
        "single": ("single", []),
        "sp": ("sp", []),
        "sp, norm+columns": ("sp", ["prune.smooth.slices=norm+columns"]),
        **{
            f"rate {rate}, len {length}, share {share}": (
                "sr",
                [
                    f"prune.rectify.t_rate={rate}",
                    f"prune.rectify.t_len={length}",
                    f"prune.rectify.max_share={share}",
                ],
            )
            for rate, length, share in (
                (0.0, 0.0, 0.02),
                (0.0, 0.0, 0.05),
                (0.0, 0.0, 0.15),
                (0.02, 0.01, 0.05),
                (0.05, 0.02, 0.15),
            )
        },
    },
    "criteria": {  # by what the structures to release are chosen; docs/rectifying.md
        "single": ("single", []),
        "sp": ("sp", []),
        "sr, C_rate and C_len above their thresholds": ("sr", ["prune.rectify.criterion=rate_and_len"]),
        "sr, largest C_len": ("sr", ["prune.rectify.t_rate=-1", "prune.rectify.t_len=-1e9"]),
        "sr, largest |<g, w>|": ("sr", ["prune.rectify.criterion=first_order"]),
        "sr, largest |<g, w>|, retries 0": (
            "sr",
            ["prune.rectify.criterion=first_order", "prune.rectify.retries=0"],
        ),
        "sr, at random": ("sr", ["prune.rectify.criterion=random"]),
    },
    "starts": {  # of a decay under OTOv2
        "single": ("single", []),
        **{
            f"{arm}, {start}": (arm, [f"prune.host.decay_from={start}"])
            for arm in ("sp", "sr")
            for start in ("half-space", "partition")
        },
    },
    "gates": {  # where a decay runs under Gate Decorator
        "single": ("single", []),
        **{
            f"{slices}, in {place}": ("sp", [f"prune.smooth.slices={slices}", f"prune.host.decay_in={place}"])
            for slices in ("gates", "all")
            for place in ("tick", "own")
        },
    },
}


def at_random(seen: rectify.Resistance, settings: rectify.SelfRectifying) -> torch.Tensor:
    """What a criterion has to beat: as many released structures, drawn by chance."""
    return torch.rand(seen.c_rate.shape, device=seen.c_rate.device)


def job(path: str, assignments: list[str], arm: str, seed: int, out: str) -> dict[str, Any]:
    """One run, in a process of its own."""
    torch.set_num_threads(1)
    rectify.CRITERIA["random"] = at_random
    settings = recipe.load(path, assignments)
    data = settings.data.load()
    start = compare.dense_start(settings, data, seed, Path(out) / "starts")
    if not arm:
        return {}
    begin = time.perf_counter()
    run = compare.run_arm(settings, arm, seed, data, start)
    report = run.report or {}
    return {
        "seed": seed,
        "accuracy": run.accuracy,
        "accuracy_start": run.accuracy_start,
        "accuracy_removed": run.accuracy_removed,
        "macs": run.macs,
        "params": run.params,
        "picked": report.get("picked"),
        "released": report.get("released"),
        "rounds": report.get("rounds"),
        "seconds": round(time.perf_counter() - begin, 1),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Mean accuracy, and paired difference to `single`, best first."""
    by: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        by.setdefault(row["variation"], {})[row["seed"]] = row
    single = by.get("single", {})
    lines = []
    for name, runs in by.items():
        accuracy = statistics.mean(r["accuracy"] for r in runs.values())
        gains = [r["accuracy"] - single[s]["accuracy"] for s, r in runs.items() if s in single]
        spread = statistics.stdev(gains) if len(gains) > 1 else float("nan")
        gain = f"{statistics.mean(gains):+6.2f} ± {spread:4.2f}" if gains else ""
        removed = [r["accuracy_removed"] for r in runs.values() if r["accuracy_removed"] is not None]
        after = f"{statistics.mean(removed):6.2f}" if removed else "      "
        released = [r["released"] for r in runs.values() if r["released"] is not None]
        let_go = f"{statistics.mean(released):6.1f}" if released else ""
        lines.append(
            (accuracy, f"{name:<34} {len(runs)} {accuracy:6.2f}  {gain}   removed {after}  released {let_go}")
        )
    return "\n".join(line for _, line in sorted(lines, reverse=True))


def main() -> None:
    """Run what is missing, write after each run, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("--grid", choices=list(GRIDS), nargs="+", default=["smooth", "rectify"])
    parser.add_argument("--set", dest="assignments", nargs="+", action="extend", default=[])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", default="runs/search", help="folder for dense starts")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no new run after this long")
    args = parser.parse_args()
    begin = time.monotonic()
    settings = recipe.load(args.recipe, args.assignments)
    saved = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    grid = {name: v for g in args.grid for name, v in GRIDS[g].items()}
    done = {(row["variation"], row["seed"]) for row in saved}
    rows = list(saved)

    def save() -> None:
        shown = " ".join(f"--set {a}" for a in args.assignments if not a.startswith("data.root"))
        head = {
            "command": f"python benchmarks/search.py {args.recipe} --grid {' '.join(args.grid)} {shown} "
            f"--seeds {' '.join(map(str, args.seeds))} --jobs {args.jobs} --out {args.out}",
            "versions": results.versions(),
            "machine": results.machine(
                "cuda" if torch.cuda.is_available() and settings.device == "auto" else "cpu"
            ),
            "recipe": results.anonymous(settings.to_dict()),
        }
        results.write(args.out, json.dumps({**head, "rows": rows}, indent=1))

    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        starts = [pool.submit(job, args.recipe, args.assignments, "", seed, args.work) for seed in args.seeds]
        for future in starts:
            future.result()
        print(f"dense starts ready after {time.monotonic() - begin:.0f} s", flush=True)
        pending = {}
        for seed in args.seeds:
            for name, (arm, extra) in grid.items():
                if (name, seed) not in done:
                    both = [*args.assignments, *extra]
                    pending[pool.submit(job, args.recipe, both, arm, seed, args.work)] = name
        for future in as_completed(pending):
            if future.cancelled():
                continue
            try:
                rows.append({"variation": pending[future], **future.result()})
            except Exception as error:
                print(f"{pending[future]}: {error}", flush=True)
            save()
            if time.monotonic() - begin > 60 * args.minutes:
                for other in pending:
                    other.cancel()
    print(table(rows))


if __name__ == "__main__":
    main()
