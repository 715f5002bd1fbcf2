"""What SP and SR gain, by how long training goes on: a picture and a table for the README."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from decay_pruning.lab.plot import Frame, style, svg, text, ticks
from decay_pruning.lab.results import Result, summarise

NAMES = {"single": "one step", "sp": "SP", "sr": "SP + SR"}
_WIDTH, _HEIGHT, _PAD, _TOP = 620, 250, 46, 84


def steps(result: Result) -> int:
    """Optimizer steps from the dense start on."""
    return max(run.steps for run in result.runs)


def picture(found: Sequence[Result]) -> str:
    """Accuracy over the steps that are left, one line for each arm, a band from the worst seed to the best."""
    found = sorted(found, key=steps)
    at = [math.log(steps(result)) for result in found]
    seen = {arm: [[r.accuracy for r in one.runs if r.arm == arm] for one in found] for arm in NAMES}
    values = [v for arm in seen.values() for seeds in arm for v in seeds]
    levels = ticks(min(values), max(values))
    frame = Frame(_PAD + 24, _TOP, _WIDTH - 2 * _PAD - 80, _HEIGHT, (at[0], at[-1]), (levels[0], levels[-1]))
    metric = found[0].metric.name
    body = [
        f"<style>{style('svg')}</style>",
        f'<rect width="{_WIDTH}" height="{_TOP + _HEIGHT + 56}" rx="10" style="fill:var(--bg)"/>',
        text(
            _PAD - 22,
            34,
            f"{metric[:1].upper()}{metric[1:]} after pruning to a quarter of the MACs",
            "head big",
        ),
        text(_PAD - 22, 54, "by optimizer steps that are left; bands: worst to best seed", "sub"),
        frame.axes("", y_ticks=levels),
    ]
    for x, result in zip(at, found, strict=True):
        place, _ = frame.at((x, levels[0]))
        body.append(text(place, _TOP + _HEIGHT + 18, f"{steps(result):,} steps", "num mid"))
    places: list[tuple[float, str]] = []
    for arm, points in seen.items():
        mean = [(x, statistics.fmean(seeds)) for x, seeds in zip(at, points, strict=True)]
        low = [(x, min(seeds)) for x, seeds in zip(at, points, strict=True)]
        high = [(x, max(seeds)) for x, seeds in zip(at, points, strict=True)]
        body.append(frame.band(low, high, arm) + frame.line(mean, "line", arm))
        body += [frame.dot(point, arm) for point in mean]
        places.append((frame.at(mean[-1])[1], arm))
    last = -math.inf
    for y, arm in sorted(places):
        last = max(y, last + 15)
        body.append(text(frame.x + frame.width + 12, last + 4, NAMES[arm], "big", arm))
    height = _TOP + _HEIGHT + 56
    size = f'xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}"'
    said = f"{metric} of {', '.join(NAMES.values())} by training steps that are left"
    return svg(_WIDTH, height, "".join(body), said, attributes=size) + "\n"


def rows(found: Iterable[Result]) -> list[list[str]]:
    """One row for each length and arm."""
    lines = []
    for result in sorted(found, key=steps):
        for k, s in enumerate(s for s in summarise(result) if s.arm in NAMES):
            lines.append(
                [
                    f"{steps(result):,}" if not k else "",
                    NAMES[s.arm],
                    s.accuracy.show(),
                    s.difference.show() if s.difference else "—",
                    f"{s.removed.mean:.1f}" if s.removed else "—",
                    f"{s.macs.mean:.3g}",
                ]
            )
    return lines


def first_screen(
    found: dict[Path, Result], table: Callable[..., str], link: Callable[..., str], where: str
) -> str:
    """The README's table, and what it was made with."""
    some = next(iter(found.values()))
    metric = some.metric.name
    head = ["steps left", "", f"{metric}, %", "against one step [95 %]", "just after removal, %", "MACs, %"]
    seeds = {
        path: f"{link(path, f'{steps(r):,} steps', up='')} ({len(r.seeds)} seeds)"
        for path, r in found.items()
    }
    dense = [s.accuracy.mean for r in found.values() for s in summarise(r) if s.arm == "dense"]
    said = f"CREPE tiny, a pretrained pitch tracker; DepGraph, default settings. Mean ± standard deviation of {metric}"
    said += f"; unpruned and trained on for as long: {dense[0]:.1f} %. " if dense else ". "
    return f"{table(head, rows(found.values()), left=2)}\n\n{said}{', '.join(seeds.values())}. {where}."
