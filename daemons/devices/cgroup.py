"""Control groups: limit, reclaim, freeze and measure processes, on v2, v1 and the hybrid of both.

One `Group` interface over what the kernel offers. On v2 all of it is in one folder per group. On v1
each controller has a tree of its own, so a group is a folder in each, and memory pressure per group
comes from a folder of the same name in the v2 tree that many v1 systems mount beside (``unified``):
a task may sit under a v1 memory limit and in a v2 group at once, and the kernel keeps per-group
pressure there.

Traps that this file knows: lowering a v1 limit reclaims within the write and may take tenths of a
second, or fail with EBUSY half done; ``memory.high`` on a group that has nothing to swap to
livelocks it; a v1 hard limit over zram now and then OOM-kills with swap still free, so v1 groups
are set not to kill but to wait (`Group.out_of_memory` says when one waits); freezing is not
instant; a group can be removed only when its last process is gone.

Files in bytes, microseconds and nanoseconds end here; above are bytes, seconds and `DeviceError`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from testbed.core.errors import DeviceError

Version = Literal["v2", "v1", "hybrid", "none"]
ROOT = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 62
_CPU_PERIOD_US = 100_000


@dataclass(frozen=True, slots=True)
class GroupReadings:
    """One group at one moment; totals count from its creation."""

    current_bytes: int
    swap_bytes: int
    limit_bytes: int
    major_faults_total: int
    refaults_total: int
    pressure_some_frac: float
    """Share of the last 10 s in which some task of the group waited for memory."""
    pressure_some_s: float
    io_pressure_some_frac: float
    cpu_usage_s: float
    cpu_throttled_s: float
    frozen: bool


@dataclass(slots=True)
class CgroupProbe:
    """What control groups offer on this node, with the reason where they do not."""

    version: Version
    memory: bool = False
    cpu: bool = False
    freezer: bool = False
    pressure: bool = False
    writable: bool = False
    reasons: dict[str, str] = field(default_factory=dict)


def probe(root: Path = ROOT) -> CgroupProbe:
    """Look at a cgroup mount without changing it.

    Command line: ``cat /sys/fs/cgroup/cgroup.controllers`` (v2) or ``ls /sys/fs/cgroup`` (v1).
    """
    if (root / "cgroup.controllers").exists():
        found = CgroupProbe("v2")
        controllers = _read_text(root / "cgroup.controllers").split()
        found.memory, found.cpu = "memory" in controllers, "cpu" in controllers
        found.freezer = True
        found.pressure = (root / "memory.pressure").exists() or Path(
            "/proc/pressure/memory"
        ).exists()
        found.writable = os.access(root / "cgroup.procs", os.W_OK)
        for name in ("memory", "cpu"):
            if name not in controllers:
                found.reasons[name] = f"the {name} controller is not in cgroup.controllers"
        return _explain(found, root)
    if (root / "memory").is_dir() or (root / "cpu").is_dir():
        unified = root / "unified"
        hybrid = (unified / "cgroup.procs").exists()
        found = CgroupProbe("hybrid" if hybrid else "v1")
        found.memory = (root / "memory" / "memory.limit_in_bytes").exists()
        found.cpu = (root / "cpu" / "cpu.cfs_quota_us").exists()
        found.freezer = (root / "freezer").is_dir()
        found.pressure = hybrid and (unified / "memory.pressure").exists()
        found.writable = os.access(root / "memory", os.W_OK)
        for name in ("memory", "cpu", "freezer"):
            if not getattr(found, name):
                found.reasons[name] = f"no v1 {name} controller is mounted under {root}"
        if not hybrid:
            found.reasons["pressure"] = "v1 has no pressure per group, and no v2 tree is beside it"
        return _explain(found, root)
    found = CgroupProbe("none")
    found.reasons["memory"] = f"no cgroups under {root}"
    return found


def _explain(found: CgroupProbe, root: Path) -> CgroupProbe:
    if not found.writable:
        found.reasons["writable"] = (
            f"{root} cannot be written to as this user; as root it can, or under systemd with "
            "Delegate=yes"
        )
    if not found.pressure and "pressure" not in found.reasons:
        found.reasons["pressure"] = "the kernel keeps no pressure information (boot with psi=1)"
    return found


def open_cgroups(root: Path = ROOT, *, parent: str = "serving-testbed") -> Cgroups:
    """Groups under ``parent`` in the tree at ``root``, whichever version it is.

    Raises:
        DeviceError: there are no memory cgroups, or they cannot be written to.
    """
    found = probe(root)
    if not found.memory:
        raise DeviceError(f"no memory cgroups: {found.reasons.get('memory', found.version)}")
    if not found.writable:
        raise DeviceError(f"cgroups: {found.reasons['writable']}")
    return V2Cgroups(root, parent) if found.version == "v2" else V1Cgroups(root, parent)


class Group:
    """One control group; `V1Group` and `V2Group` fill in the file names."""

    def __init__(self, name: str, folders: list[Path]) -> None:
        self.name = name
        self.folders = folders

    def attach(self, pid: int) -> None:
        """Move a process into the group. ``echo PID > cgroup.procs``"""
        for folder in self.folders:
            _write(folder / "cgroup.procs", pid)

    def pids(self) -> list[int]:
        """Processes in the group."""
        return [int(word) for word in _read_text(self.folders[0] / "cgroup.procs").split()]

    def kill(self) -> None:
        """End every process of the group."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def remove(self, *, timeout_s: float = 2.0) -> None:
        """Remove the group; its processes must have been ended.

        Raises:
            DeviceError: it is still busy after ``timeout_s``.
        """
        deadline = time.monotonic() + timeout_s
        for folder in self.folders:
            while folder.exists():
                try:
                    folder.rmdir()
                except OSError as error:
                    if time.monotonic() > deadline or error.errno not in (
                        errno.EBUSY,
                        errno.ENOTEMPTY,
                    ):
                        raise DeviceError(f"cgroup {folder}: cannot be removed: {error}") from None
                    time.sleep(0.01)

    def set_memory_limit(self, limit_bytes: int) -> None:
        """Hold the group at ``limit_bytes``; may block while the kernel reclaims."""
        raise DeviceError(f"cgroup {self.name}: has no memory controller")

    def protect(self, protected_bytes: int) -> None:
        """Keep that much of the group in memory while others are reclaimed, where the kernel can.

        v1 cannot: there, what must stay has to be locked by the process itself.
        """

    def reclaim(self, amount_bytes: int) -> None:
        """Push ``amount_bytes`` of the group out of memory now; may block."""
        raise DeviceError(f"cgroup {self.name}: has no memory controller")

    def set_cpu_quota(self, cores: float | None) -> None:
        """Let the group use so many cores, or any number with None."""
        raise DeviceError(f"cgroup {self.name}: has no cpu controller")

    def freeze(self, frozen: bool = True) -> None:
        """Stop all its processes where they are, or let them go on."""
        raise DeviceError(f"cgroup {self.name}: has no freezer")

    def out_of_memory(self) -> bool:
        """Whether a process waits for memory that the limit will not give."""
        return False

    def oom_kills_total(self) -> int:
        """Processes that the kernel killed for want of memory."""
        return 0

    def read(self) -> GroupReadings:
        """All readings now."""
        raise DeviceError(f"cgroup {self.name}: cannot be read")


class Cgroups:
    """A tree of groups that are ours."""

    version: Version

    def create(self, name: str) -> Group:
        """A new group, or the one of that name left by an earlier life."""
        raise DeviceError("no cgroups")

    def close(self) -> None:
        """Remove the parent folder, once its groups are gone."""


class V2Group(Group):
    """A folder of the v2 tree."""

    def set_memory_limit(self, limit_bytes: int) -> None:
        """``echo BYTES > memory.high``: throttles and reclaims, never kills."""
        _write(self.folders[0] / "memory.high", "max" if limit_bytes >= _UNLIMITED else limit_bytes)

    def protect(self, protected_bytes: int) -> None:
        """``echo BYTES > memory.min``, in the parent too: protection only flows from above."""
        parent = self.folders[0].parent / "memory.min"
        mine = self.folders[0] / "memory.min"
        if parent.exists():
            _write(parent, _number(parent) + protected_bytes - _number(mine))
        _write(mine, protected_bytes)

    def reclaim(self, amount_bytes: int) -> None:
        """``echo BYTES > memory.reclaim``, or a limit below the present use for a moment."""
        folder = self.folders[0]
        if (folder / "memory.reclaim").exists():
            # EAGAIN: less than asked could be reclaimed; what could, was.
            _write(folder / "memory.reclaim", amount_bytes, ignore=(errno.EAGAIN,))
            return
        before = _read_text(folder / "memory.high").strip()
        current = int(_read_text(folder / "memory.current"))
        _write(folder / "memory.high", max(0, current - amount_bytes))
        _write(folder / "memory.high", before)

    def set_cpu_quota(self, cores: float | None) -> None:
        """``echo "QUOTA PERIOD" > cpu.max``"""
        quota = "max" if cores is None else str(max(1000, round(cores * _CPU_PERIOD_US)))
        _write(self.folders[0] / "cpu.max", f"{quota} {_CPU_PERIOD_US}")

    def freeze(self, frozen: bool = True) -> None:
        """``echo 1 > cgroup.freeze``, until ``cgroup.events`` says that it is so."""
        folder = self.folders[0]
        _write(folder / "cgroup.freeze", int(frozen))
        _wait_until(lambda: _table(folder / "cgroup.events").get("frozen", 0) == int(frozen))

    def oom_kills_total(self) -> int:
        """``grep oom_kill memory.events``"""
        return _table(self.folders[0] / "memory.events").get("oom_kill", 0)

    def read(self) -> GroupReadings:
        """``cat memory.current memory.stat memory.pressure cpu.stat``"""
        folder = self.folders[0]
        stats = _table(folder / "memory.stat")
        cpu = _table(folder / "cpu.stat")
        high = _read_text(folder / "memory.high").strip()
        some_frac, some_s = _pressure(folder / "memory.pressure")
        frozen = _table(folder / "cgroup.events").get("frozen", 0)
        return GroupReadings(
            current_bytes=_number(folder / "memory.current"),
            swap_bytes=_number(folder / "memory.swap.current"),
            limit_bytes=_UNLIMITED if high in ("max", "") else int(high),
            major_faults_total=stats.get("pgmajfault", 0),
            refaults_total=stats.get("workingset_refault_anon", 0)
            + stats.get("workingset_refault_file", 0),
            pressure_some_frac=some_frac,
            pressure_some_s=some_s,
            io_pressure_some_frac=_pressure(folder / "io.pressure")[0],
            cpu_usage_s=cpu.get("usage_usec", 0) / 1e6,
            cpu_throttled_s=cpu.get("throttled_usec", 0) / 1e6,
            frozen=bool(frozen),
        )


class V2Cgroups(Cgroups):
    """Groups in one v2 tree. The controllers are enabled for the parent's children."""

    version: Version = "v2"

    def __init__(self, root: Path, parent: str) -> None:
        self._root = root
        self._parent = root / parent
        _make(self._parent)
        for folder in (root, self._parent):
            for controller in ("+memory", "+cpu"):
                with contextlib.suppress(DeviceError):
                    _write(folder / "cgroup.subtree_control", controller)

    def create(self, name: str) -> Group:
        """A folder under the parent."""
        folder = self._parent / name
        _make(folder)
        return V2Group(name, [folder])

    def close(self) -> None:
        """Remove the parent; left alone if another run still has groups in it."""
        with contextlib.suppress(OSError):
            self._parent.rmdir()


class V1Group(Group):
    """Folders in the memory, cpu and freezer trees, and in the v2 tree beside them."""

    def __init__(self, name: str, trees: dict[str, Path]) -> None:
        super().__init__(name, list(trees.values()))
        self._trees = trees
        # Wait instead of kill when the limit is hit; the owner watches `out_of_memory`.
        _write(trees["memory"] / "memory.oom_control", 1)

    def set_memory_limit(self, limit_bytes: int) -> None:
        """``echo BYTES > memory.limit_in_bytes``: reclaims within the write.

        A limit that cannot be reached at once is approached in steps; the kernel says EBUSY when it
        could not free enough, having freed some.
        """
        file = self._trees["memory"] / "memory.limit_in_bytes"
        wanted = -1 if limit_bytes >= _UNLIMITED else limit_bytes
        for _ in range(8):
            try:
                _write(file, wanted)
                return
            except DeviceError as error:
                if not isinstance(error.__cause__, OSError) or error.__cause__.errno != errno.EBUSY:
                    raise
        current = _number(self._trees["memory"] / "memory.usage_in_bytes")
        _write(file, max(limit_bytes, current))

    def reclaim(self, amount_bytes: int) -> None:
        """v1 has no reclaim: the limit goes below the present use for a moment."""
        folder = self._trees["memory"]
        before = _number(folder / "memory.limit_in_bytes")
        current = _number(folder / "memory.usage_in_bytes")
        _write(
            folder / "memory.limit_in_bytes",
            max(4096, current - amount_bytes),
            ignore=(errno.EBUSY,),
        )
        _write(folder / "memory.limit_in_bytes", before)

    def set_cpu_quota(self, cores: float | None) -> None:
        """``echo QUOTA > cpu.cfs_quota_us``"""
        if "cpu" not in self._trees:
            raise DeviceError(f"cgroup {self.name}: no v1 cpu controller is mounted")
        folder = self._trees["cpu"]
        _write(folder / "cpu.cfs_period_us", _CPU_PERIOD_US)
        quota = -1 if cores is None else max(1000, round(cores * _CPU_PERIOD_US))
        _write(folder / "cpu.cfs_quota_us", quota)

    def freeze(self, frozen: bool = True) -> None:
        """``echo FROZEN > freezer.state``, until the kernel says that it is so."""
        if "freezer" not in self._trees:
            raise DeviceError(f"cgroup {self.name}: no v1 freezer is mounted")
        file = self._trees["freezer"] / "freezer.state"
        wanted = "FROZEN" if frozen else "THAWED"
        _write(file, wanted)
        _wait_until(lambda: _read_text(file).strip() == wanted)

    def out_of_memory(self) -> bool:
        """``grep under_oom memory.oom_control``"""
        return bool(_table(self._trees["memory"] / "memory.oom_control").get("under_oom", 0))

    def oom_kills_total(self) -> int:
        """``grep oom_kill memory.oom_control``"""
        return _table(self._trees["memory"] / "memory.oom_control").get("oom_kill", 0)

    def read(self) -> GroupReadings:
        """``cat memory.usage_in_bytes memory.stat; cat ../unified/NAME/memory.pressure``"""
        folder = self._trees["memory"]
        stats = _table(folder / "memory.stat")
        limit = _number(folder / "memory.limit_in_bytes")
        unified = self._trees.get("unified")
        some_frac, some_s = _pressure(unified / "memory.pressure") if unified else (0.0, 0.0)
        throttled_ns = usage_ns = 0
        if "cpu" in self._trees:
            throttled_ns = _table(self._trees["cpu"] / "cpu.stat").get("throttled_time", 0)
        if "cpuacct" in self._trees:
            usage_ns = _number(self._trees["cpuacct"] / "cpuacct.usage")
        frozen = False
        if "freezer" in self._trees:
            frozen = _read_text(self._trees["freezer"] / "freezer.state").strip() == "FROZEN"
        return GroupReadings(
            current_bytes=_number(folder / "memory.usage_in_bytes"),
            swap_bytes=stats.get("swap", 0),
            limit_bytes=limit if limit < _UNLIMITED else _UNLIMITED,
            major_faults_total=stats.get("pgmajfault", 0),
            refaults_total=stats.get("workingset_refault_anon", 0)
            + stats.get("workingset_refault_file", 0),
            pressure_some_frac=some_frac,
            pressure_some_s=some_s,
            io_pressure_some_frac=_pressure(unified / "io.pressure")[0] if unified else 0.0,
            cpu_usage_s=usage_ns / 1e9,
            cpu_throttled_s=throttled_ns / 1e9,
            frozen=frozen,
        )


class V1Cgroups(Cgroups):
    """Groups in the v1 trees, and in the v2 tree beside them where there is one."""

    def __init__(self, root: Path, parent: str) -> None:
        self.version: Version = "hybrid" if (root / "unified").is_dir() else "v1"
        self._parents = {
            tree: root / tree / parent
            for tree in ("memory", "cpu", "cpuacct", "freezer", "unified")
            if (root / tree).is_dir()
        }
        for folder in self._parents.values():
            _make(folder)

    def create(self, name: str) -> Group:
        """A folder in each tree."""
        trees = {tree: parent / name for tree, parent in self._parents.items()}
        for folder in trees.values():
            _make(folder)
        return V1Group(name, trees)

    def close(self) -> None:
        """Remove the parents; left alone if another run still has groups in them."""
        for folder in self._parents.values():
            with contextlib.suppress(OSError):
                folder.rmdir()


def _wait_until(done: Callable[[], bool], timeout_s: float = 1.0) -> None:
    """Give the kernel a moment: freezing is not instant, and a task in it may take its time."""
    deadline = time.monotonic() + timeout_s
    while not done() and time.monotonic() < deadline:
        time.sleep(0.002)


# Files.


def _make(folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise DeviceError(f"cgroup {folder}: cannot be made: {error.strerror}") from error


def _write(file: Path, value: object, *, ignore: tuple[int, ...] = ()) -> None:
    try:
        with file.open("w", encoding="ascii") as handle:
            handle.write(str(value))
    except OSError as error:
        if error.errno not in ignore:
            raise DeviceError(f"cgroup {file}: writing {value}: {error.strerror}") from error


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise DeviceError(f"cgroup {file}: {error.strerror}") from error


def _number(file: Path) -> int:
    return int(_read_text(file).strip() or 0)


def _pairs(file: Path) -> Iterator[tuple[str, int]]:
    for line in _read_text(file).splitlines():
        words = line.split()
        if len(words) == 2 and words[1].lstrip("-").isdigit():
            yield words[0], int(words[1])


def _table(file: Path) -> dict[str, int]:
    return dict(_pairs(file))


def _pressure(file: Path) -> tuple[float, float]:
    """Share of the last 10 s and seconds in all, of the ``some`` line; zero where there is none."""
    for line in _read_text(file).splitlines():
        words = dict(word.split("=") for word in line.split()[1:])
        if line.startswith("some"):
            return float(words["avg10"]) / 100, int(words["total"]) / 1e6
    return 0.0, 0.0
