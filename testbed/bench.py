"""How fast the engine is: requests against wall time, with nothing recorded.

Instances get requests in turn by direct calls; with physics on, GPUs advance as arrays at every
tick and set the engines' clocks. The trace is a file of arrival_s, prompt_tokens, output_tokens, or
that many requests of the measured conversation lengths with Poisson arrivals.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from emulators.engine import Event
from emulators.gpu import GpuBank
from emulators.profiles import load_gpu
from emulators.server import ServerBank
from emulators.state import GpuState
from testbed.core.clock import rare_collections
from testbed.core.errors import SpecError
from testbed.core.messages import EngineConfig, InstanceConfig, Request
from testbed.core.spec import ClassSpec, WorkloadSpec
from testbed.workloads import open_workload
from testbed.workloads.table import last_arrival_s

PER_INSTANCE_RPS = 3.0
"""Arrival rate per instance: 24 requests/s on 8 instances, as peers were measured."""


INSTANCES_MAX = 1_000_000
REQUESTS_MAX = 10**9


def check_count(field: str, value: int, most: int) -> None:
    """Refuse a number of things that is not 1 to ``most``.

    Raises:
        SpecError: names the field, its value and the range.
    """
    if not 1 <= value <= most:
        raise SpecError(f"bench: {field} = {value} must be 1 to {most}")


def check_rate(rate_rps: float) -> None:
    """Refuse a rate that is neither a positive number nor 0, which stands for the usual one.

    Raises:
        SpecError: says so.
    """
    if not 0 <= rate_rps < math.inf:
        raise SpecError(f"bench: rate = {rate_rps:g} must be a positive number, or 0")


@dataclass(slots=True)
class _Tally:
    """Sums over finished requests; nothing per request is kept once it has ended."""

    arrivals: dict[int, tuple[float, int]] = field(default_factory=dict)
    firsts: dict[int, float] = field(default_factory=dict)
    ended: int = 0
    tokens: int = 0
    ttft_s: float = 0.0
    tpot_s: float = 0.0
    tpot_count: int = 0

    def count(self, events: list[Event]) -> None:
        """Take in what happened."""
        for request_id, kind, t_s, _ in events:
            if kind == "first_token":
                self.firsts[request_id] = t_s
                continue
            arrival_s, output_tokens = self.arrivals.pop(request_id)
            self.ended += 1
            first_s = self.firsts.pop(request_id, None)
            if first_s is not None:
                self.tokens += output_tokens
                self.ttft_s += first_s - arrival_s
                if output_tokens > 1:
                    self.tpot_s += (t_s - first_s) / (output_tokens - 1)
                    self.tpot_count += 1


def bench_engine(
    instances: int, requests: str, *, physics: bool = True, rate_rps: float = 0.0
) -> dict[str, float | int]:
    """Serve a workload on instances of one GPU each, as fast as it goes; see `measure_engine`."""
    measured = measure_engine(instances, requests, physics=physics, rate_rps=rate_rps)
    del measured["cpu_s"]
    return measured


def measure_engine(
    instances: int,
    requests: str,
    *,
    physics: bool = True,
    rate_rps: float = 0.0,
    tick_s: float = 1.0,
    gpu: str = "h100-sxm",
    model: str = "llama-3.1-8b",
) -> dict[str, float | int]:
    """Serve a workload on instances of one GPU each, as fast as it goes.

    Args:
        instances: how many.
        requests: a number of requests, or a CSV file as source ``csv`` reads it
            (`testbed.workloads.table`).
        physics: advance power, heat and clocks every ``tick_s``.
        rate_rps: arrivals of all instances together, where a number is given; 0 for
            `PER_INSTANCE_RPS` each.
        tick_s: length of a tick of run time.
        gpu: profile of the GPUs.
        model: what they serve.

    Raises:
        SpecError: the numbers make no sense.
        TraceError: the file cannot be read.
    """
    check_count("instances", instances, INSTANCES_MAX)
    check_rate(rate_rps)
    stream = bench_requests(requests, instances, rate_rps)
    bank = GpuBank(load_gpu(gpu), GpuState.create(instances))
    servers = ServerBank(bank, num_nodes=1)
    serving = servers.serving[0]
    config = EngineConfig()
    serving.configure(
        [
            InstanceConfig(name=str(k), pool="bench", model=model, tp=1, gpus=[k], engine=config)
            for k in range(instances)
        ],
        0.0,
    )
    tally = _Tally()
    begun, cpu_s = time.perf_counter(), time.process_time()
    with rare_collections():
        end_s = _drive(servers, stream, tally, tick_s if physics else 0.0)
    wall_s, cpu_s = time.perf_counter() - begun, time.process_time() - cpu_s
    return {
        "instances": instances,
        "requests": tally.ended,
        "wall_s": wall_s,
        "requests_per_s": tally.ended / wall_s,
        "tokens_per_s": tally.tokens / wall_s,
        "sim_over_wall": end_s / wall_s,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "ttft_mean_s": tally.ttft_s / max(1, tally.ended),
        "tpot_mean_s": tally.tpot_s / max(1, tally.tpot_count),
        "cpu_s": cpu_s,
    }


def bench_requests(requests: str, instances: int, rate_rps: float = 0.0) -> Iterator[Request]:
    """The workload that ``--requests`` names.

    Raises:
        SpecError: it is neither a number nor a file, or the number is out of range.
        TraceError: the file cannot be read, or a row is broken.
    """
    classes = [ClassSpec()]
    try:
        count = int(requests)
    except ValueError:
        if not Path(requests).is_file():
            raise SpecError(
                f"bench: requests = {requests!r} is neither a number nor a file"
            ) from None
        spec = WorkloadSpec(source="csv", trace=requests)
        # To its last row and no further: it would start again.
        return open_workload(spec, classes, 1, math.nextafter(last_arrival_s(requests), math.inf))
    check_count("requests", count, REQUESTS_MAX)
    rate_rps = rate_rps or PER_INSTANCE_RPS * instances
    spec = WorkloadSpec(source="poisson", rate_rps=rate_rps, max_prompt_tokens=4096)
    return _first(open_workload(spec, classes, 1, 1e9), count)


def _first(stream: Iterator[Request], count: int) -> Iterator[Request]:
    for _ in range(count):
        yield next(stream)


def _drive(servers: ServerBank, stream: Iterator[Request], tally: _Tally, tick_s: float) -> float:
    """Play the stream to its end; returns the run time at which the last request ended.

    Without physics the ticks only bring the engines up to date.
    """
    farm = servers.farm()
    instances = len(farm.engines)
    step_s = tick_s or 1.0
    next_s = step_s
    turn = 0
    request = next(stream, None)
    while request is not None or tally.arrivals:
        while request is not None and request.arrival_s < next_s:
            tally.arrivals[request.id] = (request.arrival_s, request.output_tokens)
            tally.count(farm.submit(turn, request, request.arrival_s))
            turn = turn + 1 if turn + 1 < instances else 0
            request = next(stream, None)
        tally.count(farm.advance_to(next_s))
        if tick_s:
            servers.tick(next_s)
        next_s += step_s
    return next_s - step_s
