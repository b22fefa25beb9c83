"""The doctor tells the truth: here, as somebody else, and where things are missing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from daemons.devices import cgroup
from daemons.devices.zram import swap_bytes
from emulators.gpu import GpuBank
from emulators.nvml import EmulatedNvml
from emulators.profiles import load_gpu
from emulators.state import GpuState
from testbed.doctor import Places, examine
from tests.conftest import ROOT, cli


def found(*arguments, **options):
    return {finding.what: finding for finding in examine(*arguments, **options)}


def test_here():
    here = found()
    assert here["swap"].works == (swap_bytes()[0] > 0)
    assert here["limit host memory"].works == cgroup.probe().memory
    assert here["privileges"].works == (os.geteuid() == 0)
    assert here["pressure (PSI)"].works == Path("/proc/pressure/memory").exists()
    for finding in here.values():
        assert finding.works or finding.todo, f"{finding.what}: does not say what to do"


def test_where_everything_is_taken_away(tmp_path):
    nothing = tmp_path / "nothing"
    bare = found(
        Places(nothing, nothing, nothing, nothing, nothing, nothing, uid=1000),
    )
    for what in (
        "control groups",
        "limit host memory",
        "pressure (PSI)",
        "swap",
        "zram",
        "CPU power (RAPL)",
        "privileges",
        "clock",
    ):
        assert not bare[what].works, what
        assert bare[what].todo


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare"
)
@pytest.mark.parametrize("taken", ["cgroups", "pressure", "swap"])
def test_the_command_where_one_thing_is_really_taken_away(tmp_path, taken):
    """In a mount namespace of its own; what was not taken is as before."""
    (tmp_path / "swaps").write_text("Filename Type Size Used Priority\n")
    place, hide, lost = {
        "cgroups": ("/sys/fs/cgroup", "mount -t tmpfs none /sys/fs/cgroup",
                    {"control groups", "limit host memory", "limit CPU time", "freeze tenants",
                     "pressure per group"}),
        "pressure": ("/proc/pressure", "mount -t tmpfs none /proc/pressure", {"pressure (PSI)"}),
        "swap": ("/proc/swaps", f"mount --bind {tmp_path}/swaps /proc/swaps", {"swap"}),
    }[taken]  # fmt: skip
    if not Path(place).exists():
        pytest.skip(f"no {place} here that could be taken away")
    command = f"{hide} && exec {sys.executable} -m testbed.cli doctor --json"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", command],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode and ("unshare failed" in done.stderr or "mount:" in done.stderr):
        pytest.skip(f"cannot be taken away here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    bare = {entry["what"]: entry for entry in json.loads(done.stdout)}
    for what, finding in found().items():
        if what in lost:
            assert not bare[what]["works"], what
            assert bare[what]["todo"], what
        elif what not in ("clock", "compiled engine", "swap"):  # other runs make swap and remove it
            assert bare[what]["works"] == finding.works, what


def test_gpus_that_are_there():
    state = GpuState.create(2)
    GpuBank(load_gpu("h100-sxm"), state)
    as_root = found(Places(uid=0), nvml=lambda: EmulatedNvml(state))
    assert as_root["GPUs (NVML)"].detail == "2 x NVIDIA H100 80GB HBM3"
    assert as_root["power limits"].works
    assert as_root["power limits"].detail == "200 to 700 W"
    as_user = found(Places(uid=1000), nvml=lambda: EmulatedNvml(state))
    assert not as_user["power limits"].works
    assert "root" in as_user["power limits"].todo


def test_from_the_command_line():
    done = cli("doctor", "--json")
    assert done.returncode == 0, done.stderr
    tree = json.loads(done.stdout)
    assert {entry["what"] for entry in tree} == set(found())
    assert "control groups" in cli("doctor").stdout


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv"
)
def test_as_an_ordinary_user():
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups",
         sys.executable, "-m", "testbed.cli", "doctor", "--json"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": "/nonexistent"},
        cwd="/", capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0 and "Permission denied" in done.stderr:
        pytest.skip("another user cannot read this checkout")
    assert done.returncode == 0, done.stderr
    tree = {entry["what"]: entry for entry in json.loads(done.stdout)}
    assert not tree["privileges"]["works"]
    assert not tree["control groups"]["works"]
