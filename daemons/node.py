"""The node daemon: reports each device at its rate, obeys commands, serves requests.

Steps that are told the time, like the coordinator; the rig's shells call them. A daemon says
`Hello` until it is welcomed, then samples every ``sample_period_s``. Commands go through
`daemons.safety`, which has the last word.
"""

from __future__ import annotations

from collections.abc import Callable

from daemons.safety import CapGuard
from daemons.seams import GpuDevice, Serving, TenantDevice
from testbed.core.errors import DeviceError
from testbed.core.messages import (
    PROTOCOL_VERSION,
    Ack,
    Arrange,
    Body,
    Bye,
    Envelope,
    Gaps,
    Hello,
    Lease,
    NodeConfig,
    Progress,
    Refused,
    Returned,
    Stop,
    Submit,
    Surroundings,
    TenantLimits,
    TenantReadings,
    Tune,
    Welcome,
    report,
)

Send = Callable[[Body, float], bool]

_NO_TENANTS = TenantReadings.empty()


_PAGE_WORK_TOUCHES = 20.0
"""What an image worker does with a page takes as long as this many plain touches of one: some 15 MB
of pixels and tensors in 30 ms, against 0.4 us a touch (assumed)."""


def preprocess_slowdown(tenants: TenantReadings) -> float:
    """How many times longer images take that are prepared inside these tenants.

    The preprocessing workers are spread over the tenants, and miss pages as often as those do. A
    tenant that lost a share ``s`` of its touching time takes ``1 / (1 - s)`` as long per touch, so
    ``s / (1 - s)`` touches' worth of waiting is added to each page of work.

    >>> preprocess_slowdown(_NO_TENANTS)
    1.0
    """
    if not len(tenants):
        return 1.0
    waits = [min(lost, 0.95) / (1.0 - min(lost, 0.95)) for lost in tenants.slowdown_frac]
    return 1.0 + sum(waits) / len(waits) / _PAGE_WORK_TOUCHES


class NodeDaemon:
    """One node.

    Args:
        name: its path in the run's topology.
        gpus: the devices.
        guard: between commands and the devices.
        serving: the instances.
        send: queues a message to the coordinator.
        boot_id: tells whether two processes share a monotonic clock.
        tenants: host-memory tenants, if any.
        surround: told what an emulated building does to emulated devices.
        log: told in a line what happens.
    """

    WIRED = (
        "name", "config", "welcome", "_gpus", "_guard", "_serving", "_send", "_boot_id",
        "_tenants", "_surround", "_log",
    )  # fmt: skip

    def __init__(
        self,
        name: str,
        gpus: GpuDevice,
        guard: CapGuard,
        serving: Serving,
        send: Send,
        *,
        boot_id: str = "",
        tenants: TenantDevice | None = None,
        surround: Callable[[Surroundings], None] = lambda around: None,
        log: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.name = name
        self.config: NodeConfig | None = None
        self.welcome: Welcome | None = None
        self.stopped = ""
        """Why the daemon should leave; empty while it should not."""
        self.failed = False
        """It leaves because it cannot go on, not because the run is over."""
        self.heard_s = 0.0
        """When the coordinator was last heard from."""
        self._gpus = gpus
        self._guard = guard
        self._serving = serving
        self._send = send
        self._boot_id = boot_id
        self._tenants = tenants
        self._surround = surround
        self._log = log
        self._gaps_s = 0.0
        self._refused = ""
        """Why the last lease was refused; empty if it was not."""

    def hello(self, now_s: float) -> None:
        """Ask to be taken in; to be repeated until `welcome` is there."""
        tenants = self._tenants.infos() if self._tenants else []
        self._send(Hello(PROTOCOL_VERSION, self._boot_id, self._gpus.infos(), tenants), now_s)

    def on_message(self, envelope: Envelope, now_s: float) -> None:
        """Obey a message that is due now."""
        body = envelope.body
        self.heard_s = now_s
        if isinstance(body, Welcome):
            self._on_welcome(body, now_s)
        elif isinstance(body, Refused):
            self.stopped, self.failed = f"the coordinator refused: {body.reason}", True
        elif isinstance(body, Submit):
            if self.config is not None:
                self._serving.submit(body.instance, body.request, now_s, body.ttft_s)
                self._report_progress(now_s)
        elif isinstance(body, Surroundings):
            self._surround(body)
        elif isinstance(body, Arrange | Tune):
            if self.config is not None:
                self._change(body, now_s)
        elif isinstance(body, Lease):
            refused = self._guard.accept(body, now_s)
            if refused:
                self._log(f"lease refused: {refused}")
            if body.answer or refused or self._refused:
                limits_w = self._guard.power_limits_w()
                self._send(Ack(body.epoch, body.sequence, refused, limits_w), now_s)
            self._refused = refused
        elif isinstance(body, TenantLimits):
            if self._tenants:
                for tenant, limit in zip(body.tenant, body.memory_limit_bytes, strict=True):
                    self._tenants.set_limit(tenant, limit)
        elif isinstance(body, Stop):
            self.stopped = body.reason

    def _on_welcome(self, welcome: Welcome, now_s: float) -> None:
        if self.welcome is not None and welcome.epoch <= self.welcome.epoch:
            return
        config = welcome.config
        try:
            self._guard.agree(
                config.safe_power_limit_w,
                lease_s=config.lease_s,
                ramp_down_w_per_s=config.ramp_down_w_per_s,
                ramp_up_w_per_s=config.ramp_up_w_per_s,
                epoch=welcome.epoch,
                now_s=now_s,
            )
            if config.elastic:
                self._serving.configure_slots(config, now_s)
            else:
                self._serving.configure(config.instances, now_s)
        except DeviceError as error:
            self.stopped, self.failed = str(error), True
            return
        self.welcome, self.config = welcome, config
        self._gaps_s = now_s

    def _change(self, body: Arrange | Tune, now_s: float) -> None:
        """Change instances, or something about them; a device that cannot says so in the log."""
        try:
            if isinstance(body, Arrange):
                self._serving.arrange(body.sequence, body.instances, body.how, now_s)
            else:
                self._serving.tune(body.kind, body.instance, body.value_count, now_s)
        except DeviceError as error:
            self._log(f"refused: {error}")
        self._report_progress(now_s)

    def serve(self, now_s: float) -> None:
        """Let the instances do what is due, and tell what became of requests."""
        self._serving.advance_to(now_s)
        self._report_progress(now_s)

    @property
    def next_serving_s(self) -> float:
        """When the instances want `serve` to be called next."""
        return self._serving.next_event_s

    def _report_progress(self, now_s: float) -> None:
        events = self._serving.drain_events()
        if events:
            self._send(
                Progress(
                    [event.request_id for event in events],
                    [event.kind for event in events],  # type: ignore[misc]
                    [event.t_s for event in events],
                    [event.preemptions for event in events],
                ),
                now_s,
            )
        returned = self._serving.drain_returned()
        if returned:
            self._send(
                Returned(
                    [request.request_id for request in returned],
                    [request.instance for request in returned],
                    [request.output_tokens for request in returned],
                    [request.why for request in returned],
                ),
                now_s,
            )

    def sample(self, now_s: float, late_s: float = 0.0) -> None:
        """Check the lease, read every device and report."""
        self._guard.advance(now_s)
        tenants = self._tenants.read(now_s) if self._tenants else _NO_TENANTS
        if self.config is not None and self.config.preprocess_in_tenants:
            self._serving.preprocess_slowdown = preprocess_slowdown(tenants)
        self._report_progress(now_s)
        self._send(
            report(
                self._gpus.read(),
                self._serving.read(now_s),
                tenants,
                lease_epoch=self._guard.epoch,
                lease_sequence=self._guard.sequence,
                drift_total=self._guard.drift_total,
                late_s=late_s,
                slots=self._serving.slots(),
            ),
            now_s,
        )
        if self.gaps_due(now_s):
            self._report_gaps(now_s)

    def gaps_due(self, now_s: float) -> bool:
        """Whether gaps between tokens are to be reported now; asking starts the next period."""
        if self.config is None or now_s - self._gaps_s < self.config.gaps_period_s - 1e-9:
            return False
        self._gaps_s = now_s
        return True

    def _report_gaps(self, now_s: float) -> None:
        gaps = self._serving.drain_gaps()
        if gaps:
            instance, bins, counts = (list(column) for column in zip(*gaps, strict=True))
            self._send(Gaps(instance, bins, counts), now_s)

    def close(self, now_s: float, lateness: Bye) -> None:
        """Restore what was found and say goodbye."""
        self._report_gaps(now_s)
        self._guard.restore()
        self._send(lateness, now_s)
        if self._tenants:
            self._tenants.close()
        self._serving.close()
        self._gpus.close()
