"""The engine: collapsed blocks equal stepping, nothing is lost, KV blocks are conserved."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emulators.engine import Activity, Engine, Event, ItlHistogram
from testbed.core.messages import EngineConfig, Request


class PlainCost:
    """Round numbers: easy to compute by hand, with every term of the real one."""

    flops_per_context_token = 3.0
    bytes_per_context_token = 5.0
    flops_per_pair = 2.0
    bytes_per_pair = 0.5

    def __init__(self):
        self.decode_tables = {}

    def base_s(self, num_seqs, prefill_tokens, num_prefill_seqs, encode_tiles, clock_frac):
        compute_s = (1e-5 * num_seqs + 2e-5 * prefill_tokens) / clock_frac
        launch_s = 1e-4 * num_prefill_seqs
        return 1e-3 + max(4e-3, compute_s) + launch_s + self.encode_s(encode_tiles, clock_frac)

    def encode_s(self, encode_tiles, clock_frac):
        return 3e-3 * encode_tiles / clock_frac

    def per_context_token_s(self, clock_frac):
        return 2e-8

    def per_context_token_mixed_s(self, clock_frac):
        return 3e-8

    def per_pair_s(self, clock_frac):
        return 1e-9 / clock_frac

    def base_flops(self, num_seqs, prefill_tokens, num_prefill_seqs, encode_tiles):
        return 10.0 * (num_seqs + prefill_tokens) + 1000.0 * encode_tiles

    def base_bytes(self, num_seqs, prefill_tokens, num_prefill_seqs, encode_tiles):
        return 5000.0 + num_seqs + 2 * prefill_tokens + 10 * encode_tiles


def make(collapse: bool, **config) -> Engine:
    kv_blocks = config.pop("kv_blocks", 200)
    return Engine(
        PlainCost(),
        EngineConfig(
            **{"max_num_seqs": 8, "max_batched_tokens": 64, "collapse": collapse, **config}
        ),
        kv_blocks=kv_blocks,
        tokens_per_tile=10,
        preprocess_s=0.02,
        keep_segments=True,
    )


def drive(engine: Engine, requests: list[Request], clocks: list[tuple[float, float]]):
    """Play requests and clock changes in time order; what can be read is read at each of them."""
    readings: list[tuple[Activity, int, int]] = []
    happenings = [(r.arrival_s, 0, r) for r in requests] + [(t, 1, x) for t, x in clocks]
    for t_s, kind, what in sorted(happenings, key=lambda entry: entry[:2]):
        engine.advance_to(t_s)
        readings.append(read(engine, t_s))
        assert 0 <= engine.kv_used_blocks(t_s) <= engine.kv_blocks
        assert engine.num_running <= engine.config.max_num_seqs
        if kind == 0:
            engine.submit(what, t_s)
        else:
            engine.set_clock(what, t_s)
    while engine.next_event_s < math.inf:
        engine.advance_to(engine.next_event_s)
        assert 0 <= engine.kv_used_blocks(engine.now_s) <= engine.kv_blocks
    readings.append(read(engine, engine.now_s))
    return readings


def read(engine: Engine, t_s: float) -> tuple[Activity, int, int]:
    return engine.activity(t_s), engine.kv_used_blocks(t_s), engine.output_tokens_total(t_s)


def token_times(engine: Engine) -> dict[int, list[float]]:
    """When each token of each request was made, by its first token, its end and the segments."""
    firsts = {e.request_id: e.t_s for e in engine.events if e.kind == "first_token"}
    times = {}
    for event in engine.events:
        if event.kind == "finished" and not event.preemptions:
            first_s = firsts[event.request_id]
            times[event.request_id] = [first_s] + [
                s.t_start_s + k * s.first_s + 0.5 * k * (k - 1) * s.growth_s
                for s in engine.segments
                if s.num_seqs and first_s <= s.t_start_s < event.t_s
                for k in range(1, s.iterations + 1)
            ]
    return times


traces = st.lists(
    st.tuples(
        st.floats(0, 3, allow_nan=False),
        st.integers(1, 400),
        st.integers(1, 120),
        st.sampled_from([0, 0, 0, 1, 3]),
    ),
    min_size=1,
    max_size=25,
)
clock_changes = st.lists(
    st.tuples(st.floats(0.01, 4, allow_nan=False), st.sampled_from([0.4, 0.7, 0.9, 1.0])),
    max_size=6,
)


@settings(max_examples=150, deadline=None)
@given(
    trace=traces,
    clocks=clock_changes,
    kv_blocks=st.integers(40, 120),
    block_size=st.sampled_from([4, 16]),
)
def test_collapsed_equals_stepping(trace, clocks, kv_blocks, block_size):
    requests = [
        Request(i, t, prompt, output, num_images=images, image_tokens=25 * images)
        for i, (t, prompt, output, images) in enumerate(sorted(trace))
    ]
    engines = [
        make(collapse, kv_blocks=kv_blocks, block_size_tokens=block_size)
        for collapse in (True, False)
    ]
    readings = [drive(engine, requests, clocks) for engine in engines]
    fast, slow = engines
    assert [(e.request_id, e.kind, e.preemptions) for e in fast.events] == [
        (e.request_id, e.kind, e.preemptions) for e in slow.events
    ]
    for ours, theirs in zip(fast.events, slow.events, strict=True):
        assert ours.t_s == pytest.approx(theirs.t_s, rel=1e-9, abs=1e-12)
    for ours, theirs in zip(*readings, strict=True):
        assert ours[0] == pytest.approx(theirs[0], rel=1e-9, abs=1e-9)
        assert ours[1:] == theirs[1:], "KV blocks held and tokens made so far"
    made = token_times(fast)
    assert made.keys() == token_times(slow).keys()
    for request_id, times_s in token_times(slow).items():
        assert len(times_s) == requests[request_id].output_tokens
        assert made[request_id] == pytest.approx(times_s, rel=1e-9, abs=1e-12)
    assert fast.preemptions_total == slow.preemptions_total
    assert fast.prompt_tokens_total == slow.prompt_tokens_total
    assert fast.output_tokens_total(1e9) == slow.output_tokens_total(1e9)
    assert sum(fast.itl.counts.values()) == sum(slow.itl.counts.values())
    assert len(fast.segments) <= len(slow.segments)
    assert sum(s.iterations for s in fast.segments) == len(slow.segments)
    for engine in engines:
        ended = [e.request_id for e in engine.events if e.kind in ("finished", "rejected")]
        assert sorted(ended) == [r.id for r in requests]
        assert engine.kv_used_blocks(engine.now_s) == 0
        assert engine.num_running == engine.num_waiting == 0


def test_one_request_by_hand():
    engine = make(True)
    engine.submit(Request(1, 0.0, prompt_tokens=10, output_tokens=3), 0.0)
    engine.advance_to(1.0)
    prefill_s = 1e-3 + 4e-3 + 1e-4 + 1e-9 * 55
    decode_s = [5e-3 + 2e-8 * 11, 5e-3 + 2e-8 * 12]
    assert engine.events == [
        Event(1, "first_token", pytest.approx(prefill_s), 0),
        Event(1, "finished", pytest.approx(prefill_s + sum(decode_s)), 0),
    ]
    assert engine.output_tokens_total(1.0) == 3
    assert engine.prompt_tokens_total == 10


def test_long_prompt_is_chunked_beside_decodes():
    engine = make(True)
    engine.submit(Request(1, 0.0, 5, 50), 0.0)
    engine.advance_to(0.02)
    engine.submit(Request(2, 0.02, 300, 2), 0.02)
    engine.advance_to(1.0)
    chunks = [s for s in engine.segments if s.prefill_tokens == 63]
    assert sum(s.iterations for s in chunks) == 300 // 63
    assert all(s.num_seqs == 1 for s in chunks)


def test_preempted_sequence_recomputes_and_finishes():
    engine = make(True, kv_blocks=8, block_size_tokens=4)
    engine.submit(Request(1, 0.0, 8, 20), 0.0)
    engine.submit(Request(2, 0.0, 8, 20), 0.0)
    while engine.next_event_s < math.inf:
        engine.advance_to(engine.next_event_s)
    assert engine.preemptions_total > 0
    assert [e.preemptions > 0 for e in engine.events if e.kind == "finished"] == [False, True]


def test_request_that_never_fits_is_rejected_at_once():
    engine = make(True, kv_blocks=4, block_size_tokens=4)
    engine.submit(Request(9, 0.0, 100, 1), 0.0)
    assert engine.events == [Event(9, "rejected", 0.0, 0)]


def test_lower_clock_slows_prefill_and_not_memory_bound_decode():
    def times(clock_frac):
        engine = make(True, max_batched_tokens=512)
        engine.set_clock(clock_frac, 0.0)
        engine.submit(Request(1, 0.0, 400, 100), 0.0)
        engine.advance_to(10.0)
        first, end = (e.t_s for e in engine.events)
        return first, end - first

    (prefill_full, decode_full), (prefill_half, decode_half) = times(1.0), times(0.5)
    assert prefill_half / prefill_full > 1.7
    assert decode_half == pytest.approx(decode_full)


def test_images_are_prepared_on_the_cpu_then_encoded():
    engine = make(True, preprocess_workers=1)
    engine.submit(Request(1, 0.0, 5, 1, num_images=3, image_tokens=30), 0.0)
    assert engine.num_waiting == 1
    assert engine.next_event_s == pytest.approx(0.06)
    engine.preprocess_slowdown = 2.0
    engine.submit(Request(2, 0.0, 5, 1, num_images=1, image_tokens=10), 0.0)
    engine.advance_to(1.0)
    ends = {e.request_id: e.t_s for e in engine.events if e.kind == "finished"}
    assert ends[1] >= 0.06 + 9e-3
    assert ends[2] >= 0.06 + 0.04
    assert engine.activity(1.0).encode_s == pytest.approx(4 * 3e-3)


def test_evict_gives_everything_back():
    engine = make(True)
    for i in range(5):
        engine.submit(Request(i, 0.0, 30, 30), 0.0)
    engine.advance_to(0.03)
    assert sorted(engine.evict(0.03)) == [0, 1, 2, 3, 4]
    assert engine.kv_used_blocks(0.03) == 0
    assert engine.next_event_s == math.inf
    engine.submit(Request(7, 0.04, 30, 3), 0.04)
    engine.advance_to(1.0)
    assert engine.events[-1].kind == "finished"


@given(
    first_s=st.floats(1e-4, 0.5),
    growth_s=st.floats(0, 1e-3),
    iterations=st.integers(1, 300),
)
@settings(max_examples=100, deadline=None)
def test_histogram_of_a_series_equals_one_by_one(first_s, growth_s, iterations):
    series, single = ItlHistogram(), ItlHistogram()
    series.add_series(first_s, growth_s, iterations, 2)
    for k in range(iterations):
        single.add(first_s + growth_s * k, 2)
    assert sum(series.counts.values()) == 2 * iterations

    def cumulative(counts):
        total, out = 0, []
        for place in range(1000):
            total += counts.get(place, 0)
            out.append(total)
        return out

    # An edge may fall on either side by rounding: never more than one iteration apart.
    for ours, theirs in zip(cumulative(series.counts), cumulative(single.counts), strict=True):
        assert abs(ours - theirs) <= 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e.set_clock(0.0, 0.0), "clock_frac = 0.0"),
        (lambda e: (e.advance_to(5.0), e.submit(Request(1, 0, 1, 1), 1.0)), "at 5.0 s"),
    ],
)
def test_bad_input_says_so(call, message):
    with pytest.raises(ValueError, match=message):
        call(make(True))
