"""Caps on clocks: cut fast, raise slowly, by priority where that is asked for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from testbed.core.spec import PolicySpec
from testbed.core.view import LockClocks, SetPowerLimit, view_of
from testbed.policies.load import load_controller

BUDGET_W = 2000.0


class Row:
    """Four GPUs whose draw goes with the square of their clock, up to their limits."""

    def __init__(self, policy: str, **params: float) -> None:
        self.policy = load_controller(
            PolicySpec(use=policy, params={"period_s": 1.0, "hold_s": 20.0, **params})
        )
        self.view = view_of([[100.0] * 4], budget_w=BUDGET_W, priority=[[1, 1, 0, 0]])
        self.clock, self.limit_w = np.ones(4), np.full(4, 700.0)
        self.load: list[float] = []
        self.changes = 0

    def play(self, seconds: int, demand_w: Callable[[int], float]) -> None:
        gpus = self.view.gpus
        for second in range(seconds):
            self.view.now_s += 1.0
            draw_w = np.minimum(100.0 + (demand_w(second) - 100.0) * self.clock**2, self.limit_w)
            gpus.t_s[:] = self.view.now_s
            gpus.power_avg_w[:] = draw_w
            gpus.power_limit_w[:] = self.limit_w
            self.load.append(float(draw_w.sum()) / BUDGET_W)
            for command in self.policy.step(self.view):
                if isinstance(command, LockClocks):
                    before = self.clock.copy()
                    self.clock[command.gpus] = np.minimum(command.sm_clock_mhz / 1980.0, 1.0)
                    self.changes += int((before != self.clock).sum())
                else:
                    assert isinstance(command, SetPowerLimit)
                    self.limit_w[command.gpus] = command.power_limit_w


@pytest.fixture(params=["uniform_cap", "polca_cap"])
def row(request):
    return Row(request.param)


def test_a_quiet_row_is_left_alone(row):
    row.play(60, lambda s: 300.0)
    assert row.changes == 0


def test_a_row_over_its_limit_is_under_it_within_three_steps(row):
    row.play(20, lambda s: 690.0)
    assert max(row.load[3:]) <= 1.0


def test_caps_come_off_when_the_load_has_gone(row):
    row.play(30, lambda s: 690.0)
    assert (row.clock < 1).any()
    row.play(200, lambda s: 150.0)
    assert (row.clock == 1).all()
    assert (row.limit_w == 700).all()


def test_a_uniform_cap_treats_all_alike():
    row = Row("uniform_cap")
    row.play(5, lambda s: 500.0)
    assert row.clock == pytest.approx([0.65] * 4)


def test_a_grace_time_waits_for_others_first():
    row = Row("uniform_cap", grace_s=10.0)
    row.play(10, lambda s: 500.0)
    assert row.changes == 0
    row.play(5, lambda s: 500.0)
    assert row.changes > 0


def test_polca_takes_from_low_priority_first():
    row = Row("polca_cap")
    row.play(5, lambda s: 440.0)
    assert row.clock == pytest.approx([1.0, 1.0, 0.65, 0.65])


def test_polca_leaves_its_levels_one_by_one():
    row = Row("polca_cap")
    row.play(5, lambda s: 480.0)
    assert row.clock.tolist() == pytest.approx([0.8, 0.8, 0.65, 0.65])
    row.play(25, lambda s: 300.0)
    assert row.clock.tolist() == pytest.approx([1.0, 1.0, 0.65, 0.65])
    row.play(25, lambda s: 300.0)
    assert (row.clock == 1).all()
