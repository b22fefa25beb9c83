"""Where a run is put together: the only file that knows all modes.

A run is one choice of clock, transport, devices and engine for the same node daemons, coordinator,
policies and recorder. `run` makes the choice the spec asks for:

- *virtual*: one process, one loop that jumps, an in-memory network, one bank of emulated GPUs;
- *emulated*: this process is the coordinator; each node is a process of its own that waits out real
  time on emulated GPUs behind NVML's names, and talks over ZeroMQ;
- *hardware*: as emulated, with the driver's GPUs and a real engine in the nodes.

The order of events at one instant is the same in all: physics, serving, deliveries, samples,
decisions (`testbed.core.clock`).
"""

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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from daemons.devices.host import boot_id
from daemons.devices.nvml import NvmlGpus
from daemons.node import NodeDaemon
from daemons.safety import CapGuard, Journal
from daemons.tenants import TenantHost, TenantPlan, load_memory_trace
from emulators.gpu import GpuBank
from emulators.memory import ModelledTenants
from emulators.models import load_model
from emulators.nvml import EmulatedNvml
from emulators.profiles import GpuProfile, load_gpu
from emulators.server import ServerBank, build_engine
from emulators.state import GpuState
from testbed.analysis.summary import summarise
from testbed.coordinator.cluster import Layout
from testbed.coordinator.loop import Coordinator
from testbed.core.clock import (
    CONTROL,
    DELIVERY,
    HOUSEKEEPING,
    PHYSICS,
    SAMPLE,
    SERVING,
    ClockSync,
    LiveScheduler,
    VirtualScheduler,
)
from testbed.core.errors import DeviceError, SpecError, TransportError
from testbed.core.messages import Bye, Envelope, GpuInfo, Hello, InstanceConfig, Ping, Pong
from testbed.core.spec import RunSpec, TenantsSpec
from testbed.core.transport.memory import Network
from testbed.core.transport.zmq import ZmqHub, ZmqSpoke
from testbed.policies.load import load_controller, load_router
from testbed.recorder.writer import Recorder, new_run_folder, write_summary
from testbed.workloads import open_workload

Progress = Callable[["Status"], None]

JOIN_TIMEOUT_S = 60.0
"""How long a live run waits for its nodes to say hello."""
_START_DELAY_S = 0.5
"""From the last hello to the run's zero: time for every node to get ready."""
_LATE_LIMIT_S = 0.05
"""A live run whose p99 lateness exceeds this is marked invalid."""


@dataclass(slots=True)
class Status:
    """Where a run stands, for a progress display."""

    now_s: float
    duration_s: float
    wall_s: float
    arrived: int
    ended: int
    in_flight: int
    nodes: int
    num_nodes: int
    power_w: float


def run(
    spec: RunSpec,
    out: Path | str = "runs",
    *,
    progress: Progress = lambda status: None,
    bind: str = "tcp://127.0.0.1:0",
    spawn: bool = True,
) -> Path:
    """Run a spec to its end and return the run folder.

    Args:
        spec: what to run, in which mode.
        out: folder that gets a folder for this run.
        progress: called about once a second of wall time.
        bind: where a live coordinator listens.
        spawn: start the node daemons of an emulated run; otherwise they are started by hand with
            ``testbed node``.

    Raises:
        TestbedError: the spec cannot be run, or a part failed; what was recorded is kept.
    """
    profile = load_gpu(spec.cluster.gpu)
    _check(spec, profile)
    controllers = [load_controller(policy) for policy in spec.policy]
    router = load_router(spec.router)
    requests = open_workload(spec.workload, spec.slo_class, spec.seed, spec.duration_s)
    folder = new_run_folder(out, spec.name)
    try:
        with Recorder(folder, spec=spec, meta=_meta(spec, profile)) as records:
            parts = _Parts(spec, folder, records, controllers, router, requests, profile, progress)
            if spec.mode == "virtual":
                _run_virtual(parts)
            else:
                _run_live(parts, bind, spawn=spawn)
    finally:
        # A run that failed has a summary of as far as it came, marked invalid.
        write_summary(folder, summarise(folder))
    return folder


@dataclass(slots=True)
class _Parts:
    spec: RunSpec
    folder: Path
    records: Recorder
    controllers: list[Any]
    router: Any
    requests: Iterator[Any]
    profile: GpuProfile
    progress: Progress


def _check(spec: RunSpec, profile: GpuProfile) -> None:
    """What needs the profiles to be known: budgets, and whether models fit."""
    cluster = spec.cluster
    info = GpuInfo(
        uuid="",
        model=profile.name,
        memory_total_bytes=0,
        power_limit_min_w=profile.power_limit_min_w,
        power_limit_max_w=profile.power_limit_max_w,
        power_limit_default_w=profile.power_limit_default_w,
        sm_clock_min_mhz=0.0,
        sm_clock_max_mhz=0.0,
    )
    Layout(spec).safe_limit_w([info])
    tick_s = spec.control.sample_period_s
    if spec.mode != "virtual" and tick_s < 0.02:
        raise SpecError(f"run spec: control.sample_period_s = {tick_s} must be >= 0.02 when live")
    if spec.mode != "hardware":
        bank = _bank(spec, profile, GpuState.create(cluster.gpus_per_node), [0])
        for pool in spec.pool:
            try:
                build_engine(bank, load_model(pool.model), _instance_of(pool))
            except ValueError as error:
                raise SpecError(f"run spec: pool {pool.name!r}: {error}") from None


def _instance_of(pool: Any) -> Any:
    return InstanceConfig(
        name=pool.name,
        pool=pool.name,
        model=pool.model,
        tp=pool.tp,
        gpus=list(range(pool.tp)),
        engine=pool.engine,
    )


def _meta(spec: RunSpec, profile: GpuProfile) -> dict[str, Any]:
    emulated = spec.mode != "hardware"
    how = "emulated" if emulated else "measured"
    clock = "virtual time" if spec.mode == "virtual" else "the machine's monotonic clock"
    return {
        "late_limit_s": _LATE_LIMIT_S,
        "provenance": [
            {"what": "time", "how": "emulated" if spec.mode == "virtual" else "measured",
             "source": clock},
            {"what": "power, clocks, heat", "how": how,
             "source": f"profile {profile.name}" if emulated else "NVML"},
            {"what": "iteration times", "how": how,
             "source": "emulators/timing.py" if emulated else "the executor"},
            {"what": "temperature offsets between GPUs", "how": "assumed",
             "source": "normal, cluster.temp_spread_c"},
        ],
    }  # fmt: skip


# The emulated plant.


def _bank(spec: RunSpec, profile: GpuProfile, state: GpuState, nodes: list[int]) -> GpuBank:
    """GPUs of the given nodes; a GPU's temperature offset depends on its place alone."""
    cluster = spec.cluster
    offsets_c = np.concatenate(
        [
            np.random.default_rng([spec.seed, 17, node]).normal(
                0.0, cluster.temp_spread_c, cluster.gpus_per_node
            )
            for node in nodes
        ]
    )
    return GpuBank(profile, state, inlet_c=cluster.inlet_c, offset_c=offsets_c)


def tenant_plan(tenants: TenantsSpec, place: int) -> TenantPlan | None:
    """The memory tenants of the node at ``place``, or None if it has none.

    Raises:
        TraceError: the memory trace cannot be read.
    """
    if not tenants.per_node:
        return None
    memory_bytes = int(tenants.memory_mib * 2**20)
    return TenantPlan(
        count=tenants.per_node,
        memory_bytes=memory_bytes,
        guaranteed_bytes=int(memory_bytes * tenants.guaranteed_frac),
        trace=load_memory_trace(tenants.trace),
        speedup=tenants.speedup,
        first_day=place * tenants.per_node,
    )


class _NoJournal(Journal):
    """In virtual time nothing can be left behind."""

    def __init__(self) -> None:
        super().__init__(Path())

    def read(self) -> None:
        """Nothing was left."""

    def write(self, found: dict[str, Any]) -> None:
        """Nothing to keep."""

    def remove(self) -> None:
        """Nothing to remove."""


class _Node:
    """A node daemon with its schedule: who is called when, on any scheduler."""

    def __init__(self, daemon: NodeDaemon, loop: VirtualScheduler | LiveScheduler) -> None:
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


class _Desk:
    """The coordinator with its schedule."""

    def __init__(self, parts: _Parts, loop: VirtualScheduler | LiveScheduler) -> None:
        self._parts = parts
        self._loop = loop
        self._period_s = parts.spec.control.sample_period_s
        self._ticks = 0
        self._started = time.monotonic()
        self._shown = self._flushed = 0.0
        self.arrivals_done = False
        self.coordinator: Coordinator

    def deliver(self, envelope: Envelope, due_s: float) -> None:
        """A message has arrived that is due at ``due_s``."""
        take = partial(self.coordinator.on_message, envelope)
        self._loop.call_at(due_s, DELIVERY, take, envelope.source)

    def begin(self) -> None:
        """Start arrivals and ticks."""
        self._next_arrival()
        self._loop.call_at(0.0, CONTROL, self._tick)

    def _next_arrival(self) -> None:
        request = next(self._parts.requests, None)
        if request is None:
            self.arrivals_done = True
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
        over = now_s >= spec.duration_s - 1e-9 and not coordinator.in_flight
        if over or now_s >= spec.duration_s + spec.drain_s - 1e-9:
            self._loop.stop()
            return
        self._ticks += 1
        self._loop.call_at(self._ticks * self._period_s, CONTROL, self._tick)

    def status(self, now_s: float) -> Status:
        """For a progress display."""
        coordinator, gpus = self.coordinator, self.coordinator.view.gpus
        return Status(
            now_s=now_s,
            duration_s=self._parts.spec.duration_s,
            wall_s=time.monotonic() - self._started,
            arrived=coordinator.arrived_total,
            ended=coordinator.ended_total,
            in_flight=len(coordinator.in_flight),
            nodes=coordinator.num_live,
            num_nodes=len(coordinator.layout.nodes),
            power_w=float(gpus.power_avg_w.sum()),
        )


def _run_virtual(parts: _Parts) -> None:
    """Everything in this process, on a clock that jumps."""
    spec = parts.spec
    loop = VirtualScheduler()
    transport = spec.transport
    network = Network(
        seed=spec.seed,
        delay_s=transport.delay_s,
        jitter_s=transport.jitter_s,
        loss_frac=transport.loss_frac,
    )
    desk = _Desk(parts, loop)
    hub = network.hub(desk.deliver)
    desk.coordinator = Coordinator(
        spec, hub, parts.records, parts.controllers, parts.router, run_id=parts.folder.name
    )
    names = spec.node_names()
    count = spec.cluster.gpus_per_node
    state = GpuState.create(len(names) * count)
    servers = ServerBank(
        _bank(spec, parts.profile, state, list(range(len(names)))), num_nodes=len(names)
    )
    nodes: list[_Node] = []
    for index, name in enumerate(names):
        plan = tenant_plan(spec.tenants, index)
        nodes.append(_virtual_node(name, index, servers, network, loop, plan))
    # Nodes join before time zero, as they do in a live run.
    loop.now_s = -1.0
    for node in nodes:
        node.daemon.hello(loop.now_s)
    period_s = spec.control.sample_period_s
    ticks = 0

    def tick(now_s: float) -> None:
        nonlocal ticks
        servers.tick(now_s)
        for node in nodes:
            loop.call_at(now_s, SAMPLE, node.sample, node.daemon.name)
        ticks += 1
        loop.call_at(ticks * period_s, PHYSICS, tick)

    loop.call_at(0.0, PHYSICS, tick)
    desk.begin()
    loop.run(until_s=math.inf)
    end_s = loop.now_s
    wire_s = transport.delay_s + transport.jitter_s + 1e-6
    desk.coordinator.stop(end_s, "the run is over")
    loop.run(until_s=end_s + wire_s)
    for node in nodes:
        node.daemon.close(loop.now_s, Bye("the run is over", 0.0, 0.0, 0.0, 0, 0))
    loop.run(until_s=end_s + 2 * wire_s)


def _virtual_node(
    name: str,
    index: int,
    servers: ServerBank,
    network: Network,
    loop: VirtualScheduler,
    plan: TenantPlan | None,
) -> _Node:
    gpus, serving = servers.gpus[index], servers.serving[index]

    def deliver(envelope: Envelope, due_s: float) -> None:
        shell.deliver(envelope, due_s)

    spoke = network.spoke(name, 1, deliver)
    tenants = ModelledTenants(plan) if plan is not None else None
    daemon = NodeDaemon(
        name, gpus, CapGuard(gpus, _NoJournal()), serving, spoke.send, tenants=tenants
    )
    shell = _Node(daemon, loop)
    return shell


# Live: the coordinator's process.


def _run_live(parts: _Parts, bind: str, *, spawn: bool) -> None:
    """This process is the coordinator; nodes are processes of their own."""
    spec = parts.spec
    greetings: dict[str, Envelope] = {}
    desk: _Desk
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
    hub = ZmqHub(bind, deliver, spec.transport.delay_s, now_s=loop.wall_s)
    with contextlib.ExitStack() as stack:
        stack.callback(hub.close)
        names = spec.node_names()
        crew = _Crew(spec, parts.folder, hub.endpoint, names if spawn else [])
        stack.callback(crew.close)
        _gather(spec, hub, greetings, crew, parts.progress)
        start_ns = time.monotonic_ns() + int(_START_DELAY_S * 1e9)
        loop.start_ns = start_ns
        desk = _Desk(parts, loop)
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
        with _signals(loop.stop) as caught:
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


@contextlib.contextmanager
def _signals(stop: Callable[[], None]) -> Iterator[list[int]]:
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


def _gather(
    spec: RunSpec,
    hub: ZmqHub,
    greetings: dict[str, Envelope],
    crew: _Crew,
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


class _Crew:
    """The node processes that an emulated run starts, watches, starts again and ends."""

    MAX_RESTARTS = 3

    def __init__(self, spec: RunSpec, folder: Path, endpoint: str, names: list[str]) -> None:
        self.leaving = False
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


# Live: a node's process.


@dataclass(slots=True)
class NodeOptions:
    """What ``testbed node`` was told on its command line."""

    coordinator: str
    name: str
    state_dir: Path
    emulate: str = ""
    """``8xh100-sxm``; empty for the driver's GPUs."""
    seed: int = 1
    place: int = 0
    """Index of the node in the run; decides its GPUs' temperature offsets."""
    inlet_c: float = 24.0
    temp_spread_c: float = 2.0
    delay_s: float = 0.005
    tenants: str = ""
    """The run file's ``tenants`` table as JSON; empty for none."""
    allow_hardware_writes: bool = False
    orphan_exit_s: float = math.inf
    """Leave when the coordinator has been silent for this long; by default stay, at safe caps."""


def parse_gpus(text: str) -> tuple[int, str]:
    """``8xH100`` as a count and a profile's name.

    >>> parse_gpus("8xH100"), parse_gpus("2xa100-80gb")
    ((8, 'h100-sxm'), (2, 'a100-80gb'))
    """
    count, cross, name = text.lower().partition("x")
    if not cross or not count.isdigit() or not 1 <= int(count) <= 64:
        raise SpecError(f"GPUs {text!r}: expected COUNTxMODEL with 1 to 64 GPUs, as in 8xH100")
    short = {"h100": "h100-sxm", "a100": "a100-80gb"}
    return int(count), load_gpu(short.get(name, name)).name


def node(options: NodeOptions, log: Callable[[str], None]) -> None:
    """Be a node daemon until told to stop.

    Raises:
        TestbedError: the devices or the coordinator cannot be used.
    """
    sync = ClockSync()

    def deliver(envelope: Envelope, due_s: float) -> None:
        body = envelope.body
        if isinstance(body, Pong):
            sync.add(body.sent_ns, body.answered_ns, time.monotonic_ns())
        elif daemon.welcome is None:
            daemon.on_message(envelope, 0.0)
        else:
            shell.deliver(envelope, due_s)

    loop = LiveScheduler(lambda timeout_s: spoke.poll(timeout_s))
    spoke = ZmqSpoke(
        options.coordinator,
        options.name,
        time.time_ns(),
        deliver,
        options.delay_s,
        now_s=loop.wall_s,
    )
    with contextlib.ExitStack() as stack:
        stack.callback(spoke.close)
        servers = _node_servers(options) if options.emulate else None
        if servers is None:
            raise DeviceError("hardware mode")
        gpus = NvmlGpus(EmulatedNvml(servers.bank.state))
        guard = CapGuard(gpus, Journal(options.state_dir / "journal.json"), log=log)
        daemon = NodeDaemon(
            options.name,
            gpus,
            guard,
            servers.serving[0],
            spoke.send,
            boot_id=boot_id(),
            tenants=_node_tenants(options, log, stack),
            log=log,
        )
        shell = _Node(daemon, loop)
        with _signals(loop.stop) as caught:
            _say_hello(daemon, spoke, sync, caught)
            if daemon.welcome is not None:
                _serve_node(options, daemon, shell, loop, spoke, servers, sync)
        late = loop.lateness
        reason = daemon.stopped or ("told by a signal" if caught else "no coordinator")
        daemon.close(
            loop.wall_s(),
            Bye(
                reason,
                late.percentile_s(0.5),
                late.percentile_s(0.99),
                late.max_s,
                late.events_total,
                late.missed_total,
            ),
        )
        time.sleep(0.05)  # the sockets drop what is unsent when they close
        log(f"left: {reason}")
        if daemon.failed:
            raise DeviceError(daemon.stopped)


def _node_servers(options: NodeOptions) -> ServerBank:
    count, name = parse_gpus(options.emulate)
    profile = load_gpu(name)
    offsets_c = np.random.default_rng([options.seed, 17, options.place]).normal(
        0.0, options.temp_spread_c, count
    )
    state = GpuState.create(count, path=options.state_dir / "gpus.state")
    bank = GpuBank(profile, state, inlet_c=options.inlet_c, offset_c=offsets_c)
    return ServerBank(bank, num_nodes=1)


def _node_tenants(
    options: NodeOptions, log: Callable[[str], None], stack: contextlib.ExitStack
) -> TenantHost | ModelledTenants | None:
    """Real tenants where this node may have them, else modelled ones, saying why."""
    if not options.tenants:
        return None
    try:
        spec = msgspec.json.decode(options.tenants, type=TenantsSpec)
    except msgspec.MsgspecError as error:
        raise SpecError(f"--tenants: {error}") from None
    plan = tenant_plan(spec, options.place)
    if plan is None:
        return None
    try:
        name = f"serving-testbed-{os.getpid()}"
        host = TenantHost(plan, options.state_dir, name=name, swap_mib=spec.swap_mib, log=log)
    except DeviceError as error:
        log(f"memory tenants are modelled: {error}")
        return ModelledTenants(plan, str(error))
    stack.callback(host.close)
    return host


def _say_hello(daemon: NodeDaemon, spoke: ZmqSpoke, sync: ClockSync, caught: list[int]) -> None:
    """Greet the coordinator until it answers."""
    said = -math.inf
    while daemon.welcome is None and not daemon.stopped and not caught:
        now = time.monotonic()
        if now - said >= 1.0:
            said = now
            for _ in range(8 if not sync.answers else 1):
                spoke.send(Ping(time.monotonic_ns()), 0.0)
            daemon.hello(0.0)
        spoke.poll(0.05)


def _serve_node(
    options: NodeOptions,
    daemon: NodeDaemon,
    shell: _Node,
    loop: LiveScheduler,
    spoke: ZmqSpoke,
    servers: ServerBank,
    sync: ClockSync,
) -> None:
    """From welcome to stop, in real time."""
    assert daemon.welcome is not None
    assert daemon.config is not None
    gc.collect()
    gc.freeze()
    same_clock = daemon.welcome.boot_id == boot_id()
    loop.restart(daemon.welcome.start_ns - (0 if same_clock else sync.offset_ns))
    period_s = daemon.config.sample_period_s
    ticks = max(0, math.ceil(loop.now_s / period_s))

    def tick(now_s: float) -> None:
        nonlocal ticks
        servers.tick(now_s)
        loop.call_at(now_s, SAMPLE, sample)
        ticks += 1
        loop.call_at(ticks * period_s, PHYSICS, tick)
        if daemon.stopped or loop.wall_s() - daemon.heard_s > options.orphan_exit_s:
            loop.stop()

    def sample(now_s: float) -> None:
        shell.sample(now_s, max(0.0, loop.wall_s() - now_s))

    loop.call_at(ticks * period_s, PHYSICS, tick)
    loop.run(until_s=math.inf)
