"""Slots of a node, and what the coordinator tells it: revived, relabelled, lost, restarted."""

from __future__ import annotations

import numpy as np
import pytest

from emulators.gpu import GpuBank
from emulators.profiles import load_gpu
from emulators.server import ServerBank
from emulators.state import GpuState
from testbed.coordinator.cluster import Layout
from testbed.coordinator.loop import Coordinator
from testbed.core.errors import PolicyError
from testbed.core.messages import (
    PROTOCOL_VERSION,
    Arrange,
    Delays,
    EngineConfig,
    Envelope,
    GpuReadings,
    Hello,
    InstanceConfig,
    InstanceReadings,
    NodeConfig,
    Request,
    Returned,
    SlotReadings,
    Submit,
    TenantReadings,
    Tune,
    Welcome,
)
from testbed.core.messages import report as packed
from testbed.core.spec import parse_spec
from testbed.core.view import DRAINING, OFF, STARTING, UP, Placement, SetBatch, SetLayout
from testbed.policies.least_loaded import LeastLoaded
from testbed.recorder.writer import Recorder
from tests.coordinator.test_coordinator import FakeHub, Says, info

SMALL = "llama-3.1-8b"


def instance(serial, first, tp, model=SMALL):
    gpus = list(range(first, first + tp))
    return InstanceConfig(f"slot{first}", "p", model, tp, gpus, EngineConfig(), "bf16", serial)


class Bench:
    """A node of 4 GPUs with its physics ticked every 0.1 s."""

    def __init__(self, *instances, **delays):
        state = GpuState.create(4)
        self.servers = ServerBank(GpuBank(load_gpu("h100-sxm"), state), 1)
        self.serving = self.servers.serving[0]
        config = NodeConfig(
            "n", list(instances), [700.0] * 4, 0.1, 3.0, 1e3, 1e3, 0.005,
            elastic=True, delays=Delays(**delays),
        )  # fmt: skip
        self.serving.configure_slots(config, 0.0)
        self.now_s = 0.0

    def until(self, t_s):
        while self.now_s < t_s - 1e-9:
            next_s = min(round(self.now_s + 0.1, 6), t_s)
            while self.serving.next_event_s < next_s:
                self.serving.advance_to(self.serving.next_event_s)
            self.servers.tick(next_s)
            self.serving.advance_to(next_s)
            self.now_s = next_s
        return self

    def states(self):
        return self.serving.slots().state


def test_a_draining_instance_that_is_wanted_again_goes_on():
    bench = Bench(instance(1, 0, 2), drain_s=5.0)
    bench.serving.submit(0, Request(1, 0.0, 100, 400), 0.0)
    bench.until(0.5)
    bench.serving.arrange(1, [], "snapshot", 0.5)
    assert bench.states() == [DRAINING, OFF, OFF, OFF]
    bench.until(0.8)
    bench.serving.arrange(2, [instance(1, 0, 2)], "snapshot", 0.8)
    assert bench.states() == [UP, OFF, OFF, OFF]
    bench.until(8.0)
    assert [e.kind for e in bench.serving.drain_events()] == ["first_token", "finished"]
    assert not bench.serving.drain_returned()


def test_a_new_instance_waits_for_all_of_its_gpus():
    bench = Bench(instance(1, 0, 1), instance(2, 1, 1, "mistral-7b"), drain_s=1.0, warm_s=0.5)
    for slot in (0, 1):
        bench.serving.submit(slot, Request(slot, 0.0, 100, 3000), 0.0)
    bench.until(0.2)
    bench.serving.arrange(1, [instance(3, 0, 4, "mistral-7b")], "snapshot", 0.2)
    bench.until(1.1)
    assert bench.states()[:2] == [DRAINING, DRAINING]
    bench.until(1.3)
    assert bench.states() == [STARTING, OFF, OFF, OFF]
    returned = bench.serving.drain_returned()
    assert sorted((r.request_id, r.why) for r in returned) == [(0, "drained"), (1, "drained")]
    assert all(r.output_tokens > 50 for r in returned)
    bench.until(2.0)
    assert bench.states() == [UP, OFF, OFF, OFF]


def test_a_later_layout_takes_a_start_back():
    bench = Bench(warm_s=2.0)
    bench.serving.arrange(1, [instance(1, 0, 4)], "snapshot", 0.0)
    bench.until(0.5)
    assert bench.states()[0] == STARTING
    used = bench.servers.bank.state.measured["memory_used_bytes"].copy()
    bench.serving.arrange(2, [instance(2, 2, 2)], "snapshot", 0.5)
    assert bench.states() == [OFF, OFF, STARTING, OFF]
    now_used = bench.servers.bank.state.measured["memory_used_bytes"]
    assert now_used.tolist() == [0, 0, *used[2:].tolist()]
    bench.serving.arrange(1, [], "snapshot", 0.6)
    assert bench.states()[2] == STARTING, "an older layout that comes late says nothing"


def test_quick_changes_wait_for_an_instance_that_starts():
    bench = Bench(warm_s=1.0)
    bench.serving.arrange(1, [instance(1, 0, 1)], "snapshot", 0.0)
    bench.serving.tune("batch", [0, 3], [7.0, 7.0], 0.1)
    bench.until(2.0)
    assert bench.serving.engine(0).config.max_num_seqs == 7


def test_what_is_sent_to_an_empty_slot_comes_back():
    bench = Bench(instance(1, 0, 1))
    bench.serving.submit(2, Request(5, 0.0, 10, 10), 0.0)
    assert bench.serving.drain_returned() == [(5, 2, 0, "gone")]


def test_totals_of_a_slot_never_fall():
    bench = Bench(instance(1, 0, 2))
    bench.serving.submit(0, Request(1, 0.0, 100, 50), 0.0)
    bench.until(1.0)
    before = bench.serving.read(1.0).output_tokens_total[0]
    assert before == 50
    bench.serving.arrange(1, [instance(2, 0, 1), instance(3, 1, 1)], "snapshot", 1.0)
    assert bench.serving.read(1.0).output_tokens_total.tolist() == [50, 0, 0, 0]
    bench.until(2.0)
    bench.serving.submit(0, Request(2, 2.0, 100, 10), 2.0)
    bench.until(3.0)
    assert bench.serving.read(3.0).output_tokens_total[0] == 60


def test_lost_gpus_hold_nothing_any_more():
    bench = Bench(instance(1, 0, 2), warm_s=0.2)
    bench.serving.submit(0, Request(1, 0.0, 100, 5000), 0.0)
    bench.until(0.5)
    bench.servers.bank.lose(0)
    bench.until(0.6)
    layout = [instance(2, 0, 1), instance(3, 1, 1)]
    bench.serving.arrange(1, layout, "snapshot", 0.6)
    bench.until(2.0)
    assert bench.states() == [OFF, UP, OFF, OFF]
    assert not bench.serving.drain_returned(), "the coordinator has sent it elsewhere"
    bench.servers.bank.lose(2)
    bench.serving.arrange(2, [*layout[1:], instance(4, 2, 2)], "snapshot", 2.0)
    bench.until(4.0)
    assert bench.states() == [OFF, UP, OFF, OFF]


# The coordinator.

SPEC = """
[cluster]
elastic = true
gpus_per_node = 4
[[pool]]
name = "a"
gpus_per_node = 2
tp = 2
priority = 3
[[pool]]
name = "b"
gpus_per_node = 2
nodes = "none"
priority = 1
[[slo_class]]
name = "default"
pool = "a"
[[slo_class]]
name = "other"
pool = "b"
[[policy]]
use = "mine"
[[policy]]
use = "theirs"
"""
NODE = "row0/rack0/node000"


@pytest.fixture
def world(tmp_path):
    spec = parse_spec(SPEC)
    hub, policies = FakeHub(), [Says(), Says()]
    with Recorder(tmp_path / "run", spec=spec) as records:
        made = Coordinator(spec, hub, records, policies, LeastLoaded(), run_id="r")
        made.fake, made.says = hub, policies
        yield made


def hear(world, body, now_s, life=1):
    world.on_message(Envelope(NODE, life, 1, now_s, body), now_s)


def report(world, slots, now_s, life=1):
    zero, one = [0.0] * 4, [1.0] * 4
    gpus = GpuReadings(one, one, one, one, zero, one, one, one, zero, [0] * 4, [0] * 4, [False] * 4)
    instances = InstanceReadings([0] * 4, [0] * 4, zero, [0] * 4, [0] * 4, [0] * 4)
    tenants = TenantReadings(*([[]] * 9))
    hear(world, packed(gpus, instances, tenants, slots=slots), now_s, life)


def join(world, slots, now_s=0.0, life=1):
    hear(world, Hello(PROTOCOL_VERSION, "", [info(k) for k in range(4)], []), now_s, life)
    report(world, slots, now_s, life)


def slots(sequence, *held):
    """Serial and state by first GPU."""
    serial, state = [0] * 4, [OFF] * 4
    for first, one, what in held:
        serial[first], state[first] = one, what
    return SlotReadings(sequence, serial, state, [0.0] * 4)


def test_another_pool_is_a_change_of_name_only(world):
    join(world, slots(0, (0, 1, UP)))
    view = world.view
    assert view.instances.pool.tolist() == [0, -1, -1, -1]
    assert view.gpus.priority.tolist() == [3, 3, 1, 1]
    world.says[0].next = [SetLayout(0, (Placement(0, 2, 1, 0),))]
    world.control(1.0)
    [arrange] = world.fake.of(Arrange)
    assert [(one.serial, one.pool) for one in arrange.instances] == [(1, "b")]
    assert view.instances.up.tolist() == [True, False, False, False]
    report(world, slots(1, (0, 1, UP)), 1.1)
    assert view.instances.pool.tolist() == [1, -1, -1, -1]
    assert view.gpus.priority.tolist() == [1, 1, 1, 1]
    world.on_arrival(Request(1, 1.2, 10, 10, slo_class="other"), 1.2)
    assert len(world.fake.of(Submit)) == 1


def test_routing_stops_with_the_command_and_goes_on_where_it_is_wanted(world):
    join(world, slots(0, (0, 1, UP)))
    world.on_arrival(Request(1, 0.5, 100, 100), 0.5)
    world.says[0].next = [SetLayout(0, (Placement(0, 1, 0, 0), Placement(1, 1, 0, 0)))]
    world.control(1.0)
    assert not world.view.instances.up.any()
    world.on_arrival(Request(2, 1.0, 100, 100), 1.0)
    assert len(world.fake.of(Submit)) == 1, "held"
    hear(world, Returned([1], [0], [30], ["resharded"]), 1.01)
    report(world, slots(1, (0, 2, UP), (1, 3, UP)), 1.1)
    first, *others = world.fake.of(Submit)
    assert first.ttft_s == 2.0
    again = next(submit for submit in others if submit.request.id == 1)
    assert (again.request.prompt_tokens, again.request.output_tokens) == (130, 70)
    assert again.ttft_s == np.inf, "its first token is out"
    assert sorted(submit.instance for submit in others) == [0, 1]


def test_a_node_that_restarts_is_told_its_latest_layout(world):
    join(world, slots(0, (0, 1, UP)))
    world.says[0].next = [SetLayout(0, (Placement(2, 2, 0, 0),)), SetBatch(np.array([0]), 8)]
    world.control(1.0)
    report(world, slots(1, (2, 2, UP)), 1.1)
    world.says[0].next = [SetBatch(np.array([2]), 16)]
    world.control(2.0)
    assert world.fake.of(Tune)[-1] == Tune("batch", [2], [16])
    join(world, slots(1, (2, 2, UP)), 3.0, life=2)
    welcome = world.fake.of(Welcome)[-1]
    assert welcome.config.layout_sequence == 1
    assert [one.gpus for one in welcome.config.instances] == [[2, 3]]
    assert world.fake.of(Tune)[-1] == Tune("batch", [2], [16]), "said again to the new life"
    assert world.view.instances.up.tolist() == [False, False, True, False]
    assert world.view.instances.max_num_seqs.tolist() == [0, 0, 16, 0]


def test_between_equals_the_policy_listed_first_holds_the_node(world):
    join(world, slots(0, (0, 1, UP)))
    mine, theirs = world.says
    theirs.next = [SetLayout(0, (Placement(0, 1, 0, 0),))]
    world.control(1.0)
    mine.next = [SetLayout(0, ())]
    theirs.next = [SetLayout(0, (Placement(0, 4, 0, 0),))]
    world.control(2.0)
    assert world.fake.of(Arrange)[-1].instances == []
    mine.next = [SetLayout(0, None)]
    world.control(3.0)
    assert [one.tp for one in world.fake.of(Arrange)[-1].instances] == [4]


def test_a_server_behind_a_url_cannot_be_told(tmp_path):
    spec = parse_spec(
        'mode = "hardware"\nforward = "http://localhost:1"\n[[policy]]\nuse = "mine"\n'
        "[cluster]\ngpus_per_node = 1\n[[pool]]\ngpus_per_node = 1"
    )
    says = Says()
    with Recorder(tmp_path / "run", spec=spec) as records:
        made = Coordinator(spec, FakeHub(), records, [says], LeastLoaded(), run_id="r")
        for command, message in (
            (SetBatch(np.array([0]), 8), "SetBatch: a server behind a URL cannot be told"),
            (SetLayout(0, ()), "needs cluster.elastic = true"),
        ):
            says.next = [command]
            with pytest.raises(PolicyError, match=message):
                made.control(1.0)
            made = Coordinator(spec, FakeHub(), records, [says], LeastLoaded(), run_id="r")


def test_fixed_runs_are_laid_out_as_before():
    fixed = Layout(parse_spec(SPEC.replace("elastic = true", "").replace('"none"', '"all"')))
    assert fixed.view.instances.name == (f"{NODE}/a0", f"{NODE}/b0", f"{NODE}/b1")
