"""Images of requests: how many, and how many tokens each, as measured.

Counts are those of the Azure LMM trace of October 2024 (``data/image_counts.csv``). Its column
NumImages holds perfect squares only (1, 4, 9, 16, ... 529), and a row with 16 has about 4,600
context tokens where a row with 1 has about 1,000, so the true count is taken to be the **square
root** of the column. That is our reading, not the publisher's; at face value a request would carry
fifteen images on average instead of three.

Tokens per image are those of ServeGen's multimodal clients, weighted by their request rates. All
images of one request have the same size.

>>> image_counts(np.array([0.0, 0.66, 0.70, 0.80, 0.99]))
array([ 1,  1,  2,  3, 23])
>>> tokens_per_image(np.array([0.1, 0.5, 0.9]))
array([   6,  713, 1224])
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import numpy as np

from testbed.workloads.columns import Columns, Floats, Ints, Source, Streams
from testbed.workloads.lengths import DATA, measured

TEXT_FLOOR_TOKENS = 35
"""Fewest text tokens beside images: the 1st percentile of ServeGen's multimodal requests."""


def image_counts(frac: Floats) -> Ints:
    """Images of a request with images, at fractions of such requests."""
    counts, cumulative = _counts()
    return counts[np.searchsorted(cumulative, frac, side="right")]


def tokens_per_image(frac: Floats) -> Ints:
    """Tokens of one image, at fractions of the images."""
    return measured("image_tokens").at(frac)


def give_images(chunks: Iterator[Columns], frac: float, streams: Streams) -> Source:
    """Add images to a share ``frac`` of the requests; their text stays as long as it was."""
    if frac == 0:
        return Source(chunks)
    return Source(_with_images(chunks, frac, streams), text=frac < 1, images=True)


def _with_images(chunks: Iterator[Columns], frac: float, streams: Streams) -> Iterator[Columns]:
    for some in chunks:
        chosen = streams.uniform("image_choice", len(some)) < frac
        count = image_counts(streams.uniform("image_count", len(some))) * chosen
        each = tokens_per_image(streams.uniform("image_size", len(some)))
        yield replace(some, num_images=count, image_tokens=count * each)


def split_context(some: Columns, streams: Streams) -> Columns:
    """Part ``prompt_tokens`` that count text and images together, as the Azure LMM trace does.

    The trace does not say which is which. Images get their measured size, but never so much that
    fewer than `TEXT_FLOOR_TOKENS` (or half of a very short context) remain for the text.
    """
    context = some.prompt_tokens
    each = tokens_per_image(streams.uniform("image_size", len(some)))
    room = context - np.minimum(TEXT_FLOOR_TOKENS, context // 2)
    images = np.minimum(some.num_images * each, room)
    return replace(some, prompt_tokens=np.maximum(context - images, 1), image_tokens=images)


@cache
def _counts() -> tuple[Ints, Floats]:
    with (DATA / "image_counts.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    counts = np.array([int(row["images"]) for row in rows])
    return counts, np.array([float(row["cumulative_frac"]) for row in rows])
