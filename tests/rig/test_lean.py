"""Virtual runs without messages write the same bytes as virtual runs with them."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest

from testbed import rig
from testbed.core.spec import parse_spec
from testbed.recorder.reader import Recording
from testbed.shells import virtual
from testbed.shells.lean import BankReports
from testbed.shells.request_path import RequestPath
from tests.conftest import SMALL, table_hashes
from tests.rig.test_plant import PLANT, events, hard

FAULT = "\n[[fault]]\nat_s = 6.05\nnode = 1\ngpu = 0\n"
TENANTS = "\n[tenants]\nper_node = 2\npreprocess = true\n"
DRAINS = '''
from testbed.policies import DrainInstance
import numpy as np

class Drains:
    """Takes an instance out and in again, every three seconds."""

    period_s = 3.0

    def __init__(self):
        self.on = False

    def step(self, view):
        self.on = not self.on
        return [DrainInstance(np.array([0, 1, 4]), self.on)]
'''

KNOBS = '''
from testbed.policies import OrderQueue, RecallWaiting, SetBatch, Squash
import numpy as np

class Knobs:
    """Turns every quick knob in turn, every second."""

    period_s = 1.0

    def __init__(self):
        self.step_count = 0

    def step(self, view):
        self.step_count += 1
        all_of_them = np.arange(len(view.instances.name))
        return [
            [SetBatch(all_of_them, 2 + self.step_count % 5)],
            [RecallWaiting(all_of_them)],
            [OrderQueue(all_of_them)],
            [Squash(all_of_them, 0.5)],
        ][self.step_count % 4]
'''


def both_ways(tmp_path, monkeypatch, *overrides, text=SMALL):
    folders = []
    for by_message in (False, True):
        monkeypatch.setattr(rig, "run_virtual", partial(virtual.run_virtual, by_message=by_message))
        folders.append(rig.run(parse_spec(text, overrides), tmp_path / "runs"))
    return folders


@pytest.mark.parametrize(
    ("more", "overrides"),
    [
        ("", []),
        ("", ["seed=7", "workload.rate_rps=60", "drain_s=0"]),
        ("", ["router.use=round_robin", "workload.source=bursty", "workload.trace="]),
        ("", ["router.use=power_of_two", "transport.delay_s=0.04", "control.sample_period_s=0.07"]),
        (FAULT, ["workload.rate_rps=60"]),
        (FAULT, ["workload.rate_rps=60", "control.max_attempts=1"]),
        ("", ["pool.0.engine={kv_blocks=60, max_num_seqs=6}", "workload.rate_rps=40"]),
        ("", ["transport.loss_frac=0.3"]),
        (TENANTS, ["duration_s=12", "workload.rate_rps=60"]),
        ("", ["record.gpu_period_s=1.0", "control.lease_s=0.5", "cluster.row_budget_w=1500"]),
        ("", ["cluster.gpu=a100-80gb", "control.hold_limit=3", "policy.0.use=DRAINS"]),
    ],
)  # fmt: skip
def test_same_bytes_with_and_without_messages(tmp_path, monkeypatch, more, overrides):
    (tmp_path / "drains.py").write_text(DRAINS)
    overrides = [text.replace("DRAINS", str(tmp_path / "drains.py")) for text in overrides]
    lean, messages = both_ways(tmp_path, monkeypatch, *overrides, text=SMALL + more)
    ours, theirs = table_hashes(lean), table_hashes(messages)
    assert ours == theirs
    assert Recording.open(lean).table("requests").num_rows > 50


@pytest.mark.parametrize(
    "overrides",
    [
        ["plant.period_s=0.5", "record.views=true"],
        ["plant.speedup=3600", "vms.short_lived_frac=1.0"],
        [*hard(1), "plant.oversubscription_frac=0.5", "duration_s=80"],  # all is dark by the end
    ],
)
def test_a_building_has_the_same_effect_without_messages(tmp_path, monkeypatch, overrides):
    lean, messages = both_ways(tmp_path, monkeypatch, *overrides, text=PLANT)
    assert table_hashes(lean) == table_hashes(messages)
    dark = "oversubscription" in overrides[-2]
    assert bool(events(lean, "dark")) == dark


def test_jitter_takes_the_way_of_messages(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(
        virtual, "RequestPath", lambda *args: made.append(args) or RequestPath(*args)
    )
    rig.run(parse_spec(SMALL, ["duration_s=2"]), tmp_path / "runs")
    assert made
    made.clear()
    rig.run(parse_spec(SMALL, ["duration_s=2", "transport.jitter_s=0.01"]), tmp_path / "runs")
    assert not made


def test_a_limit_set_by_somebody_else_is_drift(tmp_path, monkeypatch):
    """What `BankReports` skips must not hide a change that it did not make itself."""
    sample = BankReports.sample

    def meddling(self, now_s):
        if abs(now_s - 5.0) < 1e-9:
            self._limits[5] = 650_000
        sample(self, now_s)

    monkeypatch.setattr(BankReports, "sample", meddling)
    folder = rig.run(parse_spec(SMALL, ["policy=[]"]), tmp_path / "runs")
    [event] = [
        e for e in Recording.open(folder).table("events").to_pylist() if e["kind"] == "drift"
    ]
    assert event["source"] == "row1/rack0/node001"
    gpus = Recording.open(folder).columns("gpus", "t_s", "gpu", "power_limit_w")
    mine = gpus["gpu"] == 5
    after = gpus["power_limit_w"][mine][gpus["t_s"][mine] > 5.5]
    np.testing.assert_allclose(after, 650.0)  # a lower one is respected


def test_requests_and_energy_are_conserved(tmp_path):
    folder = rig.run(
        parse_spec(SMALL, ["workload.rate_rps=80", "duration_s=15", "drain_s=1"]), tmp_path / "runs"
    )
    requests = json.loads((folder / "summary.json").read_text())["requests"]
    ended = sum(requests[key] for key in ("completed", "rejected", "lost", "in_flight"))
    assert requests["arrived"] == ended > 300
    recording = Recording.open(folder)
    ids = recording.columns("requests", "request_id")["request_id"]
    assert len(np.unique(ids)) == len(ids)
    gpus = recording.columns("gpus", "t_s", "gpu", "energy_j", "power_instant_w")
    for gpu in range(8):
        mine = gpus["gpu"] == gpu
        drawn_j = np.diff(gpus["energy_j"][mine])
        instant_w = gpus["power_instant_w"][mine][1:].astype(float)
        np.testing.assert_allclose(drawn_j.sum(), (instant_w * 0.1).sum(), rtol=1e-4)


def test_nodes_say_goodbye_without_messages_too(tmp_path):
    folder = rig.run(parse_spec(SMALL, ["duration_s=2"]), tmp_path / "runs")
    sources = {row["source"] for row in Recording.open(folder).table("lateness").to_pylist()}
    assert sources == {"row0/rack0/node000", "row1/rack0/node001"}


def test_quick_knobs_reach_engines_that_are_driven_without_messages(tmp_path, monkeypatch):
    (tmp_path / "knobs.py").write_text(KNOBS)
    overrides = [f"policy.0.use={tmp_path / 'knobs.py'}", "workload.rate_rps=90"]
    engine = ["pool.0.engine={max_num_seqs=8}", "pool.1.engine={max_num_seqs=8}"]
    lean, messages = both_ways(tmp_path, monkeypatch, *overrides, *engine)
    assert table_hashes(lean) == table_hashes(messages)
    assert len(Recording.open(lean).table("moves")) > 10
