"""docs/networks.md: what of real and of random networks can be pruned."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

#: Heads and rows → a table; a file, machine, versions, command → where it comes from. As `tables` has them.
Table = Callable[[Sequence[str], Iterable[Sequence[str]]], str]
Made = Callable[[Path, dict[str, Any], dict[str, str], str], str]

HEAD = """# Which networks

Written by `python benchmarks/tables.py` from the files in `results/`, not by hand. Random weights throughout.

## Stock models

*MACs in groups*: share of all MACs that some layer group can lower. *Least*: what is left if every layer group keeps
one structure. *Refused*: layers that keep their width, each with a reason (`decay-pruning inspect` or the result file).
*Half removed*: every second structure of every layer group is cut out at once, and the output is proven to be the same
function. Seconds on one thread: a *forward* pass, the *trace* alone, torch-pruning's graph with one prune (*TP*), and
*building* the pruner's graph with all proofs, which torch-pruning does not have.
"""


def page(files: Mapping[Path, dict[str, Any]], table: Table, made: Made) -> str:
    """The whole page; empty where there are no such files."""
    parts = [HEAD] if files else []
    for path, values in files.items():
        said = made(path, values["machine"], values["versions"], values["command"])
        parts.append(f"{said}\n\n{(_coverage if 'models' in values else _fuzz)(values, table)}")
    return "\n\n".join(part.strip() for part in parts) + "\n" if parts else ""


def _coverage(values: dict[str, Any], table: Table) -> str:
    models: dict[str, dict[str, Any]] = values["models"]
    good = {name: one for name, one in models.items() if "error" not in one}
    ratio = [one["peer"] / one["traced"] for one in good.values() if isinstance(one.get("peer"), float)]
    seconds = [one["searched"] for one in good.values()]
    whole = sum(one["removed"] is True for one in good.values())
    said = (
        f"{len(models)} models: {len(good)} can be pruned, {whole} of them by every second structure at once."
    )
    if ratio:
        said += (
            f" In the median torch-pruning's graph and prune take {statistics.median(ratio):.1f} times as long as "
            f"the trace ({len(ratio)} models that it prunes); building with proofs takes "
            f"{statistics.median(seconds):.1f} s."
        )
    columns = "model, MACs in groups %, least %, refused, half removed, forward s, trace s, TP s, building s"
    return said + "\n\n" + table(columns.split(", "), [_row(name, one) for name, one in models.items()])


def _row(name: str, one: dict[str, Any]) -> list[str]:
    if "error" in one:
        return [f"`{name}`", *[""] * 2, one["error"].replace("|", "\\|"), *[""] * 5]
    peer = one.get("peer")
    return [
        f"`{name}`",
        f"{100 * one['share']:.0f}",
        f"{100 * one['least']:.0f}",
        str(len(one["unprunable"])),
        "yes" if one["removed"] is True else str(one["removed"]),
        *(f"{one[key]:.2f}" for key in ("forward", "traced")),
        f"{peer:.2f}"
        if isinstance(peer, float)
        else "fails"
        if peer and "not done" not in peer
        else "not done",
        f"{one['searched']:.1f}",
    ]


def _fuzz(values: dict[str, Any], table: Table) -> str:
    verdicts = values["verdicts"]
    seconds = values["seconds"]
    said = f"""## Random networks

{values["networks"]} generated networks (`tests/random_nets.py`), each pruned and compared with the original code with
zeros, on inputs that the library has not seen. *Wrong*: they differ. *Late*: offered, and refused at the removal.
*Raw*: an exception that is none of the library's. *Touched*: the model is changed by building the graph. *Hanging*:
longer than the limit. Seconds: {seconds["median"]:.1f} in the median, {seconds["longest"]:.1f} at most."""
    kinds = ["pruned", "refused", "wrong", "late", "raw", "touched", "hanging"]
    return said + "\n\n" + table(["", *kinds], [["networks", *(str(verdicts.get(k, 0)) for k in kinds)]])
