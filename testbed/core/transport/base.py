"""The transport seam: what the coordinator's hub and a node's spoke must offer.

A hub talks to many nodes by name; a spoke talks to one hub. Both hand what arrives to a
``deliver(envelope, due_s)`` callback: ``due_s`` is when it may act, `Envelope.t_s` plus the
agreed delay (plus injected jitter in memory). The shell enters it into its scheduler.

Sending never blocks. A message that cannot be queued is dropped and counted at the sender, and its
missing sequence number is counted as a gap at the receiver: nothing is lost silently. What comes of
an earlier life of a peer, or a second time, is ignored and counted as stale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from testbed.core.messages import Body, Envelope
from testbed.core.topics import Stream

COORDINATOR = "coordinator"
"""Name of the hub, in the envelopes that it sends."""

Deliver = Callable[[Envelope, float], None]


@dataclass(slots=True)
class StreamStats:
    """Counters of what came from one peer, over all of its streams."""

    received_total: int = 0
    gaps_total: int = 0
    """Messages that were sent to us and never came."""
    stale_total: int = 0
    """Messages of an earlier life of the peer, or heard before; ignored."""
    late_total: int = 0
    """Messages that arrived after they were due; in memory none, as jitter moves the due time."""


class PeerCounter:
    """Sequence numbers of what one peer says, stream by stream; every transport counts with it.

    Gaps count from the first message heard of a life: what a publisher said before anyone could
    listen was not sent to us.

    >>> from testbed.core.messages import Heartbeat
    >>> counter = PeerCounter()
    >>> words = [Envelope("row0/node0", 1, number, 0.0, Heartbeat()) for number in (4, 7, 7)]
    >>> [counter.take(word, "control") for word in words]
    [True, True, False]
    >>> counter.stats
    StreamStats(received_total=2, gaps_total=2, stale_total=1, late_total=0)
    """

    __slots__ = ("_incarnation", "_last", "key", "stats")

    def __init__(self, key: str = "") -> None:
        self.key = key
        """Public key that the peer's name belongs to; empty where there are no keys."""
        self.stats = StreamStats()
        self._incarnation = -1
        self._last: dict[Stream, int] = {}

    def take(self, envelope: Envelope, stream: Stream) -> bool:
        """Whether to deliver the message; counts it, and what is missing before it."""
        return self.count(envelope.incarnation, envelope.sequence, stream)

    def count(self, incarnation: int, sequence: int, stream: Stream) -> bool:
        """The same by its numbers."""
        stats = self.stats
        if incarnation > self._incarnation:
            self._incarnation = incarnation
            self._last.clear()
        last = self._last.get(stream, sequence - 1)
        if incarnation < self._incarnation or sequence <= last:
            stats.stale_total += 1
            return False
        stats.gaps_total += sequence - last - 1
        stats.received_total += 1
        self._last[stream] = sequence
        return True


class Spoke(Protocol):
    """A node's end."""

    name: str
    stats: StreamStats

    @property
    def dropped_total(self) -> int:
        """Messages that we could not queue."""
        ...

    @property
    def bad_total(self) -> int:
        """Frames that were no message of ours."""
        ...

    def send(self, body: Body, t_s: float) -> bool:
        """Queue a message to the hub; False if it had to be dropped."""
        ...

    def poll(self, timeout_s: float) -> None:
        """Deliver what has arrived, waiting up to ``timeout_s`` for the first."""
        ...

    def close(self) -> None:
        """Release the sockets without waiting for the peer."""
        ...


class Hub(Protocol):
    """The coordinator's end."""

    stats: dict[str, StreamStats]
    """By node name."""

    @property
    def dropped_total(self) -> int:
        """Messages that we could not queue."""
        ...

    @property
    def bad_total(self) -> int:
        """Frames that were no message of ours, or not from whom they said."""
        ...

    def send(self, to: str, body: Body, t_s: float) -> bool:
        """Queue a message to the node called ``to``; False if it had to be dropped."""
        ...

    def poll(self, timeout_s: float) -> None:
        """Deliver what has arrived, waiting up to ``timeout_s`` for the first."""
        ...

    def close(self) -> None:
        """Release the sockets without waiting for the peers."""
        ...
