"""The live bench counts every message, whichever way it goes. Nothing here judges speed."""

from __future__ import annotations

import json

import pytest

from testbed.bench_live import _Generator, _Job, _Template, bench_intake, bench_lateness
from testbed.core.errors import SpecError
from testbed.core.messages import (
    Envelope,
    GpuReadings,
    InstanceReadings,
    TenantReadings,
    decode,
    report,
)
from tests.conftest import cli

pytestmark = pytest.mark.live


@pytest.mark.parametrize(
    "way",
    [{}, {"connections": 2}, {"relays": 2}, {"merged": True}, {"curve": True},
     {"relays": 1, "curve": True}],
    ids=lambda way: "+".join(way) or "direct",
)  # fmt: skip
def test_every_report_is_recorded_whichever_way_it_comes(way):
    found = bench_intake(80, seconds=2.0, **way)
    assert found["reports_sent"] >= 80 * 20
    assert found["gpu_rows_missing"] == 0
    assert found["gpu_rows_recorded"] == found["reports_sent"] * 8
    lost = ("gaps", "dropped_by_nodes", "dropped_by_coordinator", "bad", "ticks_left_out")
    assert [found[name] for name in lost] == [0] * 5
    assert found["round_trips"] > 4
    assert 0 < found["round_trip_p50_s"] <= found["round_trip_p99_s"] <= found["round_trip_max_s"]


def test_a_template_makes_the_very_message_that_a_node_would_encode():
    instances = InstanceReadings([3], [0], [0.4], [10_000], [2_000], [0])
    gpus = GpuReadings(*([[k * 1.5 for k in range(8)]] * 9), [7] * 8, [4] * 8, [False] * 8)
    template = _Template("row0/rack0/node001", 12, instances)
    data = template.fill(70_000, b"\xcb@\x08\x00\x00\x00\x00\x00\x00", gpus.pack())
    said = report(gpus, instances, TenantReadings.empty(), lease_epoch=1, lease_sequence=1)
    assert decode(data) == Envelope("row0/rack0/node001", 12, 70_000, 3.0, said)


def test_a_generator_without_a_coordinator_leaves(monkeypatch):
    monkeypatch.setattr("testbed.bench_live._SILENT_EXIT_S", 0.1)
    job = _Job("tcp://127.0.0.1:5999", "generator0", ["row0/rack0/node000"], 0, False, {}, 0)
    with pytest.raises(SystemExit, match="no coordinator"):
        _Generator(job).run()


@pytest.mark.parametrize("per_process", [1, 2])
def test_nodes_on_one_core_give_account_of_their_lateness(per_process):
    found = bench_lateness(
        4, per_node=2, seconds=2.0, rate_rps=2.0, per_process=per_process, realtime=False
    )
    assert found["nodes"] == 2
    assert 2 * 20 < found["events"] < 1000
    assert 0 < found["late_p50_s"] <= found["late_p99_s"] <= found["late_max_s"]


def test_round_trips_on_the_command_line():
    done = cli("bench", "roundtrip", "--nodes", 10, "--seconds", 4, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["round_trips"] > 5


@pytest.mark.parametrize(
    ("ask", "what"),
    [
        ({"nodes": 0}, "nodes = 0 must be"),
        ({"nodes": 50}, "whole rows of 40"),
        ({"nodes": 40, "seconds": 0.0}, "seconds = 0 must be"),
        ({"nodes": 40, "generators": 0}, "generators = 0"),
        ({"nodes": 40, "connections": 41}, "connections = 41"),
        ({"nodes": 40, "relays": 1, "merged": True}, "not both"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(ask, what):
    with pytest.raises(SpecError, match=what):
        bench_intake(**ask)


@pytest.mark.parametrize(
    "ask",
    [{"instances": 0}, {"per_node": 65}, {"instances": 70}, {"rate_rps": 0.0}, {"per_process": 3}],
)
def test_so_are_those_of_lateness(ask):
    with pytest.raises(SpecError, match="bench: "):
        bench_lateness(**ask)
