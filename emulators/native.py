"""C parts of the emulators: how they are built, kept and found.

What is built lies in the user's cache under a name that changes with its sources, so an edited
source is never shadowed by an old build. Layouts that Python declares are said once, there; the C
code gets them as a generated header.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache as once
from importlib import resources
from pathlib import Path

import numpy as np

from emulators.power import NUM_LEVELS, levels_frac
from emulators.profiles import GpuProfile
from emulators.state import CONTROL, MEASURED, GpuState
from testbed.core.compiled import PURE_VARIABLE, cache_folder
from testbed.core.errors import DeviceError
from testbed.core.messages import GpuReadings
from testbed.core.view import Floats, Ints

FLAGS = ("-std=gnu11", "-Wall", "-Wextra", "-Werror", "-fPIC", "-fvisibility=hidden")
PROFILE = (
    "idle_w", "busy_w", "tensor_w", "hbm_w", "voltage_floor_frac", "voltage_knee_frac",
    "bandwidth_knee_frac", "gemm_efficiency", "thermal_fast_c_per_w", "thermal_slow_c_per_w",
    "mem_temp_offset_c", "temp_slowdown_c", "temp_shutdown_c", "sm_clock_max_mhz",
    "sm_clock_idle_mhz", "sm_clock_step_mhz",
)  # fmt: skip
"""Constants of a GPU that the C code reads, from `emulators.profiles.GpuProfile`."""
COLUMNS = (
    "busy_frac", "tensor_frac", "hbm_frac", "clock_frac", "power_w", "demand_w", "enforced_w",
    "energy_j", "smooth_w", "thermal_frac", "effective_w", "fast_c", "slow_c", "temp_c", "inlet_c",
    "offset_c", "then_j", "levels",
)  # fmt: skip
"""Arrays that the C code reads and writes in place, one entry per GPU but for ``levels``."""
STEP = (
    "fast_decay", "slow_decay", "control_decay", "down_share", "up_share", "thermal_step",
    "cool_c", "payback", "allowed_floor_frac", "smallest_frac", "step_frac", "span_s",
)  # fmt: skip
"""What depends on the length of a tick, and constants of the bank."""


def layout_header(**layouts: np.dtype[np.void]) -> str:
    """Sizes, and offsets and sizes of fields, of records as C constants."""
    lines = ["/* Generated. */"]
    for name, dtype in layouts.items():
        lines.append(f"#define {name}_SIZE {dtype.itemsize}")
        assert dtype.fields is not None
        for field, (kind, offset, *_) in dtype.fields.items():
            lines.append(f"#define {name}_{field} {offset}")
            lines.append(f"#define {name}_{field}_SIZE {kind.itemsize}")
    return "\n".join(lines) + "\n"


def build_library(
    name: str,
    files: Mapping[str, str],
    flags: Sequence[str],
    *,
    also: Sequence[str] = (),
    cache: Path | None = None,
) -> Path:
    """Folder with a shared library made of some sources, built if it is not there yet.

    Args:
        name: file name of the library.
        files: texts of the sources and headers by their names; what ends in ``.c`` is compiled.
        flags: for the compiler, beside `FLAGS`.
        also: other names to have the library under.
        cache: where to keep it; ``$XDG_CACHE_HOME/serving-testbed`` by default.

    Raises:
        DeviceError: there is no C compiler, or it failed.
    """
    flags = [*FLAGS, *flags]
    digest = hashlib.sha256(" ".join(flags).encode())
    for each in sorted(files):
        digest.update(f"{each}\0{files[each]}\0".encode())
    folder = (cache or cache_folder()) / f"{name.split('.')[0]}-{digest.hexdigest()[:16]}"
    names = [name, *also]
    if (folder / names[-1]).exists():
        return folder
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise DeviceError(f"no C compiler (gcc or cc) to build {name} with")
    with tempfile.TemporaryDirectory() as scratch:
        for each, text in files.items():
            (Path(scratch) / each).write_text(text, encoding="utf-8")
        sources = [each for each in files if each.endswith(".c")]
        done = subprocess.run(
            [compiler, "-shared", "-o", name, *sources, *flags],
            cwd=scratch,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            first = done.stderr.strip().splitlines() or ["no message"]
            raise DeviceError(f"{compiler} could not build {name}: {first[0]}")
        folder.mkdir(parents=True, exist_ok=True)
        # Into place under another name first: two builders must not see half a file.
        for each in names:
            temporary = folder / f".{each}.{os.getpid()}"
            shutil.copy(Path(scratch) / name, temporary)
            temporary.rename(folder / each)
    return folder


def _bank_header() -> str:
    """``bank.h``: the structures and layouts that ``bank.c`` works on."""
    parts = [
        layout_header(MEASURED=MEASURED, CONTROL=CONTROL, READINGS=GpuReadings.layout),
        f"#define NUM_LEVELS {NUM_LEVELS}",
        "struct profile { double " + ", ".join(PROFILE) + "; };",
        "struct columns { double " + ", ".join(f"*{name}" for name in COLUMNS) + "; };",
        "struct step { double " + ", ".join(STEP) + "; uint64_t spent_ns; };",
    ]
    return "\n".join(parts) + "\n"


@once
def bank_library() -> ctypes.CDLL | None:
    """``bank.c`` as machine code; nothing where it cannot be had or is not wanted."""
    if os.environ.get(PURE_VARIABLE):
        return None
    files = {
        "bank.c": (resources.files("emulators") / "bank.c").read_text(encoding="utf-8"),
        "bank.h": _bank_header(),
    }
    try:
        # Without contraction of a*b+c, so that the numbers are NumPy's on every processor.
        folder = build_library("bank.so", files, ("-O3", "-ffp-contract=off", "-lm"))
        library = ctypes.CDLL(str(folder / "bank.so"))
    except (DeviceError, OSError, RuntimeError):  # no compiler, no home, or not to be written
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.bank_draw.argtypes = [pointer, pointer, number, pointer, pointer, ctypes.c_double]
    library.bank_settle.argtypes = [pointer, pointer, number, pointer, pointer, pointer]
    library.bank_read.argtypes = [pointer, pointer, number, pointer]
    real = ctypes.c_double
    library.engines_load.argtypes = [
        pointer, pointer, number, pointer, number, pointer, real, real, real, pointer,
    ]  # fmt: skip
    library.engines_pace.argtypes = [pointer, pointer, number, pointer, pointer, number, pointer]
    for name in ("bank_draw", "bank_settle", "bank_read", "engines_load"):
        getattr(library, name).restype = None
    library.engines_pace.restype = number
    return library


class _Step(ctypes.Structure):
    _fields_ = (*((name, ctypes.c_double) for name in STEP), ("spent_ns", ctypes.c_uint64))


class BankKernel:
    """``bank.c`` on the arrays of one bank: `emulators.gpu.GpuBank.advance` without NumPy.

    A tick of a bank is some ninety array operations, and a few microseconds each are dear where
    there are few GPUs and many ticks. Use `for_bank`; then `bind` the arrays, which stay where they
    are from then on.
    """

    def __init__(
        self, library: ctypes.CDLL, count: int, profile: GpuProfile, state: GpuState
    ) -> None:
        self.step = _Step()
        """What `settle` needs to know of the tick; the bank sets it."""
        self.dt_s = -1.0
        """Length of the tick for which ``step`` is set."""
        self._draw, self._settle = library.bank_draw, library.bank_settle
        self._count = count
        self._profile = np.array([getattr(profile, name) for name in PROFILE], float)
        self._own = {name: np.zeros(count) for name in ("effective_w", "then_j")}
        self._own["levels"] = levels_frac(profile)
        self._work = np.zeros((3, count))
        self._own |= zip(("busy_frac", "tensor_frac", "hbm_frac"), self._work, strict=True)
        self._columns = np.zeros(len(COLUMNS), np.uintp)
        self._bound: dict[str, Floats] = {}
        self._state = state  # whose memory the pointers below are in
        self._pointers = self._profile.ctypes.data, self._columns.ctypes.data
        self._measured, self._control = state.addresses

    @classmethod
    def for_bank(cls, count: int, profile: GpuProfile, state: GpuState) -> BankKernel | None:
        """A kernel, where there is one."""
        library = bank_library()
        return None if library is None else cls(library, count, profile, state)

    def bind(self, **columns: Floats) -> None:
        """Work on these arrays, in place, by the names in `COLUMNS`.

        Raises:
            ValueError: one is not of the kind that C code can work on.
        """
        self._bound = {**columns, **self._own}
        for place, name in enumerate(COLUMNS):
            array = self._bound[name]
            if array.dtype != np.float64 or not array.flags.c_contiguous:
                raise ValueError(f"{name}: {array.dtype}, strides {array.strides}, not plain")
            self._columns[place] = array.ctypes.data

    def draw(
        self,
        dt_s: float,
        busy_frac: Floats,
        tensor_frac: Floats,
        hbm_frac: Floats,
        unloaded_w: Floats | None,
    ) -> None:
        """Power and energy of a tick in which this was done."""
        work = self._work
        work[0], work[1], work[2] = busy_frac, tensor_frac, hbm_frac
        less = None if unloaded_w is None else unloaded_w.ctypes.data
        self._draw(*self._pointers, self._count, self._measured, less, dt_s)

    def settle(self, effective_w: Floats, then_j: Floats) -> None:
        """Heat and clocks that follow, and what NVML shows.

        Args:
            effective_w: see `emulators.thermal.Thermal.effective_w`.
            then_j: energy used when the window of the mean power began.
        """
        self._own["effective_w"][:] = effective_w
        self._own["then_j"][:] = then_j
        step = ctypes.addressof(self.step)
        self._settle(*self._pointers, self._count, self._measured, self._control, step)


class EngineKernel:
    """``bank.c`` on the engines of one bank: what they did, and at which clock they go on.

    Args:
        library: see `bank_library`.
        profile: of the GPUs.
        engine_of: engine of each GPU, one past the last where there is none.
        num_engines: how many there are.
        clock_frac: of the GPUs, see `emulators.gpu.GpuBank`.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        profile: GpuProfile,
        engine_of: Ints,
        num_engines: int,
        clock_frac: Floats,
    ) -> None:
        self._load, self._pace = library.engines_load, library.engines_pace
        self._rates = profile.peak_flops, profile.hbm_bytes_per_s
        self.work = np.zeros((3, len(engine_of)))
        """Busy share, operations and bytes over those at peak, per GPU; see `load`."""
        self._changed = np.zeros(num_engines + 1, np.int64)
        self._paces = np.zeros(num_engines + 1)
        self._size, self._gpus = num_engines + 1, len(engine_of)
        self._kept = (engine_of, clock_frac)  # whose memory the pointers are to
        self._engine_of, self._clock_frac = engine_of.ctypes.data, clock_frac.ctypes.data
        self._out = self.work.ctypes.data, self._paces.ctypes.data, self._changed.ctypes.data

    def load(self, done: Floats, before: Floats, left: Floats, dt_s: float) -> None:
        """Set `work` to what was done between two ticks.

        Args:
            done: busy seconds, operations and bytes since the start, as (3, engines + 1).
            before: the same at the last tick.
            left: what engines that are gone did since then, as (3, GPUs).
            dt_s: time between the ticks.
        """
        self._load(
            done.ctypes.data, before.ctypes.data, self._size, self._engine_of, self._gpus,
            left.ctypes.data, dt_s, *self._rates, self._out[0],
        )  # fmt: skip

    def pace(self, before: Floats) -> list[int]:
        """Bring the clocks of all engines, one past the last included, up to date in place.

        Returns:
            The engines whose clock is another now.
        """
        _, paces, changed = self._out
        count = self._pace(
            self._clock_frac, self._engine_of, self._gpus, paces, before.ctypes.data, self._size,
            changed,
        )  # fmt: skip
        which: list[int] = self._changed[:count].tolist()
        return which


def read_gpus(state: GpuState) -> GpuReadings | None:
    """All readings of these GPUs, where ``bank.c`` can be had."""
    library = bank_library()
    if library is None:
        return None
    records = np.empty(len(state.measured), GpuReadings.layout)
    library.bank_read(*state.addresses, len(records), records.ctypes.data)
    return GpuReadings.of(records)
