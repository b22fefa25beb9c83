"""Instances that policies start, stop, re-shard and swap: whole runs, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from emulators.models import load_model, quality_frac
from testbed import rig
from testbed.analysis.export import export
from testbed.analysis.report import report_html
from testbed.core.errors import PolicyError, SpecError
from testbed.core.spec import load_spec, parse_spec
from testbed.core.view import DRAINING, OFF, STARTING, UP
from testbed.policies.load import load_controller
from testbed.recorder.reader import Recording
from testbed.recorder.replay import replay, ticks
from tests.conftest import ROOT, cli, table_hashes

HERE = Path(__file__).parent
SPEC = HERE / "elastic.toml"
PLAN = f"policy=[{{ use = '{HERE / 'plan.py'}' }}]"


def run(tmp_path, *overrides, policy=PLAN):
    return rig.run(load_spec(SPEC, [policy, *overrides]), tmp_path / "runs")


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def columns(folder, table):
    return Recording.open(folder).columns(table)


def policy_that(tmp_path, *lines, name="said"):
    """A policy that says once, at 2 s, what the lines put into ``said``."""
    path = tmp_path / f"{name}.py"
    body = "\n        ".join(lines)
    path.write_text(f"""
import numpy as np
from testbed.policies import *
class Says:
    period_s = 1.0
    def step(self, view):
        said = []
        if round(view.now_s) != 2:
            return said
        {body}
        return said
""")
    return f"policy=[{{ use = '{path}' }}]"


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    return run(tmp_path_factory.mktemp("planned"))


def states(folder, instance):
    """(state, num_gpus, when) of a slot, in order."""
    table = columns(folder, "layout")
    mine = np.flatnonzero(table["instance"] == instance)
    return [
        (int(table["state"][k]), int(table["num_gpus"][k]), float(table["t_s"][k])) for k in mine
    ]


def test_every_request_ends_once(planned):
    requests = summary_of(planned)["requests"]
    assert requests["arrived"] == requests["completed"] > 100
    table = columns(planned, "requests")
    assert len(set(table["request_id"])) == len(table["request_id"]) == requests["arrived"]
    # Each one's tokens came out once: those before a move, and the rest after it.
    given = columns(planned, "instances")
    last = {
        int(i): int(n) for i, n in zip(given["instance"], given["output_tokens_total"], strict=True)
    }
    assert sum(last.values()) == table["output_tokens"].sum()


def test_slots_pass_through_the_states_of_the_plan(planned):
    # Whether the small model is up before it is sent home depends on how long draining took.
    out_and_in = [
        (state, gpus) for state, gpus, _ in states(planned, 8) if (state, gpus) != (UP, 2)
    ]
    assert out_and_in == [
        (OFF, 0), (STARTING, 8), (UP, 8), (DRAINING, 8), (STARTING, 2), (OFF, 0),
    ]  # fmt: skip
    reshaped = [(state, gpus) for state, gpus, _ in states(planned, 0)]
    assert reshaped[:3] == [(UP, 8), (STARTING, 4), (UP, 4)]
    assert reshaped[-1] == (UP, 8)
    half = [(state, gpus) for state, gpus, _ in states(planned, 4)]
    assert half == [(OFF, 0), (STARTING, 4), (UP, 4), (OFF, 0)]


def test_starts_take_what_the_model_says(planned):
    table = columns(planned, "layout")

    def up_s(instance, t_s):
        mine = (table["instance"] == instance) & (table["state"] == UP) & (table["t_s"] > t_s)
        return float(table["ready_s"][mine][0])

    weights = load_model("llama-2-70b").weight_bytes
    # Said at 3 s, heard 5 ms later: an eighth over PCIe, then 1 s to warm.
    assert up_s(8, 3.0) == pytest.approx(3.005 + weights / 8 / 50e9 + 1.0, abs=1e-6)
    # 8 to 2 x 4: some GPUs need a whole quarter over NVLink, then 50 ms.
    assert up_s(4, 7.0) == pytest.approx(7.005 + weights / 4 / 450e9 + 0.05, abs=1e-6)
    # Back: each GPU drops half of what it has.
    assert up_s(0, 11.0) == pytest.approx(11.055, abs=1e-6)


def test_re_sharding_hands_requests_on_and_clients_see_no_token_twice(planned):
    moves = columns(planned, "moves")
    assert set(moves["why"]) == {"resharded"}, "a short drain lets all others finish"
    table = columns(planned, "requests")
    where = {int(one): k for k, one in enumerate(table["request_id"])}
    begun = [k for k, tokens in enumerate(moves["output_tokens"]) if tokens]
    assert begun
    for k in begun:
        row = where[int(moves["request_id"][k])]
        assert table["first_token_s"][row] < moves["t_s"][k] < table["finished_s"][row]
        assert table["attempts"][row] >= 2


def test_energy_is_the_integral_of_power_all_along(planned):
    gpus = columns(planned, "gpus")
    for gpu in (0, 4, 8, 10, 15):
        mine = gpus["gpu"] == gpu
        energy_j, watts = gpus["energy_j"][mine], gpus["power_instant_w"][mine].astype(float)
        steps_s = np.diff(gpus["t_s"][mine])
        np.testing.assert_allclose(np.diff(energy_j), watts[1:] * steps_s, rtol=1e-3, atol=2e-2)
    # GPU 15 does nothing before 3 s, loads for 0.35 s, serves until 14 s and drains; then nothing.
    mine = gpus["gpu"] == 15
    t_s, watts = gpus["t_s"][mine], gpus["power_instant_w"][mine]
    idle_w = watts[t_s < 3.0].max()
    loading = (t_s > 3.05) & (t_s < 3.3)
    assert (watts[loading] > idle_w + 0.5).all(), "weights stream into its memory"
    assert (gpus["gpu_busy_frac"][mine][loading] == 0).all()
    np.testing.assert_allclose(watts[(t_s > 3.5) & (t_s < 4.3)], idle_w, atol=0.01)
    assert watts[(t_s > 5) & (t_s < 14)].max() > 1.5 * idle_w
    np.testing.assert_allclose(watts[t_s > 18.0], idle_w, atol=0.01)
    memory = gpus["fb_used_bytes"][mine]
    assert memory[t_s < 3.0].max() < memory[loading].min()
    assert memory[t_s > 17.0].max() == memory[t_s < 3.0].max()


def test_work_is_counted_across_a_change_between_two_samples(tmp_path):
    """A run that re-shards at odd moments draws, in sum, what its busy time says."""
    folder = run(tmp_path, "control.sample_period_s=0.7", "control.lease_s=3")
    gpus = columns(folder, "gpus")
    busy = gpus["gpu_busy_frac"] > 0
    assert (gpus["gpu_busy_frac"] <= 1.0).all()
    assert (gpus["power_instant_w"][busy] >= 119.0).all(), "never less than idle"


def test_replay_shows_policies_the_layouts_of_then(planned):
    result = replay(planned, load_controller)
    assert result.equal == 7
    assert result.same
    seen = {}
    for tick in ticks(Recording.open(planned)):
        slots, gpus = tick.view.instances, tick.view.gpus
        seen[round(tick.view.now_s)] = (slots.num_gpus[[0, 4, 8]].tolist(), gpus.instance.tolist())
    assert seen[1] == ([8, 0, 0], [0] * 8 + [-1] * 8)
    assert seen[6][0] == [8, 0, 8]
    assert seen[9] == ([4, 4, 8], [0] * 4 + [4] * 4 + [8] * 8)
    assert seen[22][0] == [8, 0, 0]
    assert tick.view.models == ("llama-2-70b", "llama-2-13b")
    declared = quality_frac(load_model("llama-2-13b"), "fp8")
    assert tick.view.model_quality_frac[1, 1] == declared < tick.view.model_quality_frac[0, 0]


def test_the_summary_says_what_instances_took_and_gave(planned):
    layout = summary_of(planned)["layout"]
    assert (layout["starts"], layout["stops"], layout["moved_requests"]) == (5, 3, 8)
    end_s = summary_of(planned)["duration_s"]
    # GPUs of node 0 all along, of node 1 from 3.1 s; 4 of 8 from 16.8 s; the last 2 until 20 s.
    expected = 8 * end_s + 8 * (16.8 - 3.1) + 4 * (18.1 - 16.8) + 2 * (20.0 - 18.1)
    assert layout["gpu_s"] == pytest.approx(expected, abs=2.5)
    table = columns(planned, "requests")
    small = (table["instance"] == 10).sum()
    quality = [quality_frac(load_model(name), "bf16") for name in ("llama-2-70b", "llama-2-13b")]
    assert small > 0
    low = (len(table["instance"]) - small) * quality[0] + small * 0.997 * quality[1]
    assert layout["quality_mean_frac"] == pytest.approx(low / len(table["instance"]), rel=1e-6)


def test_the_report_and_the_exports_can_be_made(planned, tmp_path):
    page = report_html(Recording.open(planned))
    assert "tp4 bf16 at GPU 4, model 0, pool 0" in page
    assert "starting llama-2-70b tp8" in page
    for kind in ("csv", "perfetto", "prometheus"):
        export(planned, kind, tmp_path / kind)


def test_one_seed_writes_the_same_bytes(planned, tmp_path):
    assert table_hashes(run(tmp_path)) == table_hashes(planned)


def test_an_instance_that_cannot_drain_in_time_hands_the_rest_back(tmp_path):
    long = ("workload.output_tokens=700", "drain_s=90")
    folder = run(tmp_path, *long, "reconfigure.delays.drain_s=0.5")
    moves = columns(folder, "moves")
    assert "drained" in set(moves["why"])
    requests = summary_of(folder)["requests"]
    assert requests["arrived"] == requests["completed"]


def test_scale_shortens_all_delays_alike(tmp_path):
    folder = run(tmp_path, "reconfigure.scale=0.1")
    table = columns(folder, "layout")
    first = (table["instance"] == 8) & (table["state"] == UP)
    weights = load_model("llama-2-70b").weight_bytes
    expected = 3.005 + 0.1 * (weights / 8 / 50e9 + 1.0)
    assert table["ready_s"][first][0] == pytest.approx(expected, abs=1e-6)


def test_a_cold_start_of_an_empty_node_boots_and_of_a_used_one_does_not(tmp_path):
    def ready_s(node):
        policy = policy_that(
            tmp_path, f"said.append(SetLayout({node}, (Placement(0, 8, 0, 1),), 'cold'))"
        )
        few = ("duration_s=400", "workload.rate_rps=0.05", "control.sample_period_s=0.5")
        table = columns(run(tmp_path, *few, "reconfigure.scale=0.9", policy=policy), "layout")
        model = (table["model"] == 1) & (table["state"] == UP)
        return float(table["ready_s"][model][0])

    weights = load_model("llama-2-13b").weight_bytes
    used_s = 0.9 * (weights / 0.77e9 + 18.0 + 15.0)
    assert ready_s(1) == pytest.approx(2.005 + used_s + 0.9 * 210.0, abs=1e-6)
    assert 2.005 + used_s <= ready_s(0) < 2.005 + used_s + 4.0, "after a drain of at most 3.6 s"


def test_empty_gpus_can_be_told_to_draw_less(tmp_path):
    folder = run(tmp_path, "reconfigure.empty_power_frac=0.25")
    gpus = columns(folder, "gpus")
    mine = (gpus["gpu"] == 15) & ((gpus["t_s"] < 3.0) | (gpus["t_s"] > 20.0))
    np.testing.assert_allclose(gpus["power_instant_w"][mine][1:], 30.0, atol=0.01)


SHUFFLED = """
name = "shuffled"
duration_s = 12
drain_s = 60
[cluster]
elastic = true
nodes_per_row = 2
gpus_per_node = 4
[[pool]]
name = "a"
gpus_per_node = 2
tp = 2
[[pool]]
name = "b"
nodes = "0"
gpus_per_node = 1
[[slo_class]]
name = "a"
pool = "a"
[[slo_class]]
name = "b"
pool = "a"
[reconfigure]
models = ["mistral-7b"]
scale = 0.3
delays = { drain_s = 2.0 }
[workload]
rate_rps = 25.0
output_tokens = 80
"""


@settings(
    max_examples=6,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    seed=st.integers(0, 10_000),
    fault=st.booleans(),
    jitter_s=st.sampled_from([0.0, 0.02]),
    empty_power_frac=st.sampled_from([1.0, 0.3]),
)
def test_whatever_is_said_no_request_is_lost_or_doubled(
    tmp_path, seed, fault, jitter_s, empty_power_frac
):
    policy = f"policy=[{{ use = '{HERE / 'shuffle.py'}', params = {{ seed = {seed} }} }}]"
    overrides = [
        policy, f"seed={seed}", f"transport.jitter_s={jitter_s}",
        f"reconfigure.empty_power_frac={empty_power_frac}",
    ]  # fmt: skip
    if fault:
        overrides.append("fault=[{ at_s = 5.0, node = 1, gpu = 2 }]")
    folder = rig.run(parse_spec(SHUFFLED, overrides), tmp_path / "runs")
    requests = summary_of(folder)["requests"]
    assert requests["arrived"] == requests["completed"] + requests["lost"]
    assert requests["lost"] == 0 or fault
    table = columns(folder, "requests")
    assert len(set(table["request_id"])) == len(table["request_id"]) == requests["arrived"]
    done = table["status"] == "completed"
    assert (table["first_token_s"][done] >= table["arrival_s"][done]).all()
    assert (table["finished_s"][done] >= table["first_token_s"][done]).all()
    if not fault:  # what a crash took is computed, and seen, twice
        given_out = columns(folder, "instances")
        last = dict(
            zip(
                given_out["instance"].tolist(),
                given_out["output_tokens_total"].tolist(),
                strict=True,
            )
        )
        assert sum(last.values()) == table["output_tokens"].sum()
    layout = columns(folder, "layout")
    for step in np.unique(layout["step"]):
        held = np.zeros(8, int)
        for slot in range(8):
            rows = np.flatnonzero((layout["instance"] == slot) & (layout["step"] <= step))
            held[slot : slot + layout["num_gpus"][rows[-1]]] += 1
        assert held.max() <= 1, "no GPU belongs to two instances"
    gpus = columns(folder, "gpus")
    assert (gpus["gpu_busy_frac"] <= 1).all()
    for gpu in range(8):
        mine = gpus["gpu"] == gpu
        steps_j = np.diff(gpus["energy_j"][mine])
        watts = gpus["power_instant_w"][mine][1:].astype(float)
        np.testing.assert_allclose(
            steps_j, watts * np.diff(gpus["t_s"][mine]), rtol=1e-3, atol=2e-2
        )
    assert replay(folder, load_controller).same


# Several policies.


def test_of_two_layouts_the_higher_precedence_holds_and_the_other_is_told(tmp_path):
    mine = policy_that(tmp_path, "said.append(SetLayout(1, (Placement(0, 8, 0, 0),)))", name="a")
    slo = policy_that(tmp_path, "said.append(SetLayout(1, (Placement(0, 4, 0, 0),)))", name="b")
    both = f"{mine[:-1]}, {slo[8:-2].strip()}, precedence = 'slo' }}]"
    folder = run(tmp_path, policy=both)
    commands = columns(folder, "commands")
    assert commands["outcome"].tolist() == ["overruled", "sent"]
    assert commands["winner"][0].endswith("b.py")
    assert states(folder, 8)[-1][:2] == (UP, 4)


def test_a_policy_takes_its_layout_back(tmp_path):
    lines = (
        "said += [SetLayout(1, (Placement(0, 8, 0, 0),)), SetLayout(1, None)]",
        "said += [SetLayout(0, (Placement(0, 8, 0, 0),))]",
    )
    folder = run(tmp_path, policy=policy_that(tmp_path, *lines))
    outcomes = columns(folder, "commands")["outcome"].tolist()
    assert outcomes == ["unchanged"] * 3, "nobody wants node 1; node 0 holds that already"
    assert not len(columns(folder, "moves")["why"])


# Quick knobs, with fixed instances as well.

BUSY = ("workload.rate_rps=30", "workload.output_tokens=60", "duration_s=12", "drain_s=120")


@pytest.mark.parametrize("elastic", ["true", "false"])
def test_a_smaller_batch_makes_requests_wait(tmp_path, elastic):
    fixed = (f"cluster.elastic={elastic}",)
    if elastic == "false":
        fixed += ("reconfigure={}", "cluster.nodes_per_row=1", "pool.0.nodes=all")
    policy = policy_that(tmp_path, "said.append(SetBatch(np.array([0]), 8))")
    folder = run(tmp_path, *BUSY, *fixed, policy=policy)
    table = columns(folder, "instances")
    mine = table["instance"] == 0
    t_s, running = table["t_s"][mine], table["num_running"][mine]
    assert running[t_s < 2.0].max() > 8
    assert running[(t_s > 8.0) & (t_s < 12.0)].max() == 8
    assert table["num_waiting"][mine].max() > 100
    seen = {t.view.now_s: t.view.instances.max_num_seqs[0] for t in ticks(Recording.open(folder))}
    assert (seen[2.0], seen[3.0]) == (256, 8)
    assert replay(folder, load_controller).same
    requests = summary_of(folder)["requests"]
    assert requests["arrived"] == requests["completed"]


def test_waiting_requests_are_recalled_and_served_elsewhere(tmp_path):
    path = tmp_path / "recall.py"
    path.write_text("""
import numpy as np
from testbed.policies import *
class Recalls:
    period_s = 0.1
    def __init__(self):
        self.done = 0
    def step(self, view):
        if self.done == 0 and view.now_s > 2:
            self.done = 1
            return [SetBatch(np.array([0]), 4), SetLayout(1, (Placement(0, 8, 0, 0),))]
        if self.done == 1 and view.instances.up[8]:
            self.done = 2
            return [RecallWaiting(np.array([0]))]
        return []
""")
    folder = run(tmp_path, *BUSY, policy=f"policy=[{{ use = '{path}' }}]")
    moves = columns(folder, "moves")
    recalled = moves["request_id"][moves["why"] == "recalled"]
    assert len(recalled) > 20
    table = columns(folder, "requests")
    taken = np.isin(table["request_id"], recalled)
    assert (table["instance"][taken] == 8).mean() > 0.5, "node 1 has hardly anything to do"
    assert (table["attempts"][taken] == 2).all()
    assert (table["status"] == "completed").all()


def test_squashing_drops_who_is_late_and_has_no_token(tmp_path):
    path = tmp_path / "squash.py"
    path.write_text("""
import numpy as np
from testbed.policies import *
class Squashes:
    period_s = 1.0
    def step(self, view):
        if round(view.now_s) == 2:
            return [SetBatch(np.array([0]), 4)]
        if view.now_s > 4:
            return [Squash(np.array([0]), ttft_frac=1.5)]
        return []
""")
    folder = run(tmp_path, *BUSY, policy=f"policy=[{{ use = '{path}' }}]")
    table, moves = columns(folder, "requests"), columns(folder, "moves")
    squashed = moves["why"] == "squashed"
    rejected = table["status"] == "rejected"
    assert rejected.sum() == squashed.sum() > 50
    assert np.isnan(table["first_token_s"][rejected]).all()
    arrived = dict(zip(table["request_id"], table["arrival_s"], strict=True))
    waited_s = [
        t_s - arrived[one] for one, t_s in zip(moves["request_id"], moves["t_s"], strict=True)
    ]
    assert min(waited_s) > 1.5 * 2.0, "no sooner than one and a half times the class's 2 s"
    requests = summary_of(folder)["requests"]
    assert requests["arrived"] == requests["completed"] + requests["rejected"]


def test_a_queue_by_deadline_serves_the_hurried_first(tmp_path):
    classes = (
        "slo_class=[{ name='slow', pool='chat', ttft_s=60.0 }, { name='fast', pool='chat' }]",
    )
    attained = {}
    for by in ("arrival", "deadline"):
        order = f"said.append(OrderQueue(np.array([0]), by={by!r}))"
        policy = policy_that(tmp_path, "said.append(SetBatch(np.array([0]), 16))", order, name=by)
        folder = run(tmp_path, *BUSY, *classes, policy=policy)
        table = columns(folder, "requests")
        fast = (table["slo_class"] == "fast") & (table["arrival_s"] > 3.0)
        attained[by] = np.median((table["first_token_s"] - table["arrival_s"])[fast])
        assert (table["status"] == "completed").all()
    assert attained["deadline"] < 0.7 * attained["arrival"]


def test_the_policy_in_the_guide_scales_out_and_in(tmp_path):
    source = ROOT / "docs" / "scale_out.py"
    assert source.read_text() in (ROOT / "docs" / "write-a-policy.md").read_text()
    policy = f"policy=[{{ use = '{source}', params = {{ high_tokens = 10000.0 }} }}]"
    busy = ("workload.rate_rps=30", "duration_s=30", "drain_s=60")
    out = run(tmp_path, *busy, policy=policy)
    assert [state for state, _, _ in states(out, 8)] == [OFF, STARTING, UP]
    back = run(tmp_path, "pool.0.nodes=all", "workload.rate_rps=1", policy=policy)
    assert [state for state, _, _ in states(back, 8)][-1] == OFF
    for folder in (out, back):
        requests = summary_of(folder)["requests"]
        assert requests["arrived"] == requests["completed"]


# What is refused.


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("SetLayout(7, ())", r"SetLayout.node = 7 must be an index below 2"),
        (
            "SetLayout(1, (Placement(0, 4, 0, 0), Placement(2, 4, 0, 0)))",
            r"layout\[1\].first_gpu = 2, tp = 4: GPU 2 is taken by layout\[0\]",
        ),
        ("SetLayout(1, (Placement(6, 4, 0, 0),))", r"layout\[0\].tp = 4 must be one of"),
        ("SetLayout(1, (Placement(0, 3, 0, 0),))", r"layout\[0\].tp = 3 must be one of"),
        ("SetLayout(1, (Placement(0, 8, 0, 5),))", r"layout\[0\].model = 5 must be an index below"),
        ("SetLayout(1, (Placement(0, 8, 3, 0),))", r"layout\[0\].pool = 3 must be an index below"),
        (
            "SetLayout(1, (Placement(0, 1, 0, 0),))",
            r"layout\[0\].tp = 1: llama-2-70b leaves no memory for KV blocks",
        ),
        (
            "SetLayout(1, (Placement(0, 8, 0, 0, 'fp7'),))",
            r"layout\[0\].precision = 'fp7' must be one of",
        ),
        ("SetLayout(1, (), 'warm')", r"SetLayout.how = 'warm' must be"),
        ("SetBatch(np.array([0]), 9000)", r"SetBatch.max_num_seqs = 9000 must be below the 8192"),
        ("SetBatch(np.array([99]), 9)", r"index \[99\] is not below 16"),
        ("OrderQueue(np.array([0]), 'size')", r"OrderQueue.by = 'size' must be"),
        ("Squash(np.array([0]), -1.0)", r"value \[-1.0\] must be finite and >= 0"),
    ],
)
def test_what_cannot_be_is_refused_with_field_and_value(tmp_path, command, message):
    with pytest.raises(PolicyError, match=message):
        run(tmp_path, policy=policy_that(tmp_path, f"said.append({command})"))


def test_layouts_need_an_elastic_run(tmp_path):
    policy = policy_that(tmp_path, "said.append(SetLayout(0, ()))")
    fixed = ("cluster.elastic=false", "reconfigure={}")
    with pytest.raises(PolicyError, match=r"needs cluster.elastic = true"):
        run(tmp_path, *fixed, policy=policy)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["pool.0.nodes=3"], "nodes = '3'|nodes"),
        (["pool.0.nodes='5'"], "must count up and stay below 2"),
        (["pool.0.nodes='a-b'"], "must be all, none or ranges"),
        (["cluster.elastic=false"], "reconfigure: needs cluster.elastic"),
        (["mode=hardware"], "only emulated nodes"),
        (["reconfigure.delays.storage_bytes_per_s=0.0"], "storage_bytes_per_s = 0.0 must be >= 1"),
        (["cluster.elastic=false", "reconfigure={}", "pool.0.nodes=none"], "needs cluster.elastic"),
    ],
)
def test_bad_spec(overrides, message):
    with pytest.raises(SpecError, match=message):
        load_spec(SPEC, overrides)


def test_an_unknown_model_is_named(tmp_path):
    with pytest.raises(SpecError, match="model 'gpt-9' is none of"):
        run(tmp_path, "reconfigure.models=['gpt-9']")


def test_pools_on_some_nodes_only():
    text = '[cluster]\nnodes_per_row = 3\n[[pool]]\nname = "a"\nnodes = "0-1"\n'
    text += '[[pool]]\nname = "b"\nnodes = "2"\n[[slo_class]]\npool = "a"\n'
    spec = parse_spec(text)
    assert [spec.pools_on(node) for node in range(3)] == [[0], [0], [1]]


@pytest.mark.live
def test_emulated_and_virtual_runs_agree(tmp_path):
    folders = {}
    for mode in ("virtual", "emulated"):
        done = cli(
            "run", SPEC, "--mode", mode, "--policy", HERE / "plan.py",
            "--out", tmp_path / mode, "--json", "--no-report",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        folders[mode] = next((tmp_path / mode).glob("*/manifest.json")).parent
    ours, theirs = (summary_of(folders[mode]) for mode in ("virtual", "emulated"))
    assert theirs["requests"] == pytest.approx(ours["requests"])
    assert theirs["energy_j"] == pytest.approx(ours["energy_j"], rel=0.05)
    ready: list[np.ndarray] = []
    for table, names in (
        ("commands", ("t_s", "kind", "target_index", "value", "outcome")),
        ("layout", ("instance", "num_gpus", "model", "precision", "state")),
        ("moves", ("request_id", "instance", "why")),
    ):
        said = {}
        for mode, folder in folders.items():
            found = columns(folder, table)
            if table == "commands":
                # Live runs decide half a sample period later, between two samples.
                found["t_s"] = (found["t_s"] - (mode == "emulated") * 0.05).round(6)
            elif table == "layout":
                # So a sample may show a start of 55 ms in one and not in the other.
                shown = np.flatnonzero(found["state"] != STARTING)
                shown = shown[np.argsort(found["instance"][shown], kind="stable")]
                found = {name: column[shown] for name, column in found.items()}
                ready.append(found["ready_s"])
            said[mode] = [found[name].tolist() for name in names]
        assert said["emulated"] == said["virtual"], table
    np.testing.assert_allclose(*ready, atol=0.06)
    assert replay(folders["emulated"], load_controller).same
