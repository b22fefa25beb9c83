"""A bank of emulated GPUs whose loop is closed, advanced as arrays.

Load and clock give power, power gives heat, and the enforced cap and the temperature give the clock
at which the next work runs. One `GpuBank` holds any number of GPUs of one model: 8 on a live node,
all of a virtual fleet.

What NVML shows of it is kept in a `GpuState`: measured values are written there each tick, and the
limits and clock locks that clients set are read from there. Semantics follow nvml.h:

- instant power is that of the last tick; average power is the mean of the last second on H100 and
  equal to the instant value on A100 (GA100 does not average);
- energy is the integral of instant power, in millijoules, and never falls;
- the enforced limit is the lower of the requested and any out-of-band limit;
- the software-power-cap reason is set if and only if demand, the power that the present work would
  draw at the clock asked for, exceeds the enforced limit; thermal reasons above their thresholds;
  the idle reason while no kernel runs.

The cap controller moves the clock towards the highest one whose power fits, with a reaction time:
until it has reacted, power stands above the limit, as it does on a real board.
"""

from __future__ import annotations

import math
import uuid
from collections import deque
from typing import Any

import numpy as np

from emulators.native import BankKernel
from emulators.power import clock_for_limit, demand_w, power_w
from emulators.profiles import GpuProfile
from emulators.state import MAX_PROCESSES, GpuState
from emulators.thermal import Thermal
from testbed.core.freeze import put_back
from testbed.core.view import Bools, Floats, Ints

IDLE = 0x1
CLOCK_LOCK = 0x2
SW_POWER_CAP = 0x4
SW_THERMAL = 0x20
HW_THERMAL = 0x40

_CUDA = {7: (8, 0), 9: (9, 0), 10: (10, 0)}
"""CUDA compute capability by NVML architecture number."""
FIRST_UUID = 0x7E57BED
"""UUIDs of emulated GPUs count up from here."""
_CONTROL_WINDOW_S = 0.5
"""Time constant of the mean that the cap controller holds (assumed)."""
_PAYBACK = 2.0
"""How strongly it answers an overshoot of that mean (assumed)."""
_THERMAL_STEP_PER_S = 0.25
"""How fast thermal slowdown lowers the clock, as a share per second (assumed)."""
_COOL_C = 3.0
"""Degrees under the threshold at which thermal slowdown lets go (assumed)."""
_ALLOWED_FLOOR_FRAC = 0.85
"""Share of the limit below which paying back does not go (assumed)."""


class GpuBank:
    """GPUs of one model, advanced together.

    Args:
        profile: constants of the model.
        state: where NVML's view of the GPUs is kept; its size is the bank's.
        inlet_c: air temperature at the inlets, one number or one per GPU.
        offset_c: how much warmer each GPU runs than the profile's mean one.
        first_uuid: number from which the GPUs' UUIDs count up.
    """

    WIRED = ("profile", "state", "count", "_first_uuid", "_smallest_frac", "_step_frac", "_kernel")

    def __init__(
        self,
        profile: GpuProfile,
        state: GpuState,
        *,
        inlet_c: float | Floats = 24.0,
        offset_c: float | Floats = 0.0,
        first_uuid: int = FIRST_UUID,
    ) -> None:
        self.profile = profile
        self.state = state
        count = len(state.measured)
        self.count = count
        self._first_uuid = first_uuid
        self.inlet_c: Floats = np.broadcast_to(np.asarray(inlet_c, float), (count,)).copy()
        offsets_c = np.broadcast_to(np.asarray(offset_c, float), (count,)).copy()
        self.thermal = Thermal(profile, count, inlet_c=self.inlet_c, offset_c=offsets_c)
        self.clock_frac: Floats = np.ones(count)
        """SM clock at which work runs, over the highest one."""
        self.power_w: Floats = np.full(count, profile.idle_w)
        self.demand_w: Floats = self.power_w.copy()
        """What the present work would draw at the clock asked for."""
        self.enforced_w: Floats = np.full(count, profile.power_limit_default_w)
        # The driver outlives the daemon: a re-attached state goes on counting.
        self.energy_j: Floats = state.measured["energy_mj"].astype(float) / 1000
        self.unloaded_w: Floats | None = None
        """What each GPU draws less than ``idle_w`` for having no model on it, where that counts."""
        self._copies: list[tuple[int, float, float, float]] = []
        self._smooth_w: Floats = self.power_w.copy()
        self._thermal_frac: Floats = np.ones(count)
        self._history: deque[tuple[float, Floats]] = deque()
        self._time_s = 0.0
        self._smallest_frac = profile.sm_clock_min_mhz / profile.sm_clock_max_mhz
        self._step_frac = profile.sm_clock_step_mhz / profile.sm_clock_max_mhz
        self._introduce()
        zero = np.zeros(count)
        self._publish(0.0, zero, zero, np.ones(count, np.bool_), np.full(count, IDLE))
        self._kernel = BankKernel.for_bank(count, profile, state)
        self._bind()

    def _bind(self) -> None:
        """Have the kernel, if there is one, work on the arrays that are now the bank's."""
        if self._kernel is None:
            return
        thermal = self.thermal.columns()
        self._kernel.bind(
            clock_frac=self.clock_frac, power_w=self.power_w, demand_w=self.demand_w,
            enforced_w=self.enforced_w, energy_j=self.energy_j, smooth_w=self._smooth_w,
            thermal_frac=self._thermal_frac, inlet_c=self.inlet_c, **thermal,
        )  # fmt: skip
        self._kernel.step.cool_c = _COOL_C
        self._kernel.step.payback = _PAYBACK
        self._kernel.step.allowed_floor_frac = _ALLOWED_FLOOR_FRAC
        self._kernel.step.smallest_frac = self._smallest_frac
        self._kernel.step.step_frac = self._step_frac

    def _introduce(self) -> None:
        """Write what does not change, and default limits where a client has set none yet."""
        profile, measured, control = self.profile, self.state.measured, self.state.control
        low_w, high_w = profile.power_limit_range_w
        with self.state.writing():
            for index in range(self.count):
                if measured["uuid"][index] == b"":
                    measured["uuid"][index] = f"GPU-{uuid.UUID(int=self._first_uuid + index)}"
                    measured["pci_bus_id"][index] = f"00000000:{index % 256:02X}:00.0"
            measured["name"] = profile.full_name
            measured["architecture"] = profile.architecture
            measured["cuda_major"], measured["cuda_minor"] = _CUDA.get(profile.architecture, (0, 0))
            measured["memory_total_bytes"] = profile.memory_bytes
            measured["memory_reserved_bytes"] = profile.memory_reserved_bytes
            measured["memory_used_bytes"] = measured["num_processes"] = 0
            measured["power_limit_min_mw"] = round(low_w * 1000)
            measured["power_limit_max_mw"] = round(high_w * 1000)
            measured["power_limit_default_mw"] = round(profile.power_limit_default_w * 1000)
            measured["sm_clock_min_mhz"] = round(profile.sm_clock_min_mhz)
            measured["sm_clock_max_mhz"] = round(profile.sm_clock_max_mhz)
            measured["sm_clock_step_mhz"] = round(profile.sm_clock_step_mhz)
            measured["mem_clock_mhz"] = round(profile.mem_clock_mhz)
            measured["temp_slowdown_c"] = round(profile.temp_slowdown_c)
            measured["temp_shutdown_c"] = round(profile.temp_shutdown_c)
            unset = control["power_limit_mw"] == 0
            control["power_limit_mw"][unset] = round(profile.power_limit_default_w * 1000)

    def advance(
        self, dt_s: float, busy_frac: Floats, tensor_frac: Floats, hbm_frac: Floats
    ) -> None:
        """Let ``dt_s`` pass in which the GPUs did this work at their present clocks.

        Args:
            dt_s: length of the tick, seconds.
            busy_frac: share of the tick in which any kernel ran.
            tensor_frac: operations done over those at peak rate, mean over the tick.
            hbm_frac: bytes moved over those at peak bandwidth, mean over the tick.
        """
        if self._copies:
            hbm_frac = hbm_frac + self._copied(dt_s) / (dt_s * self.profile.hbm_bytes_per_s)
        if self._kernel is not None:
            self._advance_native(self._kernel, dt_s, busy_frac, tensor_frac, hbm_frac)
        else:
            self._advance_arrays(dt_s, busy_frac, tensor_frac, hbm_frac)

    def _advance_native(
        self,
        kernel: BankKernel,
        dt_s: float,
        busy_frac: Floats,
        tensor_frac: Floats,
        hbm_frac: Floats,
    ) -> None:
        """`_advance_arrays` as machine code, but for what needs a library of functions: powers."""
        kernel.draw(dt_s, busy_frac, tensor_frac, hbm_frac, self.unloaded_w)
        self._time_s += dt_s
        then_s, then_j = self._remember()
        step = kernel.step
        if kernel.dt_s != dt_s:
            kernel.dt_s = dt_s
            step.fast_decay, step.slow_decay = self.thermal.decays(dt_s)
            step.control_decay = math.exp(-dt_s / _CONTROL_WINDOW_S)
            step.down_share, step.up_share = self._shares(dt_s)
            step.thermal_step = _THERMAL_STEP_PER_S * dt_s
            step.spent_ns = round(dt_s * 1e9)
        step.span_s = self._time_s - then_s if self.profile.power_average_s > 0 else 0.0
        with self.state.writing():
            kernel.settle(self.thermal.effective_w(self.power_w), then_j)

    def _shares(self, dt_s: float) -> tuple[float, float]:
        """Part of the way to its target that the clock goes in a tick, downwards and upwards."""
        profile = self.profile
        down = 1.0 - math.exp(-dt_s / profile.cap_reaction_s)
        return down, 1.0 - math.exp(-dt_s / profile.cap_raise_s)

    def _advance_arrays(
        self, dt_s: float, busy_frac: Floats, tensor_frac: Floats, hbm_frac: Floats
    ) -> None:
        profile, control = self.profile, self.state.control
        self.power_w = power_w(profile, self.clock_frac, busy_frac, tensor_frac, hbm_frac)
        if self.unloaded_w is not None:
            self.power_w = self.power_w - self.unloaded_w
        lost = self.state.measured["lost"] != 0
        if lost.any():
            self.power_w = np.where(lost, 0.0, self.power_w)  # nobody can know, or limit it
        self.energy_j += self.power_w * dt_s
        self._time_s += dt_s
        temp_c = self.thermal.advance(dt_s, self.power_w, self.inlet_c)

        self.enforced_w = self.state.enforced_mw() / 1000
        asked_frac = self._asked(temp_c, dt_s)
        activity = (busy_frac, tensor_frac, hbm_frac, self.clock_frac)
        self.demand_w = demand_w(profile, asked_frac, *activity)
        capped = self.demand_w > self.enforced_w
        fits_frac = clock_for_limit(profile, self._allowed_w(dt_s), *activity)
        # Still paying back an overshoot, the controller holds a clock that demand would not need.
        target_frac = np.minimum(asked_frac, fits_frac)
        # Down to whole steps: the board picks the next clock below.
        target_frac = np.maximum(
            np.floor(target_frac / self._step_frac + 1e-9) * self._step_frac, self._smallest_frac
        )
        share = np.where(target_frac < self.clock_frac, *self._shares(dt_s))
        moved = self.clock_frac + (target_frac - self.clock_frac) * share
        moved = np.round(moved / self._step_frac) * self._step_frac
        near = np.abs(moved - target_frac) < 2 * self._step_frac
        self.clock_frac = np.clip(np.where(near, target_frac, moved), self._smallest_frac, 1.0)

        idle = busy_frac <= 0.0
        lock_mhz = control["sm_clock_lock_max_mhz"]
        reasons = np.where(idle, IDLE, 0)
        reasons |= np.where(capped, SW_POWER_CAP, 0)
        locked = (lock_mhz > 0) & (lock_mhz < profile.sm_clock_max_mhz)
        reasons |= np.where(locked & ~idle, CLOCK_LOCK, 0)
        reasons |= np.where(self._thermal_frac < 1.0, SW_THERMAL, 0)
        reasons |= np.where(temp_c >= profile.temp_shutdown_c, HW_THERMAL, 0)
        self._publish(dt_s, busy_frac, hbm_frac, idle, reasons)

    def _allowed_w(self, dt_s: float) -> Floats:
        """What the next tick may draw: the limit, less what the last second drew above it.

        The controller holds a mean, so a spike that it was too slow for is paid back.
        """
        keep = math.exp(-dt_s / _CONTROL_WINDOW_S)
        self._smooth_w = self.power_w + (self._smooth_w - self.power_w) * keep
        excess_w = np.maximum(self._smooth_w - self.enforced_w, 0.0)
        return np.maximum(
            self.enforced_w - _PAYBACK * excess_w, _ALLOWED_FLOOR_FRAC * self.enforced_w
        )

    def _asked(self, temp_c: Floats, dt_s: float) -> Floats:
        """The clock that would run without a power cap: locks and heat."""
        profile = self.profile
        hot = temp_c >= profile.temp_slowdown_c
        cool = temp_c < profile.temp_slowdown_c - _COOL_C
        if hot.any() or (self._thermal_frac < 1.0).any():
            step = _THERMAL_STEP_PER_S * dt_s
            moved = np.where(hot, self._thermal_frac - step, self._thermal_frac)
            moved = np.where(cool, moved + step, moved)
            self._thermal_frac = np.clip(moved, self._smallest_frac, 1.0)
        lock_mhz = self.state.control["sm_clock_lock_max_mhz"]
        lock_frac = np.where(lock_mhz > 0, lock_mhz / profile.sm_clock_max_mhz, 1.0)
        return np.minimum(np.minimum(lock_frac, 1.0), self._thermal_frac)

    def _publish(
        self,
        dt_s: float,
        busy_frac: Floats,
        hbm_frac: Floats,
        idle: Bools,
        reasons: Ints,
    ) -> None:
        """Write what NVML shows, in its units and rounding."""
        profile, measured = self.profile, self.state.measured
        then_s, then_j = self._remember()
        average_w = self.power_w
        if profile.power_average_s > 0 and self._time_s > then_s:
            average_w = (self.energy_j - then_j) / (self._time_s - then_s)
        # Under a very low cap the board skips cycles: work runs slower than the clock it shows.
        floor_mhz = profile.sm_clock_idle_mhz + profile.sm_clock_step_mhz
        lock_mhz = self.state.control["sm_clock_lock_max_mhz"]
        lowest_mhz = np.where(lock_mhz > 0, np.minimum(lock_mhz, floor_mhz), floor_mhz)
        work_mhz = np.maximum(self.clock_frac * profile.sm_clock_max_mhz, lowest_mhz)
        clock_mhz = np.where(idle, profile.sm_clock_idle_mhz, work_mhz)
        with self.state.writing():
            measured["power_instant_mw"] = np.rint(self.power_w * 1000)
            measured["power_average_mw"] = np.rint(average_w * 1000)
            measured["energy_mj"] = self.energy_j * 1000
            measured["sm_clock_mhz"] = np.rint(clock_mhz)
            measured["temp_c"] = np.maximum(np.rint(self.thermal.temp_c), 0)
            measured["mem_temp_c"] = np.maximum(np.rint(self.thermal.mem_temp_c), 0)
            # Any kernel in the period counts: 0 is for none at all.
            measured["gpu_util_pct"] = np.ceil(busy_frac * 100)
            measured["mem_util_pct"] = np.minimum(np.ceil(hbm_frac * 100), 100)
            measured["throttle"] = reasons
            spent_ns = round(dt_s * 1e9)
            if spent_ns:
                measured["power_violation_ns"] += np.where(
                    reasons & SW_POWER_CAP, spent_ns, 0
                ).astype(np.uint64)
                measured["thermal_violation_ns"] += np.where(
                    reasons & (SW_THERMAL | HW_THERMAL), spent_ns, 0
                ).astype(np.uint64)

    def _remember(self) -> tuple[float, Floats]:
        """Note the energy used by now; returns when the window of the mean began, and that then."""
        history, window_s = self._history, self.profile.power_average_s
        history.append((self._time_s, self.energy_j.copy()))
        while len(history) > 2 and history[1][0] <= self._time_s - window_s + 1e-9:
            history.popleft()
        return history[0]

    def copy(self, gpu: int, from_s: float, to_s: float, num_bytes: float) -> None:
        """Let a GPU's memory take in or give out so many bytes, evenly from one time to another.

        Copy engines do it, beside kernels: it draws what that traffic draws, and no kernel shows.
        """
        self._copies.append((gpu, from_s, to_s, num_bytes / max(to_s - from_s, 1e-9)))

    def end_copies(self, gpu: int) -> None:
        """Whatever is copied to or from a GPU is given up."""
        self._copies = [copy for copy in self._copies if copy[0] != gpu]

    def _copied(self, dt_s: float) -> Floats:
        """Bytes copied in the next ``dt_s``, per GPU."""
        start_s, end_s = self._time_s, self._time_s + dt_s
        moved = np.zeros(self.count)
        for gpu, from_s, to_s, rate in self._copies:
            moved[gpu] += rate * max(0.0, min(end_s, to_s) - max(start_s, from_s))
        self._copies = [copy for copy in self._copies if copy[2] > end_s]
        return moved

    def lose(self, gpu: int) -> None:
        """A GPU falls off the bus: from now on every call on it returns an error."""
        with self.state.writing():
            self.state.measured["lost"][gpu] = 1

    def save(self) -> dict[str, Any]:
        """The state, and what NVML shows of it; `restore` gives it to a bank made alike."""
        return {"bank": self, "measured": self.state.measured, "control": self.state.control}

    def restore(self, kept: dict[str, Any]) -> None:
        """Be what `save` saw."""
        put_back(self, kept["bank"])
        with self.state.writing():
            self.state.measured[:] = kept["measured"]
            self.state.control[:] = kept["control"]
        self._bind()

    def load(self, gpu: int, *, pid: int, used_bytes: int) -> None:
        """A process takes memory on a GPU.

        Raises:
            ValueError: there is not so much left, or no room in the process table.
        """
        row = self.state.measured[gpu]
        free = row["memory_total_bytes"] - row["memory_reserved_bytes"] - row["memory_used_bytes"]
        if used_bytes > free:
            raise ValueError(f"used_bytes = {used_bytes} exceeds the {int(free)} free on GPU {gpu}")
        place = int(row["num_processes"])
        if place >= MAX_PROCESSES:
            raise ValueError(f"GPU {gpu} has {place} processes already")
        with self.state.writing():
            row["processes"][place] = (used_bytes, pid, 0)
            row["num_processes"] = place + 1
            row["memory_used_bytes"] += np.uint64(used_bytes)

    def unload(self, gpu: int) -> None:
        """All processes leave a GPU."""
        row = self.state.measured[gpu]
        with self.state.writing():
            row["num_processes"] = 0
            row["processes"] = 0
            row["memory_used_bytes"] = 0
