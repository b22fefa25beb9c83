"""Every message on the wire, defined once and checked on arrival.

A message travels inside an `Envelope`, as MessagePack, typed by msgspec: a wrong type, a missing
field or an unknown kind is refused by `decode` before any code of ours sees it. Columns have one
entry per GPU (or instance, tenant, request) in the order that `Hello` or `Welcome` gave; readings
travel packed (`testbed.core.columns`), as they are most of the traffic.

Times are seconds on the run's clock, zero at its start. A message says when it was true or decided
(`Envelope.t_s`); the receiver lets it act `delay_s` later, the same in virtual and in real time,
so that the order of events does not hang on how fast a socket was (docs/decisions/0002).

>>> sent = Envelope("row0/rack0/node000", 1, 7, 2.5, Ping(sent_ns=5))
>>> decode(encode(sent)) == sent
True
>>> decode(encode(sent)[:-1])
Traceback (most recent call last):
...
testbed.core.errors.TransportError: bad message of 87 bytes: Input data was truncated
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import compress
from typing import Literal

import msgspec
import numpy as np

from testbed.core.columns import F8, I8, Columns, Flags
from testbed.core.errors import TransportError

StartHow = Literal["snapshot", "cold"]
ReturnedWhy = Literal["recalled", "drained", "resharded", "gone", "squashed"]
TuneKind = Literal["batch", "order", "recall", "squash"]

PROTOCOL_VERSION = 3
MAX_MESSAGE_BYTES = 16 << 20
"""Longest message a socket accepts. A report of 10,000 GPUs is about 0.9 MB."""


class Frozen(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """What every part of a message shares: immutable, and strict about unknown fields.

    The collector does not follow them: what cannot be changed is in no cycle, and there are many.
    """


class GpuInfo(Frozen, frozen=True):
    """What does not change about a GPU while a daemon runs."""

    uuid: str
    model: str
    memory_total_bytes: int
    power_limit_min_w: float
    power_limit_max_w: float
    power_limit_default_w: float
    sm_clock_min_mhz: float
    sm_clock_max_mhz: float


class TenantInfo(Frozen, frozen=True):
    """A tenant of host memory on a node: a guaranteed part and an oversubscribed part."""

    name: str
    guaranteed_bytes: int
    memory_bytes: int
    backing: str
    """What holds it: ``real`` cgroups, or a model and why."""


class EngineConfig(Frozen, frozen=True):
    """How an instance batches; the defaults are vLLM v1's on a large GPU."""

    max_num_seqs: int = 256
    max_batched_tokens: int = 8192
    block_size_tokens: int = 16
    gpu_memory_frac: float = 0.9
    kv_blocks: int = 0
    """KV blocks of the instance; 0 computes them from the memory left beside the weights."""
    preprocess_workers: int = 4
    """CPU cores for image preprocessing that this instance may use."""
    ballast_bytes: int = 0
    """Memory of each GPU that something else holds: less is left for KV blocks. Where kernels are
    real, the worker allocates it on the device and keeps it."""
    collapse: bool = True
    """Sum runs of alike iterations in closed form. Off steps one by one: same results, slower."""


class InstanceConfig(Frozen, frozen=True):
    """One copy of a model on ``tp`` GPUs of a node."""

    name: str
    pool: str
    model: str
    tp: int
    gpus: list[int]
    engine: EngineConfig
    precision: str = "native"
    """Of the layers' matrices; ``native`` is the card's own."""
    serial: int = 0
    """Where nodes are elastic: tells this instance from all others that its node ever held."""


class Delays(Frozen, frozen=True):
    """What it takes to bring an instance up or to re-shape it; models in emulators/reconfigure.py.

    Seconds and rates are published ones, see there for the sources; the run file may change them.
    """

    vm_s: float = 90.0
    """Boot of a virtual machine: cold, on a node that held nothing (1 to 2 minutes, uncertain)."""
    gpu_init_s: float = 120.0
    """Driver and multi-GPU initialisation after that boot (2 minutes, uncertain)."""
    storage_bytes_per_s: float = 0.77e9
    """From cluster storage: the 138 GB of Llama2-70B take 3 minutes (uncertain)."""
    engine_s: float = 18.0
    """Start of the engine, cold (uncertain)."""
    load_s: float = 15.0
    """Weights and KV cache onto the GPUs, cold (uncertain)."""
    pcie_bytes_per_s: float = 50e9
    """From host memory to one GPU: PCIe 5.0 x16 gives 63e9 less protocol (assumed)."""
    warm_s: float = 3.0
    """Engine restored from a snapshot: process, CUDA context, graphs (assumed)."""
    nvlink_bytes_per_s: float = 0.0
    """Between GPUs of a node, one way; 0 takes the GPU profile's."""
    sync_s: float = 0.05
    """Fixed part of a re-shard (published totals for Llama2-70B are 50 to 100 ms, secondary)."""
    drain_s: float = 30.0
    """Longest that an instance on its way out goes on serving what it has (assumed)."""


class NodeConfig(Frozen, frozen=True):
    """What the coordinator asks of a node when it joins."""

    name: str
    instances: list[InstanceConfig]
    safe_power_limit_w: list[float]
    sample_period_s: float
    lease_s: float
    ramp_down_w_per_s: float
    ramp_up_w_per_s: float
    delay_s: float
    preprocess_in_tenants: bool = False
    gaps_period_s: float = 1.0
    elastic: bool = False
    """Instances are slots, one per GPU, and `Arrange` may change them."""
    delays: Delays = Delays()
    delay_frac: float = 1.0
    """What all delays are multiplied with (``reconfigure.scale``)."""
    empty_power_frac: float = 1.0
    """What a GPU without an instance draws, of the profile's idle power."""
    layout_sequence: int = 0
    """Of the `Arrange` that ``instances`` already reflects."""


# Node and coordinator get to know each other.


class Hello(Frozen, frozen=True, tag=True):
    """First word of a node. ``boot_id`` tells whether the two share a monotonic clock."""

    protocol: int
    boot_id: str
    gpus: list[GpuInfo]
    tenants: list[TenantInfo]


class Welcome(Frozen, frozen=True, tag=True):
    """The coordinator takes the node in. Sent again until the node's reports arrive."""

    epoch: int
    run_id: str
    start_ns: int
    boot_id: str
    config: NodeConfig


class Refused(Frozen, frozen=True, tag=True):
    """The coordinator does not take the node in, and why."""

    reason: str


class Ping(Frozen, frozen=True, tag=True):
    """Asks the coordinator for the time, to set this node's clock against it."""

    sent_ns: int


class Pong(Frozen, frozen=True, tag=True):
    """The answer; half the round trip is the error of the offset."""

    sent_ns: int
    answered_ns: int


class Heartbeat(Frozen, frozen=True, tag=True):
    """The coordinator lives. Any other message from it says the same."""


class Stop(Frozen, frozen=True, tag=True):
    """The run is over: restore what was found, say `Bye` and leave."""

    reason: str


class Bye(Frozen, frozen=True, tag=True):
    """Last word of a node, with its own account of how punctual it was."""

    reason: str
    late_p50_s: float
    late_p99_s: float
    late_max_s: float
    events_total: int
    missed_total: int


# Telemetry.


class GpuReadings(Columns):
    """One column per quantity, one entry per GPU of the bank."""

    power_instant_w: F8
    power_avg_w: F8
    power_limit_w: F8
    power_limit_enforced_w: F8
    energy_j: F8
    sm_clock_mhz: F8
    temp_c: F8
    mem_temp_c: F8
    gpu_busy_frac: F8
    fb_used_bytes: I8
    throttle: I8
    lost: Flags


class InstanceReadings(Columns):
    """One entry per instance of the node."""

    num_running: I8
    num_waiting: I8
    kv_used_frac: F8
    prompt_tokens_total: I8
    output_tokens_total: I8
    preemptions_total: I8


class TenantReadings(Columns):
    """One entry per tenant of the node; kernel words, see STYLE's host table."""

    working_set_bytes: I8
    current_bytes: I8
    limit_bytes: I8
    swap_bytes: I8
    major_faults_total: I8
    refaults_total: I8
    pressure_some_frac: F8
    slowdown_frac: F8
    frozen: Flags


class SlotReadings(Frozen, frozen=True):
    """What the slots of an elastic node hold, one entry per GPU; empty on other nodes."""

    layout_sequence: int
    """Of the last `Arrange` that is reflected here."""
    serial: list[int]
    """`InstanceConfig.serial`; 0 for an empty slot."""
    state: list[int]
    """As in `testbed.core.view`: off, starting, up, draining."""
    ready_s: list[float]


class Report(Frozen, frozen=True, tag=True):
    """A node's state at ``Envelope.t_s``. Readings are packed; `report` makes one of columns."""

    gpus: bytes
    """`GpuReadings`."""
    instances: bytes
    """`InstanceReadings`."""
    tenants: bytes
    """`TenantReadings`."""
    lease_epoch: int
    lease_sequence: int
    drift_total: int
    """Times a limit was found changed by somebody else and was set again."""
    late_s: float
    """How late the node took this sample, on its own clock."""
    slots: SlotReadings | None = None
    """Of elastic nodes only."""

    def __post_init__(self) -> None:
        # Written out, since it runs for every report that arrives.
        if (
            len(self.gpus) % _GPU_BYTES
            or len(self.instances) % _INSTANCE_BYTES
            or len(self.tenants) % _TENANT_BYTES
        ):
            raise ValueError("readings are no whole number of records")

    @property
    def counts(self) -> list[int]:
        """GPUs, instances and tenants that it is of."""
        sizes = (_GPU_BYTES, _INSTANCE_BYTES, _TENANT_BYTES)
        packed = (self.gpus, self.instances, self.tenants)
        return [len(data) // size for data, size in zip(packed, sizes, strict=True)]


def report(
    gpus: GpuReadings,
    instances: InstanceReadings,
    tenants: TenantReadings,
    *,
    lease_epoch: int = 0,
    lease_sequence: int = 0,
    drift_total: int = 0,
    late_s: float = 0.0,
    slots: SlotReadings | None = None,
) -> Report:
    """A report of these readings."""
    return Report(
        gpus.pack(),
        instances.pack(),
        tenants.pack(),
        lease_epoch,
        lease_sequence,
        drift_total,
        late_s,
        slots if slots is not None and slots.serial else None,
    )


class RowReport(Frozen, frozen=True, tag=True):
    """What many nodes reported of one moment: an entry per node, and their readings one after the
    other. ``sequence`` and ``incarnation`` are the nodes' own, so that what was lost on the way to
    a relay shows at the coordinator too.
    """

    node: list[str]
    incarnation: list[int]
    sequence: list[int]
    num_gpus: list[int]
    num_instances: list[int]
    num_tenants: list[int]
    gpus: bytes
    instances: bytes
    tenants: bytes
    lease_epoch: list[int]
    lease_sequence: list[int]
    drift_total: list[int]
    late_s: list[float]
    slots: dict[int, SlotReadings]
    """By place among the nodes; elastic ones only."""

    def __post_init__(self) -> None:
        count = len(self.node)
        for name in _BY_NODE:
            if len(getattr(self, name)) != count:
                raise ValueError(f"{name} has not {count} entries, as node has")
        for kind, data, counts in self._parts():
            if len(data) != sum(counts) * kind.size_bytes or min(counts, default=0) < 0:
                raise ValueError(f"{len(data)} bytes are not the {kind.__name__} that it counts")
        if not all(0 <= place < count for place in self.slots):
            raise ValueError(f"slots of none of the {count} nodes")

    def _parts(self) -> list[tuple[type[Columns], bytes, list[int]]]:
        return [
            (GpuReadings, self.gpus, self.num_gpus),
            (InstanceReadings, self.instances, self.num_instances),
            (TenantReadings, self.tenants, self.num_tenants),
        ]

    def pick(self, keep: list[bool]) -> RowReport:
        """The same without some of the nodes."""
        gpus, instances, tenants = (
            kind.unpack(data).records[np.repeat(keep, counts)].tobytes()
            for kind, data, counts in self._parts()
        )
        columns = {name: list(compress(getattr(self, name), keep)) for name in _BY_NODE}
        kept = compress(range(len(keep)), keep)
        slots = {new: self.slots[old] for new, old in enumerate(kept) if old in self.slots}
        return RowReport(gpus=gpus, instances=instances, tenants=tenants, slots=slots, **columns)


_BY_NODE = [
    name
    for name in RowReport.__struct_fields__
    if name not in ("gpus", "instances", "tenants", "slots")
]
_GPU_BYTES = GpuReadings.size_bytes
_INSTANCE_BYTES = InstanceReadings.size_bytes
_TENANT_BYTES = TenantReadings.size_bytes


def merge(words: Sequence[Envelope]) -> RowReport:
    """One report of what several nodes reported of the same moment, in their order.

    Args:
        words: envelopes that hold a `Report` each, of one ``t_s``.
    """
    reports: list[Report] = [word.body for word in words]  # type: ignore[misc]
    return RowReport(
        [word.source for word in words],
        [word.incarnation for word in words],
        [word.sequence for word in words],
        [len(report.gpus) // _GPU_BYTES for report in reports],
        [len(report.instances) // _INSTANCE_BYTES for report in reports],
        [len(report.tenants) // _TENANT_BYTES for report in reports],
        b"".join([report.gpus for report in reports]),
        b"".join([report.instances for report in reports]),
        b"".join([report.tenants for report in reports]),
        [report.lease_epoch for report in reports],
        [report.lease_sequence for report in reports],
        [report.drift_total for report in reports],
        [report.late_s for report in reports],
        {place: report.slots for place, report in enumerate(reports) if report.slots is not None},
    )


# Relays: between a row of nodes and the coordinator.


class Forwarded(Frozen, frozen=True, tag=True):
    """A control message that a relay passes on as it came: up from a node, or down to one."""

    to: str
    """The node it is for; empty on the way up, where the message says whose it is."""
    message: bytes


class RelayStatus(Frozen, frozen=True, tag=True):
    """A relay lives, and its counters so far."""

    nodes: int
    """Nodes heard from."""
    received_total: int
    gaps_total: int
    """Messages of its nodes that never came to it."""
    dropped_total: int
    """Messages that it could not pass on, up or down."""
    bad_total: int


# Serving.


class Request(Frozen, frozen=True):
    """What a client sends. Token counts are of the model's own tokenizer."""

    id: int
    arrival_s: float
    prompt_tokens: int
    """Text tokens of the prompt."""
    output_tokens: int
    num_images: int = 0
    image_tokens: int = 0
    """Tokens of all images together, after the encoder."""
    tenant: str = "default"
    slo_class: str = "default"


class Submit(Frozen, frozen=True, tag=True):
    """Serve this request on that instance of yours."""

    instance: int
    request: Request
    ttft_s: float = math.inf
    """What its class was promised, from its arrival to its first token; infinite once that is out.
    Orders queues by deadline."""


class Progress(Frozen, frozen=True, tag=True):
    """What became of requests, in columns: ``t_s`` is when it happened on the node."""

    request_id: list[int]
    event: list[Literal["first_token", "finished", "rejected"]]
    t_s: list[float]
    preemptions: list[int]


class Returned(Frozen, frozen=True, tag=True):
    """Requests that an instance gave up before they ended, in columns.

    ``recalled`` was asked for; ``drained`` ran out of time; ``resharded`` lost its instance to
    another shape; ``gone`` came too late for the instance it was sent to. These are routed again
    and compute again what they had. ``squashed`` is past its deadline and ends.
    """

    request_id: list[int]
    instance: list[int]
    output_tokens: list[int]
    """Tokens given out so far."""
    why: list[ReturnedWhy]


class Gaps(Frozen, frozen=True, tag=True):
    """Inter-token gaps of the last ``gaps_period_s``, as counts per instance and histogram bin."""

    instance: list[int]
    bin: list[int]
    """Bin b holds gaps from 0.1 ms * 1.02**b up."""
    count: list[int]


# Control.


class Lease(Frozen, frozen=True, tag=True):
    """All caps of a node, for a while. Without renewal it moves to its safe caps by itself."""

    epoch: int
    sequence: int
    expires_s: float
    power_limit_w: list[float]
    sm_clock_lock_mhz: list[float]
    """Highest SM clock allowed per GPU; 0 leaves it unlocked."""
    answer: bool = True
    """Whether an `Ack` is wanted; a refused one has it in any case. Most renewals do without: where
    they are lost, reports show the safe caps that follow."""


class TenantLimits(Frozen, frozen=True, tag=True):
    """Memory limits for tenants of the node, by index; they hold until changed."""

    tenant: list[int]
    memory_limit_bytes: list[int]


class Arrange(Frozen, frozen=True, tag=True):
    """Hold these instances and no others; see `testbed.core.view.SetLayout`.

    An instance whose ``serial`` the node holds already goes on.
    """

    sequence: int
    instances: list[InstanceConfig]
    how: StartHow


class Tune(Frozen, frozen=True, tag=True):
    """A quick change to instances of the node.

    ``batch`` sets the most sequences in a batch to ``value``; ``order`` orders the queue by
    deadline (1) or arrival (0); ``recall`` hands back what waits; ``squash`` drops what waits
    without a first token for longer than ``value`` times its class's time to first token.
    """

    kind: TuneKind
    instance: list[int]
    value_count: list[float]


class Surroundings(Frozen, frozen=True, tag=True):
    """What an emulated building does to an emulated node, until the next word.

    Real devices have real surroundings, and leave it alone.
    """

    inlet_c: float
    """Air at the inlet."""
    dark: bool
    """The node is without power: its GPUs are gone."""
    load_frac: list[float]
    """What opaque VMs ask of each GPU, over what it can do at full clock; 0 without a VM."""


class Ack(Frozen, frozen=True, tag=True):
    """What the node did with a lease: refused (and why), or the limits as read back."""

    epoch: int
    sequence: int
    refused: str
    power_limit_w: list[float]


Body = (
    Hello
    | Welcome
    | Refused
    | Ping
    | Pong
    | Heartbeat
    | Stop
    | Bye
    | Report
    | RowReport
    | Forwarded
    | RelayStatus
    | Submit
    | Progress
    | Returned
    | Gaps
    | Lease
    | TenantLimits
    | Arrange
    | Tune
    | Surroundings
    | Ack
)


class Envelope(Frozen, frozen=True):
    """Who says it (and which life of them), the how manieth word it is, and when it was true."""

    source: str
    incarnation: int
    sequence: int
    t_s: float
    body: Body


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Envelope)


def encode(envelope: Envelope) -> bytes:
    """MessagePack bytes of an envelope."""
    return _encoder.encode(envelope)


def decode(data: bytes) -> Envelope:
    """The envelope in ``data``, validated.

    Raises:
        TransportError: it is not a message of ours, with the reason and the place in it.
    """
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        text = " ".join(str(error).split())
        raise TransportError(f"bad message of {len(data)} bytes: {text}") from None
