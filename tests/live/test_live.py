"""Real processes over ZeroMQ on 127.0.0.1: emulated runs, and what happens when parts die."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from emulators.state import GpuState
from testbed.analysis.summary import summarise
from testbed.emulate import client_environment
from testbed.recorder.reader import Recording
from tests.conftest import ROOT, cli

pytestmark = pytest.mark.live


def start(spec: Path, out: Path, *overrides: str) -> subprocess.Popen[bytes]:
    sets = [word for override in overrides for word in ("--set", override)]
    return subprocess.Popen(
        [sys.executable, "-m", "testbed.cli", "run", str(spec), "--mode", "emulated",
         "--out", str(out), "--no-report", *sets],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip


def wait_for(condition, timeout_s=40.0, what="it"):
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"{what} did not happen within {timeout_s} s")


def run_folder(out: Path) -> Path | None:
    folders = list(out.glob("*/manifest.json"))
    return folders[0].parent if folders else None


def states(folder: Path) -> list[GpuState]:
    return [GpuState.attach(path, mode="r") for path in sorted(folder.glob("nodes/*/gpus.state"))]


def nodes_of(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "node" in words and any(str(folder) in word for word in words):
            found.append(process)
    return found


def end_nodes(folder: Path) -> None:
    for process in nodes_of(folder):
        process.terminate()
    psutil.wait_procs(nodes_of(folder), timeout=10)


def limits_w(folder: Path) -> np.ndarray:
    return np.array([state.control["power_limit_mw"] / 1000 for state in states(folder)])


def test_emulated_and_virtual_runs_agree(small_spec, tmp_path):
    summaries = {}
    folders = {}
    for mode in ("virtual", "emulated"):
        done = cli(
            "run", small_spec, "--mode", mode, "--out", tmp_path / mode, "--json", "--no-report"
        )
        assert done.returncode == 0, done.stderr
        summaries[mode] = json.loads(done.stdout)
        folders[mode] = run_folder(tmp_path / mode)
    virtual, emulated = summaries["virtual"], summaries["emulated"]
    assert emulated["valid"], emulated
    assert emulated["requests"]["completed"] == virtual["requests"]["completed"] > 100
    assert emulated["energy_j"] == pytest.approx(virtual["energy_j"], rel=0.05)
    for metric in ("ttft_s", "itl_s"):
        assert emulated[metric]["p50"] == pytest.approx(virtual[metric]["p50"], rel=0.10)
    said = {}
    for mode, folder in folders.items():
        table = Recording.open(folder).table("commands")
        said[mode] = [
            tuple(table[name][i].as_py() for name in ("policy", "kind", "target", "value"))
            for i in range(len(table))
        ]
    assert said["virtual"]
    assert said["emulated"] == said["virtual"]
    replayed = cli("replay", folders["emulated"], "--json")
    assert replayed.returncode == 0
    assert json.loads(replayed.stdout)["different"] == 0


def test_a_relay_per_row_changes_no_decision(small_spec, tmp_path):
    """Two rows, two relays, two nodes behind each; nor do nodes that share a process."""
    said = {}
    text = small_spec.read_text().replace("nodes_per_row = 1", "nodes_per_row = 2")
    small_spec.write_text(text.replace("row_budget_w = 1700", "row_budget_w = 3400"))
    for relays, per_process in (("none", 1), ("row", 1), ("none", 2), ("row", 2)):
        out = tmp_path / f"{relays}-{per_process}"
        done = cli("run", small_spec, "--mode", "emulated", "--out", out, "--json", "--no-report",
                   "--set", f"transport.relays={relays}", "--set", "duration_s=8",
                   "--set", f"cluster.nodes_per_process={per_process}")  # fmt: skip
        assert done.returncode == 0, done.stderr
        recording = Recording.open(run_folder(out))
        summary, wire = json.loads(done.stdout), recording.manifest["meta"]["wire"]
        assert summary["requests"]["completed"] == summary["requests"]["arrived"] > 50
        assert (wire["gaps_total"], wire["stale_total"], wire["bad_total"]) == (0, 0, 0)
        assert wire["round_trips"] > 4
        sources = set(recording.table("events")["source"].to_pylist())
        assert ({"row0/relay", "row1/relay"} <= sources) == (relays == "row")
        commands = recording.table("commands")
        said[relays, per_process] = [
            tuple(commands[name][i].as_py() for name in ("policy", "kind", "target", "value"))
            for i in range(len(commands))
        ]
        assert len(states(run_folder(out))) == 4, "each node keeps its GPUs' state to itself"
    first, *others = said.values()
    assert first
    assert all(other == first for other in others)


def test_a_relay_killed_under_way_is_started_again_and_no_request_is_lost(small_spec, tmp_path):
    process = start(small_spec, tmp_path, "duration_s=10", "transport.relays=row")
    folder = None
    try:
        folder = wait_for(lambda: run_folder(tmp_path), what="the run folder")
        wait_for(lambda: (folder / "commands.arrows").exists(), what="a first cap")
        [victim] = [
            process
            for process in psutil.process_iter(["cmdline"])
            if {"relay", "row0/relay"} <= set(process.info["cmdline"] or [])
            and psutil.Process(process.pid).ppid() != 1
            and str(folder) in str(process.open_files())
        ]
        victim.send_signal(signal.SIGKILL)
        assert process.wait(timeout=60) == 0, process.stdout.read().decode()
    finally:
        process.kill()
        if folder:
            end_nodes(folder)
    recording = Recording.open(folder)
    events = recording.table("events").to_pylist()
    assert [e["kind"] for e in events if e["source"] == "row0/relay"].count("died") == 1
    assert recording.summary["requests"]["lost"] == 0
    gpus = recording.columns("gpus", "t_s", "gpu")
    last_s = [gpus["t_s"][gpus["gpu"] == gpu].max() for gpu in range(8)]
    assert min(last_s) > gpus["t_s"].max() - 1.0, "both rows report to the end"


@pytest.mark.parametrize("mode", ["virtual", "emulated"])
def test_a_lost_gpu_is_survived(small_spec, tmp_path, mode):
    spec = tmp_path / "fault.toml"
    spec.write_text(small_spec.read_text() + "\n[[fault]]\nat_s = 6.0\nnode = 1\ngpu = 0\n")
    done = cli(
        "run", spec, "--mode", mode, "--out", tmp_path / "runs", "--json", "--no-report",
        "--set", "workload.rate_rps=80",  # so that the GPU has work when it is lost
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    recording = Recording.open(run_folder(tmp_path / "runs"))
    events = recording.table("events").to_pylist()
    [lost] = [event for event in events if event["kind"] == "gpu_lost"]
    assert lost["source"] == "row1/rack0/node001"
    assert "GPU-" in lost["text"], "said by UUID, since indices move when a GPU is gone"
    assert 6.0 <= lost["t_s"] < 6.5
    # Its requests went to the pool's other instances, and new ones never came to it.
    assert summary["requests"]["lost"] == 0
    assert summary["requests"]["completed"] > 100
    requests = recording.columns("requests", "routed_s", "instance", "attempts", "finished_s")
    mine = requests["instance"] == 4  # the second node's first, on its GPU 0
    assert mine.any()
    assert (requests["finished_s"][mine] <= 6.0).all()
    assert (requests["attempts"] == 2).any()


def test_kill_the_coordinator_and_nodes_go_to_safe_caps(small_spec, tmp_path):
    process = start(small_spec, tmp_path, "duration_s=60", "control.lease_s=2.0")
    folder = None
    try:
        folder = wait_for(lambda: run_folder(tmp_path), what="the run folder")
        wait_for(lambda: (folder / "commands.arrows").exists(), what="a first cap")
        time.sleep(2.0)
        process.kill()
        killed = time.monotonic()
        process.wait()
        safe_w = 0.95 * 1700 // 4
        wait_for(lambda: (limits_w(folder) <= safe_w).all(), timeout_s=2.0 + 1.5, what="safe caps")
        assert time.monotonic() - killed < 3.5
        assert limits_w(folder).sum(axis=1).max() <= 1700
        time.sleep(1.5)
        for state in states(folder):
            assert state.measured["power_average_mw"].sum() / 1000 <= 1700
        # What was recorded until a second before the kill can be read.
        recording = Recording.open(folder)
        assert recording.state == "killed"
        last_s = recording.table("gpus")["t_s"].to_numpy()[-1]
        last_wall = time.time() - (time.monotonic() - killed)
        written = max(path.stat().st_mtime for path in folder.glob("*.arrows"))
        assert last_wall - written < 1.5
        assert last_s > 2.0
        assert summarise(folder)["requests"]["completed"] > 0
        assert len(nodes_of(folder)) == 2, "nodes go on without the coordinator"
    finally:
        process.kill()
        if folder:
            end_nodes(folder)
    # Told to leave, they put back what they found.
    assert (limits_w(folder) == 700.0).all()
    assert not list(folder.glob("nodes/*/journal.json"))


def test_kill_a_node_and_its_requests_go_elsewhere(small_spec, tmp_path):
    spec = small_spec.read_text().replace("nodes_per_row = 1", "nodes_per_row = 2")
    small_spec.write_text(spec.replace("row_budget_w = 1700", "row_budget_w = 3400"))
    process = start(
        small_spec, tmp_path, "duration_s=16", "control.node_timeout_s=2.0", "cluster.rows=1"
    )
    folder = None
    try:
        folder = wait_for(lambda: run_folder(tmp_path), what="the run folder")
        wait_for(lambda: (folder / "commands.arrows").exists(), what="a first cap")
        time.sleep(1.0)
        victim = next(p for p in nodes_of(folder) if "row0/rack0/node000" in p.cmdline())
        before = limits_w(folder)[0]
        assert (before < 700).any()
        victim.send_signal(signal.SIGKILL)
        assert process.wait(timeout=60) == 0, process.stdout.read().decode()
    finally:
        process.kill()
        if folder:
            end_nodes(folder)
    recording = Recording.open(folder)
    events = recording.table("events")
    kinds = events["kind"].to_pylist()
    assert "died" in kinds
    assert "lost" in kinds
    assert kinds.count("joined") == 3, "two at the start, and one in a new life"
    log = (folder / "nodes" / "row0.rack0.node000" / "node.log").read_text()
    assert "putting its limits back as it found them" in log
    requests = recording.summary["requests"]
    assert requests["arrived"] == sum(
        requests[key] for key in ("completed", "rejected", "lost", "in_flight")
    )
    attempts = recording.table("requests")["attempts"].to_numpy()
    assert (attempts > 1).any(), "some were routed again"
    # While it was silent, the node counted at its enforced limits.
    rows = recording.table("rows")
    t_s, draw_w = rows["t_s"].to_numpy(), rows["draw_w"].to_numpy()
    assert np.isfinite(draw_w[t_s > 1.0]).all()
    assert (limits_w(folder) == 700.0).all()


FOREIGN = """
import pynvml as n, time
n.nvmlInit()
h = n.nvmlDeviceGetHandleByIndex(1)
n.nvmlDeviceSetPowerManagementLimit(h, 250000)
[process] = n.nvmlDeviceGetComputeRunningProcesses(h)
print(n.nvmlDeviceGetUUID(h), process.pid, process.usedGpuMemory)
for _ in range(30):
    # Power twice: between equal readings there was no tick.
    before, mhz = n.nvmlDeviceGetPowerUsage(h), n.nvmlDeviceGetClockInfo(h, n.NVML_CLOCK_SM)
    if n.nvmlDeviceGetPowerUsage(h) == before:
        print(before, mhz)
    time.sleep(0.05)
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc to build the NVML library")
def test_another_program_sees_the_gpus_of_a_run_and_its_lower_limit_is_respected(
    small_spec, tmp_path
):
    process = start(small_spec, tmp_path, "duration_s=14")
    folder = None
    try:
        folder = wait_for(lambda: run_folder(tmp_path), what="the run folder")
        wait_for(lambda: (folder / "commands.arrows").exists(), what="a first cap")
        time.sleep(2.0)
        state = sorted(folder.glob("nodes/*/gpus.state"))[0]
        seen = subprocess.run(
            [sys.executable, "-c", FOREIGN], env=client_environment(state),
            capture_output=True, text=True, check=True,
        ).stdout.splitlines()  # fmt: skip
        node = next(p.pid for p in nodes_of(folder) if "row0/rack0/node000" in p.cmdline())
        assert process.wait(timeout=60) == 0, process.stdout.read().decode()
    finally:
        process.kill()
        if folder:
            end_nodes(folder)
    recording = Recording.open(folder)
    gpus, info = recording.table("gpus"), recording.table("gpu_info")
    mine = gpus["gpu"].to_numpy() == 1
    uuid, pid, used_bytes = seen[0].split()
    assert uuid == info["uuid"].to_pylist()[1]
    assert int(pid) == node
    [seen_bytes] = set(gpus["fb_used_bytes"].to_pylist())
    assert 0 < seen_bytes - int(used_bytes) < 1 << 30, "all but what the driver reserves"
    recorded = set(
        zip(
            np.rint(gpus["power_avg_w"].to_numpy()[mine] * 1000).astype(int).tolist(),
            gpus["sm_clock_mhz"].to_numpy()[mine].astype(int).tolist(),
            strict=True,
        )
    )
    readings = {tuple(map(int, line.split())) for line in seen[1:]}
    assert len(readings) > 5
    assert readings <= recorded, "the recording has the same watts at the same clocks"
    events = recording.table("events").to_pylist()
    [drift] = [event for event in events if event["kind"] == "drift"]
    assert drift["source"] == "row0/rack0/node000"
    enforced_w = gpus["power_limit_enforced_w"].to_numpy()[mine]
    assert (enforced_w[-20:] == 250.0).all(), "the lower foreign limit is respected"
    assert (gpus["power_avg_w"].to_numpy()[mine][-10:] < 256).all()


def test_sigterm_ends_a_run_in_order(small_spec, tmp_path):
    process = start(small_spec, tmp_path, "duration_s=60")
    folder = wait_for(lambda: run_folder(tmp_path), what="the run folder")
    wait_for(lambda: (folder / "gpus.arrows").exists(), what="telemetry")
    process.terminate()
    assert process.wait(timeout=20) != 0
    assert not nodes_of(folder)
    assert Recording.open(folder).manifest["exit_status"] == "interrupted"
    assert (folder / "summary.json").exists()


def test_a_node_that_cannot_join_says_why(tmp_path):
    done = cli(
        "node", "--coordinator", "tcp://127.0.0.1:0", "--name", "row0/rack0/node000",
        "--emulate", "2xh100", "--state-dir", tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert "needs the coordinator's port" in done.stderr


def test_a_node_that_nobody_answers_leaves_in_the_end(tmp_path):
    done = cli(
        "node", "--coordinator", "tcp://127.0.0.1:9", "--name", "row0/rack0/node000",
        "--emulate", "2xh100", "--state-dir", tmp_path, "--orphan-exit-s", "1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "left: no coordinator" in done.stderr
    assert not (tmp_path / "journal.json").exists()


def test_port_in_use(small_spec, tmp_path):
    import zmq

    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        done = cli(
            "run", small_spec, "--mode", "emulated", "--bind", f"tcp://127.0.0.1:{port}",
            "--out", tmp_path,
        )  # fmt: skip
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1 ports {port}" in done.stderr
    assert "Traceback" not in done.stderr


def test_nodes_with_keys_join_and_others_do_not(small_spec, tmp_path):
    keys = tmp_path / "keys"
    for folder, name in ((keys, "coordinator"), (keys / "nodes", "node"), (keys / "x", "stranger")):
        assert cli("keys", folder, name).returncode == 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    endpoint = f"tcp://127.0.0.1:{port}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.Popen(
        [sys.executable, "-m", "testbed.cli", "run", small_spec, "--mode", "emulated", "--bind",
         endpoint, "--no-spawn", "--curve-secret", keys / "coordinator.key_secret",
         "--curve-clients", keys / "nodes", "--set", "duration_s=4", "--set", "cluster.rows=1",
         "--out", tmp_path / "runs", "--no-report", "--json"],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip

    def node(secret, place):
        return subprocess.Popen(
            [sys.executable, "-m", "testbed.cli", "node", "--coordinator", endpoint, "--name",
             "row0/rack0/node000", "--emulate", "4xh100", "--state-dir", tmp_path / place,
             "--curve-secret", secret, "--curve-server", keys / "coordinator.key"],
            cwd=ROOT, env=environment, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    stranger = node(keys / "x" / "stranger.key_secret", "a")
    time.sleep(4.0)
    assert run.poll() is None, run.communicate()
    friend = node(keys / "nodes" / "node.key_secret", "b")
    try:
        out, err = run.communicate(timeout=60)
        assert run.returncode == 0, err
        assert json.loads(out)["requests"]["completed"] > 0
        assert stranger.poll() is None, "never answered, it still asks"
    finally:
        for process in (run, stranger, friend):
            process.terminate()
            process.wait()
