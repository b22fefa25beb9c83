"""Requests in bursts: a renewal process whose gaps vary ``burst_cv`` times as much as their mean.

Gaps are gamma distributed, which is what ServeGen (NSDI 2026) fits to most clients of a large model
service; 1 is Poisson, below it arrivals are more even. Everything else is as in `poisson`.

>>> import numpy as np
>>> from testbed.core.spec import ClassSpec, WorkloadSpec
>>> from testbed.workloads import open_workload
>>> spec = WorkloadSpec(source="bursty", rate_rps=100.0, burst_cv=4.0)
>>> requests = list(open_workload(spec, [ClassSpec()], 1, 100.0))
>>> per_second = np.bincount([int(request.arrival_s) for request in requests])
>>> bool(per_second.var() / per_second.mean() > 8)  # it would be 1 for Poisson
True
"""

from __future__ import annotations

from testbed.workloads import poisson
from testbed.workloads.columns import Job, Source, SourceKind


def open_source(job: Job) -> Source:
    """`poisson` with gaps of another variation."""
    return poisson.open_source(job, job.spec.burst_cv)


KIND = SourceKind(open_source, poisson.KIND.uses | {"burst_cv"})
