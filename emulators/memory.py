"""Modelled tenants of host memory, for virtual time and for nodes without privileges.

The model answers the same questions as real tenants in control groups (`daemons.tenants`): a tenant
touches its working set, low pages more often than high ones (a page at share ``u^2``, ``u``
uniform); what does not fit under its limit is in compressed swap; a touch of a swapped page costs a
fault. The guaranteed part, the lowest pages, is locked: filled at the start, it never leaves
memory. With a share ``r`` of the working set in memory, a share ``1 - sqrt(r)`` of touches fault,
and the time of a touch grows from ``hot`` to ``hot + miss * fault``.

Constants were measured on a 2-core machine with lz4 zram (a hot touch 0.4 us, one from zram 8.2
us, reclaim at 0.3 to 0.7 GB/s, coming back at 0.9 GB/s sequentially). Pressure is the share of time
lost to faults, averaged over some seconds as real tenants' is. Deterministic.
"""

from __future__ import annotations

import math
from typing import Protocol

from testbed.core.messages import TenantInfo, TenantReadings

HOT_TOUCH_S = 0.4e-6
FAULT_S = 8.2e-6
TOUCHES_PER_S = 30_000.0
RECLAIM_BYTES_PER_S = 0.4e9
PAGE_IN_BYTES_PER_S = 0.9e9
PRESSURE_WINDOW_S = 3.0
_PAGE = 4096


class Plan(Protocol):
    """Who the tenants are: `daemons.tenants.TenantPlan`."""

    @property
    def count(self) -> int:
        """Tenants of the node."""
        ...

    @property
    def memory_bytes(self) -> int:
        """What each was sold."""
        ...

    @property
    def guaranteed_bytes(self) -> int:
        """What of it is its own whatever happens."""
        ...

    def working_set_bytes(self, tenant: int, t_s: float) -> int:
        """What a tenant needs at ``t_s``."""
        ...

    def infos(self, backing: str) -> list[TenantInfo]:
        """Names and sizes."""
        ...


class ModelledTenants:
    """Answers `daemons.seams.TenantDevice` without a kernel.

    Args:
        plan: who they are.
        why: why they are not real; shown in the recording.
    """

    def __init__(self, plan: Plan, why: str = "virtual time") -> None:
        self._plan = plan
        self._why = why
        count = plan.count
        self._limit = [plan.memory_bytes] * count
        self._working = [0] * count
        self._resident = [0.0] * count
        self._faults = [0.0] * count
        self._pressure = [0.0] * count
        self._slowdown = [0.0] * count
        self._t_s = 0.0

    def infos(self) -> list[TenantInfo]:
        """Names and sizes."""
        return self._plan.infos(f"modelled ({self._why})")

    def set_limit(self, tenant: int, memory_limit_bytes: int) -> None:
        """Let a tenant hold at most so much; the excess is reclaimed at a finite rate."""
        plan = self._plan
        self._limit[tenant] = min(max(memory_limit_bytes, plan.guaranteed_bytes), plan.memory_bytes)

    def advance_to(self, t_s: float) -> None:
        """Let time pass until ``t_s``."""
        dt_s = t_s - self._t_s
        if dt_s <= 0:
            return
        self._t_s = t_s
        for tenant in range(self._plan.count):
            self._advance(tenant, dt_s)

    def _advance(self, tenant: int, dt_s: float) -> None:
        working = self._plan.working_set_bytes(tenant, self._t_s)
        own = self._plan.guaranteed_bytes
        before = max(self._working[tenant], own if self._resident[tenant] else 0)
        self._working[tenant] = working
        held = max(working, own)
        resident = min(self._resident[tenant], float(held))
        if held > before:
            resident += held - before  # new pages are born in memory
        target = float(min(held, self._limit[tenant]))
        if resident > target:
            resident = max(target, resident - RECLAIM_BYTES_PER_S * dt_s)
        share = min(1.0, resident / working) if working else 1.0
        miss = 1.0 - math.sqrt(share)
        touch_s = HOT_TOUCH_S + miss * FAULT_S
        # The process is paced: it loses speed only when a period's touches outlast the period.
        touches = min(TOUCHES_PER_S, 1.0 / touch_s) * dt_s
        faults = touches * miss
        self._faults[tenant] += faults
        resident = min(target, resident + min(faults * _PAGE, PAGE_IN_BYTES_PER_S * dt_s))
        self._resident[tenant] = resident
        lost = faults * FAULT_S / dt_s
        keep = math.exp(-dt_s / PRESSURE_WINDOW_S)
        self._pressure[tenant] = lost + (self._pressure[tenant] - lost) * keep
        self._slowdown[tenant] = 1.0 - HOT_TOUCH_S / touch_s

    def read(self, now_s: float) -> TenantReadings:
        """All readings at ``now_s``."""
        self.advance_to(now_s)
        count = self._plan.count
        resident = [int(value) for value in self._resident]
        faults = [int(value) for value in self._faults]
        return TenantReadings(
            working_set_bytes=list(self._working),
            current_bytes=resident,
            limit_bytes=list(self._limit),
            swap_bytes=[max(0, w - r) for w, r in zip(self._working, resident, strict=True)],
            major_faults_total=faults,
            refaults_total=list(faults),
            pressure_some_frac=list(self._pressure),
            slowdown_frac=list(self._slowdown),
            frozen=[False] * count,
        )

    def close(self) -> None:
        """Nothing was made."""
