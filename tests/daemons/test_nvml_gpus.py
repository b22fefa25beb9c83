"""The NVML adapter on emulated GPUs: the same columns as the direct way, and GPUs that get lost."""

from __future__ import annotations

import numpy as np
import pytest

from daemons.devices.nvml import NvmlGpus
from emulators.gpu import GpuBank
from emulators.nvml import EmulatedNvml
from emulators.profiles import load_gpu
from emulators.server import NodeGpus
from emulators.state import GpuState
from testbed.core.errors import DeviceError


@pytest.fixture
def bank():
    made = GpuBank(load_gpu("h100-sxm"), GpuState.create(3), offset_c=np.array([0.0, 3.0, -2.0]))
    for busy in (0.2, 1.0, 0.6):
        made.advance(0.1, *(np.full(3, share) for share in (busy, 0.5 * busy, 0.2 * busy)))
    return made


def test_both_ways_to_the_gpus_read_alike(bank):
    through_names, direct = NvmlGpus(EmulatedNvml(bank.state)), NodeGpus(bank.state, 0, 3)
    assert through_names.infos() == direct.infos()
    for _ in range(2):
        assert through_names.read() == direct.read()
        assert through_names.power_limits_w() == direct.power_limits_w()
        bank.advance(0.1, np.ones(3), np.full(3, 0.4), np.full(3, 0.1))


def test_a_gpu_lost_under_way_reads_zero_and_keeps_its_energy(bank):
    gpus, direct = NvmlGpus(EmulatedNvml(bank.state)), NodeGpus(bank.state, 0, 3)
    before = gpus.read()
    bank.lose(1)
    after = gpus.read()
    assert after.lost.tolist() == [False, True, False]
    assert after == direct.read()
    assert after.power_avg_w[1] == after.power_limit_w[1] == after.temp_c[1] == 0.0
    assert after.energy_j[1] == before.energy_j[1] > 0
    bank.advance(0.1, np.ones(3), np.full(3, 0.4), np.full(3, 0.1))
    assert gpus.read() == direct.read()
    assert after.power_avg_w[0] == before.power_avg_w[0] > 100


def test_a_gpu_lost_between_two_calls_has_no_limit(bank):
    gpus = NvmlGpus(EmulatedNvml(bank.state))
    bank.lose(2)
    assert gpus.power_limits_w() == [700.0, 700.0, 0.0]
    with pytest.raises(DeviceError, match="lost") as caught:
        gpus.set_power_limit(2, 400.0)
    assert caught.value.lost
    gpus.set_power_limit(0, 400.0)
    assert gpus.power_limits_w()[0] == 400.0


def test_a_daemon_starts_beside_a_lost_gpu_but_not_on_lost_ones_alone(bank):
    bank.lose(0)
    gpus = NvmlGpus(EmulatedNvml(bank.state))
    assert gpus.read().lost.tolist() == [True, False, False]
    infos = gpus.infos()
    assert infos[0].power_limit_max_w == infos[1].power_limit_max_w
    assert len({info.uuid for info in infos}) == 3
    bank.lose(1)
    bank.lose(2)
    with pytest.raises(DeviceError, match="all GPUs"):
        NvmlGpus(EmulatedNvml(bank.state))
