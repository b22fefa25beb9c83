"""The host itself: its identity."""

from __future__ import annotations

from functools import cache
from pathlib import Path


@cache
def boot_id() -> str:
    """Names this boot of this machine: processes that agree on it share a monotonic clock.

    ``cat /proc/sys/kernel/random/boot_id``
    """
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
