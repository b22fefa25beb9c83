"""The cluster of the TAPAS experiment: endpoints, configurations and their profiles, one run."""

from __future__ import annotations

import math
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from emulators.fluid import CLOCKS, FlowTables, Lengths
from emulators.power import power_w
from emulators.profiles import GpuProfile, load_gpu
from testbed.core.spec import ClassSpec, PolicySpec, RunSpec, WorkloadSpec, parse_spec
from testbed.policies.load import load_controller, load_router
from testbed.policies.tapas.configurator import LOAD_STEPS
from testbed.shells.fluid import Config, Endpoint, FluidFleet, Tally, flow_of
from testbed.workloads import open_workload
from testbed.workloads.vms import demand_frac

BASE = Path(__file__).with_name("run.toml").read_text(encoding="utf-8")
ROW_SERVERS = 40
"""Servers that a row's limits are sized for."""
SIZING = 0.7
"""Demand of an endpoint's busiest hour over what its VMs can serve within the latency limits, all
alike. A free parameter: swept."""
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
    return peak_rps * float(demand_frac(curve, start_hour % 24.0 + t_s / 3600.0))


@cache
def goodput_rps(config: Config, service: str, clock: float, ttft_s: float, tpot_s: float) -> float:
    """Highest rate at which an instance meets its class's limits in the mean."""
    tables = FlowTables([flow_of(config, lengths(service), load_gpu("h100-sxm"))])
    which, at = np.zeros(97, np.int64), np.full(97, clock)
    rates = np.linspace(0.0, PEAK_FRAC, 97) * tables.capacity_rps(which, at)
    flow = tables.at(which, rates, at)
    good = (flow.ttft_s <= ttft_s) & (flow.itl_s <= tpot_s)
    return float(rates[good].max()) if good.any() else 0.0


@cache
def profiles(ttft_s: float, tpot_s: float) -> list[dict[str, Any]]:
    """What TAPAS is told of configurations: swept on the emulator, as a provider does offline."""
    gpu = load_gpu("h100-sxm")
    rows: list[dict[str, Any]] = []
    for service in ("chat", "code"):
        shape = lengths(service)
        tokens = shape.prompt_tokens + shape.output_tokens
        for config in CONFIGS:
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


def make_fleet(
    spec: RunSpec,
    *,
    saas_vms: int,
    controllers: list[Any],
    router: Any,
    sizing: float = SIZING,
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
        spec, load_gpu(spec.cluster.gpu), endpoints, CONFIGS, controllers, router
    )
