"""A run that was killed goes on from its checkpoint and ends as if it had not been."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from functools import partial

import numpy as np
import pytest

from emulators import engine
from emulators.models import load_model
from emulators.profiles import load_gpu
from emulators.state import CONTROL
from emulators.timing import IterationCost
from testbed import profiling, rig
from testbed.coordinator.loop import Coordinator
from testbed.core.errors import SpecError, TestbedError
from testbed.core.freeze import FreezeError, attributes, freeze, put_back, thaw
from testbed.core.messages import EngineConfig, Request
from testbed.core.spec import parse_spec
from testbed.experiment import load_beside
from testbed.policies.dynamollm import DynamoLLM
from testbed.recorder.reader import Recording
from testbed.shells import checkpoint, schedule, virtual
from tests.conftest import ROOT, SMALL, cli, table_hashes
from tests.elastic.test_elastic import SHUFFLED
from tests.rig.test_plant import PLANT, events, hard

OFTEN = ["record.checkpoint_s=4", "workload.rate_rps=40", "router.use=power_of_two"]


class Killed(BaseException):
    """Nothing of ours catches it, as nothing catches SIGKILL."""


def broken_off(tmp_path, monkeypatch, at_s, spec):
    """A run that ends in the middle of things at ``at_s``."""

    def progress_to(parts, limit_s):
        control = Coordinator.control

        def until(self, now_s):
            if now_s >= limit_s:
                raise Killed
            control(self, now_s)

        monkeypatch.setattr(Coordinator, "control", until)
        try:
            virtual.run_virtual(parts)
        finally:
            monkeypatch.setattr(Coordinator, "control", control)

    monkeypatch.setattr(rig, "run_virtual", partial(progress_to, limit_s=at_s))
    with pytest.raises(Killed):
        rig.run(spec, tmp_path / "broken")
    monkeypatch.setattr(rig, "run_virtual", virtual.run_virtual)
    [folder] = (tmp_path / "broken").iterdir()
    return folder


@pytest.mark.parametrize(
    ("at_s", "more", "overrides"),
    [
        (9.3, "", []),
        (17.0, "", ["record.gpu_period_s=3", "record.instance_period_s=2", "record.segments=true"]),
        (13.0, "\n[[fault]]\nat_s = 6.0\nnode = 1\ngpu = 0\n", ["record.requests_every=7"]),
        (5.0, "", ["pool.0.engine={kv_blocks=60, max_num_seqs=6}", "control.hold_limit=3"]),
        (12.4, "", ["router.use=round_robin", "policy.0.use=row_power_cap", "drain_s=0"]),
    ],
)  # fmt: skip
def test_resumed_as_if_undisturbed(tmp_path, monkeypatch, at_s, more, overrides):
    check_resumed(tmp_path, monkeypatch, at_s, [*OFTEN, *overrides], SMALL + more)


def test_the_time_left_of_a_resumed_run_counts_from_its_resumption(tmp_path, monkeypatch):
    spec = parse_spec(SMALL, [*OFTEN, "duration_s=40"])
    folder = broken_off(tmp_path, monkeypatch, 21.0, spec)
    reads = itertools.count()
    # A clock on which every tick takes the same: one second each time somebody looks.
    monkeypatch.setattr(schedule.time, "monotonic", lambda: float(next(reads)))
    said: list[tuple[float, float, int]] = []
    rig.resume(
        folder, progress=lambda status: said.append((status.now_s, status.left_s, next(reads)))
    )
    monkeypatch.undo()
    (begun_s, _, first), (now_s, left_s, then) = said[3], said[50]
    assert 20.0 < begun_s < now_s < 30.0
    pace = (then - first) / (now_s - begun_s)
    assert left_s == pytest.approx((40.0 - now_s) * pace, rel=0.15)


def check_resumed(tmp_path, monkeypatch, at_s, overrides, text):
    """`check_resumed_spec` of a run file's text."""
    return check_resumed_spec(tmp_path, monkeypatch, at_s, parse_spec(text, overrides))


def check_resumed_spec(tmp_path, monkeypatch, at_s, spec):
    """Broken off at ``at_s`` and resumed, a run ends as the whole one; returns the whole one."""
    whole = rig.run(spec, tmp_path / "whole")
    folder = broken_off(tmp_path, monkeypatch, at_s, spec)
    assert (folder / "checkpoint.msgpack").exists()
    assert rig.resume(folder) == folder
    assert table_hashes(folder) == table_hashes(whole)
    ours, theirs = (json.loads((f / "summary.json").read_text()) for f in (folder, whole))
    for summary in (ours, theirs):
        del summary["run_id"], summary["wall_s"]
    assert ours == theirs
    assert not (folder / "checkpoint.msgpack").exists()
    return whole


CAPS = 'policy=[{use="blind_placement"},{use="%s",precedence="safety"}]'


@pytest.mark.parametrize(
    ("at_s", "overrides"),
    [
        (9.3, ["plant.period_s=1.0", "plant.speedup=600", "record.views=true"]),
        (13.0, ["vms.short_lived_frac=1.0", "plant.speedup=3600", CAPS % "uniform_cap"]),
        (15.0, ['fault=[{kind="ahu_lost",at_s=6,duration_s=5}]', CAPS % "polca_cap"]),
        (14.0, ['policy=[{use="tapas"}]', 'router.use="tapas:TapasRouter"']),
    ],
)
def test_a_run_with_a_building_is_resumed(tmp_path, monkeypatch, at_s, overrides):
    """Weather that goes on, VMs that come and go, units that fail, policies made of parts."""
    overrides = ["record.checkpoint_s=4", *overrides]
    check_resumed(tmp_path, monkeypatch, at_s, overrides, PLANT)


@pytest.mark.parametrize(
    ("at_s", "overrides"),
    [
        (250.0, ["plant.oversubscription_frac=0.47", "duration_s=320"]),  # 1.8 times the rating
        (60.0, ["plant.oversubscription_frac=0.5", "duration_s=80"]),  # twice: all are open by then
    ],
)
def test_breakers_remember_over_a_break(tmp_path, monkeypatch, at_s, overrides):
    """They open when they would have, and what is dark stays dark."""
    overrides = [*hard(1), *overrides, "record.checkpoint_s=8"]
    whole = check_resumed(tmp_path, monkeypatch, at_s, overrides, PLANT)
    assert events(whole, "breaker_tripped")
    assert events(whole, "dark")


SHUFFLE = ROOT / "tests" / "elastic" / "shuffle.py"


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_instances_that_come_and_go_are_resumed(tmp_path, monkeypatch, seed):
    """Starting, draining, re-sharding, recalled requests: whatever is under way."""
    policy = f'policy=[{{use="{SHUFFLE}",params={{seed={seed}}}}}]'
    fault = "fault=[{at_s=5.0,node=1,gpu=2}]"
    more = ["reconfigure.empty_power_frac=0.3", fault] if seed > 1 else []
    overrides = [policy, f"seed={seed}", "record.checkpoint_s=1.3", *more]
    for at_s in (4.1, 8.0):
        folder = tmp_path / f"{at_s:g}"
        whole = check_resumed(folder, monkeypatch, at_s, overrides, SHUFFLED)
    layouts = Recording.open(whole).columns("events", "kind")["kind"].astype(str)
    assert (layouts == "layout").sum() > 5


def test_requests_as_messages_are_resumed(tmp_path, monkeypatch):
    """As they travel where instances come and go, here where they do not."""
    monkeypatch.setattr(virtual, "run_virtual", partial(virtual.run_virtual, by_message=True))
    monkeypatch.setattr(rig, "run_virtual", virtual.run_virtual)
    check_resumed(tmp_path, monkeypatch, 13.0, [*OFTEN, "transport.delay_s=0.01"], SMALL)


def test_dynamollm_is_resumed(tmp_path, monkeypatch):
    """Nine pools, a profile, a forecast, plans: a policy that routes and steps, and is one."""
    monkeypatch.setattr(profiling, "REQUESTS", 60)  # a second instead of twenty
    sweep = DynamoLLM.sweep._replace(clocks_mhz=(1000.0, 1400.0, 1980.0))
    monkeypatch.setattr(DynamoLLM, "sweep", sweep)
    text = (ROOT / "experiments" / "dynamollm" / "run.toml").read_text(encoding="utf-8")
    params = "{period_s=5.0,pool_period_s=30.0,cluster_period_s=60.0}"
    overrides = [
        "duration_s=150", "workload.rate_rps=10", "cluster.nodes_per_row=6", "workload.start_s=600",
        f'policy=[{{use="dynamollm",precedence="slo",params={params}}}]', "record.checkpoint_s=20",
    ]  # fmt: skip
    check_resumed(tmp_path, monkeypatch, 101.0, overrides, text)


def test_tapas_with_engines_is_resumed(tmp_path, monkeypatch):
    """A building, and instances that a policy makes something else when a UPS is lost."""
    folder = ROOT / "experiments" / "tapas"
    live = load_beside(str(folder / "experiment.py"), "live")
    spec = live.live_spec("tapas", ['mode="virtual"', "record.checkpoint_s=2"])
    whole = check_resumed_spec(tmp_path, monkeypatch, 14.0, spec)
    assert events(whole, "layout")


def test_checkpoints_change_nothing(tmp_path):
    with_them, without = (
        rig.run(
            parse_spec(SMALL, ["record.segments=true", f"record.checkpoint_s={each}"]), tmp_path
        )
        for each in (2, 0)
    )
    assert table_hashes(with_them) == table_hashes(without)


def test_killed_twice_from_the_command_line(tmp_path, small_spec):
    """SIGKILL, wherever it hits."""
    sets = ["duration_s=1200", "record.checkpoint_s=20", "record.views=false"]
    words = [word for each in sets for word in ("--set", each)]
    whole = cli("run", small_spec, "--mode", "virtual", "--no-report", "--json", *words,
                "--out", tmp_path / "whole")  # fmt: skip
    assert whole.returncode == 0, whole.stderr
    command = [
        sys.executable, "-m", "testbed.cli", "run", small_spec, "--mode", "virtual",
        "--no-report", "--out", tmp_path / "runs", *words,
    ]  # fmt: skip
    for _ in range(2):
        process = subprocess.Popen(
            [str(word) for word in command], cwd=ROOT, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        seen: set[int] = set()
        deadline = time.monotonic() + 60
        while len(seen) < 3 and process.poll() is None and time.monotonic() < deadline:
            for path in (tmp_path / "runs").glob("*/checkpoint.msgpack"):
                seen.add(path.stat().st_mtime_ns)
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        [folder] = (tmp_path / "runs").iterdir()
        assert Recording.open(folder).state == "killed"
        command = [sys.executable, "-m", "testbed.cli", "resume", folder, "--no-report"]
    done = cli("resume", folder, "--no-report", "--json")
    assert done.returncode == 0, done.stderr
    [theirs] = (tmp_path / "whole").iterdir()
    assert table_hashes(folder) == table_hashes(theirs)
    again = cli("resume", folder)
    assert again.returncode == 2
    assert "no checkpoint" in again.stderr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["transport.jitter_s=0.01"], "not with transport.jitter_s"),
        (["transport.delay_s=0.05"], "at most 0.0125, an eighth"),
        (["mode=emulated"], "only for virtual runs"),
    ],
)
def test_what_cannot_be_kept_is_refused(tmp_path, overrides, message):
    with pytest.raises(SpecError, match=message):
        rig.run(parse_spec(SMALL, ["record.checkpoint_s=4", *overrides]), tmp_path)


def test_a_policy_with_a_state_that_is_no_data_is_named(tmp_path):
    policy = tmp_path / "odd.py"
    policy.write_text(
        "class Odd:\n"
        "    period_s = 1.0\n"
        "    def __init__(self):\n"
        "        self.file = open(__file__)\n"
        "    def step(self, view):\n"
        "        return []\n"
    )
    overrides = ["record.checkpoint_s=4", f"policy.0.use={policy}"]
    with pytest.raises(TestbedError, match="cannot hold a TextIOWrapper"):
        rig.run(parse_spec(SMALL, overrides), tmp_path / "runs")


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """The parts of a run that has ended: a building, breakers, VMs, a policy made of parts."""
    seen = []
    save = checkpoint.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", lambda stage: seen.append(stage) or save(stage))
        overrides = ["record.checkpoint_s=4", "duration_s=6", 'policy=[{use="tapas"}]']
        rig.run(parse_spec(PLANT, overrides), tmp_path_factory.mktemp("stage"))
    return seen[-1]


def stateful(value, found):
    """Objects that a checkpoint takes in, by class; one of each will do."""
    if isinstance(value, dict | list | tuple | set):
        for entry in value.values() if isinstance(value, dict) else value:
            stateful(entry, found)
        return found
    kind = type(value)
    ours = hasattr(kind, "WIRED") or kind.__module__.startswith("testbed.policies")
    if ours and kind not in found:
        found[kind] = value
        stateful(list(attributes(value).values()), found)
    return found


def test_every_class_says_what_of_it_is_made_anew(stage):
    found = stateful(checkpoint.save(stage), {})
    names = {kind.__name__ for kind in found}
    assert names >= {
        "Coordinator", "Building", "Datacenter", "Breakers", "Facility", "VmColumns", "Arranging",
        "Claims", "Node", "NodeDaemon", "CapGuard", "ServerBank", "NodeServing", "GpuBank",
        "Thermal", "Recorder", "RequestPath", "BankReports", "GpuColumns", "Tapas", "Predictors",
    }  # fmt: skip
    for kind, thing in found.items():
        unknown = [name for name in getattr(kind, "WIRED", ()) if not hasattr(thing, name)]
        assert not unknown, f"{kind.__name__}.WIRED names what is not there: {unknown}"


def test_a_new_attribute_that_is_no_data_must_be_declared(stage):
    """Whatever class gets it: a call, a file and a lock are refused with their place."""
    kinds = stateful(checkpoint.save(stage), {})
    for kind, thing in kinds.items():
        state = attributes(thing)
        name = "brand_new" if hasattr(thing, "__dict__") else next(iter(state))
        for odd in (stateful, partial(print), sys.stdout, threading.Lock()):
            setattr(thing, name, odd)
            declared = hasattr(kind, "WIRED")
            hint = rf".*; if it is made anew, name it in {kind.__name__}\.WIRED" if declared else ""
            with pytest.raises(
                FreezeError, match=rf"^{kind.__name__}\.{name}: .*cannot hold{hint}"
            ):
                freeze(checkpoint.save(stage))
        if name in state:
            setattr(thing, name, state[name])
        else:
            delattr(thing, name)
    freeze(checkpoint.save(stage))


def test_an_engine_accounts_for_all_of_itself():
    """It is compiled, and so lists what it keeps."""
    names = getattr(engine.Engine, "__mypyc_attrs__", None)
    if names is None:
        cost = IterationCost(load_model("llama-2-7b"), load_gpu("h100-sxm"), tp=1)
        names = vars(engine.Engine(cost, EngineConfig(), kv_blocks=64))
    listed = (*engine._ENGINE_FIELDS, *engine._ENGINE_PARTS, *engine._ENGINE_WIRED)
    assert len(listed) == len(set(listed))
    assert set(names) == set(listed)


def test_a_state_of_another_version_is_refused(stage):
    breakers = stage.desk.coordinator._building._hall.row_breakers
    kept = thaw(freeze(breakers))
    del kept.heat
    with pytest.raises(FreezeError, match=r"another version: Breakers has other .*\(heat\)"):
        put_back(breakers, kept)
    kept = freeze(breakers).replace(b":Breakers", b":Brackets")
    with pytest.raises(FreezeError, match=r"no class emulators\.breaker:Brackets"):
        thaw(kept)


class Keeps:
    """A policy that keeps a part of the view: a copy of it would go stale."""

    def __init__(self, part):
        self.parts = [part]


Keeps.__module__ = "_policy_keeps"


def test_what_others_fill_is_not_kept_with_a_policy(stage):
    with pytest.raises(FreezeError, match=r"Keeps\.parts: .*cannot hold a GpuColumns that is not"):
        freeze(Keeps(stage.desk.coordinator.view.gpus))


def test_what_was_one_thing_is_one_again():
    shared = deque([1, 2], maxlen=3)
    request = Request(1, 0.5, 10, 20)
    value = {("a", request): shared, "b": [shared, request], "c": frozenset({2, 1})}
    found = thaw(freeze(value))
    [(_, key), *_] = found
    found["a"] = found["a", request]
    assert found["a"] is found["b"][0]
    assert key is found["b"][1]
    assert (found["a"], found["a"].maxlen, found["c"]) == (shared, 3, frozenset({1, 2}))


def test_plain_data_comes_back_as_it_was():
    generator = np.random.default_rng(5)
    generator.random(7)
    value = {
        "numbers": [1, -2.5, float("inf"), None, True],
        ("a", 3): {"x", "y"},
        "array": np.arange(6, dtype=np.int32).reshape(2, 3),
        "rows": np.zeros(2, CONTROL),
        "generator": generator,
    }
    found = thaw(freeze(value))
    assert found["generator"].random() == generator.random()
    np.testing.assert_array_equal(found.pop("array"), value.pop("array"))
    np.testing.assert_array_equal(found.pop("rows"), value.pop("rows"))
    del found["generator"], value["generator"]
    assert found == value
    with pytest.raises(FreezeError, match="function"):
        freeze(lambda: None)
