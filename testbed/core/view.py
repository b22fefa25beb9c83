"""All that a policy is told (`View`) and all that it may say (`Command`).

A view is columns: one NumPy array per quantity with one row per GPU, instance, tenant or row of
racks. A policy that sums power per row is one ``np.bincount(gpus.row, draw_w)``. The arrays are
read-only and are those of the coordinator: copy what should outlive the step.

Commands name what they act on by index into the same columns.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from testbed.core.messages import Request

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(slots=True)
class GpuColumns:
    """One row per GPU of the cluster."""

    name: tuple[str, ...]
    row: Ints
    """Index into `View.rows`."""
    node: Ints
    instance: Ints
    """Index into `View.instances`; -1 where no model is served."""
    priority: Ints
    """Priority of the pool it serves: higher is more important."""
    t_s: Floats
    """When it was last heard from; minus infinity before the first report."""
    lost: Bools
    power_instant_w: Floats
    power_avg_w: Floats
    power_limit_w: Floats
    power_limit_enforced_w: Floats
    power_limit_min_w: Floats
    power_limit_max_w: Floats
    energy_j: Floats
    sm_clock_mhz: Floats
    sm_clock_min_mhz: Floats
    sm_clock_max_mhz: Floats
    temp_c: Floats
    mem_temp_c: Floats
    gpu_busy_frac: Floats
    fb_used_bytes: Floats
    throttle: Ints
    """NVML's clocks-event-reason mask."""

    def draw_w(self, now_s: float, stale_s: float = 2.0) -> Floats:
        """What each GPU counts for: its 1-second mean, or its enforced limit when not heard from.

        Unseen, it may draw all that it is allowed.
        """
        return np.where(now_s - self.t_s <= stale_s, self.power_avg_w, self.power_limit_enforced_w)


@dataclass(slots=True)
class InstanceColumns:
    """One row per serving instance. ``outstanding_tokens`` is the coordinator's own account."""

    name: tuple[str, ...]
    node: Ints
    pool: Ints
    """Index into `View.pools`."""
    up: Bools
    """Takes requests: its node is heard from and it is not draining."""
    num_gpus: Ints
    t_s: Floats
    num_running: Ints
    num_waiting: Ints
    kv_used_frac: Floats
    outstanding_requests: Ints
    outstanding_tokens: Floats
    """Prompt and output tokens sent there and not finished."""
    prompt_tokens_total: Ints
    output_tokens_total: Ints
    preemptions_total: Ints


@dataclass(slots=True)
class TenantColumns:
    """One row per tenant of host memory."""

    name: tuple[str, ...]
    node: Ints
    guaranteed_bytes: Floats
    memory_bytes: Floats
    """What the tenant was sold: guaranteed plus oversubscribed."""
    t_s: Floats
    working_set_bytes: Floats
    current_bytes: Floats
    limit_bytes: Floats
    swap_bytes: Floats
    major_faults_total: Ints
    refaults_total: Ints
    pressure_some_frac: Floats
    slowdown_frac: Floats
    frozen: Bools


@dataclass(slots=True)
class RowColumns:
    """One row per row of racks: the breaker that all its GPUs share."""

    name: tuple[str, ...]
    budget_w: Floats
    """What the GPUs of the row may draw together; infinite where none was set."""


@dataclass(slots=True)
class View:
    """What is known at ``now_s``, with the age of each part in its ``t_s`` column."""

    now_s: float
    rows: RowColumns
    gpus: GpuColumns
    instances: InstanceColumns
    tenants: TenantColumns
    pools: tuple[str, ...]
    pool_priority: Ints
    pool_of_class: dict[str, int] = field(default_factory=dict)
    """Which pool serves a request's ``slo_class``."""


@dataclass(frozen=True, slots=True)
class SetPowerLimit:
    """Hold each of ``gpus`` at ``power_limit_w`` (one number, or one per GPU)."""

    gpus: Ints
    power_limit_w: Floats | float
    why: str = ""


@dataclass(frozen=True, slots=True)
class LockClocks:
    """Keep the SM clock of each of ``gpus`` at or below ``sm_clock_mhz``; 0 unlocks."""

    gpus: Ints
    sm_clock_mhz: Floats | float
    why: str = ""


@dataclass(frozen=True, slots=True)
class SetMemoryLimit:
    """Let each of ``tenants`` hold at most ``memory_limit_bytes`` of host memory."""

    tenants: Ints
    memory_limit_bytes: Floats | float
    why: str = ""


@dataclass(frozen=True, slots=True)
class DrainInstance:
    """Send nothing new to ``instances`` until ``drain`` is said to be False again."""

    instances: Ints
    drain: bool = True
    why: str = ""


Command = SetPowerLimit | LockClocks | SetMemoryLimit | DrainInstance


class Controller(Protocol):
    """A policy that acts every ``period_s``: from what is known to what is asked."""

    period_s: float

    def step(self, view: View) -> list[Command]:
        """Commands for now; an empty list changes nothing."""
        ...


class Router(Protocol):
    """A policy that picks the instance for a request."""

    def route(self, request: Request, view: View) -> int | None:
        """Index into ``view.instances``, or None to hold the request at the front door."""
        ...


_C = TypeVar("_C", GpuColumns, InstanceColumns, TenantColumns)


def empty_gpus(names: tuple[str, ...]) -> GpuColumns:
    """Columns for GPUs that have not been heard from yet."""
    return _empty(GpuColumns, names)


def empty_instances(names: tuple[str, ...]) -> InstanceColumns:
    """Columns for instances that have not been heard from yet."""
    return _empty(InstanceColumns, names)


def empty_tenants(names: tuple[str, ...]) -> TenantColumns:
    """Columns for tenants that have not been heard from yet."""
    return _empty(TenantColumns, names)


def _empty(columns: type[_C], names: tuple[str, ...]) -> _C:
    made: dict[str, Any] = {"name": names}
    for column in fields(columns):
        if column.name == "name":
            continue
        dtype = {"Floats": np.float64, "Ints": np.int64, "Bools": np.bool_}[str(column.type)]
        made[column.name] = np.zeros(len(names), dtype)
    if "t_s" in made:
        made["t_s"] = np.full(len(names), -np.inf)
    return columns(**made)


def view_of(
    draw_w: list[list[float]],
    *,
    budget_w: float = np.inf,
    now_s: float = 10.0,
    limit_w: float = 700.0,
    priority: list[list[int]] | None = None,
    outstanding_tokens: list[float] | None = None,
) -> View:
    """A small view for doctests and tests: the draw of each GPU, row by row.

    Each GPU is an H100-like device (200 to 700 W) on a node and an instance of its own; all
    instances are up and in one pool.

    >>> view = view_of([[300.0, 400.0], [650.0]], budget_w=1000.0)
    >>> view.gpus.name, view.gpus.row.tolist()
    (('row0/gpu0', 'row0/gpu1', 'row1/gpu2'), [0, 0, 1])
    """
    rows = [row for row, gpus in enumerate(draw_w) for _ in gpus]
    count = len(rows)
    gpus = empty_gpus(tuple(f"row{row}/gpu{index}" for index, row in enumerate(rows)))
    gpus.row[:] = rows
    gpus.node[:] = gpus.instance[:] = np.arange(count)
    gpus.t_s[:] = now_s
    gpus.power_avg_w[:] = gpus.power_instant_w[:] = [w for row in draw_w for w in row]
    gpus.power_limit_w[:] = gpus.power_limit_enforced_w[:] = limit_w
    gpus.power_limit_min_w[:], gpus.power_limit_max_w[:] = 200.0, 700.0
    gpus.sm_clock_min_mhz[:], gpus.sm_clock_max_mhz[:] = 210.0, 1980.0
    if priority is not None:
        gpus.priority[:] = [p for row in priority for p in row]
    instances = empty_instances(tuple(f"{name}/default0" for name in gpus.name))
    instances.node[:] = np.arange(count)
    instances.up[:] = True
    instances.num_gpus[:] = 1
    instances.t_s[:] = now_s
    if outstanding_tokens is not None:
        instances.outstanding_tokens[:] = outstanding_tokens
    names = tuple(f"row{row}" for row in range(len(draw_w)))
    return View(
        now_s=now_s,
        rows=RowColumns(names, np.full(len(names), budget_w)),
        gpus=gpus,
        instances=instances,
        tenants=empty_tenants(()),
        pools=("default",),
        pool_priority=np.ones(1, np.int64),
        pool_of_class={"default": 0},
    )
