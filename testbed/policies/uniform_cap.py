"""Hold every GPU of a row that nears its limit at the same lower clock, whoever it belongs to.

The simple cap that published evaluations compare with: once a row draws more than ``trip`` of what
it may, the SM clocks of all its GPUs are cut by ``cut_frac``; while it still does, once more per
step. A cut is taken back when the row has drawn less than ``release`` for ``hold_s``, one at a
time: cut fast, raise slowly. An aisle short of air because air handlers are out counts the same for
its rows. With ``grace_s`` a row must stay above for so long before a cut: time for others to act,
which breakers allow up to ``rush`` of the limit, and no further. Above ``brake`` of the limit, GPUs
are also held at equal power limits that fit, whatever their work: a clock alone promises no power.

>>> from testbed.core.view import view_of
>>> policy = UniformCap()
>>> [command] = policy.step(view_of([[500.0, 480.0]], budget_w=1000.0))
>>> command.gpus.tolist(), command.sm_clock_mhz.round().tolist()
([0, 1], [1287.0, 1287.0])
"""

from __future__ import annotations

import numpy as np

from testbed.core.view import Floats, Ints
from testbed.policies import Command, LockClocks, SetPowerLimit, View

_DEEPEST = 4
"""Cuts in a row: 0.65^4 is 18 % of the clock."""


class UniformCap:
    """Cuts clocks of whole rows by ``cut_frac`` above ``trip``, and power above ``brake``."""

    def __init__(
        self,
        *,
        trip: float = 0.97,
        release: float = 0.85,
        brake: float = 1.0,
        cut_frac: float = 0.35,
        hold_s: float = 120.0,
        grace_s: float = 0.0,
        rush: float = 1.35,
        stale_s: float = 2.0,
        period_s: float = 5.0,
    ) -> None:
        if not 0 < release < trip <= brake:
            raise ValueError(f"need 0 < release < trip <= brake, not {release}, {trip}, {brake}")
        if not 0 < cut_frac < 1:
            raise ValueError(f"cut_frac = {cut_frac} must be between 0 and 1")
        self.trip, self.release, self.brake = trip, release, brake
        self.cut_frac, self.hold_s, self.stale_s = cut_frac, hold_s, stale_s
        self.grace_s, self.rush, self.period_s = grace_s, rush, period_s
        self._cuts: Ints = np.zeros(0, np.int64)
        self._quiet_since_s: Floats = np.zeros(0)
        self._over_since_s: Floats = np.zeros(0)

    def step(self, view: View) -> list[Command]:
        """Cut rows that are near their limit, raise rows that have long been quiet."""
        gpus = view.gpus
        power = view.row_load_frac(self.stale_s)
        load = np.maximum(power, self.trip * _short_of_air(view, len(power)))
        if len(self._cuts) != len(load):
            self._cuts = np.zeros(len(load), np.int64)
            self._quiet_since_s = np.full(len(load), view.now_s)
            self._over_since_s = np.full(len(load), np.inf)
        before = self._cuts
        self._quiet_since_s = np.where(load < self.release, self._quiet_since_s, view.now_s)
        quiet = view.now_s - self._quiet_since_s >= self.hold_s
        over = load > self.trip
        self._over_since_s = np.where(over, np.minimum(self._over_since_s, view.now_s), np.inf)
        late = over & (view.now_s - self._over_since_s >= self.grace_s)
        late |= load > self.rush
        down = late & (before < _DEEPEST)
        up = quiet & (before > 0)
        self._cuts = before + down - up
        self._quiet_since_s = np.where(up, view.now_s, self._quiet_since_s)
        commands: list[Command] = []
        for row in np.flatnonzero(self._cuts != before):
            members = np.flatnonzero(gpus.row == row)
            clock_mhz = gpus.sm_clock_max_mhz[members] * (1 - self.cut_frac) ** self._cuts[row]
            clock_mhz = np.maximum(clock_mhz, gpus.sm_clock_min_mhz[members])
            why = f"{view.rows.name[row]} at {load[row]:.0%} of its limit, {self._cuts[row]} cuts"
            commands.append(LockClocks(members, clock_mhz, why))
            if not self._cuts[row] and load[row] < self.release:
                commands.append(SetPowerLimit(members, gpus.power_limit_max_w[members], why))
        for row in np.flatnonzero((power > self.brake) & late):
            members = np.flatnonzero(gpus.row == row)
            share_w = 0.95 * view.rows.budget_w[row] // len(members)
            limit_w = np.maximum(share_w, gpus.power_limit_min_w[members])
            if (gpus.power_limit_w[members] > limit_w).any():
                why = f"{view.rows.name[row]} at {power[row]:.0%} of its limit"
                commands.append(SetPowerLimit(members, limit_w, why))
        return commands


def _short_of_air(view: View, num_rows: int) -> Floats:
    """Airflow over capacity of each row's aisle while air handlers of it are out, else 0."""
    used = np.zeros(num_rows)
    if view.facility is not None:
        aisles, servers = view.facility.aisles, view.facility.servers
        out = aisles.capacity_m3_s < aisles.rating_m3_s
        load = np.where(out, aisles.airflow_m3_s / np.maximum(aisles.capacity_m3_s, 1e-9), 0.0)
        used[servers.row] = load[servers.aisle]
    return used
