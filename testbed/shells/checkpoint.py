"""Checkpoints of a virtual run: all that it will be decided by, as plain data, and back.

One is taken half-way between two ticks, when everything that travels as a message has arrived: the
scheduler then holds the two next ticks and nothing else, and requests are on queues of ours. What
the run file and the handshake determine is not kept but made anew: each class names it in its
``WIRED`` (`testbed.core.freeze`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from daemons.node import NodeDaemon
from daemons.safety import CapGuard
from emulators.server import ServerBank
from testbed.coordinator.loop import Coordinator
from testbed.core.clock import HOUSEKEEPING, VirtualScheduler
from testbed.core.errors import SpecError
from testbed.core.freeze import freeze, put_back
from testbed.core.spec import RunSpec
from testbed.recorder.writer import Recorder
from testbed.shells.lean import BankReports, RequestPath


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
    """The state of everything, for `testbed.core.freeze`: each class says what of it is state."""
    return {
        "records": stage.records.save(),
        "servers": stage.servers.save(),
        "parts": _parts(stage),
    }


def restore(stage: Stage, kept: dict[str, Any]) -> None:
    """Put a state back into parts made from the same run file, whose nodes have joined."""
    stage.loop.now_s = kept["now_s"]
    stage.servers.restore(kept["servers"])
    parts = _parts(stage)
    stage.path.skip(kept["parts"]["path"][0].arrived)
    for name, things in parts.items():
        for thing, state in zip(things, kept["parts"][name], strict=True):
            put_back(thing, state)
    # Last: all that was said while the parts were made is forgotten.
    stage.records.go_on(kept["records"])


def _parts(stage: Stage) -> dict[str, list[Any]]:
    """Everything that has a state, beside servers and recorder."""
    layout = stage.coordinator.layout
    return {
        "coordinator": [stage.coordinator],
        "columns": [layout.gpus, layout.instances, layout.tenants, layout.rows],
        "nodes": layout.nodes,
        "daemons": stage.daemons,
        "guards": stage.guards,
        "controllers": stage.controllers,
        "router": [stage.router],
        "path": [stage.path],
        "reports": [stage.reports],
    }
