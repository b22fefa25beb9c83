"""Keep each row under its power budget by capping its GPUs evenly.

Once a row draws more than ``trip`` of its budget, each of its GPUs is held at an equal share of
that much, in whole watts so that a limit reads back as it was set: from then on the limits keep the
row under its breaker, with room for what a board's own controller overshoots. The caps come off
when the row has drawn less than ``release`` of its budget for ``hold_s``; in between nothing
changes, so that the policy does not hunt. A GPU not heard from for ``stale_s`` counts at its
enforced limit: unseen, it may draw all it is allowed.

>>> from testbed.core.view import view_of
>>> policy = RowPowerCap()
>>> policy.step(view_of([[640.0, 500.0]], budget_w=1001.0))  # doctest: +ELLIPSIS
[SetPowerLimit(gpus=array([0, 1]), power_limit_w=475.0, why='row0 draws 1140 W of 1001 W')]
>>> policy.step(view_of([[450.0, 460.0]], budget_w=1001.0, limit_w=475.0))
[]
"""

from __future__ import annotations

import numpy as np

from testbed.policies import Command, SetPowerLimit, View


class RowPowerCap:
    """Caps evenly at ``trip`` of a row's budget, releases below ``release`` after ``hold_s``."""

    def __init__(
        self,
        *,
        trip: float = 0.95,
        release: float = 0.75,
        hold_s: float = 10.0,
        stale_s: float = 2.0,
        period_s: float = 0.5,
    ) -> None:
        if not 0 < release < trip:
            raise ValueError(f"release = {release} must lie between 0 and trip = {trip}")
        self.trip, self.release, self.hold_s = trip, release, hold_s
        self.stale_s, self.period_s = stale_s, period_s
        self._quiet_since_s: dict[int, float] = {}
        self._said_w: dict[int, float] = {}
        """The limit said last for each row: it stands, also where a stronger policy holds a lower
        one, and is not said again."""

    def step(self, view: View) -> list[Command]:
        """Cap rows above their trip level, uncap rows that have long been quiet."""
        gpus, rows = view.gpus, view.rows
        draws_w = np.bincount(gpus.row, gpus.draw_w(view.now_s, self.stale_s), len(rows.name))
        # GPUs of each row, found at once: looking for each anew is rows times GPUs.
        ends = np.bincount(gpus.row, minlength=len(rows.name)).cumsum()
        members_of = np.split(np.argsort(gpus.row, kind="stable"), ends[:-1])
        commands: list[Command] = []
        for row, (name, budget_w) in enumerate(zip(rows.name, rows.budget_w, strict=True)):
            members = members_of[row]
            draw_w = draws_w[row]
            if draw_w >= self.release * budget_w:
                self._quiet_since_s.pop(row, None)
            quiet_s = view.now_s - self._quiet_since_s.setdefault(row, view.now_s)
            if draw_w > self.trip * budget_w:
                limit_w = max(
                    self.trip * budget_w // len(members), gpus.power_limit_min_w[members].max()
                )
                why = f"{name} draws {draw_w:.0f} W of {budget_w:.0f} W"
            elif draw_w < self.release * budget_w and quiet_s >= self.hold_s:
                limit_w = gpus.power_limit_max_w[members].min()
                why = f"{name} drew under {self.release:.0%} for {quiet_s:.0f} s"
            else:
                continue
            said = self._said_w.get(row) == limit_w
            if not said and (gpus.power_limit_w[members] != limit_w).any():
                self._said_w[row] = float(limit_w)
                commands.append(SetPowerLimit(members, float(limit_w), why))
        return commands
