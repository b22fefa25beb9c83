"""Checkpoints of a virtual run: all that it will be decided by, as plain data, and back.

One is taken half-way between two ticks, when what nodes said at the last one has arrived. On the
scheduler are then the two next ticks and, where requests travel as messages, those on their way,
the next arrival and the times at which nodes want to be woken: each can say what it is. What the
run file and the handshake determine is not kept but made anew: each class names it in its ``WIRED``
(`testbed.core.freeze`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from daemons.safety import CapGuard
from emulators.server import ServerBank
from testbed.core.clock import CONTROL, HOUSEKEEPING, PHYSICS, VirtualScheduler
from testbed.core.errors import SpecError
from testbed.core.freeze import freeze, put_back
from testbed.core.spec import RunSpec
from testbed.recorder.writer import Recorder
from testbed.shells.lean import LEAN_DELAY_S, BankReports
from testbed.shells.request_path import RequestPath
from testbed.shells.schedule import Desk, NodeSchedule, Waiting


@dataclass(slots=True)
class Stage:
    """The parts of a virtual run that have a state."""

    spec: RunSpec
    records: Recorder
    loop: VirtualScheduler
    servers: ServerBank
    nodes: list[NodeSchedule]
    guards: list[CapGuard]
    desk: Desk
    controllers: list[Any]
    router: Any
    path: RequestPath | None
    reports: BankReports | None
    """How requests and reports travel where there are no messages for them."""


def check(spec: RunSpec) -> None:
    """Refuse checkpoints of runs whose state is spread wider than this file knows.

    Raises:
        SpecError: says what is in the way.
    """
    period_s, transport = spec.control.sample_period_s, spec.transport
    if transport.jitter_s or transport.loss_frac or spec.tenants.per_node:
        raise SpecError(
            "run spec: record.checkpoint_s: not with transport.jitter_s, transport.loss_frac or "
            "memory tenants"
        )
    most_s = min(period_s / 8, LEAN_DELAY_S)
    if transport.delay_s > most_s:
        raise SpecError(
            f"run spec: record.checkpoint_s: transport.delay_s = {transport.delay_s} must be at "
            f"most {most_s:g}, an eighth of control.sample_period_s and no more than "
            f"{LEAN_DELAY_S:g}, so that messages arrive in between"
        )


class Checkpoints:
    """Keeps one every ``record.checkpoint_s`` of run time."""

    def __init__(self, stage: Stage, ticks: Callable[[], tuple[int, int]]) -> None:
        self._stage = stage
        self._ticks = ticks
        self._half_s = 0.5 * stage.spec.control.sample_period_s
        self._next_s = stage.spec.record.checkpoint_s

    def after_tick(self, now_s: float) -> None:
        """Called at each tick: take one half a period later if it is time."""
        if now_s >= self._next_s - 1e-9:
            self._next_s = now_s + self._stage.spec.record.checkpoint_s
            self._stage.loop.call_at(now_s + self._half_s, HOUSEKEEPING, self._take)

    def _take(self, now_s: float) -> None:
        kept = {"now_s": now_s, "next_s": self._next_s, "ticks": self._ticks(), **save(self._stage)}
        self._stage.records.keep_checkpoint(freeze(kept))

    def go_on(self, kept: dict[str, Any]) -> None:
        """Be where a checkpoint was taken."""
        self._next_s = kept["next_s"]
        restore(self._stage, kept)


def save(stage: Stage) -> dict[str, Any]:
    """The state of everything, for `testbed.core.freeze`: each class says what of it is state."""
    return {
        "records": stage.records.save(),
        "servers": stage.servers.save(),
        "waiting": _waiting(stage),
        "parts": _parts(stage),
    }


def restore(stage: Stage, kept: dict[str, Any]) -> None:
    """Put a state back into parts made from the same run file, whose nodes have joined."""
    loop, desk = stage.loop, stage.desk
    loop.now_s = kept["now_s"]
    stage.servers.restore(kept["servers"])
    arrived = kept["parts"]["dispatcher"][0].arrived_total
    (stage.path or desk).skip(arrived)
    for name, things in _parts(stage).items():
        for thing, state in zip(things, kept["parts"][name], strict=True):
            put_back(thing, state)
    loop.heap.clear()
    for due_s, order, key, place, told in kept["waiting"]:
        owner = desk if place < 0 else stage.nodes[place]
        loop.call_at(due_s, order, owner.again(told), key)
    # Last: all that was said while the parts were made is forgotten.
    stage.records.go_on(kept["records"])


def _waiting(stage: Stage) -> list[tuple[float, int, str, int, Waiting]]:
    """What is on the scheduler but for the two ticks: when, and by which node (-1: the desk)."""
    owners: list[tuple[int, Desk | NodeSchedule]] = [(-1, stage.desk), *enumerate(stage.nodes)]
    place_of = {id(owner): place for place, owner in owners}
    place_of[id(stage.desk.coordinator)] = -1
    found: list[tuple[float, int, str, int, Waiting]] = []
    for due_s, order, key, _, callback in sorted(stage.loop.heap, key=itemgetter(0, 1, 2, 3)):
        if order in (PHYSICS, CONTROL):
            continue
        place = place_of.get(id(getattr(getattr(callback, "func", callback), "__self__", None)), -1)
        told = owners[place + 1][1].told(callback)
        if told is None:
            raise SpecError(f"run spec: record.checkpoint_s: {callback!r} is to come at {due_s} s")
        found.append((due_s, order, key, place, told))
    return found


def _parts(stage: Stage) -> dict[str, list[Any]]:
    """Everything that has a state, beside servers and recorder."""
    coordinator = stage.desk.coordinator
    layout = coordinator.layout
    return {
        "coordinator": [coordinator],
        "dispatcher": [coordinator.dispatcher],
        "columns": [layout.gpus, layout.instances, layout.tenants, layout.rows],
        "nodes": layout.nodes,
        "schedules": stage.nodes,
        "daemons": [node.daemon for node in stage.nodes],
        "guards": stage.guards,
        "controllers": stage.controllers,
        "router": [stage.router],
        "lean": [part for part in (stage.path, stage.reports) if part is not None],
    }
