"""Means over seeds with their confidence intervals.

>>> mean_of([1.0, 2.0, 3.0])
Estimate(mean=2.0, low=-0.48..., high=4.48..., num=3)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A mean and the 95 % interval around it (Student's t over ``num`` values)."""

    mean: float
    low: float
    high: float
    num: int

    def scaled(self, factor: float) -> Estimate:
        """The same in another unit; ``factor`` is above 0."""
        return Estimate(self.mean * factor, self.low * factor, self.high * factor, self.num)


def mean_of(values: Sequence[float]) -> Estimate:
    """Mean and interval; of one value alone the interval is that value.

    Raises:
        ValueError: there are none.
    """
    if not len(values):
        raise ValueError("no values to take the mean of")
    numbers = np.asarray(values, dtype=np.float64)
    mean, num = float(numbers.mean()), len(numbers)
    if num < 2:
        return Estimate(mean, mean, mean, num)
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, num - 1) * numbers.std(ddof=1) / num**0.5)
    return Estimate(mean, mean - half, mean + half, num)


def change_of(ours: Mapping[int, float], baseline: Mapping[int, float]) -> Estimate:
    """Relative change against a baseline, paired by seed: 0 where they are equal, -0.5 for half.

    >>> change_of({1: 5.0, 2: 8.0}, {1: 10.0, 2: 16.0, 3: 1.0})
    Estimate(mean=-0.5, low=-0.5, high=-0.5, num=2)
    """
    return mean_of([ours[seed] / baseline[seed] - 1.0 for seed in ours if seed in baseline])
