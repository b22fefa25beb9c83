"""Figures of predicted against measured: one self-contained HTML page and a small SVG for docs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go

from testbed.analysis.drawing import Figure
from testbed.analysis.fidelity import Comparison, compare
from testbed.analysis.pictures import save

_POINTS = 1500
_COLOURS = ("#2a6f97", "#bc4b51", "#5b8e7d", "#8d6b94", "#f4a259", "#333333", "#7a9e9f", "#b08968")
_PICKS = [
    ("GEMM, s", "gpu_kernels_aiconfigurator", "gemm_bf16_s"),
    ("Mixed attention, s", "vllm_kernel_profiles", "prefill_attention_s"),
    ("TPOT of vLLM run, s", "vllm_runs", "tpot_s"),
    ("TTFT, closed loop, s", "llm_e2e_silicon", "ttft_s"),
    ("TPOT, closed loop, s", "llm_e2e_silicon", "tpot_s"),
    ("Serving power, W", "ml_energy_v3", "power_w"),
]
"""Title, set and quantity of the panels of the small figure."""


def _thin(comparison: Comparison) -> tuple[Any, Any]:
    predicted, measured = comparison.predicted, comparison.measured
    if len(measured) > _POINTS:
        rows = np.random.default_rng(0).choice(len(measured), _POINTS, replace=False)
        return predicted[rows], measured[rows]
    return predicted, measured


def write_page(comparisons: Sequence[Comparison], path: Path) -> None:
    """One panel per set and quantity, a colour per GPU and model; opens without a network."""
    groups: dict[tuple[str, str], list[Comparison]] = {}
    for comparison in comparisons:
        if len(comparison.measured) > 1 and comparison.gpu != "all":
            groups.setdefault((comparison.set, comparison.quantity), []).append(comparison)
    parts = [
        "<!doctype html><meta charset='utf-8'><title>Predicted against measured</title>"
        "<h1>Predicted against measured</h1><p>Each point is one measured row, predicted with "
        "constants that have not seen its configuration. The line is equality.</p>"
    ]
    for number, ((set_name, quantity), members) in enumerate(sorted(groups.items())):
        figure = go.Figure()
        low, high = np.inf, -np.inf
        for colour, comparison in enumerate(members):
            predicted, measured = _thin(comparison)
            row = comparison.row()
            unit = "" if comparison.differences else "%"
            scale = 1.0 if comparison.differences else 100.0
            name = (
                f"{comparison.gpu} {comparison.model}: median error "
                f"{scale * row['ape_median_frac']:.3g}{unit}, {row['rows']} rows"
            )
            figure.add_scattergl(
                x=measured, y=predicted, mode="markers", name=name,
                marker={"size": 4, "opacity": 0.5, "color": _COLOURS[colour % len(_COLOURS)]},
            )  # fmt: skip
            both = np.concatenate([predicted, measured])
            both = both[np.isfinite(both) & (both > 0)]
            low, high = min(low, float(both.min())), max(high, float(both.max()))
        figure.add_scatter(
            x=[low, high], y=[low, high], mode="lines", name="equal",
            line={"color": "#999999", "width": 1},
        )  # fmt: skip
        log = high / max(low, 1e-12) > 20
        axis = {"type": "log" if log else "linear"}
        figure.update_layout(
            title=f"{set_name}: {quantity}", height=460, width=900, template="plotly_white",
            xaxis={"title": "measured", **axis}, yaxis={"title": "predicted", **axis},
        )  # fmt: skip
        parts.append(figure.to_html(full_html=False, include_plotlyjs=number == 0))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts), encoding="utf-8")


def write_svg(comparisons: Sequence[Comparison], path: Path) -> None:
    """The six panels as one picture."""
    save([_panel(comparisons, *pick) for pick in _PICKS], path, across=3)


def _panel(comparisons: Sequence[Comparison], title: str, set_name: str, quantity: str) -> Figure:
    """What was predicted over what was measured, a colour per GPU."""
    chosen = [
        one for one in comparisons
        if (one.set, one.quantity) == (set_name, quantity) and one.gpu != "all"
    ]  # fmt: skip
    data: list[dict[str, Any]] = []
    values = []
    for one, colour in zip(chosen, itertools.cycle(_COLOURS)):
        predicted, measured = _thin(one)
        step = max(1, len(measured) // 220)
        values += [*measured, *predicted]
        data.append(
            {
                "x": measured[::step], "y": predicted[::step], "mode": "markers", "name": one.gpu,
                "marker": {"color": colour, "size": 4}, "opacity": 0.6, "showlegend": False,
            }
        )  # fmt: skip
    known = np.array([value for value in values if np.isfinite(value) and value > 0])
    ends = [float(known.min()), float(known.max())] if len(known) else [1.0, 2.0]
    scale = "log" if ends[1] / ends[0] > 20 else "linear"
    data.insert(0, {"x": ends, "y": ends, "line": {"color": "#888888", "width": 1}})
    axis = {"type": scale}
    return Figure(
        quantity,
        title,
        "predicted over measured",
        data,
        {"xaxis": {**axis, "title": {"text": "measured"}}, "yaxis": axis},
    )


def draw(data: Path | None, page: Path, small: Path | None = None) -> list[Comparison]:
    """Compare with the sets in ``data`` (the shipped ones if None) and draw what comes out."""
    comparisons = compare(data)
    write_page(comparisons, page)
    if small is not None:
        write_svg(comparisons, small)
    return comparisons
