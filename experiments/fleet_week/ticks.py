"""What a tick's length does to a run: ``python -m experiments.fleet_week.ticks SWEEP``.

SWEEP is the folder of ``testbed sweep experiments/fleet_week/ticks.toml``. Each run is held against
that of the shortest tick, for the README. Its cost is wall time, so the runs must have been made
one after the other (``--workers 1``).
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

from testbed.analysis.markdown import table
from testbed.recorder.reader import Recording

SHARES = {
    "energy": "energy_j",
    "row power, mean": "power_w.mean",
    "row power, p99": "power_w.p99",
    "TTFT p50": "ttft_s.p50",
    "TTFT p99": "ttft_s.p99",
    "e2e p50": "e2e_s.p50",
}
"""Quantities that are given relative to the shortest tick, and where a summary has them."""


def read_ticks(folder: Path) -> list[dict[str, Any]]:
    """A dictionary for each run, by rising tick: quantities of `SHARES`, and the others."""
    with (folder / "table.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    found = []
    for line in lines:
        if line["error"]:
            raise SystemExit(f"{folder}: run {line['run']} failed: {line['error']}")
        [run] = (folder / "points" / f"{int(line['run']):06d}").iterdir()
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        found.append(
            {
                "tick_s": float(line["control.sample_period_s"]),
                **{name: float(line[path]) for name, path in SHARES.items()},
                "gap p50, s": float(line["itl_s.p50"]),
                "temp_c": float(Recording.open(run).columns("gpus", "temp_c")["temp_c"].mean()),
                "wall_s": float(summary["wall_s"]),
            }
        )
    return sorted(found, key=lambda run: run["tick_s"])


def ticks_table(runs: list[dict[str, Any]]) -> str:
    """The table of the README."""
    first = runs[0]
    head = ["tick", *SHARES, "gap between tokens, p50", "die temperature, mean", "cost of the run"]
    lines = []
    for run in runs:
        base = run is first
        lines.append(
            [
                f"{run['tick_s']:g} s",
                *("" if base else f"{run[name] / first[name] - 1:+.1%}" for name in SHARES),
                f"{1000 * run['gap p50, s']:.0f} ms",
                f"{run['temp_c']:.1f} C" if base else f"{run['temp_c'] - first['temp_c']:+.1f} C",
                "1" if base else f"1/{first['wall_s'] / run['wall_s']:.0f}",
            ]
        )
    return table(head, lines)


if __name__ == "__main__":
    print(ticks_table(read_ticks(Path(sys.argv[1]))))
