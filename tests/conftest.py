"""What several test folders share."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

SMALL = """
name = "small"
duration_s = 20
drain_s = 10

[cluster]
rows = 2
nodes_per_row = 1
gpus_per_node = 4
row_budget_w = 1700

[[pool]]
name = "chat"
gpus_per_node = 2
priority = 1

[[pool]]
name = "vision"
model = "llava-onevision-7b"
gpus_per_node = 2
priority = 0

[[slo_class]]
name = "chat"
pool = "chat"
images = "never"

[[slo_class]]
name = "vision"
pool = "vision"
images = "only"
ttft_s = 4.0

[workload]
source = "azure_llm"
trace = "azure_llm_2023_conv"
rate_rps = 25.0
image_frac = 0.2

[[policy]]
use = "priority_cap"
precedence = "safety"
"""


@pytest.fixture
def small_spec(tmp_path: Path) -> Path:
    """A run file of two rows with four GPUs each, under a cap that binds."""
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


def cli(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "testbed.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=180,
        cwd=options.pop("cwd", ROOT),
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"},
        check=False,
        **options,
    )


def table_hashes(folder: Path) -> dict[str, str]:
    """A hash of each table of a recording."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("*.parquet"))
    }
