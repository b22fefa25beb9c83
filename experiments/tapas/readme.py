"""What ``testbed publish RUN`` puts into the README; a run over ZeroMQ fills in its own part."""

from __future__ import annotations

from testbed.analysis.drawing import Figure
from testbed.analysis.markdown import table
from testbed.analysis.statistics import Estimate, mean_of
from testbed.experiment import Results, Row, load_beside, shown

FIGURES = ("heat-baseline", "heat-tapas", "power-day-40", "power-ups_lost-20", "capacity")
"""What of the report stands in the README."""
DASH = "-"

_tapas = load_beside(__file__, "experiment")
_figure = load_beside(__file__, "figure")
_CROWD = f"day +{_tapas.CROWDED:.0%}"
_FAILED = {kind: f"{kind} +{level:.0%}" for kind, level in _tapas.FAILURES.items()}
_ANSWER = [
    ("highest GPU temperature, day", "highest GPU temperature, a day, % of C"),
    ("highest GPU temperature above its inlet, day", "the same above its inlet, C"),
    ("highest row power, day", "highest row power, a day, %"),
    ("energy, day", "energy, a day, %"),
    ("P99 time to first token, day", "P99 time to first token, ms"),
    ("P99 time between tokens, day", "P99 time between tokens, ms"),
    ("requests past a limit, day", "requests past a limit, a day, %"),
    (f"thermal throttling events, {_CROWD}", f"thermal throttling, GPUs, {_CROWD}"),
    (f"power throttling events, {_CROWD}", f"power throttling, servers, {_CROWD}"),
    (f"time under the cap, {_CROWD}", f"time under the cap, % of server time, {_CROWD}"),
    (f"requests past a limit, {_CROWD}", f"requests past a limit, %, {_CROWD}"),
    ("servers added with under 1 % of time capped and of requests late", "servers added, %"),
]
"""Metrics of rows, and what the README calls them."""
_DAMAGE = {"speed of opaque VMs": "opaque VMs", "speed of endpoints": "endpoints",
           "quality": "quality"}  # fmt: skip


def spread(estimate: Estimate) -> str:
    """A mean, and half of its 95 % interval where that shows.

    >>> spread(mean_of([-1.0, -2.0, -3.0])), spread(mean_of([5.0, 5.0]))
    ('-2 ± 2.5', '5')
    """
    half, mean = (estimate.high - estimate.low) / 2.0, round(estimate.mean, 3) + 0.0
    return f"{shown(mean)} ± {half:.2g}" if half > 5e-4 else shown(mean)


def _cell(row: Row | None) -> str:
    if row is None or row.ours is None or row.ci95 is None:
        return DASH
    return spread(Estimate(row.ours, row.ci95[0], row.ci95[1], row.seeds))


def _paper(row: Row | None) -> str:
    if row is None or row.paper is None:
        return DASH
    return f"{shown(row.paper)} ({row.mark})"


def answer(results: Results) -> str:
    """TAPAS against the baseline, beside the paper."""
    rows: list[Row] = _tapas.rows(results)
    lines = []
    for metric, words in _ANSWER:
        for row in (r for r in rows if (r.metric, r.arm) == (metric, _tapas.TAPAS)):
            unit = ", change in %" if row.unit == "%" and "throttling" in metric else ""
            lines.append([words + unit, shown(row.baseline), _cell(row), _paper(row)])
    for scenario in _FAILED.values():
        for metric, words in _DAMAGE.items():
            base, ours = (
                next((r for r in rows if (r.metric, r.arm) == (f"{metric}, {scenario}", arm)), None)
                for arm in ("baseline", _tapas.TAPAS)
            )
            paper = f"{_paper(base)}; {_paper(ours)}" if base and base.paper else _paper(ours)
            lines.append([f"{scenario}: {words}, %", _cell(base), _cell(ours), paper])
    return table(["", "baseline", "TAPAS (95 %)", "paper"], lines)


def rungs(results: Results) -> str:
    """Each controller alone, in pairs and all together; then the peers."""
    lines = []
    seeds = sorted({run.case.seed for run in results.of("baseline", "day")})
    for arm in [*_tapas.ARMS, *_tapas.PEERS]:
        if not results.of(arm, "day"):
            continue
        temp_c, row_w = (
            results.change(name, arm, "baseline", "day").scaled(100.0)
            for name in ("temp_max_c", "row_max_w")
        )
        cells = [spread(temp_c), spread(results.mean("rise_max_c", arm, "day")), spread(row_w)]
        for name, scale in (("thermal_events", 1), ("power_events", 1), ("capped_frac", 100)):
            there = results.of(arm, _CROWD)
            cells.append(spread(results.mean(name, arm, _CROWD).scaled(scale)) if there else DASH)
        levels = [s for s in results.scenarios() if s.startswith("day +")]
        known = all(results.of(arm, level) for level in levels)
        added = [_tapas.reached(results, arm, seed) for seed in seeds] if known else []
        lines.append([_named(arm), *cells, spread(mean_of(added)) if added else DASH])
    head = [
        "system", "highest temperature, %", "above inlet, C", "row power, %",
        f"{_CROWD}: hot GPUs", "capped servers", "time capped, %", "servers added, %",
    ]  # fmt: skip
    return table(head, lines)


def failures(results: Results) -> str:
    """What each system does in a failure: change against an undisturbed full clock."""
    lines = []
    for arm in [*_tapas.ARMS, "polca"]:
        cells = []
        for scenario in _FAILED.values():
            there = results.of(arm, scenario)
            for what in ("iaas", "saas", "quality"):
                values = [100.0 * (run.values[f"during_{what}"] - 1.0) for run in there]
                cells.append(spread(mean_of(values)) if values else DASH)
        if set(cells) != {DASH}:
            lines.append([_named(arm), *cells])
    head = ["system, %"]
    for scenario in _FAILED.values():
        head += [f"{scenario}: {words}" for words in _DAMAGE.values()]
    return table(head, lines)


def safety(results: Results) -> str:
    """In how many seeds a breaker opens, where one does without a cap."""
    lines = []
    for scenario in results.scenarios():
        opened = {
            arm: sum(bool(run.values["trips"]) for run in results.of(arm, scenario))
            for arm in results.arms(scenario)
        }
        if opened.get("none"):
            cells = [str(opened.get(a, DASH)) for a in ("none", "baseline", "polca", _tapas.TAPAS)]
            lines.append([scenario, str(len(results.of("none", scenario))), *cells])
    return table(["scenario", "seeds", "no cap", "baseline", "POLCA-like", "TAPAS"], lines)


def bands(results: Results) -> str:
    """Declared values, swept: days by time capped and requests late, failures by what they cost."""
    days = {f"{name} {value}" for name, many in _tapas.BANDS.items() for value, _ in many}
    lines = []
    for scenario in results.scenarios():
        kind = scenario.partition(" ")[0]
        if scenario in days or scenario == _CROWD:
            words, names = "time capped; requests late", ("capped_frac", "late_frac")
        elif kind in _FAILED or kind == "reload":
            words, names = "opaque VMs' speed; quality", ("during_iaas", "during_quality")
        else:
            continue
        cells = [
            "; ".join(spread(results.mean(name, arm, scenario).scaled(100.0)) for name in names)
            for arm in ("baseline", _tapas.TAPAS)
        ]
        lines.append([scenario, f"{words}, %", *cells])
    return table(["scenario", "", "baseline", "TAPAS"], lines)


def _named(arm: str) -> str:
    words = {_tapas.TAPAS: "all three", "polca": "POLCA-like cap", "none": "no cap"}
    return words.get(arm, arm.replace("+", ", "))


def live(results: Results) -> str:
    """The small run over ZeroMQ."""
    rows: list[Row] = _tapas.rows(results)
    lines = [
        [f"{row.metric}, {row.unit}", shown(row.baseline), _cell(row), _paper(row)] for row in rows
    ]
    return table(["", "baseline", "TAPAS (95 %)", "paper"], lines)


def parts(results: Results) -> dict[str, str]:
    """What stands between which marks."""
    seeds = len({run.case.seed for run in results.runs})
    made = f"{len(results.runs)} runs, seeds 1 to {seeds}; means, ± half of the 95 % interval."
    if results.options.mode == "emulated":
        return {"live run": made, "live": live(results)}
    makers = (answer, rungs, failures, safety, bands)
    return {"run": made} | {make.__name__: make(results) for make in makers}


def pictures(results: Results) -> dict[str, list[Figure]]:
    """What of the report stands in the README; a run over ZeroMQ has no pictures."""
    drawn = {figure.name: figure for figure in _figure.figures(results)}
    return {"figure.svg": [drawn[name] for name in FIGURES if name in drawn]}
