"""What the generators share: renewal arrivals, and lengths put beside them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from testbed.workloads.columns import CHUNK, Columns, Floats, Ints, Streams, text_only
from testbed.workloads.lengths import Lengths


def renewal(rate_rps: float, cv: float, rng: np.random.Generator) -> Iterator[Floats]:
    """Arrival times, chunk by chunk, with gamma gaps of mean ``1/rate_rps`` and variation ``cv``.

    The process is taken as running since ever when time 0 comes, so the first gap is the rest of a
    length-biased one (gamma with shape one higher, times a uniform). Were it an ordinary gap, a run
    would begin with an arrival and hold (cv**2 - 1) / 2 requests too many.

    >>> times = next(renewal(10.0, 3.0, np.random.default_rng(1)))
    >>> bool(np.all(np.diff(times) >= 0)), len(times)
    (True, 8192)
    """
    shape = 1.0 / cv**2
    scale_s = cv**2 / rate_rps
    next_s = float(rng.gamma(shape + 1.0) * scale_s * rng.random())
    while True:
        times = next_s + np.cumsum(np.append(0.0, rng.gamma(shape, scale_s, CHUNK)))
        next_s = float(times[-1])
        yield times[:-1]


def with_lengths(
    arrivals: Iterator[Floats], prompt: Lengths, output: Lengths, streams: Streams
) -> Iterator[Columns]:
    """Text requests at these times, prompt and output drawn independently.

    In the Azure traces of 2023 the two are almost uncorrelated.
    """
    for times in arrivals:
        yield text_only(
            times,
            prompt.at(streams.uniform("prompt", len(times))),
            output.at(streams.uniform("output", len(times))),
        )


def minute_rates(
    low: Floats, high: Floats, per_row: int, skew: float, streams: Streams, name: str
) -> Floats:
    """A rate for each of the ``per_row`` minutes of each row, between its lowest and highest.

    It lies at ``u**skew`` of the way, u uniform from the stream ``name``.
    """
    low, high = np.repeat(low, per_row), np.repeat(high, per_row)
    rates: Floats = low + (high - low) * streams.uniform(name, len(low)) ** skew
    return rates


class ByMinute:
    """Poisson arrivals whose rate is given minute by minute, and which repeat after the last one.

    Args:
        rate_rps: the rate of each minute.
        start_s: where in it time zero lies.
        speed: minutes of the rates that a minute plays, each at its own rate.

    >>> hour = ByMinute(np.repeat([1.0, 0.0, 3.0], 20), 600.0)
    >>> arrival_s, minute = next(hour.arrivals(Streams(1)))
    >>> counts = np.bincount(minute[arrival_s < 3600.0], minlength=60)
    >>> counts.reshape(3, 20).sum(axis=1).tolist()
    [1233, 0, 3628]
    """

    def __init__(self, rate_rps: Floats, start_s: float, speed: float = 1.0) -> None:
        self.start_s = start_s / speed
        self.length_s = 60.0 / speed
        self.expected: Floats = np.cumsum(np.append(0.0, rate_rps * self.length_s))
        """Requests expected until the start of each minute."""
        self.minute_s: Floats = np.asarray(
            np.arange(len(self.expected)) * self.length_s, np.float64
        )

    def arrivals(self, streams: Streams) -> Iterator[tuple[Floats, Ints]]:
        """Chunks of arrival times, with the minute of the whole that each falls into.

        Those of a process of rate 1 in "requests expected so far", put back into seconds.
        """
        loop_s, loop = float(self.minute_s[-1]), float(self.expected[-1])
        loops_before, rest_s = divmod(self.start_s, loop_s)
        now = loops_before * loop + float(np.interp(rest_s, self.minute_s, self.expected))
        while True:
            expected = now + np.cumsum(streams["arrivals"].standard_exponential(CHUNK))
            now = float(expected[-1])
            loops, rest = np.divmod(expected, loop)
            within_s = np.interp(rest, self.expected, self.minute_s)
            minute = np.minimum(within_s // self.length_s, len(self.expected) - 2).astype(np.int64)
            yield np.maximum(within_s + loops * loop_s - self.start_s, 0.0), minute
