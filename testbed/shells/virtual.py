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
)
from testbed.core.messages import Bye, Envelope
from testbed.core.transport.memory import Network
from testbed.shells.plant import emulated_bank, gpu_faults, tenant_plan
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


def run_virtual(parts: Parts) -> None:
    """Everything in this process, on a clock that jumps."""
    spec = parts.spec
    loop = VirtualScheduler()
    transport = spec.transport
    network = Network(
        seed=spec.seed,
        delay_s=transport.delay_s,
        jitter_s=transport.jitter_s,
        loss_frac=transport.loss_frac,
    )
    desk = Desk(parts, loop)
    hub = network.hub(desk.deliver)
    desk.coordinator = Coordinator(
        spec, hub, parts.records, parts.controllers, parts.router, run_id=parts.folder.name
    )
    names = spec.node_names()
    count = spec.cluster.gpus_per_node
    state = GpuState.create(len(names) * count)
    places = list(range(len(names)))
    servers = ServerBank(
        emulated_bank(spec, parts.profile, state, places),
        num_nodes=len(names),
        faults=gpu_faults(spec, places),
    )
    nodes: list[NodeSchedule] = []
    for index, name in enumerate(names):
        plan = tenant_plan(spec.tenants, index)
        nodes.append(_virtual_node(name, index, servers, network, loop, plan))
    # Nodes join before time zero, as they do in a live run.
    loop.now_s = -1.0
    for node in nodes:
        node.daemon.hello(loop.now_s)
    period_s = spec.control.sample_period_s
    ticks = 0

    def tick(now_s: float) -> None:
        nonlocal ticks
        servers.tick(now_s)
        for node in nodes:
            loop.call_at(now_s, SAMPLE, node.sample, node.daemon.name)
        ticks += 1
        loop.call_at(ticks * period_s, PHYSICS, tick)

    loop.call_at(0.0, PHYSICS, tick)
    desk.begin()
    loop.run(until_s=math.inf)
    end_s = loop.now_s
    # Jitter is exponential: thirty times its mean is beyond any that will be drawn.
    wire_s = transport.delay_s + 30.0 * transport.jitter_s + 1e-6
    desk.coordinator.stop(end_s, "the run is over")
    loop.run(until_s=end_s + wire_s)
    for node in nodes:
        node.daemon.close(loop.now_s, Bye("the run is over", 0.0, 0.0, 0.0, 0, 0))
    loop.run(until_s=end_s + 2 * wire_s)


def _virtual_node(
    name: str,
    index: int,
    servers: ServerBank,
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
        CapGuard(gpus, NoJournal()),
        serving,
        spoke.send,
        tenants=tenants,
        surround=partial(servers.surround, index),
    )
    shell = NodeSchedule(daemon, loop)
    return shell
