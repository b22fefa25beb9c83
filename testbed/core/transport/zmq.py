"""Messages between processes, over ZeroMQ.

Two sockets on each side. *Control* is a ROUTER at the hub and a DEALER at each node, whose identity
is the node's name: two-way and bounded. *Telemetry* is a PUB at each node that connects to one SUB
of the hub, on the port after the control port: it drops under pressure, and the gap in its sequence
numbers shows.

Traps that this file knows (libzmq 4.3, each tried out):

- options act only before bind or connect, and the default LINGER hangs a shutdown;
- a PUB says nothing until its subscription has arrived, and a SUB that is bound sends it only while
  its owner polls: a node's hello therefore goes by control, and gaps count from the first telemetry
  that came;
- a PUB drops without a word above its high-water mark, unless told not to (XPUB_NODROP);
- what was queued for a peer that went away goes to its successor, unless IMMEDIATE says that a
  queue needs a connection: a new coordinator must not hear what was meant for the last one;
- a ROUTER drops what it cannot route unless told to complain, and ignores a restarted peer with an
  old identity unless told to hand over;
- CURVE without an authenticator lets every client in, also when the authenticator has died, unless
  ZAP_ENFORCE_DOMAIN is set;
- a message above MAXMSGSIZE makes the receiver cut the connection, so it is dropped at the sender;
- contexts do not survive a fork;
- a context that is collected as garbage together with its sockets waits for them for ever.

A node may speak through a relay (`testbed.shells.relay`), or through a connection that it shares
with others of its process (`testbed.core.transport.shared`): its control messages then arrive
inside `Forwarded`, its reports inside `RowReport`. The hub remembers which way a node was heard
last and answers that way. Both hops count: the relay's own sequence numbers, and the node's within.
"""

from __future__ import annotations

import ipaddress
import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator

from testbed.core.errors import TransportError
from testbed.core.messages import (
    MAX_MESSAGE_BYTES,
    Body,
    Envelope,
    Forwarded,
    Hello,
    Ping,
    Pong,
    Refused,
    RelayStatus,
    RowReport,
    Welcome,
    decode,
    encode,
)
from testbed.core.topics import TOPICS, Stream
from testbed.core.transport.base import COORDINATOR, Deliver
from testbed.core.transport.counting import PeerCounter, StreamStats
from testbed.core.transport.intake import NOBLOCK, ReportIntake

_CONTROL_HWM_MESSAGES = 10_000
"""Per peer and direction: many seconds of a busy node, then drops are counted."""
_TELEMETRY_HWM_MESSAGES = 1_000
"""Per node: 100 s of reports at 10 Hz; what is older tells nobody anything."""
_DRAIN_MESSAGES = 1_000
"""Messages taken in per socket and poll, so that no socket starves another or the caller."""
_SLICE_MESSAGES = 125
"""Reports taken in before control is looked at again: less than a millisecond of them."""
_BACKLOG = 4_096
"""Connections that may wait to be accepted: a whole fleet comes back at once after an outage. The
system bounds it (net.core.somaxconn); what is refused tries again a second later."""
_CONNECT_MS = 250
"""How long a node waits for its connection when it is made; later, nothing ever waits."""
_RECONNECT_MAX_MS = 1_000
"""Attempts back off to this, so that a lost coordinator is not met by a storm."""
_ZAP_DOMAIN = "testbed"
_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)
_UNTIMED = (Hello, Welcome, Refused, Ping, Pong, RelayStatus)
"""Said before the two ends agree on a clock; whether these are late means nothing."""


@dataclass(frozen=True)
class Curve:
    """Keys of one end.

    A hub needs ``clients``, the folder with the public keys (``*.key``) that it lets in; a spoke
    needs ``server``, the hub's public key file. The hub reads its folder once, at start.
    """

    secret: Path
    clients: Path | None = None
    server: Path | None = None


def generate_keys(folder: Path, name: str) -> tuple[Path, Path]:
    """Make ``name.key`` (public) and ``name.key_secret`` (mode 0600) in a folder.

    A slash in a node's name becomes a dot in the file's.

    Raises:
        TransportError: a file is there already, or cannot be written.
    """
    public_key, secret_key = (key.decode() for key in zmq.curve_keypair())
    public = folder / f"{name.replace('/', '.')}.key"
    secret = public.with_name(public.name + "_secret")
    text = f'metadata\ncurve\n    public-key = "{public_key}"\n'
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The mode is given as the file is made: there is no moment when others can read the key.
        _write_new(secret, text + f'    secret-key = "{secret_key}"\n', mode=0o600)
        _write_new(public, text, mode=0o644)
    except OSError as error:
        raise TransportError(f"key file {error.filename}: {error.strerror}") from None
    return public, secret


def _write_new(path: Path, text: str, *, mode: int) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
        file.write(text)


class _Context(zmq.Context[zmq.Socket[bytes]]):
    """A context that closes its own sockets before it ends, also as garbage.

    pyzmq's knows them by weak references, which are gone when it is collected together with them:
    it then waits for ever for sockets that nobody closes.
    """

    made: tuple[zmq.Socket[bytes], ...] = ()
    pid = 0

    def socket(self, *args: Any, **options: Any) -> zmq.Socket[bytes]:
        """As pyzmq's."""
        socket: zmq.Socket[bytes] = super().socket(*args, **options)
        self.made = (*(each for each in self.made if not each.closed), socket)
        return socket

    def __del__(self) -> None:
        if os.getpid() == self.pid:  # a forked child has no part in them
            for socket in self.made:
                socket.close(0)
        super().__del__()


def new_context(io_threads: int = 1) -> zmq.Context[zmq.Socket[bytes]]:
    """A context whose I/O threads are as urgent as this thread, which waits for what they bring.

    Not more: they would run for every single message, and take more time than all the rest.
    """
    context = _Context(io_threads)
    context.pid = os.getpid()
    if os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK == os.SCHED_FIFO:
        context.set(zmq.THREAD_SCHED_POLICY, os.SCHED_FIFO)
        context.set(zmq.THREAD_PRIORITY, os.sched_getparam(0).sched_priority)
    return context


class _Sockets:
    """What both ends share: a context of this process, safe options, sending and waiting."""

    def __init__(self, curve: Curve | None, host: str, *, control_apart: bool = False) -> None:
        keys = _load_keys(curve) if curve else None
        self.dropped_total = 0
        self.bad_total = 0
        self.context = new_context(2 if control_apart else 1)
        self._control_apart = control_apart
        self._pid = os.getpid()
        self._poller = zmq.Poller()
        self._sockets: list[zmq.Socket[bytes]] = []
        self._keys = keys
        self._ipv6 = ":" in host

    def open(self, kind: int, hwm_messages: int) -> zmq.Socket[bytes]:
        socket = self.context.socket(kind)
        if self._control_apart:
            socket.setsockopt(zmq.AFFINITY, 2 if kind == zmq.ROUTER else 1)
        self._sockets.append(socket)
        socket.linger = 0
        socket.set_hwm(hwm_messages)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        socket.setsockopt(zmq.IPV6, self._ipv6)
        if self._keys:
            socket.curve_publickey, socket.curve_secretkey = self._keys
        return socket

    def listen(self, socket: zmq.Socket[bytes]) -> None:
        self._poller.register(socket, zmq.POLLIN)

    def send(self, socket: zmq.Socket[bytes], data: bytes, to: bytes | None = None) -> bool:
        self._check_process()
        try:
            if len(data) > MAX_MESSAGE_BYTES:
                raise zmq.Again  # as good as a full queue: it will not get through
            if to is not None:
                socket.send(to, _MORE)
            socket.send(data, NOBLOCK)
        except zmq.ZMQError:
            self.dropped_total += 1
            return False
        return True

    def watch(self, descriptor: int) -> None:
        self._poller.register(descriptor, zmq.POLLIN)

    def wait(self, timeout_s: float) -> bool:
        self._check_process()
        return bool(self._poller.poll(max(0, int(timeout_s * 1000))))

    def read(self, data: bytes) -> Envelope | None:
        try:
            return decode(data)
        except (TransportError, ValueError):  # ValueError: text that is not UTF-8
            self.bad_total += 1
            return None

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise TransportError(
                "sockets do not survive a fork: open them in the child, or start it with 'spawn'"
            )

    def close(self) -> None:
        if os.getpid() != self._pid:
            return
        for socket in self._sockets:
            socket.close()
        self.context.term()


class ZmqHub:
    """The coordinator's end; see `testbed.core.transport.base.Hub`.

    Beyond loopback the hub wants CURVE keys and a list of the clients that it lets in. A name then
    belongs to the key that first used it: another client's reports under that name are bad frames.

    Args:
        bind: ``tcp://HOST:PORT``; telemetry uses PORT + 1. Port 0 picks a free pair.
        deliver: gets what arrives.
        delay_s: from sent to due.
        now_s: the run's clock, to count what came after it was due.
        deliver_reports: gets nodes' reports of one moment together, which costs less; by default
            ``deliver`` gets each.
        curve: keys; without them only loopback addresses are bound.
        incarnation: grows with every life of the coordinator; by default the wall clock.
        hwm_messages: bound of each queue; by default ample.

    Raises:
        TransportError: the address is taken, wrong, or not loopback without keys; or a key file
            cannot be used.
    """

    def __init__(
        self,
        bind: str,
        deliver: Deliver,
        delay_s: float,
        *,
        now_s: Callable[[], float],
        deliver_reports: Callable[[list[Envelope], float], object] | None = None,
        curve: Curve | None = None,
        incarnation: int | None = None,
        hwm_messages: int | None = None,
    ) -> None:
        host, port = _split(bind)
        if curve is None and not _is_loopback(host):
            raise TransportError(
                f"{bind} is not a loopback address: it needs CURVE keys and a folder of the public "
                "keys that are let in"
            )
        clients = _load_clients(curve) if curve else {}
        self.stats: dict[str, StreamStats] = {}
        self.incarnation = time.time_ns() if incarnation is None else incarnation
        self._counters: dict[str, PeerCounter] = {}
        self._sequence: dict[str, int] = {}
        self._routes: dict[str, str] = {}
        """Which relay a node is behind."""
        self._deliver, self._delay_s, self._now_s = deliver, delay_s, now_s
        self._guard: ThreadAuthenticator | None = None
        # Commands have an I/O thread of their own: they do not queue behind a fleet's reports.
        self._io = _Sockets(curve, host, control_apart=True)
        try:
            if curve is not None:
                self._guard = ThreadAuthenticator(self._io.context)
                self._guard.certs[_ZAP_DOMAIN] = clients
                self._guard.start()
            self._control = self._open(zmq.ROUTER, hwm_messages or _CONTROL_HWM_MESSAGES)
            self._control.setsockopt(zmq.ROUTER_MANDATORY, 1)
            self._control.setsockopt(zmq.ROUTER_HANDOVER, 1)
            self._telemetry = self._open(zmq.SUB, hwm_messages or _TELEMETRY_HWM_MESSAGES)
            self._telemetry.setsockopt(zmq.SUBSCRIBE, b"")
            port = self._bind(host, port)
        except BaseException:
            self.close()
            raise
        self.endpoint = _join(host, port)
        self._reports = ReportIntake(
            self._telemetry.recv,
            self._io.read,
            self._counters,
            delay_s,
            deliver_reports or self._deliver_each,
            self._take_telemetry,
            keyed=curve is not None,
        )
        self._io.listen(self._control)
        self._io.listen(self._telemetry)

    def _open(self, kind: int, hwm_messages: int) -> zmq.Socket[bytes]:
        socket = self._io.open(kind, hwm_messages)
        socket.setsockopt(zmq.BACKLOG, _BACKLOG)
        if self._guard is not None:
            socket.curve_server = True
            socket.setsockopt(zmq.ZAP_DOMAIN, _ZAP_DOMAIN.encode())
            socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        return socket

    def _bind(self, host: str, port: int) -> int:
        """Bind both sockets to neighbouring ports; returns the first."""
        for _ in range(1 if port else 50):
            chosen = port
            try:
                self._control.bind(_join(host, port))
                chosen = _split(self._control.getsockopt_string(zmq.LAST_ENDPOINT))[1]
                self._telemetry.bind(_join(host, chosen + 1))
                return chosen
            except zmq.ZMQError as error:
                if port or not chosen:  # nothing else to try
                    ports = f"ports {port} and {port + 1}" if port else "any port"
                    raise TransportError(
                        f"cannot listen on {host} {ports}: {zmq.strerror(error.errno or 0)}"
                    ) from None
                self._control.unbind(_join(host, chosen))
        raise TransportError(f"no two neighbouring ports are free on {host}")

    @property
    def dropped_total(self) -> int:
        """Messages that could not be queued."""
        return self._io.dropped_total

    @property
    def bad_total(self) -> int:
        """Frames that were no message of ours, or not from whom they said."""
        return self._io.bad_total

    def send(self, to: str, body: Body, t_s: float) -> bool:
        """Queue a message to a node; False if it is not connected or its queue is full."""
        return self.pass_on(to, self._word(to, body, t_s), t_s)

    def pass_on(self, to: str, data: bytes, t_s: float) -> bool:
        """Queue a message as somebody else made it; False as for `send`."""
        relay = self._routes.get(to)
        if relay is not None:
            to, data = relay, self._word(relay, Forwarded(to, data), t_s)
        return self._io.send(self._control, data, to.encode())

    def _word(self, to: str, body: Body, t_s: float) -> bytes:
        sequence = self._sequence[to] = self._sequence.get(to, 0) + 1
        return encode(Envelope(COORDINATOR, self.incarnation, sequence, t_s, body))

    def poll(self, timeout_s: float) -> None:
        """Deliver what has arrived, waiting up to ``timeout_s`` for the first."""
        os.sched_yield()  # I/O threads of the same real-time priority would not get this core else
        if not self._io.wait(timeout_s):
            return
        control = _DRAIN_MESSAGES
        for _ in range(_DRAIN_MESSAGES // _SLICE_MESSAGES):
            control -= self._drain_control(control)
            taken = self._reports.drain(_SLICE_MESSAGES, self._now_s())
            if taken < _SLICE_MESSAGES:
                break

    def _drain_control(self, limit: int) -> int:
        """Take in up to ``limit`` messages; returns how many."""
        key, now_s = "", self._now_s()
        for taken in range(limit):
            try:
                if self._guard is None:
                    frames = _receive(self._control, 2)
                else:
                    parts = self._control.recv_multipart(NOBLOCK, copy=False)
                    frames, key = [part.bytes for part in parts], str(parts[-1].get("User-Id"))
            except zmq.Again:
                return taken
            if len(frames) == 2:
                self._take_control(frames[1], frames[0], key, now_s)
            else:
                self._io.bad_total += 1
        return limit

    def _deliver_each(self, words: list[Envelope], due_s: float) -> None:
        for envelope in words:
            self._deliver(envelope, due_s)

    def _take_control(self, data: bytes, identity: bytes, key: str, now_s: float) -> None:
        envelope = self._io.read(data)
        if envelope is None:
            return
        if envelope.source.encode() != identity:
            self._io.bad_total += 1
        else:
            self._take(envelope, key, "control", now_s)

    def _take_telemetry(self, envelope: Envelope, key: str, now_s: float) -> None:
        self._take(envelope, key, "telemetry", now_s)

    def _take(self, envelope: Envelope, key: str, stream: Stream, now_s: float) -> None:
        name, body = envelope.source, envelope.body
        if TOPICS[type(body)].stream != stream:
            self._io.bad_total += 1
            return
        counter = self._counters.get(name) or self._meet(name, key)
        if counter.key != key:
            self._io.bad_total += 1
        elif not counter.take(envelope, stream):
            pass
        elif isinstance(body, Forwarded):
            self._take_forwarded(name, body.message, key, now_s)
        elif isinstance(body, RowReport):
            self._take_row(envelope, body, key, now_s)
        else:
            if stream == "control":
                self._routes.pop(name, None)
            hand_over(envelope, self._delay_s, now_s, counter.stats, self._deliver)

    def _take_forwarded(self, relay: str, data: bytes, key: str, now_s: float) -> None:
        """What a node said through a relay; it has the relay's key from then on."""
        envelope = self._io.read(data)
        if envelope is None:
            return
        name = envelope.source
        topic = TOPICS[type(envelope.body)]
        if (topic.stream, topic.sender) != ("control", "node"):
            self._io.bad_total += 1
            return
        counter = self._counters.get(name) or self._meet(name, key)
        if counter.key != key:
            self._io.bad_total += 1
            return
        self._routes[name] = relay
        if counter.take(envelope, "control"):
            hand_over(envelope, self._delay_s, now_s, counter.stats, self._deliver)

    def _take_row(self, envelope: Envelope, row: RowReport, key: str, now_s: float) -> None:
        """What many nodes reported through a relay: each counts for itself."""
        keep = []
        for name, incarnation, number in zip(row.node, row.incarnation, row.sequence, strict=True):
            counter = self._counters.get(name) or self._meet(name, key)
            if counter.key != key:
                self._io.bad_total += 1
                keep.append(False)
            else:
                keep.append(counter.count(incarnation, number, "telemetry"))
        if not all(keep):
            envelope = msgspec.structs.replace(envelope, body=row.pick(keep))
        stats = self._counters[envelope.source].stats
        hand_over(envelope, self._delay_s, now_s, stats, self._deliver)

    def _meet(self, name: str, key: str) -> PeerCounter:
        """Somebody speaks for the first time: the name belongs to this key from now on."""
        counter = self._counters[name] = PeerCounter(key)
        self.stats[name] = counter.stats
        return counter

    def wake_for(self, spoke: ZmqSpoke) -> None:
        """Have what comes to a spoke of this process end the waiting of `poll` too."""
        self._io.listen(spoke.control)

    def close(self) -> None:
        """Release the sockets without waiting for the peers."""
        if self._guard is not None:
            self._guard.stop()
            self._guard = None
        self._io.close()


class NodeEnd:
    """What every node's end does, whatever carries it: number what it says, judge what it hears.

    Args:
        name: of the node; the hub knows it by this.
        incarnation: grows with every life of the node.
        deliver: gets what arrives.
        delay_s: from sent to due.
        now_s: the run's clock, to count what came after it was due.
    """

    def __init__(
        self,
        name: str,
        incarnation: int,
        deliver: Deliver,
        delay_s: float,
        now_s: Callable[[], float],
    ) -> None:
        self.name = name
        self.incarnation = incarnation
        self._counter = PeerCounter()
        self.stats = self._counter.stats
        self._sequence: dict[Stream, int] = {"control": 0, "telemetry": 0}
        self._deliver, self._delay_s, self._now_s = deliver, delay_s, now_s

    def _word(self, body: Body, t_s: float) -> tuple[Stream, Envelope]:
        """A message with its number, and the stream that it goes by."""
        stream = TOPICS[type(body)].stream
        sequence = self._sequence[stream] = self._sequence[stream] + 1
        return stream, Envelope(self.name, self.incarnation, sequence, t_s, body)

    def _hear(self, envelope: Envelope) -> bool:
        """Deliver what the coordinator says, once; False if it was not the coordinator."""
        if envelope.source != COORDINATOR:
            return False
        if self._counter.take(envelope, "control"):
            hand_over(envelope, self._delay_s, self._now_s(), self.stats, self._deliver)
        return True


class ZmqSpoke(NodeEnd):
    """A node's end; see `testbed.core.transport.base.Spoke`.

    Making one waits a moment for the connection, so that the first word is not dropped; a hub that
    is not there yet is tried again and again in the background, and until then `send` says False.

    Args:
        connect: the hub's ``tcp://HOST:PORT``.
        name: of the node; the hub knows it by this.
        incarnation: grows with every life of the node.
        deliver: gets what arrives.
        delay_s: from sent to due.
        now_s: the run's clock, to count what came after it was due.
        curve: keys; without them only loopback addresses are connected to.
        hwm_messages: bound of each queue; by default ample.

    Raises:
        TransportError: the address, the name or the keys are wrong.
    """

    def __init__(
        self,
        connect: str,
        name: str,
        incarnation: int,
        deliver: Deliver,
        delay_s: float,
        *,
        now_s: Callable[[], float],
        curve: Curve | None = None,
        hwm_messages: int | None = None,
    ) -> None:
        host, port = _split(connect)
        if port == 0:
            raise TransportError(f"{connect}: a node needs the coordinator's port")
        if curve is None and not _is_loopback(host):
            raise TransportError(
                f"{connect} is not a loopback address: it needs CURVE keys, here and there"
            )
        if not 0 < len(name.encode()) < 256 or name[0] == "\0":
            raise TransportError(f"node name {name!r}: must have 1 to 255 bytes")
        server_key = _load_server(curve) if curve else b""
        super().__init__(name, incarnation, deliver, delay_s, now_s)
        self._io = _Sockets(curve, host)
        try:
            self.control = self._open(zmq.DEALER, hwm_messages or _CONTROL_HWM_MESSAGES)
            self.control.setsockopt(zmq.IDENTITY, name.encode())
            telemetry = self._open(zmq.PUB, hwm_messages or _TELEMETRY_HWM_MESSAGES)
            telemetry.setsockopt(zmq.XPUB_NODROP, 1)
            if curve is not None:
                self.control.curve_serverkey = telemetry.curve_serverkey = server_key
            telemetry.connect(_join(host, port + 1))
            self.control.connect(_join(host, port))
        except zmq.ZMQError as error:
            self._io.close()
            raise TransportError(
                f"cannot connect to {connect}: {zmq.strerror(error.errno or 0)}"
            ) from None
        self._by_stream = {"control": self.control, "telemetry": telemetry}
        self._io.listen(self.control)
        self.control.poll(_CONNECT_MS, zmq.POLLOUT)

    def _open(self, kind: int, hwm_messages: int) -> zmq.Socket[bytes]:
        socket = self._io.open(kind, hwm_messages)
        socket.setsockopt(zmq.IMMEDIATE, 1)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, _RECONNECT_MAX_MS)
        return socket

    @property
    def dropped_total(self) -> int:
        """Messages that could not be queued."""
        return self._io.dropped_total

    @property
    def bad_total(self) -> int:
        """Frames that were no message of ours."""
        return self._io.bad_total

    def send(self, body: Body, t_s: float) -> bool:
        """Queue a message to the hub; False if it is not connected or its queue is full."""
        stream, envelope = self._word(body, t_s)
        return self._io.send(self._by_stream[stream], encode(envelope))

    def poll(self, timeout_s: float) -> None:
        """Deliver what has arrived, waiting up to ``timeout_s`` for the first."""
        if not self._io.wait(timeout_s):
            return
        for _ in range(_DRAIN_MESSAGES):
            try:
                frames = _receive(self.control, 1)
            except zmq.Again:
                return
            if len(frames) == 1:
                self._take(frames[0])
            else:
                self._io.bad_total += 1

    def _take(self, data: bytes) -> None:
        envelope = self._io.read(data)
        if envelope is not None and not self._hear(envelope):
            self._io.bad_total += 1

    def watch(self, descriptor: int) -> None:
        """Have something readable on another file descriptor end the waiting of `poll`."""
        self._io.watch(descriptor)

    def close(self) -> None:
        """Release the sockets without waiting for the peer."""
        self._io.close()


def _receive(socket: zmq.Socket[bytes], num_frames: int) -> list[bytes]:
    """The frames of the next message, which has at least so many; it may have more."""
    frames = [socket.recv(NOBLOCK) for _ in range(num_frames - 1)]
    last = socket.recv(NOBLOCK, copy=False)
    frames.append(last.bytes)
    while last.more:
        last = socket.recv(NOBLOCK, copy=False)
        frames.append(last.bytes)
    return frames


def hand_over(
    envelope: Envelope,
    delay_s: float,
    now_s: float,
    stats: StreamStats,
    deliver: Deliver,
) -> None:
    """Deliver a message with the time it is due, counting it if that has passed."""
    due_s = envelope.t_s + delay_s
    if now_s > due_s and not isinstance(envelope.body, _UNTIMED):
        stats.late_total += 1
    deliver(envelope, due_s)


def _load_keys(curve: Curve) -> tuple[bytes, bytes]:
    """This end's public and secret key."""
    path = curve.secret
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise TransportError(f"key file {path}: {error.strerror}") from None
    if mode & 0o077:
        raise TransportError(f"key file {path}: its mode is {mode:o}, must be 600")
    public, secret = _load_key(path)
    if secret is None:
        raise TransportError(f"key file {path}: holds no secret key")
    return public, secret


def _load_server(curve: Curve) -> bytes:
    if curve.server is None:
        raise TransportError("CURVE: a node needs the coordinator's public key file")
    return _load_key(curve.server)[0]


def _load_clients(curve: Curve) -> dict[bytes, bool]:
    """The allow-list: never empty, and never a wildcard."""
    if curve.clients is None or not curve.clients.is_dir():
        raise TransportError(f"CURVE: no folder of the public keys to let in: {curve.clients}")
    clients = {_load_key(path)[0]: True for path in sorted(curve.clients.glob("*.key"))}
    if not clients:
        raise TransportError(f"CURVE: no public key (*.key) in {curve.clients}: nobody could join")
    return clients


def _load_key(path: Path) -> tuple[bytes, bytes | None]:
    try:
        public, secret = zmq.auth.load_certificate(path)
        if any(len(key) != 40 for key in (public, secret) if key is not None):
            raise ValueError("a key has 40 characters")
    except (OSError, ValueError) as error:
        raise TransportError(f"key file {path}: {error}") from None
    return public, secret


def _split(address: str) -> tuple[str, int]:
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise TransportError(f"address {address!r}: {error}") from None
    if parts.scheme != "tcp" or not host or port is None or not 0 <= port < 65535:
        raise TransportError(f"address {address!r}: expected tcp://HOST:PORT, port 0 to 65534")
    return "0.0.0.0" if host == "*" else host, port


def _join(host: str, port: int) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name, which may lead anywhere
