"""A recording in the formats of others: CSV, a timeline for Perfetto, metrics for Prometheus."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.csv

from testbed.analysis.energy import THROTTLE_REASONS, held_s
from testbed.analysis.series import edges, grid
from testbed.analysis.summary import run_duration_s
from testbed.core.errors import RecordingError
from testbed.core.names import parent
from testbed.recorder.reader import Recording, Source

FORMATS = ("csv", "perfetto", "prometheus")
COUNTER_POINTS = 1000
"""Points of one counter in a timeline; Perfetto stays quick with some million events."""


def export(source: Source, kind: str, out: Path | None = None) -> Path:
    """Write a recording as ``kind`` beside its tables, or to ``out``, and say where.

    Raises:
        RecordingError: no such format.
    """
    recording = Recording.open(source)
    if kind == "csv":
        return export_csv(recording, out or recording.folder / "csv")
    if kind == "perfetto":
        path = out or recording.folder / "timeline.json"
        path.write_text(json.dumps(perfetto(recording), separators=(",", ":")), encoding="utf-8")
        return path
    if kind == "prometheus":
        path = out or recording.folder / "metrics.prom"
        path.write_text(prometheus(recording), encoding="utf-8")
        return path
    raise RecordingError(f"export: format {kind!r} is none of {', '.join(FORMATS)}")


def export_csv(recording: Recording, folder: Path) -> Path:
    """One CSV file per table, and units.csv with the unit of every column."""
    folder.mkdir(parents=True, exist_ok=True)
    units = ["table,column,unit"]
    for name in recording.names():
        table = recording.table(name)
        pyarrow.csv.write_csv(table, folder / f"{name}.csv")
        units += [f'{name},{column},"{unit}"' for column, unit in recording.units(name).items()]
    (folder / "units.csv").write_text("\n".join(units) + "\n", encoding="utf-8")
    return folder


# Perfetto (ui.perfetto.dev, chrome://tracing): the JSON trace event format, times in microseconds.


def perfetto(recording: Recording) -> dict[str, Any]:
    """A timeline: requests on their instances, counters of GPUs and rows, commands and events."""
    events: list[dict[str, Any]] = []
    events.extend(_instances(recording))
    events.extend(_requests(recording))
    events.extend(_gpu_counters(recording))
    events.extend(_row_counters(recording))
    events.extend(_instants(recording))
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"run_id": recording.run_id, "mode": str(recording.manifest["mode"])},
    }


_CLUSTER = 1
_FIRST_INSTANCE = 1000
_FIRST_NODE = 1_000_000


def _named(pid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": pid, "name": "process_name", "args": {"name": name}}


def _us(t_s: float) -> float:
    return round(float(t_s) * 1e6, 3)


def _instances(recording: Recording) -> Iterator[dict[str, Any]]:
    yield _named(_CLUSTER, "cluster")
    for place, name in enumerate(recording.columns("instance_index", "name")["name"]):
        yield _named(_FIRST_INSTANCE + place, str(name))


def _requests(recording: Recording) -> Iterator[dict[str, Any]]:
    """Each request as a slice, with its wait for the first token and its decoding inside."""
    for row in recording.table("requests").to_pylist():
        end_s = row["finished_seen_s"]
        first_s = row["first_token_seen_s"]
        if np.isnan(end_s):
            continue
        pid = _FIRST_INSTANCE + row["instance"] if row["instance"] >= 0 else _CLUSTER
        common = {"cat": "request", "id": row["request_id"], "pid": pid, "tid": 0}
        facts = {
            key: row[key]
            for key in ("tenant", "slo_class", "prompt_tokens", "image_tokens", "output_tokens",
                        "status", "preemptions", "attempts")
        }  # fmt: skip
        name = f"request {row['request_id']}"
        start = common | {"ph": "b", "name": name, "ts": _us(row["arrival_s"]), "args": facts}
        yield start
        if not np.isnan(first_s):
            yield common | {"ph": "b", "name": "first token", "ts": _us(row["arrival_s"])}
            yield common | {"ph": "e", "name": "first token", "ts": _us(first_s)}
            yield common | {"ph": "b", "name": "decode", "ts": _us(first_s)}
            yield common | {"ph": "e", "name": "decode", "ts": _us(end_s)}
        yield common | {"ph": "e", "name": name, "ts": _us(end_s)}


def _gpu_counters(recording: Recording) -> Iterator[dict[str, Any]]:
    index = recording.columns("gpu_index", "name", "node")
    names = [str(name) for name in index["name"]]
    at = recording.columns("gpus", "t_s", "gpu")
    if not len(at["t_s"]):
        return
    for name, node in dict(
        zip((parent(name) for name in names), index["node"], strict=True)
    ).items():
        yield _named(_FIRST_NODE + int(node), str(name))
    duration_s = run_duration_s(recording)
    bins = edges(duration_s, int(np.clip(len(at["t_s"]) / max(len(names), 1), 1, COUNTER_POINTS)))
    for column, label in (
        ("power_avg_w", "power (W)"),
        ("power_limit_enforced_w", "limit (W)"),
        ("sm_clock_mhz", "SM clock (MHz)"),
        ("temp_c", "temperature (degC)"),
    ):
        values = recording.columns("gpus", column)[column]
        matrix = grid(at["t_s"], at["gpu"], values, len(names), bins)
        for gpu, name in enumerate(names):
            known = ~np.isnan(matrix[:, gpu])
            change = np.append(True, np.diff(matrix[:, gpu]) != 0) & known
            pid = _FIRST_NODE + int(index["node"][gpu])
            title = f"{name.rpartition('/')[2]} {label}"
            for place in np.flatnonzero(change):
                value = round(float(matrix[place, gpu]), 2)
                yield {"ph": "C", "pid": pid, "name": title, "ts": _us(bins[place]),
                       "args": {"value": value}}  # fmt: skip


def _row_counters(recording: Recording) -> Iterator[dict[str, Any]]:
    names = recording.columns("row_index", "name")["name"]
    rows = recording.columns("rows", "t_s", "row", "draw_w", "budget_w")
    per_row = len(rows["t_s"]) // max(len(names), 1)
    every = max(1, per_row // COUNTER_POINTS)
    for row, name in enumerate(names):
        own = np.flatnonzero(rows["row"] == row)[::every]
        for place in own:
            args = {"draw (W)": round(float(rows["draw_w"][place]), 2)}
            yield {"ph": "C", "pid": _CLUSTER, "name": f"{name} draw (W)",
                   "ts": _us(rows["t_s"][place]), "args": args}  # fmt: skip


def _instants(recording: Recording) -> Iterator[dict[str, Any]]:
    mark = {"ph": "i", "pid": _CLUSTER}
    for event in recording.table("events").to_pylist():
        facts = {"source": event["source"], "level": event["level"], "text": event["text"]}
        place = {"s": "g", "tid": 0, "name": event["kind"], "ts": _us(event["t_s"])}
        yield mark | place | {"args": facts}
    for row in recording.table("commands").to_pylist():
        facts = {key: row[key] for key in ("target", "value", "outcome", "winner", "why")}
        name = f"{row['policy']}: {row['kind']}"
        yield mark | {"s": "p", "tid": 1, "name": name, "ts": _us(row["t_s"]), "args": facts}


# Prometheus: the last state of the run under the names of dcgm-exporter and vLLM.

_Sample = tuple[dict[str, str], float]


def prometheus(recording: Recording) -> str:
    """The text format, as dcgm-exporter and vLLM would have been scraped at the end of the run."""
    return "".join(
        _family(name, kind, about, samples)
        for name, kind, about, samples in (*_dcgm(recording), *_vllm(recording))
        if samples
    )


def _family(name: str, kind: str, about: str, samples: list[_Sample]) -> str:
    lines = [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
    for labels, value in samples:
        inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
        lines.append(f"{name}{{{inside}}} {value:.10g}")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    r"""Text inside a label's quotes.

    >>> print(_escaped('a "b"'))
    a \"b\"
    """
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _dcgm(recording: Recording) -> Iterator[tuple[str, str, str, list[_Sample]]]:
    table = recording.columns("gpus")
    gpu = table["gpu"]
    # The last row of each GPU: NumPy keeps the first of reversed ones.
    keys, reverse = np.unique(gpu[::-1], return_index=True)
    last = len(gpu) - 1 - reverse
    index = recording.columns("gpu_index", "name")["name"]
    info = {row["gpu"]: row for row in recording.table("gpu_info").to_pylist()}
    labels = [_gpu_labels(str(index[key]), info.get(int(key), {})) for key in keys]
    mib = 1 / 2**20
    fields = [
        ("POWER_USAGE", "gauge", "Power draw (in W).", "power_avg_w", 1.0),
        ("TOTAL_ENERGY_CONSUMPTION", "counter", "Total energy consumption since boot (in mJ).",
         "energy_j", 1e3),
        ("SM_CLOCK", "gauge", "SM clock frequency (in MHz).", "sm_clock_mhz", 1.0),
        ("GPU_TEMP", "gauge", "GPU temperature (in C).", "temp_c", 1.0),
        ("MEMORY_TEMP", "gauge", "Memory temperature (in C).", "mem_temp_c", 1.0),
        ("GPU_UTIL", "gauge", "GPU utilization (in %).", "gpu_busy_frac", 100.0),
        ("FB_USED", "gauge", "Framebuffer memory used (in MiB).", "fb_used_bytes", mib),
        ("ENFORCED_POWER_LIMIT", "gauge", "Enforced power limit (in W).",
         "power_limit_enforced_w", 1.0),
    ]  # fmt: skip
    for name, kind, about, column, scale in fields:
        values = table[column][last] * scale
        yield f"DCGM_FI_DEV_{name}", kind, about, list(zip(labels, values, strict=True))
    free = [
        (label, (info[int(key)]["memory_total_bytes"] - table["fb_used_bytes"][place]) * mib)
        for label, key, place in zip(labels, keys, last, strict=True)
        if int(key) in info
    ]
    yield "DCGM_FI_DEV_FB_FREE", "gauge", "Framebuffer memory free (in MiB).", free
    capped = (table["throttle"] & THROTTLE_REASONS["sw_power_cap"]) != 0
    held = np.bincount(gpu, held_s(table["t_s"], gpu) * capped) if len(gpu) else np.zeros(0)
    violation = list(zip(labels, held[keys] * 1e9, strict=True)) if len(gpu) else []
    about = "Throttling duration due to power constraints (in ns)."
    yield "DCGM_FI_DEV_POWER_VIOLATION", "counter", about, violation


def _gpu_labels(name: str, info: dict[str, Any]) -> dict[str, str]:
    number = name.rpartition("gpu")[2]
    return {
        "gpu": number,
        "UUID": str(info.get("uuid", "")),
        "device": f"nvidia{number}",
        "modelName": str(info.get("model", "")),
        "hostname": parent(name),
    }


def _vllm(recording: Recording) -> Iterator[tuple[str, str, str, list[_Sample]]]:
    table = recording.columns("instances")
    keys, reverse = np.unique(table["instance"][::-1], return_index=True)
    last = len(table["instance"]) - 1 - reverse
    index = recording.columns("instance_index")
    pools = recording.columns("pool_index", "name")["name"]
    models = {pool["name"]: pool["model"] for pool in recording.manifest["spec"]["pool"]}
    labels = [
        {
            "engine": str(index["name"][key]),
            "model_name": str(models.get(pools[index["pool_index"][key]], ""))
            if index["pool_index"][key] >= 0
            else "",
        }
        for key in keys
    ]
    for name, kind, about, column in (
        ("num_requests_running", "gauge", "Requests in the batch.", "num_running"),
        ("num_requests_waiting", "gauge", "Requests waiting.", "num_waiting"),
        ("kv_cache_usage_perc", "gauge", "KV cache usage; 1 is 100 percent.", "kv_used_frac"),
        ("num_preemptions_total", "counter", "Preemptions.", "preemptions_total"),
        ("prompt_tokens_total", "counter", "Prefill tokens.", "prompt_tokens_total"),
        ("generation_tokens_total", "counter", "Output tokens.", "output_tokens_total"),
    ):
        yield f"vllm:{name}", kind, about, list(zip(labels, table[column][last], strict=True))
