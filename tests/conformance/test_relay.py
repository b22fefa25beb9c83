"""What a relay must do between nodes and a hub: the same as no relay, counted on both hops."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from testbed.core.errors import TransportError
from testbed.core.messages import (
    Envelope,
    GpuReadings,
    Heartbeat,
    Hello,
    Lease,
    Ping,
    RelayStatus,
    RowReport,
    Stop,
    encode,
)
from testbed.core.transport.zmq import Curve, ZmqHub, ZmqSpoke, generate_keys
from testbed.shells.relay import Relay, RelayOptions
from tests.conformance.test_transport import DELAY_S, NODE, OTHER, Inbox, ZmqWire, hello, report

RELAY = "row0/relay"


class RelayedWire(ZmqWire):
    """Nodes connect to a relay, and the relay to the hub."""

    def __init__(self, hwm_messages: int | None = None) -> None:
        super().__init__(hwm_messages)
        self.relays: list[Relay] = []
        self.open_relay()

    def open_relay(self, bind: str = "tcp://127.0.0.1:0", name: str = RELAY) -> Relay:
        behind = self.relays[-1].hub.endpoint if name != RELAY else self.hub.endpoint
        made = Relay(RelayOptions(behind, name, bind=bind, hold_s=0.02))
        self.relays.append(made)
        return made

    def connect(self, name: str, incarnation: int) -> ZmqSpoke:
        return ZmqSpoke(
            self.relays[-1].hub.endpoint,
            name,
            incarnation,
            self.at[name],
            DELAY_S,
            now_s=lambda: self.now_s,
        )

    def poll(self, timeout_s: float = 0.002) -> None:
        for relay in self.relays:
            relay.poll(timeout_s)
        super().poll(timeout_s)

    def greet(self, *spokes: ZmqSpoke) -> None:
        """Nodes say hello, and report until all are heard."""
        for spoke in spokes:
            spoke.send(hello(), 0.0)

        def heard() -> bool:
            for spoke in spokes:
                spoke.send(report(), 0.0)
            rows = [row for row in self.at_hub.bodies(RowReport) if isinstance(row, RowReport)]
            return {spoke.name for spoke in spokes} <= {name for row in rows for name in row.node}

        self.wait_for(heard)
        last = -1
        while last != self.said():
            last = self.said()
            for _ in range(10):
                self.poll(0.01)
        self.at_hub.clear()

    def said(self) -> int:
        return sum(not isinstance(word.body, RelayStatus) for word, _ in self.at_hub)

    def rows(self) -> list[Envelope]:
        return [word for word, _ in self.at_hub if isinstance(word.body, RowReport)]

    def close(self) -> None:
        for relay in self.relays:
            relay.close()
        super().close()


@pytest.fixture
def wire() -> Iterator[RelayedWire]:
    made = RelayedWire()
    yield made
    made.close()


def test_reports_of_one_moment_arrive_as_one_message(wire):
    nodes = [wire.spoke(NODE), wire.spoke(OTHER)]
    wire.greet(*nodes)
    for number in range(5):
        for place, node in enumerate(nodes):
            node.send(report(gpus=2 + place, tag=number), 1.0 + number)
    wire.wait_for(lambda: sum(len(word.body.node) for word in wire.rows()) == 10)
    rows = wire.rows()
    assert len(rows) == 5, "none was held back for a node that had reported"
    assert [word.t_s for word in rows] == [1.0, 2.0, 3.0, 4.0, 5.0]
    for number, word in enumerate(rows):
        row = word.body
        assert (word.source, sorted(row.node)) == (RELAY, [NODE, OTHER])
        assert row.lease_epoch == [number, number]
        assert sorted(row.num_gpus) == [2, 3]
        assert GpuReadings.unpack(row.gpus).power_avg_w.tolist() == [300.5] * 5
    for name in (NODE, OTHER, RELAY):
        stats = wire.hub.stats[name]
        assert (stats.gaps_total, stats.stale_total) == (0, 0)


def test_a_silent_node_holds_the_others_up_only_for_a_moment(wire):
    nodes = [wire.spoke(NODE), wire.spoke(OTHER)]
    wire.greet(*nodes)
    nodes[0].send(report(tag=7), 9.0)
    wire.wait_for(wire.rows)
    assert [word.body.node for word in wire.rows()] == [[NODE]]
    nodes[1].send(report(tag=7), 9.0)
    wire.wait_for(lambda: len(wire.rows()) == 2)
    assert wire.rows()[1].body.node == [OTHER]


def test_control_passes_both_ways_as_it_was_said(wire):
    node, other = wire.spoke(NODE), wire.spoke(OTHER)
    wire.greet(node, other)
    for number in range(50):
        node.send(Ping(number), 0.5)
    wire.wait_for(lambda: len(wire.at_hub.bodies(Ping)) == 50)
    pings = [(word, due_s) for word, due_s in wire.at_hub if isinstance(word.body, Ping)]
    assert [word.body.sent_ns for word, _ in pings] == list(range(50))
    assert {(word.source, word.incarnation, due_s) for word, due_s in pings} == {
        (NODE, 1, 0.5 + DELAY_S)
    }
    lease = Lease(1, 2, 9.0, [400.0], [0.0])
    assert wire.hub.send(OTHER, lease, t_s=2.0)
    wire.wait_for(lambda: wire.at[OTHER])
    [(word, due_s)] = wire.at[OTHER]
    assert (word.source, word.body, due_s) == ("coordinator", lease, 2.0 + DELAY_S)
    assert not wire.at[NODE]
    assert (other.stats.gaps_total, other.stats.stale_total) == (0, 0)


def test_a_node_that_leaves_its_relay_is_answered_directly(wire):
    behind = wire.spoke(NODE)
    wire.greet(behind)
    behind.close()
    wire.spokes.remove(behind)
    wire.at[NODE] = Inbox()
    moved = ZmqSpoke(wire.hub.endpoint, NODE, 2, wire.at[NODE], DELAY_S, now_s=lambda: 0.0)
    wire.spokes.append(moved)
    moved.send(hello(), 0.0)
    wire.wait_for(lambda: wire.at_hub.bodies(Hello))
    assert wire.hub.send(NODE, Stop("directly"), 0.0)
    wire.wait_for(lambda: wire.at[NODE])
    assert wire.at[NODE].bodies(Stop) == [Stop("directly")]


def test_what_a_relay_missed_shows_at_both_ends(wire):
    node = wire.spoke(NODE)
    wire.greet(node)
    node._sequence["telemetry"] += 3  # lost between node and relay
    node.send(report(tag=1), 5.0)
    wire.wait_for(wire.rows)
    assert wire.relays[0].hub.stats[NODE].gaps_total == 3
    assert wire.relays[0].status().gaps_total == 3
    assert wire.hub.stats[NODE].gaps_total == 3
    assert wire.hub.stats[RELAY].gaps_total == 0
    wire.relays[0].spoke._sequence["telemetry"] += 2  # lost between relay and hub
    node._sequence["telemetry"] += 2
    node.send(report(tag=2), 6.0)
    wire.wait_for(lambda: len(wire.rows()) == 2)
    assert wire.hub.stats[RELAY].gaps_total == 2
    assert wire.hub.stats[NODE].gaps_total == 5


def test_what_a_relay_cannot_pass_on_is_counted_there(wire):
    node = wire.spoke(NODE)
    wire.greet(node)
    wire.hub.close()
    relay = wire.relays[0]

    def dropped() -> bool:
        node.send(Ping(1), 0.0)
        relay.poll(0.01)
        return relay.dropped_total >= 5

    for _ in range(1000):
        if dropped():
            break
    assert relay.status().dropped_total >= 5


def test_a_relay_that_was_started_again_goes_on(wire):
    node = wire.spoke(NODE)
    wire.greet(node)
    endpoint = wire.relays[0].hub.endpoint
    wire.relays.pop().close()
    wire.poll()
    wire.open_relay(endpoint)
    wire.at_hub.clear()
    wire.greet(node)
    wire.hub.send(NODE, Stop("to the old node"), 0.0)
    wire.wait_for(lambda: wire.at[NODE])
    assert wire.at[NODE].bodies(Stop) == [Stop("to the old node")]
    assert wire.hub.stats[RELAY].gaps_total == 0, "a new life counts from its first word"


def test_a_coordinator_that_was_started_again_finds_its_nodes(wire):
    node = wire.spoke(NODE)
    wire.greet(node)
    endpoint = wire.hub.endpoint
    wire.hub.close()
    wire.relays[0].poll(0.01)
    wire.open_hub(endpoint)
    wire.at_hub.clear()
    wire.wait_for(lambda: wire.relays[0].spoke.send(Heartbeat(), 0.0))
    wire.greet(node)
    assert wire.hub.send(NODE, Stop("from the new one"), 0.0)
    wire.wait_for(lambda: wire.at[NODE])
    assert wire.at[NODE].bodies(Stop) == [Stop("from the new one")]
    assert node.stats.stale_total == 0
    assert wire.hub.stats[NODE].gaps_total == 0


def test_relays_may_stand_behind_relays(wire):
    wire.open_relay(name="rack0/relay")
    nodes = [wire.spoke(NODE), wire.spoke(OTHER)]
    wire.greet(*nodes)
    for node in nodes:
        node.send(report(tag=3), 4.0)
    wire.wait_for(lambda: sum(len(word.body.node) for word in wire.rows()) == 2)
    wire.hub.send(OTHER, Stop("two hops"), 0.0)
    wire.wait_for(lambda: wire.at[OTHER])
    assert wire.at[OTHER].bodies(Stop) == [Stop("two hops")]
    assert wire.hub.stats[NODE].gaps_total == wire.hub.stats[RELAY].gaps_total == 0


def test_a_relay_says_how_it_fares(wire):
    node = wire.spoke(NODE)
    wire.greet(node)
    wire.relays[0]._status_s = 0.0
    wire.wait_for(lambda: wire.at_hub.bodies(RelayStatus))
    status = wire.at_hub.bodies(RelayStatus)[-1]
    assert (status.nodes, status.gaps_total, status.dropped_total) == (1, 0, 0)
    assert status.received_total >= 2


def test_what_a_relay_may_not_pass_on_is_refused(wire):
    """It speaks for nodes, not for the coordinator or for itself in their name."""
    node = wire.spoke(NODE)
    wire.greet(node)
    from testbed.core.messages import Forwarded

    spoke = wire.relays[0].spoke
    before = wire.hub.bad_total
    forged = encode(Envelope(NODE, 1, 99, 0.0, Stop("forged")))
    for message in (forged, b"\xc1", b""):
        spoke.send(Forwarded("", message), 0.0)
    wire.wait_for(lambda: wire.hub.bad_total == before + 3)
    assert not wire.at_hub.bodies(Stop)


def test_a_name_behind_a_relay_belongs_to_the_relays_key(tmp_path):
    """With CURVE: another client cannot speak for a node that a relay has spoken for."""
    keys = tmp_path / "keys"
    generate_keys(keys, "coordinator")
    for name in ("relay", "other", "node"):
        generate_keys(keys / "clients", name)
    at_hub = Inbox()
    hub = ZmqHub(
        "tcp://127.0.0.1:0",
        at_hub,
        0.0,
        now_s=lambda: 0.0,
        curve=Curve(keys / "coordinator.key_secret", clients=keys / "clients"),
    )
    relay = Relay(
        RelayOptions(
            hub.endpoint,
            RELAY,
            curve_secret=keys / "clients" / "relay.key_secret",
            curve_server=keys / "coordinator.key",
            curve_clients=keys / "clients",
        )
    )

    def spoke(endpoint: str, key: str, server: str) -> ZmqSpoke:
        curve = Curve(keys / "clients" / f"{key}.key_secret", server=keys / server)
        return ZmqSpoke(endpoint, NODE, 1, Inbox(), 0.0, now_s=lambda: 0.0, curve=curve)

    node = spoke(relay.hub.endpoint, "node", "clients/relay.key")
    for _ in range(500):
        node.send(hello(), 0.0)
        relay.poll(0.01)
        hub.poll(0.0)
        if at_hub.bodies(Hello):
            break
    assert at_hub.bodies(Hello)
    thief = spoke(hub.endpoint, "other", "coordinator.key")
    heard, bad = len(at_hub.bodies(Hello)), hub.bad_total
    for _ in range(500):
        thief.send(hello(), 0.0)
        hub.poll(0.01)
        if hub.bad_total > bad:
            break
    assert hub.bad_total > bad
    assert len(at_hub.bodies(Hello)) == heard
    for end in (node, thief, relay, hub):
        end.close()


def test_bad_addresses_are_one_clear_line():
    with pytest.raises(TransportError, match="needs the coordinator's port"):
        Relay(RelayOptions("tcp://127.0.0.1:0", RELAY))
    with pytest.raises(TransportError, match="not a loopback address"):
        Relay(RelayOptions("tcp://127.0.0.1:5555", RELAY, bind="tcp://0.0.0.0:0"))
