"""Try settings on a recipe: variations × seeds from the same dense starts, several processes side by side.

    python benchmarks/search.py recipes/digits.toml --grid smooth --seeds 0 1 2 --jobs 2 --out search.json

Seeds and data of a search are not those of a final table: search on a validation split
(`--set data.validation=0.1`) and report on other seeds. Finished runs are kept, so a stopped search goes on.
"""

from __future__ import annotations

import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from trials import made, options

from decay_pruning import rectify
from decay_pruning.lab import compare, parallel, recipe, results
from decay_pruning.lab.parallel import Chain
from decay_pruning.resistance import Resistance

#: variation → (arm, assignments)
Grid = dict[str, tuple[str, list[str]]]

LARGE_PICKS = ["prune.host.share=0.25", "prune.host.tick=60", "prune.smooth.steps=60"]
#: What SR has to mend.
RANKINGS = {
    "default": [],
    "magnitude": [
        "prune.host.importance=magnitude",
        "prune.host.normalizer=none",
        "prune.host.reduction=mean",
    ],
    "magnitude / mean": ["prune.host.importance=magnitude"],
    "Taylor / mean": ["prune.host.importance=taylor"],
    "local magnitude": ["prune.host.importance=magnitude", "prune.host.scope=local"],
}
#: One step, or a decay under Gate Decorator.
FADING: Grid = {
    "single": ("single", []),
    "gates, in tick": ("sp", []),
    "all, in tick": ("sp", ["prune.smooth.slices=all"]),
    "all, in own": ("sp", ["prune.smooth.slices=all", "prune.host.decay_in=own"]),
}

GRIDS: dict[str, Grid] = {
    "arms": {arm: (arm, []) for arm in results.ARMS},
    "ranking": {  # what one-step pruning costs under each ranking: importance, normalizer, price
        f"{importance}, {normalizer}, per {per}": (
            "single",
            [
                f"prune.host.importance={importance}",
                f"prune.host.normalizer={normalizer}",
                "prune.host.reduction=mean",
                f"prune.host.per={per}",
            ],
        )
        for per in ("structure", "macs")
        for normalizer in ("none", "mean")
        for importance in ("magnitude", "magnitude-l1", "taylor", "fpgm", "lamp", "bn-scale")
    },
    "ranking-few": {  # those that CREPE leaves to choose from
        f"{importance}, {normalizer}, per structure": (
            "single",
            [
                f"prune.host.importance={importance}",
                f"prune.host.normalizer={normalizer}",
                "prune.host.reduction=mean",
            ],
        )
        for normalizer in ("none", "mean")
        for importance in ("magnitude", "magnitude-l1", "taylor", "lamp")
    },
    "ranking-sum": {  # the same, with layers added up
        f"{importance}, {normalizer}, sum over layers": (
            "single",
            [
                f"prune.host.importance={importance}",
                f"prune.host.normalizer={normalizer}",
                "prune.host.reduction=sum",
            ],
        )
        for normalizer in ("none", "mean")
        for importance in ("magnitude", "magnitude-l1")
    },
    "hard": {  # where one-step pruning costs something: a smaller budget, less training
        f"{arm}, {macs} of the MACs in {epochs} epochs": (
            arm,
            [f"prune.target.macs={macs}", f"prune.epochs={epochs}"],
        )
        for macs in (0.2, 0.1)
        for epochs in (2, 4, 8)
        for arm in ("single", "sp", "sr")
    },
    "shares": {  # SR by an exchange, against a fixed share, under rankings that leave much or little to mend
        f"{name}: {words}": (arm, [*ranking, *extra])
        for name, ranking in RANKINGS.items()
        for words, arm, extra in (
            ("sp", "sp", []),
            *(
                (f"sr, margin {m}", "sr", ["prune.rectify.criterion=worth", f"prune.rectify.margin={m}"])
                for m in (1, 4)
            ),
            *(
                (
                    f"sr, {share:.0%}",
                    "sr",
                    ["prune.rectify.criterion=first_order", f"prune.rectify.max_share={share}"],
                )
                for share in (0.05, 0.15, 0.3)
            ),
        )
    },
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
                (0.0, 1.0, 0.05),
                (0.0, 1.0, 0.15),
                (0.0, 1.0, 1.0),
                (0.0, 2.0, 1.0),
                (0.1, 1.0, 1.0),
            )
        },
    },
    "rate": {  # is the learning rate high enough for the rest to adapt while structures fade?
        f"{arm}, learning rate {lr}": (arm, [f"prune.lr={lr}"])
        for lr in (0.01, 0.03, 0.1)
        for arm in ("single", "sp")
    },
    "length": {  # N against the training that is left: set prune.epochs
        "single": ("single", []),
        **{f"N = {n}": ("sp", [f"prune.smooth.steps={n}"]) for n in (0.05, 0.1, 0.2, 0.35, 0.5)},
    },
    "criteria": {  # by what the structures to release are chosen; docs/rectifying.md
        "single": ("single", []),
        "sp": ("sp", []),
        "sr, largest |<g, w>|": ("sr", ["prune.rectify.criterion=first_order"]),
        "sr, outward > 0.02 and regrowth > 0.01": ("sr", ["prune.rectify.criterion=outward_and_regrowth"]),
        "sr, the paper's criteria": ("sr", ["prune.rectify.criterion=rate_and_len"]),
        "sr, at random": ("sr", ["prune.rectify.criterion=random"]),
        "sp, without the first stream": ("sp", ['prune.host.ignored=["conv1"]']),  # which SR releases
    },
    "verdict": {  # when SR judges, on which average, how many go, and what becomes of them
        "single": ("single", []),
        "sp": ("sp", []),
        "sr": ("sr", []),
        **{
            f"sr, {', '.join(f'{k} = {v}' for k, v in changes.items())}": (
                "sr",
                [f"prune.rectify.{k}={v}" for k, v in changes.items()],
            )
            for changes in (
                {"judge_from": 0.25},
                {"judge_from": 0.75},
                {"max_share": 0.02},
                {"max_share": 0.15},
                {"judge_from": 0.25, "max_share": 0.15},
                {"average": 0.9},
                {"retries": 2},
                {"retries": 2, "cooldown": 3},
            )
        },
    },
    "rounds": {  # one pick for the whole target, or several; those of single lie as far apart as those of SP
        "single": ("single", []),
        "sp": ("sp", []),
        "sr": ("sr", []),
        **{
            f"{arm}, {rounds} rounds": (
                arm,
                [f"prune.host.rounds={rounds}"]
                + ([f"prune.host.interval={140 // rounds}"] if arm == "single" else []),
            )
            for rounds in (4,)
            for arm in ("single", "sp", "sr")
        },
    },
    "pull": {  # λ of OTOv2: strong enough that structures come to the half-space before the deadline?
        f"{arm}, λ = {lam}": (arm, [f"prune.host.lam={lam}"])
        for lam in (0.02, 0.05, 0.1, 0.2)
        for arm in ("single", "sp")
    },
    "starts": {  # of a decay under OTOv2
        "single": ("single", []),
        **{
            f"{arm}, {start}": (arm, [f"prune.host.decay_from={start}"])
            for arm in ("sp", "sr")
            for start in ("half-space", "partition")
        },
    },
    "streams": {  # OTOv2 when the residual streams of a CIFAR ResNet keep their width
        f"{arm}, streams kept": (
            arm.split(",")[0],
            [
                'prune.host.ignored=["conv1","layer2.0.conv2","layer3.0.conv2"]',
                f"prune.host.decay_from={'partition' if 'partition' in arm else 'half-space'}",
            ],
        )
        for arm in ("single", "sp, half-space", "sp, partition")
    },
    "gates": {  # where a decay runs under Gate Decorator
        "single": ("single", []),
        **{
            f"{slices}, in {place}": ("sp", [f"prune.smooth.slices={slices}", f"prune.host.decay_in={place}"])
            for slices in ("gates", "all")
            for place in ("tick", "own")
        },
    },
    "large-picks": {  # Gate Decorator when it prunes a quarter of the gates at a time: is there a cliff then?
        f"{name}, large picks": (arm, [*LARGE_PICKS, *extra]) for name, (arm, extra) in FADING.items()
    },
    "large-picks-fast": {  # the same where Ticks and decays have the highest learning rate: can more adapt?
        f"{name}, large picks at 0.03": (arm, [*LARGE_PICKS, "prune.host.lr_min=0.03", *extra])
        for name, (arm, extra) in FADING.items()
    },
}


def at_random(seen: Resistance, settings: rectify.SelfRectifying) -> torch.Tensor:
    """What a criterion has to beat: as many released structures, drawn by chance."""
    return torch.rand(seen.c_rate.shape, device=seen.c_rate.device)


def job(path: str, assignments: list[str], arm: str, seed: int, starts: Path) -> dict[str, Any]:
    """One run, in a process of its own."""
    rectify.CRITERIA["random"] = at_random
    run = compare.run_from(recipe.load(path, assignments), arm, seed, starts)
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
        "seconds": run.seconds,
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
    parser = options(__doc__)
    parser.add_argument("--grid", choices=list(GRIDS), nargs="+", default=["smooth", "rectify"])
    parser.add_argument("--minutes", type=float, default=1e9, help="start no new run after this long")
    args = parser.parse_args()
    begin = time.monotonic()
    settings = recipe.load(args.recipe, args.assignments)
    saved = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    grid = {name: v for g in args.grid for name, v in GRIDS[g].items()}
    done = {(row["variation"], row["seed"]) for row in saved}
    rows = list(saved)

    def save() -> None:
        results.write(args.out, json.dumps({**made(args, settings, "grid"), "rows": rows}, indent=1))

    starts = args.work / "starts"
    names: dict[Any, str] = {}
    chains = []
    for seed in args.seeds:
        runs = []
        for name, (arm, extra) in grid.items():
            if (name, seed) not in done:
                runs.append(partial(job, args.recipe, [*args.assignments, *extra], arm, seed, starts))
                names[runs[-1]] = name
        chains.append(Chain(partial(compare.make_start, settings, seed, starts), runs))
    for call, outcome in parallel.run(chains, args.jobs):
        if isinstance(outcome, BaseException):
            print(f"{names[call]}: {outcome}", flush=True)
        else:
            rows.append({"variation": names[call], **outcome})
            save()
        if time.monotonic() - begin > 60 * args.minutes:
            break
    print(table(rows))


if __name__ == "__main__":
    main()
