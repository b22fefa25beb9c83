"""The ledger: what a run drew, emitted and cost, and whose it was."""

from __future__ import annotations

import json

import numpy as np
import pytest

from emulators.datacenter import Host
from emulators.profiles import load_gpu
from testbed import rig
from testbed.analysis.compare import compare
from testbed.analysis.ledger import (
    J_PER_KWH,
    carbon_g_per_kwh,
    ledger,
    price_usd_per_kwh,
    read_energy,
)
from testbed.analysis.report import ledger_number, report_html
from testbed.core.errors import SpecError
from testbed.core.spec import LedgerSpec, PlantSpec, load_spec, parse_spec
from testbed.recorder.reader import Recording
from tests.conftest import ROOT, SMALL, cli

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


def test_a_named_price_is_charged_hour_by_hour(small_run):
    series = price_usd_per_kwh("CISO")
    for begins_h in (0.5, 45.5):
        found = ledger(small_run, LedgerSpec(price="CISO", begins_h=begins_h))
        hour_usd = series[int(begins_h)]
        assert found["energy_usd"] == pytest.approx(found["energy_kwh"] * hour_usd)
    assert series[0] != series[45]
    # Cheap in California when the sun is high (19 h UTC is noon), as carbon is low then.
    by_hour = series.reshape(-1, 24).mean(axis=0)
    assert by_hour[17:22].max() < by_hour.mean() < by_hour[3]
    assert np.corrcoef(series, carbon_g_per_kwh("CISO"))[0, 1] > 0.7


def test_an_instance_pays_for_its_own_gpus(tmp_path):
    """Two instances on one node: what one draws is not charged to who asked the other."""
    more = [
        "duration_s=60",
        "cluster.gpus_per_node=4",
        "cluster.row_budget_w=0",
        "policy=[]",
        "workload.image_frac=0.02",
        "pool.0.gpus_per_node=2",
        "pool.1.gpus_per_node=1",
    ]
    recording = Recording.open(rig.run(parse_spec(SMALL, more), tmp_path))
    found = ledger(recording)
    index = recording.columns("gpu_index", "instance")["instance"]
    pool_of = recording.columns("instance_index", "pool_index")["pool_index"]
    gpus = recording.columns("gpus", "gpu", "energy_j")
    drawn_j = np.array([np.ptp(gpus["energy_j"][gpus["gpu"] == g]) for g in range(len(index))])
    for pool, name in enumerate(("chat", "vision")):
        mine = (index >= 0) & (pool_of[index] == pool)
        share = drawn_j[mine].sum() / drawn_j.sum()
        assert found["by_class"][name]["share_frac"] == pytest.approx(share, abs=1e-3)
        time_frac = mine.sum() / len(index)
        assert found["by_class"][name]["gpu_h"] == pytest.approx(found["gpu_h"] * time_frac)
    unused = drawn_j[index < 0].sum() / drawn_j.sum()
    assert found["by_class"]["(idle)"]["share_frac"] == pytest.approx(unused, abs=1e-3)


@pytest.fixture(scope="module")
def plant_run(tmp_path_factory):
    more = ['mode="virtual"', "record.views=false"]
    spec = load_spec(ROOT / "experiments" / "tapas" / "run.toml", more)
    return rig.run(spec, tmp_path_factory.mktemp("plant"))


def test_opaque_vms_pay_for_their_gpus(plant_run):
    recording = Recording.open(plant_run)
    found = ledger(recording)
    # No instance is on these: two of the four GPUs of each node.
    layout = recording.columns("layout", "instance", "num_gpus")
    served = {
        int(first) + k
        for first, count in zip(layout["instance"], layout["num_gpus"], strict=True)
        for k in range(int(count))
    }
    gpus = recording.columns("gpus", "gpu", "energy_j")
    drawn_j = np.array([np.ptp(gpus["energy_j"][gpus["gpu"] == gpu]) for gpu in range(16)])
    unserved = drawn_j[[gpu not in served for gpu in range(16)]].sum() / drawn_j.sum()
    by_class = found["by_class"]
    theirs = by_class["(vms)"]["share_frac"] + by_class["(idle)"]["share_frac"]
    assert 0.3 < by_class["(vms)"]["share_frac"] < 0.7
    assert theirs == pytest.approx(unserved, abs=0.03)
    tenants = found["by_tenant"]
    of_vms = {name: part for name, part in tenants.items() if name.startswith("vm:customer")}
    assert len(of_vms) > 1
    assert sum(part["share_frac"] for part in of_vms.values()) == pytest.approx(
        by_class["(vms)"]["share_frac"]
    )
    for name in ("by_class", "by_tenant"):
        for number in ("energy_kwh", "gpu_h", "gpu_usd", "energy_usd"):
            total = sum(part[number] for part in found[name].values())
            assert total == pytest.approx(found[number])


def test_a_plant_has_its_hosts_counted_unless_told_otherwise(plant_run, small_run):
    counted = ledger(plant_run)
    assert counted["host_kwh"] > 0.2 * counted["gpu_kwh"]
    assert counted["energy_kwh"] == pytest.approx(counted["gpu_kwh"] + counted["host_kwh"])
    alone = ledger(plant_run, LedgerSpec(plant_hosts=False))
    assert alone["energy_kwh"] == alone["gpu_kwh"] == counted["gpu_kwh"]
    flat = ledger(plant_run, LedgerSpec(host_w=1000.0))
    assert flat["host_kwh"] == pytest.approx(flat["gpu_h"] / 4)  # four GPUs a node, 1 kW
    assert ledger(small_run)["host_kwh"] == 0


def test_the_ledger_is_on_the_page_in_the_comparison_and_in_print(plant_run, small_spec, tmp_path):
    found = ledger(plant_run)
    page = report_html(Recording.open(plant_run))
    part = page[page.index('<h2 id="ledger">') :].partition("<h2")[2].partition("<h2")[0]
    for name, entry in (found["by_class"] | found["by_tenant"]).items():
        assert f"<td>{name}</td>" in part
        assert f">{ledger_number(entry['energy_kwh'])}</td>" in part
    assert "no grid named: carbon unknown" in part
    compared = compare([plant_run, plant_run])["metrics"]
    [energy] = [m for m in compared if m["metric"] == "ledger.energy_kwh"]
    assert energy["values"] == [found["energy_kwh"]] * 2
    more = ["--set", 'ledger={grid="CISO", price="CISO"}', "--set", "duration_s=5"]
    done = cli("run", small_spec, "--mode", "virtual", *more, "--out", tmp_path)
    [summary] = tmp_path.glob("*/summary.json")
    said = json.loads(summary.read_text())["ledger"]
    line = next(line for line in done.stdout.splitlines() if "energy" in line)
    assert f"{ledger_number(said['energy_kwh'])} kWh" in line
    assert f"{ledger_number(said['carbon_kg'])} kg CO2" in line
    assert f"{ledger_number(said['energy_usd'])} USD" in line
    runs = cli("compare", summary.parent, plant_run)
    assert "duration_s" in runs.stdout.split("\u2521")[1]  # a row, not the head


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
