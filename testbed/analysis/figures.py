"""Figures of a run, as plain Plotly trees: lines for few devices, bands and heat maps for many.

A figure is `Figure`: traces and a layout in Plotly's own vocabulary, without colours of text or
paper, which the page sets by its theme. No line has more than `series.MAX_POINTS` points and no
heat map more than `HEAT_ROWS` x `HEAT_BINS` cells, so a page of ten thousand GPUs stays light.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from testbed.analysis import drawing as draw
from testbed.analysis.drawing import (
    BLUE,
    COLOURS,
    FEW,
    GREEN,
    GREY,
    HEAT_ROWS,
    INFERNO,
    ORANGE,
    PINK,
    PURPLE,
    RED,
    Figure,
)
from testbed.analysis.energy import (
    SLOWING,
    THROTTLE_REASONS,
)
from testbed.analysis.latency import cumulative
from testbed.analysis.layouts import read_layouts
from testbed.analysis.run import Run
from testbed.analysis.series import edges, envelope, grid, spans
from testbed.core.view import Floats
from testbed.recorder.reader import Recording
from testbed.recorder.tables import ITL_BINS, itl_edges_s

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
        draw.line(
            *draw.thin(run, rows.instant_w[:, row]), "instantaneous", GREY, width=1, opacity=0.45
        ),
        draw.line(*draw.thin(run, rows.draw_w[:, row]), "1-second mean", BLUE, width=2.2),
    ]
    limits_w = _row_limits_w(run, row)
    if limits_w is not None:
        data.append(draw.line(run.mid, limits_w, "sum of enforced limits", ORANGE, shape="hv"))
    data += _levels(run, budget_w, float(run.safe_w[row]) if len(run.safe_w) > row else np.nan)
    shapes = [
        draw.band(run, start, end, ORANGE, 0.10)
        for start, end in spans(run.capped[:, row], run.edges_s[:-1], run.duration_s)
    ]
    shapes += [draw.band(run, b.start_s, b.end_s, RED, 0.28) for b in run.breaches if b.row == row]
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
    layout = {"yaxis": draw.axis("", " W", rangemode="tozero"), "shapes": shapes[:400]}
    return Figure(
        f"power{row}", f"Power of {title}", note, data, draw.timed(run, layout), 320, True
    )


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
        data.append(draw.line(ends, [budget_w[0]] * 2, "budget", RED, dash="dash"))
    elif np.isfinite(budget_w).any():
        data.append(draw.line(*draw.thin(run, budget_w), "budget", RED, dash="dash", shape="hv"))
    if np.isfinite(safe_w) and safe_w > 0:
        data.append(draw.line(ends, [safe_w] * 2, "sum of safe caps", GREEN, dash="dot"))
    return data


def _cluster_power(run: Run) -> Figure:
    total_w = run.rows.total_w
    data = [
        draw.line(
            *draw.thin(run, run.rows.instant_w.sum(axis=1)), "instantaneous", GREY, 1, opacity=0.45
        ),
        draw.line(*draw.thin(run, total_w), "1-second mean", BLUE, width=2.2),
        *_levels(run, run.rows.budget_w.sum(axis=1), float(run.safe_w.sum())),
    ]
    layout = {"yaxis": draw.axis("", " W", rangemode="tozero")}
    return Figure(
        "power",
        f"Power of all {len(run.rows.name)} rows",
        "",
        data,
        draw.timed(run, layout),
        320,
        True,
    )


def _row_heat(run: Run) -> Figure:
    num = len(run.rows.name)
    t_s = np.repeat(run.rows.t_s, num)
    key = np.tile(np.arange(num), len(run.rows.t_s))
    used = (run.rows.draw_w / run.rows.budget_w).ravel()
    limited = bool(np.isfinite(run.rows.budget_w).all())
    shown = used if limited else run.rows.draw_w.ravel()
    matrix = grid(t_s, key, shown, num, run.edges_s, "max")
    trace = draw.heat(run, matrix, run.rows.name, "of budget" if limited else "W", INFERNO)
    if limited:
        trace |= {"zmin": 0, "zmax": 1.05}
    title = "Draw of each row" + (" as a share of its budget" if limited else "")
    return Figure(
        "rows", title, "Highest 1-second mean in each bin.", [trace], draw.timed(run, {}), 420, True
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
            draw.bands(run, run.gpus(name), colour, unit),
            draw.timed(run, {"yaxis": draw.axis("", unit)}),
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
            draw.line(run.mid, share, name, colour, width=1.2)
            | {"fill": "tozeroy", "fillcolor": draw.rgba(colour, 0.25)}
        )
    note = "Share of GPUs, by NVML's clocks event reasons."
    if not data:
        note = "No GPU was slowed or idle at any sample."
        data = [draw.line(run.mid, np.zeros(len(run.mid)), "none", GREY)]
    layout = {"yaxis": draw.axis("", "", range=[0, 1.02], tickformat=".0%")}
    return Figure("throttle", "Throttle reasons", note, data, draw.timed(run, layout))


def _gpu_heat(run: Run) -> Figure:
    """Every GPU over time, one quantity at a choice."""
    names = [str(name) for name in run.index["name"]]
    data = []
    for place, (name, title, unit, _) in enumerate(GPU_QUANTITIES[::-1]):
        matrix, labels = draw.gathered(run.gpus(name), names)
        scale: Any = "Viridis" if name != "temp_c" else INFERNO
        data.append(
            draw.heat(run, matrix, labels, unit.strip() or "share", scale)
            | {"name": title, "visible": place == 1}
        )
    shown = min(len(names), HEAT_ROWS)
    note = "" if len(names) <= HEAT_ROWS else f"Each line is the mean of {len(names) / shown:.0f}."
    return Figure(
        "gpu_heat",
        f"All {len(names)} GPUs",
        note,
        data,
        draw.timed(run, {}),
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
            data.append(draw.line(value_s, share, name, colour, 2))
        limit_s = float(run.requests.ttft_limit_s[inside][0])
        shapes.append(draw.mark(limit_s, colour))
        marks.append(draw.label(np.log10(limit_s), f"SLO {limit_s:g} s", colour, place))
    layout = {
        "xaxis": draw.log_axis(1.0, " s"),
        "yaxis": draw.axis("", "", range=[0, 1.02], tickformat=".0%"),
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
            draw.line(middle_s[part] * 1e3, smooth, name, colour, 1.8)
            | {
                "fill": "tozeroy",
                "fillcolor": draw.rgba(colour, 0.15),
                "hovertemplate": "%{x:.3g} ms",
            }
        )
    for place, entry in enumerate(run.recording.manifest["spec"]["slo_class"]):
        colour = COLOURS[place % len(COLOURS)]
        limit_ms = entry["tpot_s"] * 1e3
        shapes.append(draw.mark(limit_ms, colour))
        marks.append(draw.label(np.log10(limit_ms), f"{entry['name']} SLO", colour, place))
    layout = {
        "xaxis": draw.log_axis(1e3, " ms"),
        "yaxis": draw.axis("", "", rangemode="tozero", tickformat=".1%"),
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
                draw.line(middle, line, f"{name} {label}", colour, 1.8, dash=dash)
                | {"connectgaps": True}
            )
    shapes = draw.cap_bands(run)
    layout = {"yaxis": draw.axis("", " s", rangemode="tozero"), "shapes": shapes}
    note = "By time of arrival." + (" Shaded: a cap is set in some row." if shapes else "")
    return Figure("ttft_time", "TTFT over time", note, data, draw.timed(run, layout))


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
            draw.line(middle, rate, name, colour, 1.2, shape="hvh")
            | {"stackgroup": "one", "fillcolor": draw.rgba(colour, 0.35)}
        )
    layout = {"yaxis": draw.axis("", " /s", rangemode="tozero")}
    return Figure("arrivals", "Arrivals", "Requests per second.", data, draw.timed(run, layout))


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
        axis = draw.axis("", unit, rangemode="tozero")
        if name.endswith("_frac"):
            axis |= {"tickformat": ".0%", "range": [0, 1.02]}
        bands = draw.bands(run, run.instances(name), colour, unit)
        made.append(Figure(name, title, "Per instance.", bands, draw.timed(run, {"yaxis": axis})))
    data = []
    for place, (name, title, _, _) in enumerate(quantities):
        matrix, labels = draw.gathered(run.instances(name), names)
        data.append(
            draw.heat(run, matrix, labels, "", "Viridis") | {"name": title, "visible": place == 0}
        )
    shown = min(len(names), HEAT_ROWS)
    heat = Figure(
        "instance_heat",
        f"All {len(names)} instances",
        "" if len(names) == shown else f"Each line is the mean of {len(names) / shown:.0f}.",
        data,
        draw.timed(run, {}),
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
        data.append(draw.line(run.mid[1:], smooth, title, colour, 1.8))
    layout = {"yaxis": draw.axis("", " /s", rangemode="tozero")}
    return Figure("tokens", "Tokens per second", "All instances.", data, draw.timed(run, layout))


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
        draw.line(run.mid, np.nansum(of(column), axis=1) / gib, title, colour, 2, dash=dash)
        for column, title, colour, dash in (
            ("limit_bytes", "limit", ORANGE, "solid"),
            ("working_set_bytes", "working set", PURPLE, "solid"),
            ("current_bytes", "resident", BLUE, "solid"),
            ("swap_bytes", "swapped out", RED, "solid"),
        )
    ]
    ends = run.time(np.array([0.0, run.duration_s]))
    for column, title in (("memory_bytes", "sold"), ("guaranteed_bytes", "guaranteed")):
        data.append(draw.line(ends, [index[column].sum() / gib] * 2, title, GREY, 1.4, dash="dot"))
    memory = Figure(
        "memory",
        f"Memory of {num} tenants",
        "Sums over all tenants.",
        data,
        draw.timed(run, {"yaxis": draw.axis("", " GiB", rangemode="tozero")}),
        320,
        True,
    )
    share = {"yaxis": draw.axis("", "", rangemode="tozero", tickformat=".0%")}
    width_s = float(run.edges_s[1] - run.edges_s[0])
    faults = np.maximum(np.diff(np.nan_to_num(of("major_faults_total")), axis=0), 0) / width_s
    return [
        memory,
        Figure(
            "psi",
            "Memory pressure",
            "Share of time that some task stalls (PSI some).",
            draw.bands(run, of("pressure_some_frac"), PURPLE, ""),
            draw.timed(run, share),
        ),
        Figure(
            "slowdown",
            "Slowdown of tenants",
            "Share of speed lost.",
            draw.bands(run, of("slowdown_frac"), RED, ""),
            draw.timed(run, share),
        ),
        Figure(
            "faults",
            "Major faults",
            "All tenants.",
            [draw.line(run.mid[1:], faults.sum(axis=1), "major faults", ORANGE)],
            draw.timed(run, {"yaxis": draw.axis("", " /s", rangemode="tozero")}),
            wide=True,
        ),
    ]


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
            watts.append(draw.line(longest.time(t_s), total_w, label, colour, 1.8))
        value_s, share = cumulative(run.requests.ttft_s)
        first.append(draw.line(value_s, share, label, colour, 2))
        counts = sum(itl_by_pool(run.recording).values())
        if np.any(counts):
            below = np.cumsum(counts) / np.sum(counts)
            used = np.flatnonzero(counts)
            part = slice(max(used[0] - 1, 0), used[-1] + 1)
            gaps.append(draw.line(edges_s[1:][part] * 1e3, below[part], label, colour, 2))
    share_axis = draw.axis("", "", range=[0, 1.02], tickformat=".0%")
    power_layout = draw.timed(longest, {"yaxis": draw.axis("", " W", rangemode="tozero")})
    ttft_layout = {"xaxis": draw.log_axis(1.0, " s"), "yaxis": share_axis, "hovermode": "closest"}
    itl_layout = {
        "xaxis": draw.log_axis(1e3, " ms"),
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
