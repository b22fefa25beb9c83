"""A live run: this process is the coordinator, nodes are processes of their own."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from daemons.devices.host import boot_id
from testbed.coordinator.loop import Coordinator
from testbed.core.clock import (
    HOUSEKEEPING,
    LiveScheduler,
)
from testbed.core.errors import TransportError
from testbed.core.messages import Envelope, Hello, Ping, Pong
from testbed.core.spec import RunSpec
from testbed.core.transport.zmq import Curve, ZmqHub
from testbed.recorder.writer import Recorder
from testbed.shells.schedule import Desk, Parts, Progress, Status

JOIN_TIMEOUT_S = 60.0
"""How long a live run waits for its nodes to say hello."""
_WARM_DELAY_S = 20.0
"""The same where nodes first load real models and warm their kernels."""
_START_DELAY_S = 0.5
"""From the last hello to the run's zero: time for every node to get ready."""


def run_live(
    parts: Parts,
    bind: str,
    *,
    spawn: bool,
    allow_writes: bool = False,
    curve: Curve | None = None,
) -> None:
    """This process is the coordinator; nodes are processes of their own."""
    spec = parts.spec
    greetings: dict[str, Envelope] = {}
    desk: Desk
    started = False

    def deliver(envelope: Envelope, due_s: float) -> None:
        if isinstance(envelope.body, Ping):
            # Answered at once: the round trip is what the node measures.
            hub.send(envelope.source, Pong(envelope.body.sent_ns, time.monotonic_ns()), 0.0)
        elif started:
            desk.deliver(envelope, due_s)
        elif isinstance(envelope.body, Hello):
            greetings[envelope.source] = envelope

    loop = LiveScheduler(lambda timeout_s: hub.poll(timeout_s))
    hub = ZmqHub(bind, deliver, spec.transport.delay_s, now_s=loop.wall_s, curve=curve)
    with contextlib.ExitStack() as stack:
        stack.callback(hub.close)
        names = spec.node_names()
        crew = Crew(
            spec,
            parts.folder,
            hub.endpoint,
            names if spawn else [],
            allow_writes=allow_writes,
        )
        stack.callback(crew.close)
        _gather(spec, hub, greetings, crew, parts.progress)
        delay_s = _WARM_DELAY_S if spec.mode == "hardware" else _START_DELAY_S
        start_ns = time.monotonic_ns() + int(delay_s * 1e9)
        loop.start_ns = start_ns
        desk = Desk(parts, loop)
        desk.coordinator = Coordinator(
            spec,
            hub,
            parts.records,
            parts.controllers,
            parts.router,
            run_id=parts.folder.name,
            epoch=time.time_ns() // 1_000_000,
            start_ns=start_ns,
            boot_id=boot_id(),
            observed_s=lambda now_s: loop.wall_s(),
            monotonic_ns=time.monotonic_ns,
        )
        # What is slow the first time happens before the clock starts: files, imports, collection.
        parts.records.flush(now=True)
        gc.collect()
        gc.freeze()
        started = True
        for name in sorted(greetings):
            desk.coordinator.on_message(greetings[name], 0.0)
        desk.begin()

        def watch(now_s: float) -> None:
            crew.watch(parts.records, now_s)
            loop.call_at(now_s + 0.5, HOUSEKEEPING, watch)

        loop.call_at(0.5, HOUSEKEEPING, watch)
        with signals_stop(loop.stop) as caught:
            loop.run(until_s=math.inf)
        crew.leaving = True
        end_s = loop.wall_s()
        desk.coordinator.stop(end_s, "the run is over")
        late = loop.lateness
        parts.records.lateness(
            "coordinator",
            end_s,
            late.percentile_s(0.5),
            late.percentile_s(0.99),
            late.max_s,
            late.events_total,
            late.missed_total,
        )
        deadline_s = end_s + 5.0
        while desk.coordinator.num_live and loop.wall_s() < deadline_s:
            loop.run(until_s=loop.wall_s() + 0.05)
        for name, stats in sorted(hub.stats.items()):
            if stats.gaps_total or stats.stale_total:
                text = f"{stats.gaps_total} messages missing, {stats.stale_total} stale"
                parts.records.event(loop.now_s, "warning", name, "gaps", text)
        if caught:
            raise KeyboardInterrupt


def _gather(
    spec: RunSpec,
    hub: ZmqHub,
    greetings: dict[str, Envelope],
    crew: Crew,
    progress: Progress,
) -> None:
    """Wait until every node of the run has said hello."""
    names = spec.node_names()
    begun = shown = time.monotonic()
    while len(greetings) < len(names):
        hub.poll(0.05)
        crew.check()
        now = time.monotonic()
        if now - shown > 1.0:
            shown = now
            wall = now - begun
            progress(Status(0.0, spec.duration_s, wall, 0, 0, 0, len(greetings), len(names), 0.0))
        if now - begun > JOIN_TIMEOUT_S:
            missing = [name for name in names if name not in greetings]
            raise TransportError(
                f"{len(missing)} of {len(names)} nodes did not say hello to {hub.endpoint} within "
                f"{JOIN_TIMEOUT_S:g} s, first {missing[0]}"
            )


class Crew:
    """The node processes that an emulated run starts, watches, starts again and ends."""

    MAX_RESTARTS = 3

    def __init__(
        self,
        spec: RunSpec,
        folder: Path,
        endpoint: str,
        names: list[str],
        *,
        allow_writes: bool,
    ) -> None:
        self.leaving = False
        self._allow_writes = allow_writes
        self._spec = spec
        self._folder = folder
        self._endpoint = endpoint
        self._restarts = dict.fromkeys(names, 0)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        for index, name in enumerate(names):
            self._start(name, index)
        self._index = {name: index for index, name in enumerate(names)}

    def _place(self, name: str) -> Path:
        return self._folder / "nodes" / name.replace("/", ".")

    def _start(self, name: str, index: int) -> None:
        spec, place = self._spec, self._place(name)
        place.mkdir(parents=True, exist_ok=True)
        command = [
            *(sys.executable, "-m", "testbed.cli", "node"),
            *("--coordinator", self._endpoint, "--name", name),
            *("--state-dir", str(place), "--orphan-exit-s", "60"),
            *("--delay-s", str(spec.transport.delay_s)),
        ]
        if spec.mode == "emulated":
            cluster = spec.cluster
            command += ["--emulate", f"{cluster.gpus_per_node}x{cluster.gpu}"]
            command += ["--seed", str(spec.seed), "--place", str(index)]
            command += ["--inlet-c", str(cluster.inlet_c)]
            command += ["--temp-spread-c", str(cluster.temp_spread_c)]
            if spec.plant is not None:
                command += ["--gpu-order-c", str(spec.plant.gpu_order_c)]
            for fault in spec.fault:
                if fault.kind == "gpu_lost" and fault.node == index:
                    command += ["--lose", f"{fault.gpu}@{fault.at_s}"]
        else:
            command += ["--device", spec.device, "--cores", str(spec.cluster.gpus_per_node)]
            if spec.forward:
                command += ["--forward", spec.forward]
            if self._allow_writes:
                command.append("--allow-hardware-writes")
        if spec.tenants.per_node:
            command += ["--tenants", msgspec.json.encode(spec.tenants).decode()]
        with (place / "node.log").open("ab") as log:
            # A session of its own: Ctrl-C reaches the coordinator, which ends its nodes in order.
            self._processes[name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=_node_environment(),
            )

    def check(self) -> None:
        """Raise if a node ended before the run began."""
        for name, process in self._processes.items():
            code = process.poll()
            if code is not None:
                log = (self._place(name) / "node.log").read_text(errors="replace").strip()
                last = log.splitlines()[-1] if log else "no output"
                raise TransportError(f"node {name} ended with exit status {code}: {last}")

    def watch(self, records: Recorder, now_s: float) -> None:
        """Start nodes again that ended in mid-run, as a service manager would."""
        for name, process in list(self._processes.items()):
            code = process.poll()
            if code is None or self.leaving or self._restarts[name] >= self.MAX_RESTARTS:
                continue
            self._restarts[name] += 1
            records.event(now_s, "error", name, "died", f"exit status {code}; started again")
            self._start(name, self._index[name])

    def close(self) -> None:
        """End all nodes: politely, then not."""
        for process in self._processes.values():
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + 5.0
        for process in self._processes.values():
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _node_environment() -> dict[str, str]:
    """Numerical libraries get one thread: nodes share the machine with each other."""
    single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {**os.environ, **single}


@contextlib.contextmanager
def signals_stop(stop: Callable[[], None]) -> Iterator[list[int]]:
    """SIGINT and SIGTERM call ``stop``; yields the list of those that came."""
    caught: list[int] = []

    def handle(number: int, frame: object) -> None:
        caught.append(number)
        stop()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
