"""Summaries against brute force, replay, the report, comparisons and exports."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from plotly.offline import get_plotlyjs
from prometheus_client.parser import text_string_to_metric_families
from synthetic_run import EvenCap, load, make, make_spec

from testbed.analysis.compare import compare, comparison_lines, write_comparison
from testbed.analysis.drawing import HEAT_ROWS
from testbed.analysis.energy import slowed, throttle_s
from testbed.analysis.export import export, perfetto, prometheus
from testbed.analysis.figures import power
from testbed.analysis.latency import itl_percentiles
from testbed.analysis.orders import orders
from testbed.analysis.report import cap_cost, report_html, write_report
from testbed.analysis.run import HEAT_BINS, Run
from testbed.analysis.series import MAX_POINTS
from testbed.analysis.summary import summarise, write
from testbed.core.errors import RecordingError
from testbed.core.spec import PolicySpec, RunSpec
from testbed.core.view import View
from testbed.recorder.reader import Recording
from testbed.recorder.replay import replay, ticks
from testbed.recorder.tables import ITL_BINS, itl_bin
from testbed.recorder.writer import Recorder


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    folder = tmp_path_factory.mktemp("runs") / "base"
    return make(folder, make_spec(seconds=60, tenants=2))


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    folder = tmp_path_factory.mktemp("runs") / "empty"
    Recorder(folder, spec=RunSpec()).close()
    return Recording.open(folder)


# Summary.


def rows_of(recording: Recording, table: str) -> list[dict[str, Any]]:
    return list(recording.table(table).to_pylist())


def test_summary_agrees_with_counting_by_hand(recording: Recording) -> None:
    summary = summarise(recording)
    requests = rows_of(recording, "requests")
    done = [r for r in requests if r["status"] == "completed"]
    ttft = [
        r["first_token_seen_s"] - r["arrival_s"]
        for r in requests
        if not np.isnan(r["first_token_seen_s"])
    ]
    attained = 0
    for r in done:
        gaps = r["output_tokens"] - 1
        slow = r["first_token_seen_s"] - r["arrival_s"] > r["ttft_limit_s"]
        if gaps:
            tpot = (r["finished_seen_s"] - r["first_token_seen_s"]) / gaps
            slow = slow or tpot > r["tpot_limit_s"]
        attained += not slow
    ended = [r for r in requests if r["status"] != "in_flight"]
    assert summary["requests"]["arrived"] == len(requests)
    assert summary["requests"]["completed"] == len(done)
    counts = summary["requests"]
    assert len(requests) == sum(
        counts[status] for status in ("completed", "rejected", "lost", "in_flight")
    )
    assert summary["requests"]["slo_attained_frac"] == pytest.approx(attained / len(ended))
    assert summary["goodput_rps"] == pytest.approx(attained / 60)
    assert summary["ttft_s"]["p99"] == pytest.approx(np.quantile(ttft, 0.99))
    assert summary["e2e_s"]["p50"] == pytest.approx(
        np.median([r["finished_seen_s"] - r["arrival_s"] for r in done])
    )
    assert summary["tokens"] == {
        "input": sum(r["prompt_tokens"] for r in done),
        "image": sum(r["image_tokens"] for r in done),
        "output": sum(r["output_tokens"] for r in done),
    }


def test_energy_and_power_agree_with_counting_by_hand(recording: Recording) -> None:
    summary = summarise(recording)
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    seen: dict[int, tuple[float, int]] = {}
    slow_s = 0.0
    for row in rows_of(recording, "gpus"):
        gpu = row["gpu"]
        first.setdefault(gpu, row["energy_j"])
        last[gpu] = row["energy_j"]
        if gpu in seen and seen[gpu][1] & (0x4 | 0x8 | 0x20 | 0x40 | 0x80):
            slow_s += row["t_s"] - seen[gpu][0]
        seen[gpu] = row["t_s"], row["throttle"]
    assert summary["energy_j"] == pytest.approx(sum(last.values()) - sum(first.values()))
    assert summary["throttle_s"] == pytest.approx(slow_s)
    assert summary["throttle_s"] > 0

    total: dict[float, float] = {}
    over: dict[int, list[bool]] = {}
    for row in rows_of(recording, "rows"):
        total[row["t_s"]] = total.get(row["t_s"], 0.0) + row["draw_w"]
        over.setdefault(row["row"], []).append(row["draw_w"] > row["budget_w"])
    starts = sum(
        is_over and not before
        for one in over.values()
        for before, is_over in zip([False, *one], one, strict=False)
    )
    assert summary["power_w"]["max"] == pytest.approx(max(total.values()))
    assert summary["power_w"]["mean"] == pytest.approx(np.mean(list(total.values())), rel=1e-3)
    assert summary["breaches"]["count"] == starts > 0
    assert summary["breaches"]["s"] == pytest.approx(0.1 * sum(map(sum, over.values())), rel=1e-6)
    assert 0 < summary["breaches"]["longest_s"] <= summary["breaches"]["s"]


def test_commands_are_counted_by_outcome(recording: Recording) -> None:
    summary = summarise(recording)
    found = [row["outcome"] for row in rows_of(recording, "commands")]
    assert summary["commands"]["sent"] == found.count("sent") > 0
    assert summary["commands"]["overruled"] == found.count("overruled") > 0
    assert summary["commands"]["per_min"] == summary["commands"]["sent"]
    assert summary["commands"]["per_target_per_min_max"] <= summary["commands"]["sent"] / 8


def test_itl_percentiles_are_within_a_bin_of_the_exact_ones() -> None:
    gaps_s = 0.02 * np.exp(0.5 * np.random.default_rng(1).standard_normal(100_000))
    counts = np.bincount(itl_bin(gaps_s), minlength=ITL_BINS)
    for name, value_s in itl_percentiles(counts).items():
        exact_s = np.quantile(gaps_s, float(name[1:]) / 100)
        assert value_s == pytest.approx(exact_s, rel=0.02), name


def test_a_counter_that_was_reset_goes_on(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "run", spec=RunSpec())
    for t_s, energy_j in ((0.0, 100.0), (1.0, 150.0), (2.0, 30.0), (3.0, 70.0)):
        zeros = dict.fromkeys(recorder.tables["gpus"]._names, 0.0)
        recorder.append("gpus", zeros | {"t_s": t_s, "gpu": 0, "energy_j": energy_j})
    recorder.close()
    assert summarise(Recording.open(tmp_path / "run"))["energy_j"] == 50 + 30 + 40


def test_a_gap_in_telemetry_is_not_time_throttled() -> None:
    t_s = np.array([0.0, 0.1, 0.2, 60.0, 60.1])
    total_s, by_reason = throttle_s(t_s, np.zeros(5, int), np.full(5, 0x4))
    assert total_s == pytest.approx(0.1 + 0.1 + 0.3 + 0.1)
    assert by_reason["sw_power_cap"] == total_s
    assert not slowed(np.array([0x1, 0x2])).any(), "idling and set clocks are not slowdowns"


def test_nothing_recorded_is_null_and_not_nan(empty: Recording) -> None:
    summary = write(empty)
    assert summary["ttft_s"] == {"p50": None, "p90": None, "p99": None}
    assert summary["itl_s"]["p99"] is None
    assert summary["energy_j"] is None
    assert summary["power_w"]["mean"] is None
    assert summary["requests"]["slo_attained_frac"] is None
    assert summary["lateness_s"]["p99"] is None
    assert summary["memory"] == {"tenants": 0}
    text = (empty.folder / "summary.json").read_text()
    assert "NaN" not in text
    assert json.loads(text) == empty.summary == summary
    assert "<h1>run</h1>" in report_html(empty), "and the report is drawn all the same"


def test_contract_fields_are_there(recording: Recording) -> None:
    summary = summarise(recording)
    contract = (
        "run_id mode seed duration_s wall_s requests ttft_s itl_s e2e_s tokens energy_j power_w "
        "breaches throttle_s memory commands lateness_s valid"
    )
    assert not set(contract.split(" ")) - set(summary)
    assert set(summary["ttft_s"]) == {"p50", "p90", "p99"}
    assert {"p50", "p99"} <= set(summary["lateness_s"])
    json.dumps(summary, allow_nan=False)


def test_a_late_run_is_not_valid(tmp_path: Path) -> None:
    late = make(tmp_path / "late", make_spec(seconds=20, mode="emulated"), late=True)
    summary = summarise(late)
    assert not summary["valid"]
    assert "coordinator was late: p99 90.0 ms, limit 50.0 ms" in summary["invalid_because"]
    assert summary["lateness_s"]["p99"] == 0.09
    html = report_html(late)
    assert 'class="banner"' in html
    assert "coordinator was late" in html


def test_memory_sums_are_over_tenants_at_one_time(recording: Recording) -> None:
    memory = summarise(recording)["memory"]
    assert memory["tenants"] == 4
    assert memory["sold_bytes"] == 4 * 4096 * 2**20
    by_time: dict[float, float] = {}
    for row in rows_of(recording, "tenants"):
        by_time[row["t_s"]] = by_time.get(row["t_s"], 0) + row["working_set_bytes"]
    assert memory["working_set_max_bytes"] == pytest.approx(max(by_time.values()), rel=0.02)
    assert memory["major_faults"] > 0


# Replay.


def test_replay_says_every_command_again(recording: Recording) -> None:
    result = replay(recording, load)
    assert result.same
    assert result.steps == 61
    assert result.equal == len(rows_of(recording, "commands")) > 0
    assert result.first_difference == ""


def test_replay_finds_an_altered_command(recording: Recording, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    folder = tmp_path / "altered"
    shutil.copytree(recording.folder, folder)
    table = pq.read_table(folder / "commands.parquet")
    values = table["value"].to_numpy().copy()
    values[3] = np.nextafter(values[3], np.inf)  # the smallest change there is
    place = table.schema.get_field_index("value")
    pq.write_table(table.set_column(place, table.schema.field(place), [values]),
                   folder / "commands.parquet")  # fmt: skip
    result = replay(Recording.open(folder), load)
    assert result.different == 1
    assert (
        "policy row_power_cap: recorded power_limit 470.00000000000006" in result.first_difference
    )
    assert "replayed power_limit 470.0 for target" in result.first_difference


def test_replay_of_another_policy_counts_the_differences(recording: Recording) -> None:
    result = replay(recording, lambda policy: EvenCap(release=0.7))
    assert result.different > 0
    policies = [PolicySpec(use="row_power_cap")]
    with pytest.raises(RecordingError, match="policy 1 was stepped, there are 1"):
        replay(recording, load, policies)


def test_replayed_views_are_those_that_were_seen(tmp_path: Path) -> None:
    seen: list[bytes] = []

    class Watcher(EvenCap):
        def step(self, view: View) -> list[Any]:
            seen.append(msgspec.msgpack.encode([view.now_s, *map(str, _arrays(view))]))
            return super().step(view)

    def watch(policy: PolicySpec) -> Any:
        return Watcher() if policy.use == "row_power_cap" else load(policy)

    import synthetic_run

    spec = make_spec(seconds=10, tenants=1)
    original = synthetic_run.load
    synthetic_run.load = watch
    try:
        made = make(tmp_path / "run", spec)
    finally:
        synthetic_run.load = original
    live, seen[:] = list(seen), []
    assert replay(made, watch).same
    assert seen == live


def _arrays(view: View) -> list[Any]:
    found: list[Any] = [view.pools, view.pool_priority.tolist(), view.pool_of_class]
    for columns in (view.rows, view.gpus, view.instances, view.tenants):
        for name in columns.__slots__:
            value = getattr(columns, name)
            found.append(value if isinstance(value, tuple) else (value.dtype, value.tobytes()))
    return found


def test_replay_needs_views(tmp_path: Path) -> None:
    spec = make_spec(seconds=5)
    record = msgspec.structs.replace(spec.record, views=False)
    made = make(tmp_path / "run", msgspec.structs.replace(spec, record=record))
    with pytest.raises(RecordingError, match=r"no views to replay"):
        list(ticks(made))


# Report.


def test_report_loads_nothing_from_outside(recording: Recording) -> None:
    html = write_report(recording).read_text()
    plotly = get_plotlyjs()
    assert html.count(plotly) == 1
    own = html.replace(plotly, "")
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?!#)\w""", own), "only links inside the page"
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(", own)
    assert "https://" not in own
    assert "http://" not in own


def test_report_shows_what_was_asked_of_it(recording: Recording) -> None:
    html = report_html(recording)
    for words in (
        "Power of row0",
        "sum of safe caps",
        "SM clock",
        "Die temperature",
        "Throttle reasons",
        "Time to first token",
        "Inter-token latency",
        "What the cap cost",
        "KV cache in use",
        "Memory pressure",
        "overruled by row_power_cap",
        "drift",
        "Provenance",
        "assumed",
    ):
        assert words in html, words


def test_report_escapes_what_it_is_told(tmp_path: Path) -> None:
    made = make(tmp_path / "run", make_spec(seconds=3))
    made.manifest["name"] = "<script>alert(1)</script>"
    made.manifest["spec"]["slo_class"][0]["name"] = "</script><b>"
    html = report_html(made)
    assert "<script>alert(1)" not in html
    assert "</script><b>" not in html


def test_report_of_a_killed_run_is_drawn_and_marked(recording: Recording, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    shutil.copytree(recording.folder, folder)
    (folder / "summary.json").unlink(missing_ok=True)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest |= {"exit_status": "running", "duration_s": None, "wall_s": None, "ended_utc": None}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    killed = Recording.open(folder)
    assert summarise(killed)["duration_s"] == pytest.approx(60)
    html = report_html(killed)
    assert "the run is killed" in html


def test_many_rows_and_gpus_stay_light(tmp_path: Path) -> None:
    made = make(tmp_path / "wide", make_spec(rows=10, nodes=2, seconds=30), period_s=1.0)
    run = Run(made)
    assert power(run)[0].name == "power"
    html = report_html(made)
    figures = json.loads(
        re.search(r'id="figure-data">(.*?)</script>', html, re.DOTALL).group(1)  # type: ignore[union-attr]
    )
    for figure in figures:
        for trace in figure["data"]:
            if trace["type"] == "heatmap":
                assert len(trace["z"]) <= HEAT_ROWS
                assert len(trace["x"]) <= HEAT_BINS + 2
            else:
                assert len(trace["x"]) <= MAX_POINTS
    assert len(html) - len(get_plotlyjs()) < 3_000_000


def test_cap_cost_covers_every_served_request(recording: Recording) -> None:
    lines = cap_cost(Run(recording))
    served = sum(not np.isnan(row["first_token_seen_s"]) for row in rows_of(recording, "requests"))
    assert sum(count for what, count, _ in lines if what.startswith("TTFT")) == served
    assert len(lines) == 4


def test_orders_gather_the_targets_of_one_command(recording: Recording) -> None:
    made = orders(recording)
    assert sum(len(order.targets) for order in made) == len(rows_of(recording, "commands"))
    assert any(len(order.targets) == 8 and order.low == order.high == 470 for order in made)


# Comparison and export.


def test_comparison_names_differences_and_ratios(recording: Recording, tmp_path: Path) -> None:
    other = make(tmp_path / "other", make_spec(seconds=60, tenants=2, seed=4))
    found = compare([recording, other])
    assert found["spec_differences"] == {"seed": [3, 4]}
    by_name = {metric["metric"]: metric for metric in found["metrics"]}
    energy = by_name["energy_j"]
    assert energy["ratio"][1] == pytest.approx(energy["values"][1] / energy["values"][0])
    assert energy["delta"][0] == 0
    assert by_name["requests.lost"]["ratio"] == [None, None], "no ratio to zero"
    json.dumps(found, allow_nan=False)
    assert all(len(line) == 4 for line in comparison_lines(found))
    html = write_comparison([recording, other], tmp_path / "compare.html").read_text()
    assert "other / base" in html
    with pytest.raises(RecordingError, match="two recordings or more, got 1"):
        compare([recording])


def test_csv_has_every_table_and_its_units(recording: Recording, tmp_path: Path) -> None:
    folder = export(recording, "csv", tmp_path / "csv")
    with (folder / "gpus.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == recording.table("gpus").num_rows
    assert float(rows[5]["temp_c"]) == pytest.approx(
        recording.columns("gpus", "temp_c")["temp_c"][5]
    )
    assert 'gpus,temp_c,"degC"' in (folder / "units.csv").read_text()
    with pytest.raises(RecordingError, match="format 'xml' is none of csv, perfetto, prometheus"):
        export(recording, "xml")


def test_perfetto_timeline_is_well_formed(recording: Recording, tmp_path: Path) -> None:
    path = export(recording, "perfetto", tmp_path / "timeline.json")
    timeline = json.loads(path.read_text())
    assert timeline == perfetto(recording)
    open_slices: dict[tuple[int, int], list[str]] = {}
    phases = set()
    for event in timeline["traceEvents"]:
        phases.add(event["ph"])
        key = (event["pid"], event.get("id", -1))
        if event["ph"] == "b":
            open_slices.setdefault(key, []).append(event["name"])
        elif event["ph"] == "e":
            assert open_slices[key].pop() == event["name"], "slices nest"
        elif event["ph"] == "C":
            assert all(np.isfinite(value) for value in event["args"].values())
    assert phases == {"M", "b", "e", "C", "i"}
    assert not any(open_slices.values()), "every slice ends"


def test_prometheus_text_parses_and_agrees(recording: Recording) -> None:
    families = {f.name: f for f in text_string_to_metric_families(prometheus(recording))}
    power_w = families["DCGM_FI_DEV_POWER_USAGE"].samples
    assert len(power_w) == 16
    assert set(power_w[0].labels) == {"gpu", "UUID", "device", "modelName", "hostname"}
    last = [row["power_avg_w"] for row in rows_of(recording, "gpus")][-16:]
    assert [sample.value for sample in power_w] == pytest.approx(last)
    energy = families["DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION"].samples
    assert energy[0].value > 1e9, "millijoules"
    violation = families["DCGM_FI_DEV_POWER_VIOLATION"].samples
    assert sum(sample.value for sample in violation) / 1e9 == pytest.approx(
        summarise(recording)["throttle_by_reason_s"]["sw_power_cap"]
    )
    assert families["vllm:kv_cache_usage_perc"].samples[0].value <= 1
