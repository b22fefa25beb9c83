"""What policies asked for and what became of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from testbed.analysis import drawing as draw
from testbed.analysis.drawing import (
    GREY,
    OUTCOME_COLOURS,
    Figure,
)
from testbed.analysis.run import Run
from testbed.analysis.series import MAX_POINTS
from testbed.recorder.reader import Recording
from testbed.recorder.tables import placement_words


@dataclass(frozen=True, slots=True)
class Order:
    """Commands of one policy in one step that share an outcome, over their targets."""

    t_s: float
    policy: str
    precedence: str
    kind: str
    targets: list[str]
    low: float
    high: float
    outcome: str
    winner: str
    why: str


def orders(recording: Recording) -> list[Order]:
    """The commands table with the targets of one command gathered."""
    table = recording.columns("commands")
    found: dict[tuple[Any, ...], list[int]] = {}
    keys = zip(
        table["t_s"],
        table["step"],
        table["policy_index"],
        table["command"],
        table["kind"],
        table["outcome"],
        table["winner"],
        table["why"],
        strict=True,
    )
    for place, key in enumerate(keys):
        found.setdefault(key, []).append(place)
    return [
        Order(
            t_s=float(table["t_s"][places[0]]),
            policy=str(table["policy"][places[0]]),
            precedence=str(table["precedence"][places[0]]),
            kind=str(table["kind"][places[0]]),
            targets=[str(name) for name in table["target"][places]],
            low=float(table["value"][places].min()),
            high=float(table["value"][places].max()),
            outcome=str(table["outcome"][places[0]]),
            winner=str(table["winner"][places[0]]),
            why=str(table["why"][places[0]]),
        )
        for places in found.values()
    ]


VALUE_WORDS: dict[str, Callable[[float], str]] = {
    "power_limit": lambda value: f"{value:.4g} W",
    "sm_clock_lock": lambda value: f"{value:.0f} MHz" if value else "unlocked",
    "memory_limit": lambda value: f"{value / 2**20:,.0f} MiB",
    "drain": lambda value: "drain" if value else "resume",
    "max_num_seqs": lambda value: f"batch of {value:.0f}" if value else "the pool's batch",
    "queue_order": lambda value: "by deadline" if value else "by arrival",
    "recall": lambda value: "recall",
    "squash": lambda value: f"squash after {value:g} x TTFT",
    "place_vm": lambda value: f"on node {value:.0f}",
    "layout_snapshot": placement_words,
    "layout_cold": lambda value: f"{placement_words(value)}, cold",
}


def value_words(order: Order) -> str:
    """The value of an order with its unit; a range where the targets differ."""
    say = VALUE_WORDS[order.kind]
    if order.low == order.high:
        return say(order.low)
    return f"{say(order.low)} to {say(order.high)}"


def commands(run: Run, made: Sequence[Order]) -> list[Figure]:
    """Who asked when, and what became of it."""
    if not made:
        return []
    every = max(1, len(made) // MAX_POINTS)
    shown = made[::every]
    data = []
    for outcome in sorted({order.outcome for order in shown}):
        own = [order for order in shown if order.outcome == outcome]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": outcome,
                "x": draw.numbers(run.time(np.array([order.t_s for order in own]))),
                "y": [order.policy for order in own],
                "text": [
                    f"{value_words(o)} for {len(o.targets)} ({o.why})"
                    if o.why
                    else f"{value_words(o)} for {len(o.targets)}"
                    for o in own
                ],
                "hovertemplate": "%{text}<extra>%{y}</extra>",
                "marker": {
                    "color": OUTCOME_COLOURS.get(outcome, GREY),
                    "size": [float(6 + 2 * np.log2(len(o.targets))) for o in own],
                    "symbol": "circle"
                    if outcome == "sent"
                    else "x-thin-open"
                    if outcome in ("refused", "expired")
                    else "circle-open",
                    "line": {"width": 1.5, "color": OUTCOME_COLOURS.get(outcome, GREY)},
                    "opacity": 0.85,
                },
            }
        )
    policies = len({order.policy for order in shown})
    layout = draw.timed(run, {"yaxis": {"automargin": True, "type": "category"}})
    layout["hovermode"] = "closest"
    note = "One mark per command; larger for more targets."
    return [Figure("commands", "Commands", note, data, layout, 130 + 42 * policies, True)]
