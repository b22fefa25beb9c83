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
soon as it is there; what is killed loses only what was under way, and ``resume`` does the rest.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
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

_ATTEMPTS = 3
"""How often a run is begun whose worker was killed under it."""
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
    count: int = 1
    seed: int = 1
    fields: dict[str, _Range] = {}


class SweepSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A sweep file."""

    base: str
    name: str = "sweep"
    mode: Literal["virtual", "emulated"] = "virtual"
    grid: dict[str, list[Any]] = {}
    point: list[Values] = []
    random: _Random = _Random()
    keep_recordings: bool = False
    """Keep each run's recording under ``points/``; by default only its summary is kept."""


class Job(NamedTuple):
    """One run to do: its number, the base spec's text and what to change in it."""

    number: int
    base: str
    overrides: list[str]
    keep: str
    """Folder for the recording; empty to throw it away."""


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
    for field, values in sweep.grid.items():
        if not values:
            raise SpecError(f"sweep {path}: grid.{field} = [] must have at least one value")
    for field, drawn in sweep.random.fields.items():
        ordered = drawn.low < drawn.high and (drawn.low > 0 or not drawn.log)
        if not drawn.choice and not ordered:
            raise SpecError(
                f"sweep {path}: random.fields.{field}: needs a choice, or low < high "
                f"(above 0 with log), not low = {drawn.low}, high = {drawn.high}"
            )
    if sweep.random.count < 1:
        raise SpecError(f"sweep {path}: random.count = {sweep.random.count} must be at least 1")
    return sweep


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
    if not sweep.random.fields:
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
    with tempfile.TemporaryDirectory(prefix="testbed-sweep-") as scratch:
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
        SpecError: the file cannot be used, or is another than the interrupted one.
        TestbedError: runs kept failing for a reason that is not in them.
    """
    sweep = load_sweep(path)
    base = path.parent / sweep.base
    try:
        text = base.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"sweep {path}: base = {sweep.base!r}: cannot be read: {error}") from None
    folder = resume or new_run_folder(out, sweep.name)
    changes = points(sweep)
    _remember(folder, {"sweep": msgspec.to_builtins(sweep), "base": text}, resume is not None)
    jobs = [
        Job(number, text, _overrides(sweep, change), _keep(folder, sweep, number))
        for number, change in enumerate(changes)
    ]
    parse_spec(text)  # one clear error before anything is started
    results = folder / "results"
    results.mkdir(exist_ok=True)
    left = [job for job in jobs if not (results / f"{job.number:06d}.json").exists()]
    done = len(jobs) - len(left)
    progress(done, len(jobs))
    runs = (
        _on_ray(left, address, workers) if engine == "ray" else on_processes(left, workers, run_job)
    )
    for number, result in runs:
        _write(results / f"{number:06d}.json", result)
        done += 1
        progress(done, len(jobs))
    write_table(folder, changes)
    return folder


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


def _keep(folder: Path, sweep: SweepSpec, number: int) -> str:
    return str(folder.absolute() / "points" / f"{number:06d}") if sweep.keep_recordings else ""


def _overrides(sweep: SweepSpec, change: Values) -> list[str]:
    overrides = [f"mode={json.dumps(sweep.mode)}"]
    return overrides + [f"{field}={_toml(value)}" for field, value in change.items()]


def _toml(value: Any) -> str:
    """A value as TOML writes it in a line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(entry) for entry in value) + "]"
    return json.dumps(value)


def _write(path: Path, tree: Any) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(tree), encoding="utf-8")
    temporary.rename(path)


# Engines.


def on_processes(
    jobs: Sequence[_J], workers: int, work: Callable[[_J], dict[str, Any]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Runs on processes of this machine, as they end; a killed worker's runs are begun again.

    Args:
        jobs: what to do, each with its own number.
        workers: runs at once; as many as there are cores for 0.
        work: does one job in a worker; a function of a module.
    """
    count = workers or os.cpu_count() or 1
    attempts = dict.fromkeys((job.number for job in jobs), 0)
    left = {job.number: job for job in jobs}
    while left:
        with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
            waiting: dict[Future[dict[str, Any]], int] = {}
            queue = iter(list(left.values()))
            try:
                # As many as can run, and one each to go on with: what a broken pool takes down.
                for job in itertools.islice(queue, 2 * count):
                    waiting[pool.submit(work, job)] = job.number
                while waiting:
                    ended, _ = wait(waiting, return_when=FIRST_COMPLETED)
                    for future in ended:
                        result = future.result()
                        number = waiting.pop(future)
                        del left[number]
                        yield number, result
                        for job in itertools.islice(queue, 1):
                            waiting[pool.submit(work, job)] = job.number
            except BrokenProcessPool:
                for number in waiting.values():
                    attempts[number] += 1
                    if attempts[number] >= _ATTEMPTS:
                        raise TestbedError(
                            f"sweep: run {number} ended its worker {_ATTEMPTS} times "
                            "(out of memory?); what was finished is kept"
                        ) from None


def _on_ray(jobs: list[Job], address: str, workers: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Runs on a Ray cluster, as they end; those of a lost node are begun again elsewhere."""
    try:
        import ray
    except ImportError:
        raise SpecError("--engine ray: pip install 'serving-testbed[ray]'") from None
    started = not ray.is_initialized()
    if started:
        ray.init(
            address=address or None,
            num_cpus=workers or None if not address else None,
            include_dashboard=False,
            log_to_driver=False,
        )
    try:
        remote = ray.remote(num_cpus=1, max_retries=_ATTEMPTS)(run_job)
        waiting = {remote.remote(job): job.number for job in jobs}
        while waiting:
            ended, _ = ray.wait(list(waiting), num_returns=1)
            for reference in ended:
                number = waiting.pop(reference)
                try:
                    result = ray.get(reference)
                except ray.exceptions.RayError as error:
                    raise TestbedError(f"sweep: run {number}: {error}") from None
                yield number, result
    finally:
        if started:
            ray.shutdown()


# The table.


def write_table(folder: Path, changes: list[Values]) -> None:
    """``table.csv`` and ``table.parquet`` from the results that are there."""
    rows: list[dict[str, Any]] = []
    for number, change in enumerate(changes):
        place = folder / "results" / f"{number:06d}.json"
        if place.exists():
            result = json.loads(place.read_text(encoding="utf-8"))
            shown = {
                f: v if not isinstance(v, dict | list) else _toml(v) for f, v in change.items()
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
