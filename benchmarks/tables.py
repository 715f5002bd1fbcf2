"""Write the pages with results from the files in results/, or check that they are up to date.

    python benchmarks/tables.py
    python benchmarks/tables.py --check      # writes nothing; exit code 1 where a page is stale

No number on these pages is written by hand. A new file in results/ appears by itself; the README shows those
called crepe-*.json, or final-*.json, or digits.json. Whole pages are docs/results-appendix.md and docs/networks.md;
in docs/results.md the tables between its marks.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import curve
import network_tables

from decay_pruning.errors import ConfigError
from decay_pruning.lab import recipe as recipes
from decay_pruning.lab import results
from decay_pruning.lab.results import Result, Summary, summarise
from decay_pruning.lab.stats import Difference, paired, spread

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- table: python benchmarks/tables.py -->", "<!-- end of table -->"

HEAD = """# All tables

Written by `python benchmarks/tables.py` from the files in `results/`, not by hand. What the files do not say by
themselves: [results/README.md](../results/README.md).

- Accuracy is top-1 in percent, that of the last step, never of the best: mean ± standard deviation over seeds.
- *Against `single`* is the mean of the differences within each seed, with its 95 % t interval. Where that holds 0, the
  two are **not distinguishable** on these runs, whatever the means say.
- Arms: `dense` trains on unpruned, `single` prunes in one step as the host alone would, `sp` fades (Smooth Pruning),
  `sr` fades and lets go (with Self-Rectifying); `tp-…` is torch-pruning's own pruning with a fresh optimizer. All arms
  of a seed have the same dense start, data order, steps and learning rates.
- CIFAR-10 is a JPEG export of its images: compare these figures with each other, not with published ones.
"""

SEARCHES = """## Searches

Settings were chosen on these runs, so the best row of a table looks better than it is; their seeds are not those of the
comparisons. *Against `single`* means one step in the same setting where there is one: "sp, 2 rounds" goes against
"single, 2 rounds".
"""

DIAGNOSES = """## What criteria of SR know

The true loss increase of removing each structure, and what criteria say of it. How this was measured, and what
follows: [rectifying.md](rectifying.md).
"""

CAUSES = """## Jumps and stale statistics

From the first pick to the last removal, the loss on 500 images with batch statistics: before, at its highest, and its
largest rise in one optimizer step. Then accuracy with batch-norm's running statistics as they are, and *refreshed* on
5,000 training images.
"""


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table of Markdown; all columns but the first `left` are aligned to the right."""
    lines = [head, ["---"] * left + ["---:"] * (len(head) - left), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def against(d: Difference | None) -> str:
    """A difference to `single`, and whether it can be told from none."""
    if d is None:
        return "—"
    return d.show() + (" (one seed)" if d.low is None else "" if d.clear else ", not distinguishable")


def where(machine: dict[str, Any]) -> str:
    """What it ran on."""
    threads = machine["threads"]
    cpu = f"{machine['processor']}, {threads} thread{'s' * (threads != 1)}"
    return cpu if machine["device"] == "CPU" else str(machine["device"])


def host(values: dict[str, Any]) -> str:
    """The host of a recipe, with what tells apart two comparisons by the same one."""
    chosen = values["prune"]["host"]
    name = {"depgraph": "DepGraph", "otov2": "OTOv2", "gate-decorator": "Gate Decorator"}[chosen["kind"]]
    start = f", from {chosen['decay_from']}" if "decay_from" in chosen else ""
    return name + (", sparse learning" if values["sparse"] else start)


def link(path: Path, text: str = "", up: str = "../") -> str:
    """A link to a file of the repository."""
    return f"[{text or path.name}]({up}{path.parent.name}/{path.name})"


def images(result: Result) -> str:
    """The data set, scaled down or not."""
    size = result.recipe["data"]["size"]
    return str(result.data["name"]) + (f" at {size}×{size}" if size else "")


def tested(values: dict[str, Any]) -> str:
    """Which images accuracy is measured on."""
    return "held-out training images" if values["data"].get("validation") else "test images"


def made(path: Path, machine: dict[str, Any], versions: dict[str, str], command: str) -> str:
    """What a figure can be repeated with."""
    return f"{where(machine)}, torch {versions['torch']}: `{command}`. File: {link(path)}."


def comparison(path: Path, result: Result) -> str:
    """One result of `decay-pruning compare`."""
    values, steps = result.recipe, sorted({run.steps for run in result.runs})
    said = (
        f"{images(result)}: {result.data['note']} {values['model']['name']} by {host(values)}, "
        f"{result.data['train']:,} training images, {result.data['test']:,} {tested(values)}, "
        f"{values['dense']['epochs']:g} epochs to the dense start, {' or '.join(map(str, steps))} steps from there, "
        f"seeds {', '.join(map(str, result.seeds))}. {made(path, result.machine, result.versions, result.command)}"
    )
    head = ["arm", result.metric.name, "against `single`", "just after removal", "MACs kept, %"]
    head += ["parameters kept, %"]
    head += ["latency, dense ÷ pruned", "released", "seeds"]
    title = values["title"] or values["name"]
    return f"### {path.stem}: {title}\n\n{said}\n\n{table(head, map(_arm, summarise(result)))}"


def _arm(s: Summary) -> list[str]:
    pruned = s.arm != "dense"
    return [
        f"`{s.arm}`",
        s.accuracy.show(),
        against(s.difference),
        s.removed.show(1) if s.removed else "—",
        s.macs.show(1) if pruned else "100",
        s.params.show(1) if pruned else "100",
        f"{s.speedup:.2f}" if pruned else "—",
        f"{s.released:.1f} of {s.picked:.1f}" if s.picked else "—",
        str(s.accuracy.n),
    ]


def summary(comparisons: dict[Path, Result]) -> str:
    """The README's table: one row for each host and arm."""
    rows: list[list[str]] = []
    files: dict[str, list[str]] = {}
    for path, result in comparisons.items():
        name, steps = host(result.recipe), max(run.steps for run in result.runs)
        setting = f"{result.recipe['model']['name']}, {images(result)}, {where(result.machine)}"
        file = link(path, f"{name} ({len(result.seeds)} seeds, {steps} steps)", up="")
        files.setdefault(setting, []).append(file)
        for i, s in enumerate(summarise(result)):
            row = [
                "" if i else name,
                f"`{s.arm}`",
                s.accuracy.show(),
                s.difference.show() if s.difference else "—",
            ]
            row += [f"{s.removed.mean:.1f}" if s.removed else "—", f"{s.macs.mean:.3g}"]
            rows.append(row)
    head = ["host", "arm", "top-1, %", "against `single` [95 %]", "just after removal, %", "MACs kept, %"]
    said = ". ".join(f"{setting}: {', '.join(links)}" for setting, links in files.items())
    return f"{table(head, rows, left=2)}\n\nMean ± standard deviation. {said}."


def alone(name: str, names: Iterable[str]) -> str:
    """The one-step pruning that a variation is compared with: that of its setting ("single, 2 rounds"), or any."""
    own = f"single, {name.rpartition(', ')[2]}"
    return "" if name == "single" else own if own in names and name != own else "single"


def search(path: Path, values: dict[str, Any]) -> str:
    """One result of `benchmarks/search.py`, best first."""
    by: dict[str, dict[int, dict[str, Any]]] = {}
    for row in values["rows"]:
        by.setdefault(row["variation"], {})[row["seed"]] = row
    rows = []
    for name, runs in by.items():
        single = by.get(alone(name, by), {})
        common = [seed for seed in runs if seed in single]
        before, after = ([of[seed]["accuracy"] for seed in common] for of in (single, runs))
        accuracy = spread([run["accuracy"] for run in runs.values()])
        cells = [today(name), accuracy.show(), against(paired(before, after) if common else None)]
        cells += [_mean(run["accuracy_removed"] for run in runs.values())]
        cells += [_mean(100 * run["macs"][1] / run["macs"][0] for run in runs.values())]
        cells += [_mean(run["released"] for run in runs.values()), str(len(runs))]
        rows.append((accuracy.mean, cells))
    head = [
        "variation",
        "top-1",
        "against `single`",
        "just after removal",
        "MACs kept, %",
        "released",
        "seeds",
    ]
    said = f"{values['recipe']['title']}, {tested(values['recipe'])}. "
    said += made(path, values["machine"], values["versions"], values["command"])
    ordered = [cells for _, cells in sorted(rows, key=lambda row: -row[0])]
    return f"### {path.stem}\n\n{said}\n\n{table(head, ordered)}"


def _mean(values: Iterable[float | None], digits: int = 1) -> str:
    known = [value for value in values if value is not None]
    return f"{spread(known).mean:.{digits}f}" if known else "—"


#: Criteria of a diagnosis that are shown; the file holds more.
CRITERIA = ["|⟨g, w⟩|", "norm at the pick", "−⟨g, w⟩", "growth ρ", "C_len", "C_rate", "C_rate, per decay"]
CRITERIA += ["regrowth", "outward", "regrowth by the optimizer's own move"]
CRITERIA += [
    "regrowth of norm and columns",
    "regrowth, z in its layer",
    "|⟨g, w⟩|, z in its layer",
    "|⟨g, w⟩| per MAC",
]
CRITERIA += ["rank of host score × rank of |⟨g, w⟩|", "rank of host score × rank of regrowth"]
CRITERIA += ["rank of |⟨g, w⟩| × rank of C_rate", "rank of |⟨g, w⟩| × rank of C_len"]
CRITERIA += ["rank of C_rate × rank of C_len"]
CRITERIA += ["host score at the pick", "chance", "the truth itself", "the truth itself, per MAC"]


#: Until the paper's own criteria were known, others bore their names: what these are called today.
_TODAY = {"update, C_len": "regrowth by the optimizer's own move", "C_rate": "outward", "C_len": "regrowth"}


def today(criterion: str) -> str:
    """A criterion of an old result file in the words of today."""
    for old, new in _TODAY.items():
        criterion = criterion.replace(old, new)
    return criterion


def renamed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a diagnosis in the words of today."""
    old = all(row["criterion"] != "outward" for row in rows)
    return [{**row, "criterion": today(row["criterion"])} for row in rows] if old else rows


def diagnosis(path: Path, values: dict[str, Any]) -> str:
    """One result of `benchmarks/diagnose.py`: what criteria know, thresholds, and whether an exchange pays."""
    rows = renamed(values["rows"])
    said = made(path, values["machine"], values["versions"], values["command"])
    stages = sorted({row["stage"] for row in rows})
    truths = list(dict.fromkeys(row["truth"] for row in rows))

    def all_of(field: str, criterion: str, truth: str, stage: float = 0.5) -> list[float]:
        found = (r for r in rows if (r["criterion"], r["truth"], r["stage"]) == (criterion, truth, stage))
        return [row[field] for row in found if row.get(field) is not None]

    def one(field: str, criterion: str, truth: str, stage: float = 0.5, digits: int = 2) -> str:
        return _mean(all_of(field, criterion, truth, stage), digits)

    def name(criterion: str) -> str:
        return criterion.replace("|", "\\|")

    first, *others = truths
    head = [
        "criterion",
        *(f"{first}, {stage}" for stage in stages),
        "beyond the norm",
        "precision 5 %",
        "15 %",
    ]
    shown = [c for c in CRITERIA if all_of("spearman", c, first)]
    knows = [
        [name(c), *(one("spearman", c, first, stage) for stage in stages)]
        + [one(field, c, first) for field in ("beyond_norm", "precision_0.05", "precision_0.15")]
        + [one("spearman", c, truth) for truth in others]
        for c in shown
    ]
    both = "half of the images against the other half"
    knows.append([both, *(one("spearman", both, first, stage) for stage in stages), "", "", ""])
    knows[-1] += [one("spearman", both, truth) for truth in others]
    limits = list(dict.fromkeys(row["criterion"] for row in rows if "released" in row))
    let_go = [
        [name(c), one("released", c, first, digits=1), one("of", c, first, digits=0)]
        + [one(field, c, first) for field in ("precision", "recall")]
        for c in limits
    ]
    exchange = []
    for c in shown:
        cells = [name(c)]
        for truth in truths:
            nets = [
                a - b
                for a, b in zip(*(all_of(f"{f}_0.05", c, truth) for f in ("saved", "cost")), strict=True)
            ]
            net = spread(nets)
            cells.append(
                f"{net.mean:+.4f}".replace("-", "−") + (f" ± {net.sd:.4f}" if net.sd is not None else "")
            )
        cells += [f"{100 * spread(all_of('won_0.05', c, truth)).mean:.0f} %" for truth in (first, "stage")]
        exchange.append(cells)
    price = [
        [truth, *(one(f"mean_of_{which}", both, truth, digits=4) for which in ("picks", "replacements"))]
        for truth in truths
    ]
    seeds = sorted({row["seed"] for row in rows})
    return "\n\n".join(
        [
            f"### {path.stem}",
            f"{values['recipe']['title']}, {values['recipe']['prune']['host']['scope']} scope, "
            f"{tested(values['recipe'])}, seeds {', '.join(map(str, seeds))}. {said}",
            f"Rank correlation with the truth *{first}* by stage of the decay; at half the decay: what is beyond the "
            "norm, precision (which is recall, too), rank correlation with the other truths.",
            table([*head, *others], knows),
            f"The thresholds at half the decay, against the top 15 % of the truth *{first}*.",
            table(["", "released", "of", "precision", "recall"], let_go),
            "Loss saved less loss paid where the top 5 % by a criterion are released at half the decay and the next in "
            "the host's ranking removed for the same MACs (positive: it pays); and how many are worth more than that.",
            table(["criterion", *truths, f"worth more: {first}", "stage"], exchange),
            "What removing one structure costs, mean.",
            table(["truth", "a pick", "a replacement"], price),
        ]
    )


def together(path: Path, values: dict[str, Any]) -> str:
    """One result of `benchmarks/together.py`."""
    rows, cells = values["rows"], []
    for group in dict.fromkeys(row["group"] for row in rows):
        mine = [row for row in rows if row["group"] == group]
        cells.append([f"`{group}`", str(mine[0]["structures"]), _mean(row["picked"] for row in mine)])
        cells[-1] += [spread([row[key] for row in mine]).show(3) for key in ("together", "one_by_one")]
    said = made(path, values["machine"], values["versions"], values["command"])
    return (
        f"### {path.stem}\n\n{values['recipe']['title']}, {tested(values['recipe'])}. Loss increase where all picks "
        "of a layer group are removed from the dense start at once, and the sum over them of removing each alone. "
        f"{said}\n\n"
        + table(["layer group", "structures", "picked", "together", "one by one, summed"], cells)
    )


def causes(path: Path, values: dict[str, Any]) -> str:
    """One result of `benchmarks/causes.py`."""
    names = {
        "loss_before": "loss before", "loss_highest": "highest", "jump": "largest jump in a step",
        "removed": "just after removal", "removed_refreshed": "refreshed", "end": "at the end",
        "end_refreshed": "refreshed",
    }  # fmt: skip
    cells = []
    for arm in dict.fromkeys(row["arm"] for row in values["rows"]):
        runs = [row for row in values["rows"] if row["arm"] == arm]
        cells.append(
            [f"`{arm}`", *(spread([run[name] for run in runs]).show() for name in names), str(len(runs))]
        )
    said = made(path, values["machine"], values["versions"], values["command"])
    return f"### {path.stem}\n\n{values['recipe']['title']}, {tested(values['recipe'])}. {said}\n\n" + table(
        ["arm", *names.values(), "seeds"], cells
    )


def cost(path: Path, values: dict[str, Any]) -> str:
    """One measurement of time: `benchmarks/step_cost.py`, `otov2_cost.py` or `scaling.py`."""
    said = made(path, values["machine"], values["versions"], values["command"])
    rows = values.get("rows", [])
    if "row" in values:
        row = values["row"]
        said += f" {row['model']}, batch of {row['batch']}."
        head = ["part of a step", "seconds", "share of forward + backward, %"]
        share = {part: 100 * s / row["seconds"]["forward_backward"] for part, s in row["seconds"].items()}
        cells = [[part, f"{s:.4f}", f"{share[part]:.2f}"] for part, s in row["seconds"].items()]
    elif "ratio" in rows[0]:
        said += " Shares of forward + backward, in percent."
        names = {"SP": "sp", "SP + SR": "sp_sr", "SR by exchange, observed": "exchange", "idle": "idle"}
        names["torch-pruning's regulariser"] = "peer"
        parts = {
            title: k for title, k in names.items() if k != "exchange" or any(k in r["ratio"] for r in rows)
        }
        head = ["", "forward + backward, s", *parts]
        cells = [
            [f"{row['model']}, {'×'.join(map(str, row['input']))}", f"{row['forward_backward_s']:.3g}"]
            for row in rows
        ]
        for line, row in zip(cells, rows, strict=True):
            line += [
                f"{100 * row['ratio'][k]:.3f}" if k in row["ratio"] else "not run" for k in parts.values()
            ]
    elif "of_forward_backward" in rows[0]:
        said += " Shares of forward + backward, in percent; in brackets those of SGD's step."
        arms = dict.fromkeys(rows[0]["of_forward_backward"])
        head = ["", "forward + backward, s", *arms]
        cells = [
            [
                f"{row['model']}, {'×'.join(map(str, row['input']))}",
                f"{row['seconds']['forward_backward']:.3g}",
            ]
            + [f"{100 * row['of_forward_backward'][k]:.3f} ({100 * row['of_sgd'][k]:.1f})" for k in arms]
            for row in rows
        ]
    elif "kernels" in rows[0]:
        said += " Milliseconds of one core that a decay adds to a step; arithmetic is next to nothing here."
        row = rows[0]
        head = ["a step of", "ms", "kernels", "copies to or from the device"]
        cells = [
            [part.replace("_", " "), f"{1000 * s:.3f}", str(row["kernels"][part]), str(row["copies"][part])]
            for part, s in row["seconds"].items()
        ]
    elif "kind" in rows[0]:
        said += " Seconds of one core; GB of the whole process."
        seconds = dict.fromkeys(name for row in rows for name in row.get("seconds", {}))
        head = ["model", "structures", "parameters", *seconds, "GB"]
        cells = [
            [row["kind"], f"{row['structures']:,}", f"{row['parameters']:,}"]
            + [f"{row['seconds'][k]:.2f}" if k in row["seconds"] else "" for k in seconds]
            + [f"{row['peak'] / 1e9:.2f}"]
            for row in rows
            if "seconds" in row
        ]
    else:
        head = list(rows[0])
        cells = [
            [f"{row[k]:,}" if isinstance(row[k], int) else f"{row[k]:.4f}" for k in head] for row in rows
        ]
    return f"### {path.stem}\n\n{said}\n\n{table(head, cells)}"


def tried(path: Path, values: dict[str, Any]) -> str:
    """One result of `benchmarks/matrix.py`: Python and torch, and whether the tests pass."""
    rows = values["rows"]
    cells = [[str(row.get(key, "")) for key in ("python", "torch", "said", "passed")] for row in rows]
    tests = ", ".join(f"`{name}`" for name in values["tests"])
    said = made(path, values["machine"], values["versions"], values["command"])
    return f"## Versions\n\n{said} Tests: {tests}.\n\n{table(['Python', 'torch', '', 'tests passed'], cells, left=3)}"


def used(root: Path, files: dict[Path, dict[str, Any]]) -> str:
    """Every recipe, and which results were made with it."""
    rows = []
    for path in sorted((root / "recipes").glob("*.toml")):
        loaded = recipes.load(path)
        runs = [
            f"{link(file)} ({where(values['machine'])}{_changes(loaded.to_dict(), values['recipe'])})"
            for file, values in files.items()
            if values.get("recipe", {}).get("name") == loaded.name
        ]
        rows.append([f"{link(path)}: {loaded.title}", "; ".join(runs) or "not yet run"])
    return table(["recipe", "run on"], rows, left=2)


def _changes(now: dict[str, Any], then: dict[str, Any]) -> str:
    """Which settings of a result are not those of the recipe as it is now."""
    if then["prune"]["host"].get("round_to") == 1:  # the default of its time, and still what it is for MACs
        then = {**then, "prune": {**then["prune"], "host": {**then["prune"]["host"], "round_to": None}}}
    rectify = then["prune"].get("rectify")
    if rectify and "margin" not in rectify and rectify.get("t_rate") is rectify.get("t_len") is None:
        rectify = {**rectify, "criterion": rectify["criterion"] or "first_order"}  # the default of its time
        if rectify.get("max_share") == 0.05:
            rectify["max_share"] = None
        then = {**then, "prune": {**then["prune"], "rectify": rectify}}
    try:
        then = recipes.Recipe.from_dict(then).to_dict()
    except ConfigError:
        return ", with settings that are gone"
    idle = {"name", "title", "device", "data.root", "data.workers", "data.beside", "model.beside", "report"}
    keys = [text.partition(":")[0] for text in results.differences(then, now)]
    keys = [key for key in keys if not {key, key.partition(".")[0]} & idle]
    return f", with another {', '.join(f'`{key}`' for key in keys)}" if keys else ""


def pages(root: Path) -> dict[Path, str]:
    """What the pages should hold."""
    files = {path: json.loads(path.read_text("utf-8")) for path in sorted((root / "results").glob("*.json"))}
    found = {path: results.load(path) for path, values in files.items() if "runs" in values}
    final = {path: result for path, result in found.items() if path.name.startswith("final-")}
    searches = {path: values for path, values in files.items() if path.name.startswith("search-")}
    diagnoses = {path: values for path, values in files.items() if path.name.startswith("diagnose-")}
    reasons = {path: values for path, values in files.items() if path.name.startswith("causes-")}
    joint = {path: values for path, values in files.items() if path.name.startswith("together-")}
    networks = {path: values for path, values in files.items() if path.stem in ("coverage", "fuzz")}
    versions = {path: values for path, values in files.items() if path.stem == "matrix"}
    elsewhere = {
        path for path in files if path.stem in ("transformers", "int8-example", "speedup-cpu")
    }  # on pages of their own
    others = {*found, *searches, *diagnoses, *reasons, *joint, *networks, *versions, *elsewhere}
    costs = {path: values for path, values in files.items() if path not in others}
    parts = [HEAD, "## Comparisons", *(comparison(*each) for each in {**final, **found}.items())]
    parts += [SEARCHES, *(search(*each) for each in searches.items())]
    parts += [DIAGNOSES, *(diagnosis(*each) for each in diagnoses.items())] if diagnoses else []
    parts += [together(*each) for each in joint.items()]
    parts += [CAUSES, *(causes(*each) for each in reasons.items())] if reasons else []
    parts += ["## Costs", *(cost(*each) for each in costs.items())]
    parts += ["## Recipes", used(root, files), *(tried(*each) for each in versions.items())]
    further = {root / "docs" / "networks.md": network_tables.page(networks, table, made)} if networks else {}
    lengths = [root / "results" / f"crepe-{steps}.json" for steps in (250, 500, 1000, 4000)]
    longer = {path: found[path] for path in lengths if path in found}
    shown = final or {path: result for path, result in found.items() if path.name == "digits.json"}
    if longer:
        machine = where(next(iter(longer.values())).machine)
        further[root / "docs" / "longer.svg"] = curve.picture(list(longer.values()))
        table_of_readme = curve.first_screen(longer, table, link, machine)
    else:
        table_of_readme = summary(shown)
    findings = root / "docs" / "results.md"
    if findings.is_file():
        of = {BEGIN: table_of_readme, BEGIN.replace("table:", "hosts:"): summary(shown)}
        further[findings] = filled(
            findings, {k: v.replace("](results/", "](../results/") for k, v in of.items()}
        )
    return {
        **further,
        root / "docs" / "results-appendix.md": "\n\n".join(part.strip() for part in parts) + "\n",
        root / "README.md": filled(root / "README.md", {BEGIN: table_of_readme}),
    }


def filled(page: Path, tables: dict[str, str]) -> str:
    """A page that people wrote, with each table between its marks made anew."""
    text = page.read_text("utf-8")
    for begin, table in tables.items():
        before, found, rest = text.partition(begin)
        _, end, after = rest.partition(END)
        if not found or not end:
            raise ConfigError(f"{page.name} has no lines {begin} and {END}")
        text = f"{before}{begin}\n{table}\n{END}{after}"
    return text


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Write the pages, or say which are stale; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a page is stale")
    check = parser.parse_args(arguments).check
    stale = {p: text for p, text in pages(root).items() if not p.is_file() or p.read_text("utf-8") != text}
    for path, text in stale.items():
        print(
            f"{path.relative_to(root)} {'is stale: run python benchmarks/tables.py' if check else 'written'}"
        )
        if not check:
            results.write(path, text)
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
