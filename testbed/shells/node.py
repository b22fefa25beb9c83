"""A node's process: the daemon on real time, with emulated or real devices.

Several emulated nodes can share a process, a loop and a connection. On a machine with few cores
that keeps them punctual: nodes in processes of their own compute their physics at the same
instants, one after another and each with cold caches.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import msgspec
import numpy as np

from daemons.devices.cpu import CpuDevices
from daemons.devices.host import boot_id
from daemons.devices.nvml import NvmlGpus
from daemons.node import NodeDaemon
from daemons.safety import CapGuard, Journal
from daemons.seams import GpuDevice, Serving
from daemons.tenants import TenantHost
from emulators.datacenter import order_c
from emulators.gpu import FIRST_UUID, GpuBank
from emulators.memory import ModelledTenants
from emulators.nvml import EmulatedNvml
from emulators.profiles import load_gpu
from emulators.server import ServerBank
from emulators.state import GpuState
from testbed.core.clock import (
    HOUSEKEEPING,
    PHYSICS,
    SAMPLE,
    ClockSync,
    LiveScheduler,
)
from testbed.core.errors import DeviceError, SpecError
from testbed.core.messages import Bye, Envelope, GpuReadings, Ping, Pong, Surroundings
from testbed.core.names import parent
from testbed.core.spec import TenantsSpec
from testbed.core.transport.shared import Seat, SharedSpoke
from testbed.core.transport.zmq import Curve, ZmqSpoke
from testbed.shells.executed import ExecutedServing
from testbed.shells.forwarded import ForwardedServing
from testbed.shells.live import rare_collections, realtime, signals_stop
from testbed.shells.plant import tenant_plan
from testbed.shells.schedule import NodeSchedule


@dataclass(slots=True)
class NodeOptions:
    """What ``testbed node`` was told on its command line."""

    coordinator: str
    name: str
    state_dir: Path
    emulate: str = ""
    """``8xh100-sxm``; empty for the driver's GPUs."""
    device: str = "cuda"
    """What runs the kernels where GPUs are not emulated: ``cuda`` or ``cpu``."""
    forward: str = ""
    """URL of an OpenAI-compatible server that serves in place of kernels of ours."""
    cores: int = 1
    """Cores that stand in for GPUs with ``device = "cpu"``."""
    seed: int = 1
    place: int = 0
    """Index of the node in the run; decides its GPUs' temperature offsets."""
    inlet_c: float = 24.0
    temp_spread_c: float = 2.0
    gpu_order_c: float = 0.0
    """How much warmer the last GPU in the airflow runs than the first (`PlantSpec`)."""
    faults: list[tuple[float, int]] = field(default_factory=list)
    """When which emulated GPU is lost."""
    delay_s: float = 0.005
    tenants: str = ""
    """The run file's ``tenants`` table as JSON; empty for none."""
    realtime: bool = False
    """Ask for real-time priority."""
    allow_hardware_writes: bool = False
    curve_secret: Path | None = None
    """This node's secret key file, and the coordinator's public one beside it."""
    curve_server: Path | None = None
    orphan_exit_s: float = math.inf
    """Leave when the coordinator has been silent for this long; by default stay, at safe caps."""


_EARLY_S = 0.003
"""How long before its time a tick of emulated physics may be computed, where the loop is idle."""


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


def parse_fault(text: str) -> tuple[float, int]:
    """``3@20``: GPU 3 is lost at 20 s.

    >>> parse_fault("3@20")
    (20.0, 3)
    """
    gpu, at, t_s = text.partition("@")
    try:
        fault = (float(t_s), int(gpu))
    except ValueError:
        fault = (-1.0, -1)
    if not at or min(fault) < 0:
        raise SpecError(f"lost GPU {text!r}: expected GPU@SECONDS, as in 3@20")
    return fault


def host(nodes: Sequence[NodeOptions], log: Callable[[str], None]) -> None:
    """Be the daemons of several nodes, on one loop and one connection, until told to stop.

    Where to connect, keys, priority and patience are those of the first.

    Raises:
        TestbedError: the devices of one or the coordinator cannot be used.
    """
    options = nodes[0]
    for each in nodes[1:]:
        if not each.emulate:
            raise SpecError(f"node {each.name}: only emulated nodes can share a process")

    def poll(timeout_s: float) -> None:
        link.poll(timeout_s)
        for seat in seats:
            seat.collect()

    loop = LiveScheduler(poll)
    sync = ClockSync()
    curve = curve_of(options.curve_secret, server=options.curve_server)
    seats = [
        _Seat(each, loop, sync, log if len(nodes) == 1 else _named(log, each)) for each in nodes
    ]
    with contextlib.ExitStack() as stack:
        life = time.time_ns()
        if len(seats) == 1:
            link: ZmqSpoke | SharedSpoke = ZmqSpoke(
                options.coordinator, options.name, life, seats[0].deliver, options.delay_s,
                now_s=loop.wall_s, curve=curve,
            )  # fmt: skip
            stack.callback(link.close)
            seats[0].open(link, stack)  # type: ignore[arg-type]
        else:
            link = SharedSpoke(
                options.coordinator, f"{parent(options.name)}/host{options.place}", life,
                options.delay_s, now_s=loop.wall_s, curve=curve,
                soon=lambda act: loop.call_at(loop.wall_s(), SAMPLE, lambda now_s: act()),
            )  # fmt: skip
            stack.callback(link.close)
            for seat in seats:
                seat.open(link.seat(seat.options.name, seat.deliver), stack)
        if options.realtime:
            stack.enter_context(realtime(log))
        with signals_stop(loop.stop) as caught:
            _say_hello(seats, sync, caught, options.orphan_exit_s)
            if all(seat.daemon.welcome is not None for seat in seats):
                _serve(seats, loop, sync, options.orphan_exit_s)
        for seat in seats:
            seat.leave("told by a signal" if caught else "no coordinator")
        time.sleep(0.05)  # the sockets drop what is unsent when they close
    for seat in seats:
        seat.log(f"left: {seat.reason}")
    for seat in seats:
        if seat.daemon.failed:
            raise DeviceError(seat.daemon.stopped)


def _named(log: Callable[[str], None], options: NodeOptions) -> Callable[[str], None]:
    return lambda text: log(f"{options.name}: {text}")


class _Seat:
    """One node of this process: its devices, its daemon and their schedule."""

    def __init__(
        self,
        options: NodeOptions,
        loop: LiveScheduler,
        sync: ClockSync,
        log: Callable[[str], None],
    ) -> None:
        self.options = options
        self.log = log
        self.reason = ""
        """Why it left."""
        self._loop = loop
        # Real sensors are read when it is time, emulated ones may be read a little before.
        self._lane = loop.lane(min(_EARLY_S, options.delay_s / 2) if options.emulate else 0.0)
        self._sync = sync
        self.daemon: NodeDaemon
        self.plant: _Plant
        self.link: ZmqSpoke | Seat
        self._shell: NodeSchedule
        self._is_open = False

    def open(self, link: ZmqSpoke | Seat, stack: contextlib.ExitStack) -> None:
        """Take hold of the devices.

        Raises:
            TestbedError: that cannot be done.
        """
        options, log = self.options, self.log
        self.link = link
        self.plant = plant = _open_plant(options, self._loop, link)
        guard = CapGuard(
            plant.gpus,
            Journal(options.state_dir / "journal.json"),
            allow_writes=plant.allow_writes,
            log=log,
        )
        if not plant.allow_writes:
            log("dry run: no limit is set on these GPUs without --allow-hardware-writes")
        self.daemon = NodeDaemon(
            options.name,
            plant.gpus,
            guard,
            plant.serving,
            link.send,
            boot_id=boot_id(),
            tenants=_node_tenants(options, log, stack),
            surround=plant.surround,
            log=log,
        )
        self._shell = NodeSchedule(self.daemon, self._lane)
        self._is_open = True

    def deliver(self, envelope: Envelope, due_s: float) -> None:
        """A message has arrived that is due at ``due_s``."""
        body = envelope.body
        if isinstance(body, Pong):
            self._sync.add(body.sent_ns, body.answered_ns, time.monotonic_ns())
        elif self.daemon.welcome is None:
            self.daemon.on_message(envelope, 0.0)
        else:
            self._shell.deliver(envelope, due_s)

    def collect(self) -> None:
        """Take in what real executors have finished."""
        if self._is_open and self.plant.collect():
            self.daemon.serve(self._loop.wall_s())
            self._shell.rearm()

    def begin(self, ticks: int, period_s: float) -> None:
        """Tick and sample every ``period_s`` from the tick numbered ``ticks`` on."""
        loop, lane, shell, plant = self._loop, self._lane, self._shell, self.plant

        def tick(now_s: float) -> None:
            nonlocal ticks
            plant.tick(now_s)
            lane.call_at(now_s, SAMPLE, sample)
            ticks += 1
            lane.call_at(ticks * period_s, PHYSICS, tick)

        def sample(now_s: float) -> None:
            shell.sample(now_s, max(0.0, loop.wall_s() - now_s))

        lane.call_at(ticks * period_s, PHYSICS, tick)

    def leave(self, otherwise: str) -> None:
        """Say goodbye, giving the reason if there is none yet."""
        late = self._loop.lateness
        self.reason = self.daemon.stopped or otherwise
        self.daemon.close(
            self._loop.wall_s(),
            Bye(
                self.reason,
                late.percentile_s(0.5),
                late.percentile_s(0.99),
                late.max_s,
                late.events_total,
                late.missed_total,
            ),
        )
        _write_lateness(self.options.state_dir / "lateness.json", self._loop)


def _write_lateness(path: Path, loop: LiveScheduler) -> None:
    """This node's account of how punctual it was, by what was due."""
    kinds = ("physics", "iterations", "messages", "samples")
    facts = {kind: late.facts() for kind, late in zip(kinds, loop.late_by_order, strict=False)}
    path.write_text(json.dumps(facts, indent=2) + "\n")


def curve_of(
    secret: Path | None, *, clients: Path | None = None, server: Path | None = None
) -> Curve | None:
    """Keys of this end, or None if none were given.

    Raises:
        SpecError: half of what is needed was given.
    """
    other = clients or server
    if secret is None and other is None:
        return None
    if secret is None or other is None:
        raise SpecError("CURVE needs both a secret key file and whom to trust")
    return Curve(secret, clients=clients, server=server)


@dataclass(slots=True)
class _Plant:
    """The devices and instances of this node, and what drives them."""

    gpus: GpuDevice
    serving: Serving
    tick: Callable[[float], None]
    """Emulated physics; nothing where devices are real."""
    collect: Callable[[], bool]
    """Take in what real executors have finished; True if anything."""
    allow_writes: bool
    surround: Callable[[Surroundings], None] = lambda around: None
    """Told what an emulated building does to emulated devices."""


class _EmulatedGpus(NvmlGpus):
    """Emulated GPUs behind NVML's names, but that a sample is read in columns.

    A dozen calls per GPU keep a node of 50 GPUs from its iterations for a millisecond ten times a
    second; both ways read the same state alike (tests/daemons/test_nvml_gpus.py).
    """

    def __init__(self, servers: ServerBank) -> None:
        self._state = servers.bank.state
        super().__init__(EmulatedNvml(self._state))
        self._columns = servers.gpus[0]

    def read(self) -> GpuReadings:
        """All readings now."""
        return self._columns.read()

    def power_limits_w(self) -> list[float]:
        """Limits as asked for last; 0 of a lost GPU."""
        limit_w = self._state.control["power_limit_mw"] / 1000
        limit_w[self._state.measured["lost"] != 0] = 0.0
        found: list[float] = limit_w.tolist()
        return found


def _open_plant(options: NodeOptions, loop: LiveScheduler, link: ZmqSpoke | Seat) -> _Plant:
    if options.emulate:
        servers = _node_servers(options)
        return _Plant(
            _EmulatedGpus(servers),
            servers.serving[0],
            servers.tick,
            lambda: False,
            True,
            surround=partial(servers.surround, 0),
        )
    if options.device == "cpu":
        cores = CpuDevices(options.cores, name=f"serving-testbed-cpu-{os.getpid()}")
        serving = _real_serving(options, loop, link, cores.attach, [])
        return _Plant(cores, serving, lambda t_s: None, lambda: serving.collect(readable), True)
    import pynvml

    real = NvmlGpus(pynvml)
    serving = _real_serving(options, loop, link, _attach_to_nothing, real.uuids)
    return _Plant(
        real,
        serving,
        lambda t_s: None,
        lambda: serving.collect(readable),
        options.allow_hardware_writes,
    )


def _real_serving(
    options: NodeOptions,
    loop: LiveScheduler,
    link: ZmqSpoke | Seat,
    attach: Callable[[int, int], None],
    uuids: list[str],
) -> ExecutedServing | ForwardedServing:
    if options.forward:
        return ForwardedServing(options.forward, loop.wall_s, link.watch)
    return ExecutedServing(options.device, attach, loop.wall_s, link.watch, uuids=uuids)


def _attach_to_nothing(gpu: int, pid: int) -> None:
    """CUDA programs are told their GPU when they start."""


def readable(descriptor: int) -> bool:
    """Whether a read would not block."""
    return bool(select.select([descriptor], [], [], 0)[0])


def _node_servers(options: NodeOptions) -> ServerBank:
    count, name = parse_gpus(options.emulate)
    profile = load_gpu(name)
    offsets_c = np.random.default_rng([options.seed, 17, options.place]).normal(
        0.0, options.temp_spread_c, count
    )
    offsets_c += order_c(options.gpu_order_c, count)
    state = GpuState.create(count, path=options.state_dir / "gpus.state")
    bank = GpuBank(
        profile,
        state,
        inlet_c=options.inlet_c,
        offset_c=offsets_c,
        # Counted through the run, as the one bank of a virtual run counts them.
        first_uuid=FIRST_UUID + options.place * count,
    )
    return ServerBank(bank, num_nodes=1, faults=options.faults)


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
        name = f"serving-testbed-{os.getpid()}-{options.place}"
        host = TenantHost(plan, options.state_dir, name=name, swap_mib=spec.swap_mib, log=log)
    except DeviceError as error:
        log(f"memory tenants are modelled: {error}")
        return ModelledTenants(plan, str(error))
    stack.callback(host.close)
    return host


def _say_hello(
    seats: Sequence[_Seat], sync: ClockSync, caught: list[int], patience_s: float
) -> None:
    """Greet the coordinator until it answers every node, or for so long."""
    said = -math.inf
    begun = now = time.monotonic()
    while not caught and now - begun < patience_s:
        silent = [seat for seat in seats if seat.daemon.welcome is None]
        if not silent or any(seat.daemon.stopped for seat in seats):
            return
        now = time.monotonic()
        if now - said >= 1.0:
            said = now
            for _ in range(8 if not sync.answers else 1):
                silent[0].link.send(Ping(time.monotonic_ns()), 0.0)
            for seat in silent:
                seat.daemon.hello(0.0)
        seats[0].link.poll(0.05)


def _serve(
    seats: Sequence[_Seat], loop: LiveScheduler, sync: ClockSync, orphan_exit_s: float
) -> None:
    """From welcome to stop, in real time."""
    welcome, config = seats[0].daemon.welcome, seats[0].daemon.config
    assert welcome is not None
    assert config is not None
    same_clock = welcome.boot_id == boot_id()
    loop.restart(welcome.start_ns - (0 if same_clock else sync.offset_ns))
    period_s = config.sample_period_s
    first = max(0, math.ceil(loop.now_s / period_s))

    def watch(now_s: float) -> None:
        silent_s = loop.wall_s() - max(seat.daemon.heard_s for seat in seats)
        failed = any(seat.daemon.failed for seat in seats)
        if failed or all(seat.daemon.stopped for seat in seats) or silent_s > orphan_exit_s:
            loop.stop()
        loop.call_at(now_s + period_s, HOUSEKEEPING, watch)

    for seat in seats:
        seat.begin(first, period_s)
    loop.call_at(first * period_s, HOUSEKEEPING, watch)
    with rare_collections():
        loop.run(until_s=math.inf)
