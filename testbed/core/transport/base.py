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
from typing import Protocol

from testbed.core.messages import Body, Envelope
from testbed.core.transport.counting import StreamStats

COORDINATOR = "coordinator"
"""Name of the hub, in the envelopes that it sends."""

Deliver = Callable[[Envelope, float], None]


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
