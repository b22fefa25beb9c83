"""Virtual time without messages where there are many: requests by direct calls, reports in one.

A message costs some twenty microseconds in objects, envelopes and callbacks, and a request needs
four. Where nothing can delay or lose them at random, the same things happen here at the same
times and in the same order with none of it: a request that is routed at ``t_s`` reaches its engine
at ``t_s + delay_s``, and what becomes of it reaches the coordinator ``delay_s`` after it happened.
A run writes the same bytes either way (tests/rig/test_lean.py). What is said seldom (who joins,
leases, limits) still travels as messages.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from daemons.node import NodeDaemon
from daemons.safety import CapGuard
from emulators.engine import Event
from emulators.server import ServerBank
from testbed.coordinator.building import Answer
from testbed.coordinator.cluster import Node
from testbed.coordinator.loop import Coordinator
from testbed.core.clock import DELIVERY, SERVING, VirtualScheduler
from testbed.core.messages import GpuReadings, InstanceReadings, Request, Submit
from testbed.core.view import Ints

LEAN_DELAY_S = 0.4
"""Longest delay with which all nodes have joined by time zero, a second after they began to."""


class RequestPath:
    """Requests between coordinator and engines.

    Three queues that are in order of time by themselves (arrivals, requests on their way to an
    engine, news on their way back) and the heap of the engines, beside the scheduler's own.
    """

    WIRED = ("coordinator", "_loop", "_servers", "_delay_s", "_requests", "_next")

    def __init__(
        self,
        loop: VirtualScheduler,
        servers: ServerBank,
        delay_s: float,
        requests: Iterator[Request],
    ) -> None:
        self.coordinator: Coordinator
        self.arrived = 0
        """Requests taken from the workload and handed to the coordinator."""
        self._loop = loop
        self._servers = servers
        self._delay_s = delay_s
        self._requests = requests
        self._next = next(requests, None)
        self.submits: deque[tuple[float, int, Submit]] = deque()
        """Due time and engine of what was routed and has not arrived there yet."""
        self.news: deque[tuple[float, int, list[Event]]] = deque()
        """Due time, engine and events of what the coordinator has not heard yet."""

    def skip(self, count: int) -> None:
        """Go on after the first ``count`` requests of the workload, which are played already."""
        while self.arrived < count:
            self.arrived += 1
            self._next = next(self._requests, None)

    def submit(self, node: Node, body: Submit, now_s: float) -> None:
        """The coordinator sends a request to a node."""
        index = node.instances.start + body.instance
        self.submits.append((now_s + self._delay_s, index, body))

    def surround(self, nodes: Ints, answer: Answer, now_s: float) -> None:
        """The coordinator tells nodes what the building does to them."""
        deliver = partial(self._surround, nodes, answer.at(nodes))
        self._loop.call_at(now_s + self._delay_s, DELIVERY, deliver)

    def _surround(self, nodes: Ints, answer: Answer, now_s: float) -> None:
        self._servers.surround_nodes(nodes, *answer)

    def tell(self, index: int, events: list[Event], now_s: float) -> None:
        """An engine has news for the coordinator."""
        self.news.append((now_s + self._delay_s, index, events))

    def run(self, until_s: float) -> None:
        """As `VirtualScheduler.run`, with requests."""
        loop, servers, farm = self._loop, self._servers, self._servers.farm()
        heap, submits, news = loop.heap, self.submits, self.news
        coordinator = self.coordinator
        nodes, node_of = coordinator.layout.nodes, coordinator.layout.instances.node.tolist()
        loop.resume()
        while not loop.stopped:
            # Who is first? At one instant: engines, what reaches them, arrivals, news.
            t_s, rank, what = farm.next_s, SERVING, 0
            if submits and submits[0][0] < t_s:
                t_s, rank, what = submits[0][0], DELIVERY, 1
            request = self._next
            if request is not None and request.arrival_s < t_s:
                t_s, rank, what = request.arrival_s, DELIVERY, 2
            if news and news[0][0] < t_s:
                t_s, rank, what = news[0][0], DELIVERY, 3
            if heap and (heap[0][0] < t_s or (heap[0][0] == t_s and heap[0][1] < rank)):
                if heap[0][0] > until_s:
                    break
                loop.step()
                continue
            if t_s > until_s or t_s == math.inf:
                break
            loop.now_s = t_s
            if what == 0:
                index, events = farm.step()
                if events:
                    self.tell(index, events, t_s)
            elif what == 1:
                _, index, body = submits.popleft()
                events = servers.submit(index, body.request, t_s, body.ttft_s)
                if events:
                    self.tell(index, events, t_s)
            elif what == 2:
                assert request is not None
                self.arrived += 1
                self._next = next(self._requests, None)
                coordinator.on_arrival(request, t_s)
            else:
                _, index, events = news.popleft()
                coordinator.on_happened(nodes[node_of[index]], events, t_s)
        if not loop.stopped:
            loop.now_s = max(loop.now_s, until_s)


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
