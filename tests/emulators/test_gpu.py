"""The bank of GPUs: caps, clocks, heat, and NVML's rules about them."""

from __future__ import annotations

import os

import numpy as np
import pynvml
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emulators.gpu import IDLE, SW_POWER_CAP, SW_THERMAL, GpuBank
from emulators.nvml import EmulatedNvml
from emulators.power import clock_for_limit, demand_w, power_w
from emulators.profiles import available_gpus, load_gpu, load_sources
from emulators.state import GpuState


def bank(count=1, gpu="h100-sxm", **kwargs):
    return GpuBank(load_gpu(gpu), GpuState.create(count), **kwargs)


def work(value, count=1):
    return np.full(count, float(value))


class Prefill:
    """Compute-bound work: as fast as the clock allows."""

    def __call__(self, gpus):
        return work(1.0), work(0.7) * gpus.clock_frac, work(0.15) * gpus.clock_frac


class Decode:
    """Memory-bound work: the clock hardly matters."""

    def __call__(self, gpus):
        reach = np.minimum(gpus.clock_frac / gpus.profile.bandwidth_knee_frac, 1.0)
        return work(1.0), work(0.04) * reach, work(0.6) * reach


def drive(gpus, load, seconds, dt_s=0.1):
    for _ in range(round(seconds / dt_s)):
        gpus.advance(dt_s, *load(gpus))


def set_limit(gpus, limit_w):
    gpus.state.control["power_limit_mw"] = round(limit_w * 1000)


@pytest.mark.parametrize("limit_w", [350.0, 450.0, 600.0])
def test_prefill_settles_under_its_cap(limit_w):
    gpus = bank()
    drive(gpus, Prefill(), 3)
    assert gpus.power_w[0] > 600
    set_limit(gpus, limit_w)
    gpus.advance(0.1, *Prefill()(gpus))
    gpus.advance(0.1, *Prefill()(gpus))
    drive(gpus, Prefill(), 2)
    assert gpus.power_w[0] <= limit_w + 1
    assert gpus.power_w[0] > 0.9 * limit_w, "the cap must not cost more than it has to"
    assert gpus.state.measured["throttle"][0] & SW_POWER_CAP
    assert gpus.state.measured["power_average_mw"][0] <= (limit_w + 1) * 1000


def test_a_cap_above_the_draw_of_decoding_costs_nothing():
    gpus = bank()
    drive(gpus, Decode(), 2)
    draw_w = gpus.power_w[0]
    assert draw_w < 600
    set_limit(gpus, draw_w + 10)
    drive(gpus, Decode(), 2)
    assert gpus.clock_frac[0] == 1.0
    assert not gpus.state.measured["throttle"][0] & SW_POWER_CAP


def test_decode_sheds_voltage_first_and_then_falls_off_a_cliff():
    gpus = bank()
    rates = {}
    for limit_w in (700, 480, 430, 300, 220):
        set_limit(gpus, limit_w)
        drive(gpus, Decode(), 4)
        rates[limit_w] = Decode()(gpus)[2][0]
    assert rates[430] > 0.95 * rates[700]
    assert rates[220] < 0.6 * rates[700]


def test_a_spike_stands_above_the_limit_until_the_controller_has_reacted():
    gpus = bank(gpu="a100-80gb")
    drive(gpus, Decode(), 2)
    gpus.advance(0.1, *Prefill()(gpus))
    assert gpus.power_w[0] > 400, "the first tick of a prefill exceeds the board's limit"
    drive(gpus, Prefill(), 2)
    assert gpus.power_w[0] <= 401


def test_power_reading_is_a_one_second_mean_on_h100_and_instant_on_a100():
    for gpu, averaged in (("h100-sxm", True), ("a100-80gb", False)):
        gpus = bank(gpu=gpu)
        drive(gpus, lambda g: (work(0), work(0), work(0)), 2)
        for _ in range(5):
            gpus.advance(0.1, *Decode()(gpus))
        row = gpus.state.measured[0]
        if averaged:
            mean_mw = (5 * row["power_instant_mw"] + 5 * gpus.profile.idle_w * 1000) / 10
            assert row["power_average_mw"] == pytest.approx(mean_mw, rel=1e-3)
        else:
            assert row["power_average_mw"] == row["power_instant_mw"]


def test_a_lower_out_of_band_limit_is_the_one_enforced():
    gpus = bank()
    gpus.state.measured["power_limit_oob_mw"] = 400_000
    drive(gpus, Prefill(), 3)
    assert gpus.state.enforced_mw()[0] == 400_000
    assert gpus.state.control["power_limit_mw"][0] == 700_000
    assert gpus.power_w[0] <= 401


def test_locked_clocks_act():
    gpus = bank()
    gpus.state.control["sm_clock_lock_max_mhz"] = 1200
    drive(gpus, Decode(), 1)
    assert gpus.state.measured["sm_clock_mhz"][0] == 1200
    assert gpus.power_w[0] < 460


def test_heat_slows_a_gpu_that_is_cooled_badly():
    gpus = bank(inlet_c=55.0)
    drive(gpus, Prefill(), 120)
    row = gpus.state.measured[0]
    assert row["throttle"] & SW_THERMAL
    assert gpus.clock_frac[0] < 0.98
    assert row["temp_c"] <= gpus.profile.temp_slowdown_c + 2


def test_temperature_has_a_fast_and_a_slow_part():
    gpus = bank(gpu="a100-80gb")
    start_c = gpus.thermal.temp_c[0]
    seen = {}
    for tick in range(1, 601):
        gpus.advance(0.1, *Decode()(gpus))
        seen[tick] = gpus.thermal.temp_c[0] - start_c
    assert seen[20] > 0.3 * seen[600]
    assert seen[20] < 0.7 * seen[600]
    assert seen[600] - seen[400] < 0.5


def test_steps_of_any_size_give_the_same_temperature():
    small, large = bank(), bank()
    for _ in range(100):
        small.thermal.advance(0.1, work(500.0), small.inlet_c)
    large.thermal.advance(10.0, work(500.0), large.inlet_c)
    assert small.thermal.temp_c == pytest.approx(large.thermal.temp_c)


def test_memory_adds_up_and_processes_hold_it():
    gpus = bank()
    gpus.load(0, pid=4242, used_bytes=10 << 30)
    row = gpus.state.measured[0]
    assert row["memory_used_bytes"] == 10 << 30
    assert row["num_processes"] == 1
    with pytest.raises(ValueError, match="exceeds"):
        gpus.load(0, pid=1, used_bytes=1 << 40)
    gpus.unload(0)
    assert row["memory_used_bytes"] == 0


def test_idle_says_idle():
    gpus = bank()
    gpus.advance(0.1, work(0), work(0), work(0))
    row = gpus.state.measured[0]
    assert row["throttle"] == IDLE
    assert row["power_instant_mw"] == gpus.profile.idle_w * 1000


@settings(max_examples=200, deadline=None)
@given(
    busy=st.floats(0, 1),
    tensor=st.floats(0, 1),
    hbm=st.floats(0, 1),
    clock=st.floats(0.15, 1.0),
    limit=st.floats(150, 700),
)
def test_the_chosen_clock_is_the_highest_that_fits(busy, tensor, hbm, clock, limit):
    profile = load_gpu("h100-sxm")
    tensor = min(tensor, busy * profile.gemm_efficiency * clock)
    activity = tuple(work(v) for v in (busy, tensor * 1.0, hbm * busy, clock))
    chosen = clock_for_limit(profile, work(limit), *activity)
    at_chosen = demand_w(profile, chosen, *activity)[0]
    lowest = profile.sm_clock_min_mhz / profile.sm_clock_max_mhz
    if chosen[0] > lowest + 1e-9:
        assert at_chosen <= limit * 1.02 + 1
    if chosen[0] < 1.0:
        higher = np.minimum(chosen + 0.05, 1.0)
        assert demand_w(profile, higher, *activity)[0] >= limit * 0.98 - 1


def test_power_is_linear_in_work():
    profile = load_gpu("h100-sxm")
    parts = [(0.2, 0.1, 0.3), (0.6, 0.3, 0.1)]
    mean = tuple(sum(p[k] for p in parts) / 2 for k in range(3))
    each = [power_w(profile, 0.8, *part) for part in parts]
    assert power_w(profile, 0.8, *mean) == pytest.approx(sum(each) / 2)


@pytest.mark.parametrize("name", available_gpus())
def test_every_constant_has_a_source(name):
    sources = load_sources(name)
    constants = set(load_gpu(name).__struct_fields__) - {"name", "full_name", "architecture"}
    assert constants == set(sources)
    assert all(len(text) > 5 for text in sources.values())


ticks = st.lists(
    st.tuples(
        st.just(0.0) | st.floats(0.01, 1),
        st.floats(0, 0.75),
        st.floats(0, 0.9),
        st.sampled_from([0, 250, 450, 700]),
    ),
    min_size=5,
    max_size=60,
)


@settings(max_examples=80, deadline=None)
@given(ticks=ticks, gpu=st.sampled_from(["h100-sxm", "a100-80gb"]))
def test_what_nvml_shows_is_consistent_at_every_tick(ticks, gpu):
    """HARDWARE's consistency rules, over random work and limits set at random moments."""
    gpus = bank(gpu=gpu)
    gpus.load(0, pid=os.getpid(), used_bytes=60 << 30)
    nvml = EmulatedNvml(gpus.state)
    nvml.nvmlInit()
    handle = nvml.nvmlDeviceGetHandleByIndex(0)
    low_w, high_w = gpus.profile.power_limit_range_w
    energy_j = gpus.energy_j[0]
    for busy, tensor, hbm, limit_w in ticks:
        if limit_w:
            wanted_mw = round(min(max(limit_w, low_w), high_w) * 1000)
            nvml.nvmlDeviceSetPowerManagementLimit(handle, wanted_mw)
        gpus.advance(0.1, work(busy), work(tensor * busy), work(hbm * busy))
        reasons = nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
        enforced_mw = nvml.nvmlDeviceGetEnforcedPowerLimit(handle)
        assert bool(reasons & SW_POWER_CAP) == bool(gpus.demand_w[0] * 1000 > enforced_mw)
        assert bool(reasons & IDLE) == (busy == 0)
        assert enforced_mw <= nvml.nvmlDeviceGetPowerManagementLimit(handle)
        assert low_w * 1000 <= enforced_mw <= high_w * 1000
        memory = nvml.nvmlDeviceGetMemoryInfo(handle, pynvml.nvmlMemory_v2)
        assert memory.used + memory.free + memory.reserved == memory.total
        held = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
        assert sum(process.usedGpuMemory for process in held) <= memory.used
        if nvml.nvmlDeviceGetUtilizationRates(handle).gpu > 0:
            assert memory.used > 0
            assert held
            assert gpus.power_w[0] > gpus.profile.idle_w
            clock_mhz = nvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)
            assert clock_mhz > gpus.profile.sm_clock_idle_mhz
        assert gpus.energy_j[0] == pytest.approx(energy_j + gpus.power_w[0] * 0.1)
        energy_j = gpus.energy_j[0]
