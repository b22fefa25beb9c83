"""A relay: stands between a row of nodes and the coordinator, and merges what they report.

Nodes connect to it as to a coordinator; to the coordinator it is one peer that speaks for many.
Reports of one moment go up as one `RowReport`; control messages pass in both directions as they
are, each in a `Forwarded`. So a coordinator has one connection and ten large messages a second
where it had forty connections and four hundred small ones. Relays may stand behind relays.

It keeps no state that matters: started again, it hears from its nodes within a sample period.
Nothing is lost silently on either hop. The relay counts what its nodes sent and it did not get, and
what it could not pass on; the coordinator counts the relay's sequence numbers, and those of the
nodes that come with their reports.

Reports wait for the slowest node of the row, but no longer than ``hold_s``: well below the agreed
delay of the wire, so that they act when they would have without a relay.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from testbed.core.messages import (
    Bye,
    Envelope,
    Forwarded,
    Hello,
    RelayStatus,
    Report,
    RowReport,
    encode,
    merge,
)
from testbed.core.transport.zmq import Curve, ZmqHub, ZmqSpoke
from testbed.shells.live import signals_stop

_STATUS_PERIOD_S = 1.0
_FORGET_S = 1.0
"""A node that has not reported for so long is not waited for."""


@dataclass(slots=True)
class RelayOptions:
    """What ``testbed relay`` was told on its command line."""

    coordinator: str
    name: str
    bind: str = "tcp://127.0.0.1:0"
    hold_s: float = 0.002
    curve_secret: Path | None = None
    """This relay's secret key file, for both of its sides."""
    curve_server: Path | None = None
    """The coordinator's public key file."""
    curve_clients: Path | None = None
    """Folder of the public keys of its nodes."""
    orphan_exit_s: float = math.inf
    """Leave when the coordinator has been silent for this long."""


@dataclass(slots=True)
class _Moment:
    """Reports of one moment that wait for the others."""

    since_s: float
    words: list[Envelope] = field(default_factory=list)


class Relay:
    """See the module's story.

    Args:
        options: addresses and keys.
        monotonic_s: this machine's clock, seconds.

    Raises:
        TransportError: an address or a key cannot be used.
    """

    def __init__(
        self, options: RelayOptions, *, monotonic_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._hold_s = options.hold_s
        self._clock_s = monotonic_s
        self.heard_s = monotonic_s()
        """When the coordinator was last heard from."""
        self._moments: dict[float, _Moment] = {}
        self._nodes_s: dict[str, float] = {}
        self._status_s = -math.inf
        secret, clients, server = options.curve_secret, options.curve_clients, options.curve_server
        self.hub = ZmqHub(
            options.bind,
            self._from_node,
            0.0,
            now_s=_never_late,
            curve=Curve(secret, clients=clients) if secret and clients else None,
        )
        try:
            self.spoke = ZmqSpoke(
                options.coordinator,
                options.name,
                time.time_ns(),
                self._from_coordinator,
                0.0,
                now_s=_never_late,
                curve=Curve(secret, server=server) if secret and server else None,
            )
        except BaseException:
            self.hub.close()
            raise
        self.hub.wake_for(self.spoke)

    @property
    def dropped_total(self) -> int:
        """Messages that could not be passed on, up or down."""
        return self.hub.dropped_total + self.spoke.dropped_total

    def _from_coordinator(self, envelope: Envelope, due_s: float) -> None:
        self.heard_s = self._clock_s()
        body = envelope.body
        if isinstance(body, Forwarded):
            self.hub.pass_on(body.to, body.message, envelope.t_s)

    def _from_node(self, envelope: Envelope, due_s: float) -> None:
        body = envelope.body
        if isinstance(body, Report):
            self._gather(envelope)
        elif isinstance(body, RowReport):
            self.spoke.send(body, envelope.t_s)
        elif not isinstance(body, RelayStatus):
            if isinstance(body, Hello | Bye):
                self._nodes_s.pop(envelope.source, None)  # until it reports (again)
            self.spoke.send(Forwarded("", encode(envelope)), envelope.t_s)

    def _gather(self, word: Envelope) -> None:
        now_s = self._clock_s()
        self._nodes_s[word.source] = now_s
        moment = self._moments.get(word.t_s)
        if moment is None:
            moment = self._moments[word.t_s] = _Moment(now_s)
        moment.words.append(word)
        if len(moment.words) >= len(self._nodes_s):
            self._send(word.t_s)

    def _send(self, t_s: float) -> None:
        self.spoke.send(merge(self._moments.pop(t_s).words), t_s)

    def poll(self, timeout_s: float) -> None:
        """Pass on what has come, waiting up to ``timeout_s`` for the first."""
        now_s = self._clock_s()
        for moment in self._moments.values():
            timeout_s = min(timeout_s, moment.since_s + self._hold_s - now_s)
        self.hub.poll(max(0.0, timeout_s))
        self.spoke.poll(0.0)
        now_s = self._clock_s()
        for t_s in [t for t, m in self._moments.items() if now_s - m.since_s >= self._hold_s]:
            self._send(t_s)
        if now_s - self._status_s >= _STATUS_PERIOD_S:
            self._status_s = now_s
            for name in [n for n, at_s in self._nodes_s.items() if now_s - at_s > _FORGET_S]:
                del self._nodes_s[name]
            self.spoke.send(self.status(), 0.0)

    def status(self) -> RelayStatus:
        """Counters so far."""
        stats = self.hub.stats.values()
        return RelayStatus(
            nodes=len(self._nodes_s),
            received_total=sum(s.received_total for s in stats),
            gaps_total=sum(s.gaps_total for s in stats) + self.spoke.stats.gaps_total,
            dropped_total=self.dropped_total,
            bad_total=self.hub.bad_total + self.spoke.bad_total,
        )

    def close(self) -> None:
        """Release all sockets."""
        self.spoke.close()
        self.hub.close()


def _never_late() -> float:
    """A relay does not know the run's clock: the two ends judge what is late."""
    return -math.inf


def relay(options: RelayOptions, log: Callable[[str], None], ready: Callable[[str], None]) -> None:
    """Be a relay until told to stop.

    Args:
        options: see there.
        log: told in a line what happens.
        ready: told the endpoint that nodes connect to, once it listens.

    Raises:
        TestbedError: an address or a key cannot be used.
    """
    stopped = False

    def stop() -> None:
        nonlocal stopped
        stopped = True

    made = Relay(options)
    try:
        with signals_stop(stop):
            ready(made.hub.endpoint)
            while not stopped and time.monotonic() - made.heard_s < options.orphan_exit_s:
                made.poll(0.05)
        log(f"left: {made.status()}")
    finally:
        made.close()
