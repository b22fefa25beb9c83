"""The cluster as the run file lays it out: which GPU hangs where and serves what.

Built once from the spec, before any node is heard from; nodes then fill the columns in. In an
elastic run there is an instance slot per GPU and `Layout.hold` writes what a slot holds.

>>> from testbed.core.spec import parse_spec
>>> layout = Layout(parse_spec("cluster.nodes_per_row = 2\\ncluster.gpus_per_node = 2\\n"
...                            "[[pool]]\\ngpus_per_node = 2\\ntp = 2"))
>>> [node.name for node in layout.nodes], layout.view.gpus.instance.tolist()
(['row0/rack0/node000', 'row0/rack0/node001'], [0, 0, 1, 1])
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

import numpy as np

from emulators.datacenter import gpu_budget_w
from emulators.models import load_model, precision_of, quality_frac
from emulators.profiles import load_gpu
from testbed.core.errors import SpecError
from testbed.core.messages import (
    GpuInfo,
    GpuReadings,
    InstanceConfig,
    InstanceReadings,
    NodeConfig,
    SlotReadings,
    StartHow,
    TenantInfo,
    TenantReadings,
)
from testbed.core.names import gpu_name, instance_name, row_of, slot_name
from testbed.core.spec import RunSpec
from testbed.core.view import (
    OFF,
    PRECISIONS,
    UP,
    RowColumns,
    View,
    empty_gpus,
    empty_instances,
    empty_tenants,
    slots_to_gpus,
)

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

SAFE_SHARE = 0.95
"""Share of a budget that limits may add up to: boards overshoot theirs by a few percent."""

LeaseWhy = Literal["joins", "changes", "renews"]
"""Why a lease is sent: its node joins, a policy changed a limit, or the one before is renewed."""

_Columns = TypeVar("_Columns", bound="DataclassInstance")


@dataclass(slots=True)
class Node:
    """What the coordinator knows of one node."""

    WIRED: ClassVar = (
        "name", "index", "row", "gpus", "instances", "tenants", "infos", "tenant_infos", "counts",
        "report_bytes",
    )  # fmt: skip
    name: str
    index: int
    row: int
    gpus: slice
    instances: slice
    tenants: slice
    configs: list[InstanceConfig]
    """What it is to hold. In an elastic run `testbed.coordinator.arranging` changes it."""
    layout_sequence: int = 0
    """Of the last change to that."""
    layout_how: StartHow = "snapshot"
    """How what that change brought is to start."""
    layout_seen: SlotReadings | None = None
    """What it said of its slots last."""
    incarnation: int = 0
    """Of the life that was welcomed last; 0 before the first."""
    live: bool = False
    """Its reports arrive."""
    last_s: float = -np.inf
    """When it was last heard from, on the coordinator's clock."""
    lease_sequence: int = 0
    renew_s: float = np.inf
    """When its lease is to be renewed."""
    told_s: float = 0.0
    """When it was last sent a lease or a heartbeat."""
    lease_seen_s: float = np.nan
    """When the last lease really left, by the clock that a client would read."""
    lease_why: LeaseWhy = "joins"
    """Why it was sent."""
    lease_joined: int = 0
    """The lease with which its present life began."""
    refused: str = ""
    unfit: bool = False
    """It has sent a report that is not laid out like its row of the run file."""
    drift_total: int = 0
    infos: list[GpuInfo] = field(default_factory=list)
    tenant_infos: list[TenantInfo] = field(default_factory=list)
    counts: list[int] = field(init=False)
    """Its GPUs, instances and tenants."""
    report_bytes: tuple[int, int, int] = field(init=False)
    """What its report has of each."""

    def __post_init__(self) -> None:
        places = (self.gpus, self.instances, self.tenants)
        self.counts = gpus, instances, tenants = [place.stop - place.start for place in places]
        self.report_bytes = (
            gpus * GpuReadings.size_bytes,
            instances * InstanceReadings.size_bytes,
            tenants * TenantReadings.size_bytes,
        )


class Layout:
    """Columns for everything in the spec, writable here and read-only in ``view``."""

    def __init__(self, spec: RunSpec) -> None:
        cluster = spec.cluster
        self.spec = spec
        pools = [pool.name for pool in spec.pool]
        gpu_names: list[str] = []
        instance_names: list[str] = []
        tenant_names: list[str] = []
        gpu_node: list[int] = []
        gpu_instance: list[int] = []
        gpu_priority: list[int] = []
        instance_pool: list[int] = []
        instance_node: list[int] = []
        initial: list[tuple[int, InstanceConfig]] = []
        self.nodes: list[Node] = []
        for index, name in enumerate(spec.node_names()):
            first_gpu, first_instance = len(gpu_names), len(instance_names)
            configs: list[InstanceConfig] = []
            local = 0
            for pool_index in spec.pools_on(index):
                pool = spec.pool[pool_index]
                for number in range(pool.gpus_per_node // pool.tp):
                    members = list(range(local, local + pool.tp))
                    instance = instance_name(name, pool.name, number)
                    if cluster.elastic:
                        instance = slot_name(name, local)
                    local += pool.tp
                    gpu_instance += [len(instance_names)] * pool.tp
                    gpu_priority += [pool.priority] * pool.tp
                    config = InstanceConfig(
                        name=instance,
                        pool=pool.name,
                        model=pool.model,
                        tp=pool.tp,
                        gpus=members,
                        engine=pool.engine,
                        precision=precision_of(load_model(pool.model), pool.precision),
                        serial=len(configs) + 1 if cluster.elastic else 0,
                    )
                    configs.append(config)
                    if cluster.elastic:
                        initial.append((first_gpu + members[0], config))
                        continue
                    initial.append((len(instance_names), config))
                    instance_names.append(instance)
                    instance_pool.append(pool_index)
                    instance_node.append(index)
            if cluster.elastic:
                slots = range(cluster.gpus_per_node)
                instance_names += [slot_name(name, slot) for slot in slots]
                instance_pool += [-1 for _ in slots]
                instance_node += [index for _ in slots]
            spare = cluster.gpus_per_node - local
            gpu_instance += [-1] * spare
            gpu_priority += [min(pool.priority for pool in spec.pool)] * spare
            gpu_names += [gpu_name(name, place) for place in range(cluster.gpus_per_node)]
            gpu_node += [index] * cluster.gpus_per_node
            first_tenant = len(tenant_names)
            tenant_names += [f"{name}/tenant{k}" for k in range(spec.tenants.per_node)]
            self.nodes.append(
                Node(
                    name=name,
                    index=index,
                    row=index // cluster.nodes_per_row,
                    gpus=slice(first_gpu, len(gpu_names)),
                    instances=slice(first_instance, len(instance_names)),
                    tenants=slice(first_tenant, len(tenant_names)),
                    configs=configs,
                )
            )
        self.by_name = {node.name: node for node in self.nodes}
        self.gpus = empty_gpus(tuple(gpu_names))
        self.gpus.node[:] = gpu_node
        self.gpus.row[:] = self.gpus.node // cluster.nodes_per_row
        self.gpus.instance[:] = gpu_instance
        self.gpus.priority[:] = gpu_priority
        self.gpus.lost[:] = True
        self.instances = empty_instances(tuple(instance_names))
        self.instances.node[:] = instance_node
        self.instances.pool[:] = instance_pool
        self.instances.model[:] = self.instances.precision[:] = -1
        self._pools = {pool.name: index for index, pool in enumerate(spec.pool)}
        self._models = {model: index for index, model in enumerate(spec.model_names())}
        self._spare_priority = min(pool.priority for pool in spec.pool)
        self._pool_priority = np.array([pool.priority for pool in spec.pool])
        for place, config in initial:
            self.hold(place, config, UP, 0.0)
        if cluster.elastic:
            self.spread(slice(0, len(gpu_names)))
        self.tenants = empty_tenants(tuple(tenant_names))
        self.tenants.node[:] = [self.by_name[t.rpartition("/")[0]].index for t in tenant_names]
        sold_bytes = float(int(spec.tenants.memory_mib * 2**20))
        self.tenants.memory_bytes[:] = sold_bytes
        self.tenants.guaranteed_bytes[:] = sold_bytes * spec.tenants.guaranteed_frac // 1
        row_names = tuple(dict.fromkeys(row_of(node.name) for node in self.nodes))
        budget_w = self._row_budget_w() or np.inf
        self.rows = RowColumns(row_names, np.full(len(row_names), budget_w))
        self.gpus_per_row = cluster.nodes_per_row * cluster.gpus_per_node
        cards = [load_model(model) for model in spec.model_names()]
        self.view = View(
            now_s=0.0,
            rows=read_only(self.rows),
            gpus=read_only(self.gpus),
            instances=read_only(self.instances),
            tenants=read_only(self.tenants),
            pools=tuple(pools),
            pool_priority=self._pool_priority,
            pool_of_class={c.name: self._pools[c.pool] for c in spec.slo_class},
            models=tuple(spec.model_names()),
            model_quality_frac=np.array(
                [[quality_frac(card, precision) for precision in PRECISIONS] for card in cards]
            ),
        )

    def hold(self, place: int, config: InstanceConfig | None, state: int, ready_s: float) -> None:
        """Write what the instance (or slot) at ``place`` is; None for an empty slot."""
        instances = self.instances
        if config is None:
            instances.pool[place] = instances.model[place] = instances.precision[place] = -1
            instances.num_gpus[place] = instances.max_num_seqs[place] = 0
            instances.state[place], instances.ready_s[place] = OFF, 0.0
            return
        instances.pool[place] = self._pools[config.pool]
        instances.model[place] = self._models[config.model]
        instances.precision[place] = PRECISIONS.index(config.precision)
        instances.num_gpus[place] = config.tp
        instances.state[place], instances.ready_s[place] = state, ready_s
        instances.max_num_seqs[place] = config.engine.max_num_seqs

    def spread(self, slots: slice) -> None:
        """Write which slot each of these GPUs belongs to."""
        instances, gpus = self.instances, self.gpus
        local, gpus.priority[slots] = slots_to_gpus(
            instances.num_gpus[slots],
            instances.pool[slots],
            self._pool_priority,
            self._spare_priority,
        )
        gpus.instance[slots] = np.where(local >= 0, local + slots.start, -1)

    def broken(self, node: Node, instance: int) -> bool:
        """Whether a GPU of an instance is lost."""
        mine = self.gpus.instance[node.gpus] == instance
        return bool(self.gpus.lost[node.gpus][mine].any())

    def _row_budget_w(self) -> float:
        """What the GPUs of a row may always draw: given, or left by the plant's breakers."""
        if self.spec.plant is None:
            return self.spec.cluster.row_budget_w
        return max(1.0, gpu_budget_w(self.spec, load_gpu(self.spec.cluster.gpu)))

    def safe_limit_w(self, infos: list[GpuInfo]) -> list[float]:
        """The cap that each GPU of a node falls back to when it is cut off.

        An equal share of the row's budget, less what boards overshoot their limits by, so that a
        row whose every node is cut off stays under it; without a budget, the GPU's default.

        Raises:
            SpecError: a share is below what the GPU can be set to.
        """
        budget_w = self._row_budget_w()
        if not budget_w:
            return [info.power_limit_default_w for info in infos]
        share_w = float(SAFE_SHARE * budget_w // self.gpus_per_row)
        field = "cluster.row_budget_w" if self.spec.plant is None else "plant: GPUs' part of a row"
        for info in infos:
            if share_w < info.power_limit_min_w:
                raise SpecError(
                    f"run spec: {field} = {budget_w:g} W leaves {share_w:g} W for "
                    f"each of {self.gpus_per_row} GPUs; {info.model} cannot be set below "
                    f"{info.power_limit_min_w:g} W, so the budget must be at least "
                    f"{math.ceil(info.power_limit_min_w * self.gpus_per_row / SAFE_SHARE)} W"
                )
        return [min(share_w, info.power_limit_max_w) for info in infos]

    def node_config(self, node: Node, infos: list[GpuInfo]) -> NodeConfig:
        """What a node is told when it joins."""
        control = self.spec.control
        return NodeConfig(
            name=node.name,
            instances=node.configs,
            safe_power_limit_w=self.safe_limit_w(infos),
            sample_period_s=control.sample_period_s,
            lease_s=control.lease_s,
            ramp_down_w_per_s=control.ramp_down_w_per_s,
            ramp_up_w_per_s=control.ramp_up_w_per_s,
            delay_s=self.spec.transport.delay_s,
            preprocess_in_tenants=self.spec.tenants.preprocess,
            gaps_period_s=max(1.0, self.spec.record.itl_period_s),
            elastic=self.spec.cluster.elastic,
            delays=self.spec.reconfigure.delays,
            delay_frac=self.spec.reconfigure.scale,
            empty_power_frac=self.spec.reconfigure.empty_power_frac,
            layout_sequence=node.layout_sequence,
        )


def read_only(columns: _Columns) -> _Columns:
    """The same memory, which a policy cannot write to by mistake."""
    shared = {}
    for column in fields(columns):
        value = getattr(columns, column.name)
        if isinstance(value, np.ndarray):
            value = value.view()
            value.flags.writeable = False
        shared[column.name] = value
    return type(columns)(**shared)
