"""`testbed experiment`: cases spread over processes, rows with intervals, one JSON object."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from testbed.core.errors import SpecError
from testbed.core.spec import load_spec
from testbed.experiment import (
    Case,
    Options,
    Result,
    Results,
    available_experiments,
    find_experiment,
    read_results,
)
from tests.conftest import ROOT, cli


@pytest.fixture
def guide(tmp_path: Path, small_spec: Path) -> Path:
    """The experiment of the guide, in a folder of its own."""
    folder = tmp_path / "caps"
    folder.mkdir()
    text = (ROOT / "docs" / "write-an-experiment.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code is not None
    (folder / "experiment.py").write_text(code.group(1), encoding="utf-8")
    (folder / "run.toml").write_text(small_spec.read_text(encoding="utf-8"), encoding="utf-8")
    return folder


def test_the_experiment_in_the_guide_works(guide: Path, tmp_path: Path):
    done = cli("experiment", guide, "--quick", "--json", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["seeds"] == [1, 2]
    assert result["runs"] == 4
    assert result["mode"] == "virtual"
    energy, ttft = result["rows"]
    assert energy["metric"] == "energy"
    assert energy["ci95"][0] <= energy["ours"] <= energy["ci95"][1]
    assert energy["seeds"] == 2
    assert ttft["unit"] == "ms"
    assert ttft["baseline"] > 0
    assert result["provenance"]["devices"] == "emulated"
    folder = Path(result["folder"])
    assert (folder / "report.html").stat().st_size > 100_000
    again = read_results(folder)
    assert again.change("energy_j", *again.arms()).mean * 100 == pytest.approx(energy["ours"])


def test_the_same_seeds_give_the_same_rows(guide: Path, tmp_path: Path):
    first, second = (
        json.loads(cli("experiment", guide, "--quick", "--json", "--out", tmp_path / str(k)).stdout)
        for k in range(2)
    )
    assert first["rows"] == second["rows"]


def test_a_mode_that_an_experiment_cannot_be_made_in_is_refused(guide: Path, tmp_path: Path):
    done = cli("experiment", guide, "--mode", "emulated", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "'emulated' must be one of virtual" in done.stderr


def test_a_run_that_fails_names_itself(guide: Path, tmp_path: Path):
    code = (guide / "experiment.py").read_text(encoding="utf-8").replace("2400.0", "10.0")
    (guide / "experiment.py").write_text(code, encoding="utf-8")
    done = cli("experiment", guide, "--quick", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert re.search(r"10 W seed [12]: ", done.stderr)  # whichever worker was first
    assert "row_budget_w = 10" in done.stderr


@pytest.fixture
def single(tmp_path: Path, small_spec: Path) -> Path:
    """A folder with a run file and no module."""
    folder = tmp_path / "single"
    folder.mkdir()
    (folder / "run.toml").write_text(small_spec.read_text(encoding="utf-8"), encoding="utf-8")
    return folder


def test_a_single_run_is_shortened_as_its_folder_says(single: Path, tmp_path: Path):
    arguments = ("experiment", single, "--quick", "--json", "--out", tmp_path / "out")
    refused = cli(*arguments)
    assert refused.returncode == 2
    assert "--quick" in refused.stderr
    assert "quick.toml" in refused.stderr
    (single / "quick.toml").write_text("duration_s = 5\n[workload]\nrate_rps = 3.0\n")
    done = cli(*arguments, "--mode", "virtual", "--workers", 1, "--keep")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    [folder] = (tmp_path / "out").iterdir()
    spec = json.loads((folder / "manifest.json").read_text())["spec"]
    assert spec["duration_s"] == 5
    assert spec["workload"]["rate_rps"] == 3.0
    assert summary["duration_s"] < 20


def test_a_single_run_with_seeds_gives_their_means(single: Path, tmp_path: Path):
    (single / "quick.toml").write_text("duration_s = 5\n")
    arguments = ("experiment", single, "--quick", "--seeds", 2, "--keep", "--workers", 1)
    done = cli(*arguments, "--mode", "virtual", "--json", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["seeds"] == [1, 2]
    energy = next(row for row in result["rows"] if row["metric"] == "energy")
    runs = read_results(Path(result["folder"])).runs
    kept = [json.loads((Path(r.values["run_folder"]) / "summary.json").read_text()) for r in runs]
    assert kept[0]["seed"] != kept[1]["seed"]
    mean_kwh = sum(summary["ledger"]["energy_kwh"] for summary in kept) / 2
    assert energy["ours"] == pytest.approx(mean_kwh)
    assert energy["seeds"] == 2
    metrics = [row["metric"] for row in result["rows"]]
    assert "carbon" not in metrics  # no grid was named


@pytest.mark.parametrize("name", available_experiments())
def test_every_experiment_has_a_quick_way(name: str):
    found = find_experiment(name)
    if found.module is None:
        quick = load_spec(found.spec, found.quick_overrides())
        assert quick.duration_s < load_spec(found.spec).duration_s
    else:
        full, quick = (found.module.cases(Options(quick=q)) for q in (False, True))
        assert len(quick) < len(full)


def test_an_unknown_experiment_is_refused_with_those_there_are():
    with pytest.raises(SpecError, match="first_run"):
        find_experiment("no_such_thing")


def test_changes_are_paired_by_seed():
    runs = [
        Result(Case(arm, seed), {"energy_j": value})
        for arm, seed, value in [("a", 1, 10.0), ("b", 1, 5.0), ("a", 2, 100.0), ("b", 2, 50.0)]
    ]
    row = Results(runs, Options()).change_row("energy_j", "b", "a")
    assert row.ours == -50.0
    assert row.ci95 == [-50.0, -50.0]
    with pytest.raises(KeyError, match="no runs of 'c'"):
        Results(runs).mean("energy_j", "c")
