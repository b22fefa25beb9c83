"""Breakers against the bands of their standards and data sheets, and their memory."""

from __future__ import annotations

import numpy as np
import pytest

from emulators.breaker import MOLDED_CASE, UPS, Breakers


@pytest.mark.parametrize(
    ("load", "after_s"),
    [
        (1.35, 2 * 3600.0),  # UL 489, over 50 A
        (2.00, 14 * 60.0),  # UL 489, 401 to 600 A
        (1.30, 2 * 3600.0),  # IEC 60947-2, over 63 A
    ],
)
def test_a_breaker_trips_in_time(load: float, after_s: float):
    assert 0 < MOLDED_CASE.trips_after_s(load) <= after_s


@pytest.mark.parametrize("load", [1.0, 1.05])
def test_a_breaker_holds_what_it_must(load: float):
    breaker = Breakers(MOLDED_CASE, np.array([100.0]))
    for _ in range(2 * 60):
        assert not breaker.advance(60.0, np.array([100.0 * load])).any()


@pytest.mark.parametrize(("load", "allowed_s"), [(1.25, 600.0), (1.5, 90.0)])
def test_a_ups_gives_up_no_later_than_its_data_sheet(load: float, allowed_s: float):
    assert UPS.trips_after_s(load, 1.0) <= allowed_s


def test_the_step_does_not_change_when_it_trips():
    for curve in (MOLDED_CASE, UPS):
        breaker, fine = (Breakers(curve, np.array([1.0])) for _ in range(2))
        coarse_s = next(
            60.0 * k for k in range(1, 500) if breaker.advance(60.0, np.array([1.4])).any()
        )
        fine_s = next(k * 1.0 for k in range(1, 30_000) if fine.advance(1.0, np.array([1.4])).any())
        assert fine_s == pytest.approx(curve.trips_after_s(1.4), abs=1.0)
        assert coarse_s - 60.0 < fine_s <= coarse_s


def test_overloads_add_up():
    """Two thirds of the time that trips, again after a short rest, trips."""
    breaker = Breakers(MOLDED_CASE, np.array([100.0]))
    part_s = 0.66 * MOLDED_CASE.trips_after_s(1.5)
    assert not breaker.advance(part_s, np.array([150.0])).any()
    assert not breaker.advance(30.0, np.array([80.0])).any()
    assert breaker.advance(part_s, np.array([150.0])).all()
    assert breaker.tripped.all()
    assert not breaker.advance(1.0, np.array([150.0])).any(), "it trips once and stays open"


def test_a_short_circuit_trips_at_once():
    assert Breakers(MOLDED_CASE, np.array([1.0])).advance(0.001, np.array([9.0])).all()
