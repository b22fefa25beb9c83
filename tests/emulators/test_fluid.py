"""An instance in the mean against the engine that plays every request."""

from __future__ import annotations

import numpy as np
import pytest

from emulators.fluid import FlowTables, Lengths, flow_table
from emulators.gpu import GpuBank
from emulators.models import load_model
from emulators.power import power_w
from emulators.profiles import load_gpu
from emulators.server import ServerBank
from emulators.state import GpuState
from emulators.timing import IterationCost
from testbed.core.messages import EngineConfig, InstanceConfig, Request

GPU = load_gpu("h100-sxm")
SEQS = 64
TICK_S, WARM_S, END_S = 0.2, 40.0, 240.0


def played(model: str, tp: int, clock: float, rate_rps: float, prompts, outputs):
    """Rate, mean draw per GPU, sequences running, gap between tokens, with Poisson arrivals."""
    state = GpuState.create(tp)
    bank = GpuBank(GPU, state)
    servers = ServerBank(bank, 1)
    if clock < 1.0:
        state.control["sm_clock_lock_max_mhz"][:] = round(clock * GPU.sm_clock_max_mhz)
    [serving] = servers.serving
    config = EngineConfig(max_num_seqs=SEQS)
    serving.configure([InstanceConfig("one", "pool", model, tp, list(range(tp)), config)], 0.0)
    rng = np.random.default_rng(5)
    arrivals_s = np.cumsum(rng.exponential(1.0 / rate_rps, int(2 * END_S * rate_rps)))
    number, running, before_j = 0, [], np.zeros(tp)
    for tick in range(1, round(END_S / TICK_S) + 1):
        now_s = tick * TICK_S
        while arrivals_s[number] <= now_s:
            at_s = float(arrivals_s[number])
            serving.advance_to(at_s)
            prompt, output = int(rng.choice(prompts)), int(rng.choice(outputs))
            serving.submit(0, Request(number, at_s, prompt, output), at_s)
            number += 1
        serving.advance_to(now_s)
        servers.tick(now_s)
        if tick == round(WARM_S / TICK_S):
            before_j = bank.energy_j.copy()
            serving.engines[0].itl.drain()
        elif now_s > WARM_S:
            running.append(serving.engines[0].num_running)
    gaps = serving.engines[0].itl.drain()
    bins, counts = np.array(list(gaps)), np.array(list(gaps.values()))
    itl_s = float((1e-4 * 1.02 ** (bins + 0.5) * counts).sum() / counts.sum())
    draw_w = float((bank.energy_j - before_j)[0] / (END_S - WARM_S))
    came = ((arrivals_s > WARM_S) & (arrivals_s <= END_S)).sum() / (END_S - WARM_S)
    return float(came), draw_w, float(np.mean(running)), itl_s


FIXED = ([1500], [120])
SPREAD = ([200, 800, 1500, 4000], [20, 80, 200, 500])


@pytest.mark.parametrize("clock", [1.0, 0.6])
@pytest.mark.parametrize("used", [0.25, 0.7])
@pytest.mark.parametrize("lengths", [FIXED, SPREAD], ids=["alike", "spread"])
def test_the_mean_agrees_with_the_engine(clock: float, used: float, lengths):
    prompts, outputs = (np.array(values) for values in lengths)
    cost = IterationCost(load_model("llama-2-70b"), GPU, tp=8)
    tables = FlowTables([flow_table(cost, Lengths.of(prompts, outputs), SEQS)])
    which, at = np.zeros(1, np.int64), np.array([clock])
    rate_rps = float(used * tables.capacity_rps(which, at)[0])
    came_rps, engine_w, running, itl_s = played("llama-2-70b", 8, clock, rate_rps, prompts, outputs)
    flow = tables.at(which, np.array([came_rps]), at)
    draw_w = power_w(GPU, clock, flow.busy_frac, flow.tensor_frac, flow.hbm_frac)[0]
    assert draw_w == pytest.approx(engine_w, rel=0.04)
    # Bursts count for more in a mean over tokens than in a mean over time.
    assert flow.itl_s[0] == pytest.approx(itl_s, rel=0.12)
    assert flow.num_running[0] == pytest.approx(running, rel=0.20)


def test_capacity_falls_with_the_clock_less_than_in_proportion():
    cost = IterationCost(load_model("llama-2-70b"), GPU, tp=8)
    tables = FlowTables([flow_table(cost, Lengths.of(np.array([1500]), np.array([120])), SEQS)])
    which = np.zeros(4, np.int64)
    capacity = tables.capacity_rps(which, np.array([1.0, 0.8, 0.6, 0.4]))
    assert (np.diff(capacity) < 0).all()
    assert capacity[2] / capacity[0] > 0.7


def test_a_model_without_room_is_refused():
    cost = IterationCost(load_model("llama-2-70b"), GPU, tp=2)
    long = Lengths.of(np.array([10**7]), np.array([10]))
    with pytest.raises(ValueError, match="leaves no memory"):
        flow_table(cost, long, SEQS)
