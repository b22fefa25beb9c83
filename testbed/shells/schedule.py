"""Who is called when: the coordinator and the node daemons on any scheduler.

Their steps are told the time; here is what calls them. Nothing in this file knows whether time
jumps or passes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

from daemons.node import NodeDaemon
from emulators.profiles import GpuProfile
from testbed.coordinator.loop import Coordinator
from testbed.core.clock import (
    CONTROL,
    DELIVERY,
    SERVING,
    Callback,
    LiveScheduler,
    Scheduler,
    VirtualScheduler,
)
from testbed.core.messages import Envelope, Report, RowReport
from testbed.core.spec import RunSpec
from testbed.recorder.writer import Recorder

Progress = Callable[["Status"], None]
Waiting = tuple[str, Envelope | None]
"""What a callback on the scheduler will do, and with which message."""


@dataclass(slots=True)
class Status:
    """Where a run stands, for a progress display."""

    now_s: float
    duration_s: float
    wall_s: float
    """Since this process began or went on with the run, at ``from_s`` of its time."""
    arrived: int
    ended: int
    in_flight: int
    nodes: int
    num_nodes: int
    power_w: float
    from_s: float = 0.0

    @property
    def left_s(self) -> float:
        """Wall time that the rest of the duration takes at the pace so far; NaN before any."""
        done_s = self.now_s - self.from_s
        if done_s <= 0:
            return math.nan
        return max(0.0, self.duration_s - self.now_s) / done_s * self.wall_s


@dataclass(slots=True)
class Parts:
    """What a run is put together from."""

    spec: RunSpec
    controllers: list[Any]
    router: Any
    requests: Iterator[Any]
    profile: GpuProfile
    progress: Progress
    records: Recorder = field(init=False)
    checkpoint: bytes | None = None
    """Go on from here."""

    @property
    def folder(self) -> Path:
        """Where it is recorded."""
        return self.records.folder


class NodeSchedule:
    """A node daemon with its schedule: who is called when, on any scheduler."""

    WIRED = ("daemon", "_loop")

    def __init__(self, daemon: NodeDaemon, loop: Scheduler) -> None:
        self.daemon = daemon
        self._loop = loop
        self._wake_s = math.inf

    def deliver(self, envelope: Envelope, due_s: float) -> None:
        """A message has arrived that is due at ``due_s``."""
        self._loop.call_at(due_s, DELIVERY, partial(self._take, envelope))

    def _take(self, envelope: Envelope, now_s: float) -> None:
        self.daemon.on_message(envelope, now_s)
        self.rearm()

    def _serve(self, now_s: float) -> None:
        if now_s != self._wake_s:
            return  # an earlier wake-up has replaced this one
        self._wake_s = math.inf
        self.daemon.serve(now_s)
        self.rearm()

    def sample(self, now_s: float, late_s: float = 0.0) -> None:
        """One sample, after the physics of the same instant."""
        self.daemon.sample(now_s, late_s)
        self.rearm()

    def rearm(self) -> None:
        """Be woken when the instances want to be."""
        next_s = max(self.daemon.next_serving_s, self._loop.now_s)
        if next_s < self._wake_s:
            self._wake_s = next_s
            self._loop.call_at(next_s, SERVING, self._serve, self.daemon.name)

    # For checkpoints: what waits on the scheduler, as data.

    def told(self, callback: Callback) -> Waiting | None:
        """What a callback of ours will do; None if it is somebody else's."""
        if callback == self._serve:
            return "serve", None
        if isinstance(callback, partial) and callback.func == self._take:
            return "take", callback.args[0]
        return None

    def again(self, told: Waiting) -> Callback:
        """The callback that does it."""
        _, envelope = told
        return self._serve if envelope is None else partial(self._take, envelope)


_source = attrgetter("source")
_TOGETHER_MAX = 500
"""Reports taken in at a time: a live loop looks at its sockets in between, for what is urgent."""


class Desk:
    """The coordinator with its schedule."""

    def __init__(self, parts: Parts, loop: VirtualScheduler | LiveScheduler) -> None:
        self._parts = parts
        self._loop = loop
        self._period_s = parts.spec.control.sample_period_s
        # In live runs between two samples: what a policy sees is then as old as the wire made it,
        # not a period older, and what it changes leaves while no reports arrive.
        self._phase_s = self._period_s / 2 if isinstance(loop, LiveScheduler) else 0.0
        self.ticks = 0
        self.on_tick: Callable[[float], object] = lambda now_s: None
        """Called at each tick, after everything else."""
        self._started = time.monotonic()
        self._shown = self._flushed = 0.0
        self.from_s = 0.0
        """Where this process took up the run: its zero, or a checkpoint."""
        self._reports: dict[tuple[float, float], list[Envelope]] = {}
        self.coordinator: Coordinator

    def deliver(self, envelope: Envelope, due_s: float) -> None:
        """A message has arrived that is due at ``due_s``."""
        if isinstance(envelope.body, Report | RowReport):
            self.deliver_reports([envelope], due_s)
            return
        take = partial(self.coordinator.on_message, envelope)
        self._loop.call_at(due_s, DELIVERY, take, envelope.source)

    def deliver_reports(self, words: list[Envelope], due_s: float) -> None:
        """Reports of one moment, of nodes or rows: all that are due together are taken in together,
        which costs a tenth."""
        moment = (due_s, words[0].t_s)
        others = self._reports.get(moment)
        if others is None:
            self._reports[moment] = words
            self._loop.call_at(due_s, DELIVERY, partial(self._take_reports, moment))
        else:
            others += words

    def _take_reports(self, moment: tuple[float, float], now_s: float) -> None:
        words = self._reports.pop(moment)
        words.sort(key=_source)  # the order in which they came is the network's affair
        some = _TOGETHER_MAX
        if type(words[0].body) is RowReport:
            some = 1 + some // (1 + len(words[0].body.node))
        due_s, t_s = moment
        for first in range(some, len(words), some):
            part = words[first : first + some]
            self._loop.call_at(due_s, DELIVERY, partial(self.coordinator.on_reports, part, t_s))
        self.coordinator.on_reports(words[:some], t_s, now_s)

    # For checkpoints, as those of `NodeSchedule`.

    def told(self, callback: Callback) -> Waiting | None:
        """What a callback of ours will do, ticks apart; None if it is somebody else's."""
        if not isinstance(callback, partial):
            return None
        if callback.func == self._arrive:
            return "arrive", None
        if callback.func == self.coordinator.on_message:
            return "message", callback.args[0]
        return None

    def again(self, told: Waiting) -> Callback:
        """The callback that does it; of an arrival, the next of the workload."""
        kind, envelope = told
        if kind == "arrive":
            return partial(self._arrive, next(self._parts.requests))
        assert envelope is not None
        return partial(self.coordinator.on_message, envelope)

    def skip(self, count: int) -> None:
        """Go on after the first ``count`` requests of the workload, which have arrived already."""
        for _ in range(count):
            next(self._parts.requests)

    def begin(self, *, arrivals: bool = True) -> None:
        """Start ticks and, unless somebody else brings the requests, arrivals."""
        self._started = time.monotonic()
        if arrivals:
            self._next_arrival()
        self._call_tick()

    def _call_tick(self) -> None:
        self._loop.call_at(self.ticks * self._period_s + self._phase_s, CONTROL, self._tick)

    def _next_arrival(self) -> None:
        request = next(self._parts.requests, None)
        if request is None:
            return
        self._loop.call_at(request.arrival_s, DELIVERY, partial(self._arrive, request))

    def _arrive(self, request: Any, now_s: float) -> None:
        self.coordinator.on_arrival(request, now_s)
        self._next_arrival()

    def _tick(self, now_s: float) -> None:
        coordinator, spec = self.coordinator, self._parts.spec
        coordinator.tick(now_s)
        coordinator.control(now_s)
        wall = time.monotonic() - self._started
        if wall - self._flushed >= 0.5:
            self._flushed = wall
            self._parts.records.flush(now_s)
        if wall - self._shown >= 1.0:
            self._shown = wall
            self._parts.progress(self.status(now_s))
        over = now_s >= spec.duration_s - 1e-9 and not coordinator.dispatcher.in_flight
        if over or now_s >= spec.duration_s + spec.drain_s - 1e-9:
            self._loop.stop()
            return
        self.ticks += 1
        self._call_tick()
        self.on_tick(now_s)

    def status(self, now_s: float) -> Status:
        """For a progress display."""
        coordinator, gpus = self.coordinator, self.coordinator.view.gpus
        return Status(
            now_s=now_s,
            duration_s=self._parts.spec.duration_s,
            wall_s=time.monotonic() - self._started,
            arrived=coordinator.dispatcher.arrived_total,
            ended=coordinator.dispatcher.ended_total,
            in_flight=len(coordinator.dispatcher.in_flight),
            nodes=coordinator.num_live,
            num_nodes=len(coordinator.layout.nodes),
            power_w=float(gpus.power_avg_w.sum()),
            from_s=self.from_s,
        )
