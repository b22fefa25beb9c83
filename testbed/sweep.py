"""Many runs of one spec with fields changed: a grid, a list, a random sample, or all three.

A sweep is a TOML file:

    base = "run.toml"            # beside this file
    name = "caps"
    [grid]                       # every combination
    "cluster.row_budget_w" = [3000, 3600, 4200]
    seed = [1, 2, 3]
    [[point]]                    # and these, each with every combination above
    "router.use" = "round_robin"
    [[point]]
    "router.use" = "least_loaded"
    [random]                     # and for each of those, draws of a random sample
    count = 5
    seed = 7
    fields = { "workload.rate_rps" = { low = 10.0, high = 60.0, log = true } }

Each run becomes a line of ``table.csv`` and ``table.parquet``: its number, what was changed, and
every number of its summary. The table's order is the sweep's, whatever ran first, so it does not
depend on the engine: processes of this machine, or Ray on many. A run's result is written down as
soon as it is there; what is killed loses only what was under way. Runs whose worker or node died
are begun again, and ``resume`` does what a killed sweep left.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import itertools
import json
import logging
import math
import multiprocessing
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from testbed import rig
from testbed.core.errors import SpecError, TestbedError
from testbed.core.spec import parse_spec
from testbed.recorder.writer import new_run_folder

Values = dict[str, Any]
Results = Iterator[tuple[int, dict[str, Any] | None]]
"""Runs as they end: number and result, which is None if whatever ran it died each time."""

_ATTEMPTS = 3
"""How often a run is begun whose worker was killed under it."""
_RAY_QUEUE = 1000
"""Runs given to a Ray cluster at once: enough for as many cores."""
_DATES = (datetime.datetime, datetime.date, datetime.time)
_NOT_COMPARABLE = ("run_id", "wall_s", "run_folder")
"""Of a summary: what differs between two runs that are the same."""


class _Range(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a random value comes from: ``choice``, or ``low`` to ``high``."""

    low: float = math.nan
    high: float = math.nan
    log: bool = False
    """Evenly over the logarithm."""
    integer: bool = False
    choice: list[Any] = []


class _Random(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    count: int
    fields: dict[str, _Range]
    seed: int = 1


class SweepSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A sweep file."""

    base: str
    name: str = "sweep"
    mode: Literal["virtual", "emulated"] = "virtual"
    grid: dict[str, list[Any]] = {}
    point: list[Values] = []
    random: _Random | None = None
    keep_recordings: bool = False
    """Keep each run's recording under ``points/``; by default only its summary is kept."""


class Job(NamedTuple):
    """One run to do."""

    number: int
    base: str
    """Text of the base spec."""
    overrides: list[str]
    place: str
    """Working folder: paths in the base, of policies and traces, count from there."""
    scratch: str
    """Where recordings go that are thrown away, if that folder is there."""
    keep: str
    """Where the recording goes; empty to throw it away."""


class _Numbered(Protocol):
    @property
    def number(self) -> int: ...


_J = TypeVar("_J", bound=_Numbered)


def load_sweep(path: Path) -> SweepSpec:
    """Read a sweep file.

    Raises:
        SpecError: it cannot be read; names the field, its value and what is allowed.
    """
    try:
        text = path.read_text(encoding="utf-8")
        sweep = msgspec.toml.decode(text, type=SweepSpec)
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"sweep {path}: cannot be read: {error}") from None
    except msgspec.MsgspecError as error:
        raise SpecError(f"sweep {path}: {error}") from None
    try:
        _check(sweep)
    except (SpecError, TypeError) as error:  # dates are values of TOML, and no value of a run's
        raise SpecError(f"sweep {path}: {error}") from None
    return sweep


def _check(sweep: SweepSpec) -> None:
    """What no single field can say about itself."""
    if not sweep.name or "/" in sweep.name or sweep.name.startswith("."):
        raise SpecError(f"name = {sweep.name!r} must be the name of a folder")
    for field, values in sweep.grid.items():
        if not values:
            raise SpecError(f"grid.{field} = [] must have at least one value")
    ranges = sweep.random.fields if sweep.random else {}
    places = [("grid", set(sweep.grid)), ("random.fields", set(ranges))]
    for (name, fields), (other, others) in itertools.combinations(
        [*places, *((f"point {k}", set(point)) for k, point in enumerate(sweep.point))], 2
    ):
        if fields & others and not (name.startswith("point") and other.startswith("point")):
            raise SpecError(f"{min(fields & others)!r} is in {name} and in {other}")
    if sweep.random and sweep.random.count < 1:
        raise SpecError(f"random.count = {sweep.random.count} must be at least 1")
    if sweep.random and not ranges:
        raise SpecError("random.fields = {} must have at least one field")
    for field, drawn in ranges.items():
        ranged = not (math.isnan(drawn.low) and math.isnan(drawn.high))
        ordered = drawn.low < drawn.high < math.inf and (drawn.low > 0 or not drawn.log)
        if bool(drawn.choice) == ranged or (ranged and not ordered):
            raise SpecError(
                f"random.fields.{field}: needs either a choice, or low < high (above 0 with log), "
                f"not choice = {drawn.choice}, low = {drawn.low}, high = {drawn.high}"
            )
    json.dumps(msgspec.to_builtins(sweep, builtin_types=_DATES))


def points(sweep: SweepSpec) -> list[Values]:
    """What each run changes, in the order of the table.

    >>> [*points(SweepSpec("a", grid={"seed": [1, 2]}, point=[{"x": 5}, {"x": 6}]))][1:3]
    [{'x': 5, 'seed': 2}, {'x': 6, 'seed': 1}]
    """
    combinations = [
        dict(zip(sweep.grid, values, strict=True))
        for values in itertools.product(*sweep.grid.values())
    ]
    found = [{**point, **grid} for point in sweep.point or [{}] for grid in combinations]
    if not sweep.random:
        return found
    draw = np.random.default_rng(sweep.random.seed)
    samples = [
        {field: _drawn(draw, drawn) for field, drawn in sweep.random.fields.items()}
        for _ in range(sweep.random.count)
    ]
    return [{**point, **sample} for point in found for sample in samples]


def _drawn(draw: np.random.Generator, drawn: _Range) -> Any:
    if drawn.choice:
        return drawn.choice[int(draw.integers(len(drawn.choice)))]
    if drawn.log:
        value = math.exp(draw.uniform(math.log(drawn.low), math.log(drawn.high)))
    else:
        value = float(draw.uniform(drawn.low, drawn.high))
    return round(value) if drawn.integer else value


def run_job(job: Job) -> dict[str, Any]:
    """Do one run, here; returns the numbers of its summary.

    A run that its spec forbids is a line with an ``error``, since a grid may well cross a limit.
    """
    with contextlib.ExitStack() as stack:
        if os.path.isdir(job.place):  # on another machine it need not be
            stack.enter_context(contextlib.chdir(job.place))
        within = job.scratch if os.path.isdir(job.scratch) else None
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="sweep-", dir=within))
        try:
            spec = parse_spec(job.base, job.overrides)
            folder = rig.run(spec, job.keep or scratch)
        except TestbedError as error:
            return {"error": str(error)}
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return {"error": "", **flat(summary)}


def flat(tree: dict[str, Any], before: str = "") -> dict[str, Any]:
    """Numbers and truths of a summary by their path.

    >>> flat({"ttft_s": {"p50": 0.1}, "valid": True, "wall_s": 3.0})
    {'ttft_s.p50': 0.1, 'valid': True}
    """
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found.update(flat(value, f"{before}{name}."))
        elif isinstance(value, bool | int | float) and name not in _NOT_COMPARABLE:
            found[f"{before}{name}"] = value
    return found


Progress = Callable[[int, int], None]
"""Told how many runs are done, of how many."""


def run_sweep(
    path: Path,
    out: Path,
    *,
    engine: Literal["local", "ray"] = "local",
    address: str = "",
    workers: int = 0,
    resume: Path | None = None,
    progress: Progress = lambda done, count: None,
) -> Path:
    """Do all runs of a sweep; returns the folder with ``table.csv`` and ``table.parquet``.

    Args:
        path: the sweep file.
        out: folder that gets a folder for this sweep.
        engine: processes of this machine, or a Ray cluster.
        address: of the cluster, as Ray takes it; a new one on this machine by default.
        workers: runs at once; as many as there are cores by default.
        resume: folder of a sweep that was interrupted: only what it lacks is done.
        progress: called after each run.

    Raises:
        SpecError: the file cannot be used, or is another than the interrupted one; or there is an
            address without Ray.
        TestbedError: runs kept failing for a reason that is not in them.
    """
    if address and engine != "ray":
        raise SpecError(
            f"--address {address!r}: only with --engine ray: {engine!r} stays on this machine"
        )
    sweep = load_sweep(path)
    base = path.parent / sweep.base
    try:
        text = base.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"sweep {path}: base = {sweep.base!r}: cannot be read: {error}") from None
    changes = points(sweep)
    _check_runs(text, [_overrides(sweep, change) for change in changes])
    folder = (resume or new_run_folder(out, sweep.name)).absolute()
    facts = {"sweep": msgspec.to_builtins(sweep), "base": text}
    _remember(folder, facts, resume is not None)
    results, scratch, kept = (folder / name for name in ("results", "scratch", "points"))
    shutil.rmtree(scratch, ignore_errors=True)  # of runs that were killed
    for place in (results, scratch):
        place.mkdir(exist_ok=True)
    jobs = [
        Job(
            number,
            text,
            _overrides(sweep, change),
            os.getcwd(),
            str(scratch),
            str(kept / f"{number:06d}") if sweep.keep_recordings else "",
        )
        for number, change in enumerate(changes)
        if not _result(folder, number).exists()
    ]
    done = len(changes) - len(jobs)
    progress(done, len(changes))
    runs = (
        _on_ray(jobs, address, workers) if engine == "ray" else on_processes(jobs, workers, run_job)
    )
    died: list[int] = []
    for number, result in runs:
        if result is None:
            died.append(number)
            continue
        _write(_result(folder, number), result)
        done += 1
        progress(done, len(changes))
    shutil.rmtree(scratch, ignore_errors=True)
    write_table(folder, changes)
    if died:
        raise TestbedError(
            f"sweep {folder}: what ran {', '.join(map(str, died))} died {_ATTEMPTS} times (out of "
            "memory?); the table has all other runs, and --resume tries again"
        )
    return folder


def _check_runs(base: str, overrides: list[list[str]]) -> None:
    """One clear error before anything is started, if no run of the sweep can be."""
    first: SpecError | None = None
    for each in overrides:
        try:
            parse_spec(base, each)
            return
        except SpecError as error:
            first = first or error
    raise first or SpecError("sweep: no runs")


def _remember(folder: Path, facts: dict[str, Any], resuming: bool) -> None:
    """Keep what the sweep was, and hold a resumed one to it."""
    place = folder / "sweep.json"
    if not resuming:
        _write(place, facts)
        return
    try:
        before = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SpecError(f"--resume {folder}: no sweep there: {error}") from None
    if before != json.loads(json.dumps(facts)):
        raise SpecError(f"--resume {folder}: the sweep or its base has changed since then")


def _result(folder: Path, number: int) -> Path:
    return folder / "results" / f"{number:06d}.json"


def _overrides(sweep: SweepSpec, change: Values) -> list[str]:
    overrides = [f"mode={json.dumps(sweep.mode)}"]
    return overrides + [f"{field}={toml_text(value)}" for field, value in change.items()]


def toml_text(value: Any) -> str:
    """A value as TOML writes it in a line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {toml_text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(toml_text(entry) for entry in value) + "]"
    return json.dumps(value)


def _write(path: Path, tree: Any) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(tree), encoding="utf-8")
    temporary.rename(path)


# Engines.


def _end_with_parent() -> None:
    """Have this process end when the one that started it does, of whatever death."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def on_processes(
    jobs: Iterable[_J], workers: int, work: Callable[[_J], dict[str, Any]]
) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """On processes of this machine, as they end; None for one that died at every attempt.

    Args:
        jobs: what to do, each with its own number.
        workers: at once; as many as there are cores for 0.
        work: does one, in a worker; a function of a module.

    A worker that dies takes down its pool. What was under way then is begun again at the end, each
    alone in a pool, so that one run that cannot live does not take others with it.
    """
    count = workers or len(os.sched_getaffinity(0))
    queue, alone = iter(jobs), list[_J]()
    while under_way := (yield from _in_pool(queue, count, work)):
        alone += under_way
    for job in alone:
        for _ in range(_ATTEMPTS - 1):
            if not (yield from _in_pool(iter([job]), 1, work)):
                break
        else:
            yield job.number, None


def _in_pool(
    queue: Iterator[_J], count: int, work: Callable[[_J], dict[str, Any]]
) -> Generator[tuple[int, dict[str, Any] | None], None, list[_J]]:
    """Runs from the queue in a pool of processes until it breaks; what was under way then.

    No more is taken from the queue than is run at once.
    """
    context = multiprocessing.get_context("spawn")
    under_way: dict[int, _J] = {}
    futures: dict[Future[dict[str, Any]], int] = {}
    with (
        ProcessPoolExecutor(count, mp_context=context, initializer=_end_with_parent) as pool,
        contextlib.suppress(BrokenProcessPool),
    ):
        while True:
            for job in itertools.islice(queue, count - len(futures)):
                under_way[job.number] = job
                futures[pool.submit(work, job)] = job.number
            if not futures:
                break
            for future in wait(futures, return_when=FIRST_COMPLETED).done:
                result = future.result()
                number = futures.pop(future)
                del under_way[number]
                yield number, result
    return list(under_way.values())


def _on_ray(jobs: Iterable[Job], address: str, workers: int) -> Results:
    """On a Ray cluster, which begins those of a lost worker or node again elsewhere."""
    try:
        import ray
    except ImportError:
        raise SpecError("--engine ray: pip install 'serving-testbed[ray]'") from None
    _reach(address)
    options = {"address": address} if address else {"address": "local", "num_cpus": workers or None}
    try:
        ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise SpecError(f"--engine ray --address {address!r}: {error}") from None
    try:
        remote = ray.remote(num_cpus=1, max_retries=_ATTEMPTS - 1)(run_job)
        queue = iter(jobs)
        waiting: dict[Any, int] = {}
        while True:
            room = (workers or _RAY_QUEUE) - len(waiting)
            waiting.update(
                (remote.remote(job), job.number) for job in itertools.islice(queue, room)
            )
            if not waiting:
                return
            ended, _ = ray.wait(list(waiting), num_returns=1)
            for reference in ended:
                number = waiting.pop(reference)
                try:
                    yield number, ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    raise TestbedError(f"sweep: run {number}: {error}") from None
                except ray.exceptions.RayError:
                    yield number, None
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Say at once when nobody listens there: Ray would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10.0).close()
    except (OSError, OverflowError) as error:
        raise SpecError(f"--engine ray --address {address!r}: {error}") from None


# The table.


def write_table(folder: Path, changes: list[Values]) -> None:
    """``table.csv`` and ``table.parquet`` from the results that are there."""
    rows: list[dict[str, Any]] = []
    for number, change in enumerate(changes):
        place = _result(folder, number)
        if place.exists():
            result = json.loads(place.read_text(encoding="utf-8"))
            shown = {
                f: v if not isinstance(v, dict | list) else toml_text(v) for f, v in change.items()
            }
            rows.append({"run": number, **shown, **result})
    names = list(dict.fromkeys(name for row in rows for name in row))
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        draft = Path(scratch) / "table.csv"
        with draft.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names, restval="")
            writer.writeheader()
            writer.writerows(rows)
        shutil.move(draft, folder / "table.csv")
        columns = {name: _column([row.get(name) for row in rows]) for name in names}
        draft = Path(scratch) / "table.parquet"
        pq.write_table(pa.table(columns), draft)
        shutil.move(draft, folder / "table.parquet")


def _column(values: list[Any]) -> Any:
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} and float in kinds:
        return pa.array([None if value is None else float(value) for value in values])
    if len(kinds) > 1:
        return pa.array([None if value is None else str(value) for value in values])
    return pa.array(values)
