"""Between policies and nodes: who wins where several ask for the same thing, and why.

Each policy's last word on a GPU stands until it says otherwise; asking for a GPU's highest limit
takes its claim back. Among standing claims the declared precedence decides: an SLO policy's limit
overrides an efficiency policy's, and no result exceeds what any safety policy asked. Within one
precedence the lowest limit holds. A GPU that nobody claims goes to its default.

>>> arbiter = Claims(["saver", "slo", "breaker"], ["efficiency", "slo", "safety"], 2)
>>> top = np.array([700.0, 700.0])
>>> for policy, limit_w in enumerate([300.0, 650.0, 600.0]):
...     arbiter.claim(policy, np.array([0]), np.array([limit_w]), top)
>>> limit_w, winner = arbiter.resolve(top)
>>> limit_w.tolist(), [arbiter.names[w] if w >= 0 else "nobody" for w in winner]
([600.0, 700.0], ['breaker', 'nobody'])
"""

from __future__ import annotations

import numpy as np

from testbed.core.view import Floats, Ints

PRECEDENCE = ("safety", "slo", "efficiency")


class Claims:
    """Upper bounds that policies ask for, one column per GPU (or instance)."""

    WIRED = ("names", "_rank")

    def __init__(self, names: list[str], precedence: list[str], count: int) -> None:
        self.names = names
        self._rank = np.array([PRECEDENCE.index(p) for p in precedence], dtype=np.int64)
        self._asked = np.full((len(names), count), np.nan)

    def claim(self, policy: int, targets: Ints, values: Floats, top: Floats) -> None:
        """Record what ``policy`` asks for ``targets``; at or above ``top`` it lets go of them."""
        self._asked[policy, targets] = np.where(values >= top[targets], np.nan, values)

    def forget(self, targets: Ints) -> None:
        """What is at ``targets`` is another thing from now on: nobody has asked for anything."""
        self._asked[:, targets] = np.nan

    def resolve(self, default: Floats) -> tuple[Floats, Ints]:
        """The value that holds for each column, and the policy that set it (-1: nobody)."""
        claimed = ~np.isnan(self._asked)
        if not claimed.any():
            return default.copy(), np.full(default.shape, -1, dtype=np.int64)
        value = np.full(default.shape, np.nan)
        winner = np.full(default.shape, -1, dtype=np.int64)
        for rank in (1, 2, 0):  # SLO before efficiency; safety then bounds what they agreed on
            members = np.flatnonzero(self._rank == rank)
            if not len(members):
                continue
            asked = np.where(claimed[members], self._asked[members], np.inf)
            lowest = asked.argmin(axis=0)
            best = asked[lowest, np.arange(asked.shape[1])]
            taken = best < (np.where(np.isnan(value), np.inf, value) if rank == 0 else np.inf)
            if rank == 2:
                taken &= np.isnan(value)
            value = np.where(taken, best, value)
            winner = np.where(taken, members[lowest], winner)
        return np.where(np.isnan(value), default, value), winner
