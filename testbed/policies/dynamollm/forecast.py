"""How much of each class will come: what was seen lately, and what usually comes at this time."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from testbed.core.view import Floats

SURGE_QUANTILE = 0.99
"""Of past steps: limits are on the 99th percentile of waits, so that of each hundred one may be
late."""


def surge_rps(counts: Floats, step_s: float, span_steps: int = 12) -> float:
    """Rate by which the arrivals of a step surely exceed what those before let expect.

    That is: at most one step in a hundred brought more, counting only what twice the standard
    deviation of chance does not explain. Poisson arrivals have none, whatever their rate.

    Args:
        counts: arrivals in each step of the past.
        step_s: length of a step.
        span_steps: how many steps before are taken for what is expected.

    >>> chance = np.random.default_rng(1).poisson(100.0, 1000).astype(float)
    >>> surge_rps(chance, 5.0) < 1.0
    True
    >>> bursts = chance.copy()
    >>> bursts[::50] = 1000.0
    >>> 100.0 < surge_rps(bursts, 5.0) < 200.0
    True
    """
    if len(counts) <= span_steps:
        return 0.0
    before = np.convolve(counts, np.ones(span_steps) / span_steps)[span_steps - 1 : -span_steps]
    after = counts[span_steps:]
    excess = np.maximum(after - 2.0 * np.sqrt(after) - before, 0.0)
    return float(np.quantile(excess, SURGE_QUANTILE)) / step_s


class Forecast:
    """Rates by class from counts, and the peak that a template of the day or week foresees.

    Args:
        count: classes.
        step_s: length of the steps that arrivals are counted in.
        keep_s: how far back counts are kept.
        template_rps: rate of all requests in windows of ``window_s`` from time 0; may be empty.
        window_s: length of a window.
        shares: share of each class in it.

    >>> seen = Forecast(1, step_s=5.0, keep_s=60.0, template_rps=[2.0, 8.0], window_s=300.0,
    ...                 shares=np.ones(1))
    >>> for _ in range(4):
    ...     seen.add(np.array([10.0]))
    >>> seen.recent_rps(60.0), seen.recent_rps(10.0), seen.usual_rps(0.0, 400.0)
    (array([2.]), array([2.]), array([8.]))
    """

    def __init__(
        self,
        count: int,
        *,
        step_s: float,
        keep_s: float,
        template_rps: Sequence[float] = (),
        window_s: float,
        shares: Floats,
    ) -> None:
        self._count, self._step_s, self._window_s = count, step_s, window_s
        self._seen: deque[Floats] = deque(maxlen=max(1, round(keep_s / step_s)))
        self._template = np.asarray(template_rps, dtype=np.float64)
        self._shares = shares

    def add(self, arrivals: Floats) -> None:
        """Count what arrived in the last step."""
        self._seen.append(arrivals)

    def recent_rps(self, span_s: float) -> Floats:
        """Mean rate over the last ``span_s``, or as much of it as was seen; 0 if nothing was."""
        steps = min(len(self._seen), max(1, round(span_s / self._step_s)))
        if not steps:
            return np.zeros(self._count)
        recent = list(self._seen)[-steps:]
        return np.asarray(np.sum(recent, axis=0) / (steps * self._step_s))

    def sure_rps(self, span_s: float) -> Floats:
        """The recent rate less twice what chance may have added to it, as far as anything is known.

        Peaks of counts over a short span are mostly chance: plans that follow them only grow.
        """
        recent = self.recent_rps(span_s)
        seen_s = max(min(span_s, len(self._seen) * self._step_s), self._step_s)
        return np.asarray(np.maximum(recent - 2.0 * np.sqrt(recent / seen_s), 0.0))

    def peak_rps(self) -> Floats:
        """The template's highest rate."""
        highest = float(self._template.max()) if len(self._template) else 0.0
        return highest * self._shares

    def usual_rps(self, from_s: float, to_s: float) -> Floats:
        """The template's highest rate between two times; it repeats."""
        if not len(self._template):
            return np.zeros(self._count)
        first = int(from_s // self._window_s)
        last = max(first, int(np.ceil(to_s / self._window_s)) - 1)
        windows = np.arange(first, last + 1) % len(self._template)
        return float(self._template[windows].max()) * self._shares
