"""The bench measures what it says, and adds up."""

from __future__ import annotations

import json

import pytest

from testbed import bench_scale
from testbed.bench import bench_engine
from tests.conftest import cli


@pytest.mark.parametrize("physics", [True, False])
def test_everything_is_served(physics):
    result = bench_engine(4, "300", physics=physics)
    assert result["requests"] == 300
    assert result["tokens_per_s"] > result["requests_per_s"] > 0
    assert 0.005 < result["ttft_mean_s"] < 1.0
    assert 0.004 < result["tpot_mean_s"] < 0.1


def test_a_file_of_requests(tmp_path):
    path = tmp_path / "requests.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n0.5,100,10\n1.5,2000,20\n2.5,50,1\n")
    done = cli("bench", "engine", "--instances", 2, "--requests", path, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["requests"] == 3


def test_bad_arguments():
    for arguments in (("--instances", 0), ("--requests", "none.csv")):
        done = cli("bench", "engine", *arguments)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr


def test_rate_and_counts_are_as_asked():
    result = bench_engine(4, "300", rate_rps=100.0, physics=False)
    assert result["requests"] == 300
    expected = {
        "instances", "requests", "wall_s", "requests_per_s", "tokens_per_s", "sim_over_wall",
        "peak_rss_mib", "ttft_mean_s", "tpot_mean_s",
    }  # fmt: skip
    assert set(result) == expected
    slow = bench_engine(4, "300", rate_rps=10.0, physics=False)
    assert slow["ttft_mean_s"] < result["ttft_mean_s"], "a busier instance answers later"


@pytest.mark.parametrize("instances", [1, 6, 100, 1000])
def test_whole_runs_have_one_gpu_for_each_instance(instances):
    spec = bench_scale.run_spec(instances, 10.0, 30.0)
    cluster = spec.cluster
    assert cluster.rows * cluster.nodes_per_row * cluster.gpus_per_node == instances


def test_a_whole_run_serves_everything():
    row = bench_scale.whole_run(8, 200, 24.0)
    assert row["requests"] == pytest.approx(200, abs=50)
    assert row["sim_over_wall"] > 1
    assert row["recording_bytes"] > 1000


def test_memory_does_not_grow_with_finished_requests():
    few, many = (
        bench_scale.alone("bench_scale.whole_run", instances=8, requests=n, rate_rps=60.0)
        for n in (4_000, 40_000)
    )
    assert many["requests"] > 9 * few["requests"]
    assert many["peak_rss_mib"] < few["peak_rss_mib"] + 60


def test_growth_is_fitted_and_drawn(tmp_path, monkeypatch):
    def row(function, instances, requests, rate_rps):
        return {"cpu_s": 1e-6 * requests**1.0 * instances**0.5}

    monkeypatch.setattr(bench_scale, "alone", row)
    rows = bench_scale.bench_growth(lambda text: None)
    exponents = {each["against"]: each["exponent"] for each in rows}
    assert exponents["GPUs"] == pytest.approx(0.5)
    assert exponents["requests"] == pytest.approx(1.0)
    bench_scale.write_growth_figure(rows, tmp_path / "growth.svg")
    drawn = (tmp_path / "growth.svg").read_text()
    assert all(f"against {row['against']}: exponent" in drawn for row in rows)
