"""Latencies of a recording: per request from the requests table, gaps between tokens from counts.

Times are the client's: a token counts when the coordinator saw it. A request attains its SLO when
it was completed with its TTFT and its mean time per output token within the limits of its class;
a rejected or lost request does not, and one still in flight at the end is not counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from testbed.core.errors import RecordingError
from testbed.core.view import Bools, Floats, Ints
from testbed.recorder.reader import Recording
from testbed.recorder.tables import ITL_BINS, itl_edges_s

QUANTILES = {"p50": 0.50, "p90": 0.90, "p99": 0.99}


@dataclass(frozen=True, slots=True)
class Requests:
    """The requests table, as arrays, with what follows from it."""

    status: NDArray[Any]
    slo_class: NDArray[Any]
    pool: NDArray[Any]
    instance: Ints
    arrival_s: Floats
    ttft_s: Floats
    """NaN where there was no first token."""
    tpot_s: Floats
    """NaN for requests without a second token."""
    e2e_s: Floats
    ttft_limit_s: Floats
    tpot_limit_s: Floats
    prompt_tokens: Ints
    image_tokens: Ints
    output_tokens: Ints
    num_images: Ints

    @property
    def completed(self) -> Bools:
        """Which were served to the end."""
        return np.asarray(self.status == "completed")

    @property
    def ended(self) -> Bools:
        """Which count for the SLO: all but those in flight when the run ended."""
        return np.asarray(self.status != "in_flight")

    @property
    def attained(self) -> Bools:
        """Which met both limits of their class."""
        slow = (self.ttft_s > self.ttft_limit_s) | (self.tpot_s > self.tpot_limit_s)
        return np.asarray(self.completed & ~slow)

    def attained_frac(self, among: Bools | None = None) -> float | None:
        """Share of ended requests (``among`` some) that met their SLO."""
        counted = self.ended if among is None else self.ended & among
        return float(self.attained[counted].mean()) if counted.any() else None


def read_requests(recording: Recording) -> Requests:
    """The requests of a recording, all at once."""
    parts = [_columns_of(batch) for batch in recording.batches("requests", _COLUMNS)]
    names = [entry.name for entry in fields(Requests)]
    columns = {}
    for name in names:  # one after the other, so that little is there twice
        columns[name] = np.concatenate([part[name] for part in parts])
        for part in parts:
            del part[name]
    return Requests(**columns)


def request_parts(recording: Recording) -> Iterator[Requests]:
    """The requests of a recording, a part at a time: there may be tens of millions."""
    for batch in recording.batches("requests", _COLUMNS):
        yield Requests(**_columns_of(batch))


_COLUMNS = (
    "status", "slo_class", "pool", "instance", "arrival_s", "first_token_seen_s",
    "finished_seen_s", "ttft_limit_s", "tpot_limit_s", "prompt_tokens", "image_tokens",
    "output_tokens", "num_images",
)  # fmt: skip


def _columns_of(table: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    first_s, finished_s = table["first_token_seen_s"], table["finished_seen_s"]
    gaps = table["output_tokens"] - 1
    completed = table["status"] == "completed"
    tpot_s = np.full(len(gaps), np.nan)
    np.divide(finished_s - first_s, gaps, out=tpot_s, where=completed & (gaps > 0))
    kept = (
        "status", "slo_class", "pool", "instance", "arrival_s", "ttft_limit_s", "tpot_limit_s",
        "prompt_tokens", "image_tokens", "output_tokens", "num_images",
    )  # fmt: skip
    return {name: table[name] for name in kept} | {
        "ttft_s": first_s - table["arrival_s"],
        "tpot_s": tpot_s,
        "e2e_s": np.where(completed, finished_s - table["arrival_s"], np.nan),
    }


def token_times_s(recording: Recording, request_id: int) -> Floats:
    """When each token of a completed request was made on its node, first to last.

    From the table ``segments`` (``record.segments``): between its first token and its last, every
    iteration of its instance made one token of it.

    Raises:
        RecordingError: no such request, or one that was preempted, whose pauses segments do not
            show; or the run kept no segments.
    """
    table = recording.table("requests")
    rows = np.flatnonzero(table["request_id"].to_numpy() == request_id)
    request = table.slice(int(rows[0]), 1).to_pylist()[0] if len(rows) else {"status": "not there"}
    if request["status"] != "completed" or request["preemptions"]:
        how = "preempted" if request.get("preemptions") else request["status"]
        raise RecordingError(f"recording {recording.folder}: request {request_id} is {how}")
    segments = recording.columns(
        "segments", "instance", "t_start_s", "iterations", "first_s", "growth_s", "num_seqs"
    )
    first_s, last_s = request["first_token_s"], request["finished_s"]
    mine = (segments["instance"] == request["instance"]) & (segments["num_seqs"] > 0)
    mine &= (segments["t_start_s"] >= first_s) & (segments["t_start_s"] < last_s)
    times_s = [np.array([first_s])]
    for index in np.flatnonzero(mine):
        done = np.arange(1, segments["iterations"][index] + 1)
        times_s.append(
            segments["t_start_s"][index]
            + done * segments["first_s"][index]
            + 0.5 * done * (done - 1) * segments["growth_s"][index]
        )
    made_s = np.concatenate(times_s)
    if len(made_s) != request["output_tokens"]:
        raise RecordingError(
            f"recording {recording.folder}: segments show {len(made_s)} of "
            f"{request['output_tokens']} tokens of request {request_id}; was record.segments on?"
        )
    return made_s


def percentiles(values: Floats) -> dict[str, float | None]:
    """p50, p90 and p99, without the NaN; None where there is nothing.

    >>> percentiles(np.array([1.0, 2.0, 3.0, np.nan]))
    {'p50': 2.0, 'p90': 2.8, 'p99': 2.98}
    """
    known = values[~np.isnan(values)]
    if not len(known):
        return dict.fromkeys(QUANTILES)
    # `known` is a copy already: sorting it in place takes no more memory.
    found = np.quantile(known, list(QUANTILES.values()), overwrite_input=True)
    return dict(zip(QUANTILES, found.tolist(), strict=True))


def itl_counts(recording: Recording) -> Ints:
    """Counts of gaps between tokens: one row per instance, one column per bin."""
    table = recording.table("itl", ["instance", "bin", "count"])
    if not table.num_rows:
        return np.zeros((0, ITL_BINS), np.int64)
    instance, place, count = (column.to_numpy() for column in table.columns)
    instances = int(instance.max()) + 1
    cell = instance.astype(np.int64) * ITL_BINS + place
    counts = np.bincount(cell, count, minlength=instances * ITL_BINS)
    return counts.astype(np.int64).reshape(instances, ITL_BINS)


def itl_percentiles(counts: Ints) -> dict[str, float | None]:
    """p50, p90 and p99 of counts per bin, interpolated inside the bin.

    >>> counts = np.zeros(ITL_BINS, np.int64)
    >>> counts[288] = 10                                  # gaps of 30.0 to 30.6 ms
    >>> round(itl_percentiles(counts)["p50"], 4)
    0.0303
    """
    total = int(counts.sum())
    if not total:
        return dict.fromkeys(QUANTILES)
    edges_s = itl_edges_s()
    below = np.concatenate([[0], np.cumsum(counts)])
    found: dict[str, float | None] = {}
    for name, share in QUANTILES.items():
        place = int(np.searchsorted(below[1:], share * total, "left"))
        inside = (share * total - below[place]) / counts[place]
        found[name] = float(edges_s[place] * (edges_s[place + 1] / edges_s[place]) ** inside)
    return found


def cumulative(values: Floats, points: int = 400) -> tuple[Floats, Floats]:
    """A cumulative distribution in at most ``points`` points, denser towards its upper tail."""
    known = np.sort(values[~np.isnan(values)])
    if not len(known):
        return np.zeros(0), np.zeros(0)
    tail = 1 - np.logspace(0, -np.log10(max(len(known), 10)), points // 2)
    share = np.unique(np.concatenate([np.linspace(0, 1, points // 2), tail]))
    return np.quantile(known, share), share
