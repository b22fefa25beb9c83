"""Energy by system, power over time, and energy against SLO attainment."""

from __future__ import annotations

from typing import Any

from testbed.analysis.figures import COLOURS, GREY, RED, Figure
from testbed.analysis.statistics import Estimate
from testbed.experiment import Results

SYSTEMS = (
    "SinglePool", "MultiPool", "ScaleInst", "ScaleShard", "ScaleFreq",
    "Inst+Shard", "Inst+Freq", "Shard+Freq", "DynamoLLM",
)  # fmt: skip


def figures(results: Results) -> list[Figure]:
    """All that the runs made allow."""
    found = []
    for place, scenario in enumerate(results.scenarios()):
        arms = [arm for arm in results.arms(scenario) if arm in SYSTEMS]
        found.append(_bars(results, scenario, arms, place))
        found.append(_pareto(results, scenario, place))
        found.append(_power(results, scenario, arms, place))
    return found


def _colour(arm: str) -> str:
    if arm == "DynamoLLM":
        return RED
    return COLOURS[SYSTEMS.index(arm)] if arm in SYSTEMS else GREY


def _bars(results: Results, scenario: str, arms: list[str], place: int) -> Figure:
    means = [results.mean("energy_kwh", arm, scenario) for arm in arms]
    return Figure(
        f"energy{place}",
        f"Energy by system, {scenario}",
        "GPUs of nodes in use; bars are 95 % intervals over seeds",
        [
            {
                "type": "bar",
                "x": arms,
                "y": [mean.mean for mean in means],
                "error_y": {"type": "data", "array": [mean.high - mean.mean for mean in means]},
                "marker": {"color": [_colour(arm) for arm in arms]},
                "showlegend": False,
            }
        ],
        {"yaxis": {"title": {"text": "kWh"}, "rangemode": "tozero"}},
        over_time=False,
    )


def _pareto(results: Results, scenario: str, place: int) -> Figure:
    data: list[dict[str, Any]] = []
    for arm in results.arms(scenario):
        energy = results.mean("energy_kwh", arm, scenario)
        attained = results.mean("attained_frac", arm, scenario).scaled(100.0)
        data.append(
            {
                "type": "scatter",
                "mode": "markers+text" if arm in SYSTEMS else "markers",
                "name": arm,
                "x": [energy.mean],
                "y": [attained.mean],
                "text": [arm],
                "textposition": "bottom center",
                "error_x": _whiskers(energy),
                "error_y": _whiskers(attained),
                "marker": {"color": _colour(arm), "size": 10},
                "showlegend": False,
            }
        )
    return Figure(
        f"pareto{place}",
        f"Energy against SLO attainment, {scenario}",
        "up and left is better; grey: variants of DynamoLLM and of SinglePool's provisioning",
        data,
        {
            "xaxis": {"title": {"text": "kWh"}, "type": "linear"},
            "yaxis": {"title": {"text": "% within limits"}},
        },
        over_time=False,
        height=360,
    )


def _whiskers(estimate: Estimate) -> dict[str, Any]:
    return {"type": "data", "array": [estimate.high - estimate.mean], "thickness": 1}


def _power(results: Results, scenario: str, arms: list[str], place: int) -> Figure:
    data = []
    for arm in arms:
        for run in results.of(arm, scenario):
            series = run.values.get("series")
            if series:
                week = scenario.endswith("week")
                scale = 168.0 / (4 * 3600.0) if week else 1 / 60.0  # a week in four hours
                data.append(
                    {
                        "type": "scatter",
                        "mode": "lines",
                        "name": arm,
                        "x": [t * scale for t in series["t_s"]],
                        "y": [w / 1000 for w in series["power_w"]],
                        "line": {"color": _colour(arm), "width": 1.5, "shape": "hv"},
                        "visible": True if arm in ("SinglePool", "DynamoLLM") else "legendonly",
                    }
                )
    return Figure(
        f"power{place}",
        f"Power of nodes in use, {scenario}",
        "first seed; click a name to show it",
        data,
        {
            "xaxis": {"title": {"text": "h" if scenario.endswith("week") else "min"}},
            "yaxis": {"title": {"text": "kW"}, "rangemode": "tozero"},
        },
        wide=True,
        over_time=False,
    )
