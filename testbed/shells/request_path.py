"""Requests between coordinator and engines in a virtual run, without messages.

Compiled with the engine (`testbed.core.compiled`): every request of a run passes here four times.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import ClassVar

from emulators.engine import Event
from emulators.server import ServerBank
from testbed.coordinator.building import Answer
from testbed.coordinator.loop import Coordinator
from testbed.core.clock import DELIVERY, SERVING, VirtualScheduler
from testbed.core.messages import Request
from testbed.core.view import Ints


class RequestPath:
    """Requests between coordinator and engines.

    Three queues that are in order of time by themselves (arrivals, requests on their way to an
    engine, news on their way back) and the heap of the engines, beside the scheduler's own.
    """

    WIRED: ClassVar = ("coordinator", "_loop", "_servers", "_delay_s", "_requests", "_next")

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
        self.submits: deque[tuple[float, int, Request, float]] = deque()
        """Due time, engine, request and TTFT promised of what was routed and has not arrived."""
        self.news: deque[tuple[float, int, list[Event]]] = deque()
        """Due time, engine and events of what the coordinator has not heard yet."""

    def skip(self, count: int) -> None:
        """Go on after the first ``count`` requests of the workload, which are played already."""
        while self.arrived < count:
            self.arrived += 1
            self._next = next(self._requests, None)

    def submit(self, instance: int, request: Request, ttft_s: float, now_s: float) -> None:
        """The coordinator sends a request to an instance."""
        self.submits.append((now_s + self._delay_s, instance, request, ttft_s))

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
        dispatcher, layout = self.coordinator.dispatcher, self.coordinator.layout
        spans = [layout.nodes[node].instances for node in layout.instances.node.tolist()]
        firsts: list[int] = [span.start for span in spans]
        stops: list[int] = [span.stop for span in spans]
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
                _, index, sent, ttft_s = submits.popleft()
                events = servers.submit(index, sent, t_s, ttft_s)
                if events:
                    self.tell(index, events, t_s)
            elif what == 2:
                assert request is not None
                self.arrived += 1
                self._next = next(self._requests, None)
                dispatcher.arrive(request, t_s)
            else:
                _, index, events = news.popleft()
                dispatcher.happened(firsts[index], stops[index], events, t_s, t_s)
        if not loop.stopped:
            loop.now_s = max(loop.now_s, until_s)
