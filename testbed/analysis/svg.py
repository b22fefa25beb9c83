"""Figures as one plain SVG, for a README: plotly's own images need a browser.

Takes the part of Plotly's vocabulary that READMEs need: lines and markers, and heat maps. Narrow
figures stand two to a line, wide ones alone.

>>> from testbed.analysis.drawing import Figure
>>> line = {"x": [0, 1, 2], "y": [0.0, 5.0, 3.0], "name": "draw", "mode": "lines"}
>>> text = svg_of([Figure("power", "Power", "of a row", [line], {}, wide=True)])
>>> text.count("<path"), "Power" in text
(1, True)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np

from testbed.analysis.drawing import COLOURS, INFERNO, Figure
from testbed.core.view import Floats

_WIDTH, _GAP = 1180, 20
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 16, 62, 38
"""Around the axes of a figure: numbers and titles."""
_SCALE = 66
"""Room for a heat map's scale."""
_LETTER = 7
"""Width of a letter, about."""
_DASHES = {"dash": "7 4", "dot": "2 3"}


class _Box(NamedTuple):
    """Where a figure's axes are, in pixels, and what they span."""

    x0: float
    y0: float
    """Lower left corner."""
    width: float
    height: float
    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: Any) -> Any:
        return self.x0 + (value - self.x_low) / (self.x_high - self.x_low) * self.width

    def y(self, value: Any) -> Any:
        return self.y0 - (value - self.y_low) / (self.y_high - self.y_low) * self.height


def svg_of(figures: Sequence[Figure]) -> str:
    """One picture of all figures, in their order.

    Raises:
        ValueError: a figure has a kind of trace that is not drawn here.
    """
    parts: list[str] = []
    left, top, deepest = 0, 0, 0
    for figure in figures:
        width = _WIDTH if figure.wide else (_WIDTH - _GAP) // 2
        if left + width > _WIDTH:
            left, top, deepest = 0, top + deepest + _GAP, 0
        parts += _figure(figure, left, top, width)
        left, deepest = left + width + _GAP, max(deepest, figure.height)
    height = top + deepest
    head = (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {_WIDTH} {height}' "
        f"width='{_WIDTH}' height='{height}' font-family='sans-serif' font-size='12'>"
        "<rect width='100%' height='100%' fill='white'/>"
    )
    return "\n".join([head, *parts, "</svg>"]) + "\n"


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers between two ends, at most about so many.

    >>> ticks(0.0, 24.0, 6), ticks(0.31, 0.48, 4)
    ([0.0, 5.0, 10.0, 15.0, 20.0], [0.35, 0.4, 0.45])
    """
    span = max(high - low, 1e-12)
    size = 10.0 ** math.floor(math.log10(span / most))
    step = next(size * one for one in (1, 2, 5, 10) if span / (size * one) <= most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(step * place, 12) for place in range(first, last + 1)]


def _figure(figure: Figure, left: int, top: int, width: int) -> list[str]:
    kinds = {str(trace.get("type", "scatter")) for trace in figure.data}
    words = [
        f"<text x='{left + 8}' y='{top + 18}' font-size='14' font-weight='bold'>"
        f"{escape(figure.title)}</text>",
        f"<text x='{left + 8}' y='{top + 35}' fill='#666'>{escape(figure.note)}</text>",
    ]
    if kinds == {"heatmap"} and len(figure.data) == 1:
        return [*words, *_heat(figure, left, top, width)]
    if kinds != {"scatter"}:
        raise ValueError(f"figure {figure.name!r}: {', '.join(sorted(kinds))} is not drawn as SVG")
    return [*words, *_lines(figure, left, top, width)]


def _lines(figure: Figure, left: int, top: int, width: int) -> list[str]:
    xs = [np.asarray(trace["x"], float) for trace in figure.data]
    ys = [np.asarray(trace["y"], float) for trace in figure.data]
    x_low, x_high = float(min(x.min() for x in xs)), float(max(x.max() for x in xs))
    y_low, y_high = float(min(y.min() for y in ys)), float(max(y.max() for y in ys))
    if figure.layout.get("yaxis", {}).get("rangemode") == "tozero":
        y_low = min(y_low, 0.0)
    y_high += 0.05 * max(y_high - y_low, 1e-9)
    size = (width - _LEFT - _RIGHT, figure.height - _TOP - _BOTTOM)
    box = _Box(left + _LEFT, top + figure.height - _BOTTOM, *size, x_low, x_high, y_low, y_high)
    parts = _axes(figure, box)
    names = [str(trace.get("name", "")) for trace in figure.data]
    named_at = left + width - _RIGHT - sum(_LETTER * len(name) + 36 for name in names)
    for place, (trace, x, y) in enumerate(zip(figure.data, xs, ys, strict=True)):
        line = trace.get("line", {})
        colour = str(line.get("color", COLOURS[place % len(COLOURS)]))
        dash = f" stroke-dasharray='{_DASHES[line['dash']]}'" if line.get("dash") in _DASHES else ""
        stroke = f"stroke='{colour}' stroke-width='{line.get('width', 1.5)}'{dash}"
        parts += _trace(trace, box.x(x), box.y(y), stroke, colour)
        parts += [
            f"<line x1='{named_at}' y1='{top + 50}' x2='{named_at + 22}' y2='{top + 50}' "
            f"{stroke}/>",
            f"<text x='{named_at + 27}' y='{top + 54}'>{escape(names[place])}</text>",
        ]
        named_at += _LETTER * len(names[place]) + 36
    return parts


def _axes(figure: Figure, box: _Box) -> list[str]:
    """Grid, numbers and titles."""
    parts = []
    for value in ticks(box.x_low, box.x_high, max(2, int(box.width / 90))):
        x = box.x(value)
        parts += [
            f"<line x1='{x:.1f}' y1='{box.y0}' x2='{x:.1f}' y2='{box.y0 - box.height}' "
            "stroke='#e5e7eb'/>",
            f"<text x='{x:.1f}' y='{box.y0 + 15}' text-anchor='middle'>{value:g}</text>",
        ]
    for value in ticks(box.y_low, box.y_high, max(2, int(box.height / 40))):
        y = box.y(value)
        parts += [
            f"<line x1='{box.x0}' y1='{y:.1f}' x2='{box.x0 + box.width}' y2='{y:.1f}' "
            "stroke='#e5e7eb'/>",
            f"<text x='{box.x0 - 5}' y='{y + 4:.1f}' text-anchor='end'>{value:g}</text>",
        ]
    across, up = (_title(figure, axis) for axis in ("xaxis", "yaxis"))
    middle = box.x0 + box.width / 2
    parts.append(f"<text x='{middle}' y='{box.y0 + 32}' text-anchor='middle'>{across}</text>")
    parts.append(f"<text x='{box.x0 - 48}' y='{box.y0 - box.height - 8}'>{up}</text>")
    return parts


def _title(figure: Figure, axis: str) -> str:
    return escape(str(figure.layout.get(axis, {}).get("title", {}).get("text", "")))


def _trace(trace: dict[str, Any], x: Floats, y: Floats, stroke: str, colour: str) -> list[str]:
    """A line, as steps where it says so, and its markers."""
    mode, parts = str(trace.get("mode", "lines")), []
    if "lines" in mode:
        if trace.get("line", {}).get("shape") == "hv":
            x, y = np.repeat(x, 2)[1:], np.repeat(y, 2)[:-1]
        # What falls on the pixel before adds nothing that could be seen.
        keep = np.append(True, (np.diff(x) ** 2 + np.diff(y) ** 2) > 0.25)
        dots = "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x[keep], y[keep], strict=True))
        parts.append(f"<path d='M{dots}' fill='none' {stroke}/>")
    if "markers" in mode:
        parts += [
            f"<circle cx='{a:.1f}' cy='{b:.1f}' r='3' fill='{colour}'/>"
            for a, b in zip(x, y, strict=True)
        ]
    return parts


def _heat(figure: Figure, left: int, top: int, width: int) -> list[str]:
    """Cells from the top, and a scale beside them; cells without a value stay empty."""
    [trace] = figure.data
    rows = [[math.nan if v is None else float(v) for v in line] for line in trace["z"]]
    known = [v for line in rows for v in line if not math.isnan(v)]
    low, high = float(trace.get("zmin", min(known))), float(trace.get("zmax", max(known)))
    x0, y0 = left + _LEFT, top + _TOP - 14
    cell_w = (width - _LEFT - _SCALE) / max(len(line) for line in rows)
    cell_h = (figure.height - _TOP) / len(rows)
    parts = [
        f"<rect x='{x0 + column * cell_w:.1f}' y='{y0 + row * cell_h:.1f}' "
        f"width='{cell_w - 2:.1f}' height='{cell_h - 2:.1f}' fill='{_colour(v, low, high)}'/>"
        for row, line in enumerate(rows)
        for column, v in enumerate(line)
        if not math.isnan(v)
    ]
    labels = figure.layout.get("yaxis", {})
    for at, text in zip(labels.get("tickvals", ()), labels.get("ticktext", ()), strict=True):
        y = y0 + (at + 0.5) * cell_h + 4
        parts.append(f"<text x='{x0 - 6}' y='{y:.1f}' text-anchor='end'>{escape(text)}</text>")
    scale_x, height = left + width - _SCALE + 14, len(rows) * cell_h
    for step in range(40):
        y = y0 + height * (1 - (step + 1) / 40)
        colour = _colour(low + (high - low) * (step + 0.5) / 40, low, high)
        parts.append(
            f"<rect x='{scale_x}' y='{y:.1f}' width='12' height='{height / 40 + 0.5:.1f}' "
            f"fill='{colour}'/>"
        )
    unit = escape(str(trace.get("colorbar", {}).get("title", {}).get("text", "")))
    parts.append(f"<text x='{scale_x}' y='{y0 - 6}'>{unit}</text>")
    for value in ticks(low, high, 4):
        y = y0 + height * (1 - (value - low) / (high - low)) + 4
        parts.append(f"<text x='{scale_x + 16}' y='{y:.1f}'>{value:g}</text>")
    return parts


def _colour(value: float, low: float, high: float) -> str:
    """Of a value on the scale that figures use for heat."""
    place = min(max((value - low) / max(high - low, 1e-12), 0.0), 1.0) * (len(INFERNO) - 1)
    first = min(int(place), len(INFERNO) - 2)
    pair = (str(INFERNO[first][1]), str(INFERNO[first + 1][1]))
    ends = [[int(colour[at : at + 2], 16) for at in (1, 3, 5)] for colour in pair]
    mixed = [a + (place - first) * (b - a) for a, b in zip(*ends, strict=True)]
    return "#" + "".join(f"{round(part):02x}" for part in mixed)
