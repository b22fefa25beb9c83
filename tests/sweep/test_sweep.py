"""Sweeps: what is run, that nothing finished is lost, and the same table from every engine."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from testbed.core.errors import SpecError, TestbedError
from testbed.sweep import load_sweep, points, run_sweep
from tests.conftest import ROOT, cli

BASE = """
name = "tiny"
duration_s = 3
[cluster]
rows = 1
nodes_per_row = 1
gpus_per_node = 2
row_budget_w = 900
[[pool]]
gpus_per_node = 2
[workload]
source = "poisson"
rate_rps = 5.0
[[policy]]
use = "row_power_cap"
"""
SWEEP = """
base = "base.toml"
name = "caps"
[grid]
seed = [1, 2, 3, 4, 5, 6, 7, 8]
"workload.rate_rps" = [5.0, 10.0]
[[point]]
"router.use" = "round_robin"
[[point]]
"router.use" = "least_loaded"
[random]
count = 2
fields = { "cluster.row_budget_w" = { low = 600, high = 1400 } }
"""
RUNS = 64

live = pytest.mark.live
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray is not installed (the extra 'ray')"
)


def test_an_address_is_for_ray_alone(tmp_path):
    done = cli(
        "sweep", write(tmp_path, SWEEP), "--address", "127.0.0.1:9", "--out", tmp_path / "out"
    )
    assert done.returncode == 2
    assert "--address '127.0.0.1:9': only with --engine ray" in done.stderr
    assert not (tmp_path / "out").exists()


def write(folder: Path, sweep: str, base: str = BASE) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "base.toml").write_text(base)
    path = folder / "sweep.toml"
    path.write_text(sweep)
    return path


def tables(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("table.csv", "table.parquet")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """The sweep's folder after all runs on this machine, with nothing in their way."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return run_sweep(write(folder, SWEEP), folder / "out")


# What is run.


def loaded(tmp_path, text):
    return load_sweep(write(tmp_path, 'base = "base.toml"\n' + text))


def test_a_grid_is_every_combination_in_the_order_written(tmp_path):
    found = points(loaded(tmp_path, 'grid = { seed = [1, 2], "router.use" = ["a", "b"] }'))
    assert [tuple(change.values()) for change in found] == [(1, "a"), (1, "b"), (2, "a"), (2, "b")]


def test_a_list_meets_every_combination(tmp_path):
    found = points(loaded(tmp_path, "grid = { seed = [1, 2] }\n[[point]]\nx = 5\n[[point]]\ny = 6"))
    assert found == [
        {"x": 5, "seed": 1},
        {"x": 5, "seed": 2},
        {"y": 6, "seed": 1},
        {"y": 6, "seed": 2},
    ]


def test_nothing_changed_is_one_run(tmp_path):
    assert points(loaded(tmp_path, "")) == [{}]


def test_a_random_sample_is_within_its_ranges_and_the_same_for_one_seed(tmp_path):
    text = """
[random]
count = 400
seed = %d
[random.fields]
rate = { low = 1.0, high = 100.0, log = true }
share = { low = 0.25, high = 0.75 }
nodes = { low = 2, high = 5, integer = true }
who = { choice = ["a", "b"] }
"""
    found = points(loaded(tmp_path, text % 7))
    assert found == points(loaded(tmp_path, text % 7))
    assert found != points(loaded(tmp_path, text % 8))
    columns = {name: [change[name] for change in found] for name in found[0]}
    assert 1.0 <= min(columns["rate"]) < 2.0
    assert 50.0 < max(columns["rate"]) <= 100.0
    assert 150 < sum(rate < 10.0 for rate in columns["rate"]) < 250, "evenly over the logarithm"
    assert 0.25 <= min(columns["share"]) < 0.3
    assert set(columns["nodes"]) == {2, 3, 4, 5}
    assert set(columns["who"]) == {"a", "b"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grid = { seed = [] }", r"grid.seed = \[\] must have at least one value"),
        ("grid = { seed = 3 }", r"Expected `array`, got `int` - at `\$.grid"),
        ("colour = 3", "unknown field `colour`"),
        ('name = "a/b"', "name = 'a/b' must be the name of a folder"),
        ('mode = "hardware"', "hardware"),
        ("grid = { seed = [1] }\npoint = [{ seed = 2 }]", "'seed' is in grid and in point 0"),
        ("random = { count = 0, fields = { x = { low = 1, high = 2 } } }", "count = 0 must be"),
        ("random = { count = 3, fields = {} }", "must have at least one field"),
        ("random = { count = 3, fields = { x = { low = 2, high = 1 } } }", "low < high"),
        ("random = { count = 3, fields = { x = { low = 0, high = 1, log = true } } }", "above 0"),
        ("random = { count = 3, fields = { x = { low = 0, high = 1, choice = [1] } } }", "either"),
        ("grid = { seed = [2026-01-01] }", "date"),
        ("[grid", "TOML|Invalid|Expected"),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path, text, message):
    with pytest.raises(SpecError, match=message) as caught:
        loaded(tmp_path, text)
    assert str(tmp_path / "sweep.toml") in str(caught.value)


def test_a_base_that_is_not_there_or_not_right(tmp_path):
    path = write(tmp_path, 'base = "none.toml"')
    done = cli("sweep", path, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "base = 'none.toml': cannot be read" in done.stderr
    path = write(tmp_path, 'base = "base.toml"\ngrid = { "cluster.row_budgt_w" = [1, 2] }')
    done = cli("sweep", path, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "row_budgt_w" in done.stderr, "no run of the sweep can be: said before any is started"
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_run_that_cannot_be_is_a_line_with_the_reason(tmp_path):
    path = write(tmp_path, 'base = "base.toml"\ngrid = { "cluster.row_budget_w" = [900, 100] }')
    folder = run_sweep(path, tmp_path / "out", workers=1)
    table = pq.read_table(folder / "table.parquet").to_pylist()
    assert table[0]["error"] == ""
    assert table[0]["energy_j"] > 0
    assert "budget" in table[1]["error"]
    assert table[1]["energy_j"] is None


def test_recordings_are_kept_if_asked_for_and_nothing_else_is(tmp_path):
    path = write(tmp_path, 'base = "base.toml"\nkeep_recordings = true\ngrid = { seed = [1] }')
    folder = run_sweep(path, tmp_path / "out", workers=1)
    assert len(list(folder.glob("points/000000/*/summary.json"))) == 1
    assert sorted(entry.name for entry in folder.iterdir()) == [
        "points", "results", "sweep.json", "table.csv", "table.parquet",
    ]  # fmt: skip


# What is killed.


def test_the_table_has_every_run_in_order(undisturbed):
    table = pq.read_table(undisturbed / "table.parquet").to_pylist()
    assert [row["run"] for row in table] == list(range(RUNS))
    assert {row["error"] for row in table} == {""}
    assert min(row["requests.completed"] for row in table) > 0
    assert len({row["energy_j"] for row in table}) > RUNS // 2
    assert not (undisturbed / "scratch").exists()


def test_a_killed_worker_changes_nothing(undisturbed, tmp_path):
    killed = []

    def kill_one(done, count):
        if done >= RUNS // 4 and not killed:
            # The newest child of spawn is a worker; the resource tracker came first.
            workers = [
                child
                for child in psutil.Process().children()
                if "--multiprocessing-fork" in child.cmdline()
            ]
            killed.append(max(workers, key=psutil.Process.create_time))
            killed[0].kill()

    folder = run_sweep(write(tmp_path, SWEEP), tmp_path / "out", progress=kill_one)
    assert killed
    assert tables(folder) == tables(undisturbed)


def test_a_run_that_kills_its_worker_leaves_the_others_alone(tmp_path):
    deadly = tmp_path / "deadly.py"
    deadly.write_text(
        "import os\n\nclass Deadly:\n    period_s = 1.0\n\n    def step(self, view):\n"
        "        os._exit(1)\n"
    )
    path = write(
        tmp_path,
        'base = "base.toml"\n[[point]]\nseed = 1\n[[point]]\n'
        f'"policy.0.use" = "{deadly}"\n[[point]]\nseed = 3\n',
    )
    with pytest.raises(TestbedError, match=r"what ran 1 died 3 times.*--resume"):
        run_sweep(path, tmp_path / "out", workers=2)
    [folder] = (tmp_path / "out").iterdir()
    assert [row["run"] for row in pq.read_table(folder / "table.parquet").to_pylist()] == [0, 2]
    deadly.write_text(deadly.read_text().replace("os._exit(1)", "return []"))
    run_sweep(path, tmp_path / "out", workers=1, resume=folder)
    assert [row["run"] for row in pq.read_table(folder / "table.parquet").to_pylist()] == [0, 1, 2]


def start_and_kill(path: Path, out: Path, *arguments: str) -> Path:
    """A sweep whose driver is killed once a quarter is done; its folder, when all are gone."""
    driver = subprocess.Popen(
        [sys.executable, "-m", "testbed.cli", "sweep", path, "--out", out, *arguments],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 90
    while len(list(out.glob("*/results/[0-9]*.json"))) < RUNS // 4:
        assert driver.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    children = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    _, alive = psutil.wait_procs(children, timeout=15)
    assert not alive, "workers end with their driver"
    [folder] = out.iterdir()
    assert not (folder / "table.csv").exists()
    return folder


@live
def test_a_killed_sweep_is_resumed_where_it_was(undisturbed, tmp_path):
    path = write(tmp_path, SWEEP)
    folder = start_and_kill(path, tmp_path / "out")
    finished = {file: file.stat().st_mtime_ns for file in (folder / "results").glob("[0-9]*.json")}
    assert RUNS // 4 <= len(finished) < RUNS
    done = cli("sweep", path, "--resume", folder, "--json")
    assert done.returncode == 0, done.stderr
    assert tables(folder) == tables(undisturbed)
    assert {file: file.stat().st_mtime_ns for file in finished} == finished, "none was run again"
    assert not (folder / "scratch").exists()
    path.write_text(SWEEP.replace("seed = [1, 2,", "seed = [11, 2,"))
    done = cli("sweep", path, "--resume", folder)
    assert done.returncode == 2
    assert "has changed since" in done.stderr
    done = cli("sweep", path, "--resume", tmp_path)
    assert done.returncode == 2
    assert "no sweep there" in done.stderr


# Ray.


@pytest.fixture(scope="module")
def cluster():
    """A head and another node, a core each, as processes of this machine."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield made
    with contextlib.suppress(Exception):
        made.shutdown()


@live
@needs_ray
@pytest.mark.timeout(180)
def test_a_ray_node_killed_half_way_changes_nothing(undisturbed, tmp_path, cluster):
    other = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    killed = []

    def kill_node(done, count):
        if done >= RUNS // 2 and not killed:
            killed.append(other)
            cluster.remove_node(other, allow_graceful=False)

    folder = run_sweep(
        write(tmp_path, SWEEP), tmp_path / "out", engine="ray", address=cluster.address,
        progress=kill_node,
    )  # fmt: skip
    assert killed
    assert tables(folder) == tables(undisturbed)


@live
@needs_ray
@pytest.mark.timeout(180)
def test_a_killed_ray_sweep_is_resumed_on_this_machine(undisturbed, tmp_path, cluster):
    path = write(tmp_path, SWEEP)
    folder = start_and_kill(path, tmp_path / "out", "--engine", "ray", "--address", cluster.address)
    run_sweep(path, tmp_path / "out", resume=folder)
    assert tables(folder) == tables(undisturbed)


@live
@needs_ray
def test_no_ray_cluster_there_is_one_clear_line(tmp_path):
    path = write(tmp_path, 'base = "base.toml"')
    done = cli("sweep", path, "--engine", "ray", "--address", "127.0.0.1:9", "--out", tmp_path)
    assert done.returncode == 2
    assert "--address '127.0.0.1:9'" in done.stderr
    assert "Traceback" not in done.stderr
