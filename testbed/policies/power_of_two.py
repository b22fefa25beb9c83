"""Send each request to the less loaded of two instances of its pool, drawn at random.

Two choices come close to the best of all (Mitzenmacher, 2001) and cost the same for ten instances
or ten thousand: nothing is scanned. Load is counted in outstanding tokens, as in `least_loaded`.

>>> from testbed.core.view import view_of
>>> from testbed.policies import Request
>>> view = view_of([[0.0] * 4], outstanding_tokens=[900.0, 120.0, 500.0, 800.0])
>>> chosen = [PowerOfTwo(seed=s).route(Request(0, 0.0, 10, 10), view) for s in range(200)]
>>> [chosen.count(k) for k in range(4)]
[11, 79, 68, 42]
"""

from __future__ import annotations

import random

import numpy as np

from testbed.policies import Request, View

_TRIES = 64
"""Draws of an instance that is down or of another pool, before all of them are looked at."""


class PowerOfTwo:
    """Two random choices."""

    def __init__(self, *, seed: int = 0) -> None:
        self._random = random.Random(seed)

    def route(self, request: Request, view: View) -> int | None:
        """The less loaded of two random instances, or None while the whole pool is down."""
        pool = view.pool_of_class[request.slo_class]
        first, second = self._draw(view, pool), self._draw(view, pool)
        if first is None or second is None:
            return None
        tokens = view.instances.outstanding_tokens
        return second if tokens[second] < tokens[first] else first

    def _draw(self, view: View, pool: int) -> int | None:
        """An instance of the pool that is up, all alike likely."""
        up, pools = view.instances.up, view.instances.pool
        count = len(up)
        for _ in range(_TRIES):
            index = int(self._random.random() * count)
            if up[index] and pools[index] == pool:
                return index
        usable = np.flatnonzero((pools == pool) & up)
        return int(usable[int(self._random.random() * len(usable))]) if len(usable) else None
