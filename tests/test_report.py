"""The report: complete, self-contained, well-formed, and true to the figures."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from typing import Any

import pytest

from decay_pruning.errors import ConfigError
from decay_pruning.lab import plot, report
from decay_pruning.lab.results import ARMS, Line, Result, Run

VOID = {"meta", "br", "hr", "img", "link", "input"}
#: End tags that HTML lets one leave out.
OPTIONAL = {"p", "td", "th", "tr", "li", "dt", "dd"}


def run_of(arm: str, seed: int, accuracy: float, **more: Any) -> Run:
    pruned = arm != "dense"
    macs = 470 if pruned else 1000
    given: dict[str, Any] = {
        "accuracy_start": 97.0,
        "accuracy_removed": 61.25 if pruned else None,
        "macs": (1000, macs),
        "params": (200, 90 if pruned else 200),
        "latency": (0.004, 0.002),
        "steps": 100,
        "seconds": 2.0,
        "rows": [
            {"step": 10, "accuracy": 61.25, "why": "removal", **({"macs": macs} if pruned else {})},
            {"step": 100, "accuracy": accuracy, "why": "end", **({"macs": macs} if pruned else {})},
        ],
        "report": {
            "picked": 3,
            "released": 1 if arm == "sr" else 0,
            "widths": {"layer1.conv<a>": [16, 14], "layer2.conv": [8, 7]},
            "unprunable": {"fc": "feeds the model's output & ends it"},
        }
        if pruned
        else None,
    }
    if pruned:
        given["lines"] = (
            Line("layer1.conv<a>:0", "removed", ((0, 1.0), (5, 0.5), (10, 0.0))),
            Line(
                "layer1.conv<a>:1", "released" if arm == "sr" else "removed", ((0, 1.0), (5, 0.5), (8, 0.4))
            ),
        )
        given["events"] = (
            [{"step": 8, "kind": "released", "group": "layer2.conv", "count": 1}] if arm == "sr" else []
        )
    return Run(arm, seed, accuracy, **{**given, **more})


def result_of(*runs: Run, title: str = "A <net> & its numbers") -> Result:
    recipe = {"title": title, "model": {"name": "net"}, "prune": {"target": {"macs": 0.47, "params": None}}}
    result = Result.new(recipe, {"name": "digits", "note": "Small."}, "decay-pruning compare x.toml", "cpu")
    for run in runs:
        result = result.with_run(run)
    return result


FULL = result_of(
    *[
        run_of(arm, seed, 95 + seed + bonus)
        for seed in range(3)
        for arm, bonus in (
            ("dense", 1.0),
            ("single", 0.0),
            ("sp", 0.5 + 0.01 * seed),
            ("sr", 0.7 - 0.4 * seed),
        )
    ]
)


class Checker(HTMLParser):
    """Fails on tags that do not match; collects text, tags and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID and tag not in OPTIONAL:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in OPTIONAL:
            assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def parsed(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert not checker.open
    return checker


def test_the_page_is_well_formed_and_needs_nothing_else() -> None:
    page = report.render(FULL)
    checker = parsed(page)
    tags = {tag for tag, _ in checker.seen}
    assert not tags & {"script", "link", "img", "iframe", "object"}
    assert not re.search(r"https?://|url\(|@import", page)
    assert not any(
        name in {"src", "href"} or name.startswith("on") for _, attrs in checker.seen for name in attrs
    )


def test_the_page_is_fit_for_phones_the_dark_and_screen_readers() -> None:
    page = report.render(FULL)
    checker = parsed(page)
    assert 'name="viewport"' in page and "prefers-color-scheme:dark" in page and '<html lang="en">' in page
    for tag, attrs in checker.seen:
        if tag == "svg":
            assert attrs.get("aria-label") or attrs.get("aria-hidden") == "true"
        if tag == "th":
            assert attrs.get("scope") in {"col", "row"}


def test_every_svg_is_well_formed_xml_with_known_colours() -> None:
    charts = re.findall(r"<svg viewBox.*?</svg>", report.render(FULL), re.DOTALL)
    assert len(charts) >= 5
    colours = set(re.findall(r"--([a-z]+):", plot.style("svg")))
    for chart in [*charts, report.figure(FULL)]:
        if "xmlns" not in chart:
            chart = chart.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
        root = ET.fromstring(chart)
        assert root.tag.endswith("svg")
        assert set(re.findall(r"var\(--([a-z]+)\)", chart)) <= colours
        assert "nan" not in chart


def test_names_and_titles_are_escaped() -> None:
    page = report.render(FULL)
    assert "A &lt;net&gt; &amp; its numbers" in page and "<net>" not in page
    assert "layer1.conv&lt;a&gt;" in page and "conv<a>" not in page


def test_the_table_tells_the_figures() -> None:
    words = re.sub(r"\s+", " ", " ".join(parsed(report.render(FULL)).words))
    for row in (
        "96.00 ± 1.00",
        "96.51 ± 1.01",
        "61.2 ± 0.0",
        "47.0 ± 0.0",
        "45.0 ± 0.0",
        "×2.00",
        "feeds the model's",
    ):
        assert row in words, row
    assert "+0.51 [+0.49, +0.53]" in words
    assert "<b>+0.51</b>" in report.render(FULL), "an interval that leaves zero out is bold"
    assert "+0.30 [−0.69, +1.29]" in words and "<b>+0.30</b>" not in report.render(FULL)


def test_widths_and_releases_by_layer() -> None:
    page = report.render(FULL)
    layers = page[page.index("Layer by layer") :]
    row = re.search(r"<code>layer2\.conv</code>(.*?)</tr>", layers)
    assert row is not None
    assert re.findall(r"<span>([^<]*)</span>", row[1]) == ["7", "7", "7", "1"]
    assert re.findall(r"<td>(\d+)<td>", row[1])[:1] == ["8"]


def test_a_released_structure_is_marked() -> None:
    figure = report.figure(FULL)
    assert figure.count("<circle") == 3 + 1, "one end of accuracy for each arm, one release in sr"
    assert "● 1 released" in figure


def test_norms_are_drawn_where_they_belong() -> None:
    frame = plot.Frame(10, 20, 100, 50, (0, 10), (0, 1))
    assert frame.at((0, 1)) == (10, 20) and frame.at((10, 0)) == (110, 70) and frame.at((5, 0.5)) == (60, 45)
    assert 'd="M10 20 L60 45 L110 70"' in frame.line([(0, 1), (5, 0.5), (10, 0)], "line", "sp")


def test_the_figure_stands_alone() -> None:
    figure = report.figure(FULL)
    root = ET.fromstring(figure)
    assert root.get("role") == "img" and root.get("width") and root.get("height")
    assert "prefers-color-scheme:dark" in figure and "<style>" in figure
    for heading in (
        "One step",
        "Smooth Pruning",
        "SP + Self-Rectifying",
        "norm of 3 picks",
        "test accuracy, %",
    ):
        assert heading in figure
    assert "61.2 % just after removal, 96.00 % at the end" in figure


def labels(drawing: str) -> list[tuple[str, float, float, float]]:
    """Every text of a chart: words, left, right, and baseline, at 6.7 pixels a letter of 12 pixels."""
    found = []
    for node in ET.fromstring(drawing).iter("text"):
        kinds = (node.get("class") or "").split()
        letter = 9.0 if "head" in kinds else 7.2 if "sub" in kinds else 6.7
        wide, x = letter * len(node.text or ""), float(node.get("x") or 0)
        left = x - wide / 2 if "mid" in kinds else x - wide if "end" in kinds else x
        found.append((node.text or "", left, left + wide, float(node.get("y") or 0)))
    return found


@pytest.mark.parametrize("chart", [report._seeds, report._macs])
@pytest.mark.parametrize("arms", [ARMS[:4], ARMS])
def test_labels_of_all_arms_stay_apart(chart: Any, arms: tuple[str, ...]) -> None:
    drawing = chart(result_of(*(run_of(arm, seed, 95.0 + seed) for arm in arms for seed in (0, 1))))
    found = labels(drawing)
    assert {arm for arm in arms if arm != "dense"} <= {words for words, *_ in found}
    height = float((ET.fromstring(drawing).get("viewBox") or "").split()[3])
    assert all(left >= 0 and right <= 400 and y <= height for _, left, right, y in found)
    for i, (a, left_a, right_a, y_a) in enumerate(found):
        for b, left_b, right_b, y_b in found[i + 1 :]:
            apart = right_a < left_b or right_b < left_a or abs(y_a - y_b) >= 12
            assert apart, f"{a!r} and {b!r} overlap"


def test_panels_of_many_arms_stand_in_rows() -> None:
    few, many = (
        ET.fromstring(report.figure(result_of(*(run_of(arm, 0, 95.0) for arm in arms))))
        for arms in (ARMS[:4], ARMS)
    )
    assert few.get("width") == many.get("width")
    assert float(many.get("height") or 0) > 1.8 * float(few.get("height") or 0)
    assert len({g.get("transform") for g in many.iter("{http://www.w3.org/2000/svg}g")}) == len(ARMS) - 1


@pytest.mark.parametrize(
    "runs",
    [
        [run_of("sr", 0, 95.0)],
        [run_of("dense", 0, 95.0)],
        [run_of("single", 0, 95.0, lines=(), report=None, accuracy_removed=None)],
        [run_of("sp", 0, 95.0), run_of("sp", 1, 95.0)],
        [run_of("sp", 0, 97.0, rows=[{"step": 100, "accuracy": 97.0}])],
    ],
    ids=["one run", "dense alone", "nothing recorded", "no other arm", "flat"],
)
def test_partial_results_render(runs: list[Run]) -> None:
    page = report.render(result_of(*runs))
    parsed(page)
    assert "Traceback" not in page and "nan" not in page


def test_nothing_to_show_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no finished run"):
        report.render(result_of())
    with pytest.raises(ConfigError, match="pruned arms"):
        report.figure(result_of(run_of("dense", 0, 95.0)))


def test_means_over_seeds_that_were_tested_at_different_steps() -> None:
    a = run_of("sp", 0, 90.0, accuracy_start=100.0, rows=[{"step": 100, "accuracy": 90.0}])
    b = run_of(
        "sp",
        1,
        80.0,
        accuracy_start=100.0,
        rows=[{"step": 50, "accuracy": 60.0}, {"step": 100, "accuracy": 80.0}],
    )
    assert report._mean([a, b]) == [(0.0, 100.0), (50.0, 77.5), (100.0, 85.0)]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 100, [0, 20, 40, 60, 80, 100]),
        (96.8, 99.2, [96.5, 97, 97.5, 98, 98.5, 99, 99.5]),
        (0, 330, [0, 100, 200, 300, 400]),
        (5, 5, [4, 5, 6]),
    ],
)
def test_ticks_are_round_and_enclose_the_data(low: float, high: float, expected: list[float]) -> None:
    found = plot.ticks(low, high)
    assert found[0] <= low and found[-1] >= high
    if (low, high) != (5, 5):
        assert found == expected
