"""Schedulers: order, ties, and lateness that is counted."""

from __future__ import annotations

import math
import time

import pytest

from testbed.core.clock import (
    CONTROL,
    DELIVERY,
    HOUSEKEEPING,
    PHYSICS,
    SAMPLE,
    SERVING,
    LiveScheduler,
    VirtualScheduler,
)


@pytest.fixture(params=["virtual", "live"])
def loop(request):
    if request.param == "virtual":
        return VirtualScheduler()
    return LiveScheduler(lambda timeout_s: time.sleep(max(0.0, timeout_s)))


def test_order_is_time_then_rank_then_key_then_entry(loop):
    seen = []
    for name, t_s, order, key in (
        ("control", 0.02, CONTROL, ""),
        ("b", 0.02, DELIVERY, "b"),
        ("first", 0.01, HOUSEKEEPING, ""),
        ("a", 0.02, DELIVERY, "a"),
        ("physics", 0.02, PHYSICS, ""),
        ("sample", 0.02, SAMPLE, ""),
        ("a again", 0.02, DELIVERY, "a"),
        ("serving", 0.02, SERVING, ""),
    ):
        loop.call_at(t_s, order, lambda now_s, name=name: seen.append((name, now_s)), key)
    loop.run(until_s=0.03)
    assert [name for name, _ in seen] == [
        "first", "physics", "serving", "a", "a again", "b", "sample", "control",
    ]  # fmt: skip
    assert all(now_s == 0.02 for name, now_s in seen if name != "first")


def test_callbacks_may_enter_more_and_stop(loop):
    seen = []

    def tick(now_s):
        seen.append(now_s)
        if len(seen) == 3:
            loop.stop()
        loop.call_at(now_s + 0.005, CONTROL, tick)

    loop.call_at(0.0, CONTROL, tick)
    loop.run(until_s=1.0)
    assert seen == pytest.approx([0.0, 0.005, 0.01])


def test_what_is_past_runs_now(loop):
    seen = []
    loop.call_at(0.01, CONTROL, lambda now_s: loop.call_at(0.0, CONTROL, seen.append))
    loop.run(until_s=0.02)
    assert seen == [0.01]


def test_not_a_number_is_refused(loop):
    with pytest.raises(ValueError, match="not a number"):
        loop.call_at(math.nan, CONTROL, print)


def test_what_is_due_later_stays_for_the_next_run(loop):
    seen = []
    loop.call_at(0.05, CONTROL, seen.append)
    loop.run(until_s=0.02)
    assert seen == []
    loop.run(until_s=0.06)
    assert seen == [0.05]


def test_live_never_runs_early_and_counts_lateness():
    loop = LiveScheduler(lambda timeout_s: time.sleep(max(0.0, timeout_s)), miss_s=0.01)
    early = []
    for k in range(30):
        due_s = k * 0.003
        loop.call_at(due_s, CONTROL, lambda now_s, d=due_s: early.append(loop.wall_s() - d))
    loop.call_at(0.1, CONTROL, lambda now_s: time.sleep(0.05))
    loop.call_at(0.11, CONTROL, lambda now_s: None)
    loop.run(until_s=0.2)
    assert min(early) >= 0
    assert loop.lateness.events_total == 32
    assert loop.lateness.missed_total >= 1
    assert loop.lateness.max_s >= 0.03


def test_live_goes_on_reading_when_behind():
    polls = []
    loop = LiveScheduler(lambda timeout_s: polls.append(timeout_s))

    def busy(now_s):
        time.sleep(0.004)

    for k in range(20):
        loop.call_at(k * 0.0001, CONTROL, busy)
    loop.run(until_s=0.01)
    assert len(polls) >= 10
