"""The state of emulated GPUs as one flat block of memory, in this process or in a mapped file.

Layout: a header, then per GPU a *measured* block (the emulator writes) and a *control* block
(clients write). Two writers never share a field, and fields are aligned, so each is read whole. A
file makes the state visible to other processes, and lets limits outlive the process that set them,
as a driver does: attaching to an existing file keeps its control blocks.

>>> state = GpuState.create(2)
>>> state.control["power_limit_mw"][:] = [700_000, 650_000]
>>> state.slice(1, 2).control["power_limit_mw"].tolist()
[650000]
>>> with state.writing():
...     state.measured["power_instant_mw"][0] = 123_456
>>> int(state.header["sequence"]) % 2
0
"""

from __future__ import annotations

import time
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from testbed.core.errors import DeviceError

MAGIC = b"TBGPU\x00\x00\x01"
LAYOUT_VERSION = 1
MAX_PROCESSES = 8

HEADER = np.dtype(
    [
        ("magic", "S8"),
        ("layout_version", "<u4"),
        ("num_gpus", "<u4"),
        ("sequence", "<u8"),  # odd while the emulator writes
        ("heartbeat_ns", "<u8"),  # CLOCK_MONOTONIC of the last write
        ("reserved", "V224"),
    ],
    align=True,
)
PROCESS = np.dtype(
    [("used_bytes", "<u8"), ("pid", "<u4"), ("sm_util_pct", "<u4")],
    align=True,
)
MEASURED = np.dtype(
    [
        ("uuid", "S96"),
        ("name", "S96"),
        ("pci_bus_id", "S32"),
        ("memory_total_bytes", "<u8"),
        ("memory_reserved_bytes", "<u8"),
        ("memory_used_bytes", "<u8"),
        ("energy_mj", "<u8"),
        ("throttle", "<u8"),
        ("power_violation_ns", "<u8"),
        ("thermal_violation_ns", "<u8"),
        ("power_limit_min_mw", "<u4"),
        ("power_limit_max_mw", "<u4"),
        ("power_limit_default_mw", "<u4"),
        ("power_limit_oob_mw", "<u4"),  # out-of-band limit (a BMC's); 0 for none
        ("power_instant_mw", "<u4"),
        ("power_average_mw", "<u4"),
        ("sm_clock_mhz", "<u4"),
        ("sm_clock_min_mhz", "<u4"),
        ("sm_clock_max_mhz", "<u4"),
        ("sm_clock_step_mhz", "<u4"),
        ("mem_clock_mhz", "<u4"),
        ("temp_c", "<u4"),
        ("mem_temp_c", "<u4"),
        ("temp_slowdown_c", "<u4"),
        ("temp_shutdown_c", "<u4"),
        ("gpu_util_pct", "<u4"),
        ("mem_util_pct", "<u4"),
        ("lost", "<u4"),
        ("architecture", "<u4"),  # NVML_DEVICE_ARCH_*
        ("cuda_major", "<u4"),
        ("cuda_minor", "<u4"),
        ("num_processes", "<u4"),
        ("processes", PROCESS, (MAX_PROCESSES,)),
    ],
    align=True,
)
CONTROL = np.dtype(
    [
        ("power_limit_mw", "<u4"),
        ("sm_clock_lock_min_mhz", "<u4"),
        ("sm_clock_lock_max_mhz", "<u4"),  # 0: unlocked
        ("mem_clock_lock_min_mhz", "<u4"),
        ("mem_clock_lock_max_mhz", "<u4"),
        ("persistence", "<u4"),
        ("writes", "<u4"),  # counts what clients set
        ("pad", "<u4"),
    ],
    align=True,
)


class GpuState:
    """Header and one row per GPU of ``measured`` and ``control``; see the module's story."""

    def __init__(
        self,
        header: NDArray[Any],
        measured: NDArray[Any],
        control: NDArray[Any],
        path: Path | None = None,
    ) -> None:
        self.header = header
        self.measured = measured
        self.control = control
        self.path = path
        self._sequence = header["sequence"]
        self._heartbeat = header["heartbeat_ns"]

    @classmethod
    def create(cls, num_gpus: int, *, path: Path | None = None) -> GpuState:
        """State for ``num_gpus`` GPUs, in memory or in a file made for it.

        An existing file of the same layout and size is taken over as it is, also from an emulator
        that was killed in the middle of a write.

        Raises:
            DeviceError: the file cannot be made, or holds something else.
        """
        if num_gpus < 1:
            raise DeviceError(f"num_gpus = {num_gpus} must be at least 1")
        if path is None:
            return cls(
                np.zeros((), HEADER), np.zeros(num_gpus, MEASURED), np.zeros(num_gpus, CONTROL)
            )._begin(num_gpus)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and path.stat().st_size:
                state = cls.attach(path, num_gpus=num_gpus)
                state._sequence[...] += state._sequence % 2  # or at rest would look like writing
                return state
            with path.open("wb") as file:
                file.truncate(cls.size_bytes(num_gpus))
            path.chmod(0o644)
        except OSError as error:
            raise DeviceError(f"GPU state file {path}: {error}") from None
        return cls._map(path, num_gpus, "r+")._begin(num_gpus)

    @classmethod
    def attach(cls, path: Path, *, num_gpus: int | None = None, mode: str = "r+") -> GpuState:
        """The state in an existing file.

        Raises:
            DeviceError: it is not such a file, of another layout, or of another size.
        """
        try:
            header = np.fromfile(path, HEADER, 1)
        except OSError as error:
            raise DeviceError(f"GPU state file {path}: {error}") from None
        if len(header) != 1 or header["magic"][0] != MAGIC.rstrip(b"\x00"):
            raise DeviceError(f"GPU state file {path}: not one of ours")
        version, count = int(header["layout_version"][0]), int(header["num_gpus"][0])
        if version != LAYOUT_VERSION:
            raise DeviceError(f"GPU state file {path}: layout {version}, not {LAYOUT_VERSION}")
        if num_gpus not in (None, count):
            raise DeviceError(f"GPU state file {path}: {count} GPUs, expected {num_gpus}")
        if path.stat().st_size != cls.size_bytes(count):
            raise DeviceError(
                f"GPU state file {path}: {path.stat().st_size} bytes, "
                f"expected {cls.size_bytes(count)}"
            )
        return cls._map(path, count, mode)

    @classmethod
    def _map(cls, path: Path, num_gpus: int, mode: str) -> GpuState:
        flat = np.memmap(path, np.uint8, mode, shape=(cls.size_bytes(num_gpus),))  # type: ignore[call-overload]
        plain = np.asarray(flat)
        end = HEADER.itemsize
        header = plain[:end].view(HEADER).reshape(())
        measured = plain[end : end + num_gpus * MEASURED.itemsize].view(MEASURED)
        control = plain[end + num_gpus * MEASURED.itemsize :].view(CONTROL)
        return cls(header, measured, control, path)

    @staticmethod
    def size_bytes(num_gpus: int) -> int:
        """Size of the block."""
        return HEADER.itemsize + num_gpus * (MEASURED.itemsize + CONTROL.itemsize)

    def _begin(self, num_gpus: int) -> GpuState:
        self.header["magic"] = MAGIC
        self.header["layout_version"] = LAYOUT_VERSION
        self.header["num_gpus"] = num_gpus
        return self

    def slice(self, first: int, stop: int) -> GpuState:
        """The same memory, seen as GPUs ``first`` to ``stop``."""
        return GpuState(self.header, self.measured[first:stop], self.control[first:stop], self.path)

    @cached_property
    def addresses(self) -> tuple[int, int]:
        """Where the measured and the control blocks lie in memory."""
        return self.measured.ctypes.data, self.control.ctypes.data

    def enforced_mw(self) -> NDArray[np.uint32]:
        """Limits in force: the requested ones, or lower ones set out of band.

        Computed by whoever asks, so that a limit is in force the moment it is set.
        """
        requested = self.control["power_limit_mw"]
        out_of_band = self.measured["power_limit_oob_mw"]
        lower: NDArray[np.uint32] = np.where(
            (out_of_band > 0) & (out_of_band < requested), out_of_band, requested
        )
        return lower

    def writing(self) -> GpuState:
        """Context in which measured fields change; readers can tell from the sequence counter."""
        return self

    def __enter__(self) -> GpuState:
        self._sequence[...] += 1
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._heartbeat[...] = time.monotonic_ns()
        self._sequence[...] += 1
