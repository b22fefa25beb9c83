"""What a coordinator and its nodes may expect of the wire between them, whichever it is.

The first part runs over every transport; the second holds what only sockets can get wrong. Sockets
listen on 127.0.0.1 at a port of the system's choosing, and nothing here waits long.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import zmq
import zmq.auth

from testbed.core.errors import TransportError
from testbed.core.messages import (
    MAX_MESSAGE_BYTES,
    Body,
    Envelope,
    GpuReadings,
    Heartbeat,
    Hello,
    InstanceReadings,
    Lease,
    Ping,
    Report,
    Stop,
    TenantReadings,
    encode,
)
from testbed.core.messages import report as packed
from testbed.core.transport.base import COORDINATOR, Hub, Spoke
from testbed.core.transport.memory import Network
from testbed.core.transport.zmq import Curve, ZmqHub, ZmqSpoke, generate_keys
from tests.conftest import ROOT

DELAY_S = 0.005
NODE = "row0/rack0/node000"
OTHER = "row0/rack0/node001"


def report(gpus: int = 1, tag: int = 0) -> Report:
    """A report of ``gpus`` GPUs that can be told from others by ``tag``."""
    watts, counts = [300.5] * gpus, [7] * gpus
    return packed(
        GpuReadings(
            *([watts] * 9),
            fb_used_bytes=counts,
            throttle=counts,
            lost=[False] * gpus,
        ),
        InstanceReadings.empty(),
        TenantReadings.empty(),
        lease_epoch=tag,
    )


def hello() -> Hello:
    return Hello(protocol=1, boot_id="boot", gpus=[], tenants=[])


class Inbox(list[tuple[Envelope, float]]):
    """What one end was given, with due times."""

    def __call__(self, envelope: Envelope, due_s: float) -> None:
        self.append((envelope, due_s))

    def bodies(self, kind: type[Body]) -> list[Body]:
        return [envelope.body for envelope, _ in self if isinstance(envelope.body, kind)]


class Wire:
    """A hub, its nodes, and what each was given."""

    hub: Hub

    def __init__(self) -> None:
        self.at_hub = Inbox()
        self.at: dict[str, Inbox] = {}
        self.spokes: list[Spoke] = []
        self.now_s = 0.0

    def spoke(self, name: str = NODE, incarnation: int = 1) -> Spoke:
        self.at[name] = Inbox()
        spoke = self.connect(name, incarnation)
        self.spokes.append(spoke)
        return spoke

    def connect(self, name: str, incarnation: int) -> Spoke:
        raise NotImplementedError

    def wait_for(self, condition: Callable[[], object], timeout_s: float = 5.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"not within {timeout_s} s"
            self.poll()

    def poll(self, timeout_s: float = 0.002) -> None:
        self.hub.poll(timeout_s)
        for spoke in self.spokes:
            spoke.poll(timeout_s)

    def greet(self, spoke: Spoke) -> None:
        """The handshake of real runs: a node says hello, and reports until it is heard."""
        before = len(self.at_hub.bodies(Report))

        def heard() -> bool:
            spoke.send(report(), 0.0)
            return len(self.at_hub.bodies(Report)) > before

        spoke.send(hello(), 0.0)
        self.wait_for(heard)
        # Until nothing is under way any more: what was sent last may still be in a pipe.
        last = -1
        while last != len(self.at_hub):
            last = len(self.at_hub)
            self.poll(0.02)
        self.at_hub.clear()

    def close(self) -> None:
        for spoke in self.spokes:
            spoke.close()
        self.hub.close()


class MemoryWire(Wire):
    def __init__(self) -> None:
        super().__init__()
        self.network = Network(delay_s=DELAY_S, check=True)
        self.hub = self.network.hub(self.at_hub)

    def connect(self, name: str, incarnation: int) -> Spoke:
        return self.network.spoke(name, incarnation, self.at[name])


class ZmqWire(Wire):
    hub: ZmqHub

    def __init__(self, hwm_messages: int | None = None) -> None:
        super().__init__()
        self.hwm_messages = hwm_messages
        self.open_hub("tcp://127.0.0.1:0")

    def open_hub(self, bind: str) -> None:
        self.hub = ZmqHub(
            bind,
            self.at_hub,
            DELAY_S,
            now_s=lambda: self.now_s,
            hwm_messages=self.hwm_messages,
        )

    def connect(self, name: str, incarnation: int) -> ZmqSpoke:
        return ZmqSpoke(
            self.hub.endpoint,
            name,
            incarnation,
            self.at[name],
            DELAY_S,
            now_s=lambda: self.now_s,
            hwm_messages=self.hwm_messages,
        )


@pytest.fixture(params=[MemoryWire, ZmqWire], ids=["memory", "zmq"])
def wire(request) -> Iterator[Wire]:
    made = request.param()
    yield made
    made.close()


@pytest.fixture
def sockets() -> Iterator[ZmqWire]:
    made = ZmqWire()
    yield made
    made.close()


# Every transport.


def test_what_is_sent_arrives_and_is_due_after_the_agreed_delay(wire):
    node = wire.spoke()
    assert node.send(hello(), t_s=1.5)
    wire.wait_for(lambda: wire.at_hub)
    assert wire.at_hub == [(Envelope(NODE, 1, 1, 1.5, hello()), 1.5 + DELAY_S)]

    lease = Lease(1, 2, 9.0, [400.0], [0.0])
    assert wire.hub.send(NODE, lease, t_s=2.0)
    wire.wait_for(lambda: wire.at[NODE])
    [(envelope, due_s)] = wire.at[NODE]
    assert (envelope.source, envelope.body, due_s) == (COORDINATOR, lease, 2.0 + DELAY_S)


def test_messages_reach_the_node_they_were_sent_to_and_no_other(wire):
    for name in (NODE, OTHER):
        wire.greet(wire.spoke(name))
    wire.hub.send(OTHER, Stop("you"), 0.0)
    wire.hub.send(NODE, Stop("and you"), 0.0)
    wire.wait_for(lambda: wire.at[NODE] and wire.at[OTHER])
    assert wire.at[OTHER].bodies(Stop) == [Stop("you")]
    assert wire.at[NODE].bodies(Stop) == [Stop("and you")]


def test_each_stream_keeps_its_order_and_counts_for_itself(wire):
    node = wire.spoke()
    wire.greet(node)
    for number in range(300):
        node.send(Ping(number), number * 0.01)
        node.send(report(tag=number), number * 0.01)
    wire.wait_for(lambda: len(wire.at_hub) == 600)
    assert [ping.sent_ns for ping in wire.at_hub.bodies(Ping)] == list(range(300))
    assert [tick.lease_epoch for tick in wire.at_hub.bodies(Report)] == list(range(300))
    for kind in (Ping, Report):
        numbers = [word.sequence for word, _ in wire.at_hub if isinstance(word.body, kind)]
        assert numbers == list(range(numbers[0], numbers[0] + 300))
    stats = wire.hub.stats[NODE]
    assert (stats.gaps_total, stats.stale_total, wire.hub.bad_total) == (0, 0, 0)


def test_nothing_that_was_said_before_the_hub_could_listen_counts_as_a_gap(wire):
    node = wire.spoke()
    wire.greet(node)
    wire.greet(node)
    assert wire.hub.stats[NODE].gaps_total == 0
    assert wire.hub.stats[NODE].received_total > 2


def test_a_large_message_arrives_whole(wire):
    node = wire.spoke()
    wire.greet(node)
    large = report(gpus=10_000)
    assert 500_000 < len(encode(Envelope(NODE, 1, 1, 0.0, large))) < MAX_MESSAGE_BYTES
    node.send(large, 0.0)
    wire.wait_for(lambda: wire.at_hub)
    assert wire.at_hub[0][0].body == large


def test_a_node_that_is_not_there_cannot_be_sent_to(wire):
    assert wire.hub.send("row9/rack9/node999", Heartbeat(), 0.0) is False
    assert wire.hub.dropped_total == 1


def test_a_node_that_left_cannot_be_sent_to(wire):
    node = wire.spoke()
    wire.greet(node)
    wire.spokes.remove(node)
    node.close()
    wire.wait_for(lambda: not wire.hub.send(NODE, Heartbeat(), 0.0))
    assert wire.hub.dropped_total == 1


def test_a_restarted_node_takes_over_its_name(wire):
    first = wire.spoke(incarnation=1)
    wire.greet(first)
    wire.hub.send(NODE, Stop("first life"), 0.0)
    wire.wait_for(lambda: wire.at[NODE])
    first.close()
    wire.spokes.remove(first)

    wire.greet(wire.spoke(incarnation=2))
    wire.hub.send(NODE, Stop("second life"), 0.0)
    wire.wait_for(lambda: wire.at[NODE])
    assert wire.at[NODE].bodies(Stop) == [Stop("second life")]
    assert wire.spokes[0].stats.gaps_total == 0, "what the first life was told is no gap"
    stats = wire.hub.stats[NODE]
    assert (stats.gaps_total, stats.stale_total) == (0, 0)


def test_an_earlier_life_of_a_node_is_not_listened_to(wire):
    old = wire.spoke(incarnation=1)
    wire.greet(old)
    new = wire.spoke(incarnation=2)
    wire.greet(new)
    # The old one was only paused, and goes on as if nothing had happened.
    for number in range(5):
        old.send(report(tag=100 + number), 1.0)
    new.send(report(tag=200), 1.0)
    wire.wait_for(lambda: wire.hub.stats[NODE].stale_total == 5 and wire.at_hub)
    assert [tick.lease_epoch for tick in wire.at_hub.bodies(Report)] == [200]
    assert wire.hub.stats[NODE].gaps_total == 0


def test_after_close_nothing_is_sent(wire):
    node = wire.spoke()
    wire.greet(node)
    node.close()
    wire.spokes.remove(node)
    assert node.send(Heartbeat(), 0.0) is False
    assert node.dropped_total == 1
    node.close()
    wire.hub.close()
    assert wire.hub.send(NODE, Heartbeat(), 0.0) is False


# In memory only: what is injected there.


def chatter(network: Network, names: list[str], count: int = 400) -> dict[str, Inbox]:
    """Every node reports and pings ``count`` times, 10 ms apart; what the hub got, by node."""
    got: dict[str, Inbox] = {name: Inbox() for name in names}
    network.hub(lambda envelope, due_s: got[envelope.source](envelope, due_s))
    nodes = [network.spoke(name, 1, Inbox()) for name in names]
    for number in range(count):
        for node in nodes:
            node.send(report(tag=number), number * 0.01)
            node.send(Ping(number), number * 0.01)
    return got


def test_only_telemetry_is_lost_and_the_gaps_say_how_much():
    network = Network(seed=3, loss_frac=0.2)
    got = chatter(network, [NODE])[NODE]
    assert len(got.bodies(Ping)) == 400
    reports = got.bodies(Report)
    assert 280 < len(reports) < 360
    first, last = reports[0].lease_epoch, reports[-1].lease_epoch
    assert network._hub.stats[NODE].gaps_total == last - first + 1 - len(reports)


def test_jitter_delays_and_never_reorders():
    got = chatter(Network(seed=3, delay_s=DELAY_S, jitter_s=0.05), [NODE])[NODE]
    for kind in (Ping, Report):
        due_s = [due_s for envelope, due_s in got if isinstance(envelope.body, kind)]
        late_s = [
            due_s - envelope.t_s for envelope, due_s in got if isinstance(envelope.body, kind)
        ]
        assert due_s == sorted(due_s)
        assert min(late_s) >= DELAY_S
        assert max(late_s) > 0.05


def test_the_luck_of_a_link_is_its_own():
    settings = {"seed": 5, "loss_frac": 0.3, "jitter_s": 0.02}
    alone = chatter(Network(**settings), [NODE])[NODE]
    assert alone == chatter(Network(**settings), [NODE])[NODE]
    assert alone == chatter(Network(**settings), [OTHER, "row1/rack0/node002", NODE])[NODE]
    assert alone != chatter(Network(**{**settings, "seed": 6}), [NODE])[NODE]
    others = chatter(Network(**settings), [NODE, OTHER])
    numbers = [[tick.lease_epoch for tick in got.bodies(Report)] for got in others.values()]
    assert numbers[0] != numbers[1]


def test_each_life_of_a_node_has_luck_of_its_own():
    network = Network(seed=5, loss_frac=0.5)
    got = Inbox()
    network.hub(got)
    for life in (1, 2):
        node = network.spoke(NODE, life, Inbox())
        for number in range(100):
            node.send(report(tag=number), 0.0)
    lives = [
        [word.body.lease_epoch for word, _ in got if word.incarnation == life] for life in (1, 2)
    ]
    assert lives[0] != lives[1]


def test_a_partition_cuts_both_ways_and_heals():
    wire = MemoryWire()
    node = wire.spoke()
    wire.greet(node)
    wire.hub.send(NODE, Stop("before"), 0.0)
    wire.network.partition(NODE)
    assert node.send(report(), 1.0), "the sender cannot know"
    assert wire.hub.send(NODE, Stop("during"), 1.0)
    wire.network.partition(NODE, cut=False)
    node.send(report(), 2.0)
    wire.hub.send(NODE, Stop("after"), 2.0)
    assert wire.at[NODE].bodies(Stop) == [Stop("before"), Stop("after")]
    assert wire.hub.stats[NODE].gaps_total == node.stats.gaps_total == 1


def test_a_node_needs_a_hub():
    with pytest.raises(TransportError, match="hub first"):
        Network().spoke(NODE, 1, Inbox())


# Over sockets only.


def test_a_full_queue_drops_and_both_ends_count():
    wire = ZmqWire(hwm_messages=20)
    node = wire.spoke()
    wire.greet(node)
    heard = wire.hub.stats[NODE].received_total
    # Nobody polls the hub: first the buffers of the system fill, then ours.
    large, sent = report(gpus=2_000), 0
    deadline = time.monotonic() + 10
    while node.dropped_total < 30 and time.monotonic() < deadline:
        sent += 1
        node.send(large, 0.0)
    dropped = node.dropped_total
    assert dropped == 30

    def through() -> bool:
        node.send(report(tag=77), 0.0)
        return report(tag=77) in [word.body for word, _ in wire.at_hub]

    wire.wait_for(through)
    stats = wire.hub.stats[NODE]
    assert stats.received_total - heard >= sent - dropped
    assert stats.gaps_total >= 30
    wire.close()


def test_sending_to_a_node_that_does_not_listen_never_blocks():
    wire = ZmqWire(hwm_messages=20)
    node = wire.spoke()
    wire.greet(node)
    big = Stop("x" * 100_000)
    began = time.monotonic()
    while wire.hub.dropped_total < 30 and time.monotonic() - began < 10:
        wire.hub.send(NODE, big, 0.0)
    assert wire.hub.dropped_total == 30
    wire.wait_for(lambda: wire.hub.send(NODE, Stop("last"), 0.0) and not wire.poll())
    wire.wait_for(lambda: Stop("last") in wire.at[NODE].bodies(Stop))
    assert node.stats.gaps_total >= 30
    wire.close()


def test_close_does_not_wait_for_peers_that_do_not_listen():
    wire = ZmqWire(hwm_messages=20)
    node = wire.spoke()
    wire.greet(node)
    while wire.hub.dropped_total < 3:
        wire.hub.send(NODE, Stop("x" * 100_000), 0.0)
    while node.dropped_total < 3:
        node.send(report(gpus=2_000), 0.0)
    wire.close()


def test_a_new_hub_does_not_hear_what_was_said_while_there_was_none(sockets):
    node = sockets.spoke()
    sockets.greet(node)
    endpoint, first_life = sockets.hub.endpoint, sockets.hub.incarnation
    sockets.hub.close()
    deadline = time.monotonic() + 5
    while node.send(Stop("nobody listens"), 0.0) and time.monotonic() < deadline:
        time.sleep(0.01)
    for _ in range(50):
        assert not node.send(Ping(-1), 0.0)
        node.send(report(tag=-1), 0.0)
    assert node.dropped_total > 50

    sockets.at_hub.clear()
    sockets.open_hub(endpoint)
    sockets.wait_for(lambda: node.send(hello(), 0.0))
    sockets.greet(node)
    assert sockets.hub.incarnation > first_life
    assert sockets.hub.stats[NODE].gaps_total == 0
    assert Ping(-1) not in [word.body for word, _ in sockets.at_hub]
    assert report(tag=-1) not in [word.body for word, _ in sockets.at_hub]
    sockets.hub.send(NODE, Stop("from the new one"), 0.0)
    sockets.wait_for(lambda: sockets.at[NODE])
    assert node.stats.gaps_total == node.stats.stale_total == 0


def test_a_node_may_come_before_its_hub():
    wire = ZmqWire()
    endpoint = wire.hub.endpoint
    wire.hub.close()
    node = wire.spoke()
    assert not node.send(hello(), 0.0), "there is nobody to queue it for"
    wire.open_hub(endpoint)
    wire.wait_for(lambda: node.send(hello(), 0.0))
    wire.wait_for(lambda: wire.at_hub)
    assert wire.at_hub[0][0].body == hello()
    wire.close()


def test_late_means_after_the_agreed_time_by_the_run_clock(sockets):
    node = sockets.spoke()
    sockets.greet(node)
    sockets.now_s = 10.0
    node.send(report(), 9.999)
    node.send(report(), 9.0)
    node.send(hello(), 0.0)
    sockets.wait_for(lambda: len(sockets.at_hub) == 3)
    assert sockets.hub.stats[NODE].late_total == 1, "a hello has no time to be late for"


def test_frames_that_are_no_message_of_ours_are_counted_and_nothing_more(sockets):
    sockets.greet(sockets.spoke())
    host, port = "127.0.0.1", int(sockets.hub.endpoint.rsplit(":", 1)[1])
    good = encode(Envelope("mallory", 1, 1, 0.0, Heartbeat()))
    forged = encode(Envelope(NODE, 9, 1, 0.0, Stop("forged")))
    not_text = encode(Envelope("mallory", 1, 2, 0.0, Stop("xyz"))).replace(b"xyz", b"\xff\xfe\xfd")
    on_the_wrong_stream = encode(Envelope("mallory", 1, 3, 0.0, report()))
    bad = [b"", b"\xc1", b"GET / HTTP/1.1", good[:-1], good + b"\x00", forged, not_text]
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.linger = 0
    dealer.identity = b"mallory"
    dealer.connect(f"tcp://{host}:{port}")
    for data in [*bad, on_the_wrong_stream]:
        dealer.send(data)
    dealer.send_multipart([good, good])
    dealer.send(good)
    sockets.wait_for(lambda: sockets.at_hub)
    assert [word.source for word, _ in sockets.at_hub] == ["mallory"]
    assert sockets.hub.bad_total == len(bad) + 2
    assert sockets.hub.stats[NODE].stale_total == 0

    publisher = context.socket(zmq.PUB)
    publisher.linger = 0
    publisher.connect(f"tcp://{host}:{port + 1}")
    before = sockets.hub.bad_total

    def counted() -> bool:
        publisher.send(b"\xc1")
        publisher.send(good)  # control's place is not here
        return sockets.hub.bad_total >= before + 4

    sockets.wait_for(counted)
    assert len(sockets.at_hub) == 1
    context.destroy()


def test_a_node_ignores_bad_frames_and_strangers():
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.linger = 0
    port = router.bind_to_random_port("tcp://127.0.0.1", 20_000, 60_000)
    got = Inbox()
    node = ZmqSpoke(f"tcp://127.0.0.1:{port}", NODE, 1, got, DELAY_S, now_s=lambda: 0.0)
    node.send(hello(), 0.0)
    assert router.poll(5000)
    identity, _ = router.recv_multipart()
    good = encode(Envelope(COORDINATOR, 1, 1, 0.0, Heartbeat()))
    router.send_multipart([identity, b"\xc1"])
    router.send_multipart([identity, good, good])
    router.send_multipart([identity, encode(Envelope("stranger", 1, 1, 0.0, Stop("x")))])
    router.send_multipart([identity, good])
    deadline = time.monotonic() + 5
    while not got and time.monotonic() < deadline:
        node.poll(0.01)
    assert [word.body for word, _ in got] == [Heartbeat()]
    assert node.bad_total == 3
    node.close()
    context.destroy()


def test_a_message_too_long_for_the_wire_is_dropped_where_it_was_made(sockets):
    node = sockets.spoke()
    sockets.greet(node)
    assert not node.send(Stop("x" * MAX_MESSAGE_BYTES), 0.0)
    assert not sockets.hub.send(NODE, Stop("x" * MAX_MESSAGE_BYTES), 0.0)
    assert (node.dropped_total, sockets.hub.dropped_total) == (1, 1)
    node.send(Ping(1), 0.0)
    sockets.wait_for(lambda: sockets.at_hub)
    assert sockets.hub.stats[NODE].gaps_total == 1


def test_one_poll_takes_a_bounded_number_and_is_fair_to_both_streams(sockets):
    node = sockets.spoke()
    sockets.greet(node)
    for _ in range(2_500):
        node.send(Ping(0), 0.0)
    for _ in range(500):
        node.send(report(), 0.0)
    taken = [(0, 0)]
    while taken[-1] != (2_500, 500):
        sockets.hub.poll(5.0)
        taken.append((len(sockets.at_hub.bodies(Ping)), len(sockets.at_hub.bodies(Report))))
        assert taken[-1] != taken[-2], "nothing came for 5 s"
    for before, after in pairwise(taken):
        assert max(after[0] - before[0], after[1] - before[1]) <= 1_000
    first_report = next(place for place, (_, reports) in enumerate(taken) if reports)
    assert taken[first_report][0] < 2_500, "reports waited until all else was done"


def test_poll_waits_no_longer_than_it_was_told(sockets):
    began = time.monotonic()
    sockets.hub.poll(0.05)
    assert 0.04 < time.monotonic() - began < 2.0
    sockets.hub.poll(0.0)


def free_pair() -> int:
    wire = ZmqWire()
    port = int(wire.hub.endpoint.rsplit(":", 1)[1])
    wire.close()
    return port


def bind(address: str, **options: object) -> ZmqHub:
    return ZmqHub(address, Inbox(), DELAY_S, now_s=lambda: 0.0, **options)


def connect(address: str, **options: object) -> ZmqSpoke:
    name = options.pop("name", NODE)
    return ZmqSpoke(address, name, 1, Inbox(), DELAY_S, now_s=lambda: 0.0, **options)


def test_close_releases_both_ports():
    port = free_pair()
    for _ in range(3):
        hub = bind(f"tcp://127.0.0.1:{port}")
        assert hub.endpoint == f"tcp://127.0.0.1:{port}"
        hub.close()
        hub.close()


@pytest.mark.parametrize("which", [0, 1])
def test_a_port_in_use_is_one_clear_line(which):
    port = free_pair()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port + which))
        taken.listen()
        with pytest.raises(TransportError) as error:
            bind(f"tcp://127.0.0.1:{port}")
    text = f"cannot listen on 127.0.0.1 ports {port} and {port + 1}: Address already in use"
    assert str(error.value) == text
    bind(f"tcp://127.0.0.1:{port}").close()


@pytest.mark.parametrize(
    "address",
    ["", "127.0.0.1:5555", "udp://127.0.0.1:1", "tcp://127.0.0.1", "tcp://127.0.0.1:65535",
     "tcp://127.0.0.1:-1", "tcp://127.0.0.1:x", "tcp://:5555"],
)  # fmt: skip
def test_an_address_that_cannot_be_is_refused(address):
    for opened in (bind, connect):
        with pytest.raises(TransportError, match="address"):
            opened(address)


@pytest.mark.parametrize("name", ["", "\0x", "x" * 256])
def test_a_name_that_sockets_cannot_carry_is_refused(name):
    with pytest.raises(TransportError, match="node name"):
        connect("tcp://127.0.0.1:5555", name=name)


def test_a_node_needs_a_port():
    with pytest.raises(TransportError, match="needs the coordinator's port"):
        connect("tcp://127.0.0.1:0")


def test_sockets_made_before_a_fork_are_refused_in_the_child(sockets):
    node = sockets.spoke()
    sockets.greet(node)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        said = []
        for use in (
            lambda: node.send(Heartbeat(), 0.0),
            lambda: node.poll(0.0),
            lambda: sockets.hub.send(NODE, Heartbeat(), 0.0),
            lambda: sockets.hub.poll(0.0),
        ):
            try:
                use()
                said.append("no error")
            except TransportError as error:
                said.append(str(error))
        node.close()  # does nothing: they are the parent's
        os.write(writer, "\n".join(said).encode())
        os._exit(0)
    os.waitpid(child, 0)
    said = os.read(reader, 10_000).decode().splitlines()
    assert len(said) == 4
    assert all("do not survive a fork" in line for line in said), said
    node.send(Ping(1), 0.0)
    sockets.wait_for(lambda: sockets.at_hub)


# Keys.


@pytest.fixture
def keys(tmp_path) -> dict[str, Curve]:
    """Of a hub that lets in node and other, of those two, and of a stranger."""
    made: dict[str, Curve] = {}
    public, secret = generate_keys(tmp_path / "hub", "hub")
    made["hub"] = Curve(secret, clients=tmp_path / "clients")
    for name, folder in (("node", "clients"), ("other", "clients"), ("stranger", "elsewhere")):
        made[name] = Curve(generate_keys(tmp_path / folder, name)[1], server=public)
    return made


class CurveWire(ZmqWire):
    def __init__(self, keys: dict[str, Curve]) -> None:
        Wire.__init__(self)
        self.keys = keys
        self.hwm_messages = None
        self.hub = bind("tcp://127.0.0.1:0", curve=keys["hub"])
        self.hub._deliver = self.at_hub

    def join(self, curve: Curve | None, name: str = NODE) -> ZmqSpoke:
        self.at[name] = Inbox()
        node = ZmqSpoke(
            self.hub.endpoint, name, 1, self.at[name], DELAY_S, now_s=lambda: 0.0, curve=curve
        )
        self.spokes.append(node)
        return node


@pytest.fixture
def guarded(keys) -> Iterator[CurveWire]:
    made = CurveWire(keys)
    yield made
    made.close()


def test_a_node_on_the_list_is_let_in(guarded, keys):
    node = guarded.join(keys["node"])
    guarded.greet(node)
    guarded.hub.send(NODE, Stop("come in"), 0.0)
    guarded.wait_for(lambda: guarded.at[NODE])
    node.send(report(tag=5), 0.0)
    guarded.wait_for(lambda: guarded.at_hub)
    assert guarded.hub.stats[NODE].gaps_total == 0
    assert guarded.hub.bad_total == 0


@pytest.mark.parametrize("who", ["stranger", "plain", "wrong server key"])
def test_others_are_not(guarded, keys, tmp_path, who):
    if who == "stranger":
        curve = keys["stranger"]
    elif who == "plain":
        curve = None
    else:
        public, _ = generate_keys(tmp_path / "another", "hub")
        curve = Curve(keys["node"].secret, server=public)
    outsider = guarded.join(curve, "outsider")
    for _ in range(20):
        assert not outsider.send(hello(), 0.0)
        outsider.send(report(), 0.0)
        guarded.poll(0.01)
    # The door is not stuck: one on the list comes in meanwhile.
    guarded.greet(guarded.join(keys["node"]))
    assert list(guarded.hub.stats) == [NODE]


def test_a_client_on_the_list_cannot_report_in_anothers_name(guarded, keys):
    node = guarded.join(keys["node"])
    guarded.greet(node)
    impostor = guarded.join(keys["other"], OTHER)
    guarded.greet(impostor)
    impostor.name = NODE
    impostor.incarnation = 99
    before = guarded.hub.bad_total
    impostor.send(report(tag=666), 0.0)
    impostor.send(Ping(666), 0.0)
    guarded.wait_for(lambda: guarded.hub.bad_total == before + 2)
    node.send(report(tag=1), 0.0)
    guarded.wait_for(lambda: guarded.at_hub)
    assert [tick.lease_epoch for tick in guarded.at_hub.bodies(Report)] == [1]


def test_nobody_is_let_in_when_the_guard_has_died(guarded, keys):
    guarded.hub._guard.stop()
    late = guarded.join(keys["node"])
    assert not late.send(hello(), 0.0)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "*", "192.0.2.7", "example.org", "127.example.org", "[::]"]
)
def test_beyond_loopback_there_must_be_keys(host):
    with pytest.raises(TransportError, match="not a loopback address: it needs CURVE keys"):
        bind(f"tcp://{host}:0")
    if host not in ("*",):
        with pytest.raises(TransportError, match="not a loopback address: it needs CURVE keys"):
            connect(f"tcp://{host}:5555")


def test_keys_without_a_list_are_no_protection_and_are_refused(keys, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for clients, what in (
        (None, "no folder"),
        (tmp_path / "nowhere", "no folder"),
        (empty, "nobody could join"),
        (Path("*"), "no folder"),
    ):
        with pytest.raises(TransportError, match=what):
            bind("tcp://127.0.0.1:0", curve=Curve(keys["hub"].secret, clients=clients))
    with pytest.raises(TransportError, match="coordinator's public key"):
        connect("tcp://127.0.0.1:5555", curve=Curve(keys["node"].secret))


def test_a_key_file_that_others_can_read_is_refused(keys):
    keys["node"].secret.chmod(0o640)
    with pytest.raises(TransportError, match="its mode is 640, must be 600"):
        connect("tcp://127.0.0.1:5555", curve=keys["node"])


def test_a_key_file_that_is_none_is_refused(keys, tmp_path):
    broken = tmp_path / "broken"
    for text, what in (("", "No public key"), ('public-key = "short"', "40 characters"),
                       ('public-key = "' + "x" * 40 + '"', "holds no secret key")):  # fmt: skip
        broken.write_text(text)
        broken.chmod(0o600)
        with pytest.raises(TransportError, match=what):
            connect("tcp://127.0.0.1:5555", curve=Curve(broken, server=keys["node"].server))
    with pytest.raises(TransportError, match="No such file"):
        connect("tcp://127.0.0.1:5555", curve=Curve(tmp_path / "none", server=broken))


def test_new_keys_are_private_and_never_overwrite_old_ones(tmp_path):
    public, secret = generate_keys(tmp_path / "keys", NODE)
    assert secret.name == "row0.rack0.node000.key_secret"
    assert secret.stat().st_mode & 0o777 == 0o600
    assert "secret" not in public.read_text()
    assert zmq.auth.load_certificate(public)[0] == zmq.auth.load_certificate(secret)[0]
    before = secret.read_text()
    with pytest.raises(TransportError, match="File exists"):
        generate_keys(tmp_path / "keys", NODE)
    assert secret.read_text() == before


DROPPED = """
import gc, os, sys
from pathlib import Path
from testbed.core.messages import Heartbeat
from testbed.core.transport.zmq import Curve, ZmqHub, ZmqSpoke, generate_keys

def ends():
    hub_keys = node_keys = None
    if sys.argv[2:]:
        folder = Path(sys.argv[2])
        public, secret = generate_keys(folder / "hub", "hub")
        hub_keys = Curve(secret, clients=folder / "nodes")
        node_keys = Curve(generate_keys(folder / "nodes", "node")[1], server=public)
    hub = ZmqHub("tcp://127.0.0.1:0", print, 0.0, now_s=lambda: 0.0, curve=hub_keys)
    spoke = ZmqSpoke(hub.endpoint, "node", 1, print, 0.0, now_s=lambda: 0.0, curve=node_keys)
    for _ in range(100):  # something is queued, and nobody will take it
        spoke.send(Heartbeat(), 0.0)
    hub.itself, spoke.itself = hub, spoke  # so that only a collection finds them
    return hub, spoke

kept = ends()
if sys.argv[1] == "dropped":
    kept = None
    gc.collect()
    print("collected", flush=True)
if sys.argv[1] == "forked" and os.fork() == 0:
    kept = None
    gc.collect()
"""


@pytest.mark.parametrize("curve", [False, True])
@pytest.mark.parametrize("how", ["dropped", "kept", "forked"])
def test_ends_that_nobody_closes_do_not_hang(tmp_path, how, curve):
    """Left to the garbage collector, or to the end of the process, also with CURVE's thread."""
    command = [sys.executable, "-c", DROPPED, how, *([str(tmp_path)] if curve else [])]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=20, check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert ("collected" in done.stdout) == (how == "dropped")
