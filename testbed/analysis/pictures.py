"""Figures as one picture for a README, by matplotlib: plotly's own images need a browser.

Takes the part of Plotly's vocabulary that our figures use: lines, markers, bars with whiskers, heat
maps, logarithmic axes. Narrow figures stand two to a line (or as many as asked for), wide ones
alone. The same figures give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from testbed.analysis.drawing import COLOURS, GREY, Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PIXELS_PER_INCH = 96.0
_WIDTH = 1180
"""Of the picture, pixels."""
_DASHES = {"dash": (0, (6, 3)), "dot": (0, (1.5, 2.5))}
_MARKERS = {
    "circle": "o", "square": "s", "diamond": "D", "cross": "P", "x": "X", "triangle-up": "^",
    "triangle-down": "v", "star": "*", "hexagon": "h",
}  # fmt: skip
_FEW_DECADES = 20.0
"""Span of a logarithmic axis up to which more than powers of ten are labelled."""
_CLOUD = 60
"""From so many markers on a trace is drawn as pixels within an SVG."""
_PREFIX = "-open"
"""Of names of markers that are drawn as an outline."""


def save(figures: Sequence[Figure], path: Path, *, across: int = 2) -> None:
    """Draw figures into one picture, whose format is that of the path's suffix (SVG, PNG).

    Raises:
        ValueError: a figure has a kind of trace that is not drawn here.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure as Canvas

    lines = list(_lines(figures, across))
    heights = [max(figure.height for figure in line) for line in lines]
    look: Any = {
        "svg.fonttype": "none", "svg.hashsalt": "testbed", "font.size": 8.5,
        "font.family": "sans-serif", "axes.spines.top": False, "axes.spines.right": False,
        "axes.grid": True, "grid.color": "#e5e7eb", "axes.axisbelow": True,
        "axes.edgecolor": "#9ca3af", "legend.frameon": False,
    }  # fmt: skip
    with mpl.rc_context(look):
        size = (_WIDTH / _PIXELS_PER_INCH, sum(heights) / _PIXELS_PER_INCH)
        canvas = Canvas(figsize=size, layout="constrained")
        grid = canvas.add_gridspec(len(lines), across, height_ratios=heights)
        for row, line in enumerate(lines):
            for place, figure in enumerate(line):
                where = grid[row, :] if figure.wide else grid[row, place]
                _draw(figure, canvas.add_subplot(where), canvas)
        path.parent.mkdir(parents=True, exist_ok=True)
        drawing = path.suffix == ".svg"
        canvas.savefig(
            path,
            metadata={"Date": None} if drawing else {},
            dpi=_PIXELS_PER_INCH * (1 if drawing else 2),
        )


def _lines(figures: Sequence[Figure], across: int) -> Iterator[list[Figure]]:
    """Figures that stand beside each other."""
    line: list[Figure] = []
    for figure in figures:
        if line and (figure.wide or len(line) == across):
            yield line
            line = []
        line.append(figure)
        if figure.wide:
            yield line
            line = []
    if line:
        yield line


def _draw(figure: Figure, axes: Axes, canvas: Any) -> None:
    axes.set_title(figure.title, loc="left", fontweight="bold", fontsize=9.5, pad=18)
    axes.annotate(
        figure.note, (0, 1), (0, 5), xycoords="axes fraction", textcoords="offset points",
        color="#6b7280", fontsize=7.5,
    )  # fmt: skip
    for place, trace in enumerate(figure.data):
        if trace.get("visible", True) is not True:
            continue
        kind = str(trace.get("type", "scatter"))
        if kind == "scatter":
            _scatter(trace, axes, COLOURS[place % len(COLOURS)])
        elif kind == "bar":
            _bars(trace, axes)
        elif kind == "heatmap":
            _heat(trace, axes, canvas)
        else:
            raise ValueError(f"figure {figure.name!r}: {kind} is not drawn as a picture")
    for name, axis in (
        ("x", figure.layout.get("xaxis", {})),
        ("y", figure.layout.get("yaxis", {})),
    ):
        _axis(axes, name, axis)
    _legend(figure, axes)


def _legend(figure: Figure, axes: Axes) -> None:
    """On the note's line if there is room, else beside the axes, or within wide ones."""
    handles, labels = axes.get_legend_handles_labels()
    if not labels:
        return
    letters = len(figure.note) + sum(len(label) + 7 for label in labels)
    look: dict[str, Any] = {"fontsize": 7, "handlelength": 1.8, "borderaxespad": 0.2}
    if letters < (230 if figure.wide else 100):
        look |= {"ncols": len(labels), "loc": "lower right", "bbox_to_anchor": (1.0, 1.0)}
    elif figure.wide:
        look |= {"loc": "best", "ncols": 2}
    else:
        look |= {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
    axes.legend(handles, labels, **look)


def _axis(axes: Axes, name: str, said: dict[str, Any]) -> None:
    setter = getattr(axes, f"set_{name}label")
    setter(str(said.get("title", {}).get("text", "")), fontsize=8)
    if said.get("type") == "log":
        getattr(axes, f"set_{name}scale")("log")
        axis = getattr(axes, f"{name}axis")
        axis.set_major_formatter(lambda value, place: f"{value:g}")
        low, high = getattr(axes, f"get_{name}lim")()
        # Numbers between the powers of ten: where there are few powers, and not all of them.
        shown = "235" if high / low < _FEW_DECADES else ""
        axis.set_minor_formatter(
            lambda value, place: f"{value:g}" if f"{value:.0e}"[0] in shown else ""
        )
    low, high = getattr(axes, f"get_{name}lim")()
    if said.get("rangemode") == "tozero" and low > 0 and said.get("type") != "log":
        getattr(axes, f"set_{name}lim")(0.0, high)
    if "tickvals" in said:
        getattr(axes, f"set_{name}ticks")(said["tickvals"], said.get("ticktext"))
    if said.get("showticklabels") is False:
        getattr(axes, f"set_{name}ticks")([])
    if said.get("showgrid") is False:
        axes.grid(visible=False, axis=name)  # type: ignore[arg-type]


def _scatter(trace: dict[str, Any], axes: Axes, colour: str) -> None:
    line, marker = trace.get("line", {}), trace.get("marker", {})
    mode = str(trace.get("mode", "lines"))
    colour = str(line.get("color", marker.get("color", colour)))
    symbol = str(marker.get("symbol", "circle"))
    outlined = symbol.endswith(_PREFIX)
    errors = {
        f"{axis}err": trace[f"error_{axis}"]["array"]
        for axis in "xy"
        if f"error_{axis}" in trace and any(np.nan_to_num(trace[f"error_{axis}"]["array"]) > 0)
    }
    said: dict[str, Any] = {
        "color": colour,
        "linewidth": float(line.get("width", 1.5)) * 0.75,
        "linestyle": _DASHES.get(line.get("dash", ""), "-") if "lines" in mode else "none",
        "marker": _MARKERS.get(symbol.removesuffix(_PREFIX), "o") if "markers" in mode else "none",
        "markersize": 0.6 * float(marker.get("size", 7)),
        "markerfacecolor": "white" if outlined else colour,
        "label": trace.get("name") if trace.get("showlegend", True) else None,
        "drawstyle": "steps-post" if line.get("shape") == "hv" else "default",
        "alpha": trace.get("opacity"),
        # A cloud of dots is smaller as pixels than as drawings, and looks alike.
        "rasterized": "markers" in mode and len(trace["x"]) > _CLOUD,
    }
    x, y = np.asarray(trace["x"], float), np.asarray(trace["y"], float)
    if errors:
        axes.errorbar(x, y, **errors, ecolor=colour, elinewidth=0.7, **said)
    else:
        axes.plot(x, y, **said)


def _bars(trace: dict[str, Any], axes: Axes) -> None:
    values = np.asarray(trace["y"], float)
    spread = np.nan_to_num(trace.get("error_y", {}).get("array", np.zeros(len(values))))
    colours = trace.get("marker", {}).get("color", GREY)
    names = [str(name) for name in trace["x"]]
    axes.bar(names, values, color=colours, width=0.7)
    axes.errorbar(
        names, values, yerr=spread, fmt="none", ecolor="#374151", elinewidth=0.8, capsize=2.0
    )
    for place, value in enumerate(values):
        top = value + spread[place]
        said = f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
        axes.annotate(
            said, (place, top), (0, 2), textcoords="offset points", ha="center", fontsize=7
        )
    axes.grid(visible=False, axis="x")
    if len(names) > 5 or max(map(len, names)) > 10:
        axes.tick_params(axis="x", labelrotation=30)


def _heat(trace: dict[str, Any], axes: Axes, canvas: Any) -> None:
    cells = np.array(
        [[math.nan if v is None else float(v) for v in line] for line in trace["z"]], float
    )
    image = axes.imshow(
        np.ma.masked_invalid(cells),
        aspect="auto",
        cmap=str(trace.get("colorscale", "inferno")).lower(),
        vmin=trace.get("zmin"),
        vmax=trace.get("zmax"),
        interpolation="none",
    )
    axes.set_frame_on(False)
    # Gaps between cells, as wide as the figure has them on its page.
    axes.set_xticks(np.arange(-0.5, cells.shape[1]), minor=True)
    axes.set_yticks(np.arange(-0.5, cells.shape[0]), minor=True)
    axes.grid(which="minor", color="white", linewidth=0.75 * float(trace.get("xgap", 0)))
    axes.tick_params(which="both", length=0)
    scale = canvas.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    scale.set_label(str(trace.get("colorbar", {}).get("title", {}).get("text", "")))
    scale.outline.set_visible(False)
