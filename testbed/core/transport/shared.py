"""One connection for several nodes of one process.

To the hub such a process is a relay of its own nodes: their control messages travel inside
`Forwarded` and their reports of one moment as one `RowReport`, each with its own node's name and
numbers, so that gaps are counted end to end and the coordinator need not know where nodes run.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from testbed.core.errors import TransportError
from testbed.core.messages import (
    Body,
    Envelope,
    Forwarded,
    Report,
    decode,
    encode,
    merge,
)
from testbed.core.transport.base import Deliver
from testbed.core.transport.zmq import Curve, NodeEnd, ZmqSpoke


class Seat(NodeEnd):
    """One node's end of the shared connection; see `testbed.core.transport.base.Spoke`.

    Its reports wait for those of the others; everything else leaves at once.
    """

    def __init__(self, owner: SharedSpoke, name: str, incarnation: int, deliver: Deliver) -> None:
        super().__init__(name, incarnation, deliver, owner.delay_s, owner.now_s)
        self.bad_total = 0
        self._owner = owner

    @property
    def dropped_total(self) -> int:
        """Messages of all nodes of the connection that could not be queued."""
        return self._owner.spoke.dropped_total

    def send(self, body: Body, t_s: float) -> bool:
        """Queue a message to the hub; False if it is not connected or its queue is full."""
        _, envelope = self._word(body, t_s)
        if isinstance(body, Report):
            self._owner.gather(envelope)
            return True
        return self._owner.spoke.send(Forwarded("", encode(envelope)), t_s)

    def poll(self, timeout_s: float) -> None:
        """Deliver what has arrived for any node of the connection."""
        self._owner.poll(timeout_s)

    def watch(self, descriptor: int) -> None:
        """Have something readable on another file descriptor end the waiting of `poll`."""
        self._owner.spoke.watch(descriptor)

    def take(self, data: bytes) -> None:
        """A message for this node has arrived."""
        try:
            envelope = decode(data)
        except (TransportError, ValueError):
            self.bad_total += 1
            return
        if not self._hear(envelope):
            self.bad_total += 1

    def close(self) -> None:
        """The connection is its owner's."""


class SharedSpoke:
    """The connection; `seat` gives each node its end.

    Args:
        connect: the hub's ``tcp://HOST:PORT``.
        name: of the process, as a relay would have one.
        incarnation: grows with every life of the process.
        delay_s: from sent to due.
        now_s: the run's clock, to count what came after it was due.
        curve: keys; without them only loopback addresses are connected to.
        soon: called with what sends the reports of a moment once they are all there; by default
            they leave at once.

    Raises:
        TransportError: the address, the name or the keys are wrong.
    """

    def __init__(
        self,
        connect: str,
        name: str,
        incarnation: int,
        delay_s: float,
        *,
        now_s: Callable[[], float],
        curve: Curve | None = None,
        soon: Callable[[Callable[[], None]], None] = lambda act: act(),
    ) -> None:
        self.delay_s, self.now_s = delay_s, now_s
        self._soon = soon
        self._seats: dict[str, Seat] = {}
        self._words: list[Envelope] = []
        self.spoke = ZmqSpoke(
            connect, name, incarnation, self._take, 0.0, now_s=_never_late, curve=curve
        )

    def seat(self, name: str, deliver: Deliver) -> Seat:
        """The end of the node called ``name``."""
        made = self._seats[name] = Seat(self, name, self.spoke.incarnation, deliver)
        return made

    def gather(self, word: Envelope) -> None:
        """A report that leaves with those of the other nodes at its moment."""
        if self._words and self._words[0].t_s != word.t_s:
            self._flush()
        self._words.append(word)
        if len(self._words) == len(self._seats):
            self._soon(self._flush)

    def _flush(self) -> None:
        words, self._words = self._words, []
        if words:
            self.spoke.send(merge(words), words[0].t_s)

    def poll(self, timeout_s: float) -> None:
        """Deliver what has arrived, waiting up to ``timeout_s`` for the first."""
        self.spoke.poll(timeout_s)

    def close(self) -> None:
        """Release the sockets without waiting for the peer."""
        self.spoke.close()

    def _take(self, envelope: Envelope, due_s: float) -> None:
        body = envelope.body
        if isinstance(body, Forwarded) and body.to in self._seats:
            self._seats[body.to].take(body.message)


def _never_late() -> float:
    """Each node judges for itself what is late."""
    return -math.inf
