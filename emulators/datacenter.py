"""The building around the servers: power tree, breakers, shared air, weather.

Power. Each server draws its GPUs plus a host; a row of servers hangs from a breaker; each rack has
two cords to two of the UPS, which carry it in equal shares. With four UPS and racks spread over
all six pairs a lost one leaves its load to the other three (4-to-make-3): three quarters of what
four may carry. Where both UPS of a rack are out, or its row's breaker is open, it is dark.

    host   = host_idle + host_load load + fan_max (AF / AF_max)^3        (fan affinity law)
    load   = (GPU power - idle) / (limit - idle), all GPUs of the server together

The defaults for 8 x H100 meet a published 8-GPU server at two points (MLPerf Power: 2.4 kW idle;
6.3 kW on Llama-2-70B with GPUs capped at 500 W); full load is then 8.8 kW with fans at 14 %, where
other servers have 15 % (Azure GreenSKU, `server_fan_power`).

Air. The servers of an aisle share the flow of its air handlers:

    AF     = AF_max (0.4 + 0.6 load)
    inlet -> 18 + 0.6 clip(T_out - 15, 0, 10) + 0.3 max(T_out - 25, 0) + 2 load_dc + offset
             + 50 max(0, 1 - capacity / sum AF)

Regimes, the 2 C of load and 1 C per 2 % of missing flow (which recirculates from the hot side) are
starting constants of the project for TAPAS (arXiv 2501.02600), which states no equations; AF_max is
the 1,105 CFM given for a DGX-H100. ``offset`` is normal and belongs to the place; the air of an
aisle follows with a lag.

Pure physics: arrays, told the time.

>>> from emulators.profiles import load_gpu
>>> from testbed.core.spec import parse_spec
>>> spec = parse_spec("cluster.rows = 2\\ncluster.nodes_per_row = 4\\ncluster.racks_per_row = 2\\n"
...                   "[plant]")
>>> hall = Datacenter(spec, load_gpu("h100-sxm"))
>>> hall.advance(0.0, np.full(64, 700.0)); round(hall.server_w[0]), round(hall.row_limit_w[0])
(8820, 35280)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from emulators.breaker import MOLDED_CASE, UPS, Breakers
from emulators.profiles import GpuProfile
from emulators.sites import load_site
from testbed.core.spec import PlantSpec, RunSpec
from testbed.core.view import Bools, Floats, Ints

AIRFLOW_IDLE = 0.4
"""Share of the highest airflow that a server needs when idle."""
_RECIRCULATION_C = 50.0
"""Inlet rise per missing share of airflow: 1 C per 2 %."""


class Happening(NamedTuple):
    """Something worth a line: a breaker opened, a unit failed or came back."""

    level: str
    source: str
    kind: str
    text: str


class Host(NamedTuple):
    """What a server draws and breathes beside its GPUs, by `PlantSpec` and GPU profile."""

    plant: PlantSpec
    profile: GpuProfile
    num_gpus: int

    def load(self, gpus_w: Floats) -> Floats:
        """Load of servers, 0 to 1, by what their GPUs draw together."""
        idle_w = self.num_gpus * self.profile.idle_w
        full_w = self.num_gpus * self.profile.power_limit_default_w
        load: Floats = np.clip((gpus_w - idle_w) / (full_w - idle_w), 0.0, 1.0)
        return load

    def airflow_m3_s(self, load: Floats) -> Floats:
        """Air that servers take in at this load."""
        flow: Floats = self.plant.airflow_max_m3_s * (AIRFLOW_IDLE + (1 - AIRFLOW_IDLE) * load)
        return flow

    def host_w(self, load: Floats) -> Floats:
        """What servers draw beside their GPUs."""
        plant = self.plant
        flow_frac = AIRFLOW_IDLE + (1 - AIRFLOW_IDLE) * load
        draw: Floats = plant.host_idle_w + plant.host_load_w * load + plant.fan_max_w * flow_frac**3
        return draw

    @property
    def peak_w(self) -> float:
        """Highest draw of a server."""
        gpus_w = self.num_gpus * self.profile.power_limit_default_w
        return gpus_w + float(self.host_w(np.float64(1.0)))  # type: ignore[arg-type]


def row_limit_w(spec: RunSpec, profile: GpuProfile) -> float:
    """What a row's breaker bears: given, or sized by oversubscription."""
    assert spec.plant is not None
    if spec.plant.row_limit_w:
        return spec.plant.row_limit_w
    peak_w = Host(spec.plant, profile, spec.cluster.gpus_per_node).peak_w
    return spec.cluster.nodes_per_row * peak_w / (1.0 + spec.plant.oversubscription_frac)


def gpu_budget_w(spec: RunSpec, profile: GpuProfile) -> float:
    """What the GPUs of a row may always draw, their hosts at full draw."""
    assert spec.plant is not None
    host = Host(spec.plant, profile, spec.cluster.gpus_per_node)
    hosts_w = spec.cluster.nodes_per_row * float(host.host_w(np.float64(1.0)))  # type: ignore[arg-type]
    return row_limit_w(spec, profile) - hosts_w


def gpu_order_c(plant: PlantSpec | None, gpus_per_node: int) -> Floats:
    """`order_c` of a run's servers; zero without a plant."""
    return order_c(plant.gpu_order_c if plant is not None else 0.0, gpus_per_node)


def order_c(spread_c: float, gpus_per_node: int) -> Floats:
    """How much warmer each GPU of a server runs than their mean, by its place in the airflow.

    >>> order_c(10.0, 3).tolist()
    [-5.0, 0.0, 5.0]
    """
    if gpus_per_node == 1:
        return np.zeros(1)
    return np.linspace(-spread_c / 2, spread_c / 2, gpus_per_node)


def cord_pairs(num_ups: int) -> list[tuple[int, int]]:
    """Pairs of UPS in the order in which racks hang from them: each UPS in turn, then anew.

    >>> cord_pairs(4)
    [(0, 3), (1, 2), (0, 2), (1, 3), (0, 1), (2, 3)]
    """
    ring = list(range(num_ups + num_ups % 2))  # an odd one rests: the circle method of tournaments
    pairs: list[tuple[int, int]] = []
    for _ in ring[1:]:
        meets = zip(ring[: len(ring) // 2], reversed(ring[len(ring) // 2 :]), strict=True)
        pairs += [(min(a, b), max(a, b)) for a, b in meets if max(a, b) < num_ups]
        ring = [ring[0], ring[-1], *ring[1:-1]]
    return pairs


class Datacenter:
    """The plant of one run; see the module's equations.

    Args:
        spec: the run, with a plant.
        profile: of its GPUs.
    """

    WIRED = (
        "plant", "host", "row", "aisle", "rack", "cords", "offset_c", "num_rows", "num_aisles",
        "_site", "_ahu_m3_s", "_faults", "_provisioned_w",
    )  # fmt: skip

    def __init__(self, spec: RunSpec, profile: GpuProfile) -> None:
        assert spec.plant is not None
        cluster, plant = spec.cluster, spec.plant
        self.plant = plant
        self.host = Host(plant, profile, cluster.gpus_per_node)
        self._site = load_site(plant.site)
        count = cluster.rows * cluster.nodes_per_row
        place = np.arange(count)
        self.row: Ints = place // cluster.nodes_per_row
        self.aisle: Ints = self.row // plant.rows_per_aisle
        per_rack = -(-cluster.nodes_per_row // cluster.racks_per_row)
        in_row = place % cluster.nodes_per_row // per_rack
        self.rack: Ints = self.row * cluster.racks_per_row + in_row
        pairs = np.array(cord_pairs(plant.num_ups))
        self.cords: Ints = pairs[self.rack % len(pairs)]
        """The two UPS of each server."""
        self.offset_c: Floats = np.random.default_rng([spec.seed, 23]).normal(
            0.0, plant.inlet_spread_c, count
        )
        self.num_rows, self.num_aisles = cluster.rows, int(self.aisle.max()) + 1
        rating_w = row_limit_w(spec, profile)
        self.row_breakers = Breakers(MOLDED_CASE, np.full(cluster.rows, rating_w))
        # Each UPS is sized for what its racks may draw while all are up.
        share_w = np.full(2 * count, rating_w / cluster.nodes_per_row / 2)
        ups_w = np.bincount(self.cords.ravel(), share_w, plant.num_ups)
        self.ups_breakers = Breakers(UPS, np.maximum(ups_w, 1.0))
        per_aisle = np.bincount(self.aisle, minlength=self.num_aisles)
        self._ahu_m3_s: Floats = (
            per_aisle * plant.airflow_max_m3_s / (1.0 + plant.oversubscription_frac)
        ) / plant.ahus_per_aisle
        self._ahus_out: Ints = np.zeros(self.num_aisles, np.int64)
        self._ups_out: Bools = np.zeros(plant.num_ups, np.bool_)
        self._faults = [fault for fault in spec.fault if fault.kind != "gpu_lost"]
        self._begun: set[int] = set()
        self._ended: set[int] = set()
        self._t_s: float | None = None
        self._provisioned_w = cluster.rows * rating_w

        self.happenings: list[Happening] = []
        """Since they were last taken."""
        self.dark: Bools = np.zeros(count, np.bool_)
        """Servers without power."""
        self.hour = plant.start_hour
        """Local hour of the year."""
        self.outside_c = 0.0
        self.server_w: Floats = np.zeros(count)
        self.airflow_m3_s: Floats = np.zeros(count)
        self.row_w: Floats = np.zeros(cluster.rows)
        self.ups_w: Floats = np.zeros(plant.num_ups)
        self.aisle_m3_s: Floats = np.zeros(self.num_aisles)
        self.inlet_c: Floats = np.zeros(count)
        self._settle(np.zeros(count))
        self.inlet_c = self._target_c()

    # Limits.

    @property
    def ups_up(self) -> Bools:
        """Which UPS carry load."""
        return ~(self._ups_out | self.ups_breakers.tripped)

    @property
    def ups_limit_w(self) -> Floats:
        """What each UPS may carry; 0 for one that is out."""
        return np.where(self.ups_up, self.ups_breakers.rating_w, 0.0)

    @property
    def aisle_capacity_m3_s(self) -> Floats:
        """What the air handlers of each aisle move."""
        capacity: Floats = self._ahu_m3_s * (self.plant.ahus_per_aisle - self._ahus_out)
        return capacity

    @property
    def aisle_rating_m3_s(self) -> Floats:
        """What they move when all of them run."""
        rating: Floats = self._ahu_m3_s * self.plant.ahus_per_aisle
        return rating

    @property
    def row_limit_w(self) -> Floats:
        """What each row may draw now: its breaker's rating, and its part of the UPS.

        If every row grew by the same share of its rating, or shrank by the same share of its draw,
        until it is at its limit, the UPS loaded most would be at its rating.
        """
        up = self.ups_up
        rating_w, capacity_w = self.row_breakers.rating_w, self.ups_breakers.rating_w
        if not up.any():
            return np.zeros(len(rating_w))
        full_w = self._ups_load_w(rating_w[self.row] / np.bincount(self.row)[self.row])
        used = self.ups_w[up] / capacity_w[up]
        if used.max() >= 1.0:
            shared_w = self.row_w / used.max()
        else:
            room = (capacity_w[up] - self.ups_w[up]) / np.maximum(full_w[up], 1e-9)
            shared_w = self.row_w + rating_w * room.min()
        return np.asarray(np.minimum(rating_w, shared_w))

    def _ups_load_w(self, server_w: Floats) -> Floats:
        """What each UPS carries if servers draw this: a half of each, all where one is out."""
        live = self.ups_up[self.cords]
        share = np.where(live, 1.0, 0.0) / np.maximum(live.sum(axis=1, keepdims=True), 1)
        load_w = (share * server_w[:, None]).ravel()
        return np.bincount(self.cords.ravel(), load_w, self.plant.num_ups).astype(float)

    # Time.

    def advance(self, t_s: float, gpu_w: Floats) -> None:
        """Let time pass until ``t_s`` with the GPUs drawing ``gpu_w`` since the last call."""
        dt_s = 0.0 if self._t_s is None else t_s - self._t_s
        first, self._t_s = self._t_s is None, t_s
        self._break(t_s)
        self._settle(gpu_w.reshape(len(self.row), -1).sum(axis=1))
        if first:
            self.row_breakers.settle(self.row_w)
            self.ups_breakers.settle(self.ups_w)
        for row in np.flatnonzero(self.row_breakers.advance(dt_s, self.row_w)):
            self._happen("error", f"row{row}", "breaker_tripped", self.row_w[row])
        loads_w = np.where(self.ups_up, self.ups_w, 0.0)
        for ups in np.flatnonzero(self.ups_breakers.advance(dt_s, loads_w)):
            self._happen("error", f"ups{ups}", "breaker_tripped", loads_w[ups])
        self._darken()
        target_c = self._target_c()
        lag_s = self.plant.inlet_lag_s
        keep = np.exp(-dt_s / lag_s) if lag_s > 0 else 0.0
        self.inlet_c = target_c + (self.inlet_c - target_c) * keep

    def _happen(self, level: str, source: str, kind: str, load_w: float | None = None) -> None:
        text = f"at {load_w:.0f} W" if load_w is not None else ""
        self.happenings.append(Happening(level, source, kind, text))

    def _break(self, t_s: float) -> None:
        """Units whose time has come fail, and come back."""
        for number, fault in enumerate(self._faults):
            ends_s = fault.at_s + fault.duration_s if fault.duration_s else np.inf
            ups = fault.kind == "ups_lost"
            source = f"ups{fault.unit}" if ups else f"aisle{fault.unit}"
            change = 0
            if fault.at_s <= t_s and number not in self._begun:
                self._begun.add(number)
                change += 1
                self._happen("error", source, fault.kind)
            if ends_s <= t_s and number not in self._ended:
                self._ended.add(number)
                change -= 1
                self._happen("info", source, fault.kind.replace("lost", "back"))
            if ups and change:
                self._ups_out[fault.unit] = change > 0
            elif change:
                self._ahus_out[fault.unit] += change

    def _settle(self, gpus_w: Floats) -> None:
        """Draws and flows that follow from what the GPUs of each server draw."""
        lit = ~self.dark
        load = self.host.load(gpus_w)
        self.server_w = np.where(lit, gpus_w + self.host.host_w(load), 0.0)
        self.airflow_m3_s = np.where(lit, self.host.airflow_m3_s(load), 0.0)
        self.row_w = np.bincount(self.row, self.server_w, self.num_rows).astype(float)
        self.aisle_m3_s = np.bincount(self.aisle, self.airflow_m3_s, self.num_aisles).astype(float)
        self.ups_w = self._ups_load_w(self.server_w)

    def _darken(self) -> None:
        fed = self.ups_up[self.cords].any(axis=1) & ~self.row_breakers.tripped[self.row]
        # Back under power a server boots into nothing: what it ran is gone, so it stays dark.
        newly = ~fed & ~self.dark
        if newly.any():
            self._happen("error", "plant", "dark")
            self.dark |= newly

    def _target_c(self) -> Floats:
        """Where inlet temperatures settle."""
        self.hour = self.plant.start_hour + self.plant.speedup * (self._t_s or 0.0) / 3600.0
        self.outside_c = outside_c = self._site.outside_c(self.hour)
        load = self.row_w.sum() / self._provisioned_w
        supply_c = supply_temp_c(outside_c, float(load))
        missing = 1.0 - self.aisle_capacity_m3_s / np.maximum(self.aisle_m3_s, 1e-9)
        hot_c = _RECIRCULATION_C * np.maximum(missing, 0.0)
        target: Floats = supply_c + self.offset_c + hot_c[self.aisle]
        return target


def supply_temp_c(outside_c: float, load_frac: float) -> float:
    """Mean inlet temperature without recirculation.

    >>> [supply_temp_c(outside_c, 0.0) for outside_c in (5.0, 20.0, 35.0)]
    [18.0, 21.0, 27.0]
    """
    mild = min(max(outside_c - 15.0, 0.0), 10.0)
    return 18.0 + 0.6 * mild + 0.3 * max(outside_c - 25.0, 0.0) + 2.0 * load_frac
