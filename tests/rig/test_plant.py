"""Runs with a building around them: what nodes feel, what policies see, and which breakers open."""

from __future__ import annotations

import json

import numpy as np
import pytest

from testbed import rig
from testbed.core.errors import PolicyError, SpecError
from testbed.core.spec import parse_spec
from testbed.policies.load import load_controller
from testbed.recorder.reader import Recording
from testbed.recorder.replay import replay
from tests.conftest import table_hashes

PLANT = """
name = "plant"
duration_s = 20
drain_s = 5

[cluster]
rows = 2
nodes_per_row = 2
racks_per_row = 2
gpus_per_node = 4

[plant]
site = "phoenix_az"
oversubscription_frac = 0.15
host_idle_w = 430
host_load_w = 75
fan_max_w = 300
airflow_max_m3_s = 0.13

[vms]
count = 4
gpus = 2
short_lived_frac = 0.0

[[pool]]
name = "chat"
gpus_per_node = 2

[[slo_class]]
name = "chat"
pool = "chat"

[workload]
rate_rps = 60

[[policy]]
use = "blind_placement"
"""

HARD = """
duration_s = 300
control.sample_period_s = 1.0
control.lease_s = 6
fault = [{kind = "ups_lost", at_s = 20}]
workload.prompt_tokens = 3000
workload.rate_rps = 24
vms.intensity = 0.98
plant.oversubscription_frac = 0.62
record.views = false
"""


def run(tmp_path, *overrides, text=PLANT):
    return rig.run(parse_spec(text, overrides), tmp_path / "runs")


def hard(seed: int) -> list[str]:
    return [*(line.replace(" = ", "=", 1) for line in HARD.strip().splitlines()), f"seed={seed}"]


def events(folder, kind):
    table = Recording.open(folder).columns("events", "t_s", "source", "kind")
    return [str(s) for s, k in zip(table["source"], table["kind"], strict=True) if str(k) == kind]


def facility(folder, quantity):
    table = Recording.open(folder).columns("facility")
    mine = table["quantity"].astype(str) == quantity
    places = int(table["place_index"][mine].max()) + 1
    last = np.zeros(places)
    last[table["place_index"][mine]] = table["value"][mine]
    return last


def test_one_seed_writes_the_same_bytes(tmp_path):
    first, again = run(tmp_path), run(tmp_path)
    assert table_hashes(first) == table_hashes(again)


@pytest.mark.parametrize("policy", ["tapas", "blind_placement"])
def test_a_policy_for_a_plant_is_refused_without_one(tmp_path, policy):
    text = f'[[policy]]\nuse = "{policy}"\n'
    with pytest.raises(SpecError, match=rf"'{policy}': does nothing without a plant"):
        rig.run(parse_spec(text), tmp_path)
    assert not list(tmp_path.iterdir())


def test_tapas_says_that_it_configures_nothing_without_profiles(tmp_path):
    def warnings(params: str) -> list[str]:
        policy = f'policy=[{{use="tapas",params={{{params}}}}}]'
        events = Recording.open(run(tmp_path, policy)).columns("events")
        mine = (events["source"] == "tapas") & (events["level"] == "warning")
        return [str(text) for text in events["text"][mine]]

    [text] = warnings("")
    assert "without profiles" in text
    assert warnings("configure=false") == []


def test_a_building_needs_no_vms(tmp_path):
    folder = run(tmp_path, "vms.count=0", 'policy=[{use="uniform_cap"}]')
    assert facility(folder, "servers.inlet_c").min() > 18.0
    assert events(folder, "dark") == []


def test_replay_reproduces_every_command(tmp_path):
    cap = '{use="uniform_cap",params={trip=0.5,release=0.4},precedence="safety"}'
    folder = run(tmp_path, f'policy=[{{use="tapas"}},{cap},{{use="priority_cap"}}]')
    result = replay(folder, load_controller)
    assert result.equal > 8
    assert result.same, result.first_difference


def test_vms_draw_power_and_the_air_reaches_the_gpus(tmp_path):
    folder = run(tmp_path)
    assert (facility(folder, "vms.node") >= 0).all()
    assert (facility(folder, "vms.draw_w") > 400).all()
    gpus = Recording.open(folder).columns("gpus", "t_s", "gpu", "power_avg_w", "temp_c")
    late = gpus["t_s"] > 15
    vm_gpus = np.flatnonzero(facility(folder, "gpu_vm") >= 0)
    assert sorted(vm_gpus % 4) == [2, 2, 2, 2, 3, 3, 3, 3], "pools have the first two of each node"
    drawn = gpus["power_avg_w"][late & np.isin(gpus["gpu"], vm_gpus)]
    assert drawn.min() > 200
    cool = run(tmp_path, 'plant.site="seattle_wa"', "plant.start_hour=200")
    other = Recording.open(cool).columns("gpus", "t_s", "temp_c")
    assert gpus["temp_c"][late].mean() - other["temp_c"][other["t_s"] > 15].mean() > 8


def test_rows_have_the_budget_that_hosts_leave(tmp_path):
    folder = run(
        tmp_path, 'policy=[{use="blind_placement"},{use="row_power_cap",precedence="safety"}]'
    )
    rows = Recording.open(folder).columns("rows", "t_s", "row", "budget_w")
    limit_w, draw_w = facility(folder, "row_limit_w"), facility(folder, "row_draw_w")
    assert (rows["budget_w"] < limit_w.max()).all()
    assert (draw_w < limit_w).all()


def test_a_policy_cannot_take_the_gpus_of_an_opaque_vm(tmp_path):
    policy = tmp_path / "grab.py"
    policy.write_text(
        "from testbed.policies import Placement, SetLayout\n"
        "class Grab:\n"
        "    period_s = 1.0\n"
        "    def step(self, view):\n"
        "        node = int(view.facility.vms.node.max())\n"
        "        return [SetLayout(node, (Placement(2, 2, 0, 0),))] if node >= 0 else []\n"
    )
    with pytest.raises(PolicyError, match="belong to an opaque VM"):
        run(tmp_path, "cluster.elastic=true",
            f'policy=[{{use="blind_placement"}},{{use="{policy}"}}]')  # fmt: skip


def test_a_policy_that_places_without_a_plant_is_told(tmp_path):
    policy = tmp_path / "place.py"
    policy.write_text(
        "import numpy as np\n"
        "from testbed.policies import PlaceVm\n"
        "class Place:\n"
        "    period_s = 1.0\n"
        "    def step(self, view):\n"
        "        return [PlaceVm(np.array([0]), np.array([0]))]\n"
    )
    with pytest.raises(PolicyError, match=r"without a \[plant\]"):
        run(tmp_path, f'policy=[{{use="{policy}"}}]', text="duration_s = 2")


SEEDS = range(1, 6)
CAPS = {
    "uniform_cap": '{use="uniform_cap",precedence="safety",params={period_s=1.0}}',
    "polca_cap": '{use="polca_cap",precedence="safety",params={period_s=1.0}}',
    "row_power_cap": '{use="row_power_cap",precedence="safety"}',
    "tapas": '{use="tapas"},'
    '{use="uniform_cap",precedence="safety",params={period_s=1.0,grace_s=20}}',
}


@pytest.mark.parametrize("seed", SEEDS)
def test_without_a_cap_a_lost_ups_opens_breakers(tmp_path, seed):
    folder = run(tmp_path, *hard(seed))
    assert len(events(folder, "breaker_tripped")) >= 1
    assert "plant" in events(folder, "dark")
    summary = json.loads((folder / "summary.json").read_text())["requests"]
    assert summary["completed"] < summary["arrived"]


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("seed", SEEDS)
def test_under_a_leased_cap_no_breaker_opens_in_the_same_scenario(tmp_path, seed, cap):
    place = "" if cap == "tapas" else '{use="blind_placement"},'
    folder = run(tmp_path, *hard(seed), f"policy=[{place}{CAPS[cap]}]")
    assert events(folder, "ups_lost") == ["ups0"]
    assert events(folder, "breaker_tripped") == []
    assert not facility_dark(folder)


def facility_dark(folder) -> bool:
    return "plant" in events(folder, "dark")
