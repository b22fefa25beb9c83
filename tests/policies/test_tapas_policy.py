"""TAPAS: what its predictors learn, where its allocator puts VMs, what its configurator chooses."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from emulators.datacenter import Datacenter
from emulators.profiles import load_gpu
from emulators.thermal import Thermal
from testbed.core.errors import PolicyError
from testbed.core.spec import PolicySpec, parse_spec
from testbed.core.view import (
    LockClocks,
    Placement,
    SetLayout,
    view_of,
    with_facility,
)
from testbed.policies import Request
from testbed.policies.load import load_controller, load_router
from testbed.policies.tapas.predictors import HeatModel, InletModel, ServerModel, Templates

GPU = load_gpu("h100-sxm")


def test_inlets_are_predicted_within_a_degree_on_another_day():
    """The mean absolute error that is published for the system's own model is below 1 C."""
    spec = parse_spec("cluster.nodes_per_row = 20\ncluster.racks_per_row = 5\n[plant]")
    rng = np.random.default_rng(3)
    model, errors = InletModel(20), []
    for start_hour, learns in ((2000.0, True), (4900.0, True), (5200.0, False)):
        plant = msgspec.structs.replace(spec.plant, start_hour=start_hour)
        hall = Datacenter(msgspec.structs.replace(spec, plant=plant), GPU)
        for minute in range(0, 3 * 1440, 10):
            gpu_w = np.full(160, 300.0 + 250.0 * np.sin(minute / 500.0) ** 2)
            hall.advance(60.0 * minute, gpu_w)
            load = float(hall.row_w.sum() / hall.row_limit_w.sum())
            measured_c = hall.inlet_c + rng.normal(0.0, 0.3, 20)
            if learns:
                model.observe(hall.outside_c, load, measured_c)
            else:
                errors.append(np.abs(model.inlet_c(hall.outside_c, load) - hall.inlet_c).mean())
    assert np.mean(errors) < 1.0


def test_each_gpu_gets_its_own_line():
    rng = np.random.default_rng(4)
    inlet_c = np.full(16, 25.0)
    thermal = Thermal(GPU, 16, inlet_c=inlet_c, offset_c=rng.normal(0.0, 4.0, 16))
    model = HeatModel(16)
    for _ in range(400):
        power_w = rng.uniform(200.0, 650.0, 16)
        model.observe(thermal.settled_c(power_w, inlet_c) - inlet_c, power_w)
    for power_w in (300.0, 450.0, 600.0):
        found = model.temp_c(inlet_c + 3.0, np.full(16, power_w))
        assert found == pytest.approx(
            thermal.settled_c(np.full(16, power_w), inlet_c + 3.0), abs=2.0
        )
    allowed_w = model.power_at_w(inlet_c, 75.0)
    assert thermal.settled_c(allowed_w, inlet_c) == pytest.approx(75.0, abs=3.0)


def test_templates_are_percentiles_by_hour_and_unknown_customers_are_taken_at_their_peak():
    templates = Templates(0.95)
    for day in range(3):
        for hour in range(24):
            load = np.array([0.2 + 0.6 * (hour in (9, 10)), 0.5])
            templates.observe(np.array([0, 1]), load + 0.01 * day, hour + 0.5)
    assert templates.knows(0)
    assert not templates.knows(7)
    assert templates.by_hour(0)[9] == pytest.approx(0.83, abs=0.03)
    assert templates.by_hour(0)[3] == pytest.approx(0.23, abs=0.03)
    assert (templates.by_hour(7) == 1.0).all()


def test_servers_are_lines_in_the_power_of_their_gpus():
    model = ServerModel()
    gpus_w = np.linspace(1000.0, 5000.0, 50)
    model.observe(gpus_w, 1800.0 + 1.2 * gpus_w, 0.2 + 6e-5 * gpus_w)
    assert model.draw_w(np.array([3000.0])) == pytest.approx(5400.0, rel=0.01)
    assert model.gpus_for_draw_w(np.array([5400.0])) == pytest.approx(3000.0, rel=0.01)
    assert model.gpus_for_airflow_w(np.array([0.38])) == pytest.approx(3000.0, rel=0.02)


# Whole controllers on small views: every node has one GPU.


def profile(model: str, clock_frac: float, goodput_tps: float, full_w: float) -> dict:
    gpu_w = np.linspace(100.0, full_w, 5).tolist()
    return {
        "pool": "default", "model": model, "precision": "bf16", "tp": 1, "max_num_seqs": 256,
        "clock_frac": clock_frac, "goodput_tps": goodput_tps, "gpu_w": gpu_w,
    }  # fmt: skip


PROFILES = [
    profile("big", 1.0, 1000.0, 600.0),
    profile("big", 0.6, 800.0, 350.0),
    profile("small", 1.0, 4000.0, 500.0),
    profile("small", 0.6, 3000.0, 260.0),
]


class Stage:
    """A view whose instances go on serving, stepped by a policy."""

    def __init__(self, draw_w, *, row_limit_w: float, demand_tps: float, **params) -> None:
        self.view = with_facility(view_of(draw_w, now_s=0.0), row_limit_w=row_limit_w)
        self.view.models = ("big", "small")
        self.view.model_quality_frac = np.array([[0.7] * 5, [0.5] * 5])
        self.view.instances.precision[:] = 0
        self.view.gpus.temp_c[:] = 45.0
        self.demand_tps = demand_tps
        self.policy = load_controller(
            PolicySpec(use="tapas", params={"profiles": PROFILES, **params})
        )

    def step(self, dt_s: float = 10.0) -> list:
        self.view.now_s += dt_s
        self.view.gpus.t_s[:] = self.view.now_s
        self.view.instances.prompt_tokens_total += int(self.demand_tps * dt_s)
        return self.policy.step(self.view)

    def settled(self, steps: int = 4) -> list:
        return [command for _ in range(steps) for command in self.step()]


def clocks(commands) -> dict[int, float]:
    return {
        int(gpu): float(mhz)
        for command in commands
        if isinstance(command, LockClocks)
        for gpu, mhz in zip(command.gpus, np.broadcast_to(command.sm_clock_mhz, len(command.gpus)),
                            strict=True)
    }  # fmt: skip


def test_the_least_power_that_serves_the_demand():
    said = Stage([[300.0] * 3], row_limit_w=1e5, demand_tps=500.0).settled()
    assert clocks(said) == dict.fromkeys(range(3), 1188.0)
    assert not any(isinstance(command, SetLayout) for command in said), "quality is kept"


def test_a_demand_that_needs_the_full_clock_keeps_it():
    assert clocks(Stage([[500.0] * 3], row_limit_w=1e5, demand_tps=790.0).settled()) == {}


def test_a_row_near_its_limit_serves_what_fits_at_its_own_quality():
    said = Stage([[500.0] * 3], row_limit_w=1200.0, demand_tps=790.0).settled()
    assert clocks(said) == dict.fromkeys(range(3), 1188.0)
    assert not any(isinstance(command, SetLayout) for command in said)


def test_in_an_emergency_quality_goes_for_half_of_them_at_once():
    stage = Stage([[500.0] * 4], row_limit_w=1300.0, demand_tps=790.0)
    stage.view.facility.ups.up[1] = False
    stage.step()
    said = [c for c in stage.step() if isinstance(c, SetLayout)]
    assert len(said) == 2
    assert {c.layout for c in said} == {(Placement(0, 1, 0, 1, "bf16"),)}


def test_a_hot_gpu_is_told_to_draw_less():
    stage = Stage([[500.0, 500.0]], row_limit_w=1e5, demand_tps=790.0)
    rng = np.random.default_rng(1)
    for _ in range(40):
        power_w = rng.uniform(200.0, 600.0, 2)
        stage.view.gpus.power_avg_w[:] = power_w
        stage.view.gpus.temp_c[:] = np.array([50.0, 30.0]) + 0.1 * power_w
        stage.step(60.0)
    said = clocks(stage.settled(2))
    limit_w = (84.0 - 50.0) / 0.1  # the first may not pass 340 W, the second 540 W
    assert limit_w < 0.25 * 500 + 450
    assert stage.policy._configurator._lock.get(0) == 0.6 or said.get(0) == 1188.0


def test_requests_go_where_there_is_room():
    view = with_facility(
        view_of([[300.0, 300.0], [100.0, 100.0]], outstanding_tokens=[5.0] * 4), row_limit_w=600.0
    )
    router = load_router(PolicySpec(use="tapas:TapasRouter"))
    counts = np.zeros(4)
    for number in range(400):
        chosen = router.route(Request(number, 0.0, 100, 10), view)
        view.instances.outstanding_tokens[chosen] += 110
        counts[chosen] += 1
    assert counts[:2].sum() < 0.05 * counts.sum(), "its row is at its limit"


def test_a_hot_instance_takes_nothing_and_if_all_are_hot_all_do():
    view = with_facility(view_of([[300.0] * 3]), row_limit_w=1e6)
    view.gpus.temp_c[:] = [86.0, 60.0, 60.0]
    router = load_router(PolicySpec(use="tapas:TapasRouter"))
    assert router.route(Request(0, 0.0, 10, 10), view) != 0
    assert router.weights(view)[0] == 0.0
    view.gpus.temp_c[:] = 86.5
    view.now_s += 600.0
    hot = load_router(PolicySpec(use="tapas:TapasRouter"))
    assert (hot.weights(view) > 0).all()
    view.instances.up[:] = False
    assert hot.route(Request(0, 0.0, 10, 10), view) is None


def test_hot_vms_go_to_cool_places_and_rows_stay_mixed():
    draws = [[0.0] * 4, [0.0] * 4]
    view = view_of(draws)
    view.gpus.instance[:] = -1
    inlets = [24.0, 21.0, 24.0, 24.0, 24.0, 24.0, 20.0, 24.0]
    view = with_facility(view, row_limit_w=1e5, inlet_c=inlets, waiting=[-1, 0, -1, 0])
    [command] = load_controller(PolicySpec(use="tapas", params={"configure": False})).step(view)
    where = dict(zip(command.vms.tolist(), command.nodes.tolist(), strict=True))
    assert {where[0], where[2]} == {1, 6}, "opaque ones in the coolest place of each row"
    assert sorted(where[vm] // 4 for vm in (1, 3)) == [0, 1]


def test_a_row_without_room_is_left_to_the_other():
    view = view_of([[650.0, 0.0], [100.0, 0.0]])
    view.gpus.instance[[1, 3]] = -1
    view = with_facility(view, row_limit_w=800.0, inlet_c=[20.0, 18.0, 24.0, 24.0], waiting=[-1])
    view.facility.vms.node[:] = -1
    policy = load_controller(PolicySpec(use="tapas", params={"configure": False}))
    [command] = policy.step(view)
    assert len(command.nodes) == 1


@pytest.mark.parametrize(
    "params",
    [{"percentile": 1.5}, {"target": 0.0}, {"profiles": [{"model": "x"}]}, {"nonsense": 1}],
)
def test_bad_parameters_are_named(params):
    with pytest.raises(PolicyError, match=next(iter(params))):
        load_controller(PolicySpec(use="tapas", params=params))


@pytest.mark.parametrize("params", [{"ramp": 0.99}, {"temp_margin_c": 9.0}])
def test_bad_parameters_of_the_router_are_named(params):
    with pytest.raises(PolicyError, match="need"):
        load_router(PolicySpec(use="tapas:TapasRouter", params=params))
