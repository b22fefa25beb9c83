"""Nodes of one process on one connection: to the hub the same as nodes with one each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from testbed.core.messages import Forwarded, Lease, Ping, RowReport, Stop
from testbed.core.transport.shared import Seat, SharedSpoke
from tests.conformance.test_transport import DELAY_S, NODE, OTHER, Inbox, ZmqWire, report

HOST = "row0/rack0/host0"


class SharedWire(ZmqWire):
    """Two nodes on one connection."""

    def __init__(self) -> None:
        super().__init__()
        self.put_off: list = []
        self.shared = SharedSpoke(
            self.hub.endpoint, HOST, 1, DELAY_S, now_s=lambda: self.now_s, soon=self.put_off.append
        )
        self.at = {NODE: Inbox(), OTHER: Inbox()}
        self.seats: dict[str, Seat] = {
            name: self.shared.seat(name, self.at[name]) for name in (NODE, OTHER)
        }

    def poll(self, timeout_s: float = 0.002) -> None:
        self.shared.poll(timeout_s)
        super().poll(timeout_s)

    def flush(self) -> None:
        while self.put_off:
            self.put_off.pop(0)()

    def close(self) -> None:
        self.shared.close()
        super().close()


@pytest.fixture
def wire() -> Iterator[SharedWire]:
    made = SharedWire()

    def heard() -> bool:
        for seat in made.seats.values():
            seat.send(report(), 0.0)
        made.flush()
        return bool(made.at_hub.bodies(RowReport))

    made.wait_for(heard)
    for _ in range(20):
        made.poll(0.01)
    made.at_hub.clear()
    yield made
    made.close()


def test_reports_of_one_moment_leave_together_once_all_are_there(wire):
    node, other = wire.seats.values()
    node.send(report(gpus=2, tag=1), 1.0)
    assert not wire.put_off, "one is missing"
    other.send(report(gpus=3, tag=2), 1.0)
    wire.flush()
    wire.wait_for(lambda: wire.at_hub.bodies(RowReport))
    [row] = wire.at_hub.bodies(RowReport)
    assert (row.node, row.num_gpus, row.lease_epoch) == ([NODE, OTHER], [2, 3], [1, 2])
    for name in (NODE, OTHER, HOST):
        assert (wire.hub.stats[name].gaps_total, wire.hub.stats[name].stale_total) == (0, 0)


def test_a_report_does_not_wait_for_one_of_a_later_moment(wire):
    node, other = wire.seats.values()
    node.send(report(tag=1), 1.0)
    other.send(report(tag=2), 2.0)
    wire.wait_for(lambda: wire.at_hub.bodies(RowReport))
    assert [row.node for row in wire.at_hub.bodies(RowReport)] == [[NODE]]
    node.send(report(tag=3), 2.0)
    wire.flush()
    wire.wait_for(lambda: len(wire.at_hub.bodies(RowReport)) == 2)


def test_control_goes_both_ways_under_the_node_s_own_name(wire):
    node, other = wire.seats.values()
    for number in range(20):
        node.send(Ping(number), 0.5)
    wire.wait_for(lambda: len(wire.at_hub.bodies(Ping)) == 20)
    words = [(word, due_s) for word, due_s in wire.at_hub if isinstance(word.body, Ping)]
    assert {(word.source, due_s) for word, due_s in words} == {(NODE, 0.5 + DELAY_S)}
    assert wire.hub.send(NODE, Stop("enough"), 1.0)
    wire.wait_for(lambda: wire.at[NODE])
    assert [(word.body, due_s) for word, due_s in wire.at[NODE]] == [(Stop("enough"), 1 + DELAY_S)]
    assert not wire.at[OTHER]
    assert not wire.hub.send(OTHER, Lease(1, 1, 9.0, [], []), 1.0), "it has said nothing yet"
    other.send(Ping(1), 0.5)
    wire.wait_for(lambda: len(wire.at_hub.bodies(Ping)) == 21)
    assert wire.hub.send(OTHER, Lease(1, 1, 9.0, [400.0], [0.0]), 1.0)
    wire.wait_for(lambda: wire.at[OTHER])


def test_what_a_node_missed_and_what_is_no_message_is_counted_there(wire):
    node, other = wire.seats.values()
    node.send(Ping(1), 0.0)
    wire.wait_for(lambda: wire.at_hub.bodies(Ping))
    wire.hub.send(NODE, Stop("first"), 0.0)
    wire.hub._sequence[NODE] += 2  # lost on the way
    wire.hub.send(NODE, Stop("second"), 0.0)
    wire.wait_for(lambda: len(wire.at[NODE].bodies(Stop)) == 2)
    assert (node.stats.gaps_total, other.stats.gaps_total) == (2, 0)
    node.take(b"rubbish")
    assert (node.bad_total, other.bad_total) == (1, 0)


def test_a_message_for_a_stranger_is_left_alone(wire):
    node, _ = wire.seats.values()
    node.send(Ping(1), 0.0)
    wire.wait_for(lambda: wire.at_hub.bodies(Ping))
    word = wire.hub._word("row0/rack0/node099", Stop("who?"), 0.0)
    wire.hub.send(HOST, Forwarded("row0/rack0/node099", word), 0.0)
    wire.hub.send(NODE, Stop("you"), 0.0)
    wire.wait_for(lambda: wire.at[NODE])
    assert [word.body for word, _ in wire.at[NODE]] == [Stop("you")]
