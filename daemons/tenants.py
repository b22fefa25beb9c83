"""Tenants of a node's host memory: real processes, each in a control group of its own.

A tenant was sold ``memory_bytes``, of which ``guaranteed_bytes`` are its own whatever happens and
the rest is oversubscribed. Its working set follows a trace. `TenantHost` answers the node daemon's
`TenantDevice`: readings per tenant, and limits that never go below the guaranteed part.

The guaranteed part is locked in memory by its process and protected by its group (``memory.min``,
where cgroups are v2), so that neither its own limit nor another tenant takes it.

Safety, as production outages taught it: no oversubscription where nothing can absorb it (no swap,
looked at again every second: if it vanishes, what was taken is given back, and swap is made if that
is permitted); writes of limits, which block while the kernel reclaims, happen in a thread; a tenant
that thrashes is frozen first and decided about then (its limit is given back before it is thawed);
a group that waits at its limit for memory is freed; and a guardian process cleans up if this one is
killed.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import math
import mmap
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np

from daemons.devices import cgroup
from daemons.devices.zram import make_zram, remove_zram, swap_bytes
from daemons.guardian import Guardian
from daemons.tenant_child import STATS
from testbed.core.errors import DeviceError, TraceError
from testbed.core.messages import TenantInfo, TenantReadings
from testbed.core.view import Floats

_THRASHING_FRAC = 0.9
"""Share of its touching time that a tenant may lose before it is frozen."""
_THRASHING_SAMPLES = 10
_PRESSURE_WINDOW_S = 3.0
_SWAP_CHECK_S = 1.0
_SLACK_BYTES = 12 << 20
"""What the tenant's interpreter itself takes beside its memory."""


def load_memory_trace(name: str = "vm_memory") -> Floats:
    """Memory use over a day, as shares of what is sold: shape (days, 288), one per 5 minutes.

    Args:
        name: one we ship, or the path of a CSV file of day, slot and memory_frac.

    Raises:
        TraceError: no such file, or a row that cannot be read.
    """
    try:
        if name == "vm_memory":
            data = resources.files("testbed.workloads.data") / "vm_memory.csv.gz"
            text = gzip.decompress(data.read_bytes()).decode("ascii")
        else:
            text = Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise TraceError(f"memory trace {name}: {error.strerror}") from None
    rows = list(csv.DictReader(text.splitlines()))
    try:
        days = 1 + max(int(row["day"]) for row in rows)
        slots = 1 + max(int(row["slot"]) for row in rows)
        trace = np.zeros((days, slots))
        for row in rows:
            trace[int(row["day"]), int(row["slot"])] = float(row["memory_frac"])
    except (KeyError, ValueError, TypeError) as error:
        raise TraceError(f"memory trace {name}: {error}") from None
    return trace


@dataclass(frozen=True, slots=True)
class TenantPlan:
    """What the tenants of a node are."""

    count: int
    memory_bytes: int
    guaranteed_bytes: int
    trace: Floats
    speedup: float
    """By how much the trace's time is compressed."""
    first_day: int = 0
    """Which day of the trace the first tenant lives; the next ones follow."""

    def working_set_bytes(self, tenant: int, t_s: float) -> int:
        """What a tenant needs at ``t_s``, between the trace's 5-minute samples a straight line."""
        day = self.trace[(self.first_day + tenant) % len(self.trace)]
        place = max(0.0, t_s) * self.speedup / 300.0
        low = int(place)
        here, there = day[low % len(day)], day[(low + 1) % len(day)]
        share = here + (there - here) * (place - low)
        return int(self.memory_bytes * min(1.0, float(share)))

    def infos(self, backing: str) -> list[TenantInfo]:
        """Names and sizes."""
        return [
            TenantInfo(f"tenant{k}", self.guaranteed_bytes, self.memory_bytes, backing)
            for k in range(self.count)
        ]


class _Tenant:
    """One process and its group."""

    def __init__(self, group: cgroup.Group, plan: TenantPlan, place: Path) -> None:
        self.group = group
        self.working_bytes = -1
        self.slowdown_frac = 0.0
        self.thrashed = 0
        self.frozen = False
        self.pressure_frac = 0.0
        self.locked_bytes = -1
        """Of the guaranteed part; -1 until the process has said so."""
        self._last = (0.0, 0.0)
        self._waited = (0.0, 0.0)
        place.write_bytes(b"\0" * STATS.size)
        self._file = place.open("r+b")
        self._stats = mmap.mmap(self._file.fileno(), STATS.size)
        self.process = subprocess.Popen(
            [sys.executable, "-S", str(Path(__file__).with_name("tenant_child.py")),
             str(plan.memory_bytes), str(plan.guaranteed_bytes), str(place)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip
        group.attach(self.process.pid)

    def need(self, working_bytes: int) -> None:
        """Tell the process its working set, when that has moved by a megabyte."""
        if abs(working_bytes - self.working_bytes) < 1 << 20 and self.working_bytes >= 0:
            return
        self.working_bytes = working_bytes
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(b"w %d\n" % working_bytes)
            self.process.stdin.flush()

    def measure(self) -> None:
        """Read what the process measured since last time."""
        touches, spent_s, baseline_s, _, locked = STATS.unpack(self._stats[: STATS.size])
        if touches:
            self.locked_bytes = int(locked)
        new, took_s = touches - self._last[0], spent_s - self._last[1]
        if new > 0 and took_s > 0:
            self._last = (touches, spent_s)
            # Three times the best is the noise of a shared machine, not memory.
            self.slowdown_frac = max(0.0, 1.0 - 3.0 * baseline_s * new / took_s)

    def feel(self, now_s: float, waited_s: float) -> None:
        """Pressure from its running total: the kernel's own averages move only every 2 s."""
        since_s, before_s = now_s - self._waited[0], self._waited[1]
        if since_s > 0:
            keep = math.exp(-since_s / _PRESSURE_WINDOW_S)
            recent = min(1.0, max(0.0, waited_s - before_s) / since_s)
            self.pressure_frac = recent + (self.pressure_frac - recent) * keep
            self._waited = (now_s, waited_s)

    def end(self) -> None:
        """End the process and remove its group."""
        with contextlib.suppress(DeviceError):
            self.group.freeze(False)
        self.process.kill()
        self.process.wait()
        if self.process.stdin:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
        self._stats.close()
        self._file.close()
        self.group.remove()


class TenantHost:
    """All tenants of a node; see the module's story.

    Args:
        plan: who they are.
        state_dir: for small files.
        swap_mib: size of a zram swap to make if the node has none; 0 makes none.
        name: of the parent group; unique on the machine.
        log: told in a line what happens.

    Raises:
        DeviceError: no cgroups that may be written to, or nothing to swap to.
    """

    def __init__(
        self,
        plan: TenantPlan,
        state_dir: Path,
        *,
        name: str,
        swap_mib: float = 0.0,
        root: Path = cgroup.ROOT,
        log: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.plan = plan
        self._log = log
        self._swap_mib = swap_mib
        self._devices: list[str] = []
        self._pool = ThreadPoolExecutor(max_workers=max(1, plan.count), thread_name_prefix="limit")
        self._pending: dict[int, Future[None]] = {}
        self._wanted: dict[int, int] = {}
        self._tenants: list[_Tenant] = []
        self._absorbed = True
        self._swap_checked_s = -math.inf
        self.frozen_total = 0
        self._closed = False
        self._cgroups = cgroup.open_cgroups(root, parent=name)
        self._guardian = Guardian()
        self._guardian.tell(f"cgroup {name}")
        try:
            if swap_bytes()[0] == 0 and swap_mib > 0:
                self._make_swap()
            if swap_bytes()[0] == 0:
                raise DeviceError(
                    "oversubscribing memory needs swap to absorb it: there is none, and "
                    "tenants.swap_mib is 0"
                )
            for index in range(plan.count):
                group = self._cgroups.create(f"tenant{index}")
                with contextlib.suppress(DeviceError):  # the lock alone holds it then
                    group.protect(plan.guaranteed_bytes)
                tenant = _Tenant(group, plan, state_dir / f"tenant{index}.stats")
                self._tenants.append(tenant)
                self.set_limit(index, plan.memory_bytes)
        except BaseException:
            self.close()
            raise

    def _make_swap(self) -> None:
        device = make_zram(int(self._swap_mib * 2**20))
        self._devices.append(device)
        self._guardian.tell(f"swap {device}")
        self._log(f"made {self._swap_mib:g} MiB of swap on {device}")

    def infos(self) -> list[TenantInfo]:
        """Names and sizes."""
        return self.plan.infos(f"real ({self._cgroups.version} cgroups)")

    def set_limit(self, tenant: int, memory_limit_bytes: int) -> None:
        """Set a limit in a thread; while one is being set, only the newest wish is kept."""
        limit = min(max(memory_limit_bytes, self.plan.guaranteed_bytes), self.plan.memory_bytes)
        if not self._absorbed:
            limit = self.plan.memory_bytes
        self._wanted[tenant] = limit
        self._start(tenant)

    def _start(self, tenant: int) -> None:
        running = self._pending.get(tenant)
        if running is None or running.done():
            limit = self._wanted.pop(tenant, None)
            if limit is not None:
                group = self._tenants[tenant].group
                self._pending[tenant] = self._pool.submit(
                    group.set_memory_limit, limit + _SLACK_BYTES
                )

    def read(self, now_s: float) -> TenantReadings:
        """Move the working sets on, look after the tenants and read all groups."""
        self._check_swap(now_s)
        readings = []
        for index, tenant in enumerate(self._tenants):
            self._collect(index)
            tenant.need(self.plan.working_set_bytes(index, now_s))
            before = tenant.locked_bytes
            tenant.measure()
            if before < tenant.locked_bytes < self.plan.guaranteed_bytes // 4096 * 4096:
                self._log(f"tenant{index}: its guaranteed part could not be locked in memory")
            reading = tenant.group.read()
            tenant.feel(now_s, reading.pressure_some_s)
            self._look_after(index, tenant)
            readings.append(reading)
        slack = _SLACK_BYTES
        return TenantReadings(
            working_set_bytes=[tenant.working_bytes for tenant in self._tenants],
            current_bytes=[max(0, reading.current_bytes - slack) for reading in readings],
            limit_bytes=[
                min(max(0, reading.limit_bytes - slack), self.plan.memory_bytes)
                for reading in readings
            ],
            swap_bytes=[reading.swap_bytes for reading in readings],
            major_faults_total=[reading.major_faults_total for reading in readings],
            refaults_total=[reading.refaults_total for reading in readings],
            pressure_some_frac=[tenant.pressure_frac for tenant in self._tenants],
            slowdown_frac=[tenant.slowdown_frac for tenant in self._tenants],
            frozen=[tenant.frozen for tenant in self._tenants],
        )

    def _check_swap(self, now_s: float) -> None:
        """Stop oversubscribing when there is no longer anything to swap to; go on when there is."""
        if 0 <= now_s - self._swap_checked_s < _SWAP_CHECK_S:
            return
        self._swap_checked_s = now_s
        absorbed = swap_bytes()[0] > 0
        if absorbed == self._absorbed:
            return
        self._absorbed = absorbed
        if absorbed:
            self._log("swap is back: limits are obeyed again")
            return
        self._log("swap is gone: tenants get all their memory back until there is some again")
        for index in range(len(self._tenants)):
            self.set_limit(index, self.plan.memory_bytes)
        if self._swap_mib:  # it was another's, or was taken from us
            self._pool.submit(self._make_swap)

    def _collect(self, index: int) -> None:
        """Take note of a limit that could not be set, and start the next wish."""
        done = self._pending.get(index)
        if done is not None and done.done():
            error = done.exception()
            if error is not None:
                self._log(f"tenant{index}: {error}")
            del self._pending[index]
        self._start(index)

    def _look_after(self, index: int, tenant: _Tenant) -> None:
        """Freeze what thrashes or waits, give its limit back, and let it go on: in a thread."""
        if tenant.frozen:
            if index not in self._pending:
                tenant.frozen = False
                tenant.thrashed = 0
            return
        stuck = tenant.group.out_of_memory()
        thrashing = tenant.slowdown_frac > _THRASHING_FRAC
        tenant.thrashed = tenant.thrashed + 1 if thrashing else 0
        if (stuck or tenant.thrashed >= _THRASHING_SAMPLES) and index not in self._pending:
            why = "waits for memory at its limit" if stuck else "thrashes"
            self._log(f"tenant{index} {why}: frozen, and its limit given back")
            tenant.frozen = True
            self.frozen_total += 1
            self._wanted.pop(index, None)
            self._pending[index] = self._pool.submit(self._rescue, tenant.group)

    def _rescue(self, group: cgroup.Group) -> None:
        with contextlib.suppress(DeviceError):
            group.freeze()
        try:
            group.set_memory_limit(self.plan.memory_bytes + _SLACK_BYTES)
        finally:
            group.freeze(False)

    def oom_kills_total(self) -> int:
        """Processes that the kernel killed in any tenant's group."""
        return sum(tenant.group.oom_kills_total() for tenant in self._tenants)

    def close(self) -> None:
        """End the tenants, and remove groups and swap. Closing twice does nothing more."""
        if self._closed:
            return
        self._closed = True
        for tenant in self._tenants:
            with contextlib.suppress(DeviceError):
                tenant.group.set_memory_limit(self.plan.memory_bytes + 4 * _SLACK_BYTES)
        self._pool.shutdown(wait=True)
        for tenant in self._tenants:
            tenant.end()
        self._tenants.clear()
        self._cgroups.close()
        for device in self._devices:
            try:
                remove_zram(device)
            except DeviceError as error:
                self._log(str(error))
        self._guardian.dismiss()
