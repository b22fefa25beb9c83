"""The coordinator: keeps the view, lets policies decide, and tells the nodes.

It is written as steps that are told the time (`on_arrival`, `on_message`, `control`, `tick`); the
rig calls them from virtual or live shells. It sends through a hub and writes to a recorder, and
knows nothing else of the world.

A node's life: it says `Hello`; the coordinator answers `Welcome`, with an epoch, until the node's
first `Report` shows that its telemetry arrives; then its instances take requests and its caps are
leased: all limits of the node in one message, renewed three times per lease. A node that falls
silent counts at its enforced limits; after ``node_timeout_s`` it is lost and its requests are
routed again, until they have had ``max_attempts``. A node that says `Hello` in a new life has
forgotten its requests: it is treated as lost, then welcomed.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import numpy as np

from testbed.coordinator.arbiter import Claims
from testbed.coordinator.arranging import Arranging
from testbed.coordinator.building import Answer, Building
from testbed.coordinator.cluster import Layout, LeaseWhy, Node
from testbed.coordinator.dispatch import Dispatcher
from testbed.core.columns import Columns
from testbed.core.errors import PolicyError, SpecError, TestbedError
from testbed.core.messages import (
    PROTOCOL_VERSION,
    Ack,
    Arrange,
    Bye,
    Envelope,
    Gaps,
    GpuReadings,
    Heartbeat,
    Hello,
    InstanceReadings,
    Lease,
    Ping,
    Pong,
    Progress,
    Refused,
    RelayStatus,
    Report,
    Request,
    Returned,
    RowReport,
    SlotReadings,
    Stop,
    Submit,
    TenantLimits,
    TenantReadings,
    Tune,
    TuneKind,
    Welcome,
)
from testbed.core.spec import RunSpec
from testbed.core.transport.base import Hub
from testbed.core.view import (
    OFF,
    UP,
    Bools,
    Command,
    Controller,
    DrainInstance,
    Floats,
    GpuColumns,
    InstanceColumns,
    Ints,
    LockClocks,
    OrderQueue,
    PlaceVm,
    RecallWaiting,
    Router,
    SetBatch,
    SetLayout,
    SetMemoryLimit,
    SetPowerLimit,
    Squash,
    TenantColumns,
)
from testbed.recorder.tables import LAYOUT
from testbed.recorder.writer import Recorder

_PHASES = 10
"""Into how many groups renewals of leases are spread."""
_ANSWER_EVERY = 8
"""Of so many renewals of a lease one is answered, to know round trips; changes all are."""
_SLICE_NODES = 100
"""Nodes that a tick sees to at a time; each may get a lease, which takes some 15 us."""
_STATES = ("off", "starting", "up", "draining")


class Coordinator:
    """See the module's story.

    Args:
        spec: the run.
        hub: sends to nodes.
        records: keeps what happened.
        controllers: policies in the order of ``spec.policy``.
        router: picks an instance per request.
        epoch: grows with every start of a coordinator, so that nodes can tell old from new.
        start_ns: the run's zero on this machine's monotonic clock (live modes).
        observed_s: what the clock shows, for what a client would have measured. In virtual time
            the time of the event itself.
        beat_period_s: least time between two heartbeats; infinite where nodes cannot miss them.
        submit: sends a request to an instance by a shorter way than the hub; see `Dispatcher`.
        surround: tells nodes, by their indices, what the building does to them, likewise.
        monotonic_ns: this machine's clock, for nodes that set theirs by it.
        breathe: called between pieces of long work; a live loop looks at its sockets then. Of what
            arrives only answers are heard before the work is done, by which nothing is decided.
    """

    WIRED = (
        "spec", "layout", "view", "dispatcher", "_hub", "_records", "_controllers", "_run_id",
        "_epoch", "_start_ns", "_boot_id", "_beat_period_s", "_observed_s", "_surround",
        "_monotonic_ns", "_breathe",
    )  # fmt: skip

    def __init__(
        self,
        spec: RunSpec,
        hub: Hub,
        records: Recorder,
        controllers: list[Controller],
        router: Router,
        *,
        run_id: str,
        epoch: int = 1,
        start_ns: int = 0,
        boot_id: str = "",
        beat_period_s: float = 1.0,
        submit: Callable[[int, Request, float, float], object] | None = None,
        surround: Callable[[Ints, Answer, float], object] | None = None,
        observed_s: Callable[[float], float] = lambda now_s: now_s,
        monotonic_ns: Callable[[], int] = lambda: 0,
        breathe: Callable[[], object] = lambda: None,
    ) -> None:
        self.spec = spec
        self.layout = Layout(spec)
        self.view = self.layout.view
        self._hub = hub
        self._records = records
        self._controllers = controllers
        self._run_id = run_id
        self._epoch = epoch
        self._start_ns = start_ns
        self._boot_id = boot_id
        self._beat_period_s = beat_period_s
        self._observed_s = observed_s
        self._surround = surround
        self.dispatcher = Dispatcher(
            spec, self.layout, records, router, submit or self._send_request
        )
        self._monotonic_ns = monotonic_ns
        self._breathe = breathe
        num_instances = len(self.layout.instances.name)
        self._draining = np.zeros(num_instances, dtype=np.bool_)
        self._by_deadline = np.zeros(num_instances, dtype=np.bool_)
        self._own_seqs = self.layout.instances.max_num_seqs.copy()
        """Most sequences in a batch as the instance's pool has it."""
        self.commands_total = 0
        names = [policy.use for policy in spec.policy]
        precedence = [policy.precedence for policy in spec.policy]
        count = len(self.layout.gpus.name)
        self._power = Claims(names, list(precedence), count)
        self._clocks = Claims(names, list(precedence), count)
        self._batches = Claims(names, list(precedence), num_instances)
        self._arranging = Arranging(spec, self.layout)
        self._default_w = np.zeros(count)
        self._limit_w = np.zeros(count)
        self._lock_mhz = np.zeros(count)
        self._next_step_s = [0.0] * len(controllers)
        self._step = 0
        self._relays: dict[str, RelayStatus] = {}
        self._building = Building(spec, self.layout) if spec.plant is not None else None
        records.cluster(self.view)

    # What nodes say.

    def on_message(self, envelope: Envelope, now_s: float) -> None:
        """Take in a message that is due now."""
        body = envelope.body
        if isinstance(body, Report | RowReport):
            self.on_reports([envelope], envelope.t_s, now_s)
        elif isinstance(body, RelayStatus):
            self._on_relay(envelope.source, body, now_s)
        else:
            node = self.layout.by_name.get(envelope.source)
            if node is None:
                self._on_stranger(envelope, now_s)
            elif isinstance(body, Ping):
                self._hub.send(node.name, Pong(body.sent_ns, self._monotonic_ns()), now_s)
            elif isinstance(body, Hello):
                self._on_hello(node, envelope.incarnation, body, now_s)
            elif envelope.incarnation == node.incarnation:
                node.last_s = now_s
                self._on_word(node, envelope, now_s)

    def _on_word(self, node: Node, envelope: Envelope, now_s: float) -> None:
        """What a node says in its present life."""
        body = envelope.body
        if isinstance(body, Ack):
            self._on_ack(node, body, now_s)
        elif isinstance(body, Progress):
            self._on_progress(node, body, now_s)
        elif isinstance(body, Returned):
            self._on_returned(node, body, envelope.t_s, now_s)
        elif isinstance(body, Gaps):
            self._on_gaps(node, body, envelope.t_s)
        elif isinstance(body, Bye):
            self._on_bye(node, body, now_s)

    def _on_stranger(self, envelope: Envelope, now_s: float) -> None:
        """Somebody who has no place in this run."""
        if isinstance(envelope.body, Hello):
            known = len(self.layout.nodes)
            reason = f"{envelope.source!r} is none of the {known} nodes of this run"
            self._hub.send(envelope.source, Refused(reason), now_s)
            self._event(now_s, "warning", envelope.source, "refused", reason)

    def _on_relay(self, name: str, status: RelayStatus, now_s: float) -> None:
        before = self._relays.get(name)
        self._relays[name] = status
        if before is None:
            self._event(now_s, "info", name, "relay", f"passes on {status.nodes} nodes")
        elif (status.gaps_total, status.dropped_total) > (before.gaps_total, before.dropped_total):
            text = f"{status.gaps_total} messages missing, {status.dropped_total} dropped so far"
            self._event(now_s, "warning", name, "gaps", text)

    def _on_hello(self, node: Node, incarnation: int, hello: Hello, now_s: float) -> None:
        reason = ""
        expected = node.gpus.stop - node.gpus.start
        if hello.protocol != PROTOCOL_VERSION:
            reason = f"protocol {hello.protocol}, the coordinator speaks {PROTOCOL_VERSION}"
        elif len(hello.gpus) != expected:
            reason = f"{len(hello.gpus)} GPUs, the run file says {expected}"
        elif len(hello.tenants) != node.tenants.stop - node.tenants.start:
            expected = node.tenants.stop - node.tenants.start
            reason = f"{len(hello.tenants)} tenants, the run file says {expected}"
        elif node.live and incarnation < node.incarnation:
            reason = f"{node.name} is already here in a later life"
        else:
            try:
                config = self.layout.node_config(node, hello.gpus)
            except SpecError as error:
                reason = str(error)
        if reason:
            self._hub.send(node.name, Refused(reason), now_s)
            if node.refused != reason:
                self._event(now_s, "error", node.name, "refused", reason)
            node.refused = reason
            return
        if node.incarnation and node.incarnation != incarnation:
            self._lose(node, now_s, "restarted")
        node.incarnation = incarnation
        node.last_s = now_s
        node.refused = ""
        node.infos = hello.gpus
        node.tenant_infos = hello.tenants
        gpus = self.layout.gpus
        for name in ("power_limit_min_w", "power_limit_max_w"):
            getattr(gpus, name)[node.gpus] = [getattr(info, name) for info in hello.gpus]
        for name in ("sm_clock_min_mhz", "sm_clock_max_mhz"):
            getattr(gpus, name)[node.gpus] = [getattr(info, name) for info in hello.gpus]
        self._default_w[node.gpus] = [info.power_limit_default_w for info in hello.gpus]
        tenants = self.layout.tenants
        tenants.guaranteed_bytes[node.tenants] = [t.guaranteed_bytes for t in hello.tenants]
        tenants.memory_bytes[node.tenants] = [t.memory_bytes for t in hello.tenants]
        members = range(node.gpus.start, node.gpus.stop)
        self._records.node_joined(now_s, members, hello.gpus, config.safe_power_limit_w)
        self._hub.send(
            node.name,
            Welcome(self._epoch, self._run_id, self._start_ns, self._boot_id, config),
            now_s,
        )

    def on_reports(self, words: list[Envelope], t_s: float, now_s: float) -> None:
        """Take in what nodes reported of ``t_s``, however many of them at once.

        Args:
            words: a `Report` each, or a `RowReport` of several nodes, as relays merge them.
            t_s: what they show is of then.
            now_s: now.
        """
        by_name = self.layout.by_name
        nodes: list[Node] = []
        drift_totals: list[int] = []
        slots: dict[int, SlotReadings] = {}
        packed: tuple[list[bytes], list[bytes], list[bytes]] = ([], [], [])
        gpus, instances, tenants = packed
        for word in words:
            body: Any = word.body
            if type(body) is RowReport:
                body = self._kept(body, now_s)
                slots |= {len(nodes) + place: said for place, said in body.slots.items()}
                nodes += [by_name[name] for name in body.node]
                drift_totals += body.drift_total
            else:
                node = by_name.get(word.source)
                if node is None or node.incarnation != word.incarnation:
                    continue  # of an earlier life
                sizes = (len(body.gpus), len(body.instances), len(body.tenants))
                if sizes != node.report_bytes:
                    self._on_unfit(node, body.counts, now_s)
                    continue
                if body.slots is not None:
                    slots[len(nodes)] = body.slots
                nodes.append(node)
                drift_totals.append(body.drift_total)
            gpus.append(body.gpus)
            instances.append(body.instances)
            tenants.append(body.tenants)
        if not nodes:
            return
        read = GpuReadings.unpack(b"".join(gpus))
        served = InstanceReadings.unpack(b"".join(instances))
        held = TenantReadings.unpack(b"".join(tenants))
        gpu = _places([node.gpus for node in nodes], len(read))
        instance = _places([node.instances for node in nodes], len(served))
        newly_lost = self._enter(t_s, gpu, read, instance, served)
        if len(held):
            tenant = _places([node.tenants for node in nodes], len(held))
            _enter(self.layout.tenants, tenant, t_s, held)
            self._records.tenants(t_s, tenant, held)
        for place, said in slots.items():
            if said != nodes[place].layout_seen:
                self._on_slots(nodes[place], said, t_s, now_s)
        self._record_readings(t_s, gpu, read, instance, served)
        for place, (node, drift_total) in enumerate(zip(nodes, drift_totals, strict=True)):
            node.last_s = now_s
            if not node.live or drift_total != node.drift_total:
                self._heard(node, drift_total, slots.get(place), now_s)
        for index, lost in newly_lost.items():
            self._lose_gpus(self.layout.nodes[index], lost, now_s)

    def on_bank(
        self,
        gpus: GpuReadings,
        instances: InstanceReadings,
        drift_totals: list[int],
        t_s: float,
        now_s: float,
    ) -> None:
        """The reports of all nodes in one, as arrays: what they show at ``t_s``."""
        gpu, instance = np.arange(len(gpus)), np.arange(len(instances))
        newly_lost = self._enter(t_s, gpu, gpus, instance, instances)
        self._record_readings(t_s, gpu, gpus, instance, instances)
        for node, drift_total in zip(self.layout.nodes, drift_totals, strict=True):
            node.last_s = now_s
            if not node.live or drift_total != node.drift_total:
                self._heard(node, drift_total, None, now_s)
        for index, lost in newly_lost.items():
            self._lose_gpus(self.layout.nodes[index], lost, now_s)

    def _enter(
        self,
        t_s: float,
        gpu: Ints,
        read: GpuReadings,
        instance: Ints,
        served: InstanceReadings,
    ) -> dict[int, list[int]]:
        """Enter readings into the view; returns GPUs newly lost, by node and counted there."""
        gpus = self.layout.gpus
        newly_lost: dict[int, list[int]] = {}
        for place in gpu[np.asarray(read.lost) & ~gpus.lost[gpu]].tolist():
            node = self.layout.nodes[gpus.node[place]]
            if node.live:  # a node that joins had all its GPUs marked lost
                newly_lost.setdefault(node.index, []).append(place - node.gpus.start)
        _enter(gpus, gpu, t_s, read)
        _enter(self.layout.instances, instance, t_s, served)
        return newly_lost

    def _record_readings(
        self, t_s: float, gpu: Ints, read: GpuReadings, instance: Ints, served: InstanceReadings
    ) -> None:
        self._records.gpus(t_s, gpu, read)
        outstanding_tokens = self.layout.instances.outstanding_tokens[instance]
        self._records.instances(t_s, instance, served, outstanding_tokens)

    def _kept(self, row: RowReport, now_s: float) -> RowReport:
        """A row without entries of an earlier life, and those that do not fit their nodes."""
        keep: list[bool] = []
        counts = zip(row.num_gpus, row.num_instances, row.num_tenants, strict=True)
        for name, incarnation, (*count,) in zip(row.node, row.incarnation, counts, strict=True):
            node = self.layout.by_name.get(name)
            keep.append(node is not None and node.incarnation == incarnation)
            if node is not None and keep[-1] and count != node.counts:
                self._on_unfit(node, count, now_s)
                keep[-1] = False
        return row if all(keep) else row.pick(keep)

    def _on_unfit(self, node: Node, counts: list[int], now_s: float) -> None:
        if not node.unfit:
            text = f"reports {counts} GPUs, instances and tenants; it has {node.counts}"
            self._event(now_s, "error", node.name, "bad report", text)
        node.unfit = True

    def _heard(
        self, node: Node, drift_total: int, slots: SlotReadings | None, now_s: float
    ) -> None:
        """A node has reported: for the first time in this life, or that limits were changed."""
        if drift_total > node.drift_total:
            count = drift_total - node.drift_total
            text = f"a limit was changed by somebody else and set again ({count} times)"
            self._event(now_s, "warning", node.name, "drift", text)
        node.drift_total = drift_total
        if not node.live:
            self._join(node, slots, now_s)

    def _join(self, node: Node, slots: SlotReadings | None, now_s: float) -> None:
        """A node's reports arrive: it takes part."""
        node.live = True
        backing = node.tenant_infos[0].backing if node.tenant_infos else ""
        text = f"life {node.incarnation}" + (f"; memory tenants: {backing}" if backing else "")
        self._event(now_s, "info", node.name, "joined", text)
        limit_w = self._limit_w[node.gpus]
        np.copyto(limit_w, self._default_w[node.gpus], where=limit_w == 0)
        self._lease(node, now_s, "joins")
        # Nodes that joined together renew apart, and go on so whatever policies change in between:
        # a burst would hold up what is urgent.
        share = node.index % _PHASES / _PHASES
        node.renew_s = now_s + self.spec.control.lease_s / 3 * (1 - share)
        node.told_s -= share
        self._tune_again(node, now_s)
        if slots is not None and slots.layout_sequence < node.layout_sequence:
            self._tell_layout(node, now_s)  # it was welcomed with an older one
        self._refresh_up(node)
        self.dispatcher.release_held(now_s)

    def _on_slots(self, node: Node, slots: SlotReadings, t_s: float, now_s: float) -> None:
        """What the slots of an elastic node hold has changed, or is called something else."""
        before, node.layout_seen = node.layout_seen, slots
        instances = self.layout.instances
        changed = []
        for local, serial in enumerate(slots.serial):
            place = node.instances.start + local
            another = before is not None and serial != before.serial[local]
            batch = instances.max_num_seqs[place]
            was = [getattr(instances, name)[place] for name in LAYOUT]
            config = self._arranging.known(node, serial)
            self.layout.hold(place, config, slots.state[local], slots.ready_s[local])
            if not another:
                instances.max_num_seqs[place] = batch
            if was != [getattr(instances, name)[place] for name in LAYOUT]:
                changed.append(place)
            if before is not None and (another or slots.state[local] != before.state[local]):
                words = f"{config.model} tp{config.tp}" if config else ""
                text = f"{_STATES[slots.state[local]]} {words}".strip()
                self._event(t_s, "info", instances.name[place], "instance", text)
        self.layout.spread(node.gpus)
        self._refresh_up(node)
        if changed:
            self._records.layout(t_s, self._step + 1, np.array(changed), instances)
            self._settle_batches(now_s)
        if node.live:
            self.dispatcher.release_held(now_s)

    def _on_returned(self, node: Node, returned: Returned, t_s: float, now_s: float) -> None:
        """An instance has given requests up: send them elsewhere, or let them end."""
        if self.dispatcher.stopped:
            return  # every request has its row by now
        self._records.moves(t_s, returned, node.instances.start)
        first = node.instances.start
        given = zip(
            returned.request_id,
            [first + local for local in returned.instance],
            returned.output_tokens,
            returned.why,
            strict=True,
        )
        self.dispatcher.given_up(given, t_s, self._observed_s(now_s), now_s)

    def _on_gaps(self, node: Node, gaps: Gaps, t_s: float) -> None:
        counted = zip(gaps.instance, gaps.bin, gaps.count, strict=True)
        self.on_gaps(node.instances.start, counted, t_s)

    def on_gaps(self, first: int, gaps: Iterable[tuple[int, int, int]], t_s: float) -> None:
        """Counts of gaps between tokens: (instance counted from ``first``, bin, count)."""
        by_instance: dict[int, list[tuple[int, int]]] = {}
        for local, place, count in gaps:
            by_instance.setdefault(local, []).append((place, count))
        for local in sorted(by_instance):
            bins, counts = zip(*by_instance[local], strict=True)
            self._records.itl(t_s, first + local, bins, counts)

    def _on_progress(self, node: Node, progress: Progress, now_s: float) -> None:
        events = zip(
            progress.request_id, progress.event, progress.t_s, progress.preemptions, strict=True
        )
        mine = node.instances
        seen_s = self._observed_s(now_s)
        self.dispatcher.happened(mine.start, mine.stop, events, seen_s, now_s)

    def _on_ack(self, node: Node, ack: Ack, now_s: float) -> None:
        if ack.refused and ack.refused != node.refused:
            self._event(now_s, "error", node.name, "lease refused", ack.refused)
        node.refused = ack.refused

    def _on_bye(self, node: Node, bye: Bye, now_s: float) -> None:
        self._records.lateness(
            node.name,
            now_s,
            bye.late_p50_s,
            bye.late_p99_s,
            bye.late_max_s,
            bye.events_total,
            bye.missed_total,
        )
        if not self.dispatcher.stopped:
            self._lose(node, now_s, f"left: {bye.reason}")
        else:
            node.live = False

    def _lose(self, node: Node, now_s: float, why: str) -> None:
        """A node is gone: mark it down, and send its requests elsewhere."""
        if node.live:
            self._event(now_s, "error", node.name, "lost", why)
        node.live = False
        node.drift_total = 0
        self.layout.gpus.lost[node.gpus] = True
        self._refresh_up(node)
        self.dispatcher.reroute(range(node.instances.start, node.instances.stop), now_s)

    def _lose_gpus(self, node: Node, gpus: list[int], now_s: float) -> None:
        """GPUs fell off the bus: the instances on them are gone, their requests go elsewhere."""
        for local in gpus:
            uuid = node.infos[local].uuid
            self._event(now_s, "error", node.name, "gpu_lost", f"GPU {local}, {uuid}")
        self._refresh_up(node)
        on = self.layout.gpus.instance[node.gpus][gpus]
        self.dispatcher.reroute(set(on.tolist()) - {-1}, now_s)

    def _refresh_up(self, node: Node) -> None:
        """Which instances of a node take requests."""
        instances, seen = self.layout.instances, node.layout_seen
        wanted = {config.serial for config in node.configs}
        for index in range(node.instances.start, node.instances.stop):
            up = node.live and not self._draining[index] and instances.state[index] == UP
            up = up and not self.layout.broken(node, index)
            if up and seen is not None:
                # On its way out, even if the node does not know yet.
                up = seen.serial[index - node.instances.start] in wanted
            instances.up[index] = up

    # What clients ask.

    def on_arrival(self, request: Request, now_s: float) -> None:
        """A request arrives at the front door."""
        self.dispatcher.arrive(request, now_s)

    def _send_request(self, instance: int, request: Request, ttft_s: float, now_s: float) -> None:
        """Send a request to the node of an instance."""
        node = self.layout.nodes[self.layout.instances.node[instance]]
        self._hub.send(node.name, Submit(instance - node.instances.start, request, ttft_s), now_s)

    # What policies decide.

    def control(self, now_s: float) -> None:
        """Let every policy that is due take its step, then lease what changed."""
        due = [i for i, t_s in enumerate(self._next_step_s) if now_s >= t_s - 1e-9]
        if not due:
            return
        self.view.now_s = now_s
        self._step += 1
        self._records.view(self._step, self.view, self._breathe)
        said: list[tuple[int, int, Command]] = []
        for index in due:
            controller = self._controllers[index]
            self._next_step_s[index] = now_s + controller.period_s
            commands = self._asked(index, controller)
            for ordinal, command in enumerate(commands):
                self._hear(index, command)
                said.append((index, ordinal, command))
            self._breathe()
        if said:
            self._settle(said, now_s)
        for index in due:
            count = sum(policy == index for policy, _, _ in said)
            use = self.spec.policy[index].use
            self._records.step(self._step, now_s, index, use, count)

    def _asked(self, policy: int, controller: Controller) -> list[Command]:
        """What a policy says; its own mistakes become one clear line."""
        try:
            return list(controller.step(self.view))
        except TestbedError:
            raise
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise PolicyError(
                f"policy {self.spec.policy[policy].use!r} failed at {self.view.now_s:g} s: "
                f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})"
            ) from error

    def _hear(self, policy: int, command: Command) -> None:
        """Check a command and enter its claims."""
        gpus = self.layout.gpus
        if isinstance(command, SetPowerLimit):
            targets, values = self._checked(policy, command.gpus, command.power_limit_w, gpus.name)
            self._power.claim(policy, targets, values, gpus.power_limit_max_w)
        elif isinstance(command, LockClocks):
            targets, values = self._checked(policy, command.gpus, command.sm_clock_mhz, gpus.name)
            unlocked = np.where(values <= 0, np.inf, values)
            self._clocks.claim(policy, targets, unlocked, gpus.sm_clock_max_mhz)
        elif isinstance(command, SetMemoryLimit):
            self._checked(
                policy, command.tenants, command.memory_limit_bytes, self.layout.tenants.name
            )
        elif isinstance(command, DrainInstance):
            self._checked(policy, command.instances, 0.0, self.layout.instances.name)
        elif isinstance(command, PlaceVm):
            self._hear_place(policy, command)
        elif isinstance(command, SetLayout):
            if self._building is not None:
                use = self.spec.policy[policy].use
                self._building.check_layout(use, command.node, command.layout)
            self._arranging.claim(policy, command)
        elif isinstance(command, SetBatch | OrderQueue | RecallWaiting | Squash):
            self._hear_quick(policy, command)
        else:
            raise PolicyError(f"policy {self.spec.policy[policy].use!r}: {command!r} is no command")

    def _hear_place(self, policy: int, command: PlaceVm) -> None:
        """Check where a policy would have VMs run."""
        use = self.spec.policy[policy].use
        if self._building is None:
            raise PolicyError(f"policy {use!r}: PlaceVm: there are no VMs without a [plant]")
        vms, nodes = self._building.facility.vms.name, self._building.facility.servers.name
        places = np.atleast_1d(np.asarray(command.nodes, np.int64))
        self._checked(policy, command.vms, places.astype(float), vms)
        self._checked(policy, places, 0.0, nodes)

    def _hear_quick(
        self, policy: int, command: SetBatch | OrderQueue | RecallWaiting | Squash
    ) -> None:
        """Check a command to batches and queues."""
        use, kind = self.spec.policy[policy].use, type(command).__name__
        if self.spec.mode == "hardware" and self.spec.forward:
            raise PolicyError(f"policy {use!r}: {kind}: a server behind a URL cannot be told")
        value: Floats | float = 0.0
        if isinstance(command, Squash):
            value = command.ttft_frac
        if isinstance(command, SetBatch):
            value = np.asarray(command.max_num_seqs, dtype=np.float64)
        names = self.layout.instances.name
        targets, values = self._checked(policy, command.instances, value, names)
        if isinstance(command, OrderQueue) and command.by not in ("deadline", "arrival"):
            raise PolicyError(
                f"policy {use!r}: OrderQueue.by = {command.by!r} must be 'deadline' or 'arrival'"
            )
        if isinstance(command, SetBatch):
            pools = self.layout.instances.pool[targets]
            for pool, most in zip(pools.tolist(), values.tolist(), strict=True):
                limit = self.spec.pool[pool].engine.max_batched_tokens
                if most >= limit:
                    raise PolicyError(
                        f"policy {use!r}: SetBatch.max_num_seqs = {most:g} must be below the "
                        f"{limit} of engine.max_batched_tokens"
                    )
            asked = np.where(values < 1, np.inf, np.floor(values))
            self._batches.claim(policy, targets, asked, np.full(len(names), np.inf))

    def _checked(
        self, policy: int, targets: Ints, values: Floats | float, names: tuple[str, ...]
    ) -> tuple[Ints, Floats]:
        use = self.spec.policy[policy].use
        targets = np.atleast_1d(np.asarray(targets, dtype=np.int64))
        column = np.broadcast_to(np.asarray(values, dtype=np.float64), targets.shape)
        if len(targets) and (targets.min() < 0 or targets.max() >= len(names)):
            raise PolicyError(f"policy {use!r}: index {targets.tolist()} is not below {len(names)}")
        if not np.isfinite(column).all() or (column < 0).any():
            raise PolicyError(f"policy {use!r}: value {column.tolist()} must be finite and >= 0")
        return targets, column

    def _settle(self, said: list[tuple[int, int, Command]], now_s: float) -> None:
        """Resolve all claims, tell the nodes whose limits change, and write down who asked."""
        gpus = self.layout.gpus
        limit_w, power_winner = self._power.resolve(self._default_w)
        limit_w = np.where(
            self._default_w > 0,
            np.clip(limit_w, gpus.power_limit_min_w, gpus.power_limit_max_w),
            0.0,
        )
        lock_mhz, clock_winner = self._clocks.resolve(np.zeros(len(limit_w)))
        changed = (limit_w != self._limit_w) | (lock_mhz != self._lock_mhz)
        power_changed = limit_w != self._limit_w
        clock_changed = lock_mhz != self._lock_mhz
        self._limit_w, self._lock_mhz = limit_w, lock_mhz
        batch_winner, batch_changed = self._settle_batches(now_s)
        arranged = self._arrange(said, now_s)
        for policy, ordinal, command in said:
            if isinstance(command, SetPowerLimit | LockClocks):
                power = isinstance(command, SetPowerLimit)
                winner = (power_winner if power else clock_winner)[command.gpus]
                moved = (power_changed if power else clock_changed)[command.gpus]
                self._record_command(now_s, policy, ordinal, command, moved, winner)
            elif isinstance(command, SetMemoryLimit):
                moved = self._limit_memory(policy, command, now_s)
                self._record_command(now_s, policy, ordinal, command, moved)
            elif isinstance(command, PlaceVm):
                assert self._building is not None
                moved = self._building.place(command.vms, command.nodes)
                self._record_command(now_s, policy, ordinal, command, moved)
            elif isinstance(command, DrainInstance):
                moved = self._drain(policy, command, now_s)
                self._record_command(now_s, policy, ordinal, command, moved)
            elif isinstance(command, SetLayout):
                rows = max(1, len(command.layout or ()))
                moved = np.full(rows, command.node in arranged)
                winner = np.full(rows, self._arranging.winner(command.node))
                self._record_command(now_s, policy, ordinal, command, moved, winner)
            elif isinstance(command, SetBatch):
                where = np.atleast_1d(command.instances)
                moved, winner = batch_changed[where], batch_winner[where]
                self._record_command(now_s, policy, ordinal, command, moved, winner)
            else:
                moved = self._tune_queues(command, now_s)
                self._record_command(now_s, policy, ordinal, command, moved)
            self._breathe()
        for count, index in enumerate(np.unique(gpus.node[changed]), 1):
            if count % _SLICE_NODES == 0:
                self._breathe()
            node = self.layout.nodes[index]
            if node.live:
                self._lease(node, now_s, "changes")

    def _arrange(self, said: list[tuple[int, int, Command]], now_s: float) -> set[int]:
        """Tell nodes whose layout changes; returns which."""
        asked = sorted({c.node for _, _, c in said if isinstance(c, SetLayout)})
        arranged = set()
        for index in asked:
            node = self.layout.nodes[index]
            if not self._arranging.settle(node):
                continue
            arranged.add(index)
            if node.live:
                self._tell_layout(node, now_s)
            self._forget_quick(node)
            self._refresh_up(node)
            words = [f"{c.model} tp{c.tp} at GPU {c.gpus[0]}" for c in node.configs]
            text = f"{node.layout_how}: {', '.join(words) or 'nothing'}"
            self._event(now_s, "info", node.name, "layout", text)
        return arranged

    def _tell_layout(self, node: Node, now_s: float) -> None:
        arrange = Arrange(node.layout_sequence, node.configs, node.layout_how)
        self._hub.send(node.name, arrange, now_s)

    def _forget_quick(self, node: Node) -> None:
        """What was asked of instances that are to leave is not asked of those that follow."""
        stay = {config.serial for config in node.configs}
        seen = node.layout_seen.serial if node.layout_seen is not None else []
        gone = [node.instances.start + k for k, serial in enumerate(seen) if serial not in stay]
        self._batches.forget(np.array(gone, np.int64))
        self._draining[gone] = self._by_deadline[gone] = False
        self._own_seqs[gone] = 0
        for config in node.configs:
            self._own_seqs[node.instances.start + config.gpus[0]] = config.engine.max_num_seqs

    def _settle_batches(self, now_s: float) -> tuple[Ints, Bools]:
        """Let the batch limits that hold be set; who set each, and which changed."""
        instances = self.layout.instances
        limit, winner = self._batches.resolve(self._own_seqs.astype(np.float64))
        seqs = np.where(instances.num_gpus > 0, limit, 0).astype(np.int64)
        changed = seqs != instances.max_num_seqs
        changed &= seqs > 0
        if changed.any():
            which = np.flatnonzero(changed)
            instances.max_num_seqs[which] = seqs[which]
            self._records.layout(now_s, self._step + 1, which, instances)
            self._tune("batch", which, seqs[which], now_s)
        return winner, changed

    def _tune_queues(self, command: OrderQueue | RecallWaiting | Squash, now_s: float) -> Bools:
        """Pass a command to queues on; where that changes something."""
        which = np.atleast_1d(np.asarray(command.instances, np.int64))
        moved = self.layout.instances.state[which] != OFF
        if isinstance(command, OrderQueue):
            by_deadline = command.by == "deadline"
            moved = moved & (self._by_deadline[which] != by_deadline)
            self._by_deadline[which[moved]] = by_deadline
            self._tune("order", which[moved], np.full(moved.sum(), float(by_deadline)), now_s)
        elif isinstance(command, RecallWaiting):
            self._tune("recall", which[moved], np.zeros(moved.sum()), now_s)
        else:
            self._tune("squash", which[moved], np.full(moved.sum(), command.ttft_frac), now_s)
        return np.asarray(moved)

    def _tune(self, kind: TuneKind, which: Ints, values: Ints | Floats, now_s: float) -> None:
        """Tell the nodes of these instances."""
        of_node = self.layout.instances.node[which]
        for index in np.unique(of_node):
            node = self.layout.nodes[index]
            mine = of_node == index
            if node.live:
                local = (which[mine] - node.instances.start).tolist()
                self._hub.send(node.name, Tune(kind, local, values[mine].tolist()), now_s)

    def _tune_again(self, node: Node, now_s: float) -> None:
        """A node that has just begun knows nothing of batches and queues that were changed."""
        mine = node.instances
        seqs, own = self.layout.instances.max_num_seqs[mine], self._own_seqs[mine]
        changed = np.flatnonzero((seqs != own) & (seqs > 0))
        if len(changed):
            self._tune("batch", mine.start + changed, seqs[changed], now_s)
        ordered = mine.start + np.flatnonzero(self._by_deadline[mine])
        if len(ordered):
            self._tune("order", ordered, np.ones(len(ordered)), now_s)

    def _limit_memory(self, policy: int, command: SetMemoryLimit, now_s: float) -> Bools:
        tenants = self.layout.tenants
        targets, values = self._checked(
            policy, command.tenants, command.memory_limit_bytes, tenants.name
        )
        # The guaranteed part is not a policy's to take, whatever it says.
        values = np.clip(values, tenants.guaranteed_bytes[targets], tenants.memory_bytes[targets])
        changed: Bools = values != tenants.limit_bytes[targets]
        for index in np.unique(tenants.node[targets[changed]]):
            node = self.layout.nodes[index]
            mine = changed & (tenants.node[targets] == index)
            if node.live:
                local = (targets[mine] - node.tenants.start).tolist()
                limits = [int(value) for value in values[mine]]
                self._hub.send(node.name, TenantLimits(local, limits), now_s)
        return changed

    def _drain(self, policy: int, command: DrainInstance, now_s: float) -> Bools:
        instances = self.layout.instances
        targets, _ = self._checked(policy, command.instances, 0.0, instances.name)
        changed: Bools = self._draining[targets] != command.drain
        self._draining[targets] = command.drain
        for index in np.unique(instances.node[targets]):
            self._refresh_up(self.layout.nodes[index])
        if not command.drain:
            self.dispatcher.release_held(now_s)
        return changed

    def _record_command(
        self,
        now_s: float,
        policy: int,
        ordinal: int,
        command: Command,
        moved: Bools,
        winner: Ints | None = None,
    ) -> None:
        """Write down what became of a command; a ``winner`` of -1 means that nobody claims it."""
        outcome = np.where(moved, "sent", "unchanged")
        names: list[str] | str = ""
        uses = [p.use for p in self.spec.policy]
        if winner is not None:
            winner, outcome = np.atleast_1d(winner), np.atleast_1d(outcome)
            outcome = np.where((winner == policy) | (winner == -1), outcome, "overruled")
            names = [uses[w] if w >= 0 else "" for w in winner]
        self.commands_total += int((outcome == "sent").sum())
        self._records.command(
            now_s,
            self._step,
            policy,
            uses[policy],
            self.spec.policy[policy].precedence,
            ordinal,
            command,
            outcome.tolist(),
            names,
        )

    def _lease(self, node: Node, now_s: float, why: LeaseWhy) -> None:
        node.lease_sequence += 1
        node.lease_why = why
        if why == "joins":
            node.lease_joined = node.lease_sequence
        node.told_s = now_s
        node.lease_seen_s = self._observed_s(now_s)
        self._hub.send(
            node.name,
            Lease(
                epoch=self._epoch,
                sequence=node.lease_sequence,
                expires_s=now_s + self.spec.control.lease_s,
                power_limit_w=self._limit_w[node.gpus].tolist(),
                sm_clock_lock_mhz=self._lock_mhz[node.gpus].tolist(),
                answer=why != "renews" or (node.lease_sequence + node.index) % _ANSWER_EVERY == 0,
            ),
            now_s,
        )

    # Once per sample period.

    def tick(self, now_s: float) -> None:
        """Renew leases, notice silence, move the building on, and write down the draw of rows."""
        self._renew(now_s)
        if self._building is not None:
            self._move_building(self._building, now_s)
        self._record_rows(now_s)
        self.dispatcher.sum_up(now_s)

    def _renew(self, now_s: float) -> None:
        control = self.spec.control
        for count, node in enumerate(self.layout.nodes, 1):
            if count % _SLICE_NODES == 0:
                self._breathe()
            if node.live:
                if now_s - node.last_s > control.node_timeout_s:
                    self._lose(node, now_s, f"silent for {now_s - node.last_s:.1f} s")
                elif now_s >= node.renew_s - 1e-9:
                    node.renew_s = now_s + control.lease_s / 3
                    self._lease(node, now_s, "renews")
            if now_s - node.told_s >= self._beat_period_s - 1e-9:
                node.told_s = now_s
                self._hub.send(node.name, Heartbeat(), now_s)

    def _move_building(self, building: Building, now_s: float) -> None:
        """Let the building answer what nodes draw, and tell them what it does to them."""
        answer, happened = building.advance(now_s)
        for happening in happened:
            self._event(now_s, *happening)
        if answer is None:
            return
        live = [node for node in self.layout.nodes if node.live]
        if self._surround is not None:
            self._surround(np.array([node.index for node in live], np.int64), answer, now_s)
            return
        for node in live:
            self._hub.send(node.name, answer.of(node.index), now_s)

    def _record_rows(self, now_s: float) -> None:
        gpus, rows = self.layout.gpus, self.layout.rows
        count = len(rows.name)
        stale_s = self.spec.control.stale_s
        fresh = now_s - gpus.t_s <= stale_s
        instant_w = np.where(fresh, gpus.power_instant_w, gpus.power_limit_enforced_w)
        self._records.rows(
            now_s,
            np.bincount(gpus.row, gpus.draw_w(now_s, stale_s), count).astype(np.float64),
            np.bincount(gpus.row, instant_w, count).astype(np.float64),
            rows.budget_w,
        )

    # The end.

    @property
    def num_live(self) -> int:
        """Nodes whose reports arrive."""
        return sum(node.live for node in self.layout.nodes)

    def stop(self, now_s: float, reason: str) -> None:
        """Tell all nodes to leave, and write down the requests that were still on their way."""
        self.dispatcher.stop(now_s)
        for node in self.layout.nodes:
            if node.incarnation:
                self._hub.send(node.name, Stop(reason), now_s)

    def _event(self, now_s: float, level: str, source: str, kind: str, text: str) -> None:
        self._records.event(now_s, level, source, kind, text)


def _places(spans: list[slice], total: int) -> Ints:
    """Rows of a column that nodes fill, ``total`` together.

    >>> _places([slice(4, 6), slice(0, 3)], 5).tolist()
    [4, 5, 0, 1, 2]
    """
    starts = np.array([span.start for span in spans], np.int64)
    counts = np.array([span.stop for span in spans], np.int64) - starts
    shifts: Ints = (starts + counts - counts.cumsum()).repeat(counts)
    shifts += np.arange(total)
    return shifts


def _enter(
    columns: GpuColumns | InstanceColumns | TenantColumns, rows: Ints, t_s: float, said: Columns
) -> None:
    """Write readings into their rows of the view."""
    columns.t_s[rows] = t_s
    # Neighbours are copied together: row by row takes five times as long.
    breaks = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
    runs = [(slice(a, b), slice(rows[a], rows[a] + b - a)) for a, b in pairwise(breaks) if a < b]
    neighbours = len(runs) <= 1 + len(rows) // 32
    for name, values in zip(said.names, said.values(), strict=True):
        column = getattr(columns, name)
        if neighbours:
            for source, target in runs:
                column[target] = values[source]
        else:
            column[rows] = values
