"""TAPAS against what it is held against: a day, a crowded day, how many servers fit, two failures.

Each run is a cluster in the mean (`cluster.run`); ``--mode emulated`` makes the small run of
``run.toml`` over ZeroMQ instead, with the same policy files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from testbed import rig
from testbed.analysis.statistics import mean_of
from testbed.core.view import Floats
from testbed.experiment import Case, Options, Results, Row, Values, load_beside
from testbed.recorder.reader import Recording

MODES = ("virtual", "emulated")
RUNGS = ["place", "route", "config", "place+route", "place+config", "route+config"]
TAPAS = "place+route+config"
ARMS = ["baseline", *RUNGS, TAPAS]
"""Every rung of the ablation; each keeps the baseline's cap as its last resort."""
PEERS = ["none", "polca"]
CROWDED = 0.4
LEVELS = [0.2, 0.3, 0.35, 0.4, 0.45, 0.5]
FAILURES = {"ups_lost": 0.2, "ahu_lost": 0.3}
"""Servers added where a failure is played: the first of the levels at which the baseline's draw or
air exceeds what is left."""
SAFETY = f"UPS out for good +{CROWDED:.0%}"
FAIL_S, FAILED_S = 1200.0, 300.0
CAPPED_FRAC = LATE_FRAC = 0.01
"""A level counts as reached with less than this share of time capped, and of requests late."""
DECLARED = {
    "site, day": "Phoenix AZ, 24 July of a typical year: 45 C; San Jose swept",
    "demand of the busiest hour over what endpoints can serve": "0.7; swept 0.5 to 0.8",
    "peak load of opaque VMs": "0.85 of full load, customers 0.15 either way; swept 0.7 to 1.0",
    "share of VMs that serve endpoints": "0.5; swept 0 to 0.75",
    "time without an instance while it reloads": "30 s; swept 5 to 60 s",
    "limits of first-token and mean inter-token time": "2 s, 60 ms",
    "TAPAS: share of row power used, margins": "0.93; demand 25 %, temperature 3 C, percentile 95",
    "uniform cap": "35 % of the clock above 97 % of a limit, released below 85 % for 120 s",
    "grace of the last-resort cap under a configurator": "45 s; a UPS bears 133 % for 99 s",
    "servers added in the failures": "20 % (UPS), 30 % (air handler); swept 0 to 40 %",
}
BANDS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "site": [("San Jose", {"overrides": ['plant.site="san_jose_ca"']})],
    "sizing": [(f"{x:g}", {"sizing": x}) for x in (0.5, 0.6, 0.8)],
    "opaque load": [(f"{x:g}", {"overrides": [f"vms.intensity={x}"]}) for x in (0.7, 1.0)],
    "share of endpoints": [(f"{x:g}", {"saas_share": x}) for x in (0.0, 0.25, 0.75)],
}
"""What is swept around the declared values, on the crowded day."""


def cases(options: Options) -> list[Case]:
    """Which runs to make."""
    if options.mode == "emulated":
        seeds = options.seed_list(full=5, quick=1)
        return [Case(arm, seed, "live") for arm in ("baseline", "tapas") for seed in seeds]
    seeds, quick = options.seed_list(full=5, quick=2), options.quick
    step_s = 180.0 if quick else 60.0
    made: list[Case] = []

    def add(scenario: str, arms: list[str], which: list[int], **params: Any) -> None:
        made.extend(Case(arm, seed, scenario, params=params) for arm in arms for seed in which)

    arms = ["baseline", "place", "route", "config", TAPAS] if quick else ARMS
    day = {"until_s": 86_400.0, "dt_s": step_s}
    add("day", [*arms, *PEERS], seeds, oversubscription=0.0, **day)
    singles = [] if quick else ["place", "route", "config", "polca"]
    for level in [0.2, 0.3, CROWDED, 0.5] if quick else LEVELS:
        some = [*arms, *PEERS] if level == CROWDED else ["baseline", TAPAS, *singles]
        add(f"day +{level:.0%}", some, seeds, oversubscription=level, **day)
    hour = {"until_s": 2400.0, "dt_s": 5.0, "peak": True}
    for kind, level in FAILURES.items():
        some = ["baseline", TAPAS, "none", "polca", *singles[:3]]
        add(f"{kind} +{level:.0%}", some, seeds, oversubscription=level, failure=kind, **hour)
        for extra in [] if quick else [x for x in (0.0, 0.2, 0.3, 0.4) if x != level]:
            add(
                f"{kind} +{extra:.0%}",
                ["baseline", TAPAS],
                seeds,
                oversubscription=extra,
                failure=kind,
                **hour,
            )
    # A UPS that stays out, with so many servers that only a cap keeps the others from following.
    add(
        SAFETY,
        ["none", "baseline", "polca", TAPAS],
        seeds,
        oversubscription=CROWDED,
        failure="ups_lost",
        lasts_s=1200.0,
        **hour,
    )
    if quick:
        return made
    for name, settings in BANDS.items():
        for value, params in settings:
            add(
                f"{name} {value}",
                ["baseline", TAPAS],
                seeds,
                oversubscription=CROWDED,
                **day,
                **params,
            )
    for reload_s in (5.0, 60.0):
        add(
            f"reload {reload_s:g} s",
            ["baseline", TAPAS],
            seeds,
            oversubscription=0.2,
            failure="ups_lost",
            reload_s=reload_s,
            **hour,
        )
    return made


def measure(case: Case, folder: Path) -> Values:
    """Numbers of one run."""
    if case.scenario == "live":
        return _measure_live(case, folder)
    cluster = load_beside(__file__, "cluster")
    params = dict(case.params)
    failure, lasts_s = params.pop("failure", ""), params.pop("lasts_s", FAILED_S)
    overrides = [f"seed={case.seed}", *params.pop("overrides", [])]
    if params.pop("peak", False):
        overrides.append("plant.start_hour=4882")  # ten in the morning, the busiest hour
    if failure:
        fault = f'{{kind="{failure}",at_s={FAIL_S},duration_s={lasts_s}}}'
        overrides += [f"fault=[{fault}]", "duration_s=3600"]
    fleet, tally = cluster.run(case.arm, overrides, **params)
    servers = fleet.servers
    series = np.array(tally.series)
    rows = fleet.hall.num_rows
    weight = np.concatenate(tally.weight)
    values: Values = {
        "temp_max_c": tally.temp_max_c,
        "rise_max_c": tally.rise_max_c,
        "row_max_frac": tally.row_max_frac,
        "row_max_w": tally.row_max_w,
        "thermal_events": tally.thermal_events,
        "thermal_frac": tally.thermal_s / tally.time_s / servers / fleet.per,
        "power_events": tally.power_events,
        "capped_frac": tally.capped_s / tally.time_s / servers,
        "over_frac": tally.over_s / tally.time_s / rows,
        "trips": tally.trips,
        "dark_servers": tally.dark_servers,
        # What was asked and never served is late, too.
        "late_frac": round((tally.late + tally.asked - tally.served) / max(tally.asked, 1e-9), 9),
        "ttft_p99_s": _percentile(np.concatenate(tally.ttft_s), weight, 0.99),
        "itl_p99_s": _percentile(np.concatenate(tally.itl_s), weight, 0.99),
        "iaas_speed": tally.iaas_work / max(tally.iaas_wanted, 1e-9),
        "quality_frac": tally.quality / tally.served if tally.served else 1.0,
        "energy_j": tally.energy_j,
        "servers": servers,
        "unplaced": tally.unplaced,
    }
    if failure:
        during = (series[:, 0] > FAIL_S) & (series[:, 0] <= FAIL_S + FAILED_S)
        before = (series[:, 0] > FAIL_S - 600) & (series[:, 0] <= FAIL_S)
        for name, column in {"iaas": -3, "saas": -2, "quality": -1}.items():
            values[f"during_{name}"] = float(series[during, column].mean())
            values[f"before_{name}"] = float(series[before, column].mean())
        values["during_capped_frac"] = float(series[during, -4].mean())
        values["during_temp_max_c"] = float(series[during, -6].max())
    if case.seed == 1:
        values["series"] = {
            "t_s": series[:, 0].tolist(),
            "row_w": series[:, 1 : 1 + rows].tolist(),
            "limit_w": series[:, 1 + rows : 1 + 2 * rows].tolist(),
        }
        values["heat_c"] = tally.heat_c.tolist()
        values["server_max_w"] = tally.server_max_w.tolist()
        opaque = fleet.facility.vms.pool[fleet.vm_of] < 0
        kind = np.where(fleet.vm_of < 0, 0, np.where(opaque, 1, 2))
        values["kind"] = kind.tolist()
        values["row_of"] = fleet.hall.row.tolist()
    return values


def _percentile(values: Floats, weight: Floats, part: float) -> float:
    if not len(values):
        return 0.0
    order = np.argsort(values)
    total = np.cumsum(weight[order])
    return float(values[order][np.searchsorted(total, part * total[-1])])


def _measure_live(case: Case, folder: Path) -> Values:
    live = load_beside(__file__, "live")
    run_folder = rig.run(live.live_spec(case.arm, [f"seed={case.seed}"]), folder)
    recording = Recording.open(run_folder)
    summary: Values = recording.summary or {}
    table = recording.columns("facility", "now_s", "quantity", "place_index", "value")
    spec = recording.spec
    [fault] = spec.fault
    series = {name: _over_time(table, name) for name in ("vms.draw_w", "row_draw_w", "row_limit_w")}

    def mean(name: str, start_s: float, end_s: float) -> Floats:
        times, values = series[name]
        chosen: Floats = values[(times > start_s) & (times <= end_s)].mean(axis=0)
        return chosen

    ends_s = fault.at_s + fault.duration_s
    before_w, during_w = mean("vms.draw_w", 4, fault.at_s), mean("vms.draw_w", fault.at_s, ends_s)
    settled = mean("row_draw_w", fault.at_s + 6, ends_s) / mean(
        "row_limit_w", fault.at_s + 6, ends_s
    )
    times, draws_w = series["row_draw_w"]
    return {
        "row_max_w": float(draws_w[(times > 4) & (times <= fault.at_s)].max()),
        "vms_kept_frac": float((during_w / before_w).mean()),
        "row_load_settled": float(settled.max()),
        "slo_attained_frac": summary["requests"]["slo_attained_frac"],
        "lateness_p99_s": summary["lateness_s"]["p99"],
        "valid": float(summary["valid"]),
        "run_folder": str(run_folder),
    }


def _over_time(table: dict[str, Any], quantity: str) -> tuple[Floats, Floats]:
    """A quantity of the building at each time that it changed: times, and values by place."""
    mine = table["quantity"].astype(str) == quantity
    times, at = np.unique(table["now_s"][mine], return_inverse=True)
    count = int(table["place_index"][mine].max()) + 1
    values = np.full((len(times), count), np.nan)
    values[at, table["place_index"][mine]] = table["value"][mine]
    for row in range(1, len(values)):
        values[row] = np.where(np.isnan(values[row]), values[row - 1], values[row])
    return times, values


def rows(results: Results) -> list[Row]:
    """What the runs say, beside the paper."""
    if results.options.mode == "emulated":
        return _live_rows(results)
    found = [*_day_rows(results), *_crowded_rows(results), _capacity_rows(results)]
    flat = [row for part in found for row in (part if isinstance(part, list) else [part])]
    return [*flat, *_failure_rows(results), *_safety_rows(results), *_band_rows(results)]


def _day_rows(results: Results) -> list[Row]:
    made: list[Row] = []
    arms = [arm for arm in results.arms("day") if arm not in ("baseline", *PEERS)]
    for arm in arms:
        paper = arm == TAPAS
        marks = {"mark": "secondary"} if paper else {}
        made.append(
            results.change_row(
                "temp_max_c",
                arm,
                "baseline",
                "day",
                paper=-17.0 if paper else None,
                metric="highest GPU temperature, day",
                note="percent of degrees Celsius",
                **marks,
            )
        )
        made.append(
            results.mean_row(
                "rise_max_c",
                arm,
                "baseline",
                "day",
                metric="highest GPU temperature above its inlet, day",
                unit="C",
            )
        )
        made.append(
            results.change_row(
                "row_max_w",
                arm,
                "baseline",
                "day",
                paper=-23.0 if paper else None,
                metric="highest row power, day",
                **marks,
            )
        )
    for number, metric in (
        ("ttft_p99_s", "P99 time to first token, day"),
        ("itl_p99_s", "P99 time between tokens, day"),
    ):
        made.append(
            results.mean_row(
                number,
                TAPAS,
                "baseline",
                "day",
                metric=metric,
                unit="ms",
                scale=1e3,
                note="of mean flows, no spread within a minute; the paper's P99 keeps its SLO",
            )
        )
    made.append(
        results.mean_row(
            "late_frac",
            TAPAS,
            "baseline",
            "day",
            scale=100.0,
            metric="requests past a limit, day",
            unit="%",
        )
    )
    made.append(results.change_row("energy_j", TAPAS, "baseline", "day", metric="energy, day"))
    return made


def _crowded_rows(results: Results) -> list[Row]:
    scenario = f"day +{CROWDED:.0%}"
    made: list[Row] = []
    for arm in [a for a in results.arms(scenario) if a not in ("baseline", "none")]:
        tapas = arm == TAPAS
        for number, metric, paper in (
            ("thermal_events", "thermal throttling events", -97.0),
            ("power_events", "power throttling events", -99.0),
        ):
            made.append(
                results.mean_row(
                    number, arm, "baseline", scenario, metric=f"{metric}, {scenario}", unit="count"
                )
            )
            # A share of nothing says nothing: only where the baseline throttles in every seed.
            if tapas and min(results.by_seed(number, "baseline", scenario).values()) > 0:
                made.append(
                    results.change_row(
                        number,
                        arm,
                        "baseline",
                        scenario,
                        metric=f"{metric}, {scenario}",
                        paper=paper,
                        mark="secondary",
                    )
                )
        marks = {"paper": 0.7, "mark": "uncertain"} if tapas else {}
        made.append(
            results.mean_row(
                "capped_frac",
                arm,
                "baseline",
                scenario,
                scale=100.0,
                metric=f"time under the cap, {scenario}",
                unit="% of server time",
                **marks,
            )
        )
        made.append(
            results.mean_row(
                "late_frac",
                arm,
                "baseline",
                scenario,
                scale=100.0,
                metric=f"requests past a limit, {scenario}",
                unit="%",
            )
        )
        made.append(
            results.mean_row(
                "iaas_speed",
                arm,
                "baseline",
                scenario,
                scale=100.0,
                metric=f"speed of opaque VMs, {scenario}",
                unit="%",
            )
        )
    return made


def reached(results: Results, arm: str, seed: int) -> float:
    """The most servers added, in percent, with little time capped and few requests late."""
    best = 0.0
    for level in LEVELS:
        scenario = f"day +{level:.0%}"
        runs = [run for run in results.of(arm, scenario) if run.case.seed == seed]
        for run in runs:
            values = run.values
            good = values["capped_frac"] < CAPPED_FRAC and values["late_frac"] < LATE_FRAC
            good = good and not values["trips"] and values["thermal_frac"] < CAPPED_FRAC
            good = good and values["over_frac"] < CAPPED_FRAC
            if not good:
                return best
            best = 100.0 * level
    return best


def _capacity_rows(results: Results) -> list[Row]:
    made: list[Row] = []
    seeds = sorted({run.case.seed for run in results.of("baseline", "day")})
    base = mean_of([reached(results, "baseline", seed) for seed in seeds]).mean
    for arm in ("polca", "place", "route", "config", TAPAS):
        if not results.of(arm, f"day +{LEVELS[-1]:.0%}"):
            continue
        marks: dict[str, Any] = {"paper": 40.0, "mark": "secondary"} if arm == TAPAS else {}
        estimate = mean_of([reached(results, arm, seed) for seed in seeds])
        made.append(
            Row(
                "servers added with under 1 % of time capped and of requests late",
                "%",
                base,
                arm=arm,
                against="baseline",
                note=f"levels {_levels(results)}",
                **marks,
            ).with_ours(estimate)
        )
    return made


def _levels(results: Results) -> str:
    found = [level for level in LEVELS if f"day +{level:.0%}" in results.scenarios()]
    return ", ".join(f"{level:.0%}" for level in found)


_PAPER: dict[tuple[str, str, str], tuple[float, str]] = {
    ("ups_lost", "baseline", "iaas"): (-35.0, "secondary"),
    ("ups_lost", "baseline", "saas"): (-28.0, "secondary"),
    ("ups_lost", TAPAS, "iaas"): (0.0, "uncertain"),
    ("ups_lost", TAPAS, "saas"): (0.0, "uncertain"),
    ("ups_lost", TAPAS, "quality"): (-12.0, "uncertain"),
    ("ahu_lost", "baseline", "iaas"): (-22.0, "uncertain"),
    ("ahu_lost", "baseline", "saas"): (-18.0, "uncertain"),
    ("ahu_lost", TAPAS, "iaas"): (0.0, "uncertain"),
    ("ahu_lost", TAPAS, "saas"): (0.0, "uncertain"),
    ("ahu_lost", TAPAS, "quality"): (-6.0, "uncertain"),
}


def _failure_rows(results: Results) -> list[Row]:
    """What failures cost: change during one against the ten minutes before it, per seed."""
    made: list[Row] = []
    words = {"iaas": "speed of opaque VMs", "saas": "speed of endpoints", "quality": "quality"}
    for kind, level in FAILURES.items():
        scenario = f"{kind} +{level:.0%}"
        for arm in [a for a in results.arms(scenario) if a != "none"]:
            for what, word in words.items():
                during = results.by_seed(f"during_{what}", arm, scenario)
                # Against an undisturbed system: TAPAS trades speed within limits on any day.
                changes = [100.0 * (value - 1.0) for value in during.values()]
                paper, mark = _PAPER.get((kind, arm, what), (None, "ours"))
                made.append(
                    Row(
                        f"{word}, {scenario}",
                        "%",
                        0.0,
                        paper=paper,
                        mark=mark,
                        arm=arm,
                        against="undisturbed, full clock",
                    ).with_ours(mean_of(changes))
                )
            made.append(
                results.mean_row(
                    "late_frac",
                    arm,
                    "",
                    scenario,
                    scale=100.0,
                    metric=f"requests past a limit in 40 minutes, {scenario}",
                    unit="%",
                )
            )
            made.append(
                results.mean_row(
                    "during_temp_max_c",
                    arm,
                    "",
                    scenario,
                    metric=f"highest GPU temperature during the failure, {scenario}",
                    unit="C",
                )
            )
    return made


def _safety_rows(results: Results) -> list[Row]:
    """Breakers that opened: seeds with a trip."""
    made: list[Row] = []
    for scenario in results.scenarios():
        if "none" not in results.arms(scenario):
            continue
        tripped = [run for run in results.of("none", scenario) if run.values["trips"]]
        if not tripped:
            continue
        for arm in (a for a in results.arms(scenario) if a != "none"):
            runs = results.of(arm, scenario)
            made.append(
                Row(
                    f"seeds in which a breaker opens, {scenario}",
                    "count",
                    float(len(tripped)),
                    float(sum(bool(run.values["trips"]) for run in runs)),
                    arm=arm,
                    against="none",
                    seeds=len(runs),
                )
            )
    return made


def _band_rows(results: Results) -> list[Row]:
    made: list[Row] = []
    for name, settings in BANDS.items():
        for value, _ in settings:
            scenario = f"{name} {value}"
            if not results.of(TAPAS, scenario):
                continue
            for number, metric in (
                ("capped_frac", "time under the cap"),
                ("late_frac", "requests past a limit"),
                ("row_max_frac", "highest row power over its rating"),
            ):
                made.append(
                    results.mean_row(
                        number,
                        TAPAS,
                        "baseline",
                        scenario,
                        scale=100.0,
                        unit="%",
                        metric=f"{metric}, +{CROWDED:.0%}, {scenario}",
                    )
                )
    for scenario in results.scenarios():
        kind, _, extra = scenario.partition(" ")
        if (kind in FAILURES and extra != f"+{FAILURES[kind]:.0%}") or kind == "reload":
            made += [
                results.mean_row(
                    f"during_{what}",
                    TAPAS,
                    "baseline",
                    scenario,
                    scale=100.0,
                    unit="%",
                    metric=f"{what} during the failure, {scenario}",
                )
                for what in ("iaas", "quality")
            ]
    return made


def _live_rows(results: Results) -> list[Row]:
    found = [
        results.mean_row(
            number,
            "tapas",
            "baseline",
            "live",
            scale=scale,
            metric=metric,
            unit=unit,
            note="emulated nodes over ZeroMQ",
        )
        for number, metric, unit, scale in (
            ("vms_kept_frac", "power of opaque VMs while a UPS is out, over before", "%", 100.0),
            ("row_load_settled", "row draw over its limit, 6 s after the loss", "%", 100.0),
            ("slo_attained_frac", "requests within their limits", "%", 100.0),
        )
    ]
    peak = results.change_row(
        "row_max_w",
        "tapas",
        "baseline",
        "live",
        metric="highest row power before the loss",
        paper=-20.0,
        mark="secondary",
        note="the paper's scaled real cluster; sources disagree on what of it peaks",
    )
    return [*found, peak]
