"""A few marks of SVG: enough for the report's charts, and nothing that needs a script or a network.

Colours are CSS variables (`STYLE`), so that every chart follows the reader's light or dark setting.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]

_LIGHT = {
    "bg": "#ffffff",
    "surface": "#f6f6f3",
    "text": "#1b1c1e",
    "muted": "#5c6068",
    "grid": "#e3e3de",
    "dense": "#6b7078",
    "single": "#c2410c",
    "sp": "#1d5fd1",
    "sr": "#0b7a55",
    "tp-one-shot": "#7a6400",
    "tp-iterative": "#6d3fc0",
    "tp-growing-reg": "#0b7285",
    "own": "#8a2f2f",
    "released": "#b3206f",
}
_DARK = {
    "bg": "#121315",
    "surface": "#1b1d20",
    "text": "#ebebe8",
    "muted": "#a3a8b0",
    "grid": "#2e3136",
    "dense": "#a3a8b0",
    "single": "#fb9a5a",
    "sp": "#74b0ff",
    "sr": "#43d3a0",
    "tp-one-shot": "#d8c25a",
    "tp-iterative": "#b79bff",
    "tp-growing-reg": "#5fd0e0",
    "own": "#ff9d9d",
    "released": "#f783bd",
}

FONT = "system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif"


def style(selector: str) -> str:
    """CSS: the colours on `selector`, light and dark, and how the marks look."""

    def colours(values: dict[str, str]) -> str:
        return ";".join(f"--{name}:{value}" for name, value in values.items())

    return (
        f"{selector}{{color-scheme:light dark;{colours(_LIGHT)}}}"
        f"@media(prefers-color-scheme:dark){{{selector}{{{colours(_DARK)}}}}}" + _MARKS
    )


_MARKS = (
    """
svg text{font:12px/1 """
    + FONT
    + """;fill:var(--muted)}
svg .head{font-size:16px;font-weight:650}
svg .sub{font-size:13px}
svg .big{fill:var(--text);font-weight:650}
svg .num{font-variant-numeric:tabular-nums}
svg .end{text-anchor:end}
svg .mid{text-anchor:middle}
svg .grid{stroke:var(--grid);stroke-width:1;fill:none}
svg .base{stroke:var(--muted);stroke-width:1;fill:none}
svg .line{fill:none;stroke-width:2.25;stroke-linejoin:round;stroke-linecap:round}
svg .thin{fill:none;stroke-width:1.4;stroke-linejoin:round;opacity:.6}
svg .ghost{fill:none;stroke-width:1.5;opacity:.4}
svg .dash{stroke-dasharray:5 4}
svg .band{stroke:none;opacity:.16}
"""
)


@dataclass(frozen=True)
class Frame:
    """A plotting area: data ↔ pixels.

    Attributes:
        x, y, width, height: the area in pixels, y downwards.
        xs, ys: (lowest, highest) of the data.
    """

    x: float
    y: float
    width: float
    height: float
    xs: Point
    ys: Point

    def at(self, point: Point) -> Point:
        """Data → pixels."""
        across = (point[0] - self.xs[0]) / ((self.xs[1] - self.xs[0]) or 1)
        up = (point[1] - self.ys[0]) / ((self.ys[1] - self.ys[0]) or 1)
        return self.x + across * self.width, self.y + self.height * (1 - up)

    def line(self, points: Iterable[Point], kind: str, colour: str) -> str:
        """A polyline; `kind` is a class of `STYLE`."""
        path = " ".join(
            f"{'L' if i else 'M'}{_n(x)} {_n(y)}" for i, (x, y) in enumerate(map(self.at, points))
        )
        return f'<path class="{kind}" stroke="{colour_of(colour)}" d="{path}"/>'

    def band(self, low: Sequence[Point], high: Sequence[Point], colour: str) -> str:
        """The area between two polylines."""
        corners = [*map(self.at, low), *map(self.at, reversed(high))]
        path = " ".join(f"{_n(x)},{_n(y)}" for x, y in corners)
        return f'<polygon class="band" fill="{colour_of(colour)}" points="{path}"/>'

    def area(self, points: Sequence[Point], colour: str) -> str:
        """The area under a polyline."""
        return self.band([(x, self.ys[0]) for x, _ in points], points, colour)

    def dot(self, point: Point, colour: str, radius: float = 3.5) -> str:
        """A filled circle with a rim in the colour of the background."""
        x, y = self.at(point)
        return (
            f'<circle cx="{_n(x)}" cy="{_n(y)}" r="{radius}" fill="{colour_of(colour)}" stroke="var(--bg)" '
            f'stroke-width="1.2"/>'
        )

    def axes(self, name: str, *, y_ticks: Sequence[float], x_ticks: Sequence[float] = ()) -> str:
        """Horizontal grid lines with their figures, the name above, ticks below."""
        parts = [text(self.x, self.y - 10, name, "sub")]
        for value in y_ticks:
            _, y = self.at((self.xs[0], value))
            kind = "base" if value == self.ys[0] else "grid"
            parts.append(f'<path class="{kind}" d="M{_n(self.x)} {_n(y)}h{_n(self.width)}"/>')
            parts.append(text(self.x - 7, y + 4, number(value), "num end"))
        for value in x_ticks:
            x, _ = self.at((value, self.ys[0]))
            kind = "num end" if value == self.xs[1] else "num mid"
            parts.append(text(x, self.y + self.height + 17, number(value), kind))
        return "".join(parts)


def svg(width: float, height: float, body: str, title: str, *, attributes: str = "") -> str:
    """A chart with a name that screen readers speak."""
    return (
        f'<svg viewBox="0 0 {_n(width)} {_n(height)}" role="img" aria-label="{escape(title)}" {attributes}>'
        f"<title>{escape(title)}</title>{body}</svg>"
    )


def text(x: float, y: float, words: str, kind: str = "", colour: str = "") -> str:
    """A line of text."""
    fill = f' style="fill:{colour_of(colour)}"' if colour else ""
    return f'<text x="{_n(x)}" y="{_n(y)}" class="{kind}"{fill}>{escape(words)}</text>'


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers from at most `low` to at least `high`.

    >>> ticks(0, 97)
    [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]
    """
    spread = (high - low) or abs(high) or 1.0
    raw = spread / about
    power: float = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.8)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * i, 10) for i in range(first, last + 1)]


def number(value: float) -> str:
    """Short: 1,200, 0.5, 97.5.

    >>> number(1200.0), number(0.25)
    ('1,200', '0.25')
    """
    shown = f"{value:,.10g}"
    return shown.replace("-", "−")


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def colour_of(name: str) -> str:
    """The colour of this name; of an arm of someone's own, which has none, that of all such arms."""
    return f"var(--{name if name in _LIGHT else 'own'})"
