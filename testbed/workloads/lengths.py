"""Token counts drawn from measured distributions (``data/lengths.csv``; sources in its README).

A table gives tokens at fractions of the requests; between two of them the logarithm of the tokens
is interpolated, because lengths spread over four decades.

>>> chat = measured("chat_prompt")
>>> chat.at(np.array([0.25, 0.5, 0.75, 0.99]))
array([ 396, 1015, 1204, 4122])
>>> halved = chat.with_mean(500.0, field="prompt_tokens")
>>> round(halved.mean_tokens())
500
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from testbed.core.errors import SpecError
from testbed.workloads.columns import Floats, Ints

DATA = Path(__file__).parent / "data"

_GRID = (np.arange(20_000) + 0.5) / 20_000
"""Fractions over which a mean is taken: fine enough for 0.5 % even with the long-context tail."""


@dataclass(frozen=True)
class Lengths:
    """A distribution of token counts, sampled through its inverse.

    Args:
        frac: fractions of the requests, rising from 0 to 1.
        log_tokens: logarithm of the tokens at them.
        scale: factor on all tokens.
        tail_from_frac: from here on the table is not used; a power law carries on instead.
        tail_alpha: exponent of that power law: P(more than x) falls as ``x**-tail_alpha``.
    """

    frac: Floats
    log_tokens: Floats
    scale: float = 1.0
    tail_from_frac: float = 1.0
    tail_alpha: float = math.inf

    def at(self, frac: Floats) -> Ints:
        """Tokens, at least 1, that a share ``frac`` of the requests does not exceed."""
        return np.maximum(np.rint(self._exact(frac)), 1.0).astype(np.int64)

    def mean_tokens(self, limit_tokens: float = math.inf) -> float:
        """Mean, with everything longer than ``limit_tokens`` cut to it."""
        return float(np.minimum(np.maximum(self._exact(_GRID), 1.0), limit_tokens).mean())

    def with_mean(
        self, mean_tokens: float, *, field: str, limit_tokens: float = math.inf
    ) -> Lengths:
        """The same shape stretched so that its mean, after the cut, is ``mean_tokens``."""
        if not 1 <= mean_tokens <= limit_tokens:
            raise SpecError(
                f"run spec: workload.{field} = {mean_tokens:g} must be from 1 to {limit_tokens:g}"
            )
        low, high = 0.0, 2.0 * mean_tokens
        while replace(self, scale=high).mean_tokens(limit_tokens) < mean_tokens * (1 - 1e-9):
            high *= 2
        for _ in range(50):
            middle = (low + high) / 2
            short = replace(self, scale=middle).mean_tokens(limit_tokens) < mean_tokens
            low, high = (middle, high) if short else (low, middle)
        return replace(self, scale=high)

    def _exact(self, frac: Floats) -> Floats:
        start = self.tail_from_frac
        log_tokens = np.interp(np.minimum(frac, start), self.frac, self.log_tokens)
        if start < 1:
            beyond = np.log((1 - start) / (1 - np.maximum(frac, start)))
            log_tokens = log_tokens + beyond / self.tail_alpha
        tokens: Floats = np.exp(log_tokens) * self.scale
        return tokens


@cache
def measured(name: str) -> Lengths:
    """The distribution ``name`` of ``data/lengths.csv``."""
    with (DATA / "lengths.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["table"] == name]
    frac = np.array([float(row["frac"]) for row in rows])
    return Lengths(frac, np.log([float(row["tokens"]) for row in rows]))


def stretched(name: str, mean_tokens: float, *, field: str, limit: float = math.inf) -> Lengths:
    """The distribution ``name``, with another mean unless ``mean_tokens`` is 0."""
    lengths = measured(name)
    if mean_tokens == 0:
        return lengths
    return lengths.with_mean(mean_tokens, field=field, limit_tokens=limit)
