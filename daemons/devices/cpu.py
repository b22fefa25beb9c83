"""A CPU core in the place of a GPU, with a CPU-time quota in the place of a power limit.

So that a real device is in the loop on any machine: real kernels run in a control group, a quota
really slows them, and the readings are what the kernel measured. What is not real is the watt: a
core that is always busy counts as `WATTS_PER_CORE` (assumed; no counter is read), so a limit of
half of it is a quota of half a core. A quota is a poor stand-in for a power cap in one respect: it
stops a process for parts of each 0.1 s, where a cap lowers the clock.

Groups and what runs in them are gone afterwards, also if this process is killed: see
`daemons.guardian`.
"""

from __future__ import annotations

import os
import time
from collections import deque
from pathlib import Path

import psutil

from daemons.devices.cgroup import ROOT, Cgroups, Group, open_cgroups
from daemons.guardian import Guardian
from testbed.core.errors import DeviceError
from testbed.core.messages import GpuInfo, GpuReadings

WATTS_PER_CORE = 10.0
_IDLE_W = 0.0
_LOWEST_SHARE = 0.1
_IDLE, _POWER_CAP = 0x1, 0x4


class CpuDevices:
    """Cores that look like GPUs to the node daemon; answers `daemons.seams.GpuDevice`.

    Args:
        count: how many, one core each.
        name: of the parent group; unique on the machine.

    Raises:
        DeviceError: no CPU control groups that may be written to.
    """

    def __init__(self, count: int, *, name: str, root: Path = ROOT) -> None:
        self._cgroups: Cgroups = open_cgroups(root, parent=name)
        self._guardian = Guardian()
        self._guardian.tell(f"cgroup {name}")
        self._groups: list[Group] = [self._cgroups.create(f"core{k}") for k in range(count)]
        self._limit_w = [WATTS_PER_CORE] * count
        self._used_s = [0.0] * count
        self._throttled_s = [0.0] * count
        self._energy_j = [0.0] * count
        self._read_s = time.monotonic()
        self._history: deque[tuple[float, list[float]]] = deque([(self._read_s, [0.0] * count)])
        frequency = psutil.cpu_freq()
        self._mhz = float(frequency.max or frequency.current) if frequency else 1000.0
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        self._infos = [
            GpuInfo(
                uuid=f"CPU-{boot}-{k}",
                model="CPU core with a quota",
                memory_total_bytes=int(psutil.virtual_memory().total),
                power_limit_min_w=WATTS_PER_CORE * _LOWEST_SHARE,
                power_limit_max_w=WATTS_PER_CORE,
                power_limit_default_w=WATTS_PER_CORE,
                sm_clock_min_mhz=self._mhz,
                sm_clock_max_mhz=self._mhz,
            )
            for k in range(count)
        ]

    def attach(self, index: int, pid: int) -> None:
        """Run a process on this device."""
        self._groups[index].attach(pid)

    def infos(self) -> list[GpuInfo]:
        """What does not change."""
        return self._infos

    def read(self) -> GpuReadings:
        """Use of each core since the last reading, as the kernel counted it."""
        now_s = time.monotonic()
        since_s = max(now_s - self._read_s, 1e-6)
        self._read_s = now_s
        instant_w, busy, masks, memory = [], [], [], []
        for index, group in enumerate(self._groups):
            reading = group.read()
            used_s = reading.cpu_usage_s - self._used_s[index]
            held_s = reading.cpu_throttled_s - self._throttled_s[index]
            self._used_s[index] = reading.cpu_usage_s
            self._throttled_s[index] = reading.cpu_throttled_s
            self._energy_j[index] += used_s * WATTS_PER_CORE
            instant_w.append(_IDLE_W + used_s / since_s * WATTS_PER_CORE)
            busy.append(min(1.0, used_s / since_s))
            masks.append((_POWER_CAP if held_s > 0 else 0) | (_IDLE if used_s <= 0 else 0))
            memory.append(reading.current_bytes)
        self._history.append((now_s, list(self._energy_j)))
        while len(self._history) > 2 and self._history[1][0] <= now_s - 1.0:
            self._history.popleft()
        then_s, then_j = self._history[0]
        mean_w = [
            (now_j - before_j) / max(now_s - then_s, 1e-6)
            for now_j, before_j in zip(self._energy_j, then_j, strict=True)
        ]
        count = len(self._groups)
        return GpuReadings(
            power_instant_w=instant_w,
            power_avg_w=mean_w,
            power_limit_w=list(self._limit_w),
            power_limit_enforced_w=list(self._limit_w),
            energy_j=list(self._energy_j),
            sm_clock_mhz=[self._mhz] * count,
            temp_c=[_temperature_c()] * count,
            mem_temp_c=[0.0] * count,
            gpu_busy_frac=busy,
            fb_used_bytes=memory,
            throttle=masks,
            lost=[False] * count,
        )

    def power_limits_w(self) -> list[float]:
        """The limits set last."""
        return list(self._limit_w)

    def set_power_limit(self, index: int, power_limit_w: float) -> None:
        """Set the quota that the limit stands for."""
        info = self._infos[index]
        if not info.power_limit_min_w <= power_limit_w <= info.power_limit_max_w:
            raise DeviceError(
                f"limit {power_limit_w} W is outside [{info.power_limit_min_w}, "
                f"{info.power_limit_max_w}] W"
            )
        share = power_limit_w / WATTS_PER_CORE
        self._groups[index].set_cpu_quota(None if share >= 1.0 else share)
        self._limit_w[index] = power_limit_w

    def set_clock_lock(self, index: int, sm_clock_mhz: float) -> None:
        """Not something that a quota can do; ignored when unlocking."""
        if sm_clock_mhz > 0 and sm_clock_mhz < self._mhz:
            raise DeviceError("the clock of a CPU core cannot be locked here: use a power limit")

    def close(self) -> None:
        """End what runs on the cores and remove the groups."""
        for group in self._groups:
            group.kill()
        for group in self._groups:
            group.remove()
        self._cgroups.close()
        self._guardian.dismiss()


def _temperature_c() -> float:
    """The warmest core that the machine reports; 0 where it reports none."""
    sensors = psutil.sensors_temperatures() if hasattr(psutil, "sensors_temperatures") else {}
    cores = [entry.current for entries in sensors.values() for entry in entries]
    return float(max(cores)) if cores else 0.0


def core_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
