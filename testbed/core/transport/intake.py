"""Reports as they come in from a telemetry socket, put together by the moment that they are of.

Compiled with the engine (`testbed.core.compiled`): each of tens of thousands of reports a second
passes here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import zmq

from testbed.core.messages import Envelope, Report
from testbed.core.transport.counting import PeerCounter

NOBLOCK = int(zmq.NOBLOCK)
"""As a number: a sum of flags takes pyzmq more time than the socket does."""


class ReportIntake:
    """Takes in a fleet's reports from a telemetry socket: at half the cost of other messages.

    Every frame is a message of its own here, of a message of several as well.

    Args:
        recv: gives the next frame, as bytes or, with keys, as a `zmq.Frame`.
        read: makes a message of a frame, or counts it as none of ours.
        counters: by peer.
        delay_s: from sent to due.
        deliver: gets reports of one moment together, and when they are due.
        other: gets what is no report of a peer that is known: the message, its key and the time.
        keyed: whether frames come with the key of who sent them.
    """

    def __init__(
        self,
        recv: Callable[..., Any],
        read: Callable[[bytes], Envelope | None],
        counters: dict[str, PeerCounter],
        delay_s: float,
        deliver: Callable[[list[Envelope], float], object],
        other: Callable[[Envelope, str, float], object],
        *,
        keyed: bool,
    ) -> None:
        self._recv = recv
        self._read = read
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
            envelope = self._read(data)
            if envelope is None:
                continue
            counter = counters.get(envelope.source)
            if type(envelope.body) is not Report or counter is None or counter.key != key:
                self._other(envelope, key, now_s)
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
