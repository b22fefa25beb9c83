"""Requests with very long prompts: chats over documents, code bases, hours of talk.

Lengths up to the 99th percentile are those of Kimi's conversation trace (Mooncake, FAST 2025: half
of the prompts above 7,300 tokens, 1 % above 90,000). That service cut prompts at 128 K tokens,
newer ones do not; so the tail beyond the 99th percentile is ours: a power law with the exponent
measured between the 90th and the 99th. It puts 1 request in 100 above 90 K tokens, 1 in 1,000 above
290 K and 1 in 10,000 above 920 K. ``max_prompt_tokens`` cuts it (128,000 unless set).

Arrivals are Poisson: the published times are rounded to 3 s, so their burstiness is not known. With
``rate_rps`` 0 the rate is that trace's own.

>>> prompts = prompt_lengths()
>>> prompts.at(np.array([0.5, 0.9, 0.99, 0.999, 0.9999])).tolist()
[7295, 28042, 89869, 288012, 923021]
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from testbed.workloads.columns import Job, Source, SourceKind
from testbed.workloads.generate import renewal, with_lengths
from testbed.workloads.images import give_images
from testbed.workloads.lengths import Lengths, measured, stretched

RATE_RPS = 7_676 / 2_355
"""Mean rate of the conversation trace: rows in its first 2,355 s."""


def prompt_lengths() -> Lengths:
    """Mooncake's prompts, with a power law for the longest one in a hundred."""
    lengths = measured("long_prompt")
    at_90, at_99 = np.interp([0.90, 0.99], lengths.frac, lengths.log_tokens)
    return replace(lengths, tail_from_frac=0.99, tail_alpha=float(np.log(10) / (at_99 - at_90)))


def open_source(job: Job) -> Source:
    """Poisson arrivals with lengths of long documents."""
    spec = job.spec
    prompt = prompt_lengths()
    if spec.prompt_tokens > 0:
        prompt = prompt.with_mean(
            spec.prompt_tokens, field="prompt_tokens", limit_tokens=spec.max_prompt_tokens
        )
    output = stretched("long_output", spec.output_tokens, field="output_tokens")
    arrivals = renewal(spec.rate_rps or RATE_RPS, 1.0, job.streams["arrivals"])
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
