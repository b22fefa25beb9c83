"""What a node daemon needs of the things it is given: signatures only.

The rig hands in what answers them: real devices or emulated ones, a real engine or an emulated one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from testbed.core.messages import (
    GpuInfo,
    GpuReadings,
    InstanceConfig,
    InstanceReadings,
    NodeConfig,
    Request,
    ReturnedWhy,
    SlotReadings,
    StartHow,
    TenantInfo,
    TenantReadings,
    TuneKind,
)


class GpuDevice(Protocol):
    """The GPUs of a node, in one order for its whole life."""

    def infos(self) -> list[GpuInfo]:
        """What does not change, per GPU. Command line: ``nvidia-smi -q``."""
        ...

    def read(self) -> GpuReadings:
        """All readings now. A lost GPU reads zero and says ``lost``."""
        ...

    def power_limits_w(self) -> list[float]:
        """The limits that were asked for last, by anybody.

        Command line: ``nvidia-smi --query-gpu=power.limit``.
        """
        ...

    def set_power_limit(self, index: int, power_limit_w: float) -> None:
        """Ask for a limit. Command line: ``nvidia-smi -i INDEX -pl WATTS``.

        Raises:
            DeviceError: refused (privilege, range) or the GPU is lost.
        """
        ...

    def set_clock_lock(self, index: int, sm_clock_mhz: float) -> None:
        """Keep the SM clock at or below a value; 0 unlocks. ``nvidia-smi -i INDEX -lgc 0,MHZ``.

        Raises:
            DeviceError: as for `set_power_limit`.
        """
        ...

    def close(self) -> None:
        """Let go of the driver."""
        ...


class ServingEvent(Protocol):
    """What became of a request; `emulators.engine.Event` is one."""

    @property
    def request_id(self) -> int:
        """As submitted."""
        ...

    @property
    def kind(self) -> str:
        """``first_token``, ``finished`` or ``rejected``."""
        ...

    @property
    def t_s(self) -> float:
        """When, on the run's clock."""
        ...

    @property
    def preemptions(self) -> int:
        """How often it was preempted so far."""
        ...


class ReturnedRequest(Protocol):
    """A request that an instance gave up before it ended."""

    @property
    def request_id(self) -> int:
        """As submitted."""
        ...

    @property
    def instance(self) -> int:
        """Which instance gave it up."""
        ...

    @property
    def output_tokens(self) -> int:
        """Tokens given out since it was submitted there."""
        ...

    @property
    def why(self) -> ReturnedWhy:
        """See `testbed.core.messages.Returned`."""
        ...


class Serving(Protocol):
    """The instances on a node: told the time, asked when something happens next."""

    preprocess_slowdown: float
    """How many times longer an image takes to prepare than on a host with nothing else to do."""

    def configure(self, instances: list[InstanceConfig], t_s: float) -> None:
        """Load these models.

        Raises:
            DeviceError: a model is unknown or does not fit.
        """
        ...

    def configure_slots(self, config: NodeConfig, t_s: float) -> None:
        """As `configure`, on a node whose instances may change: there is a slot per GPU.

        Raises:
            DeviceError: as for `configure`, or this kind of serving cannot do that.
        """
        ...

    def arrange(
        self, sequence: int, instances: list[InstanceConfig], how: StartHow, t_s: float
    ) -> None:
        """Hold these instances and no others, each from when it can be there.

        Raises:
            DeviceError: one cannot be held.
        """
        ...

    def tune(self, kind: TuneKind, instances: list[int], values: list[float], t_s: float) -> None:
        """A quick change to some instances, see `testbed.core.messages.Tune`.

        Raises:
            DeviceError: this kind of serving cannot do that.
        """
        ...

    def submit(self, instance: int, request: Request, t_s: float, ttft_s: float) -> None:
        """Give a request to an instance, and what it was promised (`Submit.ttft_s`)."""
        ...

    def advance_to(self, t_s: float) -> None:
        """Let happen what is due by ``t_s``."""
        ...

    @property
    def next_event_s(self) -> float:
        """When the next thing happens by itself; infinite when idle."""
        ...

    def drain_events(self) -> Sequence[ServingEvent]:
        """What happened since the last call, in order of time per instance."""
        ...

    def drain_returned(self) -> Sequence[ReturnedRequest]:
        """Requests given up since the last call."""
        ...

    def drain_gaps(self) -> list[tuple[int, int, int]]:
        """Inter-token gaps since the last call: (instance, histogram bin, count)."""
        ...

    def read(self, t_s: float) -> InstanceReadings:
        """Queue, batch and KV use of each instance, or slot."""
        ...

    def slots(self) -> SlotReadings:
        """What each slot holds; empty columns where instances are fixed."""
        ...

    def close(self) -> None:
        """Stop serving."""
        ...


class TenantDevice(Protocol):
    """The host-memory tenants of a node."""

    def infos(self) -> list[TenantInfo]:
        """Names and sizes."""
        ...

    def read(self, now_s: float) -> TenantReadings:
        """All readings now."""
        ...

    def set_limit(self, tenant: int, memory_limit_bytes: int) -> None:
        """Let a tenant hold at most so much; returns at once, acts when the kernel is done."""
        ...

    def close(self) -> None:
        """End the tenants and remove what was made for them."""
        ...
