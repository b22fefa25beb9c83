"""Power of a GPU from the work it does and the clock it does it at.

    P = idle + busy * busy_w * x v(x)^2 + tensor * tensor_w * v(x)^2 + hbm * hbm_w

``x`` is the SM clock over its highest value and ``v(x)`` the core voltage over its highest value:
linear from ``voltage_floor_frac`` at ``voltage_knee_frac`` to 1 at ``x = 1``, constant below. Clock
trees and leakage of a busy chip switch at every cycle, so go as f V^2; an operation costs energy
per operation, V^2, whatever the clock, so its term goes with the rate of operations; memory runs on
clocks and voltages of its own. Power is linear in the work at a given clock, so the mean of a tick
with several phases is right, and energy is the integral of power.

Below ``bandwidth_knee_frac`` the SMs cannot keep the memory busy: what decoding sheds under a cap
comes first from voltage (free) and then from bandwidth (a cliff).
"""

from __future__ import annotations

import numpy as np

from emulators.profiles import GpuProfile
from testbed.core.view import Floats

NUM_LEVELS = 33
"""Clocks at which `clock_for_limit` looks; it interpolates between them."""


def voltage_frac(profile: GpuProfile, clock_frac: Floats | float) -> Floats:
    """Core voltage over its highest value, at an SM clock over its highest value."""
    floor, knee = profile.voltage_floor_frac, profile.voltage_knee_frac
    slope = (1.0 - floor) / (1.0 - knee)
    volts: Floats = np.maximum(floor, 1.0 - slope * (1.0 - np.asarray(clock_frac)))
    return volts


def power_w(
    profile: GpuProfile,
    clock_frac: Floats | float,
    busy_frac: Floats | float,
    tensor_frac: Floats | float,
    hbm_frac: Floats | float,
) -> Floats:
    """Mean power over a tick; all arguments broadcast.

    Args:
        profile: constants of the GPU.
        clock_frac: SM clock over the highest.
        busy_frac: share of the tick in which a kernel ran.
        tensor_frac: operations over those at peak rate and highest clock.
        hbm_frac: bytes moved over those at peak bandwidth.
    """
    volts2 = voltage_frac(profile, clock_frac) ** 2
    power: Floats = (
        profile.idle_w
        + profile.busy_w * np.asarray(busy_frac) * clock_frac * volts2
        + profile.tensor_w * np.asarray(tensor_frac) * volts2
        + profile.hbm_w * np.asarray(hbm_frac)
    )
    return power


def slowdown(
    profile: GpuProfile,
    at_frac: Floats | float,
    busy_frac: Floats | float,
    tensor_frac: Floats | float,
    clock_frac: Floats | float,
) -> Floats:
    """How many times longer work seen at ``clock_frac`` takes at the clock ``at_frac``.

    The busy time is split into a part bound by the tensor cores, whose rate goes with the clock,
    and the rest, whose rate goes with the memory bandwidth that the clock can sustain.
    """
    attainable = np.maximum(busy_frac * profile.gemm_efficiency * np.asarray(clock_frac), 1e-9)
    bound = np.minimum(tensor_frac / attainable, 1.0)
    knee = profile.bandwidth_knee_frac
    memory_now = np.minimum(np.asarray(clock_frac) / knee, 1.0)
    memory_then = np.minimum(np.asarray(at_frac) / knee, 1.0)
    times: Floats = bound * clock_frac / at_frac + (1.0 - bound) * memory_now / memory_then
    return times


def demand_w(
    profile: GpuProfile,
    at_frac: Floats,
    busy_frac: Floats,
    tensor_frac: Floats,
    hbm_frac: Floats,
    clock_frac: Floats,
) -> Floats:
    """What work seen at ``clock_frac`` would draw at the clock ``at_frac`` instead.

    The GPU is taken to stay as busy as it was: a queue that empties faster is seen at the next
    tick.
    """
    times = slowdown(profile, at_frac, busy_frac, tensor_frac, clock_frac)
    return power_w(profile, at_frac, busy_frac, tensor_frac / times, hbm_frac / times)


def levels_frac(profile: GpuProfile) -> Floats:
    """The clocks at which `clock_for_limit` looks, over the highest one."""
    lowest = profile.sm_clock_min_mhz / profile.sm_clock_max_mhz
    return np.linspace(lowest, 1.0, NUM_LEVELS)


def clock_for_limit(
    profile: GpuProfile,
    limit_w: Floats,
    busy_frac: Floats,
    tensor_frac: Floats,
    hbm_frac: Floats,
    clock_frac: Floats,
) -> Floats:
    """The highest clock at which `demand_w` of this work fits the limit.

    Limits that no clock meets give the lowest clock: the floor of a power cap.
    """
    fits: Floats = np.ones(len(limit_w))
    activity = (busy_frac, tensor_frac, hbm_frac, clock_frac)
    over = demand_w(profile, fits, *activity) > limit_w
    if not over.any():
        return fits
    levels = levels_frac(profile)
    columns = [column[over][:, None] for column in activity]
    demand = demand_w(profile, levels[None, :], *columns)
    wanted_w = limit_w[over]
    # Demand grows with the clock: count the levels that fit, then interpolate to the limit.
    last = np.maximum((demand <= wanted_w[:, None]).sum(axis=1) - 1, 0)
    rows = np.arange(len(last))
    upper = np.minimum(last + 1, NUM_LEVELS - 1)
    low_w, high_w = demand[rows, last], demand[rows, upper]
    part = np.clip((wanted_w - low_w) / np.maximum(high_w - low_w, 1e-9), 0.0, 1.0)
    fits[over] = levels[last] + part * (levels[upper] - levels[last])
    return fits
