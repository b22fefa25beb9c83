"""A recording with what several figures need of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from testbed.analysis.energy import (
    Breach,
    RowPower,
    read_rows,
)
from testbed.analysis.latency import Requests, read_requests
from testbed.analysis.series import grid
from testbed.analysis.summary import run_duration_s
from testbed.core.view import Bools, Floats
from testbed.recorder.reader import Recording

HEAT_BINS = 400
"""Most bins of time in a heat map."""


@dataclass
class Run:
    """A recording with what several figures need of it, each read once."""

    recording: Recording

    @cached_property
    def duration_s(self) -> float:
        """Length of the run."""
        return run_duration_s(self.recording)

    @cached_property
    def scale(self) -> tuple[float, str]:
        """Seconds per unit of the time axis, and its name."""
        if self.duration_s > 3 * 3600:
            return 3600.0, "h"
        return (60.0, "min") if self.duration_s > 1200 else (1.0, "s")

    @cached_property
    def edges_s(self) -> Floats:
        """Bins of time that heat maps and bands share."""
        # Whole numbers of samples in each bin, and edges between samples: else counters alias.
        spec = self.recording.manifest["spec"]
        period_s = max(spec["control"]["sample_period_s"], spec["record"]["gpu_period_s"])
        samples = max(1, math.ceil(self.duration_s / period_s / HEAT_BINS))
        bins = max(1, math.ceil((self.duration_s / period_s + 1) / samples))
        return np.asarray((np.arange(bins + 1) * samples - 0.5) * period_s, np.float64)

    @cached_property
    def mid(self) -> Floats:
        """Middles of the bins, in units of the time axis."""
        return self.time((self.edges_s[1:] + self.edges_s[:-1]) / 2)

    def time(self, t_s: Floats) -> Floats:
        """Seconds in units of the time axis."""
        return np.asarray(t_s) / self.scale[0]

    @cached_property
    def rows(self) -> RowPower:
        """Draw per row."""
        return read_rows(self.recording)

    @cached_property
    def breaches(self) -> list[Breach]:
        """Every breach."""
        return self.rows.breaches(self.duration_s)

    @cached_property
    def requests(self) -> Requests:
        """The requests."""
        return read_requests(self.recording)

    @cached_property
    def index(self) -> dict[str, Any]:
        """Names and places of the GPUs."""
        return self.recording.columns("gpu_index")

    @cached_property
    def info(self) -> dict[int, dict[str, Any]]:
        """What each GPU last said of itself."""
        rows = self.recording.table("gpu_info").to_pylist()
        return {row["gpu"]: row for row in rows}

    def gpus(self, column: str) -> Floats:
        """A quantity of the GPUs in bins of time: ``[bin, gpu]``."""
        return self._grids("gpus", "gpu", column, len(self.index["name"]))

    def instances(self, column: str) -> Floats:
        """A quantity of the instances in bins of time: ``[bin, instance]``."""
        num = len(self.recording.columns("instance_index", "name")["name"])
        return self._grids("instances", "instance", column, num)

    def _grids(self, table: str, key: str, column: str, num: int) -> Floats:
        cache = self.__dict__.setdefault("_cache", {})
        if (table, column) not in cache:
            if table not in cache:
                cache[table] = self.recording.columns(table, "t_s", key)
            values = self.recording.columns(table, column)[column]
            at = cache[table]
            cache[table, column] = grid(at["t_s"], at[key], values, num, self.edges_s)
        return np.asarray(cache[table, column])

    @cached_property
    def limit_max_w(self) -> Floats:
        """Highest limit of each GPU, as it said when it joined."""
        num = len(self.index["name"])
        found = [self.info.get(g, {}).get("power_limit_default_w", np.nan) for g in range(num)]
        return np.asarray(found, np.float64)

    @cached_property
    def safe_w(self) -> Floats:
        """What each row would draw at most if every node were cut off."""
        num = len(self.index["name"])
        found = [self.info.get(g, {}).get("safe_power_limit_w", np.nan) for g in range(num)]
        return np.asarray(np.bincount(self.index["row"], found, len(self.rows.name)))

    @cached_property
    def capped(self) -> Bools:
        """In which bins a limit below its default held somewhere in each row: ``[bin, row]``."""
        num_rows = len(self.rows.name)
        if not len(self.index["name"]):
            return np.zeros((len(self.edges_s) - 1, num_rows), bool)
        low = self.gpus("power_limit_enforced_w") < self.limit_max_w - 0.5
        return np.stack(
            [low[:, self.index["row"] == row].any(axis=1) for row in range(num_rows)], axis=1
        )

    def capped_at(self, t_s: Floats, row: Any) -> Bools:
        """Whether a row was capped at a time."""
        place = np.clip(np.searchsorted(self.edges_s, t_s, "right") - 1, 0, len(self.capped) - 1)
        return np.asarray(self.capped[place, row])
