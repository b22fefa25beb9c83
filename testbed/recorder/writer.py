"""Write a recording: buffers in memory, an Arrow stream per table on disk, Parquet at the end.

Appending copies columns into preallocated arrays. `Recorder.flush` hands what is there to the
operating system as one Arrow record batch per table: from then on it survives ``kill -9`` of the
process. Closing rewrites each stream as Parquet, in row groups of a fixed size, so that the bytes
depend on the rows alone and not on when they were flushed. Wall-clock facts are in manifest.json
and summary.json and nowhere else.

A recorder holds a lock on its folder. A recording whose manifest says "running" and whose folder
is not locked was killed: `finalise` closes it afterwards, and the reader takes it as it is.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from testbed.core.errors import RecordingError
from testbed.core.freeze import put_back
from testbed.core.messages import GpuInfo, GpuReadings, InstanceReadings, Returned, TenantReadings
from testbed.core.names import parent
from testbed.core.spec import RunSpec
from testbed.core.view import (
    PRECISIONS,
    Command,
    Floats,
    GpuColumns,
    InstanceColumns,
    Ints,
    TenantColumns,
    View,
)
from testbed.recorder.facility import OWNERS, facility_columns
from testbed.recorder.tables import (
    FORMAT,
    NUMPY_TYPE,
    TABLES,
    Table,
    flatten,
    view_columns,
)

FLUSH_S = 0.5
"""Least wall-clock time between two flushes. The shell asks about once a second of the run's clock,
which in virtual time may be a thousand times a second."""
FULL_ROWS = 1 << 14
"""A buffer of so many rows is flushed without waiting: it bounds memory, and how long a flush keeps
a live loop from its messages. 16,384 rows of GPUs take 0.4 ms; eight times as many take 2 ms, more
than a cache holds, and now and then 150 ms."""
ROW_GROUP_ROWS = 1 << 17
_VIEW_SLICE_ROWS = 1 << 12
CHECKPOINT = "checkpoint.msgpack"
"""File of a run's last checkpoint, while it goes on."""
BATCH_ROWS = 1 << 10
"""Single rows are turned into columns so many at a time: one by one costs five times as much."""

_VIEW_GPUS = view_columns(GpuColumns)
_VIEW_INSTANCES = view_columns(InstanceColumns)
_VIEW_TENANTS = view_columns(TenantColumns)
_OF_INSTANCES = ("drain", "max_num_seqs", "queue_order", "recall", "squash")
_PACKAGES = ("serving-testbed", "numpy", "pyarrow", "scipy", "msgspec", "pyzmq", "nvidia-ml-py")


_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"


class TableWriter:
    """Buffers of one table, and its stream once there is something to write."""

    def __init__(self, table: Table, folder: Path) -> None:
        self.table = table
        self.num_rows = 0
        self._path = folder / f"{table.name}.arrows"
        self._schema = table.schema()
        self._capacity = 256
        self._numeric: list[tuple[int, np.ndarray[Any, Any]]] = []
        self._texts: list[tuple[int, list[str]]] = []
        for place, column in enumerate(table.columns):
            if column.kind in NUMPY_TYPE:
                empty = np.empty(self._capacity, NUMPY_TYPE[column.kind])
                self._numeric.append((place, empty))
            else:
                self._texts.append((place, []))
        self._names = [column.name for column in table.columns]
        self._rows: list[tuple[Any, ...]] = []
        self._sink: Any = None

    def append_row(self, row: tuple[Any, ...]) -> bool:
        """Add one row, in the table's order; True once it is time to flush.

        Rows wait for each other and are put in as columns.
        """
        rows = self._rows
        rows.append(row)
        if len(rows) < BATCH_ROWS:
            return False
        self._put_rows()
        return self.num_rows >= FULL_ROWS

    def _put_rows(self) -> None:
        rows, self._rows = self._rows, []
        if rows:
            self.append(len(rows), *zip(*rows, strict=True))

    def append(self, count: int, *values: Any) -> None:
        """Add ``count`` rows; ``values`` are columns in the table's order, or one value for all."""
        if self._rows:
            self._put_rows()
        start = self.num_rows
        end = start + count
        if end > self._capacity:
            self._grow(end)
        for place, buffer in self._numeric:
            buffer[start:end] = values[place]
        for place, texts in self._texts:
            value = values[place]
            texts.extend([value] * count if isinstance(value, str) else value)
            if len(texts) != end:
                for _, others in self._texts:
                    del others[start:]
                raise ValueError(
                    f"table {self.table.name}: {self._names[place]} needs {count} rows"
                )
        self.num_rows = end

    def append_columns(self, columns: Mapping[str, Any]) -> None:
        """Add rows by column name; single values are repeated."""
        if len(columns) != len(self._names) or any(name not in columns for name in self._names):
            odd = sorted(set(columns) ^ set(self._names))
            raise ValueError(f"table {self.table.name}: missing or unknown columns {odd}")
        values = [columns[name] for name in self._names]
        lengths = [len(v) for v in values if not isinstance(v, str) and hasattr(v, "__len__")]
        self.append(max(lengths) if lengths else 1, *values)

    def _grow(self, needed: int) -> None:
        while self._capacity < needed:
            self._capacity *= 2
        for index, (place, buffer) in enumerate(self._numeric):
            larger = np.empty(self._capacity, buffer.dtype)
            larger[: self.num_rows] = buffer[: self.num_rows]
            self._numeric[index] = (place, larger)

    def flush(self) -> None:
        """Hand the buffered rows to the operating system."""
        self._put_rows()
        if not self.num_rows:
            return
        if self._sink is None:
            self._sink = self._path.open("wb")
            self._sink.write(self._schema.serialize())
        arrays: list[Any] = [None] * len(self._names)
        for place, buffer in self._numeric:
            arrays[place] = pa.array(buffer[: self.num_rows])
        for place, texts in self._texts:
            arrays[place] = pa.array(texts, pa.string())
            texts.clear()
        # A stream is its schema, then batches, so it can be gone on with after a batch.
        self._sink.write(pa.RecordBatch.from_arrays(arrays, schema=self._schema).serialize())
        self._sink.flush()
        self.num_rows = 0

    @property
    def size_bytes(self) -> int:
        """What is on disk of the stream, after a `flush`."""
        return self._sink.tell() if self._sink is not None else 0

    def go_on_at(self, size_bytes: int) -> None:
        """Forget what is buffered and what the stream holds beyond so many bytes; then go on."""
        self._rows.clear()
        self.num_rows = 0
        for _, texts in self._texts:
            texts.clear()
        if self._sink is not None:
            self._sink.close()
            self._sink = None
        if size_bytes:
            self._sink = self._path.open("r+b")
            self._sink.truncate(size_bytes)
            self._sink.seek(size_bytes)
        else:
            self._path.unlink(missing_ok=True)

    def close(self) -> None:
        """Flush and end the stream."""
        self.flush()
        if self._sink is not None:
            self._sink.write(_END_OF_STREAM)
            self._sink.close()
            self._sink = None


class _Due:
    """Which samples of GPUs or instances to keep: those at least ``period_s`` apart."""

    WIRED = ("period_s",)

    def __init__(self, period_s: float) -> None:
        self.period_s = period_s
        self.next_s = np.empty(0)
        """By index, when it is to be kept next."""

    def now(self, places: Any, t_s: float) -> Any:
        """Which of the samples at ``t_s`` to keep, taken as kept; None where all are."""
        if not self.period_s:
            return None
        places = np.asarray(places, np.int64)
        more = int(places.max(initial=-1)) + 1 - len(self.next_s)
        if more > 0:
            self.next_s = np.append(self.next_s, np.full(more, -np.inf))
        due = t_s >= self.next_s[places] - 1e-6
        self.next_s[places[due]] = t_s + self.period_s
        return due


class Recorder:
    """The recording of one run while it goes on.

    Args:
        folder: made if needed; must not hold a recording already.
        spec: what was asked for.
        meta: further facts for the manifest: ``provenance`` (a list of ``{what, how, source}`` with
            ``how`` one of measured, emulated, assumed), ``late_limit_s`` and the like.
        extra_tables: tables of an experiment, beside those of `tables.TABLES`.
        resume: go on with a recording that was broken off; `go_on` says from where.
    """

    WIRED = (
        "folder", "spec", "manifest", "tables", "_lock", "_started", "_gpus", "_instances",
        "_requests", "_tenants", "_names", "_flushed", "_closed",
    )  # fmt: skip

    def __init__(
        self,
        folder: Path | str,
        *,
        spec: RunSpec,
        meta: Mapping[str, Any] | None = None,
        extra_tables: Sequence[Table] = (),
        resume: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.spec = spec
        with _map_os_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            there = (self.folder / "manifest.json").exists()
            if there and not resume:
                raise RecordingError(f"recording {self.folder}: there is one already")
            self._lock = lock_folder(self.folder)
            self._started = time.monotonic()
            self.manifest = _new_manifest(self.folder.name, spec, dict(meta or {}))
            write_json(self.folder / "manifest.json", self.manifest)
        # `steps` stays last: see its place in TABLES.
        tables = {**{t.name: t for t in extra_tables}, **TABLES}
        self._facility_seen: dict[str, Floats] = {}
        self.tables = {name: TableWriter(table, self.folder) for name, table in tables.items()}
        self._gpus = self.tables["gpus"]
        self._instances = self.tables["instances"]
        self._requests = self.tables["requests"]
        self._tenants = self.tables["tenants"]
        self._names: dict[str, tuple[str, ...]] = {}
        self._gpu_due = _Due(spec.record.gpu_period_s)
        self._instance_due = _Due(spec.record.instance_period_s)
        # By GPU, what it said since it was recorded, and when (NaN: nothing).
        self._held_s = np.empty(0)
        self._held = np.empty(0, GpuReadings.layout)
        self._flushed = self._started
        self._last_s = 0.0
        self._closed = False

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if kind is None:
            self.close()
        elif issubclass(kind, KeyboardInterrupt):
            self.close("interrupted")
        else:
            self.close("failed", error=f"{kind.__name__}: {error}")

    def append(self, table: str, columns: Mapping[str, Any]) -> None:
        """Add rows to a table by column name; a single value is repeated."""
        writer = self.tables[table]
        writer.append_columns(columns)
        if writer.num_rows >= FULL_ROWS:
            self._flush()

    def request(self, row: tuple[Any, ...]) -> None:
        """A request has ended; ``row`` is in the order of the table ``requests``."""
        if self._requests.append_row(row):
            self._flush()

    def totals(self, t_s: float, slo_class: str, status: str, sums: Sequence[int]) -> None:
        """Requests that ended, counted: how many, their tokens, how many attained their SLO."""
        self.tables["request_totals"].append(1, t_s, slo_class, status, *sums)

    # What does not change.

    def cluster(self, view: View) -> None:
        """The index tables: names and places, from a view. Call once, before anything else."""
        gpus, instances, tenants = view.gpus, view.instances, view.tenants
        nodes = tuple(dict.fromkeys(parent(name) for name in gpus.name))
        self._names = {
            "power_limit": gpus.name,
            "sm_clock_lock": gpus.name,
            "memory_limit": tenants.name,
            **dict.fromkeys(_OF_INSTANCES, instances.name),
            **dict.fromkeys(("layout_snapshot", "layout_cold"), nodes),
            "place_vm": view.facility.vms.name if view.facility is not None else (),
        }
        put = self.tables
        put["gpu_index"].append(
            len(gpus.name),
            range(len(gpus.name)),
            gpus.name,
            gpus.row,
            gpus.node,
            gpus.instance,
            gpus.priority,
        )
        put["instance_index"].append(
            len(instances.name),
            range(len(instances.name)),
            instances.name,
            instances.node,
            instances.pool,
            instances.num_gpus,
        )
        put["tenant_index"].append(
            len(tenants.name),
            range(len(tenants.name)),
            tenants.name,
            tenants.node,
            tenants.guaranteed_bytes,
            tenants.memory_bytes,
        )
        rows = view.rows
        put["row_index"].append(len(rows.name), range(len(rows.name)), rows.name, rows.budget_w)
        put["pool_index"].append(
            len(view.pools), range(len(view.pools)), view.pools, view.pool_priority
        )
        for model, name in enumerate(view.models):
            quality = view.model_quality_frac[model]
            put["model_index"].append(len(PRECISIONS), model, name, PRECISIONS, quality)
        self.layout(0.0, 0, np.arange(len(instances.name)), instances)

    def layout(self, t_s: float, step: int, which: Ints, instances: InstanceColumns) -> None:
        """What some instances hold from now on; ``step`` is the first control tick to see it."""
        self.tables["layout"].append(
            len(which),
            t_s,
            step,
            which,
            instances.pool[which],
            instances.num_gpus[which],
            instances.model[which],
            [PRECISIONS[one] if one >= 0 else "" for one in instances.precision[which]],
            instances.state[which],
            instances.ready_s[which],
            instances.max_num_seqs[which],
        )

    def moves(self, t_s: float, returned: Returned, first_instance: int) -> None:
        """Requests that instances of a node gave up; its first one has that index."""
        self.tables["moves"].append(
            len(returned.request_id),
            t_s,
            returned.request_id,
            np.asarray(returned.instance) + first_instance,
            returned.output_tokens,
            returned.why,
        )

    def node_joined(
        self,
        t_s: float,
        gpus: Sequence[int],
        infos: Sequence[GpuInfo],
        safe_power_limit_w: Sequence[float],
    ) -> None:
        """What the GPUs of a node said of themselves, in its `Hello`."""
        facts = zip(*(msgspec.structs.astuple(info) for info in infos), strict=True)
        self.tables["gpu_info"].append(len(infos), t_s, gpus, *facts, safe_power_limit_w)

    # Telemetry. The hot path: positional, no checks beyond NumPy's.

    def gpus(self, t_s: float, gpu: Any, readings: GpuReadings) -> None:
        """What nodes reported: ``gpu`` are the indices of their GPUs.

        With ``record.gpu_period_s`` set, a report that comes too soon is held back; the last one
        is kept at the end, so that energy counters cover the whole run.
        """
        due = self._gpu_due.now(gpu, t_s)
        if due is None:
            self._put_gpus(t_s, gpu, readings)
            return
        gpu = np.asarray(gpu)
        more = len(self._gpu_due.next_s) - len(self._held)
        if more:
            self._held_s = np.append(self._held_s, np.full(more, np.nan))
            self._held = np.append(self._held, np.zeros(more, GpuReadings.layout))
        self._held_s[gpu] = np.where(due, np.nan, t_s)
        self._held[gpu] = readings.records  # also of those due, which the NaN says are not held
        if due.any():
            self._put_gpus(t_s, gpu[due], GpuReadings.of(readings.records[due]))

    def _put_gpus(self, t_s: Any, gpu: Any, readings: GpuReadings) -> None:
        self._gpus.append(len(gpu), t_s, gpu, *readings.values())
        self._last_s = float(np.max(t_s))
        if self._gpus.num_rows >= FULL_ROWS:
            self._flush()

    def instances(
        self, t_s: float, instance: Any, readings: InstanceReadings, outstanding_tokens: Any
    ) -> None:
        """Nodes' instances, and how many tokens the coordinator holds each to have ahead.

        Thinned by ``record.instance_period_s``.
        """
        due = self._instance_due.now(instance, t_s)
        if due is not None:
            instance, outstanding_tokens = np.asarray(instance)[due], outstanding_tokens[due]
            readings = InstanceReadings.of(readings.records[due])
        self._instances.append(len(instance), t_s, instance, *readings.values(), outstanding_tokens)
        if self._instances.num_rows >= FULL_ROWS:
            self._flush()

    def tenants(self, t_s: float, tenant: Any, readings: TenantReadings) -> None:
        """A node's memory tenants."""
        self._tenants.append(len(tenant), t_s, tenant, *readings.values())
        if self._tenants.num_rows >= FULL_ROWS:
            self._flush()

    def rows(self, t_s: float, draw_w: Floats, instant_w: Floats, budget_w: Floats) -> None:
        """Draw of every row, in the order of ``view.rows``."""
        self.tables["rows"].append(
            len(draw_w), t_s, range(len(draw_w)), draw_w, instant_w, budget_w
        )
        self._last_s = t_s

    def itl(self, t_s: float, instance: int, bins: Any, counts: Any) -> None:
        """Gaps between tokens of an instance since the last call, by `tables.itl_bin`."""
        self.tables["itl"].append(len(bins), t_s, instance, bins, counts)

    def segments(self, rows: Sequence[tuple[Any, ...]]) -> None:
        """Finished segments of engines: the instance, then `emulators.engine.Segment`."""
        if rows:
            writer = self.tables["segments"]
            writer.append(len(rows), *zip(*rows, strict=True))
            if writer.num_rows >= FULL_ROWS:
                self._flush()

    # Control.

    def view(self, step: int, view: View, breathe: Callable[[], object] = lambda: None) -> None:
        """What the policies are shown at a control tick, if ``record.views``.

        Else no more than whose GPUs are, which the ledger needs. ``breathe`` is called now and
        then, since a large fleet takes tens of milliseconds.
        """
        now_s = view.now_s
        if not self.spec.record.views:
            if view.facility is not None and view.facility.vms.name:
                columns = facility_columns(view.facility)
                self._facility(step, now_s, {name: columns[name] for name in OWNERS})
            return
        count = len(view.rows.name)
        self.tables["view_rows"].append(count, step, now_s, range(count), view.rows.budget_w)
        self._view("view_gpus", step, now_s, view.gpus, _VIEW_GPUS, breathe)
        self._view("view_instances", step, now_s, view.instances, _VIEW_INSTANCES, breathe)
        self._view("view_tenants", step, now_s, view.tenants, _VIEW_TENANTS, breathe)
        if view.facility is not None:
            self._facility(step, now_s, facility_columns(view.facility))

    def _facility(self, step: int, now_s: float, columns: dict[str, Floats]) -> None:
        for quantity, values in columns.items():
            before = self._facility_seen.get(quantity)
            places = np.arange(len(values)) if before is None else np.flatnonzero(values != before)
            if len(places):
                self._facility_seen[quantity] = values
                self.tables["facility"].append(
                    len(places), step, now_s, quantity, places, values[places]
                )

    def _view(
        self,
        table: str,
        step: int,
        now_s: float,
        columns: Any,
        names: list[str],
        breathe: Callable[[], object],
    ) -> None:
        count, writer = len(columns.name), self.tables[table]
        for start in range(0, count, _VIEW_SLICE_ROWS):
            rows = range(start, min(start + _VIEW_SLICE_ROWS, count))
            values = (getattr(columns, name)[rows.start : rows.stop] for name in names)
            writer.append(len(rows), step, now_s, rows, *values)
            if writer.num_rows >= FULL_ROWS:
                self._flush()
            breathe()

    def step(
        self, step: int, now_s: float, policy_index: int, policy: str, num_commands: int
    ) -> None:
        """A policy was stepped. Call after its `command` rows."""
        self.tables["steps"].append(1, step, now_s, policy_index, policy, num_commands)

    def command(
        self,
        t_s: float,
        step: int,
        policy_index: int,
        policy: str,
        precedence: str,
        ordinal: int,
        command: Command,
        outcome: str | Sequence[str],
        winner: str | Sequence[str] = "",
    ) -> None:
        """What a policy asked for, to the letter, and what the arbiter made of it.

        ``outcome`` (sent, unchanged, overruled) and ``winner`` (the policy that overruled) are one
        word for all targets or one for each. ``ordinal`` counts the policy's commands in the step;
        -1 marks an outcome that became known later (refused, expired) and is no proposal.
        """
        kind, target, value = flatten(command)
        names = self._names[kind]
        self.tables["commands"].append(
            len(target),
            t_s,
            step,
            policy_index,
            policy,
            precedence,
            ordinal,
            kind,
            target,
            [names[index] for index in target],
            value,
            outcome,
            winner,
            command.why,
        )

    def event(self, t_s: float, level: str, source: str, kind: str, text: str) -> None:
        """Something worth a line: node joined or lost, lease expired, drift, breach, late."""
        self.tables["events"].append(1, t_s, level, source, kind, text)

    def lateness(
        self,
        source: str,
        t_s: float,
        late_p50_s: float,
        late_p99_s: float,
        late_max_s: float,
        events: int,
        missed: int,
    ) -> None:
        """How late a loop has run so far; the last row of a source counts."""
        self.tables["lateness"].append(
            1, source, t_s, late_p50_s, late_p99_s, late_max_s, events, missed
        )

    # Checkpoints.

    def save(self) -> dict[str, Any]:
        """Everything on disk, and what is needed to `go_on` from here."""
        self._flush()
        sizes_bytes = {name: writer.size_bytes for name, writer in self.tables.items()}
        return {"records": self, "sizes_bytes": sizes_bytes}

    def go_on(self, saved: dict[str, Any]) -> None:
        """Be where `save` was: what was recorded after it is forgotten."""
        for name, writer in self.tables.items():
            writer.go_on_at(saved["sizes_bytes"].get(name, 0))
        put_back(self, saved["records"])

    def keep_checkpoint(self, data: bytes) -> None:
        """Put a checkpoint in place of the one before it, in one step."""
        part = self.folder / f"{CHECKPOINT}.part"
        with _map_os_errors(self.folder):
            part.write_bytes(data)
            os.replace(part, self.folder / CHECKPOINT)

    # To disk.

    def flush(self, now_s: float | None = None, *, now: bool = False) -> None:
        """Hand all buffered rows to the operating system, unless that was just done.

        ``now`` insists: a live run does it once before its clock starts, since the first flush
        makes the libraries load what they need (some 0.2 s).
        """
        if now_s is not None:
            self._last_s = now_s
        if now or time.monotonic() - self._flushed >= FLUSH_S:
            self._flush()

    def _flush(self) -> None:
        for writer in self.tables.values():
            writer.flush()
        self._flushed = time.monotonic()

    def close(
        self, exit_status: str = "ok", *, error: str = "", duration_s: float | None = None
    ) -> None:
        """End the recording: Parquet files, and the last facts of the manifest."""
        if self._closed:
            return
        self._closed = True
        held = np.flatnonzero(~np.isnan(self._held_s))
        if len(held):
            readings = GpuReadings.of(self._held[held])
            self._put_gpus(self._held_s[held], held, readings)
        wall_s = time.monotonic() - self._started
        for writer in self.tables.values():
            writer.close()
        if exit_status == "ok":
            (self.folder / CHECKPOINT).unlink(missing_ok=True)
        if not (self.folder / CHECKPOINT).exists():  # a run that can be gone on with stays streams
            _streams_to_parquet(self.folder)
        self.manifest |= {
            "exit_status": exit_status,
            "error": error,
            "ended_utc": utc_now(),
            "wall_s": wall_s,
            "duration_s": self._last_s if duration_s is None else duration_s,
        }
        write_json(self.folder / "manifest.json", self.manifest)
        os.close(self._lock)


def finalise(folder: Path | str) -> None:
    """Close a recording whose process was killed. Does nothing to one that is closed.

    Raises:
        RecordingError: it is no recording, or it is still being written.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        raise RecordingError(f"recording {folder}: no readable manifest.json: {error}") from None
    with _map_os_errors(folder):
        lock = lock_folder(folder)
        try:
            if not (folder / CHECKPOINT).exists():
                _streams_to_parquet(folder)
            if manifest.get("exit_status") == "running":
                manifest["exit_status"] = "killed"
                write_json(folder / "manifest.json", manifest)
        finally:
            os.close(lock)


def new_run_folder(out: Path | str, name: str) -> Path:
    """A folder not yet there, named by time and run: ``runs/20260102-030405-name``."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = Path(out) / f"{stamp}-{name}"
    for again in range(2, 1000):
        with _map_os_errors(folder), contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
        folder = Path(out) / f"{stamp}-{name}-{again}"
    raise RecordingError(f"recording {folder}: no free name")


def write_summary(folder: Path | str, summary: Mapping[str, Any]) -> None:
    """summary.json of a recording; replaces one that is there."""
    with _map_os_errors(Path(folder)):
        write_json(Path(folder) / "summary.json", summary)


# Parquet.


def read_stream(path: Path) -> tuple[Any, Iterator[Any]]:
    """Schema and batches of a stream, up to where it was cut off. No schema if cut off there.

    >>> read_stream(Path("no/such.arrows"))[0] is None
    True
    """
    try:
        reader = pa.ipc.open_stream(pa.memory_map(str(path)))
    except (pa.ArrowInvalid, OSError):
        return None, iter(())
    return reader.schema, _batches(reader)


def _batches(reader: Any) -> Iterator[Any]:
    while True:
        try:
            yield reader.read_next_batch()
        except (StopIteration, pa.ArrowInvalid, OSError):
            return


def _streams_to_parquet(folder: Path) -> None:
    for stream in sorted(folder.glob("*.arrows")):
        _to_parquet(stream, stream.with_suffix(".parquet"))
        stream.unlink()


def _to_parquet(stream: Path, target: Path) -> None:
    schema, batches = read_stream(stream)
    if schema is None:
        return
    part = target.with_suffix(".parquet.part")
    # Everything that a later pyarrow might choose differently is said here.
    with pq.ParquetWriter(
        part,
        schema,
        compression="zstd",
        compression_level=3,
        version="2.6",
        data_page_version="1.0",
    ) as writer:
        for rows in _regroup(schema, batches):
            writer.write_table(rows, row_group_size=ROW_GROUP_ROWS)
    os.replace(part, target)


def _regroup(schema: Any, batches: Iterator[Any]) -> Iterator[Any]:
    """Tables of ROW_GROUP_ROWS rows and a rest, in one chunk each."""
    held: list[Any] = []
    count = 0
    for batch in batches:
        held.append(batch)
        count += batch.num_rows
        if count >= ROW_GROUP_ROWS:
            rows = pa.Table.from_batches(held, schema=schema)
            whole = count // ROW_GROUP_ROWS * ROW_GROUP_ROWS
            for start in range(0, whole, ROW_GROUP_ROWS):
                yield rows.slice(start, ROW_GROUP_ROWS).combine_chunks()
            held = rows.slice(whole).to_batches()
            count -= whole
    if count:
        yield pa.Table.from_batches(held, schema=schema).combine_chunks()


# Manifest.


def lock_folder(folder: Path) -> int:
    """A file descriptor that holds the folder's lock.

    Raises:
        RecordingError: another process holds it, so the run is still going on.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise RecordingError(f"recording {folder}: still being written") from None
    return descriptor


def write_json(path: Path, tree: Mapping[str, Any]) -> None:
    """A JSON file, replaced in one step: a reader sees the old one or the new one."""
    part = path.with_suffix(".json.part")
    part.write_text(json.dumps(tree, indent=2, allow_nan=False) + "\n")
    os.replace(part, path)


def utc_now() -> str:
    """The wall clock, for the manifest."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _new_manifest(run_id: str, spec: RunSpec, meta: dict[str, Any]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "run_id": run_id,
        "name": spec.name,
        "mode": spec.mode,
        "seed": spec.seed,
        "exit_status": "running",
        "error": "",
        "started_utc": utc_now(),
        "ended_utc": None,
        "wall_s": None,
        "duration_s": None,
        "spec": msgspec.to_builtins(spec),
        "meta": meta,
        "versions": {"python": platform.python_version(), **_versions()},
        "host": {
            "name": platform.node(),
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "argv": sys.argv[1:],
        },
        "git": git_commit(Path(__file__).resolve().parent),
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def git_commit(start: Path) -> str | None:
    """Commit checked out around ``start``, read without a child process; None outside of git."""
    for folder in (start, *start.parents):
        head = folder / ".git" / "HEAD"
        if head.is_file():
            break
    else:
        return None
    text = head.read_text().strip()
    if not text.startswith("ref: "):
        return text
    loose = head.parent / text[5:]
    if loose.is_file():
        return loose.read_text().strip()
    packed = head.parent / "packed-refs"
    lines = packed.read_text().splitlines() if packed.is_file() else []
    return next((line.split()[0] for line in lines if line.endswith(text[5:])), None)


@contextlib.contextmanager
def _map_os_errors(folder: Path) -> Iterator[None]:
    """Full disks and forbidden folders, in our own words."""
    try:
        yield
    except OSError as error:
        raise RecordingError(f"recording {folder}: {error.strerror or error}") from None
