"""Requests in columns, and the seeded random streams that fill them.

A source hands over its requests a chunk at a time, one array per quantity, so that a million of
them cost a few hundred calls and memory does not grow with the length of a run.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from testbed.core.spec import ClassSpec, WorkloadSpec

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Names = NDArray[np.object_]

CHUNK = 8192
"""Requests drawn at a time: large enough for NumPy, a few hundred KB of memory."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Requests in time order, one entry each.

    >>> some = text_only(np.array([0.0, 1.5]), np.array([10, 20]), np.array([3, 4]))
    >>> some.rows(np.array([1])).prompt_tokens
    array([20])
    """

    arrival_s: Floats
    prompt_tokens: Ints
    output_tokens: Ints
    num_images: Ints
    image_tokens: Ints
    tenant: Names | None = None
    slo_class: Names | None = None

    def __len__(self) -> int:
        return len(self.arrival_s)

    def rows(self, index: NDArray[Any] | slice) -> Columns:
        """The entries at ``index``."""
        return Columns(
            self.arrival_s[index],
            self.prompt_tokens[index],
            self.output_tokens[index],
            self.num_images[index],
            self.image_tokens[index],
            None if self.tenant is None else self.tenant[index],
            None if self.slo_class is None else self.slo_class[index],
        )

    def at(self, arrival_s: Floats) -> Columns:
        """The same requests at other times."""
        return replace(self, arrival_s=arrival_s)


def text_only(arrival_s: Floats, prompt_tokens: Ints, output_tokens: Ints) -> Columns:
    """Requests without images."""
    none = np.zeros(len(arrival_s), np.int64)
    return Columns(arrival_s, prompt_tokens, output_tokens, none, none)


class Streams:
    """Independent random streams, each known by the name of what it decides.

    Every request takes the same number of draws from every stream, so changing what one stream is
    used for (the share of images, say) leaves all others as they were.

    >>> before, after = Streams(7), Streams(7)
    >>> _ = after["tenants"].random(100)
    >>> bool(before["arrivals"].random() == after["arrivals"].random())
    True
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._streams: dict[str, np.random.Generator] = {}

    def __getitem__(self, name: str) -> np.random.Generator:
        if name not in self._streams:
            key = [self._seed, zlib.crc32(f"workload/{name}".encode())]
            self._streams[name] = np.random.default_rng(key)
        return self._streams[name]

    def uniform(self, name: str, count: int) -> Floats:
        """``count`` numbers in [0, 1) from the stream ``name``."""
        return self[name].random(count)


@dataclass(frozen=True, slots=True)
class Job:
    """What a source is told."""

    spec: WorkloadSpec
    classes: list[ClassSpec]
    streams: Streams
    duration_s: float


@dataclass(frozen=True, slots=True)
class Source:
    """What a source gives: chunks in time order, and which kinds of request are among them.

    The chunks may go on for ever; whoever reads them stops at the end of the run.
    """

    chunks: Iterator[Columns]
    text: bool = True
    images: bool = False


@dataclass(frozen=True, slots=True)
class SourceKind:
    """A source as the registry knows it: how to open it, and the spec's fields that it reads."""

    open: Callable[[Job], Source]
    uses: frozenset[str]
