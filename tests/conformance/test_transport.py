"""One suite over every transport: what a hub and its spokes promise."""

from __future__ import annotations

import os
import socket
import time

import pytest
import zmq

from testbed.core.errors import TransportError
from testbed.core.messages import (
    Envelope,
    GpuReadings,
    Heartbeat,
    Hello,
    InstanceReadings,
    Ping,
    Report,
    Stop,
    TenantReadings,
    decode,
    encode,
)
from testbed.core.topics import TOPICS
from testbed.core.transport.memory import Network
from testbed.core.transport.zmq import Curve, ZmqHub, ZmqSpoke, generate_keys


def report(drift: int = 0) -> Report:
    """Telemetry; ``drift`` makes messages tell apart."""
    return Report(
        GpuReadings(*([[]] * 12)), InstanceReadings(*([[]] * 6)), TenantReadings(*([[]] * 9)),
        1, 1, drift, 0.0,
    )  # fmt: skip


class World:
    """A hub, and spokes by name, with what each received."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.at_hub: list[tuple[Envelope, float]] = []
        self.at: dict[str, list[tuple[Envelope, float]]] = {}
        self.spokes = []
        if kind == "memory":
            self.network = Network(delay_s=0.01, check=True)
            self.hub = self.network.hub(lambda e, due: self.at_hub.append((e, due)))
        else:
            self.hub = ZmqHub(
                "tcp://127.0.0.1:0",
                lambda e, due: self.at_hub.append((e, due)),
                0.01,
                now_s=lambda: 0.0,
            )

    def spoke(self, name: str, incarnation: int = 1):
        received = self.at.setdefault(name, [])

        def deliver(envelope, due_s):
            received.append((envelope, due_s))

        if self.kind == "memory":
            made = self.network.spoke(name, incarnation, deliver)
        else:
            made = ZmqSpoke(self.hub.endpoint, name, incarnation, deliver, 0.01, now_s=lambda: 0.0)
        self.spokes.append(made)
        return made

    def settle(self, done, timeout_s=5.0):
        """Poll until ``done()`` or give up."""
        deadline = time.monotonic() + timeout_s
        while not done() and time.monotonic() < deadline:
            self.hub.poll(0.01)
            for spoke in self.spokes:
                spoke.poll(0.0)
        return done()

    def greet(self, spoke):
        """As a node does: hello by control, telemetry until the hub hears it."""
        before = len(self.at_hub)
        spoke.send(Hello(1, "", [], []), 0.0)
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            spoke.send(report(), 0.0)
            self.hub.poll(0.02)
            if any(isinstance(e.body, Report) for e, _ in self.at_hub[before:]):
                break
        self.settle(lambda: False, 0.1)
        self.at_hub.clear()

    def close(self):
        for spoke in self.spokes:
            spoke.close()
        self.hub.close()


@pytest.fixture(params=["memory", "zmq"])
def world(request):
    made = World(request.param)
    yield made
    made.close()


def test_messages_go_both_ways_in_order_and_are_due_after_the_delay(world):
    spoke = world.spoke("row0/rack0/node000")
    world.greet(spoke)
    for k in range(50):
        assert spoke.send(Ping(k), 1.0 + k)
        assert world.hub.send(spoke.name, Ping(k), 2.0 + k)
    assert world.settle(lambda: len(world.at_hub) == 50 and len(world.at[spoke.name]) == 50)
    assert [e.body.sent_ns for e, _ in world.at_hub] == list(range(50))
    assert [due for _, due in world.at_hub] == pytest.approx([1.01 + k for k in range(50)])
    assert all(e.source == spoke.name for e, _ in world.at_hub)
    assert [e.body.sent_ns for e, _ in world.at[spoke.name]] == list(range(50))


def test_nothing_counts_as_lost_at_the_start(world):
    spoke = world.spoke("n0")
    world.greet(spoke)
    for k in range(200):
        spoke.send(report(k), float(k))
    world.settle(lambda: len(world.at_hub) == 200)
    assert world.hub.stats["n0"].gaps_total == 0
    assert [e.body.drift_total for e, _ in world.at_hub] == list(range(200))


def test_nodes_are_told_apart(world):
    spokes = [world.spoke(f"n{k}") for k in range(3)]
    for spoke in spokes:
        world.greet(spoke)
    world.hub.send("n1", Stop("you"), 0.0)
    assert world.settle(lambda: world.at["n1"])
    assert not world.at["n0"]
    assert not world.at["n2"]


def test_a_message_to_nobody_is_dropped_and_counted(world):
    assert world.hub.send("nobody", Heartbeat(), 0.0) is False
    assert world.hub.dropped_total == 1


def test_a_node_in_a_new_life_takes_the_place_of_the_old_one(world):
    old = world.spoke("n0", 1)
    world.greet(old)
    new = world.spoke("n0", 2)
    world.greet(new)
    world.at["n0"].clear()
    world.hub.send("n0", Stop("hello again"), 0.0)
    assert world.settle(lambda: world.at["n0"])
    assert new.send(Ping(1), 0.0)
    assert world.settle(lambda: any(e.incarnation == 2 for e, _ in world.at_hub))


def test_large_messages_arrive_whole(world):
    spoke = world.spoke("n0")
    world.greet(spoke)
    count = 20_000
    columns = [[1.5] * count] * 9 + [[1] * count] * 2 + [[False] * count]
    big = Report(
        GpuReadings(*columns), InstanceReadings(*([[]] * 6)), TenantReadings(*([[]] * 9)),
        1, 1, 0, 0.0,
    )  # fmt: skip
    spoke.send(big, 0.0)
    assert world.settle(lambda: len(world.at_hub) == 1)
    assert world.at_hub[0][0].body == big


# What only one of them can show.


def test_memory_loses_only_telemetry_and_counts_it():
    at_hub = []
    network = Network(seed=3, loss_frac=0.3)
    hub = network.hub(lambda e, due: at_hub.append(e))
    spoke = network.spoke("n0", 1, lambda e, due: None)
    for k in range(1000):
        spoke.send(report(k), float(k))
        spoke.send(Ping(k), float(k))
    pings = [e for e in at_hub if isinstance(e.body, Ping)]
    reports = [e for e in at_hub if isinstance(e.body, Report)]
    assert len(pings) == 1000
    assert 600 < len(reports) < 800
    assert hub.stats["n0"].gaps_total == 1000 - len(reports)


def test_memory_jitter_is_seeded_and_keeps_order():
    def dues(seed, other_traffic):
        seen = []
        network = Network(seed=seed, jitter_s=0.01)
        network.hub(lambda e, due: seen.append((e.source, due)))
        first = network.spoke("n0", 1, lambda e, due: None)
        second = network.spoke("n1", 1, lambda e, due: None)
        for k in range(100):
            first.send(Ping(k), k * 0.001)
            for _ in range(other_traffic):
                second.send(Ping(k), k * 0.001)
        return [due for source, due in seen if source == "n0"]

    assert dues(1, 0) == dues(1, 3), "one link's traffic does not change another's luck"
    assert dues(1, 0) != dues(2, 0)
    assert dues(1, 0) == sorted(dues(1, 0))


def test_memory_partition():
    at_hub, at_node = [], []
    network = Network()
    hub = network.hub(lambda e, due: at_hub.append(e))
    spoke = network.spoke("n0", 1, lambda e, due: at_node.append(e))
    network.partition("n0")
    spoke.send(Ping(1), 0.0)
    hub.send("n0", Heartbeat(), 0.0)
    network.partition("n0", cut=False)
    spoke.send(Ping(2), 0.0)
    assert [e.body.sent_ns for e in at_hub] == [2]
    assert not at_node


@pytest.fixture
def hub():
    made = World("zmq")
    yield made
    made.close()


def test_bad_frames_are_counted_and_harm_nothing(hub):
    host, port = hub.hub.endpoint.removeprefix("tcp://").split(":")
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.linger = 0
        stranger.identity = b"stranger"
        stranger.connect(f"tcp://{host}:{port}")
        good = encode(Envelope("somebody-else", 1, 1, 0.0, Ping(1)))
        for data in (b"", b"\x00" * 50, os.urandom(200), good[:-2], good):
            stranger.send(data)
        stranger.send_multipart([b"two", b"frames"])
        assert hub.settle(lambda: hub.hub.bad_total == 6)
    assert not hub.at_hub
    spoke = hub.spoke("n0")
    hub.greet(spoke)


def test_telemetry_that_cannot_be_queued_shows_as_a_gap(hub, monkeypatch):
    monkeypatch.setattr("testbed.core.transport.zmq._HWM_MESSAGES", 10)
    spoke = hub.spoke("n0")
    hub.greet(spoke)
    for k in range(20_000):
        spoke.send(report(k), float(k))
    time.sleep(0.2)
    hub.settle(lambda: False, 0.5)
    spoke.send(report(1), 0.0)
    hub.settle(lambda: hub.at_hub and hub.at_hub[-1][0].body.drift_total == 1, 2.0)
    received = len(hub.at_hub)
    if received < 20_001:
        assert hub.hub.stats["n0"].gaps_total == 20_001 - received


def test_closing_frees_the_port():
    first = World("zmq")
    endpoint = first.hub.endpoint
    first.close()
    again = ZmqHub(endpoint, lambda e, due: None, 0.0, now_s=lambda: 0.0)
    with pytest.raises(TransportError, match="cannot listen"):
        ZmqHub(endpoint, lambda e, due: None, 0.0, now_s=lambda: 0.0)
    again.close()


@pytest.mark.parametrize("address", ["tcp://0.0.0.0:0", "tcp://192.0.2.1:5555"])
def test_off_loopback_needs_keys(address):
    with pytest.raises(TransportError, match="CURVE"):
        ZmqHub(address, lambda e, due: None, 0.0, now_s=lambda: 0.0)


@pytest.mark.parametrize("address", ["nonsense", "tcp://127.0.0.1", "ipc://x", "tcp://h:99999"])
def test_bad_addresses(address):
    with pytest.raises(TransportError, match="address"):
        ZmqHub(address, lambda e, due: None, 0.0, now_s=lambda: 0.0)


def test_curve_lets_in_the_listed_and_nobody_else(tmp_path):
    clients = tmp_path / "clients"
    server_public, server_secret = generate_keys(tmp_path / "server", "server")
    public, secret = generate_keys(tmp_path / "known", "known")
    _, stranger = generate_keys(tmp_path / "stranger", "stranger")
    clients.mkdir()
    (clients / public.name).write_bytes(public.read_bytes())
    seen = []
    hub = ZmqHub(
        "tcp://127.0.0.1:0", lambda e, due: seen.append(e.source), 0.0,
        now_s=lambda: 0.0, curve=Curve(server_secret, clients=clients),
    )  # fmt: skip
    spokes = [
        ZmqSpoke(hub.endpoint, name, 1, lambda e, due: None, 0.0, now_s=lambda: 0.0, curve=curve)
        for name, curve in (
            ("known", Curve(secret, server=server_public)),
            ("stranger", Curve(stranger, server=server_public)),
            ("plain", None),
        )
    ]
    deadline = time.monotonic() + 2.0
    while time.monotonic() < deadline:
        for spoke in spokes:
            spoke.send(Ping(1), 0.0)
        hub.poll(0.05)
    for spoke in spokes:
        spoke.close()
    hub.close()
    assert set(seen) == {"known"}


def test_secret_keys_must_be_private(tmp_path):
    server_public, secret = generate_keys(tmp_path, "server")
    secret.chmod(0o644)
    with pytest.raises(TransportError, match="must be 600"):
        ZmqSpoke(
            "tcp://127.0.0.1:5000", "n", 1, lambda e, due: None, 0.0, now_s=lambda: 0.0,
            curve=Curve(secret, server=server_public),
        )  # fmt: skip


def test_sockets_do_not_survive_a_fork(hub):
    child = os.fork()
    if child == 0:
        try:
            hub.hub.poll(0.0)
        except TransportError:
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_every_message_is_in_the_topics_table():
    for kind in TOPICS:
        assert TOPICS[kind].stream in ("control", "telemetry")
    assert decode(encode(Envelope("n", 1, 1, 0.0, Stop("x")))).body == Stop("x")
    assert socket.gethostbyname("localhost").startswith("127.")
