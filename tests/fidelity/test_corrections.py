"""What measured serving of a model adds to kernels: learnt, shipped, and run by the engine."""

from __future__ import annotations

import numpy as np
import pytest

from emulators.corrections import BATCHES, correction_for, steady_state, steady_w
from emulators.models import available_models, load_model
from emulators.profiles import load_gpu
from emulators.timing import IterationCost, Stack
from testbed.analysis import pooling

FAMILIES = [
    ("llama-3.1-8b", "h100-sxm", 1), ("llama-3.1-70b", "h100-sxm", 4),
    ("qwen3-30b-a3b", "b200-sxm", 1), ("qwen3-235b-a22b", "b200-sxm", 8),
]  # fmt: skip


@pytest.mark.parametrize(("model", "gpu", "num_gpus"), FAMILIES)
def test_the_engine_s_cost_comes_to_the_ratios_of_the_file(model, gpu, num_gpus):
    plain, corrected = (
        IterationCost(load_model(model), load_gpu(gpu), tp=num_gpus, correct=correct)
        for correct in (False, True)
    )
    found = corrected.correction
    assert (found.model, found.num_gpus) == (model, num_gpus)
    for batch, gap, power in zip(found.batch, found.gap, found.power, strict=True):
        lengths = found.prompt_tokens, found.output_tokens
        before_s, flops, moved = steady_state(plain, batch, *lengths)
        after_s, more_flops, _ = steady_state(corrected, batch, *lengths)
        assert after_s / before_s == pytest.approx(gap, rel=0.02), batch
        before_w = steady_w(plain, after_s, flops, moved)
        after_w = steady_w(corrected, after_s, more_flops, moved)
        limit_w = corrected.gpu.power_limit_default_w
        assert after_w == pytest.approx(min(power * before_w, limit_w), rel=0.05), batch


def test_a_stated_stack_and_an_unmeasured_gpu_are_left_as_computed():
    model = load_model("llama-3.1-8b")
    stated = IterationCost(model, load_gpu("h100-sxm"), stack=Stack(1e-3, 0.0))
    elsewhere = IterationCost(model, load_gpu("rtx-4090"))
    assert stated.correction is elsewhere.correction is None
    assert IterationCost(model, load_gpu("h200-sxm")).correction.gpu == "h100-sxm"


def test_a_model_is_corrected_like_itself_before_others():
    card = load_model("llama-3.1-70b")
    assert correction_for("h100-sxm", card, 8).model == "llama-3.1-70b"
    unknown = IterationCost(card, load_gpu("h100-sxm"), tp=8, precision="fp8")
    assert unknown.correction.model == "dense"
    assert unknown.correction.precision == "fp8"


def test_no_correction_turns_an_iteration_odd():
    """Iterations stay positive and grow with the batch, and work is never negative."""
    for name in available_models():
        for gpu in ("h100-sxm", "b200-sxm"):
            cost = IterationCost(load_model(name), load_gpu(gpu), tp=8)
            context_s = cost.per_context_token_s(1.0)
            times = [cost.base_s(n, 0, 0, 0, 1.0) + 300 * n * context_s for n in BATCHES]
            assert min(times) > 0, (name, gpu)
            assert times[9] > 0.9 * times[0], (name, gpu)
            assert min(cost.base_flops(n, 0, 0, 0) for n in BATCHES) >= 0, (name, gpu)


def test_a_pool_leaves_out_what_it_says():
    """Two configurations with opposite effects: each is known only to those who may see it."""
    rng = np.random.default_rng(0)
    labels = np.array(["a", "b"] * 20, dtype=object)
    points = np.array([f"{name}{row // 4}" for row, name in enumerate(labels)], dtype=object)
    rows = pooling.Rows(
        rng.normal(size=(40, 1)),
        {"gpu": np.full(40, "x", dtype=object), "configuration": labels, "point": points},
        rng.normal(size=(40, 1)),
    )
    logs = np.where(labels == "a", 0.3, -0.3) + rng.normal(scale=0.01, size=40)
    pooled = pooling.Pooled([1.0], 0.01, 0.01, {"configuration": 1.0}, {}, [1.0], {"x": 0.01})
    pool = pooling.Pool(rows, logs, pooled)
    off = {
        leave: np.abs(pool.predict(rows, leave) - logs).mean()
        for leave in ("", "point", "configuration")
    }
    assert off[""] < 0.02
    assert off["point"] < 0.05
    assert off["configuration"] > 0.25
    # Leaving out at prediction is the same as never having had the rows.
    away = labels == "a"
    never = pooling.Pool(rows.take(~away), logs[~away], pooled)
    apart = pool.predict(rows.take(away), "configuration")
    assert np.abs(never.predict(rows.take(away)) - apart).max() < 0.35
