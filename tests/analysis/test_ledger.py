"""The ledger: what a run drew, emitted and cost, and whose it was."""

from __future__ import annotations

import json

import numpy as np
import pytest

from emulators.datacenter import Host
from emulators.profiles import load_gpu
from testbed import rig
from testbed.analysis.ledger import J_PER_KWH, carbon_g_per_kwh, ledger, read_energy
from testbed.core.errors import SpecError
from testbed.core.spec import LedgerSpec, PlantSpec, load_spec, parse_spec
from testbed.recorder.reader import Recording
from tests.conftest import ROOT, SMALL

ELASTIC = ROOT / "tests" / "elastic" / "elastic.toml"


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    return rig.run(parse_spec(SMALL, ["duration_s=60"]), tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def elastic_run(tmp_path_factory):
    plan = ROOT / "tests" / "elastic" / "plan.py"
    more = [f'policy=[{{use="{plan}:Plan"}}]', "control.sample_period_s=0.5"]
    return rig.run(load_spec(ELASTIC, more), tmp_path_factory.mktemp("elastic"))


def test_energy_is_that_of_the_counters(small_run):
    summary = json.loads((small_run / "summary.json").read_text())
    found = ledger(small_run)
    assert found["gpu_kwh"] == pytest.approx(summary["energy_j"] / J_PER_KWH, rel=1e-3)
    assert found["released_kwh"] == 0
    end_s = summary["duration_s"]
    assert found["gpu_h"] == pytest.approx(8 * end_s / 3600, rel=0.02)
    assert summary["ledger"]["energy_kwh"] == found["energy_kwh"]


def test_two_halves_make_a_whole(small_run):
    parts = [ledger(small_run, None, *span)["energy_kwh"] for span in ((0, 30), (30, np.inf))]
    assert sum(parts) == pytest.approx(ledger(small_run)["energy_kwh"], rel=0.01)


def test_shares_of_classes_and_of_tenants_make_a_whole(small_run):
    found = ledger(small_run, LedgerSpec(grid="PJM"))
    for name in ("by_class", "by_tenant"):
        assert sum(part["share_frac"] for part in found[name].values()) == pytest.approx(1.0)
        carbon = sum(part["carbon_kg"] for part in found[name].values())
        assert carbon == pytest.approx(found["carbon_kg"])
    assert set(found["by_class"]) == {"chat", "vision", "(idle)"}
    tenants = found["by_tenant"]
    assert tenants["tenant0"]["share_frac"] > tenants["tenant3"]["share_frac"]


def test_carbon_and_money_follow_their_series(small_run):
    flat = ledger(small_run, LedgerSpec(price_usd_per_kwh=[0.5]))
    assert flat["energy_usd"] == pytest.approx(0.5 * flat["energy_kwh"])
    assert flat["carbon_kg"] is None
    hour = ledger(small_run, LedgerSpec(grid="CISO", begins_h=30))
    intensity = carbon_g_per_kwh("CISO")[30]
    assert hour["carbon_kg"] == pytest.approx(hour["energy_kwh"] * intensity / 1000)
    by_hour = LedgerSpec(price_usd_per_kwh=[float(h) for h in range(24)], begins_h=5)
    assert ledger(small_run, by_hour)["energy_usd"] == pytest.approx(5 * flat["energy_kwh"])


def test_hosts_and_pue_are_added_where_they_are_named(small_run):
    plain, whole = (ledger(small_run, LedgerSpec(host_w=w)) for w in (0.0, 1000.0))
    hours = plain["gpu_h"] / 4  # four GPUs a node
    assert whole["energy_kwh"] - plain["energy_kwh"] == pytest.approx(hours, rel=1e-6)
    assert ledger(small_run, LedgerSpec(pue=1.3))["energy_kwh"] == pytest.approx(
        1.3 * plain["energy_kwh"]
    )


def test_hosts_of_a_plant_draw_more_where_their_gpus_do(small_run):
    """Between what an idle server's host draws and a busy one's, and not a constant."""
    spec = Recording.open(small_run).spec
    host = Host(PlantSpec(), load_gpu(spec.cluster.gpu), spec.cluster.gpus_per_node)
    idle_w, busy_w = (float(host.host_w(np.float64(load))) for load in (0.0, 1.0))
    found = ledger(small_run, LedgerSpec(plant_hosts=True))
    flat = ledger(small_run, LedgerSpec(host_w=1.0))  # hours of nodes, in kWh
    mean_w = found["host_kwh"] / flat["host_kwh"]
    assert idle_w < mean_w < busy_w
    assert found["energy_kwh"] == pytest.approx(found["gpu_kwh"] + found["host_kwh"])


def test_an_unknown_grid_is_refused_with_those_there_are():
    with pytest.raises(SpecError, match="CISO"):
        carbon_g_per_kwh("MARS")


def test_a_node_counts_while_it_holds_an_instance(elastic_run):
    recording = Recording.open(elastic_run)
    energy = read_energy(recording)
    begun = energy.used_frac.sum(axis=0) * np.diff(energy.edges_s)[0]
    assert begun.max() > begun.min()  # one node came later
    kept = read_energy(recording, given_back=False)
    assert kept.gpu_s > energy.gpu_s
    found = ledger(elastic_run)
    total = found["gpu_kwh"] + found["released_kwh"]
    assert total == pytest.approx(energy.drawn_j.sum() / J_PER_KWH)
