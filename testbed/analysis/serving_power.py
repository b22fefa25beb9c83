"""Work and power of saturated serving: from configuration and rate to watts.

The emulator's own prediction: work per second, from the model card and the measured token rate,
times energy per unit of work (`emulators.power`). It knows nothing of the model but its shape. What
models show beyond that is pooled by `testbed.analysis.pooling`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from emulators.corrections import steady_state
from emulators.models import load_model
from emulators.profiles import GpuProfile, load_gpu
from emulators.timing import IterationCost, Precision, Stack
from testbed.analysis.measured import Columns, card_for, find, keys, need, size, take
from testbed.analysis.pooling import Pool, Pooled, Rows

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
_PROMPT_TOKENS = 120
"""The same for tasks of other sets."""
_VIDEO_IMAGES = 4
IMAGE_TASKS = ("image-chat", "video-chat")
PRECISION: dict[str, Precision | None] = {"bfloat16": None, "fp8": "fp8", "mxfp4": None}


_NEEDED = ["model_id", "gpu_model", "num_gpus", "avg_batch_size", "avg_output_len",
           "output_throughput_tokens_per_sec", "avg_power_watts"]  # fmt: skip


def known(columns: Columns) -> Any:
    """Which rows have a model card, a GPU profile and what they need measured."""
    need(columns, [*_NEEDED, "task"], "ml_energy_v3/llm_runs")
    usable = np.array([card_for(str(model)) is not None for model in columns["model_id"]], bool)
    usable &= np.array([gpu in GPUS for gpu in columns["gpu_model"]], bool)
    for name in _NEEDED[2:]:
        usable &= np.isfinite(columns[name]) & (columns[name] > 0)
    return usable


def work(columns: Columns) -> Columns:
    """Work per second and GPU of each row, at the measured token rate.

    Returns:
        ``tensor_frac``, ``hbm_frac`` (over data-sheet peaks), ``decode_frac`` (decoded tokens x
        layers x hidden per second and 1e12, alike on each GPU of an instance), ``sample_frac``
        (decoded tokens x vocabulary per second and 1e12), ``kv_frac`` (the part of ``hbm_frac``
        that reads keys and values), ``busy_frac`` (kernel time over measured time),
        ``iteration_s`` (measured), ``kernel_s`` (predicted, of one iteration), and what
        `testbed.analysis.pooling` needs.
    """
    out: dict[str, list[float]] = {}
    for row in range(size(columns)):
        one = work_of({name: values[row] for name, values in columns.items()})
        for name, value in one.items():
            out.setdefault(name, []).append(value)
    return {name: np.array(values) for name, values in out.items()}


def work_of(row: dict[str, Any]) -> dict[str, float]:
    """`work` of one row."""
    model = load_model(card_for(row["model_id"]) or "")
    gpu = load_gpu(GPUS[row["gpu_model"]])
    plain = msgspec.structs.replace(gpu, decode_ops=0.0, sample_ops=0.0)
    num_gpus = int(row["num_gpus"])
    cost = cost_of(row, plain)
    batch, rate = row["avg_batch_size"], row["output_throughput_tokens_per_sec"]
    prompt, tiles = prompt_of(row)
    output = row["avg_output_len"]
    iteration_s = batch / rate
    kernel_s, flops, moved = steady_state(cost, batch, prompt, output, tiles)
    kv_bytes = batch * (prompt + output / 2) * cost.bytes_per_context_token
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
        "images": float(row.get("task", "") in IMAGE_TASKS),
        "experts": float(model.experts > 1),
    }


def cost_of(row: dict[str, Any], gpu: GpuProfile | None = None) -> IterationCost:
    """Cost of a row's kernels alone."""
    gpu = gpu or load_gpu(GPUS[row["gpu_model"]])
    num_gpus = int(row["num_gpus"])
    expert_parallel = row.get("expert_parallel", 1.0) > 1
    precision = PRECISION.get(row.get("weight_precision", "bfloat16"))
    model = load_model(card_for(row["model_id"]) or "")
    return IterationCost(
        model, gpu, tp=num_gpus, ep=num_gpus if expert_parallel else 1, precision=precision,
        stack=Stack(0.0, 0.0),
    )  # fmt: skip


def prompt_of(row: dict[str, Any]) -> tuple[int, int]:
    """Prompt tokens with those of images, and encoder tiles."""
    prompt = PROMPT_TOKENS.get(row.get("task", ""), _PROMPT_TOKENS)
    model = load_model(card_for(row["model_id"]) or "")
    if model.vision is None or row.get("task") not in IMAGE_TASKS:
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


# Pooling what work does not explain (`testbed.analysis.pooling`).

CONFIGURATION = ("model_id", "gpu_model", "task", "num_gpus", "tensor_parallel",
                 "expert_parallel", "data_parallel", "weight_precision")  # fmt: skip
EFFECTS, COURSES = ["model", "pair", "configuration"], ["configuration"]


class Quantity(NamedTuple):
    """What is pooled."""

    measured: Callable[[Columns], Any]
    computed: Callable[[Columns], Any]
    """What logs are taken relative to."""
    features: Callable[[Columns], list[Any]]
    """Beside those of `_kind`."""

    def logs(self, columns: Columns) -> Any:
        """Log of measured over computed."""
        return np.log(self.measured(columns) / self.computed(columns))

    def rows(self, columns: Columns) -> Rows:
        """Rows as a `Pool` wants them."""
        asked = np.log2(asked_batch(columns))
        features = np.column_stack([*self.features(columns), *_kind(columns)])
        return Rows(features, _labels(columns, asked), asked[:, None])

    def predict(self, pool: Pool, columns: Columns, leave: str = "") -> Any:
        """The quantity itself, in its unit."""
        return self.computed(columns) * np.exp(pool.predict(self.rows(columns), leave))


def power_w(columns: Columns) -> Any:
    """Measured watts per GPU."""
    return columns["avg_power_watts"] / columns["num_gpus"]


def idle_formula_w(columns: Columns) -> Any:
    """Watts by the profile's constants, with GPUs busy for the time of their kernels."""
    out = np.zeros(size(columns))
    for label in set(columns["gpu_model"]):
        own = columns["gpu_model"] == label
        gpu, rates = load_gpu(GPUS[label]), take(columns, own)
        busy = np.minimum(1.0, rates["busy_frac"])
        out[own] = formula_w(gpu, watts_of(gpu), rates, busy)
    return out


def gap_s(columns: Columns) -> Any:
    """Measured mean seconds from token to token."""
    return columns["avg_batch_size"] / columns["output_throughput_tokens_per_sec"]


def stack_gap_s(columns: Columns) -> Any:
    """The same as computed: kernels and the host of the profile."""
    hosts = [load_gpu(GPUS[name]) for name in columns["gpu_model"]]
    iteration_s = np.array([gpu.host_iteration_s for gpu in hosts])
    seq_s = np.array([gpu.host_seq_s for gpu in hosts])
    return columns["kernel_s"] + iteration_s + seq_s * columns["avg_batch_size"]


def _power_features(columns: Columns) -> list[Any]:
    return [
        np.log2(columns["iteration_s"] * 1e3), np.log2(columns["batch"]),
        np.log10(columns["tensor_frac"] + 1e-3), columns["hbm_frac"], columns["kv_frac"],
        columns["busy_frac"],
    ]  # fmt: skip


def _gap_features(columns: Columns) -> list[Any]:
    task = columns["task"].astype(str)
    tasks = [(task == name).astype(float) for name in ("gpqa", "video-chat", "sourcegraph-fim")]
    reading = columns["kv_frac"] * columns["iteration_s"] / columns["kernel_s"]
    batch = columns["avg_batch_size"]
    return [
        np.log2(columns["batch"]), np.log2(batch), np.log2(columns["kernel_s"] * 1e3), reading,
        *tasks,
    ]  # fmt: skip


def _kind(columns: Columns) -> list[Any]:
    """How it is served, and the shape of the model: like shapes use like kernels."""
    models = [load_model(card_for(name) or "") for name in columns["model_id"]]
    shapes = [(one.hidden, one.active_params, one.ffn, one.experts) for one in models]
    own = [columns[name] for name in ("fp8", "images", "experts")]
    hopper = np.array(["H100" in name for name in columns["gpu_model"]], float)
    return [np.log2(columns["num_gpus"]), *own, hopper, *np.log2(np.array(shapes, float)).T]


def _labels(columns: Columns, asked: Any) -> dict[str, Any]:
    """What each row belongs to: a point is a configuration at one batch size."""
    gpu = columns["gpu_model"]
    cards = np.array([card_for(model) or "" for model in columns["model_id"]], dtype=object)
    configuration = keys(columns, [name for name in CONFIGURATION if name in columns])
    return {
        "gpu": gpu,
        "model": cards,
        "pair": _joined(cards, gpu),
        "configuration": configuration,
        "point": _joined(configuration, np.round(asked, 2)),
    }


def _joined(first: Any, second: Any) -> Any:
    return np.array([f"{a}|{b}" for a, b in zip(first, second, strict=True)], dtype=object)


def asked_batch(columns: Columns) -> Any:
    """Sequences that the engine may run at once; those it ran where that is not stated."""
    ran = np.maximum(np.round(columns["avg_batch_size"]), 1.0)
    if "max_num_seqs" not in columns:
        return ran
    asked = columns["max_num_seqs"]
    return np.where(np.isfinite(asked), asked, ran)


QUANTITIES = {
    "power": Quantity(power_w, lambda columns: np.ones(size(columns)), _power_features),
    "gap": Quantity(gap_s, stack_gap_s, _gap_features),
}
OLDER = Quantity(power_w, idle_formula_w, _power_features)
"""Power of the engine of `ml_energy_v2`, which leaves GPUs waiting."""


def energy_rows(data: Path) -> Columns | None:
    """Rows of `ml_energy_v3` that are known, with their `work`."""
    columns = find(data / "ml_energy_v3", "llm_runs")
    if columns is None:
        return None
    columns = take(columns, known(columns))
    if not size(columns):
        return None
    rates = work(columns)
    return {**columns, **{name: rates[name] for name in rates if name not in columns}}


_OLDER = ["Model", "GPU", "task", "TP", "Energy/req (J)", "Token tput (tok/s)",
          "Avg Output Tokens", "Avg BS (reqs)"]  # fmt: skip


def older_rows(data: Path) -> Columns | None:
    """Rows of `ml_energy_v2` as columns of `ml_energy_v3`, with their `work`."""
    columns = find(data / "ml_energy_v2", "text_generation_runs")
    if columns is None:
        return None
    need(columns, _OLDER, "ml_energy_v2/text_generation_runs")
    gpus = columns["TP"] * np.nan_to_num(columns.get("PP", np.ones(size(columns))), nan=1.0)
    rate, output = columns["Token tput (tok/s)"], columns["Avg Output Tokens"]
    batch = columns["Avg BS (reqs)"]
    columns = {
        "model_id": columns["Model"], "gpu_model": columns["GPU"], "task": columns["task"],
        "num_gpus": gpus, "avg_batch_size": batch, "avg_output_len": output,
        "max_num_seqs": columns.get("Max BS (reqs)", batch),
        "output_throughput_tokens_per_sec": rate,
        "avg_power_watts": columns["Energy/req (J)"] * rate / output,
    }  # fmt: skip
    columns = take(columns, known(columns))
    if not size(columns):
        return None
    rates = work(columns)
    return {**columns, **{name: rates[name] for name in rates if name not in columns}}


def pools(folder: Path) -> dict[str, Pool]:
    """`Pool` per quantity, of the rows that we ship."""
    columns = energy_rows(folder)
    assert columns is not None, "shipped data are part of the package"
    pooled = msgspec.json.decode((folder / "pooled.json").read_bytes(), type=dict[str, Pooled])
    return {
        name: Pool(one.rows(columns), one.logs(columns), pooled[name])
        for name, one in QUANTITIES.items()
    }


def older_pool(folder: Path) -> Pool:
    """The same for the power of `ml_energy_v2`."""
    columns = older_rows(folder)
    assert columns is not None, "shipped data are part of the package"
    pooled = msgspec.json.decode((folder / "pooled.json").read_bytes(), type=dict[str, Pooled])
    return Pool(OLDER.rows(columns), OLDER.logs(columns), pooled["power_v2"])
