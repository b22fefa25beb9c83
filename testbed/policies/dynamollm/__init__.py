"""DynamoLLM: reconfigure a serving cluster so that it meets its latency limits for less energy.

After "DynamoLLM: Designing LLM Inference Clusters for Performance and Energy Efficiency" (HPCA
2025). Requests fall into nine classes by input and (predicted) output length, each with a pool of
nodes. Three controllers act on different periods:

- the cluster manager (30 min) gives nodes to pools for the peak it predicts (`cluster`);
- the pool manager (5 min) cuts a pool's GPUs into instances of 2, 4 or 8 by an integer program
  over profiles of energy and latency (`pool`);
- the instance manager (5 s) sets each instance's clock to the cheapest that meets the limits.

The router sends a request to the instance of its pool whose power grows least, within the limits,
and spills to larger pools. Where more prompts are due all the same than an instance can prefill
within the limit, a ladder of emergency measures begins: order by deadline and highest clock, then,
a rung a second, send elsewhere and drop what is past its deadline.

Each part is a switch; with all off this is one pool of whole nodes, provisioned for the peak, at
the highest clock. Use it as controller and as router: ``use = "dynamollm"`` in both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from testbed.core.view import STARTING, Floats, Ints
from testbed.policies import (
    Command,
    LockClocks,
    OrderQueue,
    Placement,
    RecallWaiting,
    Request,
    SetLayout,
    Squash,
    View,
)
from testbed.policies.dynamollm.capacity import COUNTS, STEPS, Capacity, Card, Shapes
from testbed.policies.dynamollm.classes import ALL, CLASSES, MIXES, Predictor, larger
from testbed.policies.dynamollm.cluster import Mix, nodes_for, spread
from testbed.policies.dynamollm.forecast import Forecast
from testbed.policies.dynamollm.layout import Shape, first_gpus, fit
from testbed.policies.dynamollm.pool import Kind, kinds_of, plan
from testbed.policies.serving_profile import ServingProfile, Sweep

_MEMORY_S = 10.0
"""Over how long the router remembers what it sent to an instance."""
_LAST = COUNTS - 1
_GRAIN = 0.02
"""Loads are planned for in steps of this, rounded up, so that plans can be used again."""
_FASTER, _RECALL, _SQUASH = 2, 3, 4
"""Rungs of the ladder; the first orders queues by deadline."""
RUNGS = _SQUASH
FASTER_WHY = "more is due than can be met"
"""Why the ladder sets clocks: by this its second rung is known in a recording."""
_EMPTY: tuple[str, Shape] = ("", ())
"""A node without a pool."""
_SHORT_STEPS = 12
"""Steps of the instance manager that a burst must last to count as load: a minute."""


@dataclass(slots=True)
class _Pool:
    """A pool and what it is planned to do."""

    name: str
    index: int
    nodes: list[int] = field(default_factory=list)
    shapes: Shapes | None = None
    planned: list[Kind] = field(default_factory=list)
    serves: frozenset[str] = frozenset()
    """Classes that it is planned for."""
    mixed_frac: float = 1.0
    """Share of what it can do as planned that it can do when others' requests come too."""


@dataclass(slots=True)
class _Entry:
    """An instance that the router may choose."""

    slot: int
    card: Card
    fill: float
    """Load up to which it is to be filled, in nodes."""
    top: Card
    """Its card at the highest clock."""
    added_w: list[float]
    """Power that another node's worth of load would add, in steps of load."""
    steps_per_load: float
    prefill_tps: float
    """Prompt tokens per second at its clock, and at the highest."""
    top_tps: float


class DynamoLLM:
    """See the module's story.

    Args:
        pools: nine pools by class; else one for all.
        instances: nodes follow the predicted load; else they are provisioned for the peak.
        sharding: the pool manager may use 2 and 4 GPUs per instance.
        frequency: the instance manager may lower clocks.
        saving: the router looks for the least power; else for the least load.
        rungs: of the ladder, how many may be climbed: 0 for no emergency measures, 4 for all.
        predictor_error: share of requests whose output class is mispredicted.
        headroom_frac: capacity beyond the predicted load.
        peak_factor: provisioning over the predicted peak, where nodes do not follow the load.
        slack_frac: share that plans may use of the room between latencies on an empty node and
            their limits.
        template_rps: rate of all requests usual in each window from the run's start.
        template_window_s: length of a window.
        surge_rps: rate by which a step of the instance manager may exceed what the last minute let
            expect, as the past shows (`forecast.surge_rps`): clocks are kept high enough for it.
        start: how nodes that were given back come up: from a snapshot, or cold.
        lead_s: how long before its epoch the cluster manager starts nodes.
        empty_w: draw of a GPU without an instance, for the pool manager.
        period_s, pool_period_s, cluster_period_s: of the three controllers.
        ladder_period_s: how often the ladder is looked at, at most; ``period_s`` is a whole
            multiple of what results.
        seed: of the predictor's errors.
    """

    sweep = Sweep(mixes=MIXES)

    def __init__(
        self,
        *,
        pools: bool = True,
        instances: bool = True,
        sharding: bool = True,
        frequency: bool = True,
        saving: bool = True,
        rungs: int = RUNGS,
        predictor_error: float = 0.0,
        headroom_frac: float = 0.1,
        peak_factor: float = 1.0,
        slack_frac: float = 1.0,
        template_rps: Sequence[float] = (),
        template_window_s: float = 300.0,
        surge_rps: float = 0.0,
        start: Literal["snapshot", "cold"] = "snapshot",
        lead_s: float = 0.0,
        empty_w: float = 0.0,
        period_s: float = 5.0,
        pool_period_s: float = 300.0,
        cluster_period_s: float = 1800.0,
        ladder_period_s: float = 1.0,
        seed: int = 1,
    ) -> None:
        if not 0 < period_s <= pool_period_s <= cluster_period_s:
            raise ValueError(
                f"period_s = {period_s} <= pool_period_s = {pool_period_s} <= "
                f"cluster_period_s = {cluster_period_s} must hold"
            )
        if start not in ("snapshot", "cold"):
            raise ValueError(f"start = {start!r} must be 'snapshot' or 'cold'")
        if not 0 <= lead_s < cluster_period_s:
            raise ValueError(f"lead_s = {lead_s} must be in [0, cluster_period_s)")
        if headroom_frac < 0 or peak_factor <= 0 or surge_rps < 0:
            raise ValueError(
                f"headroom_frac = {headroom_frac} and surge_rps = {surge_rps} must be >= 0, "
                f"peak_factor = {peak_factor} above 0"
            )
        if not 0 < slack_frac <= 1:
            raise ValueError(f"slack_frac = {slack_frac} must be in (0, 1]")
        if not 0 <= rungs <= RUNGS:
            raise ValueError(f"rungs = {rungs} must be in [0, {RUNGS}]")
        if ladder_period_s <= 0:
            raise ValueError(f"ladder_period_s = {ladder_period_s} must be above 0")
        self.instances, self.sharding = instances, sharding
        self.frequency, self.saving, self.rungs = frequency, saving, rungs
        self.headroom_frac, self.peak_factor = headroom_frac, peak_factor
        looks = max(1, math.ceil(period_s / ladder_period_s - 1e-9)) if rungs else 1
        self.period_s = period_s / looks
        self._manage_period_s, self.pool_period_s = period_s, pool_period_s
        self.cluster_period_s, self.lead_s, self.start = cluster_period_s, lead_s, start
        self.empty_w = empty_w
        self.names = CLASSES if pools else (ALL,)
        self._slack_frac, self._surge_rps = slack_frac, surge_rps
        self._template = (list(template_rps), template_window_s)
        self._predictor = Predictor(predictor_error, seed)
        self._began = self._grown = False
        self._next_manage_s = 0.0
        self._last_id = -1
        self._epoch = 0
        self._next_pool_s = -math.inf
        self._wanted: dict[str, int] = {}
        self._want: dict[int, tuple[str, Shape]] = {}
        self._said: dict[int, tuple[str, Shape]] = {}
        self._routes: dict[str, list[_Entry]] = {}
        self._trouble: dict[int, int] = {}
        self._locked: dict[int, float] = {}
        self._plans: dict[tuple[Shapes, int, float, Shape], list[Kind]] = {}

    def learn(self, profile: ServingProfile) -> None:
        """Take the profile that plans are made with."""
        self._capacity = Capacity(profile, self._slack_frac)
        self._top = len(profile.clocks_mhz) - 1
        self._shares = np.array([profile.shares[profile.classes.index(n)] for n in self.names])
        node_rps = [self._capacity.node_rps[name] for name in self.names]
        self._weights = [1.0 / rps if rps else 0.0 for rps in node_rps]
        self._class_index = {name: place for place, name in enumerate(self.names)}
        template_rps, window_s = self._template
        self._forecast = Forecast(
            len(self.names),
            step_s=self._manage_period_s,
            keep_s=self.cluster_period_s,
            template_rps=template_rps,
            window_s=window_s,
            shares=self._shares,
        )
        self._arrived = [0.0] * len(self.names)
        limits_s = profile.ttft_limit_s.tolist()
        self._ttft_s = dict(zip(profile.classes, limits_s, strict=True))
        self._surge = self._in_nodes(self._surge_rps * self._shares)

    # Routing.

    def route(self, request: Request, view: View) -> int | None:
        """The instance whose power grows least, in the predicted class's pool or a larger one."""
        if not self._began:
            return None
        name = ALL
        if len(self.names) > 1:
            name = self._predictor.class_of(request.prompt_tokens, request.output_tokens)
        place = self._class_index[name]
        if request.id > self._last_id:  # else it was held, or an instance gave it up
            self._last_id = request.id
            self._arrived[place] += 1.0
        weight = self._weights[place] / _MEMORY_S
        chosen = self._choose(name, weight, request, view)
        if chosen is not None:
            self._sent[chosen] = self._sent_load(chosen, view.now_s) + weight
            self._sent_s[chosen] = view.now_s
            self._step_sent[chosen] += self._weights[place]
        return chosen

    def _sent_load(self, slot: int, now_s: float) -> float:
        """Load that was sent to an instance lately, in nodes: a mean that forgets."""
        return self._sent[slot] * math.exp((self._sent_s[slot] - now_s) / _MEMORY_S)

    def _choose(self, name: str, weight: float, request: Request, view: View) -> int | None:
        """The best instance, by what is in flight on it or was sent there, whichever is more.

        What is in flight says how full an instance is, but long after it was sent too much: a
        long answer is in flight for many times the period of the instance manager. Neither sees a
        burst of a second: what the prompts that are due there would make this one wait does.
        """
        limit_s = self._slack_frac * self._ttft_s.get(request.slo_class, self._ttft_s[name])
        prompt_tokens = request.prompt_tokens + request.image_tokens
        due_tokens = view.instances.prefill_due_tokens
        up, running = view.instances.up, view.instances.outstanding_requests
        now_s = view.now_s
        fallback, crowded = -1, math.inf
        for pool in (name, *(larger(name) if name != ALL else ())):
            best, least_w = -1, math.inf
            # Where it is not planned for, it would wait behind requests that may wait longer.
            part = 1.0 if name in self._pools[pool].serves else self._pools[pool].mixed_frac
            for entry in self._routes.get(pool, ()):
                slot = entry.slot
                if not up[slot]:
                    continue
                count = min(int(running[slot]) + 1, _LAST)
                card = entry.card
                sent = self._sent_load(slot, now_s) + weight
                load = max(card.load[count], sent)
                due = prompt_tokens + float(due_tokens[slot])
                if self.saving and load <= entry.fill * part and due <= limit_s * entry.prefill_tps:
                    slope_w = entry.added_w[min(STEPS - 1, int(load * entry.steps_per_load))]
                    if slope_w < least_w:
                        best, least_w = slot, slope_w
                elif best < 0:
                    share = max(entry.top.load[count], sent) / max(entry.top.most * part, 1e-9)
                    share = max(share, due / (limit_s * entry.top_tps))
                    if share < crowded:
                        fallback, crowded = slot, share
            if best >= 0:
                return best
            # Within the limits at the highest clock: the instance manager will raise it.
            if fallback >= 0 and crowded <= 1.0:
                return fallback
        if fallback >= 0:
            return fallback
        return self._anywhere(view)

    def _anywhere(self, view: View) -> int | None:
        """No pool that is large enough has an instance: the emptiest there is."""
        up = np.flatnonzero(view.instances.up)
        if not len(up):
            return None
        return int(up[np.argmin(view.instances.outstanding_tokens[up])])

    # The three controllers.

    def step(self, view: View) -> list[Command]:
        """All that is due now."""
        now_s = view.now_s
        if now_s < self._next_manage_s - self.period_s / 2:
            return self._climb(view)
        self._next_manage_s = max(self._next_manage_s, now_s) + self._manage_period_s
        if not self._began:
            self._begin(view)
        else:
            self._forecast.add(np.array(self._arrived))
        self._arrived = [0.0] * len(self.names)
        self._manage_cluster(now_s)
        if now_s >= self._next_pool_s - 1e-9:
            self._next_pool_s = now_s + self.pool_period_s
            self._manage_pools(now_s)
        return self._layouts(view) + self._manage_instances(view)

    def _begin(self, view: View) -> None:
        missing = [name for name in self.names if name not in view.pools]
        if missing:
            raise ValueError(f"the run file has no pool named {', '.join(missing)}")
        self._began = True
        self._pools = {name: _Pool(name, view.pools.index(name)) for name in self.names}
        self._by_index = {pool.index: pool for pool in self._pools.values()}
        self._free = sorted(set(view.gpus.node.tolist()))
        self._gpus_per_node = int(np.bincount(view.gpus.node)[0])
        self._sent = [0.0] * len(view.instances.name)
        self._sent_s = [0.0] * len(view.instances.name)
        self._step_sent = [0.0] * len(view.instances.name)
        self._usual = np.zeros(len(view.instances.name))
        self._due_most_tokens = np.full(len(view.instances.name), np.inf)
        self._due_top_tokens = self._due_most_tokens.copy()

    # Cluster manager: which pool has how many nodes.

    def _manage_cluster(self, now_s: float) -> None:
        """Grow ``lead_s`` before an epoch, shrink when it begins."""
        epoch_s = self._epoch * self.cluster_period_s
        if now_s >= epoch_s - self.lead_s - 1e-9 and not self._grown:
            self._grown = True
            self._wanted = self._nodes_wanted(epoch_s, now_s)
            grown = {
                name: max(self._wanted.get(name, 0), len(pool.nodes))
                for name, pool in self._pools.items()
            }
            self._lend(grown, now_s)
        if now_s >= epoch_s - 1e-9:
            self._lend(self._wanted, now_s)
            self._epoch += 1
            self._grown = False

    def _nodes_wanted(self, epoch_s: float, now_s: float) -> dict[str, int]:
        if self.instances:
            rps = self._forecast.usual_rps(epoch_s, epoch_s + self.cluster_period_s)
            rps = np.maximum(rps, self._recent(self.pool_period_s))
        else:
            if self._epoch:
                return {name: len(pool.nodes) for name, pool in self._pools.items()}
            rps = self._forecast.peak_rps() * self.peak_factor
        load = self._in_nodes(rps * (1.0 + self.headroom_frac))
        count = len(self._free) + sum(len(pool.nodes) for pool in self._pools.values())
        if not load:  # nothing is known yet: all nodes, by what classes usually need
            usual = self._in_nodes(self._shares)
            load = {name: value * count / sum(usual.values()) for name, value in usual.items()}
        nodes = nodes_for(load, self._capacity.most_of)
        while sum(nodes.values()) > count:
            nodes[max(nodes, key=lambda name: nodes[name])] -= 1
        return nodes

    def _recent(self, span_s: float) -> Floats:
        """Rates seen lately: where a template says what is usual, only what is surely above it."""
        if self._template[0]:
            return self._forecast.sure_rps(span_s)
        return self._forecast.recent_rps(span_s)

    def _in_nodes(self, rps: Floats) -> Mix:
        """Rates of the classes as loads, those that are not zero."""
        loads = zip(self.names, (rps * self._weights).tolist(), strict=True)
        return {name: load for name, load in loads if load > 0}

    def _lend(self, wanted: dict[str, int], now_s: float) -> None:
        """Move nodes between pools, from those with too many; what nobody wants is given back."""
        spare: list[int] = []
        for name, pool in self._pools.items():
            while len(pool.nodes) > wanted.get(name, 0):
                spare.append(pool.nodes.pop())
        changed = bool(spare)
        for name, pool in self._pools.items():
            while len(pool.nodes) < wanted.get(name, 0) and (spare or self._free):
                node = spare.pop(0) if spare else self._free.pop(0)
                shape = self._want[node][1] if node in self._want else ()
                self._want[node] = (name, shape or (self._gpus_per_node,))
                pool.nodes.append(node)
                changed = True
        for node in spare:
            self._want[node] = ("", ())
        self._free = sorted([*self._free, *spare])
        if changed:
            self._next_pool_s = now_s

    # Pool manager: how a pool's GPUs are cut into instances.

    def _manage_pools(self, now_s: float) -> None:
        rps = self._forecast.usual_rps(now_s, now_s + self.pool_period_s)
        for span_s in (self.pool_period_s, _SHORT_STEPS * self._manage_period_s):
            rps = np.maximum(rps, self._recent(span_s))
        loads = self._in_nodes(rps * (1.0 + self.headroom_frac))
        nodes = {name: len(pool.nodes) for name, pool in self._pools.items()}
        mixes = spread(loads, nodes, self._capacity.most_of)
        allowed = self._capacity.profile.tps if self.sharding else (self._gpus_per_node,)
        use_all = not self.sharding
        for name, mix in mixes.items():
            pool = self._pools[name]
            pool.shapes = self._capacity.of(name, mix)
            pool.serves = frozenset(mix)
            pool.mixed_frac = self._capacity.mixed_frac(name, mix)
            gpus = len(pool.nodes) * self._gpus_per_node
            load = math.ceil(sum(mix.values()) / _GRAIN) * _GRAIN
            before = {node: self._want[node][1] for node in pool.nodes}
            held = tuple(sorted(tp for shape in before.values() for tp in shape))
            key = (pool.shapes, gpus, load, held)
            if key not in self._plans:
                kinds = kinds_of(pool.shapes, allowed, free_clock=self.frequency)
                self._plans[key] = plan(
                    kinds, gpus, load, use_all=use_all, empty_w=self.empty_w, held=held
                )
            pool.planned = self._plans[key]
            tps = [kind.tp for kind in pool.planned]
            shapes = fit(tps, before, pool.nodes, gpus_per_node=self._gpus_per_node)
            for node, shape in shapes.items():
                self._want[node] = (name, shape)

    def _layouts(self, view: View) -> list[Command]:
        """Tell nodes what changes: first what adds instances, last what takes them away.

        In each pool one node at a time is cut up anew, and nothing is given back before all that
        is to come is up: the pool never has less than the smaller of its two plans.
        """
        todo: dict[str, list[int]] = {}
        for node, want in self._want.items():
            before = self._said.get(node, _EMPTY)
            if want != before:
                todo.setdefault(want[0] or before[0], []).append(node)
        columns = view.instances
        coming = {
            self._by_index[int(columns.pool[slot])].name
            for slot in np.flatnonzero(columns.state == STARTING).tolist()
        }
        commands: list[Command] = []
        for name, nodes in todo.items():
            grow = [node for node in nodes if self._grows(node)]
            cut = [node for node in nodes if node not in grow and self._want[node][1]]
            if cut:  # the one that changes most
                cut = [max(cut, key=lambda node: (self._changed(node), -node))]
            now = grow + cut
            if not now and name not in coming:
                now = nodes
            for node in sorted(now):
                self._said[node] = self._want[node]
                how = self.start if view.now_s > 0 else "snapshot"  # the run begins warm
                commands.append(SetLayout(node, self._placements(*self._want[node]), how))
        return commands

    def _grows(self, node: int) -> bool:
        """Everything that is there stays, whatever comes beside it."""
        left = list(self._want[node][1])
        for tp in self._said.get(node, _EMPTY)[1]:
            if tp not in left:
                return False
            left.remove(tp)
        return True

    def _changed(self, node: int) -> int:
        """GPUs of instances that leave or come."""
        want, said = list(self._want[node][1]), self._said.get(node, _EMPTY)[1]
        for tp in said:
            if tp in want:
                want.remove(tp)
        return sum(want) + max(0, sum(said) - sum(self._want[node][1]))

    def _placements(self, name: str, shape: Shape) -> tuple[Placement, ...]:
        if not shape:
            return ()
        index = self._pools[name].index
        return tuple(
            Placement(first, tp, index, 0, "native")
            for first, tp in zip(first_gpus(shape), shape, strict=True)
        )

    # Instance manager: clocks, what the router may choose, emergencies.

    def _manage_instances(self, view: View) -> list[Command]:
        steps_rps = np.array(self._step_sent) / self._manage_period_s
        self._usual += (steps_rps - self._usual) / _SHORT_STEPS
        self._step_sent = [0.0] * len(self._step_sent)
        routes: dict[str, list[_Entry]] = {name: [] for name in self.names}
        clocks: list[tuple[int, int, int]] = []
        self._due_most_tokens[:] = np.inf
        planned = {
            name: sorted(pool.planned, key=lambda kind: -kind.load)
            for name, pool in self._pools.items()
        }
        surges = {
            name: sum(self._surge.get(each, 0.0) for each in pool.serves)
            for name, pool in self._pools.items()
        }
        columns, clocks_mhz = view.instances, self._capacity.profile.clocks_mhz
        for slot in np.flatnonzero(columns.num_gpus).tolist():
            pool = self._by_index.get(int(columns.pool[slot]))
            if pool is None or pool.shapes is None:
                continue
            tp = int(columns.num_gpus[slot])
            place = pool.shapes.tps.index(tp)
            count = min(int(columns.outstanding_requests[slot]), _LAST)
            top = pool.shapes.card(place, self._top)
            # A lull is no reason to slow down: what comes after it would wait.
            load = max(self._sent_load(slot, view.now_s), top.load[count], self._usual[slot])
            top_tps = self._capacity.prefill_tps(pool.name, pool.serves, place)
            least_s = min(self._ttft_s[name] for name in pool.serves or {pool.name})
            clock = self._top
            if self.frequency and self._trouble.get(slot, 0) < _FASTER:
                surge = surges[pool.name] * tp / max(tp, len(pool.nodes) * self._gpus_per_node)
                clock = pool.shapes.clock_for(place, load * (1.0 + self.headroom_frac) + surge)
            clocks.append((slot, tp, clock))
            card = pool.shapes.card(place, clock)
            kind = next((kind for kind in planned[pool.name] if kind.tp == tp), None)
            fill = card.most
            if kind is not None:
                planned[pool.name].remove(kind)
                fill = min(fill, kind.load)
            most = pool.shapes.most[place]
            if self.frequency:
                added_w, most_load = pool.shapes.added_w(place), float(most.max())
            else:
                added_w, most_load = top.slope_w, float(most[-1])
            steps = (STEPS - 1) / max(most_load, 1e-9)
            # Prefill is bound by arithmetic: its time goes as one over the clock.
            tps = top_tps * float(clocks_mhz[clock] / clocks_mhz[-1])
            self._due_most_tokens[slot], self._due_top_tokens[slot] = (
                least_s * tps,
                least_s * top_tps,
            )
            routes[pool.name].append(_Entry(slot, card, fill, top, added_w, steps, tps, top_tps))
        self._routes = routes
        return self._set_clocks(clocks) + self._climb(view)

    def _set_clocks(self, clocks: list[tuple[int, int, int]], why: str = "") -> list[Command]:
        """Lock the GPUs whose clock is to change."""
        gpus: list[int] = []
        values: list[float] = []
        for slot, tp, clock in clocks:
            mhz = float(self._capacity.profile.clocks_mhz[clock]) if clock < self._top else 0.0
            for gpu in range(slot, slot + tp):
                if self._locked.get(gpu, 0.0) != mhz:
                    self._locked[gpu] = mhz
                    gpus.append(gpu)
                    values.append(mhz)
        return [LockClocks(np.array(gpus), np.array(values), why)] if gpus else []

    def _climb(self, view: View) -> list[Command]:
        """The ladder: a rung higher wherever there still is trouble, down at once where not.

        It begins on the second rung: neither order nor clock costs anybody anything.

        There is trouble where the prompts that are due would take an instance longer than the
        shortest limit that it serves, at the clock that it has.
        """
        if not self.rungs:
            return []
        late = np.flatnonzero(view.instances.prefill_due_tokens > self._due_most_tokens)
        before, self._trouble = (
            self._trouble,
            {slot: min(self.rungs, self._trouble.get(slot, 1) + 1) for slot in late.tolist()},
        )
        calm = np.array(sorted(set(before) - set(self._trouble)), dtype=np.int64)
        new = [slot for slot in self._trouble if slot not in before]
        commands: list[Command] = []
        if len(calm):
            commands.append(OrderQueue(calm, "arrival", "calm again"))
        if new:
            commands.append(OrderQueue(np.array(new), "deadline", FASTER_WHY))
        if self.frequency:
            num_gpus = view.instances.num_gpus
            slots = self._on(_FASTER)
            fast = [(slot, int(num_gpus[slot]), self._top) for slot in slots.tolist()]
            commands += self._set_clocks(fast, FASTER_WHY)
            self._due_most_tokens[slots] = self._due_top_tokens[slots]
        if len(stuck := self._on(_SQUASH)):  # before the others leave: they would come back
            commands.append(Squash(stuck, why="past their deadline"))
        if len(stuck := self._on(_RECALL)):
            commands.append(RecallWaiting(stuck, "it does not clear at the highest clock"))
        return commands

    def _on(self, rung: int) -> Ints:
        """Slots that stand on this rung of the ladder or higher."""
        return np.array([s for s, at in self._trouble.items() if at >= rung], dtype=np.int64)
