"""Two thresholds per row with clock caps by priority, low first; a brake above the limit.

Above ``first`` of what a row may draw, its GPUs of lower priority are held at ``low_clock_frac`` of
their highest clock; above ``second``, those of the highest priority at ``high_clock_frac``; above
``brake`` all of them at equal power limits that fit. A level is left when the row has drawn
``margin`` less than its threshold for ``hold_s``, one level at a time.

The idea is POLCA's (Patel et al., ASPLOS 2024); thresholds and clocks here are settings of ours.

>>> from testbed.core.view import view_of
>>> policy = PolcaCap()
>>> [command] = policy.step(view_of([[430.0, 440.0]], budget_w=1000.0, priority=[[1, 0]]))
>>> command.gpus.tolist(), command.sm_clock_mhz.round().tolist()
([0, 1], [1980.0, 1287.0])
"""

from __future__ import annotations

import numpy as np

from testbed.policies import Command, LockClocks, SetPowerLimit, View


class PolcaCap:
    """Caps clocks by priority at two levels of each row's limit, and power at a third."""

    def __init__(
        self,
        *,
        first: float = 0.85,
        second: float = 0.92,
        brake: float = 1.0,
        margin: float = 0.08,
        low_clock_frac: float = 0.65,
        high_clock_frac: float = 0.8,
        hold_s: float = 120.0,
        stale_s: float = 2.0,
        period_s: float = 5.0,
    ) -> None:
        if not 0 < margin < first < second < brake:
            raise ValueError(
                f"need margin < first < second < brake, not {margin}, {first}, {second}, {brake}"
            )
        self.thresholds = (first, second, brake)
        self.margin, self.hold_s, self.stale_s = margin, hold_s, stale_s
        self.low_clock_frac, self.high_clock_frac = low_clock_frac, high_clock_frac
        self.period_s = period_s
        self._level: dict[int, int] = {}
        self._quiet_since_s: dict[int, float] = {}

    def step(self, view: View) -> list[Command]:
        """Move each row's level with its draw, and say what changes with it."""
        commands: list[Command] = []
        for row, load in enumerate(view.row_load_frac(self.stale_s)):
            before = self._level.get(row, 0)
            level = self._level[row] = self._move(row, before, float(load), view.now_s)
            if level != before or level == len(self.thresholds):
                commands += self._say(view, row, level, float(load))
        return commands

    def _move(self, row: int, level: int, load: float, now_s: float) -> int:
        wanted = sum(load > threshold for threshold in self.thresholds)
        if wanted >= level or load > self.thresholds[level - 1] - self.margin:
            self._quiet_since_s.pop(row, None)
            return max(level, wanted)
        if now_s - self._quiet_since_s.setdefault(row, now_s) < self.hold_s:
            return level
        self._quiet_since_s.pop(row)
        return level - 1

    def _say(self, view: View, row: int, level: int, load: float) -> list[Command]:
        gpus = view.gpus
        members = np.flatnonzero(gpus.row == row)
        low = gpus.priority[members] < gpus.priority[members].max()
        top_mhz = gpus.sm_clock_max_mhz[members]
        clock_mhz = top_mhz.copy()
        if level >= 1:
            clock_mhz[low] = top_mhz[low] * self.low_clock_frac
        if level >= 2:
            clock_mhz[~low] = top_mhz[~low] * self.high_clock_frac
        limit_w = gpus.power_limit_max_w[members].copy()
        if level >= 3:
            share_w = 0.95 * view.rows.budget_w[row] // len(members)
            limit_w = np.maximum(share_w, gpus.power_limit_min_w[members])
        why = f"{view.rows.name[row]} at {load:.0%} of its limit, level {level}"
        said: list[Command] = [LockClocks(members, clock_mhz, why)]
        moved = gpus.power_limit_w[members] != limit_w
        if moved.any():
            said.append(SetPowerLimit(members[moved], limit_w[moved], why))
        return said
