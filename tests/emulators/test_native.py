"""The C form of the physics: the same bits as the arrays that it stands in for."""

from __future__ import annotations

import numpy as np
import pytest

from emulators import native, server
from emulators.gpu import GpuBank
from emulators.profiles import available_gpus, load_gpu
from emulators.state import GpuState
from testbed.core.freeze import freeze, thaw

COUNT, TICKS = 24, 400
COLUMNS = ("clock_frac", "power_w", "demand_w", "enforced_w", "energy_j")

needs_kernel = pytest.mark.skipif(native.bank_library() is None, reason="no C compiler")


def pair(gpu: str) -> tuple[GpuBank, GpuBank]:
    made = []
    for _ in range(2):
        offsets_c = np.random.default_rng(5).normal(0.0, 8.0, COUNT)
        made.append(GpuBank(load_gpu(gpu), GpuState.create(COUNT), offset_c=offsets_c))
    arrays, kernel = made
    arrays._kernel = None
    assert kernel._kernel is not None
    return arrays, kernel


def disturb(bank: GpuBank, tick: int, draw: np.random.Generator) -> None:
    """Whatever clients, buildings and accidents do to GPUs."""
    profile, control = bank.profile, bank.state.control
    gpu = int(draw.integers(COUNT))
    limit_w = draw.uniform(*profile.power_limit_range_w)
    lock_mhz = draw.uniform(profile.sm_clock_min_mhz, profile.sm_clock_max_mhz)
    if tick % 3 == 0:
        control["power_limit_mw"][gpu] = round(limit_w * 1000)
    if tick % 7 == 0:
        control["sm_clock_lock_max_mhz"][gpu] = round(lock_mhz) if tick % 2 else 0
    if tick % 11 == 0:
        bank.state.measured["power_limit_oob_mw"][gpu] = round(limit_w * 900) if tick % 2 else 0
    if tick % 40 == 0:
        bank.inlet_c[:] = draw.uniform(15.0, 70.0)
    if tick == 150:
        bank.lose(gpu)
    if tick == 200:
        bank.unloaded_w = draw.uniform(0.0, 20.0, COUNT)
    if tick % 50 == 10:
        bank.copy(gpu, 0.1 * tick, 0.1 * tick + 1.0, 1e12)


def work(draw: np.random.Generator) -> list[np.ndarray]:
    busy = np.clip(draw.uniform(-0.3, 1.2, COUNT), 0.0, 1.0)
    return [busy, busy * draw.uniform(0.0, 0.8, COUNT), busy * draw.uniform(0.0, 0.9, COUNT)]


@needs_kernel
@pytest.mark.parametrize("gpu", available_gpus())
def test_both_forms_give_the_same_bits(gpu):
    arrays, kernel = pair(gpu)
    reasons = 0
    for tick in range(TICKS):
        dt_s = 0.1 if tick % 5 else 0.37
        for bank in (arrays, kernel):
            draw = np.random.default_rng([3, tick])
            disturb(bank, tick, draw)
            bank.advance(dt_s, *work(draw))
        for name in COLUMNS:
            np.testing.assert_array_equal(getattr(kernel, name), getattr(arrays, name), name)
        np.testing.assert_array_equal(kernel.thermal.temp_c, arrays.thermal.temp_c)
        assert kernel.state.measured.tobytes() == arrays.state.measured.tobytes(), tick
        reasons |= int(np.bitwise_or.reduce(kernel.state.measured["throttle"]))
    assert reasons & 0x27 == 0x27, "every kind of throttling is met on the way"


@needs_kernel
def test_readings_are_those_of_the_columns():
    _, bank = pair("h100-sxm")
    draw = np.random.default_rng(1)
    for tick in range(160):
        disturb(bank, tick, draw)
        bank.advance(0.1, *work(draw))
        assert native.read_gpus(bank.state) == server._gpu_readings(bank.state)
    part = bank.state.slice(5, 9)
    assert native.read_gpus(part) == server._gpu_readings(part)


@needs_kernel
def test_a_restored_bank_goes_on_where_it_was():
    _, kernel = pair("h100-sxm")
    draw = np.random.default_rng(2)
    for _ in range(20):
        kernel.advance(0.1, *work(draw))
    kept = freeze(kernel.save())
    later = [work(draw) for _ in range(20)]
    for done in later:
        kernel.advance(0.1, *done)
    for bank in pair("h100-sxm"):
        bank.restore(thaw(kept))
        for done in later:
            bank.advance(0.1, *done)
        assert kernel.state.measured.tobytes() == bank.state.measured.tobytes()


def test_without_a_compiler_the_arrays_do_it(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    native.bank_library.cache_clear()
    try:
        assert native.bank_library() is None
        bank = GpuBank(load_gpu("h100-sxm"), GpuState.create(2))
        bank.advance(0.1, np.ones(2), np.full(2, 0.5), np.full(2, 0.2))
        assert bank.power_w[0] > 300
        assert len(server.gpu_readings(bank.state)) == 2
    finally:
        native.bank_library.cache_clear()
