"""Time series of many devices, made small enough to look at.

Telemetry is long tables: a time, the index of a device, a value. `grid` turns one quantity into a
matrix of time bins by devices; `envelope` thins one line and keeps its peaks.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from testbed.core.view import Floats, Ints

MAX_POINTS = 2000
"""Points of one line in a figure: about twice the pixels it is drawn on."""


def edges(end_s: float, bins: int, start_s: float = 0.0) -> Floats:
    """Edges of ``bins`` equal bins."""
    return np.linspace(start_s, max(end_s, start_s + 1e-9), bins + 1)


def grid(
    t_s: Floats,
    key: NDArray[Any],
    value: NDArray[Any],
    num_keys: int,
    edges_s: Floats,
    how: Literal["mean", "max", "last"] = "mean",
) -> Floats:
    """One row per time bin, one column per key; NaN before a key was first heard from.

    A bin without a value repeats the one before it.

    >>> t_s = np.array([0.1, 0.2, 0.6, 2.5])
    >>> grid(t_s, np.array([0, 1, 0, 0]), np.array([1.0, 5.0, 3.0, 9.0]), 2, edges(3, 3)).tolist()
    [[2.0, 5.0], [2.0, 5.0], [9.0, 5.0]]
    """
    bins = len(edges_s) - 1
    place = np.searchsorted(edges_s, t_s, "right") - 1
    inside = (place >= 0) & ((place < bins) | (t_s == edges_s[-1]))
    cell = np.minimum(place[inside], bins - 1) * num_keys + np.asarray(key)[inside]
    values = np.asarray(value, np.float64)[inside]
    made = np.full(bins * num_keys, np.nan)
    if how == "mean":
        count = np.bincount(cell, minlength=bins * num_keys)
        total = np.bincount(cell, values, minlength=bins * num_keys)
        np.divide(total, count, out=made, where=count > 0)
    elif how == "max":
        made[:] = -np.inf
        np.maximum.at(made, cell, values)
        made[np.isneginf(made)] = np.nan
    else:
        made[cell] = values  # NumPy keeps the last one, and tables are in order of time
    return fill_forward(made.reshape(bins, num_keys))


def fill_forward(matrix: Floats) -> Floats:
    """Each NaN replaced by the value above it, if there is one."""
    known = ~np.isnan(matrix)
    row = np.where(known, np.arange(len(matrix))[:, None], 0)
    np.maximum.accumulate(row, axis=0, out=row)
    return np.asarray(matrix[row, np.arange(matrix.shape[1])])


def envelope(t_s: Floats, value: Floats, points: int = MAX_POINTS) -> tuple[Floats, Floats]:
    """The line thinned to ``points``: of each stretch its lowest and its highest value.

    >>> t_s = np.arange(1000.0)
    >>> spike = np.where(t_s == 500, 7.0, 0.0)
    >>> thin_s, thin = envelope(t_s, spike, 20)
    >>> len(thin) <= 20, thin.max()
    (True, np.float64(7.0))
    """
    if len(t_s) <= points:
        return t_s, value
    starts = np.linspace(0, len(t_s), max(points // 2, 1), endpoint=False).astype(np.int64)
    ends = np.append(starts[1:], len(t_s))
    kept = np.empty(2 * len(starts), np.int64)
    for place, (start, end) in enumerate(zip(starts, ends, strict=True)):
        part = value[start:end]
        low, high = start + int(np.argmin(part)), start + int(np.argmax(part))
        kept[2 * place], kept[2 * place + 1] = min(low, high), max(low, high)
    kept = np.unique(kept)
    return t_s[kept], value[kept]


def by_key(t_s: Floats, key: NDArray[Any]) -> Ints:
    """Order of rows by key, and within a key by time as recorded."""
    return np.asarray(np.argsort(key, kind="stable"), np.int64)


def spans(on: NDArray[np.bool_], t_s: Floats, end_s: float) -> list[tuple[float, float]]:
    """Stretches of time in which ``on`` holds; a sample holds until the next one.

    >>> spans(np.array([False, True, True, False, True]), np.arange(5.0), 5.0)
    [(1.0, 3.0), (4.0, 5.0)]
    """
    if not len(on):
        return []
    change = np.diff(np.concatenate([[0], on.astype(np.int8), [0]]))
    starts, ends = np.flatnonzero(change == 1), np.flatnonzero(change == -1)
    until_s = np.append(t_s, end_s)
    return [
        (float(t_s[start]), float(until_s[end])) for start, end in zip(starts, ends, strict=True)
    ]
