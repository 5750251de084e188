"""A bar chart as an SVG that is written by hand: a few figures for each contender, on a logarithmic scale.

What must live here: where a bar begins and ends, and how it looks on a light and on a dark page. What must not: which
figures are drawn. The scale is logarithmic because the slowest contender is three hundred times slower than the
quickest; each bar therefore carries its number. It needs no font of its own and nothing from the network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

NAMES, WIDTH, EDGE = 270, 860, 60  # pixels: the names to the left, the whole, and room for a number to the right
BAR, GAP, TOP = 13, 9, 64
STYLE = """
    text { font: 13px system-ui, sans-serif; fill: #24322f; dominant-baseline: central }
    .name { text-anchor: end } .scale, .figure { font-size: 11.5px; fill: #5a6b67 } .scale { text-anchor: middle }
    .title { font-size: 15px } line { stroke: #c9d5d1 }
    .b0 { fill: #1f6f5c } .b1 { fill: #86bfae }
    @media (prefers-color-scheme: dark) {
      text { fill: #e6efec } .scale, .figure { fill: #a9bbb6 } line { stroke: #3a4d47 }
      .b0 { fill: #5fb59d } .b1 { fill: #2f6b5b }
    }
"""

Figures = Mapping[str, Sequence[float | None]]


class Scale:
    """From a figure to a place on the page: whole decades around all figures."""

    def __init__(self, figures: Sequence[float]) -> None:
        self.low = math.floor(math.log10(min(figures) / 2))  # half, so that the shortest bar is seen too
        self.high = math.ceil(math.log10(max(figures)))
        self.decade = (WIDTH - NAMES - EDGE) / (self.high - self.low)

    def x(self, figure: float) -> float:
        """Pixels from the left edge."""
        return NAMES + (math.log10(figure) - self.low) * self.decade

    def grid(self, bottom: float) -> list[str]:
        """A line and its number for each decade."""
        powers = [10.0**power for power in range(self.low, self.high + 1)]
        lines = [
            f'<line x1="{self.x(each):.1f}" y1="{TOP - 6}" x2="{self.x(each):.1f}" y2="{bottom}"/>' for each in powers
        ]
        return lines + [f'<text class="scale" x="{self.x(each):.1f}" y="{TOP - 15}">{each:g}</text>' for each in powers]


def svg(title: str, series: Sequence[str], figures: Figures) -> str:
    """The picture: for each name one bar for each of the series; a figure that is None has none."""
    scale = Scale([figure for row in figures.values() for figure in row if figure is not None])
    step = len(series) * BAR + GAP
    height = TOP + len(figures) * step
    shapes = scale.grid(height - GAP + 4)
    for number, (name, row) in enumerate(figures.items()):
        top = TOP + number * step
        shapes.append(f'<text class="name" x="{NAMES - 10}" y="{top + (step - GAP) / 2}">{plain(name)}</text>')
        shapes += [bar(scale, index, top, figure) for index, figure in enumerate(row) if figure is not None]
    label = escape(f"{title}: {'; '.join(spoken(name, series, row) for name, row in figures.items())}")
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">'
    return "\n".join([head, f"<style>{STYLE}</style>", *legend(title, series), *shapes, "</svg>", ""])


def bar(scale: Scale, index: int, top: float, figure: float) -> str:
    """One bar with its number behind it."""
    y, end = top + index * BAR, scale.x(figure)
    shape = f'<rect class="b{index}" x="{NAMES}" y="{y}" width="{end - NAMES:.1f}" height="{BAR - 1}" rx="2"/>'
    return (
        f'{shape}<text class="figure" x="{end + 5:.1f}" y="{y + BAR / 2}">{figure:.{2 if figure < 10 else 1}f}</text>'
    )


def legend(title: str, series: Sequence[str]) -> list[str]:
    """What is drawn, and which colour is which."""
    made = [f'<text class="title" x="12" y="20">{escape(title)} (logarithmic)</text>']
    for index, name in enumerate(series):
        x = NAMES + 170 + index * 150
        made.append(f'<rect class="b{index}" x="{x}" y="14" width="12" height="12" rx="2"/>')
        made.append(f'<text x="{x + 18}" y="20">{escape(name)}</text>')
    return made


def plain(name: str) -> str:
    """A title of a table without its marks for code."""
    return escape(name.replace("`", ""))


def spoken(name: str, series: Sequence[str], row: Sequence[float | None]) -> str:
    """One contender in words, for who does not see the picture."""
    said = [f"{what} {figure:.2f}" for what, figure in zip(series, row, strict=True) if figure is not None]
    return f"{name.replace('`', '')} {', '.join(said)}"


def write(path: Path, title: str, series: Sequence[str], figures: Figures) -> None:
    """Put the picture there; its folder is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(svg(title, series, figures), encoding="utf-8")
