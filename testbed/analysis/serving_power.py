"""Power of saturated serving: from configuration and rate to watts, with what is known pooled.

Two predictions are made for a row of measured serving.

*The emulator's own*: work per second, from the model card and the measured token rate, times
energy per unit of work (`emulators.power`). It knows nothing of the model but its shape.

*Pooled*: a Gaussian process (Rasmussen and Williams 2006, ch. 2) over the same work rates, with
effects for the model, for the model on a GPU and for the configuration. Kernels that an engine
chooses for a model differ in power by more than their work explains (experts above all), and
similar models use similar kernels. It says what can be known of a configuration from others; the
emulator does not use it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from emulators.models import load_model
from emulators.profiles import GpuProfile, load_gpu
from emulators.timing import IterationCost, Precision, Stack
from testbed.analysis.measured import Columns, card_for, keys, need, size

GPUS = {
    "H100": "h100-sxm",
    "B200": "b200-sxm",
    "NVIDIA A100-SXM4-40GB": "a100-40gb",
    "NVIDIA A100-SXM4-80GB": "a100-80gb",
    "NVIDIA H100 80GB HBM3": "h100-sxm",
}
PROMPT_TOKENS = {
    "lm-arena-chat": 120,
    "gpqa": 230,
    "sourcegraph-fim": 600,
    "image-chat": 60,
    "video-chat": 60,
}
"""Text tokens per request (assumed: the set does not state them)."""
_VIDEO_IMAGES = 4
_IMAGE_TASKS = ("image-chat", "video-chat")
_PRECISION: dict[str, Precision | None] = {"bfloat16": None, "fp8": "fp8", "mxfp4": None}

FEATURES = (
    "iteration_s", "batch", "tensor_frac", "hbm_frac", "kv_frac", "busy_frac", "num_gpus", "fp8",
    "images", "experts",
)  # fmt: skip
CONFIGURATION = ("model_id", "gpu_model", "task", "num_gpus", "tensor_parallel",
                 "expert_parallel", "data_parallel", "weight_precision")  # fmt: skip


def known(columns: Columns) -> Any:
    """Which rows have a model card and a GPU profile."""
    need(columns, ["model_id", "gpu_model"], "ml_energy_v3/llm_runs")
    cards = np.array([card_for(model) is not None for model in columns["model_id"]])
    gpus = np.array([gpu in GPUS for gpu in columns["gpu_model"]])
    return cards & gpus


def work(columns: Columns) -> Columns:
    """Work per second and GPU of each row, at the measured token rate.

    Returns:
        ``tensor_frac``, ``hbm_frac`` (over data-sheet peaks), ``decode_frac`` (decoded tokens x
        layers x hidden per second and 1e12, alike on each GPU of an instance), ``sample_frac``
        (decoded tokens x vocabulary per second and 1e12), ``kv_frac`` (the part of ``hbm_frac``
        that reads keys and values), ``busy_frac`` (kernel time over measured time),
        ``iteration_s`` (measured), ``kernel_s`` (predicted, of one iteration), and features of
        `Pool`.
    """
    out: dict[str, list[float]] = {}
    for row in range(size(columns)):
        one = _work_of({name: values[row] for name, values in columns.items()})
        for name, value in one.items():
            out.setdefault(name, []).append(value)
    return {name: np.array(values) for name, values in out.items()}


def _work_of(row: dict[str, Any]) -> dict[str, float]:
    model = load_model(card_for(row["model_id"]) or "")
    gpu = load_gpu(GPUS[row["gpu_model"]])
    plain = msgspec.structs.replace(gpu, decode_ops=0.0, sample_ops=0.0)
    num_gpus = int(row["num_gpus"])
    cost = _cost(row, plain)
    batch, rate = row["avg_batch_size"], row["output_throughput_tokens_per_sec"]
    prompt, tiles = _prompt(row)
    context = prompt + row["avg_output_len"] / 2
    iteration_s = batch / rate
    starts = rate / row["avg_output_len"] * iteration_s  # requests that begin per iteration
    seqs = max(1, round(batch))
    decode_s = cost.base_s(seqs, 0, 0, 0, 1.0) + batch * context * cost.per_context_token_s(1.0)
    pairs = 0.5 * prompt * prompt
    prefill_s = starts * (
        cost.base_s(seqs, prompt, 1, tiles, 1.0) - cost.base_s(seqs, 0, 0, 0, 1.0)
        + pairs * cost.per_pair_s(1.0)
    )  # fmt: skip
    flops = cost.base_flops(seqs, 0, 0, 0) + batch * context * cost.flops_per_context_token
    flops += starts * (cost.base_flops(0, prompt, 1, tiles) + pairs * cost.flops_per_pair)
    kv_bytes = batch * context * cost.bytes_per_context_token
    moved = cost.base_bytes(seqs, 0, 0, 0) + kv_bytes
    kernel_s = decode_s + prefill_s
    return {
        "iteration_s": iteration_s,
        "kernel_s": kernel_s,
        "tensor_frac": flops / iteration_s / gpu.peak_flops,
        "hbm_frac": moved / iteration_s / gpu.hbm_bytes_per_s,
        "kv_frac": kv_bytes / iteration_s / gpu.hbm_bytes_per_s,
        "decode_frac": rate * model.layers * model.hidden / 1e12,
        "sample_frac": rate * model.vocab / num_gpus / 1e12,
        "busy_frac": min(kernel_s / iteration_s, 1.5),
        "batch": batch / num_gpus,
        "num_gpus": float(num_gpus),
        "fp8": float(row.get("weight_precision", "") == "fp8"),
        "images": float(row.get("task", "") in _IMAGE_TASKS),
        "experts": float(model.experts > 1),
    }


def _cost(row: dict[str, Any], gpu: GpuProfile) -> IterationCost:
    num_gpus = int(row["num_gpus"])
    expert_parallel = row.get("expert_parallel", 1.0) > 1
    precision = _PRECISION.get(row.get("weight_precision", "bfloat16"))
    model = load_model(card_for(row["model_id"]) or "")
    return IterationCost(
        model, gpu, tp=num_gpus, ep=num_gpus if expert_parallel else 1, precision=precision,
        stack=Stack(0.0, 0.0),
    )  # fmt: skip


def _prompt(row: dict[str, Any]) -> tuple[int, int]:
    """Prompt tokens with those of images, and encoder tiles."""
    prompt = PROMPT_TOKENS.get(row.get("task", ""), 200)
    model = load_model(card_for(row["model_id"]) or "")
    if model.vision is None or row.get("task") not in _IMAGE_TASKS:
        return prompt, 0
    tiles = model.vision.tiles_per_image
    if row["task"] == "video-chat":
        tiles *= _VIDEO_IMAGES
    return prompt + tiles * model.vision.tokens_per_tile, tiles


# The emulator's formula.


class Watts(NamedTuple):
    """Constants of `formula_w`: watts per unit of the columns of `work`."""

    busy: float
    hbm: float
    decode: float
    sample: float


def formula_w(gpu: GpuProfile, watts: Watts, columns: Columns, busy: Any = 1.0) -> Any:
    """Watts of rows from their `work`, held under the power limit.

    Args:
        gpu: idle power, tensor power and limit.
        watts: constants.
        columns: of `work`.
        busy: share of time that the GPU is not waiting. Saturated rows keep it busy: where kernels
            take less than an iteration, what fills it is work that no card describes.
    """
    power = (
        gpu.idle_w
        + watts.busy * busy
        + gpu.tensor_w * columns["tensor_frac"]
        + watts.hbm * columns["hbm_frac"]
        + watts.decode * columns["decode_frac"]
        + watts.sample * columns["sample_frac"]
    )
    return soft_limit_w(power, gpu.power_limit_default_w)


def soft_limit_w(power_w: Any, limit_w: float) -> Any:
    """Mean power under a limit that bites on its peaks before it bites on its mean."""
    return (power_w**-12.0 + (0.99 * limit_w) ** -12.0) ** (-1.0 / 12.0)


def operations(gpu: GpuProfile, watts: float) -> float:
    """The profile's ``decode_ops`` or ``sample_ops`` that draw so many watts per unit."""
    return watts / gpu.tensor_w * gpu.peak_flops / 1e12


def watts_of(gpu: GpuProfile) -> Watts:
    """The constants that a profile states."""
    per_op = gpu.tensor_w / gpu.peak_flops * 1e12
    return Watts(gpu.busy_w, gpu.hbm_w, gpu.decode_ops * per_op, gpu.sample_ops * per_op)


# Pooling.


class Pooled(msgspec.Struct, frozen=True):
    """Hyperparameters, fitted by marginal likelihood on the shipped rows."""

    lengths: list[float]
    """Per feature, in standard deviations."""
    smooth: float
    linear: float
    model: float
    pair: float
    configuration: float
    noise: dict[str, float]
    """Per ``gpu_model``. All variances are shares of that of log power within a GPU model."""


class Pool:
    """Known rows, from which others are predicted.

    Args:
        columns: measured rows, in the layout of `ml_energy_v3`, all `known`.
        pooled: hyperparameters.
    """

    def __init__(self, columns: Columns, pooled: Pooled) -> None:
        self._pooled = pooled
        raw = _features(columns, work(columns))
        self._centre, self._spread = raw.mean(axis=0), raw.std(axis=0) + 1e-9
        self._x = (raw - self._centre) / self._spread
        self._labels = _labels(columns)
        power = columns["avg_power_watts"] / columns["num_gpus"]
        self._power_w = power
        self._gpu = columns["gpu_model"]
        log = np.log(power)
        self._mean = {gpu: float(log[self._gpu == gpu].mean()) for gpu in set(self._gpu)}
        self._y = log - np.array([self._mean[gpu] for gpu in self._gpu])
        self._scale = float(self._y.var())
        noise = np.array([pooled.noise.get(gpu, 0.02) for gpu in self._gpu])
        kernel = self._kernel(self._x, self._x, self._labels, self._labels)
        self._matrix = kernel + self._scale * np.diag(noise)

    def likelihood(self, pooled: Pooled) -> float:
        """Log marginal likelihood of the known rows under other hyperparameters."""
        self._pooled = pooled
        noise = np.array([pooled.noise[gpu] for gpu in self._gpu])
        matrix = self._kernel(self._x, self._x, self._labels, self._labels)
        matrix += self._scale * np.diag(noise)
        try:
            factor = np.linalg.cholesky(matrix)
        except np.linalg.LinAlgError:
            return -1e9
        whitened = np.linalg.solve(factor, self._y)
        return float(-0.5 * whitened @ whitened - np.log(np.diag(factor)).sum())

    def predict(self, columns: Columns, leave: str) -> Any:
        """Watts per GPU of these rows, without using what they belong to.

        Args:
            columns: rows to predict; they may be among the known.
            leave: "row", "configuration", "pair" (model on a GPU) or "model": what of the known
                rows is left out for each.
        """
        x = (_features(columns, work(columns)) - self._centre) / self._spread
        labels = _labels(columns)
        cross = self._kernel(x, self._x, labels, self._labels)
        if leave == "row":
            groups = np.arange(size(columns))
            power = columns["avg_power_watts"] / columns["num_gpus"]
        else:
            groups = labels[leave]
        out = np.zeros(size(columns))
        for group in np.unique(groups):
            rows = np.flatnonzero(groups == group)
            if leave == "row":
                same = self._labels["configuration"] == labels["configuration"][rows[0]]
                keep = ~(same & (np.abs(self._power_w / power[rows[0]] - 1.0) < 1e-6))
            else:
                keep = self._labels[leave] != group
            inner = self._matrix[np.ix_(keep, keep)]
            out[rows] = cross[np.ix_(rows, np.flatnonzero(keep))] @ np.linalg.solve(
                inner, self._y[keep]
            )
        fallback = float(np.mean(list(self._mean.values())))
        mean = np.array([self._mean.get(gpu, fallback) for gpu in columns["gpu_model"]])
        return np.exp(out + mean)

    def _kernel(self, a: Any, b: Any, la: dict[str, Any], lb: dict[str, Any]) -> Any:
        pooled = self._pooled
        gap = (a[:, None] - b[None]) / np.array(pooled.lengths)
        total = pooled.smooth * np.exp(-0.5 * (gap**2).sum(axis=-1))
        total += pooled.linear * (a @ b.T) / a.shape[1]
        for name, weight in (
            ("model", pooled.model), ("pair", pooled.pair),
            ("configuration", pooled.configuration),
        ):  # fmt: skip
            total += weight * (la[name][:, None] == lb[name][None])
        return self._scale * total


def _labels(columns: Columns) -> dict[str, Any]:
    cards = np.array([card_for(model) or "" for model in columns["model_id"]], dtype=object)
    pairs = np.array(
        [f"{card}|{gpu}" for card, gpu in zip(cards, columns["gpu_model"], strict=True)],
        dtype=object,
    )
    present = [name for name in CONFIGURATION if name in columns]
    return {"model": cards, "pair": pairs, "configuration": keys(columns, present)}


def _features(columns: Columns, rates: Columns) -> Any:
    h100 = (columns["gpu_model"] == "H100").astype(float)
    return np.column_stack(
        [
            np.log2(rates["iteration_s"] * 1e3),
            np.log2(rates["batch"]),
            np.log10(rates["tensor_frac"] + 1e-3),
            rates["hbm_frac"],
            rates["kv_frac"],
            rates["busy_frac"],
            np.log2(rates["num_gpus"]),
            rates["fp8"],
            rates["images"],
            rates["experts"],
            h100,
        ]
    )


def load_pool(folder: Path) -> Pool:
    """The pool of the rows that we ship."""
    from testbed.analysis.measured import find, take

    columns = find(folder / "ml_energy_v3", "llm_runs")
    assert columns is not None, "shipped data are part of the package"
    pooled = msgspec.json.decode((folder / "pooled.json").read_bytes(), type=Pooled)
    return Pool(take(columns, known(columns)), pooled)
