"""The building: power tree, shared air, failures, and the measured points it was set by."""

from __future__ import annotations

import numpy as np
import pytest

from emulators.datacenter import Datacenter, Host, supply_temp_c
from emulators.profiles import load_gpu
from testbed.core.errors import SpecError
from testbed.core.spec import parse_spec

GPU = load_gpu("h100-sxm")


def hall(*overrides: str) -> Datacenter:
    text = "[cluster]\nrows = 2\nnodes_per_row = 12\nracks_per_row = 6\n[plant]\n"
    return Datacenter(parse_spec(text, overrides), GPU)


def load(plant: Datacenter, gpu_w: float) -> np.ndarray:
    return np.full(8 * len(plant.row), gpu_w)


def test_a_server_meets_the_measured_points():
    """MLPerf Power, 8 GPUs: 2.4 kW idle and 6.3 kW on Llama-2-70B capped at 500 W per GPU."""
    host = Host(hall().plant, GPU, 8)
    measured = {80.0: 2400.0, 470.0: 6300.0}  # GPUs of that server idle lower than the profile's
    for gpu_w, server_w in measured.items():
        gpus_w = np.array([8 * gpu_w])
        assert gpus_w + host.host_w(host.load(gpus_w)) == pytest.approx(server_w, rel=0.05)


def test_power_adds_up_along_the_tree():
    plant = hall()
    plant.advance(0.0, load(plant, 400.0))
    assert plant.row_w.sum() == pytest.approx(plant.server_w.sum())
    assert plant.ups_w.sum() == pytest.approx(plant.server_w.sum())
    assert np.ptp(plant.ups_w) < 1e-6, "racks spread over all pairs load all UPS alike"
    assert (plant.row_limit_w == plant.row_breakers.rating_w).all()


def test_a_lost_ups_leaves_three_quarters_and_nobody_dark():
    plant = hall('fault=[{kind="ups_lost", at_s=5, unit=1, duration_s=60}]')
    plant.advance(0.0, load(plant, 690.0))
    before_w = plant.ups_w.copy()
    plant.advance(6.0, load(plant, 690.0))
    up = [0, 2, 3]
    assert not plant.dark.any()
    assert plant.ups_w[1] == 0
    assert plant.ups_w[up] == pytest.approx(before_w[up] * 4 / 3)
    assert plant.row_limit_w == pytest.approx(0.75 * plant.row_breakers.rating_w, rel=0.01)
    plant.advance(70.0, load(plant, 690.0))
    assert plant.ups_up.all()
    assert [h.kind for h in plant.happenings] == ["ups_lost", "ups_back"]


def test_without_a_cap_one_lost_ups_takes_all_others():
    plant = hall('fault=[{kind="ups_lost", at_s=1}]')
    for second in range(600):
        plant.advance(float(second), load(plant, 690.0))
    assert plant.dark.all()
    assert plant.server_w.sum() == 0


def test_under_the_limit_nobody_follows():
    plant = hall('fault=[{kind="ups_lost", at_s=1}]')
    for second in range(3600):
        plant.advance(float(second), load(plant, 460.0))
    assert (plant.row_w < plant.row_limit_w).all()
    assert not plant.ups_breakers.tripped.any()


def test_a_row_over_its_breaker_goes_dark_alone():
    plant = hall("plant.oversubscription_frac=0.3")
    gpu_w = load(plant, 300.0)
    gpu_w[: 8 * 12] = 700.0  # row 0 alone
    for minute in range(120):
        plant.advance(60.0 * minute, gpu_w)
    assert plant.dark.tolist() == [True] * 12 + [False] * 12


def test_inlets_follow_the_weather_in_three_regimes():
    assert supply_temp_c(-5.0, 0.0) == supply_temp_c(14.0, 0.0) == 18.0
    assert supply_temp_c(24.0, 0.0) - supply_temp_c(20.0, 0.0) == pytest.approx(2.4)
    assert supply_temp_c(40.0, 0.0) - supply_temp_c(30.0, 0.0) == pytest.approx(3.0)
    assert supply_temp_c(20.0, 1.0) - supply_temp_c(20.0, 0.0) == pytest.approx(2.0)


def test_offsets_belong_to_places_and_seeds():
    one, again, other = hall(), hall(), hall("seed=2")
    assert (one.offset_c == again.offset_c).all()
    assert (one.offset_c != other.offset_c).any()
    assert 0.5 < one.offset_c.std() < 1.6


def test_missing_air_comes_back_hot_to_the_whole_aisle():
    """At full load 10 % of the air handlers lost is 10 % of the flow: 1 C per 2 %."""
    warm = hall("plant.inlet_lag_s=0", "plant.rows_per_aisle=1")
    short = hall(
        "plant.inlet_lag_s=0",
        "plant.rows_per_aisle=1",
        'fault=[{kind="ahu_lost", at_s=1, unit=1}]',
    )
    for plant in (warm, short):
        plant.advance(0.0, load(plant, 700.0))
        plant.advance(2.0, load(plant, 700.0))
    rise_c = short.inlet_c - warm.inlet_c
    assert rise_c[:12] == pytest.approx(0.0)
    assert rise_c[12:] == pytest.approx(5.0, abs=0.01)


def test_air_takes_its_time():
    """Two lags after the loss of an air handler, seven eighths of the rise are there."""
    well, short = hall(), hall('fault=[{kind="ahu_lost", at_s=100}]')
    rises_c = []
    for t_s in (0.0, 100.0, 220.0, 340.0, 3600.0):
        for plant in (well, short):
            plant.advance(t_s, load(plant, 700.0))
        rises_c.append((short.inlet_c - well.inlet_c).mean())
    assert rises_c[0] == 0.0
    assert rises_c[-1] == pytest.approx(5.0, abs=0.01)
    # A failure counts from the beginning of the step that it falls into.
    assert rises_c[2] / rises_c[-1] == pytest.approx(1 - np.exp(-220 / 120), abs=0.01)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ('plant.site="atlantis"', "atlantis"),
        ("plant.num_ups=1", "num_ups"),
        ("cluster.row_budget_w=9000", "plant.row_limit_w"),
        ('fault=[{kind="ups_lost", at_s=1, unit=4}]', "below 4"),
        ('fault=[{kind="ahu_lost", at_s=1, unit=1}]', "below 1"),
        ("vms.count=1", "room for 0"),
    ],
)
def test_bad_input_is_named(override: str, says: str):
    with pytest.raises(SpecError, match=says):
        hall(override)


@pytest.mark.parametrize(
    "text", ['fault=[{kind="ups_lost", at_s=1}]', "vms.count=1\n[[pool]]\ngpus_per_node=4"]
)
def test_what_needs_a_plant_says_so(text: str):
    with pytest.raises(SpecError, match=r"add a table \[plant\]"):
        parse_spec(text)
