"""Power and energy of a recording: draw per row, breaches of budgets, throttling, joules.

Energy comes from the counters, never from samples of power. A counter that runs backwards was
reset (a driver was reloaded): what it shows then was drawn since.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from testbed.analysis.series import by_key, spans
from testbed.core.view import Bools, Floats, Ints
from testbed.recorder.reader import Recording

THROTTLE_REASONS = {
    # NVML's clocks event reasons, by its own names (nvml.h, nvmlClocksEventReason...).
    "gpu_idle": 0x1,
    "applications_clocks_setting": 0x2,
    "sw_power_cap": 0x4,
    "hw_slowdown": 0x8,
    "sync_boost": 0x10,
    "sw_thermal_slowdown": 0x20,
    "hw_thermal_slowdown": 0x40,
    "hw_power_brake_slowdown": 0x80,
    "display_clock_setting": 0x100,
}
SLOWING = (
    "sw_power_cap",
    "hw_slowdown",
    "sw_thermal_slowdown",
    "hw_thermal_slowdown",
    "hw_power_brake_slowdown",
)
"""Reasons that take speed away from a busy GPU. Idling and settings of clocks do not count."""


@dataclass(frozen=True, slots=True)
class Breach:
    """A stretch of time in which a row drew more than its budget, by its 1-second mean."""

    row: int
    start_s: float
    end_s: float
    max_over_w: float

    @property
    def s(self) -> float:
        """How long it took."""
        return self.end_s - self.start_s


@dataclass(frozen=True, slots=True)
class RowPower:
    """Draw of each row at each sample: ``draw_w[sample, row]``."""

    name: list[str]
    t_s: Floats
    draw_w: Floats
    instant_w: Floats
    budget_w: Floats

    @property
    def total_w(self) -> Floats:
        """Draw of the whole cluster."""
        return np.asarray(self.draw_w.sum(axis=1))

    def breaches(self, end_s: float) -> list[Breach]:
        """Every breach of every row."""
        found = []
        for row in range(len(self.name)):
            over_w = self.draw_w[:, row] - self.budget_w[:, row]
            for start_s, until_s in spans(over_w > 0, self.t_s, end_s):
                inside = (self.t_s >= start_s) & (self.t_s < until_s)
                worst_w = float(over_w[inside].max()) if inside.any() else 0.0
                found.append(Breach(row, start_s, until_s, worst_w))
        return found


def read_rows(recording: Recording) -> RowPower:
    """Draw of the rows of a recording."""
    table = recording.columns("rows")
    index = recording.columns("row_index")
    num = max(len(index["name"]), int(table["row"].max()) + 1 if len(table["row"]) else 0, 1)
    name = [str(n) for n in index["name"]] or [f"row{row}" for row in range(num)]
    whole = len(table["t_s"]) // num * num  # a cut-off recording may end inside a sample

    def matrix(column: str) -> Floats:
        return np.asarray(table[column][:whole].reshape(-1, num))

    return RowPower(
        name, matrix("t_s")[:, 0], matrix("draw_w"), matrix("instant_w"), matrix("budget_w")
    )


def energy_j(gpu: NDArray[Any], counter_j: Floats) -> dict[int, float]:
    """Energy of each GPU over the recording, from its counter.

    >>> energy_j(np.array([0, 1, 0, 1, 0]), np.array([10.0, 0.0, 15.0, 7.0, 2.0]))
    {0: 7.0, 1: 7.0}
    """
    order = by_key(counter_j, gpu)
    key, value = np.asarray(gpu)[order], counter_j[order]
    rise = np.diff(value)
    rise = np.where(rise < 0, value[1:], rise)
    rise[key[1:] != key[:-1]] = 0.0
    totals = np.bincount(key[1:], rise, minlength=int(key.max()) + 1 if len(key) else 0)
    return {int(k): float(totals[k]) for k in np.unique(key)}


def held_s(t_s: Floats, key: NDArray[Any]) -> Floats:
    """For how long each sample stands: until the next of its key; gaps count as three samples.

    >>> held_s(np.array([0.0, 0.0, 1.0, 1.0, 2.0, 9.0]), np.array([0, 1, 0, 1, 0, 0])).tolist()
    [1.0, 1.0, 1.0, 0.0, 3.0, 0.0]
    """
    order = by_key(t_s, key)
    step = np.append(np.diff(t_s[order]), 0.0)
    last = np.append(np.asarray(key)[order][1:] != np.asarray(key)[order][:-1], True)
    step[last] = 0.0
    if (step > 0).any():
        step = np.minimum(step, 3 * float(np.median(step[step > 0])))
    held = np.empty_like(step)
    held[order] = step
    return held


def throttle_s(t_s: Floats, gpu: NDArray[Any], mask: Ints) -> tuple[float, dict[str, float]]:
    """GPU-seconds slowed by anything, and by each reason."""
    held = held_s(t_s, gpu)
    by_reason = {name: float(held[(mask & THROTTLE_REASONS[name]) != 0].sum()) for name in SLOWING}
    return float(held[slowed(mask)].sum()), by_reason


def slowed(mask: Ints) -> Bools:
    """Which samples show a reason that takes speed away."""
    bits = sum(THROTTLE_REASONS[name] for name in SLOWING)
    return np.asarray((mask & bits) != 0)
