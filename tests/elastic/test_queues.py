"""Queue and batch knobs of the engine: equal with and without collapsing, and nothing is lost."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.core.messages import Request
from tests.emulators.test_engine import make

requests = st.lists(
    st.tuples(
        st.floats(0, 2), st.integers(1, 200), st.integers(1, 80), st.sampled_from([0.1, 5.0])
    ),
    min_size=1,
    max_size=25,
)
knobs = st.lists(
    st.tuples(
        st.floats(0, 4),
        st.sampled_from(["batch", "order", "recall", "squash"]),
        st.integers(1, 10),
    ),
    max_size=8,
)


def play(engine, arrivals, changes):
    """What was withdrawn, in order."""
    taken = []
    happenings = [(r.arrival_s, 0, (r, ttft_s)) for r, ttft_s in arrivals]
    happenings += [(t_s, 1, (kind, value)) for t_s, kind, value in changes]
    for t_s, which, (what, value) in sorted(happenings, key=lambda entry: entry[:2]):
        if which == 0:
            engine.submit(what, t_s, value)
        elif what == "batch":
            engine.set_batch(value, t_s)
        elif what == "order":
            engine.order(value % 2 == 1, t_s)
        elif what == "recall":
            taken += engine.withdraw(t_s)
        else:
            taken += engine.withdraw(t_s, late_frac=value / 5)
    while engine.next_event_s < math.inf:
        engine.advance_to(engine.next_event_s)
    return taken


@settings(max_examples=100, deadline=None)
@given(trace=requests, changes=knobs, kv_blocks=st.integers(20, 80))
def test_knobs_act_alike_on_collapsed_and_stepped_engines(trace, changes, kv_blocks):
    arrivals = [
        (Request(i, t, prompt, output), ttft_s)
        for i, (t, prompt, output, ttft_s) in enumerate(sorted(trace))
    ]
    engines = [make(collapse, kv_blocks=kv_blocks) for collapse in (True, False)]
    taken = [play(engine, arrivals, changes) for engine in engines]
    assert taken[0] == taken[1]
    fast, slow = ([(e.request_id, e.kind) for e in engine.events] for engine in engines)
    assert fast == slow
    for engine in engines:
        ended = [e.request_id for e in engine.events if e.kind in ("finished", "rejected")]
        assert sorted(ended + [request for request, _ in taken[0]]) == list(range(len(arrivals)))
        assert engine.num_running == engine.num_waiting == engine.kv_used_blocks(engine.now_s) == 0


@settings(max_examples=60, deadline=None)
@given(trace=requests, at_s=st.floats(0.0, 3.0))
def test_progress_is_what_clients_have_seen(trace, at_s):
    """First tokens, finished requests and progress add up to the tokens given out."""
    engine = make(True)
    whole = {}
    for i, (t_s, prompt, output, _) in enumerate(sorted(trace)):
        if t_s < at_s:
            engine.submit(Request(i, t_s, prompt, output), t_s)
            whole[i] = output
    engine.advance_to(at_s)
    left = dict(engine.progress(at_s))
    for event in engine.events:
        if event.kind == "first_token":
            assert left.get(event.request_id, 1) >= 1
    done = [e.request_id for e in engine.events if e.kind == "finished"]
    assert sum(left.values()) + sum(whole[i] for i in done) == engine.output_tokens_total(at_s)
    before = engine.output_tokens_total(at_s)
    gaps = sum(engine.itl.counts.values())
    engine.evict(at_s)
    assert engine.output_tokens_total(at_s) == before
    firsts = sum(e.kind == "first_token" for e in engine.events)
    assert sum(engine.itl.counts.values()) >= gaps
    assert sum(engine.itl.counts.values()) == before - firsts, "a gap for each token but the first"


def test_the_queue_is_served_by_deadline():
    engine = make(True, max_num_seqs=1)
    for i, ttft_s in enumerate([9.0, 9.0, 1.0, 5.0]):
        engine.submit(Request(i, 0.0, 10, 5), 0.0, ttft_s)
    engine.order(True, 0.0)
    engine.submit(Request(4, 0.01, 10, 5), 0.01, 2.0)
    engine.advance_to(10.0)
    ended = [e.request_id for e in engine.events if e.kind == "finished"]
    assert ended == [0, 2, 4, 3, 1], "the first runs already"


def test_batch_limits_have_a_range():
    engine = make(True)
    with pytest.raises(ValueError, match=r"max_num_seqs = 64 must be in \[1, 64\)"):
        engine.set_batch(64, 0.0)
    with pytest.raises(ValueError, match="max_num_seqs = 0"):
        engine.set_batch(0, 0.0)
