"""What an instance draws and how long its requests wait, by class, shape, clock and load.

A table made by sweeping a device (`testbed.profiling` sweeps the emulated one) and read by policies
that plan with it. Loads are requests per second of one class on one instance; latencies are the
99th percentile over what the class was promised, so 1 is the edge of what is allowed.

>>> profile = ServingProfile(
...     classes=("short",), shares=np.ones(1), tps=(8,), clocks_mhz=np.array([990.0, 1980.0]),
...     saturation_rps=np.array([[10.0]]), load_frac=np.array([0.0, 0.5, 1.0]),
...     power_w=np.array([[[[800.0, 1600.0, 2000.0], [800.0, 3000.0, 4000.0]]]]),
...     ttft_ratio=np.array([[[[0.0, 0.5, 3.0], [0.0, 0.2, 0.8]]]]),
...     tpot_ratio=np.array([[[[0.0, 0.5, 0.7], [0.0, 0.2, 0.3]]]]),
...     running=np.array([[[[0.0, 5.0, 12.0], [0.0, 4.0, 9.0]]]]),
...     prefill_tps=np.array([[20e3]]), ttft_limit_s=np.array([0.4]))
>>> [round(float(profile.limit_rps(0, 0, clock)), 2) for clock in (0, 1)]
[6.0, 10.0]
>>> float(profile.power_at_w(0, 0, 1, 2.5))
1900.0
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from testbed.core.view import Floats


class Sweep(NamedTuple):
    """What a policy wants to know of every class."""

    tps: tuple[int, ...] = (2, 4, 8)
    clocks_mhz: tuple[float, ...] = (800.0, 1000.0, 1200.0, 1400.0, 1600.0, 1800.0, 1980.0)
    mixes: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Mixes to be swept beside the classes: a name, and classes at their usual shares."""


class Learner(Protocol):
    """A policy that plans with a profile: it is handed one before the run begins."""

    sweep: Sweep

    def learn(self, profile: ServingProfile) -> None:
        """Keep the profile."""
        ...


@dataclass(frozen=True, slots=True)
class ServingProfile:
    """The table; arrays are indexed ``[class, tp, clock, load]``."""

    classes: tuple[str, ...]
    """Names of service classes, of the sweep's mixes, and last ``all``, the mix of all classes."""
    shares: Floats
    """Share of all requests that each class, or mix, has had."""
    tps: tuple[int, ...]
    clocks_mhz: Floats
    """Ascending; the last is the highest of the GPU."""
    saturation_rps: Floats
    """``[class, tp]``: what an instance can do at the highest clock, whatever the wait."""
    load_frac: Floats
    """Loads of the table over ``saturation_rps``, from 0 up."""
    power_w: Floats
    """Of all GPUs of the instance together."""
    ttft_ratio: Floats
    """P99 of time to first token over its limit."""
    tpot_ratio: Floats
    """P99 of a request's mean time per token over its limit."""
    running: Floats
    """Mean number of requests in the instance."""
    prefill_tps: Floats
    """``[class, tp]``: prompt tokens per second of an instance at the highest clock that does
    nothing else."""
    ttft_limit_s: Floats
    """``[class]``: time to first token that was promised; of a mix the shortest."""

    def limit_rps(
        self, cls: int, tp: int, clock: int, *, ttft_most: float = 1.0, tpot_most: float = 1.0
    ) -> float:
        """The highest load at which both latencies stay within so many times their limits.

        Linear between the loads of the table; 0 where even the lowest load misses.
        """
        worst = np.maximum(
            self.ttft_ratio[cls, tp, clock] / ttft_most,
            self.tpot_ratio[cls, tp, clock] / tpot_most,
        )
        over = np.flatnonzero(worst > 1.0)
        if not len(over):
            frac = float(self.load_frac[-1])
        elif over[0] <= 1:
            return 0.0  # the lowest load is too much; nothing lies between it and none at all
        else:
            first = over[0]
            low, high = worst[first - 1], worst[first]
            part = (1.0 - low) / (high - low)
            frac = float(
                self.load_frac[first - 1]
                + part * (self.load_frac[first] - self.load_frac[first - 1])
            )
        return frac * float(self.saturation_rps[cls, tp])

    def power_at_w(self, cls: int, tp: int, clock: int, rps: Floats | float) -> Floats:
        """Draw of the instance at a load; at most that of the table's last."""
        return self._at(self.power_w, cls, tp, clock, rps)

    def running_at(self, cls: int, tp: int, clock: int, rps: Floats | float) -> Floats:
        """Requests in the instance at a load, the same way."""
        return self._at(self.running, cls, tp, clock, rps)

    def _at(self, table: Floats, cls: int, tp: int, clock: int, rps: Floats | float) -> Floats:
        frac = np.asarray(rps) / self.saturation_rps[cls, tp]
        return np.asarray(np.interp(frac, self.load_frac, table[cls, tp, clock]))
