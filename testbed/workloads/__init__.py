"""Workloads: one source of requests, one file. `open_workload` is all that a run needs.

A source yields chunks of requests as columns (`columns.Columns`), seeded by named streams. Here
they are cut to length, given a tenant and a service class, and turned into `Request` objects. A new
source is a module with an ``open_source(job)`` and a ``KIND``, and an entry in `SOURCES`.

>>> from testbed.core.spec import ClassSpec, WorkloadSpec
>>> spec = WorkloadSpec(source="azure_llm", rate_rps=50.0, image_frac=0.2)
>>> classes = [ClassSpec(name="chat", images="never"), ClassSpec(name="vision", images="only")]
>>> requests = open_workload(spec, classes, seed=1, duration_s=60.0)
>>> next(requests).slo_class
'chat'
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from testbed.core.errors import SpecError
from testbed.core.messages import Request
from testbed.core.spec import ClassSpec, WorkloadSpec
from testbed.workloads import (
    azure_llm,
    azure_llm_week,
    azure_lmm,
    bursty,
    long_context,
    poisson,
    table,
)
from testbed.workloads.columns import Columns, Floats, Job, Names, SourceKind, Streams

__all__ = ["SOURCES", "open_workload"]

SOURCES: dict[str, SourceKind] = {
    "azure_llm": azure_llm.KIND,
    "azure_llm_week": azure_llm_week.KIND,
    "azure_lmm": azure_lmm.KIND,
    "bursty": bursty.KIND,
    "csv": table.KIND,
    "long_context": long_context.KIND,
    "poisson": poisson.KIND,
}


def open_workload(
    spec: WorkloadSpec, classes: list[ClassSpec], seed: int, duration_s: float
) -> Iterator[Request]:
    """The requests of a run, in order of arrival, made as they are asked for.

    The same arguments give the same requests. Ids count from 0; arrivals are in [0, duration_s).

    A request falls into one of the ``classes`` whose rule on images it fits, by their shares, and
    to one of ``spec.tenants`` tenants, ``tenant0`` the busiest (Zipf: the k-th gets 1/k of it).
    Text and image tokens together are cut to ``spec.max_prompt_tokens``: first whole images are
    dropped until the rest fits beside one text token, then the text is cut.

    Raises:
        SpecError: a field is out of range or not used by the source, or no class fits.
        TraceError: the trace cannot be read, or a row is broken.
    """
    if spec.source not in SOURCES:
        raise SpecError(
            f"run spec: workload.source = {spec.source!r} must be one of {', '.join(SOURCES)}"
        )
    kind = SOURCES[spec.source]
    _refuse_unused(spec, kind)
    job = Job(spec, classes, Streams(seed), duration_s)
    source = kind.open(job)
    assigned = _Classes(classes, spec.source)
    for images, sends in ((False, source.text), (True, source.images)):
        if sends:
            assigned.check(images=images)  # an error now, not in the middle of the run
    return _requests(source.chunks, job, assigned)


def _refuse_unused(spec: WorkloadSpec, kind: SourceKind) -> None:
    default = WorkloadSpec()
    for field in spec.__struct_fields__:
        value = getattr(spec, field)
        if field == "source" or field in kind.uses or value == getattr(default, field):
            continue
        users = [name for name, other in SOURCES.items() if field in other.uses]
        raise SpecError(
            f"run spec: workload.{field} = {value!r} must be left out: source {spec.source!r} "
            f"does not use it ({', '.join(users)} would)"
        )


def _requests(chunks: Iterator[Columns], job: Job, classes: _Classes) -> Iterator[Request]:
    tenants = _tenants(job.spec.tenants)
    first = 0
    for chunk in chunks:
        # The whole chunk takes part in the draws, so that a longer run begins like a shorter one.
        some = _cut(chunk, job.spec.max_prompt_tokens)
        tenant, slo_class = some.tenant, some.slo_class
        if tenant is None:
            tenant = tenants.at(job.streams.uniform("tenants", len(some)))
        if slo_class is None:
            slo_class = classes.at(some, job.streams.uniform("classes", len(some)))
        end = int(np.searchsorted(some.arrival_s, job.duration_s))
        yield from map(
            Request,
            range(first, first + end),
            some.arrival_s[:end].tolist(),
            some.prompt_tokens[:end].tolist(),
            some.output_tokens[:end].tolist(),
            some.num_images[:end].tolist(),
            some.image_tokens[:end].tolist(),
            tenant[:end].tolist(),
            slo_class[:end].tolist(),
        )
        first += end
        if end < len(some):
            return


def _cut(some: Columns, limit_tokens: int) -> Columns:
    """Cut prompts to ``limit_tokens``: whole images first, then text, at least one token of it."""
    if not len(some) or int((some.prompt_tokens + some.image_tokens).max()) <= limit_tokens:
        return some
    has = np.maximum(some.num_images, 1)
    each = np.maximum(-(-some.image_tokens // has), 1)
    count = np.minimum(some.num_images, (limit_tokens - 1) // each)
    images = some.image_tokens * count // has
    text = np.minimum(some.prompt_tokens, limit_tokens - images)
    return replace(some, prompt_tokens=text, num_images=count, image_tokens=images)


class _Weighted:
    """Names, drawn with weights."""

    def __init__(self, names: list[str], weights: list[float]) -> None:
        self._names = np.array(names, dtype=object)
        self._cumulative = np.cumsum(weights) / sum(weights)

    def at(self, frac: Floats) -> Names:
        index = np.searchsorted(self._cumulative, frac, side="right")
        return self._names[np.minimum(index, len(self._names) - 1)]


def _tenants(count: int) -> _Weighted:
    """``count`` tenants with weights 1, 1/2, 1/3, ..."""
    ranks = range(1, count + 1)
    return _Weighted([f"tenant{rank - 1}" for rank in ranks], [1.0 / rank for rank in ranks])


class _Classes:
    """Service classes, drawn by their shares among those whose rules a request fits."""

    def __init__(self, classes: list[ClassSpec], source: str) -> None:
        self._classes = classes
        self._source = source
        self._names = np.array([entry.name for entry in classes], dtype=object)
        self._shares = np.array([entry.share for entry in classes])
        # One row per class, to be broadcast over the requests.
        self._images = [
            np.array([[entry.images in ("any", rule)] for entry in classes])
            for rule in ("never", "only")
        ]
        self._prompt, self._output = (
            [np.array([[getattr(entry, f"{what}_{end}_tokens")] for entry in classes])
             for end in ("min", "max")]
            for what in ("prompt", "output")
        )  # fmt: skip

    def check(self, *, images: bool) -> None:
        """Whether any class takes requests with, or without, images.

        Raises:
            SpecError: there is none.
        """
        if not self._images[images].any():
            rule = "only" if images else "never"
            have = ", ".join(f"{entry.name} ({entry.images})" for entry in self._classes)
            raise SpecError(
                f"run spec: source {self._source!r} sends requests "
                f"{'with' if images else 'without'} images, which no slo_class takes: "
                f"one must have images = 'any' or {rule!r}, there are: {have or 'none'}"
            )

    def at(self, some: Columns, frac: Floats) -> Names:
        """A class for each request, at fractions of the requests of its kind.

        Raises:
            SpecError: a request is in no class's range of lengths.
        """
        fits = np.where(some.num_images > 0, self._images[True], self._images[False])
        for tokens, (low, high) in (
            (some.prompt_tokens, self._prompt),
            (some.output_tokens, self._output),
        ):
            fits = fits & (low <= tokens) & (tokens <= high)
        cumulative = np.cumsum(self._shares[:, None] * fits, axis=0)
        total = cumulative[-1] if len(cumulative) else np.zeros(len(frac))
        if not total.all():
            lost = int(np.flatnonzero(total == 0)[0])
            raise SpecError(
                f"run spec: no slo_class takes a request of {int(some.prompt_tokens[lost])} prompt "
                f"and {int(some.output_tokens[lost])} output tokens"
            )
        index = (cumulative / total <= frac).sum(axis=0)
        return np.asarray(self._names[np.minimum(index, len(self._names) - 1)])
