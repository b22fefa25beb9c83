"""The summary of a run: one object of numbers, from its recording alone.

``summary.json`` and every ``--json`` output are this object. What cannot be known is None, never
NaN. Counting rules are with the functions that apply them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from testbed.analysis import layouts
from testbed.analysis.energy import energy_j, held_s, read_rows, throttle_s
from testbed.analysis.latency import (
    itl_counts,
    itl_percentiles,
    percentiles,
    request_parts,
)
from testbed.analysis.ledger import ledger
from testbed.analysis.series import edges, grid
from testbed.core.view import Floats, Ints
from testbed.recorder.reader import Recording, Source
from testbed.recorder.writer import write_summary

LATE_FRAC = 0.5
"""A live run is invalid when its p99 lateness is above this share of the sampling period (unless
its manifest names a ``late_limit_s``): then samples and decisions no longer are when they claim."""
MISSED_FRAC = 0.01
"""... or when more than this share of its events missed their period."""


def summarise(source: Source) -> dict[str, Any]:
    """The summary object of a run."""
    recording = Recording.open(source)
    ledgered = ledger(recording)
    total_j, slowed_s, by_reason = _gpus(recording)
    duration_s = run_duration_s(recording)
    because = invalid_because(recording)
    totals, latencies = _read_requests(recording)
    tokens = _tokens(totals)
    attained = sum(total.attained for total in totals)
    return {
        "run_id": recording.run_id,
        "name": recording.manifest["name"],
        "mode": recording.manifest["mode"],
        "seed": recording.manifest["seed"],
        "duration_s": duration_s,
        "wall_s": recording.manifest["wall_s"],
        "requests": _requests(totals),
        "classes": _classes(latencies, totals),
        "ttft_s": percentiles(_joined(latencies, "ttft_s")),
        "itl_s": itl_percentiles(itl_counts(recording).sum(axis=0)),
        "e2e_s": percentiles(_joined(latencies, "e2e_s")),
        "goodput_rps": attained / duration_s if duration_s else None,
        "tokens": tokens,
        "energy_j": total_j,
        "energy_per_output_token_j": (
            total_j / tokens["output"] if total_j is not None and tokens["output"] else None
        ),
        **_power(recording, duration_s),
        "throttle_s": slowed_s,
        "throttle_by_reason_s": by_reason,
        "memory": _memory(recording, duration_s),
        **_layout(recording, duration_s),
        "ledger": ledgered,
        "commands": _commands(recording, duration_s),
        "lateness_s": _lateness(recording),
        "valid": not because,
        "invalid_because": because,
    }


def _gpus(recording: Recording) -> tuple[float | None, float, dict[str, float]]:
    """Energy of all GPUs, and how long they were slowed down, in all and by reason."""
    gpus = recording.columns("gpus", "t_s", "gpu", "energy_j", "throttle")
    energy = energy_j(gpus["gpu"], gpus["energy_j"])
    slowed_s, by_reason = throttle_s(gpus["t_s"], gpus["gpu"], gpus["throttle"])
    return sum(energy.values()) if energy else None, slowed_s, by_reason


def write(source: Source) -> dict[str, Any]:
    """Make the summary and keep it as summary.json."""
    recording = Recording.open(source)
    summary = summarise(recording)
    write_summary(recording.folder, summary)
    return summary


def run_duration_s(recording: Recording) -> float:
    """How long the run was on its own clock; to its last sample where it was cut off."""
    said = recording.manifest.get("duration_s")
    if said is not None:
        return float(said)
    ends = [recording.table(name, ["t_s"])["t_s"].to_numpy() for name in ("gpus", "rows")]
    return max((float(t_s.max()) for t_s in ends if len(t_s)), default=0.0)


class Total(NamedTuple):
    """Requests of one class that ended in one way."""

    slo_class: str
    status: str
    requests: int
    input_tokens: int
    image_tokens: int
    output_tokens: int
    attained: int


@dataclass(slots=True)
class _Latencies:
    """Of one class: its limits, and what its requests took, in parts as they were read."""

    ttft_limit_s: float
    tpot_limit_s: float
    ttft_s: list[Floats] = field(default_factory=list)
    tpot_s: list[Floats] = field(default_factory=list)
    e2e_s: list[Floats] = field(default_factory=list)


def _joined(latencies: dict[str, _Latencies], column: str) -> Floats:
    """One column of all classes."""
    parts = [part for found in latencies.values() for part in getattr(found, column)]
    return np.concatenate(parts) if parts else np.zeros(0)


def _read_requests(recording: Recording) -> tuple[list[Total], dict[str, _Latencies]]:
    """Counts of all requests, and latencies of the recorded ones by class.

    Counts are of their rows, or as the run kept them where it thinned those. Of tens of millions of
    requests three numbers each are held, and no more.
    """
    counts: defaultdict[tuple[str, str], Ints] = defaultdict(lambda: np.zeros(5, np.int64))
    latencies: dict[str, _Latencies] = {}
    for part in request_parts(recording):
        tokens = (part.prompt_tokens, part.image_tokens, part.output_tokens)
        columns = (np.ones(len(part.status), np.int64), *tokens, part.attained)
        for name in sorted(set(part.slo_class)):
            inside = part.slo_class == name
            for status in sorted(set(part.status[inside])):
                mine = inside & (part.status == status)
                counts[name, status] += [int(column[mine].sum()) for column in columns]
            if name not in latencies:
                first = int(inside.argmax())
                latencies[name] = _Latencies(
                    float(part.ttft_limit_s[first]), float(part.tpot_limit_s[first])
                )
            for column in ("ttft_s", "tpot_s", "e2e_s"):
                getattr(latencies[name], column).append(getattr(part, column)[inside])
    kept = _kept_counts(recording)
    return [Total(*key, *row.tolist()) for key, row in sorted((kept or counts).items())], latencies


def _kept_counts(recording: Recording) -> dict[tuple[str, str], Ints]:
    """What a run that thins its requests counted of all of them, by class and status."""
    table = recording.columns("request_totals")
    keys = set(zip(table["slo_class"].tolist(), table["status"].tolist(), strict=True))
    columns = (
        "requests_count", "prompt_tokens", "image_tokens", "output_tokens", "attained_count",
    )  # fmt: skip
    return {
        (slo_class, status): np.array([table[name][mine].sum() for name in columns], np.int64)
        for slo_class, status in keys
        for mine in [(table["slo_class"] == slo_class) & (table["status"] == status)]
    }


def _attained_frac(totals: list[Total]) -> float | None:
    """Share of ended requests that met their SLO; those still in flight are not counted."""
    ended = sum(total.requests for total in totals if total.status != "in_flight")
    return sum(total.attained for total in totals) / ended if ended else None


def _requests(totals: list[Total]) -> dict[str, Any]:
    counts = {
        status: sum(total.requests for total in totals if total.status == status)
        for status in ("completed", "rejected", "lost", "in_flight")
    }
    return {
        "arrived": sum(total.requests for total in totals),
        **counts,
        "slo_attained_frac": _attained_frac(totals),
    }


def _classes(latencies: dict[str, _Latencies], totals: list[Total]) -> dict[str, Any]:
    found = {}
    for name in sorted({total.slo_class for total in totals}):
        of_class = [total for total in totals if total.slo_class == name]
        known = latencies.get(name)
        only = {name: known} if known else {}
        found[name] = {
            "arrived": sum(total.requests for total in of_class),
            "completed": sum(total.requests for total in of_class if total.status == "completed"),
            "slo_attained_frac": _attained_frac(of_class),
            "ttft_limit_s": known.ttft_limit_s if known else None,
            "tpot_limit_s": known.tpot_limit_s if known else None,
            "ttft_s": percentiles(_joined(only, "ttft_s")),
            "tpot_s": percentiles(_joined(only, "tpot_s")),
        }
    return found


def _tokens(totals: list[Total]) -> dict[str, int]:
    """Tokens of completed requests: text in, images in, out."""
    done = [total for total in totals if total.status == "completed"]
    return {
        "input": sum(total.input_tokens for total in done),
        "image": sum(total.image_tokens for total in done),
        "output": sum(total.output_tokens for total in done),
    }


def _power(recording: Recording, duration_s: float) -> dict[str, Any]:
    """Draw of the cluster, and breaches of row budgets, both by the 1-second mean."""
    rows = read_rows(recording)
    total_w = rows.total_w
    power: dict[str, float | None] = dict.fromkeys(("mean", "p99", "max"))
    if len(total_w):
        held = held_s(rows.t_s, np.zeros(len(rows.t_s), np.int64))
        mean_w = np.average(total_w, weights=held) if held.any() else total_w.mean()
        power = {
            "mean": float(mean_w),
            "p99": float(np.quantile(total_w, 0.99)),
            "max": float(total_w.max()),
        }
    breaches = rows.breaches(duration_s)
    return {
        "power_w": power,
        "breaches": {
            "count": len(breaches),
            "s": float(sum(breach.s for breach in breaches)),
            "longest_s": max((breach.s for breach in breaches), default=0.0),
            "max_over_w": max((breach.max_over_w for breach in breaches), default=0.0),
        },
    }


def _memory(recording: Recording, duration_s: float) -> dict[str, Any]:
    """Host memory of the tenants; sums are over all tenants at one time."""
    index = recording.columns("tenant_index")
    table = recording.columns("tenants")
    count = len(index["name"])
    if not count or not len(table["t_s"]):
        return {"tenants": count}
    key = table["tenant_index"]
    bins = edges(duration_s, int(np.clip(duration_s, 1, 5000)))

    def together(column: str) -> Any:
        return np.nansum(grid(table["t_s"], key, table[column], count, bins, "last"), axis=1)

    def increments(column: str) -> int:
        return int(sum(energy_j(key, table[column].astype(np.float64)).values()))

    return {
        "tenants": count,
        "sold_bytes": int(index["memory_bytes"].sum()),
        "guaranteed_bytes": int(index["guaranteed_bytes"].sum()),
        "limit_min_bytes": int(together("limit_bytes").min()),
        "current_max_bytes": int(together("current_bytes").max()),
        "working_set_max_bytes": int(together("working_set_bytes").max()),
        "swap_max_bytes": int(together("swap_bytes").max()),
        "major_faults": increments("major_faults_total"),
        "refaults": increments("refaults_total"),
        "pressure_some_p99_frac": float(np.quantile(table["pressure_some_frac"], 0.99)),
        "slowdown_mean_frac": float(table["slowdown_frac"].mean()),
        "frozen_s": float(held_s(table["t_s"], key)[table["frozen"]].sum()),
    }


def _layout(recording: Recording, duration_s: float) -> dict[str, Any]:
    """How instances changed, in runs where they do."""
    if not recording.spec.cluster.elastic:
        return {}
    return {"layout": layouts.summary(recording, duration_s)}


def _commands(recording: Recording, duration_s: float) -> dict[str, Any]:
    """Commands by outcome, one for each device that a limit was set on."""
    outcomes = ("sent", "refused", "expired", "overruled", "unchanged")
    counts: dict[str, Any] = dict.fromkeys(outcomes, 0)
    sent: Counter[tuple[str, int]] = Counter()
    for part in recording.batches("commands", ("kind", "target_index", "outcome")):
        for name in outcomes:
            counts[name] += int((part["outcome"] == name).sum())
        was_sent = part["outcome"] == "sent"
        sent.update(zip(part["kind"][was_sent], part["target_index"][was_sent], strict=True))
    minutes = duration_s / 60
    busiest = max(sent.values(), default=0)
    counts["per_min"] = counts["sent"] / minutes if minutes else None
    counts["per_target_per_min_max"] = busiest / minutes if minutes else None
    return counts


def _lateness(recording: Recording) -> dict[str, Any]:
    """Of the least punctual loop; None in virtual time, which is never late."""
    last = last_lateness(recording)
    if not last:
        return {"p50": None, "p99": None, "max": None, "missed": 0}
    return {
        "p50": max(row["late_p50_s"] for row in last),
        "p99": max(row["late_p99_s"] for row in last),
        "max": max(row["late_max_s"] for row in last),
        "missed": sum(row["missed"] for row in last),
    }


def last_lateness(recording: Recording) -> list[dict[str, Any]]:
    """The last account of each loop."""
    rows = recording.table("lateness").to_pylist()
    return list({row["source"]: row for row in rows}.values())


def late_limit_s(recording: Recording) -> float:
    """Lateness (p99) above which a live run does not count."""
    said = recording.manifest["meta"].get("late_limit_s")
    period_s = recording.manifest["spec"]["control"]["sample_period_s"]
    return float(said) if said is not None else LATE_FRAC * float(period_s)


def invalid_because(recording: Recording) -> list[str]:
    """Why the run does not count; empty if it does."""
    because = []
    status = recording.manifest["exit_status"]
    if status == "running":
        status = "still running" if recording.state == "running" else "killed"
    if status != "ok":
        error = recording.manifest.get("error")
        because.append(f"the run is {status}" + (f": {error}" if error else ""))
    limit_s = late_limit_s(recording)
    for row in last_lateness(recording):
        if row["late_p99_s"] > limit_s:
            because.append(
                f"{row['source']} was late: p99 {row['late_p99_s'] * 1e3:.1f} ms, "
                f"limit {limit_s * 1e3:.1f} ms"
            )
        if row["missed"] > MISSED_FRAC * row["events"]:
            because.append(f"{row['source']} missed {row['missed']} of {row['events']} events")
    return because
