"""Requests that come independently of each other, at one mean rate.

Lengths are those of the Azure conversation trace of November 2023 (a large chat service), or that
shape stretched to the means ``prompt_tokens`` and ``output_tokens``. With ``rate_rps`` 0 the rate
is that trace's own.

>>> from testbed.core.spec import ClassSpec, WorkloadSpec
>>> from testbed.workloads import open_workload
>>> spec = WorkloadSpec(source="poisson", rate_rps=100.0, prompt_tokens=512.0)
>>> requests = list(open_workload(spec, [ClassSpec()], 1, 60.0))
>>> len(requests)
6074
>>> requests[0].id, requests[0].prompt_tokens, requests[0].output_tokens
(0, 499, 100)
"""

from __future__ import annotations

from testbed.workloads.columns import Job, Source, SourceKind
from testbed.workloads.generate import renewal, with_lengths
from testbed.workloads.images import give_images
from testbed.workloads.lengths import stretched

RATE_RPS = 14_176 / 2_400
"""Mean rate of the conversation trace: rows in its first 40 minutes."""


def open_source(job: Job, cv: float = 1.0) -> Source:
    """Requests with gamma gaps; a variation of 1 makes them a Poisson process."""
    spec = job.spec
    prompt = stretched(
        "chat_prompt", spec.prompt_tokens, field="prompt_tokens", limit=spec.max_prompt_tokens
    )
    output = stretched("chat_output", spec.output_tokens, field="output_tokens")
    arrivals = renewal(spec.rate_rps or RATE_RPS, cv, job.streams["arrivals"])
    chunks = with_lengths(arrivals, prompt, output, job.streams)
    return give_images(chunks, spec.image_frac, job.streams)


KIND = SourceKind(
    open_source,
    frozenset(
        {
            "rate_rps",
            "image_frac",
            "tenants",
            "max_prompt_tokens",
            "prompt_tokens",
            "output_tokens",
        }
    ),
)
