"""A cluster in the mean: the same controllers on days and clusters too long for single requests.

Policies see a `View` and say commands, as everywhere. Between their steps each server is an
instance in the mean (`emulators.fluid`: the engine's own iteration times and work), an opaque VM at
its load, or empty; clocks follow from locks, limits and heat through the GPU model's own equations,
and the building (`emulators.datacenter`) answers the draw. Each server holds one VM on all its
GPUs: an opaque one, or one whose instance serves a pool.

Left out against a run with engines: single requests (a router is asked for ``weights``, else load
is spread so that instances are equally full), delays of messages, leases, power spikes shorter than
a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from emulators.datacenter import Datacenter, gpu_order_c
from emulators.fluid import FlowTable, FlowTables, Lengths, flow_table
from emulators.models import load_model, quality_frac
from emulators.opaque import opaque_activity
from emulators.power import clock_for_limit, power_w
from emulators.profiles import GpuProfile
from emulators.thermal import Thermal
from emulators.timing import IterationCost
from testbed.coordinator.arbiter import Claims
from testbed.coordinator.building import gpu_budgets_w, make_facility, show
from testbed.coordinator.cluster import read_only
from testbed.core.names import gpu_name, node_name
from testbed.core.spec import RunSpec
from testbed.core.view import (
    OFF,
    PRECISIONS,
    STARTING,
    UP,
    Bools,
    Command,
    Floats,
    Ints,
    LockClocks,
    PlaceVm,
    RowColumns,
    SetBatch,
    SetLayout,
    SetPowerLimit,
    View,
    VmColumns,
    empty_columns,
    empty_gpus,
    empty_instances,
    empty_tenants,
)
from testbed.workloads.vms import PERIOD_H, Vms, make_vms

_FULL = 0.9
"""Share of an instance's capacity that is filled before others of its pool take more."""
_PASSES = 3
"""Rounds in which clocks, flows and limits of a step are brought together."""


@dataclass(frozen=True, slots=True)
class Config:
    """What an instance may be: quick knobs aside, its clock."""

    model: str
    precision: str
    tp: int
    max_num_seqs: int


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A service of the provider's: what is asked of it and how many VMs it has."""

    lengths: Lengths
    rate_rps: Callable[[float], float]
    """Requests per second at a time of the run."""
    num_vms: int
    start: Config


class _Kinds(NamedTuple):
    """Configurations and endpoints in columns."""

    model: Ints
    precision: Ints
    tp: Ints
    """Per configuration; the first two as the view numbers them."""
    start: Ints
    """Configuration that an endpoint begins with."""
    prompt_tokens: Floats
    output_tokens: Floats
    """Per endpoint."""

    @classmethod
    def of(cls, configs: list[Config], endpoints: list[Endpoint], view: View) -> _Kinds:
        """The columns."""
        return cls(
            np.array([view.models.index(config.model) for config in configs]),
            np.array([PRECISIONS.index(config.precision) for config in configs]),
            np.array([config.tp for config in configs]),
            np.array([configs.index(end.start) for end in endpoints]),
            np.array([end.lengths.prompt_tokens for end in endpoints]),
            np.array([end.lengths.output_tokens for end in endpoints]),
        )


@dataclass(slots=True)
class Tally:
    """What a run is measured by; times in seconds."""

    series: list[tuple[float, ...]] = field(default_factory=list)
    """Time, each row's draw, each row's limit, highest GPU temperature, outside, capped share,
    IaaS speed, SaaS speed, quality, per step."""
    thermal_events: int = 0
    """GPUs that began to be slowed by heat."""
    power_events: int = 0
    """Servers that began to be capped by a safety policy."""
    thermal_s: float = 0.0
    """GPU-seconds slowed by heat, over all GPUs."""
    capped_s: float = 0.0
    """Server-seconds capped by a safety policy, over all servers."""
    over_s: float = 0.0
    """Row-seconds above the limit."""
    time_s: float = 0.0
    trips: int = 0
    dark_servers: int = 0
    temp_max_c: float = 0.0
    rise_max_c: float = 0.0
    """Highest temperature above the own inlet."""
    row_max_frac: float = 0.0
    """Highest draw of a row over its rating."""
    row_max_w: float = 0.0
    asked: float = 0.0
    served: float = 0.0
    late: float = 0.0
    """Requests that missed an SLO."""
    quality: float = 0.0
    """Sum over served requests of their model's quality, over that of the pool's own."""
    iaas_work: float = 0.0
    iaas_wanted: float = 0.0
    saas_speed: float = 0.0
    """Sum over served requests of unlimited over present time per token."""
    energy_j: float = 0.0
    unplaced: int = 0
    ttft_s: list[Floats] = field(default_factory=list)
    itl_s: list[Floats] = field(default_factory=list)
    weight: list[Floats] = field(default_factory=list)
    heat_c: Floats = field(default_factory=lambda: np.zeros(0))
    """Highest GPU temperature per server."""
    server_max_w: Floats = field(default_factory=lambda: np.zeros(0))


class FluidFleet:
    """One run of a cluster in the mean.

    Args:
        spec: cluster, plant, faults, opaque VMs; ``spec.policy`` names the controllers.
        profile: of the GPUs.
        endpoints: one per pool of the spec, in order.
        configs: what instances may be.
        controllers: policies, in the order of ``spec.policy``.
        router: with ``weights(view)`` per instance, or None to fill instances equally.
        reload_s: how long an instance is out when its model, precision or parallelism changes.
    """

    def __init__(
        self,
        spec: RunSpec,
        profile: GpuProfile,
        endpoints: Sequence[Endpoint],
        configs: Sequence[Config],
        controllers: Sequence[Any],
        router: Any = None,
        *,
        reload_s: float = 30.0,
    ) -> None:
        assert spec.plant is not None
        self.spec, self.profile = spec, profile
        self.endpoints, self.configs = list(endpoints), list(configs)
        self.controllers, self.router = list(controllers), router
        self._reload_s = reload_s
        self.hall = Datacenter(spec, profile)
        self.servers = len(self.hall.row)
        self.per = spec.cluster.gpus_per_node
        count = self.servers * self.per
        rng = np.random.default_rng([spec.seed, 17])
        offsets_c = rng.normal(0.0, spec.cluster.temp_spread_c, count)
        offsets_c += np.tile(gpu_order_c(spec.plant, self.per), self.servers)
        inlet_c = np.repeat(self.hall.inlet_c, self.per)
        self.thermal = Thermal(profile, count, inlet_c=inlet_c, offset_c=offsets_c)
        self._noise = np.random.default_rng([spec.seed, 37])
        self.vms = self._all_vms()
        self._tables = FlowTables(
            [flow_of(config, end.lengths, profile) for end in self.endpoints for config in configs]
        )
        self.config: Ints = np.full(self.servers, -1)
        self.batch: Ints = np.zeros(self.servers, np.int64)
        self.ready_s: Floats = np.zeros(self.servers)
        self.vm_of: Ints = np.full(self.servers, -1)
        self.backlog: Floats = np.zeros(self.servers)
        self.clock_frac: Floats = np.ones(count)
        self._hot: Bools = np.zeros(count, np.bool_)
        names = [policy.use for policy in spec.policy]
        precedence: list[str] = [policy.precedence for policy in spec.policy]
        self._safety = [rank == "safety" for rank in precedence]
        self._power, self._locks = (Claims(names, precedence, count) for _ in range(2))
        self._caps: Bools = np.zeros((len(names), count), np.bool_)
        self._next_s = [0.0] * len(names)
        self.limit_w: Floats = np.full(count, profile.power_limit_default_w)
        self.lock_frac: Floats = np.ones(count)
        self.tally = Tally(heat_c=np.zeros(self.servers), server_max_w=np.zeros(self.servers))
        self._was_capped: Bools = np.zeros(self.servers, np.bool_)
        self.view = self._make_view()
        self._kinds = _Kinds.of(self.configs, self.endpoints, self.view)

    # Set-up.

    def _all_vms(self) -> Vms:
        """Opaque VMs, then those of the endpoints, which are there from the start and stay."""
        plant = self.spec.plant
        assert plant is not None
        return make_vms(
            self.spec.vms,
            self.spec.seed,
            self.spec.duration_s,
            speedup=plant.speedup,
            start_hour=plant.start_hour % PERIOD_H,
        )

    def _make_view(self) -> View:
        hall, spec, profile = self.hall, self.spec, self.profile
        per_rack = math.ceil(spec.cluster.nodes_per_row / spec.cluster.racks_per_row)
        in_row = np.arange(self.servers) % spec.cluster.nodes_per_row
        nodes = tuple(
            node_name(int(row), int(place // per_rack), index)
            for index, (row, place) in enumerate(zip(hall.row, in_row, strict=True))
        )
        self.gpus = gpus = empty_gpus(
            tuple(gpu_name(node, k) for node in nodes for k in range(self.per))
        )
        gpus.node[:] = np.repeat(np.arange(self.servers), self.per)
        gpus.row[:] = hall.row[gpus.node]
        gpus.instance[:] = -1
        gpus.power_limit_min_w[:] = profile.power_limit_min_w
        gpus.power_limit_max_w[:] = profile.power_limit_max_w
        gpus.sm_clock_min_mhz[:] = profile.sm_clock_min_mhz
        gpus.sm_clock_max_mhz[:] = profile.sm_clock_max_mhz
        self.instances = empty_instances(tuple(f"{node}/instance" for node in nodes))
        self.instances.node[:] = np.arange(self.servers)
        self.instances.pool[:] = self.instances.model[:] = self.instances.precision[:] = -1
        saas = [f"{p.name}{k}" for p, e in zip(spec.pool, self.endpoints, strict=True)
                for k in range(e.num_vms)]  # fmt: skip
        vms = self._vm_columns = empty_columns(VmColumns, self.vms.name + tuple(saas))
        opaque = len(self.vms.name)
        vms.pool[:opaque], vms.customer[:opaque] = -1, self.vms.customer
        vms.pool[opaque:] = np.repeat(
            np.arange(len(self.endpoints)), [e.num_vms for e in self.endpoints]
        )
        vms.customer[opaque:] = len(self.vms.customers.peak) + vms.pool[opaque:]
        vms.num_gpus[:] = self.per
        vms.node[:] = -2
        self._arrival_s = np.concatenate([self.vms.arrival_s, np.zeros(len(saas))])
        self._departure_s = np.concatenate([self.vms.departure_s, np.full(len(saas), math.inf)])
        # Kinds arrive in a mixed order, as customers' and the provider's requests do.
        order = np.random.default_rng([spec.seed, 41]).permutation(len(vms.name))
        self._order: Ints = order[np.argsort(self._arrival_s[order], kind="stable")]
        rows = tuple(f"row{k}" for k in range(hall.num_rows))
        models = tuple(dict.fromkeys(config.model for config in self.configs))
        self.rows = RowColumns(rows, np.full(hall.num_rows, np.inf))
        self.facility = make_facility(hall, nodes, len(gpus.name), vms)
        return View(
            now_s=0.0,
            rows=self.rows,
            gpus=read_only(gpus),
            instances=read_only(self.instances),
            tenants=empty_tenants(()),
            pools=tuple(pool.name for pool in spec.pool),
            pool_priority=np.array([pool.priority for pool in spec.pool]),
            pool_of_class={c.name: k for k, c in enumerate(spec.slo_class)},
            models=models,
            model_quality_frac=quality_table(models),
            facility=self.facility,
        )

    # Time.

    def run(self, dt_s: float, until_s: float) -> Tally:
        """Step until ``until_s``; the tally so far."""
        steps = round(until_s / dt_s)
        for step in range(1, steps + 1):
            self.step(step * dt_s, dt_s)
        self.tally.unplaced = int((self._vm_columns.node == -1).sum())
        return self.tally

    def step(self, t_s: float, dt_s: float) -> None:
        """Let ``dt_s`` pass until ``t_s``: load, clocks, power, building, policies."""
        self._come_and_go(t_s)
        demand, served, flow_itl, flow_ttft, draw_w = self._serve(t_s, dt_s)
        self.hall.advance(t_s, draw_w)
        self.thermal.advance(dt_s, draw_w, np.repeat(self.hall.inlet_c, self.per))
        self._show(t_s, dt_s, draw_w, demand, served)
        self._count(t_s, dt_s, demand, served, flow_itl, flow_ttft, draw_w)
        self._control(t_s)

    def _come_and_go(self, t_s: float) -> None:
        vms = self._vm_columns
        for vm in np.flatnonzero((self._departure_s <= t_s) & (vms.node >= 0)):
            self._vacate(int(vms.node[vm]))
            vms.node[vm] = -2
        came = self._order[(self._arrival_s[self._order] <= t_s) & (vms.node[self._order] == -2)]
        vms.node[came[self._departure_s[came] > t_s]] = -1

    def _vacate(self, server: int) -> None:
        self.vm_of[server] = self.config[server] = -1
        self.facility.gpu_vm[server * self.per : (server + 1) * self.per] = -1

    def _settle_vm(self, vm: int, server: int, t_s: float) -> None:
        """A VM takes a server if that is free and lit."""
        vms = self._vm_columns
        if not 0 <= server < self.servers or self.vm_of[server] >= 0 or vms.node[vm] != -1:
            return
        if self.hall.dark[server]:
            return
        vms.node[vm], self.vm_of[server] = server, vm
        self.facility.servers.free_gpus[server] = 0
        self.facility.gpu_vm[server * self.per : (server + 1) * self.per] = vm
        if vms.pool[vm] >= 0:
            start = self.endpoints[vms.pool[vm]].start
            self._configure(server, self.configs.index(start), t_s)

    def _configure(self, server: int, config: int, ready_s: float) -> None:
        self.config[server], self.ready_s[server] = config, ready_s
        self.batch[server] = self.configs[config].max_num_seqs
        members = slice(server * self.per, server * self.per + self.configs[config].tp)
        self.gpus.instance[server * self.per : (server + 1) * self.per] = -1
        self.gpus.instance[members] = server

    def _rates(self, t_s: float, ready: Bools, capacity: Floats) -> Floats:
        """Requests per second that arrive at each server."""
        pool = np.where(self.vm_of >= 0, self._vm_columns.pool[self.vm_of], -1)
        weights = np.ones(self.servers)
        if self.router is not None and hasattr(self.router, "weights"):
            self.view.now_s = t_s
            weights = self.router.weights(self.view)
        rates = np.zeros(self.servers)
        noise = np.exp(self._noise.normal(0.0, 0.05, len(self.endpoints)))
        for index, endpoint in enumerate(self.endpoints):
            members = (pool == index) & ready
            asked = endpoint.rate_rps(t_s) * noise[index]
            rates += _spread(
                asked, np.where(members, weights, 0.0), np.where(members, capacity, 0.0)
            )
        return rates

    def _serve(self, t_s: float, dt_s: float) -> tuple[Floats, Floats, Floats, Floats, Floats]:
        """Rates asked and served, gaps and first tokens of each server, draw of each GPU."""
        profile = self.profile
        lit = ~self.hall.dark
        saas = (self.config >= 0) & lit
        ready = saas & (self.ready_s <= t_s)
        pool = np.where(self.vm_of >= 0, self._vm_columns.pool[self.vm_of], -1)
        which = np.where(saas, pool * len(self.configs) + self.config, 0)
        server = self.gpus.node
        working = (self.gpus.instance >= 0) & ready[server]
        opaque = (pool < 0) & (self.vm_of >= 0) & lit
        load = np.zeros(self.servers)
        loads = np.append(self.vms.loads(t_s), np.zeros(1))
        load[opaque] = loads[self.vm_of[opaque]]
        load_gpu = load[server]
        locks = np.minimum(self.lock_frac, 1.0)
        limit_w = np.minimum(self.limit_w, self._thermal_limit_w())
        clock = locks.copy()
        slowest = _lowest(clock, self.gpus.instance, self.servers)
        rates = self._rates(t_s, ready, self._tables.capacity_rps(which, slowest))
        for _ in range(_PASSES):
            slowest = _lowest(clock, self.gpus.instance, self.servers)
            capacity = np.where(ready, self._tables.capacity_rps(which, slowest), 0.0)
            served = np.minimum(rates + self.backlog / dt_s, capacity)
            flow = self._tables.at(which, served, slowest)
            busy, tensor, hbm, times = opaque_activity(profile, load_gpu, clock)
            busy = np.where(working, flow.busy_frac[server], busy)
            tensor = np.where(working, flow.tensor_frac[server], tensor)
            hbm = np.where(working, flow.hbm_frac[server], hbm)
            x = np.where(working, slowest[server], clock)
            draw_w = power_w(profile, x, busy, tensor, hbm)
            over = (draw_w > limit_w) & (clock > 0.25)
            if not over.any():
                break
            fits = clock_for_limit(profile, limit_w, busy, tensor, hbm, x)
            clock = np.where(over, np.minimum(clock, np.maximum(fits, 0.25)), clock)
        hot = self._thermal_limit_w() < np.minimum(self.limit_w, draw_w / 0.999)
        hot &= clock < locks - 1e-9
        self.tally.thermal_events += int((hot & ~self._hot).sum())
        self.tally.thermal_s += float(hot.sum()) * dt_s
        self._hot = hot
        self.clock_frac = clock
        self.backlog = np.where(ready, np.maximum(self.backlog + (rates - served) * dt_s, 0.0), 0.0)
        self._times, self._load = times, load_gpu
        self._flow, self._capacity, self._ready = flow, capacity, ready
        draw_w = np.where(lit[server], draw_w, 0.0)
        wait_s = self.backlog / np.maximum(capacity, 1e-9)
        return rates, served, flow.itl_s, flow.ttft_s + wait_s, draw_w

    def _thermal_limit_w(self) -> Floats:
        """What each GPU may draw for ever without passing its slowdown temperature."""
        inlet_c = np.repeat(self.hall.inlet_c, self.per)
        return self.thermal.limit_w(inlet_c, self.profile.temp_slowdown_c)

    # What policies see.

    def _show(
        self, t_s: float, dt_s: float, draw_w: Floats, demand: Floats, served: Floats
    ) -> None:
        gpus, hall, facility = self.gpus, self.hall, self.facility
        gpus.t_s[:] = t_s
        gpus.power_avg_w[:] = gpus.power_instant_w[:] = draw_w
        gpus.power_limit_w[:] = gpus.power_limit_enforced_w[:] = self.limit_w
        gpus.energy_j += draw_w * dt_s
        gpus.sm_clock_mhz[:] = self.clock_frac * self.profile.sm_clock_max_mhz
        gpus.temp_c[:] = self.thermal.temp_c
        gpus.mem_temp_c[:] = self.thermal.mem_temp_c
        gpus.throttle[:] = np.where(self._hot, 0x20, 0)
        gpus.lost[:] = hall.dark[gpus.node]
        pools = np.where(self.vm_of >= 0, self._vm_columns.pool[self.vm_of], -1)
        gpus.priority[:] = np.where(pools >= 0, 0, 1)[gpus.node]
        instances = self.instances
        there = self.config >= 0
        instances.pool[:] = np.where(there, pools, -1)
        instances.up[:] = self._ready
        kinds = self._kinds
        instances.model[:] = np.where(there, kinds.model[self.config], -1)
        instances.precision[:] = np.where(there, kinds.precision[self.config], -1)
        instances.num_gpus[:] = np.where(there, kinds.tp[self.config], 0)
        instances.state[:] = np.where(~there, OFF, np.where(self._ready, UP, STARTING))
        instances.ready_s[:] = self.ready_s
        instances.max_num_seqs[:] = np.where(there, self.batch, 0)
        instances.t_s[:] = t_s
        instances.num_running[:] = np.rint(self._flow.num_running)
        instances.num_waiting[:] = np.rint(self.backlog)
        instances.outstanding_requests[:] = instances.num_running + instances.num_waiting
        prompt = kinds.prompt_tokens[np.maximum(pools, 0)]
        output = kinds.output_tokens[np.maximum(pools, 0)]
        instances.outstanding_tokens[:] = instances.outstanding_requests * (prompt + output)
        instances.prefill_due_tokens[:] = instances.num_waiting * prompt
        instances.prompt_tokens_total += np.rint(served * dt_s * prompt).astype(np.int64)
        instances.output_tokens_total += np.rint(served * dt_s * output).astype(np.int64)
        show(facility, hall, t_s)
        free = (self.vm_of < 0) & ~hall.dark
        facility.servers.free_gpus[:] = np.where(free, self.per, 0)
        by_server_w = draw_w.reshape(-1, self.per).sum(axis=1)
        placed = np.flatnonzero(self.vm_of >= 0)
        facility.vms.draw_w[:] = 0.0
        facility.vms.draw_w[self.vm_of[placed]] = by_server_w[placed]
        self.rows.budget_w[:] = gpu_budgets_w(hall, by_server_w)

    # What policies say.

    def _control(self, t_s: float) -> None:
        self.view.now_s = t_s
        for index, controller in enumerate(self.controllers):
            if t_s < self._next_s[index] - 1e-9:
                continue
            self._next_s[index] = t_s + controller.period_s
            for command in controller.step(self.view):
                self._obey(index, command, t_s)
        top = self.gpus.power_limit_max_w
        self.limit_w = np.clip(self._power.resolve(top)[0], self.profile.power_limit_min_w, None)
        self.lock_frac = np.clip(self._locks.resolve(np.ones(len(top)))[0], 0.25, 1.0)

    def _obey(self, policy: int, command: Command, t_s: float) -> None:
        if isinstance(command, LockClocks):
            asked = np.broadcast_to(np.asarray(command.sm_clock_mhz, float), command.gpus.shape)
            frac = np.where(asked > 0, asked, np.inf) / self.profile.sm_clock_max_mhz
            self._locks.claim(policy, command.gpus, frac, np.ones(len(self.gpus.name)))
            self._caps[policy, command.gpus] = frac < 1.0
        elif isinstance(command, SetPowerLimit):
            asked = np.broadcast_to(np.asarray(command.power_limit_w, float), command.gpus.shape)
            self._power.claim(policy, command.gpus, asked, self.gpus.power_limit_max_w)
            self._caps[policy, command.gpus] = asked < self.gpus.power_limit_max_w[command.gpus]
        elif isinstance(command, PlaceVm):
            for vm, node in zip(command.vms, command.nodes, strict=True):
                self._settle_vm(int(vm), int(node), t_s)
        elif isinstance(command, SetBatch):
            sizes = np.broadcast_to(np.asarray(command.max_num_seqs), command.instances.shape)
            for server, size in zip(command.instances, sizes, strict=True):
                self._set_config(int(server), max_num_seqs=int(size))
        elif isinstance(command, SetLayout) and command.layout:
            [placement] = command.layout
            changed = self._set_config(
                command.node,
                model=self.view.models[placement.model],
                precision=placement.precision,
                tp=placement.tp,
            )
            if changed:
                self.ready_s[command.node] = t_s + self._reload_s

    def _set_config(self, server: int, **changes: Any) -> bool:
        """Change what an instance is; True if it is another one now."""
        if self.config[server] < 0:
            return False
        old = self.configs[self.config[server]]
        wanted = Config(**{f: changes.get(f, getattr(old, f)) for f in Config.__slots__})
        if wanted == old or wanted not in self.configs:
            return False
        self._configure(server, self.configs.index(wanted), self.ready_s[server])
        return True

    # What is measured.

    def _count(
        self,
        t_s: float,
        dt_s: float,
        demand: Floats,
        served: Floats,
        itl_s: Floats,
        ttft_s: Floats,
        draw_w: Floats,
    ) -> None:
        tally, hall = self.tally, self.hall
        tally.time_s += dt_s
        by_gpu = np.asarray(self._caps[self._safety].any(axis=0))
        capped: Bools = np.asarray(by_gpu.reshape(-1, self.per).any(axis=1))
        tally.power_events += int((capped & ~self._was_capped).sum())
        tally.capped_s += float(capped.sum()) * dt_s
        self._was_capped = capped
        limit_w = hall.row_limit_w
        tally.over_s += float((hall.row_w > limit_w * 1.0001).sum()) * dt_s
        tally.trips += sum(h.kind == "breaker_tripped" for h in hall.happenings)
        hall.happenings.clear()
        tally.dark_servers = int(hall.dark.sum())
        temp_c = self.thermal.temp_c.reshape(-1, self.per)
        tally.heat_c = np.maximum(tally.heat_c, temp_c.max(axis=1))
        tally.server_max_w = np.maximum(tally.server_max_w, hall.server_w)
        tally.temp_max_c = max(tally.temp_max_c, float(temp_c.max()))
        rise_c = (temp_c - hall.inlet_c[:, None]).max()
        tally.rise_max_c = max(tally.rise_max_c, float(rise_c))
        tally.row_max_w = max(tally.row_max_w, float(hall.row_w.max()))
        rated = hall.row_w / hall.row_breakers.rating_w
        tally.row_max_frac = max(tally.row_max_frac, float(rated.max()))
        tally.energy_j += float(hall.server_w.sum()) * dt_s
        tally.asked += float(demand.sum()) * dt_s
        done = served * dt_s
        tally.served += float(done.sum())
        limits = [(c.ttft_s, c.tpot_s) for c in self.spec.slo_class]
        pool = np.maximum(self.instances.pool, 0)
        ttft_limit, itl_limit = np.array(limits)[pool].T
        late = (ttft_s > ttft_limit) | (itl_s > itl_limit)
        tally.late += float(done[late].sum())
        table, kinds = self.view.model_quality_frac, self._kinds
        own = table[kinds.model[kinds.start], kinds.precision[kinds.start]]
        quality = table[self.instances.model, self.instances.precision] / own[pool]
        at = np.where(done > 0, quality, 0.0)
        tally.quality += float((at * done).sum())
        best = self._reference_itl_s(served)
        speed = np.minimum(best / np.maximum(itl_s, 1e-9), 1.0)
        tally.saas_speed += float((speed * done).sum())
        wanted = self._load * dt_s
        work = wanted / self._times
        tally.iaas_wanted += float(wanted.sum())
        tally.iaas_work += float(work.sum())
        active = done > 0
        tally.ttft_s.append(ttft_s[active])
        tally.itl_s.append(itl_s[active])
        tally.weight.append(done[active])
        served_sum = max(float(done.sum()), 1e-9)
        tally.series.append(
            (
                t_s,
                *hall.row_w,
                *limit_w,
                float(temp_c.max()),
                hall.outside_c,
                float(capped.mean()),
                float(work.sum() / max(wanted.sum(), 1e-9)),
                float((speed * done).sum() / served_sum),
                float((at * done).sum() / served_sum),
            )
        )

    def _reference_itl_s(self, served: Floats) -> Floats:
        """Time per token of the pool's own configuration at full clock and this rate."""
        pool = np.maximum(self.instances.pool, 0)
        which = pool * len(self.configs) + self._kinds.start[pool]
        return self._tables.at(which, served, np.ones(self.servers)).itl_s


def _spread(asked: float, weights: Floats, capacity: Floats) -> Floats:
    """Requests over instances by weight and capacity; no more than `_FULL` to one while others
    of positive weight have room, and to all by capacity beyond that."""
    rates = np.zeros(len(capacity))
    if capacity.sum() <= 0.0:
        return rates
    part = weights * capacity if (weights * capacity).sum() > 0 else capacity
    left = asked
    for _ in range(4):
        open_ = np.where(rates < _FULL * capacity, part, 0.0)
        if left <= 1e-9 or open_.sum() <= 0.0:
            break
        more = np.minimum(left * open_ / open_.sum(), _FULL * capacity - rates)
        rates += np.maximum(more, 0.0)
        left = asked - rates.sum()
    if left > 1e-9:
        rates += left * capacity / capacity.sum()
    return rates


def _lowest(clock: Floats, instance: Ints, count: int) -> Floats:
    """The slowest GPU of each instance sets its pace."""
    slowest = np.ones(count)
    members = instance >= 0
    np.minimum.at(slowest, instance[members], clock[members])
    return slowest


@cache
def flow_of(config: Config, lengths: Lengths, profile: GpuProfile) -> FlowTable:
    """The table of a configuration."""
    precision: Any = None if config.precision == "native" else config.precision
    cost = IterationCost(load_model(config.model), profile, tp=config.tp, precision=precision)
    return flow_table(cost, lengths, config.max_num_seqs)


def quality_table(models: Sequence[str]) -> Floats:
    """Declared quality of models (rows) at `PRECISIONS` (columns)."""
    cards = [load_model(model) for model in models]
    return np.array([[quality_frac(card, precision) for precision in PRECISIONS] for card in cards])
