"""Every cap policy goes through the same scenarios, played against a row that answers its caps."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from testbed.core.errors import PolicyError
from testbed.core.spec import PolicySpec
from testbed.core.view import SetPowerLimit, view_of
from testbed.policies.load import load_controller, load_router, shipped_policies

BUDGET_W = 2000.0
CAPS = ["row_power_cap", "priority_cap"]


class Row:
    """Four GPUs that draw what is asked of them, up to their limits; every second is one step."""

    def __init__(self, policy: str) -> None:
        self.policy = load_controller(PolicySpec(use=policy))
        self.view = view_of([[100.0] * 4], budget_w=BUDGET_W, priority=[[1, 1, 0, 0]])
        self.limit_w = np.full(4, 700.0)
        self.draws_w: list[float] = []
        self.commands = 0

    def play(self, seconds: int, demand_w: Callable[[int], float], *, heard: bool = True) -> None:
        for second in range(seconds):
            self.view.now_s += 1.0
            draw_w = np.minimum(demand_w(second), self.limit_w)
            gpus = self.view.gpus
            if heard:
                gpus.t_s[:] = self.view.now_s
                gpus.power_avg_w[:] = gpus.power_instant_w[:] = draw_w
                gpus.power_limit_w[:] = gpus.power_limit_enforced_w[:] = self.limit_w
            for command in self.policy.step(self.view):
                assert isinstance(command, SetPowerLimit)
                before = self.limit_w.copy()
                self.limit_w[command.gpus] = command.power_limit_w
                assert (self.limit_w >= 200).all()
                assert (self.limit_w <= 700).all()
                assert (self.limit_w % 1 == 0).all(), "a limit reads back as it was set"
                self.commands += int((before != self.limit_w).sum())
            self.draws_w.append(float(draw_w.sum()))


@pytest.fixture(params=CAPS)
def row(request):
    return Row(request.param)


def test_a_quiet_row_is_left_alone(row):
    row.play(60, lambda s: 250.0)
    assert row.commands == 0


def test_a_row_over_its_budget_is_under_it_within_three_steps(row):
    row.play(20, lambda s: 680.0)
    assert max(row.draws_w[3:]) <= BUDGET_W


def test_a_steady_load_at_the_edge_does_not_hunt(row):
    row.play(600, lambda s: 510.0)
    assert row.commands / 10 <= 4, "per minute"


def test_a_load_that_swings_does_not_hunt(row):
    row.play(600, lambda s: 650.0 if s // 15 % 2 else 350.0)
    assert row.commands / 10 <= 20, "per minute, all four GPUs together"


def test_caps_come_off_when_the_load_has_gone(row):
    row.play(30, lambda s: 680.0)
    assert (row.limit_w < 700).any()
    row.play(60, lambda s: 150.0)
    assert (row.limit_w == 700).all()


def test_what_is_not_heard_from_counts_at_its_limit(row):
    row.play(5, lambda s: 300.0)
    assert row.commands == 0
    row.play(10, lambda s: 300.0, heard=False)
    assert row.limit_w.sum() <= BUDGET_W, "unseen, they may draw all they are allowed"


@pytest.mark.parametrize("policy", CAPS)
def test_a_budget_too_small_for_the_devices_ends_at_their_lowest_limit(policy):
    row = Row(policy)
    row.view.rows.budget_w[:] = 500.0
    row.play(10, lambda s: 600.0)
    assert row.limit_w.min() == 200.0


@pytest.mark.parametrize("name", shipped_policies())
def test_every_shipped_policy_loads_with_its_defaults(name):
    spec = PolicySpec(use=name)
    try:
        assert load_controller(spec).period_s > 0
    except PolicyError:
        assert load_router(spec) is not None
