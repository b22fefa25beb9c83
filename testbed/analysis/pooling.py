"""What is known of measured serving, pooled: a Gaussian process over configurations.

Models of kernels and work leave a ratio, measured over computed, that belongs to what an engine
does with a model: which kernels it picks, how it overlaps them, how hot they run. A Gaussian
process (Rasmussen and Williams 2006, ch. 2) predicts the log of it from work rates and batch size,
with effects for the model, for the model on a GPU and for the configuration, the last with a course
over batch sizes. Its hyperparameters maximise the marginal likelihood; there is one such `Pool` for
power and one for the time between tokens.

A row is predicted from the rows that we ship, less those that it belongs to: the same *point*
(configuration and batch size), the same *configuration* (model, task, GPUs, precision) or the same
*pair* (model and GPU). A row that we never had shares its point with none, so it is predicted from
all we know.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np

from emulators.models import load_model
from emulators.profiles import load_gpu
from testbed.analysis import serving_power
from testbed.analysis.measured import Columns, card_for, keys, size

CONFIGURATION = ("model_id", "gpu_model", "task", "num_gpus", "tensor_parallel",
                 "expert_parallel", "data_parallel", "weight_precision")  # fmt: skip
Level = Literal["none", "point", "configuration", "pair", "model"]
_NOISE = 0.02
"""Variance share of GPUs that hyperparameters do not know."""


class Quantity(NamedTuple):
    """What a pool predicts."""

    measured: Callable[[Columns], Any]
    computed: Callable[[Columns], Any]
    """What logs are taken relative to."""
    features: Callable[[Columns], Any]
    """(row, feature) array; work rates are columns."""


class Pooled(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Hyperparameters, fitted by marginal likelihood on the shipped rows."""

    lengths: list[float]
    """Per feature, in standard deviations."""
    smooth: float
    linear: float
    model: float
    pair: float
    configuration: float
    course: float
    course_log2: float
    """Length over log2 of batch, of the configuration's own course."""
    noise: dict[str, float]
    """Per ``gpu_model``. All variances are shares of that of the logs within a GPU model."""


def power_w(columns: Columns) -> Any:
    """Measured watts per GPU."""
    return columns["avg_power_watts"] / columns["num_gpus"]


def gap_s(columns: Columns) -> Any:
    """Measured mean seconds from token to token."""
    return columns["avg_batch_size"] / columns["output_throughput_tokens_per_sec"]


def stack_gap_s(columns: Columns) -> Any:
    """The same as computed: kernels and the host of the profile."""
    hosts = [load_gpu(serving_power.GPUS[name]) for name in columns["gpu_model"]]
    iteration_s = np.array([gpu.host_iteration_s for gpu in hosts])
    seq_s = np.array([gpu.host_seq_s for gpu in hosts])
    return columns["kernel_s"] + iteration_s + seq_s * columns["avg_batch_size"]


def _ones(columns: Columns) -> Any:
    return np.ones(size(columns))


def _power_features(columns: Columns) -> Any:
    return np.column_stack(
        [
            np.log2(columns["iteration_s"] * 1e3),
            np.log2(columns["batch"]),
            np.log10(columns["tensor_frac"] + 1e-3),
            columns["hbm_frac"],
            columns["kv_frac"],
            columns["busy_frac"],
            *_kind(columns),
        ]
    )


def _gap_features(columns: Columns) -> Any:
    task = columns["task"].astype(str)
    return np.column_stack(
        [
            np.log2(columns["batch"]),
            np.log2(columns["avg_batch_size"]),
            np.log2(columns["kernel_s"] * 1e3),
            columns["kv_frac"] * columns["iteration_s"] / columns["kernel_s"],
            *((task == name).astype(float) for name in ("gpqa", "video-chat", "sourcegraph-fim")),
            *_kind(columns),
        ]
    )


def _kind(columns: Columns) -> list[Any]:
    """How it is served, and the shape of the model: like shapes use like kernels."""
    models = [load_model(card_for(name) or "") for name in columns["model_id"]]
    shapes = [(one.hidden, one.active_params, one.ffn, one.experts) for one in models]
    own = [columns[name] for name in ("fp8", "images", "experts")]
    hopper = (columns["gpu_model"] == "H100").astype(float)
    return [np.log2(columns["num_gpus"]), *own, hopper, *np.log2(np.array(shapes, float)).T]


QUANTITIES = {
    "power": Quantity(power_w, _ones, _power_features),
    "gap": Quantity(gap_s, stack_gap_s, _gap_features),
}
NUM_FEATURES = {"power": 15, "gap": 16}


class Pool:
    """Known rows, from which others are predicted.

    Args:
        columns: measured rows with their `serving_power.work`, in the layout of `ml_energy_v3`.
        pooled: hyperparameters.
        quantity: what of them.
    """

    def __init__(self, columns: Columns, pooled: Pooled, quantity: Quantity) -> None:
        self._quantity, self._pooled = quantity, pooled
        raw = quantity.features(columns)
        self._centre, self._spread = raw.mean(axis=0), raw.std(axis=0) + 1e-9
        self._x = (raw - self._centre) / self._spread
        self._labels, self._batch = labels(columns), _log2_batch(columns)
        self._gpu = columns["gpu_model"]
        log = np.log(quantity.measured(columns) / quantity.computed(columns))
        self._mean = {gpu: float(log[self._gpu == gpu].mean()) for gpu in set(self._gpu)}
        self._y = log - np.array([self._mean[gpu] for gpu in self._gpu])
        self._scale = float(self._y.var())
        self._inverse: Any = None

    def _matrix(self) -> Any:
        noise = np.array([self._pooled.noise.get(gpu, _NOISE) for gpu in self._gpu])
        kernel = self._kernel(self._x, self._labels, self._batch)
        return kernel + self._scale * np.diag(noise)

    def likelihood(self, pooled: Pooled) -> float:
        """Log marginal likelihood of the known rows under other hyperparameters."""
        self._pooled, self._inverse = pooled, None
        try:
            factor = np.linalg.cholesky(self._matrix())
        except np.linalg.LinAlgError:
            return -1e9
        whitened = np.linalg.solve(factor, self._y)
        return float(-0.5 * whitened @ whitened - np.log(np.diag(factor)).sum())

    def predict(self, columns: Columns, leave: Level) -> Any:
        """The quantity of rows, without using what they belong to.

        Args:
            columns: rows to predict, with their work; they may be among the known.
            leave: what of the known rows is left out for each.
        """
        if self._inverse is None:
            self._inverse = np.linalg.inv(self._matrix())
        inverse, weights = self._inverse, self._inverse @ self._y
        own = labels(columns)
        x = (self._quantity.features(columns) - self._centre) / self._spread
        cross = self._kernel(x, own, _log2_batch(columns))
        out = np.zeros(size(columns))
        for group in np.unique(own[leave]):
            rows = np.flatnonzero(own[leave] == group)
            away = np.flatnonzero((self._labels[leave] == group) & (leave != "none"))
            # Weights of the process that never saw these rows, by inversion in blocks.
            rest = weights - inverse[:, away] @ np.linalg.solve(
                inverse[np.ix_(away, away)], weights[away]
            )
            rest[away] = 0.0
            out[rows] = cross[rows] @ rest
        fallback = float(np.mean(list(self._mean.values())))
        mean = np.array([self._mean.get(gpu, fallback) for gpu in columns["gpu_model"]])
        return self._quantity.computed(columns) * np.exp(out + mean)

    def _kernel(self, x: Any, own: dict[str, Any], batch: Any) -> Any:
        """Covariance of rows (features, labels, log2 of batch) with the known ones."""
        pooled = self._pooled
        gap = (x[:, None] - self._x[None]) / np.array(pooled.lengths)
        total = pooled.smooth * np.exp(-0.5 * (gap**2).sum(axis=-1))
        total += pooled.linear * (x @ self._x.T) / x.shape[1]
        for name, weight in (("model", pooled.model), ("pair", pooled.pair)):
            total += weight * (own[name][:, None] == self._labels[name][None])
        same = own["configuration"][:, None] == self._labels["configuration"][None]
        apart = (batch[:, None] - self._batch[None]) / pooled.course_log2
        total += same * (pooled.configuration + pooled.course * np.exp(-0.5 * apart**2))
        return self._scale * total


def labels(columns: Columns) -> dict[str, Any]:
    """What each row belongs to, by `Level`."""
    cards = np.array([card_for(model) or "" for model in columns["model_id"]], dtype=object)
    pairs = [f"{card}|{gpu}" for card, gpu in zip(cards, columns["gpu_model"], strict=True)]
    configuration = keys(columns, [name for name in CONFIGURATION if name in columns])
    points = [
        f"{one}|{batch:.2f}"
        for one, batch in zip(configuration, _log2_batch(columns), strict=True)
    ]  # fmt: skip
    return {
        "none": np.full(size(columns), "", dtype=object),
        "model": cards,
        "pair": np.array(pairs, dtype=object),
        "configuration": configuration,
        "point": np.array(points, dtype=object),
    }


def _log2_batch(columns: Columns) -> Any:
    return np.log2(asked_batch(columns))


def asked_batch(columns: Columns) -> Any:
    """Sequences that the engine may run at once; those it ran where that is not stated."""
    ran = np.maximum(np.round(columns["avg_batch_size"]), 1.0)
    if "max_num_seqs" not in columns:
        return ran
    asked = columns["max_num_seqs"]
    return np.where(np.isfinite(asked), asked, ran)


def load_pool(folder: Path, name: str) -> Pool:
    """The pool of the rows that we ship, for ``power`` or ``gap``."""
    from testbed.analysis.measured import find, take

    columns = find(folder / "ml_energy_v3", "llm_runs")
    assert columns is not None, "shipped data are part of the package"
    columns = take(columns, serving_power.known(columns))
    rates = serving_power.work(columns)
    columns = {**columns, **{one: rates[one] for one in rates if one not in columns}}
    raw = (folder / "pooled.json").read_bytes()
    pooled = msgspec.json.decode(raw, type=dict[str, Pooled])
    return Pool(columns, pooled[name], QUANTITIES[name])
