"""A recording with the shapes of a real run, made without the testbed: for tests and for looking.

Load comes in bursts; a row that would draw more than its budget is capped by a small policy which
is stepped on the recorded views; caps clip the clock, the die warms and cools, and the latencies
of requests follow the load. Nothing here is a model to be trusted.

    python tests/analysis/synthetic_run.py FOLDER [ROWS NODES SECONDS]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from testbed.core.messages import GpuInfo, GpuReadings, InstanceReadings, TenantReadings
from testbed.core.names import gpu_name, instance_name
from testbed.core.spec import PolicySpec, RunSpec, parse_spec
from testbed.core.view import (
    Command,
    InstanceColumns,
    RowColumns,
    SetPowerLimit,
    TenantColumns,
    View,
    empty_gpus,
    empty_instances,
    empty_tenants,
)
from testbed.recorder.reader import Recording
from testbed.recorder.tables import ITL_BINS, itl_bin
from testbed.recorder.writer import Recorder

GPUS = 8
SPEC = """
name = "synthetic"
seed = {seed}
duration_s = {seconds}
mode = "{mode}"
[cluster]
rows = {rows}
nodes_per_row = {nodes}
row_budget_w = {budget}
[[pool]]
name = "chat"
priority = 2
gpus_per_node = 4
[[pool]]
name = "vision"
priority = 1
gpus_per_node = 4
[[slo_class]]
name = "chat"
pool = "chat"
images = "never"
ttft_s = 1.0
tpot_s = 0.05
[[slo_class]]
name = "vision"
pool = "vision"
images = "only"
ttft_s = 3.0
tpot_s = 0.1
[[policy]]
use = "row_power_cap"
params = {{release = 0.85}}
precedence = "safety"
[[policy]]
use = "priority_cap"
[tenants]
per_node = {tenants}
memory_mib = 4096
"""


class EvenCap:
    """Share a row's budget evenly while it is exceeded; let go below ``release`` of it."""

    period_s = 1.0

    def __init__(self, release: float = 0.85) -> None:
        self.release = release

    def step(self, view: View) -> list[Command]:
        """A limit for each GPU of a row over budget, or all they can have."""
        draw_w = np.bincount(view.gpus.row, view.gpus.draw_w(view.now_s), len(view.rows.name))
        commands: list[Command] = []
        for row, budget_w in enumerate(view.rows.budget_w):
            members = np.flatnonzero(view.gpus.row == row)
            if draw_w[row] > 0.97 * budget_w:
                limit_w = 0.94 * budget_w // len(members)
            elif draw_w[row] < self.release * budget_w:
                limit_w = 700.0
            else:
                continue
            if (view.gpus.power_limit_w[members] != limit_w).any():
                why = f"{view.rows.name[row]} draws {draw_w[row]:.0f} W of {budget_w:.0f} W"
                commands.append(SetPowerLimit(members, limit_w, why))
        return commands


class WishfulCap:
    """Now and then asks for full power for the important pool; it will be overruled."""

    period_s = 10.0

    def step(self, view: View) -> list[Command]:
        """The maximum, for every GPU of priority 2 that is held lower."""
        low = np.flatnonzero((view.gpus.priority == 2) & (view.gpus.power_limit_w < 700))
        return [SetPowerLimit(low, 700.0, "chat first")] if len(low) else []


def load(policy: PolicySpec) -> EvenCap | WishfulCap:
    """How `replay` gets the policies."""
    return EvenCap(**policy.params) if policy.use == "row_power_cap" else WishfulCap()


def make_spec(
    rows: int = 2,
    nodes: int = 1,
    seconds: float = 120.0,
    tenants: int = 0,
    seed: int = 3,
    mode: str = "virtual",
) -> RunSpec:
    """The spec that such a run would have had."""
    return parse_spec(
        SPEC.format(
            rows=rows,
            nodes=nodes,
            seconds=seconds,
            tenants=tenants,
            seed=seed,
            mode=mode,
            budget=nodes * GPUS * 500,
        )
    )


def make(folder: Path | str, spec: RunSpec, period_s: float = 0.1, late: bool = False) -> Recording:
    """Write the recording and open it."""
    meta = {
        "provenance": [
            {"what": "GPU power, clock, temperature", "how": "emulated", "source": "H100 profile"},
            {"what": "memory of tenants", "how": "measured", "source": "cgroup v1"},
            {"what": "spread of GPU temperatures", "how": "assumed", "source": "2 degC"},
        ]
    }
    recorder = Recorder(folder, spec=spec, meta=meta)
    rng = np.random.default_rng(spec.seed)
    nodes = spec.node_names()
    num = len(nodes) * GPUS
    gpus = empty_gpus(tuple(gpu_name(n, i) for n in nodes for i in range(GPUS)))
    gpus.node[:] = np.arange(num) // GPUS
    gpus.row[:] = gpus.node // spec.cluster.nodes_per_row
    gpus.instance[:] = np.arange(num)
    gpus.priority[:] = np.where(np.arange(num) % GPUS < 4, 2, 1)
    gpus.power_limit_min_w[:], gpus.power_limit_max_w[:] = 200, 700
    gpus.power_limit_w[:] = gpus.power_limit_enforced_w[:] = 700
    gpus.sm_clock_min_mhz[:], gpus.sm_clock_max_mhz[:] = 345, 1980
    names = tuple(
        instance_name(n, "chat" if i < 4 else "vision", i % 4) for n in nodes for i in range(GPUS)
    )
    instances: InstanceColumns = empty_instances(names)
    instances.node[:], instances.pool[:] = gpus.node, np.arange(num) % GPUS >= 4
    instances.num_gpus[:], instances.up[:] = 1, True
    per_node = spec.tenants.per_node
    tenants: TenantColumns = empty_tenants(
        tuple(f"{n}/vm{i}" for n in nodes for i in range(per_node))
    )
    tenants.node[:] = np.arange(len(tenants.name)) // max(per_node, 1)
    tenants.memory_bytes[:] = spec.tenants.memory_mib * 2**20
    tenants.guaranteed_bytes[:] = tenants.memory_bytes / 2
    budget_w = np.full(spec.cluster.rows, spec.cluster.row_budget_w)
    rows = RowColumns(tuple(f"row{r}" for r in range(spec.cluster.rows)), budget_w)
    view = View(
        0.0,
        rows,
        gpus,
        instances,
        tenants,
        ("chat", "vision"),
        np.array([2, 1]),
        {"chat": 0, "vision": 1},
    )
    recorder.cluster(view)
    info = GpuInfo("", "NVIDIA H100 80GB HBM3", 80 << 30, 200, 700, 700, 345, 1980)
    for node in range(len(nodes)):
        which = list(range(node * GPUS, (node + 1) * GPUS))
        recorder.node_joined(0.0, which, [info] * GPUS, [450.0] * GPUS)
        recorder.event(0.0, "info", nodes[node], "joined", f"{GPUS} GPUs, {GPUS} instances")

    power = np.full(num, 120.0)
    average = power.copy()
    energy = np.full(num, 1e6)
    die = np.full(num, 38.0)
    offset = rng.normal(0, 2, num)
    served = np.zeros(num)
    prompts = np.zeros(num)
    faults = np.zeros(len(tenants.name))
    controllers = [load(policy) for policy in spec.policy]
    step = 0
    for tick in range(round(spec.duration_s / period_s) + 1):
        t_s = tick * period_s
        phase = 2 * np.pi * t_s / max(spec.duration_s, 1)
        wave = 0.55 + 0.35 * np.sin(3 * phase - 1.2) + 0.1 * np.sin(17 * phase)
        busy = np.clip(wave + 0.12 * rng.standard_normal(num) + 0.06 * (gpus.row % 2), 0.02, 1)
        wanted = 120 + 560 * busy
        power = np.minimum(wanted, gpus.power_limit_enforced_w)
        clipped = wanted > gpus.power_limit_enforced_w
        clock = np.where(clipped, 1980 * (power / wanted) ** 0.6, 1980 - 15 * (busy > 0.8))
        average += (power - average) * min(1.0, period_s)
        energy += power * period_s
        die += (28 + offset + 0.055 * power - die) * min(1.0, period_s / 12)
        hot = die > 64.5
        throttle = 0x4 * clipped + 0x20 * hot + 0x1 * (busy < 0.05)
        running = np.rint(60 * busy + 4).astype(int)
        waiting = np.rint(np.maximum(0, busy * 1980 / clock - 0.85) * 60).astype(int)
        kv = np.clip(0.15 + 0.75 * busy + 0.05 * rng.standard_normal(num), 0, 1)
        served += running * 28 * period_s * clock / 1980
        prompts += running * 80 * period_s
        for node in range(len(nodes)):
            part = slice(node * GPUS, (node + 1) * GPUS)
            which = list(range(node * GPUS, (node + 1) * GPUS))
            recorder.gpus(
                t_s,
                which,
                GpuReadings(
                    power[part].tolist(),
                    average[part].tolist(),
                    gpus.power_limit_w[part].tolist(),
                    gpus.power_limit_enforced_w[part].tolist(),
                    energy[part].tolist(),
                    clock[part].tolist(),
                    die[part].tolist(),
                    (die[part] + 9).tolist(),
                    busy[part].tolist(),
                    ((40 + 30 * kv[part]) * 2**30).astype(int).tolist(),
                    throttle[part].tolist(),
                    [False] * GPUS,
                ),
            )
            recorder.instances(
                t_s,
                which,
                InstanceReadings(
                    running[part].tolist(),
                    waiting[part].tolist(),
                    kv[part].tolist(),
                    prompts[part].astype(int).tolist(),
                    served[part].astype(int).tolist(),
                    [0] * GPUS,
                ),
                (running[part] * 180.0 + waiting[part] * 900.0).tolist(),
            )
            if per_node:
                own = slice(node * per_node, (node + 1) * per_node)
                need = 2**30 * (2.2 + 1.2 * np.sin(phase + np.arange(per_node)))
                limit = np.full(per_node, 2**30 * (3.4 - 1.2 * wave))
                short = np.maximum(0, need - limit) / need
                faults[own] += 4000 * short * period_s
                recorder.tenants(
                    t_s,
                    list(range(own.start, own.stop)),
                    TenantReadings(
                        need.astype(int).tolist(),
                        np.minimum(need, limit).astype(int).tolist(),
                        limit.astype(int).tolist(),
                        np.maximum(0, need - limit).astype(int).tolist(),
                        faults[own].astype(int).tolist(),
                        (2 * faults[own]).astype(int).tolist(),
                        (0.6 * short).tolist(),
                        (0.8 * short).tolist(),
                        [False] * per_node,
                    ),
                )
        row_w = np.bincount(gpus.row, average)
        recorder.rows(t_s, row_w, np.bincount(gpus.row, power), budget_w)
        if abs(t_s - round(t_s)) < 1e-9:
            view.now_s = t_s
            gpus.t_s[:], gpus.power_avg_w[:], gpus.power_instant_w[:] = t_s, average, power
            gpus.energy_j[:], gpus.sm_clock_mhz[:], gpus.temp_c[:] = energy, clock, die
            gpus.gpu_busy_frac[:], gpus.throttle[:] = busy, throttle
            instances.t_s[:], instances.num_running[:], instances.num_waiting[:] = (
                t_s,
                running,
                waiting,
            )
            instances.kv_used_frac[:] = kv
            recorder.view(step, view)
            asked: set[int] = set()
            granted: list[SetPowerLimit] = []
            for index, (policy, controller) in enumerate(
                zip(spec.policy, controllers, strict=True)
            ):
                if round(t_s) % controller.period_s:
                    continue
                commands = controller.step(view)
                for ordinal, command in enumerate(commands):
                    assert isinstance(command, SetPowerLimit)
                    won = index == 0 or not asked & set(command.gpus.tolist())
                    # The second policy only ever wishes; the first one's caps stand.
                    outcome = "sent" if index == 0 and won else "overruled"
                    recorder.command(
                        t_s,
                        step,
                        index,
                        policy.use,
                        policy.precedence,
                        ordinal,
                        command,
                        outcome,
                        "" if outcome == "sent" else "row_power_cap",
                    )
                    if outcome == "sent":
                        asked |= set(command.gpus.tolist())
                        granted.append(command)
                recorder.step(step, t_s, index, policy.use, len(commands))
            step += 1
            for command in granted:  # after all policies: within a tick they see one view
                gpus.power_limit_w[command.gpus] = command.power_limit_w
                gpus.power_limit_enforced_w[command.gpus] = command.power_limit_w
            recorder.flush(t_s)
            if spec.mode != "virtual" and round(t_s) % 10 == 0:
                late_s = 0.09 if late else 0.0012
                recorder.lateness("coordinator", t_s, 2e-4, late_s, 2 * late_s, 10 * tick, 0)
                for node_name in nodes:
                    recorder.lateness(node_name, t_s, 1e-4, 8e-4, 2e-3, 10 * tick, 0)
    _serve(recorder, spec, rng, num)
    recorder.event(spec.duration_s * 0.4, "warning", nodes[0], "drift", "gpu3: limit was changed")
    recorder.event(spec.duration_s, "info", "coordinator", "end", "all requests accounted for")
    recorder.close(duration_s=spec.duration_s)
    return Recording.open(folder)


def _serve(recorder: Recorder, spec: RunSpec, rng: np.random.Generator, num: int) -> None:
    """Requests and gaps between their tokens."""
    count = int(spec.duration_s * num * 0.6)
    arrival = np.sort(rng.uniform(0, spec.duration_s, count))
    vision = rng.random(count) < 0.3
    wave = 0.55 + 0.35 * np.sin(6 * np.pi * arrival / spec.duration_s - 1.2)
    ttft = (0.08 + 0.5 * vision) * np.exp(0.5 * rng.standard_normal(count) + 2.2 * (wave - 0.5))
    output = np.maximum(1, rng.lognormal(5, 0.8, count).astype(int))
    tpot = 0.022 * np.exp(0.2 * rng.standard_normal(count) + 0.5 * (wave - 0.5))
    first = arrival + ttft
    finished = first + tpot * (output - 1)
    status = np.where(finished > spec.duration_s, "in_flight", "completed").astype(object)
    status[rng.random(count) < 0.01] = "rejected"
    gone = status == "rejected"
    first[gone] = finished[gone] = np.nan
    finished[status == "in_flight"] = np.nan
    name = np.where(vision, "vision", "chat").astype(object)
    instance = rng.integers(0, num // 8, count) * 8 + rng.integers(0, 4, count) + 4 * vision
    recorder.append(
        "requests",
        {
            "request_id": np.arange(count),
            "tenant": [f"t{i % 4}" for i in range(count)],
            "slo_class": name.tolist(),
            "pool": name.tolist(),
            "instance": instance,
            "arrival_s": arrival,
            "routed_s": arrival + 0.005,
            "first_token_s": first - 0.005,
            "first_token_seen_s": first,
            "finished_s": finished - 0.005,
            "finished_seen_s": finished,
            "prompt_tokens": rng.lognormal(6.5, 1, count).astype(int) + 1,
            "image_tokens": vision * rng.integers(256, 2880, count),
            "num_images": vision * rng.integers(1, 4, count),
            "output_tokens": output,
            "preemptions": 0,
            "attempts": 1,
            "status": status.tolist(),
            "ttft_limit_s": np.where(vision, 3.0, 1.0),
            "tpot_limit_s": np.where(vision, 0.1, 0.05),
        },
    )
    for t_s in np.linspace(spec.duration_s / 40, spec.duration_s, 40):
        wave = max(0.0, float(np.sin(6 * np.pi * t_s / spec.duration_s - 1.2)))
        for place in range(num):
            gaps = (0.018 + 0.006 * wave) * np.exp(0.25 * rng.standard_normal(800))
            slow = rng.random(800) < 0.02 + 0.03 * wave + 0.05 * (place % 8 >= 4)
            gaps[slow] += rng.gamma(2.0, 0.05, int(slow.sum()))
            counts = np.bincount(itl_bin(gaps), minlength=ITL_BINS)
            used = np.flatnonzero(counts)
            recorder.itl(float(t_s), place, used, counts[used])


if __name__ == "__main__":
    size = [int(word) for word in sys.argv[2:5]] or [2, 1, 120]
    make(sys.argv[1], make_spec(*size, tenants=3, mode="emulated"))
