"""Runs side by side: how their specs differ, and every number of their summaries.

The first run is the baseline. Deltas and ratios are against it; a ratio to zero, or of what one
of the runs does not know, is None.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from testbed.analysis import figures
from testbed.analysis.drawing import COLOURS
from testbed.analysis.page import Page, card, table, tag
from testbed.analysis.run import Run
from testbed.analysis.summary import summarise
from testbed.core.errors import RecordingError
from testbed.recorder.reader import Recording, Source

_NOT_COMPARED = {"run_id", "name", "mode", "seed", "valid", "invalid_because", "wall_s", "policies"}
_LOWER_IS_BETTER = ("ttft_s", "itl_s", "e2e_s", "tpot_s", "energy", "breaches", "lost", "rejected",
                    "lateness", "throttle", "swap", "faults", "pressure", "slowdown", "_kwh",
                    "carbon", "_usd")  # fmt: skip
_HIGHER_IS_BETTER = ("slo_attained_frac", "goodput", "completed")


def compare(sources: Sequence[Source]) -> dict[str, Any]:
    """The comparison as one object of plain values.

    Raises:
        RecordingError: fewer than two recordings.
    """
    if len(sources) < 2:
        raise RecordingError(f"comparing needs two recordings or more, got {len(sources)}")
    recordings = [Recording.open(source) for source in sources]
    summaries = [summarise(recording) for recording in recordings]
    specs = [dict(_leaves(recording.manifest["spec"])) for recording in recordings]
    metrics = [dict(_leaves(summary, skip=_NOT_COMPARED)) for summary in summaries]
    return {
        "runs": [
            {key: summary[key] for key in ("run_id", "name", "mode", "seed", "valid")}
            for summary in summaries
        ],
        "spec_differences": _differences(specs),
        "metrics": [_metric(name, metrics) for name in _keys(metrics)],
    }


def _leaves(
    tree: Any, path: str = "", skip: set[str] | frozenset[str] = frozenset()
) -> Iterator[tuple[str, Any]]:
    """Every value in a tree with its path.

    >>> dict(_leaves({"a": {"b": 1}, "c": [2, {"d": 3}]}))
    {'a.b': 1, 'c.0': 2, 'c.1.d': 3}
    """
    if isinstance(tree, dict):
        items = [(str(key), value) for key, value in tree.items() if key not in skip]
    elif isinstance(tree, list):
        items = [(str(place), value) for place, value in enumerate(tree)]
    else:
        yield path, tree
        return
    for key, value in items:
        yield from _leaves(value, f"{path}.{key}" if path else key)


def _keys(trees: Sequence[dict[str, Any]]) -> list[str]:
    """Keys of all, in the order in which they first come."""
    return list(dict.fromkeys(key for tree in trees for key in tree))


def _differences(specs: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    found = {key: [spec.get(key) for spec in specs] for key in _keys(specs)}
    return {key: values for key, values in found.items() if any(v != values[0] for v in values)}


def _metric(name: str, metrics: Sequence[dict[str, Any]]) -> dict[str, Any]:
    values = [metric.get(name) for metric in metrics]
    numbers = [v if isinstance(v, int | float) else float("nan") for v in values]
    base = numbers[0]
    return {
        "metric": name,
        "values": values,
        "delta": [_known(number - base) for number in numbers],
        "ratio": [_known(number / base) if base else None for number in numbers],
    }


def _known(number: float) -> float | None:
    return None if math.isnan(number) else number


def comparison_lines(comparison: dict[str, Any]) -> list[list[str]]:
    """Rows of text: the metric, the value of each run, and the ratio of each to the first."""
    return [
        [
            metric["metric"],
            *(_text(value) for value in metric["values"]),
            *("–" if r is None else f"{r:.3f}" for r in metric["ratio"][1:]),
        ]
        for metric in comparison["metrics"]
    ]


def _text(value: Any) -> str:
    """A value for people.

    >>> _text(None), _text(12345), _text(0.123456)
    ('–', '12,345', '0.1235')
    """
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def verdict(metric: str, ratio: float | None) -> str:
    """``good``, ``bad`` or nothing: whether a change by more than 1 % is for the better.

    >>> verdict("ttft_s.p50", 0.8), verdict("energy_j", 1.2), verdict("tokens.output", 2.0)
    ('good', 'bad', '')
    >>> verdict("ledger.carbon_kg", 0.8), verdict("ledger.by_class.chat.gpu_usd", 1.2)
    ('good', 'bad')
    """
    if ratio is None or abs(ratio - 1) <= 0.01:
        return ""
    if any(word in metric for word in _HIGHER_IS_BETTER):
        return "good" if ratio > 1 else "bad"
    if any(word in metric for word in _LOWER_IS_BETTER):
        return "good" if ratio < 1 else "bad"
    return ""


def write_comparison(sources: Sequence[Source], path: Path) -> Path:
    """A page with the runs' figures laid over each other, and the table."""
    recordings = [Recording.open(source) for source in sources]
    comparison = compare(recordings)
    runs = [Run(recording) for recording in recordings]
    labels = [run["run_id"] for run in comparison["runs"]]
    page = Page("Comparison of " + ", ".join(labels))
    invalid = [run["run_id"] for run in comparison["runs"] if not run["valid"]]
    page.head(tag("h1", "Comparison") + f'<div class="facts">{_badges(labels)}</div>')
    if invalid:
        text = "Not valid: " + ", ".join(invalid)
        page.head(f'<div class="banner"><strong>{tag("span", text)}</strong></div>')
    page.section("figures", "Figures", page.figures(figures.overlays(runs, labels)))
    page.section("spec", "What differs in the specs", _spec_table(comparison, labels))
    page.section("numbers", "Numbers", _metric_table(comparison, labels))
    path.write_text(page.html(), encoding="utf-8")
    return path


def _badges(labels: Sequence[str]) -> str:
    return "".join(
        f'<span class="badge" style="color:{COLOURS[i % len(COLOURS)]}">{tag("span", label)}</span>'
        for i, label in enumerate(labels)
    )


def _spec_table(comparison: dict[str, Any], labels: Sequence[str]) -> str:
    differences = comparison["spec_differences"]
    if not differences:
        return card(tag("p", "Nothing: the specs are the same.", "soft"))
    rows = [[key, *(_text(value) for value in values)] for key, values in differences.items()]
    return card(table(["", *labels], rows))


def _metric_table(comparison: dict[str, Any], labels: Sequence[str]) -> str:
    head = ["", *labels, *(f"{label} / {labels[0]}" for label in labels[1:])]
    lines = comparison_lines(comparison)
    body = []
    for metric, line in zip(comparison["metrics"], lines, strict=True):
        marks = [verdict(metric["metric"], ratio) for ratio in metric["ratio"][1:]]
        cells = [tag("td", line[0])] + [tag("td", text, "n") for text in line[1 : 1 + len(labels)]]
        cells += [
            f'<td class="n"><span class="badge {mark}">{tag("span", text)}</span></td>'
            for mark, text in zip(marks, line[1 + len(labels) :], strict=True)
        ]
        body.append(f"<tr>{''.join(cells)}</tr>")
    heads = "".join(tag("th", text, "n" if i else "") for i, text in enumerate(head))
    return card(f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(body)}</tbody></table>")
