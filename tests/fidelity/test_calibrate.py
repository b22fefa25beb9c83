"""Calibration: fits, files and the twin. Torch itself is used only where it is installed."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from testbed import calibrate
from testbed.calibrate import (
    DeviceProfile,
    Line,
    Point,
    TwinCost,
    fit_lines,
    fresh_points,
    load_profile,
    points,
    write_profile,
)
from testbed.core.errors import DeviceError, SpecError

TRUE = {
    "prefill": Line(0.005, 2.5e-4, 1.0, 1.2e-7, 1.0),
    "decode": Line(0.002, 2.5e-3, 0.7, 1e-6, 1.1),
    "encode": Line(0.001, 1e-2, 1.0, 1e-9, 1.0),
}


def profile():
    errors = [{"phase": "decode", "speed": 1.0, "points": 9, "ape_mean_frac": 0.04,
               "ape_max_frac": 0.1, "bias_frac": 0.0}]  # fmt: skip
    return DeviceProfile(
        device="cpu", host="x", date="2026-11-24", speeds=[1.0, 0.5], disturbed_frac=0.1,
        errors=errors, **TRUE,
    )  # fmt: skip


def test_a_fit_finds_the_lines_that_made_the_times():
    draw = np.random.default_rng(0)
    times = {
        speed: {
            point: float(TRUE[point.phase].time_s(point.first, point.second, speed))
            * draw.normal(1.0, 0.01)
            for point in points()
        }
        for speed in (1.0, 0.75, 0.5, 0.3)
    }
    lines = fit_lines(times, lambda point: True)
    for point in fresh_points():
        for speed in (1.0, 0.4):
            found = lines[point.phase].time_s(point.first, point.second, speed)
            true = TRUE[point.phase].time_s(point.first, point.second, speed)
            assert found == pytest.approx(true, rel=0.03)


def test_a_profile_reads_back_as_it_was_written(tmp_path):
    path = tmp_path / "device.toml"
    write_profile(profile(), path)
    again = load_profile(path)
    assert again.decode.bend == pytest.approx(0.7)
    assert again.errors == profile().errors
    for word in ("source", "date", "error"):
        assert word in path.read_text()
    path.write_text("device = 3\n")
    with pytest.raises(SpecError, match="not a device profile"):
        load_profile(path)


def test_the_twin_takes_what_the_lines_say():
    twin = TwinCost(profile())
    decode = twin.base_s(8, 0, 0, 0, 0.5) + 8 * 200 * twin.per_context_token_s(0.5)
    assert decode == pytest.approx(float(TRUE["decode"].time_s(8, 1600, 0.5)))
    prefill = twin.base_s(0, 128, 1, 0, 1.0) + 128 * 129 / 2 * twin.per_pair_s(1.0)
    assert prefill == pytest.approx(float(TRUE["prefill"].time_s(128, 128 * 129 / 2, 1.0)))
    assert twin.encode_s(0, 1.0) == 0.0


def test_points_of_validation_are_not_those_of_calibration():
    assert not set(points()) & set(fresh_points())
    assert {point.phase for point in fresh_points()} == {"prefill", "decode", "encode"}


def test_without_torch_there_is_one_clear_line(monkeypatch):
    import builtins

    real = builtins.__import__

    def no_torch(name, *args, **kwargs):
        if name == "torch":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_torch)
    with pytest.raises(DeviceError, match="torch is not installed"):
        calibrate.Kernels("cpu")


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_real_kernels_run_and_longer_prompts_take_longer():
    kernels = calibrate.Kernels("cpu")
    times = {
        tokens: min(
            calibrate._mean_s(kernels, Point("prefill", tokens, 0), 1.0)[0] for _ in range(2)
        )
        for tokens in (16, 256)
    }
    assert times[256] > 2 * times[16]
