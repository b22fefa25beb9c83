"""Opaque GPU VMs (IaaS): when they come and go, whose they are, and what load they put on GPUs.

A customer's VMs are alike: they follow the hours of one service (conversation or coding, of Azure's
week of May 2024) between a floor and the customer's peak, and each wanders a little on its own.
Lifetimes: a share is drawn from those of a measured fleet, and replaced on leaving; the others
outlive the run (some 60 % of GPU VMs live over two weeks).

Times are seconds of the run; ``speedup`` compresses the day. Customers' peaks, floors and shifts
are free parameters, declared here and swept where they matter.

>>> vms = make_vms(VmSpec(count=3), seed=1, duration_s=3600.0)
>>> vms.name[:3], vms.loads(0.0).shape == (len(vms.name),)
(('vm0', 'vm1', 'vm2'), True)
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache

import numpy as np

from testbed.core.spec import VmSpec
from testbed.workloads.columns import Floats, Ints
from testbed.workloads.lengths import DATA

DAYS = ("2024-05-13", "2024-05-14")
"""A Monday and a Tuesday that both services' curves have; they repeat."""
PERIOD_H = 24 * len(DAYS)
"""A run that begins at this hour of the year, or a multiple, begins on the first of them."""
UTC_OFFSET_H = -7
"""Sites' local time at the trace's hour 0 UTC: Pacific daylight time."""
NUM_CUSTOMERS = 8
_SPREAD = 0.15
"""Customers' peaks lie this far around the mean one."""
_SHIFT_H = 3.0
"""Customers' hours are shifted by up to this much either way."""
_FLOOR = (0.15, 0.5)
"""Load at the quietest hour over that at the peak, per customer (assumed)."""
_WANDER = 0.06
"""Standard deviation of a VM's own wandering."""
_WANDER_S = 300.0


@cache
def hourly_rpm(service: str) -> Floats:
    """Requests per minute of ``coding`` or ``conversation``, hour by hour over `DAYS`, UTC."""
    with (DATA / "azure_llm_2024_hourly.csv").open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["service"] == service and r["day"] in DAYS]
    rows.sort(key=lambda row: (row["day"], int(row["hour_utc"])))
    return np.array([float(row["requests_per_minute"]) for row in rows])


@cache
def _around(service: str) -> tuple[Floats, Floats, float]:
    """Middles of hours and their demand, with the last before the first and the first after the
    last, since the days repeat; and the highest demand."""
    rpm = hourly_rpm(service)
    middle: Floats = np.arange(-0.5, len(rpm) + 1.0)
    return middle, np.concatenate([rpm[-1:], rpm, rpm[:1]]), float(rpm.max())


def demand_frac(service: str, hour: Floats | float) -> Floats:
    """Demand over its highest hour at a local hour since the first day's midnight.

    >>> bool(0.9 < demand_frac("coding", 12.0) <= 1.0), bool(demand_frac("coding", 2.0) < 0.3)
    (True, True)
    """
    middle, rpm, highest = _around(service)
    at = (np.asarray(hour, float) - UTC_OFFSET_H) % PERIOD_H
    return np.asarray(np.interp(at, middle, rpm) / highest)


@cache
def _lifetimes() -> tuple[Floats, Floats]:
    with (DATA / "vm_lifetimes.csv").open(newline="") as file:
        rows = [(float(r["lifetime_h"]), float(r["frac"])) for r in csv.DictReader(file)]
    hours, frac = np.array(rows).T
    return np.append(hours, 1000.0), np.append(frac, 1.0)


@dataclass(frozen=True, slots=True)
class Customers:
    """What a customer's VMs have in common, in columns."""

    service: tuple[str, ...]
    peak: Floats
    floor: Floats
    shift_h: Floats

    def loads(self, customer: Ints, hour: float) -> Floats:
        """Mean load of a VM of each ``customer`` at a local hour."""
        shape = np.empty(len(self.peak))
        for service in ("coding", "conversation"):
            mine = np.array([s == service for s in self.service])
            shape[mine] = demand_frac(service, hour + self.shift_h[mine])
        mean: Floats = self.peak * (self.floor + (1.0 - self.floor) * shape)
        return mean[customer]


def make_customers(spec: VmSpec, seed: int, count: int = NUM_CUSTOMERS) -> Customers:
    """Customers drawn with a seed; every second one serves code."""
    rng = np.random.default_rng([seed, 29])
    return Customers(
        tuple("coding" if k % 2 else "conversation" for k in range(count)),
        np.clip(spec.intensity + rng.uniform(-_SPREAD, _SPREAD, count), 0.05, 1.0),
        rng.uniform(*_FLOOR, count),
        rng.uniform(-_SHIFT_H, _SHIFT_H, count),
    )


class Vms:
    """All VMs that a run will see, in order of arrival."""

    def __init__(
        self, spec: VmSpec, seed: int, duration_s: float, *, speedup: float, start_hour: float
    ) -> None:
        self.spec = spec
        self.customers = make_customers(spec, seed)
        self._speedup, self._start_hour = speedup, start_hour
        rng = np.random.default_rng([seed, 31, int(start_hour)])
        customer: list[int] = []
        arrival_s: list[float] = []
        departure_s: list[float] = []
        waiting = [0.0] * spec.count
        while waiting:
            at_s = waiting.pop(0)
            life_s = float("inf")
            if rng.random() < spec.short_lived_frac:
                hours, frac = _lifetimes()
                life_s = 3600.0 / speedup * float(np.interp(rng.random(), frac, hours))
                life_s = max(life_s, 360.0 / speedup)
            customer.append(int(rng.integers(len(self.customers.peak))))
            arrival_s.append(at_s)
            departure_s.append(at_s + life_s)
            if at_s + life_s < duration_s:
                waiting.append(at_s + life_s)
                waiting.sort()
        self.name = tuple(f"vm{index}" for index in range(len(customer)))
        self.customer: Ints = np.array(customer, np.int64)
        self.arrival_s: Floats = np.array(arrival_s)
        self.departure_s: Floats = np.array(departure_s)
        slots = int(duration_s * speedup / _WANDER_S) + 2
        self._wander = rng.normal(0.0, _WANDER, (len(customer), slots))

    def loads(self, t_s: float) -> Floats:
        """Load of each VM, 0 to 1: the share of full work that its GPUs do."""
        hour = self._start_hour + t_s * self._speedup / 3600.0
        place = t_s * self._speedup / _WANDER_S
        low = min(int(place), self._wander.shape[1] - 2)
        part = min(place - low, 1.0)
        wander = self._wander[:, low] * (1.0 - part) + self._wander[:, low + 1] * part
        loads = self.customers.loads(self.customer, hour) * (1.0 + wander)
        there = (self.arrival_s <= t_s) & (t_s < self.departure_s)
        return np.where(there, np.clip(loads, 0.0, 1.0), 0.0)


def make_vms(
    spec: VmSpec, seed: int, duration_s: float, *, speedup: float = 1.0, start_hour: float = 12.0
) -> Vms:
    """The VMs of a run that begins at a local hour of the first of `DAYS`."""
    return Vms(spec, seed, duration_s, speedup=speedup, start_hour=start_hour)
