"""Engines on one heap do what each does alone, and a tick asks only those that are awake."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emulators.farm import Farm
from emulators.gpu import GpuBank
from emulators.profiles import load_gpu
from emulators.server import ServerBank
from emulators.state import GpuState
from testbed.core.messages import EngineConfig, InstanceConfig, Request
from tests.emulators.test_engine import make

submissions = st.lists(
    st.tuples(st.integers(0, 3), st.floats(0, 3), st.integers(1, 300), st.integers(1, 60)),
    min_size=1,
    max_size=30,
)


@settings(max_examples=60, deadline=None)
@given(submissions)
def test_a_farm_equals_its_engines_alone(trace):
    requests = [
        (index, Request(number, t_s, prompt, output))
        for number, (index, t_s, prompt, output) in enumerate(sorted(trace, key=lambda e: e[1]))
    ]
    farm = Farm([make(True) for _ in range(4)], set())
    happened = []
    for index, request in requests:
        while farm.next_s <= request.arrival_s:
            t_s = farm.next_s
            which, events = farm.step()
            happened += [(event.t_s, which, event) for event in events]
            assert all(event.t_s == t_s for event in events), "nothing is told late"
        events = farm.submit(index, request, request.arrival_s)
        happened += [(event.t_s, index, event) for event in events]
    while farm.next_s < math.inf:
        which, events = farm.step()
        happened += [(event.t_s, which, event) for event in events]
    assert [entry[0] for entry in happened] == sorted(entry[0] for entry in happened)
    for index in range(4):
        engine = make(True)
        for which, request in requests:
            if which == index:
                engine.submit(request, request.arrival_s)
        engine.advance_to(1e6)
        assert engine.events == [event for _, which, event in happened if which == index]


def servers(count: int, tp: int = 1) -> ServerBank:
    bank = ServerBank(GpuBank(load_gpu("h100-sxm"), GpuState.create(count)), num_nodes=1)
    bank.serving[0].configure(
        [
            InstanceConfig(
                name=str(k), pool="p", model="llama-3.1-8b", tp=tp,
                gpus=list(range(k * tp, k * tp + tp)), engine=EngineConfig(),
            )
            for k in range(count // tp)
        ],
        0.0,
    )  # fmt: skip
    return bank


def test_idle_engines_are_not_asked(monkeypatch):
    bank = servers(64)
    bank.tick(1.0)  # nobody is known to be idle before the first look
    bank.submit(5, Request(0, 1.5, 500, 400), 1.5, math.inf)
    asked = []
    for t_s in range(2, 30):
        bank.tick(float(t_s))
        asked.append(list(bank._asked))
    assert asked[0] == [5]
    assert asked[-1] == [], "asleep again once it has nothing to do"
    assert all(each in ([5], []) for each in asked)


@pytest.mark.parametrize("tp", [1, 4])
def test_a_tick_sees_the_same_with_and_without_a_farm(tp):
    """Nodes that drive their own engines, and a farm that drives all: the same watts and clocks."""
    driven, by_node = servers(8, tp), servers(8, tp)
    driven.farm()
    rng = np.random.default_rng(3)
    t_s = 0.0
    for number in range(60):
        t_s += float(rng.exponential(0.05))
        request = Request(number, t_s, int(rng.integers(50, 3000)), int(rng.integers(5, 200)))
        where = int(rng.integers(0, 8 // tp))
        for event_s in (driven.farm().next_s,):
            if event_s <= t_s:
                driven.farm().advance_to(t_s)
        by_node.serving[0].advance_to(t_s)
        driven.submit(where, request, t_s, math.inf)
        by_node.serving[0].submit(where, request, t_s)
        if number % 3 == 0:
            for bank in (driven, by_node):
                if number == 30:
                    bank.bank.state.control["power_limit_mw"][:4] = 250_000
                bank.tick(t_s + 1e-3)
            t_s += 1e-3
    driven.farm().advance_to(100.0)
    by_node.serving[0].advance_to(100.0)
    for bank in (driven, by_node):
        bank.tick(100.0)
    np.testing.assert_array_equal(driven.bank.energy_j, by_node.bank.energy_j)
    np.testing.assert_array_equal(driven.bank.clock_frac, by_node.bank.clock_frac)
    ours, theirs = driven.read_instances(100.0), by_node.serving[0].read(100.0)
    assert ours["output_tokens_total"].tolist() == list(theirs.output_tokens_total)
    assert sum(theirs.output_tokens_total) > 1000


def test_energy_of_a_run_is_that_of_the_work(monkeypatch):
    """All FLOPs that engines did reach their GPUs' ticks, whoever sleeps in between."""
    bank = servers(4)
    seen = np.zeros(4)
    advance = bank.bank.advance

    def counting(dt_s, busy_frac, tensor_frac, hbm_frac):
        seen[:] += tensor_frac * dt_s * bank.bank.profile.peak_flops
        advance(dt_s, busy_frac, tensor_frac, hbm_frac)

    monkeypatch.setattr(bank.bank, "advance", counting)
    for number in range(40):
        t_s = 0.7 * number
        bank.farm().advance_to(t_s)
        bank.submit(number % 3, Request(number, t_s, 800, 50), t_s, math.inf)
        bank.tick(t_s + 0.3)
    bank.farm().advance_to(60.0)
    bank.tick(60.0)
    done = [engine.activity(60.0).flops for engine in bank.farm().engines]
    np.testing.assert_allclose(seen, done, rtol=1e-9)
    assert done[3] == 0
