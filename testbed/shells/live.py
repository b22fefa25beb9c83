"""A live run: this process is the coordinator, nodes are processes of their own."""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import msgspec

from daemons.devices.host import boot_id
from testbed.coordinator.loop import Coordinator
from testbed.core.clock import (
    HOUSEKEEPING,
    Lateness,
    LiveScheduler,
)
from testbed.core.errors import TransportError
from testbed.core.messages import Ack, Envelope, Hello, Ping, Pong
from testbed.core.names import row_of
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
_WELCOME_S = 4e-4
"""And for each node to be welcomed: 8,000 take about a second on half a core."""

_SETTLING_S = 1.0
"""After the last node joined, before round trips count."""


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
            if isinstance(envelope.body, Ack):
                # Nothing is decided by it: it need not wait until it is due.
                wire.answered(desk.coordinator, envelope.source, envelope.body)
                desk.coordinator.on_message(envelope, due_s)
            else:
                desk.deliver(envelope, due_s)
        elif isinstance(envelope.body, Hello):
            greetings[envelope.source] = envelope

    def deliver_reports(words: list[Envelope], due_s: float) -> None:
        if started:
            desk.deliver_reports(words, due_s)

    loop = LiveScheduler(lambda timeout_s: hub.poll(timeout_s))
    wire = _Wire(loop)
    with contextlib.ExitStack() as stack:
        if spec.control.realtime:
            stack.enter_context(
                realtime(partial(parts.records.event, 0.0, "warning", "coordinator", "realtime"))
            )
        hub = ZmqHub(
            bind,
            deliver,
            spec.transport.delay_s,
            now_s=loop.wall_s,
            deliver_reports=deliver_reports,
            curve=curve,
        )
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
        warms = spec.mode == "hardware" and not spec.forward  # a server is warm already
        delay_s = _WARM_DELAY_S if warms else _START_DELAY_S
        delay_s += _WELCOME_S * len(names)
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
            breathe=loop.breathe,
        )
        # What is slow the first time happens before the clock starts: files, imports, collection.
        parts.records.flush(now=True)
        stack.enter_context(rare_collections())
        started = True
        for name in sorted(greetings):
            desk.coordinator.on_message(greetings[name], 0.0)
        desk.begin()

        def watch(now_s: float) -> None:
            crew.watch(parts.records, now_s)
            loop.call_at(now_s + 0.5, HOUSEKEEPING, watch)

        loop.call_at(0.5, HOUSEKEEPING, watch)
        wire.begin()
        with signals_stop(loop.stop) as caught:
            loop.run(until_s=math.inf)
        crew.leaving = True
        end_s = loop.wall_s()
        wire.end()
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
        parts.records.manifest["meta"]["wire"] = wire.facts(hub)
        for name, stats in sorted(hub.stats.items()):
            if stats.gaps_total or stats.stale_total:
                text = f"{stats.gaps_total} messages missing, {stats.stale_total} stale"
                parts.records.event(loop.now_s, "warning", name, "gaps", text)
        if caught:
            raise KeyboardInterrupt


class _Wire:
    """What the wire and this process had to bear, for the manifest."""

    def __init__(self, loop: LiveScheduler) -> None:
        self._loop = loop
        self._trips, self._changes = Lateness(math.inf), Lateness(math.inf)
        self._cpu_s = (0.0, 0.0)
        self._joined_s = math.inf
        """When a node last answered the lease that it joined with."""
        self._over = False

    def begin(self) -> None:
        self._cpu_s = (time.process_time(), time.thread_time())

    def end(self) -> None:
        process_s, thread_s = self._cpu_s
        self._cpu_s = (time.process_time() - process_s, time.thread_time() - thread_s)
        self._over = True

    def answered(self, coordinator: Coordinator, source: str, ack: Ack) -> None:
        """A node has answered a lease: how long was that after it left?

        Leases of the second in which nodes join do not count: the first ones leave all at once.
        """
        node = coordinator.layout.by_name.get(source)
        if node is None or self._over:
            return
        if ack.sequence == node.lease_joined:
            self._joined_s = self._loop.wall_s()
        elif (
            ack.sequence == node.lease_sequence and node.lease_seen_s > self._joined_s + _SETTLING_S
        ):
            trip_s = self._loop.wall_s() - node.lease_seen_s
            self._trips.add(trip_s)
            if node.lease_why == "changes":
                self._changes.add(trip_s)

    def facts(self, hub: ZmqHub) -> dict[str, float]:
        """Counters over all peers; times in seconds. Call after `end`."""
        stats = hub.stats.values()
        of_all, of_changes = (
            {
                f"{name}s": trips.events_total,
                f"{name}_p50_s": trips.percentile_s(0.5),
                f"{name}_p99_s": trips.percentile_s(0.99),
                f"{name}_max_s": trips.max_s,
            }
            for name, trips in (("round_trip", self._trips), ("change_trip", self._changes))
        )
        return {
            "peers": len(hub.stats),
            "received_total": sum(s.received_total for s in stats),
            "gaps_total": sum(s.gaps_total for s in stats),
            "stale_total": sum(s.stale_total for s in stats),
            "late_total": sum(s.late_total for s in stats),
            "dropped_total": hub.dropped_total,
            "bad_total": hub.bad_total,
            **of_all,
            **of_changes,
            "cpu_s": self._cpu_s[0],
            "cpu_main_thread_s": self._cpu_s[1],
        }


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
    """The processes that an emulated run starts, watches, starts again and ends.

    They are its nodes and, where the spec asks for them, a relay for each row.
    """

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
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._relays: dict[str, str] = {}
        """Endpoints of relays by their names."""
        if spec.transport.relays == "row":
            for name in dict.fromkeys(_relay_of(name) for name in names):
                self._relays[name] = "tcp://127.0.0.1:0"
                self._start_relay(name)
            for name in self._relays:
                self._relays[name] = self._endpoint_said_by(name)
        self._index = {name: index for index, name in enumerate(names)}
        self._groups = {group[0]: group for group in _groups(spec, names)}
        """Names of the nodes of each process by the first of them."""
        self._restarts = dict.fromkeys([*self._relays, *self._groups], 0)
        for name in self._groups:
            self._start(name)

    def _start(self, name: str) -> None:
        if name in self._relays:
            self._start_relay(name)
        else:
            self._start_nodes(self._groups[name])

    def _start_relay(self, name: str) -> None:
        self._spawn(
            name,
            [
                *("relay", "--coordinator", self._endpoint, "--name", name),
                *("--bind", self._relays[name], "--orphan-exit-s", "60"),
            ],
        )

    def _endpoint_said_by(self, name: str) -> str:
        """Where a relay listens: the first line that it prints."""
        path = self._place(name) / "endpoint"
        deadline = time.monotonic() + JOIN_TIMEOUT_S
        while time.monotonic() < deadline:
            self.check()
            line = path.read_text() if path.exists() else ""
            if line.endswith("\n"):
                return line.strip()
            time.sleep(0.02)
        raise TransportError(f"relay {name} did not listen within {JOIN_TIMEOUT_S:g} s")

    def _place(self, name: str) -> Path:
        return self._folder / "nodes" / name.replace("/", ".")

    def _start_nodes(self, names: list[str]) -> None:
        spec, name = self._spec, names[0]
        places = range(self._index[name], self._index[name] + len(names))
        endpoint = self._relays.get(_relay_of(name), self._endpoint)
        command = [
            *("node", "--coordinator", endpoint, "--orphan-exit-s", "60"),
            *(word for each in names for word in ("--name", each)),
            *("--state-dir", str(self._place(name) if len(names) == 1 else self._folder / "nodes")),
            *("--delay-s", str(spec.transport.delay_s)),
        ]
        if spec.mode == "emulated":
            cluster = spec.cluster
            command += ["--emulate", f"{cluster.gpus_per_node}x{cluster.gpu}"]
            command += ["--seed", str(spec.seed), "--place", str(places.start)]
            command += ["--inlet-c", str(cluster.inlet_c)]
            command += ["--temp-spread-c", str(cluster.temp_spread_c)]
            if spec.plant is not None:
                command += ["--gpu-order-c", str(spec.plant.gpu_order_c)]
            for fault in spec.fault:
                if fault.kind == "gpu_lost" and fault.node in places:
                    lost = f"{names[fault.node - places.start]}:{fault.gpu}@{fault.at_s}"
                    command += ["--lose", lost]
        else:
            command += ["--device", spec.device, "--cores", str(spec.cluster.gpus_per_node)]
            if spec.forward:
                command += ["--forward", spec.forward]
            if self._allow_writes:
                command.append("--allow-hardware-writes")
        if spec.control.realtime:
            command.append("--realtime")
        if spec.tenants.per_node:
            command += ["--tenants", msgspec.json.encode(spec.tenants).decode()]
        self._spawn(name, command)

    def _spawn(self, name: str, arguments: list[str]) -> None:
        """Start a process of ours, with its log in its place."""
        place = self._place(name)
        place.mkdir(parents=True, exist_ok=True)
        with (place / "node.log").open("ab") as log, (place / "endpoint").open("wb") as said:
            # A session of its own: Ctrl-C reaches the coordinator, which ends its nodes in order.
            self._processes[name] = subprocess.Popen(
                [sys.executable, "-m", "testbed.cli", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=said if name in self._relays else log,
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
                raise TransportError(f"{name} ended with exit status {code}: {last}")

    def watch(self, records: Recorder, now_s: float) -> None:
        """Start again what ended in mid-run, as a service manager would."""
        for name, process in list(self._processes.items()):
            code = process.poll()
            if code is None or self.leaving or self._restarts[name] >= self.MAX_RESTARTS:
                continue
            self._restarts[name] += 1
            records.event(now_s, "error", name, "died", f"exit status {code}; started again")
            self._start(name)

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


def _groups(spec: RunSpec, names: list[str]) -> Iterator[list[str]]:
    """Names of the nodes that share a process: neighbours in a row."""
    size = spec.cluster.nodes_per_process if spec.mode == "emulated" else 1
    for _, row in itertools.groupby(names, row_of):
        nodes = list(row)
        for first in range(0, len(nodes), size):
            yield nodes[first : first + size]


def _relay_of(node: str) -> str:
    return f"{row_of(node)}/relay"


def _node_environment() -> dict[str, str]:
    """Numerical libraries get one thread: nodes share the machine with each other."""
    single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {**os.environ, **single}


@contextlib.contextmanager
def rare_collections() -> Iterator[None]:
    """Garbage collection seldom: what is there now is left out of it, and messages make no cycles.

    By default a loop that takes in thousands of messages a tick collects at every few hundred.
    """
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


_REALTIME_PRIORITY = 10
"""Below what kernels use for themselves."""


@contextlib.contextmanager
def realtime(log: Callable[[str], None]) -> Iterator[None]:
    """Real-time priority for this thread; what it starts does not inherit it."""
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    policy = os.SCHED_FIFO | os.SCHED_RESET_ON_FORK
    try:
        os.sched_setscheduler(0, policy, os.sched_param(_REALTIME_PRIORITY))
    except OSError as error:
        log(f"no real-time priority: {error.strerror}")
        yield
        return
    try:
        yield
    finally:
        os.sched_setscheduler(0, *before)


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
