"""Figures of a run, as plain Plotly trees: lines for few devices, bands and heat maps for many.

A figure is `Figure`: traces and a layout in Plotly's own vocabulary, without colours of text or
paper, which the page sets by its theme. No line has more than `series.MAX_POINTS` points and no
heat map more than `HEAT_ROWS` x `HEAT_BINS` cells, so a page of ten thousand GPUs stays light.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from testbed.analysis.energy import (
    SLOWING,
    THROTTLE_REASONS,
    Breach,
    RowPower,
    read_rows,
)
from testbed.analysis.latency import Requests, cumulative, read_requests
from testbed.analysis.layouts import read_layouts
from testbed.analysis.series import MAX_POINTS, edges, envelope, grid, spans
from testbed.analysis.summary import run_duration_s
from testbed.core.view import Bools, Floats
from testbed.recorder.reader import Recording
from testbed.recorder.tables import ITL_BINS, itl_edges_s, placement_words

HEAT_BINS = 400
HEAT_ROWS = 96
FEW = 4
"""Up to so many rows of racks get a figure each."""

INFERNO = [
    [place / 5, colour]
    for place, colour in enumerate(
        ["#000004", "#420a68", "#932667", "#dd513a", "#fca50a", "#fcffa4"]
    )
]
BLUE, ORANGE, GREEN, RED = "#3b82f6", "#f59e0b", "#10b981", "#ef4444"
PURPLE, CYAN, PINK, GREY = "#8b5cf6", "#06b6d4", "#ec4899", "#94a3b8"
COLOURS = [BLUE, ORANGE, GREEN, PURPLE, CYAN, PINK, "#84cc16", "#a16207"]
OUTCOME_COLOURS = {
    "sent": GREEN,
    "unchanged": GREY,
    "overruled": PURPLE,
    "refused": RED,
    "expired": ORANGE,
}


@dataclass(slots=True)
class Figure:
    """One figure of the page."""

    name: str
    title: str
    note: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    height: int = 280
    wide: bool = False
    over_time: bool = True
    """Zooming one figure over time zooms them all."""
    buttons: list[str] = field(default_factory=list)
    """Names of alternatives among the traces, of which one is shown."""


@dataclass
class Run:
    """A recording with what several figures need of it, each read once."""

    recording: Recording

    @cached_property
    def duration_s(self) -> float:
        """Length of the run."""
        return run_duration_s(self.recording)

    @cached_property
    def scale(self) -> tuple[float, str]:
        """Seconds per unit of the time axis, and its name."""
        if self.duration_s > 3 * 3600:
            return 3600.0, "h"
        return (60.0, "min") if self.duration_s > 1200 else (1.0, "s")

    @cached_property
    def edges_s(self) -> Floats:
        """Bins of time that heat maps and bands share."""
        # Whole numbers of samples in each bin, and edges between samples: else counters alias.
        spec = self.recording.manifest["spec"]
        period_s = max(spec["control"]["sample_period_s"], spec["record"]["gpu_period_s"])
        samples = max(1, math.ceil(self.duration_s / period_s / HEAT_BINS))
        bins = max(1, math.ceil((self.duration_s / period_s + 1) / samples))
        return np.asarray((np.arange(bins + 1) * samples - 0.5) * period_s, np.float64)

    @cached_property
    def mid(self) -> Floats:
        """Middles of the bins, in units of the time axis."""
        return self.time((self.edges_s[1:] + self.edges_s[:-1]) / 2)

    def time(self, t_s: Floats) -> Floats:
        """Seconds in units of the time axis."""
        return np.asarray(t_s) / self.scale[0]

    @cached_property
    def rows(self) -> RowPower:
        """Draw per row."""
        return read_rows(self.recording)

    @cached_property
    def breaches(self) -> list[Breach]:
        """Every breach."""
        return self.rows.breaches(self.duration_s)

    @cached_property
    def requests(self) -> Requests:
        """The requests."""
        return read_requests(self.recording)

    @cached_property
    def index(self) -> dict[str, Any]:
        """Names and places of the GPUs."""
        return self.recording.columns("gpu_index")

    @cached_property
    def info(self) -> dict[int, dict[str, Any]]:
        """What each GPU last said of itself."""
        rows = self.recording.table("gpu_info").to_pylist()
        return {row["gpu"]: row for row in rows}

    def gpus(self, column: str) -> Floats:
        """A quantity of the GPUs in bins of time: ``[bin, gpu]``."""
        return self._grids("gpus", "gpu", column, len(self.index["name"]))

    def instances(self, column: str) -> Floats:
        """A quantity of the instances in bins of time: ``[bin, instance]``."""
        num = len(self.recording.columns("instance_index", "name")["name"])
        return self._grids("instances", "instance", column, num)

    def _grids(self, table: str, key: str, column: str, num: int) -> Floats:
        cache = self.__dict__.setdefault("_cache", {})
        if (table, column) not in cache:
            if table not in cache:
                cache[table] = self.recording.columns(table, "t_s", key)
            values = self.recording.columns(table, column)[column]
            at = cache[table]
            cache[table, column] = grid(at["t_s"], at[key], values, num, self.edges_s)
        return np.asarray(cache[table, column])

    @cached_property
    def limit_max_w(self) -> Floats:
        """Highest limit of each GPU, as it said when it joined."""
        num = len(self.index["name"])
        found = [self.info.get(g, {}).get("power_limit_default_w", np.nan) for g in range(num)]
        return np.asarray(found, np.float64)

    @cached_property
    def safe_w(self) -> Floats:
        """What each row would draw at most if every node were cut off."""
        num = len(self.index["name"])
        found = [self.info.get(g, {}).get("safe_power_limit_w", np.nan) for g in range(num)]
        return np.asarray(np.bincount(self.index["row"], found, len(self.rows.name)))

    @cached_property
    def capped(self) -> Bools:
        """In which bins a limit below its default held somewhere in each row: ``[bin, row]``."""
        num_rows = len(self.rows.name)
        if not len(self.index["name"]):
            return np.zeros((len(self.edges_s) - 1, num_rows), bool)
        low = self.gpus("power_limit_enforced_w") < self.limit_max_w - 0.5
        return np.stack(
            [low[:, self.index["row"] == row].any(axis=1) for row in range(num_rows)], axis=1
        )

    def capped_at(self, t_s: Floats, row: Any) -> Bools:
        """Whether a row was capped at a time."""
        place = np.clip(np.searchsorted(self.edges_s, t_s, "right") - 1, 0, len(self.capped) - 1)
        return np.asarray(self.capped[place, row])


# Power.


def power(run: Run) -> list[Figure]:
    """Draw against budget: one figure per row, or the cluster and a heat map of many rows."""
    count = len(run.rows.name)
    if not len(run.rows.t_s):
        return []
    if count <= FEW:
        return [_row_power(run, row) for row in range(count)]
    peak = np.max(run.rows.draw_w / run.rows.budget_w, axis=0)
    fullest = int(np.argmax(np.where(np.isfinite(peak), peak, 0)))
    return [_cluster_power(run), _row_power(run, fullest, "the fullest row"), _row_heat(run)]


def _row_power(run: Run, row: int, what: str = "") -> Figure:
    rows = run.rows
    budget_w = rows.budget_w[:, row]
    data = [
        _line(*_thin(run, rows.instant_w[:, row]), "instantaneous", GREY, width=1, opacity=0.45),
        _line(*_thin(run, rows.draw_w[:, row]), "1-second mean", BLUE, width=2.2),
    ]
    limits_w = _row_limits_w(run, row)
    if limits_w is not None:
        data.append(_line(run.mid, limits_w, "sum of enforced limits", ORANGE, shape="hv"))
    data += _levels(run, budget_w, float(run.safe_w[row]) if len(run.safe_w) > row else np.nan)
    shapes = [
        _band(run, start, end, ORANGE, 0.10)
        for start, end in spans(run.capped[:, row], run.edges_s[:-1], run.duration_s)
    ]
    shapes += [_band(run, b.start_s, b.end_s, RED, 0.28) for b in run.breaches if b.row == row]
    own = [b for b in run.breaches if b.row == row]
    note = "Shaded: a cap is set. "
    if own:
        longest_s = max(b.s for b in own)
        worst_w = max(b.max_over_w for b in own)
        note += (
            f"Red: over budget, {len(own)} times, {sum(b.s for b in own):.1f} s in all, "
            f"{longest_s:.1f} s at the longest, by up to {worst_w:.0f} W."
        )
    elif np.isfinite(budget_w).any():
        note += "Never over budget."
    title = f"{rows.name[row]}" + (f", {what}" if what else "")
    layout = {"yaxis": _axis("", " W", rangemode="tozero"), "shapes": shapes[:400]}
    return Figure(f"power{row}", f"Power of {title}", note, data, _timed(run, layout), 320, True)


def _row_limits_w(run: Run, row: int) -> Floats | None:
    members = run.index["row"] == row
    if not members.any():
        return None
    return np.asarray(run.gpus("power_limit_enforced_w")[:, members].sum(axis=1))


def _levels(run: Run, budget_w: Floats, safe_w: float) -> list[dict[str, Any]]:
    """The budget, and the draw at the safe caps."""
    ends = run.time(np.array([0.0, run.duration_s]))
    data = []
    if np.isfinite(budget_w).all() and (budget_w == budget_w[0]).all():
        data.append(_line(ends, [budget_w[0]] * 2, "budget", RED, dash="dash"))
    elif np.isfinite(budget_w).any():
        data.append(_line(*_thin(run, budget_w), "budget", RED, dash="dash", shape="hv"))
    if np.isfinite(safe_w) and safe_w > 0:
        data.append(_line(ends, [safe_w] * 2, "sum of safe caps", GREEN, dash="dot"))
    return data


def _cluster_power(run: Run) -> Figure:
    total_w = run.rows.total_w
    data = [
        _line(*_thin(run, run.rows.instant_w.sum(axis=1)), "instantaneous", GREY, 1, opacity=0.45),
        _line(*_thin(run, total_w), "1-second mean", BLUE, width=2.2),
        *_levels(run, run.rows.budget_w.sum(axis=1), float(run.safe_w.sum())),
    ]
    layout = {"yaxis": _axis("", " W", rangemode="tozero")}
    return Figure(
        "power", f"Power of all {len(run.rows.name)} rows", "", data, _timed(run, layout), 320, True
    )


def _row_heat(run: Run) -> Figure:
    num = len(run.rows.name)
    t_s = np.repeat(run.rows.t_s, num)
    key = np.tile(np.arange(num), len(run.rows.t_s))
    used = (run.rows.draw_w / run.rows.budget_w).ravel()
    limited = bool(np.isfinite(run.rows.budget_w).all())
    shown = used if limited else run.rows.draw_w.ravel()
    matrix = grid(t_s, key, shown, num, run.edges_s, "max")
    trace = _heat(run, matrix, run.rows.name, "of budget" if limited else "W", INFERNO)
    if limited:
        trace |= {"zmin": 0, "zmax": 1.05}
    title = "Draw of each row" + (" as a share of its budget" if limited else "")
    return Figure(
        "rows", title, "Highest 1-second mean in each bin.", [trace], _timed(run, {}), 420, True
    )


# GPUs.

GPU_QUANTITIES: list[tuple[str, str, str, str]] = [
    ("sm_clock_mhz", "SM clock", " MHz", PURPLE),
    ("temp_c", "Die temperature", " °C", RED),
    ("power_limit_enforced_w", "Enforced power limit", " W", ORANGE),
    ("power_avg_w", "Power, 1-second mean", " W", BLUE),
    ("gpu_busy_frac", "Busy", "", GREEN),
]


def gpus(run: Run) -> list[Figure]:
    """Clocks, temperatures, limits and throttling of the GPUs."""
    if not len(run.recording.columns("gpus", "t_s")["t_s"]):
        return []
    made = [
        Figure(
            name,
            title,
            "",
            _bands(run, run.gpus(name), colour, unit),
            _timed(run, {"yaxis": _axis("", unit)}),
        )
        for name, title, unit, colour in GPU_QUANTITIES[:3]
    ]
    return [*made, _throttle(run), _gpu_heat(run)]


def _throttle(run: Run) -> Figure:
    """Share of GPUs that each reason slows, over time."""
    table = run.recording.columns("gpus", "t_s", "throttle")
    one = np.zeros(len(table["t_s"]), np.int64)
    data = []
    colours = dict(zip(SLOWING, [ORANGE, RED, PINK, "#b91c1c", PURPLE], strict=True))
    for name in (*SLOWING, "gpu_idle"):
        on = (table["throttle"] & THROTTLE_REASONS[name]) != 0
        if not on.any():
            continue
        share = grid(table["t_s"], one, on.astype(np.float64), 1, run.edges_s)[:, 0]
        colour = colours.get(name, GREY)
        data.append(
            _line(run.mid, share, name, colour, width=1.2)
            | {"fill": "tozeroy", "fillcolor": _rgba(colour, 0.25)}
        )
    note = "Share of GPUs, by NVML's clocks event reasons."
    if not data:
        note = "No GPU was slowed or idle at any sample."
        data = [_line(run.mid, np.zeros(len(run.mid)), "none", GREY)]
    layout = {"yaxis": _axis("", "", range=[0, 1.02], tickformat=".0%")}
    return Figure("throttle", "Throttle reasons", note, data, _timed(run, layout))


def _gpu_heat(run: Run) -> Figure:
    """Every GPU over time, one quantity at a choice."""
    names = [str(name) for name in run.index["name"]]
    data = []
    for place, (name, title, unit, _) in enumerate(GPU_QUANTITIES[::-1]):
        matrix, labels = _gathered(run.gpus(name), names)
        scale: Any = "Viridis" if name != "temp_c" else INFERNO
        data.append(
            _heat(run, matrix, labels, unit.strip() or "share", scale)
            | {"name": title, "visible": place == 1}
        )
    shown = min(len(names), HEAT_ROWS)
    note = "" if len(names) <= HEAT_ROWS else f"Each line is the mean of {len(names) / shown:.0f}."
    return Figure(
        "gpu_heat",
        f"All {len(names)} GPUs",
        note,
        data,
        _timed(run, {}),
        int(np.clip(120 + 13 * shown, 260, 560)),
        True,
        buttons=[title for _, title, _, _ in GPU_QUANTITIES[::-1]],
    )


# Serving.


def serving(run: Run) -> list[Figure]:
    """Distributions of TTFT and of the gaps between tokens, and both over time."""
    made = []
    if len(run.requests.status):
        made += [_ttft_distribution(run), _itl_distribution(run), _ttft_over_time(run)]
        made.append(_arrivals(run))
    return [figure for figure in made if figure.data]


def _classes(run: Run) -> list[str]:
    return sorted({str(name) for name in run.requests.slo_class})


def _ttft_distribution(run: Run) -> Figure:
    data, shapes, marks = [], [], []
    for place, name in enumerate(_classes(run)):
        inside = run.requests.slo_class == name
        colour = COLOURS[place % len(COLOURS)]
        value_s, share = cumulative(run.requests.ttft_s[inside])
        if len(value_s):
            data.append(_line(value_s, share, name, colour, 2))
        limit_s = float(run.requests.ttft_limit_s[inside][0])
        shapes.append(_mark(limit_s, colour))
        marks.append(_label(np.log10(limit_s), f"SLO {limit_s:g} s", colour, place))
    layout = {
        "xaxis": _log_axis(1.0, " s"),
        "yaxis": _axis("", "", range=[0, 1.02], tickformat=".0%"),
        "shapes": shapes,
        "annotations": marks,
        "hovermode": "closest",
    }
    note = "Cumulative share of requests per class, as the client saw it."
    return Figure("ttft", "Time to first token", note, data, layout, 320, over_time=False)


def itl_by_pool(recording: Recording) -> dict[str, Any]:
    """Counts of gaps between tokens per pool and bin."""
    table = recording.columns("itl", "instance", "bin", "count")
    index = recording.columns("instance_index", "pool_index")["pool_index"]
    pool = index[table["instance"]] if len(table["bin"]) else index[:0]
    if recording.spec.cluster.elastic and len(table["bin"]):
        layouts = read_layouts(recording)
        t_s = recording.columns("itl", "t_s")["t_s"]
        pool = layouts.pool[layouts.at(table["instance"].astype(np.int64), t_s)]
    pools = [str(name) for name in recording.columns("pool_index", "name")["name"]]
    found = {}
    for place, name in enumerate(pools):
        inside = pool == place
        counts = np.bincount(table["bin"][inside], table["count"][inside], ITL_BINS)
        if counts.any():
            found[name] = counts
    return found


def _itl_distribution(run: Run) -> Figure:
    edges_s = itl_edges_s()
    middle_s = np.sqrt(edges_s[1:] * edges_s[:-1])
    data, shapes, marks = [], [], []
    for place, (name, counts) in enumerate(itl_by_pool(run.recording).items()):
        colour = COLOURS[place % len(COLOURS)]
        used = np.flatnonzero(counts)
        part = slice(used[0], used[-1] + 1)
        # Three bins together: 6 % wide, smooth to the eye and still narrower than any mode.
        smooth = np.convolve(counts, np.ones(3) / 3, "same")[part] / counts.sum()
        data.append(
            _line(middle_s[part] * 1e3, smooth, name, colour, 1.8)
            | {"fill": "tozeroy", "fillcolor": _rgba(colour, 0.15), "hovertemplate": "%{x:.3g} ms"}
        )
    for place, entry in enumerate(run.recording.manifest["spec"]["slo_class"]):
        colour = COLOURS[place % len(COLOURS)]
        limit_ms = entry["tpot_s"] * 1e3
        shapes.append(_mark(limit_ms, colour))
        marks.append(_label(np.log10(limit_ms), f"{entry['name']} SLO", colour, place))
    layout = {
        "xaxis": _log_axis(1e3, " ms"),
        "yaxis": _axis("", "", rangemode="tozero", tickformat=".1%"),
        "shapes": shapes,
        "annotations": marks,
        "hovermode": "closest",
    }
    note = "Share of gaps in each 2 %. Lines: SLO on a request's mean time per token."
    return Figure("itl", "Inter-token latency", note, data, layout, 320, over_time=False)


def _ttft_over_time(run: Run) -> Figure:
    """Median and p99 in a few dozen bins of arrival time."""
    bins = edges(run.duration_s, int(np.clip(run.duration_s / 2, 4, 60)))
    middle = run.time((bins[1:] + bins[:-1]) / 2)
    data = []
    for place, name in enumerate(_classes(run)):
        colour = COLOURS[place % len(COLOURS)]
        inside = (run.requests.slo_class == name) & ~np.isnan(run.requests.ttft_s)
        for share, dash, label in ((0.5, "solid", "p50"), (0.99, "dot", "p99")):
            line = _binned(run.requests.arrival_s[inside], run.requests.ttft_s[inside], bins, share)
            data.append(
                _line(middle, line, f"{name} {label}", colour, 1.8, dash=dash)
                | {"connectgaps": True}
            )
    shapes = _cap_bands(run)
    layout = {"yaxis": _axis("", " s", rangemode="tozero"), "shapes": shapes}
    note = "By time of arrival." + (" Shaded: a cap is set in some row." if shapes else "")
    return Figure("ttft_time", "TTFT over time", note, data, _timed(run, layout))


def _binned(t_s: Floats, value: Floats, bins: Floats, share: float) -> Floats:
    place = np.searchsorted(bins, t_s, "right") - 1
    order = np.argsort(place, kind="stable")
    groups = np.split(value[order], np.searchsorted(place[order], np.arange(1, len(bins) - 1)))
    return np.array([np.quantile(group, share) if len(group) else np.nan for group in groups])


def _arrivals(run: Run) -> Figure:
    bins = edges(run.duration_s, int(np.clip(run.duration_s, 4, 200)))
    middle = run.time((bins[1:] + bins[:-1]) / 2)
    width_s = bins[1] - bins[0]
    data = []
    for place, name in enumerate(_classes(run)):
        inside = run.requests.slo_class == name
        rate = np.histogram(run.requests.arrival_s[inside], bins)[0] / width_s
        colour = COLOURS[place % len(COLOURS)]
        data.append(
            _line(middle, rate, name, colour, 1.2, shape="hvh")
            | {"stackgroup": "one", "fillcolor": _rgba(colour, 0.35)}
        )
    layout = {"yaxis": _axis("", " /s", rangemode="tozero")}
    return Figure("arrivals", "Arrivals", "Requests per second.", data, _timed(run, layout))


def instances(run: Run) -> list[Figure]:
    """Batch, queue and KV use of the serving instances."""
    names = [str(n) for n in run.recording.columns("instance_index", "name")["name"]]
    if not names or not len(run.recording.columns("instances", "t_s")["t_s"]):
        return []
    quantities = [
        ("num_running", "Running sequences", "", BLUE),
        ("num_waiting", "Waiting sequences", "", ORANGE),
        ("kv_used_frac", "KV cache in use", "", GREEN),
    ]
    made = []
    for name, title, unit, colour in quantities:
        axis = _axis("", unit, rangemode="tozero")
        if name.endswith("_frac"):
            axis |= {"tickformat": ".0%", "range": [0, 1.02]}
        bands = _bands(run, run.instances(name), colour, unit)
        made.append(Figure(name, title, "Per instance.", bands, _timed(run, {"yaxis": axis})))
    data = []
    for place, (name, title, _, _) in enumerate(quantities):
        matrix, labels = _gathered(run.instances(name), names)
        data.append(
            _heat(run, matrix, labels, "", "Viridis") | {"name": title, "visible": place == 0}
        )
    shown = min(len(names), HEAT_ROWS)
    heat = Figure(
        "instance_heat",
        f"All {len(names)} instances",
        "" if len(names) == shown else f"Each line is the mean of {len(names) / shown:.0f}.",
        data,
        _timed(run, {}),
        int(np.clip(120 + 13 * shown, 260, 560)),
        True,
        buttons=[title for _, title, _, _ in quantities],
    )
    tokens = _tokens(run)
    return [*made, tokens, heat]


def _tokens(run: Run) -> Figure:
    """Tokens per second of all instances, from their counters."""
    data = []
    width_s = float(run.edges_s[1] - run.edges_s[0])
    for name, title, colour in (
        ("prompt_tokens_total", "prompt", PURPLE),
        ("output_tokens_total", "output", BLUE),
    ):
        total = run.instances(name)
        rate = np.maximum(np.diff(np.nan_to_num(total), axis=0), 0).sum(axis=1) / width_s
        span = min(max(1, round(1.0 / width_s)), len(rate))
        smooth = np.convolve(rate, np.ones(span), "same")
        smooth /= np.convolve(np.ones(len(rate)), np.ones(span), "same")
        data.append(_line(run.mid[1:], smooth, title, colour, 1.8))
    layout = {"yaxis": _axis("", " /s", rangemode="tozero")}
    return Figure("tokens", "Tokens per second", "All instances.", data, _timed(run, layout))


# Memory tenants.


def tenants(run: Run) -> list[Figure]:
    """Limits, working sets, pressure and faults of the tenants of host memory."""
    table = run.recording.columns("tenants")
    index = run.recording.columns("tenant_index")
    num = len(index["name"])
    if not num or not len(table["t_s"]):
        return []

    def of(column: str) -> Floats:
        return grid(table["t_s"], table["tenant_index"], table[column], num, run.edges_s)

    gib = 2.0**30
    data = [
        _line(run.mid, np.nansum(of(column), axis=1) / gib, title, colour, 2, dash=dash)
        for column, title, colour, dash in (
            ("limit_bytes", "limit", ORANGE, "solid"),
            ("working_set_bytes", "working set", PURPLE, "solid"),
            ("current_bytes", "resident", BLUE, "solid"),
            ("swap_bytes", "swapped out", RED, "solid"),
        )
    ]
    ends = run.time(np.array([0.0, run.duration_s]))
    for column, title in (("memory_bytes", "sold"), ("guaranteed_bytes", "guaranteed")):
        data.append(_line(ends, [index[column].sum() / gib] * 2, title, GREY, 1.4, dash="dot"))
    memory = Figure(
        "memory",
        f"Memory of {num} tenants",
        "Sums over all tenants.",
        data,
        _timed(run, {"yaxis": _axis("", " GiB", rangemode="tozero")}),
        320,
        True,
    )
    share = {"yaxis": _axis("", "", rangemode="tozero", tickformat=".0%")}
    width_s = float(run.edges_s[1] - run.edges_s[0])
    faults = np.maximum(np.diff(np.nan_to_num(of("major_faults_total")), axis=0), 0) / width_s
    return [
        memory,
        Figure(
            "psi",
            "Memory pressure",
            "Share of time that some task stalls (PSI some).",
            _bands(run, of("pressure_some_frac"), PURPLE, ""),
            _timed(run, share),
        ),
        Figure(
            "slowdown",
            "Slowdown of tenants",
            "Share of speed lost.",
            _bands(run, of("slowdown_frac"), RED, ""),
            _timed(run, share),
        ),
        Figure(
            "faults",
            "Major faults",
            "All tenants.",
            [_line(run.mid[1:], faults.sum(axis=1), "major faults", ORANGE)],
            _timed(run, {"yaxis": _axis("", " /s", rangemode="tozero")}),
            wide=True,
        ),
    ]


# Control.


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
                "x": numbers(run.time(np.array([order.t_s for order in own]))),
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
    layout = _timed(run, {"yaxis": {"automargin": True, "type": "category"}})
    layout["hovermode"] = "closest"
    note = "One mark per command; larger for more targets."
    return [Figure("commands", "Commands", note, data, layout, 130 + 42 * policies, True)]


# Pieces.


def numbers(values: Any) -> list[float | None]:
    """Plain numbers of five digits, None for what is not finite.

    >>> numbers(np.array([1.23456789, np.nan]))
    [1.2346, None]
    """
    array = np.asarray(values, np.float64)
    finite = np.isfinite(array)
    safe = np.where(finite & (array != 0), array, 1.0)
    digits = 10.0 ** (4 - np.floor(np.log10(np.abs(safe))))
    rounded = np.where(array == 0, 0.0, np.round(safe * digits) / digits)
    return [float(f"{v:.6g}") if ok else None for v, ok in zip(rounded, finite, strict=True)]


def _line(
    x: Any,
    y: Any,
    name: str,
    colour: str,
    width: float = 1.6,
    *,
    dash: str = "solid",
    shape: str = "linear",
    opacity: float = 1.0,
) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": _times(x),
        "y": numbers(y),
        "opacity": opacity,
        "line": {"color": colour, "width": width, "dash": dash, "shape": shape},
    }


def _times(x: Any) -> list[float]:
    """Places on an axis, to seven digits: times need more than values do."""
    return [float(f"{value:.7g}") for value in x]


def _thin(run: Run, value: Floats) -> tuple[Floats, Floats]:
    t_s, thin = envelope(run.rows.t_s, value)
    return run.time(t_s), thin


def _bands(run: Run, matrix: Floats, colour: str, unit: str) -> list[dict[str, Any]]:
    """Median of all devices over time, with the middle half and the whole range around it."""
    with np.errstate(invalid="ignore"):
        known = matrix[~np.isnan(matrix).all(axis=1)]
        mid = run.mid[~np.isnan(matrix).all(axis=1)]
        low, quarter, half, three, high = np.nanquantile(known, [0, 0.25, 0.5, 0.75, 1], axis=1)
    if matrix.shape[1] == 1:
        return [_line(mid, half, "value", colour, 1.8)]
    area = {"fill": "tonexty", "hoverinfo": "skip"}
    none = {"hoverinfo": "skip", "showlegend": False}
    return [
        _line(mid, low, "lowest", colour, 0) | none,
        _line(mid, high, "all", colour, 0) | area | {"fillcolor": _rgba(colour, 0.14)},
        _line(mid, quarter, "quarter", colour, 0) | none,
        _line(mid, three, "middle half", colour, 0) | area | {"fillcolor": _rgba(colour, 0.30)},
        _line(mid, half, "median", colour, 2),
    ]


def _heat(
    run: Run, matrix: Floats, labels: Sequence[str], unit: str, colours: Any
) -> dict[str, Any]:
    return {
        "type": "heatmap",
        "x": _times(run.mid),
        "y": list(labels),
        "z": [numbers(column) for column in matrix.T],
        "colorscale": colours,
        "colorbar": {"title": {"text": unit}, "thickness": 10, "outlinewidth": 0},
        "hovertemplate": "%{y}<br>%{x}<br>%{z} " + unit + "<extra></extra>",
    }


def _gathered(matrix: Floats, names: Sequence[str]) -> tuple[Floats, list[str]]:
    """At most HEAT_ROWS columns: means of neighbours, named by the first of them."""
    if len(names) <= HEAT_ROWS:
        return matrix, list(names)
    starts = np.linspace(0, len(names), HEAT_ROWS, endpoint=False).astype(int)
    sizes = np.diff(np.append(starts, len(names)))
    means = np.add.reduceat(np.nan_to_num(matrix), starts, axis=1) / sizes
    return means, [f"{names[start]} +{size - 1}" for start, size in zip(starts, sizes, strict=True)]


def _timed(run: Run, layout: dict[str, Any]) -> dict[str, Any]:
    unit = run.scale[1]
    end = run.duration_s / run.scale[0]
    return layout | {"xaxis": _axis("", f" {unit}", range=[0, end]), "hovermode": "x unified"}


def _axis(title: str, suffix: str, **more: Any) -> dict[str, Any]:
    axis: dict[str, Any] = {"ticksuffix": suffix, "automargin": True, **more}
    return axis | ({"title": {"text": title}} if title else {})


def _log_axis(per_s: float, suffix: str) -> dict[str, Any]:
    """A logarithmic axis of times with 1, 2 and 5 of every decade from 0.1 ms to 1,000 s."""
    ticks = [digit * 10.0**decade * per_s for decade in range(-4, 4) for digit in (1, 2, 5)]
    labels = [f"{tick:g}{suffix}" for tick in ticks]
    return {"type": "log", "tickvals": ticks, "ticktext": labels, "automargin": True}


def _band(run: Run, start_s: float, end_s: float, colour: str, opacity: float) -> dict[str, Any]:
    return {
        "type": "rect",
        "xref": "x",
        "yref": "paper",
        "x0": start_s / run.scale[0],
        "x1": end_s / run.scale[0],
        "y0": 0,
        "y1": 1,
        "fillcolor": colour,
        "opacity": opacity,
        "line": {"width": 0},
        "layer": "below",
    }


def _cap_bands(run: Run) -> list[dict[str, Any]]:
    capped = np.asarray(run.capped.any(axis=1), np.bool_)
    found = spans(capped, run.edges_s[:-1], run.duration_s)
    return [_band(run, start, end, ORANGE, 0.10) for start, end in found[:400]]


def _mark(x: float, colour: str) -> dict[str, Any]:
    line = {"color": colour, "width": 1.5, "dash": "dash"}
    return {"type": "line", "yref": "paper", "x0": x, "x1": x, "y0": 0, "y1": 1, "line": line}


def _label(x: float, text: str, colour: str, place: int) -> dict[str, Any]:
    return {
        "x": x,
        "y": 0.99 - 0.09 * (place % 8),
        "yref": "paper",
        "text": text,
        "showarrow": False,
        "xanchor": "left",
        "xshift": 3,
        "font": {"color": colour, "size": 11},
    }


def _rgba(colour: str, opacity: float) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


# Several runs.


def overlays(runs: Sequence[Run], labels: Sequence[str]) -> list[Figure]:
    """Power, TTFT and gaps between tokens of several runs, one colour each."""
    longest = max(runs, key=lambda run: run.duration_s)
    watts, first, gaps = [], [], []
    edges_s = itl_edges_s()
    for place, (run, label) in enumerate(zip(runs, labels, strict=True)):
        colour = COLOURS[place % len(COLOURS)]
        if len(run.rows.t_s):
            t_s, total_w = envelope(run.rows.t_s, run.rows.total_w)
            watts.append(_line(longest.time(t_s), total_w, label, colour, 1.8))
        value_s, share = cumulative(run.requests.ttft_s)
        first.append(_line(value_s, share, label, colour, 2))
        counts = sum(itl_by_pool(run.recording).values())
        if np.any(counts):
            below = np.cumsum(counts) / np.sum(counts)
            used = np.flatnonzero(counts)
            part = slice(max(used[0] - 1, 0), used[-1] + 1)
            gaps.append(_line(edges_s[1:][part] * 1e3, below[part], label, colour, 2))
    share_axis = _axis("", "", range=[0, 1.02], tickformat=".0%")
    power_layout = _timed(longest, {"yaxis": _axis("", " W", rangemode="tozero")})
    ttft_layout = {"xaxis": _log_axis(1.0, " s"), "yaxis": share_axis, "hovermode": "closest"}
    itl_layout = {
        "xaxis": _log_axis(1e3, " ms"),
        "yaxis": share_axis,
        "hovermode": "closest",
    }
    note = "Cumulative share."
    made = [
        Figure("power", "Power of the cluster, 1-second mean", "", watts, power_layout, 320, True),
        Figure("ttft", "Time to first token", note, first, ttft_layout, 320, over_time=False),
        Figure("itl", "Gap between tokens", note, gaps, itl_layout, 320, over_time=False),
    ]
    return [figure for figure in made if figure.data]
