"""Cleans up after a daemon that was killed: a process that outlives it by a moment.

Told on stdin, a line each, what there is to clean: ``cgroup PARENT`` (kill what is in its groups
and remove them) and ``swap DEVICE`` (switch off and remove a zram device). When its stdin ends, by
whatever death of the daemon, it cleans, groups before swap, and leaves. ``done`` makes it leave
without cleaning: the daemon has cleaned up itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from daemons.devices.cgroup import ROOT, Group
from daemons.devices.zram import remove_zram
from testbed.core.errors import DeviceError


def clean_cgroups(parent: str, root: Path = ROOT) -> None:
    """End all processes under groups of that name, in whichever trees it is, and remove them."""
    trees = [root, *(path for path in root.iterdir() if path.is_dir())]
    parents = [tree / parent for tree in trees if (tree / parent).is_dir()]
    for folder in parents:
        for child in [path for path in folder.iterdir() if path.is_dir()]:
            group = Group(child.name, [child])
            with contextlib.suppress(DeviceError, OSError):
                for file in ("freezer.state", "cgroup.freeze"):
                    if (child / file).exists():
                        (child / file).write_text("THAWED" if "state" in file else "0")
                group.kill()
    for folder in parents:
        for child in [path for path in folder.iterdir() if path.is_dir()]:
            with contextlib.suppress(DeviceError):
                Group(child.name, [child]).remove(timeout_s=5.0)
        with contextlib.suppress(OSError):
            folder.rmdir()


def main() -> None:
    """Wait for the daemon's end."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    told: list[str] = []
    for line in sys.stdin:
        if line.strip() == "done":
            return
        told.append(line.strip())
    for line in told:
        kind, _, what = line.partition(" ")
        if kind == "cgroup":
            clean_cgroups(what)
    # Swap only then: what a tenant under a limit has in it could not come back to memory.
    for line in told:
        kind, _, what = line.partition(" ")
        if kind == "swap":
            _remove_swap(what)


def _remove_swap(device: str) -> None:
    """Remove a swap device, patiently: processes just killed may still be letting go of it."""
    for _ in range(50):
        try:
            remove_zram(device)
            return
        except DeviceError:
            time.sleep(0.1)


class Guardian:
    """The guardian of this process, in a session of its own so that it is not killed with us."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "daemons.guardian"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )

    def tell(self, line: str) -> None:
        """Say what there will be to clean."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def dismiss(self) -> None:
        """All is cleaned up already."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self.tell("done")
            self._process.stdin.close()
        self._process.wait(timeout=10)


if __name__ == "__main__":
    main()
