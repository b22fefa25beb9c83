"""Timing: built up from kernels, reduced to a closed form, fast, and split over GPUs."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from emulators.models import available_models, load_model
from emulators.profiles import available_gpus, load_gpu
from emulators.timing import IterationCost, Stack
from testbed.core.errors import SpecError

BARE = Stack(0.0, 0.0)


def cost(model="llama-3.1-8b", gpu="h100-sxm", **kwargs):
    kwargs.setdefault("stack", BARE)
    return IterationCost(load_model(model), load_gpu(gpu), **kwargs)


# Parameters in billions as their publishers state them, and what takes part in one token.
PUBLISHED = {
    "llama-2-7b": (6.74, 6.74), "llama-2-13b": (13.0, 13.0), "llama-2-70b": (69.0, 69.0),
    "llama-3.1-8b": (8.03, 8.03), "llama-3.1-70b": (70.6, 70.6), "llama-3.1-405b": (405.9, 405.9),
    "qwen2.5-7b": (7.62, 7.62), "qwen3-32b": (32.8, 32.8), "qwen3-30b-a3b": (30.5, 3.3),
    "qwen3-235b-a22b": (235.1, 22.2), "mixtral-8x7b": (46.7, 12.9), "bloom-176b": (176.2, 176.2),
    "deepseek-v3": (671.0, 37.5), "gpt-oss-120b": (116.8, 5.7), "gemma-3-27b": (27.0, 27.0),
    "llama-4-scout-17b-16e": (107.8, 17.2), "kimi-k2.5": (1026.0, 32.7),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_card_has_the_published_number_of_parameters(name):
    card, (total, active) = load_model(name), PUBLISHED[name]
    assert card.params / 1e9 == pytest.approx(total, rel=0.01)
    assert card.active_params / 1e9 == pytest.approx(active, rel=0.02)


def test_every_card_and_profile_loads_and_gives_a_plausible_iteration():
    for name in available_models():
        assert 0 < cost(name, tp=8).base_s(8, 0, 0, 0, 1.0) < 0.2, name
    for name in available_gpus():
        assert 0 < cost(gpu=name).base_s(8, 0, 0, 0, 1.0) < 0.1, name


def test_the_models_of_the_papers_are_there():
    wanted = [
        "llama-2-7b", "llama-2-13b", "llama-2-70b", "llama-3.1-8b", "llama-3.1-70b",
        "llama-3.2-vision-11b", "llama-3.2-vision-90b", "llava-onevision-7b",
        "llava-onevision-72b", "internvl-2.5-26b", "nvlm-d-72b", "pixtral-12b", "qwen2.5-7b",
        "qwen2.5-72b", "qwen3-8b", "qwen3-32b", "qwen3-30b-a3b", "qwen3-vl-30b-a3b",
        "mixtral-8x7b", "bloom-176b",
    ]  # fmt: skip
    assert set(wanted) <= set(available_models())
    gpus = [
        "a100-40gb", "a100-80gb", "h100-sxm", "h200-sxm", "b200-sxm", "rtx-4090", "rtx-pro-6000",
    ]  # fmt: skip
    assert set(gpus) <= set(available_gpus())


@pytest.mark.parametrize("gpu", ["h100-sxm", "rtx-4090"])
def test_the_closed_form_is_near_the_sum_of_its_kernels(gpu):
    one = cost(gpu=gpu)
    rng = np.random.default_rng(0)
    errors = []
    for _ in range(300):
        seqs, tokens = (
            int(rng.integers(0, 200)),
            int(rng.integers(0, 4)) * int(rng.integers(1, 700)),
        )
        if not seqs and not tokens:
            continue
        context, before = seqs * int(rng.integers(50, 4000)), int(rng.integers(0, 2000))
        pairs = tokens * before + tokens * (tokens + 1) / 2
        per_context = one.per_context_token_mixed_s(1.0) if tokens else one.per_context_token_s(1.0)
        closed = one.base_s(seqs, tokens, 1 if tokens else 0, 0, 1.0)
        closed += per_context * context + one.per_pair_s(1.0) * pairs
        errors.append(abs(closed / one.kernels_s(seqs, context, tokens, before) - 1))
    assert np.median(errors) < 0.01
    assert np.quantile(errors, 0.9) < 0.06


@pytest.mark.parametrize("stack", [Stack(1e-3, 1e-5), None], ids=["stated", "corrected"])
def test_the_array_form_agrees_with_the_scalar_one(stack):
    one = cost("qwen3-30b-a3b", tp=2, stack=stack)
    rng = np.random.default_rng(1)
    n = 200
    seqs, prompt = rng.integers(0, 300, n), rng.integers(0, 2, n) * rng.integers(1, 3000, n)
    seqs = np.where((seqs == 0) & (prompt == 0), 1, seqs)
    context, pairs = seqs * rng.integers(10, 3000, n), prompt * rng.integers(1, 2000, n)
    clock = rng.choice([0.2, 0.35, 0.5, 0.75, 0.9, 1.0], n)
    prefills = (prompt > 0).astype(int)
    array = one.iterations_s(seqs, context, prompt, pairs, prefills, np.zeros(n), clock)
    for row in range(n):
        x = float(clock[row])
        mixed = prompt[row] > 0
        each = one.per_context_token_mixed_s(x) if mixed else one.per_context_token_s(x)
        scalar = one.base_s(int(seqs[row]), int(prompt[row]), int(prefills[row]), 0, x)
        scalar += each * context[row] + one.per_pair_s(x) * pairs[row]
        assert array[row] == pytest.approx(scalar, rel=0.01)


def test_splitting_makes_an_iteration_shorter_but_not_in_proportion():
    one, four = cost("llama-3.1-70b", tp=2), cost("llama-3.1-70b", tp=8)
    assert 0.25 < four.base_s(32, 0, 0, 0, 1.0) / one.base_s(32, 0, 0, 0, 1.0) < 0.6
    piped = cost("llama-3.1-70b", tp=2, pp=4)
    assert piped.base_s(32, 0, 0, 0, 1.0) >= one.base_s(32, 0, 0, 0, 1.0)
    assert piped.kv_blocks() > one.kv_blocks()


def test_sequence_and_kv_parallelism_split_prompt_and_context():
    one, ringed, split = cost(), cost(sp=4), cost(kvp=4)
    assert ringed.per_pair_s(1.0) == pytest.approx(one.per_pair_s(1.0) / 4)
    assert ringed.base_s(0, 16384, 1, 0, 1.0) < 0.35 * one.base_s(0, 16384, 1, 0, 1.0)
    assert split.per_context_token_s(1.0) == pytest.approx(one.per_context_token_s(1.0) / 4)


def test_eight_bit_weights_halve_a_decode_that_reads_weights():
    full, half = cost("llama-3.1-70b", tp=4), cost("llama-3.1-70b", tp=4, precision="fp8")
    assert 0.45 < half.base_s(4, 0, 0, 0, 1.0) / full.base_s(4, 0, 0, 0, 1.0) < 0.75


def test_without_cuda_graphs_small_batches_wait_for_launches():
    graphs, eager = cost("llama-3.1-8b"), cost("llama-3.1-8b", cuda_graphs=False)
    small = cost("llama-3.1-70b", tp=8, cuda_graphs=False)
    assert (
        small.base_s(1, 0, 0, 0, 1.0)
        == pytest.approx(small.gpu.launch_s * small._plan.num_kernels, rel=0.05)
        or small.base_s(1, 0, 0, 0, 1.0) > small.gpu.launch_s * small._plan.num_kernels
    )
    assert eager.base_s(256, 4096, 1, 0, 1.0) == graphs.base_s(256, 4096, 1, 0, 1.0)


def test_kv_blocks_come_from_the_memory_that_is_left():
    blocks = cost().kv_blocks()
    assert 20_000 < blocks < 30_000  # 8B on one H100 with vLLM: about 27,000
    assert cost("llama-3.1-405b").kv_blocks() < 1


@pytest.mark.parametrize("kwargs", [{"tp": 0}, {"ep": 4, "tp": 2}, {"pp": 999}])
def test_impossible_degrees_are_refused(kwargs):
    with pytest.raises(ValueError, match=r"= \d"):
        cost(**kwargs)


def test_a_profile_without_source_or_with_an_unknown_key_is_refused(tmp_path):
    from importlib import resources

    text = (resources.files("emulators.profiles") / "h100-sxm.toml").read_text()
    odd = tmp_path / "odd.toml"
    odd.write_text(text + '\n[colour]\nvalue = 1.0\nsource = "x"\n')
    with pytest.raises(SpecError, match="colour"):
        load_gpu(str(odd))
    bare = tmp_path / "bare.toml"
    bare.write_text(
        text.replace('[idle_w]\nvalue = 120.0\nsource = "', '[idle_w]\nvalue = 120.0\nnote = "')
    )
    with pytest.raises(SpecError, match="idle_w"):
        load_gpu(str(bare))


def test_every_constant_has_source_and_date():
    from importlib import resources

    for name in available_gpus():
        tree = msgspec.toml.decode(
            (resources.files("emulators.profiles") / f"{name}.toml").read_bytes()
        )
        for key, entry in tree.items():
            if isinstance(entry, dict):
                assert entry["source"], (name, key)
                assert entry["date"], (name, key)
