"""Requests: in order, repeatable, at the rate asked for, with the lengths that were measured."""

from __future__ import annotations

import csv
import gzip
import itertools
import re

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.core.errors import SpecError, TraceError
from testbed.core.spec import ClassSpec, WorkloadSpec
from testbed.workloads import SOURCES, open_workload
from testbed.workloads.lengths import DATA, measured

ANY = [ClassSpec()]
SPLIT = [
    ClassSpec(name="chat", images="never"),
    ClassSpec(name="batch", images="never", share=3.0),
    ClassSpec(name="vision", images="only"),
]
TABLE = "arrival_s,prompt_tokens,output_tokens\n0.5,100,7\n2.0,90,8\n4.0,80,9\n"
LLM = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
LMM = "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens\n"


def play(duration_s=60.0, classes=ANY, seed=1, **fields):
    return list(open_workload(WorkloadSpec(**fields), classes, seed, duration_s))


def column(requests, name):
    return np.array([getattr(request, name) for request in requests])


@pytest.fixture
def write(tmp_path):
    def write(text, name="trace.csv"):
        path = tmp_path / name
        data = text.encode() if isinstance(text, str) else text
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return str(path)

    return write


@pytest.fixture
def table(write):
    return write(TABLE)


def fields_of(source, table):
    return {"source": source} | ({"trace": table} if source == "csv" else {})


# What every source must do.


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_is_in_order_and_counts_from_zero(source, table):
    requests = play(500.0, rate_rps=20.0, **fields_of(source, table))
    arrivals = column(requests, "arrival_s")
    assert len(requests) > 2000
    assert column(requests, "id").tolist() == list(range(len(requests)))
    assert np.all(np.diff(arrivals) >= 0)
    assert arrivals[0] >= 0
    assert arrivals[-1] < 500.0
    assert column(requests, "prompt_tokens").min() >= 1
    assert column(requests, "output_tokens").min() >= 1
    images, tokens = column(requests, "num_images"), column(requests, "image_tokens")
    assert np.array_equal(images > 0, tokens > 0)
    assert np.all(tokens >= images)
    assert {type(value) for value in (requests[0].arrival_s, requests[0].prompt_tokens)} == {
        float,
        int,
    }


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_repeats_for_a_seed_and_differs_for_another(source, table):
    first, again, other = (
        play(30.0, seed=seed, rate_rps=30.0, **fields_of(source, table)) for seed in (4, 4, 5)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize("source", SOURCES)
def test_a_longer_run_begins_like_a_shorter_one(source, table):
    short = play(100.0, rate_rps=30.0, **fields_of(source, table))
    longer = play(1000.0, rate_rps=30.0, **fields_of(source, table))
    assert longer[: len(short)] == short


@pytest.mark.parametrize(
    "source", [name for name in SOURCES if name not in ("azure_lmm", "azure_llm_week")]
)
@pytest.mark.parametrize("rate_rps", [0.5, 7.0, 300.0])
def test_the_mean_rate_is_the_one_asked_for(source, rate_rps, table):
    # As long as the longest trace, or for 20,000 requests.
    duration_s = max(2400.0, 20_000 / rate_rps)
    duration_s = 2400.0 * np.ceil(duration_s / 2400.0)
    fields = fields_of(source, table)
    if source == "bursty":
        fields["burst_cv"] = 1.5
    count = len(play(duration_s, rate_rps=rate_rps, **fields))
    assert count == pytest.approx(rate_rps * duration_s, rel=0.03)


def test_the_mean_rate_of_generated_multimodal_days_is_over_all_of_them():
    five_days_s = 5 * 86_400.0
    assert len(play(five_days_s, source="azure_lmm")) == pytest.approx(
        five_days_s * 1_000_000 / 604_800, rel=0.01
    )
    per_minute = np.bincount(
        (column(play(86_400.0, source="azure_lmm"), "arrival_s") // 60).astype(int)
    )
    assert per_minute.var() > 3 * per_minute.mean()  # a Poisson process would have 1


@pytest.mark.parametrize("source", SOURCES)
def test_memory_does_not_grow_with_the_run(source, table):
    fields = fields_of(source, table)

    # The process's own size, not tracemalloc: that crashes Python 3.11 beside pyarrow's threads.
    def held_bytes(count):
        requests = open_workload(WorkloadSpec(rate_rps=1000.0, **fields), ANY, 1, 1e9)
        for _ in itertools.islice(requests, count):
            pass
        return psutil.Process().memory_info().rss

    held_bytes(20_000)
    before = held_bytes(20_000)
    assert held_bytes(400_000) < before + 40e6, "400,000 requests kept would be 100 MB"


@settings(max_examples=40, deadline=None)
@given(
    source=st.sampled_from(sorted(set(SOURCES) - {"csv"})),
    rate_rps=st.floats(0.01, 500.0),
    image_frac=st.floats(0.0, 1.0),
    tenants=st.integers(1, 50),
    limit=st.integers(1, 2_000_000),
    seed=st.integers(0, 2**62),
    duration_s=st.floats(0.1, 200.0),
)
def test_whatever_the_numbers(source, rate_rps, image_frac, tenants, limit, seed, duration_s):
    requests = play(
        duration_s,
        seed=seed,
        source=source,
        rate_rps=rate_rps,
        image_frac=image_frac,
        tenants=tenants,
        max_prompt_tokens=limit,
    )
    assert [request.id for request in requests] == list(range(len(requests)))
    assert all(a.arrival_s <= b.arrival_s for a, b in itertools.pairwise(requests))
    for request in requests:
        assert 0 <= request.arrival_s < duration_s
        assert request.prompt_tokens >= 1
        assert request.prompt_tokens + request.image_tokens <= limit
        assert (request.num_images > 0) == (request.image_tokens > 0)
        assert int(request.tenant.removeprefix("tenant")) < tenants


# Streams: changing one thing leaves the others.


def test_images_tenants_and_classes_do_not_disturb_each_other():
    base = {"source": "poisson", "rate_rps": 50.0, "max_prompt_tokens": 10**7}
    plain = play(**base)
    changed = play(image_frac=0.5, tenants=9, classes=SPLIT, **base)
    for name in ("arrival_s", "prompt_tokens", "output_tokens"):
        assert np.array_equal(column(plain, name), column(changed, name))
    fewer = play(image_frac=0.2, tenants=9, classes=SPLIT, **base)
    has, had = column(changed, "num_images"), column(fewer, "num_images")
    assert np.array_equal(has[had > 0], had[had > 0])  # those with images at 0.2 are among the 0.5
    assert np.array_equal(column(changed, "tenant"), column(fewer, "tenant"))


# Lengths.

QUANTILES = [0.1, 0.25, 0.5, 0.75, 0.9, 0.95]


def assert_measured(values, name, rel=0.06):
    expected = measured(name).at(np.array(QUANTILES))
    # A quantile of a sample may fall anywhere in a step of the distribution: look on both sides.
    low, high = (measured(name).at(np.clip(np.array(QUANTILES) + d, 0, 1)) for d in (-0.01, 0.01))
    got = np.quantile(values, QUANTILES)
    assert np.all(got >= low * (1 - rel)), (got, expected)
    assert np.all(got <= high * (1 + rel)), (got, expected)


@pytest.mark.parametrize(
    ("source", "prompt", "output"),
    [
        ("poisson", "chat_prompt", "chat_output"),
        ("bursty", "chat_prompt", "chat_output"),
        ("long_context", "long_prompt", "long_output"),
    ],
)
def test_generated_lengths_are_the_measured_ones(source, prompt, output):
    requests = play(300.0, source=source, rate_rps=100.0)
    assert_measured(column(requests, "prompt_tokens"), prompt)
    assert_measured(column(requests, "output_tokens"), output)


def test_generated_multimodal_requests_are_the_measured_ones():
    requests = play(5 * 86_400.0, source="azure_lmm", rate_rps=0.2, max_prompt_tokens=10**6)
    images = column(requests, "num_images")
    context = column(requests, "prompt_tokens") + column(requests, "image_tokens")
    output = column(requests, "output_tokens")
    assert (images > 0).mean() == pytest.approx(1 - 51 / 99.2, abs=0.01)
    assert_measured(context[images > 0], "lmm_image_context")
    assert_measured(context[images == 0], "lmm_text_context")
    assert_measured(output[images > 0], "lmm_image_output")
    assert_measured(output[images == 0], "lmm_text_output")
    with (DATA / "image_counts.csv").open() as file:
        for row in csv.DictReader(file):
            share = (images[images > 0] <= int(row["images"])).mean()
            assert share == pytest.approx(float(row["cumulative_frac"]), abs=0.01)
    # More images, longer contexts.
    medians = [np.median(context[images == count]) for count in (1, 3, 5, 23)]
    assert medians == sorted(medians)
    assert medians[0] == pytest.approx(1000, rel=0.1)


def test_week_of_llm_services_has_the_published_rates_and_lengths():
    services = [ClassSpec(name="coding"), ClassSpec(name="conversation")]
    requests = play(7 * 86_400.0, services, source="azure_llm_week", rate_rps=0.5)
    assert len(requests) == pytest.approx(0.5 * 7 * 86_400, rel=0.01)
    coding = np.array([request.slo_class == "coding" for request in requests])
    assert coding.mean() == pytest.approx(1667 / (1667 + 2709), rel=0.02)
    arrival_s = column(requests, "arrival_s")
    day = (arrival_s[coding] // 86_400).astype(int)
    per_day = np.bincount(day, minlength=7)
    assert per_day[5:].max() < 0.6 * per_day[:5].min(), "nobody codes at weekends"
    hour = (arrival_s[~coding] % 86_400 // 3600).astype(int)
    per_hour = np.bincount(hour, minlength=24)
    assert per_hour.max() > 1.5 * per_hour.min()
    prompt, output = column(requests, "prompt_tokens"), column(requests, "output_tokens")
    for mine, name in ((coding, "coding"), (~coding, "conversation")):
        assert_measured(prompt[mine], f"week_{name}_prompt")
        assert_measured(output[mine], f"week_{name}_output")
    # The second reading of the same plots, from the publisher's quantiles.
    assert np.quantile(prompt[coding], 0.5) == pytest.approx(1903, rel=0.03)
    assert np.quantile(prompt[~coding], 0.9) == pytest.approx(3743, rel=0.04)
    assert np.quantile(output[~coding], 0.9) == pytest.approx(328, rel=0.06)


def test_the_image_share_of_generated_multimodal_requests_can_be_set():
    requests = play(5 * 86_400.0, source="azure_lmm", rate_rps=0.1, image_frac=0.1)
    assert (column(requests, "num_images") > 0).mean() == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("source", ["poisson", "long_context"])
def test_mean_lengths_can_be_set_and_hold_after_the_cut(source):
    requests = play(
        300.0,
        source=source,
        rate_rps=200.0,
        prompt_tokens=3000.0,
        output_tokens=150.0,
        max_prompt_tokens=16_000,
    )
    prompts = column(requests, "prompt_tokens")
    assert prompts.mean() == pytest.approx(3000, rel=0.03)
    assert prompts.max() <= 16_000
    assert column(requests, "output_tokens").mean() == pytest.approx(150, rel=0.03)


def test_long_contexts_reach_a_million_tokens():
    requests = play(1000.0, source="long_context", rate_rps=100.0, max_prompt_tokens=4_000_000)
    prompts = column(requests, "prompt_tokens")
    assert prompts.max() > 1_000_000
    assert np.quantile(prompts, 0.99) == pytest.approx(90_000, rel=0.1)


def test_images_are_dropped_whole_before_text_is_cut(write):
    trace = write(
        "arrival_s,prompt_tokens,output_tokens,num_images,image_tokens\n"
        "0,500,1,3,3000\n1,500,1,1,4000\n2,5000,1,0,0\n"
    )
    requests = play(3.0, source="csv", trace=trace, max_prompt_tokens=2100)
    assert [(r.prompt_tokens, r.num_images, r.image_tokens) for r in requests] == [
        (100, 2, 2000),
        (500, 0, 0),
        (2100, 0, 0),
    ]


# Bursts.


def dispersion(requests, bin_s):
    """Variance over mean of arrivals per bin: 1 for Poisson."""
    counts = np.bincount((column(requests, "arrival_s") // bin_s).astype(int))
    return counts.var() / counts.mean()


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0, 6.0])
def test_gaps_vary_as_asked(cv):
    arrivals = column(play(3000.0, source="bursty", rate_rps=50.0, burst_cv=cv), "arrival_s")
    gaps = np.diff(arrivals)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1)


def test_bursty_runs_do_not_begin_with_a_burst():
    counts = [len(play(5.0, seed=seed, source="bursty", rate_rps=4.0)) for seed in range(400)]
    assert np.mean(counts) == pytest.approx(20.0, rel=0.15)  # an ordinary first gap gives 24


@pytest.mark.parametrize("rate_rps", [1.0, 30.0])
def test_another_rate_keeps_the_bursts_of_a_trace(rate_rps):
    fields = {"source": "azure_llm", "trace": "azure_llm_2023_code"}
    own = column(play(2392.0, **fields), "arrival_s")
    other = column(play(2392.0, rate_rps=rate_rps, **fields), "arrival_s")
    minutes = np.arange(0, 2401, 60)
    own, other = (np.histogram(times, minutes)[0] for times in (own, other))
    assert np.corrcoef(own, other)[0, 1] > 0.9
    assert other.std() / other.mean() == pytest.approx(own.std() / own.mean(), rel=0.15)
    copies_differ = len(np.unique(column(play(60.0, rate_rps=30.0, **fields), "arrival_s")))
    assert copies_differ == len(play(60.0, rate_rps=30.0, **fields))


# Traces.


def published_rows(name):
    with gzip.open(DATA / f"{name}.csv.gz", "rt") as file:
        return [
            (int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in csv.DictReader(file)
        ]


@pytest.mark.parametrize("name", ["azure_llm_2023_conv", "azure_llm_2023_code"])
def test_a_shipped_trace_is_played_row_by_row(name):
    rows = published_rows(name)
    requests = play(2400.0, source="azure_llm", trace=name)[: len(rows)]
    assert [(r.prompt_tokens, r.output_tokens) for r in requests] == rows


def test_the_first_rows_of_the_conversation_trace():
    first = play(6.0, source="azure_llm")[:3]
    assert [r.arrival_s for r in first] == pytest.approx([0.0, 4.314579, 4.541877])


def test_a_trace_repeats_one_mean_gap_after_its_end(table):
    arrivals = column(play(13.0, source="csv", trace=table), "arrival_s")
    assert arrivals == pytest.approx([0.5, 2.0, 4.0, 6.25, 7.75, 9.75, 12.0])


def test_start_s_begins_within_a_trace(table):
    requests = play(3.0, source="csv", trace=table, start_s=1.5)
    assert [(r.id, r.arrival_s, r.prompt_tokens) for r in requests] == [(0, 0.5, 90), (1, 2.5, 80)]


def test_start_s_of_generated_days_shifts_them():
    day = play(3 * 86_400.0, source="azure_lmm")
    later = play(86_400.0, source="azure_lmm", start_s=86_400.0)
    second = column(day, "arrival_s") - 86_400.0
    edges = np.arange(0, 86_401, 600)
    a, b = np.histogram(second, edges)[0], np.histogram(column(later, "arrival_s"), edges)[0]
    assert np.corrcoef(a, b)[0, 1] > 0.85


def test_more_than_the_own_rate_starts_at_full_rate(table):
    arrivals = column(play(100.0, source="csv", trace=table, rate_rps=100.0), "arrival_s")
    counts = np.histogram(arrivals, np.arange(0, 101, 5))[0]
    assert counts[0] == pytest.approx(500, rel=0.3)


def test_a_trace_of_one_moment_plays_once(write):
    trace = write("arrival_s,prompt_tokens,output_tokens\n2,5,6\n")
    assert [r.arrival_s for r in play(60.0, source="csv", trace=trace)] == [2.0]
    with pytest.raises(SpecError, match=r"workload.rate_rps = 3 must be 0"):
        play(60.0, source="csv", trace=trace, rate_rps=3.0)


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz"])
@pytest.mark.parametrize("zone", ["", "+00:00", "Z"])
def test_wall_times_with_and_without_a_zone_plain_and_gzip(write, name, zone):
    trace = write(
        f"{LLM}2024-05-10 00:00:00.009930{zone},10,2\n2024-05-10 00:00:01{zone},0,0\n", name
    )
    requests = play(1.5, source="azure_llm", trace=trace)
    assert column(requests, "arrival_s") == pytest.approx([0.0, 0.99007])
    assert (requests[1].prompt_tokens, requests[1].output_tokens) == (1, 1)


def test_a_multimodal_file_is_read_with_the_square_root_rule(write):
    trace = write(
        f"{LMM}2024-10-15 12:00:00,16,4564,20\n2024-10-15 12:00:01,0,300,5\n"
        "2024-10-15 12:00:02,1,20,5\n"
    )
    four, none, tiny = play(2.5, source="azure_lmm", trace=trace, classes=SPLIT)
    assert four.num_images == 4
    assert four.prompt_tokens + four.image_tokens == 4564
    assert four.slo_class == "vision"
    assert (none.num_images, none.prompt_tokens, none.image_tokens) == (0, 300, 0)
    assert tiny.prompt_tokens + tiny.image_tokens == 20
    assert tiny.prompt_tokens >= 10


def test_a_table_may_name_tenants_classes_and_images(write):
    trace = write(
        "arrival_s,prompt_tokens,output_tokens,num_images,image_tokens,tenant,slo_class\n"
        "0,10,1,2,900,ann,vision\n0.5,11,1,0,0,bob,batch\n"
    )
    first, second = play(1.0, source="csv", trace=trace, classes=SPLIT)
    assert (first.tenant, first.slo_class, first.num_images, first.image_tokens) == (
        "ann",
        "vision",
        2,
        900,
    )
    assert (second.tenant, second.slo_class) == ("bob", "batch")


# Tenants and classes.


def test_tenants_have_zipf_weights():
    tenants = column(play(1000.0, source="poisson", rate_rps=50.0, tenants=3), "tenant")
    shares = [(tenants == f"tenant{index}").mean() for index in range(3)]
    assert shares == pytest.approx([6 / 11, 3 / 11, 2 / 11], abs=0.01)


def test_classes_follow_their_shares_and_rules():
    requests = play(1000.0, SPLIT, source="poisson", rate_rps=50.0, image_frac=0.2)
    names, images = column(requests, "slo_class"), column(requests, "num_images") > 0
    assert images.mean() == pytest.approx(0.2, abs=0.01)
    assert set(names[images]) == {"vision"}
    assert (names[~images] == "batch").mean() == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize(
    ("fields", "rule", "missing"),
    [
        ({"source": "poisson", "image_frac": 0.1}, "never", "with images"),
        ({"source": "azure_lmm"}, "never", "with images"),
        ({"source": "azure_lmm"}, "only", "without images"),
        ({"source": "azure_llm"}, "only", "without images"),
    ],
)
def test_a_request_that_no_class_takes_is_an_error_at_once(fields, rule, missing):
    with pytest.raises(SpecError, match=f"{fields['source']}.* {missing}.*there are: odd"):
        open_workload(WorkloadSpec(**fields), [ClassSpec(name="odd", images=rule)], 1, 1.0)


def test_only_images_need_no_class_for_text():
    requests = play(10.0, SPLIT[2:], source="poisson", rate_rps=10.0, image_frac=1.0)
    assert {r.slo_class for r in requests} == {"vision"}


# Bad input ends with one line that names what is wrong.


def error_of(kind, **fields):
    with pytest.raises(kind) as caught:
        open_workload(WorkloadSpec(**fields), SPLIT, 1, 60.0)
    text = str(caught.value)
    assert "\n" not in text
    return text


ROW = "2023-11-16 18:17:04,10,20\n"


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ("yesterday,1,2\n", r"row 2: TIMESTAMP = 'yesterday' must be a time"),
        (",1,2\n", r"row 2: TIMESTAMP = '' must be a time"),
        ("2023-11-16 18:17:05,abc,2\n", r"row 2: ContextTokens = 'abc' must be a whole number"),
        ("2023-11-16 18:17:05,-3,2\n", r"row 2: ContextTokens = '-3' must be a whole number"),
        ("2023-11-16 18:17:05,3,2.5\n", r"row 2: GeneratedTokens = '2.5' must be a whole number"),
        ("2023-11-16 18:17:05,3,\n", r"row 2: GeneratedTokens = '' must be a whole number"),
        (f"{ROW}2023-11-16 18:17:05,9999999999,2\n", r"row 3: ContextTokens = '9999999999' must"),
        ("2023-11-16 18:17:03,1,2\n", r"row 2: TIMESTAMP = 2023-11-16T18:17:03.* no earlier than"),
        ("2023-11-16 18:17:05,1\n", r"row 2: 2 fields in .* must be 3"),
        (f"\n{ROW}2023-11-16 18:17:05,1,2,3\n", r"row 3: 4 fields in .* must be 3"),
    ],
)
def test_a_broken_row_is_named(write, rows, expected):
    trace = write(LLM + ROW + rows)
    text = error_of(TraceError, source="azure_llm", trace=trace)
    assert text.startswith(trace)
    assert re.search(expected, text), text


def test_a_broken_row_far_down_is_named(write):
    trace = write(LLM + ROW * 300_000 + "2023-11-16 18:17:04,x,1\n" + ROW)
    text = error_of(TraceError, source="azure_llm", trace=trace)
    assert "row 300001: ContextTokens = 'x'" in text


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (LLM, "has a header and no rows"),
        ("", "cannot be read: Empty CSV file"),
        ("TIMESTAMP,ContextTokens\n1,2\n", "columns TIMESTAMP, ContextTokens must be TIMESTAMP"),
        (LMM + "2024-10-15 12:00:00,1,2,3\n", "columns TIMESTAMP, NumImages,"),
        (LLM.encode() + b"\xff\xfe,1,2\n", "UTF8"),
    ],
)
def test_a_broken_file_is_named(write, content, expected):
    trace = write(content)
    text = error_of(TraceError, source="azure_llm", trace=trace)
    assert text.startswith(trace)
    assert expected in text


def test_a_file_that_is_not_gzip_is_named(write, tmp_path):
    path = tmp_path / "plain.csv.gz"
    path.write_text(LLM + ROW)
    assert f"{path}: cannot be read" in error_of(TraceError, source="azure_llm", trace=str(path))


def test_an_unknown_trace_lists_what_is_shipped(tmp_path):
    text = error_of(TraceError, source="azure_llm", trace="azure_llm_2023")
    assert "no such file; shipped: azure_llm_2023_code, azure_llm_2023_conv" in text
    assert "is a folder" in error_of(TraceError, source="azure_llm", trace=str(tmp_path))
    assert "no such file" in error_of(TraceError, source="csv", trace="missing.csv")


@pytest.mark.parametrize(
    ("header", "row", "expected"),
    [
        ("", "nan,1,1", "row 2: arrival_s = 'nan' must be a finite number"),
        ("", "-1,1,1", "row 2: arrival_s = '-1' must be a finite number"),
        ("", "0.2,1,1", "row 2: arrival_s = 0.2 must be no earlier than the row above, 0.5"),
        (",tenant", "1,1,1,", "row 2: tenant = '' must be a name"),
        (",slo_class", "1,1,1,gold", "row 2: slo_class = gold must be one of chat, batch, vision"),
        (",slo_class", "1,1,1,vision", "row 2: slo_class = vision must be a class that takes"),
        (",num_images", "1,1,1,1", "num_images and image_tokens go together"),
        (",num_images,image_tokens", "1,1,1,2,0", "row 2: image_tokens = 0 must be at least"),
        (",num_images,image_tokens", "1,1,1,0,9", "row 2: image_tokens = 9 must be at least"),
        (",tenants", "1,1,1,a", "and may be num_images, image_tokens, tenant, slo_class"),
    ],
)
def test_a_broken_table_is_named(write, header, row, expected):
    filler = {
        "": "",
        ",tenant": ",a",
        ",slo_class": ",chat",
        ",num_images": ",1",
        ",num_images,image_tokens": ",1,5",
        ",tenants": ",a",
    }[header]
    trace = write(f"arrival_s,prompt_tokens,output_tokens{header}\n0.5,1,1{filler}\n{row}\n")
    assert expected in error_of(TraceError, source="csv", trace=trace)


def test_a_multimodal_file_with_plain_counts_is_refused(write):
    trace = write(f"{LMM}2024-10-15 12:00:00,1,900,20\n2024-10-15 12:00:01,3,3000,5\n")
    text = error_of(TraceError, source="azure_lmm", trace=trace)
    assert "row 2: NumImages = 3 must be a perfect square" in text


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"source": "poisson", "burst_cv": 2.0}, "workload.burst_cv = 2.0 .*bursty would"),
        ({"source": "poisson", "trace": "x"}, "workload.trace = 'x' must be left out"),
        ({"source": "bursty", "start_s": 5.0}, "workload.start_s = 5.0 must be left out"),
        ({"source": "azure_llm", "prompt_tokens": 5.0}, "workload.prompt_tokens = 5.0 must be"),
        ({"source": "azure_lmm", "output_tokens": 5.0}, "workload.output_tokens = 5.0 must be"),
        ({"source": "long_context", "burst_cv": 1.0}, "workload.burst_cv = 1.0 must be left out"),
        ({"source": "csv"}, "workload.trace = '' must name a CSV file"),
        ({"source": "csvv"}, "workload.source = 'csvv' must be one of azure_llm, azure_llm_week"),
        ({"source": "azure_llm", "start_s": 1e6}, "workload.start_s = 1e.06 must be at most 2399"),
        ({"source": "azure_lmm", "start_s": 432e3}, "workload.start_s = 432000 must be below"),
        ({"source": "poisson", "prompt_tokens": 2e5}, "prompt_tokens = 200000 must be from 1 to"),
        ({"source": "poisson", "output_tokens": 0.5}, "output_tokens = 0.5 must be from 1 to"),
    ],
)
def test_a_field_out_of_place_is_named(fields, expected):
    assert re.search(expected, error_of(SpecError, **fields))


def test_what_a_file_says_cannot_be_said_again(write):
    trace = write(
        "arrival_s,prompt_tokens,output_tokens,num_images,image_tokens,tenant\n0,1,1,0,0,a\n"
    )
    for field, value in (("image_frac", 0.5), ("tenants", 7)):
        text = error_of(SpecError, source="csv", trace=trace, **{field: value})
        assert f"workload.{field} = {value} must be left out" in text
    trace = write(f"{LMM}2024-10-15 12:00:00,1,900,20\n")
    text = error_of(SpecError, source="azure_lmm", trace=trace, image_frac=0.5)
    assert "has its own images" in text
