"""DynamoLLM: reconfigure a serving cluster so that it meets its latency limits for less energy.

After "DynamoLLM: Designing LLM Inference Clusters for Performance and Energy Efficiency" (HPCA
2025). Requests fall into nine classes by input and (predicted) output length, each with a pool of
nodes. Three controllers act on different periods:

- the cluster manager (30 min) gives nodes to pools for the peak it predicts (`cluster`);
- the pool manager (5 min) cuts a pool's GPUs into instances of 2, 4 or 8 by an integer program
  over profiles of energy and latency (`pool`);
- the instance manager (5 s) sets each instance's clock to the cheapest that meets the limits.

The router sends a request to the instance of its pool whose power grows least, within the limits,
and spills to larger pools. When queues form all the same, a ladder of emergency measures begins:
order by deadline, highest clock, send elsewhere, drop what is past its deadline.

Each part is a switch; with all off this is one pool of whole nodes, provisioned for the peak, at
the highest clock. Use it as controller and as router: ``use = "dynamollm"`` in both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

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
from testbed.policies.dynamollm.capacity import Capacity, Card, Shapes, Slack
from testbed.policies.dynamollm.classes import CLASSES, Predictor, larger
from testbed.policies.dynamollm.cluster import ALL, Mix, nodes_for, spread
from testbed.policies.dynamollm.forecast import Forecast
from testbed.policies.dynamollm.layout import Shape, first_gpus, fit
from testbed.policies.dynamollm.pool import Kind, kinds_of, plan
from testbed.policies.serving_profile import ServingProfile, Sweep

_SMOOTH = 0.4
"""Weight of the last step in an instance's load."""
_FULLER = 1.1
"""How far above its planned load the router fills an instance before it looks elsewhere."""
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


@dataclass(slots=True)
class _Entry:
    """An instance that the router may choose."""

    slot: int
    card: Card
    fill: float
    """Load up to which it is to be filled, in nodes."""
    top: Card
    """Its card at the highest clock."""


class DynamoLLM:
    """See the module's story.

    Args:
        pools: nine pools by class; else one for all.
        instances: nodes follow the predicted load; else they are provisioned for the peak.
        sharding: the pool manager may use 2 and 4 GPUs per instance.
        frequency: the instance manager may lower clocks.
        ladder: emergency measures.
        predictor_error: share of requests whose output class is mispredicted.
        headroom_frac: capacity beyond the predicted load.
        peak_factor: provisioning over the predicted peak, where nodes do not follow the load.
        ttft_slack, tpot_slack: share of each latency limit that plans may use.
        template_rps: rate of all requests usual in each window from the run's start.
        template_window_s: length of a window.
        start: how nodes that were given back come up: from a snapshot, or cold.
        lead_s: how long before its epoch the cluster manager starts nodes.
        empty_w: draw of a GPU without an instance, for the pool manager.
        period_s, pool_period_s, cluster_period_s: of the three controllers.
        seed: of the predictor's errors.
    """

    sweep = Sweep()

    def __init__(
        self,
        *,
        pools: bool = True,
        instances: bool = True,
        sharding: bool = True,
        frequency: bool = True,
        ladder: bool = True,
        predictor_error: float = 0.0,
        headroom_frac: float = 0.1,
        peak_factor: float = 1.0,
        ttft_slack: float = 1.0,
        tpot_slack: float = 1.0,
        template_rps: Sequence[float] = (),
        template_window_s: float = 300.0,
        start: Literal["snapshot", "cold"] = "snapshot",
        lead_s: float = 0.0,
        empty_w: float = 0.0,
        period_s: float = 5.0,
        pool_period_s: float = 300.0,
        cluster_period_s: float = 1800.0,
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
        if headroom_frac < 0 or peak_factor <= 0 or ttft_slack <= 0 or tpot_slack <= 0:
            raise ValueError("headroom_frac must be >= 0, peak_factor and slacks above 0")
        self.instances, self.sharding = instances, sharding
        self.frequency, self.ladder = frequency, ladder
        self.headroom_frac, self.peak_factor = headroom_frac, peak_factor
        self.period_s, self.pool_period_s = period_s, pool_period_s
        self.cluster_period_s, self.lead_s, self.start = cluster_period_s, lead_s, start
        self.empty_w = empty_w
        self.names = CLASSES if pools else (ALL,)
        self._slack = Slack(ttft_slack, tpot_slack)
        self._template = (list(template_rps), template_window_s)
        self._predictor = Predictor(predictor_error, seed)
        self._next_cluster_s = self._next_pool_s = -math.inf
        self._began = False
        self._shape: dict[int, Shape] = {}
        self._asked: dict[int, tuple[int, Shape]] = {}
        self._waiting: list[int] = []
        self._routes: dict[str, list[_Entry]] = {}
        self._trouble: dict[int, int] = {}
        self._clock: dict[int, int] = {}

    def learn(self, profile: ServingProfile) -> None:
        """Take the profile that plans are made with."""
        self._capacity = Capacity(profile, self._slack)
        self._top = len(profile.clocks_mhz) - 1
        self._shares = np.array([profile.shares[profile.classes.index(n)] for n in self.names])
        self._weights = [1.0 / self._capacity.node_rps[name] for name in self.names]
        self._class_index = {name: place for place, name in enumerate(self.names)}
        template_rps, window_s = self._template
        self._forecast = Forecast(
            len(self.names),
            step_s=self.period_s,
            keep_s=self.cluster_period_s,
            template_rps=template_rps,
            window_s=window_s,
            shares=self._shares,
        )
        self._arrived = [0.0] * len(self.names)

    # Routing.

    def route(self, request: Request, view: View) -> int | None:
        """The instance whose power grows least, in the predicted class's pool or a larger one."""
        if not self._began:
            return None
        name = ALL
        if len(self.names) > 1:
            name = self._predictor.class_of(request.prompt_tokens, request.output_tokens)
        place = self._class_index[name]
        self._arrived[place] += 1.0
        chosen = self._choose(name, view)
        if chosen is not None:
            self._sent[chosen] += self._weights[place]
        return chosen

    def _choose(self, name: str, view: View) -> int | None:
        up, running = view.instances.up, view.instances.outstanding_requests
        fallback, crowded = -1, math.inf
        for pool in (name, *(larger(name) if name != ALL else ())):
            best, least_w = -1, math.inf
            for entry in self._routes.get(pool, ()):
                slot = entry.slot
                if not up[slot]:
                    continue
                count = min(int(running[slot]) + 1, _LAST)
                card = entry.card
                if card.load[count] <= entry.fill:
                    if card.slope_w[count] < least_w:
                        best, least_w = slot, card.slope_w[count]
                elif best < 0:
                    share = entry.top.load[count] / max(entry.top.most, 1e-9)
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
        if not self._began:
            self._begin(view)
        else:
            self._forecast.add(np.array(self._arrived))
        self._arrived = [0.0] * len(self.names)
        commands: list[Command] = []
        if now_s >= self._next_cluster_s - 1e-9:
            self._provision(now_s, view)
            late = now_s - self._epoch_s(now_s)
            commands += self._lend(keep=self.lead_s > 0 and late < -1e-9)
        if now_s >= self._next_pool_s - 1e-9:
            self._next_pool_s = now_s + self.pool_period_s
            self._reshape(now_s)
        commands += self._apply()
        commands += self._tune(view)
        return commands

    def _begin(self, view: View) -> None:
        self._began = True
        self._nodes = sorted(set(view.gpus.node.tolist()))
        self._gpus_per_node = int(np.bincount(view.gpus.node)[0])
        self._sent = np.zeros(len(view.instances.name))
        self._load = np.zeros(len(view.instances.name))
        self._pools = {
            name: _Pool(name, view.pools.index(name)) for name in self.names if name in view.pools
        }
        missing = [name for name in self.names if name not in view.pools]
        if missing:
            raise ValueError(f"the run file has no pool named {', '.join(missing)}")

    # Cluster manager.

    def _epoch_s(self, now_s: float) -> float:
        """Start of the epoch that is being planned for."""
        return self._planned_epoch * self.cluster_period_s

    def _provision(self, now_s: float, view: View) -> None:
        ...
