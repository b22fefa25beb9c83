"""On a machine with a GPU and its driver: the daemon's readings, kernels and ballast on `cuda`."""

from __future__ import annotations

import functools
import json
import subprocess
import sys

import pytest

from daemons.devices.nvml import NvmlGpus
from daemons.executors import torch_worker
from emulators.models import load_model
from testbed.core.errors import DeviceError
from testbed.recorder.reader import Recording
from testbed.shells.executed import shape_of
from tests.conftest import ROOT, cli


@functools.cache
def why_not() -> str:
    """Why there is no GPU to test on; empty if there is one."""
    import pynvml

    try:
        NvmlGpus(pynvml).close()
        import torch
    except DeviceError as error:
        return f"no GPU: {error}"
    except ImportError:
        return "torch is not installed"
    return "" if torch.cuda.is_available() else "torch sees no CUDA device"


@pytest.fixture
def gpus():
    """What NVML shows here."""
    import pynvml

    if why_not():
        pytest.skip(why_not())
    opened = NvmlGpus(pynvml)
    yield opened
    opened.close()


def start_worker(gpus: NvmlGpus, ballast_bytes: int) -> subprocess.Popen[bytes]:
    arguments = {
        "shape": shape_of(load_model("toy-8m")),
        "device": "cuda",
        "threads": 1,
        "ballast_bytes": ballast_bytes,
    }
    return subprocess.Popen(
        [sys.executable, torch_worker.__file__, json.dumps(arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.hardware
def test_ballast_on_cuda_is_seen_by_nvml_and_gone_afterwards(gpus):
    size_bytes = 2 << 30
    before = sum(gpus.read().fb_used_bytes)
    worker = start_worker(gpus, size_bytes)
    try:
        assert worker.stdout.readline().strip() == b"ready", worker.stderr.read()
        assert sum(gpus.read().fb_used_bytes) - before >= size_bytes
        batch = {"num_seqs": 4, "context_tokens": 4096, "chunks": [[64, 0]], "encode_tiles": 0}
        worker.stdin.write(json.dumps(batch).encode() + b"\n")
        worker.stdin.flush()
        assert 0 < float(worker.stdout.readline()) < 10, "kernels run beside it"
    finally:
        worker.kill()
        worker.communicate()
    assert sum(gpus.read().fb_used_bytes) - before < size_bytes


@pytest.mark.hardware
def test_ballast_that_does_not_fit_on_cuda_is_refused_with_what_is_free(gpus):
    worker = start_worker(gpus, 1 << 43)
    _, said = worker.communicate(timeout=120)
    assert worker.returncode != 0
    assert b"engine.ballast_bytes = 8796093022208 does not fit on cuda" in said
    assert b"MiB are free" in said


@pytest.mark.hardware
@pytest.mark.live
def test_a_short_trace_on_cuda_is_a_dry_run_for_limits(gpus, tmp_path):
    limits_w = gpus.power_limits_w()
    done = cli(
        "run", ROOT / "experiments" / "real_kernels" / "run.toml", "--mode", "hardware",
        "--device", "cuda", "--set", "duration_s=8", "--set", "drain_s=5",
        "--set", "cluster.row_budget_w=1000000", "--set", "pool.0.engine.ballast_bytes=1073741824",
        "--out", tmp_path, "--json", "--no-report",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["requests"]["completed"] > 0
    [folder] = [path.parent for path in tmp_path.glob("*/manifest.json")]
    table = Recording.open(folder).table("gpus")
    assert min(table["power_avg_w"].to_pylist()) > 5.0, "watts that the driver reports"
    assert max(table["fb_used_bytes"].to_pylist()) > 1 << 30
    assert gpus.power_limits_w() == limits_w
