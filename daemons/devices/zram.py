"""Compressed swap in memory (zram): made if a node has no swap, and removed again.

Command line: ``cat /sys/class/zram-control/hot_add``, ``mkswap``, ``swapon``.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from testbed.core.errors import DeviceError

CONTROL = Path("/sys/class/zram-control")
SWAPS = Path("/proc/swaps")


def swap_bytes(swaps: Path = SWAPS) -> tuple[int, int]:
    """Size of all swap, and what is in use. ``cat /proc/swaps``"""
    total = used = 0
    try:
        lines = swaps.read_text(encoding="ascii").splitlines()[1:]
    except OSError:
        return 0, 0
    for line in lines:
        words = line.split()
        total += int(words[2]) * 1024
        used += int(words[3]) * 1024
    return total, used


def make_zram(size_bytes: int) -> str:
    """A zram device of that size as swap; returns its path.

    Raises:
        DeviceError: not root, no zram in the kernel, or mkswap or swapon failed.
    """
    for program in ("mkswap", "swapon"):
        if shutil.which(program) is None:
            raise DeviceError(f"zram swap: {program} is not installed")
    try:
        number = (CONTROL / "hot_add").read_text(encoding="ascii").strip()
    except OSError as error:
        raise DeviceError(f"zram swap: {CONTROL}/hot_add: {error.strerror}") from None
    device = f"/dev/zram{number}"
    block = Path("/sys/block") / f"zram{number}"
    try:
        # lz4 where the kernel has it: the fastest to come back from.
        algorithms = (block / "comp_algorithm").read_text(encoding="ascii")
        if "lz4" in algorithms.replace("lz4hc", ""):
            (block / "comp_algorithm").write_text("lz4", encoding="ascii")
        (block / "disksize").write_text(str(size_bytes), encoding="ascii")
        for command in (["mkswap", device], ["swapon", "-p", "100", device]):
            subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        remove_zram(device)
        raise DeviceError(f"zram swap {device}: {error}") from None
    return device


def remove_zram(device: str) -> None:
    """Switch a zram swap off and remove the device.

    Raises:
        DeviceError: it is in use and what is in it does not fit into memory.
    """
    number = device.removeprefix("/dev/zram")
    if device in SWAPS.read_text(encoding="ascii").split():
        done = subprocess.run(["swapoff", device], check=False, capture_output=True)
        if done.returncode:
            why = done.stderr.decode(errors="replace").strip()
            raise DeviceError(f"zram swap {device}: cannot be switched off: {why}")
    try:
        (Path("/sys/block") / f"zram{number}" / "reset").write_text("1", encoding="ascii")
        (CONTROL / "hot_remove").write_text(number, encoding="ascii")
    except OSError as error:
        raise DeviceError(f"zram swap {device}: cannot be removed: {error.strerror}") from None
