"""What TAPAS learns from telemetry: inlets, GPU temperatures, power by hour, servers.

All four take samples as they come and keep sums only. They know no constant of the emulator:
inlets are piecewise linear in the outside temperature with knots every 5 C, GPUs are linear in
their power (one line each), servers linear in the power of their GPUs, and customers are the
percentile of their VMs' power at each hour of the day.
"""

from __future__ import annotations

import numpy as np

from testbed.core.view import Facility, Floats, GpuColumns, Ints

_KNOTS_C = np.arange(-10.0, 46.0, 5.0)
_RIDGE = 1e-3
_BINS = 64
"""Power classes of a customer's template, over the highest power of its GPUs."""
_PRIOR = 25.0
"""Samples that the fleet's slope counts for in a GPU's own."""
HOURS = 24


class InletModel:
    """Inlet temperature of each server by outside temperature and load of the datacenter.

    A common curve, and a constant offset per server: places differ by the same amount whatever the
    weather. Samples with an aisle short of air are left out: there the curve does not hold.
    """

    def __init__(self, count: int) -> None:
        size = len(_KNOTS_C) + 3
        self._left: Floats = np.zeros((size, size))
        self._right: Floats = np.zeros(size)
        self._weights: Floats = np.zeros(size)
        self._offset_c: Floats = np.zeros(count)
        self._samples: Floats = np.zeros(count)

    @staticmethod
    def _features(outside_c: float, load: float) -> Floats:
        return np.concatenate([[1.0, outside_c, load], np.maximum(outside_c - _KNOTS_C, 0.0)])

    def observe(self, outside_c: float, load: float, inlet_c: Floats) -> None:
        """A sample of all servers at one time."""
        features, mean_c = self._features(outside_c, load), float(inlet_c.mean())
        self._left += np.outer(features, features)
        self._right += features * mean_c
        ridge = _RIDGE * np.eye(len(features))
        self._weights = np.asarray(np.linalg.solve(self._left + ridge, self._right), np.float64)
        self._samples += 1.0
        self._offset_c = self._offset_c + (inlet_c - mean_c - self._offset_c) / self._samples

    @property
    def offset_c(self) -> Floats:
        """How much warmer each server's place is than the mean."""
        return self._offset_c

    def inlet_c(self, outside_c: float, load: float) -> Floats:
        """Inlet of each server with enough air."""
        predicted: Floats = self._features(outside_c, load) @ self._weights + self._offset_c
        return predicted


class HeatModel:
    """Temperature of each GPU above its inlet, a line in its power."""

    def __init__(self, count: int) -> None:
        self._n, self._x, self._y, self._xx, self._xy = np.zeros((5, count))

    def observe(self, rise_c: Floats, power_w: Floats) -> None:
        """A sample of all GPUs at one time."""
        known = power_w > 0
        for total, value in (
            (self._n, 1.0),
            (self._x, power_w),
            (self._y, rise_c),
            (self._xx, power_w * power_w),
            (self._xy, power_w * rise_c),
        ):
            total += np.where(known, value, 0.0)

    @property
    def lines(self) -> tuple[Floats, Floats]:
        """Intercept (C) and slope (C/W) of each GPU; the fleet's slope where little is known."""
        n = np.maximum(self._n, 1.0)
        variance = np.maximum(self._xx / n - (self._x / n) ** 2, 0.0)
        covariance = self._xy / n - self._x * self._y / n**2
        fleet = covariance.sum() / max(variance.sum(), 1e-9)
        own = self._n * variance / max(float(variance.mean()), 1e-9)
        with np.errstate(invalid="ignore", divide="ignore"):
            mine = np.where(variance > 0, covariance / np.maximum(variance, 1e-9), fleet)
        slope = (own * mine + _PRIOR * fleet) / (own + _PRIOR)
        slope = np.maximum(slope, 1e-3)
        return self._y / n - slope * self._x / n, slope

    def temp_c(self, inlet_c: Floats, power_w: Floats) -> Floats:
        """Temperature of each GPU at this power."""
        intercept, slope = self.lines
        predicted: Floats = inlet_c + intercept + slope * power_w
        return predicted

    def power_at_w(self, inlet_c: Floats, temp_c: float) -> Floats:
        """What each GPU may draw to stay at a temperature."""
        intercept, slope = self.lines
        allowed: Floats = (temp_c - inlet_c - intercept) / slope
        return allowed


class Templates:
    """Power of a customer's VMs by hour of the day, per GPU, at a percentile of what was seen.

    An unknown customer is taken to draw all it may.
    """

    def __init__(self, percentile: float) -> None:
        self.percentile = percentile
        self._counts: dict[int, Floats] = {}

    def observe(self, customer: Ints, gpu_frac: Floats, hour: float) -> None:
        """A sample of running VMs: their GPUs' power over their highest."""
        bins = np.clip((gpu_frac * _BINS).astype(np.int64), 0, _BINS - 1)
        for who, where in zip(customer.tolist(), bins.tolist(), strict=True):
            counts = self._counts.setdefault(who, np.zeros((HOURS, _BINS)))
            counts[int(hour) % HOURS, where] += 1.0

    def knows(self, customer: int) -> bool:
        """Whether all hours of this customer were seen."""
        counts = self._counts.get(customer)
        return counts is not None and bool((counts.sum(axis=1) > 0).all())

    def by_hour(self, customer: int) -> Floats:
        """Expected power per GPU over its highest, for each hour of the day."""
        counts = self._counts.get(customer)
        if counts is None:
            return np.ones(HOURS)
        total = counts.sum(axis=1)
        below = counts.cumsum(axis=1) >= self.percentile * total[:, None]
        level = (below.argmax(axis=1) + 1.0) / _BINS
        return np.where(total > 0, level, 1.0)


class ServerModel:
    """Draw and airflow of a server, lines in the power of its GPUs; the same for all servers."""

    def __init__(self) -> None:
        self._left, self._right = np.zeros((2, 2)), np.zeros((2, 2))
        self._weights = np.array([[0.0, 0.0], [1.0, 0.0]])

    def observe(self, gpus_w: Floats, draw_w: Floats, airflow_m3_s: Floats) -> None:
        """A sample of servers that run."""
        features = np.column_stack([np.ones(len(gpus_w)), gpus_w / 1e3])
        self._left += features.T @ features
        self._right += features.T @ np.column_stack([draw_w, airflow_m3_s])
        self._weights = np.linalg.solve(self._left + _RIDGE * np.eye(2), self._right)
        self._weights[1] /= 1e3

    def draw_w(self, gpus_w: Floats) -> Floats:
        """Whole servers."""
        draw: Floats = self._weights[0, 0] + self._weights[1, 0] * gpus_w
        return draw

    def airflow_m3_s(self, gpus_w: Floats) -> Floats:
        """Air that servers take in."""
        flow: Floats = self._weights[0, 1] + self._weights[1, 1] * gpus_w
        return flow

    def gpus_for_draw_w(self, draw_w: Floats) -> Floats:
        """What the GPUs of a server may draw for the server to draw this."""
        gpus: Floats = (draw_w - self._weights[0, 0]) / max(self._weights[1, 0], 1e-9)
        return gpus

    def gpus_for_airflow_w(self, airflow_m3_s: Floats) -> Floats:
        """What the GPUs of a server may draw for it to take in this much air."""
        gpus: Floats = (airflow_m3_s - self._weights[0, 1]) / max(self._weights[1, 1], 1e-12)
        return gpus


class Predictors:
    """The four together, fed from views."""

    def __init__(self, gpus: GpuColumns, facility: Facility, percentile: float) -> None:
        self.inlet = InletModel(len(facility.servers.name))
        self.heat = HeatModel(len(gpus.name))
        self.templates = Templates(percentile)
        self.server = ServerModel()

    def observe(self, gpus: GpuColumns, facility: Facility) -> None:
        """Take in what the building and the GPUs show now."""
        servers, vms = facility.servers, facility.vms
        lit = ~servers.dark
        if not lit.all():
            return
        load = facility.row_draw_w.sum() / facility.row_rating_w.sum()
        short = facility.aisles.airflow_m3_s > facility.aisles.capacity_m3_s
        if not short.any():
            self.inlet.observe(facility.outside_c, float(load), servers.inlet_c)
        self.heat.observe(gpus.temp_c - servers.inlet_c[gpus.node], gpus.power_avg_w)
        gpus_w = np.bincount(gpus.node, gpus.power_avg_w, len(servers.name)).astype(float)
        self.server.observe(gpus_w, servers.draw_w, servers.airflow_m3_s)
        running = np.flatnonzero(vms.node >= 0)
        if len(running):
            top_w = vms.num_gpus[running] * gpus.power_limit_max_w.max()
            frac = vms.draw_w[running] / top_w
            self.templates.observe(vms.customer[running], frac, facility.hour)
