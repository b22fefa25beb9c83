"""A run that was killed goes on from its checkpoint and ends as if it had not been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest

from testbed import rig
from testbed.coordinator.loop import Coordinator
from testbed.core.errors import SpecError, TestbedError
from testbed.core.freeze import FreezeError, freeze, thaw
from testbed.core.spec import parse_spec
from testbed.recorder.reader import Recording
from testbed.shells import virtual
from tests.conftest import ROOT, SMALL, cli, table_hashes

OFTEN = ["record.checkpoint_s=4", "workload.rate_rps=40", "router.use=power_of_two"]


class Killed(BaseException):
    """Nothing of ours catches it, as nothing catches SIGKILL."""


def broken_off(tmp_path, monkeypatch, at_s, *overrides, text=SMALL):
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
        rig.run(parse_spec(text, overrides), tmp_path / "broken")
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
    overrides = [*OFTEN, *overrides]
    whole = rig.run(parse_spec(SMALL + more, overrides), tmp_path / "whole")
    folder = broken_off(tmp_path, monkeypatch, at_s, *overrides, text=SMALL + more)
    assert (folder / "checkpoint.msgpack").exists()
    assert rig.resume(folder) == folder
    assert table_hashes(folder) == table_hashes(whole)
    ours, theirs = (json.loads((f / "summary.json").read_text()) for f in (folder, whole))
    for summary in (ours, theirs):
        del summary["run_id"], summary["wall_s"]
    assert ours == theirs
    assert not (folder / "checkpoint.msgpack").exists()


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
    sets = ["duration_s=600", "record.checkpoint_s=20", "record.views=false"]
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
        (["transport.delay_s=0.05"], "an eighth"),
        (["mode=emulated"], "only for virtual runs"),
        (["cluster.elastic=true"], "not with .* or cluster.elastic"),
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


def test_plain_data_comes_back_as_it_was():
    generator = np.random.default_rng(5)
    generator.random(7)
    value = {
        "numbers": [1, -2.5, float("inf"), None, True],
        ("a", 3): {"x", "y"},
        "array": np.arange(6, dtype=np.int32).reshape(2, 3),
        "generator": generator,
    }
    found = thaw(freeze(value))
    assert found["generator"].random() == generator.random()
    np.testing.assert_array_equal(found.pop("array"), value.pop("array"))
    del found["generator"], value["generator"]
    assert found == value
    with pytest.raises(FreezeError, match="function"):
        freeze(lambda: None)
