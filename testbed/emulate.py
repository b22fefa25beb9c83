"""Run any NVML program against emulated GPUs, and show emulated GPUs as a table.

``testbed emulate --gpus 8xH100 -- COMMAND`` keeps a bank of emulated GPUs in a state file, does a
given load on them, and starts the command with the library path and the variable that lead its NVML
to that file. The command's process is shown as the one that holds the memory.

A load says what the GPUs do while the command runs:

- ``idle``; ``decode`` (memory-bound, hardly needs the clock); ``prefill`` (as fast as the clock);
- ``constant:0.6``: prefill for 60 % of each tick; ``sine:PERIOD_S``: idle to prefill and back.

>>> parse_load("constant:0.5")(0.0, np.ones(2), load_gpu("h100-sxm")).busy_frac.tolist()
[0.5, 0.5]
>>> parse_load("constant:7")
Traceback (most recent call last):
...
testbed.core.errors.SpecError: load 'constant:7': 7.0 must be between 0 and 1
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from emulators.gpu import GpuBank
from emulators.nvml import EmulatedNvml
from emulators.nvml_shim import STATE_VARIABLE, build_shim
from emulators.profiles import GpuProfile, load_gpu
from emulators.state import GpuState
from testbed.core.errors import DeviceError, SpecError
from testbed.core.view import Floats

TICK_S = 0.02
_MEMORY_FRAC = 0.8
"""Share of the memory that the command is shown to hold, as a serving engine would."""


class Activity(NamedTuple):
    """What GPUs did in a tick; see `GpuBank.advance`."""

    busy_frac: Floats
    tensor_frac: Floats
    hbm_frac: Floats


Load = Callable[[float, Floats, GpuProfile], Activity]


def parse_load(text: str) -> Load:
    """The load that ``text`` describes.

    Raises:
        SpecError: it is none of those in the module's text.
    """
    kind, _, argument = text.partition(":")
    try:
        value = float(argument) if argument else math.nan
    except ValueError:
        raise SpecError(f"load {text!r}: {argument!r} is not a number") from None
    if kind == "idle" and not argument:
        return lambda t_s, clock_frac, gpu: _prefill(0.0, clock_frac, gpu)
    if kind == "prefill" and not argument:
        return lambda t_s, clock_frac, gpu: _prefill(1.0, clock_frac, gpu)
    if kind == "decode" and not argument:
        return lambda t_s, clock_frac, gpu: _decode(clock_frac)
    if kind == "constant" and argument:
        if not 0 <= value <= 1:
            raise SpecError(f"load {text!r}: {value} must be between 0 and 1")
        return lambda t_s, clock_frac, gpu: _prefill(value, clock_frac, gpu)
    if kind == "sine" and argument:
        if not value > 0:
            raise SpecError(f"load {text!r}: a period of {value} s must be above 0")
        return lambda t_s, clock_frac, gpu: _prefill(
            0.5 - 0.5 * math.cos(2 * math.pi * t_s / value), clock_frac, gpu
        )
    raise SpecError(
        f"load {text!r} is none of: idle, decode, prefill, constant:SHARE, sine:PERIOD_S"
    )


def _prefill(share: float, clock_frac: Floats, gpu: GpuProfile) -> Activity:
    return Activity(
        np.full(len(clock_frac), share), share * 0.7 * clock_frac, share * 0.15 * clock_frac
    )


def _decode(clock_frac: Floats) -> Activity:
    reach = np.minimum(clock_frac / 0.45, 1.0)
    return Activity(np.ones(len(clock_frac)), 0.04 * reach, 0.6 * reach)


class EmulatedNode:
    """A bank of GPUs in a state file, advanced in real time by a thread."""

    def __init__(
        self,
        path: Path,
        count: int,
        gpu: str,
        load: Load,
        *,
        faults: Sequence[tuple[float, int]] = (),
    ) -> None:
        self.profile = load_gpu(gpu)
        self.state = GpuState.create(count, path=path)
        self.bank = GpuBank(self.profile, self.state)
        self._load = load
        self._faults = sorted(faults)
        for at_s, index in self._faults:
            if index >= count:
                raise SpecError(f"lost GPU {index}@{at_s:g}: there are {count}")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._advance, daemon=True)

    def hold_memory(self, pid: int) -> None:
        """Show a process on every GPU."""
        used = int(self.profile.memory_bytes * _MEMORY_FRAC)
        for gpu in range(self.bank.count):
            self.bank.unload(gpu)
            self.bank.load(gpu, pid=pid, used_bytes=used)

    def __enter__(self) -> EmulatedNode:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _advance(self) -> None:
        begun = last = time.monotonic()
        while not self._ended.wait(TICK_S):
            now = time.monotonic()
            while self._faults and self._faults[0][0] <= now - begun:
                self.bank.lose(self._faults.pop(0)[1])
            activity = self._load(now - begun, self.bank.clock_frac, self.profile)
            self.bank.advance(now - last, *activity)
            last = now


def client_environment(state_path: Path) -> dict[str, str]:
    """Environment in which NVML programs see the GPUs of a state file.

    Raises:
        DeviceError: the library cannot be built.
    """
    library = str(build_shim())
    before = os.environ.get("LD_LIBRARY_PATH")
    return {
        **os.environ,
        "LD_LIBRARY_PATH": f"{library}:{before}" if before else library,
        STATE_VARIABLE: str(state_path),
    }


def emulate(
    count: int,
    gpu: str,
    load: Load,
    command: list[str],
    warn: Callable[[str], None],
    *,
    faults: Sequence[tuple[float, int]] = (),
) -> int:
    """Run a command against emulated GPUs; returns its exit status.

    Raises:
        DeviceError: the command cannot be started or the library cannot be built.
    """
    program = shutil.which(command[0])
    if program is None:
        raise DeviceError(f"command {command[0]!r}: not found")
    if Path(program).name == "sudo" or os.stat(program).st_mode & (stat.S_ISUID | stat.S_ISGID):
        warn(f"{command[0]} runs with other privileges and will drop LD_LIBRARY_PATH")
    with tempfile.TemporaryDirectory(prefix="testbed-") as folder:
        path = Path(folder) / "gpus.state"
        os.chmod(folder, 0o755)  # other users may look, as at a real driver
        with EmulatedNode(path, count, gpu, load, faults=faults) as node:
            try:
                process = subprocess.Popen(command, env=client_environment(path))
            except OSError as error:
                raise DeviceError(f"command {command[0]!r}: {error.strerror}") from None
            node.hold_memory(process.pid)
            return _wait(process)


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Wait for a child, passing on what we are told to die of."""

    def forward(number: int, frame: object) -> None:
        process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 - status if status < 0 else status


def smi_table(nvml: Any) -> Table:
    """What ``nvidia-smi`` would show, through pynvml's names."""
    nvml.nvmlInit()
    table = Table(title=f"driver {_text(nvml.nvmlSystemGetDriverVersion())}")
    for head in ("GPU", "name", "temp", "power", "limit", "SM clock", "memory", "busy", "why slow"):
        table.add_column(head, justify="left" if head in ("name", "why slow") else "right")
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            table.add_row(str(index), *_smi_row(nvml, nvml.nvmlDeviceGetHandleByIndex(index)))
        except nvml.NVMLError as error:
            table.add_row(str(index), str(error))
    nvml.nvmlShutdown()
    return table


_REASONS = {
    0x1: "idle",
    0x2: "clocks set",
    0x4: "power cap",
    0x8: "hardware",
    0x20: "heat",
    0x40: "heat (hardware)",
    0x80: "power brake",
}


def _smi_row(nvml: Any, handle: Any) -> list[str]:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    mask = nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
    return [
        _text(nvml.nvmlDeviceGetName(handle)),
        f"{nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)} C",
        f"{nvml.nvmlDeviceGetPowerUsage(handle) / 1000:.0f} W",
        f"{nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000:.0f} W",
        f"{nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)} MHz",
        f"{memory.used / 2**30:.1f} / {memory.total / 2**30:.1f} GiB",
        f"{nvml.nvmlDeviceGetUtilizationRates(handle).gpu} %",
        ", ".join(word for bit, word in _REASONS.items() if mask & bit) or "-",
    ]


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def open_nvml(state_path: Path | None) -> Any:
    """pynvml's names on a state file, or on the driver (or library) that this process sees."""
    if state_path is not None:
        return EmulatedNvml(GpuState.attach(state_path, mode="r"), privileged=False)
    import pynvml

    return pynvml
