"""The last word on a node's limits, whoever asks.

`CapGuard` stands between what arrives over the wire and the device:

- A lease of an older epoch or sequence is refused, and so is one that does not fit this node.
- Values are clamped to what the device allows; it moves towards them at a bounded rate, down fast
  and up slowly.
- When the lease runs out, the node moves by itself to its safe caps, agreed when it joined.
- After every set it reads back. Finding another limit than it left, it counts drift. A lower one is
  another authority's and is respected until it rises; a higher one is set again.
- What was found at start is on disk before the first change, and is put back on exit. A daemon that
  was killed leaves the file, and its next life puts the limits back first.

Told the time; `advance` is called once per sample period.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from daemons.seams import GpuDevice
from testbed.core.errors import DeviceError
from testbed.core.messages import Lease

_SAME_W = 0.001
"""Limits are whole milliwatts in NVML: closer than this is equal."""


class Journal:
    """What was found on the devices before this daemon changed anything, keyed by UUID.

    Written and synced before the first change; a leftover file is the mark of a killed daemon.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any] | None:
        """What an earlier life found, or None if it left in peace.

        Raises:
            DeviceError: there is a journal that cannot be read: somebody must look at it.
        """
        try:
            tree = json.loads(self.path.read_text(encoding="utf-8"))
            return {str(uuid): dict(found) for uuid, found in tree["found"].items()}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise DeviceError(
                f"journal {self.path} of an earlier daemon cannot be read ({error}); check the "
                "GPUs' power limits by hand, then remove it"
            ) from None

    def write(self, found: dict[str, Any]) -> None:
        """Put what was found on disk, so that it survives a crash of the machine."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".new")
        with temporary.open("w", encoding="utf-8") as file:
            json.dump({"found": found, "pid": os.getpid()}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(self.path)

    def remove(self) -> None:
        """Everything is as it was found."""
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()


class CapGuard:
    """Keeps the power limits and clock locks of a node's GPUs within what is safe.

    Args:
        gpus: the devices.
        journal: where what was found is kept.
        allow_writes: off makes a dry run: everything is computed, nothing is set.
        log: told in a line what happens.

    Raises:
        DeviceError: a device cannot be read, or the journal cannot.
    """

    WIRED = ("_gpus", "_journal", "_log", "_infos", "_allow_writes")

    def __init__(
        self,
        gpus: GpuDevice,
        journal: Journal,
        *,
        allow_writes: bool = True,
        log: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._gpus = gpus
        self._journal = journal
        self._allow_writes = allow_writes
        self._log = log
        self._infos = gpus.infos()
        count = len(self._infos)
        self.epoch = 0
        self.sequence = 0
        self.expires_s = math.inf
        self.expired = False
        self.drift_total = 0
        self.errors_total = 0
        self._safe_w = [info.power_limit_default_w for info in self._infos]
        self._ramp_down_w_per_s = self._ramp_up_w_per_s = math.inf
        self._lease_s = math.inf
        self._advanced_s: float | None = None
        self._foreign_w = [math.inf] * count
        found = journal.read()
        if found is not None:
            log("an earlier daemon was killed: putting its limits back as it found them")
            self._restore(found)
        self._found = {
            info.uuid: {"power_limit_w": limit_w}
            for info, limit_w in zip(self._infos, gpus.power_limits_w(), strict=True)
        }
        self._set_w = gpus.power_limits_w()  # as last set or accepted by us
        self._target_w = list(self._set_w)
        self._lock_mhz = [0.0] * count
        self._target_lock_mhz = [0.0] * count
        self._moving = True
        if allow_writes:
            journal.write(self._found)

    def agree(
        self,
        safe_power_limit_w: list[float],
        *,
        lease_s: float,
        ramp_down_w_per_s: float,
        ramp_up_w_per_s: float,
        epoch: int,
        now_s: float,
    ) -> None:
        """Take the terms of a coordinator; its first lease must come within ``lease_s``.

        Raises:
            DeviceError: the terms do not fit this node's devices.
        """
        if len(safe_power_limit_w) != len(self._infos):
            raise DeviceError(f"{len(safe_power_limit_w)} safe limits for {len(self._infos)} GPUs")
        for info, safe_w in zip(self._infos, safe_power_limit_w, strict=True):
            if not info.power_limit_min_w <= safe_w <= info.power_limit_max_w:
                raise DeviceError(
                    f"safe limit {safe_w} W is outside {info.model}'s range "
                    f"[{info.power_limit_min_w}, {info.power_limit_max_w}] W"
                )
        if epoch < self.epoch:
            raise DeviceError(f"epoch {epoch} is older than {self.epoch}")
        if epoch > self.epoch:
            self.epoch, self.sequence = epoch, 0
        self._safe_w = list(safe_power_limit_w)
        self._lease_s = lease_s
        self._ramp_down_w_per_s = ramp_down_w_per_s
        self._ramp_up_w_per_s = ramp_up_w_per_s
        self.expires_s = now_s + lease_s
        self._advanced_s = now_s
        self._moving = True

    def accept(self, lease: Lease, now_s: float) -> str:
        """Take a lease, or say why not; the limits move with the next `advance`."""
        count = len(self._infos)
        if lease.epoch != self.epoch:
            return f"epoch {lease.epoch}, this node obeys {self.epoch}"
        if lease.sequence <= self.sequence:
            return f"sequence {lease.sequence} after {self.sequence}"
        if len(lease.power_limit_w) != count or len(lease.sm_clock_lock_mhz) != count:
            return f"limits for {len(lease.power_limit_w)} GPUs, this node has {count}"
        if not all(map(math.isfinite, [*lease.power_limit_w, *lease.sm_clock_lock_mhz])):
            return "a limit is not a number"
        if not lease.expires_s > now_s:
            return f"it ran out at {lease.expires_s:.3f} s, now is {now_s:.3f} s"
        self.sequence = lease.sequence
        self._moving = True
        # However long a lease claims to be, it does not bind us longer than was agreed.
        self.expires_s = min(lease.expires_s, now_s + self._lease_s)
        if self.expired:
            self._log(f"lease {lease.sequence} taken, no longer cut off")
        self.expired = False
        self._target_w = [
            min(max(limit_w, info.power_limit_min_w), info.power_limit_max_w)
            for limit_w, info in zip(lease.power_limit_w, self._infos, strict=True)
        ]
        self._target_lock_mhz = [
            min(max(lock_mhz, info.sm_clock_min_mhz), info.sm_clock_max_mhz)
            if lock_mhz > 0
            else 0.0
            for lock_mhz, info in zip(lease.sm_clock_lock_mhz, self._infos, strict=True)
        ]
        return ""

    def advance(self, now_s: float) -> None:
        """Check the lease, look for changes by others, and move a step towards the targets."""
        since_s = 0.0 if self._advanced_s is None else now_s - self._advanced_s
        self._advanced_s = now_s
        if now_s >= self.expires_s and not self.expired:
            self.expired = self._moving = True
            self._target_w = list(self._safe_w)
            self._log(f"lease ran out at {self.expires_s:.3f} s: moving to the safe caps")
        self._reconcile()
        if not self._moving:
            return
        for index, target_w in enumerate(self._target_w):
            wanted_w = min(target_w, self._foreign_w[index])
            here_w = self._set_w[index]
            if here_w - wanted_w > _SAME_W:
                wanted_w = max(wanted_w, here_w - self._ramp_down_w_per_s * since_s)
            elif wanted_w - here_w > _SAME_W:
                wanted_w = min(wanted_w, here_w + self._ramp_up_w_per_s * since_s)
            else:
                continue
            info = self._infos[index]
            wanted_w = min(max(wanted_w, info.power_limit_min_w), info.power_limit_max_w)
            self._set(index, round(wanted_w, 3))
        for index, lock_mhz in enumerate(self._target_lock_mhz):
            if lock_mhz != self._lock_mhz[index]:
                self._lock(index, lock_mhz)
        self._moving = self._lock_mhz != self._target_lock_mhz or any(
            abs(min(target_w, foreign_w) - here_w) > _SAME_W
            for target_w, foreign_w, here_w in zip(
                self._target_w, self._foreign_w, self._set_w, strict=True
            )
        )

    def rest(self, now_s: float) -> bool:
        """Pass the time until ``now_s`` if `advance` would change nothing, and say so.

        For a caller who knows that nobody else has touched the limits.
        """
        if self._moving or (now_s >= self.expires_s and not self.expired):
            return False
        self._advanced_s = now_s
        return True

    def _reconcile(self) -> None:
        """Compare with what we left, and decide about what somebody else set."""
        if not self._allow_writes:
            return
        found_w = self._gpus.power_limits_w()
        if found_w == self._set_w:
            return
        for index, read_w in enumerate(found_w):
            if read_w <= 0 or abs(read_w - self._set_w[index]) <= _SAME_W:
                continue  # a lost GPU, or as we left it
            self.drift_total += 1
            self._moving = True
            uuid = self._infos[index].uuid
            lower = read_w < min(self._target_w[index], self._set_w[index]) - _SAME_W
            self._log(
                f"{uuid}: somebody set {read_w} W, we had {self._set_w[index]} W: "
                + ("respected" if lower else "set again")
            )
            self._foreign_w[index] = read_w if lower else math.inf
            self._set_w[index] = read_w

    def _set(self, index: int, limit_w: float) -> None:
        if self._allow_writes:
            try:
                self._gpus.set_power_limit(index, limit_w)
            except DeviceError as error:
                self._fail(error)
                return
        self._set_w[index] = limit_w

    def _lock(self, index: int, lock_mhz: float) -> None:
        if self._allow_writes:
            try:
                self._gpus.set_clock_lock(index, lock_mhz)
            except DeviceError as error:
                self._fail(error)
                return
        self._lock_mhz[index] = lock_mhz

    def _fail(self, error: DeviceError) -> None:
        # A lost GPU draws nothing that we could still limit: said once, tried no more.
        self.errors_total += 1
        if self.errors_total <= 10:
            self._log(str(error))

    def power_limits_w(self) -> list[float]:
        """Limits as read back, or as they would be in a dry run."""
        return self._gpus.power_limits_w() if self._allow_writes else list(self._set_w)

    def restore(self) -> None:
        """Put back what was found at start, and say so by removing the journal."""
        if self._allow_writes:
            self._restore(self._found)
            self._journal.remove()

    def _restore(self, found: dict[str, Any]) -> None:
        if not self._allow_writes:
            return
        for index, info in enumerate(self._infos):
            if info.uuid not in found:
                continue
            try:
                self._gpus.set_power_limit(index, float(found[info.uuid]["power_limit_w"]))
                self._gpus.set_clock_lock(index, 0.0)
            except DeviceError as error:
                self._log(f"not restored: {error}")
