"""The bench measures what it says, and adds up."""

from __future__ import annotations

import json

import pytest

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
