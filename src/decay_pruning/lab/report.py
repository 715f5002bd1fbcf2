"""A result as one HTML page that opens offline, and its main figure as an SVG file.

No script, no font and no picture is fetched; charts are drawn by `lab.plot`. The page follows the reader's
light or dark setting and reads on a phone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from itertools import pairwise
from typing import Any, get_args

from decay_pruning.budget import Quantity
from decay_pruning.errors import ConfigError
from decay_pruning.lab.plot import FONT, Frame, Point, colour_of, number, style, svg, text, ticks
from decay_pruning.lab.results import TITLES, Result, Run, Summary, summarise
from decay_pruning.lab.stats import Difference, Spread, signed

#: Size of one panel of the main figure, in pixels.
_WIDTH, _HEIGHT = 340, 424
#: Panels side by side.
_COLUMNS = 3


def render(result: Result) -> str:
    """The whole page.

    Raises:
        ConfigError: the result has no runs.
    """
    _check(result)
    sections = [
        _header(result),
        _table(result),
        _fading(result),
        _charts(result),
        _layers(result),
        _unprunable(result),
        _made(result),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(_title(result))}</title><style>{style(':root')}{_PAGE}</style></head>\n"
        f"<body><main>\n{''.join(sections)}</main></body></html>\n"
    )


def figure(result: Result) -> str:
    """The main figure by itself: a standalone SVG with its own background.

    Raises:
        ConfigError: nothing in the result was pruned.
    """
    _check(result)
    arms = [arm for arm in result.arms if arm != "dense"]
    if not arms:
        raise ConfigError("the figure shows pruned arms; this result has none")
    pad, top, gap = 24, 82, 20
    columns, rows = min(len(arms), _COLUMNS), -(-len(arms) // _COLUMNS)
    width = 2 * pad + columns * (_WIDTH + gap) - gap
    height = top + rows * (_HEIGHT + gap) - gap + 14
    body = [
        f"<style>{style('svg')}</style>",
        f'<rect width="{width}" height="{height}" rx="10" style="fill:var(--bg)"/>',
        text(pad, 36, _title(result), "head big"),
        text(pad, 56, _subtitle(result), "sub"),
    ]
    for i, arm in enumerate(arms):
        x, y = pad + i % _COLUMNS * (_WIDTH + gap), top + i // _COLUMNS * (_HEIGHT + gap)
        body.append(f'<g transform="translate({x} {y})">{_panel(result, arm)}</g>')
    size = f'xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
    return svg(width, height, "".join(body), _spoken(result), attributes=size) + "\n"


# -- the main figure --------------------------------------------------------------------------


def _panel(result: Result, arm: str) -> str:
    """One arm: norms of fading structures above, accuracy below, over the same steps."""
    runs = result.of(arm)
    steps = float(max(run.steps for run in result.runs))
    left, inner = 40, _WIDTH - 50
    x_ticks = _inside(ticks(0, steps, 4), steps)
    norms = Frame(left, 88, inner, 118, (0, steps), (0, 1))
    low, high = _range(result)
    y_ticks = ticks(low, high, 4)
    accuracy = Frame(left, 256, inner, 118, (0, steps), (y_ticks[0], y_ticks[-1]))

    parts = [text(left, 18, TITLES.get(arm, arm), "head", arm), text(left, 40, _story(result, arm), "sub")]
    parts.append(norms.axes(_caption(runs[0]), y_ticks=(0, 0.5, 1)))
    lines = {}
    for line in runs[0].lines:  # those that look alike are drawn once
        shape = tuple((step, round(left_of_it, 2)) for step, left_of_it in line.points)
        lines[line.end == "released", shape] = line.points
    for (released, _), points in sorted(lines.items()):
        alone = len(lines) == 1
        parts.append(norms.line(points, "line" if alone else "thin", "released" if released else arm))
        parts.append(norms.area(points, arm) if alone else "")
        parts.append(norms.dot(points[-1], "released", 3) if released else "")
    released_count = (runs[0].report or {}).get("released", 0)
    if released_count:
        x = norms.x + norms.width
        parts.append(text(x, norms.y + 14, f"● {released_count:,} released", "sub end", "released"))

    parts.append(
        accuracy.axes(f"test {result.metric.word}{result.metric.of}", y_ticks=y_ticks, x_ticks=x_ticks)
    )
    for other in result.arms:
        if other != arm:
            kind = "ghost dash" if other == "dense" else "ghost"
            parts.append(accuracy.line(_mean(result.of(other)), kind, "dense"))
    curves = [_accuracy(run) for run in runs]
    at = sorted({x for curve in curves for x, _ in curve})
    values = [[_interpolate(curve, x) for curve in curves] for x in at]
    if len(curves) > 1:
        lowest = [(x, min(v)) for x, v in zip(at, values, strict=True)]
        highest = [(x, max(v)) for x, v in zip(at, values, strict=True)]
        parts.append(accuracy.band(lowest, highest, arm))
    mean = [(x, sum(v) / len(v)) for x, v in zip(at, values, strict=True)]
    parts.append(accuracy.line(mean, "line", arm))
    parts.append(accuracy.dot(mean[-1], arm))
    parts.append(text(left + inner / 2, _HEIGHT - 8, "optimizer steps from the dense start", "mid"))
    return "".join(parts)


def _story(result: Result, arm: str) -> str:
    runs, show = result.of(arm), result.metric.show
    final = f"{show(sum(run.accuracy for run in runs) / len(runs))} at the end"
    removed = [run.accuracy_removed for run in runs if run.accuracy_removed is not None]
    return f"{show(sum(removed) / len(removed), 1)} just after removal, {final}" if removed else final


def _caption(run: Run) -> str:
    """What the upper chart of a panel shows: "norm of 47 picks, N = 110"."""
    picked = (run.report or {}).get("picked", len(run.lines))
    decays = sorted(
        round(line.points[-1][0] - line.points[0][0]) for line in run.lines if line.end == "removed"
    )
    if not decays:
        return f"norm of {picked:,} picks"
    same = decays[0] == decays[-1]
    return f"norm of {picked:,} picks, N = {decays[0]}" + ("" if same else f"–{decays[-1]}")


def _accuracy(run: Run) -> list[Point]:
    measured = {0.0: run.accuracy_start}
    measured |= {
        float(row["step"]): float(row["accuracy"]) for row in run.rows if row.get("accuracy") is not None
    }
    return sorted(measured.items())


def _mean(runs: Sequence[Run]) -> list[Point]:
    curves = [_accuracy(run) for run in runs]
    at = sorted({x for curve in curves for x, _ in curve})
    return [(x, sum(_interpolate(curve, x) for curve in curves) / len(curves)) for x in at]


def _interpolate(curve: Sequence[Point], x: float) -> float:
    if x <= curve[0][0]:
        return curve[0][1]
    for (x0, y0), (x1, y1) in pairwise(curve):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return curve[-1][1]


def _range(result: Result) -> Point:
    values = [y for run in result.runs for _, y in _accuracy(run)]
    return min(values), max(values)


def _inside(values: Sequence[float], most: float) -> list[float]:
    return [v for v in values if v <= most]


def _spoken(result: Result) -> str:
    told = "; ".join(f"{TITLES.get(arm, arm)}: {_story(result, arm)}" for arm in result.arms)
    return f"{_title(result)}. Norms of fading structures and test {result.metric.word} over optimizer steps. {told}."


# -- sections of the page --------------------------------------------------------------------------


def _title(result: Result) -> str:
    recipe = result.recipe
    return str(recipe.get("title") or recipe.get("name") or "Decay pruning")


def _subtitle(result: Result) -> str:
    given = result.recipe.get("prune", {}).get("target", {})
    target = {name: given[name] for name in get_args(Quantity) if given.get(name) is not None}
    words = [str(result.data.get("name", "")), str(result.recipe.get("model", {}).get("name", ""))]
    words += [
        f"{share if isinstance(share, str) else f'{100 * share:.4g} %'} of {_of(what)} to keep"
        for what, share in target.items()
    ]
    seeds = len(result.seeds)
    words.append("1 seed" if seeds == 1 else f"{seeds} seeds, shaded from lowest to highest")
    return " · ".join(word for word in words if word)


def _of(what: str) -> str:
    return {"macs": "MACs", "params": "parameters"}.get(what, what)


def _header(result: Result) -> str:
    note = result.data.get("note", "")
    return (
        f"<header><h1>{escape(_title(result))}</h1><p class=lead>{escape(_subtitle(result))}</p>"
        f"<p class=note>{escape(str(note))}</p></header>\n"
    )


def _table(result: Result) -> str:
    rows = "".join(_table_row(summary) for summary in summarise(result))
    single = (
        " “Against one step” is the mean of the differences within each seed, with their 95 % t interval; it "
        "is bold where the interval leaves zero out."
        if "single" in result.arms and len(result.arms) > 1
        else ""
    )
    spread = (
        "Mean ± standard deviation over seeds." if len(result.seeds) > 1 else "One seed: no spread is known."
    )
    metric = result.metric
    points = "points" if metric.unit == "%" else metric.unit
    unit, end = escape(metric.of), f"{escape(metric.title)} at the end"
    better = "" if metric.higher_is_better else f" Lower {escape(metric.word)} is better."
    return (
        "<section><h2>What came out</h2>"
        "<div class=scroll tabindex=0 role=region aria-label='Table of arms'><table>"
        f"<thead><tr><th scope=col>Arm<th scope=col>{end}{unit}"
        f"<th scope=col>Against one step{escape(f', {points}' if points else '')}"
        f"<th scope=col>Just after removal{unit}<th scope=col>MACs kept, %<th scope=col>Parameters kept, %"
        "<th scope=col>Latency, ms<th scope=col>Released</tr></thead>"
        f"<tbody>{rows}</tbody></table></div><p class=note>{spread} All arms of a seed start from the same "
        f"dense model, see the same {_samples(result)} in the same order, and take the same number of steps; "
        f"{escape(metric.word)} is that of the last step, never of the best.{better}{single}</p></section>\n"
    )


def _samples(result: Result) -> str:
    return "samples" if ":" in str(result.recipe.get("data", {}).get("name", "")) else "images"


def _table_row(s: Summary) -> str:
    faster = f" <span class=note>×{s.speedup:.2f}</span>" if s.arm != "dense" else ""
    cells = [
        _spread(s.accuracy, 2),
        _difference(s.difference),
        _spread(s.removed, 1) if s.removed else "—",
        _spread(s.macs, 1),
        _spread(s.params, 1),
        f"{s.latency.mean:.3g}{faster}",
        f"{s.released:.3g} <span class=note>of {s.picked:.3g}</span>" if s.picked else "—",
    ]
    key, arm = f'<span class=key style="--c:{colour_of(s.arm)}"></span>', escape(TITLES.get(s.arm, s.arm))
    head = f"<th scope=row><span>{key}{arm}</span> <code>{escape(s.arm)}</code>"
    return f"<tr>{head}" + "".join(f"<td>{cell}" for cell in cells) + "</tr>"


def _spread(s: Spread, digits: int) -> str:
    around = f" <span class=note>± {s.sd:.{digits}f}</span>" if s.sd is not None else ""
    return f"{s.mean:.{digits}f}{around}"


def _difference(d: Difference | None) -> str:
    if d is None:
        return "—"
    mean = signed(d.mean)
    if d.low is None or d.high is None:
        return mean
    interval = f"[{signed(d.low)}, {signed(d.high)}]"
    return f"{f'<b>{mean}</b>' if d.clear else mean} <span class=note>{interval}</span>"


def _fading(result: Result) -> str:
    arms = [arm for arm in result.arms if arm != "dense"]
    if not arms:
        return ""
    panels = ""
    for arm in arms:
        name = f"{TITLES.get(arm, arm)}: {_story(result, arm)}"
        panels += f"<figure>{svg(_WIDTH, _HEIGHT, _panel(result, arm), name)}</figure>"
    ghosts = " Grey: the other arms" + (" (dashed: not pruned)." if "dense" in result.arms else ".")
    shown = f" Norms are those of seed {result.seeds[0]}" + (
        ", a sample of its structures." if any(len(r.lines) > 40 for r in result.runs) else "."
    )
    return (
        f"<section><h2>How structures fade, and what it does to {escape(result.metric.word)}</h2>"
        f"<div class=panels>{panels}</div>"
        f"<p class=note>{'' if len(result.arms) == 1 else ghosts.strip()}{shown} "
        "1 is the norm at the pick.</p>"
        "</section>\n"
    )


def _charts(result: Result) -> str:
    charts = [_macs(result)]
    if len(result.seeds) > 1 and len(result.arms) > 1:
        charts.insert(0, _seeds(result))
    figures = "".join(f"<figure>{chart}</figure>" for chart in charts if chart)
    return f"<section><div class=panels>{figures}</div></section>\n" if figures else ""


def _seeds(result: Result) -> str:
    """Each seed's metric in every arm, joined by a line."""
    arms = result.arms
    values = [run.accuracy for run in result.runs]
    y_ticks = ticks(min(values), max(values), 4)
    many = len(arms) > 4  # then their names stand on two lines, by turns
    frame = Frame(48, 62, 320 if many else 340, 180, (-0.35, len(arms) - 0.65), (y_ticks[0], y_ticks[-1]))
    parts = [
        text(0, 18, "Every seed", "head big"),
        frame.axes(f"test {result.metric.word} at the end{result.metric.of}", y_ticks=y_ticks),
    ]
    for seed in result.seeds:
        runs = [(float(i), run.accuracy) for i, arm in enumerate(arms) if (run := result.find(arm, seed))]
        parts.append(frame.line(runs, "ghost", "dense"))
        parts += [frame.dot(point, arms[int(point[0])]) for point in runs]
    for i, arm in enumerate(arms):
        x, _ = frame.at((i, y_ticks[0]))
        parts.append(text(x, 278 if many and i % 2 else 262, arm, "mid", arm))
    return svg(
        400,
        296 if many else 280,
        "".join(parts),
        f"Test {result.metric.word} at the end, each seed joined across the arms",
    )


def _macs(result: Result) -> str:
    """MACs over steps: a staircase."""
    pruned = [arm for arm in result.arms if arm != "dense"]
    if not pruned:
        return ""
    steps = float(max(run.steps for run in result.runs))
    frame = Frame(48, 62, 340, 180, (0, steps), (0, 100))
    x_ticks = _inside(ticks(0, steps, 4), steps)
    parts = [text(0, 18, "Size while training", "head big")]
    parts.append(frame.axes("MACs, % of the dense model", y_ticks=(0, 25, 50, 75, 100), x_ticks=x_ticks))
    for i, arm in enumerate(pruned):
        run = result.of(arm)[0]
        points: list[Point] = [(0.0, 100.0)]
        for row in run.rows:
            if "macs" in row:
                share = 100 * float(row["macs"]) / run.macs[0]
                if share != points[-1][1]:
                    points += [(float(row["step"]), points[-1][1]), (float(row["step"]), share)]
        points.append((float(run.steps), points[-1][1]))
        parts.append(frame.line(points, ("line", "line dash", "thin line")[i % 3], arm))
        parts.append(text(48 + 120 * (i % 3), 300 + 18 * (i // 3), arm, "", arm))
    parts.append(text(218, 276, "optimizer steps from the dense start", "mid"))
    height = 292 + 18 * -(-len(pruned) // 3)
    return svg(400, height, "".join(parts), "MACs left of the dense model, over optimizer steps")


def _layers(result: Result) -> str:
    arms = [arm for arm in result.arms if any((run.report or {}).get("widths") for run in result.of(arm))]
    if not arms:
        return ""
    widths = {arm: _widths(result.of(arm)) for arm in arms}
    layers = list(dict.fromkeys(name for by_layer in widths.values() for name in by_layer))
    released = {arm: _released(result.of(arm)) for arm in arms}
    with_releases = [arm for arm in arms if sum(released[arm].values())]
    widest = max((before for by_layer in widths.values() for before, _ in by_layer.values()), default=1)
    most = max((n for arm in with_releases for n in released[arm].values()), default=1) or 1
    rows = []
    for name in layers:
        before = next(widths[arm][name][0] for arm in arms if name in widths[arm])
        cells = [f"<td>{before}"]
        for arm in arms:
            _, after = widths[arm].get(name, (before, float(before)))
            cells.append(
                f"<td>{_bar(before / widest, after / widest, arm)}<span>{number(round(after, 1))}</span>"
            )
        for arm in with_releases:
            n = released[arm].get(name, 0.0)
            cells.append(f"<td>{_bar(0, n / most, 'released')}<span>{number(round(n, 1))}</span>")
        rows.append(f"<tr><th scope=row><code>{escape(name)}</code>{''.join(cells)}</tr>")
    heads = "".join(f"<th scope=col style='color:var(--{arm})'>{escape(arm)}" for arm in arms)
    heads += "".join(
        f"<th scope=col style='color:var(--released)'>released by {escape(arm)}" for arm in with_releases
    )
    many = " many" if len(arms) > 3 else ""
    none = "" if with_releases else " No structure was released."
    return (
        "<section><h2>Layer by layer</h2>"
        "<div class=scroll tabindex=0 role=region aria-label='Table of layers'>"
        f"<table class='layers{many}'><thead><tr><th scope=col>Layer group<th scope=col>Before{heads}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
        "<p class=note>Structures per layer group before and after, mean over seeds; the pale bar is the "
        f"dense width.{none}</p></section>\n"
    )


def _bar(whole: float, part: float, colour: str) -> str:
    return (
        '<svg class=bar viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect width="{100 * whole:.1f}" height="10" fill="var(--grid)"/>'
        f'<rect width="{100 * part:.1f}" height="10" fill="var(--{colour})"/></svg>'
    )


def _widths(runs: Sequence[Run]) -> dict[str, tuple[int, float]]:
    """Layer group → (before, mean after)."""
    found: dict[str, list[tuple[int, int]]] = {}
    for run in runs:
        for name, (before, after) in (run.report or {}).get("widths", {}).items():
            found.setdefault(name, []).append((before, after))
    return {name: (pairs[0][0], sum(a for _, a in pairs) / len(pairs)) for name, pairs in found.items()}


def _released(runs: Sequence[Run]) -> dict[str, float]:
    """Layer group → structures released, mean over runs."""
    total: dict[str, float] = {}
    for run in runs:
        for event in run.events:
            if event["kind"] == "released":
                total[event["group"]] = total.get(event["group"], 0.0) + event["count"] / len(runs)
    return total


def _unprunable(result: Result) -> str:
    reasons: dict[str, str] = {}
    for run in result.runs:
        reasons |= (run.report or {}).get("unprunable", {})
    if not reasons:
        return ""
    items = "".join(f"<li><code>{escape(name)}</code> {escape(reason)}" for name, reason in reasons.items())
    summary = f"<summary>What was never pruned ({len(reasons)})</summary>"
    return f"<section><details>{summary}<ul>{items}</ul></details></section>\n"


def _made(result: Result) -> str:
    machine = ", ".join(f"{key} {value}" for key, value in result.machine.items())
    versions = ", ".join(f"{key} {value}" for key, value in result.versions.items())
    facts = [
        ("Command", f"<code>{escape(result.command)}</code>" if result.command else ""),
        ("Seeds", ", ".join(map(str, result.seeds))),
        ("Machine", escape(machine)),
        ("Versions", escape(versions)),
        ("Begun", escape(result.created)),
        ("Training time", f"{sum(run.seconds for run in result.runs):,.0f} s in {len(result.runs)} runs"),
    ]
    listed = "".join(f"<dt>{name}<dd>{value}" for name, value in facts if value)
    return (
        f"<section><h2>How it was made</h2><dl>{listed}</dl><details><summary>Recipe</summary>"
        f"<pre>{escape(_toml(result.recipe))}</pre></details></section>\n"
        "<footer><p class=note>Decay Pruning Method: Yang et al., arXiv 2406.03879. The normalisers of C_rate "
        "and C_len are this library's own.</p></footer>"
    )


def _toml(values: dict[str, Any], at: str = "") -> str:
    """Plain values as TOML; settings that are None are left out."""
    lines, sections = [], []
    for key, value in values.items():
        if isinstance(value, dict):
            name = f"{at}.{key}" if at else key
            inner = _toml(value, name)
            direct = any(not isinstance(v, dict) and v is not None for v in value.values())
            sections.append((f"\n[{name}]\n" if direct else "") + inner)
        elif value is not None:
            lines.append(f"{key} = {json.dumps(value, ensure_ascii=False)}\n")
    return "".join(lines + sections)


def _check(result: Result) -> None:
    if not result.runs:
        raise ConfigError("the result has no finished run yet: nothing to report")


_PAGE = (
    """
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--text);font:16px/1.55 """
    + FONT
    + """}
main{max-width:1140px;margin:0 auto;padding:2.2rem 1.2rem 3rem}
h1{font-size:clamp(1.5rem,4vw,2.1rem);line-height:1.2;margin:0 0 .4rem;letter-spacing:-.015em;
text-wrap:balance}
h2{font-size:1.2rem;margin:0 0 .9rem;letter-spacing:-.01em}
p{margin:.3rem 0;max-width:48rem}
.lead{color:var(--text)}
.note{color:var(--muted);font-size:.875rem;font-weight:400}
section{margin-top:2.6rem}
.panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,310px),1fr));gap:1.6rem 1.4rem}
.panels:has(>:nth-child(2):last-child){grid-template-columns:repeat(auto-fit,minmax(min(100%,340px),460px))}
figure{margin:0}
figure svg{display:block;width:100%;max-width:460px;height:auto}
.scroll{overflow-x:auto;margin:0 -1.2rem;padding:0 1.2rem}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.5rem .7rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--grid)}
thead th{font-size:.82rem;font-weight:550;color:var(--muted);white-space:normal;
vertical-align:bottom;line-height:1.3}
tbody th{font-weight:550;text-align:left;white-space:normal}
tbody td{white-space:normal}
tbody th *,tbody td *{white-space:nowrap}
th:first-child{text-align:left;padding-left:0}
.key{display:inline-block;width:.75em;height:.75em;border-radius:50%;background:var(--c,var(--muted));margin-right:.55em}
code,pre{font:.85em/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
th code{color:var(--muted);font-weight:400}
.layers td,.layers th{padding:.22rem .7rem;white-space:nowrap}
.layers{width:auto}
.layers td span{display:inline-block;min-width:2.6em}
.layers tbody th code{color:var(--text)}
.bar{display:inline-block;width:clamp(70px,10vw,130px);height:9px;vertical-align:middle;margin-right:.3rem}
.many .bar{width:44px}
dl{display:grid;grid-template-columns:auto 1fr;gap:.25rem 1.2rem;margin:0 0 1rem;font-size:.92rem}
dt{color:var(--muted)}
dd{margin:0;overflow-wrap:anywhere}
summary{cursor:pointer}
pre{background:var(--surface);padding:1rem;border-radius:8px;overflow-x:auto}
footer{margin-top:2.6rem;border-top:1px solid var(--grid);padding-top:.8rem}
@media print{.scroll{overflow:visible}}
"""
)
