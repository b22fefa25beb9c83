"""A week of Azure's LLM services of May 2024, made after the published plots of its rates.

The trace itself (DynamoLLM, HPCA 2025; 44 million requests) is played by `azure_llm` where somebody
has it. Here are synthetic requests with its rates and its lengths (`data/README.md`):

- Two services, coding and conversation, each with the lowest and the highest requests per minute in
  every 8 minutes, as read off the plots; a minute's rate is drawn evenly between them, then both
  are scaled to the published means, 1,667 and 2,709 requests per minute. Within a minute arrivals
  are Poisson. The week begins on Monday at 00:00 UTC; ``start_s`` begins within it, and it repeats.
- Five days of each service were read. Wednesday and Thursday of coding are its Tuesday and Monday,
  Friday and Saturday of conversation its Thursday and Sunday.
- ``trace`` leaves one service alone: ``coding`` or ``conversation``, at its own share of the rate.
- ``time_scale`` plays so many seconds of the week in one, at their rates: a week is shorter, and no
  busier. Requests take their usual time, so what depends on them is not compressed.
- ``rate_rps`` multiplies the rates so that it is their mean over the week, 72.9 of both if 0.
- Prompt and output lengths have each service's distributions, drawn independently.
- Where the run file has the service classes ``coding`` and ``conversation``, requests fall into
  that of their service; otherwise by the shares of the classes.

>>> from testbed.core.spec import ClassSpec, WorkloadSpec
>>> from testbed.workloads import open_workload
>>> services = [ClassSpec(name="coding"), ClassSpec(name="conversation")]
>>> spec = WorkloadSpec(source="azure_llm_week", rate_rps=10.0)
>>> noon = [r.slo_class for r in open_workload(spec, services, 1, 60.0)]
>>> sorted(set(noon))
['coding', 'conversation']
"""

from __future__ import annotations

import csv
from collections.abc import Iterator

import numpy as np

from testbed.core.errors import SpecError
from testbed.workloads.columns import Columns, Floats, Job, Source, SourceKind
from testbed.workloads.generate import ByMinute, minute_rates
from testbed.workloads.images import give_images
from testbed.workloads.lengths import DATA, measured

SERVICES = ("coding", "conversation")
PER_MINUTE = {"coding": 1667.0, "conversation": 2709.0}
"""Published means over the week."""
RATE_RPS = sum(PER_MINUTE.values()) / 60.0


def open_source(job: Job) -> Source:
    """The two services as one stream."""
    return give_images(_generated(job), job.spec.image_frac, job.streams)


def _generated(job: Job) -> Iterator[Columns]:
    with (DATA / "azure_llm_2024_week.csv").open(encoding="utf-8", newline="") as file:
        table = np.array([[float(value) for value in row] for row in list(csv.reader(file))[1:]])
    per_row = round((table[1, 0] - table[0, 0]) / 60)
    chosen = job.spec.trace or "both"
    if chosen not in (*SERVICES, "both"):
        raise SpecError(
            f"run spec: workload.trace = {chosen!r} must be coding or conversation, or left out"
        )
    of_week = {name: PER_MINUTE[name] for name in SERVICES if chosen in (name, "both")}
    usual_rps = sum(of_week.values()) / 60.0
    factor = (job.spec.rate_rps or usual_rps) / usual_rps
    rates = []
    for place, service in enumerate(SERVICES):
        low, high = table[:, 1 + 2 * place], table[:, 2 + 2 * place]
        drawn = minute_rates(low, high, per_row, 1.0, job.streams, f"{service}_minutes")
        rates.append(drawn * factor * of_week.get(service, 0.0) / 60.0 / drawn.mean())
    coding_rps, conversation_rps = rates
    week = ByMinute(coding_rps + conversation_rps, job.spec.start_s, job.spec.time_scale)
    share = coding_rps / np.maximum(coding_rps + conversation_rps, 1e-12)
    return _rows(week, share, job)


def _rows(week: ByMinute, coding_share: Floats, job: Job) -> Iterator[Columns]:
    lengths = {
        service: (measured(f"week_{service}_prompt"), measured(f"week_{service}_output"))
        for service in SERVICES
    }
    by_service = set(SERVICES) <= {entry.name for entry in job.classes}
    names = np.array(SERVICES, dtype=object)
    for arrival_s, minute in week.arrivals(job.streams):
        count = len(arrival_s)
        other = job.streams.uniform("service", count) >= coding_share[minute]
        prompt_frac, output_frac = (
            job.streams.uniform(name, count) for name in ("prompt", "output")
        )
        prompt, output = (
            np.where(other, lengths["conversation"][k].at(frac), lengths["coding"][k].at(frac))
            for k, frac in enumerate((prompt_frac, output_frac))
        )
        none = np.zeros(count, np.int64)
        service = names[other.astype(np.int64)] if by_service else None
        yield Columns(arrival_s, prompt, output, none, none, slo_class=service)


KIND = SourceKind(
    open_source,
    frozenset(
        {"trace", "start_s", "time_scale", "rate_rps", "image_frac", "tenants", "max_prompt_tokens"}
    ),
)
