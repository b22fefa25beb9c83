"""Requests of a service of multimodal models: Azure's trace of October 2024, or rows made like it.

**A file** with the four columns ``TIMESTAMP,NumImages,ContextTokens,GeneratedTokens`` is read
directly. It holds two traps. NumImages holds perfect squares only and is taken to be the square of
the true count (see `images`); a file with any other number in it is refused, and can be played at
face value through the source ``csv``. ContextTokens counts text and images together; they are
parted by the measured size of an image.

**Without a file** rows of the same four columns are made, and go the same way. They are synthetic,
after the published plots of the trace (ModServe, SoCC 2025; `data/README.md`):

- Arrivals follow five days of the trace's week, minute by minute: text and image requests each
  have their own rate, smooth and daily for text, very spiky for images, and the peaks do not
  coincide. The plots give the lowest and the highest minute of every 8; a minute's rate is drawn
  between them, nearer to the lower one, such that both means are the published ones. Within a
  minute arrivals are Poisson. ``start_s`` begins within the five days, which repeat.
- ``rate_rps`` multiplies the rates so that it is their mean over the five days, 1.65 if 0. Any hour
  has its own, as in the trace.
- ``image_frac`` is the share of image requests over the five days, 0.49 if 0.
- Context and output lengths have the trace's distributions, one pair for text and one for images.
  A request with more images has a longer context: a normal copula with correlation 0.9 couples
  the two. That number is ours; it puts the median context of one-image requests at 1,060 tokens
  (a row of the trace: about 1,000) and that of four-image requests at 6,000 (a row: 4,564).

>>> from testbed.core.spec import ClassSpec, WorkloadSpec
>>> from testbed.workloads import open_workload
>>> spec = WorkloadSpec(source="azure_lmm", rate_rps=10.0)
>>> requests = list(open_workload(spec, [ClassSpec()], 1, 3600.0))
>>> with_images = [request for request in requests if request.num_images]
>>> max(request.num_images for request in with_images)
32
"""

from __future__ import annotations

import csv
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from testbed.core.errors import SpecError
from testbed.workloads.columns import (
    Columns,
    Floats,
    Job,
    Source,
    SourceKind,
    Streams,
)
from testbed.workloads.generate import ByMinute, minute_rates
from testbed.workloads.images import image_counts, split_context
from testbed.workloads.lengths import DATA, measured
from testbed.workloads.playback import play
from testbed.workloads.trace_file import Holds, TraceFile, find_trace

RATE_RPS = 1_000_000 / (7 * 86_400)
"""The trace has exactly a million rows in seven days."""
IMAGE_FRAC = 1 - 51 / 99.2
"""Of 99.2 requests per minute, 51 are text (read off a plot)."""
CONTEXT_CORRELATION = 0.9

_TEXT_SKEW = 2.0
_IMAGE_SKEW = 2.25
"""A minute lies at ``u**skew`` between its lowest and highest rate, u uniform: these put the means
at 51 and 48.2 requests per minute before any scaling, where the middle would give 56 and 69."""

_COLUMNS: dict[str, Holds] = {
    "TIMESTAMP": "wall_time",
    "NumImages": "count",
    "ContextTokens": "count",
    "GeneratedTokens": "count",
}


def open_source(job: Job) -> Source:
    """A trace file's rows if one is named, else rows made like them."""
    if not job.spec.trace:
        frac = job.spec.image_frac or IMAGE_FRAC
        rows = _generated(job, frac)
        return Source(_parted(rows, job.streams), text=frac < 1, images=True)
    if job.spec.image_frac:
        raise SpecError(
            f"run spec: workload.image_frac = {job.spec.image_frac:g} must be left out: "
            f"the trace {job.spec.trace!r} has its own images"
        )
    trace = _read(job.spec.trace)
    images = trace.num_images > 0
    chunks = _parted(play(trace, job, job.spec.trace), job.streams)
    return Source(chunks, text=not images.all(), images=bool(images.any()))


def _parted(chunks: Iterator[Columns], streams: Streams) -> Iterator[Columns]:
    for some in chunks:
        yield split_context(some, streams)


def _read(name: str) -> Columns:
    """The file's rows; ``prompt_tokens`` still counts text and images together."""
    file = TraceFile(find_trace(name, {}), _COLUMNS)
    squares = file["NumImages"]
    roots = np.rint(np.sqrt(squares)).astype(np.int64)
    file.require(
        "NumImages",
        roots**2 == squares,
        "a perfect square, the square of the number of images "
        "(play a file with plain counts through source = 'csv')",
    )
    return Columns(
        file["TIMESTAMP"],
        np.maximum(file["ContextTokens"], 1),
        np.maximum(file["GeneratedTokens"], 1),
        roots,
        np.zeros(len(roots), np.int64),
    )


def _generated(job: Job, image_frac: float) -> Iterator[Columns]:
    """Rows like those of the trace, with the true count of images."""
    with (DATA / "azure_lmm_2024_week.csv").open(encoding="utf-8", newline="") as file:
        rows = [[float(value) for value in row] for row in list(csv.reader(file))[1:]]
    t_s, image_low, image_high, text_low, text_high = np.array(rows).T
    per_row = round((t_s[1] - t_s[0]) / 60)
    streams = job.streams
    rate = job.spec.rate_rps or RATE_RPS
    image = minute_rates(image_low, image_high, per_row, _IMAGE_SKEW, streams, "image_minutes")
    text = minute_rates(text_low, text_high, per_row, _TEXT_SKEW, streams, "text_minutes")
    image *= rate * image_frac / image.mean()
    text *= rate * (1 - image_frac) / text.mean()
    days = ByMinute(image + text, job.spec.start_s)
    if job.spec.start_s >= days.minute_s[-1]:
        raise SpecError(
            f"run spec: workload.start_s = {job.spec.start_s:g} must be below "
            f"{days.minute_s[-1]:g}, the length of the generated days in seconds"
        )
    return _played(days, image / (image + text), streams)


def _played(days: ByMinute, image_share: Floats, streams: Streams) -> Iterator[Columns]:
    for arrival_s, minute in days.arrivals(streams):
        has_images = streams.uniform("image_choice", len(minute)) < image_share[minute]
        yield _rows(arrival_s, has_images, streams)


def _rows(arrival_s: Floats, has_images: NDArray[np.bool_], streams: Streams) -> Columns:
    """Counts and lengths for requests of which it is known whether they have images."""
    count_frac, context_frac, output_frac = (
        streams.uniform(name, len(arrival_s)) for name in ("image_count", "prompt", "output")
    )
    image_context = measured("lmm_image_context").at(_coupled(count_frac, context_frac))
    text_context = measured("lmm_text_context").at(context_frac)
    image_output = measured("lmm_image_output").at(output_frac)
    text_output = measured("lmm_text_output").at(output_frac)
    return Columns(
        arrival_s,
        np.where(has_images, image_context, text_context),
        np.where(has_images, image_output, text_output),
        image_counts(count_frac) * has_images,
        np.zeros(len(arrival_s), np.int64),
    )


def _coupled(leader: Floats, own: Floats) -> Floats:
    """Uniform numbers that follow ``leader`` as a normal copula has them."""
    rho = CONTEXT_CORRELATION
    lead, noise = ndtri(np.clip(leader, 1e-12, None)), ndtri(np.clip(own, 1e-12, None))
    followed: Floats = ndtr(rho * lead + np.sqrt(1 - rho**2) * noise)
    return followed


KIND = SourceKind(
    open_source,
    frozenset({"trace", "start_s", "rate_rps", "image_frac", "tenants", "max_prompt_tokens"}),
)
