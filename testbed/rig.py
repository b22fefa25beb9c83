"""Where a run is put together: the only file that knows all modes.

A run is one choice of clock, transport, devices and engine for the same node daemons, coordinator,
policies and recorder. `run` makes the choice the spec asks for:

- *virtual*: one process, one loop that jumps, an in-memory network, one bank of emulated GPUs;
- *emulated*: this process is the coordinator; each node is a process of its own that waits out real
  time on emulated GPUs behind NVML's names, and talks over ZeroMQ;
- *hardware*: as emulated, with the driver's GPUs and a real engine in the nodes.

The order of events at one instant is the same in all: physics, serving, deliveries, samples,
decisions (`testbed.core.clock`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from emulators.models import load_model
from emulators.profiles import GpuProfile, load_gpu
from emulators.server import build_engine
from emulators.state import GpuState
from testbed.analysis.ledger import check_tariff
from testbed.analysis.summary import summarise
from testbed.coordinator.cluster import Layout
from testbed.core.errors import RecordingError, SpecError
from testbed.core.messages import GpuInfo, InstanceConfig
from testbed.core.spec import RunSpec
from testbed.core.transport.zmq import Curve
from testbed.core.view import Controller, Router
from testbed.policies.load import load_controller, load_router
from testbed.policies.serving_profile import Learner
from testbed.profiling import profile_of
from testbed.recorder.reader import Recording
from testbed.recorder.writer import CHECKPOINT, Recorder, new_run_folder, write_summary
from testbed.shells.live import run_live
from testbed.shells.node import NodeOptions, curve_of, host, parse_fault, parse_gpus
from testbed.shells.plant import emulated_bank
from testbed.shells.relay import RelayOptions, relay
from testbed.shells.schedule import Parts, Progress, Status
from testbed.shells.virtual import run_virtual
from testbed.workloads import open_workload

__all__ = [
    "NodeOptions",
    "Progress",
    "RelayOptions",
    "Status",
    "curve_of",
    "host",
    "load_policies",
    "parse_fault",
    "parse_gpus",
    "relay",
    "resume",
    "run",
]


_LATE_LIMIT_S = 0.05
"""A live run whose p99 lateness exceeds this is marked invalid."""


def run(
    spec: RunSpec,
    out: Path | str = "runs",
    *,
    progress: Progress = lambda status: None,
    bind: str = "tcp://127.0.0.1:0",
    spawn: bool = True,
    allow_writes: bool = False,
    curve: Curve | None = None,
) -> Path:
    """Run a spec to its end and return the run folder.

    Args:
        spec: what to run, in which mode.
        out: folder that gets a folder for this run.
        progress: called about once a second of wall time.
        bind: where a live coordinator listens.
        spawn: start the node daemons of an emulated run; otherwise they are started by hand with
            ``testbed node``.
        allow_writes: let nodes started here set limits on real GPUs.
        curve: keys, needed where ``bind`` is not a loopback address. Nodes are then started by
            hand, each with a key of its own.

    Raises:
        TestbedError: the spec cannot be run, or a part failed; what was recorded is kept.
    """
    if curve is not None and spawn:
        raise SpecError("with CURVE keys nodes are started by hand: give --no-spawn as well")
    parts = _parts(spec, progress)

    def play() -> None:
        if spec.mode == "virtual":
            run_virtual(parts)
        else:
            run_live(parts, bind, spawn=spawn, allow_writes=allow_writes, curve=curve)

    return _recorded(parts, new_run_folder(out, spec.name), play)


def resume(folder: Path | str, *, progress: Progress = lambda status: None) -> Path:
    """Go on with a virtual run that was broken off, from its last checkpoint to its end.

    It ends as it would have without the break: the tables have the same bytes.

    Raises:
        TestbedError: there is no checkpoint, or it is of another version.
    """
    recording = Recording.open(folder)
    folder = recording.folder
    if recording.state == "running":
        raise RecordingError(f"recording {folder}: the run is still going on")
    try:
        checkpoint = (folder / CHECKPOINT).read_bytes()
    except OSError:
        raise RecordingError(
            f"recording {folder}: no checkpoint to go on from (record.checkpoint_s)"
        ) from None
    parts = _parts(recording.spec, progress)
    parts.checkpoint = checkpoint
    return _recorded(parts, folder, lambda: run_virtual(parts))


def _parts(spec: RunSpec, progress: Progress) -> Parts:
    """What a run file names, found and checked; its recorder comes when the run begins."""
    profile = load_gpu(spec.cluster.gpu)
    _check(spec, profile)
    controllers, router = load_policies(spec)
    return Parts(
        spec=spec,
        controllers=controllers,
        router=router,
        requests=open_workload(spec.workload, spec.slo_class, spec.seed, spec.duration_s),
        profile=profile,
        progress=progress,
    )


def _recorded(parts: Parts, folder: Path, play: Callable[[], None]) -> Path:
    """Play a run into a folder; it has a summary afterwards, whatever happens."""
    spec = parts.spec
    meta = _meta(spec, parts.profile)
    try:
        with Recorder(
            folder, spec=spec, meta=meta, resume=parts.checkpoint is not None
        ) as parts.records:
            if parts.checkpoint is None:
                for policy, controller in zip(spec.policy, parts.controllers, strict=True):
                    for text in getattr(controller, "remarks", ()):
                        parts.records.event(0.0, "warning", policy.use, "policy", text)
            play()
    finally:
        # A run that failed has a summary of as far as it came, marked invalid.
        write_summary(folder, summarise(folder))
    return folder


def load_policies(spec: RunSpec) -> tuple[list[Controller], Router]:
    """The run's policies, each taught what it plans with.

    A router named as one of the controllers, without parameters of its own, is that controller: a
    policy that both routes and steps.

    Raises:
        SpecError: a policy ``needs`` a table (``plant``) that the run file does not have.
    """
    controllers = [load_controller(policy) for policy in spec.policy]
    router = next(
        (
            cast(Router, controller)
            for policy, controller in zip(spec.policy, controllers, strict=True)
            if policy.use == spec.router.use
            and not spec.router.params
            and callable(getattr(controller, "route", None))
        ),
        None,
    ) or load_router(spec.router)
    for use, part in [
        *zip((p.use for p in spec.policy), controllers, strict=True),
        (spec.router.use, router),
    ]:
        for table in getattr(part, "needs", ()):
            if getattr(spec, table) is None:
                raise SpecError(
                    f"policy {use!r}: does nothing without a {table}: add a table [{table}]"
                )
    learners = {id(p): cast(Learner, p) for p in (*controllers, router) if hasattr(p, "learn")}
    for learner in learners.values():
        learner.learn(profile_of(spec, learner.sweep))
    return controllers, router


def _check(spec: RunSpec, profile: GpuProfile) -> None:
    """What needs profiles and data to be known: budgets, whether models fit, named series."""
    cluster = spec.cluster
    info = GpuInfo(
        uuid="",
        model=profile.name,
        memory_total_bytes=0,
        power_limit_min_w=profile.power_limit_min_w,
        power_limit_max_w=profile.power_limit_max_w,
        power_limit_default_w=profile.power_limit_default_w,
        sm_clock_min_mhz=0.0,
        sm_clock_max_mhz=0.0,
    )
    if spec.mode != "hardware":
        Layout(spec).safe_limit_w([info])
    check_tariff(spec.ledger)
    tick_s = spec.control.sample_period_s
    if spec.mode != "virtual" and tick_s < 0.02:
        raise SpecError(f"run spec: control.sample_period_s = {tick_s} must be >= 0.02 when live")
    for name in spec.model_names():
        load_model(name)
    if spec.mode != "hardware":
        bank = emulated_bank(spec, profile, GpuState.create(cluster.gpus_per_node), [0])
        for pool in spec.pool:
            try:
                build_engine(bank, load_model(pool.model), instance_of(pool))
            except ValueError as error:
                raise SpecError(f"run spec: pool {pool.name!r}: {error}") from None


def instance_of(pool: Any) -> Any:
    return InstanceConfig(
        name=pool.name,
        pool=pool.name,
        model=pool.model,
        tp=pool.tp,
        gpus=list(range(pool.tp)),
        engine=pool.engine,
        precision=pool.precision,
    )


def _meta(spec: RunSpec, profile: GpuProfile) -> dict[str, Any]:
    """Facts for the manifest: what of this run is measured, emulated or assumed."""
    time_how = "emulated" if spec.mode == "virtual" else "measured"
    clock = "virtual time" if spec.mode == "virtual" else "the machine's monotonic clock"
    facts = [("time", time_how, clock)]
    if spec.mode != "hardware":
        facts += [
            ("power, clocks, heat", "emulated", f"emulators/profiles/{profile.name}.toml"),
            ("iteration times", "emulated", "emulators/timing.py"),
            ("temperature offsets between GPUs", "assumed", "normal, cluster.temp_spread_c"),
        ]
    else:
        engine = f"the server at {spec.forward}" if spec.forward else f"torch on {spec.device}"
        facts.append(("iteration times", "measured", engine))
        if spec.device == "cpu":
            watts = "CPU time of a core, at 10 W for a busy one"
            facts.append(("power and its limit", "assumed", watts))
        else:
            facts.append(("power, clocks, heat", "measured", "NVML"))
    if spec.cluster.elastic:
        facts.append(("starts and re-shards of instances", "assumed", "reconfigure.delays"))
    if spec.tenants.per_node:
        if spec.mode == "virtual":
            facts.append(("memory tenants", "emulated", "emulators/memory.py"))
        else:
            facts.append(("memory tenants", "measured", "control groups, or as the events say"))
    return {
        "late_limit_s": _LATE_LIMIT_S,
        "provenance": [{"what": what, "how": how, "source": source} for what, how, source in facts],
    }
