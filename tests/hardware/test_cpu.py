"""Hardware mode on a CPU core: real kernels, a real quota, real time."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time

import psutil
import pytest

from daemons.devices import cgroup
from daemons.devices.cpu import WATTS_PER_CORE, CpuDevices
from daemons.executors.torch_worker import hold_ballast
from emulators.engine import Batch, Engine
from emulators.models import load_model
from emulators.profiles import load_gpu
from emulators.timing import IterationCost
from testbed.core.errors import DeviceError
from testbed.core.messages import EngineConfig, Request
from testbed.recorder.reader import Recording
from tests.conftest import ROOT, cli

may_limit = cgroup.probe().cpu and cgroup.probe().writable
needs_quota = pytest.mark.skipif(not may_limit, reason="no writable cpu cgroups")


def measured_engine() -> Engine:
    cost = IterationCost(load_model("toy-8m"), load_gpu("h100-sxm"))
    config = EngineConfig(max_num_seqs=4, max_batched_tokens=64)
    return Engine(cost, config, kv_blocks=100, measured=True)


def test_an_engine_that_waits_to_be_told():
    engine = measured_engine()
    engine.submit(Request(1, 0.0, 100, 2), 0.0)
    assert engine.batch == Batch(0, 0, [(64, 0)], 0)
    assert engine.next_event_s == float("inf")
    engine.advance_to(5.0)
    assert engine.batch == Batch(0, 0, [(64, 0)], 0), "it ends only when it is told"
    engine.complete(6.0)
    assert engine.batch == Batch(0, 0, [(36, 64)], 0)
    engine.complete(7.0)
    assert [(e.kind, e.t_s) for e in engine.events] == [("first_token", 7.0)]
    assert engine.batch == Batch(1, 101, [], 0)
    engine.complete(7.5)
    assert engine.events[-1].kind == "finished"
    assert engine.activity(8.0).prefill_s + engine.activity(8.0).decode_s == pytest.approx(7.5)
    with pytest.raises(ValueError, match="no iteration waits"):
        engine.complete(9.0)


@needs_quota
def test_a_limit_is_a_quota():
    device = CpuDevices(1, name=f"testbed-test-cpu-{os.getpid()}")
    child = os.fork()
    if child == 0:
        while True:
            pass
    try:
        device.attach(0, child)
        device.read()
        time.sleep(0.5)
        free = device.read()
        device.set_power_limit(0, 0.3 * WATTS_PER_CORE)
        device.read()
        time.sleep(1.0)
        held = device.read()
        with pytest.raises(DeviceError, match="outside"):
            device.set_power_limit(0, 2 * WATTS_PER_CORE)
    finally:
        device.close()
        os.waitpid(child, 0)
    # Others may want the core too, so how fast it is without a quota is not certain; the quota is.
    assert 0.0 < held.gpu_busy_frac[0] < 0.4
    assert free.gpu_busy_frac[0] > 0.0
    assert not free.throttle[0] & 0x4
    assert held.throttle[0] & 0x4
    assert held.power_limit_enforced_w[0] == 3.0


@needs_quota
def test_nothing_is_left_behind_after_kill_9():
    name = f"testbed-test-cpu-kill-{os.getpid()}"
    code = (
        "import subprocess, sys, time\nfrom daemons.devices.cpu import CpuDevices\n"
        f"device = CpuDevices(1, name={name!r})\n"
        "worker = subprocess.Popen([sys.executable, '-c', 'while True: pass'])\n"
        "device.attach(0, worker.pid)\nprint(worker.pid, flush=True)\ntime.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    worker = int(process.stdout.readline())
    assert list(cgroup.ROOT.glob(f"*/{name}*")) + list(cgroup.ROOT.glob(f"{name}*"))
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and psutil.pid_exists(worker):
        time.sleep(0.05)
    assert not psutil.pid_exists(worker)
    while time.monotonic() < deadline and list(cgroup.ROOT.glob(f"*/{name}*")):
        time.sleep(0.05)
    assert not list(cgroup.ROOT.glob(f"*/{name}*")) + list(cgroup.ROOT.glob(f"{name}*"))


@needs_quota
@pytest.mark.live
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_a_short_trace_on_real_kernels_under_a_quota(tmp_path):
    done = cli(
        "run", ROOT / "experiments" / "real_kernels" / "run.toml", "--mode", "hardware",
        "--device", "cpu", "--set", "duration_s=10", "--set", "drain_s=5",
        "--set", "cluster.row_budget_w=3", "--out", tmp_path, "--json", "--no-report",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["requests"]["completed"] > 0
    assert summary["ttft_s"]["p50"] > 0.005
    assert summary["itl_s"]["p50"] > 0.0005
    [folder] = [path.parent for path in tmp_path.glob("*/manifest.json")]
    recording = Recording.open(folder)
    gpus = recording.columns("gpus", "t_s", "power_avg_w", "power_limit_enforced_w", "throttle")
    assert gpus["power_avg_w"].max() > 1.0
    # A policy asked for less than a third of the core, the kernel held the worker to it, and the
    # recording has both.
    capped = gpus["power_limit_enforced_w"] <= 3.0
    assert capped.any()
    assert (gpus["throttle"][capped] & 0x4).any(), "the worker wanted more"
    settled = capped & (gpus["t_s"] > gpus["t_s"][capped][0] + 1.5)
    assert gpus["power_avg_w"][settled].max() <= 3.3
    assert recording.table("commands").num_rows > 0


def test_no_gpu_and_no_permission_is_one_clear_line(tmp_path):
    if importlib.util.find_spec("torch") is not None and os.path.exists("/dev/nvidiactl"):
        pytest.skip("there is a GPU here")
    done = cli(
        "node", "--coordinator", "tcp://127.0.0.1:5999", "--name", "row0/rack0/node000",
        "--state-dir", tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert "NVML" in done.stderr
    assert "Traceback" not in done.stderr


def test_ballast_is_held_or_refused_by_name():
    pytest.importorskip("torch", reason="torch is an extra")
    held = hold_ballast("cpu", 24 << 20)
    assert held.numel() == 24 << 20
    with pytest.raises(SystemExit, match="ballast_bytes = 10000"):
        hold_ballast("cpu", 10**15)


def test_ballast_leaves_less_for_kv_blocks():
    cost = IterationCost(load_model("llama-3.1-8b"), load_gpu("h100-sxm"), tp=1)
    without, beside = cost.kv_blocks(0.9, 16), cost.kv_blocks(0.9, 16, ballast_bytes=20 << 30)
    per_block_bytes = 2 * 2 * 8 * 128 * 32 * 16  # K and V, bf16, 8 KV heads of 128, 32 layers
    assert (without - beside) * per_block_bytes == pytest.approx(0.9 * (20 << 30), rel=0.01)
