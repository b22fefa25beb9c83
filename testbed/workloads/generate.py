"""What the generators share: renewal arrivals, and lengths put beside them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from testbed.workloads.columns import CHUNK, Columns, Floats, Streams, text_only
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
