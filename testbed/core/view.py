"""All that a policy is told (`View`) and all that it may say (`Command`).

A view is columns: one NumPy array per quantity with one row per GPU, instance, tenant or row of
racks. A policy that sums power per row is one ``np.bincount(gpus.row, draw_w)``. The arrays are
read-only and are those of the coordinator: copy what should outlive the step.

Commands name what they act on by index into the same columns.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Final, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from testbed.core.messages import Request

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

OFF: Final = 0
"""State of an instance slot: nothing is there, or its node has not begun yet."""
STARTING: Final = 1
"""The model is being loaded or re-sharded; serves from ``ready_s`` on."""
UP: Final = 2
DRAINING: Final = 3
"""On its way out: serves what it has and takes nothing new."""

PRECISIONS: Final = ("bf16", "fp8", "fp4", "int4", "native")
"""Precisions of a model's layers, as `InstanceColumns.precision` counts them. ``native`` is that of
the model's card where it is none of the others."""


@dataclass(slots=True)
class GpuColumns:
    """One row per GPU of the cluster."""

    WIRED: ClassVar = ("name",)
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
    """One row per serving instance. ``outstanding_*`` and ``prefill_due_tokens`` are the
    coordinator's own account, true at every step whenever a node reported last.

    In a run with ``cluster.elastic`` a row is a slot: there is one per GPU, slot i is the instance
    whose first GPU is GPU i of the cluster, and most slots are empty. So indices never move, and a
    request sent to an index reaches what was there when the router saw it.
    """

    WIRED: ClassVar = ("name",)
    name: tuple[str, ...]
    node: Ints
    pool: Ints
    """Index into `View.pools`; -1 for an empty slot."""
    up: Bools
    """Takes requests: its node is heard from, it is loaded and it is not draining."""
    num_gpus: Ints
    """Tensor-parallel degree: GPUs from its first one on. 0 for an empty slot."""
    model: Ints
    """Index into `View.models`; -1 for an empty slot."""
    precision: Ints
    """Index into `PRECISIONS`; -1 for an empty slot."""
    state: Ints
    """`OFF`, `STARTING`, `UP` or `DRAINING`, as its node reported last."""
    ready_s: Floats
    """When a starting instance will serve, or when one that is up began to."""
    max_num_seqs: Ints
    """Most sequences in a batch, see `SetBatch`; 0 for an empty slot."""
    t_s: Floats
    num_running: Ints
    num_waiting: Ints
    kv_used_frac: Floats
    outstanding_requests: Ints
    outstanding_tokens: Floats
    """Prompt and output tokens sent there and not finished."""
    prefill_due_tokens: Floats
    """Prompt tokens, images' too, of requests sent there that have no first token yet."""
    prompt_tokens_total: Ints
    output_tokens_total: Ints
    preemptions_total: Ints


@dataclass(slots=True)
class TenantColumns:
    """One row per tenant of host memory."""

    WIRED: ClassVar = ("name",)
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

    WIRED: ClassVar = ("name",)
    name: tuple[str, ...]
    budget_w: Floats
    """What the GPUs of the row may draw together; infinite where none was set."""


@dataclass(slots=True)
class ServerColumns:
    """One row per node, in their order: what the building's meters say of it."""

    WIRED: ClassVar = ("name",)
    name: tuple[str, ...]
    row: Ints
    aisle: Ints
    ups_a: Ints
    ups_b: Ints
    """The two UPS that feed it."""
    free_gpus: Ints
    """GPUs that an opaque VM could take."""
    inlet_c: Floats
    airflow_m3_s: Floats
    draw_w: Floats
    """GPUs and host."""
    dark: Bools


@dataclass(slots=True)
class AisleColumns:
    """One row per aisle: servers that share their air."""

    WIRED: ClassVar = ("name",)
    name: tuple[str, ...]
    airflow_m3_s: Floats
    capacity_m3_s: Floats
    """What its air handlers move now; with more asked for, hot air comes back to the inlets."""
    rating_m3_s: Floats
    """The same with all of them running."""


@dataclass(slots=True)
class UpsColumns:
    """One row per UPS."""

    WIRED: ClassVar = ("name",)
    name: tuple[str, ...]
    up: Bools
    draw_w: Floats
    limit_w: Floats
    """0 while it is out."""


@dataclass(slots=True)
class VmColumns:
    """One row per GPU VM that has arrived."""

    WIRED: ClassVar = ("name",)
    name: tuple[str, ...]
    pool: Ints
    """The pool whose instance it holds (SaaS), or -1 for an opaque one (IaaS): that may be placed,
    and not be touched afterwards."""
    customer: Ints
    """Whose it is; a customer's VMs are alike."""
    num_gpus: Ints
    node: Ints
    """Where it runs: -1 while it waits for a place, -2 once it has left."""
    draw_w: Floats
    """Its GPUs together."""


@dataclass(slots=True)
class Facility:
    """The building: what a plant (`emulators.datacenter`) or a real one's meters tell."""

    WIRED: ClassVar = ()
    t_s: float
    hour: float
    """Local hour of the year; modulo 24 that of the day."""
    outside_c: float
    row_draw_w: Floats
    """Whole servers, per row of `View.rows`."""
    row_limit_w: Floats
    """What each row may draw now: its breaker, and its part of the UPS that are left."""
    row_rating_w: Floats
    """The same when all is well."""
    servers: ServerColumns
    aisles: AisleColumns
    ups: UpsColumns
    vms: VmColumns
    gpu_vm: Ints
    """Index into ``vms`` per GPU of the cluster; -1 for none."""


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
    models: tuple[str, ...] = ()
    """Models that instances may hold: those of the pools, then ``reconfigure.models``."""
    model_quality_frac: Floats = field(default_factory=lambda: np.ones((0, len(PRECISIONS))))
    """Quality of each model (row) at each precision (column) as its card declares it: the share of
    MMLU questions answered. NaN where nothing is declared."""
    facility: Facility | None = None
    """In runs with a ``[plant]``."""

    def row_load_frac(self, stale_s: float = 2.0) -> Floats:
        """Each row's draw over what it may draw now: whole servers where they are metered, else
        its GPUs over their budget."""
        if self.facility is not None:
            limit_w = np.maximum(self.facility.row_limit_w, 1e-9)
            return np.asarray(self.facility.row_draw_w / limit_w)
        draws_w = np.bincount(
            self.gpus.row, self.gpus.draw_w(self.now_s, stale_s), len(self.rows.name)
        )
        return np.asarray(draws_w / self.rows.budget_w)


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


# What follows but for `SetBatch` and the queues needs a run with ``cluster.elastic``.


@dataclass(frozen=True, slots=True)
class Placement:
    """An instance that a node should hold."""

    first_gpu: int
    """Counted on the node."""
    tp: int
    """GPUs from the first one on: 1, 2, 4 or 8."""
    pool: int
    """Index into `View.pools`: whose requests it serves, with that pool's engine settings."""
    model: int
    """Index into `View.models`; need not be the model that the run file gives the pool."""
    precision: str = "bf16"
    """One of `PRECISIONS`."""


@dataclass(frozen=True, slots=True)
class SetLayout:
    """Let a node hold these instances and no others.

    The node compares with what it holds. What is in both goes on undisturbed (another pool is a
    change of name only, where both pools have the same engine settings). What is not in ``layout``
    drains: it serves what it has until that is done or ``reconfigure.drain_s`` have passed; the
    rest is handed back and routed again. What is new starts once its GPUs are free, and takes
    requests after the delay of ``how``. Where what leaves and what comes is the same model at the
    same precision on overlapping GPUs, it is re-sharded: its requests are handed back at once and
    the new instances serve some 0.1 s later (docs/decisions/0040).

    A placement on a lost GPU stays empty. The last layout said for a node stands; of several
    policies that of the highest precedence holds, then that of the policy listed first. A
    ``layout`` of None takes a policy's word back.
    """

    node: int
    """As in ``view.gpus.node``."""
    layout: tuple[Placement, ...] | None
    how: Literal["snapshot", "cold"] = "snapshot"
    """Start from a snapshot in host memory, or from storage; cold, an empty node boots as well."""
    why: str = ""


@dataclass(frozen=True, slots=True)
class SetBatch:
    """Let each of ``instances`` run at most ``max_num_seqs`` sequences at once.

    Holds until said otherwise or the slot's instance changes; 0 takes it back. What runs already
    goes on. Of several policies' values the arbiter picks as it does for power limits.
    """

    instances: Ints
    max_num_seqs: Ints | int
    why: str = ""


@dataclass(frozen=True, slots=True)
class OrderQueue:
    """Serve waiting requests of ``instances`` in this order from now on.

    A request's deadline is its arrival plus its class's ``ttft_s``.
    """

    instances: Ints
    by: Literal["deadline", "arrival"] = "deadline"
    why: str = ""


@dataclass(frozen=True, slots=True)
class RecallWaiting:
    """Take back what waits for a place in a batch of ``instances``, and route it again."""

    instances: Ints
    why: str = ""


@dataclass(frozen=True, slots=True)
class Squash:
    """Drop requests that wait in ``instances`` without a first token and are past their deadline.

    They end as rejected; the recording's table ``moves`` says why.
    """

    instances: Ints
    ttft_frac: float = 1.0
    """Deadline: arrival plus so many times the class's ``ttft_s``."""
    why: str = ""


@dataclass(frozen=True, slots=True)
class PlaceVm:
    """Let each of ``vms`` run on the node of ``nodes``; those that do not fit go on waiting."""

    vms: Ints
    nodes: Ints
    why: str = ""


Command = (
    SetPowerLimit
    | LockClocks
    | SetMemoryLimit
    | DrainInstance
    | SetLayout
    | SetBatch
    | OrderQueue
    | RecallWaiting
    | Squash
    | PlaceVm
)


class Controller(Protocol):
    """A policy that acts every ``period_s``: from what is known to what is asked.

    It may also have ``needs``, names of tables without which it can do nothing (``("plant",)``): a
    run file without them is refused; and ``remarks``, sentences on what it will not do as it was
    configured: they become warnings in the run's events.
    """

    period_s: float

    def step(self, view: View) -> list[Command]:
        """Commands for now; an empty list changes nothing."""
        ...


class Router(Protocol):
    """A policy that picks the instance for a request."""

    def route(self, request: Request, view: View) -> int | None:
        """Index into ``view.instances``, or None to hold the request at the front door."""
        ...


def slots_to_gpus(num_gpus: Ints, pool: Ints, pool_priority: Ints, spare: int) -> tuple[Ints, Ints]:
    """Instance and priority of each GPU where instances are slots, from the slots' columns.

    GPUs that serve nothing have instance -1 and priority ``spare``.

    >>> priority = np.array([1, 5])
    >>> slots_to_gpus(np.array([2, 0, 1, 0]), np.array([1, -1, 0, -1]), priority, 1)
    (array([ 0,  0,  2, -1]), array([5, 5, 1, 1]))
    """
    count = len(num_gpus)
    first = np.where(num_gpus > 0, np.arange(count), -1)
    latest = np.maximum.accumulate(first)
    held = (latest >= 0) & (np.arange(count) < latest + num_gpus[latest])
    instance = np.where(held, latest, -1)
    return instance, np.where(held, pool_priority[pool[latest]], spare)


_C = TypeVar(
    "_C",
    GpuColumns,
    InstanceColumns,
    TenantColumns,
    ServerColumns,
    AisleColumns,
    UpsColumns,
    VmColumns,
)


def empty_gpus(names: tuple[str, ...]) -> GpuColumns:
    """Columns for GPUs that have not been heard from yet."""
    return _empty(GpuColumns, names)


def empty_instances(names: tuple[str, ...]) -> InstanceColumns:
    """Columns for instances that have not been heard from yet."""
    return _empty(InstanceColumns, names)


def empty_tenants(names: tuple[str, ...]) -> TenantColumns:
    """Columns for tenants that have not been heard from yet."""
    return _empty(TenantColumns, names)


def empty_columns(columns: type[_C], names: tuple[str, ...]) -> _C:
    """Columns of a kind, all zero."""
    return _empty(columns, names)


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
    instances.state[:] = UP
    instances.max_num_seqs[:] = 256
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
        models=("llama-3.1-8b",),
        model_quality_frac=np.full((1, len(PRECISIONS)), np.nan),
    )


def view_of_layouts(
    layouts: list[tuple[Placement, ...]],
    *,
    gpus_per_node: int = 8,
    pools: tuple[str, ...] = ("default",),
    models: tuple[str, ...] = ("llama-2-70b",),
    draw_w: float = 300.0,
    now_s: float = 10.0,
) -> View:
    """A small view of an elastic run for doctests and tests: what each node holds, all of it up.

    GPUs are as those of `view_of`, on one row; each pool serves the class of its name.

    >>> eight, fours = (Placement(0, 8, 0, 0),), (Placement(0, 4, 0, 0), Placement(4, 4, 0, 0))
    >>> view = view_of_layouts([eight, fours, ()])
    >>> np.flatnonzero(view.instances.up).tolist(), view.gpus.instance[[7, 8, 15, 16]].tolist()
    ([0, 8, 12], [0, 8, 12, -1])
    """
    view = view_of([[draw_w] * (gpus_per_node * len(layouts))], now_s=now_s)
    slots, gpus = view.instances, view.gpus
    slots.node[:] = gpus.node[:] = np.arange(len(gpus.name)) // gpus_per_node
    slots.up[:] = False
    slots.num_gpus[:] = slots.max_num_seqs[:] = slots.state[:] = OFF
    slots.pool[:] = slots.model[:] = slots.precision[:] = -1
    for node, layout in enumerate(layouts):
        for placement in layout:
            slot = node * gpus_per_node + placement.first_gpu
            slots.up[slot], slots.state[slot] = True, UP
            slots.num_gpus[slot], slots.max_num_seqs[slot] = placement.tp, 256
            slots.pool[slot], slots.model[slot] = placement.pool, placement.model
            slots.precision[slot] = PRECISIONS.index(placement.precision)
    view.pools, view.pool_priority = pools, np.ones(len(pools), np.int64)
    view.pool_of_class = {name: index for index, name in enumerate(pools)}
    view.models = models
    view.model_quality_frac = np.full((len(models), len(PRECISIONS)), np.nan)
    gpus.instance, gpus.priority = slots_to_gpus(
        slots.num_gpus, slots.pool, view.pool_priority, spare=1
    )
    return view


def with_facility(
    view: View,
    *,
    row_limit_w: float = np.inf,
    inlet_c: list[float] | None = None,
    waiting: list[int] | None = None,
) -> View:
    """The view with a building around it, for doctests and tests.

    Rows share one aisle with air to spare; each node without an instance has its GPUs free.

    Args:
        view: as from `view_of`.
        row_limit_w: what each row may draw, whole servers.
        inlet_c: of each node; 24 by default.
        waiting: a VM of one GPU that waits for a place, for each pool listed; -1 is opaque.

    >>> view = with_facility(view_of([[300.0], [0.0]]), waiting=[-1])
    >>> view.facility.vms.node.tolist(), view.facility.row_draw_w.tolist()
    ([-1], [300.0, 0.0])
    """
    gpus, count = view.gpus, int(view.gpus.node.max()) + 1
    servers = _empty(ServerColumns, tuple(f"node{k}" for k in range(count)))
    servers.row[gpus.node] = gpus.row
    servers.ups_b[:] = 1
    servers.free_gpus[:] = np.bincount(gpus.node, gpus.instance < 0, count)
    servers.inlet_c[:] = 24.0 if inlet_c is None else inlet_c
    servers.draw_w[:] = np.bincount(gpus.node, gpus.power_avg_w, count)
    servers.airflow_m3_s[:] = 0.2
    aisles = _empty(AisleColumns, ("aisle0",))
    aisles.airflow_m3_s[:] = 0.2 * count
    aisles.capacity_m3_s[:] = aisles.rating_m3_s[:] = 1.0 * count
    ups = _empty(UpsColumns, ("ups0", "ups1"))
    ups.up[:] = True
    ups.draw_w[:], ups.limit_w[:] = servers.draw_w.sum() / 2, len(view.rows.name) * row_limit_w / 2
    vms = _empty(VmColumns, tuple(f"vm{k}" for k in range(len(waiting or []))))
    vms.pool[:] = waiting or []
    vms.customer[:] = np.where(vms.pool < 0, 0, 1 + vms.pool)
    vms.num_gpus[:], vms.node[:] = 1, -1
    limits_w = np.full(len(view.rows.name), row_limit_w)
    view.facility = Facility(
        view.now_s,
        4884.0,
        25.0,
        np.bincount(gpus.row, gpus.power_avg_w, len(view.rows.name)).astype(float),
        limits_w,
        limits_w,
        servers,
        aisles,
        ups,
        vms,
        np.full(len(gpus.name), -1),
    )
    return view
