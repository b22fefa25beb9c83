"""Emulated GPUs that answer `pynvml`'s own function names, inside this process.

``EmulatedNvml(state)`` stands where code says ``import pynvml``: the same names, argument order,
constants, return types and error classes, on a `GpuState`. What a client sets goes to the state's
control blocks, where the emulator and every other reader of the state find it.

Semantics are those of nvml.h 13: limits outside the constraints are INVALID_ARGUMENT, setters of a
client without privilege NO_PERMISSION, anything on a lost GPU GPU_IS_LOST, calls before `nvmlInit`
UNINITIALIZED.

>>> state = GpuState.create(1)
>>> state.measured["power_average_mw"] = 512_000
>>> nvml = EmulatedNvml(state)
>>> nvml.nvmlInit()
>>> nvml.nvmlDeviceGetPowerUsage(nvml.nvmlDeviceGetHandleByIndex(0))
512000
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pynvml

from emulators.state import GpuState

DRIVER_VERSION = "580.65.06"
NVML_VERSION = f"13.{DRIVER_VERSION}"
CUDA_VERSION = 13000

_FIELDS: dict[int, tuple[str, str]] = {
    82: ("measured", "mem_temp_c"),
    83: ("measured", "energy_mj"),
    185: ("measured", "power_average_mw"),
    186: ("measured", "power_instant_mw"),
    187: ("measured", "power_limit_min_mw"),
    188: ("measured", "power_limit_max_mw"),
    189: ("measured", "power_limit_default_mw"),
    190: ("enforced", ""),
    192: ("control", "power_limit_mw"),
}
"""NVML field id -> where its value is kept."""


class Handle:
    """What ``nvmlDeviceGetHandleBy...`` returns."""

    def __init__(self, index: int) -> None:
        self.index = index


class EmulatedNvml:
    """See the module's story.

    Args:
        state: the GPUs.
        privileged: whether this client may set limits; the driver asks for root.
    """

    def __init__(self, state: GpuState, *, privileged: bool = True) -> None:
        self._state = state
        self._privileged = privileged
        self._users = 0

    def __getattr__(self, name: str) -> Any:
        # Constants, structs and error classes are pynvml's own; functions we do not answer behave
        # as a driver that does not support them.
        if name.startswith("nvml") and callable(getattr(pynvml, name, None)):
            return self._unsupported
        try:
            return getattr(pynvml, name)
        except AttributeError:
            raise AttributeError(f"neither emulated nor in pynvml: {name}") from None

    def _unsupported(self, *arguments: object) -> Any:
        self._check()
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    def _check(self) -> None:
        if not self._users:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)

    def _measured(self, handle: Handle) -> Any:
        self._check()
        row = self._state.measured[handle.index]
        if row["lost"]:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return row

    def _control(self, handle: Handle, *, write: bool = False) -> Any:
        self._measured(handle)
        if write:
            if not self._privileged:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_NO_PERMISSION)
            self._state.control["writes"][handle.index] += 1
        return self._state.control[handle.index]

    # Library and system.

    def nvmlInit(self) -> None:
        """Count one more user of the library."""
        self._users += 1

    def nvmlInitWithFlags(self, flags: int) -> None:
        """As `nvmlInit`."""
        self.nvmlInit()

    def nvmlShutdown(self) -> None:
        """Count one user less."""
        self._check()
        self._users -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        """The version that the emulation claims."""
        self._check()
        return DRIVER_VERSION

    def nvmlSystemGetNVMLVersion(self) -> str:
        """Goes with the driver's."""
        self._check()
        return NVML_VERSION

    def nvmlSystemGetCudaDriverVersion(self) -> int:
        """1000 * major + 10 * minor."""
        self._check()
        return CUDA_VERSION

    nvmlSystemGetCudaDriverVersion_v2 = nvmlSystemGetCudaDriverVersion

    # Finding GPUs.

    def nvmlDeviceGetCount(self) -> int:
        """GPUs of the node, lost ones included."""
        self._check()
        return len(self._state.measured)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Handle:
        """Handle by place."""
        self._check()
        if not 0 <= index < len(self._state.measured):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return Handle(index)

    def nvmlDeviceGetHandleByUUID(self, uuid: str | bytes) -> Handle:
        """Handle by UUID."""
        return self._find("uuid", uuid)

    def nvmlDeviceGetHandleByPciBusId(self, pci_bus_id: str | bytes) -> Handle:
        """Handle by PCI bus id."""
        return self._find("pci_bus_id", pci_bus_id)

    def _find(self, column: str, value: str | bytes) -> Handle:
        self._check()
        wanted = value.encode() if isinstance(value, str) else value
        for index, found in enumerate(self._state.measured[column]):
            if found == wanted:
                return Handle(index)
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)

    def nvmlDeviceGetIndex(self, handle: Handle) -> int:
        """Place of a handle."""
        self._measured(handle)
        return handle.index

    nvmlDeviceGetMinorNumber = nvmlDeviceGetIndex

    def nvmlDeviceGetName(self, handle: Handle) -> str:
        """Product name."""
        return str(self._measured(handle)["name"].decode())

    def nvmlDeviceGetUUID(self, handle: Handle) -> str:
        """UUID; also of a lost GPU, as one must be able to say which is lost."""
        self._check()
        return str(self._state.measured["uuid"][handle.index].decode())

    def nvmlDeviceGetPciInfo(self, handle: Handle) -> Any:
        """PCI address."""
        row = self._measured(handle)
        bus_id = row["pci_bus_id"].decode()
        return SimpleNamespace(
            busIdLegacy=bus_id[4:],
            domain=0,
            bus=handle.index,
            device=0,
            pciDeviceId=0x10DE,
            pciSubSystemId=0x10DE,
            busId=bus_id,
        )

    nvmlDeviceGetPciInfo_v3 = nvmlDeviceGetPciInfo

    def nvmlDeviceGetArchitecture(self, handle: Handle) -> int:
        """NVML_DEVICE_ARCH_*."""
        return int(self._measured(handle)["architecture"])

    def nvmlDeviceGetCudaComputeCapability(self, handle: Handle) -> tuple[int, int]:
        """Major and minor."""
        row = self._measured(handle)
        return int(row["cuda_major"]), int(row["cuda_minor"])

    # Power and energy.

    def nvmlDeviceGetPowerUsage(self, handle: Handle) -> int:
        """mW: mean of the last second on Ampere and newer, instant on GA100."""
        return int(self._measured(handle)["power_average_mw"])

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Handle) -> int:
        """mJ since the driver was loaded."""
        return int(self._measured(handle)["energy_mj"])

    def nvmlDeviceGetPowerManagementMode(self, handle: Handle) -> int:
        """Limits can be set."""
        self._measured(handle)
        return 1

    def nvmlDeviceGetPowerManagementLimit(self, handle: Handle) -> int:
        """mW asked for."""
        return int(self._control(handle)["power_limit_mw"])

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: Handle) -> int:
        """mW in force, whoever asked."""
        self._measured(handle)
        return int(self._state.enforced_mw()[handle.index])

    def nvmlDeviceGetPowerManagementDefaultLimit(self, handle: Handle) -> int:
        """mW at power-on."""
        return int(self._measured(handle)["power_limit_default_mw"])

    def nvmlDeviceGetPowerManagementLimitConstraints(self, handle: Handle) -> list[int]:
        """Lowest and highest limit, mW."""
        row = self._measured(handle)
        return [int(row["power_limit_min_mw"]), int(row["power_limit_max_mw"])]

    def nvmlDeviceSetPowerManagementLimit(self, handle: Handle, limit_mw: int) -> None:
        """Ask for a limit in mW."""
        low_mw, high_mw = self.nvmlDeviceGetPowerManagementLimitConstraints(handle)
        if self._privileged and not low_mw <= limit_mw <= high_mw:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        self._control(handle, write=True)["power_limit_mw"] = limit_mw

    def nvmlDeviceGetFieldValues(self, handle: Handle, fields: Sequence[Any]) -> list[Any]:
        """Values of fields by id, or of (id, scope) pairs; each with its own return code."""
        self._measured(handle)
        values = []
        for entry in fields:
            field_id = entry[0] if isinstance(entry, tuple | list) else entry
            value = pynvml.c_nvmlFieldValue_t()
            value.fieldId = field_id
            value.timestamp = time.time_ns() // 1000
            if field_id in _FIELDS:
                block, column = _FIELDS[field_id]
                if block == "enforced":
                    number = int(self._state.enforced_mw()[handle.index])
                else:
                    number = int(getattr(self._state, block)[column][handle.index])
                wide = column == "energy_mj"
                value.valueType = (
                    pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG
                    if wide
                    else pynvml.NVML_VALUE_TYPE_UNSIGNED_INT
                )
                if wide:
                    value.value.ullVal = number
                else:
                    value.value.uiVal = number
                value.nvmlReturn = pynvml.NVML_SUCCESS
            else:
                value.nvmlReturn = pynvml.NVML_ERROR_NOT_SUPPORTED
            values.append(value)
        return values

    # Clocks.

    def nvmlDeviceGetClockInfo(self, handle: Handle, clock_type: int) -> int:
        """Present clock in MHz of a domain."""
        row = self._measured(handle)
        memory = clock_type == pynvml.NVML_CLOCK_MEM
        return int(row["mem_clock_mhz" if memory else "sm_clock_mhz"])

    def nvmlDeviceGetMaxClockInfo(self, handle: Handle, clock_type: int) -> int:
        """Highest clock in MHz of a domain."""
        row = self._measured(handle)
        memory = clock_type == pynvml.NVML_CLOCK_MEM
        return int(row["mem_clock_mhz" if memory else "sm_clock_max_mhz"])

    def nvmlDeviceGetSupportedMemoryClocks(self, handle: Handle) -> list[int]:
        """MHz, highest first."""
        return [int(self._measured(handle)["mem_clock_mhz"])]

    def nvmlDeviceGetSupportedGraphicsClocks(self, handle: Handle, memory_mhz: int) -> list[int]:
        """MHz at a memory clock, highest first."""
        row = self._measured(handle)
        if memory_mhz != int(row["mem_clock_mhz"]):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        low, high, step = (int(row[f"sm_clock_{word}_mhz"]) for word in ("min", "max", "step"))
        return list(range(high, low - 1, -step))

    def nvmlDeviceSetGpuLockedClocks(self, handle: Handle, low_mhz: int, high_mhz: int) -> None:
        """Keep the SM clock between two values."""
        row = self._measured(handle)
        if self._privileged and not 0 < low_mhz <= high_mhz:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        control = self._control(handle, write=True)
        control["sm_clock_lock_min_mhz"] = max(low_mhz, int(row["sm_clock_min_mhz"]))
        control["sm_clock_lock_max_mhz"] = max(
            min(high_mhz, int(row["sm_clock_max_mhz"])), int(row["sm_clock_min_mhz"])
        )

    def nvmlDeviceResetGpuLockedClocks(self, handle: Handle) -> None:
        """Unlock the SM clock."""
        control = self._control(handle, write=True)
        control["sm_clock_lock_min_mhz"] = control["sm_clock_lock_max_mhz"] = 0

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: Handle) -> int:
        """Why the clock is where it is: a mask."""
        return int(self._measured(handle)["throttle"])

    nvmlDeviceGetCurrentClocksThrottleReasons = nvmlDeviceGetCurrentClocksEventReasons

    def nvmlDeviceGetViolationStatus(self, handle: Handle, policy: int) -> Any:
        """Time lost to a limit."""
        row = self._measured(handle)
        columns = {
            pynvml.NVML_PERF_POLICY_POWER: "power_violation_ns",
            pynvml.NVML_PERF_POLICY_THERMAL: "thermal_violation_ns",
        }
        if policy not in columns:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return SimpleNamespace(
            referenceTime=time.time_ns() // 1000, violationTime=int(row[columns[policy]])
        )

    # Heat, load, memory.

    def nvmlDeviceGetTemperature(self, handle: Handle, sensor: int) -> int:
        """Die temperature, whole degrees."""
        row = self._measured(handle)
        if sensor != pynvml.NVML_TEMPERATURE_GPU:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return int(row["temp_c"])

    def nvmlDeviceGetTemperatureV(self, handle: Handle, sensor: int, version: int = 0) -> int:
        """As above, by the newer name."""
        return self.nvmlDeviceGetTemperature(handle, sensor)

    def nvmlDeviceGetTemperatureThreshold(self, handle: Handle, threshold: int) -> int:
        """Slowdown and shutdown temperatures."""
        row = self._measured(handle)
        columns = {
            pynvml.NVML_TEMPERATURE_THRESHOLD_SHUTDOWN: "temp_shutdown_c",
            pynvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN: "temp_slowdown_c",
        }
        if threshold not in columns:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return int(row[columns[threshold]])

    def nvmlDeviceGetUtilizationRates(self, handle: Handle) -> Any:
        """Percent of time in which any kernel ran, and in which memory was used."""
        row = self._measured(handle)
        return SimpleNamespace(gpu=int(row["gpu_util_pct"]), memory=int(row["mem_util_pct"]))

    def nvmlDeviceGetMemoryInfo(self, handle: Handle, version: int | None = None) -> Any:
        """Bytes. Version 1 counts reserved memory as used; version 2 has it apart."""
        row = self._measured(handle)
        total, reserved, used = (
            int(row[f"memory_{word}_bytes"]) for word in ("total", "reserved", "used")
        )
        free = total - reserved - used
        if version is None:
            return SimpleNamespace(total=total, free=free, used=used + reserved)
        return SimpleNamespace(
            version=version, total=total, reserved=reserved, free=free, used=used
        )

    def nvmlDeviceGetComputeRunningProcesses(self, handle: Handle) -> list[Any]:
        """Processes that hold memory on the GPU."""
        row = self._measured(handle)
        return [
            SimpleNamespace(
                pid=int(process["pid"]),
                usedGpuMemory=int(process["used_bytes"]),
                gpuInstanceId=0xFFFFFFFF,
                computeInstanceId=0xFFFFFFFF,
            )
            for process in row["processes"][: int(row["num_processes"])]
        ]

    nvmlDeviceGetComputeRunningProcesses_v3 = nvmlDeviceGetComputeRunningProcesses

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: Handle) -> list[Any]:
        """None: these GPUs compute."""
        self._measured(handle)
        return []

    nvmlDeviceGetGraphicsRunningProcesses_v3 = nvmlDeviceGetGraphicsRunningProcesses

    def nvmlDeviceGetPersistenceMode(self, handle: Handle) -> int:
        """Whether the driver stays loaded without users."""
        return int(self._control(handle)["persistence"])

    def nvmlDeviceSetPersistenceMode(self, handle: Handle, mode: int) -> None:
        """Keep the driver loaded, or not."""
        self._control(handle, write=True)["persistence"] = mode
