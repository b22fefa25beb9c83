"""Requests from a table of your own: any CSV file, plain or gzip, with these columns.

``arrival_s`` (seconds since the run's start, not going back), ``prompt_tokens`` (text only) and
``output_tokens`` must be there. ``num_images`` with ``image_tokens`` (all images of the request
together), ``tenant`` and ``slo_class`` may be; where they are, ``image_frac``, ``tenants`` and the
shares of the classes have nothing to decide. In a run file this source is called ``csv``.

A table that ends before the run does starts again: give the run the length of the table to play it
once.

>>> import tempfile
>>> from testbed.core.spec import ClassSpec, WorkloadSpec
>>> from testbed.workloads import open_workload
>>> with tempfile.NamedTemporaryFile("w", suffix=".csv") as file:
...     _ = file.write("arrival_s,prompt_tokens,output_tokens,tenant\\n0.5,100,7,a\\n2.0,90,8,b\\n")
...     file.flush()
...     spec = WorkloadSpec(source="csv", trace=file.name)
...     for request in open_workload(spec, [ClassSpec()], 1, 3.0):
...         print(request.id, request.arrival_s, request.prompt_tokens, request.tenant)
0 0.5 100 a
1 2.0 90 b
"""

from __future__ import annotations

import numpy as np

from testbed.core.errors import SpecError, TraceError
from testbed.core.spec import WorkloadSpec
from testbed.workloads.columns import Columns, Job, Source, SourceKind
from testbed.workloads.images import give_images
from testbed.workloads.playback import play
from testbed.workloads.trace_file import Holds, TraceFile, find_trace

_REQUIRED: dict[str, Holds] = {
    "arrival_s": "seconds",
    "prompt_tokens": "count",
    "output_tokens": "count",
}
_OPTIONAL: dict[str, Holds] = {
    "num_images": "count",
    "image_tokens": "count",
    "tenant": "name",
    "slo_class": "name",
}


def open_source(job: Job) -> Source:
    """The rows of the table that the spec names."""
    name = job.spec.trace
    if not name:
        raise SpecError("run spec: workload.trace = '' must name a CSV file for source 'csv'")
    file = TraceFile(find_trace(name, {}), _REQUIRED, _OPTIONAL)
    _check(file, job)
    none = np.zeros(len(file), np.int64)
    with_images = "num_images" in file
    trace = Columns(
        file["arrival_s"],
        np.maximum(file["prompt_tokens"], 1),
        np.maximum(file["output_tokens"], 1),
        file["num_images"] if with_images else none,
        file["image_tokens"] if with_images else none,
        file.get("tenant"),
        file.get("slo_class"),
    )
    chunks = play(trace, job, name)
    if not with_images:
        return give_images(chunks, job.spec.image_frac, job.streams)
    images = trace.num_images > 0
    return Source(chunks, text=not images.all(), images=bool(images.any()))


def last_arrival_s(trace: str) -> float:
    """Time of the last row of the table that a spec would name.

    Raises:
        TraceError: the file cannot be read, or a row is broken.
    """
    return float(TraceFile(find_trace(trace, {}), _REQUIRED, _OPTIONAL)["arrival_s"][-1])


def _check(file: TraceFile, job: Job) -> None:
    """What columns say about each other, and about the spec."""
    if ("num_images" in file) != ("image_tokens" in file):
        raise TraceError(f"{file.path}: columns num_images and image_tokens go together")
    default = WorkloadSpec()
    for column, field in (("num_images", "image_frac"), ("tenant", "tenants")):
        value = getattr(job.spec, field)
        if column in file and value != getattr(default, field):
            raise SpecError(
                f"run spec: workload.{field} = {value} must be left out: "
                f"{file.path} has a column {column}"
            )
    if "num_images" in file:
        counts, tokens = file["num_images"], file["image_tokens"]
        expected = "at least num_images where there are images, and 0 where there are none"
        file.require("image_tokens", (tokens >= counts) & ((tokens > 0) == (counts > 0)), expected)
    if "slo_class" in file:
        _check_classes(file, job)


def _check_classes(file: TraceFile, job: Job) -> None:
    known = {slo_class.name: slo_class.images for slo_class in job.classes}
    names = file["slo_class"]
    is_known = np.array([name in known for name in names])
    file.require("slo_class", is_known, f"one of {', '.join(known)}")
    images = file["num_images"] > 0 if "num_images" in file else np.zeros(len(file), bool)
    rules = np.array([known[name] for name in names])
    fits = (rules == "any") | np.where(images, rules == "only", rules == "never")
    file.require("slo_class", fits, "a class that takes this request with or without images")


KIND = SourceKind(
    open_source,
    frozenset({"trace", "start_s", "rate_rps", "image_frac", "tenants", "max_prompt_tokens"}),
)
