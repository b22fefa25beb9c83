"""The command line: arguments -> rig -> analysis. No logic of its own.

Errors meant for users (`TestbedError`) end in one line on stderr and exit status 2; with ``--json``
stdout carries one JSON object and nothing else.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, Literal

import click
import pynvml
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from emulators.models import available_models
from emulators.profiles import available_gpus
from testbed import bench_scale, rig
from testbed import emulate as emulation
from testbed.analysis.compare import compare as comparison
from testbed.analysis.compare import comparison_lines, write_comparison
from testbed.analysis.export import export as export_recording
from testbed.analysis.fidelity import compare as compare_with_measured
from testbed.analysis.fidelity_figures import write_page, write_svg
from testbed.analysis.report import ledger_number, write_report
from testbed.bench import bench_engine
from testbed.bench_live import bench_intake, bench_lateness, bench_lateness_series
from testbed.bench_timing import bench_evaluation
from testbed.calibrate import calibrate, load_profile, validate, write_profile
from testbed.core import compiled
from testbed.core.errors import DeviceError, SpecError, TestbedError
from testbed.core.spec import PolicySpec, load_spec
from testbed.core.transport.zmq import generate_keys
from testbed.doctor import examine
from testbed.experiment import Options, find_experiment, row_lines, run_experiment
from testbed.policies.load import load_controller, shipped_policies
from testbed.publish import publish
from testbed.recorder.replay import replay as replay_policies
from testbed.sweep import Progress as SweepProgress
from testbed.sweep import run_sweep

_ERR = Console(stderr=True)
_OUT = Console()
_WIDE = 120
"""Columns of text that a table with a column for everything takes."""


class _Failure(click.ClickException):
    exit_code = 2


class _Group(click.Group):
    """Turns our errors into one line and a non-zero exit."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except TestbedError as error:
            raise _Failure(" ".join(str(error).split())) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="serving-testbed", prog_name="testbed")
def main() -> None:
    """Emulate clouds that serve LLMs and multimodal models, hardware in the loop."""


_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object and no more.")


def _print_json(tree: Any) -> None:
    click.echo(json.dumps(tree, allow_nan=False))


def _compile_first() -> None:
    """Compile the engine if that has not been done, and start this command over with it."""
    told = (compiled.PURE_VARIABLE, compiled.ONCE_VARIABLE)
    if compiled.in_use() or any(os.environ.get(name) for name in told):
        return
    reason = compiled.why_not()
    if not reason:
        click.echo("compiling the engine: half a minute, once", err=True)
        try:
            compiled.build()
        except (RuntimeError, OSError) as error:
            reason = str(error)
    if reason:
        click.echo(f"the engine runs interpreted, three times slower: {reason}", err=True)
        return
    sys.stderr.flush()
    os.execve(  # the slow engine is imported by now
        sys.executable,
        [sys.executable, "-m", "testbed.cli", *sys.argv[1:]],
        {**os.environ, compiled.ONCE_VARIABLE: "1"},
    )


# Runs.


@main.command()
@click.argument("spec", type=click.Path(path_type=Path))
@click.option(
    "--mode",
    type=click.Choice(["virtual", "emulated", "hardware"]),
    help="Override the spec's mode.",
)
@click.option(
    "--set", "overrides", multiple=True, metavar="PATH=VALUE",
    help="Override any field, as in cluster.rows=2 or policy.0.params.trip=0.9.",
)  # fmt: skip
@click.option("--trace", help="Trace file for the workload, or the name of one we ship.")
@click.option("--seed", type=int, help="Override the spec's seed.")
@click.option("--policy", "policies", multiple=True, metavar="NAME|FILE.py:CLASS",
              help="Run these controllers in place of the spec's.")  # fmt: skip
@click.option("--router", metavar="NAME|FILE.py:CLASS", help="Run this router.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs"), show_default=True)
@click.option("--bind", default="tcp://127.0.0.1:0", show_default=True,
              help="Where a live coordinator listens.")  # fmt: skip
@click.option("--no-spawn", is_flag=True, help="Wait for nodes started by hand (testbed node).")
@click.option("--device", type=click.Choice(["cuda", "cpu"]),
              help="What runs the kernels in hardware mode.")  # fmt: skip
@click.option("--forward", metavar="URL",
              help="In hardware mode, serve by this OpenAI-compatible server.")  # fmt: skip
@click.option("--allow-hardware-writes", is_flag=True, help="Let nodes set limits on real GPUs.")
@click.option("--curve-secret", type=click.Path(path_type=Path),
              help="The coordinator's secret key file (testbed keys).")  # fmt: skip
@click.option("--curve-clients", type=click.Path(path_type=Path),
              help="Folder of the nodes' public keys: nobody else is let in.")  # fmt: skip
@click.option("--no-report", is_flag=True, help="Do not write report.html.")
@_JSON
def run(
    spec: Path,
    mode: str | None,
    overrides: tuple[str, ...],
    trace: str | None,
    seed: int | None,
    policies: tuple[str, ...],
    router: str | None,
    out: Path,
    bind: str,
    no_spawn: bool,
    device: str | None,
    forward: str | None,
    allow_hardware_writes: bool,
    curve_secret: Path | None,
    curve_clients: Path | None,
    no_report: bool,
    as_json: bool,
) -> None:
    """Run SPEC.toml and write its recording to runs/<id>/."""
    _compile_first()
    more = list(overrides)
    if mode is not None:
        more.append(f'mode="{mode}"')
    if trace is not None:
        more.append(f"workload.trace={json.dumps(trace)}")
    if device is not None:
        more.append(f'device="{device}"')
    if forward is not None:
        more.append(f"forward={json.dumps(forward)}")
    if seed is not None:
        more.append(f"seed={seed}")
    if policies:
        tables = ", ".join(f"{{use = {json.dumps(use)}}}" for use in policies)
        more.append(f"policy=[{tables}]")
    if router is not None:
        more.append(f"router={{use = {json.dumps(router)}}}")
    checked = load_spec(spec, more)
    progress = _Progress(quiet=as_json and not sys.stderr.isatty())
    folder = rig.run(
        checked,
        out,
        progress=progress,
        bind=bind,
        spawn=not no_spawn,
        allow_writes=allow_hardware_writes,
        curve=rig.curve_of(curve_secret, clients=curve_clients),
    )
    progress.close()
    _show_run(folder, report=not no_report, as_json=as_json)


@main.command()
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--no-report", is_flag=True, help="Do not write report.html.")
@_JSON
def resume(folder: Path, no_report: bool, as_json: bool) -> None:
    """Go on with a virtual run that was broken off, from its last checkpoint.

    The run file must have asked for them: record.checkpoint_s.
    """
    _compile_first()
    progress = _Progress(quiet=as_json and not sys.stderr.isatty())
    rig.resume(folder, progress=progress)
    progress.close()
    _show_run(folder, report=not no_report, as_json=as_json)


def _show_run(folder: Path, *, report: bool, as_json: bool) -> None:
    if report:
        write_report(folder)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    if as_json:
        _print_json(summary)
    else:
        _show_summary(summary, folder)


class _Progress:
    """One line on stderr, rewritten while a run goes on."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._tty = sys.stderr.isatty()
        self._last = 0.0

    def __call__(self, status: rig.Status) -> None:
        if self._quiet:
            return
        now = time.monotonic()
        if not self._tty and now - self._last < 10.0:
            return
        self._last = now
        if status.nodes < status.num_nodes and status.now_s == 0.0:
            text = f"waiting for nodes: {status.nodes} of {status.num_nodes} said hello"
        else:
            left = "" if math.isnan(status.left_s) else f"about {status.left_s:.0f} s left"
            text = (
                f"{status.now_s:7.1f} of {status.duration_s:.0f} s  "
                f"{status.ended}/{status.arrived} requests ended  "
                f"{status.power_w / 1000:.2f} kW  {status.nodes}/{status.num_nodes} nodes  "
                f"{left}"
            )
        if self._tty:
            click.echo(f"\r\x1b[2K{text}", nl=False, err=True)
        else:
            click.echo(text, err=True)

    def close(self) -> None:
        """Leave the line."""
        if self._tty and not self._quiet:
            click.echo("", err=True)


def _show_summary(summary: dict[str, Any], folder: Path) -> None:
    table = Table(title=f"{summary['run_id']} ({summary['mode']})", show_header=False)
    requests = summary["requests"]

    def line(name: str, value: str) -> None:
        table.add_row(name, value)

    def spread(part: dict[str, float | None], unit: str, scale: float = 1.0) -> str:
        return "  ".join(
            f"{key} {value * scale:.4g} {unit}" if value is not None else f"{key} -"
            for key, value in part.items()
        )

    counts = (
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in requests.items()
    )
    line("requests", "  ".join(counts))
    line("time to first token", spread(summary["ttft_s"], "s"))
    line("gap between tokens", spread(summary["itl_s"], "ms", 1000))
    line("power", spread(summary["power_w"], "W"))
    line("energy", _ledger_words(summary["ledger"]))
    breaches = summary["breaches"]
    line("over budget", f"{breaches['count']} times, {breaches['s']:.1f} s in all")
    line("commands", "  ".join(f"{key} {value}" for key, value in summary["commands"].items()))
    late = dict(summary["lateness_s"])
    missed = late.pop("missed")
    line("lateness", f"{spread(late, 'ms', 1000)}  missed {missed or 0:.0f} events")
    line("valid", "yes" if summary["valid"] else "NO: see the report")
    line("recording", str(folder))
    if (folder / "report.html").exists():
        line("report", str(folder / "report.html"))
    _OUT.print(table)


def _ledger_words(ledger: dict[str, Any]) -> str:
    """What a run drew, emitted and cost, in a line."""
    number = ledger_number
    host = f" (GPUs {number(ledger['gpu_kwh'])})" if ledger["host_kwh"] else ""
    carbon = "" if ledger["carbon_kg"] is None else f"  {number(ledger['carbon_kg'])} kg CO2"
    return (
        f"{number(ledger['energy_kwh'])} kWh{host}{carbon}  {number(ledger['energy_usd'])} USD"
        f"  and {number(ledger['gpu_usd'])} USD of GPU time"
    )


@main.command("publish")
@click.argument("run", type=click.Path(path_type=Path))
def publish_command(run: Path) -> None:
    """Fill the README of an experiment, and draw its pictures, from a finished run of it."""
    for name, text in publish(run).items():
        click.echo(f"{name}:\n{text}\n")


@main.command()
@click.option("--coordinator", required=True, metavar="tcp://HOST:PORT")
@click.option("--name", required=True, multiple=True,
              help="Path of this node in the run, as row0/rack0/node000; several emulated nodes, "
              "at consecutive places, share the process.")  # fmt: skip
@click.option("--emulate", default="", metavar="8xH100", help="Emulated GPUs; else the driver's.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option(
    "--forward", default="", metavar="URL", help="Serve by this OpenAI-compatible server."
)
@click.option("--cores", default=1, show_default=True, help="With --device cpu.")
@click.option("--state-dir", type=click.Path(path_type=Path), default=Path("/var/lib/testbed"),
              show_default=True, help="Journal and GPU state.")  # fmt: skip
@click.option("--seed", default=1, show_default=True)
@click.option("--place", default=0, show_default=True, help="Index of this node in the run.")
@click.option("--inlet-c", default=24.0, show_default=True)
@click.option("--temp-spread-c", default=2.0, show_default=True)
@click.option("--gpu-order-c", default=0.0, show_default=True,
              help="Last emulated GPU in the airflow over the first.")  # fmt: skip
@click.option("--lose", multiple=True, metavar="[NODE:]GPU@SECONDS",
              help="Lose an emulated GPU then.")  # fmt: skip
@click.option("--delay-s", default=0.005, show_default=True, help="Agreed delay of the wire.")
@click.option("--tenants", default="", metavar="JSON", help="The run file's tenants table.")
@click.option("--curve-secret", type=click.Path(path_type=Path),
              help="This node's secret key file (testbed keys).")  # fmt: skip
@click.option("--curve-server", type=click.Path(path_type=Path),
              help="The coordinator's public key file.")  # fmt: skip
@click.option("--orphan-exit-s", default=float("inf"), show_default=True,
              help="Leave when the coordinator is silent for this long.")  # fmt: skip
@click.option("--realtime", is_flag=True, help="Ask for real-time priority (SCHED_FIFO).")
@click.option("--allow-hardware-writes", is_flag=True, help="Really set limits on real GPUs.")
def node(name: tuple[str, ...], state_dir: Path, lose: tuple[str, ...], **options: Any) -> None:
    """Be the daemon of one node, or of several emulated ones."""
    faults: dict[str, list[tuple[float, int]]] = {each: [] for each in name}
    for text in lose:
        whose, _, fault = text.rpartition(":")
        if (whose or name[0]) not in faults:
            raise SpecError(f"--lose {text!r}: no node of this process is called {whose!r}")
        faults[whose or name[0]].append(rig.parse_fault(fault))
    first = options.pop("place")
    rig.host(
        [
            rig.NodeOptions(
                name=each,
                place=first + index,
                state_dir=state_dir if len(name) == 1 else state_dir / each.replace("/", "."),
                faults=faults[each],
                **options,
            )
            for index, each in enumerate(name)
        ],
        log=lambda text: click.echo(f"{time.strftime('%H:%M:%S')} {text}", err=True),
    )


@main.command()
@click.option("--coordinator", required=True, metavar="tcp://HOST:PORT")
@click.option("--name", required=True, help="Of this relay, as row0/relay.")
@click.option("--bind", default="tcp://127.0.0.1:0", show_default=True,
              help="Where its nodes connect to; printed once it listens.")  # fmt: skip
@click.option("--hold-s", default=0.002, show_default=True,
              help="Longest wait for the slowest node, below the agreed delay.")  # fmt: skip
@click.option("--curve-secret", type=click.Path(path_type=Path),
              help="This relay's secret key file (testbed keys).")  # fmt: skip
@click.option("--curve-server", type=click.Path(path_type=Path),
              help="The coordinator's public key file.")  # fmt: skip
@click.option("--curve-clients", type=click.Path(path_type=Path),
              help="Folder of its nodes' public keys: nobody else is let in.")  # fmt: skip
@click.option("--orphan-exit-s", default=float("inf"), show_default=True,
              help="Leave when the coordinator is silent for this long.")  # fmt: skip
def relay(**options: Any) -> None:
    """Merge what a row of nodes reports into one message, and pass on the rest."""
    rig.relay(
        rig.RelayOptions(**options),
        log=lambda text: click.echo(f"{time.strftime('%H:%M:%S')} {text}", err=True),
        ready=click.echo,
    )


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("name")
def keys(folder: Path, name: str) -> None:
    """Make a pair of CURVE keys, NAME.key (public) and NAME.key_secret, in FOLDER."""
    for path in generate_keys(folder, name):
        click.echo(path)


@main.command()
@_JSON
def doctor(as_json: bool) -> None:
    """Say what this node can measure and throttle, why not, and what to do."""
    findings = examine()
    if as_json:
        _print_json([finding._asdict() for finding in findings])
        return
    table = Table(title="this node")
    for head in ("what", "works", "found", "what to do"):
        table.add_column(head)
    for what, works, detail, todo in findings:
        table.add_row(what, "yes" if works else "no", escape(detail), escape(todo))
    _OUT.print(table)


@main.command(context_settings={"ignore_unknown_options": True})
@click.option("--gpus", default="8xH100", show_default=True, metavar="COUNTxMODEL")
@click.option("--load", default="idle", show_default=True,
              help="idle, decode, prefill, constant:SHARE or sine:PERIOD_S.")  # fmt: skip
@click.option("--lose", multiple=True, metavar="GPU@SECONDS", help="That GPU falls off the bus.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def emulate(gpus: str, load: str, lose: tuple[str, ...], command: tuple[str, ...]) -> None:
    """Run any NVML program against emulated GPUs: testbed emulate --gpus 8xH100 -- nvitop."""
    count, name = rig.parse_gpus(gpus)
    raise SystemExit(
        emulation.emulate(
            count,
            name,
            emulation.parse_load(load),
            list(command),
            lambda text: click.echo(f"warning: {text}", err=True),
            faults=[rig.parse_fault(text) for text in lose],
        )
    )


@main.command()
@click.option("--state", type=click.Path(path_type=Path),
              help="State file of emulated GPUs: runs/<id>/nodes/<node>/gpus.state.")  # fmt: skip
def smi(state: Path | None) -> None:
    """Show GPUs as NVML shows them: emulated ones by state file, else the driver's."""
    try:
        _OUT.print(emulation.smi_table(emulation.open_nvml(state)))
    except pynvml.NVMLError as error:
        raise DeviceError(f"NVML: {error}") from None


# Recordings.

_RUNS = click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))


@main.command()
@_RUNS
def report(runs: tuple[Path, ...]) -> None:
    """Write report.html into each run folder, from its recording alone."""
    for folder in runs:
        click.echo(write_report(folder))


@main.command()
@_RUNS
@click.option("--html", type=click.Path(path_type=Path), help="Also draw the runs over each other.")
@_JSON
def compare(runs: tuple[Path, ...], html: Path | None, as_json: bool) -> None:
    """Set two or more runs side by side."""
    if len(runs) < 2:
        raise click.UsageError("compare needs at least two run folders")
    found = comparison(list(runs))
    if as_json:
        _print_json(found)
    else:
        labels = [run["run_id"] for run in found["runs"]]
        heads = ["", *labels, *(["to the first"] * (len(labels) - 1))]
        table = Table(*(Column(head, overflow="fold") for head in heads))  # nothing is cut off
        for line in comparison_lines(found):
            table.add_row(*line)
        _OUT.print(table)
    if html is not None:
        click.echo(write_comparison(list(runs), html), err=as_json)


@main.command()
@click.argument("recording", type=click.Path(path_type=Path))
@click.option("--policy", "policies", multiple=True, metavar="NAME|FILE.py:CLASS",
              help="See what these would have said instead.")  # fmt: skip
@_JSON
def replay(recording: Path, policies: tuple[str, ...], as_json: bool) -> None:
    """Put the recorded views through the policies again; fails if a command differs."""
    others = [PolicySpec(use=use) for use in policies] or None
    result = replay_policies(recording, load_controller, others)
    tree = {
        "steps": result.steps,
        "equal": result.equal,
        "different": result.different,
        "first_difference": result.first_difference,
    }
    if as_json:
        _print_json(tree)
    else:
        click.echo(f"{result.steps} steps: {result.equal} commands equal, {result.different} not")
        if result.first_difference:
            click.echo(result.first_difference)
    if not result.same:
        raise SystemExit(1)


@main.command()
@click.argument("recording", type=click.Path(path_type=Path))
@click.option("--format", "kind", type=click.Choice(["csv", "perfetto", "prometheus"]),
              default="csv", show_default=True)  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), help="File or folder to write.")
def export(recording: Path, kind: str, out: Path | None) -> None:
    """Turn a recording into CSV files, a timeline for ui.perfetto.dev, or a metrics page."""
    click.echo(export_recording(recording, kind, out))


# Trust.


@main.command()
@click.option("--data", type=click.Path(path_type=Path), help="Folder of measured sets.")
@click.option("--set", "sets", multiple=True, help="Only these sets.")
@click.option("--html", type=click.Path(path_type=Path), help="Draw predicted against measured.")
@click.option("--svg", type=click.Path(path_type=Path), help="Draw it small, for documents.")
@_JSON
def fidelity(
    data: Path | None,
    sets: tuple[str, ...],
    html: Path | None,
    svg: Path | None,
    as_json: bool,
) -> None:
    """Errors of the models against measured hardware, on configurations that were not fitted."""
    comparisons = compare_with_measured(data, sets)
    if html is not None:
        write_page(comparisons, html)
    if svg is not None:
        write_svg(comparisons, svg)
    rows = [comparison.row() for comparison in comparisons]
    if as_json:
        _print_json(rows)
        return
    for name in dict.fromkeys(row["set"] for row in rows):
        _OUT.print(_errors_table(name, [row for row in rows if row["set"] == name]))


def _errors_table(name: str, rows: list[dict[str, Any]]) -> Table:
    """Absolute errors of one set, with the best of the naive alternatives."""
    table = Table(title=f"{name}: absolute errors", box=SIMPLE, padding=(0, 1, 0, 0))
    for head, width in (("of", 13), ("quantity", 25), ("best naive", 13)):
        table.add_column(head, min_width=13, max_width=width)
    for head in ("rows", "median", "mean", "p90", "bias"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        share = _number if row["quantity"].endswith(("_points", "_c")) else _percent
        known = [
            (errors["ape_median_frac"], naive)
            for naive, errors in row["naive"].items()
            if errors["ape_median_frac"] is not None
        ]
        best = f"{share(min(known)[0])} {min(known)[1]}" if known else ""
        who = row["gpu"] if row["model"] == row["gpu"] else f"{row['gpu']}, {row['model']}"
        # Spaces, so that lines break between words.
        table.add_row(
            who, row["quantity"].replace("_", " "), best.replace("_", " "), f"{row['rows']:,}",
            share(row["ape_median_frac"]), share(row["ape_mean_frac"]),
            share(row["ape_p90_frac"]), share(row["bias_frac"]),
        )  # fmt: skip
    return table


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


_PROFILE = click.option("--profile", type=click.Path(path_type=Path), default=Path("device.toml"),
                        show_default=True)  # fmt: skip


@main.command("calibrate")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@_PROFILE
def calibrate_command(device: str, profile: Path) -> None:
    """Measure this machine with torch for some minutes, and write its profile with its errors."""
    measured = calibrate(device, report=_say)  # type: ignore[arg-type]
    write_profile(measured, profile)
    table = Table(title=f"errors on points left out of the fit: {profile}")
    for head in ("phase", "speed", "points", "mean", "worst", "bias"):
        table.add_column(head)
    for row in measured.errors:
        mean, worst, bias = (float(row[f"{k}_frac"]) for k in ("ape_mean", "ape_max", "bias"))
        table.add_row(
            str(row["phase"]), f"{float(row['speed']):g}", str(row["points"]),
            f"{mean:.1%}", f"{worst:.1%}", f"{bias:+.1%}",
        )  # fmt: skip
    _OUT.print(table)


@main.command("validate")
@click.option("--device", type=click.Choice(["cpu", "cuda"]),
              help="Calibrate this device first if the profile is not there.")  # fmt: skip
@_PROFILE
@_JSON
def validate_command(device: str | None, profile: Path, as_json: bool) -> None:
    """Serve a short trace on the real device and on its emulated twin, and compare."""
    if not profile.exists() and device is not None:
        write_profile(calibrate(device, report=_say), profile)  # type: ignore[arg-type]
    measured = load_profile(profile)
    if device is not None and measured.device != device:
        raise SpecError(f"profile {profile} is of {measured.device}, not of {device}")
    rows = validate(measured, report=_say)
    if as_json:
        _print_json(rows)
        return
    table = Table(title="the device against its emulated twin")
    for head in ("speed", "quantity", "measured", "emulated", "error"):
        table.add_column(head)
    for row in rows:
        table.add_row(
            f"{row['speed']:g}", row["quantity"], f"{row['measured']:.4g}",
            f"{row['emulated']:.4g}", f"{row['ape_frac']:.1%}",
        )  # fmt: skip
    _OUT.print(table)


def _say(text: str) -> None:
    click.echo(text, err=True)


# Many runs.


def _counted(*, quiet: bool) -> SweepProgress:
    """Says how many runs are done, and about how long the rest takes."""
    begun = time.monotonic()
    first: list[int] = []

    def progress(done: int, count: int) -> None:
        first.append(done)
        spent_s = time.monotonic() - begun
        fresh = done - first[0]
        left = f", about {spent_s / fresh * (count - done):.0f} s left" if fresh else ""
        end = "\r" if sys.stderr.isatty() and done < count else "\n"
        if not quiet:
            click.echo(f"{done} of {count} runs{left}   {end}", nl=False, err=True)

    return progress


@main.command()
@click.argument("spec", type=click.Path(path_type=Path))
@click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True,
              help="Processes of this machine, or a Ray cluster.")  # fmt: skip
@click.option("--address", default="", metavar="HOST:PORT", help="Of the Ray cluster.")
@click.option("--workers", type=click.IntRange(min=0), default=0,
              help="Runs at once; as many as there are cores by default.")  # fmt: skip
@click.option("--resume", type=click.Path(path_type=Path), metavar="FOLDER",
              help="Go on with a sweep that was interrupted.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs"), show_default=True)
@_JSON
def sweep(
    spec: Path,
    engine: Literal["local", "ray"],
    address: str,
    workers: int,
    resume: Path | None,
    out: Path,
    as_json: bool,
) -> None:
    """Do every run of SWEEP.toml and write their summaries as one table."""
    _compile_first()
    folder = run_sweep(
        spec, out, engine=engine, address=address, workers=workers, resume=resume,
        progress=_counted(quiet=as_json and not sys.stderr.isatty()),
    )  # fmt: skip
    if as_json:
        _print_json({"folder": str(folder), "table": str(folder / "table.parquet")})
    else:
        click.echo(folder / "table.csv")


@main.command("experiment")
@click.argument("name")
@click.option("--mode", type=click.Choice(["virtual", "emulated", "hardware"]),
              help="Virtual by default; of a single run, what its run file says.")  # fmt: skip
@click.option("--quick", is_flag=True, help="Under a minute: few seeds, the main comparison.")
@click.option("--seeds", type=click.IntRange(min=1), help="How many; the experiment's own number.")
@click.option("--workers", type=click.IntRange(min=0), default=0,
              help="Runs at once; as many as there are cores by default.")  # fmt: skip
@click.option("--keep", is_flag=True, help="Keep the recording of every run.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs"), show_default=True)
@_JSON
@click.pass_context
def experiment_command(
    ctx: click.Context,
    name: str,
    mode: Literal["virtual", "emulated", "hardware"] | None,
    quick: bool,
    seeds: int | None,
    workers: int,
    keep: bool,
    out: Path,
    as_json: bool,
) -> None:
    """Make every run of an experiment, and print its rows beside the paper's numbers.

    Of a folder with a run.toml only: that run, always kept, and its summary; with --seeds, that run
    once per seed, and their means. With --quick it is shortened as its quick.toml says.
    """
    _compile_first()
    found = find_experiment(name)
    if found.module is None and seeds is None:
        overrides = tuple(found.quick_overrides()) if quick else ()
        ctx.invoke(run, spec=found.spec, mode=mode, overrides=overrides, out=out, as_json=as_json)
        return
    default = "virtual" if found.module is not None else load_spec(found.spec).mode
    folder, result = run_experiment(
        found,
        Options(mode or default, quick, seeds or 0),
        out,
        workers=workers,
        keep=keep,
        progress=_counted(quiet=as_json and not sys.stderr.isatty()),
    )
    if as_json:
        _print_json(result)
        return
    head, *lines = row_lines(result["rows"], narrow=_OUT.width < _WIDE)
    table = Table(*head, title=f"{found.name} ({result['mode']}, {len(result['seeds'])} seeds)")
    for line in lines:
        table.add_row(*map(escape, line))
    _OUT.print(table)
    click.echo(folder / "report.html")


# Speed.


@main.group()
def bench() -> None:
    """Measure how fast the testbed itself is."""


@bench.command("engine")
@click.option("--instances", default=8, show_default=True)
@click.option("--requests", default="10000", show_default=True, metavar="COUNT|FILE",
              help="How many, or a CSV of arrival_s, prompt_tokens, output_tokens.")  # fmt: skip
@click.option("--physics/--no-physics", default=True, show_default=True)
@click.option("--rate", "rate_rps", default=0.0, metavar="RPS",
              help="Arrivals together, with a COUNT; else 3 for each instance.")  # fmt: skip
@_JSON
def bench_engine_command(
    instances: int, requests: str, physics: bool, rate_rps: float, as_json: bool
) -> None:
    """Requests per second of wall time that emulated instances serve."""
    _compile_first()
    result = bench_engine(instances, requests, physics=physics, rate_rps=rate_rps)
    if as_json:
        _print_json(result)
        return
    for name, value in result.items():
        shown = f"{value:,.4g}" if isinstance(value, float) and value < 1000 else f"{value:,.0f}"
        click.echo(f"{name:16s} {shown}")


@bench.command("intake")
@click.option("--nodes", default=1000, show_default=True, help="Of 8 GPUs, reporting at 10 Hz.")
@click.option("--seconds", default=10.0, show_default=True)
@click.option("--generators", default=2, show_default=True, help="Processes that emulate them.")
@click.option("--connections", default=0, show_default=True,
              help="Telemetry connections in all; 0 is one per node.")  # fmt: skip
@click.option("--relays", default=0, show_default=True, help="Relay processes in between.")
@click.option("--merged", is_flag=True, help="Nodes arrive merged, as from relays elsewhere.")
@click.option("--curve", is_flag=True, help="Encrypt and authenticate.")
@click.option("--gpu-period-s", default=0.0, show_default=True, help="Thin the recording of GPUs.")
@click.option("--realtime", is_flag=True, help="Real-time priority.")
@_JSON
def bench_intake_command(as_json: bool, **options: Any) -> None:
    """What a live coordinator takes in, recording on, and how fast commands come back."""
    _print_bench(bench_intake(**options), as_json)


@bench.command("roundtrip")
@click.option("--nodes", default=40, show_default=True)
@click.option("--seconds", default=10.0, show_default=True)
@_JSON
def bench_roundtrip_command(nodes: int, seconds: float, as_json: bool) -> None:
    """From a command's leaving the coordinator to its answer, p50 and p99, under reports."""
    found = bench_intake(nodes, seconds=seconds, generators=1)
    kept = ("nodes", "reports_per_s", "load_before")
    _print_bench({k: v for k, v in found.items() if k in kept or "_trip" in k}, as_json)


@bench.command("lateness")
@click.option("--instances", default=[200], multiple=True, show_default=True,
              help="On one core; several for one after the other.")  # fmt: skip
@click.option("--per-node", default=50, show_default=True, help="Of one node.")
@click.option("--per-process", default=4, show_default=True, help="Nodes that share a process.")
@click.option("--rate-rps", default=3.0, show_default=True, help="Requests/s of an instance.")
@click.option("--seconds", default=10.0, show_default=True)
@click.option("--collapse/--each-iteration", default=True, show_default=True,
              help="Wake for every iteration, or once per run of alike ones.")  # fmt: skip
@click.option("--realtime", is_flag=True, help="Real-time priority.")
@_JSON
def bench_lateness_command(as_json: bool, instances: tuple[int, ...], **options: Any) -> None:
    """How late emulated iterations are acted on by nodes that share a core.

    With one number of instances everything that was measured; with several a line for each.
    """
    _compile_first()
    if len(instances) == 1:
        _print_bench(bench_lateness(instances[0], **options), as_json)
        return
    rows = bench_lateness_series(instances, **options)
    if as_json:
        _print_json(rows)
        return
    table = Table(title="lateness of the ends of iterations, ms")
    for head in ("instances on the core", "iterations", "p50", "p99", "largest"):
        table.add_column(head, justify="right")
    for row in rows:
        late = (f"{1000 * row[f'iterations_late_{k}_s']:.3f}" for k in ("p50", "p99", "max"))
        table.add_row(str(row["instances"]), f"{row['iterations']:,}", *late)
    _OUT.print(table)


def _print_bench(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _print_json(result)
        return
    for name, value in result.items():
        shown = f"{value:,.4g}" if isinstance(value, float) else f"{value}"
        click.echo(f"{name:32s} {shown}")


_SCALE = click.option("--scale", default=1.0, show_default=True, help="Multiplies all counts.")


@bench.command("sizes")
@_SCALE
@_JSON
def bench_sizes_command(scale: float, as_json: bool) -> None:
    """1 to 10,000 instances, physics on and off, the engine alone and whole runs."""
    _compile_first()
    rows = bench_scale.bench_sizes(_say, scale=scale)
    if as_json:
        _print_json(rows)


@bench.command("large")
@click.option("--instances", default=1_000, show_default=True)
@click.option("--requests", default=10_000_000, show_default=True)
@click.option("--thin", is_flag=True,
              help="Record one in a hundred requests, and GPUs once a minute.")  # fmt: skip
@_JSON
def bench_large_command(instances: int, requests: int, thin: bool, as_json: bool) -> None:
    """One whole run of many requests: processor time of each, and peak memory."""
    _compile_first()
    row = bench_scale.bench_large(_say, instances=instances, requests=requests, thin=thin)
    if as_json:
        _print_json(row)


@bench.command("dynamo")
@click.option("--instances", default=8, show_default=True)
@click.option("--requests", default=10_000, show_default=True,
              help="At 1,000 instances the peer takes some 3 ms for each.")  # fmt: skip
@click.option("--rate", "rate_rps", default=0.0, metavar="RPS", help="As for bench engine.")
@_JSON
def bench_dynamo_command(instances: int, requests: int, rate_rps: float, as_json: bool) -> None:
    """The same requests on NVIDIA Dynamo's offline replay, and the ratio."""
    _compile_first()
    result = bench_scale.bench_dynamo(instances, requests, _say, rate_rps=rate_rps)
    if as_json:
        _print_json(result)
        return
    click.echo(
        f"{instances} instances: {result['ratio_requests_per_s']:.1f} times Dynamo replay in "
        f"requests/s of wall time, {result['ratio_cpu']:.1f} times by CPU time"
    )


@bench.command("evaluation")
@_JSON
def bench_evaluation_command(as_json: bool) -> None:
    """What one evaluation of an iteration's time and work costs, microseconds."""
    _compile_first()
    _print_bench(bench_evaluation(), as_json)


@bench.command("recorder")
@_JSON
def bench_recorder_command(as_json: bool) -> None:
    """What recording everything costs."""
    _compile_first()
    result = bench_scale.bench_recorder(_say)
    if as_json:
        _print_json(result)
        return
    click.echo(
        f"recording is {result['overhead_frac']:.0%} of the run, "
        f"{result['per_gpu_sample_us']:.1f} us for each sample of a GPU"
    )


@bench.command("growth")
@_SCALE
@click.option("--figure", type=click.Path(path_type=Path), help="Draw the curves here (SVG).")
@_JSON
def bench_growth_command(scale: float, figure: Path | None, as_json: bool) -> None:
    """How the cost of a run grows with GPUs, requests and length."""
    _compile_first()
    rows = bench_scale.bench_growth(_say, scale=scale)
    if figure is not None:
        bench_scale.write_growth_figure(rows, figure)
    if as_json:
        _print_json(rows)


# What there is.


@main.command()
@_JSON
def catalogue(as_json: bool) -> None:
    """List the GPUs, models and policies that we ship."""
    tree = {"gpus": available_gpus(), "models": available_models(), "policies": shipped_policies()}
    if as_json:
        _print_json(tree)
        return
    for kind, names in tree.items():
        click.echo(f"{kind}: {', '.join(names)}")


if __name__ == "__main__":
    main()
