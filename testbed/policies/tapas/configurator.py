"""What each instance should be: model, precision, parallelism, batch and clock, from profiles.

A profile says of one configuration what it serves within its latency limits and what its GPUs draw
at parts of that. For each instance the demand is what it served lately plus a margin (or all there
is, while requests wait). The limits are: no GPU warmer than it may be, by the heat model, and the
row's and the aisle's room, shared among the instances in proportion to what they would like.

Normally the quality that the pool was given is kept, and of the configurations that serve the
demand within the limits the one that draws least is taken; if none does, the one that serves most
within the limits. In an emergency, where limits have shrunk, quality may go: the best quality that
serves the demand within the limits is taken, and what is left is spent where a watt buys most.
Clock and batch are moved at once, the rest every ``reload_period_s`` and for a part of a pool at a
time; in an emergency at once, for all that need it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from testbed.core.view import PRECISIONS, STARTING, UP, Bools, Facility, Floats, Ints
from testbed.policies import Command, LockClocks, Placement, SetBatch, SetLayout, View
from testbed.policies.tapas.predictors import Predictors

LOAD_STEPS = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
"""Parts of a configuration's goodput at which profiles give power."""
_KEEP = 0.03
"""Power by which another configuration must be better for a change."""
_ROUNDS = 2
_DRAIN_S = 60.0
"""What waits should be served in this time."""
_EMERGENCY_FRAC = 0.5
"""Part of a pool that may reload at once in an emergency: the others go on serving."""
_DWELL_S = 120.0
"""An instance that was reloaded stays what it is for so long."""


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
        self.kind = [
            (str(row["pool"]), str(row["model"]), str(row["precision"]), int(row["tp"]))
            for row in rows
        ]
        """Pool, model, precision and parallelism: what takes a reload to change."""
        kinds = list(dict.fromkeys(self.kind))
        self.of_kind = {kind: number for number, kind in enumerate(kinds)}
        numbers: dict[tuple[str, ...], int] = {}
        self.pool_of_kind: Ints = np.array(
            [numbers.setdefault(k[:1], len(numbers)) for k in kinds], np.int64
        )
        self.model_of_kind: Ints = np.array(
            [numbers.setdefault(k[:3], len(numbers)) for k in kinds], np.int64
        )
        """Pool, and pool with model and precision, of each kind, as numbers."""
        self.kind_number: Ints = np.array([self.of_kind[kind] for kind in self.kind], np.int64)
        self.tp: Ints = np.array([row["tp"] for row in rows], np.int64)
        self.batch: Ints = np.array([row["max_num_seqs"] for row in rows], np.int64)
        self.clock_frac: Floats = np.array([row["clock_frac"] for row in rows], float)
        self.goodput_tps: Floats = np.array([row["goodput_tps"] for row in rows], float)
        self.gpu_w: Floats = np.array([row["gpu_w"] for row in rows], float).reshape(
            -1, len(LOAD_STEPS)
        )

    def power_w(self, need_tps: Floats) -> Floats:
        """Power per GPU of every configuration (columns) at demands (rows)."""
        used = np.clip(need_tps[:, None] / self.goodput_tps, 0.0, 1.0)
        place = used * (len(LOAD_STEPS) - 1)
        left = np.minimum(place.astype(np.int64), len(LOAD_STEPS) - 2)
        column = np.arange(len(self.tp))[None, :]
        low, high = self.gpu_w[column, left], self.gpu_w[column, left + 1]
        power: Floats = low + (place - left) * (high - low)
        return power

    def quality_frac(self, view: View) -> Floats:
        """Quality of every configuration as the view declares it; 1 where nothing is declared."""
        places = [
            (view.models.index(model), PRECISIONS.index(precision))
            if model in view.models
            else (-1, -1)
            for _, model, precision, _ in self.kind
        ]
        models, precisions = np.array(places).T
        quality = np.where(models < 0, 0.0, view.model_quality_frac[models, precisions])
        return np.where(np.isnan(quality), 1.0, quality)


@dataclass(frozen=True, slots=True)
class _Instances:
    """Instances that can be told something, in columns."""

    index: Ints
    """In the view."""
    node: Ints
    first_gpu: Ints
    """In the view."""
    span: Ints
    """GPUs that each may use: as many as it had at first."""
    pool: Ints
    kind: Ints
    """Of what each is now."""
    config: Ints
    """Index of the profile that each is."""
    own: Ints
    """Kind of what each was at first, by number; its model and precision are the pool's own."""


@dataclass(frozen=True, slots=True)
class _Budget:
    """What groups of servers (rows, aisles) leave for instances."""

    group: Ints
    """Of each instance."""
    left: Floats
    """Of each group."""
    of_gpus: Callable[[Floats], Floats]
    """What a server takes of it, by the power of its GPUs."""
    back: Callable[[Floats], Floats]
    """The other way round."""

    def _asked(self, gpus_w: Floats) -> Floats:
        return np.bincount(self.group, self.of_gpus(gpus_w), len(self.left)).astype(float)

    def room_w(self, liked_w: Floats) -> Floats:
        """What the GPUs of each instance may draw: its part of what is left, if that is short."""
        asked = self._asked(liked_w)
        part = np.maximum(self.left, 0.0) / np.maximum(asked, 1e-9)
        share = self.of_gpus(liked_w) * part[self.group]
        return np.where(part[self.group] < 1.0, self.back(share), np.inf)

    def fits(self, now_w: Floats, more_w: Floats) -> Bools:
        """Whether instances (rows) could draw more than now, each alone."""
        spare = (self.left - self._asked(now_w))[self.group]
        slope = self.of_gpus(np.ones(1)) - self.of_gpus(np.zeros(1))
        return np.asarray(np.where(np.isfinite(more_w), more_w, 0.0) * slope <= spare[:, None])


class Configurator:
    """Chooses a profile for each instance.

    Args:
        profiles: what was measured.
        temp_limit_c: highest predicted GPU temperature.
        target: share of row power that may be used.
        air_target: the same of aisle air; a shortage is no trip, it warms: 1 C per 2 %.
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
        air_target: float = 1.0,
        demand_margin: float = 0.25,
        reload_period_s: float = 300.0,
        reload_frac: float = 0.2,
        memory_s: float = 300.0,
    ) -> None:
        self.profiles = Profiles(profiles)
        self.temp_limit_c, self.target, self.air_target = temp_limit_c, target, air_target
        self.demand_margin, self.memory_s = demand_margin, memory_s
        self.reload_period_s, self.reload_frac = reload_period_s, reload_frac
        self.reset()

    def reset(self) -> None:
        """Forget instances and times."""
        self._reloaded_s = -np.inf
        self._tokens: Floats = np.zeros(0)
        self._then_s = 0.0
        self._demand_tps: Floats = np.zeros(0)
        self._span: dict[int, int] = {}
        self._own: dict[int, int] = {}
        self._lock: dict[int, float] = {}
        self._reload_s: dict[int, float] = {}
        self._planned_w: dict[int, float] = {}
        """By node: what an instance that was told to reload will draw."""
        self._quality: Floats = np.zeros(0)

    def step(self, view: View, models: Predictors, *, emergency: bool) -> list[Command]:
        """Commands for instances that should be something else."""
        demand_tps = self._observe(view)
        facility = view.facility
        if facility is None or not len(self.profiles.tp):
            return []
        them = self._instances(view)
        if not len(them.index):
            return []
        if len(self._quality) != len(self.profiles.tp):
            self._quality = self.profiles.quality_frac(view)
        slow = emergency or view.now_s - self._reloaded_s >= self.reload_period_s - 1e-9
        if slow:
            self._reloaded_s = view.now_s
        need_tps = demand_tps[them.index] * (1.0 + self.demand_margin)
        rested = np.array(
            [view.now_s - self._reload_s.get(k, -np.inf) >= _DWELL_S for k in them.index.tolist()]
        )
        allowed = self._allowed(them, slow & rested, emergency=emergency)
        choice = self._choose(view, facility, models, them, need_tps, allowed, emergency)
        return self._say(view, them, choice, need_tps, emergency)

    def _observe(self, view: View) -> Floats:
        """Tokens per second asked of each instance: what it did, and what waits, soon."""
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
        held = np.maximum(instances.num_waiting + instances.num_running, 1)
        waiting_tokens = instances.outstanding_tokens * instances.num_waiting / held
        demand: Floats = self._demand_tps + waiting_tokens / _DRAIN_S
        return demand

    def _instances(self, view: View) -> _Instances:
        gpus, columns, table = view.gpus, view.instances, self.profiles
        served = np.flatnonzero(gpus.instance >= 0)
        owners, first = np.unique(gpus.instance[served], return_index=True)
        up = columns.state[owners] == UP
        owners, first = owners[up], served[first[up]]
        rows: list[tuple[int, ...]] = []
        for index, gpu in zip(owners.tolist(), first.tolist(), strict=True):
            kind = table.of_kind.get(
                (
                    view.pools[columns.pool[index]],
                    view.models[columns.model[index]],
                    PRECISIONS[columns.precision[index]],
                    int(columns.num_gpus[index]),
                ),
                -1,
            )
            if kind < 0:
                continue  # nothing is known of what it is
            span = self._span.setdefault(gpu, int(columns.num_gpus[index]))
            own = self._own.setdefault(int(columns.pool[index]), kind)
            rows.append(
                (index, int(columns.node[index]), gpu, span, int(columns.pool[index]), kind, own)
            )
        found = np.array(rows, np.int64).reshape(-1, 7).T
        index, node, gpu_, span_, pool, kind_, own_ = found
        clock = np.array([self._lock.get(k, 1.0) for k in index.tolist()])
        far = np.where(kind_[:, None] == table.kind_number, 0.0, np.inf)
        far = far + np.abs(clock[:, None] - table.clock_frac)
        far += np.abs(columns.max_num_seqs[index][:, None] - table.batch) / 1e3
        return _Instances(index, node, gpu_, span_, pool, kind_, far.argmin(axis=1), own_)

    def _allowed(self, them: _Instances, free: Bools, *, emergency: bool) -> Bools:
        """Which profiles (columns) each instance may take now; only ``free`` ones may reload."""
        table = self.profiles
        same = them.kind[:, None] == table.kind_number
        pool, model = table.pool_of_kind, table.model_of_kind
        fits = pool[them.kind][:, None] == pool[table.kind_number]
        fits &= table.tp <= them.span[:, None]
        if not emergency:
            # Of the quality that the pool was given; what is something else may return.
            fits &= model[them.own][:, None] == model[table.kind_number]
        return np.asarray((fits & free[:, None]) | same)

    def _choose(
        self,
        view: View,
        facility: Facility,
        models: Predictors,
        them: _Instances,
        need_tps: Floats,
        allowed: Bools,
        emergency: bool,
    ) -> Ints:
        """A profile for each instance."""
        table, rows = self.profiles, np.arange(len(them.index))
        power_w = table.power_w(need_tps)
        idle_w = table.gpu_w[:, 0]
        total_w = power_w * table.tp + idle_w * np.maximum(them.span[:, None] - table.tp, 0)
        fits = allowed & (power_w <= self._gpu_limit_w(view, facility, models, them))
        enough = table.goodput_tps >= need_tps[:, None]
        budgets = self._budgets(view, facility, models, them.node)
        room_w = np.full(len(rows), np.inf)
        choice = them.config
        for _ in range(_ROUNDS):
            within = fits & (total_w <= room_w[:, None])
            choice = self._best(them, allowed, within, enough, total_w, emergency)
            liked_w = total_w[rows, choice]
            for budget in budgets:
                room_w = np.minimum(room_w, budget.room_w(liked_w))
        if emergency:
            choice = self._upgrade(budgets, choice, fits & enough, total_w)
        return choice

    def _best(
        self,
        them: _Instances,
        allowed: Bools,
        within: Bools,
        enough: Bools,
        total_w: Floats,
        emergency: bool,
    ) -> Ints:
        """The best profile of each instance among those within the limits."""
        table, quality, rows = self.profiles, self._quality, np.arange(len(within))

        def finest(mask: Bools) -> Bools:
            best = np.where(mask, quality, -1.0).max(axis=1)
            return np.asarray(mask & (quality >= best[:, None] - 1e-9))

        # First wish: all of the demand, at the best quality, with the least power.
        good = finest(within & enough)
        cost = np.where(good, total_w, np.inf)
        choice = cost.argmin(axis=1)
        stays = good[rows, them.config]
        stays &= total_w[rows, them.config] <= cost[rows, choice] * (1.0 + _KEEP)
        choice = np.where(stays, them.config, choice)
        # Else as much of the demand as fits; else as little power as there is.
        most = within if emergency else finest(within)
        serving = np.where(most, table.goodput_tps, -1.0).argmax(axis=1)
        least = np.where(allowed, total_w, np.inf).argmin(axis=1)
        choice = np.where(good.any(axis=1), choice, np.where(most.any(axis=1), serving, least))
        return choice

    def _gpu_limit_w(
        self, view: View, facility: Facility, models: Predictors, them: _Instances
    ) -> Floats:
        """What each GPU of instances (rows) in profiles (columns) may draw and stay cool."""
        limit_w = models.heat.power_at_w(
            facility.servers.inlet_c[view.gpus.node], self.temp_limit_c
        )
        allowed_w = np.empty((len(them.index), len(self.profiles.tp)))
        for tp in np.unique(self.profiles.tp):
            members = them.first_gpu[:, None] + np.arange(tp)
            lowest = limit_w[np.minimum(members, len(limit_w) - 1)].min(axis=1)
            allowed_w[:, self.profiles.tp == tp] = lowest[:, None]
        return allowed_w

    def _budgets(
        self, view: View, facility: Facility, models: Predictors, nodes: Ints
    ) -> list[_Budget]:
        """What rows and aisles leave for the instances on ``nodes``."""
        servers = facility.servers
        starting = view.instances.node[view.instances.state == STARTING]
        planned = [(k, self._planned_w[k]) for k in starting.tolist() if k in self._planned_w]
        budgets: list[_Budget] = []
        for group, used, limit, target, of_gpus, back in (
            (
                servers.row,
                servers.draw_w,
                facility.row_limit_w,
                self.target,
                models.server.draw_w,
                models.server.gpus_for_draw_w,
            ),
            (
                servers.aisle,
                servers.airflow_m3_s,
                facility.aisles.capacity_m3_s,
                self.air_target,
                models.server.airflow_m3_s,
                models.server.gpus_for_airflow_w,
            ),
        ):
            now = used.copy()
            for node, gpus_w in planned:  # still loading, and soon at work
                now[node] = max(now[node], float(of_gpus(np.array([gpus_w]))[0]))
            now[nodes] = 0.0
            left = target * limit - np.bincount(group, now, len(limit))
            budgets.append(_Budget(group[nodes], left, of_gpus, back))
        return budgets

    def _upgrade(self, budgets: list[_Budget], choice: Ints, good: Bools, total_w: Floats) -> Ints:
        """Spend what is left on quality, where it buys most per watt."""
        rows, quality = np.arange(len(choice)), self._quality
        levels = np.unique(quality)
        # The cheapest way to each level of quality, per instance.
        ways = np.where(
            good[:, :, None] & (quality[:, None] == levels), total_w[:, :, None], np.inf
        )
        best, cheapest_w = ways.argmin(axis=1), ways.min(axis=1)
        choice = choice.copy()
        for _ in range(len(choice) * len(levels)):
            now_w = total_w[rows, choice]
            gain = levels - quality[choice][:, None]
            more_w = cheapest_w - now_w[:, None]
            fits = (gain > 1e-9) & np.isfinite(more_w)
            for budget in budgets:
                fits &= budget.fits(now_w, more_w)
            if not fits.any():
                break
            worth = np.where(fits, gain / np.maximum(more_w, 1.0), -1.0)
            place, level = np.unravel_index(int(worth.argmax()), worth.shape)
            choice[place] = best[place, level]
        return choice

    def _say(
        self, view: View, them: _Instances, choice: Ints, need_tps: Floats, emergency: bool
    ) -> list[Command]:
        table, columns = self.profiles, view.instances
        commands: list[Command] = []
        reload = table.kind_number[choice] != them.kind
        for pool in np.unique(them.pool):
            mine = np.flatnonzero(reload & (them.pool == pool))
            size = int((columns.pool == pool).sum())
            most = max(1, int((_EMERGENCY_FRAC if emergency else self.reload_frac) * size))
            most = max(0, most - int(((columns.pool == pool) & (columns.state == STARTING)).sum()))
            reload[mine[most:]] = False
            choice[mine[most:]] = them.config[mine[most:]]
        reloads = np.flatnonzero(reload)
        power_w = table.power_w(need_tps) * table.tp if len(reloads) else table.gpu_w
        for place in reloads:
            self._planned_w[int(them.node[place])] = float(power_w[place, choice[place]])
            self._reload_s[int(them.index[place])] = view.now_s
            commands.append(self._layout(view, them, int(place), int(choice[place])))
        clock = table.clock_frac[choice]
        before = np.array([self._lock.get(k, 1.0) for k in them.index.tolist()])
        moved = np.flatnonzero((clock != before) | reload)
        if len(moved):
            self._lock.update(zip(them.index[moved].tolist(), clock[moved].tolist(), strict=True))
            spans = [them.first_gpu[k] + np.arange(them.span[k]) for k in moved]
            members = np.concatenate(spans)
            frac = np.repeat(clock[moved], them.span[moved])
            mhz = np.floor(frac * view.gpus.sm_clock_max_mhz[members])
            mhz = np.where(frac >= 1.0, 0.0, mhz)
            commands.append(LockClocks(members, mhz, "least draw that serves the demand"))
        batch = table.batch[choice]
        resized = np.flatnonzero((columns.max_num_seqs[them.index] != batch) & ~reload)
        if len(resized):
            commands.append(
                SetBatch(them.index[resized], batch[resized], "least draw that serves the demand")
            )
        return commands

    def _layout(self, view: View, them: _Instances, place: int, config: int) -> SetLayout:
        """The node as it is, with one instance changed."""
        table, columns, gpus = self.profiles, view.instances, view.gpus
        node = int(them.node[place])
        start = int(np.flatnonzero(gpus.node == node)[0])
        _, model, precision, tp = table.kind[config]
        layout: list[Placement] = []
        for index in np.flatnonzero((columns.node == node) & (columns.model >= 0)).tolist():
            if index == them.index[place]:
                first, pool = int(them.first_gpu[place]), int(them.pool[place])
                layout.append(
                    Placement(first - start, tp, pool, view.models.index(model), precision)
                )
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
        why = f"{model} {precision} tp {tp} at {table.clock_frac[config]:.0%} of the clock"
        return SetLayout(node, tuple(layout), "snapshot", why)
