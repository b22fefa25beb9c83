"""NVIDIA GPUs through NVML: the only file that speaks to it.

``nvml`` is the module ``pynvml`` or anything that answers its function names: the emulated GPUs are
such a thing. Milliwatts, millijoules and error codes end here. GPUs are keyed by UUID, since a lost
one makes some tools renumber the rest.

Power that the driver reports is a 1-second mean on Ampere and later, except GA100 (A100), where it
is not averaged (nvml.h, nvmlDeviceGetPowerUsage); the instant value is field 186.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from msgspec import structs

from testbed.core.errors import DeviceError
from testbed.core.messages import GpuInfo, GpuReadings

_T = TypeVar("_T")

FIELD_MEMORY_TEMP = 82
FIELD_POWER_INSTANT = 186


class NvmlGpus:
    """All GPUs that NVML shows on this node, or those with the given UUIDs.

    Args:
        nvml: the ``pynvml`` module or an emulation of it.
        uuids: which GPUs, in this order; all of them by default.

    Raises:
        DeviceError: no driver, no GPU, or a UUID that is not there.
    """

    def __init__(self, nvml: Any, uuids: list[str] | None = None) -> None:
        self._nvml = nvml
        self._call("start NVML", nvml.nvmlInit)
        count = self._call("count GPUs", nvml.nvmlDeviceGetCount)
        handles: dict[str, Any] = {}
        for index in range(count):
            uuid, handle = self._open(index)
            handles[uuid] = handle
        if not handles:
            raise DeviceError("NVML shows no GPU on this node")
        missing = [uuid for uuid in uuids or [] if uuid not in handles]
        if missing:
            raise DeviceError(f"no GPU {missing[0]} here; there are {', '.join(handles)}")
        self.uuids = list(uuids or handles)
        self._handles = [handles[uuid] for uuid in self.uuids]
        self._lost = [handle is None for handle in self._handles]
        self._infos = self._read_infos()
        self._last_energy_j = [0.0] * len(self.uuids)

    def _call(self, what: str, function: Callable[..., _T], *arguments: Any) -> _T:
        try:
            return function(*arguments)
        except self._nvml.NVMLError as error:
            code = getattr(error, "value", None)
            lost = code in (self._nvml.NVML_ERROR_GPU_IS_LOST, self._nvml.NVML_ERROR_NOT_FOUND)
            raise DeviceError(f"cannot {what}: {error}", lost=lost) from None

    def _open(self, index: int) -> tuple[str, Any]:
        """UUID and handle of a GPU; no handle if it is lost."""
        nvml = self._nvml
        try:
            handle = self._call(f"open GPU {index}", nvml.nvmlDeviceGetHandleByIndex, index)
            return _text(self._call(f"name GPU {index}", nvml.nvmlDeviceGetUUID, handle)), handle
        except DeviceError as error:
            if not error.lost:
                raise
            return f"lost-GPU-{index}", None

    def _read_infos(self) -> list[GpuInfo]:
        """What does not change, per GPU; a lost one is taken to be like the first that answers."""
        infos: dict[int, GpuInfo] = {}
        for index in range(len(self.uuids)):
            if not self._lost[index]:
                try:
                    infos[index] = self._info(index)
                except DeviceError as error:
                    if not error.lost:
                        raise
                    self._lost[index] = True
        if not infos:
            raise DeviceError("all GPUs of this node are lost")
        like = next(iter(infos.values()))
        return [
            infos.get(index) or structs.replace(like, uuid=uuid)
            for index, uuid in enumerate(self.uuids)
        ]

    def _info(self, index: int) -> GpuInfo:
        nvml, handle = self._nvml, self._handles[index]
        what = f"read GPU {self.uuids[index]}"
        low_mw, high_mw = self._call(
            what, nvml.nvmlDeviceGetPowerManagementLimitConstraints, handle
        )
        default_mw = self._call(what, nvml.nvmlDeviceGetPowerManagementDefaultLimit, handle)
        top_mhz = self._call(what, nvml.nvmlDeviceGetMaxClockInfo, handle, nvml.NVML_CLOCK_SM)
        return GpuInfo(
            uuid=self.uuids[index],
            model=_text(self._call(what, nvml.nvmlDeviceGetName, handle)),
            memory_total_bytes=self._call(what, nvml.nvmlDeviceGetMemoryInfo, handle).total,
            power_limit_min_w=low_mw / 1000,
            power_limit_max_w=high_mw / 1000,
            power_limit_default_w=default_mw / 1000,
            sm_clock_min_mhz=float(self._lowest_clock_mhz(handle)),
            sm_clock_max_mhz=float(top_mhz),
        )

    def _lowest_clock_mhz(self, handle: Any) -> int:
        """Lowest SM clock that can be locked, or 0 where the driver does not list them."""
        nvml = self._nvml
        try:
            memory_mhz = max(nvml.nvmlDeviceGetSupportedMemoryClocks(handle))
            return int(min(nvml.nvmlDeviceGetSupportedGraphicsClocks(handle, memory_mhz)))
        except (nvml.NVMLError, ValueError):
            return 0

    def infos(self) -> list[GpuInfo]:
        """What does not change, per GPU. Command line: ``nvidia-smi -q``."""
        return self._infos

    def read(self) -> GpuReadings:
        """All readings now; a GPU that fell off the bus reads zero and stays lost.

        Command line: ``nvidia-smi --query-gpu=power.draw.instant,power.draw.average,power.limit,``
        ``enforced.power.limit,clocks.sm,temperature.gpu,utilization.gpu,memory.used``.
        """
        rows = [self._read(index) for index in range(len(self.uuids))]
        columns = zip(*rows, strict=True)
        return GpuReadings(*(list(column) for column in columns))

    def _read(self, index: int) -> tuple[Any, ...]:
        """One GPU in the order of `GpuReadings`."""
        nvml, handle = self._nvml, self._handles[index]
        if not self._lost[index]:
            try:
                average_w = nvml.nvmlDeviceGetPowerUsage(handle) / 1000
                instant_w, mem_temp_c = self._fields(index, average_w)
                energy_j = nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
                self._last_energy_j[index] = energy_j
                return (
                    instant_w,
                    average_w,
                    nvml.nvmlDeviceGetPowerManagementLimit(handle) / 1000,
                    nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
                    energy_j,
                    float(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
                    float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
                    mem_temp_c,
                    nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
                    int(nvml.nvmlDeviceGetMemoryInfo(handle).used),
                    int(nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)),
                    False,
                )
            except nvml.NVMLError as error:
                if getattr(error, "value", None) != nvml.NVML_ERROR_GPU_IS_LOST:
                    raise DeviceError(f"cannot read GPU {self.uuids[index]}: {error}") from None
                self._lost[index] = True
        return (0.0, 0.0, 0.0, 0.0, self._last_energy_j[index], 0.0, 0.0, 0.0, 0.0, 0, 0, True)

    def _fields(self, index: int, average_w: float) -> tuple[float, float]:
        """Instant power and memory temperature, where the GPU has them."""
        nvml = self._nvml
        values = nvml.nvmlDeviceGetFieldValues(
            self._handles[index], [FIELD_POWER_INSTANT, FIELD_MEMORY_TEMP]
        )
        instant, memory = values
        instant_w = instant.value.uiVal / 1000 if instant.nvmlReturn == 0 else average_w
        return instant_w, float(memory.value.uiVal) if memory.nvmlReturn == 0 else 0.0

    def power_limits_w(self) -> list[float]:
        """Limits as asked for last, by anybody. ``nvidia-smi --query-gpu=power.limit``."""
        return [self._power_limit_w(index) for index in range(len(self.uuids))]

    def _power_limit_w(self, index: int) -> float:
        if not self._lost[index]:
            read = self._nvml.nvmlDeviceGetPowerManagementLimit
            try:
                return float(self._call("read a power limit", read, self._handles[index])) / 1000
            except DeviceError as error:
                if not error.lost:
                    raise
                self._lost[index] = True
        return 0.0

    def set_power_limit(self, index: int, power_limit_w: float) -> None:
        """Ask for a limit. Command line: ``nvidia-smi -i INDEX -pl WATTS``."""
        self._call(
            f"set {power_limit_w} W on GPU {self.uuids[index]}",
            self._nvml.nvmlDeviceSetPowerManagementLimit,
            self._handles[index],
            round(power_limit_w * 1000),
        )

    def set_clock_lock(self, index: int, sm_clock_mhz: float) -> None:
        """Keep the SM clock at or below a value; 0 unlocks.

        Command line: ``nvidia-smi -i INDEX -lgc LOW,HIGH``.
        """
        nvml, handle = self._nvml, self._handles[index]
        what = f"lock GPU {self.uuids[index]} at {sm_clock_mhz} MHz"
        if sm_clock_mhz <= 0:
            self._call(what, nvml.nvmlDeviceResetGpuLockedClocks, handle)
        else:
            low_mhz = int(self._infos[index].sm_clock_min_mhz)
            self._call(
                what, nvml.nvmlDeviceSetGpuLockedClocks, handle, low_mhz, round(sm_clock_mhz)
            )

    def close(self) -> None:
        """Let go of the driver; limits stay as they are, as NVML has it."""
        self._call("stop NVML", self._nvml.nvmlShutdown)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
