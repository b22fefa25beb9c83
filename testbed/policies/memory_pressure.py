"""Take back host memory that tenants do not miss, and give it back when they do.

Each tenant was sold more memory than the host has for all of them: its guaranteed part is its own,
the rest comes from a pool. The policy keeps each tenant's memory pressure (the share of time that
it waits for memory) near a small ``target``. Under it, the limit is trimmed by ``trim_frac`` at a
time, down to the guaranteed part: memory that nobody waits for goes back to the pool. Above it, the
limit is extended at once by ``extend_frac``, and left alone for ``settle_s``: give back fast, cut
slowly, do not hunt. If the pool of a node (``pool_frac`` of what its tenants were sold) is short,
those who wait least are cut first.

The idea of steering by a small pressure target is that of Meta's senpai and TMO; the guaranteed and
oversubscribed parts are Coach's (ASPLOS 2025). Written from their descriptions.

>>> from testbed.core.view import view_of, empty_tenants
>>> view = view_of([[0.0]])
>>> view.tenants = empty_tenants(("calm", "short"))
>>> view.tenants.guaranteed_bytes[:], view.tenants.memory_bytes[:] = 100e6, 300e6
>>> view.tenants.limit_bytes[:], view.tenants.t_s[:] = 200e6, 10.0
>>> view.tenants.current_bytes[:], view.tenants.pressure_some_frac[:] = [150e6, 200e6], [0.0, 0.2]
>>> [command] = MemoryPressure().step(view)
>>> (command.memory_limit_bytes / 1e6).round().tolist()
[135.0, 250.0]
"""

from __future__ import annotations

import numpy as np

from testbed.core.view import Floats
from testbed.policies import Command, SetMemoryLimit, View

_PAGE = 4096


class MemoryPressure:
    """Trims below ``target`` pressure and extends above it, within the pool of each node."""

    def __init__(
        self,
        *,
        target: float = 0.01,
        slowdown_target: float = 0.1,
        trim_frac: float = 0.1,
        extend_frac: float = 0.25,
        settle_s: float = 10.0,
        pool_frac: float = 1.0,
        stale_s: float = 2.0,
        period_s: float = 2.0,
    ) -> None:
        if not 0 < trim_frac < extend_frac:
            raise ValueError(f"need 0 < trim_frac < extend_frac, not {trim_frac}, {extend_frac}")
        if not 0 < target < 1:
            raise ValueError(f"target = {target} must be between 0 and 1")
        self.target, self.slowdown_target = target, slowdown_target
        self.trim_frac, self.extend_frac = trim_frac, extend_frac
        self.settle_s = settle_s
        self.pool_frac, self.stale_s, self.period_s = pool_frac, stale_s, period_s
        self._short_s: Floats = np.zeros(0)

    def step(self, view: View) -> list[Command]:
        """New limits for tenants whose limit should move."""
        tenants = view.tenants
        fresh = view.now_s - tenants.t_s <= self.stale_s
        if not fresh.any():
            return []
        short = (tenants.pressure_some_frac > self.target) | (
            tenants.slowdown_frac > self.slowdown_target
        )
        if len(self._short_s) != len(short):
            self._short_s = np.full(len(short), -np.inf)
        self._short_s = np.where(short, view.now_s, self._short_s)
        settled = view.now_s - self._short_s >= self.settle_s
        # Trim from what is in use: a limit far above it holds nothing back.
        used = np.minimum(tenants.limit_bytes, tenants.current_bytes)
        trimmed = np.maximum(used * (1.0 - self.trim_frac), tenants.guaranteed_bytes)
        extended = np.minimum(
            tenants.limit_bytes + self.extend_frac * tenants.limit_bytes, tenants.memory_bytes
        )
        wanted = np.where(short, extended, np.where(settled, trimmed, tenants.limit_bytes))
        wanted = self._fit(view, wanted)
        wanted = np.where(fresh, wanted // _PAGE * _PAGE, tenants.limit_bytes)
        moved = np.flatnonzero(np.abs(wanted - tenants.limit_bytes) >= 0.02 * tenants.limit_bytes)
        if not len(moved):
            return []
        why = f"{int(short[moved].sum())} extended, {int((~short[moved]).sum())} trimmed"
        return [SetMemoryLimit(moved, wanted[moved], why)]

    def _fit(self, view: View, wanted: Floats) -> Floats:
        """Cut what nodes' pools cannot give, from those first who wait least."""
        tenants = view.tenants
        fitting = wanted.copy()
        for node in np.unique(tenants.node):
            members = np.flatnonzero(tenants.node == node)
            pool = self.pool_frac * tenants.memory_bytes[members].sum()
            excess = fitting[members].sum() - pool
            for index in members[np.argsort(tenants.pressure_some_frac[members])]:
                if excess <= 0:
                    break
                give = min(excess, fitting[index] - tenants.guaranteed_bytes[index])
                fitting[index] -= give
                excess -= give
        return fitting
