"""Where a new GPU VM goes: filter servers by what would break, prefer by what stays cool.

Filter: no GPU would pass its temperature, no row its power and no aisle its air, at the hour that
is worst for it, with every VM at the percentile of its customer's history. If no server passes, the
one with the least excess is taken: a VM that was sold is placed.

Prefer, in this order: the row with the most room at its worst hour (in steps of 2 %, so that small
differences leave a choice), then the row with the fewest VMs of its kind, so that there is somebody
everywhere who can give way, then cool places for opaque VMs and warm ones for own VMs, which can be
told to draw less.
"""

from __future__ import annotations

import numpy as np

from testbed.core.view import Facility, Floats, GpuColumns, Ints, VmColumns
from testbed.policies import PlaceVm
from testbed.policies.tapas.predictors import HOURS, Predictors

_ROW_STEP = 0.02


class Allocator:
    """Places VMs by prediction.

    Args:
        temp_limit_c: highest predicted GPU temperature.
        margin: share of row power and aisle air that is kept free.
    """

    def __init__(self, *, temp_limit_c: float, margin: float) -> None:
        self.temp_limit_c, self.margin = temp_limit_c, margin
        self._outside_max_c = -np.inf

    def observe(self, facility: Facility) -> None:
        """Remember the hottest hour: what is placed will meet it again."""
        self._outside_max_c = max(self._outside_max_c, facility.outside_c)

    def place(self, gpus: GpuColumns, facility: Facility, models: Predictors) -> PlaceVm | None:
        """Places for all VMs that wait and for which there is room."""
        vms, servers = facility.vms, facility.servers
        waiting = np.flatnonzero(vms.node == -1)
        if not len(waiting):
            return None
        plan = _Plan(gpus, facility, models, self._outside_max_c)
        chosen: list[tuple[int, int]] = []
        # Hot ones first: they have the fewest places that will do.
        heat = [-plan.expected_w(vms, int(vm)).max() for vm in waiting]
        for vm in waiting[np.argsort(heat, kind="stable")]:
            room = np.flatnonzero((plan.free >= vms.num_gpus[vm]) & ~servers.dark)
            if not len(room):
                continue
            node = self._best(vms, int(vm), room, plan)
            plan.add(vms, int(vm), node)
            chosen.append((int(vm), node))
        if not chosen:
            return None
        which, where = np.array(chosen).T
        return PlaceVm(which, where, "least predicted risk")

    def _best(self, vms: VmColumns, vm: int, room: Ints, plan: _Plan) -> int:
        wanted_w = plan.expected_w(vms, vm)
        row_load, aisle_load = plan.loads_with(room, wanted_w)
        temp_c = plan.temp_c(room, wanted_w.max() / max(int(vms.num_gpus[vm]), 1))
        excess = np.maximum(row_load - (1.0 - self.margin), 0.0)
        excess += np.maximum(aisle_load - (1.0 - self.margin), 0.0)
        excess += np.maximum(temp_c - self.temp_limit_c, 0.0) / 50.0
        opaque = vms.pool[vm] < 0
        mix = plan.mix_with(room, opaque)
        warm = temp_c if opaque else -temp_c
        keys = (warm, np.round(mix, 2), np.floor(row_load / _ROW_STEP), np.round(excess, 3))
        return int(room[np.lexsort(keys)[0]])


class _Plan:
    """What is placed so far, hour by hour."""

    def __init__(
        self, gpus: GpuColumns, facility: Facility, models: Predictors, outside_c: float
    ) -> None:
        servers, vms = facility.servers, facility.vms
        self._models, self._gpus = models, gpus
        self.free = servers.free_gpus.copy()
        self._row, self._aisle = servers.row, servers.aisle
        self._row_limit_w = facility.row_limit_w
        self._aisle_limit = facility.aisles.capacity_m3_s
        self._server_w = np.zeros((len(servers.name), HOURS))
        self._opaque = np.zeros(len(facility.row_limit_w))
        self._count = np.zeros(len(facility.row_limit_w))
        self._size = np.maximum(np.bincount(servers.row, minlength=len(self._count)), 1)
        self._top_w = float(gpus.power_limit_max_w.max())
        self._known: dict[int, Floats] = {}
        for vm in np.flatnonzero(vms.node >= 0):
            self.add(vms, int(vm), int(vms.node[vm]), take=False)
        self._inlet_c = models.inlet.inlet_c(outside_c, 0.9)

    def expected_w(self, vms: VmColumns, vm: int) -> Floats:
        """Power of a VM's GPUs together, by hour."""
        customer = int(vms.customer[vm])
        if customer not in self._known:
            self._known[customer] = self._models.templates.by_hour(customer)
        expected: Floats = self._known[customer] * int(vms.num_gpus[vm]) * self._top_w
        return expected

    def add(self, vms: VmColumns, vm: int, node: int, *, take: bool = True) -> None:
        """A VM is placed."""
        self._server_w[node] += self.expected_w(vms, vm)
        if take:
            self.free[node] -= vms.num_gpus[vm]
        self._opaque[self._row[node]] += vms.pool[vm] < 0
        self._count[self._row[node]] += 1

    def loads_with(self, room: Ints, wanted_w: Floats) -> tuple[Floats, Floats]:
        """Load of row and aisle at their worst hour, with a VM on each server of ``room``."""
        model = self._models.server
        draw_w = model.draw_w(self._server_w)
        flow = model.airflow_m3_s(self._server_w)
        extra_w = model.draw_w(wanted_w) - model.draw_w(0.0 * wanted_w)
        extra_flow = model.airflow_m3_s(wanted_w) - model.airflow_m3_s(0.0 * wanted_w)
        loads = []
        for group, own, extra, limit in (
            (self._row, draw_w, extra_w, self._row_limit_w),
            (self._aisle, flow, extra_flow, self._aisle_limit),
        ):
            total = np.zeros((len(limit), HOURS))
            np.add.at(total, group, own)
            load = (total + extra).max(axis=1) / np.maximum(limit, 1e-9)
            loads.append(load[group[room]])
        return loads[0], loads[1]

    def temp_c(self, room: Ints, power_w: float) -> Floats:
        """Highest temperature of a GPU of each server in a hot hour at this power."""
        inlet_c = self._inlet_c[self._gpus.node]
        temps_c = self._models.heat.temp_c(inlet_c, np.full(len(inlet_c), power_w))
        highest = np.full(len(self.free), -np.inf)
        np.maximum.at(highest, self._gpus.node, temps_c)
        return highest[room]

    def mix_with(self, room: Ints, opaque: bool) -> Floats:
        """VMs of the same kind in each row already, per server of it."""
        row = self._row[room]
        alike = self._opaque if opaque else self._count - self._opaque
        return alike[row] / self._size[row]
