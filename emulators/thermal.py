"""Temperature of GPUs: a fast die on a slow sink, over the air at the inlet.

Each of the two is a first-order lag of power with its own thermal resistance R and time constant:

    T = inlet + offset + rise_fast + rise_slow,   d rise/dt = (R P - rise) / tau

solved exactly for power that is constant over a step, so the size of steps does not matter.

>>> from emulators.profiles import load_gpu
>>> gpu = load_gpu("h100-sxm")
>>> heat = Thermal(gpu, 1, inlet_c=np.array([24.0]), offset_c=np.zeros(1))
>>> for _ in range(600):
...     temp_c = heat.advance(0.1, np.array([700.0]), np.array([24.0]))
>>> bool(abs(temp_c[0] - (24.0 + 8.4 + 0.062 * 700.0)) < 0.5)
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

    def __init__(
        self, profile: GpuProfile, count: int, *, inlet_c: Floats, offset_c: Floats
    ) -> None:
        self._profile = profile
        self._offset_c = offset_c + profile.thermal_offset_c
        self._fast_c = np.full(count, profile.thermal_fast_c_per_w * profile.idle_w)
        self._slow_c = np.full(count, profile.thermal_slow_c_per_w * profile.idle_w)
        self._decays: tuple[float, float, float] = (-1.0, 0.0, 0.0)
        self.temp_c: Floats = inlet_c + self._offset_c + self._fast_c + self._slow_c

    def advance(self, dt_s: float, power_w: Floats, inlet_c: Floats) -> Floats:
        """Let ``dt_s`` pass at ``power_w``; returns the die temperatures."""
        profile = self._profile
        if self._decays[0] != dt_s:
            fast = math.exp(-dt_s / profile.thermal_fast_s)
            slow = math.exp(-dt_s / profile.thermal_slow_s)
            self._decays = (dt_s, fast, slow)
        _, fast, slow = self._decays
        target_c = profile.thermal_fast_c_per_w * power_w
        self._fast_c = target_c + (self._fast_c - target_c) * fast
        target_c = profile.thermal_slow_c_per_w * power_w
        self._slow_c = target_c + (self._slow_c - target_c) * slow
        self.temp_c = inlet_c + self._offset_c + self._fast_c + self._slow_c
        return self.temp_c

    @property
    def mem_temp_c(self) -> Floats:
        """Memory temperature: follows the sink, not the die's spikes."""
        warm: Floats = self.temp_c - self._fast_c + self._profile.mem_temp_offset_c
        return warm
