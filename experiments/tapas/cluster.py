"""The cluster of the TAPAS experiment: endpoints, configurations and their profiles, one run."""

from __future__ import annotations

import math
from functools import cache, partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from emulators.fluid import FlowTables, Lengths
from emulators.power import power_w
from emulators.profiles import load_gpu
from testbed.core.spec import ClassSpec, PolicySpec, RunSpec, WorkloadSpec, parse_spec
from testbed.policies.load import load_controller, load_router
from testbed.policies.tapas.configurator import LOAD_STEPS
from testbed.shells.fluid import Config, Endpoint, FluidFleet, Tally, flow_of
from testbed.workloads import open_workload
from testbed.workloads.vms import PERIOD_H, demand_frac

BASE = Path(__file__).with_name("cluster.toml").read_text(encoding="utf-8")
ROW_SERVERS = 40
"""Servers that a row's limits are sized for."""
SIZING = 0.7
"""Demand of an endpoint's busiest hour over what its VMs can serve within the latency limits, all
alike. A free parameter: swept."""
RELOAD_S = 30.0
"""Tens of seconds for another model, precision or parallelism (uncertain): swept."""
PEAK_FRAC = 0.9
"""Share of an instance's capacity that counts as served within the limits: queues need room."""
START = Config("llama-2-70b", "bf16", 8, 64)
MODELS = ("llama-2-70b", "llama-2-13b", "llama-2-7b")
CONFIGS = tuple(
    Config(model, precision, tp, batch)
    for model in MODELS
    for precision in ("bf16", "fp8")
    for tp in (8, 4)
    for batch in (64, 32)
)
PROFILE_CLOCKS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)


@cache
def lengths(service: str) -> Lengths:
    """Moments of Azure's 2023 traces: the hour that is published."""
    source = {"chat": "azure_llm_2023_conv", "code": "azure_llm_2023_code"}[service]
    spec = WorkloadSpec(source="azure_llm", trace=source)
    requests = list(open_workload(spec, [ClassSpec()], 1, 2400.0))
    return Lengths.of(
        np.array([r.prompt_tokens for r in requests]), np.array([r.output_tokens for r in requests])
    )


def rate_rps(service: str, peak_rps: float, start_hour: float, t_s: float) -> float:
    """Requests per second of an endpoint at a time of the run."""
    curve = {"chat": "conversation", "code": "coding"}[service]
    return peak_rps * float(demand_frac(curve, start_hour % PERIOD_H + t_s / 3600.0))


@cache
def goodput_rps(config: Config, service: str, clock: float, ttft_s: float, tpot_s: float) -> float:
    """Highest rate at which an instance meets its class's limits in the mean."""
    tables = FlowTables([flow_of(config, lengths(service), load_gpu("h100-sxm"))])
    which, at = np.zeros(97, np.int64), np.full(97, clock)
    rates = np.linspace(0.0, PEAK_FRAC, 97) * tables.capacity_rps(which, at)
    flow = tables.at(which, rates, at)
    good = (flow.ttft_s <= ttft_s) & (flow.itl_s <= tpot_s)
    return float(rates[good].max()) if good.any() else 0.0


def profile_rows(
    service: str, configs: tuple[Config, ...], ttft_s: float, tpot_s: float
) -> list[dict[str, Any]]:
    """What TAPAS is told of configurations: swept on the emulator, as a provider does offline."""
    gpu, shape = load_gpu("h100-sxm"), lengths(service)
    tokens = shape.prompt_tokens + shape.output_tokens
    rows: list[dict[str, Any]] = []
    for config in configs:
        tables = FlowTables([flow_of(config, shape, gpu)])
        for clock in PROFILE_CLOCKS:
            most = goodput_rps(config, service, clock, ttft_s, tpot_s)
            if not most:
                continue
            which, at = np.zeros(len(LOAD_STEPS), np.int64), np.full(len(LOAD_STEPS), clock)
            flow = tables.at(which, LOAD_STEPS * most, at)
            draw_w = power_w(gpu, clock, flow.busy_frac, flow.tensor_frac, flow.hbm_frac)
            rows.append(
                {
                    "pool": service,
                    "model": config.model,
                    "precision": config.precision,
                    "tp": config.tp,
                    "max_num_seqs": config.max_num_seqs,
                    "clock_frac": clock,
                    "goodput_tps": most * tokens,
                    "gpu_w": draw_w.tolist(),
                }
            )
    return rows


@cache
def profiles(ttft_s: float, tpot_s: float) -> list[dict[str, Any]]:
    """Profiles of both endpoints."""
    return [
        row
        for service in ("chat", "code")
        for row in profile_rows(service, CONFIGS, ttft_s, tpot_s)
    ]


def make_fleet(
    spec: RunSpec,
    *,
    saas_vms: int,
    controllers: list[Any],
    router: Any,
    sizing: float = SIZING,
    reload_s: float = RELOAD_S,
) -> FluidFleet:
    """The cluster of a spec with ``saas_vms`` VMs that serve, half of them each endpoint."""
    assert spec.plant is not None
    endpoints = []
    for place, (slo, count) in enumerate(
        zip(spec.slo_class, (math.ceil(saas_vms / 2), saas_vms // 2), strict=True)
    ):
        good = goodput_rps(START, slo.name, 1.0, slo.ttft_s, slo.tpot_s)
        rate = partial(rate_rps, slo.name, sizing * good * count, spec.plant.start_hour)
        endpoints.append(Endpoint(lengths(spec.pool[place].name), rate, count, START))
    return FluidFleet(
        spec, load_gpu(spec.cluster.gpu), endpoints, CONFIGS, controllers, router, reload_s=reload_s
    )


GRACE_S = 45.0
"""How long the last-resort cap waits where a configurator may act first. A UPS bears 133 % for some
100 s."""
RUNGS = ("place", "route", "config")
"""TAPAS's three controllers; an arm is those that are on, joined by ``+``."""


def run(
    arm: str,
    overrides: list[str],
    *,
    oversubscription: float,
    dt_s: float,
    until_s: float,
    sizing: float = SIZING,
    tapas: dict[str, Any] | None = None,
    saas_share: float = 0.5,
    reload_s: float = RELOAD_S,
) -> tuple[FluidFleet, Tally]:
    """One run of the cluster.

    Args:
        arm: ``baseline`` (blind placement, balanced routing, static configuration, uniform cap),
            ``none`` (the same without a cap), ``polca``, or rungs of TAPAS joined by ``+``, which
            keep the baseline's cap as their last resort.
        overrides: of the run file.
        oversubscription: servers added under the limits of `ROW_SERVERS` a row.
        dt_s, until_s: step and length.
        sizing: see `SIZING`.
        tapas: parameters of the policy to change.
        saas_share: share of VMs that serve endpoints.
        reload_s: how long an instance is out while it reloads.
    """
    per_row = round(ROW_SERVERS * (1.0 + oversubscription))
    vms = round(0.95 * 2 * per_row)
    saas = round(saas_share * vms)
    on = set() if arm in ("baseline", "none", "polca") else set(arm.split("+"))
    cap = {"none": "none", "polca": "polca_cap"}.get(arm, "uniform_cap")
    policies = [] if "place" in on else ['{use="blind_placement"}']
    policies += ['{use="tapas"}'] if on & {"place", "config"} else []
    policies += [] if cap == "none" else [f'{{use="{cap}",precedence="safety"}}']
    sized = [
        f"cluster.nodes_per_row={per_row}",
        f"cluster.racks_per_row={math.ceil(per_row / 4)}",
        f"plant.oversubscription_frac={per_row / ROW_SERVERS - 1.0}",
        f"vms.count={vms - saas}",
        f"policy=[{','.join(policies)}]",
    ]
    spec = parse_spec(BASE, [*sized, *overrides])
    slo = spec.slo_class[0]
    table = profiles(slo.ttft_s, slo.tpot_s)
    planner = load_controller(
        PolicySpec(use="tapas", params={"profiles": table, "period_s": dt_s, **(tapas or {})})
    )
    if on & {"place", "config"}:
        _learn(spec, planner, saas, sizing)
        planner.place, planner.configure = "place" in on, "config" in on
    controllers = [
        planner if policy.use == "tapas" else load_controller(_stepped(policy, dt_s, spec.seed, on))
        for policy in spec.policy
    ]
    router = load_router(PolicySpec(use="tapas:TapasRouter")) if "route" in on else None
    fleet = make_fleet(
        spec,
        saas_vms=saas,
        controllers=controllers,
        router=router,
        sizing=sizing,
        reload_s=reload_s,
    )
    return fleet, fleet.run(dt_s, until_s)


def _stepped(policy: PolicySpec, dt_s: float, seed: int, on: set[str]) -> PolicySpec:
    params: dict[str, Any] = {"period_s": dt_s}
    if policy.use == "blind_placement":
        params["seed"] = seed
    if policy.use == "uniform_cap" and "config" in on:
        params["grace_s"] = GRACE_S
    return PolicySpec(use=policy.use, params=params, precedence=policy.precedence)


def _learn(spec: RunSpec, planner: Any, saas: int, sizing: float) -> None:
    """Let the planner watch the day before, under the baseline."""
    assert spec.plant is not None
    before = msgspec.structs.replace(spec.plant, start_hour=spec.plant.start_hour - 24.0)
    policies = [
        PolicySpec(use="blind_placement", params={"seed": spec.seed + 1000}),
        PolicySpec(use="uniform_cap", params={"period_s": 300.0}, precedence="safety"),
        PolicySpec(use="tapas"),
    ]
    yesterday = msgspec.structs.replace(spec, plant=before, policy=policies, fault=[])
    planner.place = planner.configure = False
    fleet = make_fleet(
        yesterday,
        saas_vms=saas,
        controllers=[*(load_controller(policy) for policy in policies[:2]), planner],
        router=None,
        sizing=sizing,
    )
    fleet.run(300.0, 86_400.0)
    planner.forget_time()
