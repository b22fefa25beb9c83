"""Virtual time without messages where there are many: requests by direct calls, reports in one.

A message costs some twenty microseconds in objects, envelopes and callbacks, and a request needs
four. Where nothing can delay or lose them at random, the same things happen here at the same
times and in the same order with none of it: a request that is routed at ``t_s`` reaches its engine
at ``t_s + delay_s``, and what becomes of it reaches the coordinator ``delay_s`` after it happened.
A run writes the same bytes either way (tests/rig/test_lean.py). Requests are in
`testbed.shells.request_path`, reports here; what is said seldom (who joins, leases, limits) still
travels as messages.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from daemons.node import NodeDaemon
from daemons.safety import CapGuard
from emulators.engine import Event
from emulators.server import ServerBank
from testbed.coordinator.loop import Coordinator
from testbed.core.clock import DELIVERY, VirtualScheduler
from testbed.core.messages import GpuReadings, InstanceReadings

LEAN_DELAY_S = 0.4
"""Longest delay with which all nodes have joined by time zero, a second after they began to."""


class BankReports:
    """The samples of all nodes as one: every guard looks after its node, and one report says all.

    A node whose limits are where they should be costs a look; only those that move, or whose
    limits somebody else has touched, take the steps that a daemon takes.
    """

    WIRED = (
        "coordinator", "_loop", "_servers", "_daemons", "_guards", "_delay_s", "_tell", "_limits",
        "_node_of",
    )  # fmt: skip

    def __init__(
        self,
        loop: VirtualScheduler,
        servers: ServerBank,
        daemons: list[NodeDaemon],
        guards: list[CapGuard],
        delay_s: float,
        tell: Callable[[int, list[Event], float], None],
    ) -> None:
        self.coordinator: Coordinator
        self._loop = loop
        self._servers = servers
        self._daemons = daemons
        self._guards = guards
        self._delay_s = delay_s
        self._tell = tell
        self._limits = servers.bank.state.control["power_limit_mw"]
        self.left_mw = self._limits.copy()
        """Limits as we left them: whoever finds others there, finds somebody else's."""
        self._node_of = np.repeat(np.arange(len(guards)), len(self._limits) // len(guards))

    def sample(self, now_s: float) -> None:
        """What every node's daemon does once per period, after the physics of that instant."""
        moved = set(self._node_of[self._limits != self.left_mw].tolist())
        for index, guard in enumerate(self._guards):
            if index in moved or not guard.rest(now_s):
                guard.advance(now_s)
                moved.add(index)
        if moved:
            self.left_mw[:] = self._limits
        servers = self._servers
        for index, events in servers.events():
            self._tell(index, events, now_s)
        instances = {name: column.copy() for name, column in servers.read_instances(now_s).items()}
        report = partial(
            self._report,
            servers.read_gpus(),
            InstanceReadings(**instances),
            [guard.drift_total for guard in self._guards],
            now_s,
        )
        self._loop.call_at(now_s + self._delay_s, DELIVERY, report, "reports")
        if self._daemons[0].gaps_due(now_s):
            gaps = servers.drain_gaps()
            deliver = partial(self._gaps, gaps, now_s)
            self._loop.call_at(now_s + self._delay_s, DELIVERY, deliver, "reports")

    def _report(
        self,
        gpus: GpuReadings,
        instances: InstanceReadings,
        drift_totals: list[int],
        t_s: float,
        now_s: float,
    ) -> None:
        self.coordinator.on_bank(gpus, instances, drift_totals, t_s, now_s)

    def _gaps(self, gaps: list[tuple[int, int, int]], t_s: float, now_s: float) -> None:
        self.coordinator.on_gaps(0, gaps, t_s)
