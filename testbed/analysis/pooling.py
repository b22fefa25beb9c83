"""What is known of measured serving, pooled: a Gaussian process over configurations.

Models of kernels, queues and work leave a ratio, measured over computed, that belongs to what an
engine does with a model: which kernels it picks, how it overlaps them, how hot they run. A Gaussian
process (Rasmussen and Williams 2006, ch. 2) predicts the log of it from features of a row, with
effects for what the row belongs to (its model, its configuration and so on), some of them with a
course over batch size and lengths. Its hyperparameters maximise the marginal likelihood of the rows
that we ship.

A row is predicted from the rows that we ship, less those that it belongs to: the same *point*
(configuration, batch size and lengths), the same *configuration* or the same *family*. A row that
we never had shares its point with none, so it is predicted from all we know.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec
import numpy as np
from scipy.optimize import minimize

_NOISE = 0.02
"""Variance share of GPUs that hyperparameters do not know."""


class Rows(NamedTuple):
    """What is to be known of some rows."""

    features: Any
    """(row, feature)."""
    labels: dict[str, Any]
    """Name of a level -> what each row belongs to; ``gpu`` among them."""
    course: Any
    """(row, coordinate): log2 of batch and lengths, over which effects may change."""

    def take(self, which: Any) -> Rows:
        """Some of them."""
        labels = {name: values[which] for name, values in self.labels.items()}
        return Rows(self.features[which], labels, self.course[which])


class Pooled(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Hyperparameters. Variances are shares of that of the logs within a GPU."""

    lengths: list[float]
    """Per feature, in standard deviations."""
    smooth: float
    linear: float
    effects: dict[str, float]
    """Per level."""
    courses: dict[str, float]
    """Per level, of what changes over batch size and lengths."""
    course_lengths: list[float]
    """Per coordinate of the course, in powers of two."""
    noise: dict[str, float]
    """Per GPU."""


class Pool:
    """Known rows, from which others are predicted.

    Args:
        rows: the known ones.
        logs: log of measured over computed of each.
        pooled: hyperparameters.
    """

    def __init__(self, rows: Rows, logs: Any, pooled: Pooled) -> None:
        self._rows, self._pooled = rows, pooled
        self._centre = rows.features.mean(axis=0)
        self._spread = rows.features.std(axis=0) + 1e-9
        gpus = rows.labels["gpu"]
        self._mean = {gpu: float(logs[gpus == gpu].mean()) for gpu in sorted(set(gpus))}
        self._y = logs - np.array([self._mean[gpu] for gpu in gpus])
        self._scale = float(self._y.var())
        self._inverse: Any = None

    def likelihood(self, pooled: Pooled) -> float:
        """Log marginal likelihood of the known rows under other hyperparameters."""
        self._pooled, self._inverse = pooled, None
        try:
            factor = np.linalg.cholesky(self._matrix())
        except np.linalg.LinAlgError:
            return -1e9
        whitened = np.linalg.solve(factor, self._y)
        return float(-0.5 * whitened @ whitened - np.log(np.diag(factor)).sum())

    def predict(self, rows: Rows, leave: str = "") -> Any:
        """Logs of measured over computed.

        Args:
            rows: to predict; they may be among the known.
            leave: level; for each row, the known rows that share it are left out. None are left
                out if empty.
        """
        if self._inverse is None:
            self._inverse = np.linalg.inv(self._matrix())
        inverse, weights = self._inverse, self._inverse @ self._y
        cross = self._kernel(rows)
        out = cross @ weights
        for group in np.unique(rows.labels[leave]) if leave else ():
            own = rows.labels[leave] == group
            away = np.flatnonzero(self._rows.labels[leave] == group)
            if len(away):
                # Weights of the process that never saw these rows, by inversion in blocks.
                theirs = np.linalg.solve(inverse[np.ix_(away, away)], weights[away])
                rest = weights - inverse[:, away] @ theirs
                rest[away] = 0.0
                out[own] = cross[own] @ rest
        fallback = float(np.mean(list(self._mean.values())))
        return out + np.array([self._mean.get(gpu, fallback) for gpu in rows.labels["gpu"]])

    def _matrix(self) -> Any:
        gpus = self._rows.labels["gpu"]
        noise = np.array([self._pooled.noise.get(gpu, _NOISE) for gpu in gpus])
        return self._kernel(self._rows) + self._scale * np.diag(noise)

    def _kernel(self, rows: Rows) -> Any:
        """Covariance of rows with the known ones."""
        pooled, known = self._pooled, self._rows
        x, own = ((one.features - self._centre) / self._spread for one in (rows, known))
        total = pooled.smooth * _bell(x, own, pooled.lengths)
        total += pooled.linear * (x @ own.T) / x.shape[1]
        near = _bell(rows.course, known.course, pooled.course_lengths)
        for level, variance in pooled.effects.items():
            same = rows.labels[level][:, None] == known.labels[level][None]
            total += same * (variance + pooled.courses.get(level, 0.0) * near)
        return self._scale * total


def _bell(a: Any, b: Any, lengths: Any) -> Any:
    """exp(-distance^2 / 2) of each row of ``a`` from each of ``b``."""
    a, b = a / np.array(lengths), b / np.array(lengths)
    squares = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)[None] - 2.0 * a @ b.T
    return np.exp(-0.5 * np.maximum(squares, 0.0))


def fit(
    rows: Rows, logs: Any, effects: list[str], courses: list[str], *, most: int = 1000,
    steps: int = 12,
) -> Pooled:  # fmt: skip
    """Hyperparameters of greatest marginal likelihood, with weak priors.

    Args:
        rows, logs: known.
        effects, courses: levels that have them.
        most: rows to use, chosen at random; the work grows with their cube.
        steps: of the search.
    """
    count = len(logs)
    if count > most:
        chosen = np.random.default_rng(0).choice(count, most, replace=False)
        rows, logs = rows.take(chosen), logs[chosen]
    gpus = sorted(set(rows.labels["gpu"]))
    width, bends = rows.features.shape[1], rows.course.shape[1]

    def pooled(theta: Any) -> Pooled:
        values = iter(np.exp(theta).tolist())
        return Pooled(
            lengths=[next(values) for _ in range(width)],
            smooth=next(values),
            linear=next(values),
            effects={level: next(values) for level in effects},
            courses={level: next(values) for level in courses},
            course_lengths=[next(values) for _ in range(bends)],
            noise={gpu: next(values) for gpu in gpus},
        )

    parts = [
        np.ones(width), np.log([0.3, 0.3]), np.full(len(effects), np.log(0.1)),
        np.full(len(courses), np.log(0.05)), np.full(bends, np.log(1.5)),
        np.full(len(gpus), np.log(0.02)),
    ]  # fmt: skip
    start = np.concatenate(parts)
    pool = Pool(rows, logs, pooled(start))
    weight = np.where(np.arange(len(start)) < width, 0.1, 0.02)

    def loss(theta: Any) -> float:
        prior = float(np.sum(weight * (theta - start) ** 2))
        return prior - pool.likelihood(pooled(theta))

    return pooled(minimize(loss, start, method="L-BFGS-B", options={"maxiter": steps}).x)
