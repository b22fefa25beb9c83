"""A whole run in this process, on a clock that jumps."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

from daemons.node import NodeDaemon
from daemons.safety import CapGuard, Journal
from daemons.tenants import TenantPlan
from emulators.memory import ModelledTenants
from emulators.server import ServerBank
from emulators.state import GpuState
from testbed.coordinator.loop import Coordinator
from testbed.core.clock import (
    PHYSICS,
    SAMPLE,
    VirtualScheduler,
    rare_collections,
)
from testbed.core.freeze import thaw
from testbed.core.messages import Bye, Envelope
from testbed.core.transport.memory import Network
from testbed.shells.checkpoint import Checkpoints, Stage
from testbed.shells.checkpoint import check as check_checkpoints
from testbed.shells.lean import LEAN_DELAY_S, BankReports
from testbed.shells.plant import emulated_bank, gpu_faults, tenant_plan
from testbed.shells.request_path import RequestPath
from testbed.shells.schedule import Desk, NodeSchedule, Parts


class NoJournal(Journal):
    """In virtual time nothing can be left behind."""

    def __init__(self) -> None:
        super().__init__(Path())

    def read(self) -> None:
        """Nothing was left."""

    def write(self, found: dict[str, Any]) -> None:
        """Nothing to keep."""

    def remove(self) -> None:
        """Nothing to remove."""


def run_virtual(parts: Parts, *, by_message: bool = False) -> None:
    """Everything in this process, on a clock that jumps.

    Args:
        parts: the run.
        by_message: send everything as messages, also where `testbed.shells.lean` could do without.
    """
    spec = parts.spec
    loop = VirtualScheduler()
    transport = spec.transport
    network = Network(
        seed=spec.seed,
        delay_s=transport.delay_s,
        jitter_s=transport.jitter_s,
        loss_frac=transport.loss_frac,
    )
    names = spec.node_names()
    count = spec.cluster.gpus_per_node
    state = GpuState.create(len(names) * count)
    places = list(range(len(names)))
    servers = ServerBank(
        emulated_bank(spec, parts.profile, state, places),
        num_nodes=len(names),
        faults=gpu_faults(spec, places),
        keep_segments=spec.record.segments,
    )
    path: RequestPath | None = None
    odd = transport.jitter_s or transport.delay_s > LEAN_DELAY_S or spec.cluster.elastic
    if not (by_message or odd):
        path = RequestPath(loop, servers, transport.delay_s, parts.requests)
    desk = Desk(parts, loop)
    desk.coordinator = Coordinator(
        spec,
        network.hub(desk.deliver),
        parts.records,
        parts.controllers,
        parts.router,
        run_id=parts.folder.name,
        beat_period_s=math.inf,
        submit=path.submit if path else None,
        surround=path.surround if path else None,
    )
    nodes: list[NodeSchedule] = []
    guards: list[CapGuard] = []
    for index, name in enumerate(names):
        plan = tenant_plan(spec.tenants, index)
        guards.append(CapGuard(servers.gpus[index], NoJournal()))
        nodes.append(_virtual_node(name, index, servers, guards[-1], network, loop, plan))
    bank: BankReports | None = None
    if path is not None:
        path.coordinator = desk.coordinator
        if not (transport.loss_frac or spec.tenants.per_node):
            daemons = [node.daemon for node in nodes]
            bank = BankReports(loop, servers, daemons, guards, transport.delay_s, path.tell)
            bank.coordinator = desk.coordinator
    stage = Stage(
        spec=spec,
        records=parts.records,
        loop=loop,
        servers=servers,
        nodes=nodes,
        guards=guards,
        desk=desk,
        controllers=parts.controllers,
        router=parts.router,
        path=path,
        reports=bank,
    )
    if spec.record.checkpoint_s:
        check_checkpoints(spec)
    # Nodes join before time zero, as they do in a live run.
    loop.now_s = -1.0
    for node in nodes:
        node.daemon.hello(loop.now_s)
    loop.run(until_s=-1e-9)
    period_s = spec.control.sample_period_s
    ticks = 0

    def tick(now_s: float) -> None:
        nonlocal ticks
        servers.tick(now_s)
        if spec.record.segments:
            parts.records.segments(servers.drain_segments())
        if bank is not None:
            loop.call_at(now_s, SAMPLE, bank.sample)
        else:
            if path is not None:
                for index, events in servers.events():
                    path.tell(index, events, now_s)
            for node in nodes:
                loop.call_at(now_s, SAMPLE, node.sample, node.daemon.name)
        ticks += 1
        loop.call_at(ticks * period_s, PHYSICS, tick)

    if spec.record.checkpoint_s:
        checkpoints = Checkpoints(stage, lambda: (ticks, desk.ticks))
        desk.on_tick = checkpoints.after_tick
        if parts.checkpoint is not None:
            kept = thaw(parts.checkpoint)
            checkpoints.go_on(kept)
            ticks, desk.ticks = kept["ticks"]
            desk.from_s = kept["now_s"]
    run = path.run if path is not None else loop.run
    loop.call_at(ticks * period_s, PHYSICS, tick)
    desk.begin(arrivals=path is None and parts.checkpoint is None)
    with rare_collections():
        run(math.inf)
    end_s = loop.now_s
    # Jitter is exponential: thirty times its mean is beyond any that will be drawn.
    wire_s = transport.delay_s + 30.0 * transport.jitter_s + 1e-6
    desk.coordinator.stop(end_s, "the run is over")
    run(end_s + wire_s)
    for node in nodes:
        node.daemon.close(loop.now_s, Bye("the run is over", 0.0, 0.0, 0.0, 0, 0))
    run(end_s + 2 * wire_s)
    if spec.record.segments:
        parts.records.segments(servers.drain_segments())


def _virtual_node(
    name: str,
    index: int,
    servers: ServerBank,
    guard: CapGuard,
    network: Network,
    loop: VirtualScheduler,
    plan: TenantPlan | None,
) -> NodeSchedule:
    gpus, serving = servers.gpus[index], servers.serving[index]

    def deliver(envelope: Envelope, due_s: float) -> None:
        shell.deliver(envelope, due_s)

    spoke = network.spoke(name, 1, deliver)
    tenants = ModelledTenants(plan) if plan is not None else None
    daemon = NodeDaemon(
        name,
        gpus,
        guard,
        serving,
        spoke.send,
        tenants=tenants,
        surround=partial(servers.surround, index),
    )
    shell = NodeSchedule(daemon, loop)
    return shell
