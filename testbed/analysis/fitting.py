"""Fits the constants of GPU profiles on measured kernels, with cross-validation by configuration.

    python -m testbed.analysis.fitting --data DIR

rewrites the fitted tables of `emulators/profiles/*.toml` (value, source, date, error) and
`fidelity_data/folds.json`: the same constants fitted five times, each time without one fifth of the
configurations. Fidelity predicts a configuration with the constants that have not seen it.

Residuals are of log time, with a soft L1 loss: a row off by a factor two counts, but does not rule.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from scipy.optimize import least_squares

from emulators import kernels
from emulators.kernels import (
    Chip,
    DecodeAttention,
    Elementwise,
    Gemm,
    Moe,
    PrefillAttention,
    Reduce,
)
from emulators.profiles import load_gpu
from testbed.analysis.measured import FOLDS, Columns, find, fold_of, keys, size, take

_AIC = "gpu_kernels_aiconfigurator"
_VLLM = "vllm_kernel_profiles"
_SYSTEMS = {"a100-80gb": "a100_sxm", "h100-sxm": "h100_sxm", "h200-sxm": "h200_sxm"}
_CARDS = {"rtx-4090": "RTX4090", "rtx-pro-6000": "RTXPRO6000"}
VLLM_MODELS = {
    "Llama-3.1-8B": "llama-3.1-8b",
    "Qwen3-32B": "qwen3-32b",
    "Qwen3-30B-A3B-Instruct-2507": "qwen3-30b-a3b",
}
_ROWS = 6000
"""Rows that a fit uses at most; more change constants by less than 1 %."""


class Sample(NamedTuple):
    """Rows of one measured kernel on one GPU."""

    columns: Columns
    measured_s: Any
    configuration: Any
    """Configuration of each row: what cross-validation leaves out together."""

    def rows(self, which: Any) -> Sample:
        """Some of them."""
        return Sample(take(self.columns, which), self.measured_s[which], self.configuration[which])


class Kernel(NamedTuple):
    """One kind of kernel: how it is measured, predicted and fitted."""

    name: str
    """Of the constants in a profile."""
    kind: type[msgspec.Struct] | None
    """Struct of the constants; None for a single number."""
    load: Callable[[Path, str], Sample | None]
    """(data folder, GPU name) -> rows, or None where that GPU was not measured."""
    predict: Callable[[Any, Chip, Columns], Any]
    roofline: Callable[[Chip, Columns], Any]
    """Data-sheet time of the same rows, the naive alternative."""
    start: dict[str, float]
    low: dict[str, float]
    high: dict[str, float]
    fixed: Callable[[str], dict[str, Any]]
    source: str


# Samples.


def _aic(data: Path, gpu: str, *names: str) -> Columns | None:
    system = _SYSTEMS.get(gpu)
    if system is None:
        return None
    columns = find(data / _AIC, *names)
    if columns is None:
        return None
    return take(columns, columns["system"] == system)


def _vllm(data: Path, gpu: str, name: str) -> Columns | None:
    card = _CARDS.get(gpu)
    if card is None:
        return None
    columns = find(data / _VLLM, name)
    if columns is None:
        return None
    return take(columns, columns["gpu"] == card)


def _sample(columns: Columns | None, time: str, unit_s: float, config: list[str]) -> Sample | None:
    if columns is None or not size(columns):
        return None
    return Sample(columns, columns[time] * unit_s, keys(columns, config))


def _gemm(dtypes: tuple[str, ...]) -> Callable[[Path, str], Sample | None]:
    def load(data: Path, gpu: str) -> Sample | None:
        columns = _aic(data, gpu, "gemm")
        if columns is not None:
            # Where FP8 was measured with one scale per tensor, leave out scales per block.
            present = [dtype for dtype in dtypes if (columns["gemm_dtype"] == dtype).any()]
            if not present:
                return None
            wanted = (columns["gemm_dtype"] == present[0]) & (columns["m"] <= 20000)
            columns = take(columns, wanted)
            return _sample(columns, "latency_ms", 1e-3, ["n", "k"])
        if "bfloat16" not in dtypes:
            return None
        return dense_of_vllm(data, gpu)

    return load


def dense_of_vllm(data: Path, gpu: str) -> Sample | None:
    """Matrix products among the layers that were profiled inside vLLM, with their shapes."""
    from emulators.models import load_model

    columns = _vllm(data, gpu, "dense")
    if columns is None:
        return None
    count = size(columns)
    n, k = np.zeros(count), np.zeros(count)
    for row in range(count):
        card = load_model(VLLM_MODELS[columns["model"][row]])
        tp = columns["tp"][row]
        q_dim, kv_dim = card.heads * card.head_dim, card.kv_heads * card.head_dim
        shapes = {
            "qkv_proj": ((q_dim + 2 * kv_dim) / tp, card.hidden),
            "o_proj": (card.hidden, q_dim / tp),
        }
        if card.experts == 1:
            shapes["gate_up_proj"] = (2 * card.ffn / tp, card.hidden)
            shapes["down_proj"] = (card.hidden, card.ffn / tp)
        n[row], k[row] = shapes.get(columns["layer"][row], (0, 0))
    columns = {**columns, "m": columns["tokens"], "n": n, "k": k}
    # Matrices that fit into the cache are timed from there when a kernel is repeated, and from
    # memory when a model runs: leave them out.
    columns = take(columns, n * k * 2 > 24e6)
    return _sample(columns, "time_us", 1e-6, ["model", "tp"])


def _plain_attention(columns: Columns | None) -> Columns | None:
    if columns is None:
        return None
    window = columns.get("window_size")
    plain = columns["kv_cache_dtype"] == "bfloat16"
    if window is not None:
        plain &= ~(window > 0)
    return take(columns, plain)


_HEADS = ["num_heads", "num_key_value_heads", "head_dim"]


def _vllm_attention(data: Path, gpu: str, *, mixed: bool) -> Columns | None:
    from emulators.models import load_model

    columns = _vllm(data, gpu, "attention")
    if columns is None:
        return None
    columns = take(columns, (columns["prefill_chunk"] > 0) == mixed)
    cards = {name: load_model(VLLM_MODELS[name]) for name in set(columns["model"])}
    heads = np.array([cards[name].heads for name in columns["model"]], float) / columns["tp"]
    kv_heads = np.array([cards[name].kv_heads for name in columns["model"]], float)
    kv_heads = kv_heads / columns["tp"]
    return {
        **columns,
        "num_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": np.full(len(heads), 128.0),
    }


def _decode(data: Path, gpu: str) -> Sample | None:
    columns = _plain_attention(_aic(data, gpu, "generation_attention"))
    if columns is not None:
        columns = take(columns, columns["head_dim"] == 128)
        seqs, context = columns["batch_size"], columns["batch_size"] * (columns["step"] + 1)
        columns = {**columns, "seqs": seqs, "context": context}
        return _sample(columns, "latency_ms", 1e-3, _HEADS)
    columns = _vllm_attention(data, gpu, mixed=False)
    if columns is None:
        return None
    context = columns["n_decode"] * columns["kv_decode"]
    columns = {**columns, "seqs": columns["n_decode"], "context": context}
    return _sample(columns, "time_us", 1e-6, ["model", "tp"])


def _prefill(data: Path, gpu: str) -> Sample | None:
    columns = _plain_attention(_aic(data, gpu, "context_attention"))
    if columns is not None:
        columns = take(columns, columns["head_dim"] == 128)
        zero = np.zeros(size(columns))
        columns = {
            **columns, "tokens": columns["isl"], "before": zero, "seqs": zero, "context": zero,
            "prefills": columns["batch_size"],
        }  # fmt: skip
        return _sample(columns, "latency_ms", 1e-3, _HEADS)
    columns = _vllm_attention(data, gpu, mixed=True)
    if columns is None:
        return None
    columns = {
        **columns, "tokens": columns["prefill_chunk"], "before": columns["kv_prefill"],
        "seqs": columns["n_decode"], "context": columns["n_decode"] * columns["kv_decode"],
        "prefills": np.ones(size(columns)),
    }  # fmt: skip
    return _sample(columns, "time_us", 1e-6, ["model", "tp"])


def _encoder(data: Path, gpu: str) -> Sample | None:
    columns = _aic(data, gpu, "encoder_attention")
    if columns is not None:
        columns = take(columns, columns["isl"] >= 64)
    return _sample(columns, "latency_ms", 1e-3, ["num_heads", "head_dim"])


def _moe(dtypes: tuple[str, ...]) -> Callable[[Path, str], Sample | None]:
    def load(data: Path, gpu: str) -> Sample | None:
        columns = _aic(data, gpu, "moe")
        if columns is None:
            return _moe_of_vllm(data, gpu) if "bfloat16" in dtypes else None
        wanted = np.isin(columns["moe_dtype"].astype(str), dtypes)
        columns = take(columns, wanted & (columns["num_tokens"] <= 20000))
        shape = ["hidden_size", "inter_size", "topk", "num_experts"]
        return _sample(columns, "latency_ms", 1e-3, shape)

    return load


def _moe_of_vllm(data: Path, gpu: str) -> Sample | None:
    """Experts profiled inside vLLM, with the number that was woken."""
    from emulators.models import load_model

    columns = _vllm(data, gpu, "moe")
    if columns is None or not size(columns):
        return None
    cards = [load_model(VLLM_MODELS[name]) for name in columns["model"]]
    columns = {
        **columns,
        "num_tokens": columns["tokens"],
        "hidden_size": np.array([card.hidden for card in cards], float),
        "inter_size": np.array([card.ffn for card in cards], float),
        "num_experts": np.array([card.experts for card in cards], float),
        "topk": np.array([card.experts_active for card in cards], float),
        "moe_tp_size": columns["tp"],
        "moe_ep_size": np.ones(len(cards)),
    }
    return _sample(columns, "time_us", 1e-6, ["model", "tp", "activated_experts"])


def _reduce(data: Path, gpu: str) -> Sample | None:
    columns = _aic(data, gpu, "custom_allreduce")
    if columns is None:
        return None
    graph = (columns["backend"] == "vllm_graph") & (columns["message_size"] < 3e8)
    return _sample(take(columns, graph), "latency_ms", 1e-3, ["num_gpus"])


def _elementwise(data: Path, gpu: str) -> Sample | None:
    from emulators.models import load_model

    columns = _vllm(data, gpu, "dense")
    if columns is None:
        return None
    layers = {"layernorm": 8.0, "final_layernorm": 8.0}
    columns = take(columns, np.isin(columns["layer"].astype(str), list(layers)))
    hidden = np.array([load_model(VLLM_MODELS[name]).hidden for name in columns["model"]], float)
    columns = {**columns, "moved": 8.0 * hidden * columns["tokens"]}
    return _sample(columns, "time_us", 1e-6, ["model", "tp"])


# Predictions.


def _predict_gemm(speed: float, weight: float) -> Callable[[Any, Chip, Columns], Any]:
    def predict(gemm: Any, chip: Chip, c: Columns) -> Any:
        return kernels.gemm_s(gemm, chip, c["m"], c["n"], c["k"], weight_bytes=weight, speed=speed)

    return predict


def _roof_gemm(speed: float, weight: float) -> Callable[[Chip, Columns], Any]:
    def roofline(chip: Chip, c: Columns) -> Any:
        moved = weight * c["n"] * c["k"] + 2 * c["m"] * (c["n"] + c["k"])
        work = 2.0 * c["m"] * c["n"] * c["k"]
        return _roof(chip, work / speed, moved)

    return roofline


def _roof(chip: Chip, work: Any, moved: Any) -> Any:
    return np.maximum(work / chip.peak_flops, moved / chip.hbm_bytes_per_s)


def _predict_decode(kernel: Any, chip: Chip, c: Columns) -> Any:
    kv_bytes = 4.0 * c["num_key_value_heads"] * c["head_dim"]
    return kernels.decode_attention_s(
        kernel, chip, c["seqs"], c["context"], c["num_key_value_heads"], kv_bytes
    )


def _roof_decode(chip: Chip, c: Columns) -> Any:
    moved = 4.0 * c["num_key_value_heads"] * c["head_dim"] * c["context"]
    work = 4.0 * c["num_heads"] * c["head_dim"] * c["context"]
    return _roof(chip, work, moved)


def _predict_prefill(kernel: Any, chip: Chip, c: Columns) -> Any:
    return kernels.prefill_attention_s(
        kernel, DecodeAttention(0.0, 0.0, 0.85), chip, c["tokens"], c["before"], c["seqs"],
        c["context"], c["num_heads"], c["num_key_value_heads"], c["head_dim"],
        num_prefills=c["prefills"],
    )  # fmt: skip


def _roof_prefill(chip: Chip, c: Columns) -> Any:
    pairs = c["prefills"] * c["tokens"] * (c["before"] + 0.5 * (c["tokens"] + 1)) + c["context"]
    work = 4.0 * c["num_heads"] * c["head_dim"] * pairs
    moved = c["prefills"] * c["tokens"] * c["head_dim"] * 4.0
    moved = moved * (c["num_heads"] + c["num_key_value_heads"])
    moved = moved + 4.0 * c["num_key_value_heads"] * c["head_dim"] * c["context"]
    return _roof(chip, work, moved)


class Encoder(msgspec.Struct, frozen=True):
    """The two constants of encoder attention."""

    start_s: float
    peak_frac: float


def _predict_encoder(kernel: Any, chip: Chip, c: Columns) -> Any:
    return kernels.encoder_attention_s(
        kernel.peak_frac, kernel.start_s, chip, c["batch_size"], c["isl"], c["num_heads"],
        c["head_dim"],
    )  # fmt: skip


def _roof_encoder(chip: Chip, c: Columns) -> Any:
    work = 4.0 * c["batch_size"] * c["isl"] ** 2 * c["num_heads"] * c["head_dim"]
    moved = 8.0 * c["batch_size"] * c["isl"] * c["num_heads"] * c["head_dim"]
    return _roof(chip, work, moved)


def _predict_moe(speed: float, weight: float) -> Callable[[Any, Chip, Columns], Any]:
    def predict(moe: Any, chip: Chip, c: Columns) -> Any:
        return kernels.moe_s(
            moe, chip, c["num_tokens"], c["hidden_size"], c["inter_size"], c["num_experts"],
            c["topk"], tp=c["moe_tp_size"], ep=c["moe_ep_size"], weight_bytes=weight, speed=speed,
            woken=c.get("activated_experts"),
        )  # fmt: skip

    return predict


def _roof_moe(speed: float, weight: float) -> Callable[[Chip, Columns], Any]:
    def roofline(chip: Chip, c: Columns) -> Any:
        one = 3.0 * c["hidden_size"] * c["inter_size"] / c["moe_tp_size"]
        routed = c["num_tokens"] * c["topk"] / c["moe_ep_size"]
        awake = np.minimum(routed, c["num_experts"] / c["moe_ep_size"])
        awake = c.get("activated_experts", awake)
        return _roof(chip, 2.0 * one * routed / speed, one * weight * awake)

    return roofline


def _predict_reduce(kernel: Any, chip: Chip, c: Columns) -> Any:
    return kernels.reduce_s(kernel, c["message_size"], c["num_gpus"])


def _roof_reduce(chip: Chip, c: Columns) -> Any:
    ring = 2.0 * (c["num_gpus"] - 1) / c["num_gpus"] * c["message_size"]
    return ring / (chip.hbm_bytes_per_s / 7.0)  # NVLink is about a seventh of memory bandwidth


def _predict_elementwise(kernel: Any, chip: Chip, c: Columns) -> Any:
    return kernels.elementwise_s(kernel, chip, c["moved"])


def _roof_elementwise(chip: Chip, c: Columns) -> Any:
    return c["moved"] / chip.hbm_bytes_per_s


_GEMM_START = {
    "start_s": 4e-6, "bandwidth_frac": 0.85, "peak_frac": 0.8, "overlap": 3.0, "wave": 0.1,
}  # fmt: skip
_GEMM_LOW = {
    "start_s": 5e-7, "bandwidth_frac": 0.3, "peak_frac": 0.2, "overlap": 1.0, "wave": 1e-3,
}  # fmt: skip
_GEMM_HIGH = {
    "start_s": 3e-5, "bandwidth_frac": 1.1, "peak_frac": 1.0, "overlap": 12.0, "wave": 2.0,
}  # fmt: skip
_MOE_START = {
    "start_s": 2e-5, "bandwidth_frac": 0.7, "peak_frac": 0.5, "overlap": 2.0, "pad_rows": 16.0,
    "spread": 0.8, "traffic": 1.0, "hot": 0.1,
}  # fmt: skip
_MOE_LOW = {
    "start_s": 1e-6, "bandwidth_frac": 0.2, "peak_frac": 0.1, "overlap": 1.0, "pad_rows": 0.1,
    "spread": 0.05, "traffic": 0.01, "hot": 0.001,
}  # fmt: skip
_MOE_HIGH = {
    "start_s": 2e-4, "bandwidth_frac": 1.2, "peak_frac": 1.0, "overlap": 12.0, "pad_rows": 128.0,
    "spread": 1.5, "traffic": 20.0, "hot": 0.6,
}  # fmt: skip


def _nothing(gpu: str) -> dict[str, Any]:
    return {}


def _tile(gpu: str) -> dict[str, Any]:
    """FlashAttention-3 runs on Hopper (and a kin of it on Blackwell servers), else version 2."""
    packs = load_gpu(gpu).architecture == 9 or gpu.startswith("b200")
    return {"rows": 128.0 if packs else 64.0, "packs_groups": packs}


def _routing(gpu: str) -> dict[str, Any]:
    """How tokens spread over experts was measured on servers only."""
    if gpu not in _CARDS:
        return {}
    moe = load_gpu("h100-sxm").moe_bf16
    return {"spread": moe.spread, "hot": moe.hot}


_SET = "aiconfigurator kernels (ai-dynamo/aiconfigurator 095f58a, Apache-2.0)"
_OWN = "vLLM 0.19 kernel profiles (casys-kaist/LLMServingSim 5daddb2, MIT)"

KERNELS = [
    Kernel("gemm_bf16", Gemm, _gemm(("bfloat16",)), _predict_gemm(1.0, 2.0), _roof_gemm(1.0, 2.0),
           _GEMM_START, _GEMM_LOW, _GEMM_HIGH, _nothing, _SET),
    Kernel("gemm_fp8", Gemm, _gemm(("fp8", "fp8_block")), _predict_gemm(2.0, 1.0),
           _roof_gemm(2.0, 1.0), _GEMM_START, _GEMM_LOW, _GEMM_HIGH, _nothing, _SET),
    Kernel("decode_attention", DecodeAttention, _decode, _predict_decode, _roof_decode,
           {"start_s": 8e-6, "seq_s": 1e-8, "bandwidth_frac": 0.85},
           {"start_s": 1e-6, "seq_s": 1e-11, "bandwidth_frac": 0.2},
           {"start_s": 5e-5, "seq_s": 1e-6, "bandwidth_frac": 1.2}, _nothing, _SET),
    Kernel("prefill_attention", PrefillAttention, _prefill, _predict_prefill, _roof_prefill,
           {"start_s": 8e-6, "block_s": 2e-6, "peak_frac": 0.5, "tail": 0.5},
           {"start_s": 1e-6, "block_s": 1e-9, "peak_frac": 0.1, "tail": 1e-3},
           {"start_s": 5e-5, "block_s": 2e-5, "peak_frac": 1.0, "tail": 3.0}, _tile, _SET),
    Kernel("encoder_attention", Encoder, _encoder, _predict_encoder, _roof_encoder,
           {"start_s": 8e-6, "peak_frac": 0.5}, {"start_s": 1e-6, "peak_frac": 0.05},
           {"start_s": 1e-4, "peak_frac": 1.0}, _nothing, _SET),
    Kernel("moe_bf16", Moe, _moe(("bfloat16",)), _predict_moe(1.0, 2.0), _roof_moe(1.0, 2.0),
           _MOE_START, _MOE_LOW, _MOE_HIGH, _routing, _SET),
    Kernel("moe_fp8", Moe, _moe(("fp8", "fp8_block")), _predict_moe(2.0, 1.0), _roof_moe(2.0, 1.0),
           _MOE_START, _MOE_LOW, _MOE_HIGH, _nothing, _SET),
    Kernel("reduce", Reduce, _reduce, _predict_reduce, _roof_reduce,
           {"start_s": 4e-6, "hop_s": 2e-7, "sync_s": 2e-6, "bytes_per_s": 2e11},
           {"start_s": 1e-6, "hop_s": 1e-9, "sync_s": 1e-9, "bytes_per_s": 1e10},
           {"start_s": 3e-5, "hop_s": 1e-5, "sync_s": 3e-5, "bytes_per_s": 1e12}, _nothing, _SET),
    Kernel("elementwise", Elementwise, _elementwise, _predict_elementwise, _roof_elementwise,
           {"start_s": 2e-6, "bandwidth_frac": 0.7}, {"start_s": 2e-7, "bandwidth_frac": 0.05},
           {"start_s": 2e-5, "bandwidth_frac": 4.0}, _nothing, _OWN),
]  # fmt: skip


# Fitting.


def fit(kernel: Kernel, gpu: str, sample: Sample, *, seed: int = 0) -> Any:
    """Constants that explain these rows best.

    Returns:
        An instance of ``kernel.kind``.
    """
    count = len(sample.measured_s)
    if count > _ROWS:
        chosen = np.random.default_rng(seed).choice(count, _ROWS, replace=False)
        sample = sample.rows(np.sort(chosen))
    fixed = kernel.fixed(gpu)
    chip = load_gpu(gpu).chip
    assert kernel.kind is not None
    names = [name for name in kernel.kind.__struct_fields__ if name not in fixed]

    def made(logs: Any) -> Any:
        values = dict(zip(names, np.exp(logs).tolist(), strict=True))
        return kernel.kind(**values, **fixed) if kernel.kind else None

    def residuals(logs: Any) -> Any:
        return np.log(kernel.predict(made(logs), chip, sample.columns) / sample.measured_s)

    bounds = [np.log([table[name] for name in names]) for table in (kernel.low, kernel.high)]
    start = np.log([kernel.start[name] for name in names])
    best = least_squares(residuals, start, bounds=bounds, loss="soft_l1", f_scale=0.1)
    return made(best.x)


def fit_folds(kernel: Kernel, gpu: str, sample: Sample) -> tuple[Any, list[Any]]:
    """Constants from all rows, and for each fold from the rows of the other folds."""
    whole = fit(kernel, gpu, sample)
    folds = fold_of(sample.configuration)
    parts = []
    for fold in range(FOLDS):
        rest = folds != fold
        parts.append(fit(kernel, gpu, sample.rows(rest)) if rest.sum() > 20 else whole)
    return whole, parts


def predict_out(kernel: Kernel, gpu: str, sample: Sample, parts: list[Any]) -> Any:
    """Each row with the constants that have not seen its configuration, seconds."""
    chip = load_gpu(gpu).chip
    folds = fold_of(sample.configuration)
    predicted = np.zeros(len(sample.measured_s))
    for fold in np.unique(folds):
        rows = folds == fold
        predicted[rows] = kernel.predict(parts[fold], chip, take(sample.columns, rows))
    return predicted


def error_text(predicted: Any, measured: Any) -> str:
    """Median, mean and 90th percentile of absolute percentage error, as profiles state it."""
    ape = np.abs(predicted / measured - 1.0)
    return (
        f"cross-validated by configuration, {len(ape)} rows: "
        f"APE median {np.median(ape):.1%}, mean {ape.mean():.1%}, p90 {np.quantile(ape, 0.9):.1%}"
    )


# Writing profiles.

_TABLE = r"(?ms)^\[{name}\]\n.*?(?=^\[|\Z)"


def set_constant(path: Path, name: str, value: Any, source: str, date: str, error: str) -> None:
    """Replace one table of a profile."""
    text = path.read_text(encoding="utf-8")
    table = (
        f"[{name}]\nvalue = {_toml(value)}\nsource = {json.dumps(source)}\n"
        f"date = {json.dumps(date)}\n"
    )
    if error:
        table += f"error = {json.dumps(error)}\n"
    table += "\n"
    pattern = re.compile(_TABLE.format(name=re.escape(name)))
    if not pattern.search(text):
        raise ValueError(f"{path.name} has no table {name}")
    text = pattern.sub(lambda _: table, text)
    path.write_text(text.rstrip() + "\n", encoding="utf-8")


def _toml(value: Any) -> str:
    if isinstance(value, msgspec.Struct):
        value = msgspec.structs.asdict(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(one)}" for key, one in value.items()) + " }"
    return repr(float(f"{value:.5g}"))


_HEIRS = {"a100-80gb": ["a100-40gb"], "h200-sxm": ["b200-sxm"]}
_MOE_HEIRS = {"rtx-pro-6000": ["rtx-4090"]}
"""GPUs whose kernels were not measured, and the ones they take constants from."""
_FP8_HEIRS = {"h100-sxm": ["h200-sxm", "b200-sxm"], "h200-sxm": []}
"""H200 was measured with scales per block only, in kernels that take 75 us from 32 to 512 tokens
whatever their number. Serving does not show that, so its FP8 products are taken from H100."""


def fit_kernels(data: Path, profiles: Path, date: str) -> dict[str, Any]:
    """Fit every kernel on every GPU that was measured; write profiles; return the folds."""
    out: dict[str, Any] = {}
    for kernel in KERNELS:
        for gpu in [*_SYSTEMS, *_CARDS]:
            sample = kernel.load(data, gpu)
            if sample is None or len(sample.measured_s) < 20:
                continue
            whole, parts = fit_folds(kernel, gpu, sample)
            predicted = predict_out(kernel, gpu, sample, parts)
            error = error_text(predicted, sample.measured_s)
            print(f"{gpu:14s} {kernel.name:18s} {error}", flush=True)
            out[f"{gpu}/{kernel.name}"] = [msgspec.to_builtins(part) for part in parts]
            source = kernel.source if gpu in _SYSTEMS else _OWN
            heirs = [gpu, *_HEIRS.get(gpu, [])]
            if kernel.name == "moe_bf16":
                heirs += _MOE_HEIRS.get(gpu, [])
            if kernel.name == "gemm_fp8":
                heirs = _FP8_HEIRS[gpu]
                heirs = [gpu, *heirs] if heirs else []
            for heir in heirs:
                if heir == "b200-sxm" and kernel.name == "reduce":
                    continue  # NVLink 5 is another network
                note = source if heir == gpu else f"as on {gpu}: not measured here; {source}"
                name, value = kernel.name, whole
                if name == "encoder_attention":
                    name, value = "encoder_peak_frac", whole.peak_frac
                set_constant(
                    profiles / f"{heir}.toml", name, value, note, date, error if heir == gpu else ""
                )
    return out


def main() -> None:
    """Fit and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--date", required=True, help="to write beside the constants")
    arguments = parser.parse_args()
    root = Path(__file__).resolve().parents[2]
    folds = fit_kernels(arguments.data, root / "emulators" / "profiles", arguments.date)
    path = Path(__file__).parent / "fidelity_data" / "folds.json"
    path.parent.mkdir(exist_ok=True)
    if path.is_file():  # what `fitting_serving` adds stays
        folds = {**json.loads(path.read_text()), **folds}
    path.write_text(json.dumps(rounded(folds), indent=0, sort_keys=True) + "\n")


def rounded(tree: Any) -> Any:
    """The same tree with numbers of six digits."""
    if isinstance(tree, dict):
        return {key: rounded(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [rounded(value) for value in tree]
    if isinstance(tree, float):
        return float(f"{tree:.6g}")
    return tree


if __name__ == "__main__":
    main()
