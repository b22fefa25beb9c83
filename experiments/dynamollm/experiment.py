"""DynamoLLM against a cluster provisioned for the peak, and each of its parts alone and in pairs.

All systems are the policy `dynamollm` with switches off, on the same requests, limits, profile,
headroom and nodes. See README.md for the question, what was expected, and the answer.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from testbed.analysis.latency import itl_counts, itl_percentiles, percentiles, read_requests
from testbed.analysis.ledger import ledger, read_energy
from testbed.core.spec import LedgerSpec, RunSpec, parse_spec
from testbed.experiment import Case, Options, Results, Row, Values, measure_run
from testbed.policies.dynamollm import FASTER_WHY, DynamoLLM
from testbed.policies.dynamollm.forecast import surge_rps
from testbed.policies.serving_profile import ServingProfile
from testbed.profiling import profile_of
from testbed.recorder.reader import Recording
from testbed.workloads import open_workload

MODES = ("virtual", "emulated")
BASE = Path(__file__).with_name("run.toml").read_text(encoding="utf-8")

KNOBS = ("pools", "instances", "sharding", "frequency", "saving")
SYSTEMS: dict[str, tuple[str, ...]] = {
    # Which switches are on.
    "SinglePool": (),
    "MultiPool": ("pools",),
    "ScaleInst": ("pools", "instances"),
    "ScaleShard": ("pools", "sharding"),
    "ScaleFreq": ("pools", "frequency"),
    "Inst+Shard": ("pools", "instances", "sharding"),
    "Inst+Freq": ("pools", "instances", "frequency"),
    "Shard+Freq": ("pools", "sharding", "frequency"),
    "DynamoLLM": KNOBS,
}
SIX = ("SinglePool", "MultiPool", "ScaleInst", "ScaleShard", "ScaleFreq", "DynamoLLM")
SINGLE = ("ScaleInst", "ScaleShard", "ScaleFreq")

WEEK_SCALE = 42.0
"""Seconds of the week in one: a week in four hours."""
WARM_S = 60.0
"""Not counted: instances start, queues fill."""
PERIODS_S = {"period_s": 5.0, "pool_period_s": 300.0, "cluster_period_s": 1800.0}
COLD_S = 420.0
"""Lead of a cluster manager whose nodes start cold: 6 to 8 minutes."""

_HOUR = ["duration_s=2400", "ledger.begins_h=18.3"]
_WEEK = [
    'workload.source="azure_llm_week"',
    f"workload.time_scale={WEEK_SCALE}",
    f"duration_s={7 * 86400 / WEEK_SCALE:.0f}",
    f"reconfigure.scale={1 / WEEK_SCALE}",
    f"reconfigure.delays.drain_s={30.0 * WEEK_SCALE}",  # what drains are requests: not compressed
    "cluster.nodes_per_row=12",
    "control.sample_period_s=5.0",
]
SCENARIOS: dict[str, list[str]] = {
    "conversation hour": [*_HOUR, 'workload.trace="azure_llm_2023_conv"', "workload.rate_rps=30"],
    "coding hour": [*_HOUR, 'workload.trace="azure_llm_2023_code"', "workload.rate_rps=4"],
    "conversation week": [*_WEEK, 'workload.trace="conversation"', "workload.rate_rps=6"],
    "coding week": [*_WEEK, 'workload.trace="coding"', "workload.rate_rps=4"],
}
OVERLOAD = "overload"
"""More than the nodes there are can serve: what the ladder is for."""
_OVERLOAD = {
    OVERLOAD: [*SCENARIOS["conversation hour"], "duration_s=900", "cluster.nodes_per_row=3"]
}
LADDER: dict[str, int] = {
    # Rungs that may be climbed.
    "no ladder": 0,
    "+ by deadline": 1,
    "+ highest clock": 2,
    "+ send elsewhere": 3,
    "+ drop what is late": 4,
}
VARIANTS: dict[str, tuple[dict[str, Any], list[str]]] = {
    # Parameters and run-file fields that differ from DynamoLLM's.
    "free reconfiguration": ({}, ["reconfigure.scale=1e-6"]),
    "cold starts": ({"start": "cold", "lead_s": COLD_S}, []),
    "20 % mispredicted": ({"predictor_error": 0.2}, []),
    "40 % mispredicted": ({"predictor_error": 0.4}, []),
    "60 % mispredicted": ({"predictor_error": 0.6}, []),
    "least-loaded router": ({"saving": False}, []),
    "no surges learned": ({"surge_rps": 0.0}, []),
    "no template": ({"template_rps": [], "surge_rps": 0.0}, []),
}
CAREFUL: dict[str, dict[str, Any]] = {
    "DynamoLLM, headroom 40 %": {"headroom_frac": 0.4},
    "DynamoLLM, slack 75 %": {"slack_frac": 0.75},
    "DynamoLLM, slack 50 %": {"slack_frac": 0.5},
}
"""DynamoLLM that misses fewer limits for more energy: what its parameters are changed to."""
FACTORS = dict.fromkeys(SCENARIOS, (0.4, 0.6)) | {"coding hour": (0.2, 0.3)}
"""Provisioning over the predicted peak of a less careful SinglePool, beside 1. For the coding
hour even 0.4 of its peak takes more nodes than there are."""
EQUAL_FRAC = 0.001
"""An attainment this little below another's counts as equal."""
SIDE_SEEDS = 2
"""Of everything but the six systems: each of these runs is one point of a band or front."""
_LOOSE = [
    f"slo_class.{place}.ttft_s={2 * limit_s}"
    for place, limit_s in enumerate([0.25] * 3 + [0.4] * 3 + [2.0] * 3)
] + [f"slo_class.{place}.tpot_s=0.2" for place in range(9)]
DECLARED: dict[str, Any] = {
    "scenarios": SCENARIOS,
    "switches": {name: list(on) for name, on in SYSTEMS.items()},
    "provisioning": "highest rate of the template x 1.1, rounded by the fragmentation rule",
    "peak_factor (band)": {name: [*some, 1.0] for name, some in FACTORS.items()},
    "peak_factor, conversation hour too": [1.25, 1.5],
    "careful (front)": CAREFUL,
    "equal attainment": f"at most {EQUAL_FRAC:.1%} lower",
    "seeds of bands, pairs, fronts and variants": SIDE_SEEDS,
    "limits x (band)": [1.0, 2.0],
    "template": "busiest 15 s of every 5 min (hour), minute of every 30 min (week), or what "
    "a step of the instance manager surely brought, if that is more; another draw",
    "surge_rps": "99th percentile of what such a step surely brought beyond the minute before it",
    "overload": "15 min of the conversation hour on 3 nodes",
    "k of the week": WEEK_SCALE,
    "periods_s": PERIODS_S,
    "periods of the week": "pool and cluster manager and all delays but drains / k; instance "
    "manager 5 s (210 s of the week); requests are not compressed",
    "not counted": f"the first {WARM_S:g} s of a run",
    "energy": "GPUs of nodes that hold an instance; nodes given back draw nothing (band: idle)",
    "GPU without an instance": "60 % of the profile's idle power (band of the above)",
    "hosts (band)": "CPUs and fans as `PlantSpec` has them by default, by the load of their GPUs",
    "grid": "CISO, May 2022",
    "cost": "GPU-hours of nodes in use",
    "sample_period_s": "2.5, of the week 5",
}


# Which runs.


def cases(options: Options) -> list[Case]:
    """Quick: the six systems on part of the conversation hour. Emulated: two of them, briefly."""
    if options.mode == "emulated":
        return _emulated(options)
    if options.quick:
        part = ["duration_s=900"]
        seeds = options.seed_list(quick=2)
        return [_case(arm, "conversation hour", seed, more=part) for arm in SIX for seed in seeds]
    seeds = options.seed_list(full=5)
    found = [_case(arm, scenario, s) for scenario in SCENARIOS for arm in SIX for s in seeds]
    seeds = seeds[:SIDE_SEEDS]
    for scenario in SCENARIOS:
        if scenario.endswith("hour"):
            pairs = [arm for arm in SYSTEMS if arm not in SIX]
            found += [_case(arm, scenario, s) for arm in pairs for s in seeds]
        for seed in seeds:
            for name, params in CAREFUL.items():
                found.append(_case("DynamoLLM", scenario, seed, name, params))
            for factor in FACTORS[scenario]:
                params = {"peak_factor": factor}
                found.append(_case("SinglePool", scenario, seed, _provisioned(factor), params))
    found += _overload(seeds)
    for name, (params, fields) in VARIANTS.items():
        for seed in seeds:
            found.append(_case("DynamoLLM", "conversation hour", seed, name, params, fields))
    for factor in (1.25, 1.5):  # of coding the cluster would be too small
        params = {"peak_factor": factor}
        for seed in seeds:
            found.append(
                _case("SinglePool", "conversation hour", seed, _provisioned(factor), params)
            )
    for arm in ("SinglePool", "DynamoLLM"):
        name = f"{arm}, limits x 2"
        found += [_case(arm, "conversation hour", s, name, more=_LOOSE) for s in seeds]
    return found


def _overload(seeds: list[int]) -> list[Case]:
    return [
        _case("DynamoLLM", OVERLOAD, seed, name, {"rungs": rungs})
        for name, rungs in LADDER.items()
        for seed in seeds
    ]


def _provisioned(factor: float) -> str:
    return f"SinglePool x {factor}"


def _emulated(options: Options) -> list[Case]:
    """Two nodes for half a minute, the same policy file and run file, over ZeroMQ."""
    part = [
        'mode="emulated"', "duration_s=20", "drain_s=5", "cluster.nodes_per_row=2",
        "workload.rate_rps=6", "record.gpu_period_s=1", "workload.start_s=1200",
        "control.sample_period_s=0.5", "control.lease_s=5", "control.stale_s=3",
        "control.node_timeout_s=10",
    ]  # fmt: skip
    periods = {"period_s": 2.0, "pool_period_s": 6.0, "cluster_period_s": 12.0}
    return [
        _case(arm, "conversation hour", seed, params=periods, more=part)
        for arm in ("SinglePool", "DynamoLLM")
        for seed in options.seed_list(full=1, quick=1)
    ]


def _case(
    arm: str,
    scenario: str,
    seed: int,
    name: str = "",
    params: dict[str, Any] | None = None,
    more: list[str] | None = None,
) -> Case:
    """A run of a system with changed parameters and fields, under its own name."""
    fields = [*(SCENARIOS | _OVERLOAD)[scenario], *(more or []), f"seed={seed}"]
    spec = parse_spec(BASE, fields)
    on = {knob: knob in SYSTEMS[arm] for knob in KNOBS}
    values: dict[str, Any] = {**on, **_periods(spec), **_template(spec), "seed": seed}
    values |= params or {}
    table = {"use": "dynamollm", "precedence": "slo", "params": values}
    return Case(name or arm, seed, scenario, BASE, [*fields, f"policy=[{_toml(table)}]"])


def _periods(spec: RunSpec) -> dict[str, float]:
    scale = spec.workload.time_scale
    if scale == 1.0:
        return PERIODS_S
    periods = {name: value / scale for name, value in PERIODS_S.items()}
    return periods | {"period_s": spec.control.sample_period_s}


_templates: dict[str, dict[str, Any]] = {}


def _template(spec: RunSpec) -> dict[str, Any]:
    """What is usual: the highest rate within each window, in another draw of the same workload.

    Of an hour the busiest 15 s of every 5 minutes: coding comes in bursts of less than a minute. Of
    the week the busiest minute of every half hour; a minute of it lasts a second or two here, so
    the noise of counting is taken out over ten of them.
    """
    key = f"{spec.workload} {spec.duration_s}"
    if key not in _templates:
        scale = spec.workload.time_scale
        fine_s, per_window = (60.0 / scale, 30) if scale > 1 else (15.0, 20)
        requests = open_workload(spec.workload, spec.slo_class, 1_000_001, spec.duration_s)
        arrival_s = [request.arrival_s for request in requests]
        count = max(1, round(spec.duration_s / fine_s / per_window)) * per_window
        rps = np.histogram(arrival_s, np.arange(count + 1) * fine_s)[0] / fine_s
        if scale > 1:
            rps = np.convolve(rps, np.ones(10) / 10, "same")
        usual_rps = rps.reshape(-1, per_window).max(axis=1)
        step_s = _periods(spec)["period_s"]
        steps = np.histogram(arrival_s, np.arange(0.0, spec.duration_s + step_s / 2, step_s))[0]
        sure_rps = (steps - 2.0 * np.sqrt(steps)) / step_s
        window = np.arange(len(steps)) * step_s // (per_window * fine_s)
        np.maximum.at(usual_rps, np.minimum(window.astype(int), len(usual_rps) - 1), sure_rps)
        _templates[key] = {
            "template_rps": usual_rps.round(3).tolist(),
            "template_window_s": per_window * fine_s,
            "surge_rps": round(surge_rps(steps.astype(float), step_s), 3),
        }
    return _templates[key]


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)


def prepare(found: list[Case]) -> None:
    """Make the profiles once, before workers ask for them."""
    cores = len(os.sched_getaffinity(0))
    for fields in {tuple(case.overrides[:-2]) for case in found}:
        profile_of(parse_spec(BASE, list(fields)), DynamoLLM.sweep, workers=cores)


# One run.


def measure(case: Case, folder: Path) -> Values:
    """Numbers of a run after its first minute."""
    summary = measure_run(case, folder)
    recording = Recording.open(Path(summary["run_folder"]))
    spec = recording.spec
    warm_s = WARM_S if spec.mode == "virtual" else 5.0
    end_s = spec.duration_s
    requests = read_requests(recording)
    counted = requests.arrival_s >= warm_s
    # Without instance scaling, nodes stay the cluster's while they are empty.
    scaled = bool(spec.policy[0].params["instances"])
    tariff = LedgerSpec(grid="CISO", begins_h=spec.ledger.begins_h)
    hosts = LedgerSpec(grid="CISO", begins_h=spec.ledger.begins_h, plant_hosts=True)
    paid, whole = (
        ledger(recording, prices, warm_s, end_s, given_back=scaled) for prices in (tariff, hosts)
    )
    energy = read_energy(recording, warm_s, end_s, given_back=scaled)
    power_w = energy.used_j.sum(axis=1) / np.diff(energy.edges_s)
    values: Values = {
        "ladder": _ladder(recording),
        "energy_kwh": paid["energy_kwh"],
        "with_released_kwh": paid["energy_kwh"] + paid["released_kwh"],
        "with_hosts_kwh": whole["energy_kwh"],
        "whole_cluster_kwh": whole["energy_kwh"] + whole["released_kwh"],
        "carbon_kg": paid["carbon_kg"],
        "energy_usd": paid["energy_usd"],
        "gpu_h": paid["gpu_h"],
        "attained_frac": requests.attained_frac(counted),
        "attained_by_class": {
            str(name): requests.attained_frac(counted & (requests.slo_class == name))
            for name in sorted(set(requests.slo_class))
        },
        "ttft_s": percentiles(requests.ttft_s[counted]),
        "tpot_s": percentiles(requests.tpot_s[counted]),
        "tbt_s": itl_percentiles(itl_counts(recording).sum(axis=0)),
        "power_w": {
            "mean": float(power_w.mean()),
            "p50": float(np.quantile(power_w, 0.5)),
            "p99": float(np.quantile(power_w, 0.99)),
        },
        "requests": summary["requests"],
        "layout": summary["layout"],
        "valid": summary["valid"],
        "invalid_because": summary["invalid_because"],
        "run_folder": summary["run_folder"],
    }
    if case.seed == 1:
        thin = max(1, len(power_w) // 400)
        values["series"] = {
            "t_s": energy.edges_s[:-1:thin].round(1).tolist(),
            "power_w": power_w[::thin].round().tolist(),
            "nodes": energy.used_frac.sum(axis=1)[::thin].round(2).tolist(),
        }
    return values


def _ladder(recording: Recording) -> dict[str, int]:
    """How often each rung was stood on: queues ordered, instances made faster, requests sent
    elsewhere and dropped."""
    said = recording.columns("commands", "kind", "value", "outcome", "why")
    why = recording.columns("moves", "why")["why"]
    sent = said["outcome"] == "sent"
    ordered = sent & (said["kind"] == "queue_order") & (said["value"] == 1.0)
    faster = sent & (said["kind"] == "sm_clock_lock") & (said["why"] == FASTER_WHY)
    return {
        "ordered": int(ordered.sum()),
        "faster": int(faster.sum()),
        "recalled": int((why == "recalled").sum()),
        "squashed": int((why == "squashed").sum()),
    }


# What they say.

_PAPER_ENERGY: dict[str, tuple[float, str]] = {
    "conversation hour": (-53.0, "paper"),
    "coding hour": (-53.0, "paper"),
    "conversation week": (-47.0, "secondary"),
    "coding week": (-56.0, "secondary"),
}


def rows(results: Results) -> list[Row]:
    """Every comparison that the runs made allow."""
    found: list[Row] = []
    for scenario in results.scenarios():
        if scenario != OVERLOAD:
            found += _against_single_pool(results, scenario)
    if OVERLOAD in results.scenarios():
        found += _rungs(results)
    if "40 % mispredicted" in results.arms("conversation hour"):
        found += _ablations(results)
    return found


class Cell(NamedTuple):
    """One way to serve a class: what a request costs there at the most that meets the limits."""

    tp: int
    clock_mhz: float
    load_rps: float
    energy_wh: float
    """Of the instance's GPUs, per request."""


def profiled(profile: ServingProfile, name: str) -> list[Cell]:
    """Energy per request of a class in every cell of a profile that keeps both limits."""
    cls, found = profile.classes.index(name), []
    loads = [load for load in enumerate(profile.load_frac.tolist()) if load[1] > 0.0]
    for t, tp in enumerate(profile.tps):
        for c, clock_mhz in enumerate(profile.clocks_mhz.tolist()):
            for k, load in loads:
                late = max(profile.ttft_ratio[cls, t, c, k], profile.tpot_ratio[cls, t, c, k])
                rps = load * float(profile.saturation_rps[cls, t])
                if late <= 1.0:
                    energy_wh = float(profile.power_w[cls, t, c, k]) / rps / 3600.0
                    found.append(Cell(tp, clock_mhz, rps, energy_wh))
    return found


def device_profile() -> ServingProfile:
    """Of the conversation hour: made if it is not in the cache."""
    return profile_of(parse_spec(BASE), DynamoLLM.sweep, workers=os.cpu_count() or 1)


def _against_single_pool(results: Results, scenario: str) -> list[Row]:
    found = []
    arms = [arm for arm in results.arms(scenario) if arm in SYSTEMS]
    for arm in arms[1:]:
        paper, mark = _PAPER_ENERGY[scenario] if arm == "DynamoLLM" else (None, "ours")
        found.append(
            results.change_row(
                "energy_kwh", arm, arms[0], scenario, metric=f"energy, {scenario}",
                paper=paper, mark=mark, note=_attained_note(results, arm, arms[0], scenario),
            )
        )  # fmt: skip
    if set(CAREFUL) <= set(results.arms(scenario)):
        found += _at_equal_attainment(results, scenario)
    ours = ("DynamoLLM", "SinglePool", scenario)
    week, conversation = scenario.endswith("week"), scenario.startswith("conversation")
    found += [
        results.change_row("carbon_kg", *ours, metric=f"operational carbon, {scenario}",
                           paper=-38.0, mark="paper", note="the paper's trace and grid differ"),
        results.change_row("gpu_h", *ours, metric=f"GPU-hours (cost), {scenario}", paper=-61.0,
                           mark="paper", note="how the paper counts cost is not confirmed"),
        results.change_row("power_w.p50", *ours, metric=f"cluster power P50, {scenario}",
                           paper=-43.0, mark="secondary"),
        results.change_row("power_w.p99", *ours, metric=f"cluster power P99, {scenario}",
                           paper=-9.0, mark="secondary"),
    ]  # fmt: skip
    for name, metric, tail, median in (
        ("TTFT", "ttft_s", -5.3, 11.4),
        ("TBT", "tbt_s", -11.1, 7.6),
    ):
        for percentile, value in (("p99", tail), ("p50", median)):
            found.append(
                results.change_row(
                    f"{metric}.{percentile}", *ours,
                    metric=f"{percentile.upper()} {name}, {scenario}",
                    paper=value if week and conversation else None,
                    mark="secondary" if week and conversation else "ours",
                )
            )  # fmt: skip
    for arm in arms:
        found.append(
            results.mean_row("attained_frac", arm, arms[0], scenario, scale=100.0, unit="%",
                             metric=f"SLO attainment, {scenario}")
        )  # fmt: skip
    if set(SINGLE) <= set(arms):
        found.append(_ordering(results, scenario))
    return found


def _at_equal_attainment(results: Results, scenario: str) -> list[Row]:
    """The cheapest careful DynamoLLM that attains as much; the smallest SinglePool that does."""

    def attained(arm: str) -> float:
        return results.mean("attained_frac", arm, scenario).mean

    def row(ours: str, base: str, what: str, *, reached: bool) -> Row:
        note = _attained_note(results, ours, base, scenario)
        paper, mark = _PAPER_ENERGY[scenario]
        return results.change_row(
            "energy_kwh", ours, base, scenario, metric=f"energy {what}, {scenario}",
            paper=paper if reached else None, mark=mark if reached else "ours",
            note=note if reached else f"not reached: {note}",
        )  # fmt: skip

    fair = attained("SinglePool") - EQUAL_FRAC
    careful = ["DynamoLLM", *CAREFUL]
    enough = [arm for arm in careful if attained(arm) >= fair]
    energy = {arm: results.mean("energy_kwh", arm, scenario).mean for arm in enough}
    ours = min(enough, key=energy.__getitem__) if enough else max(careful, key=attained)
    fair = attained("DynamoLLM") - EQUAL_FRAC
    sparing = [*(_provisioned(factor) for factor in FACTORS[scenario]), "SinglePool"]
    base = next((arm for arm in sparing if attained(arm) >= fair), "SinglePool")
    return [
        row(ours, "SinglePool", "at SinglePool's attainment", reached=bool(enough)),
        row("DynamoLLM", base, "at DynamoLLM's attainment", reached=True),
    ]


def _attained_note(results: Results, arm: str, against: str, scenario: str) -> str:
    ours, base = (results.mean("attained_frac", name, scenario).mean for name in (arm, against))
    return f"attainment {ours:.2%}, {against} {base:.2%}"


def _ordering(results: Results, scenario: str) -> Row:
    """How often DynamoLLM < each single knob < MultiPool, SinglePool holds, over seeds."""
    energy = {arm: results.by_seed("energy_kwh", arm, scenario) for arm in SIX}
    held = [
        energy["DynamoLLM"][seed] < min(energy[arm][seed] for arm in SINGLE)
        and max(energy[arm][seed] for arm in SINGLE)
        < min(energy["MultiPool"][seed], energy["SinglePool"][seed])
        for seed in energy["DynamoLLM"]
    ]
    return Row(
        f"ordering DynamoLLM < single knobs < MultiPool, SinglePool, {scenario}",
        "% of seeds", None, 100.0 * float(np.mean(held)), 100.0, "uncertain", seeds=len(held),
    )  # fmt: skip


def _ablations(results: Results) -> list[Row]:
    scenario = "conversation hour"
    found = []
    for name in VARIANTS:
        wrong = name == "40 % mispredicted"
        found.append(
            results.change_row(
                "energy_kwh", name, "DynamoLLM", scenario, metric=f"energy, {scenario}",
                paper=13.0 if wrong else None, mark="secondary" if wrong else "ours",
                note=_attained_note(results, name, "DynamoLLM", scenario),
            )
        )  # fmt: skip
        found.append(
            results.mean_row("attained_frac", name, "DynamoLLM", scenario, scale=100.0, unit="%",
                             metric=f"SLO attainment, {scenario}")
        )  # fmt: skip
    found += [
        results.change_row("energy_kwh", "DynamoLLM", _provisioned(factor), scenario,
                           metric=f"band: energy, {scenario}", paper=-53.0, mark="paper")
        for factor in (1.25, 1.5)
    ]  # fmt: skip
    found.append(
        results.change_row("energy_kwh", "DynamoLLM, limits x 2", "SinglePool, limits x 2",
                           scenario, metric=f"band: energy, {scenario}")
    )  # fmt: skip
    bands = (
        ("with_hosts_kwh", "with hosts"),
        ("with_released_kwh", "nodes given back idle"),
        ("whole_cluster_kwh", "with hosts, nodes given back idle"),
    )
    found += [
        results.change_row(number, "DynamoLLM", "SinglePool", where,
                           metric=f"band: energy {what}, {where}")
        for number, what in bands
        for where in results.scenarios()
        if where != OVERLOAD
    ]  # fmt: skip
    return found


def _rungs(results: Results) -> list[Row]:
    """What each rung of the ladder buys when there is more load than can be served."""
    base, found = next(iter(LADDER)), []
    for arm in LADDER:
        told = {
            name: results.mean(f"ladder.{name}", arm, OVERLOAD).mean
            for name in ("ordered", "faster", "recalled", "squashed")
        }
        note = ", ".join(f"{name} {count:.0f}" for name, count in told.items())
        found.append(
            results.mean_row("attained_frac", arm, base, OVERLOAD, scale=100.0, unit="%",
                             metric=f"SLO attainment, {OVERLOAD}", note=note)
        )  # fmt: skip
        found.append(
            results.mean_row("ttft_s.p99", arm, base, OVERLOAD, unit="s",
                             metric=f"P99 TTFT of what was served, {OVERLOAD}")
        )  # fmt: skip
    return found
