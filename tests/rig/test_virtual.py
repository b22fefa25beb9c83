"""Whole runs in virtual time."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from testbed import rig
from testbed.analysis.latency import token_times_s
from testbed.core.errors import RecordingError
from testbed.core.spec import parse_spec
from testbed.policies.load import load_controller
from testbed.recorder.reader import Recording
from testbed.recorder.replay import replay
from tests.conftest import SMALL, table_hashes


def run(tmp_path, *overrides, text=SMALL):
    return rig.run(parse_spec(text, overrides), tmp_path / "runs")


def columns(folder, table):
    found = Recording.open(folder).table(table)
    return {name: found[name].to_numpy(zero_copy_only=False) for name in found.column_names}


def test_one_seed_writes_the_same_bytes_another_does_not(tmp_path):
    first, again = run(tmp_path), run(tmp_path)
    other = run(tmp_path, "seed=2")
    assert table_hashes(first) == table_hashes(again)
    assert table_hashes(first)["requests.parquet"] != table_hashes(other)["requests.parquet"]
    ours, theirs = (json.loads((f / "summary.json").read_text()) for f in (first, again))
    for summary in (ours, theirs):
        del summary["run_id"], summary["wall_s"]
    assert ours == theirs


def test_replay_reproduces_every_command(tmp_path):
    folder = run(tmp_path)
    result = replay(folder, load_controller)
    assert result.equal > 0
    assert result.same


def test_no_request_is_lost(tmp_path):
    folder = run(tmp_path, "drain_s=0", "workload.rate_rps=60")
    requests = json.loads((folder / "summary.json").read_text())["requests"]
    ended = sum(requests[key] for key in ("completed", "rejected", "lost", "in_flight"))
    assert requests["arrived"] == ended
    assert requests["in_flight"] > 0
    table = columns(folder, "requests")
    assert len(set(table["request_id"])) == len(table["request_id"]) == requests["arrived"]


@pytest.mark.parametrize("policy", ["row_power_cap", "priority_cap"])
def test_the_cap_holds_but_for_the_reaction_time(tmp_path, policy):
    folder = run(tmp_path, f"policy.0.use={policy}", "duration_s=60", "workload.rate_rps=40")
    rows = columns(folder, "rows")
    reaction_s = 3.0
    for row in (0, 1):
        mine = rows["row"] == row
        t_s, over = rows["t_s"][mine], (rows["draw_w"] > rows["budget_w"])[mine]
        runs, length = [], 0
        for flag in over:
            length = length + 1 if flag else 0
            runs.append(length)
        assert max(runs) * 0.1 <= reaction_s
        # Once the caps have come on, the row stays under its budget.
        settled = t_s > 10.0
        assert over[settled].mean() < 0.01
    without = columns(run(tmp_path, "policy=[]", "duration_s=60", "workload.rate_rps=40"), "rows")
    assert (without["draw_w"] > without["budget_w"]).mean() > 0.3, "the cap must have had work"


def test_commands_are_few(tmp_path):
    folder = run(tmp_path, "duration_s=120", "workload.rate_rps=40")
    commands = json.loads((folder / "summary.json").read_text())["commands"]
    assert commands["sent"] > 0
    assert commands["per_target_per_min_max"] <= 4


def test_the_cost_of_a_cap_shows_in_latency(tmp_path):
    def ttft(*overrides):
        folder = run(tmp_path, "workload.rate_rps=30", "duration_s=60", *overrides)
        return json.loads((folder / "summary.json").read_text())["ttft_s"]["p90"]

    assert ttft("cluster.row_budget_w=1500") > 1.1 * ttft("policy=[]")


def test_lost_telemetry_does_not_break_the_cap(tmp_path):
    folder = run(
        tmp_path,
        "transport.loss_frac=0.3",
        "transport.jitter_s=0.01",
        "duration_s=60",
        "workload.rate_rps=40",
    )
    rows = columns(folder, "rows")
    settled = rows["t_s"] > 10.0
    assert (rows["draw_w"] > rows["budget_w"])[settled].mean() < 0.02


def test_the_time_of_every_token_can_be_had_from_segments(tmp_path):
    kept = Recording.open(run(tmp_path, "record.segments=true", "workload.rate_rps=40"))
    requests = kept.columns("requests")
    done = (requests["status"] == "completed") & (requests["preemptions"] == 0)
    gaps_s = []
    for row in np.flatnonzero(done):
        times_s = token_times_s(kept, int(requests["request_id"][row]))
        assert len(times_s) == requests["output_tokens"][row]
        assert times_s[0] == requests["first_token_s"][row]
        assert times_s[-1] == pytest.approx(requests["finished_s"][row], rel=1e-9)
        gaps_s.append(np.diff(times_s))
    # The very gaps that the histogram counts, but for those of requests that did not end.
    counted = kept.columns("itl", "count")
    assert 0.9 < len(np.concatenate(gaps_s)) / counted["count"].sum() <= 1.0
    assert "segments.parquet" not in table_hashes(run(tmp_path))
    with pytest.raises(RecordingError, match="was record"):
        token_times_s(Recording.open(run(tmp_path)), int(requests["request_id"][done][0]))


def test_thinned_recordings_count_everything(tmp_path):
    whole, thinned = run(tmp_path), run(tmp_path, "record.requests_every=10")
    ours, theirs = (json.loads((f / "summary.json").read_text()) for f in (thinned, whole))
    for key in ("requests", "tokens", "goodput_rps", "energy_j"):
        assert ours[key] == theirs[key]
    for name in ("arrived", "completed", "slo_attained_frac"):
        assert ours["classes"]["chat"][name] == theirs["classes"]["chat"][name]
    kept, all_of_them = columns(thinned, "requests"), columns(whole, "requests")
    assert (kept["request_id"] % 10 == 0).all()
    assert len(kept["request_id"]) == (all_of_them["request_id"] % 10 == 0).sum()


def test_samples_may_be_thinned(tmp_path):
    folder = run(tmp_path, "record.instance_period_s=2.0", "record.itl_period_s=5.0")
    t_s = np.unique(columns(folder, "instances")["t_s"])
    assert np.diff(t_s).min() > 1.9
    assert len(np.unique(columns(folder, "itl")["t_s"])) < 8
    whole = run(tmp_path)
    ours, theirs = (columns(f, "itl")["count"].sum() for f in (folder, whole))
    assert ours == theirs


def test_collapsing_iterations_changes_nothing(tmp_path):
    folders = [
        run(tmp_path, *(f"pool.{pool}.engine={{collapse={value}}}" for pool in (0, 1)))
        for value in ("true", "false")
    ]
    fast, slow = (columns(folder, "requests") for folder in folders)
    assert fast["request_id"].tolist() == slow["request_id"].tolist()
    assert fast["instance"].tolist() == slow["instance"].tolist()
    np.testing.assert_allclose(fast["finished_s"], slow["finished_s"], rtol=1e-6)


@settings(
    max_examples=3,
    deadline=None,
    # A case takes seconds: shrinking it would take minutes and its seed says all.
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    seed=st.integers(0, 1000),
    rate_rps=st.floats(0.5, 8.0),
    budget_w=st.sampled_from([1000, 1400, 2000, 2800]),
    gpu=st.sampled_from(["h100-sxm", "a100-80gb"]),
    image_frac=st.sampled_from([0.0, 0.3]),
)
def test_ten_random_minutes_are_consistent(tmp_path, seed, rate_rps, budget_w, gpu, image_frac):
    """What no real device can show, none of ours may (HARDWARE's consistency rules)."""
    folder = run(
        tmp_path,
        "duration_s=600",
        "cluster.rows=1",
        f"seed={seed}",
        f"workload.rate_rps={rate_rps}",
        f"workload.image_frac={image_frac}",
        f"cluster.row_budget_w={budget_w}",
        f"cluster.gpu={gpu}",
    )
    gpus = columns(folder, "gpus")
    info = columns(folder, "gpu_info")
    idle = 0x1
    busy = gpus["gpu_busy_frac"] > 0
    idle_w = {"h100-sxm": 120.0, "a100-80gb": 83.0}[gpu]
    assert busy.any()
    assert (~busy).any()
    assert (gpus["fb_used_bytes"][busy] > 0).all()
    assert (gpus["power_instant_w"][busy] >= idle_w - 1e-3).all()
    # A kernel at the very end of a tick draws less than a milliwatt on average.
    assert (gpus["power_instant_w"][gpus["gpu_busy_frac"] > 0.02] > idle_w).all()
    assert (gpus["throttle"][busy] & idle == 0).all()
    assert (gpus["throttle"][~busy] & idle == idle).all()
    np.testing.assert_allclose(gpus["power_instant_w"][~busy], idle_w, atol=0.01)
    idle_mhz = gpus["sm_clock_mhz"][~busy].max()
    assert (gpus["sm_clock_mhz"][busy] > idle_mhz).all()
    assert (gpus["fb_used_bytes"] < info["memory_total_bytes"].min()).all()
    assert (gpus["power_limit_enforced_w"] <= gpus["power_limit_w"] + 1e-3).all()
    assert (gpus["power_limit_w"] >= info["power_limit_min_w"].min()).all()
    for gpu_index in range(4):
        mine = gpus["gpu"] == gpu_index
        t_s, energy_j = gpus["t_s"][mine], gpus["energy_j"][mine]
        instant_w = gpus["power_instant_w"][mine].astype(float)
        assert (np.diff(energy_j) >= 0).all()
        # Energy is the integral of instant power; a tick's power covers the tick before it.
        np.testing.assert_allclose(np.diff(energy_j), (instant_w * 0.1)[1:], rtol=1e-3, atol=2e-3)
        if gpu == "h100-sxm":  # reported power is the 1-second mean
            window_j = energy_j[10:] - energy_j[:-10]
            np.testing.assert_allclose(
                gpus["power_avg_w"][mine][10:], window_j / 1.0, rtol=2e-3, atol=0.1
            )
        else:  # GA100 does not average
            np.testing.assert_allclose(gpus["power_avg_w"][mine], instant_w, atol=0.01)
        assert np.allclose(np.diff(t_s), 0.1, atol=1e-6)
    requests = json.loads((folder / "summary.json").read_text())["requests"]
    assert requests["arrived"] == sum(
        requests[key] for key in ("completed", "rejected", "lost", "in_flight")
    )
    kv = columns(folder, "instances")["kv_used_frac"]
    assert (kv >= 0).all()
    assert (kv <= 1).all()
