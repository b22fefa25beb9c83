"""The fleet's week: what can be run of it in seconds, and the commands of its README."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from experiments.fleet_week.figure import figures
from experiments.fleet_week.ticks import read_ticks, ticks_table
from testbed import rig
from testbed.analysis.pictures import save
from testbed.core.spec import load_spec
from testbed.recorder.reader import Recording
from testbed.sweep import run_sweep
from tests.conftest import ROOT

HERE = ROOT / "experiments" / "fleet_week"
SMALL = ["cluster.rows=1", "cluster.nodes_per_row=4", "cluster.racks_per_row=2",
         "workload.rate_rps=0.5", "drain_s=60"]  # fmt: skip


def shorter(name: str, folder: Path, **changes: str) -> Path:
    """A sweep file of the experiment with other values, in another folder."""
    text = (HERE / name).read_text().replace('"run.toml"', f'"{HERE / "run.toml"}"')
    for field, value in changes.items():
        [line] = [each for each in text.splitlines() if each.startswith((field, f'"{field}'))]
        text = text.replace(line, f"{line.partition(' =')[0]} = {value}")
    path = folder / name
    path.write_text(text + '"cluster.nodes_per_row" = 4\n"cluster.racks_per_row" = 2\n')
    return path


def test_the_fleet_has_rows_aisles_and_a_power_tree_that_binds():
    spec = load_spec(HERE / "run.toml")
    assert spec.cluster.rows * spec.cluster.nodes_per_row * spec.cluster.gpus_per_node == 10_000
    assert spec.plant is not None
    assert spec.record.checkpoint_s > 0


def test_rows_have_what_their_hosts_leave_and_caps_act(tmp_path):
    more = ["duration_s=600", "workload.start_s=151200", "workload.rate_rps=4.0"]
    run = rig.run(load_spec(HERE / "run.toml", [*SMALL, *more]), tmp_path)
    recording = Recording.open(run)
    rows = recording.columns("rows", "budget_w")
    assert len(np.unique(rows["budget_w"])) > 5, "budgets follow what the hosts draw"
    assert recording.table("commands").num_rows > 0
    save(figures(recording), tmp_path / "week.svg")
    assert "die temperature" in (tmp_path / "week.svg").read_text()


def test_the_table_of_ticks_comes_from_its_sweep(tmp_path):
    path = shorter(
        "ticks.toml", tmp_path, duration_s="60", **{"control.sample_period_s": "[1, 15]"}
    )
    runs = read_ticks(run_sweep(path, tmp_path / "out", workers=1))
    assert [run["tick_s"] for run in runs] == [1.0, 15.0]
    lines = ticks_table(runs).splitlines()
    assert len(lines) == 4
    share = runs[1]["energy"] / runs[0]["energy"] - 1
    assert f"{share:+.1%}" in lines[3]


def test_the_row_day_is_a_sweep_of_one_recording(tmp_path):
    path = shorter("row_day.toml", tmp_path, duration_s="1200")
    folder = run_sweep(path, tmp_path / "out", workers=1)
    [run] = (folder / "points" / "000000").iterdir()
    save(figures(Recording.open(run)), tmp_path / "row-day.svg")
    assert "<svg" in (tmp_path / "row-day.svg").read_text()


@pytest.mark.parametrize("name", ["row_day.toml", "ticks.toml"])
def test_sweeps_begin_where_the_weather_of_the_week_is(name):
    """The hour of the year moves with the hour of the week."""
    text = (HERE / name).read_text()
    found = {
        field: float(line.split("=")[1].split("#")[0])
        for field in ("workload.start_s", "plant.start_hour")
        for line in text.splitlines()
        if line.startswith(f'"{field}"')
    }
    plant = load_spec(HERE / "run.toml").plant
    assert plant is not None
    hour = plant.start_hour + found["workload.start_s"] / 3600.0
    assert found["plant.start_hour"] == hour
