"""One suite over every kind of control group: the real tree here, and a folder shaped like v2."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from daemons.devices import cgroup
from testbed.core.errors import DeviceError

MIB = 1 << 20


def v2_folder(root: Path) -> Path:
    """A v2 tree as files: what is written stays, and the kernel's own files are there to read."""
    root.mkdir()
    (root / "cgroup.controllers").write_text("cpu io memory pids\n")
    (root / "cgroup.procs").write_text("")
    (root / "cgroup.subtree_control").write_text("")
    (root / "memory.pressure").write_text("some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n")
    return root


class FolderCgroups(cgroup.V2Cgroups):
    """Groups whose files the kernel would make."""

    def create(self, name: str) -> cgroup.Group:
        group = super().create(name)
        for file, text in {
            "cgroup.procs": "",
            "memory.high": "max\n",
            "memory.current": f"{30 * MIB}\n",
            "memory.swap.current": f"{4 * MIB}\n",
            "memory.stat": "anon 1\npgmajfault 17\nworkingset_refault_anon 3\n",
            "memory.events": "low 0\noom_kill 0\n",
            "memory.pressure": "some avg10=12.50 avg60=1.00 avg300=0.00 total=2500000\n"
            "full avg10=0.00 avg60=0.00 avg300=0.00 total=0\n",
            "io.pressure": "some avg10=1.00 avg60=0.00 avg300=0.00 total=10\n",
            "cpu.max": "max 100000\n",
            "cpu.stat": "usage_usec 1500000\nthrottled_usec 250000\n",
            "cgroup.freeze": "0\n",
            "cgroup.events": "populated 0\nfrozen 0\n",
        }.items():
            (group.folders[0] / file).write_text(text)
        return group


@pytest.fixture(params=["real", "v2 folder"])
def tree(request, tmp_path):
    """Groups, and whether a kernel stands behind them."""
    if request.param == "real":
        found = cgroup.probe()
        if not (found.memory and found.writable):
            pytest.skip(f"no writable memory cgroups: {found.reasons}")
        opened = cgroup.open_cgroups(parent=f"testbed-conformance-{os.getpid()}")
        yield opened, True
        opened.close()
    else:
        yield FolderCgroups(v2_folder(tmp_path / "cgroup"), "ours"), False


@pytest.fixture
def group(tree):
    opened, kernel = tree
    made = opened.create("one")
    yield made, kernel
    if kernel:
        made.kill()
        made.remove()
        assert not any(folder.exists() for folder in made.folders)


@pytest.fixture
def sleeper():
    code = "b = bytearray(40 << 20)\nfor i in range(0, len(b), 4096): b[i] = 1\n"
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys\nsys.stdin.readline()\n" + code
         + "print('up', flush=True)\nsys.stdin.readline()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    yield process
    process.kill()
    process.wait()


def test_a_limit_reads_back(group):
    made, _ = group
    made.set_memory_limit(64 * MIB)
    assert made.read().limit_bytes == 64 * MIB
    made.set_memory_limit(1 << 62)
    assert made.read().limit_bytes >= 1 << 62


def test_readings_are_of_the_right_kind(group):
    made, _ = group
    reading = made.read()
    for name in ("current_bytes", "swap_bytes", "major_faults_total", "refaults_total"):
        assert isinstance(getattr(reading, name), int)
        assert getattr(reading, name) >= 0
    assert 0 <= reading.pressure_some_frac <= 1
    assert reading.cpu_usage_s >= 0
    assert not reading.frozen
    assert made.oom_kills_total() == 0
    assert made.out_of_memory() is False


def test_a_process_is_attached_measured_and_frozen(group, sleeper):
    made, kernel = group
    if not kernel:
        pytest.skip("needs a kernel")
    made.attach(sleeper.pid)
    assert made.pids() == [sleeper.pid]
    sleeper.stdin.write(b"go\n")
    sleeper.stdin.flush()
    sleeper.stdout.readline()
    assert made.read().current_bytes > 35 * MIB
    assert made.read().cpu_usage_s > 0
    made.freeze()
    assert made.read().frozen
    made.freeze(False)
    assert not made.read().frozen


def test_a_cpu_quota_throttles(group):
    made, kernel = group
    made.set_cpu_quota(0.2)
    if kernel:
        burner = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            made.attach(burner.pid)
            begun, used = time.monotonic(), made.read().cpu_usage_s
            time.sleep(1.0)
            reading = made.read()
            assert (reading.cpu_usage_s - used) / (time.monotonic() - begun) < 0.35
            assert reading.cpu_throttled_s > 0
        finally:
            burner.kill()
            burner.wait()
    else:
        assert (made.folders[0] / "cpu.max").read_text() == "20000 100000"
    made.set_cpu_quota(None)


def test_reclaim_leaves_the_limit_as_it_was(group):
    made, _ = group
    made.set_memory_limit(64 * MIB)
    made.reclaim(4 * MIB)
    assert made.read().limit_bytes == 64 * MIB


def test_what_is_protected_is_asked_of_the_parent_too(tree):
    opened, kernel = tree
    groups = [opened.create(name) for name in ("one", "two")]
    try:
        for made, size in zip(groups, (8 * MIB, 16 * MIB), strict=True):
            if not kernel:
                (made.folders[0] / "memory.min").write_text("0\n")
                (made.folders[0].parent / "memory.min").touch()
            made.protect(size)
            made.protect(size)
        if opened.version == "v2":
            assert int((groups[1].folders[0] / "memory.min").read_text()) == 16 * MIB
            assert int((groups[0].folders[0].parent / "memory.min").read_text()) == 24 * MIB
    finally:
        if kernel:
            for made in groups:
                made.remove()


def test_v2_files_are_read_in_their_units(tmp_path):
    made = FolderCgroups(v2_folder(tmp_path / "cgroup"), "ours").create("one")
    reading = made.read()
    assert reading.current_bytes == 30 * MIB
    assert reading.swap_bytes == 4 * MIB
    assert reading.major_faults_total == 17
    assert reading.refaults_total == 3
    assert reading.pressure_some_frac == 0.125
    assert reading.pressure_some_s == 2.5
    assert reading.cpu_usage_s == 1.5
    assert reading.cpu_throttled_s == 0.25


def test_the_probe_says_what_is_missing(tmp_path):
    assert cgroup.probe(tmp_path / "nowhere").version == "none"
    root = v2_folder(tmp_path / "v2")
    assert cgroup.probe(root).version == "v2"
    assert cgroup.probe(root).memory
    (root / "cgroup.controllers").write_text("cpu\n")
    assert "memory" in cgroup.probe(root).reasons
    v1 = tmp_path / "v1"
    (v1 / "memory").mkdir(parents=True)
    (v1 / "memory" / "memory.limit_in_bytes").write_text("1")
    found = cgroup.probe(v1)
    assert found.version == "v1"
    assert found.memory
    assert not found.pressure
    assert "pressure" in found.reasons
    with pytest.raises(DeviceError, match="no memory cgroups"):
        cgroup.open_cgroups(tmp_path / "nowhere")
