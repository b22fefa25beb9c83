"""DynamoLLM's parts: classes, provisioning, the integer program, layouts, routing, the ladder."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from testbed import profiling
from testbed.core.messages import Request
from testbed.core.spec import PolicySpec, parse_spec
from testbed.core.view import (
    LockClocks,
    OrderQueue,
    Placement,
    RecallWaiting,
    SetLayout,
    Squash,
    view_of_layouts,
)
from testbed.policies.dynamollm import DynamoLLM
from testbed.policies.dynamollm.capacity import Capacity
from testbed.policies.dynamollm.classes import (
    ALL,
    CLASSES,
    MIXES,
    Predictor,
    class_of,
    covers,
    larger,
)
from testbed.policies.dynamollm.cluster import nodes_for, spread
from testbed.policies.dynamollm.layout import fit
from testbed.policies.dynamollm.pool import Kind, _greedy, plan
from testbed.policies.load import load_controller, load_router
from testbed.policies.serving_profile import ServingProfile

CLOCKS_MHZ = np.array([1000.0, 1980.0])
LOADS = np.array([0.0, 0.5, 1.0])
NODE_RPS = dict(zip(CLASSES, [60.0, 25.0, 9.0, 24.0, 18.0, 7.0, 4.0, 6.0, 7.0], strict=True))


def made_profile() -> ServingProfile:
    """Whole nodes do `NODE_RPS`; halves and quarters less than their share; clocks cost power."""
    names = (*CLASSES, *(name for name, _ in MIXES), ALL)
    shape = (len(names), 3, 2)
    saturation = np.array([[NODE_RPS.get(n, 10.0) * part for part in (0.2, 0.45, 1.0)]
                           for n in names])  # fmt: skip
    power = np.zeros((*shape, 3))
    ratio = np.zeros((*shape, 3))
    for (_, tp, clock), load in itertools.product(np.ndindex(shape), range(3)):
        gpus = (2, 4, 8)[tp]
        power[:, tp, clock, load] = gpus * (100 + (150, 350)[clock] * LOADS[load])
        # At the low clock the limit is met up to half of what the high clock does.
        ratio[:, tp, clock, load] = (0.2, 1.0, 5.0)[load] if clock == 0 else (0.1, 0.3, 1.0)[load]
    running = np.broadcast_to(LOADS * 20.0, (*shape, 3)).copy()
    shares = np.array([1 / 9 if n in CLASSES else 1.0 for n in names])
    return ServingProfile(
        names, shares, (2, 4, 8), CLOCKS_MHZ, saturation, LOADS, power,
        ratio, ratio, running, np.full((len(names), 3), 10e3) * [0.25, 0.5, 1.0],
        np.array([2.0 if n[0] == "l" and n in CLASSES else 0.25 for n in names]),
    )  # fmt: skip


def policy(**params: object) -> DynamoLLM:
    made = DynamoLLM(**params)  # type: ignore[arg-type]
    made.learn(made_profile())
    return made


# Classes.


def test_every_request_has_one_class_and_the_cuts_are_the_papers():
    assert class_of(255, 99) == "ss"
    assert class_of(256, 100) == "mm"
    assert class_of(1024, 350) == "ll"


def test_spilling_goes_only_to_classes_at_least_as_large_in_both_lengths():
    for name in CLASSES:
        assert all(covers(other, name) and other != name for other in larger(name))
        assert len(set(larger(name))) == sum(covers(other, name) for other in CLASSES) - 1


@pytest.mark.parametrize("error_frac", [0.0, 0.2, 0.4])
def test_the_predictor_is_wrong_as_often_as_it_is_told(error_frac):
    predictor = Predictor(error_frac, seed=3)
    wrong = [predictor.class_of(10, tokens) != class_of(10, tokens)
             for tokens in (5, 200, 900) for _ in range(2000)]  # fmt: skip
    assert np.mean(wrong) == pytest.approx(error_frac, abs=0.02)


def test_two_predictors_with_one_seed_err_alike():
    first, second = (Predictor(0.4, seed=5) for _ in range(2))
    assert [first.class_of(10, 5) for _ in range(99)] == [second.class_of(10, 5) for _ in range(99)]


# Cluster manager.


def test_only_the_largest_pool_is_over_provisioned():
    load = dict.fromkeys(CLASSES, 1.4)
    nodes = nodes_for(load)
    served = spread(load, nodes)
    assert sum(nodes.values()) == 13  # ceil(9 * 1.4)
    for name, mix in served.items():
        if name != "ll":
            assert sum(mix.values()) == pytest.approx(nodes[name])
    assert sum(sum(mix.values()) for mix in served.values()) == pytest.approx(9 * 1.4)


def test_load_moves_up_and_never_down():
    load = {"ss": 0.4, "ms": 0.7, "lm": 0.3}
    nodes = nodes_for(load)
    for name, mix in spread(load, nodes).items():
        assert all(covers(name, other) for other in mix)


def test_a_pool_keeps_its_remainder_where_mixing_would_take_more_nodes():
    load = {"ss": 0.9, "ll": 0.9}
    assert nodes_for(load) == {"ll": 2}
    assert nodes_for(load, lambda pool, mix: 0.4 if len(mix) > 1 else 1.0) == {"ss": 1, "ll": 1}


def test_a_pool_that_can_do_less_with_a_mix_gets_more_nodes():
    load = {"ss": 0.3, "ls": 0.4, "ll": 0.4}
    assert nodes_for(load) == {"ll": 2}
    assert sum(nodes_for(load, lambda pool, mix: 0.5 if len(mix) > 1 else 1.0).values()) == 3


# Pool manager.

KINDS = [
    Kind(tp, load, power)
    for tp, most, idle in ((2, 0.2, 240.0), (4, 0.45, 480.0), (8, 1.0, 960.0))
    for load, power in ((0.5 * most, idle + 900 * most), (most, idle + 2200 * most))
]


def cost(kinds):
    return sum(kind.power_w for kind in kinds)


@pytest.mark.parametrize("load", [0.1, 0.3, 0.77, 1.3, 1.9])
def test_the_program_finds_what_trying_everything_finds(load):
    chosen = plan(KINDS, 16, load, use_all=False)
    assert sum(kind.tp for kind in chosen) <= 16
    assert sum(kind.load for kind in chosen) >= load - 1e-6
    best = min(
        sum(n * kind.power_w for n, kind in zip(counts, KINDS, strict=True))
        for counts in itertools.product(*(range(16 // kind.tp + 1) for kind in KINDS))
        if sum(n * kind.tp for n, kind in zip(counts, KINDS, strict=True)) <= 16
        and sum(n * kind.load for n, kind in zip(counts, KINDS, strict=True)) >= load
    )
    assert cost(chosen) <= best * 1.002


@pytest.mark.parametrize("load", [0.1, 0.77, 1.9])
def test_the_greedy_fallback_serves_the_load_within_half_again_of_the_best(load):
    counts = _greedy(KINDS, 16, load)
    chosen = [kind for n, kind in zip(counts, KINDS, strict=True) for _ in range(n)]
    assert sum(kind.tp for kind in chosen) <= 16
    assert sum(kind.load for kind in chosen) >= load - 1e-6
    assert cost(chosen) <= 1.5 * cost(plan(KINDS, 16, load, use_all=False))


def test_more_than_can_be_served_gets_all_there_is():
    chosen = plan(KINDS, 16, 5.0, use_all=False)
    assert sum(kind.load for kind in chosen) == pytest.approx(2.0)


def test_instances_that_are_there_stay_unless_others_save_what_a_change_is_worth():
    few, many = Kind(8, 1.0, 3000.0), Kind(2, 0.25, 740.0)
    kept = plan([few, many], 8, 0.9, use_all=False, held=(8,))
    assert [kind.tp for kind in kept] == [8]  # 1.3 % would be saved
    dear = Kind(8, 1.0, 3400.0)
    assert [kind.tp for kind in plan([dear, many], 8, 0.9, use_all=False, held=(8,))] == [2] * 4
    # What cannot serve the load does not stay.
    assert sum(k.load for k in plan([few, many], 16, 1.2, use_all=False, held=(8,))) >= 1.2


# Layouts.


@pytest.mark.parametrize("tps", [[8, 4, 4], [2] * 8, [4, 4, 2, 2, 2, 2], [8, 8], [4, 2, 2, 8]])
def test_instances_find_places_and_those_that_are_there_stay(tps):
    before = {0: (4, 2, 2), 1: (8,)}
    shapes = fit(tps, before, [0, 1], gpus_per_node=8)
    assert sorted(tp for shape in shapes.values() for tp in shape) == sorted(tps)
    assert all(sum(shape) <= 8 for shape in shapes.values())


def test_a_plan_that_is_in_place_changes_nothing():
    before = {0: (4, 2, 2), 1: (8,)}
    assert fit([8, 2, 2, 4], before, [0, 1], gpus_per_node=8) == before


# Capacity.


def test_limits_are_those_of_the_table_and_slack_takes_from_the_room_below_them():
    plain, careful = (Capacity(made_profile(), slack_frac) for slack_frac in (1.0, 0.5))
    assert plain.node_rps["ls"] == pytest.approx(4.0)
    # At 0.3 of the limits on half load, at 1 on full: halfway between is at 3/4.
    assert careful.node_rps["ls"] == pytest.approx(3.0, rel=0.1)


@pytest.mark.parametrize("slack_frac", [0.02, 0.3, 0.9])
def test_the_more_careful_the_less_a_node_is_taken_to_do_but_never_nothing(slack_frac):
    careful, plain = (Capacity(made_profile(), s).node_rps["ls"] for s in (slack_frac, 1.0))
    assert 0 < careful < plain


def test_the_cheapest_clock_is_the_lowest_that_meets_the_limit():
    shapes = Capacity(made_profile()).of("ls", {"ls": 1.0})
    assert shapes.clock_for(2, 0.4) == 0
    assert shapes.clock_for(2, 0.6) == 1
    assert shapes.clock_for(2, 9.0) == 1


# The whole policy on views.


POOLS = (ALL, *CLASSES)
NOTHING: tuple[Placement, ...] = ()


def first_step(**params):
    made = policy(**params)
    view = view_of_layouts([NOTHING] * 3, pools=POOLS, now_s=0.0)
    return made, view, made.step(view)


def second_step(commands, made, **columns):
    """The layouts that were asked for are up."""
    layouts = [NOTHING] * 3
    for command in commands:
        if isinstance(command, SetLayout):
            layouts[command.node] = command.layout
    view = view_of_layouts(layouts, pools=POOLS, now_s=5.0)
    for name, value in columns.items():
        getattr(view.instances, name)[:] = value
    return view, made.step(view)


def test_with_all_switches_off_whole_nodes_serve_one_pool_at_the_highest_clock():
    made, _, commands = first_step(
        pools=False, instances=False, sharding=False, frequency=False, template_rps=[18.0]
    )
    layouts = [c for c in commands if isinstance(c, SetLayout)]
    assert [[p.tp for p in c.layout] for c in layouts] == [[8], [8]]  # 18 * 1.1 / 10, rounded up
    assert not [c for c in commands if isinstance(c, LockClocks)]
    assert made.names == (ALL,)


def test_controller_and_router_are_loaded_by_name():
    assert isinstance(load_controller(PolicySpec(use="dynamollm")), DynamoLLM)
    assert isinstance(load_router(PolicySpec(use="dynamollm")), DynamoLLM)


def test_requests_are_held_until_there_is_an_instance():
    made, view, _ = first_step(template_rps=[20.0])
    assert made.route(Request(0, 0.0, 2000, 900), view) is None


def test_a_request_goes_to_its_pool_and_from_a_full_one_to_a_larger():
    made, _, commands = first_step(template_rps=[60.0], sharding=False)
    view, _ = second_step(commands, made)
    pools = {POOLS[view.instances.pool[slot]] for slot in np.flatnonzero(view.instances.up)}
    assert {"ls", "ll"} <= pools
    slot = made.route(Request(0, 5.0, 2000, 10), view)
    assert POOLS[view.instances.pool[slot]] == "ls"
    view.instances.outstanding_requests[view.instances.pool == POOLS.index("ls")] = 500
    slot = made.route(Request(1, 5.0, 2000, 10), view)
    assert covers(POOLS[view.instances.pool[slot]], "ls")
    assert POOLS[view.instances.pool[slot]] != "ls"


@pytest.mark.parametrize(("mixed_frac", "chosen"), [(1.0, "ls"), (0.3, "ll")])
def test_a_pool_not_planned_for_a_class_takes_it_as_far_as_it_can_take_a_mix(mixed_frac, chosen):
    made, _, commands = first_step(template_rps=[60.0], sharding=False, frequency=False)
    view, _ = second_step(commands, made)
    pools = made._pools
    pools["ll"].serves, pools["ls"].serves = frozenset({"ms", "ll"}), frozenset({"ls"})
    pools["ls"].mixed_frac = mixed_frac
    running = view.instances.outstanding_requests
    running[view.instances.pool == POOLS.index("ll")] = 22  # 20 are what its limits allow
    running[view.instances.pool == POOLS.index("ls")] = 8
    for pool in set(POOLS) - {"ls", "ll"}:
        view.instances.up[view.instances.pool == POOLS.index(pool)] = False
    slot = made.route(Request(0, 5.0, 500, 10), view)
    assert POOLS[view.instances.pool[slot]] == chosen


def test_a_mix_can_do_at_most_what_one_class_can():
    capacity = Capacity(made_profile())
    for name in (*CLASSES, ALL):
        assert 0 < capacity.mixed_frac(name, {name: 1.0}) <= 1.0


def test_idle_instances_run_at_the_lowest_clock_and_busy_ones_at_the_highest():
    made, _, commands = first_step(template_rps=[60.0], sharding=False)
    view, said = second_step(commands, made)
    locks = [c for c in said if isinstance(c, LockClocks)]
    assert {float(mhz) for c in locks for mhz in c.sm_clock_mhz} == {1000.0}
    view.instances.outstanding_requests[:] = 18
    view.now_s += 5.0
    locks = [c for c in made.step(view) if isinstance(c, LockClocks)]
    assert {float(mhz) for c in locks for mhz in c.sm_clock_mhz} == {0.0}


def test_in_a_pool_one_node_at_a_time_is_cut_up_and_nothing_is_taken_away_meanwhile():
    made, _, _ = first_step(template_rps=[60.0])
    view = view_of_layouts([NOTHING] * 3, pools=POOLS)
    made._said = {0: ("ll", (8,)), 1: ("ll", (8,)), 2: ("ll", (8,))}
    made._want = {0: ("ll", (4, 4)), 1: ("ll", (4, 2)), 2: ("", ())}
    asked = [[c.node for c in made._layouts(view)] for _ in range(3)]
    assert asked == [[0], [1], [2]]


@pytest.mark.parametrize(
    "bad",
    [
        {"predictor_error": 1.5},
        {"start": "warm"},
        {"period_s": 900.0},
        {"rungs": 5},
        {"ladder_period_s": 0.0},
        {"slack_frac": 0.0},
        {"surge_rps": -1.0},
    ],
)
def test_parameters_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=str(next(iter(bad)))):
        DynamoLLM(**bad)


def in_trouble(**params):
    """A policy whose first instance has more prompts due than it can prefill in time."""
    made, _, commands = first_step(template_rps=[60.0], sharding=False, **params)
    view, _ = second_step(commands, made)
    slot = int(np.flatnonzero(view.instances.up)[0])
    view.instances.prefill_due_tokens[slot] = 30_000.0  # 3 s at 10,000 a second
    return made, view, slot


def said_next(made, view):
    """What it says a second later."""
    view.now_s += 1.0
    return [c for c in made.step(view) if not isinstance(c, SetLayout)]


def test_the_ladder_climbs_a_rung_a_second_from_its_second_and_comes_down_at_once():
    made, view, slot = in_trouble()
    looks = [said_next(made, view) for _ in range(3)]
    kinds = [[type(c) for c in said] for said in looks]
    assert kinds == [[OrderQueue, LockClocks], [RecallWaiting], [Squash, RecallWaiting]]
    order, clock = looks[0]
    assert order.by == "deadline"
    assert set(clock.sm_clock_mhz) == {0.0}
    assert all(c.instances.tolist() == [slot] for c in (order, *looks[1], *looks[2]))
    view.instances.prefill_due_tokens[slot] = 100.0
    down = [c for c in said_next(made, view) if isinstance(c, OrderQueue)]
    assert [c.by for c in down] == ["arrival"]


@pytest.mark.parametrize("rungs", [0, 1, 2, 3])
def test_no_more_rungs_are_climbed_than_allowed(rungs):
    made, view, _ = in_trouble(rungs=rungs)
    said = [type(c) for _ in range(8) for c in said_next(made, view)]
    allowed = [OrderQueue, LockClocks, RecallWaiting][:rungs]
    # Clocks are the instance manager's as well.
    assert set(said) - {LockClocks} == set(allowed) - {LockClocks}


def test_more_is_late_at_a_lower_clock():
    made, view, slot = in_trouble()
    view.instances.prefill_due_tokens[slot] = made._due_most_tokens[slot] + 1.0
    assert view.instances.prefill_due_tokens[slot] < made._due_top_tokens[slot]
    assert [type(c) for c in said_next(made, view)] == [OrderQueue, LockClocks]
    # It can be met now.
    assert [c.by for c in said_next(made, view) if isinstance(c, OrderQueue)] == ["arrival"]


def test_a_request_avoids_an_instance_where_too_many_prompts_are_due():
    made, view, _ = in_trouble()
    request = Request(0, 5.0, 2000, 10, slo_class="ls")
    view.instances.prefill_due_tokens[:] = 0.0
    usual = made.route(request, view)
    view.instances.prefill_due_tokens[usual] = 30_000.0
    assert made.route(request, view) != usual


def test_a_request_that_comes_back_is_no_new_arrival():
    made, view, _ = in_trouble()
    request = Request(7, 5.0, 2000, 10, slo_class="ls")
    for _ in range(3):
        made.route(request, view)
    assert sum(made._arrived) == 1.0


def test_clocks_are_kept_high_enough_for_surges_that_the_past_has_seen():
    chosen = []
    for surge_rps in (0.0, 60.0):
        made, _, commands = first_step(template_rps=[60.0], sharding=False, surge_rps=surge_rps)
        _, said = second_step(commands, made)
        locks = [c for c in said if isinstance(c, LockClocks)]
        chosen.append({float(mhz) for c in locks for mhz in c.sm_clock_mhz})
    assert chosen == [{1000.0}, set()]  # the highest is no lock


def test_a_profile_is_another_when_its_trace_is(tmp_path):
    trace = tmp_path / "trace.csv"
    text = f'[workload]\nsource = "azure_llm"\ntrace = "{trace}"\n'
    digests = []
    for row in ("2023-11-16 18:17:03,100,20", "2023-11-16 18:17:03,100,30"):
        trace.write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{row}\n")
        digests.append(profiling._digest(parse_spec(text), DynamoLLM.sweep))
    assert digests[0] != digests[1]
