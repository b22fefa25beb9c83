"""Speed at several sizes, beside a peer, with the recorder on and off, and how cost grows.

Each measurement runs in a process of its own, so that its peak memory is its own. ``cpu_s`` is
processor time of that process: on a machine that others use, it is what can be compared.
"""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from testbed import rig
from testbed.analysis.drawing import BLUE, GREY, Figure
from testbed.analysis.pictures import save
from testbed.bench import (
    INSTANCES_MAX,
    PER_INSTANCE_RPS,
    REQUESTS_MAX,
    bench_requests,
    check_count,
    check_rate,
)
from testbed.core.compiled import cache_folder
from testbed.core.errors import SpecError, TestbedError
from testbed.core.spec import RunSpec, parse_spec

Row = dict[str, Any]
Say = Callable[[str], None]

SIZES = (1, 8, 100, 1_000, 10_000)
FLEET_RPS = 8_000.0
"""Arrivals at 10,000 instances: what must be served faster than real time."""
FULL = ("record.gpu_period_s=0", "record.instance_period_s=0", "record.itl_period_s=0")
"""Every sample is recorded."""
THIN_EVERY = 100
SCALE_MIN, SCALE_MAX = 0.01, 100.0
"""Less than a hundredth would measure nothing but the start of a process."""
PEER = "ai-dynamo==1.3.1"

PUBLISHED = [
    # Azure 2023 lengths, Poisson; 10,000 requests on 8 instances at 24 requests/s, then 200,000 on
    # 1,000 at 6,450 requests/s; 2 cores. Measured once for this project; the profiles that Vidur
    # needs and splitwise-sim are in no registry, so they stand beside and are not run again.
    {"simulator": "Vidur (Python)", "at_8_rps": "563 to 610", "at_1000_rps": "568"},
    {"simulator": "splitwise-sim (Python)", "at_8_rps": "568 to 770", "at_1000_rps": ""},
    {"simulator": "NVIDIA Dynamo replay 1.3.1 (Rust)", "at_8_rps": "6,211", "at_1000_rps": "913"},
]


def alone(function: str, **arguments: Any) -> Row:
    """The result of a function of the bench in a fresh process.

    Raises:
        TestbedError: it failed there; with the last line that it said.
    """
    code = (
        "import json, sys\n"
        "from testbed import bench, bench_scale\n"
        f"result = {function}(**json.loads(sys.argv[1]))\n"
        "print(json.dumps(result))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise TestbedError(f"bench: {function} failed: {last}")
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


# (a) The engine at several sizes.


def bench_sizes(say: Say, *, scale: float = 1.0) -> list[Row]:
    """Requests/s at 1 to 10,000 instances, physics on and off, of the engine and of whole runs.

    Args:
        say: told a line as each is done.
        scale: multiplies the numbers of requests.

    Raises:
        SpecError: the scale makes no sense.
    """
    _check_scale(scale)
    rows = []
    for instances in SIZES:
        rate_rps = PER_INSTANCE_RPS * instances if instances < 10_000 else FLEET_RPS
        # At least a minute of run time, so that filling and draining do not weigh much.
        count = max(1000, round(scale * max(30_000, 60 * rate_rps)))
        for physics in (True, False):
            row = alone(
                "bench.measure_engine",
                instances=instances,
                requests=str(count),
                physics=physics,
                rate_rps=rate_rps,
            )
            rows.append({"what": "engine", "physics": physics, **row})
            say(_line(rows[-1]))
        row = alone("bench_scale.whole_run", instances=instances, requests=count, rate_rps=rate_rps)
        rows.append({"what": "whole run", "physics": True, **row})
        say(_line(rows[-1]))
    return rows


def _check_scale(scale: float) -> None:
    if not SCALE_MIN <= scale <= SCALE_MAX:
        raise SpecError(f"bench: scale = {scale:g} must be {SCALE_MIN:g} to {SCALE_MAX:g}")


def _line(row: Row) -> str:
    physics = "physics on " if row["physics"] else "physics off"
    return (
        f"{row['what']:9s} {row['instances']:6d} instances, {physics}: "
        f"{row['requests_per_s']:9,.0f} requests/s, {1e6 * row['cpu_s'] / row['requests']:6.1f} us "
        f"of CPU each, {row['sim_over_wall']:9,.1f} x real time, {row['peak_rss_mib']:6,.0f} MiB"
    )


def run_spec(instances: int, duration_s: float, rate_rps: float, *overrides: str) -> RunSpec:
    """A whole run on one GPU per instance, 8 to a node where they divide so."""
    per_node = math.gcd(instances, 8)
    nodes = instances // per_node
    rows = next(rows for rows in range(max(1, nodes // 50), nodes + 1) if nodes % rows == 0)
    text = f"""
        name = "bench"
        duration_s = {duration_s!r}
        drain_s = 600
        cluster = {{ rows = {rows}, nodes_per_row = {nodes // rows}, gpus_per_node = {per_node} }}
        pool = [{{ gpus_per_node = {per_node} }}]
        workload = {{ source = "poisson", rate_rps = {rate_rps!r}, max_prompt_tokens = 4096 }}
        router = {{ use = "power_of_two" }}
        policy = [{{ use = "row_power_cap", params = {{ period_s = 1.0, stale_s = 3.0 }} }}]
        control = {{ sample_period_s = 1.0, lease_s = 30.0, stale_s = 3.0, node_timeout_s = 30.0 }}
        record = {{ gpu_period_s = 60, instance_period_s = 60, itl_period_s = 60, views = false }}
    """
    return parse_spec(text, overrides)


def whole_run(
    instances: int, requests: int, rate_rps: float, overrides: tuple[str, ...] = ()
) -> Row:
    """A whole ``testbed run`` in virtual time: coordinator, router, policy, recorder, summary."""
    spec = run_spec(instances, requests / rate_rps, rate_rps, *overrides)
    begun_s, cpu_s = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as out:
        folder = rig.run(spec, out)
        wall_s, cpu_s = time.perf_counter() - begun_s, time.process_time() - cpu_s
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        size_bytes = sum(path.stat().st_size for path in folder.iterdir())
    ended = summary["requests"]["completed"]
    return {
        "instances": instances,
        "requests": ended,
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "requests_per_s": ended / wall_s,
        "tokens_per_s": summary["tokens"]["output"] / wall_s,
        "sim_over_wall": summary["duration_s"] / wall_s,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "recording_bytes": size_bytes,
    }


def bench_large(
    say: Say, *, instances: int = 1_000, requests: int = 10_000_000, thin: bool = False
) -> Row:
    """One long whole run, as `bench_sizes` has them, at 3 requests/s for each instance.

    Every request is recorded, and every sample (one a second) of GPUs and instances.

    Args:
        say: told what came out.
        instances: how many, of one GPU each.
        requests: how many in expectation; arrivals are Poisson.
        thin: record one of `THIN_EVERY` requests instead, and GPUs and instances once a minute.

    Raises:
        SpecError: the numbers make no sense.
    """
    check_count("instances", instances, INSTANCES_MAX)
    check_count("requests", requests, REQUESTS_MAX)
    row = alone(
        "bench_scale.whole_run",
        instances=instances,
        requests=requests,
        rate_rps=PER_INSTANCE_RPS * instances,
        overrides=[f"record.requests_every={THIN_EVERY}"] if thin else FULL,
    )
    row = {"thin": thin, "us_per_request": 1e6 * row["cpu_s"] / row["requests"], **row}
    say(
        f"{row['requests']:,} requests on {instances:,} instances: {row['cpu_s']:,.0f} s of CPU, "
        f"{row['us_per_request']:.1f} us each, {row['peak_rss_mib']:,.0f} MiB at most"
    )
    return row


# (b) The same workload on a peer.


def bench_dynamo(instances: int, count: int, say: Say, *, rate_rps: float = 0.0) -> Row:
    """The same requests on NVIDIA Dynamo's offline replay and here, one after the other.

    Both batch continuously with 256 sequences and 8,192 tokens, chunk prompts, count KV blocks and
    route round robin; iteration times are each one's own model of an H100-class GPU. Dynamo's
    start-up is not counted, ours neither.

    Raises:
        SpecError: the numbers make no sense.
        TestbedError: the peer cannot be installed or fails.
    """
    check_count("instances", instances, INSTANCES_MAX)
    check_count("requests", count, REQUESTS_MAX)
    check_rate(rate_rps)
    python = peer_python(say)
    with tempfile.TemporaryDirectory() as folder:
        table, trace = Path(folder, "requests.csv"), Path(folder, "trace.jsonl")
        with table.open("w") as ours, trace.open("w") as theirs:
            ours.write("arrival_s,prompt_tokens,output_tokens\n")
            for request in bench_requests(str(count), instances, rate_rps):
                prompt, output = request.prompt_tokens, request.output_tokens
                ours.write(f"{request.arrival_s!r},{prompt},{output}\n")
                first = 64 * request.id  # no prefix is shared
                entry = {
                    "timestamp": 1000.0 * request.arrival_s,
                    "input_length": prompt,
                    "output_length": output,
                    "hash_ids": list(range(first, first + -(-prompt // 512))),
                }
                theirs.write(json.dumps(entry) + "\n")
        peer = _replayed(python, trace, instances)
        say(f"dynamo replay: {peer['requests_per_s']:,.0f} requests/s")
        own = alone("bench.measure_engine", instances=instances, requests=str(table))
        say(f"ours, physics on: {own['requests_per_s']:,.0f} requests/s")
    return {
        "instances": instances,
        "requests": count,
        "peer": PEER,
        "ours": own,
        "dynamo": peer,
        "ratio_requests_per_s": own["requests_per_s"] / peer["requests_per_s"],
        "ratio_cpu": peer["cpu_s"] / own["cpu_s"],
        "published": PUBLISHED,
    }


_REPLAY = """
import json, resource, sys, time
from dynamo.replay import run_trace_replay
begun, cpu = time.perf_counter(), time.process_time()
report = run_trace_replay([sys.argv[1]], num_workers=int(sys.argv[2]))
wall, cpu = time.perf_counter() - begun, time.process_time() - cpu
print(json.dumps({
    "requests": report["completed_requests"], "wall_s": wall, "cpu_s": cpu,
    "requests_per_s": report["completed_requests"] / wall,
    "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    "ttft_mean_s": report["mean_ttft_ms"] / 1000, "tpot_mean_s": report["mean_tpot_ms"] / 1000,
}))
"""


def _replayed(python: Path, trace: Path, workers: int) -> Row:
    done = subprocess.run(
        [python, "-c", _REPLAY, trace, str(workers)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "DYN_LOG": "error", "PYTHONPATH": ""},
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise TestbedError(f"bench: {PEER} failed: {last}")
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def peer_python(say: Say) -> Path:
    """The interpreter of a virtual environment that has the peer, made when first needed.

    Raises:
        TestbedError: it cannot be installed.
    """
    folder = cache_folder() / PEER.replace("==", "-")
    python = folder / "bin" / "python"
    if (folder / ".ready").exists():
        return python
    say(f"installing {PEER} into {folder}, once")
    shutil.rmtree(folder, ignore_errors=True)
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", PEER],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise TestbedError(f"bench: {PEER} cannot be installed: {last}")
    (folder / ".ready").touch()
    return python


# (f) What recording costs.


def bench_recorder(say: Say, *, instances: int = 64, duration_s: float = 60.0) -> Row:
    """A whole run with every table in full, against one that keeps next to nothing."""
    rate_rps = PER_INSTANCE_RPS * instances
    count = round(rate_rps * duration_s)
    full = ("control.sample_period_s=0.1", *FULL, "record.views=true")
    little = (
        "control.sample_period_s=0.1", "record.gpu_period_s=1e6", "record.instance_period_s=1e6",
        "record.itl_period_s=1e6", "record.requests_every=1000000",
    )  # fmt: skip
    runs = {}
    for name, overrides in (("full", full), ("little", little)):
        runs[name] = alone(
            "bench_scale.whole_run",
            instances=instances,
            requests=count,
            rate_rps=rate_rps,
            overrides=overrides,
        )
        say(f"{name}: {runs[name]['cpu_s']:.2f} s of CPU, {runs[name]['recording_bytes']:,} bytes")
    samples = instances * duration_s / 0.1
    overhead_s = runs["full"]["cpu_s"] - runs["little"]["cpu_s"]
    return {
        "instances": instances,
        "requests": count,
        "gpu_samples": round(samples),
        "full_cpu_s": runs["full"]["cpu_s"],
        "little_cpu_s": runs["little"]["cpu_s"],
        "overhead_frac": overhead_s / runs["full"]["cpu_s"],
        "per_gpu_sample_us": 1e6 * overhead_s / samples,
        "recording_bytes": runs["full"]["recording_bytes"],
    }


# (g) How cost grows.


def bench_growth(say: Say, *, scale: float = 1.0) -> list[Row]:
    """CPU time of whole runs against GPUs, requests and run length, with fitted exponents.

    GPUs: the same requests on more and more of them. Requests: more and more on the same GPUs in
    the same time. Run length: the same rate for longer. An exponent of 1 is proportional, of 0
    free; it is the slope of a straight line through the logarithms.

    Raises:
        SpecError: the scale makes no sense.
    """
    _check_scale(scale)
    base = round(20_000 * scale)
    series: list[tuple[str, list[tuple[float, Row]]]] = []

    def measure(instances: int, count: int, rate_rps: float) -> Row:
        return alone(
            "bench_scale.whole_run", instances=instances, requests=count, rate_rps=rate_rps
        )

    rate_rps = 2_400.0
    gpus: list[tuple[float, Row]] = [
        (n, measure(n, 2 * base, rate_rps)) for n in (800, 1_600, 3_200, 6_400)
    ]
    series.append(("GPUs", gpus))
    requests: list[tuple[float, Row]] = [
        (k * base, measure(800, k * base, k * base / 10.0)) for k in (1, 2, 4)
    ]
    series.append(("requests", requests))
    length: list[tuple[float, Row]] = [
        (k * base / 300.0, measure(100, k * base, 300.0)) for k in (1, 2, 4, 8)
    ]
    series.append(("run length, s", length))
    rows = []
    for name, points in series:
        x = [point[0] for point in points]
        cpu_s = [point[1]["cpu_s"] for point in points]
        exponent = float(np.polyfit(np.log(x), np.log(cpu_s), 1)[0])
        rows.append({"against": name, "x": x, "cpu_s": cpu_s, "exponent": exponent})
        say(f"CPU time against {name}: exponent {exponent:.2f}")
    return rows


def write_growth_figure(rows: list[Row], path: Path) -> None:
    """The growth curves, one panel each, on logarithmic axes."""
    save([_growth(row) for row in rows], path, across=len(rows))


def _growth(row: Row) -> Figure:
    slope, offset = np.polyfit(np.log10(row["x"]), np.log10(row["cpu_s"]), 1)
    ends = [row["x"][0], row["x"][-1]]
    fitted = [10.0 ** (slope * math.log10(x) + offset) for x in ends]
    dots = {"color": BLUE, "size": 9}
    return Figure(
        row["against"],
        f"against {row['against']}: exponent {row['exponent']:.2f}",
        "CPU seconds",
        [
            {"x": ends, "y": fitted, "line": {"color": GREY, "width": 1}},
            {"x": row["x"], "y": row["cpu_s"], "mode": "markers", "marker": dots},
        ],
        {"xaxis": {"type": "log"}, "yaxis": {"type": "log"}},
    )
