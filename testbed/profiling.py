"""Profiles of serving, made by sweeping emulated instances and kept in the user's cache.

Every class of a run's requests is served by one emulated instance for each shape, clock and load,
all at once on one bank of GPUs: Poisson arrivals with lengths drawn from the run's own workload,
power from the counters, latency from the events. The closed loop is the run's own (engine, clocks,
heat), so a profile is right up to sampling noise and what a mix of classes does.

A profile is known by its content: models, GPU, engine, lengths, limits, and the sources of the
emulators and workloads.
"""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path

import msgspec
import numpy as np
from scipy.optimize import isotonic_regression

import emulators
from emulators.gpu import GpuBank
from emulators.models import load_model
from emulators.profiles import GpuProfile, load_gpu
from emulators.server import ServerBank
from emulators.state import GpuState
from testbed import workloads
from testbed.core.compiled import cache_folder
from testbed.core.messages import EngineConfig, InstanceConfig, Request
from testbed.core.spec import ClassSpec, RunSpec
from testbed.core.view import Floats, Ints
from testbed.policies.serving_profile import ServingProfile, Sweep
from testbed.workloads import open_workload

ALL = "all"
"""The mix of all classes, as it comes."""
LOADS = np.array([0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
REQUESTS = 600
"""Requests of each class and shape at 35 % of saturation; others in proportion to their load."""
EDGE = (0.6, 1.7)
"""P99 over its limit between which a load of a mix counts as close to the most that it can be."""
EDGE_REQUESTS = 5000
"""So many requests are served there once more. In a mix, few requests make the P99 (short
ones behind the longest prompts), and it rises slowly with the load: with `REQUESTS` alone what
a node can do with all classes came out 10 to 26 % apart (standard deviation over seeds)."""
_SAMPLE = 20_000
"""Requests of the workload that lengths are drawn from."""
_WARM_FRAC = 0.15
"""Share of the time that is not counted, while queues fill."""
_TICKS = 60
_KINDS = (".py", ".c", ".toml")
"""What of a package decides what it does."""


@dataclass(frozen=True, slots=True)
class _Lengths:
    """Requests that a class is profiled with, and what each was promised."""

    prompt: Ints
    output: Ints
    ttft_s: Floats
    tpot_s: Floats
    share: float
    """Share of the requests that are of this class."""

    @property
    def mixed(self) -> bool:
        """Whether some were promised something else than others."""
        return len(np.unique(self.ttft_s)) > 1


def profile_of(
    spec: RunSpec,
    sweep: Sweep,
    *,
    report: Callable[[str], None] = lambda text: None,
    workers: int = 1,
) -> ServingProfile:
    """The profile for the classes, engine and first model of a run, from the cache if it is there.

    Args:
        spec: the run.
        sweep: shapes and clocks.
        report: told when one has to be made, which takes some ten seconds.
        workers: processes that make it.
    """
    digest = _digest(spec, sweep)
    place = cache_folder() / "profiles" / f"{digest}.npz"
    try:
        return _read(place)
    except (OSError, ValueError, KeyError):
        report("profiling the emulated device: some ten seconds, once")
    profile = make_profile(spec, sweep, workers)
    _write(place, profile)
    return profile


def _digest(spec: RunSpec, sweep: Sweep) -> str:
    digest = hashlib.sha256()
    pool = spec.pool[0]
    told = [pool.model, pool.precision, pool.engine, spec.cluster.gpu, spec.workload]
    told += [spec.slo_class, spec.cluster.inlet_c, sweep, LOADS.tolist(), REQUESTS, _TICKS]
    told += [EDGE, EDGE_REQUESTS]
    digest.update(msgspec.json.encode(told))
    digest.update(repr(load_gpu(spec.cluster.gpu)).encode())
    digest.update(repr(load_model(pool.model)).encode())
    files = [Path(__file__)]
    for package in (emulators, workloads):
        folder = Path(str(package.__file__)).parent
        files += sorted(path for path in folder.iterdir() if path.suffix in _KINDS)
    trace = Path(spec.workload.trace)
    if spec.workload.trace and trace.is_file():
        files.append(trace)
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:24]


@lru_cache(maxsize=4)
def _read(place: Path) -> ServingProfile:
    with np.load(place, allow_pickle=False) as stored:
        found = {name: stored[name] for name in stored.files}
    return ServingProfile(
        classes=tuple(found.pop("classes").tolist()), tps=tuple(found.pop("tps").tolist()), **found
    )


def _write(place: Path, profile: ServingProfile) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    draft = place.with_name(f".{place.name}.{id(profile)}.npz")
    np.savez(draft, **{column.name: getattr(profile, column.name) for column in fields(profile)})
    draft.rename(place)


def make_profile(spec: RunSpec, sweep: Sweep, workers: int = 1) -> ServingProfile:
    """Sweep the emulated device: its classes one after another, or on processes."""
    gpu = load_gpu(spec.cluster.gpu)
    tps = tuple(tp for tp in sweep.tps if tp <= spec.cluster.gpus_per_node)
    clocks_mhz = np.unique(np.append(np.minimum(sweep.clocks_mhz, gpu.sm_clock_max_mhz),
                                     gpu.sm_clock_max_mhz))  # fmt: skip
    lengths = class_lengths(spec, sweep)
    # The same requests under two names are one measurement.
    first = {id(some): index for index, some in reversed(list(enumerate(lengths.values())))}
    measure = partial(_sweep_class, spec, tps, clocks_mhz)
    once = {index: some for index, some in enumerate(lengths.values()) if first[id(some)] == index}
    if workers > 1:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            found = dict(zip(once, pool.map(measure, once.values(), once), strict=True))
    else:
        found = {index: measure(some, index) for index, some in once.items()}
    columns = [found[first[id(some)]] for some in lengths.values()]
    saturation_rps, prefill_tps, power_w, ttft, tpot, running = (
        np.array(column) for column in zip(*columns, strict=True)
    )
    return ServingProfile(
        classes=tuple(lengths),
        shares=np.array([some.share for some in lengths.values()]),
        tps=tps,
        clocks_mhz=clocks_mhz,
        saturation_rps=saturation_rps,
        load_frac=LOADS,
        power_w=power_w,
        ttft_ratio=ttft,
        tpot_ratio=tpot,
        running=running,
        prefill_tps=prefill_tps,
        ttft_limit_s=np.array([some.ttft_s.min() for some in lengths.values()]),
    )


def _sweep_class(
    spec: RunSpec, tps: tuple[int, ...], clocks_mhz: Floats, lengths: _Lengths, seed: int
) -> tuple[list[float], list[float], Floats, Floats, Floats, Floats]:
    """Saturation and prefill rate by shape; power, P99 ratios and requests in flight over
    ``[tp, clock, load]``."""
    bench = _Bench(spec, load_gpu(spec.cluster.gpu), lengths, seed)
    saturation_rps, prefill_tps, swept = [], [], []
    for tp in tps:
        saturation_rps.append(bench.saturation_rps(tp))
        prefill_tps.append(bench.prefill_tps(tp))
        swept.append(bench.sweep(tp, clocks_mhz, saturation_rps[-1]))
    power_w, ttft, tpot, running = (np.array(column) for column in zip(*swept, strict=True))
    return saturation_rps, prefill_tps, power_w, ttft, tpot, running


def class_lengths(spec: RunSpec, sweep: Sweep) -> dict[str, _Lengths]:
    """Lengths of each class, and mix, in the run's workload (as its history would show them).

    A class that the sample has nothing of gets all requests cut to its bounds.
    """
    endless = open_workload(spec.workload, spec.slo_class, seed=0, duration_s=1e9)
    sample = list(islice(endless, _SAMPLE))
    by_name = {entry.name: entry for entry in spec.slo_class}
    found = {
        entry.name: _lengths(sample, [r for r in sample if r.slo_class == entry.name], by_name)
        for entry in spec.slo_class
    }
    mixed = _lengths(sample, sample, by_name)
    for name, some in found.items():
        if not len(some.prompt):
            found[name] = _cut(mixed, by_name[name])
    for name, members in sweep.mixes:
        chosen = [request for request in sample if request.slo_class in members]
        if len(chosen) == len(sample):
            found[name] = mixed
        else:
            found[name] = _lengths(sample, chosen, by_name) if chosen else found[members[-1]]
    return {**found, ALL: mixed}


def _lengths(
    sample: list[Request], requests: list[Request], classes: dict[str, ClassSpec]
) -> _Lengths:
    return _Lengths(
        np.array([r.prompt_tokens for r in requests], dtype=np.int64),
        np.array([r.output_tokens for r in requests], dtype=np.int64),
        np.array([classes[r.slo_class].ttft_s for r in requests]),
        np.array([classes[r.slo_class].tpot_s for r in requests]),
        len(requests) / len(sample),
    )


def _cut(mixed: _Lengths, to: ClassSpec) -> _Lengths:
    return _Lengths(
        np.clip(mixed.prompt, max(1, to.prompt_min_tokens), to.prompt_max_tokens),
        np.clip(mixed.output, max(1, to.output_min_tokens), to.output_max_tokens),
        np.full(len(mixed.prompt), to.ttft_s),
        np.full(len(mixed.prompt), to.tpot_s),
        0.0,
    )


class _Bench:
    """Instances that serve one class, as many as there are points."""

    def __init__(self, spec: RunSpec, gpu: GpuProfile, lengths: _Lengths, seed: int) -> None:
        self._spec, self._gpu, self._lengths = spec, gpu, lengths
        self._draw = np.random.default_rng([seed, 31])

    def _servers(self, tps: list[int]) -> ServerBank:
        state = GpuState.create(sum(tps))
        bank = GpuBank(self._gpu, state, inlet_c=self._spec.cluster.inlet_c)
        servers = ServerBank(bank, num_nodes=1)
        pool, firsts = self._spec.pool[0], np.cumsum([0, *tps]).tolist()
        engine: EngineConfig = pool.engine
        servers.serving[0].configure(
            [
                InstanceConfig(
                    name=str(k), pool=pool.name, model=pool.model, tp=tp, engine=engine,
                    gpus=list(range(firsts[k], firsts[k] + tp)), precision=pool.precision,
                )
                for k, tp in enumerate(tps)
            ],
            0.0,
        )  # fmt: skip
        return servers

    def _requests(self, count: int) -> tuple[Ints, list[Request]]:
        rows = self._draw.integers(len(self._lengths.prompt), size=count)
        prompts, outputs = self._lengths.prompt[rows].tolist(), self._lengths.output[rows].tolist()
        requests = [
            Request(k, 0.0, prompt, output)
            for k, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))
        ]
        return rows, requests

    def saturation_rps(self, tp: int) -> float:
        """Requests per second of an instance that never runs out of them."""
        serving = self._servers([tp]).serving[0]
        _, requests = self._requests(3 * REQUESTS)
        for request in requests:
            serving.submit(0, request, 0.0)
        serving.advance_to(1e9)
        ends_s = sorted(e.t_s for e in serving.drain_events() if e.kind == "finished")
        # From the middle on: the batch has filled, and has not begun to empty.
        early, late = len(ends_s) // 4, 3 * len(ends_s) // 4
        return (late - early) / (ends_s[late] - ends_s[early])

    def prefill_tps(self, tp: int) -> float:
        """Prompt tokens per second of an instance whose requests end with their first token."""
        serving = self._servers([tp]).serving[0]
        rows = self._draw.integers(len(self._lengths.prompt), size=REQUESTS)
        prompts = self._lengths.prompt[rows].tolist()
        for k, prompt in enumerate(prompts):
            serving.submit(0, Request(k, 0.0, prompt, 1), 0.0)
        serving.advance_to(1e9)
        last_s = max(event.t_s for event in serving.drain_events())
        return float(sum(prompts) / last_s)

    def sweep(
        self, tp: int, clocks_mhz: Floats, saturation_rps: float
    ) -> tuple[Floats, Floats, Floats, Floats]:
        """Power, P99 ratios and requests in flight of ``tp`` GPUs over ``[clock, load]``."""
        shape = (len(clocks_mhz), len(LOADS))
        points = [(clock, load) for clock in range(shape[0]) for load in range(shape[1])]
        found = np.zeros((4, *shape))
        served = np.broadcast_to(np.maximum(LOADS, LOADS[1] / 4) / 0.35, shape).copy()
        duration_s = REQUESTS / (0.35 * saturation_rps)
        whole = self._serve(tp, clocks_mhz, points, saturation_rps, duration_s)
        for point, values in whole.items():
            found[:, point[0], point[1]] = values
        worst = np.maximum(found[1], found[2])
        at_edge = (worst >= EDGE[0]) & (worst <= EDGE[1]) & self._lengths.mixed
        for load in np.flatnonzero(at_edge.any(axis=0)).tolist():
            edge = [(clock, load) for clock in np.flatnonzero(at_edge[:, load]).tolist()]
            duration_s = EDGE_REQUESTS / (LOADS[load] * saturation_rps)
            fine = self._serve(tp, clocks_mhz, edge, saturation_rps, duration_s)
            for point, values in fine.items():
                found[:, point[0], point[1]] = values
                served[point] = EDGE_REQUESTS / REQUESTS
        # More load never shortens a wait, a higher clock never lengthens it: else it is noise.
        for column in found[1:]:
            for clock in range(shape[0]):
                column[clock] = isotonic_regression(column[clock], weights=served[clock]).x
            for load in range(shape[1]):
                column[:, load] = isotonic_regression(
                    column[:, load], weights=served[:, load], increasing=False
                ).x
        power_w, ttft, tpot, running = found
        return power_w, ttft, tpot, running

    def _serve(
        self,
        tp: int,
        clocks_mhz: Floats,
        points: list[tuple[int, int]],
        saturation_rps: float,
        duration_s: float,
    ) -> dict[tuple[int, int], tuple[float, float, float, float]]:
        """Power, P99 ratios and requests in flight at some points ``(clock, load)``."""
        if not points:
            return {}
        servers = self._servers([tp] * len(points))
        serving = servers.serving[0]
        locks = servers.bank.state.control["sm_clock_lock_max_mhz"]
        for (clock, _), members in zip(points, serving.gpu_lists, strict=True):
            locks[members] = round(float(clocks_mhz[clock]))
        # The same arrivals at every clock, so that clocks differ by what they do alone.
        arrivals = {
            load: self._arrivals(float(LOADS[load]) * saturation_rps, duration_s)
            for load in sorted({load for _, load in points})
        }
        streams = [_Stream(*arrivals[load]) for _, load in points]
        tally = [_Tally(len(stream.at_s)) for stream in streams]
        warm_j = np.zeros(servers.bank.count)
        warm_s = 0.0
        for tick in range(1, _TICKS + 1):
            until_s = duration_s * tick / _TICKS
            for index, stream in enumerate(streams):
                stream.submit_until(serving, index, until_s)
            servers.tick(until_s)
            for index, engine in enumerate(serving.engines):
                tally[index].take(engine.events)
                engine.events.clear()
            if tick == round(_WARM_FRAC * _TICKS):
                warm_s, warm_j = until_s, servers.bank.energy_j.copy()
        drawn_w = (servers.bank.energy_j - warm_j) / (duration_s - warm_s)
        found = {}
        for index, point in enumerate(points):
            stream, seen = streams[index], tally[index]
            ratios = self._ratios(stream, seen, warm_s, duration_s)
            left_s = np.where(np.isnan(seen.end_s), duration_s, seen.end_s) - stream.at_s
            draw_w = float(drawn_w[serving.gpu_lists[index]].sum())
            found[point] = (draw_w, *ratios, float(left_s.sum()) / duration_s)
        return found

    def _arrivals(self, rps: float, duration_s: float) -> tuple[Floats, Ints, list[Request]]:
        count = int(self._draw.poisson(rps * duration_s))
        at_s = np.sort(self._draw.uniform(0.0, duration_s, count))
        rows, requests = self._requests(count)
        return at_s, rows, requests

    def _ratios(
        self, stream: _Stream, tally: _Tally, warm_s: float, end_s: float
    ) -> tuple[float, float]:
        """P99 over the limits; a request that never got a token waited until the end at least."""
        counted = stream.at_s >= warm_s
        if not counted.any():
            return 0.0, 0.0
        rows = stream.rows[counted]
        first_s = np.where(np.isnan(tally.first_s), end_s, tally.first_s)[counted]
        ttft = (first_s - stream.at_s[counted]) / self._lengths.ttft_s[rows]
        steps = self._lengths.output[rows] - 1
        ended = ~np.isnan(tally.end_s[counted]) & (steps > 0)
        tpot = (tally.end_s[counted] - first_s)[ended] / steps[ended]
        tpot /= self._lengths.tpot_s[rows][ended]
        return float(np.quantile(ttft, 0.99)), float(np.quantile(tpot, 0.99)) if len(tpot) else 0.0


class _Stream:
    """Arrivals of one instance."""

    def __init__(self, at_s: Floats, rows: Ints, requests: list[Request]) -> None:
        self.at_s, self.rows, self._requests = at_s, rows, requests
        self._times = at_s.tolist()
        self._next = 0

    def submit_until(self, serving: object, index: int, until_s: float) -> None:
        times, place = self._times, self._next
        submit = serving.submit  # type: ignore[attr-defined]
        while place < len(times) and times[place] <= until_s:
            submit(index, self._requests[place], times[place])
            place += 1
        self._next = place


class _Tally:
    """When each request got its first and its last token."""

    def __init__(self, count: int) -> None:
        self.first_s = np.full(count, np.nan)
        self.end_s = np.full(count, np.nan)

    def take(self, events: list) -> None:  # type: ignore[type-arg]
        for event in events:
            if event.kind == "first_token":
                self.first_s[event.request_id] = event.t_s
            elif event.kind == "finished":
                self.end_s[event.request_id] = event.t_s
