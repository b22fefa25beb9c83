"""The building of a run: its plant beside the coordinator, and the opaque VMs in it.

Where nodes are processes of their own, none of them knows the air of an aisle or the draw of a row.
So the plant has one place, in every mode: here. It is told what nodes report, at its own period,
and tells each node what the building does to it (`Surroundings`): air at its inlet, whether it has
power, how much its opaque VMs ask of its GPUs. Policies see it as ``view.facility``.

A node that has fallen silent goes on counting with what it drew last: it still draws.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import numpy as np

from emulators.datacenter import Datacenter, Happening
from emulators.profiles import load_gpu
from testbed.coordinator.cluster import Layout, read_only
from testbed.core.errors import PolicyError
from testbed.core.messages import Surroundings
from testbed.core.spec import RunSpec
from testbed.core.view import (
    AisleColumns,
    Bools,
    Facility,
    Floats,
    Ints,
    Placement,
    ServerColumns,
    UpsColumns,
    VmColumns,
    empty_columns,
)
from testbed.workloads.vms import PERIOD_H, Vms

WAITING, LEFT = -1, -2
"""`VmColumns.node` of a VM without a place, and of one that is not there (yet, or any more)."""


def make_facility(
    hall: Datacenter, nodes: tuple[str, ...], num_gpus: int, vms: VmColumns
) -> Facility:
    """Columns for a plant; ``nodes`` names its servers."""
    servers = empty_columns(ServerColumns, nodes)
    servers.row[:], servers.aisle[:] = hall.row, hall.aisle
    servers.ups_a[:], servers.ups_b[:] = hall.cords.T
    facility = Facility(
        0.0,
        hall.hour,
        hall.outside_c,
        np.zeros(hall.num_rows),
        np.zeros(hall.num_rows),
        hall.row_breakers.rating_w.copy(),
        servers,
        empty_columns(AisleColumns, tuple(f"aisle{k}" for k in range(hall.num_aisles))),
        empty_columns(UpsColumns, tuple(f"ups{k}" for k in range(len(hall.ups_w)))),
        vms,
        np.full(num_gpus, -1),
    )
    show(facility, hall, 0.0)
    return facility


def show(facility: Facility, hall: Datacenter, t_s: float) -> None:
    """Write what the plant's meters show."""
    facility.t_s, facility.hour, facility.outside_c = t_s, hall.hour, hall.outside_c
    facility.row_draw_w[:], facility.row_limit_w[:] = hall.row_w, hall.row_limit_w
    servers, aisles, ups = facility.servers, facility.aisles, facility.ups
    servers.inlet_c[:], servers.airflow_m3_s[:] = hall.inlet_c, hall.airflow_m3_s
    servers.draw_w[:], servers.dark[:] = hall.server_w, hall.dark
    aisles.airflow_m3_s[:] = hall.aisle_m3_s
    aisles.capacity_m3_s[:], aisles.rating_m3_s[:] = (
        hall.aisle_capacity_m3_s,
        hall.aisle_rating_m3_s,
    )
    ups.up[:], ups.draw_w[:], ups.limit_w[:] = hall.ups_up, hall.ups_w, hall.ups_limit_w


def gpu_budgets_w(hall: Datacenter, gpus_w: Floats) -> Floats:
    """What the GPUs of each row may draw, given what their hosts draw now; by server's GPUs."""
    hosts_w = np.bincount(hall.row, hall.server_w - np.where(hall.dark, 0.0, gpus_w), hall.num_rows)
    return np.maximum(hall.row_limit_w - hosts_w, 0.0)


class Answer(NamedTuple):
    """What the building does to nodes, by node."""

    inlet_c: Floats
    dark: Bools
    load_frac: Floats
    """A row for each node, of what opaque VMs ask of each of its GPUs."""

    def at(self, nodes: Ints) -> Answer:
        """That for some nodes alone."""
        return Answer(self.inlet_c[nodes], self.dark[nodes], self.load_frac[nodes])

    def of(self, node: int) -> Surroundings:
        """What to tell one of them."""
        return Surroundings(
            float(self.inlet_c[node]), bool(self.dark[node]), self.load_frac[node].tolist()
        )


class Building:
    """See the module's story.

    Args:
        spec: a run with a plant.
        layout: the cluster; its view gets the facility.
    """

    WIRED = ("_layout", "_period_s", "_vms", "_priority", "_shown")

    def __init__(self, spec: RunSpec, layout: Layout) -> None:
        assert spec.plant is not None
        self._layout = layout
        self._period_s = spec.plant.period_s
        self._hall = Datacenter(spec, load_gpu(spec.cluster.gpu))
        self._vms = Vms(
            spec.vms,
            spec.seed,
            spec.duration_s + spec.drain_s,
            speedup=spec.plant.speedup,
            start_hour=spec.plant.start_hour % PERIOD_H,
        )
        columns = empty_columns(VmColumns, self._vms.name)
        columns.pool[:], columns.customer[:] = -1, self._vms.customer
        columns.num_gpus[:], columns.node[:] = spec.vms.gpus, LEFT
        nodes = tuple(node.name for node in layout.nodes)
        self.facility = make_facility(self._hall, nodes, len(layout.gpus.name), columns)
        self._priority = max(pool.priority for pool in spec.pool) + 1
        self._next_s = 0.0
        self._come_and_go(0.0)
        self._count_free()
        self._shown = layout.view.facility = _shown(self.facility)

    def advance(self, now_s: float) -> tuple[Answer | None, list[Happening]]:
        """Once per period: what to tell the nodes, and what happened; nothing in between."""
        if now_s < self._next_s - 1e-9:
            return None, []
        self._next_s = now_s + self._period_s
        gpus, hall, facility = self._layout.gpus, self._hall, self.facility
        draw_w = np.where(gpus.lost & (gpus.t_s >= now_s - 2 * self._period_s), 0.0, 1.0)
        draw_w = draw_w * gpus.power_instant_w
        hall.advance(now_s, draw_w)
        show(facility, hall, now_s)
        self.resumed()
        by_node_w = np.bincount(gpus.node, draw_w, len(hall.row)).astype(float)
        self._layout.rows.budget_w[:] = gpu_budgets_w(hall, by_node_w)
        self._come_and_go(now_s)
        held = facility.gpu_vm >= 0
        vms = facility.vms
        vms.draw_w[:] = np.bincount(facility.gpu_vm[held], draw_w[held], len(vms.name))
        self._count_free()
        happened, hall.happenings = hall.happenings, []
        return self._answer(now_s), happened

    def resumed(self) -> None:
        """Have policies see what is no array: arrays they share with ``facility``."""
        for name in ("t_s", "hour", "outside_c"):
            setattr(self._shown, name, getattr(self.facility, name))

    def _answer(self, now_s: float) -> Answer:
        hall = self._hall
        loads = np.append(self._vms.loads(now_s), 0.0)  # the last for GPUs without a VM
        by_node = loads[self.facility.gpu_vm].reshape(len(hall.row), -1)
        return Answer(hall.inlet_c.copy(), hall.dark.copy(), by_node)

    def _come_and_go(self, now_s: float) -> None:
        vms = self.facility.vms
        gone = (self._vms.departure_s <= now_s) & (vms.node != LEFT)
        vms.node[gone] = LEFT
        gone = np.append(gone, False)  # the last for GPUs without a VM
        self.facility.gpu_vm[gone[self.facility.gpu_vm]] = -1
        here = (self._vms.arrival_s <= now_s) & (now_s < self._vms.departure_s)
        vms.node[here & (vms.node == LEFT)] = WAITING

    def _free(self) -> Bools:
        gpus = self._layout.gpus
        return (gpus.instance < 0) & (self.facility.gpu_vm < 0) & ~self._hall.dark[gpus.node]

    def _count_free(self) -> None:
        free, node = self._free(), self._layout.gpus.node
        self.facility.servers.free_gpus[:] = np.bincount(node[free], minlength=len(self._hall.row))
        held = self.facility.gpu_vm >= 0
        self._layout.gpus.priority[held] = self._priority

    def place(self, vms: Ints, nodes: Ints) -> Bools:
        """Let waiting VMs take free GPUs of nodes; which of them did."""
        columns, done = self.facility.vms, np.zeros(len(vms), np.bool_)
        for at, (vm, node) in enumerate(zip(vms.tolist(), nodes.tolist(), strict=True)):
            here = np.flatnonzero(self._free() & (self._layout.gpus.node == node))
            wanted = int(columns.num_gpus[vm])
            if columns.node[vm] == WAITING and len(here) >= wanted:
                columns.node[vm], self.facility.gpu_vm[here[:wanted]] = node, vm
                done[at] = True
        if done.any():
            self._count_free()
        return done

    def check_layout(self, use: str, node: int, layout: tuple[Placement, ...] | None) -> None:
        """GPUs of opaque VMs are nobody else's.

        Raises:
            PolicyError: a placement overlaps one.
        """
        start = self._layout.nodes[node].gpus.start
        for placement in layout or ():
            first = start + placement.first_gpu
            if (self.facility.gpu_vm[first : first + placement.tp] >= 0).any():
                raise PolicyError(
                    f"policy {use!r}: SetLayout of node {node}: GPUs {placement.first_gpu} to "
                    f"{placement.first_gpu + placement.tp - 1} belong to an opaque VM"
                )


def _shown(facility: Facility) -> Facility:
    """The same memory, which a policy cannot write to by mistake."""
    parts: dict[str, Any] = {}
    for part in fields(facility):
        value = getattr(facility, part.name)
        if isinstance(value, np.ndarray):
            value = value.view()
            value.flags.writeable = False
        is_columns = is_dataclass(value) and not isinstance(value, type)
        parts[part.name] = read_only(value) if is_columns else value
    return Facility(**parts)
