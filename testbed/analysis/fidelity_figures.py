"""Figures of predicted against measured: one self-contained HTML page and a small SVG for docs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go

from testbed.analysis.fidelity import Comparison, compare

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
    """The six panels as a plain SVG, drawn without plotly's image engine (it needs a browser)."""
    width, height, margin = 300, 250, 34
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{3 * width}' height='{2 * height}' "
        "font-family='sans-serif' font-size='11'><rect width='100%' height='100%' fill='white'/>"
    ]
    for place, (title, set_name, quantity) in enumerate(_PICKS):
        chosen = [
            one for one in comparisons
            if (one.set, one.quantity) == (set_name, quantity) and one.gpu != "all"
        ]  # fmt: skip
        left, top = (place % 3) * width, (place // 3) * height
        if chosen:
            parts += _panel(chosen, title, left, top, width, height, margin)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")


def _panel(
    chosen: list[Comparison], title: str, left: int, top: int, width: int, height: int, margin: int
) -> list[str]:
    thin = [_thin(one) for one in chosen]
    every = np.concatenate([np.concatenate(pair) for pair in thin])
    every = every[np.isfinite(every) & (every > 0)]
    low, high = float(every.min()), float(every.max())
    log = high / low > 20
    ends = np.log10([low, high]) if log else np.array([low, high])

    def place(values: Any, span: int) -> Any:
        values = np.log10(np.maximum(values, 1e-12)) if log else values
        return (values - ends[0]) / (ends[1] - ends[0]) * span

    inner_w, inner_h = width - margin - 12, height - 2 * margin
    x0, y0 = left + margin, top + margin + inner_h
    parts = [
        f"<text x='{x0}' y='{top + 20}' font-weight='bold'>{title}</text>",
        f"<rect x='{x0}' y='{y0 - inner_h}' width='{inner_w}' height='{inner_h}' fill='none' "
        "stroke='#bbb'/>",
        f"<line x1='{x0}' y1='{y0}' x2='{x0 + inner_w}' y2='{y0 - inner_h}' stroke='#888'/>",
        f"<text x='{x0}' y='{y0 + 14}'>{low:.3g}</text>",
        f"<text x='{x0 + inner_w}' y='{y0 + 14}' text-anchor='end'>{high:.3g} measured</text>",
        f"<text x='{x0 + 4}' y='{y0 - inner_h + 14}'>predicted</text>",
    ]
    for colour, (predicted, measured) in enumerate(thin):
        step = max(1, len(measured) // 220)
        xs = x0 + place(measured[::step], inner_w)
        ys = y0 - place(predicted[::step], inner_h)
        dots = "".join(f"M{x:.1f} {y:.1f}h.1" for x, y in zip(xs, ys, strict=True))
        parts.append(
            f"<path d='{dots}' stroke='{_COLOURS[colour % len(_COLOURS)]}' stroke-width='2.2' "
            "stroke-linecap='round' opacity='.6' fill='none'/>"
        )
    return parts


def draw(data: Path | None, page: Path, small: Path | None = None) -> list[Comparison]:
    """Compare with the sets in ``data`` (the shipped ones if None) and draw what comes out."""
    comparisons = compare(data)
    write_page(comparisons, page)
    if small is not None:
        write_svg(comparisons, small)
    return comparisons
