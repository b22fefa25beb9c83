"""A run, as a TOML file says it: `RunSpec`, read and checked by `load_spec`.

Every field has a default that makes sense alone, so the smallest file is one table. Unknown keys,
wrong types and values outside their range end in one `SpecError` that names the field.

>>> parse_spec('[cluster]\\nrows = 1\\nnodes_per_row = 1').cluster.gpus_per_node
8
>>> parse_spec('[cluster]\\nbreaker_w = 3')
Traceback (most recent call last):
...
testbed.core.errors.SpecError: run spec: Object contains unknown field `breaker_w` - at `$.cluster`
"""

from __future__ import annotations

import math
import re
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from testbed.core.errors import SpecError
from testbed.core.messages import Delays, EngineConfig
from testbed.core.names import node_name

Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Frac = Annotated[float, Meta(ge=0, le=1)]
Count = Annotated[int, Meta(ge=1)]
Mode = Literal["virtual", "emulated", "hardware"]


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A table of the run file."""


class ClusterSpec(_Table, frozen=True):
    """The machines and the breakers they hang from."""

    rows: Count = 1
    racks_per_row: Count = 1
    nodes_per_row: Count = 1
    gpus_per_node: Annotated[int, Meta(ge=1, le=64)] = 8
    gpu: str = "h100-sxm"
    row_budget_w: NotNegative = 0.0
    """What the GPUs of one row may draw together; 0 sets no budget."""
    inlet_c: Annotated[float, Meta(ge=-20, le=60)] = 24.0
    temp_spread_c: NotNegative = 2.0
    """Standard deviation of the per-GPU temperature offset (assumed: place and paste)."""
    nodes_per_process: Annotated[int, Meta(ge=1, le=1000)] = 1
    """How many nodes of a row an emulated run puts into one process. More than one saves memory and
    keeps nodes punctual that outnumber the cores; they also die together. Real nodes have a process
    each."""
    elastic: bool = False
    """Policies may change which instances a node holds (`SetLayout`): ``view.instances`` then has a
    slot per GPU, and pools say how the run begins. Not on real GPUs."""


class PoolSpec(_Table, frozen=True):
    """Instances of one model, on the same number of GPUs of every node that it is on."""

    name: str = "default"
    model: str = "llama-3.1-8b"
    precision: Literal["bf16", "fp8", "fp4", "int4", "native"] = "native"
    """Of the layers' matrices; ``native`` is what the model's card says."""
    tp: Literal[1, 2, 4, 8] = 1
    gpus_per_node: Count = 8
    nodes: str = "all"
    """Which nodes it is on, counted through the run: ``all``, ``none`` (elastic runs: it gets
    instances from a policy) or ranges such as ``0-5,8``. A node without pools begins empty."""
    priority: int = 1
    engine: EngineConfig = EngineConfig()


class ClassSpec(_Table, frozen=True):
    """A service class: who serves it and what it was promised."""

    name: str = "default"
    pool: str = "default"
    share: Positive = 1.0
    """Weight of the class when the workload assigns classes; see also ``images``."""
    images: Literal["any", "only", "never"] = "any"
    """Which requests may fall into it: those with images, those without, or both."""
    prompt_min_tokens: Annotated[int, Meta(ge=0)] = 0
    prompt_max_tokens: Annotated[int, Meta(ge=0)] = 1 << 31
    """Bounds on the text prompt of its requests, both included."""
    output_min_tokens: Annotated[int, Meta(ge=0)] = 0
    output_max_tokens: Annotated[int, Meta(ge=0)] = 1 << 31
    """Bounds on their output, both included."""
    ttft_s: Positive = 2.0
    tpot_s: Positive = 0.1


class WorkloadSpec(_Table, frozen=True):
    """Where requests come from. Fields that a source does not use must be left at their default."""

    source: Literal[
        "azure_llm", "azure_llm_week", "azure_lmm", "poisson", "bursty", "long_context", "csv"
    ] = "poisson"
    trace: str = ""
    """A trace file, or the name of one we ship."""
    start_s: NotNegative = 0.0
    """Where in the trace to begin."""
    rate_rps: NotNegative = 0.0
    """Mean arrival rate; for a trace, the rate it is thinned or repeated to (0 keeps its own)."""
    time_scale: Positive = 1.0
    """Seconds of a day or week that are played in one second, at their rates."""
    burst_cv: Positive = 3.0
    image_frac: Frac = 0.0
    """Share of requests given images, with sizes from the measured LMM distributions."""
    tenants: Count = 4
    max_prompt_tokens: Count = 128_000
    prompt_tokens: NotNegative = 0.0
    """Mean prompt length for the generators; 0 draws from the measured distribution."""
    output_tokens: NotNegative = 0.0
    """Mean output length for the generators; 0 draws from the measured distribution."""


class PolicySpec(_Table, frozen=True):
    """A policy by name (``row_power_cap``) or file (``my_policy.py:MyCap``), and its parameters."""

    use: str
    params: dict[str, Any] = {}
    precedence: Literal["safety", "slo", "efficiency"] = "efficiency"


class TenantsSpec(_Table, frozen=True):
    """Host-memory tenants on each node; none by default."""

    per_node: Annotated[int, Meta(ge=0, le=64)] = 0
    memory_mib: Positive = 64.0
    guaranteed_frac: Frac = 0.5
    trace: str = "vm_memory"
    """Memory use over days: one we ship, or a CSV file of day, slot (5 minutes) and memory_frac."""
    speedup: Positive = 300.0
    """By how much the trace's time is compressed: 300 plays 5 minutes in a second."""
    swap_mib: NotNegative = 0.0
    """Size of a zram swap device to make if the node has no swap; 0 makes none."""
    preprocess: bool = False
    """Images of the node's requests are prepared inside the tenants: what they wait for memory
    reaches TTFT. Off, since a run with real tenants then no longer repeats a virtual one exactly.
    """


class PlantSpec(_Table, frozen=True):
    """The building around the servers: breakers, UPS, cooling and weather (`emulators.datacenter`).

    Limits are sized for ``1 / (1 + oversubscription_frac)`` of the servers at their highest draw
    and airflow. Where no source is given in `emulators.datacenter`, a default is assumed.
    """

    site: str = "san_jose_ca"
    start_hour: Annotated[float, Meta(ge=0, lt=8760)] = 4884.0
    """Hour of the year at the run's zero; the default is noon of a day in July."""
    speedup: Positive = 1.0
    """By how much weather and load of opaque VMs are compressed; breakers and heat are not."""
    oversubscription_frac: Annotated[float, Meta(ge=0, le=4)] = 0.0
    rows_per_aisle: Count = 2
    """Rows that share their air, and so the air handlers of their aisle."""
    ahus_per_aisle: Count = 10
    num_ups: Annotated[int, Meta(ge=2, le=16)] = 4
    """Each rack hangs from two of them; together they carry what the rows may draw."""
    row_limit_w: NotNegative = 0.0
    """Rating of a row's breaker, whole servers counted; 0 sizes it as above."""
    host_idle_w: NotNegative = 1720.0
    host_load_w: NotNegative = 300.0
    fan_max_w: NotNegative = 1200.0
    airflow_max_m3_s: Positive = 0.5215
    inlet_spread_c: NotNegative = 1.0
    """Standard deviation of servers' inlet offsets, stable in time."""
    gpu_order_c: NotNegative = 10.0
    """How much warmer the last GPU in a server's airflow runs than the first."""
    inlet_lag_s: NotNegative = 120.0
    """Time constant of the air in an aisle."""
    period_s: Annotated[float, Meta(ge=0.1, le=600)] = 1.0


class VmSpec(_Table, frozen=True):
    """Opaque GPU VMs (IaaS): a policy may place them, and may not touch them afterwards.

    They take whole GPUs of those that no pool uses, as many as a node has left.
    """

    count: Annotated[int, Meta(ge=0)] = 0
    """VMs there from the start; arrivals replace those that leave."""
    gpus: Count = 8
    intensity: Annotated[float, Meta(gt=0, le=1)] = 0.85
    """Peak load of a mean customer; customers differ by up to 0.15 either way."""
    short_lived_frac: Frac = 0.4
    """Share of VMs whose lifetime is drawn from the measured fleet's; others stay."""


class FaultSpec(_Table, frozen=True):
    """Something that breaks in mid-run, on emulated nodes or in the emulated plant."""

    at_s: NotNegative
    node: Annotated[int, Meta(ge=0)] = 0
    """Which node, counted through the run."""
    gpu: Annotated[int, Meta(ge=0)] = 0
    kind: Literal["gpu_lost", "ups_lost", "ahu_lost"] = "gpu_lost"
    """``gpu_lost``: the GPU falls off the bus, and every NVML call on it returns error 15.
    ``ups_lost``: UPS ``unit`` fails; ``ahu_lost``: one air handler of aisle ``unit``."""
    unit: Annotated[int, Meta(ge=0)] = 0
    duration_s: NotNegative = 0.0
    """How long a UPS or an air handler is out; 0 for the rest of the run."""


class ReconfigureSpec(_Table, frozen=True):
    """What changes of instances cost, in runs with ``cluster.elastic``."""

    models: list[str] = []
    """Models that policies may place beside those of the pools."""
    scale: Positive = 1.0
    """Multiplies all delays: below 1 where an experiment compresses its control periods alike."""
    empty_power_frac: Frac = 1.0
    """What a GPU without an instance draws, as a share of the profile's idle power. Below 1 stands
    for machines switched off or given back; the profile's idle power is of a GPU with a model
    loaded."""
    delays: Delays = Delays()


class LedgerSpec(_Table, frozen=True):
    """What energy and GPU time are charged at; see `testbed.analysis.ledger`."""

    grid: str = ""
    """Grid whose hourly carbon intensity we ship (BPAT, CISO, ERCO, PJM); empty counts no carbon.
    """
    begins_h: NotNegative = 0.0
    """Hour of that series, and of the day, at the run's zero."""
    price_usd_per_kwh: list[NotNegative] = msgspec.field(default_factory=lambda: [0.08])
    """One for all hours, or 24, one for each hour of the day (UTC). Assumed."""
    price: str = ""
    """Grid whose hourly day-ahead price we ship (CISO, ERCO), in place of ``price_usd_per_kwh``."""
    gpu_usd_per_h: NotNegative = 12.29
    """List price of a virtual machine with eight H100s in 2024, an eighth of it (assumed)."""
    host_w: NotNegative = 0.0
    """What a node in use draws beside its GPUs; 0 counts GPUs alone, or see ``plant_hosts``."""
    plant_hosts: bool | None = None
    """In place of ``host_w``: nodes draw beside their GPUs what a `[plant]` says (the run's own, or
    `PlantSpec`'s defaults), CPUs and fans by the load of their GPUs. So do nodes given back. Not
    given, it is so in runs with a `[plant]` and no ``host_w``."""
    pue: Annotated[float, Meta(ge=1, le=4)] = 1.0


class TransportSpec(_Table, frozen=True):
    """The wire. ``delay_s`` holds in every mode; jitter and loss are injected in virtual time."""

    delay_s: Annotated[float, Meta(ge=0, le=1)] = 0.005
    jitter_s: NotNegative = 0.0
    loss_frac: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    relays: Literal["none", "row"] = "none"
    """``row``: nodes of an emulated run talk through a relay per row. In virtual time nothing has
    to be relayed: messages act at the same times either way."""


class ControlSpec(_Table, frozen=True):
    """Rates and safety margins of the loop."""

    sample_period_s: Annotated[float, Meta(ge=0.01, le=600)] = 0.1
    lease_s: Positive = 3.0
    stale_s: Positive = 2.0
    node_timeout_s: Positive = 5.0
    """A node silent for this long is lost: its requests go elsewhere."""
    ramp_down_w_per_s: Positive = 2000.0
    ramp_up_w_per_s: Positive = 200.0
    max_attempts: Count = 3
    """How often a request is routed before it is recorded as lost."""
    realtime: bool = False
    """The coordinator of a live run and the nodes of an emulated one ask for real-time priority
    (SCHED_FIFO), so that others' load does not make them late. Needs the privilege; without it they
    say so and go on."""
    hold_limit: Count = 10_000
    """Requests held at the front door before further ones are rejected."""


class RecordSpec(_Table, frozen=True):
    """What is kept. Everything, unless a run is so large that a table must be thinned."""

    gpu_period_s: NotNegative = 0.0
    """Least time between two recorded samples of a GPU; 0 keeps every report."""
    instance_period_s: NotNegative = 0.0
    """The same for an instance."""
    itl_period_s: NotNegative = 0.0
    """Counts of gaps between tokens are put together over so much time; 0 keeps each second's."""
    requests_every: Count = 1
    """Keep the rows of every so manieth request. Counts, tokens and SLOs are kept of all."""
    checkpoint_s: NotNegative = 0.0
    """Run time between two checkpoints, from which ``testbed resume`` goes on; 0 keeps none."""
    segments: bool = False
    """Keep the engines' segments: the time of each token of a virtual run can be had from them."""
    views: bool = True
    """Keep the views that policies saw: needed by ``testbed replay``."""


class RunSpec(_Table, frozen=True):
    """One run."""

    name: str = "run"
    mode: Mode = "virtual"
    device: Literal["cuda", "cpu"] = "cuda"
    """What runs the kernels in hardware mode; on ``cpu`` a core with a quota stands for a GPU."""
    forward: str = ""
    """URL of an OpenAI-compatible server that serves in hardware mode, instead of our kernels."""
    seed: Annotated[int, Meta(ge=0, le=2**62)] = 1
    duration_s: Positive = 60.0
    drain_s: NotNegative = 10.0
    """Longest wait for requests still running when arrivals end."""
    cluster: ClusterSpec = ClusterSpec()
    pool: list[PoolSpec] = msgspec.field(default_factory=lambda: [PoolSpec()])
    slo_class: list[ClassSpec] = msgspec.field(default_factory=lambda: [ClassSpec()])
    workload: WorkloadSpec = WorkloadSpec()
    policy: list[PolicySpec] = []
    router: PolicySpec = PolicySpec(use="least_loaded")
    tenants: TenantsSpec = TenantsSpec()
    plant: PlantSpec | None = None
    vms: VmSpec = VmSpec()
    fault: list[FaultSpec] = []
    reconfigure: ReconfigureSpec = ReconfigureSpec()
    ledger: LedgerSpec = LedgerSpec()
    transport: TransportSpec = TransportSpec()
    control: ControlSpec = ControlSpec()
    record: RecordSpec = RecordSpec()

    def node_names(self) -> list[str]:
        """Names of all nodes, rack by rack."""
        cluster = self.cluster
        per_rack = math.ceil(cluster.nodes_per_row / cluster.racks_per_row)
        return [
            node_name(row, index // per_rack, row * cluster.nodes_per_row + index)
            for row in range(cluster.rows)
            for index in range(cluster.nodes_per_row)
        ]

    def model_names(self) -> list[str]:
        """Models that instances may hold: those of the pools, then ``reconfigure.models``."""
        pools = [pool.model for pool in self.pool]
        return list(dict.fromkeys([*pools, *self.reconfigure.models]))

    def pools_on(self, node: int) -> list[int]:
        """Indices of the pools that begin on the node with that index."""
        count = self.cluster.rows * self.cluster.nodes_per_row
        return [k for k, pool in enumerate(self.pool) if node in nodes_of(pool.nodes, count)]


@cache
def nodes_of(text: str, count: int) -> frozenset[int]:
    """Node indices that ``PoolSpec.nodes`` means in a cluster of ``count`` nodes.

    Raises:
        ValueError: not in the form, or out of range.

    >>> sorted(nodes_of("0-2,5", 8)), len(nodes_of("all", 8)), len(nodes_of("none", 8))
    ([0, 1, 2, 5], 8, 0)
    """
    if text in ("all", "none"):
        return frozenset(range(count if text == "all" else 0))
    found: set[int] = set()
    for part in text.split(","):
        ends = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not ends:
            raise ValueError("must be all, none or ranges as in 0-5,8")
        first, last = int(ends[1]), int(ends[2] or ends[1])
        if not first <= last < count:
            raise ValueError(f"must count up and stay below {count}")
        found.update(range(first, last + 1))
    return frozenset(found)


def parse_spec(text: str, overrides: list[str] | tuple[str, ...] = ()) -> RunSpec:
    """The spec in ``text`` (TOML) with ``path=value`` overrides applied, checked as a whole.

    Raises:
        SpecError: names the field, its value and what is allowed.
    """
    try:
        tree = msgspec.toml.decode(text)
    except msgspec.DecodeError as error:
        raise SpecError(f"run spec: not TOML: {error}") from None
    for override in overrides:
        _override(tree, override)
    try:
        spec = msgspec.convert(tree, RunSpec, strict=True)
    except msgspec.ValidationError as error:
        raise SpecError(f"run spec: {error}{_value_at(tree, str(error))}") from None
    _check(spec)
    return spec


def load_spec(path: Path | str, overrides: list[str] | tuple[str, ...] = ()) -> RunSpec:
    """`parse_spec` of a file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"run spec {path}: cannot be read: {error}") from None
    return parse_spec(text, overrides)


def _value_at(tree: Any, message: str) -> str:
    """The value that a validation error is about, which msgspec does not say."""
    found = re.search(r"at `\$(.*)`", message)
    for step in re.findall(r"[^.\[\]]+", found.group(1)) if found else ():
        try:
            tree = tree[int(step)] if isinstance(tree, list) else tree[step]
        except (KeyError, IndexError, ValueError, TypeError):
            return ""
    return "" if isinstance(tree, dict | list) else f", not {tree!r}"


def _override(tree: dict[str, Any], override: str) -> None:
    """Set ``a.b.0.c=value`` in a tree of tables; the value is TOML, or else a plain string."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise SpecError(f"--set {override!r}: expected path=value, as in cluster.rows=2")
    try:
        value = msgspec.toml.decode(f"v = {text}")["v"]
    except msgspec.DecodeError:
        value = text
    *parents, last = path.strip().split(".")
    place: Any = tree
    for key in parents:
        if isinstance(place, list):
            if not key.isdigit() or int(key) >= len(place):
                raise SpecError(f"--set {override!r}: {key!r} is not one of {len(place)} entries")
            place = place[int(key)]
        else:
            place = place.setdefault(key, {})
        if not isinstance(place, dict | list):
            raise SpecError(f"--set {override!r}: {key!r} is a value, not a table")
    if isinstance(place, list):
        if not last.isdigit() or int(last) >= len(place):
            raise SpecError(f"--set {override!r}: {last!r} is not one of {len(place)} entries")
        place[int(last)] = value
    else:
        place[last] = value


def _check(spec: RunSpec) -> None:
    """What no single field can say about itself."""
    cluster = spec.cluster
    for name, value in _floats(spec):
        if not math.isfinite(value):
            raise SpecError(f"run spec: {name} = {value} must be a finite number")
    if cluster.racks_per_row > cluster.nodes_per_row:
        raise SpecError(
            f"run spec: cluster.racks_per_row = {cluster.racks_per_row} is more than "
            f"cluster.nodes_per_row = {cluster.nodes_per_row}"
        )
    pools = [pool.name for pool in spec.pool]
    if len(set(pools)) != len(pools) or not pools:
        raise SpecError(f"run spec: pool names {pools} must be unique and at least one")
    num_nodes = len(spec.node_names())
    for pool in spec.pool:
        try:
            members = nodes_of(pool.nodes, num_nodes)
        except ValueError as error:
            raise SpecError(
                f"run spec: pool {pool.name!r}: nodes = {pool.nodes!r} {error}"
            ) from None
        if not members and not cluster.elastic:
            raise SpecError(
                f"run spec: pool {pool.name!r}: nodes = {pool.nodes!r} needs cluster.elastic = true"
            )
    for node in range(num_nodes):
        taken = sum(spec.pool[k].gpus_per_node for k in spec.pools_on(node))
        if taken > cluster.gpus_per_node:
            whose = (
                "each node" if all(pool.nodes == "all" for pool in spec.pool) else f"node {node}"
            )
            raise SpecError(
                f"run spec: pools take {taken} GPUs of {whose}, "
                f"cluster.gpus_per_node = {cluster.gpus_per_node}"
            )
    _check_elastic(spec)
    for pool in spec.pool:
        if pool.gpus_per_node % pool.tp:
            raise SpecError(
                f"run spec: pool {pool.name!r}: gpus_per_node = {pool.gpus_per_node} "
                f"is not a multiple of tp = {pool.tp}"
            )
        engine = pool.engine
        for field, value, low in (
            ("max_num_seqs", engine.max_num_seqs, 1),
            ("max_batched_tokens", engine.max_batched_tokens, engine.max_num_seqs + 1),
            ("block_size_tokens", engine.block_size_tokens, 1),
            ("kv_blocks", engine.kv_blocks, 0),
            ("preprocess_workers", engine.preprocess_workers, 1),
            ("ballast_bytes", engine.ballast_bytes, 0),
        ):
            if value < low:
                raise SpecError(
                    f"run spec: pool {pool.name!r}: engine.{field} = {value} must be >= {low}"
                )
        if not 0 < engine.gpu_memory_frac <= 1:
            raise SpecError(
                f"run spec: pool {pool.name!r}: engine.gpu_memory_frac = "
                f"{engine.gpu_memory_frac} must be in (0, 1]"
            )
    classes = [slo_class.name for slo_class in spec.slo_class]
    if len(set(classes)) != len(classes) or not classes:
        raise SpecError(f"run spec: slo_class names {classes} must be unique and at least one")
    for slo_class in spec.slo_class:
        if slo_class.pool not in pools:
            raise SpecError(
                f"run spec: slo_class {slo_class.name!r}: pool = {slo_class.pool!r} "
                f"is none of {pools}"
            )
    for fault in spec.fault:
        for field, value, count in (
            ("node", fault.node, num_nodes),
            ("gpu", fault.gpu, cluster.gpus_per_node),
        ):
            if value >= count:
                raise SpecError(f"run spec: fault.{field} = {value} must be below {count}")
    _check_plant(spec)
    if spec.transport.relays != "none" and spec.mode == "hardware":
        raise SpecError(
            'run spec: transport.relays: start relays by hand (testbed relay) in mode "hardware"'
        )
    if any(fault.kind == "gpu_lost" for fault in spec.fault) and spec.mode == "hardware":
        raise SpecError("run spec: fault: only emulated GPUs can be told to fail")
    if len(spec.ledger.price_usd_per_kwh) not in (1, 24):
        raise SpecError(
            f"run spec: ledger.price_usd_per_kwh has {len(spec.ledger.price_usd_per_kwh)} values, "
            "must have 1 or 24"
        )
    if spec.ledger.price and spec.ledger.price_usd_per_kwh != LedgerSpec().price_usd_per_kwh:
        raise SpecError(
            f"run spec: ledger.price = {spec.ledger.price!r} and ledger.price_usd_per_kwh = "
            f"{spec.ledger.price_usd_per_kwh}: give one of them"
        )
    if spec.ledger.host_w and spec.ledger.plant_hosts:
        raise SpecError(
            f"run spec: ledger.host_w = {spec.ledger.host_w:g} and ledger.plant_hosts = true: give "
            "one of them"
        )
    for field in ("segments", "checkpoint_s"):
        if getattr(spec.record, field) and spec.mode != "virtual":
            raise SpecError(f"run spec: record.{field}: only for virtual runs, not {spec.mode}")
    if spec.record.segments and spec.cluster.elastic:
        raise SpecError("run spec: record.segments: not with cluster.elastic")
    if spec.control.lease_s < 3 * spec.control.sample_period_s:
        raise SpecError(
            f"run spec: control.lease_s = {spec.control.lease_s} must be at least three times "
            f"control.sample_period_s = {spec.control.sample_period_s}"
        )


def _check_plant(spec: RunSpec) -> None:
    cluster, plant = spec.cluster, spec.plant
    if plant is None:
        for what, there in (
            ("fault", any(fault.kind != "gpu_lost" for fault in spec.fault)),
            ("vms.count", spec.vms.count > 0),
        ):
            if there:
                raise SpecError(f"run spec: {what} needs a plant: add a table [plant]")
        return
    if cluster.row_budget_w:
        raise SpecError(
            f"run spec: cluster.row_budget_w = {cluster.row_budget_w:g} and a [plant]: the plant "
            "sets the budgets; use plant.row_limit_w"
        )
    aisles = math.ceil(cluster.rows / plant.rows_per_aisle)
    for fault in spec.fault:
        count = {"ups_lost": plant.num_ups, "ahu_lost": aisles}.get(fault.kind, math.inf)
        if fault.unit >= count:
            raise SpecError(
                f"run spec: fault.unit = {fault.unit} must be below {count} for {fault.kind}"
            )
    spare = [
        cluster.gpus_per_node - sum(spec.pool[k].gpus_per_node for k in spec.pools_on(node))
        for node in range(cluster.rows * cluster.nodes_per_row)
    ]
    room = sum(gpus // spec.vms.gpus for gpus in spare)
    if spec.vms.count > room:
        raise SpecError(
            f"run spec: vms.count = {spec.vms.count} VMs of {spec.vms.gpus} GPUs; "
            f"there is room for {room} on the GPUs that pools leave"
        )


def _check_elastic(spec: RunSpec) -> None:
    """What only runs that change their instances may say."""
    if not spec.cluster.elastic:
        if spec.reconfigure != ReconfigureSpec():
            raise SpecError("run spec: reconfigure: needs cluster.elastic = true")
        return
    if spec.mode == "hardware":
        raise SpecError(
            "run spec: cluster.elastic = true: only emulated nodes can change their instances; "
            "in hardware mode the pools stay as they are"
        )
    for name in Delays.__struct_fields__:
        value = getattr(spec.reconfigure.delays, name)
        low = 1.0 if name in ("storage_bytes_per_s", "pcie_bytes_per_s") else 0.0
        if not low <= value < math.inf:
            raise SpecError(f"run spec: reconfigure.delays.{name} = {value} must be >= {low:g}")


def _floats(table: msgspec.Struct, path: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name in table.__struct_fields__:
        value = getattr(table, name)
        if isinstance(value, float):
            found.append((f"{path}{name}", value))
        elif isinstance(value, msgspec.Struct):
            found.extend(_floats(value, f"{path}{name}."))
        elif isinstance(value, list):
            for index, entry in enumerate(value):
                if isinstance(entry, msgspec.Struct):
                    found.extend(_floats(entry, f"{path}{name}.{index}."))
                elif isinstance(entry, float):
                    found.append((f"{path}{name}.{index}", entry))
    return found
