"""Engines of many nodes on one heap: which wakes next, and what happened when it did.

A request costs a push and a pop per block of iterations, however many engines there are: an entry
of the heap that an engine has moved on from is left where it is and ignored when it comes up.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

from emulators.engine import Engine, Event
from testbed.core.messages import Request


class Farm:
    """The engines, by index; `next_s` is when the earliest of them changes by itself.

    Whoever advances an engine by other ways than these (a tick of the physics, an eviction) says
    so with `rearm`.
    """

    def __init__(self, engines: list[Engine], awake: set[int]) -> None:
        self.engines = engines
        self.awake = awake
        """Engines that were given something to do since they were last found idle."""
        self.next_s = math.inf
        self._wakes_s = [math.inf] * len(engines)
        self._heap: list[tuple[float, int]] = []
        for index in range(len(engines)):
            self.rearm(index)

    def submit(
        self, index: int, request: Request, t_s: float, ttft_s: float = math.inf
    ) -> list[Event]:
        """Give an engine a request; returns what came of it at once."""
        engine = self.engines[index]
        engine.submit(request, max(t_s, engine.now_s), ttft_s)
        self.awake.add(index)
        self.rearm(index)
        events = engine.events
        if events:
            engine.events = []
        return events

    def step(self) -> tuple[int, list[Event]]:
        """Let the earliest engine do what is due at `next_s`; returns it and what happened."""
        t_s = self.next_s
        index = self._heap[0][1]
        engine = self.engines[index]
        engine.advance_to(t_s)
        wake_s = engine.next_event_s
        self._wakes_s[index] = wake_s
        if wake_s < math.inf:
            heapq.heapreplace(self._heap, (wake_s, index))
        else:
            heapq.heappop(self._heap)
        self._settle()
        events = engine.events
        if events:
            engine.events = []
        return index, events

    def advance_to(self, t_s: float) -> list[Event]:
        """Let happen what is due by ``t_s``, for callers whom the order does not matter."""
        happened: list[Event] = []
        while self.next_s <= t_s:
            happened += self.step()[1]
        return happened

    def rearm(self, index: int) -> None:
        """An engine may want to wake at another time than before."""
        wake_s = self.engines[index].next_event_s
        if wake_s != self._wakes_s[index]:
            self._wakes_s[index] = wake_s
            if wake_s < math.inf:
                heapq.heappush(self._heap, (wake_s, index))
            self._settle()

    def _settle(self) -> None:
        """Drop entries that no longer hold from the top of the heap."""
        heap, wakes_s = self._heap, self._wakes_s
        while heap and wakes_s[heap[0][1]] != heap[0][0]:
            heapq.heappop(heap)
        self.next_s = heap[0][0] if heap else math.inf


# What a tick and a sample ask of every engine: loops over engines, which compile well.


def work_at(engines: Sequence[Engine], which: list[int], t_s: float) -> list[float]:
    """Busy seconds, FLOPs and bytes since its start of each of some engines, one after the other.

    The engines are advanced to ``t_s``.
    """
    flat: list[float] = []
    for index in which:
        engine: Engine = engines[index]
        if engine.next_event_s <= t_s:
            engine.advance_to(t_s)
        encode_s, prefill_s, decode_s, flops, hbm_bytes = engine.totals(t_s)
        flat.append(encode_s + prefill_s + decode_s)
        flat.append(flops)
        flat.append(hbm_bytes)
    return flat


def readings_at(engines: Sequence[Engine], t_s: float) -> list[object]:
    """What `testbed.core.messages.InstanceReadings` says of each engine, one after the other."""
    flat: list[object] = []
    for one in engines:
        engine: Engine = one
        flat.append(engine.num_running)
        flat.append(engine.num_waiting)
        flat.append(engine.kv_used_blocks(t_s) / engine.kv_blocks)
        flat.append(engine.prompt_tokens_total)
        flat.append(engine.output_tokens_total(t_s))
        flat.append(engine.preemptions_total)
    return flat
