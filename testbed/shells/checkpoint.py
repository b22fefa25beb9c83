"""Checkpoints of a virtual run: all that it will be decided by, as plain data, and back.

One is taken half-way between two ticks, when everything that travels as a message has arrived: the
scheduler then holds the two next ticks and nothing else, and requests are on queues of ours. What
the run file and the handshake determine is not kept but made anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from daemons.node import NodeDaemon
from daemons.safety import CapGuard
from emulators.engine import Event
from emulators.server import ServerBank
from testbed.coordinator.loop import Coordinator, InFlight
from testbed.core.clock import HOUSEKEEPING, VirtualScheduler
from testbed.core.errors import SpecError
from testbed.core.freeze import attributes, freeze, put_back
from testbed.core.spec import RunSpec
from testbed.recorder.writer import Recorder
from testbed.shells.lean import BankReports, RequestPath

# What is made anew, by class; anything else that turns up is kept, or refused with its name.
_COORDINATOR = (
    "spec", "layout", "view", "in_flight", "_hub", "_records", "_controllers", "_router", "_run_id",
    "_observed_s", "_submit", "_node_of", "_monotonic_ns", "_classes", "_held", "_power", "_clocks",
    "_batches", "_arranging", "_epoch", "_start_ns", "_boot_id", "_beat_period_s",
)  # fmt: skip
_NODE = (
    "name", "index", "row", "gpus", "instances", "tenants", "configs", "infos", "tenant_infos",
    "layout_seen", "layout_how", "layout_sequence",
)  # fmt: skip
_GUARD = ("_gpus", "_journal", "_log", "_infos")
_DAEMON = (
    "name", "config", "welcome", "_gpus", "_guard", "_serving", "_send", "_boot_id", "_tenants",
    "_log", "_surround",
)  # fmt: skip
_COLUMNS = ("gpus", "instances", "rows")
_CLAIMS = ("_power", "_clocks", "_batches")


@dataclass(slots=True)
class Stage:
    """The parts of a virtual run that have a state."""

    spec: RunSpec
    records: Recorder
    loop: VirtualScheduler
    servers: ServerBank
    daemons: list[NodeDaemon]
    guards: list[CapGuard]
    coordinator: Coordinator
    controllers: list[Any]
    router: Any
    path: RequestPath
    reports: BankReports


def check(spec: RunSpec, *, lean: bool) -> None:
    """Refuse checkpoints of runs whose state is spread wider than this file knows.

    Raises:
        SpecError: says what is in the way.
    """
    period_s, delay_s = spec.control.sample_period_s, spec.transport.delay_s
    if not lean:
        raise SpecError(
            "run spec: record.checkpoint_s: not with transport.jitter_s, transport.loss_frac, "
            "memory tenants or cluster.elastic"
        )
    if spec.plant is not None:
        raise SpecError(
            "run spec: record.checkpoint_s: not with a [plant], which is not kept in it"
        )
    if 8 * delay_s > period_s:
        raise SpecError(
            f"run spec: record.checkpoint_s: transport.delay_s = {delay_s} must be at most an "
            f"eighth of control.sample_period_s = {period_s}, so that messages arrive in between"
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
        waiting = len(self._stage.loop.heap)
        if waiting != 2:
            raise SpecError(f"run spec: record.checkpoint_s: {waiting - 2} messages are on the way")
        kept = {"now_s": now_s, "next_s": self._next_s, "ticks": self._ticks(), **save(self._stage)}
        self._stage.records.keep_checkpoint(freeze(kept))

    def go_on(self, kept: dict[str, Any]) -> None:
        """Be where a checkpoint was taken."""
        self._next_s = kept["next_s"]
        restore(self._stage, kept)


def save(stage: Stage) -> dict[str, Any]:
    """The state of everything, as data that `testbed.core.freeze` takes."""
    coordinator = stage.coordinator
    layout = coordinator.layout
    return {
        "records": stage.records.save(),
        "servers": stage.servers.save(),
        "daemons": [attributes(daemon, _DAEMON) for daemon in stage.daemons],
        "guards": [attributes(guard, _GUARD) for guard in stage.guards],
        "left_mw": stage.reports.left_mw,
        "coordinator": attributes(coordinator, _COORDINATOR),
        "claims": [attributes(getattr(coordinator, name)) for name in _CLAIMS],
        "columns": [attributes(getattr(layout, name), ("name",)) for name in _COLUMNS],
        "nodes": [attributes(node, _NODE) for node in layout.nodes],
        "in_flight": [attributes(entry) for entry in coordinator.in_flight.values()],
        "held": [entry.request.id for entry in coordinator._held],
        "controllers": [attributes(policy) for policy in stage.controllers],
        "router": attributes(stage.router),
        "arrived": stage.path.arrived,
        "submits": list(stage.path.submits),
        "news": [
            (due_s, index, [tuple(event) for event in events])
            for due_s, index, events in stage.path.news
        ],
    }


def restore(stage: Stage, kept: dict[str, Any]) -> None:
    """Put a state back into parts made from the same run file, whose nodes have joined."""
    coordinator = stage.coordinator
    layout = coordinator.layout
    stage.loop.now_s = kept["now_s"]
    stage.servers.restore(kept["servers"])
    put_back(coordinator, kept["coordinator"])
    coordinator.in_flight = {entry["request"].id: InFlight(**entry) for entry in kept["in_flight"]}
    coordinator._held.extend(coordinator.in_flight[each] for each in kept["held"])
    things: list[tuple[list[Any], str]] = [
        (stage.daemons, "daemons"),
        (stage.guards, "guards"),
        ([getattr(coordinator, name) for name in _CLAIMS], "claims"),
        ([getattr(layout, name) for name in _COLUMNS], "columns"),
        (layout.nodes, "nodes"),
        (stage.controllers, "controllers"),
        ([stage.router], "router"),
    ]
    for parts, name in things:
        for part, values in zip(parts, _listed(kept[name]), strict=True):
            put_back(part, values)
    stage.reports.left_mw[:] = kept["left_mw"]
    path = stage.path
    path.skip(kept["arrived"])
    path.submits.extend(kept["submits"])
    path.news.extend(
        (due_s, index, [Event(*event) for event in events]) for due_s, index, events in kept["news"]
    )
    # Last: all that was said while the parts were made is forgotten.
    stage.records.go_on(kept["records"])


def _listed(kept: Any) -> list[dict[str, Any]]:
    return kept if isinstance(kept, list) else [kept]
