"""The last word: leases, ramps, drift, and putting back what was found."""

from __future__ import annotations

import itertools
import json
import math

import pytest

from daemons.safety import CapGuard, Journal
from testbed.core.errors import DeviceError
from testbed.core.messages import GpuInfo, Lease


class FakeGpus:
    """Two devices that do as they are told."""

    def __init__(self, limits_w=(700.0, 650.0)):
        self.limits_w = list(limits_w)
        self.locks_mhz = [0.0] * len(self.limits_w)
        self.refuse = False
        self.history = []

    def infos(self):
        return [
            GpuInfo(f"GPU-{i}", "fake", 80 << 30, 200.0, 700.0, 700.0, 210.0, 1980.0)
            for i in range(len(self.limits_w))
        ]

    def power_limits_w(self):
        return list(self.limits_w)

    def set_power_limit(self, index, power_limit_w):
        if self.refuse:
            raise DeviceError("no permission")
        self.history.append((index, power_limit_w))
        self.limits_w[index] = power_limit_w

    def set_clock_lock(self, index, sm_clock_mhz):
        self.locks_mhz[index] = sm_clock_mhz


def lease(sequence, limits_w, *, epoch=1, expires_s=3.0, locks_mhz=None):
    return Lease(epoch, sequence, expires_s, limits_w, locks_mhz or [0.0] * len(limits_w))


@pytest.fixture
def gpus():
    return FakeGpus()


@pytest.fixture
def journal(tmp_path):
    return Journal(tmp_path / "state" / "journal.json")


def make(gpus, journal, *, now_s=0.0, ramp_down=math.inf, ramp_up=math.inf, **kwargs):
    guard = CapGuard(gpus, journal, **kwargs)
    guard.agree(
        [300.0] * len(gpus.limits_w),
        lease_s=3.0,
        ramp_down_w_per_s=ramp_down,
        ramp_up_w_per_s=ramp_up,
        epoch=1,
        now_s=now_s,
    )
    return guard


def test_a_lease_is_obeyed_and_clamped_to_the_device(gpus, journal):
    guard = make(gpus, journal)
    assert guard.accept(lease(1, [500.0, 9000.0], locks_mhz=[50.0, 1500.0]), 0.0) == ""
    guard.advance(0.1)
    assert gpus.limits_w == [500.0, 700.0]
    assert gpus.locks_mhz == [210.0, 1500.0]


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (lease(1, [500.0, 500.0], epoch=0), "epoch 0"),
        (lease(1, [500.0, 500.0], epoch=2), "epoch 2"),
        (lease(0, [500.0, 500.0]), "sequence 0"),
        (lease(1, [500.0]), "1 GPUs"),
        (lease(1, [500.0, math.nan]), "not a number"),
        (lease(1, [500.0, 500.0], expires_s=0.5), "ran out"),
    ],
)
def test_what_is_refused(gpus, journal, bad, why):
    guard = make(gpus, journal, now_s=1.0)
    assert why in guard.accept(bad, 1.0)
    guard.advance(1.1)
    assert gpus.limits_w == [700.0, 650.0]


def test_a_replayed_lease_is_refused(gpus, journal):
    guard = make(gpus, journal)
    assert guard.accept(lease(5, [400.0, 400.0]), 0.0) == ""
    assert guard.accept(lease(5, [700.0, 700.0]), 0.1) != ""


def test_silence_leads_to_the_safe_cap_in_bounded_steps(gpus, journal):
    guard = make(gpus, journal, ramp_down=1000.0)
    guard.accept(lease(1, [700.0, 650.0]), 0.0)
    seen = []
    for step in range(1, 50):
        guard.advance(step * 0.1)
        seen.append(gpus.limits_w[0])
    assert seen[28] == 700.0
    assert seen[-1] == 300.0
    falls = [before - after for before, after in itertools.pairwise(seen)]
    assert max(falls) <= 100.0 + 1e-6
    assert guard.expired
    assert guard.accept(lease(2, [700.0, 650.0], expires_s=9.0), 5.0) == ""
    guard.advance(5.1)
    assert gpus.limits_w[0] == 700.0


def test_a_lease_binds_no_longer_than_agreed(gpus, journal):
    guard = make(gpus, journal)
    guard.accept(lease(1, [700.0, 650.0], expires_s=1e9), 0.0)
    guard.advance(3.2)
    assert guard.expired


def test_raising_is_slow(gpus, journal):
    guard = make(gpus, journal, ramp_up=100.0)
    guard.accept(lease(1, [300.0, 300.0]), 0.0)
    guard.advance(0.1)
    guard.accept(lease(2, [700.0, 700.0]), 0.1)
    guard.advance(0.2)
    assert gpus.limits_w == [310.0, 310.0]


def test_foreign_changes_lower_is_respected_higher_is_set_again(gpus, journal):
    guard = make(gpus, journal)
    guard.accept(lease(1, [500.0, 500.0]), 0.0)
    guard.advance(0.1)
    gpus.limits_w = [350.0, 690.0]
    guard.advance(0.2)
    assert gpus.limits_w == [350.0, 500.0]
    assert guard.drift_total == 2
    guard.advance(0.3)
    assert guard.drift_total == 2
    guard.accept(lease(2, [600.0, 600.0]), 0.3)
    guard.advance(0.4)
    assert gpus.limits_w == [350.0, 600.0], "still under the other authority's limit"
    gpus.limits_w[0] = 700.0
    guard.advance(0.5)
    assert gpus.limits_w == [600.0, 600.0]


def test_exit_restores_and_removes_the_journal(gpus, journal):
    guard = make(gpus, journal)
    guard.accept(lease(1, [400.0, 400.0], locks_mhz=[900.0, 900.0]), 0.0)
    guard.advance(0.1)
    assert journal.path.exists()
    guard.restore()
    assert gpus.limits_w == [700.0, 650.0]
    assert gpus.locks_mhz == [0.0, 0.0]
    assert not journal.path.exists()


def test_the_life_after_a_kill_restores_first(gpus, journal):
    guard = make(gpus, journal)
    guard.accept(lease(1, [400.0, 400.0]), 0.0)
    guard.advance(0.1)
    assert gpus.limits_w == [400.0, 400.0]
    make(gpus, journal)  # a new life; the old one never restored
    assert gpus.limits_w == [700.0, 650.0]


def test_a_journal_that_cannot_be_read_is_an_error(gpus, journal):
    journal.path.parent.mkdir()
    journal.path.write_text("{half")
    with pytest.raises(DeviceError, match="by hand"):
        CapGuard(gpus, journal)


def test_dry_run_sets_nothing(gpus, journal):
    guard = make(gpus, journal, allow_writes=False)
    guard.accept(lease(1, [400.0, 400.0]), 0.0)
    guard.advance(0.1)
    guard.restore()
    assert gpus.history == []
    assert guard.power_limits_w() == [400.0, 400.0]
    assert not journal.path.exists()


def test_a_refusing_device_is_reported_and_tried_again(gpus, journal):
    said = []
    guard = make(gpus, journal, log=said.append)
    gpus.refuse = True
    guard.accept(lease(1, [400.0, 400.0]), 0.0)
    guard.advance(0.1)
    assert gpus.limits_w == [700.0, 650.0]
    assert any("no permission" in line for line in said)
    gpus.refuse = False
    guard.advance(0.2)
    assert gpus.limits_w == [400.0, 400.0]


def test_terms_outside_the_device_range_are_refused(gpus, journal):
    guard = CapGuard(gpus, journal)
    with pytest.raises(DeviceError, match=r"outside fake's range \[200.0, 700.0\] W"):
        guard.agree(
            [100.0, 300.0],
            lease_s=3.0,
            ramp_down_w_per_s=1.0,
            ramp_up_w_per_s=1.0,
            epoch=1,
            now_s=0.0,
        )


def test_the_journal_says_what_was_found(gpus, journal):
    CapGuard(gpus, journal)
    found = json.loads(journal.path.read_text())["found"]
    assert found == {"GPU-0": {"power_limit_w": 700.0}, "GPU-1": {"power_limit_w": 650.0}}
