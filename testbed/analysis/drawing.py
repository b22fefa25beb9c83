"""How figures are drawn: colours, and the parts of Plotly trees that several share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from testbed.analysis.run import Run
from testbed.analysis.series import envelope, spans
from testbed.core.view import Floats

HEAT_ROWS = 96
FEW = 4
"""Up to so many rows of racks get a figure each."""

INFERNO = [
    [place / 5, colour]
    for place, colour in enumerate(
        ["#000004", "#420a68", "#932667", "#dd513a", "#fca50a", "#fcffa4"]
    )
]
BLUE, ORANGE, GREEN, RED = "#3b82f6", "#f59e0b", "#10b981", "#ef4444"
PURPLE, CYAN, PINK, GREY = "#8b5cf6", "#06b6d4", "#ec4899", "#94a3b8"
COLOURS = [BLUE, ORANGE, GREEN, PURPLE, CYAN, PINK, "#84cc16", "#a16207"]
OUTCOME_COLOURS = {
    "sent": GREEN,
    "unchanged": GREY,
    "overruled": PURPLE,
    "refused": RED,
    "expired": ORANGE,
}


@dataclass(slots=True)
class Figure:
    """One figure of the page."""

    name: str
    title: str
    note: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    height: int = 280
    wide: bool = False
    over_time: bool = True
    """Zooming one figure over time zooms them all."""
    buttons: list[str] = field(default_factory=list)
    """Names of alternatives among the traces, of which one is shown."""


def numbers(values: Any) -> list[float | None]:
    """Plain numbers of five digits, None for what is not finite.

    >>> numbers(np.array([1.23456789, np.nan]))
    [1.2346, None]
    """
    array = np.asarray(values, np.float64)
    finite = np.isfinite(array)
    safe = np.where(finite & (array != 0), array, 1.0)
    digits = 10.0 ** (4 - np.floor(np.log10(np.abs(safe))))
    rounded = np.where(array == 0, 0.0, np.round(safe * digits) / digits)
    return [float(f"{v:.6g}") if ok else None for v, ok in zip(rounded, finite, strict=True)]


def line(
    x: Any,
    y: Any,
    name: str,
    colour: str,
    width: float = 1.6,
    *,
    dash: str = "solid",
    shape: str = "linear",
    opacity: float = 1.0,
) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": times(x),
        "y": numbers(y),
        "opacity": opacity,
        "line": {"color": colour, "width": width, "dash": dash, "shape": shape},
    }


def times(x: Any) -> list[float]:
    """Places on an axis, to seven digits: times need more than values do."""
    return [float(f"{value:.7g}") for value in x]


def thin(run: Run, value: Floats) -> tuple[Floats, Floats]:
    t_s, thin = envelope(run.rows.t_s, value)
    return run.time(t_s), thin


def bands(run: Run, matrix: Floats, colour: str, unit: str) -> list[dict[str, Any]]:
    """Median of all devices over time, with the middle half and the whole range around it."""
    with np.errstate(invalid="ignore"):
        known = matrix[~np.isnan(matrix).all(axis=1)]
        mid = run.mid[~np.isnan(matrix).all(axis=1)]
        low, quarter, half, three, high = np.nanquantile(known, [0, 0.25, 0.5, 0.75, 1], axis=1)
    if matrix.shape[1] == 1:
        return [line(mid, half, "value", colour, 1.8)]
    area = {"fill": "tonexty", "hoverinfo": "skip"}
    none = {"hoverinfo": "skip", "showlegend": False}
    return [
        line(mid, low, "lowest", colour, 0) | none,
        line(mid, high, "all", colour, 0) | area | {"fillcolor": rgba(colour, 0.14)},
        line(mid, quarter, "quarter", colour, 0) | none,
        line(mid, three, "middle half", colour, 0) | area | {"fillcolor": rgba(colour, 0.30)},
        line(mid, half, "median", colour, 2),
    ]


def heat(
    run: Run, matrix: Floats, labels: Sequence[str], unit: str, colours: Any
) -> dict[str, Any]:
    return {
        "type": "heatmap",
        "x": times(run.mid),
        "y": list(labels),
        "z": [numbers(column) for column in matrix.T],
        "colorscale": colours,
        "colorbar": {"title": {"text": unit}, "thickness": 10, "outlinewidth": 0},
        "hovertemplate": "%{y}<br>%{x}<br>%{z} " + unit + "<extra></extra>",
    }


def gathered(matrix: Floats, names: Sequence[str]) -> tuple[Floats, list[str]]:
    """At most HEAT_ROWS columns: means of neighbours, named by the first of them."""
    if len(names) <= HEAT_ROWS:
        return matrix, list(names)
    starts = np.linspace(0, len(names), HEAT_ROWS, endpoint=False).astype(int)
    sizes = np.diff(np.append(starts, len(names)))
    means = np.add.reduceat(np.nan_to_num(matrix), starts, axis=1) / sizes
    return means, [f"{names[start]} +{size - 1}" for start, size in zip(starts, sizes, strict=True)]


def timed(run: Run, layout: dict[str, Any]) -> dict[str, Any]:
    unit = run.scale[1]
    end = run.duration_s / run.scale[0]
    return layout | {"xaxis": axis("", f" {unit}", range=[0, end]), "hovermode": "x unified"}


def axis(title: str, suffix: str, **more: Any) -> dict[str, Any]:
    axis: dict[str, Any] = {"ticksuffix": suffix, "automargin": True, **more}
    return axis | ({"title": {"text": title}} if title else {})


def log_axis(per_s: float, suffix: str) -> dict[str, Any]:
    """A logarithmic axis of times with 1, 2 and 5 of every decade from 0.1 ms to 1,000 s."""
    ticks = [digit * 10.0**decade * per_s for decade in range(-4, 4) for digit in (1, 2, 5)]
    labels = [f"{tick:g}{suffix}" for tick in ticks]
    return {"type": "log", "tickvals": ticks, "ticktext": labels, "automargin": True}


def band(run: Run, start_s: float, end_s: float, colour: str, opacity: float) -> dict[str, Any]:
    return {
        "type": "rect",
        "xref": "x",
        "yref": "paper",
        "x0": start_s / run.scale[0],
        "x1": end_s / run.scale[0],
        "y0": 0,
        "y1": 1,
        "fillcolor": colour,
        "opacity": opacity,
        "line": {"width": 0},
        "layer": "below",
    }


def cap_bands(run: Run) -> list[dict[str, Any]]:
    capped = np.asarray(run.capped.any(axis=1), np.bool_)
    found = spans(capped, run.edges_s[:-1], run.duration_s)
    return [band(run, start, end, ORANGE, 0.10) for start, end in found[:400]]


def mark(x: float, colour: str) -> dict[str, Any]:
    line = {"color": colour, "width": 1.5, "dash": "dash"}
    return {"type": "line", "yref": "paper", "x0": x, "x1": x, "y0": 0, "y1": 1, "line": line}


def label(x: float, text: str, colour: str, place: int) -> dict[str, Any]:
    return {
        "x": x,
        "y": 0.99 - 0.09 * (place % 8),
        "yref": "paper",
        "text": text,
        "showarrow": False,
        "xanchor": "left",
        "xshift": 3,
        "font": {"color": colour, "size": 11},
    }


def rgba(colour: str, opacity: float) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"
