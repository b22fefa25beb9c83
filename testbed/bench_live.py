"""How much a live coordinator takes in, and how fast its commands come back.

The coordinator is the real one, in this process, started as `testbed run` starts it: sockets, the
packed wire, views, a policy, leases, recording. Its nodes are emulated by a few generator
processes, which say and answer what a node daemon would at the same moments, and measure nothing:
GPUs that report a bank every period, leases that are acknowledged where that is asked for. They
keep within this machine (127.0.0.1) and leave when the coordinator does, or when it has been
silent.

By default each node has a telemetry connection of its own, as real nodes have; control goes by one
connection per generator (in `Forwarded`, as through a relay), since a process that polls thousands
of sockets would measure itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import zmq

from testbed import rig
from testbed.core.clock import Lateness
from testbed.core.errors import SpecError
from testbed.core.messages import (
    PROTOCOL_VERSION,
    Ack,
    Bye,
    Envelope,
    Forwarded,
    GpuInfo,
    GpuReadings,
    Hello,
    InstanceReadings,
    Lease,
    Report,
    Stop,
    TenantReadings,
    Welcome,
    decode,
    encode,
    merge,
    report,
)
from testbed.core.spec import RunSpec, parse_spec
from testbed.core.transport.intake import NOBLOCK
from testbed.core.transport.zmq import Curve, ZmqSpoke, generate_keys, new_context
from testbed.recorder.reader import Recording
from testbed.shells.live import realtime as at_realtime

NODES_PER_ROW = 40
GPUS_PER_NODE = 8
_SILENT_EXIT_S = 8.0
_LIFE_MAX_S = 300.0
"""No generator lives longer, whatever happens to its coordinator."""
_BEHIND_MAX_S = 0.5
"""A generator that is further behind leaves out ticks, and counts them."""
_NODES_MAX = 100_000
_SWING_W = 180.0
"""How a row's load rises and falls about 450 W a GPU; its budget is 600."""
_SWING_PERIOD_S = (4.0, 30.0)
_SWING_ROWS = 0.15
"""Seconds of its period for each row, so that about as many rows change in a second however many
there are."""


class _Job(msgspec.Struct, frozen=True):
    """What one generator emulates."""

    coordinator: str
    name: str
    nodes: list[str]
    connections: int
    """Telemetry connections; 0 for one per node."""
    merged: bool
    """Behind a relay of its own: a merged report per row in place of one per node."""
    relays: dict[str, str]
    """Endpoint of the relay for each row; empty without."""
    seed: int
    swing_period_s: float = 4.0
    realtime: bool = False
    secret: str = ""
    server: str = ""


def bench_intake(
    nodes: int,
    *,
    seconds: float = 10.0,
    generators: int = 2,
    connections: int = 0,
    relays: int = 0,
    merged: bool = False,
    curve: bool = False,
    gpu_period_s: float = 0.0,
    realtime: bool = False,
    out: Path | None = None,
) -> dict[str, Any]:
    """Run a live coordinator with emulated nodes and say what became of their messages.

    Args:
        nodes: how many, of eight GPUs each, which report at 10 Hz; whole rows of 40 where more.
        seconds: how long, once all have joined.
        generators: processes that emulate them.
        connections: telemetry connections in all; 0 for one per node.
        relays: processes of `testbed relay` between, rows in turn; 0 for none.
        merged: the generators merge rows as relays do: what a coordinator takes behind relays that
            are on other machines.
        curve: encrypt and authenticate.
        gpu_period_s: thin the recording of GPUs to this period; 0 keeps every report.
        realtime: coordinator and generators have real-time priority, where others use the machine.
        out: folder for the recording, kept; else it is removed.

    Returns:
        Counters and shares; rates are per second, ``_cores`` are CPU seconds per second (of relays
        their start included).

    Raises:
        SpecError: the numbers make no sense.
    """
    spec = _spec(nodes, seconds, gpu_period_s, realtime)
    if not 1 <= generators <= 64:
        raise SpecError(f"bench: generators = {generators} must be 1 to 64")
    if connections < 0 or connections > nodes:
        raise SpecError(f"bench: connections = {connections} must be 0 to {nodes}, the nodes")
    if merged and relays:
        raise SpecError("bench: relays of their own, or merged reports: not both")
    load = os.getloadavg()[0]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="testbed-bench-")))
        keys = _keys(folder) if curve else None
        endpoint = f"tcp://127.0.0.1:{_free_pair()}"
        relay_of, relay_crew = _start_relays(spec, relays, endpoint, keys, stack)
        crew = _start_generators(
            spec, generators, connections, merged, endpoint, relay_of, keys, folder, stack
        )
        run = rig.run(
            spec,
            out or folder / "runs",
            bind=endpoint,
            spawn=False,
            curve=keys and Curve(keys[0], clients=keys[2]),
        )
        said = [json.loads(process.communicate(timeout=30)[0]) for process in crew]
        relays_s = sum(sum(psutil.Process(relay.pid).cpu_times()[:2]) for relay in relay_crew)
        recording = Recording.open(run)
        manifest = recording.manifest
        wire = manifest["meta"]["wire"]
        span_s = manifest["duration_s"]
        expected = sum(generator["reports"] for generator in said)
        gpu = recording.columns("gpus", "gpu")["gpu"]
        return {
            "nodes": nodes,
            "gpus": nodes * GPUS_PER_NODE,
            "connections": connections or nodes,
            "relays": relays,
            "merged": merged,
            "curve": curve,
            "realtime": realtime,
            "seconds": span_s,
            "reports_sent": expected,
            "reports_per_s": expected / span_s,
            "gpu_rows_recorded": len(gpu),
            "gpu_rows_missing": 0 if gpu_period_s else expected * GPUS_PER_NODE - len(gpu),
            "gaps": wire["gaps_total"],
            "dropped_by_nodes": sum(generator["dropped"] for generator in said),
            "ticks_left_out": sum(generator["skipped"] for generator in said),
            "dropped_by_coordinator": wire["dropped_total"],
            "bad": wire["bad_total"],
            "late_frac": wire["late_total"] / max(1, wire["received_total"]),
            **{name: wire[name] for name in wire if "_trip" in name},
            "answer_p50_s": max(generator["answer_p50_s"] for generator in said),
            "answer_p99_s": max(generator["answer_p99_s"] for generator in said),
            "coordinator_cores": wire["cpu_s"] / span_s,
            "coordinator_main_thread_cores": wire["cpu_main_thread_s"] / span_s,
            "generator_cores": sum(generator["cpu_s"] for generator in said) / span_s,
            "relay_cores": relays_s / span_s,
            "loop_late_p99_s": _loop_late_s(recording),
            "load_before": load,
        }


def _spec(nodes: int, seconds: float, gpu_period_s: float, realtime: bool) -> RunSpec:
    per_row = min(nodes, NODES_PER_ROW)
    if not 1 <= nodes <= _NODES_MAX or nodes % per_row:
        raise SpecError(
            f"bench: nodes = {nodes} must be 1 to {NODES_PER_ROW}, or whole rows of "
            f"{NODES_PER_ROW} up to {_NODES_MAX}"
        )
    if not 1.0 <= seconds <= _LIFE_MAX_S / 2:
        raise SpecError(f"bench: seconds = {seconds:g} must be 1 to {_LIFE_MAX_S / 2:g}")
    return parse_spec(
        f"""
name = "intake"
mode = "emulated"
duration_s = {seconds}
drain_s = 1.0
[cluster]
rows = {nodes // per_row}
nodes_per_row = {per_row}
gpus_per_node = {GPUS_PER_NODE}
row_budget_w = {per_row * GPUS_PER_NODE * 600.0}
[[pool]]
model = "llama-3.1-70b"
tp = 8
[workload]
source = "poisson"
rate_rps = 1e-6
[[policy]]
use = "row_power_cap"
precedence = "safety"
params = {{ hold_s = 1.0 }}
[record]
gpu_period_s = {gpu_period_s}
[control]
realtime = {str(realtime).lower()}
"""
    )


def bench_lateness(
    instances: int = 200,
    *,
    per_node: int = 50,
    rate_rps: float = 3.0,
    seconds: float = 10.0,
    collapse: bool = True,
    realtime: bool = False,
    per_process: int = 4,
) -> dict[str, Any]:
    """Run emulated nodes that share one core, under load, and say how late they were.

    It is an ordinary emulated run; only its nodes are kept on one core, and the coordinator on the
    others. Lateness is the nodes' own account: of every callback of their loops, and by kind (ends
    of iterations, messages, physics and samples). A percentile over all nodes is that of the worst
    node; medians are of the nodes' medians.

    Args:
        instances: serving instances on the core, of one GPU each.
        per_node: how many of them in one node process.
        rate_rps: requests/s of an instance.
        seconds: length of the run.
        collapse: nodes wake once for a run of alike iterations; otherwise for each.
        realtime: nodes have real-time priority.
        per_process: how many nodes share a process.

    Raises:
        SpecError: the numbers make no sense.
    """
    _check_lateness(instances, per_node, per_process, rate_rps, seconds)
    spec = parse_spec(
        f"""
name = "lateness"
mode = "emulated"
duration_s = {seconds}
[cluster]
nodes_per_row = {instances // per_node}
nodes_per_process = {per_process}
gpus_per_node = {per_node}
[[pool]]
gpus_per_node = {per_node}
engine.collapse = {str(collapse).lower()}
[control]
realtime = {str(realtime).lower()}
[workload]
source = "poisson"
rate_rps = {rate_rps * instances}
max_prompt_tokens = 4096
"""
    )
    load = os.getloadavg()[0]
    before = os.sched_getaffinity(0)
    cores = sorted(before)

    def apart(status: rig.Status) -> None:
        if len(cores) > 1:
            os.sched_setaffinity(0, cores[1:])  # the nodes are there by now, and have the first

    with tempfile.TemporaryDirectory(prefix="testbed-bench-") as folder:
        os.sched_setaffinity(0, cores[:1])
        try:
            run = rig.run(spec, Path(folder), progress=apart)
        finally:
            os.sched_setaffinity(0, before)
        rows = Recording.open(run).table("lateness").to_pylist()
        nodes = [row for row in rows if row["source"] != "coordinator"]
        # Nodes of one process have one loop, and give the same account.
        nodes = nodes[::per_process]
        said = [json.loads(p.read_text()) for p in sorted(run.glob("nodes/*/lateness.json"))]
        said = said[::per_process]
        iterations = [one["iterations"] for one in said]
        span_s = max(row["t_s"] for row in rows)
        return {
            "instances": instances,
            "nodes": instances // per_node,
            "collapse": collapse,
            "realtime": realtime,
            "per_process": per_process,
            "events": sum(row["events"] for row in nodes),
            "events_per_s": sum(row["events"] for row in nodes) / span_s,
            "iterations": sum(one["events_total"] for one in iterations),
            "iterations_late_p50_s": float(np.median([one["late_p50_s"] for one in iterations])),
            "iterations_late_p99_s": max(one["late_p99_s"] for one in iterations),
            "iterations_late_max_s": max(one["late_max_s"] for one in iterations),
            **{
                f"{kind}_late_p99_s": max(one[kind]["late_p99_s"] for one in said)
                for kind in ("physics", "messages", "samples")
            },
            "late_p50_s": float(np.median([row["late_p50_s"] for row in nodes])),
            "late_p99_s": max(row["late_p99_s"] for row in nodes),
            "late_max_s": max(row["late_max_s"] for row in nodes),
            "load_before": load,
        }


def _check_lateness(
    instances: int, per_node: int, per_process: int, rate_rps: float, seconds: float
) -> None:
    if not 1 <= per_node <= 64:
        raise SpecError(f"bench: per_node = {per_node} must be 1 to 64")
    if not 1 <= instances <= 1000 or instances % per_node:
        raise SpecError(
            f"bench: instances = {instances} must be a multiple of per_node = {per_node} up to 1000"
        )
    if not 1 <= per_process <= instances // per_node or instances // per_node % per_process:
        raise SpecError(
            f"bench: per_process = {per_process} must divide the {instances // per_node} nodes"
        )
    if not 0.0 < rate_rps <= 100.0 or not 1.0 <= seconds <= _LIFE_MAX_S:
        raise SpecError(
            f"bench: rate_rps = {rate_rps:g} must be in (0, 100], seconds = {seconds:g} from 1 to "
            f"{_LIFE_MAX_S:g}"
        )


def bench_lateness_series(
    instances: Sequence[int],
    *,
    per_node: int = 50,
    rate_rps: float = 3.0,
    seconds: float = 10.0,
    collapse: bool = True,
    realtime: bool = False,
    per_process: int = 4,
) -> list[dict[str, Any]]:
    """`bench_lateness` at several numbers of instances, which are all checked first.

    Nodes share a process, ``per_process`` of them or as many as there are.

    Raises:
        SpecError: the numbers make no sense.
    """
    sharing = [min(per_process, count // max(1, per_node)) for count in instances]
    for count, share in zip(instances, sharing, strict=True):
        _check_lateness(count, per_node, share, rate_rps, seconds)
    return [
        bench_lateness(
            count,
            per_node=per_node,
            rate_rps=rate_rps,
            seconds=seconds,
            collapse=collapse,
            realtime=realtime,
            per_process=share,
        )
        for count, share in zip(instances, sharing, strict=True)
    ]


def _keys(folder: Path) -> tuple[Path, Path, Path]:
    """The coordinator's secret and public key files, and the folder of those it lets in."""
    public, secret = generate_keys(folder / "keys", "coordinator")
    generate_keys(folder / "keys" / "nodes", "generator")
    return secret, public, folder / "keys" / "nodes"


def _free_pair() -> int:
    """Two neighbouring ports that nobody listens on."""
    for _ in range(100):
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            with contextlib.suppress(OSError):
                second.bind(("127.0.0.1", port + 1))
                return port
    raise SpecError("bench: no two neighbouring ports are free on 127.0.0.1")


def _start_relays(
    spec: RunSpec,
    count: int,
    endpoint: str,
    keys: tuple[Path, Path, Path] | None,
    stack: contextlib.ExitStack,
) -> tuple[dict[str, str], list[subprocess.Popen[bytes]]]:
    """Endpoints of relays by row, and their processes."""
    rows = [f"row{row}" for row in range(spec.cluster.rows)]
    endpoints, crew = [], []
    for number in range(min(count, len(rows))):
        command = [
            *(sys.executable, "-m", "testbed.cli", "relay", "--coordinator", endpoint),
            *("--name", f"relay{number}", "--orphan-exit-s", str(5 * _SILENT_EXIT_S)),
        ]
        if keys:
            secret = keys[2] / "generator.key_secret"
            command += ["--curve-secret", str(secret), "--curve-server", str(keys[1])]
            # Its own public key is the one that its nodes are to trust: all share one here.
            command += ["--curve-clients", str(keys[2])]
        crew.append(process := _spawn(command, stack))
        assert process.stdout is not None
        endpoints.append(process.stdout.readline().decode().strip())
    return {row: endpoints[k % len(endpoints)] for k, row in enumerate(rows) if crew}, crew


def _start_generators(
    spec: RunSpec,
    count: int,
    connections: int,
    merged: bool,
    endpoint: str,
    relay_of: dict[str, str],
    keys: tuple[Path, Path, Path] | None,
    folder: Path,
    stack: contextlib.ExitStack,
) -> list[subprocess.Popen[bytes]]:
    names = spec.node_names()
    rows = [
        names[k : k + spec.cluster.nodes_per_row]
        for k in range(0, len(names), spec.cluster.nodes_per_row)
    ]
    shares = [rows[k::count] for k in range(count)] if len(rows) >= count else [[names]]
    crew = []
    for number, share in enumerate(shares):
        job = _Job(
            coordinator=endpoint,
            name=f"generator{number}",
            nodes=[name for row in share for name in row],
            connections=max(1, connections // len(shares)) if connections else 0,
            merged=merged,
            relays=relay_of,
            seed=number,
            swing_period_s=float(np.clip(_SWING_ROWS * len(rows), *_SWING_PERIOD_S)),
            realtime=spec.control.realtime,
            secret=str(keys[2] / "generator.key_secret") if keys else "",
            server=str(keys[2] / "generator.key" if relay_of else keys[1]) if keys else "",
        )
        path = folder / f"generator{number}.json"
        path.write_bytes(msgspec.json.encode(job))
        crew.append(_spawn([sys.executable, "-m", "testbed.bench_live", str(path)], stack))
    return crew


def _spawn(command: list[str], stack: contextlib.ExitStack) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    stack.callback(_end, process)
    return process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(5.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _loop_late_s(recording: Recording) -> float:
    rows = recording.table("lateness").to_pylist()
    return max((row["late_p99_s"] for row in rows if row["source"] == "coordinator"), default=0.0)


# A generator.


class _Template:
    """A node's report as bytes, but for what changes: number, time and GPU readings.

    MessagePack of fixed widths around the places, so that a report is one join of bytes. The
    generator shares the machine with what is measured: this takes a tenth of encoding it anew.
    """

    def __init__(self, name: str, incarnation: int, instances: InstanceReadings) -> None:
        gpus = GpuReadings.of(np.ones(GPUS_PER_NODE, GpuReadings.layout))
        said = report(gpus, instances, TenantReadings.empty(), lease_epoch=1, lease_sequence=1)
        number, t_s, packed = 1 << 31, 0.1, gpus.pack()
        whole = encode(Envelope(name, incarnation, number, t_s, said))
        self.head, rest = whole.split(b"\xce" + struct.pack(">I", number), 1)
        self.middle, rest = rest.split(b"\xcb" + struct.pack(">d", t_s), 1)
        before, self.tail = rest.split(packed, 1)
        self.middle_end = before

    def fill(self, number: int, time_bytes: bytes, gpus: bytes | memoryview) -> bytes:
        return b"".join(
            (
                self.head,
                b"\xce",
                number.to_bytes(4, "big"),
                self.middle,
                time_bytes,
                self.middle_end,
                gpus,
                self.tail,
            )
        )


class _Generator:
    """Emulates the nodes of a job until their coordinator stops them."""

    def __init__(self, job: _Job) -> None:
        self.job = job
        self.incarnation = time.time_ns()
        self.dropped = self.reports = self.skipped = 0
        self.start_ns = self.heard_ns = 0
        self.period_s = 0.0
        self.stopped = False
        self.answers = Lateness(np.inf)
        """How long leases may have waited for their answers here."""
        self._free_ns = 0
        """From when on what has arrived could have been seen; 0 for not yet known."""
        self.welcomed: set[str] = set()
        count = len(job.nodes)
        rng = np.random.default_rng([job.seed, 5])
        self.rng = rng
        self.readings = np.zeros(count * GPUS_PER_NODE, GpuReadings.layout)
        self.readings["power_limit_w"] = self.readings["power_limit_enforced_w"] = 700.0
        self.readings["sm_clock_mhz"] = 1980.0
        self.readings["temp_c"] = rng.normal(60.0, 3.0, len(self.readings)).round()
        self.readings["fb_used_bytes"] = 70 << 30
        self.mean_w = rng.normal(450.0, 40.0, len(self.readings))
        self.draw_w = self.mean_w
        self.limit_w = np.full(len(self.readings), 700.0)
        self.index = {name: index for index, name in enumerate(job.nodes)}
        row = np.arange(count) // NODES_PER_ROW
        # The golden ratio spreads the phases of however many rows evenly.
        self.phase = np.repeat((row * 0.618 + job.seed * 0.309) % 1.0, GPUS_PER_NODE)
        curve = Curve(Path(job.secret), server=Path(job.server)) if job.secret else None
        self.spokes: dict[str, ZmqSpoke] = {}
        endpoints = dict.fromkeys(job.relays.get(row, job.coordinator) for row in self._rows())
        for number, endpoint in enumerate(endpoints):
            self.spokes[endpoint] = ZmqSpoke(
                endpoint,
                f"{job.name}.{number}",
                self.incarnation,
                self._take,
                0.0,
                now_s=lambda: -np.inf,
                curve=curve,
            )
        self.spoke_of = {
            name: self.spokes[job.relays.get(name.partition("/")[0], job.coordinator)]
            for name in job.nodes
        }
        self.context = new_context()
        self.context.set(zmq.MAX_SOCKETS, count + 100)
        self.telemetry = [] if job.merged else self._connect(curve)
        self.numbers = dict.fromkeys(job.nodes, 0)

    def _rows(self) -> Iterator[str]:
        return iter(dict.fromkeys(name.partition("/")[0] for name in self.job.nodes))

    def _connect(self, curve: Curve | None) -> list[zmq.Socket[bytes]]:
        """A telemetry socket for each node; some share theirs where the job says so."""
        job = self.job
        made: dict[Any, zmq.Socket[bytes]] = {}
        sockets = []
        for index, name in enumerate(job.nodes):
            endpoint = job.relays.get(name.partition("/")[0], job.coordinator)
            place = (endpoint, index % job.connections if job.connections else index)
            if place not in made:
                made[place] = self._publisher(endpoint, curve)
            sockets.append(made[place])
        return sockets

    def _publisher(self, endpoint: str, curve: Curve | None) -> zmq.Socket[bytes]:
        host, _, port = endpoint.rpartition(":")
        made = self.context.socket(zmq.PUB)
        made.linger = 0
        made.setsockopt(zmq.XPUB_NODROP, 1)
        if curve is not None and curve.server is not None:
            made.curve_publickey, made.curve_secretkey = _key(curve.secret)
            made.curve_serverkey = _key(curve.server)[0]
        made.connect(f"{host}:{int(port) + 1}")
        return made

    def _say(self, name: str, body: Any, t_s: float) -> None:
        number = self.numbers[name] = self.numbers[name] + 1
        data = encode(Envelope(name, self.incarnation, number, t_s, body))
        self.dropped += not self.spoke_of[name].send(Forwarded("", data), t_s)

    def _take(self, outer: Envelope, due_s: float) -> None:
        self.heard_ns = time.monotonic_ns()
        self._free_ns = self._free_ns or self.heard_ns
        if not isinstance(outer.body, Forwarded):
            return
        name, word = outer.body.to, decode(outer.body.message)
        body = word.body
        if isinstance(body, Lease):
            place = self.index[name] * GPUS_PER_NODE
            self.limit_w[place : place + GPUS_PER_NODE] = body.power_limit_w
            if not body.answer:
                return
            self._say(name, Ack(body.epoch, body.sequence, "", body.power_limit_w), word.t_s)
            self.answers.add((time.monotonic_ns() - self._free_ns) * 1e-9)
        elif isinstance(body, Welcome):
            self.welcomed.add(name)
            self.start_ns, self.period_s = body.start_ns, body.config.sample_period_s
        elif isinstance(body, Stop):
            self.stopped = True
            self._say(name, Bye(body.reason, 0.0, 0.0, 0.0, 0, 0), word.t_s)

    def _poll(self, timeout_s: float) -> None:
        if timeout_s > 0:
            self._free_ns = 0  # until something comes
        for spoke in self.spokes.values():
            spoke.poll(timeout_s / len(self.spokes))
        self._free_ns = time.monotonic_ns()

    def run(self) -> None:
        """From hello to goodbye."""
        try:
            self._run()
        finally:  # a context that is left to the collector waits for sockets that it has lost
            for spoke in self.spokes.values():
                spoke.close()
            self.context.destroy(0)

    def _run(self) -> None:
        born_ns = self.heard_ns = time.monotonic_ns()
        self._join()
        used_s = time.process_time()
        nodes = self.job.nodes
        tick = 0
        instances = InstanceReadings([3], [0], [0.4], [10_000], [2_000], [0])
        templates = [_Template(name, self.incarnation, instances) for name in nodes]
        while not self.stopped:
            now_ns = time.monotonic_ns()
            silent_s, age_s = (now_ns - self.heard_ns) * 1e-9, (now_ns - born_ns) * 1e-9
            if silent_s > _SILENT_EXIT_S or age_s > _LIFE_MAX_S:
                break
            t_s = tick * self.period_s
            wait_s = t_s - (now_ns - self.start_ns) * 1e-9
            if wait_s > 0:
                self._poll(min(wait_s, 0.05))
                continue
            if wait_s < -_BEHIND_MAX_S:
                # The machine cannot carry it: say so, instead of sending ever older reports.
                self.skipped += 1
                tick += 1
                continue
            self._advance(t_s)
            tick += 1
            self._send(templates, t_s, tick)
        self._poll(0.2)
        print(
            json.dumps(
                {
                    "reports": self.reports,
                    "dropped": self.dropped,
                    "skipped": self.skipped,
                    "answer_p50_s": self.answers.percentile_s(0.5),
                    "answer_p99_s": self.answers.percentile_s(0.99),
                    "cpu_s": time.process_time() - used_s,
                }
            )
        )
        time.sleep(0.2)

    def _join(self) -> None:
        """Say hello for every node until all are welcome."""
        info = GpuInfo("GPU-0", "H100", 80 << 30, 200.0, 700.0, 700.0, 210.0, 1980.0)
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        hello = Hello(PROTOCOL_VERSION, boot, [info] * GPUS_PER_NODE, [])
        said_s = -np.inf
        while len(self.welcomed) < len(self.job.nodes):
            now_s = time.monotonic()
            if now_s - said_s > 5.0:
                said_s = now_s
                for name in self.job.nodes:
                    if name not in self.welcomed:
                        self._say(name, hello, 0.0)
            self._poll(0.01)
            if now_s - self.heard_ns * 1e-9 > 5 * _SILENT_EXIT_S:
                raise SystemExit("generator: no coordinator")

    def _advance(self, t_s: float) -> None:
        """GPUs that work, with some noise, as far as their limits let them.

        The load of each row rises and falls, over its budget and far below: a policy that caps rows
        has something to do at most of its steps, and never for all of them at once.
        """
        readings = self.readings
        swing_w = _SWING_W * np.sin(2 * np.pi * (t_s / self.job.swing_period_s + self.phase))
        self.draw_w = np.minimum(self.mean_w + swing_w, self.limit_w)
        draw_w = self.draw_w + self.rng.standard_normal(len(readings)) * 15.0
        readings["power_limit_w"] = readings["power_limit_enforced_w"] = self.limit_w
        readings["power_instant_w"] = draw_w
        readings["power_avg_w"] = self.draw_w
        readings["energy_j"] += draw_w * self.period_s

    def _send(self, templates: list[_Template], t_s: float, number: int) -> None:
        """Every node's report of an instant."""
        packed = memoryview(self.readings.tobytes())
        for first in range(0, len(self.job.nodes), NODES_PER_ROW):
            os.sched_yield()
            self._poll(0.0)  # answers do not wait behind reports
            if self.stopped:
                break
            if self.job.merged:
                self._send_merged(first, t_s, number, packed)
            else:
                self._send_each(templates, first, t_s, number, packed)

    def _send_each(
        self, templates: list[_Template], first: int, t_s: float, number: int, packed: memoryview
    ) -> None:
        """A report for each of some nodes."""
        time_bytes = b"\xcb" + struct.pack(">d", t_s)
        size = GPUS_PER_NODE * GpuReadings.layout.itemsize
        for index in range(first, min(first + NODES_PER_ROW, len(templates))):
            place = index * size
            data = templates[index].fill(number, time_bytes, packed[place : place + size])
            self.reports += 1
            try:
                self.telemetry[index].send(data, NOBLOCK)
            except zmq.Again:
                self.dropped += 1

    def _send_merged(self, first: int, t_s: float, number: int, packed: memoryview) -> None:
        """A report for a row, as a relay merges it."""
        size = GPUS_PER_NODE * GpuReadings.layout.itemsize
        served = InstanceReadings([3], [0], [0.4], [10_000], [2_000], [0]).pack()
        words = []
        for place, name in enumerate(self.job.nodes[first : first + NODES_PER_ROW], first):
            gpus = bytes(packed[place * size : (place + 1) * size])
            said = Report(gpus, served, b"", 1, 1, 0, 0.0)
            words.append(Envelope(name, self.incarnation, number, t_s, said))
        self.reports += len(words)
        spoke = next(iter(self.spokes.values()))
        self.dropped += not spoke.send(merge(words), t_s)


def _key(path: Path) -> tuple[bytes, bytes | None]:
    import zmq.auth

    public, secret = zmq.auth.load_certificate(path)
    return public, secret


if __name__ == "__main__":
    the_job = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=_Job)
    with (
        at_realtime(lambda text: print(text, file=sys.stderr))
        if the_job.realtime
        else contextlib.nullcontext()
    ):
        _Generator(the_job).run()
