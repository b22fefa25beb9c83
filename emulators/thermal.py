"""Temperature of GPUs: a fast die on a slow sink, over the air at the inlet.

Each of the two is a first-order lag with its own thermal resistance R and time constant:

    T = inlet + offset + rise_fast + rise_slow,   d rise/dt = (R P_eff - rise) / tau
    P_eff = P_ref (P / P_ref) ** exponent

solved exactly for power that is constant over a step, so the size of steps does not matter.
``P_ref`` is the highest power limit. Where fans answer heat, a watt warms less the more of them
there are: three years of hourly means of servers with A100 and H100 cards give an exponent of
0.48 (`docs/fidelity.md`), with an error of 1.9 C against 2.1 C for a straight line.

>>> from emulators.profiles import load_gpu
>>> gpu = load_gpu("h100-sxm")
>>> heat = Thermal(gpu, 1, inlet_c=np.array([24.0]), offset_c=np.zeros(1))
>>> for _ in range(600):
...     temp_c = heat.advance(0.1, np.array([700.0]), np.array([24.0]))
>>> bool(abs(temp_c[0] - 76.0) < 1.0)
True
"""

from __future__ import annotations

import math

import numpy as np

from emulators.profiles import GpuProfile
from testbed.core.view import Floats


class Thermal:
    """Die and memory temperatures of a bank of GPUs, which begin settled at idle power.

    Args:
        profile: constants of the GPU.
        count: GPUs in the bank.
        inlet_c: air temperature per GPU.
        offset_c: how much warmer each runs than the profile's mean one.
    """

    WIRED = ("_profile", "_offset_c")

    def __init__(
        self, profile: GpuProfile, count: int, *, inlet_c: Floats, offset_c: Floats
    ) -> None:
        self._profile = profile
        self._offset_c = offset_c + profile.thermal_offset_c
        idle_w = self.effective_w(np.full(count, profile.idle_w))
        self._fast_c = profile.thermal_fast_c_per_w * idle_w
        self._slow_c = profile.thermal_slow_c_per_w * idle_w
        self._decays: tuple[float, float, float] = (-1.0, 0.0, 0.0)
        self.temp_c: Floats = inlet_c + self._offset_c + self._fast_c + self._slow_c

    def advance(self, dt_s: float, power_w: Floats, inlet_c: Floats) -> Floats:
        """Let ``dt_s`` pass at ``power_w``; returns the die temperatures."""
        profile = self._profile
        fast, slow = self.decays(dt_s)
        effective_w = self.effective_w(power_w)
        target_c = profile.thermal_fast_c_per_w * effective_w
        self._fast_c = target_c + (self._fast_c - target_c) * fast
        target_c = profile.thermal_slow_c_per_w * effective_w
        self._slow_c = target_c + (self._slow_c - target_c) * slow
        self.temp_c = inlet_c + self._offset_c + self._fast_c + self._slow_c
        return self.temp_c

    def decays(self, dt_s: float) -> tuple[float, float]:
        """What is left after ``dt_s`` of a distance to the settled temperature, die and sink."""
        if self._decays[0] != dt_s:
            fast = math.exp(-dt_s / self._profile.thermal_fast_s)
            slow = math.exp(-dt_s / self._profile.thermal_slow_s)
            self._decays = (dt_s, fast, slow)
        _, fast, slow = self._decays
        return fast, slow

    def columns(self) -> dict[str, Floats]:
        """The arrays that `advance` reads and writes, for who does its work in place."""
        return {
            "fast_c": self._fast_c,
            "slow_c": self._slow_c,
            "temp_c": self.temp_c,
            "offset_c": self._offset_c,
        }

    def effective_w(self, power_w: Floats) -> Floats:
        """The power that a straight line would need for the heat of this one."""
        profile = self._profile
        if profile.thermal_exponent == 1.0:
            return power_w
        reference_w = profile.power_limit_max_w
        effective_w: Floats = reference_w * (power_w / reference_w) ** profile.thermal_exponent
        return effective_w

    def settled_c(self, power_w: Floats, inlet_c: Floats) -> Floats:
        """Die temperature after a long time at ``power_w``."""
        profile = self._profile
        resistance = profile.thermal_fast_c_per_w + profile.thermal_slow_c_per_w
        settled: Floats = inlet_c + self._offset_c + resistance * self.effective_w(power_w)
        return settled

    def limit_w(self, inlet_c: Floats, temp_c: float) -> Floats:
        """What each GPU may draw for ever and stay at ``temp_c``: `settled_c` turned around."""
        profile = self._profile
        resistance = profile.thermal_fast_c_per_w + profile.thermal_slow_c_per_w
        effective_w = np.maximum(temp_c - inlet_c - self._offset_c, 0.0) / resistance
        reference_w = profile.power_limit_max_w
        limit: Floats = reference_w * (effective_w / reference_w) ** (1 / profile.thermal_exponent)
        return limit

    @property
    def mem_temp_c(self) -> Floats:
        """Memory temperature: follows the sink, not the die's spikes."""
        warm: Floats = self.temp_c - self._fast_c + self._profile.mem_temp_offset_c
        return warm
