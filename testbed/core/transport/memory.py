"""Messages inside one process, with seeded delay, jitter and loss.

Nothing is encoded on this path: messages are immutable, and what arrives is the very object that
was sent. ``check=True`` sends each through the wire format all the same, for tests.

Jitter delays, and never reorders, what one sender says on one stream, as TCP would. Only telemetry
is lost: control travels on connections that retransmit, so loss there shows as delay.

>>> from testbed.core.messages import Heartbeat
>>> seen = []
>>> network = Network(delay_s=0.005)
>>> hub = network.hub(lambda envelope, due_s: seen.append((envelope.source, due_s)))
>>> node = network.spoke("row0/rack0/node000", 1, lambda envelope, due_s: None)
>>> node.send(Heartbeat(), t_s=1.0), seen
(True, [('row0/rack0/node000', 1.005)])
"""

from __future__ import annotations

import math

import numpy as np

from testbed.core.errors import TransportError
from testbed.core.messages import Body, Envelope, decode, encode
from testbed.core.topics import TOPICS, Stream
from testbed.core.transport.base import COORDINATOR, Deliver
from testbed.core.transport.counting import PeerCounter, StreamStats


class _Link:
    """One direction between one life of a node and the coordinator."""

    __slots__ = (
        "_counter", "_deliver", "_due_s", "_incarnation", "_network", "_rng", "_seed", "_sequence",
        "_source", "closed", "cut",
    )  # fmt: skip

    def __init__(
        self,
        network: Network,
        seed: list[int],
        source: str,
        incarnation: int,
        counter: PeerCounter,
        deliver: Deliver,
    ) -> None:
        self._network = network
        self._seed = seed
        self._rng: np.random.Generator | None = None
        self._source, self._incarnation = source, incarnation
        self._counter, self._deliver = counter, deliver
        self._sequence: dict[Stream, int] = {"control": 0, "telemetry": 0}
        self._due_s: dict[Stream, float] = {"control": -math.inf, "telemetry": -math.inf}
        self.cut = False
        self.closed = False

    def send(self, body: Body, t_s: float) -> bool:
        if self.closed:
            return False
        network = self._network
        stream = TOPICS[type(body)].stream
        sequence = self._sequence[stream] = self._sequence[stream] + 1
        if self.cut or (network.loss_frac > 0 and stream == "telemetry" and self._lost()):
            return True  # the sender cannot know; the receiver sees the gap
        envelope = Envelope(self._source, self._incarnation, sequence, t_s, body)
        if network.check:
            envelope = decode(encode(envelope))
        due_s = t_s + network.delay_s
        if network.jitter_s > 0:
            due_s += self._random().exponential(network.jitter_s)
            due_s = self._due_s[stream] = max(due_s, self._due_s[stream])
        if self._counter.take(envelope, stream):
            self._deliver(envelope, due_s)
        return True

    def _lost(self) -> bool:
        return self._random().random() < self._network.loss_frac

    def _random(self) -> np.random.Generator:
        # Made when first needed: a generator costs as much as a hundred messages.
        if self._rng is None:
            self._rng = np.random.default_rng(self._seed)
        return self._rng


class Network:
    """One coordinator and its nodes.

    Args:
        seed: of all random delay and loss; each link draws from a child of its own, made from the
            node's name, so that neither another link's traffic nor the order in which nodes came
            changes its luck.
        delay_s: from sent to due.
        jitter_s: mean of an exponential extra delay.
        loss_frac: share of telemetry messages that never arrive.
        check: round-trip every message through the wire format.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        delay_s: float = 0.005,
        jitter_s: float = 0.0,
        loss_frac: float = 0.0,
        check: bool = False,
    ) -> None:
        self.seed = seed
        self.delay_s = delay_s
        self.jitter_s = jitter_s
        self.loss_frac = loss_frac
        self.check = check
        self._hub: MemoryHub | None = None
        self._spokes: dict[str, MemorySpoke] = {}
        self._lives: dict[str, int] = {}

    def hub(self, deliver: Deliver) -> MemoryHub:
        """The coordinator's end."""
        self._hub = MemoryHub(self, deliver)
        return self._hub

    def spoke(self, name: str, incarnation: int, deliver: Deliver) -> MemorySpoke:
        """A node's end; a new one under an old name takes its place.

        Raises:
            TransportError: there is no hub yet.
        """
        hub = self._hub
        if hub is None:
            raise TransportError("connect the hub first")
        life = self._lives[name] = self._lives.get(name, 0) + 1
        seed = [self.seed, life, *name.encode()]
        counter = PeerCounter()
        up = _Link(self, [*seed, 1], name, incarnation, hub.counter(name), hub.deliver)
        down = _Link(self, [*seed, 2], COORDINATOR, 1, counter, deliver)
        spoke = self._spokes[name] = MemorySpoke(name, incarnation, up, down, counter.stats)
        return spoke

    def send_down(self, to: str, body: Body, t_s: float) -> bool:
        """From the coordinator to a node."""
        spoke = self._spokes.get(to)
        return spoke is not None and spoke.down.send(body, t_s)

    def partition(self, name: str, *, cut: bool = True) -> None:
        """Drop everything from and to a node, or stop doing so."""
        spoke = self._spokes[name]
        spoke.up.cut = spoke.down.cut = cut

    def close(self) -> None:
        """Let nobody send any more."""
        for spoke in self._spokes.values():
            spoke.close()


class MemoryHub:
    """See `testbed.core.transport.base.Hub`."""

    def __init__(self, network: Network, deliver: Deliver) -> None:
        self._network = network
        self._counters: dict[str, PeerCounter] = {}
        self.deliver = deliver
        self.dropped_total = 0
        self.bad_total = 0
        self.stats: dict[str, StreamStats] = {}

    def counter(self, name: str) -> PeerCounter:
        """Counts what comes from a node, over all of its lives."""
        counter = self._counters.get(name)
        if counter is None:
            counter = self._counters[name] = PeerCounter()
            self.stats[name] = counter.stats
        return counter

    def send(self, to: str, body: Body, t_s: float) -> bool:
        """Hand a message to a node; False if there is no such node."""
        sent = self._network.send_down(to, body, t_s)
        self.dropped_total += not sent
        return sent

    def poll(self, timeout_s: float) -> None:
        """Nothing waits here: messages are delivered as they are sent."""

    def close(self) -> None:
        """Nothing that is sent from now on arrives, either way."""
        self._network.close()


class MemorySpoke:
    """See `testbed.core.transport.base.Spoke`."""

    def __init__(
        self, name: str, incarnation: int, up: _Link, down: _Link, stats: StreamStats
    ) -> None:
        self.name = name
        self.incarnation = incarnation
        self.up, self.down = up, down
        self.dropped_total = 0
        self.bad_total = 0
        self.stats = stats

    def send(self, body: Body, t_s: float) -> bool:
        """Hand a message to the coordinator; False once closed."""
        sent = self.up.send(body, t_s)
        self.dropped_total += not sent
        return sent

    def poll(self, timeout_s: float) -> None:
        """Nothing waits here: messages are delivered as they are sent."""

    def close(self) -> None:
        """Nothing that is sent from now on arrives, either way."""
        self.up.closed = self.down.closed = True
