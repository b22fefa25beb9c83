"""What comes from peers: counted, and reports sorted by the moment that they are of.

Compiled with the engine (`testbed.core.compiled`): each of tens of thousands of reports a second
passes here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import zmq

from testbed.core.errors import TransportError
from testbed.core.messages import Envelope, Report, decode
from testbed.core.topics import Stream

NOBLOCK = int(zmq.NOBLOCK)
"""As a number: a sum of flags takes pyzmq more time than the socket does."""


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


class ReportIntake:
    """Takes in a fleet's reports from a telemetry socket: at half the cost of other messages.

    A frame is a message here; further frames of one are messages of their own, and bad.

    Args:
        recv: gives the next frame, as bytes or, with keys, as a `zmq.Frame`.
        counters: by peer.
        delay_s: from sent to due.
        deliver: gets reports of one moment together, and when they are due.
        other: gets what is no report of a peer that is known: data, key and the time.
        keyed: whether frames come with the key of who sent them.
    """

    def __init__(
        self,
        recv: Callable[..., Any],
        counters: dict[str, PeerCounter],
        delay_s: float,
        deliver: Callable[[list[Envelope], float], object],
        other: Callable[[bytes, str, float], object],
        *,
        keyed: bool,
    ) -> None:
        self.bad_total = 0
        self._recv = recv
        self._counters = counters
        self._delay_s = delay_s
        self._deliver = deliver
        self._other = other
        self._keyed = keyed

    def drain(self, limit: int, now_s: float) -> int:
        """Take in up to ``limit`` messages that have arrived by ``now_s``; returns how many."""
        counters = self._counters
        words: list[Envelope] = []
        t_s, due_s = math.nan, math.nan
        key = ""
        taken = 0
        while taken < limit:
            try:
                if self._keyed:
                    frame = self._recv(NOBLOCK, copy=False)
                    data, key = frame.bytes, str(frame.get("User-Id"))
                else:
                    data = self._recv(NOBLOCK)
            except zmq.Again:
                break
            taken += 1
            try:
                envelope = decode(data)
            except (TransportError, ValueError):  # ValueError: text that is not UTF-8
                self.bad_total += 1
                continue
            counter = counters.get(envelope.source)
            if type(envelope.body) is not Report or counter is None or counter.key != key:
                self._other(data, key, now_s)
            elif counter.count(envelope.incarnation, envelope.sequence, "telemetry"):
                if envelope.t_s != t_s:
                    if words:
                        self._deliver(words, due_s)
                    words, t_s = [], envelope.t_s
                    due_s = t_s + self._delay_s
                if now_s > due_s:
                    counter.stats.late_total += 1
                words.append(envelope)
        if words:
            self._deliver(words, due_s)
        return taken
