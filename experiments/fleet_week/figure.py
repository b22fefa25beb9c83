"""Draw a week of the fleet: ``python -m experiments.fleet_week.figure RUN OUT.svg``.

Requests per minute of each service, draw of the whole fleet against its budget with the GPUs held
below their default limit, and temperatures of the dies.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from testbed.analysis.drawing import Figure
from testbed.analysis.energy import read_rows
from testbed.analysis.pictures import save
from testbed.analysis.series import envelope
from testbed.recorder.reader import Recording

DAY_S = 86_400.0
DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
COLOURS = {"coding": "#4269d0", "conversation": "#ff725c", "capped": "#ff725c", "max": "#ff725c"}

Line = tuple[str, Any, Any, str]


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


def figures(recording: Recording) -> list[Figure]:
    """A panel for each, over the days of the week."""
    start_s = recording.spec.workload.start_s
    panels = lines_of(recording)
    end_s = max(float(line[1][-1]) for _, lines in panels for line in lines if len(line[1]))
    days = range(math.ceil(start_s / DAY_S), math.ceil((start_s + end_s) / DAY_S))
    names = {day * DAY_S - start_s: DAYS[day % 7] for day in days}
    axis = {"tickvals": list(names), "ticktext": list(names.values())} if names else {}
    return [
        Figure(
            title,
            title,
            "",
            [
                {"x": t_s, "y": value, "name": label, "line": {"color": colour, "width": 1.2},
                 "showlegend": bool(label)}
                for label, t_s, value, colour in lines
            ],
            {"xaxis": axis, "yaxis": {"rangemode": "tozero"} if "temp" not in title else {}},
            height=190,
            wide=True,
        )
        for title, lines in panels
    ]  # fmt: skip


if __name__ == "__main__":
    save(figures(Recording.open(sys.argv[1])), Path(sys.argv[2]))
