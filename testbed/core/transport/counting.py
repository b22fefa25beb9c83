"""What came from peers, and what is missing: sequence numbers, counted stream by stream.

Compiled with the engine (`testbed.core.compiled`): each of tens of thousands of reports a second is
counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from testbed.core.messages import Envelope
from testbed.core.topics import Stream


@dataclass
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
