"""Energy by system, power over time, and energy against SLO attainment."""

from __future__ import annotations

from typing import Any

from testbed.analysis.drawing import COLOURS, GREY, RED, Figure
from testbed.analysis.statistics import Estimate
from testbed.experiment import Results

SYSTEMS = (
    "SinglePool", "MultiPool", "ScaleInst", "ScaleShard", "ScaleFreq",
    "Inst+Shard", "Inst+Freq", "Shard+Freq", "DynamoLLM",
)  # fmt: skip

SYMBOLS = (
    "square", "diamond", "cross", "x", "triangle-up", "triangle-down", "star", "hexagon",
    "square-open", "diamond-open", "triangle-up-open", "triangle-down-open", "star-open",
)  # fmt: skip
_LEAST = 0.005
"""Percent: where no request missed its limits there is no logarithm."""


def figures(results: Results) -> list[Figure]:
    """All that the runs made allow."""
    found = []
    for place, scenario in enumerate(results.scenarios()):
        if scenario == "overload":
            continue
        arms = [arm for arm in results.arms(scenario) if arm in SYSTEMS]
        found.append(_bars(results, scenario, arms, place))
        found.append(_pareto(results, scenario, place))
        found.append(_power(results, scenario, arms, place))
    if "overload" in results.scenarios():
        found.append(_rungs(results))
    return found


def _rungs(results: Results) -> Figure:
    """What each rung of the ladder buys."""
    rungs = results.arms("overload")
    shares = [results.mean("attained_frac", arm, "overload").scaled(100.0) for arm in rungs]
    return Figure(
        "rungs",
        "Overload: rungs of the ladder",
        "% of requests within their limits; bars are 95 % intervals over seeds",
        [
            {
                "type": "bar",
                "x": rungs,
                "y": [share.mean for share in shares],
                "error_y": {"type": "data", "array": [s.high - s.mean for s in shares]},
                "marker": {"color": GREY},
                "showlegend": False,
            }
        ],
        {"yaxis": {"title": {"text": "%"}, "rangemode": "tozero"}},
        over_time=False,
    )


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
    """Names stand in the legend: points lie too close for labels of their own."""
    arms = results.arms(scenario)
    energy = {arm: results.mean("energy_kwh", arm, scenario) for arm in arms}
    missed = {
        arm: max(_LEAST, 100.0 * (1.0 - results.mean("attained_frac", arm, scenario).mean))
        for arm in arms
    }
    data: list[dict[str, Any]] = []
    for name, colour in (("DynamoLLM", RED), ("SinglePool", COLOURS[0])):
        front = sorted(
            (
                arm
                for arm in arms
                if arm == name or (arm.startswith((f"{name}, ", f"{name} x")) and "x 2" not in arm)
            ),
            key=lambda arm: energy[arm].mean,
        )
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": [energy[arm].mean for arm in front],
                "y": [missed[arm] for arm in front],
                "line": {"color": colour, "width": 1, "dash": "dot"},
                "showlegend": False,
                "hoverinfo": "skip",
            }
        )
    others = [arm for arm in arms if arm not in SYSTEMS]
    for arm in arms:
        system = arm in SYSTEMS
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": arm,
                "x": [energy[arm].mean],
                "y": [missed[arm]],
                "error_x": _whiskers(energy[arm]),
                "marker": {
                    "color": _colour(arm),
                    "size": 11 if system else 8,
                    "symbol": "circle" if system else SYMBOLS[others.index(arm) % len(SYMBOLS)],
                },
            }
        )
    return Figure(
        f"pareto{place}",
        f"Energy against misses, {scenario}",
        "down and left is better; dotted: DynamoLLM by its care, SinglePool by its size",
        data,
        {
            "xaxis": {"title": {"text": "kWh"}},
            "yaxis": {"title": {"text": "% beyond limits"}, "type": "log"},
            "legend": {"orientation": "h", "y": -0.25, "font": {"size": 10}},
        },
        over_time=False,
        height=460,
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
