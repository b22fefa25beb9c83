"""The emulated plant: GPUs and memory tenants of nodes, as a run file describes them."""

from __future__ import annotations

import math

import numpy as np

from daemons.tenants import TenantPlan, load_memory_trace
from emulators.datacenter import gpu_order_c
from emulators.gpu import GpuBank
from emulators.profiles import GpuProfile
from emulators.state import GpuState
from testbed.core.spec import RunSpec, TenantsSpec

_PAGE = 4096


def emulated_bank(spec: RunSpec, profile: GpuProfile, state: GpuState, nodes: list[int]) -> GpuBank:
    """GPUs of the given nodes; a GPU's temperature offset depends on its place alone."""
    cluster = spec.cluster
    offsets_c = np.concatenate(
        [
            np.random.default_rng([spec.seed, 17, node]).normal(
                0.0, cluster.temp_spread_c, cluster.gpus_per_node
            )
            for node in nodes
        ]
    )
    offsets_c += np.tile(gpu_order_c(spec.plant, cluster.gpus_per_node), len(nodes))
    return GpuBank(profile, state, inlet_c=cluster.inlet_c, offset_c=offsets_c)


def gpu_faults(spec: RunSpec, nodes: list[int]) -> list[tuple[float, int]]:
    """When which GPU of a bank of these nodes is lost."""
    count = spec.cluster.gpus_per_node
    return [
        (fault.at_s, nodes.index(fault.node) * count + fault.gpu)
        for fault in spec.fault
        if fault.kind == "gpu_lost" and fault.node in nodes
    ]


def tenant_plan(tenants: TenantsSpec, place: int) -> TenantPlan | None:
    """The memory tenants of the node at ``place``, or None if it has none.

    Raises:
        TraceError: the memory trace cannot be read.
    """
    if not tenants.per_node:
        return None
    memory_bytes = int(tenants.memory_mib * 2**20)
    return TenantPlan(
        count=tenants.per_node,
        memory_bytes=memory_bytes,
        # Whole pages: the kernel rounds limits down to them.
        guaranteed_bytes=math.ceil(memory_bytes * tenants.guaranteed_frac / _PAGE) * _PAGE,
        trace=load_memory_trace(tenants.trace),
        speedup=tenants.speedup,
        first_day=place * tenants.per_node,
    )
