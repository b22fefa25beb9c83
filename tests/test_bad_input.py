"""Bad input ends in one clear line that names the field, its value and the range."""

from __future__ import annotations

import pytest

from tests.conftest import cli


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("cluster.row=1", "unknown field `row`"),
        ("cluster.rows=0", ">= 1 - at `$.cluster.rows`, not 0"),
        ('cluster.rows="two"', "got `str`"),
        ("duration_s=-1", "> 0"),
        ("duration_s=nan", "not nan"),
        ("duration_s=inf", "finite"),
        ("cluster.gpu=h9000", "none of"),
        ("pool.0.model=gpt-9", "none of"),
        ("pool.0.tp=3", "Invalid"),
        ("pool.0.gpus_per_node=9", "cluster.gpus_per_node"),
        ("cluster.row_budget_w=100", "cannot be set below"),
        ("slo_class.0.pool=nowhere", "none of"),
        ("slo_class.0.pool.x=1", "not a table"),
        ("pool.7.tp=1", "not one of 2 entries"),
        ("control.lease_s=0.1", "three times"),
        ("workload.trace=missing.csv", "missing.csv"),
        ("workload.source=telepathy", "Invalid enum"),
        ("policy.0.use=no_such_policy", "row_power_cap"),
        ("policy.0.use=nowhere.py", "no such file"),
        ("policy.0.params={trip = 0.9}", "it takes"),
        ("policy.0.params={first = 2.0}", "first < second"),
        ("pool.0.engine.max_num_seqs=9000", "max_batched_tokens"),
        ("pool.0.model=llama-3.1-70b", "leaves no memory"),
        ("nonsense", "expected path=value"),
        ("transport.loss_frac=1.5", "< 1"),
        ('ledger.grid="XX"', "ledger.grid = 'XX' is none of: BPAT, CISO"),
        ('ledger.price="PJM"', "ledger.price = 'PJM' is none of: CISO, ERCO"),
        ('ledger={price="CISO", price_usd_per_kwh=[0.2]}', "give one of them"),
        ("ledger={host_w=900.0, plant_hosts=true}", "give one of them"),
        ("ledger.price_usd_per_kwh=[inf]", "ledger.price_usd_per_kwh.0 = inf"),
        ("ledger.price_usd_per_kwh=[0.1, 0.2]", "must have 1 or 24"),
    ],
)
def test_one_clear_line(small_spec, tmp_path, override, says):
    done = cli("run", small_spec, "--mode", "virtual", "--set", override, "--out", tmp_path)
    assert done.returncode == 2, done.stdout
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(errors) == 1
    assert not list(tmp_path.glob("*/manifest.json"))  # before anything was run


def test_missing_and_broken_spec_files(tmp_path):
    broken = tmp_path / "broken.toml"
    broken.write_text("[cluster\n")
    for path, says in ((tmp_path / "none.toml", "cannot be read"), (broken, "not TOML")):
        done = cli("run", path)
        assert done.returncode == 2
        assert says in done.stderr


def test_a_broken_trace_row_is_named(small_spec, tmp_path):
    trace = tmp_path / "broken.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:15:50.9951690,many,109\n"
    )
    done = cli("run", small_spec, "--mode", "virtual", "--trace", trace, "--out", tmp_path)
    assert done.returncode == 2
    assert "broken.csv" in done.stderr
    assert "many" in done.stderr


def test_a_policy_that_fails_ends_the_run_and_keeps_the_recording(small_spec, tmp_path):
    policy = tmp_path / "bad.py"
    policy.write_text(
        "class Bad:\n    period_s = 1.0\n    def step(self, view):\n        return 1 / 0\n"
    )
    done = cli(
        "run", small_spec, "--mode", "virtual", "--policy", f"{policy}:Bad", "--out", tmp_path
    )
    assert done.returncode == 2
    assert "ZeroDivisionError" in done.stderr
    assert "bad.py:4" in done.stderr
    [folder] = [path.parent for path in tmp_path.glob("*/manifest.json")]
    assert "failed" in (folder / "manifest.json").read_text()
    report = cli("report", folder)
    assert report.returncode == 0, report.stderr


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return [SetPowerLimit(np.array([99]), 300.0)]", "is not below 8"),
        ("return [SetPowerLimit(np.array([0]), float('nan'))]", "finite"),
        ("return ['faster']", "is no command"),
        ("view.gpus.power_avg_w[0] = 0.0; return []", "read-only"),
    ],
)
def test_a_policy_that_says_something_impossible(small_spec, tmp_path, body, says):
    policy = tmp_path / "odd.py"
    policy.write_text(
        "import numpy as np\nfrom testbed.policies import SetPowerLimit\n"
        f"class Odd:\n    period_s = 1.0\n    def step(self, view):\n        {body}\n"
    )
    done = cli("run", small_spec, "--mode", "virtual", "--policy", policy, "--out", tmp_path)
    assert done.returncode == 2
    assert says in done.stderr


def test_reading_what_is_not_a_recording(tmp_path):
    for command in ("report", "replay", "export"):
        done = cli(command, tmp_path / "nowhere")
        assert done.returncode == 2, command
        assert "Traceback" not in done.stderr
