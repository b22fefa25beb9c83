"""Every message in one table: which way it goes, on which stream, how often, and is it kept.

>>> TOPICS[Report].stream, TOPICS[Lease].stream
('telemetry', 'control')
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from testbed.core.messages import (
    Ack,
    Arrange,
    Body,
    Bye,
    Forwarded,
    Gaps,
    Heartbeat,
    Hello,
    Lease,
    Ping,
    Pong,
    Progress,
    Refused,
    RelayStatus,
    Report,
    Returned,
    RowReport,
    Stop,
    Submit,
    Surroundings,
    TenantLimits,
    Tune,
    Welcome,
)

Stream = Literal["control", "telemetry"]


class Topic(NamedTuple):
    """Facts about one kind of message."""

    stream: Stream
    """``control`` is two-way and bounded; ``telemetry`` may be dropped, counted."""
    sender: Literal["node", "relay", "coordinator"]
    rate: str
    recorded: str
    """Table of the recording that keeps it, or empty."""


TOPICS: dict[type[Body], Topic] = {
    Hello: Topic("control", "node", "every second until welcomed", "events"),
    Welcome: Topic("control", "coordinator", "answers Hello", "events"),
    Refused: Topic("control", "coordinator", "answers Hello", "events"),
    Ping: Topic("control", "node", "8 at start, then every 10 s", ""),
    Pong: Topic("control", "coordinator", "answers Ping", ""),
    Heartbeat: Topic("control", "coordinator", "every second", ""),
    Stop: Topic("control", "coordinator", "once", "events"),
    Bye: Topic("control", "node", "once", "lateness"),
    Report: Topic("telemetry", "node", "every sample_period_s", "gpus, instances, tenants"),
    RowReport: Topic("telemetry", "relay", "as Report, for many nodes", "gpus, instances, tenants"),
    Forwarded: Topic("control", "relay", "per control message of a node behind a relay", ""),
    RelayStatus: Topic("control", "relay", "every second", "events"),
    Submit: Topic("control", "coordinator", "per request", "requests"),
    Progress: Topic("control", "node", "per first token and end", "requests"),
    Gaps: Topic("control", "node", "every gaps_period_s", "itl"),
    Returned: Topic("control", "node", "when requests are given up", "moves"),
    Lease: Topic("control", "coordinator", "lease_s / 3, and on change", "commands"),
    TenantLimits: Topic("control", "coordinator", "on change", "commands"),
    Arrange: Topic("control", "coordinator", "on change", "commands, layout"),
    Tune: Topic("control", "coordinator", "on change", "commands"),
    Surroundings: Topic("control", "coordinator", "every plant.period_s", "facility"),
    Ack: Topic("control", "node", "answers Lease, where asked or refused", "events"),
}
