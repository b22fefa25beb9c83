"""The coordinator on its own: nodes join, fall silent and come back; policies disagree."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from testbed.coordinator.arbiter import Claims
from testbed.coordinator.cluster import Layout
from testbed.coordinator.loop import Coordinator
from testbed.core.errors import PolicyError, SpecError
from testbed.core.messages import (
    PROTOCOL_VERSION,
    Envelope,
    GpuInfo,
    GpuReadings,
    Hello,
    InstanceReadings,
    Lease,
    Progress,
    Refused,
    Request,
    Submit,
    TenantReadings,
    Welcome,
    decode,
    encode,
    merge,
)
from testbed.core.messages import report as packed
from testbed.core.spec import parse_spec
from testbed.core.view import SetPowerLimit
from testbed.policies.least_loaded import LeastLoaded
from testbed.recorder.reader import Recording
from testbed.recorder.writer import Recorder

SPEC = """
[cluster]
rows = 1
nodes_per_row = 2
gpus_per_node = 2
row_budget_w = 2000
[[pool]]
gpus_per_node = 2
[[policy]]
use = "mine"
[[policy]]
use = "theirs"
precedence = "safety"
"""
NODES = ["row0/rack0/node000", "row0/rack0/node001"]


class Says:
    """A policy that says what it is told to."""

    period_s = 1.0

    def __init__(self):
        self.next = []

    def step(self, view):
        said, self.next = self.next, []
        return said


class FakeHub:
    """Keeps what is sent."""

    def __init__(self):
        self.sent = []

    def send(self, to, body, t_s):
        self.sent.append((to, body))
        return True

    def of(self, kind, to=None):
        return [body for who, body in self.sent if isinstance(body, kind) and to in (None, who)]


@pytest.fixture
def world(tmp_path):
    spec = parse_spec(SPEC)
    hub, policies = FakeHub(), [Says(), Says()]
    with Recorder(tmp_path / "run", spec=spec) as records:
        made = Coordinator(spec, hub, records, policies, LeastLoaded(), run_id="r")
        made.fake, made.says = hub, policies
        yield made


def info(k):
    return GpuInfo(f"GPU-{k}", "fake", 1 << 30, 200.0, 700.0, 700.0, 210.0, 1980.0)


def hello(world, node, life=1, gpus=2, now_s=0.0):
    body = Hello(PROTOCOL_VERSION, "", [info(k) for k in range(gpus)], [])
    world.on_message(Envelope(node, life, 1, now_s, body), now_s)


def report(world, node, now_s, life=1, draw_w=300.0, limit_w=700.0, lost=False):
    readings = GpuReadings(
        [draw_w] * 2, [draw_w] * 2, [limit_w] * 2, [limit_w] * 2, [0.0] * 2, [1980.0] * 2,
        [50.0] * 2, [50.0] * 2, [1.0] * 2, [1] * 2, [0] * 2, [lost, False],
    )  # fmt: skip
    instances = InstanceReadings([0] * 2, [0] * 2, [0.0] * 2, [0] * 2, [0] * 2, [0] * 2)
    body = packed(readings, instances, TenantReadings.empty())
    world.on_message(Envelope(node, life, 2, now_s, body), now_s)


def join(world, *nodes, now_s=0.0, life=1):
    for node in nodes or NODES:
        hello(world, node, life, now_s=now_s)
        report(world, node, now_s, life)


def test_a_node_is_welcomed_and_leased_its_default_limits(world):
    join(world, NODES[0])
    [welcome] = world.fake.of(Welcome)
    assert welcome.config.safe_power_limit_w == [475.0, 475.0]
    [lease] = world.fake.of(Lease)
    assert lease.power_limit_w == [700.0, 700.0]
    assert world.view.instances.up.tolist() == [True, True, False, False]


def test_who_does_not_fit_is_refused_with_the_reason(world):
    hello(world, "row9/rack0/node009")
    hello(world, NODES[0], gpus=5)
    reasons = [body.reason for body in world.fake.of(Refused)]
    assert "none of the 2 nodes" in reasons[0]
    assert "5 GPUs, the run file says 2" in reasons[1]


def test_a_report_that_does_not_fit_its_node_is_ignored_and_said_once(world, tmp_path):
    join(world)
    body = packed(GpuReadings(*([[900.0] * 3] * 9), [1] * 3, [0] * 3, [False] * 3),
                  InstanceReadings.empty(), TenantReadings.empty())  # fmt: skip
    before = world.view.gpus.power_avg_w.copy()
    for sequence in (3, 4):
        world.on_message(Envelope(NODES[0], 1, sequence, 1.0, body), 1.0)
    assert (world.view.gpus.power_avg_w == before).all()
    world._records.close()
    events = Recording.open(tmp_path / "run").table("events").to_pylist()
    [bad] = [event for event in events if event["kind"] == "bad report"]
    assert bad["text"] == "reports [3, 0, 0] GPUs, instances and tenants; it has [2, 2, 0]"


def test_merged_reports_do_what_single_ones_do(world):
    """Also when one of the senders is unknown, and one is in another life."""
    join(world)
    words = []
    for node, life, draw_w in ((NODES[1], 1, 410.0), ("row7/x", 1, 1.0), (NODES[0], 9, 2.0)):
        columns = [[draw_w, draw_w + 1]] * 4 + [[0.0] * 2] * 5
        readings = GpuReadings(*columns, [1] * 2, [0] * 2, [False, False])
        instances = InstanceReadings(*([[3, 4]] * 2), [0.5] * 2, *([[5, 6]] * 3))
        body = packed(readings, instances, TenantReadings.empty())
        words.append(Envelope(node, life, 3, 2.0, body))
    world.on_message(decode(encode(Envelope("row0/relay", 1, 1, 2.0, merge(words)))), 2.1)
    assert world.view.gpus.power_avg_w.tolist() == [300.0, 300.0, 410.0, 411.0]
    assert world.view.gpus.t_s.tolist() == [0.0, 0.0, 2.0, 2.0]
    assert world.view.instances.num_waiting.tolist() == [0, 0, 3, 4]
    assert [node.last_s for node in world.layout.nodes] == [0.0, 2.1]


def test_leases_of_many_nodes_are_renewed_apart(tmp_path):
    spec = parse_spec(SPEC.replace("_row = 2", "_row = 20").replace("2000", "20000"))
    hub = FakeHub()
    with Recorder(tmp_path / "many", spec=spec) as records:
        many = Coordinator(spec, hub, records, [], LeastLoaded(), run_id="r")
        names = [node.name for node in many.layout.nodes]
        join(many, *names)
        sent = []
        for step in range(1, 31):
            for name in names:
                report(many, name, step * 0.1)
            hub.sent.clear()
            many.tick(step * 0.1)
            sent.append(len(hub.of(Lease)))
    assert sum(sent) == pytest.approx(3 * len(names), abs=len(names))
    assert max(sent) <= len(names) // 4


def test_a_cap_in_between_does_not_move_the_next_renewal(world):
    """Else nodes that were capped together would renew together from then on."""
    join(world)
    renewed = {node.name: [] for node in world.layout.nodes}
    for step in range(1, 61):
        now_s = round(step * 0.1, 6)
        for name in renewed:
            report(world, name, now_s)
        world.fake.sent.clear()
        world.tick(now_s)
        for name, times_s in renewed.items():
            times_s += [now_s] * len(world.fake.of(Lease, name))
        if step % 10 == 0:
            world.says[0].next = [SetPowerLimit(np.arange(4), 500.0 + step)]
            world.control(now_s)
    first, second = renewed.values()
    assert np.diff(first) == pytest.approx(1.0)
    assert np.diff(second) == pytest.approx(1.0)
    assert first[0] != second[0]


def test_changes_are_answered_and_of_renewals_one_in_eight(world):
    join(world)
    assert [lease.answer for lease in world.fake.of(Lease)] == [True, True]
    world.says[0].next = [SetPowerLimit(np.arange(2), 500.0)]
    world.control(0.5)
    assert world.fake.of(Lease, NODES[0])[-1].answer
    world.fake.sent.clear()
    for step in range(1, 161):
        now_s = 0.5 + step * 0.1
        report(world, NODES[0], now_s)
        world.tick(now_s)
    answers = [lease.answer for lease in world.fake.of(Lease, NODES[0])]
    assert (len(answers), sum(answers)) == (16, 2)
    join(world, NODES[0], life=2, now_s=17.0)
    assert world.fake.of(Lease, NODES[0])[-1].answer, "a new life begins with an answer"


def test_a_refusal_is_forgotten_once_the_node_is_welcome(world, tmp_path):
    for life in (1, 2, 3, 4):
        if life % 2:
            hello(world, NODES[0], life, gpus=3)
        else:
            join(world, NODES[0], life=life)
    world._records.close()
    events = Recording.open(tmp_path / "run").table("events").to_pylist()
    assert [event["kind"] for event in events].count("refused") == 2


def test_a_budget_below_what_devices_can_be_set_to_is_impossible():
    small = parse_spec(SPEC.replace("row_budget_w = 2000", "row_budget_w = 700"))
    with pytest.raises(SpecError, match="cannot be set below 200 W"):
        Layout(small).safe_limit_w([info(0)])


def test_requests_wait_at_the_door_until_somebody_is_there(world):
    world.on_arrival(Request(1, 0.0, 10, 10, slo_class="default"), 0.0)
    assert not world.fake.of(Submit)
    join(world, NODES[1])
    assert len(world.fake.of(Submit, NODES[1])) == 1


def test_a_silent_node_is_lost_and_its_requests_go_elsewhere(world):
    join(world)
    for k in range(4):
        world.on_arrival(Request(k, 1.0, 10, 10), 1.0)
    assert len(world.fake.of(Submit, NODES[0])) == 2
    for step in range(1, 80):
        now_s = 1.0 + step * 0.1
        report(world, NODES[1], now_s)
        world.tick(now_s)
    assert not world.view.instances.up[:2].any()
    assert len(world.fake.of(Submit, NODES[1])) == 4
    assert world.view.gpus.draw_w(now_s)[:2].tolist() == [700.0, 700.0], "counts at its limit"
    assert world.view.instances.outstanding_requests.tolist() == [0, 0, 2, 2]


def test_a_new_life_of_a_node_has_forgotten_its_requests(world):
    join(world)
    world.on_arrival(Request(1, 1.0, 10, 10), 1.0)
    join(world, NODES[0], life=2, now_s=2.0)
    assert len(world.fake.of(Submit)) == 2
    late = Progress([1], ["finished"], [1.5], [0])
    world.on_message(Envelope(NODES[0], 1, 9, 1.5, late), 2.1)
    assert 1 in world.dispatcher.in_flight, "a word of the old life counts for nothing"


def test_a_request_that_keeps_losing_its_node_is_given_up(world):
    join(world, NODES[0])
    world.on_arrival(Request(1, 0.5, 10, 10), 0.5)
    for life in (2, 3, 4):
        join(world, NODES[0], life=life, now_s=float(life))
    assert len(world.fake.of(Submit)) == world.spec.control.max_attempts == 3
    assert not world.dispatcher.in_flight


def test_nothing_happens_to_a_request_after_the_end(world, tmp_path):
    join(world)
    for number in (1, 2):
        world.on_arrival(Request(number, 0.5, 10, 10), 0.5)
    world.stop(1.0, "the run is over")
    world.fake.sent.clear()
    report(world, NODES[0], 1.0, lost=True)
    join(world, NODES[1], life=2, now_s=1.1)
    assert not world.fake.of(Submit)
    world._records.close()
    table = Recording.open(tmp_path / "run").table("requests").to_pylist()
    assert [(row["request_id"], row["status"]) for row in table] == [
        (1, "in_flight"), (2, "in_flight"),
    ]  # fmt: skip


class Answers:
    """A router that gives one answer."""

    def __init__(self, answer):
        self.answer = answer

    def route(self, request, view):
        return self.answer


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (np.int64(2), ""),
        (4, "instance 4 is none of 0..3"),
        (-1, "instance -1 is none of"),
        (1.5, r"1\.5 is no instance's index"),
        ("2", "'2' is no instance's index"),
    ],
)
def test_a_router_answers_with_an_index(tmp_path, answer, message):
    spec, hub = parse_spec(SPEC), FakeHub()
    with Recorder(tmp_path / "run", spec=spec) as records:
        made = Coordinator(spec, hub, records, [Says(), Says()], Answers(answer), run_id="r")
        join(made)
        if message:
            with pytest.raises(PolicyError, match=message):
                made.on_arrival(Request(1, 0.5, 10, 10), 0.5)
        else:
            made.on_arrival(Request(1, 0.5, 10, 10), 0.5)
            assert hub.of(Submit, NODES[1])[0].instance == 0


def test_finished_requests_are_taken_off_the_account(world):
    join(world)
    world.on_arrival(Request(1, 1.0, 100, 50), 1.0)
    assert world.view.instances.outstanding_tokens[0] == 150
    done = Progress([1, 1], ["first_token", "finished"], [1.1, 1.2], [0, 0])
    world.on_message(Envelope(NODES[0], 1, 3, 1.2, done), 1.2)
    assert world.view.instances.outstanding_tokens[0] == 0
    assert world.dispatcher.ended_total == 1


def test_a_lost_gpu_takes_its_instance_down(world):
    join(world)
    report(world, NODES[0], 1.0, lost=True)
    assert world.view.instances.up.tolist() == [False, True, True, True]


def test_safety_bounds_what_efficiency_asks_for(world):
    join(world)
    mine, theirs = world.says
    mine.next = [SetPowerLimit(np.array([0, 1]), 650.0)]
    theirs.next = [SetPowerLimit(np.array([0]), 500.0)]
    world.control(1.0)
    assert world.fake.of(Lease, NODES[0])[-1].power_limit_w == [500.0, 650.0]
    theirs.next = [SetPowerLimit(np.array([0]), 700.0)]
    world.control(2.0)
    assert world.fake.of(Lease, NODES[0])[-1].power_limit_w == [650.0, 650.0]


def test_the_same_word_twice_is_one_lease(world):
    join(world)
    for now_s in (1.0, 2.0):
        world.says[0].next = [SetPowerLimit(np.array([2]), 400.0)]
        world.control(now_s)
    leases = world.fake.of(Lease, NODES[1])
    assert [lease.power_limit_w[0] for lease in leases] == [700.0, 400.0]
    assert world.commands_total == 1


def test_leases_are_renewed_three_times_per_lease(world):
    join(world)
    before = len(world.fake.of(Lease, NODES[0]))
    for step in range(1, 61):
        now_s = step * 0.1
        for node in NODES:
            report(world, node, now_s)
        world.tick(now_s)
    leases = world.fake.of(Lease, NODES[0])[before:]
    assert 5 <= len(leases) <= 7
    assert all(b.sequence == a.sequence + 1 for a, b in itertools.pairwise(leases))


def test_claims_of_one_precedence_resolve_to_the_lowest():
    claims = Claims(["a", "b"], ["slo", "slo"], 1)
    top = np.array([700.0])
    claims.claim(0, np.array([0]), np.array([500.0]), top)
    claims.claim(1, np.array([0]), np.array([450.0]), top)
    limit_w, winner = claims.resolve(top)
    assert limit_w[0] == 450.0
    assert winner[0] == 1
