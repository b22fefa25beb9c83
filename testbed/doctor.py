"""What this node can measure and throttle, why not where it cannot, and what to do about it.

Looks, and changes nothing. Every check takes the paths that it looks at from `Places`, so that the
answers on machines without swap, pressure or groups can be tested on one that has them.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from daemons.devices import cgroup
from daemons.devices.nvml import NvmlGpus
from daemons.devices.zram import swap_bytes
from testbed.core import compiled
from testbed.core.errors import DeviceError


class Finding(NamedTuple):
    """One line of the table."""

    what: str
    works: bool
    detail: str
    todo: str = ""


@dataclass(frozen=True)
class Places:
    """Where to look."""

    cgroups: Path = cgroup.ROOT
    pressure: Path = Path("/proc/pressure")
    swaps: Path = Path("/proc/swaps")
    zram: Path = Path("/sys/class/zram-control")
    powercap: Path = Path("/sys/class/powercap")
    clocksource: Path = Path("/sys/devices/system/clocksource/clocksource0/current_clocksource")
    uid: int | None = None


def examine(
    places: Places | None = None, *, nvml: Callable[[], Any] | None = None
) -> list[Finding]:
    """All findings on this node.

    Args:
        places: where to look; the usual ones by default.
        nvml: gives the ``pynvml`` module or something that answers its names.
    """
    places = places or Places()
    uid = os.geteuid() if places.uid is None else places.uid
    return [
        *_gpus(nvml or _pynvml, uid),
        *_groups(places),
        *_memory(places, uid),
        *_host(places, uid),
        *_software(),
    ]


def _pynvml() -> Any:
    import pynvml

    return pynvml


def _gpus(nvml: Callable[[], Any], uid: int) -> Iterator[Finding]:
    try:
        gpus = NvmlGpus(nvml())
    except DeviceError as error:
        yield Finding(
            "GPUs (NVML)",
            False,
            str(error),
            "install NVIDIA's driver; or use emulated GPUs: testbed emulate, --mode emulated",
        )
        return
    infos = gpus.infos()
    yield Finding("GPUs (NVML)", True, f"{len(infos)} x {infos[0].model}")
    low, high = infos[0].power_limit_min_w, infos[0].power_limit_max_w
    root = uid == 0
    todo = "" if root else "run the node daemon as root: the driver lets nobody else set limits"
    yield Finding("power limits", root, f"{low:g} to {high:g} W", todo)
    clocks = f"SM {infos[0].sm_clock_min_mhz:g} to {infos[0].sm_clock_max_mhz:g} MHz"
    yield Finding("clock locks", root, clocks, todo)
    gpus.close()


def _groups(places: Places) -> Iterator[Finding]:
    found = cgroup.probe(places.cgroups)
    yield Finding(
        "control groups",
        found.version != "none" and found.writable,
        found.version + ("" if found.writable else ", not writable"),
        found.reasons.get("writable", found.reasons.get("memory", "")),
    )
    for name, use in (
        ("memory", "limit host memory"),
        ("cpu", "limit CPU time"),
        ("freezer", "freeze tenants"),
        ("pressure", "pressure per group"),
    ):
        works = bool(getattr(found, name))
        yield Finding(
            use, works, f"{name} on {found.version}" if works else found.reasons.get(name, "none"),
            "" if works else "mount cgroup v2, or boot with systemd.unified_cgroup_hierarchy=1",
        )  # fmt: skip


def _memory(places: Places, uid: int) -> Iterator[Finding]:
    works = (places.pressure / "memory").exists()
    yield Finding(
        "pressure (PSI)",
        works,
        "memory, cpu and io" if works else f"no {places.pressure}",
        "" if works else "boot with psi=1, on a kernel with CONFIG_PSI",
    )
    total, used = swap_bytes(places.swaps)
    yield Finding(
        "swap",
        total > 0,
        f"{total / 2**20:.0f} MiB, {used / 2**20:.0f} in use" if total else "none",
        "" if total else "needed to oversubscribe memory: set tenants.swap_mib, or add swap",
    )
    has = places.zram.exists()
    yield Finding(
        "zram",
        has and uid == 0,
        ("available" if uid == 0 else "available to root") if has else f"no {places.zram}",
        "" if has and uid == 0 else "modprobe zram, and run as root, to make swap when needed",
    )


def _host(places: Places, uid: int) -> Iterator[Finding]:
    counters = sorted(places.powercap.glob("intel-rapl:*/energy_uj"))
    readable = [path for path in counters if os.access(path, os.R_OK)]
    yield Finding(
        "CPU power (RAPL)",
        bool(readable),
        f"{len(readable)} of {len(counters)} counters readable",
        ""
        if readable
        else (
            "run as root to read them" if counters else "no counters: host power is not measured"
        ),
    )
    yield Finding(
        "privileges",
        uid == 0,
        f"user id {uid}",
        ""
        if uid == 0
        else "limits of GPUs and memory need root; measuring and virtual runs do not",
    )
    try:
        source = places.clocksource.read_text(encoding="ascii").strip()
    except OSError:
        source = "unknown"
    late_us = _sleep_lateness_us()
    good = source in ("tsc", "kvm-clock", "arch_sys_counter") and late_us < 2000
    yield Finding(
        "clock",
        good,
        f"{source}; a sleep of 1 ms ends {late_us:.0f} us late (p90 of 50)",
        "" if good else "an idle machine and a tsc clock make live runs punctual",
    )


def _sleep_lateness_us() -> float:
    late: list[float] = []
    for _ in range(50):
        begun = time.perf_counter()
        time.sleep(0.001)
        late.append(time.perf_counter() - begun - 0.001)
    return sorted(late)[45] * 1e6


def _software() -> Iterator[Finding]:
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
    yield Finding(
        "NVML for other programs",
        compiler is not None,
        f"built with {compiler}" if compiler else "no C compiler",
        "" if compiler else "install gcc: testbed emulate and live nodes' GPUs need it to be seen",
    )
    missing = compiled.why_not()
    yield Finding(
        "compiled engine",
        compiled.in_use() or not missing,
        "in use" if compiled.in_use() else missing or "compiled by the first run that needs it",
        "runs are three times slower until then" if missing else "",
    )
    torch = importlib.util.find_spec("torch") is not None
    yield Finding(
        "real kernels (torch)",
        torch,
        "installed" if torch else "not installed",
        "" if torch else "pip install 'serving-testbed[torch]' for --mode hardware with kernels",
    )
