"""Messages between processes, over ZeroMQ.

Two sockets on each side. *Control* is a ROUTER at the hub and a DEALER at each node, whose identity
is the node's name: two-way and bounded. *Telemetry* is a PUB at each node that connects to one SUB
of the hub, on the port after the control port: it drops under pressure, and the gap in its sequence
numbers shows.

Traps that this file knows (libzmq 4.3): options act only before bind or connect; a PUB drops
without a word above its high-water mark, and until its subscription has arrived (so a node's hello
goes by control, and gaps count from the first telemetry that came); the default LINGER hangs a
shutdown; contexts do not survive a fork; a ROUTER drops what it cannot route unless told to
complain, and ignores a restarted peer with an old identity unless told to hand over; CURVE without
an authenticator lets every client in.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator

from testbed.core.errors import TransportError
from testbed.core.messages import MAX_MESSAGE_BYTES, Body, Envelope, decode, encode
from testbed.core.topics import TOPICS, Stream
from testbed.core.transport.base import Deliver, StreamStats

COORDINATOR = "coordinator"
_HWM_MESSAGES = 10_000
"""Per peer and direction: many seconds of a busy node, then drops are counted."""
_DRAIN_MESSAGES = 1_000
"""Messages taken in per socket and poll, so that no socket starves another or the caller."""


@dataclass(frozen=True)
class Curve:
    """Keys of one end. A hub needs ``clients``, the folder with the public keys it lets in; a
    spoke needs ``server``, the hub's public key file."""

    secret: Path
    clients: Path | None = None
    server: Path | None = None


def generate_keys(folder: Path, name: str) -> tuple[Path, Path]:
    """Make ``name.key`` and ``name.key_secret`` (mode 0600) in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    public, secret = zmq.auth.create_certificates(str(folder), name)
    Path(secret).chmod(0o600)
    return Path(public), Path(secret)


class _Sockets:
    """What both ends share: a context of this process, safe options, and the poller."""

    def __init__(self, curve: Curve | None) -> None:
        self._pid = os.getpid()
        self._context = zmq.Context()
        self._poller = zmq.Poller()
        self._sockets: list[zmq.Socket[bytes]] = []
        self._keys = _load_keys(curve) if curve else None
        self.dropped_total = 0
        self.bad_total = 0

    def open(self, kind: int) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.linger = 0
        socket.set_hwm(_HWM_MESSAGES)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        if self._keys:
            socket.curve_publickey, socket.curve_secretkey = self._keys
        self._sockets.append(socket)
        return socket

    def listen(self, socket: zmq.Socket[bytes]) -> None:
        self._poller.register(socket, zmq.POLLIN)

    def watch(self, descriptor: int) -> None:
        self._poller.register(descriptor, zmq.POLLIN)

    def wait(self, timeout_s: float) -> bool:
        if os.getpid() != self._pid:
            raise TransportError("sockets were opened before a fork; open them in the child")
        return bool(self._poller.poll(max(0, int(timeout_s * 1000))))

    def close(self) -> None:
        if os.getpid() != self._pid:
            return
        for socket in self._sockets:
            socket.close()
        self._context.term()


def _load_keys(curve: Curve) -> tuple[bytes, bytes]:
    try:
        mode = stat.S_IMODE(curve.secret.stat().st_mode)
        if mode & 0o077:
            raise TransportError(f"key file {curve.secret}: mode {mode:o}, must be 600")
        public, secret = zmq.auth.load_certificate(curve.secret)
    except (OSError, ValueError) as error:
        raise TransportError(f"key file {curve.secret}: {error}") from None
    if secret is None:
        raise TransportError(f"key file {curve.secret}: holds no secret key")
    return public, secret


class _Counter:
    """Sequence numbers of what comes from one peer, by stream."""

    def __init__(self, stats: StreamStats) -> None:
        self.stats = stats
        self._incarnation = -1
        self._last: dict[Stream, int] = {}

    def count(self, envelope: Envelope, stream: Stream) -> bool:
        """Whether the message is of the peer's present life; counts what is missing before it."""
        if envelope.incarnation < self._incarnation:
            self.stats.stale_total += 1
            return False
        if envelope.incarnation > self._incarnation:
            self._incarnation = envelope.incarnation
            self._last.clear()
        last = self._last.get(stream)
        if last is not None and envelope.sequence > last + 1:
            self.stats.gaps_total += envelope.sequence - last - 1
        self._last[stream] = envelope.sequence
        self.stats.received_total += 1
        return True


class ZmqHub:
    """The coordinator's end; see `testbed.core.transport.base.Hub`.

    Args:
        bind: ``tcp://HOST:PORT``; telemetry uses PORT + 1. Port 0 picks a free pair.
        deliver: gets what arrives.
        delay_s: from sent to due.
        now_s: the run's clock, to count what came after it was due.
        curve: keys; without them only loopback addresses are bound.

    Raises:
        TransportError: the address is taken, wrong, or not loopback without keys.
    """

    def __init__(
        self,
        bind: str,
        deliver: Deliver,
        delay_s: float,
        *,
        now_s: Callable[[], float],
        curve: Curve | None = None,
    ) -> None:
        host, port = _split(bind)
        if not _is_loopback(host) and (curve is None or curve.clients is None):
            raise TransportError(
                f"{bind} is not a loopback address: it needs CURVE keys and a folder of the public "
                "keys that are let in"
            )
        self.stats: dict[str, StreamStats] = {}
        self._counters: dict[str, _Counter] = {}
        self._sequence: dict[str, int] = {}
        self._deliver, self._delay_s, self._now_s = deliver, delay_s, now_s
        self._io = _Sockets(curve)
        self._guard: ThreadAuthenticator | None = None
        self._control = self._io.open(zmq.ROUTER)
        self._control.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._control.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._telemetry = self._io.open(zmq.SUB)
        self._telemetry.setsockopt(zmq.SUBSCRIBE, b"")
        try:
            if curve is not None and curve.clients is not None:
                self._guard = ThreadAuthenticator(self._io._context)
                self._guard.start()
                self._guard.configure_curve(domain="*", location=str(curve.clients))
                self._control.curve_server = self._telemetry.curve_server = True
            port = self._bind(host, port)
        except BaseException:
            self.close()
            raise
        self.endpoint = f"tcp://{host}:{port}"
        self._io.listen(self._control)
        self._io.listen(self._telemetry)

    def _bind(self, host: str, port: int) -> int:
        """Bind both sockets to neighbouring ports; returns the first."""
        for _ in range(50 if port == 0 else 1):
            chosen = port
            try:
                if port == 0:
                    chosen = self._control.bind_to_random_port(f"tcp://{host}")
                else:
                    self._control.bind(f"tcp://{host}:{port}")
                self._telemetry.bind(f"tcp://{host}:{chosen + 1}")
                return chosen
            except zmq.ZMQError as error:
                if port != 0:
                    raise TransportError(
                        f"cannot listen on {host} ports {port} and {port + 1}: {error.strerror}"
                    ) from None
                if chosen:
                    self._control.unbind(f"tcp://{host}:{chosen}")
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
        sequence = self._sequence[to] = self._sequence.get(to, 0) + 1
        data = encode(Envelope(COORDINATOR, 1, sequence, t_s, body))
        try:
            self._control.send_multipart([to.encode(), data], zmq.NOBLOCK)
        except zmq.ZMQError:
            self._io.dropped_total += 1
            return False
        return True

    def poll(self, timeout_s: float) -> None:
        """Deliver what has arrived, waiting up to ``timeout_s`` for the first."""
        if not self._io.wait(timeout_s):
            return
        for _ in range(_DRAIN_MESSAGES):
            try:
                frames = self._control.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            if len(frames) == 2:
                self._take(frames[1], "control", frames[0])
            else:
                self._io.bad_total += 1
        for _ in range(_DRAIN_MESSAGES):
            try:
                self._take(self._telemetry.recv(zmq.NOBLOCK), "telemetry", None)
            except zmq.Again:
                break

    def _take(self, data: bytes, stream: Stream, identity: bytes | None) -> None:
        try:
            envelope = decode(data)
        except TransportError:
            self._io.bad_total += 1
            return
        name = envelope.source
        if identity is not None and name.encode() != identity:
            self._io.bad_total += 1
            return
        counter = self._counters.get(name)
        if counter is None:
            stats = self.stats[name] = StreamStats()
            counter = self._counters[name] = _Counter(stats)
        if counter.count(envelope, stream):
            due_s = envelope.t_s + self._delay_s
            counter.stats.late_total += self._now_s() > due_s
            self._deliver(envelope, due_s)

    def close(self) -> None:
        """Release the sockets without waiting for the peers."""
        if self._guard is not None:
            self._guard.stop()
            self._guard = None
        self._io.close()


class ZmqSpoke:
    """A node's end; see `testbed.core.transport.base.Spoke`.

    Args:
        connect: the hub's ``tcp://HOST:PORT``.
        name: of the node; the hub knows it by this.
        incarnation: grows with every life of the node.
        deliver: gets what arrives.
        delay_s: from sent to due.
        now_s: the run's clock, to count what came after it was due.
        curve: keys.

    Raises:
        TransportError: the address or the keys are wrong.
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
    ) -> None:
        host, port = _split(connect)
        if port == 0:
            raise TransportError(f"{connect}: a node needs the coordinator's port")
        self.name = name
        self.incarnation = incarnation
        self.stats = StreamStats()
        self._counter = _Counter(self.stats)
        self._sequence: dict[Stream, int] = {"control": 0, "telemetry": 0}
        self._deliver, self._delay_s, self._now_s = deliver, delay_s, now_s
        self._io = _Sockets(curve)
        control = self._io.open(zmq.DEALER)
        control.setsockopt(zmq.IDENTITY, name.encode())
        telemetry = self._io.open(zmq.PUB)
        if curve is not None:
            if curve.server is None:
                raise TransportError("CURVE: a node needs the coordinator's public key")
            server_key, _ = zmq.auth.load_certificate(curve.server)
            control.curve_serverkey = telemetry.curve_serverkey = server_key
        try:
            control.connect(f"tcp://{host}:{port}")
            telemetry.connect(f"tcp://{host}:{port + 1}")
        except zmq.ZMQError as error:
            self._io.close()
            raise TransportError(f"cannot connect to {connect}: {error.strerror}") from None
        self._by_stream: dict[Stream, zmq.Socket[bytes]] = {
            "control": control,
            "telemetry": telemetry,
        }
        self._control = control
        self._io.listen(control)

    @property
    def dropped_total(self) -> int:
        """Messages that could not be queued."""
        return self._io.dropped_total

    @property
    def bad_total(self) -> int:
        """Frames that were no message of ours."""
        return self._io.bad_total

    def send(self, body: Body, t_s: float) -> bool:
        """Queue a message to the hub; False if its queue is full."""
        stream = TOPICS[type(body)].stream
        self._sequence[stream] += 1
        data = encode(Envelope(self.name, self.incarnation, self._sequence[stream], t_s, body))
        try:
            self._by_stream[stream].send(data, zmq.NOBLOCK)
        except zmq.ZMQError:
            self._io.dropped_total += 1
            return False
        return True

    def poll(self, timeout_s: float) -> None:
        """Deliver what has arrived, waiting up to ``timeout_s`` for the first."""
        if not self._io.wait(timeout_s):
            return
        for _ in range(_DRAIN_MESSAGES):
            try:
                data = self._control.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                envelope = decode(data)
            except TransportError:
                self._io.bad_total += 1
                continue
            if self._counter.count(envelope, "control"):
                due_s = envelope.t_s + self._delay_s
                self.stats.late_total += self._now_s() > due_s
                self._deliver(envelope, due_s)

    def watch(self, descriptor: int) -> None:
        """Have something readable on another file descriptor end the waiting of `poll`."""
        self._io.watch(descriptor)

    def close(self) -> None:
        """Release the sockets without waiting for the peer."""
        self._io.close()


def _split(address: str) -> tuple[str, int]:
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise TransportError(f"address {address!r}: {error}") from None
    if parts.scheme != "tcp" or not host or port is None or not 0 <= port < 65535:
        raise TransportError(f"address {address!r}: expected tcp://HOST:PORT, port 0 to 65534")
    return host, port


def _is_loopback(host: str) -> bool:
    return host == "localhost" or host.startswith("127.") or host == "::1"
