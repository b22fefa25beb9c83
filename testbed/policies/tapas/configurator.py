"""What each instance should be: model, precision, parallelism, batch and clock, from profiles.

A profile says of one configuration what it serves within its latency limits and what its GPUs draw
at parts of that. For each instance the demand is what it served lately plus a margin (or all there
is, while requests wait). The limits are: no GPU warmer than it may be, by the heat model, and the
row's and the aisle's room, shared among the instances in proportion to what they would like.

Normally the quality that the pool was given is kept, and of the configurations that serve the
demand within the limits the one that draws least is taken; if none does, the one that serves most
within the limits. In an emergency, where limits have shrunk, quality may go: the best quality that
serves the demand within the limits is taken. Clock and batch are moved at once, the rest every
``reload_period_s`` and for a part of a pool at a time; in an emergency at once, for all that need
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from testbed.core.view import PRECISIONS, Bools, Facility, Floats, Ints
from testbed.policies import Command, LockClocks, Placement, SetBatch, SetLayout, View
from testbed.policies.tapas.predictors import Predictors

LOAD_STEPS = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
"""Parts of a configuration's goodput at which profiles give power."""
_KEEP = 0.03
"""Power by which another configuration must be better for a change."""
_ROUNDS = 2


class Profiles:
    """Profiles in columns.

    Args:
        rows: one dictionary per configuration with ``pool``, ``model``, ``precision``, ``tp``,
            ``max_num_seqs``, ``clock_frac``, ``goodput_tps`` (prompt and output tokens per second
            within the latency limits) and ``gpu_w``: power per GPU at `LOAD_STEPS` of it.
    """

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        wanted = {"pool", "model", "precision", "tp", "max_num_seqs", "clock_frac"}
        wanted |= {"goodput_tps", "gpu_w"}
        for place, row in enumerate(rows):
            if row.keys() != wanted or len(row["gpu_w"]) != len(LOAD_STEPS):
                raise ValueError(
                    f"profiles[{place}] must have {', '.join(sorted(wanted))}, with "
                    f"{len(LOAD_STEPS)} values of gpu_w"
                )
        self.pool = [str(row["pool"]) for row in rows]
        self.model = [str(row["model"]) for row in rows]
        self.precision = [str(row["precision"]) for row in rows]
        self.tp: Ints = np.array([row["tp"] for row in rows], np.int64)
        self.batch: Ints = np.array([row["max_num_seqs"] for row in rows], np.int64)
        self.clock_frac: Floats = np.array([row["clock_frac"] for row in rows], float)
        self.goodput_tps: Floats = np.array([row["goodput_tps"] for row in rows], float)
        self.gpu_w: Floats = np.array([row["gpu_w"] for row in rows], float).reshape(
            -1, len(LOAD_STEPS)
        )

    def power_w(self, members: Ints, need_tps: Floats) -> Floats:
        """Power per GPU of configurations ``members`` (columns) at demands (rows)."""
        used = np.clip(need_tps[:, None] / self.goodput_tps[members], 0.0, 1.0)
        place = used * (len(LOAD_STEPS) - 1)
        left = np.minimum(place.astype(np.int64), len(LOAD_STEPS) - 2)
        table = self.gpu_w[members]
        column = np.arange(len(members))[None, :]
        low, high = table[column, left], table[column, left + 1]
        power: Floats = low + (place - left) * (high - low)
        return power


class _Instance(NamedTuple):
    """Where an instance is and what it is."""

    index: int
    node: int
    first_gpu: int
    """Index in the view."""
    span: int
    """GPUs that it may use."""
    config: int
    """Index of its profile."""


class Configurator:
    """Chooses a profile for each instance.

    Args:
        profiles: what was measured.
        temp_limit_c: highest predicted GPU temperature.
        target: share of row power and aisle air that may be used.
        demand_margin: how much more than was served lately an instance must be able to serve.
        reload_period_s: how often models, precision and parallelism may change.
        reload_frac: part of a pool that may change at once in normal operation.
    """

    def __init__(
        self,
        profiles: Sequence[dict[str, Any]],
        *,
        temp_limit_c: float,
        target: float,
        demand_margin: float = 0.25,
        reload_period_s: float = 300.0,
        reload_frac: float = 0.2,
        memory_s: float = 300.0,
    ) -> None:
        self.profiles = Profiles(profiles)
        self.temp_limit_c, self.target = temp_limit_c, target
        self.demand_margin, self.memory_s = demand_margin, memory_s
        self.reload_period_s, self.reload_frac = reload_period_s, reload_frac
        self._reloaded_s = -np.inf
        self._tokens: Floats = np.zeros(0)
        self._then_s = 0.0
        self._demand_tps: Floats = np.zeros(0)
        self._span: dict[int, int] = {}
        self._own: dict[int, tuple[str, str]] = {}
        self._lock: dict[int, float] = {}

    def step(self, view: View, models: Predictors, *, emergency: bool) -> list[Command]:
        """Commands for instances that should be something else."""
        demand_tps = self._observe(view)
        facility = view.facility
        if facility is None or not len(self.profiles.pool):
            return []
        instances = self._instances(view)
        if not instances:
            return []
        slow = emergency or view.now_s - self._reloaded_s >= self.reload_period_s - 1e-9
        if slow:
            self._reloaded_s = view.now_s
        choice = self._choose(view, facility, models, instances, demand_tps, emergency, slow)
        return self._say(view, instances, choice, emergency)

    def _observe(self, view: View) -> Floats:
        """Tokens per second asked of each instance: what it did, or everything if some wait."""
        instances = view.instances
        tokens = (instances.prompt_tokens_total + instances.output_tokens_total).astype(float)
        dt_s = view.now_s - self._then_s
        if len(self._tokens) != len(tokens):
            self._tokens, self._demand_tps = tokens, np.zeros(len(tokens))
            self._then_s = view.now_s
        elif dt_s > 0:
            now_tps = np.maximum(tokens - self._tokens, 0.0) / dt_s
            keep = np.exp(-dt_s / self.memory_s)
            # Rises are followed at once, falls slowly.
            self._demand_tps = np.maximum(now_tps, now_tps + (self._demand_tps - now_tps) * keep)
            self._tokens, self._then_s = tokens, view.now_s
        return np.where(instances.num_waiting > 0, np.inf, self._demand_tps)

    def _instances(self, view: View) -> list[_Instance]:
        gpus, columns = view.gpus, view.instances
        served = np.flatnonzero(gpus.instance >= 0)
        owners, first = np.unique(gpus.instance[served], return_index=True)
        found: list[_Instance] = []
        for index, gpu in zip(owners.tolist(), served[first].tolist(), strict=True):
            if columns.model[index] < 0:
                continue
            span = self._span.setdefault(gpu, int(columns.num_gpus[index]))
            config = self._profile_of(view, index)
            if config >= 0:
                found.append(_Instance(index, int(columns.node[index]), gpu, span, config))
        return found

    def _profile_of(self, view: View, index: int) -> int:
        """The profile that an instance is nearest to."""
        columns, table = view.instances, self.profiles
        pool = view.pools[columns.pool[index]]
        model = view.models[columns.model[index]]
        precision = PRECISIONS[columns.precision[index]]
        self._own.setdefault(int(columns.pool[index]), (model, precision))
        clock = self._lock.get(index, 1.0)
        best, distance = -1, np.inf
        for place in range(len(table.pool)):
            same = (table.pool[place], table.model[place], table.precision[place])
            if same != (pool, model, precision) or table.tp[place] != columns.num_gpus[index]:
                continue
            far = abs(table.clock_frac[place] - clock)
            far += abs(table.batch[place] - columns.max_num_seqs[index]) / 1e3
            if far < distance:
                best, distance = place, far
        return best

    def _choose(
        self,
        view: View,
        facility: Facility,
        models: Predictors,
        instances: list[_Instance],
        demand_tps: Floats,
        emergency: bool,
        slow: bool,
    ) -> Ints:
        """A profile for each instance."""
        gpu_limit_w = models.heat.power_at_w(
            facility.servers.inlet_c[view.gpus.node], self.temp_limit_c
        )
        nodes = np.array([one.node for one in instances])
        need = np.array([demand_tps[one.index] for one in instances])
        need = need * (1.0 + self.demand_margin)
        options = [self._options(view, one, emergency, slow) for one in instances]
        room_w = np.full(len(instances), np.inf)
        choice = np.array([one.config for one in instances])
        for _ in range(_ROUNDS):
            liked_w = np.zeros(len(instances))
            for place, one in enumerate(instances):
                choice[place], liked_w[place] = self._pick(
                    view, one, options[place], need[place], room_w[place], gpu_limit_w, emergency
                )
            room_w = np.minimum(room_w, self._room_w(view, facility, models, nodes, liked_w))
        return choice

    def _options(self, view: View, one: _Instance, emergency: bool, slow: bool) -> Ints:
        table = self.profiles
        pool = view.pools[view.instances.pool[one.index]]
        own = self._own[int(view.instances.pool[one.index])]
        now = (table.model[one.config], table.precision[one.config], int(table.tp[one.config]))
        fits: list[int] = []
        for place in range(len(table.pool)):
            if table.pool[place] != pool or table.tp[place] > one.span:
                continue
            kind = (table.model[place], table.precision[place])
            if not slow and (*kind, int(table.tp[place])) != now:
                continue
            if kind != own and kind != now[:2] and not emergency:
                continue
            fits.append(place)
        return np.array(fits, np.int64)

    def _pick(
        self,
        view: View,
        one: _Instance,
        options: Ints,
        need_tps: float,
        room_w: float,
        gpu_limit_w: Floats,
        emergency: bool,
    ) -> tuple[int, float]:
        """The best profile for one instance, and what its GPUs would draw together."""
        table = self.profiles
        serves = np.minimum(need_tps, table.goodput_tps[options])
        power_w = table.power_w(options, np.array([min(need_tps, 1e12)]))[0]
        own_w = np.array(
            [gpu_limit_w[one.first_gpu : one.first_gpu + int(tp)].min() for tp in table.tp[options]]
        )
        idle_w = table.gpu_w[options, 0]
        total_w = power_w * table.tp[options] + idle_w * (one.span - table.tp[options])
        fits = (power_w <= own_w) & (total_w <= room_w)
        quality = self._quality(view, options)
        enough = serves >= min(need_tps, 1e12)
        if not fits.any():
            # The least excess: nothing fits, so as little as there is.
            place = int(np.argmin(total_w))
        elif (fits & enough).any():
            good = fits & enough
            good &= quality >= quality[good].max() - 1e-9
            cost = np.where(good, total_w, np.inf)
            place = int(np.argmin(cost))
            same = np.flatnonzero(options == one.config)
            if len(same) and good[same[0]] and cost[same[0]] <= cost[place] * (1 + _KEEP):
                place = int(same[0])
        else:
            good = fits if emergency else fits & (quality >= quality[fits].max() - 1e-9)
            place = int(np.argmax(np.where(good, table.goodput_tps[options], -1.0)))
        return int(options[place]), float(total_w[place])

    def _quality(self, view: View, options: Ints) -> Floats:
        table = self.profiles
        quality = np.array(
            [
                view.model_quality_frac[
                    view.models.index(table.model[k]), PRECISIONS.index(table.precision[k])
                ]
                for k in options
            ]
        )
        return np.where(np.isnan(quality), 1.0, quality)

    def _room_w(
        self,
        view: View,
        facility: Facility,
        models: Predictors,
        nodes: Ints,
        liked_w: Floats,
    ) -> Floats:
        """What the GPUs of each instance may draw: its part of what row and aisle leave."""
        servers = facility.servers
        room_w = np.full(len(nodes), np.inf)
        for group, used, limit, of_gpus, back in (
            (
                servers.row,
                servers.draw_w,
                facility.row_limit_w,
                models.server.draw_w,
                models.server.gpus_for_draw_w,
            ),
            (
                servers.aisle,
                servers.airflow_m3_s,
                facility.aisles.capacity_m3_s,
                models.server.airflow_m3_s,
                models.server.gpus_for_airflow_w,
            ),
        ):
            wanted = of_gpus(liked_w)
            for index in np.unique(group[nodes]):
                mine = group[nodes] == index
                others = np.flatnonzero(group == index)
                others = others[~np.isin(others, nodes)]
                left = self.target * limit[index] - used[others].sum()
                asked = wanted[mine].sum()
                if asked > left:
                    part = wanted[mine] * max(left, 0.0) / asked
                    room_w[mine] = np.minimum(room_w[mine], back(part))
        return room_w

    def _say(
        self, view: View, instances: list[_Instance], choice: Ints, emergency: bool
    ) -> list[Command]:
        table, columns = self.profiles, view.instances
        commands: list[Command] = []
        clocks: list[tuple[Ints, float]] = []
        batches: list[tuple[int, int]] = []
        reloads: dict[int, int] = {}
        for one, config in zip(instances, choice.tolist(), strict=True):
            if columns.state[one.index] != 2:
                continue
            kind = (table.model[config], table.precision[config], table.tp[config])
            now = (table.model[one.config], table.precision[one.config], table.tp[one.config])
            if kind != now:
                pool = int(columns.pool[one.index])
                size = int((columns.pool == pool).sum())
                most = size if emergency else max(1, int(self.reload_frac * size))
                if reloads.get(pool, 0) >= most:
                    continue
                reloads[pool] = reloads.get(pool, 0) + 1
                commands.append(self._layout(view, one, config))
            clock = float(table.clock_frac[config])
            if self._lock.get(one.index, 1.0) != clock or kind != now:
                self._lock[one.index] = clock
                members = np.arange(one.first_gpu, one.first_gpu + one.span)
                clocks.append((members, clock))
            if columns.max_num_seqs[one.index] != table.batch[config] and kind == now:
                batches.append((one.index, int(table.batch[config])))
        if clocks:
            members = np.concatenate([gpus for gpus, _ in clocks])
            frac = np.concatenate([np.full(len(gpus), clock) for gpus, clock in clocks])
            top_mhz = view.gpus.sm_clock_max_mhz[members]
            mhz = np.where(frac >= 1.0, 0.0, np.floor(frac * top_mhz))
            commands.append(LockClocks(members, mhz, "least draw that serves the demand"))
        if batches:
            which, sizes = np.array(batches).T
            commands.append(SetBatch(which, sizes, "least draw that serves the demand"))
        return commands

    def _layout(self, view: View, one: _Instance, config: int) -> SetLayout:
        """The node as it is, with one instance changed."""
        table, columns, gpus = self.profiles, view.instances, view.gpus
        start = int(np.flatnonzero(gpus.node == one.node)[0])
        layout: list[Placement] = []
        for index in np.flatnonzero((columns.node == one.node) & (columns.model >= 0)).tolist():
            if index == one.index:
                new = Placement(
                    one.first_gpu - start,
                    int(table.tp[config]),
                    int(columns.pool[index]),
                    view.models.index(table.model[config]),
                    table.precision[config],
                )
                layout.append(new)
            else:
                first = int(np.flatnonzero(gpus.instance == index)[0])
                layout.append(
                    Placement(
                        first - start,
                        int(columns.num_gpus[index]),
                        int(columns.pool[index]),
                        int(columns.model[index]),
                        PRECISIONS[columns.precision[index]],
                    )
                )
        why = f"{table.model[config]} {table.precision[config]} tp {table.tp[config]}"
        return SetLayout(one.node, tuple(layout), "snapshot", why)
