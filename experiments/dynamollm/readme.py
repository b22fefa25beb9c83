"""What ``testbed publish RUN`` puts into the README."""

from __future__ import annotations

from typing import Any

from testbed.analysis.drawing import Figure
from testbed.analysis.markdown import table
from testbed.experiment import Results, load_beside, shown

EXPERIMENT = load_beside(__file__, "experiment")
_figure = load_beside(__file__, "figure")
PROFILED = {
    "ss": "TP2 at 0.8 GHz is best (`secondary`)",
    "mm": "3.91 to 13.21 Wh over all cells, 3.4 times (`secondary`)",
    "ll": "needs TP8 and a high clock (`secondary`)",
}
"""Classes of which the paper says what their cells differ by."""
ACROSS = 2
"""Figures beside each other."""


# Tables.


def parts(results: Results) -> dict[str, str]:
    """What stands between which marks, as far as the runs allow it."""
    seeds = len({run.case.seed for run in results.runs})
    systems = [arm for arm in EXPERIMENT.SYSTEMS if _anywhere(results, arm)]
    front = [arm for arm in _arms(results) if arm.startswith(("DynamoLLM, ", "SinglePool x"))]
    found = {
        "run": f"{len(results.runs)} runs, {seeds} seed{'s' if seeds > 1 else ''}; "
        "means, ± half of the 95 % interval.",
        "energy": _energy(results, [*systems, *front]),
        "others": _others(results),
    }
    if EXPERIMENT.OVERLOAD in results.scenarios():
        found["ladder"] = _ladder(results)
    profile = EXPERIMENT.device_profile()
    found["profile"] = _profile({name: EXPERIMENT.profiled(profile, name) for name in PROFILED})
    variants = [arm for arm in EXPERIMENT.VARIANTS if _anywhere(results, arm)]
    if variants:
        found["variants"] = _variants(results, variants)
    return found


def _profile(cells: dict[str, list[Any]]) -> str:
    """What shapes, clocks and loads of one instance are worth, class by class."""
    lines = []
    for name, mine in cells.items():
        best, worst = (pick(mine, key=lambda cell: cell.energy_wh) for pick in (min, max))
        shapes = ", ".join(f"TP{tp}" for tp in sorted({cell.tp for cell in mine}))
        lines.append(
            [name.upper(), _cell(best), _cell(worst), f"{worst.energy_wh / best.energy_wh:.1f}",
             shapes, PROFILED[name]]
        )  # fmt: skip
    head = ["class", "least energy", "most", "ratio", "shapes that meet the limits", "the paper"]
    return table(head, lines)


def _cell(cell: Any) -> str:
    return (
        f"{cell.energy_wh:.2g} Wh a request (TP{cell.tp}, {cell.clock_mhz:.0f} MHz, "
        f"{cell.load_rps:.2g} /s)"
    )


def _scenarios(results: Results) -> list[str]:
    return [name for name in results.scenarios() if name != EXPERIMENT.OVERLOAD]


def _arms(results: Results) -> list[str]:
    return list(dict.fromkeys(run.case.arm for run in results.runs))


def _anywhere(results: Results, arm: str) -> bool:
    return any(results.of(arm, scenario) for scenario in _scenarios(results))


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
    return table(["system", *_scenarios(results)], lines)


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
    return table(head, lines)


def _variants(results: Results, arms: list[str]) -> str:
    where = "conversation hour"
    lines = [
        [arm, _change(results, "energy_kwh", arm, "DynamoLLM", where),
         _attained(results, arm, where)]
        for arm in arms
    ]  # fmt: skip
    return table([f"{where}, against DynamoLLM", "energy", "within limits"], lines)


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
    return table(["DynamoLLM against SinglePool", *scenarios], lines)


def pictures(results: Results) -> dict[str, list[Figure]]:
    """Energy of the systems, and energy against misses, of each scenario; the ladder last."""
    drawn = {figure.name: figure for figure in _figure.figures(results)}
    kinds = ("energy", "pareto", "rungs")
    shown_first = [f for kind in kinds for name, f in drawn.items() if name.startswith(kind)]
    return {"figure.svg": shown_first}
