"""Named phenomena of measured serving that the closed loop has to show by itself."""

from __future__ import annotations

import numpy as np
import pytest

from emulators.gpu import GpuBank
from emulators.models import load_model
from emulators.profiles import load_gpu
from emulators.server import ServerBank
from emulators.state import GpuState
from emulators.thermal import Thermal
from emulators.timing import IterationCost
from testbed.core.messages import EngineConfig, InstanceConfig, Request


class Served:
    """Users in a closed loop on one instance, after it has warmed up."""

    def __init__(
        self, gpu, model, users, prompt, output, *, tp=1, limit_w=0.0, seconds=12.0, warm_s=5.0,
        images=0, image_tokens=0, workers=64, preprocess_slowdown=1.0,
    ):  # fmt: skip
        state = GpuState.create(tp)
        bank = GpuBank(load_gpu(gpu), state)
        servers = ServerBank(bank, 1)
        if limit_w:
            state.control["power_limit_mw"] = round(limit_w * 1000)
        serving = servers.serving[0]
        serving.preprocess_slowdown = preprocess_slowdown
        config = EngineConfig(
            max_num_seqs=max(users, 16), max_batched_tokens=8192 + users, preprocess_workers=workers
        )
        serving.configure([InstanceConfig("one", "pool", model, tp, list(range(tp)), config)], 0.0)
        engine, draw, sent = serving.engines[0], np.random.default_rng(0), {}

        def send(t_s, share):
            request = Request(
                len(sent), t_s, prompt, max(2, int(output * share)), images, image_tokens
            )
            sent[request.id] = t_s
            serving.submit(0, request, t_s)

        for _ in range(users):
            send(0.0, draw.uniform(0.1, 1.0))
        t_s, watts, clocks, first, begun, ttfts = 0.0, [], [], 0, 0.0, []
        gaps = {}
        while t_s < seconds:
            t_s = round(t_s + 0.1, 6)
            servers.tick(t_s)
            for event in serving.drain_events():
                if event.kind == "finished":
                    send(t_s, draw.uniform(0.8, 1.2))
                elif event.kind == "first_token" and event.t_s > warm_s:
                    ttfts.append(event.t_s - sent[event.request_id])
            for _, place, count in serving.drain_gaps():
                if t_s > warm_s:
                    gaps[place] = gaps.get(place, 0) + count
            if t_s >= warm_s:
                if not watts:
                    first, begun = engine.output_tokens_total(t_s), t_s
                watts.append(bank.power_w.mean())
                clocks.append(bank.clock_frac.mean())
        self.power_w = float(np.mean(watts))
        self.clock_frac = float(np.mean(clocks))
        self.rate_tps = (engine.output_tokens_total(t_s) - first) / (t_s - begun)
        self.ttft_s = float(np.mean(ttfts)) if ttfts else float("nan")
        places = sorted(gaps)
        counts = np.cumsum([gaps[place] for place in places])
        middle = places[int(np.searchsorted(counts, counts[-1] / 2))] if places else 0
        self.itl_s = 1e-4 * 1.02**middle


# ML.ENERGY v3, Llama-3.1-8B chat on one H100: batch -> watts, median and mean gap in ms.
MEASURED = {
    16: (513, 7.9, 8.2), 64: (610, 11.5, 12.4), 128: (669, 16.5, 18.1), 256: (691, 26.1, 28.3),
    512: (688, 47.4, 52.1),
}  # fmt: skip


def test_h100_gap_and_power_against_batch_for_llama_8b():
    ours = {batch: Served("h100-sxm", "llama-3.1-8b", batch, 120, 400) for batch in MEASURED}
    for batch, (watts, median_ms, mean_ms) in MEASURED.items():
        one, saturated = ours[batch], batch == max(MEASURED)
        assert one.power_w == pytest.approx(watts, rel=0.03), batch
        assert one.itl_s * 1e3 == pytest.approx(median_ms, rel=0.25 if saturated else 0.1), batch
        mean = batch / one.rate_tps * 1e3
        assert mean == pytest.approx(mean_ms, rel=0.18 if saturated else 0.06), batch
    power = [ours[batch].power_w for batch in MEASURED]
    assert power[:4] == sorted(power[:4]), "power rises with batch"
    assert abs(power[4] - power[3]) < 0.1 * (power[3] - power[0]), "and stands at the limit"
    # A constant, or power in proportion to the token rate, would be far off.
    rates = [ours[batch].rate_tps for batch in MEASURED]
    assert rates[3] / rates[0] > 4.0 > 2.0 > power[3] / power[0]


# ML.ENERGY v3: model, GPU, number of GPUs, batch -> watts and mean gap in ms, output tokens.
SERVED = [
    ("llama-3.1-70b", "h100-sxm", 4, 16, 451, 18.5, 406),
    ("llama-3.1-70b", "h100-sxm", 4, 96, 525, 29.5, 406),
    ("qwen3-8b", "h100-sxm", 1, 8, 427, 8.3, 647),
    ("qwen3-8b", "h100-sxm", 1, 96, 544, 18.2, 647),
    ("qwen3-30b-a3b", "h100-sxm", 2, 96, 446, 25.1, 921),
    ("qwen3-32b", "b200-sxm", 1, 8, 860, 14.3, 634),
    ("qwen3-32b", "b200-sxm", 1, 128, 976, 27.3, 634),
    ("llama-3.1-8b", "b200-sxm", 1, 8, 639, 4.9, 396),
]


@pytest.mark.parametrize("row", SERVED, ids=lambda row: f"{row[0]}-{row[1]}-{row[3]}")
def test_the_loop_serves_models_as_they_were_measured(row):
    """Engine, corrections, clock and power together, not only the formula of the table."""
    model, gpu, num_gpus, users, watts, mean_ms, output = row
    one = Served(gpu, model, users, 120, output, tp=num_gpus, seconds=30, warm_s=15)
    assert one.power_w == pytest.approx(watts, rel=0.06)
    assert users / one.rate_tps * 1e3 == pytest.approx(mean_ms, rel=0.12)


def test_decode_of_a_large_model_sits_below_the_cap_while_mixed_batching_nears_it():
    decode = Served("h100-sxm", "llama-3.1-70b", 16, 200, 4000, tp=4, seconds=9)
    mixed = Served("h100-sxm", "llama-3.1-8b", 256, 400, 300, seconds=9)
    assert decode.power_w < 0.75 * 700
    assert mixed.power_w > 0.9 * 700


def test_a_cap_above_the_draw_of_decoding_costs_nothing_and_the_floor_is_a_cliff():
    free = Served("h100-sxm", "llama-3.1-70b", 16, 200, 4000, tp=4, seconds=9)
    above = Served(
        "h100-sxm", "llama-3.1-70b", 16, 200, 4000, tp=4, seconds=9, limit_w=free.power_w + 30
    )
    assert above.rate_tps > 0.95 * free.rate_tps
    flat = Served("h100-sxm", "llama-3.1-70b", 16, 200, 4000, tp=4, seconds=9, limit_w=350)
    assert flat.rate_tps > 0.95 * free.rate_tps, "voltage goes first, and is free"
    floor = Served("h100-sxm", "llama-3.1-70b", 16, 200, 4000, tp=4, seconds=9, limit_w=200)
    assert floor.rate_tps < 0.6 * free.rate_tps
    # The cap that decoding does not feel is felt: prompts take longer under it.
    prompts, slow = (
        Served("h100-sxm", "llama-3.1-70b", 8, 6000, 4, tp=4, seconds=9, limit_w=limit_w)
        for limit_w in (700, 350)
    )
    assert slow.rate_tps < 0.85 * prompts.rate_tps


def test_prefill_under_a_cap_takes_as_long_as_the_clock_is_slow():
    free, *capped = (
        Served("h100-sxm", "llama-3.1-8b", 8, 6000, 4, limit_w=limit_w)
        for limit_w in (700, 600, 500, 400)
    )
    clocks = [one.clock_frac / free.clock_frac for one in capped]
    assert clocks == sorted(clocks, reverse=True)
    assert clocks[-1] < 0.75
    for one, clock in zip(capped, clocks, strict=True):
        assert one.rate_tps / free.rate_tps == pytest.approx(clock, abs=0.08)


def test_a_b200_starves_when_images_are_prepared_too_slowly():
    few = Served(
        "b200-sxm", "qwen3-vl-30b-a3b", 8, 60, 300, images=1, image_tokens=1024, workers=1,
        preprocess_slowdown=12, seconds=16, warm_s=8,
    )  # fmt: skip
    many = Served(
        "b200-sxm", "qwen3-vl-30b-a3b", 128, 60, 300, images=1, image_tokens=1024, workers=1,
        preprocess_slowdown=12, seconds=16, warm_s=8,
    )  # fmt: skip
    fed = Served(
        "b200-sxm", "qwen3-vl-30b-a3b", 128, 60, 300, images=1, image_tokens=1024, seconds=10
    )
    assert fed.power_w > few.power_w, "with images at hand, more users draw more"
    assert many.power_w < 0.75 * fed.power_w, "waiting for them, a fast GPU idles"
    assert many.rate_tps < 0.4 * fed.rate_tps
    assert many.ttft_s > 5 * fed.ttft_s


# ModServe (SoCC 2025): encode share of TTFT, one 896 x 896 image, on A100.
SHARES = {
    "llama-3.2-vision-11b": (4, 0.79),
    "llama-3.2-vision-90b": (8, 0.65),
    "internvl-2.5-26b": (8, 0.25),
    "nvlm-d-72b": (8, 0.54),
}


@pytest.mark.parametrize("name", SHARES)
def test_encoding_takes_its_share_of_the_first_token(name):
    tp, share = SHARES[name]
    model = load_model(name)
    cost = IterationCost(model, load_gpu("a100-80gb"), tp=tp)
    tokens = 100 + (model.tokens_per_image if model.image_in_prompt else 0)
    encode_s = cost.encode_s(model.vision.tiles_per_image, 1.0)
    prefill_s = cost.base_s(0, tokens, 1, 0, 1.0) + tokens**2 / 2 * cost.per_pair_s(1.0)
    assert encode_s / (encode_s + prefill_s + cost.preprocess_s()) == pytest.approx(share, abs=0.03)


def test_encoding_is_linear_in_images():
    cost = IterationCost(load_model("llama-3.2-vision-11b"), load_gpu("a100-80gb"))
    one, eight = cost.encode_s(4, 1.0), cost.encode_s(32, 1.0)
    assert eight / one == pytest.approx(8, rel=0.1)


def test_prefill_of_a_decoder_only_model_costs_several_times_that_of_cross_attention():
    cross, prompt = (load_model(n) for n in ("llama-3.2-vision-11b", "llava-onevision-7b"))
    gpu, text = load_gpu("a100-80gb"), 100
    times = []
    for model in (cross, prompt):
        tokens = text + (model.tokens_per_image if model.image_in_prompt else 0)
        cost = IterationCost(model, gpu, tp=4)
        times.append(cost.base_s(0, tokens, 1, 0, 1.0) + tokens**2 / 2 * cost.per_pair_s(1.0))
    assert 6 < times[1] / times[0] < 25


def test_temperature_has_two_time_constants():
    gpu = load_gpu("a100-80gb")
    heat = Thermal(gpu, 1, inlet_c=np.array([24.0]), offset_c=np.zeros(1))
    inlet = np.array([24.0])
    course = {0.0: float(heat.temp_c[0])}
    for step in range(1, 1201):
        heat.advance(0.1, np.array([290.0]), inlet)
        course[round(step / 10, 1)] = float(heat.temp_c[0])
    # Published course of an A100-80GB that begins to decode.
    for t_s, celsius in {0.0: 34, 2.0: 41, 6.0: 47, 13.0: 49, 20.0: 51}.items():
        assert course[t_s] == pytest.approx(celsius, abs=2.0), t_s
    # The early slope is the die's: steeper than one exponential through the end would be.
    rise = course[120.0] - course[0.0]
    assert (course[1.0] - course[0.0]) / rise > 0.16
    assert (course[20.0] - course[10.0]) / rise > 0.1
    spike = float(heat.advance(2.0, np.array([480.0]), inlet)[0]) - course[120.0]
    assert 2 < spike < 9


def test_stepping_finer_gives_the_same_temperature():
    gpu = load_gpu("h100-sxm")
    inlet = np.array([24.0])
    ends = []
    for dt_s in (0.05, 1.0):
        heat = Thermal(gpu, 1, inlet_c=inlet, offset_c=np.zeros(1))
        for _ in range(round(10 / dt_s)):
            heat.advance(dt_s, np.array([600.0]), inlet)
        ends.append(float(heat.temp_c[0]))
    assert ends[0] == pytest.approx(ends[1], abs=1e-9)
