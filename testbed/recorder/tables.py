"""Every table of a recording: its columns, their types and their units.

A table is a list of columns; a column has a kind (how it is stored) and a unit. The unit follows
from the last part of the name wherever it can (STYLE: unit last), and is written out where it
cannot. Units travel in the column metadata of every file, so a table can be read without this one.

Times that did not happen (the first token of a rejected request) are NaN.

>>> TABLES["gpus"].column("power_avg_w")
Column(name='power_avg_w', kind='f4', unit='W')
>>> unit_of("ttft_limit_s"), unit_of("kv_used_frac"), unit_of("preemptions_total")
('s', 'fraction', 'count')
>>> unit_of("speed")
Traceback (most recent call last):
...
ValueError: column 'speed' has no unit: end its name in one or list it
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
import pyarrow as pa

from testbed.core.columns import Columns
from testbed.core.messages import GpuInfo, GpuReadings, InstanceReadings, TenantReadings
from testbed.core.view import (
    PRECISIONS,
    Command,
    DrainInstance,
    Floats,
    GpuColumns,
    InstanceColumns,
    Ints,
    LockClocks,
    OrderQueue,
    Placement,
    PlaceVm,
    RecallWaiting,
    SetBatch,
    SetMemoryLimit,
    SetPowerLimit,
    Squash,
    TenantColumns,
)

FORMAT = 1
"""Version of the recording's layout; the reader refuses a newer one."""

Kind = Literal["f4", "f8", "i4", "i8", "bool", "name", "text"]
"""Storage of a column. ``name`` repeats (read back dictionary-encoded), ``text`` does not."""

ARROW_TYPE: dict[str, Any] = {
    "f4": pa.float32(),
    "f8": pa.float64(),
    "i4": pa.int32(),
    "i8": pa.int64(),
    "bool": pa.bool_(),
    "name": pa.string(),
    "text": pa.string(),
}
NUMPY_TYPE: dict[str, Any] = {
    "f4": np.float32,
    "f8": np.float64,
    "i4": np.int32,
    "i8": np.int64,
    "bool": np.bool_,
}

_SUFFIX_UNITS = {
    "s": "s",
    "w": "W",
    "j": "J",
    "c": "degC",
    "mhz": "MHz",
    "bytes": "bytes",
    "tokens": "tokens",
    "frac": "fraction",
    "total": "count",
    "count": "count",
    "index": "index",
}
_UNITS = {
    "gpu": "index in gpu_index",
    "instance": "index in instance_index",
    "tenant_index": "index in tenant_index",
    "row": "index in row_index",
    "node": "index",
    "pool_index": "index in pool_index",
    "policy_index": "index in the spec's policy list; -1 for the testbed itself",
    "target_index": "index among targets of the kind",
    "step": "index of the control tick",
    "command": "index of the proposal in its step; -1 for an outcome that came later",
    "priority": "rank",
    "throttle": "mask of NVML clocks event reasons",
    "bin": "index of an ITL bin",
    "value": "W, MHz, bytes, index, or 0 and 1, by kind; of a facility by quantity",
    "model": "index in model_index",
    "state": "0 off, 1 starting, 2 up, 3 draining",
    "request_id": "identifier",
}
_NAME_UNITS = "name"
_COUNTS = {
    "count",
    "num_running",
    "num_waiting",
    "num_gpus",
    "num_images",
    "num_seqs",
    "max_num_seqs",
    "num_commands",
    "outstanding_requests",
    "preemptions",
    "attempts",
    "iterations",
    "encode_tiles",
    "events",
    "missed",
}


def unit_of(name: str) -> str:
    """Unit of the column ``name``, by list or by its last part."""
    if name in _UNITS:
        return _UNITS[name]
    if name in _COUNTS:
        return "count"
    suffix = name.rpartition("_")[2]
    if "_" not in name or suffix not in _SUFFIX_UNITS:
        raise ValueError(f"column {name!r} has no unit: end its name in one or list it")
    return _SUFFIX_UNITS[suffix]


class Column(NamedTuple):
    """One column of a table."""

    name: str
    kind: Kind
    unit: str


class Table(NamedTuple):
    """One table of a recording."""

    name: str
    about: str
    columns: tuple[Column, ...]

    def column(self, name: str) -> Column:
        """The column called ``name``."""
        return next(column for column in self.columns if column.name == name)

    def schema(self) -> Any:
        """Arrow schema, with units in the metadata of the columns."""
        return pa.schema(
            [
                pa.field(
                    column.name,
                    ARROW_TYPE[column.kind],
                    metadata={"unit": column.unit, "kind": column.kind},
                )
                for column in self.columns
            ],
            metadata={"table": self.name, "about": self.about, "format": str(FORMAT)},
        )


def table(name: str, about: str, columns: str) -> Table:
    """A table from words like ``t_s:f8 gpu:i4 why:text``."""
    return Table(name, about, tuple(_column(*word.split(":")) for word in columns.split()))


def _column(name: str, kind: str) -> Column:
    unit = {"name": _NAME_UNITS, "text": "text", "bool": "boolean"}.get(kind) or unit_of(name)
    return Column(name, kind, unit)  # type: ignore[arg-type]


def _of_struct(struct: type[msgspec.Struct], **kinds: str) -> str:
    """Columns like the fields of a message; ``kinds`` says where single precision will not do."""
    default = {float: "f4", int: "i8", bool: "bool", str: "name"}
    return " ".join(
        f"{field.name}:{kinds.get(field.name) or default[field.type]}"
        for field in msgspec.structs.fields(struct)
    )


def _of_columns(readings: type[Columns], **kinds: str) -> str:
    """Columns like those of readings."""
    default = {"f": "f4", "i": "i8", "u": "bool"}
    return " ".join(
        f"{name}:{kinds.get(name) or default[readings.layout[name].kind]}"
        for name in readings.names
    )


VIEW_STATIC = {
    GpuColumns: ("name", "row", "node", "instance", "priority"),
    InstanceColumns: (
        *("name", "node", "pool", "num_gpus"),
        *("model", "precision", "state", "ready_s", "max_num_seqs"),
    ),
    TenantColumns: ("name", "node", "guaranteed_bytes", "memory_bytes"),
}
"""Columns of a view that do not change in a run, or seldom: those of `LAYOUT` are in the table
``layout`` whenever they do, all others in the index tables."""
LAYOUT = ("pool", "num_gpus", "model", "precision", "state", "ready_s", "max_num_seqs")


def view_columns(columns: type[Any]) -> list[str]:
    """Names of the columns that a recorded view keeps for each control tick."""
    static = VIEW_STATIC[columns]
    return [column.name for column in fields(columns) if column.name not in static]


def _of_view(columns: type[Any]) -> str:
    """Columns of a view in full precision: a replayed policy must see the very same numbers."""
    kind = {"Floats": "f8", "Ints": "i8", "Bools": "bool"}
    kept = view_columns(columns)
    return " ".join(f"{c.name}:{kind[str(c.type)]}" for c in fields(columns) if c.name in kept)


_ALL = [
    # What does not change, or seldom.
    table(
        "gpu_index",
        "name and place of each GPU",
        "gpu:i4 name:name row:i4 node:i4 instance:i4 priority:i4",
    ),
    table(
        "gpu_info",
        "what each GPU said of itself when its node joined, and the cap it falls back to",
        f"t_s:f8 gpu:i4 {_of_struct(GpuInfo, memory_total_bytes='i8')} safe_power_limit_w:f8",
    ),
    table(
        "instance_index",
        "name and place of each serving instance",
        "instance:i4 name:name node:i4 pool_index:i4 num_gpus:i4",
    ),
    table(
        "tenant_index",
        "name, place and share of each tenant of host memory",
        "tenant_index:i4 name:name node:i4 guaranteed_bytes:f8 memory_bytes:f8",
    ),
    table("row_index", "name and budget of each row", "row:i4 name:name budget_w:f8"),
    table("pool_index", "name and priority of each pool", "pool_index:i4 name:name priority:i8"),
    table(
        "model_index",
        "each model that instances may hold, at each precision, and its declared quality (MMLU)",
        "model:i4 name:name precision:name quality_frac:f8",
    ),
    table(
        "layout",
        "what an instance (or slot) holds from t_s on; policies see it from control tick step on",
        "t_s:f8 step:i8 instance:i4 pool_index:i4 num_gpus:i4 model:i4 precision:name state:i4 "
        "ready_s:f8 max_num_seqs:i8",
    ),
    # Telemetry, as reported.
    table(
        "gpus",
        "each GPU's readings",
        f"t_s:f8 gpu:i4 {_of_columns(GpuReadings, energy_j='f8')}",
    ),
    table(
        "instances",
        "each serving instance's readings, and the coordinator's account of it",
        f"t_s:f8 instance:i4 {_of_columns(InstanceReadings)} outstanding_tokens:f8",
    ),
    table(
        "tenants",
        "each memory tenant's readings",
        f"t_s:f8 tenant_index:i4 {_of_columns(TenantReadings)}",
    ),
    table(
        "rows",
        "each row's draw against its budget",
        "t_s:f8 row:i4 draw_w:f8 instant_w:f8 budget_w:f8",
    ),
    # Serving.
    table(
        "requests",
        "one row per request, when it ended",
        "request_id:i8 tenant:name slo_class:name pool:name instance:i4 arrival_s:f8 routed_s:f8 "
        "first_token_s:f8 first_token_seen_s:f8 finished_s:f8 finished_seen_s:f8 prompt_tokens:i8 "
        "image_tokens:i8 num_images:i4 output_tokens:i8 preemptions:i4 attempts:i4 status:name "
        "ttft_limit_s:f8 tpot_limit_s:f8",
    ),
    table(
        "request_totals",
        "counts of all requests that ended since the last row, where not all have their own",
        "t_s:f8 slo_class:name status:name requests_count:i8 prompt_tokens:i8 image_tokens:i8 "
        "output_tokens:i8 attained_count:i8",
    ),
    table(
        "moves",
        "requests that an instance gave up before they ended: recalled, drained, resharded and "
        "gone are routed again, squashed are rejected for being past their deadline",
        "t_s:f8 request_id:i8 instance:i4 output_tokens:i8 why:name",
    ),
    table(
        "itl",
        "counts of gaps between tokens since the last row; bin i holds gaps from "
        "1e-4 * 1.02**i s on",
        "t_s:f8 instance:i4 bin:i4 count:i8",
    ),
    table(
        "segments",
        "runs of alike iterations; the k-th (from 0) took first_s + k * growth_s",
        "instance:i4 t_start_s:f8 t_end_s:f8 iterations:i8 first_s:f8 growth_s:f8 num_seqs:i4 "
        "context_tokens:i8 prefill_tokens:i8 encode_tiles:i4 clock_frac:f4",
    ),
    # Control.
    table("view_rows", "what policies saw: rows", "step:i8 now_s:f8 row:i4 budget_w:f8"),
    table(
        "view_gpus", "what policies saw: GPUs", f"step:i8 now_s:f8 gpu:i4 {_of_view(GpuColumns)}"
    ),
    table(
        "view_instances",
        "what policies saw: instances",
        f"step:i8 now_s:f8 instance:i4 {_of_view(InstanceColumns)}",
    ),
    table(
        "facility",
        "what policies saw: the building, each value of `testbed.core.view.Facility` when it is "
        "another one than before",
        "step:i8 now_s:f8 quantity:name place_index:i4 value:f8",
    ),
    table(
        "view_tenants",
        "what policies saw: tenants",
        f"step:i8 now_s:f8 tenant_index:i4 {_of_view(TenantColumns)}",
    ),
    table(
        "commands",
        "one row per proposal and target: who asked for what, why, and what became of it",
        "t_s:f8 step:i8 policy_index:i4 policy:name precedence:name command:i4 kind:name "
        "target_index:i4 target:name value:f8 outcome:name winner:name why:text",
    ),
    # What happened, and how punctual the testbed was.
    table("events", "what is worth a line", "t_s:f8 level:name source:name kind:name text:text"),
    table(
        "lateness",
        "how late each loop ran, since the run's start",
        "source:name t_s:f8 late_p50_s:f8 late_p99_s:f8 late_max_s:f8 events:i8 missed:i8",
    ),
    # Last, so that a tick which is listed here has all its rows in the tables above.
    table(
        "steps",
        "one row per step of a policy, also when it said nothing",
        "step:i8 now_s:f8 policy_index:i4 policy:name num_commands:i4",
    ),
]
TABLES: dict[str, Table] = {entry.name: entry for entry in _ALL}


# Gaps between tokens are counted in bins 2 % wide, which is far finer than run-to-run spread.
ITL_FIRST_S = 1e-4
ITL_RATIO = 1.02
ITL_BINS = 815
"""0.1 ms to 1,000 s; what lies outside is counted in the first or the last bin."""


def itl_edges_s() -> Floats:
    """Lower edge of each bin, and the upper edge of the last."""
    return ITL_FIRST_S * np.power(ITL_RATIO, np.arange(ITL_BINS + 1, dtype=np.float64))


def itl_bin(gap_s: Floats | float) -> Ints:
    """Bin of each gap.

    >>> itl_bin(np.array([0.0, 1e-4, 0.03, 1e9])).tolist()
    [0, 0, 288, 814]
    """
    with np.errstate(divide="ignore"):
        place = np.floor(np.log(np.asarray(gap_s) / ITL_FIRST_S) / np.log(ITL_RATIO) + 1e-9)
    return np.asarray(np.clip(place, 0, ITL_BINS - 1), np.int64)


class Flat(NamedTuple):
    """A command as columns."""

    kind: str
    target: Ints
    value: Floats


def placement_code(placement: Placement) -> float:
    """A placement as one number whose decimals can be read: first GPU, tp, pool, model, precision.

    Two digits, one, three, three and one; a command has one row for each. 0 stands for an empty
    layout, -1 for a policy that takes its word back.

    >>> placement_code(Placement(first_gpu=4, tp=2, pool=7, model=1, precision="fp8"))
    420070011.0
    """
    code = placement.first_gpu * 10 + placement.tp
    code = (code * 1000 + placement.pool) * 1000 + placement.model
    return float(code * 10 + PRECISIONS.index(placement.precision))


def placement_words(code: float) -> str:
    """What `placement_code` says, for people.

    >>> placement_words(420070011.0), placement_words(0.0), placement_words(-1.0)
    ('tp2 fp8 at GPU 4, model 1, pool 7', 'nothing', 'no more to say')
    """
    if code <= 0:
        return "nothing" if code == 0 else "no more to say"
    rest, precision = divmod(int(code), 10)
    rest, model = divmod(rest, 1000)
    rest, pool = divmod(rest, 1000)
    first, tp = divmod(rest, 10)
    return f"tp{tp} {PRECISIONS[precision]} at GPU {first}, model {model}, pool {pool}"


def flatten(command: Command) -> Flat:
    """A command as one row per target.

    >>> flatten(SetPowerLimit(np.array([2, 3]), 450.0))
    Flat(kind='power_limit', target=array([2, 3]), value=array([450., 450.]))
    >>> from testbed.core.view import SetLayout
    >>> layout = (Placement(0, 4, 0, 0), Placement(4, 4, 0, 0))
    >>> flatten(SetLayout(3, layout, "cold"))
    Flat(kind='layout_cold', target=array([3, 3]), value=array([4.0e+07, 4.4e+08]))
    """
    kind: str
    target: Ints
    value: Floats | float
    if isinstance(command, SetPowerLimit):
        kind, target, value = "power_limit", command.gpus, command.power_limit_w
    elif isinstance(command, LockClocks):
        kind, target, value = "sm_clock_lock", command.gpus, command.sm_clock_mhz
    elif isinstance(command, SetMemoryLimit):
        kind, target, value = "memory_limit", command.tenants, command.memory_limit_bytes
    elif isinstance(command, DrainInstance):
        kind, target, value = "drain", command.instances, float(command.drain)
    elif isinstance(command, SetBatch):
        kind, target, value = "max_num_seqs", command.instances, np.asarray(command.max_num_seqs)
    elif isinstance(command, OrderQueue):
        kind, target = "queue_order", command.instances
        value = float(command.by == "deadline")
    elif isinstance(command, PlaceVm):
        kind, target, value = "place_vm", command.vms, np.asarray(command.nodes, np.float64)
    elif isinstance(command, RecallWaiting):
        kind, target, value = "recall", command.instances, 1.0
    elif isinstance(command, Squash):
        kind, target, value = "squash", command.instances, command.ttft_frac
    else:
        kind = f"layout_{command.how}"
        value = np.array([placement_code(one) for one in command.layout or ()] or [0.0])
        if command.layout is None:
            value = np.array([-1.0])
        target = np.full(len(value), command.node)
    target = np.atleast_1d(np.asarray(target, np.int64))
    return Flat(kind, target, np.broadcast_to(np.asarray(value, np.float64), target.shape))
