"""Draw a week of the fleet: ``python -m experiments.fleet_week.figure RUN OUT.svg``.

Requests per minute of each service, draw of the whole fleet against its budget with the GPUs held
below their default limit, and temperatures of the dies.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from testbed.analysis.energy import read_rows
from testbed.analysis.series import envelope
from testbed.recorder.reader import Recording

DAY_S = 86_400.0
WIDTH, PANEL, MARGIN = 900, 170, 56
COLOURS = {"coding": "#4269d0", "conversation": "#ff725c", "capped": "#ff725c", "max": "#ff725c"}

Line = tuple[str, Any, Any, str]


def _figure(value: float) -> str:
    """Three digits, never in powers of ten."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def lines_of(recording: Recording) -> list[tuple[str, list[Line]]]:
    """Title and lines (label, t_s, value, colour) of each panel."""
    totals = recording.columns("request_totals", "t_s", "slo_class", "requests_count")
    load: list[Line] = []
    for service in sorted(set(totals["slo_class"])):
        mine = totals["slo_class"] == service
        minutes = np.bincount(
            (totals["t_s"][mine] // 600).astype(int), totals["requests_count"][mine] / 10.0
        )
        load.append(
            (service, 600.0 * np.arange(len(minutes)), minutes, COLOURS.get(service, "#888"))
        )
    rows = read_rows(recording)
    budget_mw = float(rows.budget_w[0].sum()) / 1e6
    power: list[Line] = [
        ("draw", *envelope(rows.t_s, rows.total_w / 1e6), "#4269d0"),
        ("budget", rows.t_s[[0, -1]], np.full(2, budget_mw), "#888"),
    ]
    gpus = recording.columns("gpus", "t_s", "temp_c", "power_limit_w")
    hours, first = np.unique(gpus["t_s"].round(3), return_inverse=True)
    count = np.bincount(first)
    capped = np.bincount(first, gpus["power_limit_w"] < gpus["power_limit_w"].max()) / count
    hottest = np.zeros(len(hours))
    np.maximum.at(hottest, first, gpus["temp_c"])
    heat: list[Line] = [
        ("mean", hours, np.bincount(first, gpus["temp_c"]) / count, "#4269d0"),
        ("max", hours, hottest, COLOURS["max"]),
    ]
    return [
        ("requests per minute", load),
        ("power and budget, MW", power),
        ("GPUs under a cap, share", [("", hours, capped, COLOURS["capped"])]),
        ("die temperature, degC", heat),
    ]


def draw(recording: Recording) -> str:
    """The figure as SVG."""
    panels = lines_of(recording)
    height = PANEL * len(panels) + 40
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{WIDTH}' height='{height}' "
        "font-family='sans-serif' font-size='11'><rect width='100%' height='100%' fill='white'/>"
    ]
    end_s = max(float(line[1][-1]) for _, lines in panels for line in lines if len(line[1]))
    for place, (title, lines) in enumerate(panels):
        parts += _panel(title, lines, place * PANEL, end_s)
    start_s = recording.spec.workload.start_s
    for day in range(int(start_s // DAY_S), int((start_s + end_s - 3600.0) // DAY_S) + 1):
        after_s = max(0.0, day * DAY_S - start_s)
        x = MARGIN + after_s / end_s * (WIDTH - MARGIN - 20)
        name = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")[day % 7]
        parts.append(f"<text x='{x:.1f}' y='{height - 14}'>{name}</text>")
    return "".join([*parts, "</svg>"])


def _panel(title: str, lines: list[Line], top: int, end_s: float) -> list[str]:
    inner_w, inner_h = WIDTH - MARGIN - 20, PANEL - 50
    x0, y0 = MARGIN, top + 34 + inner_h
    values = np.concatenate([np.asarray(line[2], float) for line in lines])
    high = float(values.max()) * 1.05 or 1.0
    low = 0.0 if values.min() < 0.5 * high else float(values.min()) * 0.95
    parts = [
        f"<text x='{x0}' y='{top + 26}' font-weight='bold'>{title}</text>",
        f"<rect x='{x0}' y='{y0 - inner_h}' width='{inner_w}' height='{inner_h}' fill='none' "
        "stroke='#bbb'/>",
        f"<text x='{x0 - 5}' y='{y0}' text-anchor='end'>{_figure(low)}</text>",
        f"<text x='{x0 - 5}' y='{y0 - inner_h + 9}' text-anchor='end'>{_figure(high)}</text>",
    ]
    for place, (label, t_s, value, colour) in enumerate(lines):
        x = x0 + np.asarray(t_s, float) / end_s * inner_w
        y = y0 - (np.asarray(value, float) - low) / (high - low) * inner_h
        dots = "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x, y, strict=True))
        parts.append(f"<path d='M{dots}' stroke='{colour}' fill='none' stroke-width='1.2'/>")
        if label:
            at = x0 + inner_w - 110 * (len(lines) - place)
            parts.append(f"<text x='{at}' y='{top + 26}' fill='{colour}'>{label}</text>")
    return parts


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(draw(Recording.open(sys.argv[1])), encoding="utf-8")
