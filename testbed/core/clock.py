"""The event loop is the clock: what happens next, and how one waits for it.

`Scheduler` holds callbacks with their due times and runs them in order of (due time, order, how
they were entered). Each callback is told the time that it was due, not what a clock shows, so the
control plane computes the same in every mode. `VirtualScheduler` jumps to the next due time;
`LiveScheduler` waits for it on the machine's monotonic clock, polls its inputs while it waits, and
keeps account of how late it was (openpilot's rule: make clock mistakes show themselves).

``order`` ranks what is due at one instant: physics before sampling, messages before decisions.

>>> loop = VirtualScheduler()
>>> seen = []
>>> loop.call_at(2.0, CONTROL, seen.append)
>>> loop.call_at(2.0, PHYSICS, seen.append)
>>> loop.call_at(1.0, CONTROL, seen.append)
>>> loop.run(until_s=10.0)
>>> seen, loop.now_s
([1.0, 2.0, 2.0], 10.0)
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import heapq
import math
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

Callback = Callable[[float], object]

# Ranks at one instant, lowest first.
PHYSICS = 0
SERVING = 1
DELIVERY = 2
SAMPLE = 3
CONTROL = 4
HOUSEKEEPING = 5


class Scheduler(Protocol):
    """What code that makes things happen later needs to know of a clock."""

    now_s: float

    def call_at(self, t_s: float, order: int, callback: Callback, key: str = "") -> None:
        """Run ``callback(t_s)`` at ``t_s``; ties go by ``order``, then ``key``, then entry."""
        ...


class VirtualScheduler:
    """Time that jumps from one event to the next."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.stopped = False
        self.heap: list[tuple[float, int, str, int, Callback]] = []
        """What is to come: due time, order, key, number of the entry, callback."""
        self._entered = 0

    def call_at(self, t_s: float, order: int, callback: Callback, key: str = "") -> None:
        """Run ``callback(t_s)`` at ``t_s``, or as soon as possible if that has passed."""
        if math.isnan(t_s):
            raise ValueError("t_s is not a number")
        self._entered += 1
        heapq.heappush(self.heap, (max(t_s, self.now_s), order, key, self._entered, callback))

    def stop(self) -> None:
        """Leave `run` after the current callback."""
        self.stopped = True

    def run(self, until_s: float) -> None:
        """Run everything due up to and at ``until_s``, and leave the clock there."""
        heap = self.heap
        self.resume()
        while heap and heap[0][0] <= until_s and not self.stopped:
            self.step()
        if not self.stopped:
            self.now_s = max(self.now_s, until_s)

    def resume(self) -> None:
        """Take back an earlier `stop`."""
        self.stopped = False

    def step(self) -> None:
        """Run what is due next."""
        t_s, _, _, _, callback = heapq.heappop(self.heap)
        self.now_s = t_s
        callback(t_s)


@contextlib.contextmanager
def rare_collections() -> Iterator[None]:
    """Look for cyclic garbage seldom: a run makes next to none, and a look costs an eighth of it.

    What has been built by now lives as long as the run and is not looked at again.
    """
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(200_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


class Lateness:
    """How late a live loop ran its callbacks: a histogram, so that it never grows.

    Bins are 10 % wide from 1 us to about 1,000 s; a percentile is the upper edge of its bin.

    >>> late = Lateness(miss_s=0.1)
    >>> for late_s in [0.001] * 99 + [0.5]:
    ...     late.add(late_s)
    >>> 0.001 <= late.percentile_s(0.5) < 0.0011, late.missed_total, late.max_s
    (True, 1, 0.5)
    >>> (late + late).events_total
    200
    """

    _WIDTH = math.log(1.1)
    _BINS = 220

    def __init__(self, miss_s: float) -> None:
        self.miss_s = miss_s
        self.events_total = 0
        self.missed_total = 0
        self.max_s = 0.0
        self._counts = [0] * self._BINS

    def add(self, late_s: float) -> None:
        """Count one event that ran ``late_s`` after it was due."""
        self.events_total += 1
        if late_s > self.max_s:
            self.max_s = late_s
        if late_s > self.miss_s:
            self.missed_total += 1
        place = 0 if late_s <= 1e-6 else 1 + int(math.log(late_s * 1e6) / self._WIDTH)
        self._counts[min(place, self._BINS - 1)] += 1

    def __add__(self, other: Lateness) -> Lateness:
        """Both together."""
        both = Lateness(self.miss_s)
        both.events_total = self.events_total + other.events_total
        both.missed_total = self.missed_total + other.missed_total
        both.max_s = max(self.max_s, other.max_s)
        both._counts = [a + b for a, b in zip(self._counts, other._counts, strict=True)]
        return both

    def facts(self) -> dict[str, float]:
        """What there is to say; times in seconds."""
        return {
            "late_p50_s": self.percentile_s(0.5),
            "late_p99_s": self.percentile_s(0.99),
            "late_max_s": self.max_s,
            "events_total": self.events_total,
            "missed_total": self.missed_total,
        }

    def percentile_s(self, frac: float) -> float:
        """Lateness that a share ``frac`` of the events did not exceed; 0 without events."""
        if not self.events_total:
            return 0.0
        place = int(np.searchsorted(np.cumsum(self._counts), frac * self.events_total))
        return float(min(1e-6 * math.exp(place * self._WIDTH), self.max_s))


class Lane:
    """A schedule of its own on a `LiveScheduler`: what one of several nodes of a process does.

    Within a lane things happen in order of (due time, order, key, entry); lanes do not wait for
    each other.

    Args:
        loop: runs it.
        early_s: physics and samples, which take long, may run this much before they are due, if
            nothing of their lane is due before them. They compute what they would have computed
            then; only a message that comes later than agreed could tell the difference.
    """

    def __init__(self, loop: LiveScheduler, early_s: float = 0.0) -> None:
        self.now_s = 0.0
        self.early_s = early_s
        self.heap: list[_Entry] = []
        """What is to come."""
        self._loop = loop

    def call_at(self, t_s: float, order: int, callback: Callback, key: str = "") -> None:
        """Run ``callback(t_s)`` at ``t_s``, or as soon as possible if that has passed."""
        if math.isnan(t_s):
            raise ValueError("t_s is not a number")
        number = self._loop.number()
        heapq.heappush(self.heap, (max(t_s, self.now_s), order, key, number, callback))


_Entry = tuple[float, int, str, int, Callback]


class LiveScheduler(Lane):
    """The machine's monotonic clock, zero at ``start_ns``; itself the first of its lanes.

    ``poll(timeout_s)`` is called while waiting and may block that long; it is where sockets are
    read. Below `_FINE_S` the wait is a plain sleep, since socket polls count in milliseconds.
    """

    _FINE_S = 0.0015
    _DEAF_S = 0.002  # how long a loop that has much to do leaves its inputs alone
    _WAKE_S = 15e-6  # how much a short sleep overshoots with fine timers; the loop then spins

    def __init__(
        self, poll: Callable[[float], None], *, start_ns: int | None = None, miss_s: float = 0.05
    ) -> None:
        super().__init__(self)
        self.stopped = False
        self.start_ns = time.monotonic_ns() if start_ns is None else start_ns
        self.late_by_order = [Lateness(miss_s) for _ in range(HOUSEKEEPING)]
        """Of what has a place in the run: physics, serving, deliveries, samples, decisions."""
        self._lanes: list[Lane] = [self]
        self._entered = 0
        self._poll = poll
        self._polled_s = -math.inf

    def lane(self, early_s: float = 0.0) -> Lane:
        """Another lane."""
        made = Lane(self, early_s)
        made.now_s = self.now_s
        self._lanes.append(made)
        return made

    def number(self) -> int:
        """Counts entries over all lanes."""
        self._entered += 1
        return self._entered

    def _next(self, wall_s: float) -> tuple[float, Lane]:
        """When something is to run next, and in which lane.

        Of what is due, the earliest; if nothing is, what may run before it is.
        """
        due_s = early_s = math.inf
        due: Lane = self
        early: Lane = self
        for lane in self._lanes:
            if lane.heap:
                t_s, order = lane.heap[0][:2]
                if lane.early_s and order in (PHYSICS, SAMPLE) and t_s > wall_s:
                    if t_s - lane.early_s < early_s:
                        early_s, early = t_s - lane.early_s, lane
                elif t_s < due_s:
                    due_s, due = t_s, lane
        return (due_s, due) if due_s <= wall_s or due_s <= early_s else (early_s, early)

    def stop(self) -> None:
        """Leave `run` after the current callback."""
        self.stopped = True

    @property
    def lateness(self) -> Lateness:
        """Of all of it together, up to now."""
        first, *rest = self.late_by_order
        return sum(rest, start=first)

    def wall_s(self) -> float:
        """Seconds since the run's start by the machine's clock."""
        return (time.monotonic_ns() - self.start_ns) * 1e-9

    def restart(self, start_ns: int) -> None:
        """Move zero to ``start_ns``, once a node has learned it. What is pending keeps its time."""
        self.start_ns = start_ns
        now_s = max(0.0, self.wall_s())
        for lane in self._lanes:
            lane.now_s = now_s
        self._polled_s = -math.inf

    def breathe(self) -> bool:
        """Look at the inputs in the middle of long work, unless that was just done; True if so.

        What comes in is entered and acts later, as ever, unless its receiver does otherwise.
        """
        if self.wall_s() - self._polled_s <= self._DEAF_S:
            return False
        self._poll(0.0)
        self._polled_s = self.wall_s()
        return True

    def run(self, until_s: float) -> None:
        """Run everything as it falls due until the clock shows ``until_s`` or `stop` is called."""
        self.stopped = False
        fine_timers()
        while not self.stopped:
            wall_s = self.wall_s()
            start_s, lane = self._next(wall_s)
            if start_s <= min(wall_s, until_s):
                # Arrivals first, now and then: a loop that is behind must not go deaf. Counted
                # from the end of a poll: a long one must not keep waiting what is due.
                if self.breathe():
                    _, lane = self._next(wall_s)
                t_s, order, _, _, callback = heapq.heappop(lane.heap)
                lane.now_s = max(lane.now_s, t_s)
                if order != HOUSEKEEPING:
                    self.late_by_order[order].add(max(0.0, wall_s - t_s))
                callback(t_s)
            elif wall_s >= until_s:
                for lane in self._lanes:
                    lane.now_s = max(lane.now_s, until_s)
                break
            else:
                wait_s = min(start_s, until_s) - wall_s
                if wait_s > self._FINE_S:
                    self._poll(min(wait_s - 0.001, 0.05))
                    self._polled_s = self.wall_s()
                elif wait_s > self._WAKE_S:
                    time.sleep(wait_s - self._WAKE_S)


_PR_SET_TIMERSLACK = 29


def fine_timers() -> None:
    """Have sleeps of this thread end when they should: by default Linux lets them be 50 us late.

    Instances that share a core are late by each other's spinning, so a loop must not spin for long
    either. Where there is no such call, sleeps stay coarse.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(1), 0, 0, 0)


class ClockSync:
    """Offset between a node's monotonic clock and the coordinator's, by Cristian's method.

    Of several round trips the shortest bounds the error best: half of it.

    >>> sync = ClockSync()
    >>> sync.add(sent_ns=0, answered_ns=1_000_500, received_ns=1_000)
    >>> sync.add(sent_ns=5_000, answered_ns=1_009_000, received_ns=9_000)
    >>> sync.offset_ns, round(sync.error_s, 9)
    (1000000, 5e-07)
    """

    def __init__(self) -> None:
        self.offset_ns = 0
        self.error_s = math.inf
        self.answers = 0

    def add(self, sent_ns: int, answered_ns: int, received_ns: int) -> None:
        """Take in one ping: our times of sending and receiving, and theirs of answering."""
        self.answers += 1
        error_s = (received_ns - sent_ns) * 0.5e-9
        if error_s < self.error_s:
            self.error_s = error_s
            self.offset_ns = answered_ns - (sent_ns + received_ns) // 2
