"""The bench measures what it says, and adds up."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from testbed import bench_scale
from testbed.bench import bench_engine, bench_requests
from testbed.cli import main
from testbed.core import compiled
from testbed.core.errors import TraceError
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


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffarrival_s,prompt_tokens,output_tokens\n0.5,100,10\n1.5,2000,20\n",
        '"output_tokens","arrival_s","prompt_tokens"\n10,0.5,100\n20,1.5,2000\n',
        "arrival_s,prompt_tokens,output_tokens\n3.0,100,10\n3.0,2000,20\n",  # of one moment
    ],
    ids=["byte order mark", "quoted", "one moment"],
)
def test_files_are_read_as_those_of_runs_and_once(tmp_path, text):
    path = tmp_path / "requests.csv"
    path.write_text(text, encoding="utf-8")
    assert [request.prompt_tokens for request in bench_requests(str(path), 1)] == [100, 2000]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("prompt_tokens,output_tokens\n100,10\n", "columns prompt_tokens, output_tokens must be"),
        ("arrival_s,prompt_tokens,output_tokens\n0.5,1,1\nsoon,1,1\n", "row 2: arrival_s = 'soon'"),
        ("arrival_s,prompt_tokens,output_tokens\n0.5,1\n", "row 1: 2 fields"),
        ("arrival_s,prompt_tokens,output_tokens\n", "has a header and no rows"),
        ("", "cannot be read"),
    ],
)
def test_a_broken_file_is_refused_with_its_row(tmp_path, text, what):
    path = tmp_path / "requests.csv"
    path.write_text(text)
    with pytest.raises(TraceError, match=f"requests.csv: .*{what}|requests.csv: {what}"):
        bench_engine(2, str(path))


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("engine", "--instances", 0), "instances = 0 must be 1 to"),
        (("engine", "--requests", "none.csv"), "requests = 'none.csv' is neither"),
        (("engine", "--requests", 0), "requests = 0 must be 1 to"),
        (("engine", "--requests", -5), "requests = -5 must be 1 to"),
        (("engine", "--rate", "nan"), "rate = nan must be"),
        (("sizes", "--scale", -1), "scale = -1 must be 0.01 to"),
        (("sizes", "--scale", 0), "scale = 0 must be 0.01 to"),
        (("growth", "--scale", "inf"), "scale = inf must be 0.01 to"),
        (("growth", "--scale", 0), "scale = 0 must be 0.01 to"),
        (("dynamo", "--requests", 0), "requests = 0 must be 1 to"),
        (("dynamo", "--instances", 0), "instances = 0 must be 1 to"),
        (("dynamo", "--rate", -1), "rate = -1 must be"),
        (("large", "--requests", 0), "requests = 0 must be 1 to"),
        (("large", "--instances", 0), "instances = 0 must be 1 to"),
        (("lateness", "--instances", 50, "--instances", 70), "instances = 70 must be a multiple"),
    ],
)
def test_numbers_that_make_no_sense_are_refused_at_once(monkeypatch, arguments, what):
    monkeypatch.setenv(compiled.ONCE_VARIABLE, "1")  # no command starts itself again

    def never(*more: object, **named: object) -> None:
        pytest.fail("something was started")

    monkeypatch.setattr(bench_scale, "alone", never)
    monkeypatch.setattr(bench_scale, "peer_python", never)
    done = CliRunner().invoke(main, ["bench", *map(str, arguments)])
    assert done.exit_code == 2, done.output
    assert f"bench: {what}" in done.output


@pytest.mark.parametrize("thin", [True, False])
def test_a_large_run_says_what_each_request_cost(thin):
    said: list[str] = []
    row = bench_scale.bench_large(said.append, instances=8, requests=240, thin=thin)
    assert row["requests"] == pytest.approx(240, abs=60)
    assert row["us_per_request"] == pytest.approx(1e6 * row["cpu_s"] / row["requests"])
    assert len(said) == 1
    assert "MiB at most" in said[0]


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
