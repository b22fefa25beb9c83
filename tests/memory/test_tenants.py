"""Host memory: real tenants in real control groups, their modelled twins, and the policy."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from daemons.devices import cgroup
from daemons.devices.zram import CONTROL, make_zram, remove_zram, swap_bytes
from daemons.node import preprocess_slowdown
from daemons.tenants import TenantHost, TenantPlan, load_memory_trace
from emulators.memory import ModelledTenants
from testbed.core.errors import DeviceError, TraceError
from testbed.core.view import empty_tenants, view_of
from testbed.policies.memory_pressure import MemoryPressure
from testbed.recorder.reader import Recording
from tests.conftest import ROOT, cli

MIB = 1 << 20


def plan(count=1, share=0.9, **kwargs) -> TenantPlan:
    trace = kwargs.pop("trace", np.full((1, 288), share))
    return TenantPlan(count, 96 * MIB, 40 * MIB, trace, kwargs.pop("speedup", 300.0))


def may_have_tenants() -> str:
    """Why this machine cannot have real tenants; empty if it can."""
    found = cgroup.probe()
    if not found.memory or not found.writable:
        return f"no writable memory cgroups: {found.reasons}"
    if not swap_bytes()[0] and not (os.geteuid() == 0 and CONTROL.exists()):
        return "no swap, and no zram to make some"
    return ""


real = pytest.mark.real_memory
needs_real = pytest.mark.skipif(bool(may_have_tenants()), reason=may_have_tenants())


def groups_named(name: str) -> list[Path]:
    return list(cgroup.ROOT.glob(f"*/{name}*")) + list(cgroup.ROOT.glob(f"{name}*"))


@pytest.fixture(scope="module", autouse=True)
def swap():
    """Swap of our own: that of other runs on this machine comes and goes."""
    if may_have_tenants() or os.geteuid() != 0 or not CONTROL.exists():
        yield
        return
    device = make_zram(256 * MIB)
    yield
    remove_zram(device)


@pytest.fixture
def host(tmp_path):
    name = f"testbed-test-{os.getpid()}"
    running = TenantHost(plan(), tmp_path, name=name, swap_mib=256)
    yield running
    running.close()
    assert not groups_named(name)
    for device in running._devices:
        assert device not in Path("/proc/swaps").read_text().split()


def watch(tenants, seconds, begin_s=0.0):
    """Readings over some seconds; the last one."""
    for step in range(int(seconds * 10)):
        reading = tenants.read(begin_s + step * 0.1)
        time.sleep(0.1)
    return reading


@real
@needs_real
def test_below_its_working_set_a_tenant_slows_and_recovers(host):
    calm = watch(host, 2.0)
    assert calm.current_bytes[0] > 70 * MIB
    host.set_limit(0, 68 * MIB)
    tight = watch(host, 2.5)
    assert tight.limit_bytes[0] == 68 * MIB
    assert tight.current_bytes[0] <= 69 * MIB
    assert tight.swap_bytes[0] > 4 * MIB
    assert tight.major_faults_total[0] > calm.major_faults_total[0] + 500
    assert tight.slowdown_frac[0] > calm.slowdown_frac[0] + 0.2
    assert tight.slowdown_frac[0] > 0.3
    pressed_s = host._tenants[0].group.read().pressure_some_s
    if cgroup.probe().pressure:
        assert pressed_s > 0
    host.set_limit(0, 96 * MIB)
    eased = watch(host, 4.0)
    assert eased.slowdown_frac[0] < tight.slowdown_frac[0] - 0.2
    assert host.oom_kills_total() == 0


@real
@needs_real
def test_a_limit_never_goes_below_the_guaranteed_part(host):
    watch(host, 0.5)
    host.set_limit(0, 1 * MIB)
    assert watch(host, 1.0).limit_bytes[0] == 40 * MIB


@real
@needs_real
def test_what_leaves_the_working_set_is_given_back(host):
    grown = watch(host, 1.5)
    assert grown.current_bytes[0] > 70 * MIB
    host.set_limit(0, 64 * MIB)
    assert watch(host, 1.0).swap_bytes[0] > 10 * MIB
    host.plan = plan(share=0.5)
    shrunk = watch(host, 1.0)
    assert shrunk.working_set_bytes[0] == 48 * MIB
    assert shrunk.current_bytes[0] + shrunk.swap_bytes[0] < 60 * MIB


@real
@needs_real
def test_the_guaranteed_part_is_locked_in_memory(host):
    watch(host, 1.5)
    host.set_limit(0, 40 * MIB)
    tight = watch(host, 2.0)
    assert tight.swap_bytes[0] > 20 * MIB, "the rest went to swap"
    tenant = host._tenants[0]
    status = Path(f"/proc/{tenant.process.pid}/status").read_text()
    locked_kib = int(status.split("VmLck:")[1].split()[0])
    assert locked_kib << 10 == tenant.locked_bytes == 40 * MIB
    # What is locked is resident too, whatever the limit did to the rest.
    assert int(status.split("VmRSS:")[1].split()[0]) << 10 >= 40 * MIB


@real
@needs_real
def test_memory_is_given_back_when_swap_vanishes(host, monkeypatch):
    said = []
    host._log = said.append
    watch(host, 1.0)
    host.set_limit(0, 68 * MIB)
    assert watch(host, 1.0, 1.0).limit_bytes[0] == 68 * MIB
    monkeypatch.setattr("daemons.tenants.swap_bytes", lambda: (0, 0))
    assert watch(host, 2.0, 2.0).limit_bytes[0] == 96 * MIB
    host.set_limit(0, 68 * MIB)
    assert watch(host, 0.5, 4.0).limit_bytes[0] == 96 * MIB, "and nothing is taken any more"
    monkeypatch.undo()
    watch(host, 1.5, 4.5)
    host.set_limit(0, 68 * MIB)
    assert watch(host, 1.0, 6.0).limit_bytes[0] == 68 * MIB
    assert [line.split(":")[0].split(" MiB")[0] for line in said] == [
        "swap is gone", "made 256", "swap is back",
    ]  # fmt: skip


@real
@needs_real
def test_the_policy_trims_what_is_not_missed_and_kills_nothing(tmp_path):
    trace = np.concatenate([np.full(144, 0.35), np.full(144, 0.85)])[None, :]
    name = f"testbed-test-{os.getpid()}"
    host = TenantHost(plan(trace=trace, speedup=300 * 24), tmp_path, name=name, swap_mib=256)
    policy = MemoryPressure(period_s=0.5, settle_s=3.0)
    view = view_of([[0.0]])
    view.tenants = empty_tenants(("tenant0",))
    view.tenants.guaranteed_bytes[:], view.tenants.memory_bytes[:] = 40 * MIB, 96 * MIB
    limits = []
    try:
        for step in range(110):
            now_s = step * 0.1
            reading = host.read(now_s)
            for column in reading.names:
                getattr(view.tenants, column)[:] = getattr(reading, column)
            view.now_s = view.tenants.t_s[0] = now_s
            if step % 5 == 0:
                for command in policy.step(view):
                    host.set_limit(0, int(command.memory_limit_bytes[0]))
            limits.append(reading.limit_bytes[0])
            time.sleep(0.1)
        kills = host.oom_kills_total()
    finally:
        host.close()
    assert kills == 0
    assert min(limits) >= 40 * MIB
    assert min(limits[:60]) < 60 * MIB, "what nobody misses is taken back"
    assert max(limits[70:]) > 70 * MIB, "and given back when it is missed"


@real
@needs_real
def test_nothing_is_left_behind_after_kill_9(tmp_path):
    name = f"testbed-test-kill-{os.getpid()}"
    code = (
        "import sys, time, numpy as np\nfrom pathlib import Path\n"
        "from daemons import tenants\nfrom daemons.tenants import TenantHost, TenantPlan\n"
        # It sees no swap at first, and so makes some.
        "seen = iter([(0, 0)])\nreal = tenants.swap_bytes\n"
        "tenants.swap_bytes = lambda: next(seen, None) or real()\n"
        "plan = TenantPlan(2, 64 << 20, 32 << 20, np.full((1, 288), 0.9), 300.0)\n"
        f"host = TenantHost(plan, Path(sys.argv[1]), name={name!r}, swap_mib=128)\n"
        "host.set_limit(0, 32 << 20)\nprint('up', *host._devices, flush=True)\n"
        "for k in range(1000):\n    host.read(k * 0.1); time.sleep(0.1)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    )
    up, device = process.stdout.readline().decode().split()
    assert up == "up"
    assert device in Path("/proc/swaps").read_text().split()
    time.sleep(1.0)
    assert groups_named(name)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and groups_named(name):
        time.sleep(0.1)
    assert not groups_named(name)
    while time.monotonic() < deadline and device in Path("/proc/swaps").read_text().split():
        time.sleep(0.1)
    assert device not in Path("/proc/swaps").read_text().split()
    for child in psutil.process_iter(["cmdline"]):
        with contextlib.suppress(psutil.Error):
            assert str(tmp_path) not in " ".join(child.info["cmdline"] or [])


@real
@needs_real
@pytest.mark.live
def test_a_run_records_the_pressure_and_its_report_shows_it(tmp_path):
    """Tenants that outgrow what was left to them from 3 s to 4 s, and shrink after 8 s."""
    trace = tmp_path / "memory.csv"
    shares = [0.3] * 4 + [0.9] * 5 + [0.3] * 279
    rows = (f"0,{slot},{share}\n" for slot, share in enumerate(shares))
    trace.write_text("day,slot,memory_frac\n" + "".join(rows))
    spec = tmp_path / "run.toml"
    spec.write_text(
        "name = 'pressed'\nduration_s = 12\ndrain_s = 1\n"
        "[cluster]\ngpus_per_node = 2\nrow_budget_w = 0\n[[pool]]\ngpus_per_node = 2\n"
        "[workload]\nsource = 'poisson'\nrate_rps = 2.0\noutput_tokens = 20\n"
        "[tenants]\nper_node = 2\nmemory_mib = 96\nguaranteed_frac = 0.4\nswap_mib = 256\n"
        f"trace = '{trace}'\n[[policy]]\nuse = 'memory_pressure'\n"
        "params = { settle_s = 1.0, period_s = 0.5 }\n"
    )
    done = cli("run", spec, "--mode", "emulated", "--out", tmp_path / "runs", "--json")
    assert done.returncode == 0, done.stderr
    [folder] = (tmp_path / "runs").iterdir()
    recording = Recording.open(folder)
    [joined] = [e for e in recording.table("events").to_pylist() if e["kind"] == "joined"]
    assert "memory tenants: real" in joined["text"]
    table = recording.columns(
        "tenants", "t_s", "tenant_index", "limit_bytes", "swap_bytes", "major_faults_total",
        "pressure_some_frac", "slowdown_frac",
    )  # fmt: skip
    assert table["limit_bytes"].min() >= 0.4 * 96 * MIB, "the guaranteed part is never taken"
    for tenant in range(2):
        mine = {name: column[table["tenant_index"] == tenant] for name, column in table.items()}
        before = (mine["t_s"] > 2.0) & (mine["t_s"] < 3.0)
        grown = (mine["t_s"] > 3.5) & (mine["t_s"] < 8.0)
        assert mine["limit_bytes"][before].min() < 60 * MIB, "what nobody misses is taken"
        faults = mine["major_faults_total"]
        assert faults[grown].max() > faults[before].max() + 100
        assert mine["slowdown_frac"][grown].max() > mine["slowdown_frac"][before].max() + 0.2
        assert mine["limit_bytes"][grown].max() > 80 * MIB, "and given back when it is missed"
        assert np.median(mine["slowdown_frac"][grown][-10:]) < 0.2, "so that it recovers"
        if cgroup.probe().pressure:
            assert mine["pressure_some_frac"][grown].max() > 0
    memory = json.loads(done.stdout)["memory"]
    assert memory["swap_max_bytes"] > 0
    assert memory["major_faults"] > 200
    report = (folder / "report.html").read_text()
    for figure in ("figure-memory", "figure-faults", "figure-psi", "figure-slowdown"):
        assert figure in report
    # Groups are named by their daemon: those that are left belong to others' daemons.
    left = {path.parent.name for path in cgroup.ROOT.glob("*/serving-testbed-*/tenant*")}
    assert all(psutil.pid_exists(int(name.rpartition("-")[2])) for name in left), left


@real
@needs_real
def test_no_oversubscription_without_swap(tmp_path, monkeypatch):
    monkeypatch.setattr("daemons.tenants.swap_bytes", lambda: (0, 0))
    with pytest.raises(DeviceError, match="needs swap"):
        TenantHost(plan(), tmp_path, name=f"testbed-test-{os.getpid()}")
    assert not groups_named(f"testbed-test-{os.getpid()}")


def test_without_privileges_the_reason_is_said(tmp_path):
    with pytest.raises(DeviceError, match="no memory cgroups"):
        TenantHost(plan(), tmp_path, name="x", root=tmp_path)


def test_modelled_tenants_behave_alike():
    model = ModelledTenants(plan())
    calm = model.read(2.0)
    assert calm.slowdown_frac[0] == 0.0
    model.set_limit(0, 48 * MIB)
    for step in range(30):
        tight = model.read(2.0 + step * 0.1)
    assert tight.current_bytes[0] <= 48 * MIB
    assert tight.major_faults_total[0] > 500
    assert tight.slowdown_frac[0] > 0.5
    assert tight.pressure_some_frac[0] > 0.005
    model.set_limit(0, 96 * MIB)
    for step in range(60):
        eased = model.read(5.0 + step * 0.1)
    assert eased.slowdown_frac[0] < 0.2
    model.set_limit(0, 0)
    assert model.read(20.0).limit_bytes[0] == 40 * MIB


def test_modelled_tenants_never_swap_what_is_guaranteed():
    model = ModelledTenants(plan(share=0.3))  # the working set fits into the guaranteed part
    model.set_limit(0, 0)
    for step in range(20):
        reading = model.read(1.0 + step * 0.1)
    assert reading.current_bytes[0] == 40 * MIB
    assert reading.slowdown_frac[0] == 0.0
    assert reading.major_faults_total[0] == 0


def test_images_wait_with_the_tenants_that_prepare_them(tmp_path):
    """The same run with tenants left alone, and squeezed by a limit that a policy sets."""
    policy = tmp_path / "squeeze.py"
    policy.write_text(
        "import numpy as np\nfrom testbed.policies import SetMemoryLimit\n\n"
        "class Squeeze:\n    period_s = 5.0\n\n    def step(self, view):\n"
        "        who = np.arange(len(view.tenants.limit_bytes))\n"
        "        return [SetMemoryLimit(who, view.tenants.guaranteed_bytes, 'squeeze')]\n"
    )
    spec = tmp_path / "run.toml"
    spec.write_text(
        "name = 'images'\nduration_s = 20\n"
        "[cluster]\nrow_budget_w = 0\n"
        "[[pool]]\nname = 'vision'\nmodel = 'llava-onevision-7b'\n"
        "[[slo_class]]\nname = 'vision'\npool = 'vision'\n"
        "[workload]\nsource = 'azure_llm'\nrate_rps = 10.0\nimage_frac = 1.0\n"
        "[tenants]\nper_node = 2\nmemory_mib = 96\nguaranteed_frac = 0.1\npreprocess = true\n"
        f"[[policy]]\nuse = '{policy}:Squeeze'\n"
    )
    ttft_s = {}
    for coupled in ("true", "false"):
        out = tmp_path / coupled
        cli("run", spec, "--mode", "virtual", "--out", out, "--no-report",
            "--set", f"tenants.preprocess={coupled}")  # fmt: skip
        [folder] = out.iterdir()
        requests = Recording.open(folder).columns("requests", "arrival_s", "first_token_s")
        ttft_s[coupled] = np.nanmean(requests["first_token_s"] - requests["arrival_s"])
    assert ttft_s["true"] > 1.005 * ttft_s["false"], "virtual runs: no noise"


def test_the_slowdown_of_preprocessing_follows_that_of_the_tenants():
    model = ModelledTenants(plan(count=2))
    assert preprocess_slowdown(model.read(2.0)) == pytest.approx(1.0)
    model.set_limit(0, 48 * MIB)
    for step in range(30):
        one = model.read(2.0 + step * 0.1)
    lost = one.slowdown_frac[0]
    assert lost > 0.5
    assert preprocess_slowdown(one) == pytest.approx(1.0 + lost / (1.0 - lost) / 2 / 20)
    model.set_limit(1, 40 * MIB)
    for step in range(30):
        both = model.read(5.0 + step * 0.1)
    assert preprocess_slowdown(both) > preprocess_slowdown(one)


def test_the_trace_we_ship():
    trace = load_memory_trace()
    assert trace.shape[1] == 288
    assert trace.shape[0] >= 20
    assert 0 < trace.min() < trace.max() <= 1
    assert plan(trace=trace).working_set_bytes(0, 10.0) > 0


def test_a_broken_memory_trace_is_named(tmp_path):
    path = tmp_path / "broken.csv"
    path.write_text("day,slot,memory_frac\n0,0,much\n")
    with pytest.raises(TraceError, match="much"):
        load_memory_trace(str(path))
    with pytest.raises(TraceError, match="No such file"):
        load_memory_trace(str(tmp_path / "none.csv"))


def test_the_policy_serves_those_who_wait_from_a_short_pool():
    policy = MemoryPressure(pool_frac=0.6)
    view = view_of([[0.0]])
    tenants = view.tenants = empty_tenants(("calm", "waits", "waits-more"))
    tenants.guaranteed_bytes[:], tenants.memory_bytes[:] = 50.0 * MIB, 100.0 * MIB
    tenants.limit_bytes[:] = tenants.current_bytes[:] = 60.0 * MIB
    tenants.t_s[:] = 10.0
    tenants.pressure_some_frac[:] = [0.0, 0.1, 0.5]
    [command] = policy.step(view)
    limits = dict(zip(command.tenants.tolist(), command.memory_limit_bytes, strict=True))
    assert limits[2] > 60 * MIB
    total = sum(limits.get(k, 60.0 * MIB) for k in range(3))
    assert total <= 0.6 * 300 * MIB + 3 * 4096
    assert min(limits.values()) >= 50 * MIB - 4096
