"""Two thresholds per row, low-priority GPUs first.

Above ``first`` of the row's budget the GPUs of lower priority are held at ``low_limit_frac`` of
their highest limit. Above ``second`` those of the highest priority in the row share what is left of
``second`` of the budget evenly: a board's own controller overshoots by some percent, so the limits
add up to a little less than the budget. A level is left only after the draw has been
under its threshold by ``margin`` for ``hold_s``, one level at a time: cut fast, raise slowly.

The idea of two frequency-capping thresholds by priority is POLCA's (Patel et al., ASPLOS 2024);
thresholds here are settings, not the paper's.

>>> from testbed.core.view import view_of
>>> policy = PriorityCap()
>>> rows = dict(budget_w=1000.0, priority=[[1, 0]])
>>> [command] = policy.step(view_of([[500.0, 430.0]], **rows))
>>> command.gpus.tolist(), command.power_limit_w.tolist()
([1], [350.0])
>>> [command] = policy.step(view_of([[640.0, 350.0]], **rows))
>>> command.gpus.tolist(), command.power_limit_w.tolist()
([0, 1], [600.0, 350.0])
"""

from __future__ import annotations

import numpy as np

from testbed.core.view import Floats, Ints
from testbed.policies import Command, SetPowerLimit, View


class PriorityCap:
    """Caps by priority at two levels of each row's budget."""

    def __init__(
        self,
        *,
        first: float = 0.85,
        second: float = 0.95,
        margin: float = 0.15,
        low_limit_frac: float = 0.5,
        hold_s: float = 10.0,
        stale_s: float = 2.0,
        period_s: float = 0.5,
    ) -> None:
        if not 0 < margin < first < second:
            raise ValueError(f"need margin < first < second, not {margin}, {first}, {second}")
        self.first, self.second, self.margin = first, second, margin
        self.low_limit_frac, self.hold_s = low_limit_frac, hold_s
        self.stale_s, self.period_s = stale_s, period_s
        self._level: dict[int, int] = {}
        self._quiet_since_s: dict[int, float] = {}

    def step(self, view: View) -> list[Command]:
        """Move each row's level with its draw, and say the limits of rows whose level moved."""
        gpus, rows = view.gpus, view.rows
        draws_w = np.bincount(gpus.row, gpus.draw_w(view.now_s, self.stale_s), len(rows.name))
        commands: list[Command] = []
        for row, (name, budget_w) in enumerate(zip(rows.name, rows.budget_w, strict=True)):
            before = self._level.get(row, 0)
            level = self._move(row, before, draws_w[row] / budget_w, view.now_s)
            if level != before:
                members = np.flatnonzero(gpus.row == row)
                limits_w = self._limits_w(view, members, level, budget_w)
                changed = gpus.power_limit_w[members] != limits_w
                why = f"{name} at {draws_w[row]:.0f} W of {budget_w:.0f} W, level {level}"
                commands.append(SetPowerLimit(members[changed], limits_w[changed], why))
        return commands

    def _move(self, row: int, level: int, load: float, now_s: float) -> int:
        """The row's new level at ``load``, its draw over its budget."""
        if load > self.second:
            wanted = min(level + 1, 2) if load <= 1.0 else 2
        elif load > self.first:
            wanted = max(level, 1)
        elif level and load < (self.first, self.second)[level - 1] - self.margin:
            since_s = self._quiet_since_s.setdefault(row, now_s)
            wanted = level - 1 if now_s - since_s >= self.hold_s else level
        else:
            wanted = level
            self._quiet_since_s.pop(row, None)
        if load > self.first or wanted != level:
            self._quiet_since_s.pop(row, None)
        self._level[row] = wanted
        return wanted

    def _limits_w(self, view: View, members: Ints, level: int, budget_w: float) -> Floats:
        gpus = view.gpus
        limits_w = gpus.power_limit_max_w[members].copy()
        if not level:
            return limits_w
        floor_w = gpus.power_limit_min_w[members]
        low = gpus.priority[members] < gpus.priority[members].max()
        limits_w[low] = np.maximum(floor_w, limits_w * self.low_limit_frac // 1)[low]
        if level == 2:
            share_w = (self.second * budget_w - limits_w[low].sum()) // max(1, (~low).sum())
            limits_w[~low] = np.clip(share_w, floor_w, limits_w)[~low]
        return limits_w
