"""Figures of the TAPAS experiment: heat of the rows, power against limits, servers against caps."""

from __future__ import annotations

from typing import Any

import numpy as np

from testbed.analysis.drawing import Figure
from testbed.experiment import Results, load_beside

_COLOURS = {
    "none": "#8a8f98",
    "baseline": "#c44e52",
    "polca": "#dd8452",
    "place": "#55a868",
    "route": "#8172b3",
    "config": "#64b5cd",
}
_TAPAS = "#1f5fb4"


def _name(arm: str, tapas: str) -> str:
    return "TAPAS" if arm == tapas else arm


def figures(results: Results) -> list[Figure]:
    """What the runs show; nothing for the small live runs."""
    if results.options.mode == "emulated":
        return []
    experiment = load_beside(__file__, "experiment")
    tapas, crowded = experiment.TAPAS, f"day +{experiment.CROWDED:.0%}"
    return [
        *_heat(results, crowded, tapas),
        _power(results, crowded, ["none", "baseline", tapas], tapas, "a crowded day"),
        *[
            _power(results, f"{kind} +{extra:.0%}", ["none", "baseline", tapas], tapas, words)
            for kind, extra, words in (
                ("ups_lost", 0.2, "a UPS is lost"),
                ("UPS out for good", 0.4, "a UPS stays out, with more servers behind it"),
            )
            if f"{kind} +{extra:.0%}" in results.scenarios()
        ],
        _capacity(results, tapas),
    ]


def _first(results: Results, arm: str, scenario: str) -> dict[str, Any] | None:
    found = [run.values for run in results.of(arm, scenario) if "series" in run.values]
    return found[0] if found else None


def _heat(results: Results, scenario: str, tapas: str) -> list[Figure]:
    """Highest GPU temperature of each server over the day, server by server."""
    made = []
    for arm in ("baseline", tapas):
        values = _first(results, arm, scenario)
        if values is None:
            continue
        heat, row = np.array(values["heat_c"]), np.array(values["row_of"])
        kinds = np.array(values["kind"])
        words = np.array(["empty", "opaque VM", "endpoint"])
        wide = 14
        deep = -(-int(np.bincount(row).max()) // wide)
        data, ticks, labels = [], [], []
        grid = np.full((deep * (row.max() + 1) + row.max(), wide), np.nan)
        text = np.full(grid.shape, "", dtype=object)
        for number in range(row.max() + 1):
            mine = np.flatnonzero(row == number)
            top = number * (deep + 1)
            for place, server in enumerate(mine):
                at = (top + place // wide, place % wide)
                grid[at] = heat[server]
                text[at] = f"row {number}, server {place}: {words[kinds[server]]}"
            ticks.append(top + (deep - 1) / 2)
            labels.append(f"row {number}")
        data.append(
            {
                "type": "heatmap",
                "z": [[None if np.isnan(v) else float(v) for v in line] for line in grid],
                "text": text.tolist(),
                "hovertemplate": "%{text}<br>%{z:.1f} C<extra></extra>",
                "zmin": 55,
                "zmax": 88,
                "colorscale": "Inferno",
                "colorbar": {"title": {"text": "C"}},
                "xgap": 2,
                "ygap": 2,
            }
        )
        made.append(
            Figure(
                f"heat-{_name(arm, tapas).lower()}",
                f"Hottest GPU of each server, {scenario}: {_name(arm, tapas)}",
                "Highest temperature over the day, seed 1. GPUs slow down at 87 C.",
                data,
                {
                    "xaxis": {"showticklabels": False, "showgrid": False},
                    "yaxis": {
                        "tickvals": ticks,
                        "ticktext": labels,
                        "autorange": "reversed",
                        "showgrid": False,
                    },
                },
                height=300,
                over_time=False,
            )
        )
    return made


def _power(results: Results, scenario: str, arms: list[str], tapas: str, words: str) -> Figure:
    """Power of the row loaded most against its limit."""
    data: list[dict[str, Any]] = []
    hours = 3600.0 if scenario.startswith("day") else 60.0
    for arm in arms:
        values = _first(results, arm, scenario)
        if values is None:
            continue
        series = values["series"]
        draws, limits = np.array(series["row_w"]), np.array(series["limit_w"])
        most = int(draws.max(axis=0).argmax())
        times = np.array(series["t_s"]) / hours
        colour = _TAPAS if arm == tapas else _COLOURS[arm]
        data.append(
            {
                "x": times.tolist(),
                "y": (draws[:, most] / 1e3).tolist(),
                "name": _name(arm, tapas),
                "mode": "lines",
                "line": {"color": colour, "width": 2 if arm == tapas else 1.4},
            }
        )
        if arm == arms[-1]:
            data.append(
                {
                    "x": times.tolist(),
                    "y": (limits[:, most] / 1e3).tolist(),
                    "name": "limit",
                    "mode": "lines",
                    "line": {"color": "#222222", "width": 1.5, "dash": "dash", "shape": "hv"},
                }
            )
    unit = "h" if hours == 3600.0 else "min"
    return Figure(
        f"power-{scenario.replace(' ', '-').replace('+', '').replace('%', '')}",
        f"Power of the fullest row: {words} ({scenario})",
        "Seed 1. Without a cap, a draw above the limit opens breakers in time.",
        data,
        {
            "xaxis": {"title": {"text": f"time ({unit})"}},
            "yaxis": {"title": {"text": "kW"}, "rangemode": "tozero"},
        },
        height=320,
        wide=True,
        over_time=False,
    )


def _capacity(results: Results, tapas: str) -> Figure:
    """Servers added against time capped."""
    levels = [scenario for scenario in results.scenarios() if scenario.startswith("day")]
    percent = [float(s.partition("+")[2].rstrip("%") or 0.0) for s in levels]
    data: list[dict[str, Any]] = []
    for arm in ("baseline", "polca", "place", "route", "config", tapas):
        points = [
            (x, 100.0 * results.mean("capped_frac", arm, s).mean,
             100.0 * results.mean("late_frac", arm, s).mean)
            for x, s in sorted(zip(percent, levels, strict=True))
            if results.of(arm, s)
        ]  # fmt: skip
        if not points:
            continue
        x, capped, late = zip(*points, strict=True)
        colour = _TAPAS if arm == tapas else _COLOURS[arm]
        line = {"color": colour, "width": 2.5 if arm == tapas else 1.4}
        data.append(
            {
                "x": x, "y": capped, "name": _name(arm, tapas), "mode": "lines+markers",
                "line": line,
            }
        )  # fmt: skip
        if arm in ("config", tapas):
            data.append(
                {
                    "x": x, "y": late, "name": f"{_name(arm, tapas)}: requests late",
                    "mode": "lines", "line": {**line, "dash": "dot"},
                }
            )  # fmt: skip
    return Figure(
        "capacity",
        "Servers added under the same limits against time under a cap",
        "Means over seeds; dotted: share of requests past a latency limit.",
        data,
        {
            "xaxis": {"title": {"text": "servers added (%)"}},
            "yaxis": {"title": {"text": "% of server time, or of requests"}},
        },
        height=340,
        wide=True,
        over_time=False,
    )
