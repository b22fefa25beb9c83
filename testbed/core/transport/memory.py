"""Messages inside one process, with seeded delay, jitter and loss.

Nothing is encoded on this path: messages are immutable, and what arrives is the very object that
was sent. ``check=True`` sends each through the wire format all the same, for tests.

Jitter delays, and never reorders, what one sender says on one stream, as TCP would. Only telemetry
is lost: control travels on connections that retransmit, so loss there shows as delay.
"""

from __future__ import annotations

import numpy as np

from testbed.core.errors import TransportError
from testbed.core.messages import Body, Envelope, decode, encode
from testbed.core.topics import TOPICS, Stream
from testbed.core.transport.base import Deliver, StreamStats

COORDINATOR = "coordinator"


class _Link:
    """One direction between one node and the coordinator."""

    def __init__(self, network: Network, seed: list[int], deliver: Deliver) -> None:
        self._network = network
        self._deliver = deliver
        self._rng = np.random.default_rng(seed)
        self._sequence: dict[Stream, int] = {"control": 0, "telemetry": 0}
        self._last_due_s: dict[Stream, float] = {"control": -np.inf, "telemetry": -np.inf}
        self.stats = StreamStats()
        self.cut = False

    def send(self, source: str, incarnation: int, body: Body, t_s: float) -> bool:
        stream = TOPICS[type(body)].stream
        network = self._network
        self._sequence[stream] += 1
        lossy = network.loss_frac > 0 and stream == "telemetry"
        if self.cut or (lossy and self._rng.random() < network.loss_frac):
            self.stats.gaps_total += 1
            return True  # the sender cannot know
        envelope = Envelope(source, incarnation, self._sequence[stream], t_s, body)
        if network.check:
            envelope = decode(encode(envelope))
        due_s = t_s + network.delay_s
        if network.jitter_s > 0:
            due_s += self._rng.exponential(network.jitter_s)
            due_s = self._last_due_s[stream] = max(due_s, self._last_due_s[stream])
        self.stats.received_total += 1
        self._deliver(envelope, due_s)
        return True


class Network:
    """One coordinator and its nodes.

    Args:
        seed: of all random delay and loss; each link draws from a child of its own, so that one
            link's traffic does not change another's luck.
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

    def hub(self, deliver: Deliver) -> MemoryHub:
        """The coordinator's end."""
        self._hub = MemoryHub(self, deliver)
        return self._hub

    def spoke(self, name: str, incarnation: int, deliver: Deliver) -> MemorySpoke:
        """A node's end; a new one under an old name takes its place.

        Raises:
            TransportError: there is no hub yet.
        """
        if self._hub is None:
            raise TransportError("connect the hub first")
        index = len(self._spokes)
        up = _Link(self, [self.seed, 1, index], self._hub.deliver)
        down = _Link(self, [self.seed, 2, index], deliver)
        spoke = MemorySpoke(name, incarnation, up, down)
        self._spokes[name] = spoke
        self._hub.stats[name] = up.stats
        return spoke

    def send_down(self, to: str, body: Body, t_s: float) -> bool:
        """From the coordinator to a node."""
        spoke = self._spokes.get(to)
        if spoke is None:
            return False
        return spoke.down.send(COORDINATOR, 1, body, t_s)

    def partition(self, name: str, *, cut: bool = True) -> None:
        """Drop everything from and to a node, or stop doing so."""
        spoke = self._spokes[name]
        spoke.up.cut = spoke.down.cut = cut


class MemoryHub:
    """See `testbed.core.transport.base.Hub`."""

    def __init__(self, network: Network, deliver: Deliver) -> None:
        self._network = network
        self.deliver = deliver
        self.dropped_total = 0
        self.bad_total = 0
        self.stats: dict[str, StreamStats] = {}

    def send(self, to: str, body: Body, t_s: float) -> bool:
        """Hand a message to a node; False if there is no such node."""
        sent = self._network.send_down(to, body, t_s)
        self.dropped_total += not sent
        return sent

    def poll(self, timeout_s: float) -> None:
        """Nothing waits here: messages are delivered as they are sent."""

    def close(self) -> None:
        """Nothing to release."""


class MemorySpoke:
    """See `testbed.core.transport.base.Spoke`."""

    def __init__(self, name: str, incarnation: int, up: _Link, down: _Link) -> None:
        self.name = name
        self.incarnation = incarnation
        self.up, self.down = up, down
        self.dropped_total = 0
        self.bad_total = 0
        self.stats = down.stats

    def send(self, body: Body, t_s: float) -> bool:
        """Hand a message to the coordinator."""
        return self.up.send(self.name, self.incarnation, body, t_s)

    def poll(self, timeout_s: float) -> None:
        """Nothing waits here: messages are delivered as they are sent."""

    def close(self) -> None:
        """Nothing to release."""
