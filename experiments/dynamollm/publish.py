"""What the README shows of a finished experiment: its tables, and `figure.svg`.

    python -m experiments.dynamollm.publish runs/RESULT

prints the tables and draws the figure beside this file. Drawn without plotly's image engine, which
needs a browser; the same and more, to be pointed at, is in the result's ``report.html``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from testbed.analysis.drawing import COLOURS, GREY, RED
from testbed.experiment import Results, find_experiment, read_results, shown

HERE = Path(__file__).parent
EXPERIMENT = find_experiment(str(HERE)).module
LEAST_PCT = 0.005
"""Where no request missed its limits there is no logarithm."""


# Tables.


def tables(results: Results) -> str:
    """All that the runs made allow, as Markdown."""
    systems = [arm for arm in EXPERIMENT.SYSTEMS if _anywhere(results, arm)]
    front = [arm for arm in _arms(results) if arm.startswith(("DynamoLLM, ", "SinglePool x"))]
    parts = [_energy(results, [*systems, *front])]
    if EXPERIMENT.OVERLOAD in results.scenarios():
        parts.append(_ladder(results))
    variants = [arm for arm in EXPERIMENT.VARIANTS if _anywhere(results, arm)]
    if variants:
        parts.append(_variants(results, variants))
    parts.append(_others(results))
    return "\n\n".join(parts)


def _scenarios(results: Results) -> list[str]:
    return [name for name in results.scenarios() if name != EXPERIMENT.OVERLOAD]


def _arms(results: Results) -> list[str]:
    return list(dict.fromkeys(run.case.arm for run in results.runs))


def _anywhere(results: Results, arm: str) -> bool:
    return any(results.of(arm, scenario) for scenario in _scenarios(results))


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _attained(results: Results, arm: str, scenario: str) -> str:
    return f"{100 * results.mean('attained_frac', arm, scenario).mean:.2f} %"


def _change(results: Results, number: str, arm: str, against: str, scenario: str) -> str:
    """Change in percent; behind it half the width of its interval, where there are several seeds.

    Seeds are paired, so that an arm with fewer is compared on those it has.
    """
    mine = results.by_seed(number, arm, scenario)
    base = results.by_seed(number, against, scenario)
    if not set(mine) <= set(base):
        return "-"
    change = results.change(number, arm, against, scenario).scaled(100.0)
    spread = f" ± {(change.high - change.low) / 2:.1f}" if change.num > 1 else ""
    return f"{change.mean:+.0f}{spread} %"


def _energy(results: Results, arms: list[str]) -> str:
    lines = []
    for arm in arms:
        cells = [f"**{arm}**" if arm == "DynamoLLM" else arm]
        for scenario in _scenarios(results):
            if not results.of(arm, scenario):
                cells.append("")
                continue
            if arm == "SinglePool":
                told = f"{shown(results.mean('energy_kwh', arm, scenario).mean)} kWh"
            else:
                told = _change(results, "energy_kwh", arm, "SinglePool", scenario)
            cells.append(f"{told}, {_attained(results, arm, scenario)}")
        lines.append(cells)
    return _table(["system", *_scenarios(results)], lines)


def _ladder(results: Results) -> str:
    where = EXPERIMENT.OVERLOAD
    counts = ("ordered", "faster", "recalled", "squashed")
    lines = [
        [arm, _attained(results, arm, where),
         f"{results.mean('ttft_s.p99', arm, where).mean:.1f} s",
         *(f"{results.mean(f'ladder.{count}', arm, where).mean:,.0f}" for count in counts)]
        for arm in EXPERIMENT.LADDER
    ]  # fmt: skip
    head = ["overload", "within limits", "P99 TTFT of what was served", "queues ordered",
            "clocks raised", "requests sent elsewhere", "requests dropped"]  # fmt: skip
    return _table(head, lines)


def _variants(results: Results, arms: list[str]) -> str:
    where = "conversation hour"
    lines = [
        [arm, _change(results, "energy_kwh", arm, "DynamoLLM", where),
         _attained(results, arm, where)]
        for arm in arms
    ]  # fmt: skip
    return _table([f"{where}, against DynamoLLM", "energy", "within limits"], lines)


def _others(results: Results) -> str:
    numbers = {
        "carbon": "carbon_kg", "GPU-hours": "gpu_h", "power P50": "power_w.p50",
        "power P99": "power_w.p99", "TTFT P50": "ttft_s.p50", "TTFT P99": "ttft_s.p99",
        "TBT P50": "tbt_s.p50", "TBT P99": "tbt_s.p99", "energy with hosts": "with_hosts_kwh",
        "with nodes given back idle": "with_released_kwh", "with both": "whole_cluster_kwh",
    }  # fmt: skip
    scenarios = _scenarios(results)
    lines = [
        [name, *(_change(results, number, "DynamoLLM", "SinglePool", s) for s in scenarios)]
        for name, number in numbers.items()
    ]
    return _table(["DynamoLLM against SinglePool", *scenarios], lines)


# The figure.

PANEL_W, PANEL_H, MARGIN = 330, 250, 44


def draw(results: Results) -> str:
    """Energy of the systems, and energy against misses, of each scenario; the ladder last."""
    panels = [_bars(results, scenario) for scenario in _scenarios(results)]
    panels += [_front(results, scenario) for scenario in _scenarios(results)]
    if EXPERIMENT.OVERLOAD in results.scenarios():
        panels.append(_rungs(results))
    across = max(1, min(4, len(_scenarios(results))))
    down = -(-len(panels) // across)
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{across * PANEL_W}' "
        f"height='{down * PANEL_H}' font-family='sans-serif' font-size='11'>"
        "<rect width='100%' height='100%' fill='white'/>"
    ]
    for place, panel in enumerate(panels):
        x, y = place % across * PANEL_W, place // across * PANEL_H
        parts.append(f"<g transform='translate({x} {y})'>{''.join(panel)}</g>")
    return "\n".join([*parts, "</svg>\n"])


def _colour(arm: str) -> str:
    names = list(EXPERIMENT.SIX)
    if arm == "DynamoLLM":
        return RED
    return COLOURS[names.index(arm)] if arm in names else GREY


def _text(x: float, y: float, words: str, more: str = "") -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' {more}>{words}</text>"


def _frame(title: str, y_title: str) -> list[str]:
    return [
        _text(MARGIN, 16, title, "font-weight='bold'"),
        _text(MARGIN, 32, y_title, "fill='#555'"),
        f"<path d='M{MARGIN} 40V{PANEL_H - MARGIN}H{PANEL_W - 10}' fill='none' stroke='#999'/>",
    ]


def _bars(results: Results, scenario: str) -> list[str]:
    arms = [arm for arm in EXPERIMENT.SIX if results.of(arm, scenario)]
    means = [results.mean("energy_kwh", arm, scenario) for arm in arms]
    return _bar_panel(
        f"Energy, {scenario}",
        "kWh of GPUs on nodes in use; whiskers: 95 %",
        [(arm, mean.mean, mean.low, mean.high, _colour(arm)) for arm, mean in zip(arms, means,
                                                                                 strict=True)],
    )  # fmt: skip


def _rungs(results: Results) -> list[str]:
    bars = []
    for place, arm in enumerate(EXPERIMENT.LADDER):
        share = results.mean("attained_frac", arm, EXPERIMENT.OVERLOAD).scaled(100.0)
        bars.append((arm.lstrip("+ "), share.mean, share.low, share.high, COLOURS[place]))
    return _bar_panel("Overload: rungs of the ladder", "% within limits; whiskers: 95 %", bars)


def _bar_panel(
    title: str, y_title: str, bars: list[tuple[str, float, float, float, str]]
) -> list[str]:
    floor = PANEL_H - MARGIN
    top = max(max(value, high) for _, value, _, high, _ in bars)
    scale = (floor - 52) / top
    step = (PANEL_W - MARGIN - 10) / len(bars)
    parts = _frame(title, y_title)
    for place, (name, value, low, high, colour) in enumerate(bars):
        x, middle = MARGIN + step * (place + 0.15), MARGIN + step * (place + 0.5)
        parts.append(
            f"<rect x='{x:.1f}' y='{floor - value * scale:.1f}' width='{0.7 * step:.1f}' "
            f"height='{value * scale:.1f}' fill='{colour}'/>"
        )
        parts.append(
            f"<path d='M{middle:.1f} {floor - low * scale:.1f}V{floor - high * scale:.1f}' "
            "stroke='#333'/>"
        )
        parts.append(_text(middle, floor - high * scale - 4, shown(value), "text-anchor='middle'"))
        parts.append(_text(middle, floor + 13 + 12 * (place % 2), name, "text-anchor='middle'"))
    return parts


def _front(results: Results, scenario: str) -> list[str]:
    arms = [
        arm for arm in results.arms(scenario)
        if arm in EXPERIMENT.SIX or arm.startswith(("DynamoLLM, ", "SinglePool x"))
    ]  # fmt: skip
    arms = [arm for arm in arms if "x 2" not in arm]
    energy = {arm: results.mean("energy_kwh", arm, scenario).mean for arm in arms}
    missed = {
        arm: max(LEAST_PCT, 100.0 - 100.0 * results.mean("attained_frac", arm, scenario).mean)
        for arm in arms
    }
    floor, right = PANEL_H - MARGIN, PANEL_W - 10
    most = 1.05 * max(energy.values())
    logs = [math.log10(value) for value in missed.values()]
    low, high = min(*logs, -2.0), max(*logs, 0.0) + 0.1

    def at(arm: str) -> tuple[float, float]:
        share = (math.log10(missed[arm]) - low) / (high - low)
        return MARGIN + energy[arm] / most * (right - MARGIN), floor - share * (floor - 46)

    parts = _frame(f"Energy against misses, {scenario}", "% beyond limits (log), over kWh")
    for tick in range(math.ceil(low), math.floor(high) + 1):
        y = floor - (tick - low) / (high - low) * (floor - 46)
        parts.append(_text(MARGIN - 4, y + 4, f"{10.0**tick:g}", "text-anchor='end'"))
        parts.append(f"<path d='M{MARGIN} {y:.1f}H{right}' stroke='#eee'/>")
    parts.append(_text(right, floor + 14, f"{shown(most)} kWh", "text-anchor='end'"))
    for arm in arms:
        x, y = at(arm)
        parts.append(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='4' fill='{_colour(arm)}'/>")
        name = arm.removeprefix("DynamoLLM, ").replace("SinglePool x", "Single x")
        side = "end' dx='-6" if x > 0.7 * PANEL_W else "start' dx='6"
        parts.append(_text(x, y + 4, name, f"text-anchor='{side}' font-size='9'"))
    return parts


def main(folder: Path) -> None:
    """Print the tables of a result and draw its figure."""
    results = read_results(folder)
    print(tables(results))
    (HERE / "figure.svg").write_text(draw(results), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
