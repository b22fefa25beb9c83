"""Experiments: a question, the runs that answer it, and rows to hold against a paper.

An experiment is a folder with a README (question, answer, figure) and an ``experiment.py``:

    def cases(options: Options) -> list[Case]            which runs to make
    def rows(results: Results) -> list[Row]              what they say
    def measure(case, folder) -> Values                  optional: numbers of one run
    def figures(results: Results) -> list[Figure]        optional; in ``figure.py`` or here
    MODES = ("virtual", "emulated")                      optional; virtual alone by default
    def prepare(cases: list[Case]) -> None               optional: once, before the runs
    DECLARED = {"name": value}                           optional: free parameters, for the result

It is loaded by its place, as a policy is: nothing is registered. A folder with a ``run.toml`` only
is a single run, or that run with several seeds; a ``quick.toml`` beside it says what a quick one
has in other fields. Runs are spread over processes of this machine (live ones are made one by one),
and thrown away once measured unless they are to be kept.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

import msgspec

from testbed import rig
from testbed.analysis.drawing import Figure
from testbed.analysis.page import Page, card, table, tag
from testbed.analysis.statistics import Estimate, change_of, mean_of
from testbed.core.errors import SpecError, TestbedError
from testbed.core.spec import parse_spec
from testbed.recorder.writer import new_run_folder
from testbed.sweep import Progress, on_processes, toml_text

Mode = Literal["virtual", "emulated", "hardware"]
Values = dict[str, Any]
"""What was measured of one run: numbers by name, and lists for figures. JSON in any depth."""

MARKS = ("paper", "secondary", "uncertain", "ours")
"""How sure the paper's number is: read in it, in notes on it, recalled; or not the paper's."""


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for on the command line."""

    mode: Mode = "virtual"
    quick: bool = False
    """Under a minute: few seeds, short runs, the main comparison only."""
    seeds: int = 0
    """How many; 0 leaves it to the experiment."""

    def seed_list(self, full: int = 5, quick: int = 2) -> list[int]:
        """Seeds 1, 2, ...: as many as asked for, else the experiment's own number."""
        return list(range(1, 1 + (self.seeds or (quick if self.quick else full))))


class Case(msgspec.Struct, frozen=True):
    """One run: a system (``arm``) on a trace or load (``scenario``) with a seed."""

    arm: str
    seed: int
    scenario: str = ""
    spec: str = ""
    """The run file's text."""
    overrides: list[str] = []
    """``path=value``, as ``testbed run --set`` takes them."""
    params: Values = {}
    """For an experiment with its own ``measure``."""

    @property
    def name(self) -> str:
        """For people: scenario, arm, seed."""
        return " ".join(part for part in (self.scenario, self.arm, f"seed {self.seed}") if part)


class Result(msgspec.Struct, frozen=True):
    """A run and its numbers."""

    case: Case
    values: Values


@dataclass(frozen=True, slots=True)
class Results:
    """All runs of an experiment, with the questions that rows and figures ask of them."""

    runs: list[Result]
    options: Options = field(default_factory=Options)

    def arms(self, scenario: str = "") -> list[str]:
        """Systems that were run on a scenario, in the order of the cases."""
        found = (run.case.arm for run in self.runs if run.case.scenario == scenario)
        return list(dict.fromkeys(found))

    def scenarios(self) -> list[str]:
        """In the order of the cases."""
        return list(dict.fromkeys(run.case.scenario for run in self.runs))

    def of(self, arm: str, scenario: str = "") -> list[Result]:
        """The runs of a system on a scenario."""
        return [r for r in self.runs if r.case.arm == arm and r.case.scenario == scenario]

    def by_seed(self, number: str, arm: str, scenario: str = "") -> dict[int, float]:
        """A number of each run; ``number`` is its path, as in ``ttft_s.p99``.

        Raises:
            KeyError: no such run, or it did not measure that.
        """
        found = {run.case.seed: _number(run, number) for run in self.of(arm, scenario)}
        if not found:
            raise KeyError(f"no runs of {arm!r} on {scenario!r}")
        return found

    def mean(self, number: str, arm: str, scenario: str = "") -> Estimate:
        """Mean over seeds, with its interval."""
        return mean_of(list(self.by_seed(number, arm, scenario).values()))

    def change(self, number: str, arm: str, against: str, scenario: str = "") -> Estimate:
        """Relative change against another system on the same seeds; -0.5 is half of it."""
        return change_of(
            self.by_seed(number, arm, scenario), self.by_seed(number, against, scenario)
        )

    def change_row(
        self, number: str, arm: str, against: str, scenario: str = "", **facts: Any
    ) -> Row:
        """A row in percent against a baseline: baseline 0, ours the change."""
        change = self.change(number, arm, against, scenario).scaled(100.0)
        facts = {"metric": f"{number}, {scenario}".strip(", "), "unit": "%"} | facts
        return Row(baseline=0.0, against=against, arm=arm, **facts).with_ours(change)

    def mean_row(
        self, number: str, arm: str, against: str = "", scenario: str = "", *,
        scale: float = 1.0, **facts: Any,
    ) -> Row:  # fmt: skip
        """A row of means: the baseline's where one is named, and ours."""
        base = self.mean(number, against, scenario).scaled(scale).mean if against else None
        facts = {"metric": f"{number}, {scenario}".strip(", "), "unit": ""} | facts
        row = Row(baseline=base, against=against, arm=arm, **facts)
        return row.with_ours(self.mean(number, arm, scenario).scaled(scale))


def _number(run: Result, path: str) -> float:
    place: Any = run.values
    for part in path.split("."):
        if not isinstance(place, dict) or part not in place:
            raise KeyError(f"{run.case.name}: measured no {path!r}")
        place = place[part]
    return float(place)


class Row(msgspec.Struct, frozen=True):
    """One comparison. ``baseline``, ``ours`` and ``paper`` are in the same ``unit``."""

    metric: str
    unit: str
    baseline: float | None
    """The same quantity of the baseline, on our testbed; 0 where the row is a change against it."""
    ours: float | None = None
    paper: float | None = None
    """The paper's number where it is comparable."""
    mark: str = "ours"
    against: str = ""
    """Name of the baseline."""
    arm: str = ""
    """Name of the system that ``ours`` is of."""
    ci95: list[float] | None = None
    """Interval of ``ours`` over seeds."""
    seeds: int = 0
    note: str = ""

    def with_ours(self, estimate: Estimate) -> Row:
        """The row with a measured value."""
        return msgspec.structs.replace(
            self,
            ours=estimate.mean,
            ci95=[estimate.low, estimate.high],
            seeds=estimate.num,
        )


@dataclass(frozen=True, slots=True)
class Experiment:
    """An experiment as it was found: its folder, and its module if it has one."""

    name: str
    folder: Path
    module: ModuleType | None

    @property
    def spec(self) -> Path:
        """The run file."""
        return self.folder / "run.toml"

    @property
    def modes(self) -> tuple[str, ...]:
        """Modes that it can be made in; what a single run cannot, its run file's check says."""
        if self.module is None:
            return get_args(Mode)
        return tuple(getattr(self.module, "MODES", ("virtual",)))

    def quick_overrides(self) -> list[str]:
        """What a quick single run has in other fields, as ``testbed run --set`` takes it.

        Raises:
            SpecError: the folder does not say, or not in TOML.
        """
        path = self.folder / "quick.toml"
        try:
            tree = msgspec.toml.decode(path.read_text(encoding="utf-8"))
        except OSError:
            raise SpecError(
                f"experiment {self.name!r}: --quick: a single run needs a quick.toml beside its "
                "run.toml that says what to shorten, as in duration_s = 20"
            ) from None
        except (UnicodeDecodeError, msgspec.DecodeError) as error:
            raise SpecError(f"{path}: not TOML: {error}") from None
        return _overrides_of(tree)


def _overrides_of(tree: dict[str, Any], path: str = "") -> list[str]:
    """Each value of a tree of tables, with its path.

    >>> _overrides_of({"duration_s": 20.0, "cluster": {"rows": 1, "gpu": "h100-sxm"}})
    ['duration_s=20.0', 'cluster.rows=1', 'cluster.gpu="h100-sxm"']
    """
    found: list[str] = []
    for name, value in tree.items():
        if isinstance(value, dict):
            found += _overrides_of(value, f"{path}{name}.")
        else:
            found.append(f"{path}{name}={toml_text(value)}")
    return found


def folders() -> list[Path]:
    """Where experiments are looked for: below here, then those that were installed."""
    places = [Path("experiments")]
    found = importlib.util.find_spec("experiments")
    places += [Path(place) for place in (found.submodule_search_locations or ())] if found else []
    return [place for place in places if place.is_dir()]


def available_experiments() -> list[str]:
    """Names of the experiments that `find_experiment` knows."""
    names = {
        folder.name
        for place in folders()
        for folder in place.iterdir()
        if (folder / "experiment.py").exists() or (folder / "run.toml").exists()
    }
    return sorted(names)


def find_experiment(name: str) -> Experiment:
    """The experiment of this name, or in this folder.

    Raises:
        SpecError: there is none, or it cannot be loaded.
    """
    for folder in [Path(name), *(place / name for place in folders())]:
        if (folder / "experiment.py").is_file():
            return Experiment(folder.name, folder, _load(folder / "experiment.py"))
        if (folder / "run.toml").is_file():
            return Experiment(folder.name, folder, None)
    known = ", ".join(available_experiments())
    raise SpecError(f"experiment {name!r} is none of: {known}; or give its folder")


def _load(path: Path) -> ModuleType:
    """A module by its place. Files beside it are imported by ``load_beside``."""
    path = path.resolve()
    module_name = f"_experiment_{path.parent.name}_{path.stem}"
    if module_name in sys.modules and sys.modules[module_name].__file__ == str(path):
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise SpecError(f"{path}: cannot be read as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except TestbedError:
        raise
    except Exception as error:
        del sys.modules[module_name]
        raise SpecError(f"{path}: {type(error).__name__}: {error}") from error
    return module


def load_beside(file: str, name: str) -> Any:
    """A module ``name`` beside ``file``, for experiments of several files."""
    return _load(Path(file).parent / f"{name}.py")


# One run.


def measure_run(case: Case, folder: Path) -> Values:
    """Make the run of a case below ``folder``; its summary, with the run's folder."""
    run_folder = rig.run(parse_spec(case.spec, case.overrides), folder)
    summary: Values = json.loads((run_folder / "summary.json").read_text(encoding="utf-8"))
    return {**summary, "run_folder": str(run_folder)}


class _Job(msgspec.Struct, frozen=True):
    number: int
    experiment: str
    case: Case
    keep: str


def _run_job(job: _Job) -> Values:
    """Make one run, here; what it measured, or its ``error``."""
    module = find_experiment(job.experiment).module
    measure: Callable[[Case, Path], Values] = getattr(module, "measure", measure_run)
    with tempfile.TemporaryDirectory(prefix="testbed-experiment-") as scratch:
        try:
            values = measure(job.case, Path(job.keep or scratch))
        except TestbedError as error:
            return {"error": " ".join(str(error).split())}
    return values if job.keep else {k: v for k, v in values.items() if k != "run_folder"}


_SINGLE_ROWS: tuple[tuple[str, str, str, float], ...] = (
    ("requests.slo_attained_frac", "requests within their limits", "%", 100.0),
    ("goodput_rps", "requests within their limits, per second", "1/s", 1.0),
    ("ttft_s.p99", "P99 time to first token", "ms", 1e3),
    ("itl_s.p99", "P99 time between tokens", "ms", 1e3),
    ("power_w.mean", "mean power of the GPUs", "W", 1.0),
    ("power_w.max", "highest power of the GPUs", "W", 1.0),
    ("breaches.s", "time over a row's budget", "s", 1.0),
    ("ledger.energy_kwh", "energy", "kWh", 1.0),
    ("ledger.carbon_kg", "carbon", "kg", 1.0),
    ("ledger.energy_usd", "price of the energy", "USD", 1.0),
)
"""What a single run's seeds are compared in: number, metric, unit, scale."""


def _single_cases(experiment: Experiment, options: Options) -> list[Case]:
    """The run of a folder without ``experiment.py``, once per seed."""
    text = experiment.spec.read_text(encoding="utf-8")
    more = [f'mode="{options.mode}"']
    more += experiment.quick_overrides() if options.quick else []
    return [
        Case(experiment.name, seed, "", text, [*more, f"seed={seed}"])
        for seed in options.seed_list(full=1, quick=1)
    ]


def _single_rows(results: Results) -> list[Row]:
    """Means over seeds of what every run can tell; there is no baseline."""
    [arm] = results.arms()
    rows = []
    for number, metric, unit, scale in _SINGLE_ROWS:
        try:
            rows.append(results.mean_row(number, arm, scale=scale, metric=metric, unit=unit))
        except TypeError:  # not known of one of them, as latency where nothing was served
            continue
    return rows


# All of them.


def run_experiment(
    experiment: Experiment,
    options: Options,
    out: Path,
    *,
    workers: int = 0,
    keep: bool = False,
    progress: Progress = lambda done, count: None,
) -> tuple[Path, dict[str, Any]]:
    """Make all runs; returns the folder of the result and the object that ``--json`` prints.

    Raises:
        SpecError: it cannot be made in that mode.
        TestbedError: a run failed; names it.
    """
    module = experiment.module
    if options.mode not in experiment.modes:
        raise SpecError(
            f"experiment {experiment.name!r}: mode = {options.mode!r} must be one of "
            f"{', '.join(experiment.modes)}"
        )
    if options.seeds < 0:
        raise SpecError(f"--seeds = {options.seeds} must be at least 1")
    begun = time.monotonic()
    cases: list[Case] = (
        _single_cases(experiment, options) if module is None else module.cases(options)
    )
    prepare: Callable[[list[Case]], None] = getattr(module, "prepare", lambda cases: None)
    prepare(cases)
    folder = new_run_folder(out, experiment.name)
    place = str(experiment.folder.resolve())
    jobs = [
        _Job(number, place, case, str(folder.absolute() / "runs" / f"{number:04d}") if keep else "")
        for number, case in enumerate(cases)
    ]
    found: dict[int, Values] = {}
    progress(0, len(jobs))
    at_once = 1 if options.mode != "virtual" else workers
    for number, values in on_processes(jobs, at_once, _run_job):
        if values is None:
            raise TestbedError(f"{experiment.name}: {cases[number].name}: died (out of memory?)")
        if "error" in values:
            raise TestbedError(f"{experiment.name}: {cases[number].name}: {values['error']}")
        found[number] = values
        progress(len(found), len(jobs))
    results = Results([Result(case, found[k]) for k, case in enumerate(cases)], options)
    result = {
        "experiment": experiment.name,
        "run_id": folder.name,
        "mode": options.mode,
        "quick": options.quick,
        "seeds": sorted({case.seed for case in cases}),
        "runs": len(cases),
        "wall_s": time.monotonic() - begun,
        "rows": msgspec.to_builtins(
            _single_rows(results) if module is None else module.rows(results)
        ),
        "declared": getattr(module, "DECLARED", {}),
        "provenance": _provenance(options, results),
        "folder": str(folder),
    }
    (folder / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    (folder / "cases.json").write_text(
        json.dumps(msgspec.to_builtins(results.runs)), encoding="utf-8"
    )
    write_page(folder, experiment, result, _figures(experiment, results))
    return folder, result


def read_results(folder: Path) -> Results:
    """The runs of a finished experiment, to draw its figures again."""
    try:
        runs = msgspec.json.decode((folder / "cases.json").read_bytes(), type=list[Result])
        told = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, msgspec.MsgspecError, ValueError) as error:
        raise TestbedError(f"{folder}: no result of an experiment: {error}") from None
    return Results(runs, Options(told["mode"], told["quick"], len(told["seeds"])))


def _figures(experiment: Experiment, results: Results) -> list[Figure]:
    if experiment.module is None:
        return []
    beside = experiment.folder / "figure.py"
    module = _load(beside) if beside.is_file() else experiment.module
    draw: Callable[[Results], list[Figure]] = getattr(module, "figures", lambda results: [])
    return draw(results)


def _provenance(options: Options, results: Results) -> dict[str, Any]:
    """Where the numbers come from."""
    specs = [parse_spec(run.case.spec, run.case.overrides) for run in results.runs if run.case.spec]
    return {
        "time": "virtual" if options.mode == "virtual" else "measured",
        "devices": "hardware" if options.mode == "hardware" else "emulated",
        "gpu_profiles": sorted({spec.cluster.gpu for spec in specs}),
        "models": sorted({pool.model for spec in specs for pool in spec.pool}),
        "valid": all(run.values.get("valid", True) for run in results.runs),
        "invalid_because": sorted(
            {text for run in results.runs for text in run.values.get("invalid_because", ())}
        ),
        "version": version("serving-testbed"),
        "python": platform.python_version(),
        "host": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


# What people read.


def row_lines(rows: list[dict[str, Any]], *, narrow: bool = False) -> list[list[str]]:
    """Rows as text, under a head; narrow ones have unit and mark beside the numbers."""
    if narrow:
        return [["metric", "system", "base", "ours", "95 %", "paper"], *map(_narrow_line, rows)]
    head = ["metric", "system", "against", "unit", "baseline", "ours", "95 %", "paper", "mark"]
    return [head, *(_line(row) for row in rows)]


def _line(row: dict[str, Any]) -> list[str]:
    interval = row["ci95"]
    spread = f"{shown(interval[0])} to {shown(interval[1])}" if interval else "-"
    cells = [row["metric"], row["arm"], row["against"], row["unit"]]
    numbers = [shown(row[name]) for name in ("baseline", "ours")]
    return [*cells, *numbers, spread, shown(row["paper"]), row["mark"]]


def _narrow_line(row: dict[str, Any]) -> list[str]:
    metric, arm, _, unit, baseline, ours, spread, paper, mark = _line(row)
    paper = paper if paper == "-" else f"{paper} {mark}"
    return [metric, arm, baseline, f"{ours} {unit}".strip(), spread, paper]


def shown(value: float | None) -> str:
    """A number for a table: about three digits.

    >>> shown(12345.6), shown(-3.14159), shown(0.0123), shown(None)
    ('12,346', '-3.14', '0.0123', '-')
    """
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def write_page(
    folder: Path, experiment: Experiment, result: dict[str, Any], figures: list[Figure]
) -> Path:
    """``report.html``: rows, figures, what was declared and where the numbers come from."""
    page = Page(f"Experiment {experiment.name}", f"testbed experiment {experiment.name}")
    facts = [
        result["mode"],
        f"{result['runs']} runs",
        f"{len(result['seeds'])} seeds",
        f"{result['wall_s']:.0f} s",
        *(["quick"] if result["quick"] else []),
    ]
    page.head(
        tag("h1", f"Experiment {experiment.name}")
        + f'<p class="facts">{"".join(tag("span", fact, "badge") for fact in facts)}</p>'
    )
    page.section("figures", "Figures", page.figures(figures))
    head, *lines = row_lines(result["rows"])
    notes = [row["note"] for row in result["rows"]]
    lines = [[*line, note] for line, note in zip(lines, notes, strict=True)]
    rows = table([*head, "note"], lines, right=(4, 5, 6, 7))
    page.section("rows", "Rows", card(rows))
    for name, title in (("declared", "Declared"), ("provenance", "Provenance")):
        entries = [[key, str(value)] for key, value in result[name].items()]
        page.section(name, title, card(table(("what", "value"), entries)) if entries else "")
    place = folder / "report.html"
    place.write_text(page.html(), encoding="utf-8")
    return place
