"""Requests of Azure's LLM inference traces, read as published.

The files have the columns ``TIMESTAMP,ContextTokens,GeneratedTokens``; those of November 2023 (one
hour of a conversation and of a coding service; Splitwise, ISCA 2024) and of May 2024 (one week;
DynamoLLM, HPCA 2025) are both read directly, plain or gzip. The first 40 minutes of 2023 are
shipped as ``azure_llm_2023_conv`` (used when no trace is named) and ``azure_llm_2023_code``.

Text only; ``image_frac`` turns that share of them into image requests. A length of 0 is played
as 1, because every request has a prompt and an answer.

>>> from testbed.core.spec import ClassSpec, WorkloadSpec
>>> from testbed.workloads import open_workload
>>> spec = WorkloadSpec(source="azure_llm", trace="azure_llm_2023_conv")
>>> requests = list(open_workload(spec, [ClassSpec()], 1, 600.0))
>>> len(requests)
2867
>>> requests[1].arrival_s, requests[1].prompt_tokens, requests[1].output_tokens
(4.314579, 396, 109)
"""

from __future__ import annotations

import numpy as np

from testbed.workloads.columns import Job, Source, SourceKind, text_only
from testbed.workloads.images import give_images
from testbed.workloads.playback import play
from testbed.workloads.trace_file import Holds, TraceFile, find_trace

SHIPPED = {
    "azure_llm_2023_conv": "azure_llm_2023_conv.csv.gz",
    "azure_llm_2023_code": "azure_llm_2023_code.csv.gz",
}

_COLUMNS: dict[str, Holds] = {
    "TIMESTAMP": "wall_time",
    "ContextTokens": "count",
    "GeneratedTokens": "count",
}


def open_source(job: Job) -> Source:
    """The trace's own arrivals and lengths."""
    name = job.spec.trace or "azure_llm_2023_conv"
    file = TraceFile(find_trace(name, SHIPPED), _COLUMNS)
    trace = text_only(
        file["TIMESTAMP"],
        np.maximum(file["ContextTokens"], 1),
        np.maximum(file["GeneratedTokens"], 1),
    )
    return give_images(play(trace, job, name), job.spec.image_frac, job.streams)


KIND = SourceKind(
    open_source,
    frozenset({"trace", "start_s", "rate_rps", "image_frac", "tenants", "max_prompt_tokens"}),
)
