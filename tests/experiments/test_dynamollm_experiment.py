"""experiments/dynamollm: its cases, its rows, and short runs of both modes."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from xml.etree import ElementTree

import pytest

from testbed import profiling
from testbed.analysis.markdown import fill
from testbed.analysis.pictures import save
from testbed.core.spec import parse_spec
from testbed.experiment import Options, Result, Results, find_experiment, load_beside
from testbed.policies.dynamollm import DynamoLLM
from tests.conftest import ROOT

EXPERIMENT = find_experiment(str(ROOT / "experiments" / "dynamollm"))
MODULE = EXPERIMENT.module


@pytest.fixture
def coarse(monkeypatch):
    """Profiles of few requests and clocks: a second instead of twenty.

    Made in this process, since others would not know of it.
    """
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(profiling, "REQUESTS", 60)
    monkeypatch.setattr(profiling, "EDGE_REQUESTS", 200)
    monkeypatch.setattr(
        DynamoLLM, "sweep", DynamoLLM.sweep._replace(clocks_mhz=(1000.0, 1400.0, 1980.0))
    )


def case(arm: str, options: Options, *more: str):
    found = next(c for c in MODULE.cases(options) if c.arm == arm)
    return type(found)(found.arm, 1, found.scenario, found.spec, [*found.overrides, *more])


def test_every_system_is_the_same_policy_with_switches():
    cases = {c.arm: c for c in MODULE.cases(Options(quick=True, seeds=1))}
    told = {}
    for arm, one in cases.items():
        (policy,) = parse_spec(one.spec, one.overrides).policy
        assert policy.use == "dynamollm"
        told[arm] = policy.params
        DynamoLLM(**policy.params)
    assert set(told) == set(MODULE.SIX)
    for arm, params in told.items():
        assert {k for k in MODULE.KNOBS if params[k]} == set(MODULE.SYSTEMS[arm])
        rest = {k: v for k, v in params.items() if k not in MODULE.KNOBS}
        assert rest == {k: v for k, v in told["SinglePool"].items() if k not in MODULE.KNOBS}


def test_a_full_run_has_five_seeds_and_every_rung():
    cases = MODULE.cases(Options())
    for scenario in MODULE.SCENARIOS:
        for arm in MODULE.SIX:
            seeds = {c.seed for c in cases if c.arm == arm and c.scenario == scenario}
            assert seeds == {1, 2, 3, 4, 5}
    rungs = {c.arm: c for c in cases if c.scenario == MODULE.OVERLOAD}
    told = [parse_spec(c.spec, c.overrides).policy[0].params["rungs"] for c in rungs.values()]
    assert told == [0, 1, 2, 3, 4]
    assert {c.seed for c in cases if c.scenario == MODULE.OVERLOAD} == {1, 2}
    assert {c.arm for c in cases} >= {"Inst+Shard", "Inst+Freq", "Shard+Freq", *MODULE.VARIANTS}


def test_a_compressed_week_divides_periods_and_delays():
    found = next(c for c in MODULE.cases(Options(seeds=1)) if c.scenario == "coding week")
    spec = parse_spec(found.spec, found.overrides)
    k = spec.workload.time_scale
    assert spec.duration_s == pytest.approx(7 * 86400 / k)
    assert spec.reconfigure.scale == pytest.approx(1 / k)
    params = spec.policy[0].params
    assert params["cluster_period_s"] == pytest.approx(1800 / k)
    assert params["pool_period_s"] == pytest.approx(300 / k)


def values(energy: float, attained: float) -> dict:
    quantiles = {"p50": energy, "p99": 2 * energy}
    return {
        "energy_kwh": energy, "with_hosts_kwh": 2 * energy, "with_released_kwh": energy + 1,
        "whole_cluster_kwh": 2 * energy + 1,
        "ladder": {"ordered": 3, "faster": 2, "recalled": 1, "squashed": 0},
        "carbon_kg": energy, "gpu_h": energy, "attained_frac": attained,
        "power_w": quantiles, "ttft_s": quantiles, "tbt_s": quantiles,
        "series": {"t_s": [0.0, 30.0], "power_w": [1.0, 2.0], "nodes": [1.0, 1.0]},
    }  # fmt: skip


def test_rows_compare_with_the_paper_and_figures_are_drawn(tmp_path, coarse):
    kwh = {"SinglePool": 10.0, "MultiPool": 9.5, "DynamoLLM": 5.0}
    runs = [
        Result(c, values(kwh.get(c.arm, 8.0), 0.99)) for c in MODULE.cases(Options(seeds=2))
    ]  # fmt: skip
    results = Results(runs, Options())
    rows = MODULE.rows(results)
    ours = [r for r in rows if r.metric == "energy, coding week" and r.arm == "DynamoLLM"]
    assert [(r.ours, r.paper, r.mark) for r in ours] == [(-50.0, -56.0, "secondary")]
    orders = [r for r in rows if r.metric.startswith("ordering")]
    assert [r.ours for r in orders] == [100.0] * 4
    ladder = [r for r in rows if r.metric == "SLO attainment, overload"]
    assert [r.arm for r in ladder] == list(MODULE.LADDER)
    assert ladder[0].note == "ordered 3, faster 2, recalled 1, squashed 0"
    # As careful as need be: of equals, the one that plans with the whole of the limits.
    fair = {r.metric: r for r in rows if "attainment, coding week" in r.metric}
    assert fair["energy at SinglePool's attainment, coding week"].arm == "DynamoLLM"
    assert fair["energy at DynamoLLM's attainment, coding week"].against == "SinglePool x 0.4"
    assert {r.mark for r in rows} <= {"paper", "secondary", "uncertain", "ours"}
    from testbed.experiment import _figures

    readme = load_beside(str(EXPERIMENT.folder / "readme.py"), "readme")
    parts = readme.parts(results)
    assert "| **DynamoLLM** | -50 ± 0.0 %, 99.00 % |" in parts["energy"]
    lines = parts["profile"].splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| SS", "| MM", "| LL"]
    assert all(float(line.split(" | ")[3]) > 1.0 for line in lines[2:])
    assert "| no ladder | 99.00 % | 16.0 s | 3 | 2 | 1 | 0 |" in parts["ladder"]
    assert fill((EXPERIMENT.folder / "README.md").read_text(), parts), "every mark is there"
    save(readme.pictures(results)["figure.svg"], tmp_path / "figure.svg")
    picture = ElementTree.parse(tmp_path / "figure.svg").getroot()
    words = {element.text for element in picture.iter() if element.tag.endswith("text")}
    assert {"Energy by system, coding week", "Overload: rungs of the ladder"} <= words

    drawn = _figures(EXPERIMENT, results)
    assert len(drawn) == 13
    assert all(trace for figure in drawn for trace in figure.data)
    json.dumps([dataclasses.asdict(figure) for figure in drawn], allow_nan=False)


def test_a_short_run_saves_energy_within_the_limits(coarse, tmp_path: Path):
    quick = Options(quick=True, seeds=1)
    short = ("duration_s=240", "workload.rate_rps=15", "cluster.nodes_per_row=8")
    single, ours = (
        MODULE.measure(case(arm, quick, *short), tmp_path) for arm in ("SinglePool", "DynamoLLM")
    )
    for found in (single, ours):
        assert found["requests"]["completed"] > 1000
        assert found["requests"]["lost"] == found["requests"]["rejected"] == 0
    assert ours["energy_kwh"] < 0.9 * single["energy_kwh"]
    assert single["attained_frac"] > 0.98
    assert ours["attained_frac"] > 0.95
    assert ours["layout"]["starts"] >= 1


def test_each_rung_of_the_ladder_is_stood_on_where_there_is_too_much_load(coarse, tmp_path: Path):
    short = ("duration_s=150", "cluster.nodes_per_row=2")
    cases = {c.arm: c for c in MODULE.cases(Options(seeds=1)) if c.scenario == MODULE.OVERLOAD}
    found = {}
    for arm in ("no ladder", "+ drop what is late"):
        one = cases[arm]
        found[arm] = MODULE.measure(
            type(one)(one.arm, 1, one.scenario, one.spec, [*one.overrides, *short]), tmp_path
        )
    without, whole = found.values()
    assert set(without["ladder"].values()) == {0}
    counted = whole["ladder"]  # clocks are at their highest as planned
    assert min(counted[rung] for rung in ("ordered", "recalled", "squashed")) > 0
    assert whole["requests"]["rejected"] == whole["ladder"]["squashed"]
    assert whole["attained_frac"] > without["attained_frac"] + 0.05
    # A queue that is not cut back only grows.
    assert whole["ttft_s"]["p99"] < without["ttft_s"]["p99"]


def test_where_no_margin_attains_as_much_the_row_says_so_and_names_no_target():
    attained = {"SinglePool": 0.999, "DynamoLLM": 0.98, "DynamoLLM, slack 50 %": 0.99}
    runs = [
        Result(c, values(10.0, attained.get(c.arm, 0.97))) for c in MODULE.cases(Options(seeds=1))
    ]  # fmt: skip
    rows = {r.metric: r for r in MODULE.rows(Results(runs, Options()))}
    fair = rows["energy at SinglePool's attainment, coding hour"]
    assert (fair.arm, fair.paper) == ("DynamoLLM, slack 50 %", None)
    assert fair.note.startswith("not reached")
    assert rows["energy at DynamoLLM's attainment, coding hour"].against == "SinglePool"


@pytest.mark.live
def test_the_same_policy_file_runs_on_emulated_nodes_over_zeromq(coarse, tmp_path: Path):
    emulated = Options("emulated", seeds=1)
    found = MODULE.measure(case("DynamoLLM", emulated, "duration_s=12"), tmp_path)
    assert found["requests"]["completed"] > 30
    assert found["requests"]["lost"] == 0
    assert found["energy_kwh"] > 0
    assert found["layout"]["starts"] >= 1
