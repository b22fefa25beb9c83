"""A recording survives what a run may meet, and says the same bytes for the same run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from testbed.core.errors import RecordingError
from testbed.core.messages import GpuReadings
from testbed.core.spec import RecordSpec, RunSpec
from testbed.core.view import (
    DrainInstance,
    LockClocks,
    RowColumns,
    SetMemoryLimit,
    SetPowerLimit,
    View,
    empty_gpus,
    empty_instances,
    empty_tenants,
)
from testbed.recorder import writer
from testbed.recorder.reader import Recording
from testbed.recorder.tables import TABLES, flatten, itl_bin, itl_edges_s, table
from testbed.recorder.writer import Recorder, finalise, new_run_folder, write_summary


def readings(count: int, value: float = 100.0) -> GpuReadings:
    floats = [[value + i for i in range(count)] for _ in range(9)]
    return GpuReadings(*floats, [1 << 33] * count, [4] * count, [False] * count)


def small_view() -> View:
    view = View(
        now_s=0.0,
        rows=RowColumns(("row0",), np.array([np.inf])),
        gpus=empty_gpus(("row0/rack0/node000/gpu0", "row0/rack0/node000/gpu1")),
        instances=empty_instances(("row0/rack0/node000/default0",)),
        tenants=empty_tenants(("row0/rack0/node000/vm0",)),
        pools=("default",),
        pool_priority=np.array([1]),
        pool_of_class={"default": 0},
    )
    return view


def write_run(folder: Path, flush_every: int, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Two hundred ticks of everything; flushed at other moments, it is the same run."""
    monkeypatch.setattr(writer, "FLUSH_S", 0.0)
    recorder = Recorder(folder, spec=RunSpec(), meta={"wall": time.time()})
    view = small_view()
    recorder.cluster(view)
    for tick in range(200):
        t_s = tick * 0.1
        recorder.gpus(t_s, [0, 1], readings(2, t_s))
        recorder.rows(t_s, np.array([t_s]), np.array([2 * t_s]), np.array([np.inf]))
        view.now_s = t_s
        recorder.view(tick, view)
        command = SetPowerLimit(np.array([0, 1]), 400.0 + tick / 3, f"because {tick}")
        recorder.command(t_s, tick, 0, "cap", "safety", 0, command, "sent")
        recorder.step(tick, t_s, 0, "cap", 1)
        recorder.event(t_s, "info", f"node{tick % 3}", "tick", f"number {tick}")
        if tick % flush_every == 0:
            recorder.flush(t_s)
    recorder.close(duration_s=20.0)
    return recorder


def test_what_was_written_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "run", 7, monkeypatch)
    recording = Recording.open(tmp_path / "run")
    assert recording.state == "closed"
    assert recording.spec == RunSpec()
    gpus = recording.columns("gpus")
    assert len(gpus["t_s"]) == 400
    assert gpus["t_s"][2] == 0.1
    assert gpus["power_avg_w"][3] == np.float32(1.1)
    assert gpus["fb_used_bytes"][0] == 1 << 33
    commands = recording.columns("commands")
    assert commands["value"][-1] == 400.0 + 199 / 3, "values of commands are exact"
    assert commands["target"][1] == "row0/rack0/node000/gpu1"
    assert commands["why"][0] == "because 0"
    view = recording.columns("view_gpus", "t_s")
    assert np.isneginf(view["t_s"]).all(), "a view keeps infinities"
    assert not list((tmp_path / "run").glob("*.arrows")), "streams are gone once closed"


def test_two_writes_of_one_run_are_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "a", 3, monkeypatch)
    write_run(tmp_path / "b", 50, monkeypatch)
    names = sorted(path.name for path in (tmp_path / "a").glob("*.parquet"))
    assert len(names) > 8
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_row_groups_do_not_hang_on_flushes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "ROW_GROUP_ROWS", 64)
    write_run(tmp_path / "a", 3, monkeypatch)
    write_run(tmp_path / "b", 50, monkeypatch)
    for path in (tmp_path / "a").glob("*.parquet"):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    groups = pq.ParquetFile(tmp_path / "a" / "gpus.parquet").metadata
    assert [groups.row_group(i).num_rows for i in range(groups.num_row_groups)] == [64] * 6 + [16]


def test_every_column_of_every_table_has_a_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for entry in TABLES.values():
        for field in entry.schema():
            assert field.metadata[b"unit"], f"{entry.name}.{field.name}"
    write_run(tmp_path / "run", 7, monkeypatch)
    recording = Recording.open(tmp_path / "run")
    assert len(recording.names()) > 8
    for name in recording.names():
        units = recording.units(name)
        assert all(units.values()), name
        for column, unit in units.items():
            if column.endswith(("_s", "_w", "_j", "_c")) and column != "now_s":
                assert unit in ("s", "W", "J", "degC"), f"{name}.{column}: {unit}"


CHILD = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_recorder import readings, small_view
from testbed.core.spec import RunSpec
from testbed.recorder.writer import Recorder
recorder = Recorder(sys.argv[1], spec=RunSpec())
recorder.cluster(small_view())
start = time.monotonic()
tick = 0
while True:
    t_s = time.monotonic() - start
    recorder.gpus(t_s, [0, 1], readings(2))
    recorder.event(t_s, "info", "child", "tick", str(tick))
    if tick % 50 == 0:
        recorder.flush(t_s)
        print(t_s, flush=True)
    tick += 1
    time.sleep(0.002)
"""


@pytest.mark.live
def test_kill_9_loses_nothing_but_the_last_second(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), str(Path(__file__).parent)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    last_s = 0.0
    while last_s < 2.5:
        last_s = float(child.stdout.readline())
    running = Recording.open(folder)
    assert running.state == "running"
    assert running.table("gpus").num_rows > 0, "a recording can be read while it is written"
    with pytest.raises(RecordingError, match="still being written"):
        finalise(folder)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()

    killed = Recording.open(folder)
    assert killed.state == "killed"
    kept_s = killed.columns("gpus", "t_s")["t_s"]
    assert kept_s[-1] > last_s - 1.0
    assert (np.diff(kept_s) >= 0).all()
    events = killed.columns("events", "text")["text"]
    assert events.tolist() == [str(i) for i in range(len(events))], "no hole"

    finalise(folder)
    closed = Recording.open(folder)
    assert closed.manifest["exit_status"] == "killed"
    assert closed.columns("gpus", "t_s")["t_s"].tolist() == kept_s.tolist()
    assert not list(folder.glob("*.arrows"))
    finalise(folder)  # twice does no harm


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.999])
def test_a_truncated_stream_is_read_up_to_the_cut(
    tmp_path: Path, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "FLUSH_S", 0.0)
    recorder = Recorder(tmp_path / "run", spec=RunSpec())
    for tick in range(100):
        recorder.gpus(tick * 0.1, [0, 1], readings(2, tick))
        recorder.flush()
    stream = tmp_path / "run" / "gpus.arrows"
    whole = stream.read_bytes()
    stream.write_bytes(whole[: int(share * len(whole))])
    found = Recording.open(tmp_path / "run").columns("gpus")
    count = len(found["t_s"])
    assert count % 2 == 0
    assert count >= 200 * share * 0.95 - 4, "all that is before the cut is read"
    assert found["t_s"].tolist() == [i // 2 * 0.1 for i in range(count)]


def test_buffers_grow_and_flush_when_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "FULL_ROWS", 1000)
    recorder = Recorder(tmp_path / "run", spec=RunSpec())
    for tick in range(700):
        recorder.gpus(float(tick), [0, 1, 2], readings(3))
    recorder.close()
    found = Recording.open(tmp_path / "run").columns("gpus", "t_s", "gpu")
    assert len(found["t_s"]) == 2100
    assert found["gpu"][:6].tolist() == [0, 1, 2, 0, 1, 2]
    assert found["t_s"][-1] == 699


def test_thinned_gpus_keep_the_last_report(tmp_path: Path) -> None:
    spec = RunSpec(record=RecordSpec(gpu_period_s=1.0))
    recorder = Recorder(tmp_path / "run", spec=spec)
    for tick in range(26):
        recorder.gpus(tick * 0.1, [0, 1], readings(2, tick))
        recorder.gpus(tick * 0.1, [2], readings(1, tick))
    recorder.close()
    found = Recording.open(tmp_path / "run").columns("gpus", "t_s", "gpu")
    assert found["t_s"][found["gpu"] == 0].tolist() == [0.0, 1.0, 2.0, 2.5]
    assert found["t_s"][found["gpu"] == 2].tolist() == [0.0, 1.0, 2.0, 2.5]


def test_views_can_be_left_out(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "run", spec=RunSpec(record=RecordSpec(views=False)))
    recorder.cluster(small_view())
    recorder.view(0, small_view())
    recorder.close()
    assert "view_gpus" not in Recording.open(tmp_path / "run").names()


def test_an_experiment_may_have_its_own_tables(tmp_path: Path) -> None:
    own = table("racks", "temperature of each rack", "t_s:f8 row:i4 inlet_c:f4 what:name")
    with Recorder(tmp_path / "run", spec=RunSpec(), extra_tables=[own]) as recorder:
        recorder.append("racks", {"t_s": 1.0, "row": [0, 1], "inlet_c": [20, 21], "what": "x"})
    recording = Recording.open(tmp_path / "run")
    assert recording.columns("racks")["inlet_c"].tolist() == [20, 21]
    assert recording.units("racks")["inlet_c"] == "degC"
    assert recording.manifest["exit_status"] == "ok"


def test_a_failed_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), Recorder(tmp_path / "run", spec=RunSpec()):
        raise RuntimeError("no such luck")
    manifest = Recording.open(tmp_path / "run").manifest
    assert manifest["exit_status"] == "failed"
    assert manifest["error"] == "RuntimeError: no such luck"


def test_manifest_has_what_a_reader_asks_for(tmp_path: Path) -> None:
    Recorder(tmp_path / "run", spec=RunSpec(seed=9), meta={"late_limit_s": 0.1}).close()
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["seed"] == 9
    assert manifest["spec"]["seed"] == 9
    assert manifest["meta"] == {"late_limit_s": 0.1}
    assert manifest["versions"]["pyarrow"]
    assert manifest["host"]["cpus"] >= 1
    assert manifest["started_utc"].endswith("Z")
    assert manifest["wall_s"] >= 0


def test_append_refuses_what_does_not_fit(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "run", spec=RunSpec())
    with pytest.raises(ValueError, match=r"table events: missing or unknown columns \['kind'\]"):
        recorder.append("events", {"t_s": 0.0, "level": "info", "source": "x", "text": "y"})
    with pytest.raises(ValueError, match="kind needs 2 rows"):
        recorder.append(
            "events",
            {"t_s": [0.0, 1.0], "level": "info", "source": "x", "kind": ["a"], "text": "y"},
        )
    recorder.event(3.0, "info", "x", "kind", "text")
    recorder.close()
    assert Recording.open(tmp_path / "run").columns("events", "t_s")["t_s"].tolist() == [3.0]


def test_reading_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecordingError, match="no such folder"):
        Recording.open(tmp_path / "nothing")
    with pytest.raises(RecordingError, match=r"no manifest\.json"):
        Recording.open(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(RecordingError, match=r"manifest\.json: "):
        Recording.open(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(RecordingError, match="format 99, this version reads 1"):
        Recording.open(tmp_path)
    with pytest.raises(RecordingError, match="no readable manifest"):
        finalise(tmp_path / "nothing")

    write_run(tmp_path / "run", 7, monkeypatch)
    recording = Recording.open(tmp_path / "run")
    with pytest.raises(RecordingError, match="no table 'gpu'"):
        recording.table("gpu")
    with pytest.raises(RecordingError, match="no column 'power'"):
        recording.table("gpus", ["power"])
    (tmp_path / "run" / "gpus.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(RecordingError, match="table gpus: "):
        recording.table("gpus")
    assert recording.table("lateness").num_rows == 0, "known tables without rows are empty"
    assert recording.summary is None
    write_summary(tmp_path / "run", {"valid": True})
    assert recording.summary == {"valid": True}


def test_one_folder_holds_one_recording(tmp_path: Path) -> None:
    Recorder(tmp_path / "run", spec=RunSpec()).close()
    with pytest.raises(RecordingError, match="there is one already"):
        Recorder(tmp_path / "run", spec=RunSpec())
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordingError, match="recording"):
        Recorder(tmp_path / "file" / "run", spec=RunSpec())
    first, second = new_run_folder(tmp_path, "x"), new_run_folder(tmp_path, "x")
    assert first != second
    assert first.is_dir()


def test_commands_flatten_to_targets() -> None:
    flat = flatten(LockClocks(np.array([1]), np.array([1200.0])))
    assert (flat.kind, flat.target.tolist(), flat.value.tolist()) == ("sm_clock_lock", [1], [1200])
    assert flatten(SetMemoryLimit(np.array([0, 2]), 5e9)).value.tolist() == [5e9, 5e9]
    assert flatten(DrainInstance(np.array([3]), drain=False)).value.tolist() == [0.0]


def test_itl_bins_agree_with_their_edges() -> None:
    edges_s = itl_edges_s()
    bins = itl_bin(edges_s[:-1])
    assert bins.tolist() == list(range(len(bins)))
    inside = itl_bin(np.sqrt(edges_s[1:] * edges_s[:-1]))
    assert inside.tolist() == list(range(len(bins)))
    assert int(itl_bin(0.0)) == 0
