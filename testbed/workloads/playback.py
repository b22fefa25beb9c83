"""Playing a trace: at its own rate or another, for as long as a run lasts.

A trace that ends before the run does starts again, one mean gap after its last row. Its own rate is
its rows over that period.

**Another rate** keeps the trace's bursts: the rate of every moment is multiplied, time is not
squeezed. For m times the rate, ceil(m) copies of the trace run side by side and each row of each
copy is kept with probability m / ceil(m); below its own rate that is plain thinning. The first copy
has the trace's own times; every other is shifted by its own offset of up to `SPREAD_S`, so that
copies do not arrive in the same microsecond. Rises and falls that last longer than that stay what
they were; what happens within it becomes as even as a superposition of clients is. (Squeezing time
would turn an hour's swing into a minute's, which no autoscaler could follow; copies shifted by
hours would average the bursts away.)

The rate asked for is the mean over the whole trace, as the trace's own is: a run that plays a
quiet part of it sees less, a busy part more.

``start_s`` begins within the trace; the copies have been running since before that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from testbed.core.errors import SpecError
from testbed.workloads.columns import CHUNK, Columns, Floats, Ints, Job

SPREAD_S = 10.0
"""Longest shift of a copy: short against the minutes in which a scaler or a row's heat reacts."""


def play(trace: Columns, job: Job, name: str) -> Iterator[Columns]:
    """The rows of ``trace`` as chunks of arrivals from 0 until the run ends.

    Raises:
        SpecError: it begins after the end, or there is no rate to change.
    """
    spec = job.spec
    first_s, last_s = float(trace.arrival_s[0]), float(trace.arrival_s[-1])
    if spec.start_s > last_s:
        raise SpecError(
            f"run spec: workload.start_s = {spec.start_s:g} must be at most {last_s:g}, "
            f"the length of {name} in seconds"
        )
    if last_s == first_s:
        if spec.rate_rps > 0:
            raise SpecError(
                f"run spec: workload.rate_rps = {spec.rate_rps:g} must be 0: "
                f"all rows of {name} are of one moment, so it has no rate to change"
            )
        return iter([trace.at(trace.arrival_s - spec.start_s)])
    return _copies(trace, job)


def period_s(trace: Columns) -> float:
    """Time after which a trace starts again: to its last row, and one mean gap."""
    first_s, last_s = float(trace.arrival_s[0]), float(trace.arrival_s[-1])
    return last_s + (last_s - first_s) / (len(trace) - 1)


def _copies(trace: Columns, job: Job) -> Iterator[Columns]:
    spec, streams = job.spec, job.streams
    loop_s = period_s(trace)
    times_of = _Repeated(trace.arrival_s, loop_s, spec.start_s)
    factor = spec.rate_rps * loop_s / len(trace) if spec.rate_rps > 0 else 1.0
    copies = max(1, math.ceil(factor - 1e-9))
    keep = factor / copies
    shifts = np.append(0.0, streams.uniform("copies", copies - 1) * SPREAD_S)
    spread_s = float(shifts.max())

    # Rows are taken a block at a time, for all copies at once. What lies beyond the next block's
    # first row may still be preceded by a row of it, and waits. Blocks are at least as large as
    # what waits, so that sorting it again and again stays cheap.
    waiting_rows = copies * len(trace) / loop_s * spread_s
    block = max(1, math.ceil(max(CHUNK, waiting_rows) / copies))
    position = times_of.position(-spread_s)
    when, row = np.empty(0), np.empty(0, np.int64)
    while True:
        rows = np.arange(position, position + block)
        position += block
        new_when = np.add.outer(times_of(rows), shifts).ravel()
        new_row = np.repeat(rows % len(trace), copies)
        if keep < 1:
            kept = streams.uniform("thinning", len(new_row)) < keep
            new_when, new_row = new_when[kept], new_row[kept]
        when, row = np.append(when, new_when), np.append(row, new_row)
        order = np.argsort(when, kind="stable")
        when, row = when[order], row[order]
        settled_s = float(times_of(np.array([position]))[0])
        start, end = np.searchsorted(when, [0.0, settled_s])
        yield trace.rows(row[start:end]).at(when[start:end])
        when, row = when[end:], row[end:]
        if settled_s >= job.duration_s:
            return


class _Repeated:
    """Times of the rows of a trace that repeats for ever, both ways; zero is ``start_s`` in it."""

    def __init__(self, times: Floats, loop_s: float, start_s: float) -> None:
        self._times = times
        self._loop_s = loop_s
        self._start_s = start_s

    def __call__(self, rows: Ints) -> Floats:
        loops, index = np.divmod(rows, len(self._times))
        times: Floats = self._times[index] + loops * self._loop_s - self._start_s
        return times

    def position(self, t_s: float) -> int:
        """The first row that comes at or after ``t_s``."""
        loops, rest_s = divmod(t_s + self._start_s, self._loop_s)
        return int(loops) * len(self._times) + int(np.searchsorted(self._times, rest_s))
