"""Clocks: what runs when, in which order, and how late.

`LiveScheduler` is tried on a made-up machine whose time passes only as the loop waits, polls or
looks at the clock, so that nothing here depends on how busy the real machine is; one test at the
end runs on the real one.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.core import clock
from testbed.core.clock import (
    CONTROL,
    DELIVERY,
    HOUSEKEEPING,
    PHYSICS,
    SAMPLE,
    SERVING,
    ClockSync,
    Lateness,
    LiveScheduler,
    VirtualScheduler,
)

# Virtual time.


@given(
    st.lists(
        st.tuples(
            st.sampled_from([0.0, 0.5, 1.0, 1.5]),
            st.integers(PHYSICS, HOUSEKEEPING),
            st.sampled_from(["", "a", "b"]),
        )
    )
)
def test_order_is_time_then_rank_then_key_then_entry(calls):
    loop, ran = VirtualScheduler(), []
    for entry, (t_s, order, key) in enumerate(calls):
        loop.call_at(t_s, order, lambda now_s, what=(t_s, order, key, entry): ran.append(what), key)
    loop.run(until_s=2.0)
    assert ran == sorted((*call, entry) for entry, call in enumerate(calls))


def test_ranks_let_physics_act_before_samples_and_messages_before_decisions():
    assert PHYSICS < SERVING < DELIVERY < SAMPLE < CONTROL < HOUSEKEEPING


def test_a_callback_is_told_when_it_was_due_and_the_clock_shows_it():
    loop, seen = VirtualScheduler(), []
    loop.call_at(3.25, CONTROL, lambda now_s: seen.append((now_s, loop.now_s)))
    loop.run(until_s=math.inf)
    assert seen == [(3.25, 3.25)]


def test_a_run_includes_its_last_instant_and_leaves_the_clock_there():
    loop, seen = VirtualScheduler(), []
    for t_s in (1.0, 2.0, 2.000001):
        loop.call_at(t_s, CONTROL, seen.append)
    loop.run(until_s=2.0)
    assert (seen, loop.now_s) == ([1.0, 2.0], 2.0)
    loop.run(until_s=3.0)
    assert (seen, loop.now_s) == ([1.0, 2.0, 2.000001], 3.0)
    loop.run(until_s=1.0)
    assert loop.now_s == 3.0, "time does not go back"


def test_what_was_due_in_the_past_runs_now():
    loop, seen = VirtualScheduler(), []

    def act(now_s: float) -> None:
        loop.call_at(now_s - 5.0, PHYSICS, seen.append)
        loop.call_at(now_s, CONTROL, seen.append)

    loop.call_at(10.0, CONTROL, act)
    loop.run(until_s=20.0)
    assert seen == [10.0, 10.0]


def test_a_callback_may_add_to_its_own_instant():
    loop, seen = VirtualScheduler(), []

    def again(now_s: float) -> None:
        seen.append(now_s)
        if len(seen) < 5:
            loop.call_at(now_s, CONTROL, again)

    loop.call_at(1.0, CONTROL, again)
    loop.run(until_s=1.0)
    assert seen == [1.0] * 5


def test_a_time_that_is_not_a_number_is_refused_and_changes_nothing():
    loop, seen = VirtualScheduler(), []
    with pytest.raises(ValueError, match="not a number"):
        loop.call_at(math.nan, CONTROL, seen.append)
    loop.run(until_s=1.0)
    assert seen == []


def test_stop_leaves_the_clock_and_what_is_pending_where_they_are():
    loop, seen = VirtualScheduler(), []
    loop.call_at(1.0, CONTROL, lambda now_s: loop.stop())
    loop.call_at(1.0, HOUSEKEEPING, seen.append)
    loop.run(until_s=10.0)
    assert (seen, loop.now_s) == ([], 1.0)
    loop.run(until_s=10.0)
    assert (seen, loop.now_s) == ([1.0], 10.0)


def test_a_callback_that_fails_is_not_swallowed():
    loop = VirtualScheduler()
    loop.call_at(1.0, CONTROL, lambda now_s: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loop.run(until_s=2.0)
    assert loop.now_s == 1.0


# Real time, on a made-up machine.


class Machine:
    """A clock that a loop drives by waiting: stands in for the `time` module."""

    def __init__(self) -> None:
        self.ns = 1_000_000_000_000
        self.begun_ns = self.ns
        self.polls: list[float] = []
        self.sleeps: list[float] = []
        self.oversleep_s = 0.0
        self.on_poll: Callable[[], None] = lambda: None

    @property
    def now_s(self) -> float:
        return (self.ns - self.begun_ns) * 1e-9

    def pass_s(self, wait_s: float) -> None:
        self.ns += round(wait_s * 1e9)

    def monotonic_ns(self) -> int:
        self.ns += 1_000  # looking takes a microsecond, so a loop that spins gets on
        return self.ns

    def sleep(self, wait_s: float) -> None:
        self.sleeps.append(wait_s)
        self.pass_s(wait_s + self.oversleep_s)

    def poll(self, timeout_s: float) -> None:
        assert timeout_s >= 0.0
        self.polls.append(timeout_s)
        self.pass_s(timeout_s)
        self.on_poll()


@pytest.fixture
def machine(monkeypatch) -> Machine:
    made = Machine()
    monkeypatch.setattr(clock, "time", made)
    return made


@pytest.fixture
def loop(machine) -> LiveScheduler:
    return LiveScheduler(machine.poll)


def test_nothing_runs_before_it_is_due(machine, loop):
    shown = []
    for t_s in (0.0005, 0.01, 0.4, 1.0):
        loop.call_at(t_s, CONTROL, lambda now_s: shown.append((now_s, machine.now_s)))
    loop.run(until_s=2.0)
    assert [due_s for due_s, _ in shown] == [0.0005, 0.01, 0.4, 1.0]
    assert all(due_s <= shown_s < due_s + 0.001 for due_s, shown_s in shown)
    assert loop.now_s == 2.0
    assert 2.0 <= machine.now_s < 2.01


def test_waiting_is_done_in_the_poll_but_for_the_last_moment(machine, loop):
    loop.call_at(0.5, CONTROL, lambda now_s: None)
    loop.run(until_s=0.5)
    assert sum(machine.polls) > 0.49
    assert max(machine.polls) <= 0.05, "a stop or a signal is noticed soon"
    assert sum(machine.sleeps) < 0.002


def test_both_loops_run_the_same_things_in_the_same_order(loop):
    chance = random.Random(4)
    calls = [(chance.choice((0.1, 0.2, 0.3)), chance.randrange(6), str(n)) for n in range(100)]
    seen: dict[object, list[tuple[str, float]]] = {}
    for each in (loop, VirtualScheduler()):
        seen[each] = []
        for t_s, order, name in calls:
            each.call_at(
                t_s, order, lambda now_s, name=name, each=each: seen[each].append((name, now_s))
            )
        each.run(until_s=1.0)
    live, virtual = seen.values()
    assert live == virtual
    assert len(live) == 100


def test_idle_time_is_used_for_physics_that_is_due_soon(machine, loop):
    lane, told, shown = loop.lane(early_s=0.003), [], []

    def act(what: str) -> Callable[[float], None]:
        def run(now_s: float) -> None:
            told.append((what, now_s))
            shown.append(machine.now_s)

        return run

    lane.call_at(1.0, PHYSICS, act("physics"))
    lane.call_at(1.0, SAMPLE, act("sample"))
    lane.call_at(1.0, DELIVERY, act("message"))
    lane.call_at(0.998, SERVING, act("before"))
    loop.call_at(0.9975, CONTROL, act("other lane"))
    loop.run(until_s=1.5)
    assert told == [
        ("other lane", 0.9975), ("before", 0.998), ("physics", 1.0), ("message", 1.0),
        ("sample", 1.0),
    ]  # fmt: skip
    assert shown[1] < shown[2] < 1.0, "early, but after what came before it in its lane"
    assert shown[3] >= 1.0, "a message acts when it is due, and the sample after it"


def test_what_is_due_in_one_lane_goes_before_what_may_be_early_in_another(machine, loop):
    told = []
    for name in "ab":
        lane = loop.lane(early_s=0.005)
        lane.call_at(
            1.0, PHYSICS, lambda now_s, name=name: (machine.pass_s(0.002), told.append(name))
        )
    loop.call_at(0.996, SERVING, lambda now_s: told.append("due"))
    loop.run(until_s=1.1)
    assert told == ["a", "due", "b"]
    assert loop.late_by_order[PHYSICS].max_s == 0.0, "early is not late"


def test_a_restart_moves_every_lane(loop):
    lane = loop.lane()
    loop.restart(loop.start_ns - 7_000_000_000)
    assert loop.now_s == lane.now_s >= 7.0
    seen = []
    lane.call_at(1.0, CONTROL, seen.append)
    loop.run(until_s=8.0)
    assert seen == [pytest.approx(7.0, abs=0.1)]


def test_lateness_is_kept_and_what_was_missed_is_counted(machine):
    loop = LiveScheduler(machine.poll, miss_s=0.05)
    loop.call_at(0.1, CONTROL, lambda now_s: machine.pass_s(0.2))  # a slow one
    for t_s in (0.15, 0.2, 0.29, 0.6):
        loop.call_at(t_s, CONTROL, lambda now_s: None)
    loop.run(until_s=1.0)
    late = loop.lateness
    assert late.events_total == 5
    assert late.missed_total == 2
    assert late.max_s == pytest.approx(0.15, abs=0.001)
    assert late.percentile_s(0.2) < 0.001


def test_housekeeping_may_be_late(machine, loop):
    loop.call_at(0.1, CONTROL, lambda now_s: machine.pass_s(1.0))
    loop.call_at(0.2, HOUSEKEEPING, lambda now_s: None)
    loop.run(until_s=2.0)
    assert loop.lateness.events_total == 1


def test_a_loop_that_is_behind_still_hears(machine, loop):
    """All is overdue and each callback is slow: sockets are read in between, without waiting."""
    heard = []
    machine.on_poll = lambda: heard.append(machine.now_s)

    def slow(now_s: float) -> None:
        machine.pass_s(0.01)

    machine.pass_s(1.0)
    for number in range(20):
        loop.call_at(number * 0.001, CONTROL, slow)
    loop.run(until_s=1.1)
    assert len(heard) >= 20
    assert set(machine.polls[:20]) == {0.0}


def test_what_a_poll_brings_runs_in_its_turn(machine, loop):
    seen = []

    def arrive() -> None:
        machine.on_poll = lambda: None
        loop.call_at(0.3, DELIVERY, lambda now_s: seen.append(("message", now_s)))
        loop.call_at(-1.0, DELIVERY, lambda now_s: seen.append(("late message", now_s)))

    machine.on_poll = arrive
    loop.call_at(0.3, CONTROL, lambda now_s: seen.append(("decision", now_s)))
    loop.run(until_s=0.5)
    assert seen == [("late message", 0.0), ("message", 0.3), ("decision", 0.3)]


def test_stop_from_a_poll_or_a_callback_ends_the_run(machine, loop):
    machine.on_poll = loop.stop
    loop.call_at(5.0, CONTROL, lambda now_s: None)
    loop.run(until_s=math.inf)
    assert machine.now_s < 0.1
    machine.on_poll = lambda: None
    loop.call_at(0.2, CONTROL, lambda now_s: loop.stop())
    loop.run(until_s=math.inf)
    assert 0.2 <= machine.now_s < 0.21
    assert loop.now_s == 0.2


def test_restart_moves_zero_and_pending_times_with_it(machine, loop):
    seen = []
    machine.pass_s(10.0)
    loop.call_at(0.5, CONTROL, lambda now_s: seen.append((now_s, machine.now_s)))
    loop.restart(machine.ns + 2_000_000_000)  # a run that begins in two seconds
    assert loop.now_s == 0.0
    assert loop.wall_s() == pytest.approx(-2.0, abs=0.001)
    loop.run(until_s=1.0)
    [(due_s, shown_s)] = seen
    assert due_s == 0.5
    assert shown_s == pytest.approx(12.5, abs=0.001)
    assert loop.lateness.max_s < 0.001


def test_restart_into_a_run_that_has_begun_joins_it_where_it_is(machine, loop):
    loop.restart(machine.ns - 30_000_000_000)
    assert loop.now_s == pytest.approx(30.0, abs=0.001)


def test_a_run_until_the_past_only_does_what_is_due(machine, loop):
    seen = []
    machine.pass_s(3.0)
    loop.call_at(1.0, CONTROL, seen.append)
    loop.call_at(2.5, CONTROL, seen.append)
    loop.run(until_s=2.0)
    assert seen == [1.0]


def test_the_real_clock_waits():
    loop = LiveScheduler(time.sleep)
    shown = []
    for t_s in (0.01, 0.03, 0.03):
        loop.call_at(t_s, CONTROL, lambda now_s: shown.append((now_s, loop.wall_s())))
    loop.run(until_s=0.05)
    assert [due_s for due_s, _ in shown] == [0.01, 0.03, 0.03]
    assert all(due_s <= shown_s for due_s, shown_s in shown)
    assert loop.lateness.events_total == 3


# Accounts.


@given(
    st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=200),
    st.sampled_from((0.25, 0.5, 0.75, 1.0)),
)
def test_percentiles_of_lateness_are_within_a_bin(lates_s, frac):
    late = Lateness(miss_s=0.1)
    for late_s in lates_s:
        late.add(late_s)
    exact_s = sorted(lates_s)[math.ceil(frac * len(lates_s)) - 1]
    assert exact_s / 1.0001 <= late.percentile_s(frac) <= exact_s * 1.1001
    assert late.missed_total == sum(late_s > 0.1 for late_s in lates_s)
    assert late.max_s == max(lates_s)


def test_lateness_without_events_is_zero_and_nothing_is_too_late_to_count():
    late = Lateness(miss_s=0.1)
    assert late.percentile_s(0.99) == 0.0
    late.add(-1e-9)
    late.add(1e9)
    assert late.events_total == 2
    assert late.percentile_s(1.0) <= 1e9


@given(
    offset_ns=st.integers(-(10**15), 10**15),
    trips=st.lists(st.tuples(st.integers(0, 10**7), st.integers(0, 10**7)), min_size=1),
)
def test_the_true_offset_is_within_the_error_that_clock_sync_states(offset_ns, trips):
    sync = ClockSync()
    assert sync.error_s == math.inf
    sent_ns = 0
    for there_ns, back_ns in trips:
        sync.add(sent_ns, sent_ns + there_ns + offset_ns, sent_ns + there_ns + back_ns)
        sent_ns += 10**8
    assert abs(sync.offset_ns - offset_ns) <= sync.error_s * 1e9 + 1
    assert sync.error_s * 1e9 == pytest.approx(min(map(sum, trips)) / 2)
    assert sync.answers == len(trips)


def test_a_loop_that_is_behind_polls_and_still_does_what_is_due():
    """Even when each poll takes longer than the time between two polls."""
    done, polls = [], []

    def slow_poll(timeout_s: float) -> None:
        polls.append(timeout_s)
        time.sleep(0.004)
        # What arrives is due already, as from a sender that is behind too.
        loop.call_at(loop.wall_s() - 0.01, DELIVERY, done.append)

    loop = LiveScheduler(slow_poll)
    loop.call_at(0.0, CONTROL, lambda t_s: loop.call_at(0.05, CONTROL, lambda t_s: loop.stop()))
    loop.run(until_s=20.0)
    assert loop.wall_s() < 10.0, "stopped by what was due, not by the end"
    assert done
    assert polls
