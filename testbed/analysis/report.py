"""The report of a run: report.html, one page that works offline and is drawn from the recording.

Order of the page: what came out (numbers), whether it may be believed (banner), power against
budgets, the GPUs, serving, energy and its cost, memory, who asked for what, how punctual the
testbed was, and what was asked and with which versions.
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from testbed.analysis import figures
from testbed.analysis.latency import itl_percentiles, percentiles
from testbed.analysis.orders import Order, commands, orders, value_words
from testbed.analysis.page import Page, card, table, tag
from testbed.analysis.run import Run
from testbed.analysis.summary import last_lateness, late_limit_s, summarise
from testbed.recorder.reader import Recording, Source
from testbed.recorder.tables import ITL_BINS

TABLE_ROWS = 300
"""Longest table on the page; the recording has all rows."""


def write_report(source: Source, path: Path | None = None) -> Path:
    """Make the page, by default as report.html in the run's folder, and say where it is."""
    recording = Recording.open(source)
    path = recording.folder / "report.html" if path is None else path
    path.write_text(report_html(recording), encoding="utf-8")
    return path


def report_html(recording: Recording) -> str:
    """The page."""
    run = Run(recording)
    summary = summarise(recording)
    page = Page(f"{summary['name']} ({summary['run_id']})")
    page.head(_head(recording, summary))
    page.section("power", "Power and budgets", page.figures(figures.power(run)))
    page.section("gpus", "GPUs", page.figures(figures.gpus(run)))
    page.section(
        "serving",
        "Latency",
        page.figures(figures.serving(run)) + _classes(summary) + _cap_cost(run),
    )
    page.section("instances", "Instances", page.figures(figures.instances(run)))
    page.section("ledger", "Energy, carbon and cost", _ledger(summary, recording))
    page.section("memory", "Memory", page.figures(figures.tenants(run)))
    made = orders(recording)
    page.section("commands", "Commands", page.figures(commands(run, made)) + _orders(made))
    page.section("events", "Events", _events(recording))
    page.section("time", "Real time", _lateness(recording))
    page.section("provenance", "Provenance", _provenance(recording))
    return page.html()


# Head.


def _head(recording: Recording, summary: dict[str, Any]) -> str:
    manifest = recording.manifest
    cluster = manifest["spec"]["cluster"]
    nodes = cluster["rows"] * cluster["nodes_per_row"]
    facts = [
        f"{cluster['rows']} rows, {nodes} nodes, {nodes * cluster['gpus_per_node']} x "
        f"{cluster['gpu']}",
        f"{duration_words(summary['duration_s'])} on its own clock"
        + (f", which took {duration_words(summary['wall_s'])}" if summary["wall_s"] else ""),
        f"seed {summary['seed']}",
        str(manifest["started_utc"]).replace("T", " ").replace("Z", " UTC"),
        summary["run_id"],
    ]
    verdict = (
        tag("span", "valid", "badge good")
        if summary["valid"]
        else tag("span", "not valid", "badge bad")
    )
    return (
        tag("h1", str(summary["name"]))
        + f'<div class="facts">{tag("span", summary["mode"], "badge")}{verdict}'
        + "".join(tag("span", fact) for fact in facts)
        + "</div>"
        + _banner(summary)
        + _numbers(summary)
    )


def _banner(summary: dict[str, Any]) -> str:
    if summary["valid"]:
        return ""
    reasons = "".join(tag("li", reason) for reason in summary["invalid_because"])
    return (
        '<div class="banner" role="alert"><strong>This run does not count.</strong> '
        f"Its numbers are shown for debugging only.<ul>{reasons}</ul></div>"
    )


def _numbers(summary: dict[str, Any]) -> str:
    requests, power, breaches = summary["requests"], summary["power_w"], summary["breaches"]
    commands, late = summary["commands"], summary["lateness_s"]
    attained = requests["slo_attained_frac"]
    lost = requests["lost"] + requests["rejected"]
    goodput = f"{summary['goodput_rps'] or 0:.2f} requests/s in time"
    served = (
        f"of {requests['arrived']:,}; {lost:,} lost or rejected, "
        f"{requests['in_flight']:,} in flight at the end"
    )
    over = (
        f"{breaches['count']} times; reaction {breaches['longest_s']:.1f} s at the longest, "
        f"up to {breaches['max_over_w']:.0f} W over"
    )
    said = (
        f"{commands['sent']:,} sent, {commands['overruled']:,} overruled, "
        f"{commands['refused'] + commands['expired']:,} refused or expired"
    )
    tokens = {name: _kilo(count, "") for name, count in summary["tokens"].items()}
    punctual = "time is virtual" if late["p99"] is None else f"{late['missed']} missed events"
    ttft_s, itl_s = summary["ttft_s"], summary["itl_s"]
    cards = [
        _number("SLO attained", _percent(attained), goodput),
        _number("Requests completed", f"{requests['completed']:,}", served),
        _number("Time to first token, p50", _seconds(ttft_s["p50"]), "p99", ttft_s["p99"]),
        _number("Gap of tokens, p50", _seconds(itl_s["p50"]), "p99", itl_s["p99"]),
        _number("Power, mean", _kilo(power["mean"], "W"), f"at most {_words(power['max'], 'W')}"),
        _number("Energy", _kilo(summary["energy_j"], "J"), _per_token(summary)),
        _number("Over budget", f"{breaches['s']:.1f} <small>s</small>", over, cls="bad")
        if breaches["count"]
        else _number("Over budget", "0 <small>s</small>", "never", cls="good"),
        _number("Throttled", f"{summary['throttle_s']:,.0f} <small>GPU s</small>", _why(summary)),
        _number("Commands", f"{commands['per_min'] or 0:.1f} <small>/min</small>", said),
        _number("Tokens out", tokens["output"],
                _plain(f"in: {tokens['input']} text, {tokens['image']} image")),
        _number("Lateness, p99", _seconds(late["p99"]), punctual),
    ]  # fmt: skip
    memory = summary["memory"]
    if "swap_max_bytes" in memory:
        cards.append(
            _number(
                "Memory swapped out, most",
                f"{memory['swap_max_bytes'] / 2**30:.2f} <small>GiB</small>",
                f"{memory['major_faults']:,} major faults; {memory['tenants']} tenants",
            )
        )
    return f'<div class="numbers">{"".join(cards)}</div>'


def _number(
    title: str, value: str, note: str, seconds: float | None = None, *, cls: str = ""
) -> str:
    """A headline number; ``value`` is HTML of ours, the rest is text."""
    more = "" if seconds is None else f" {_plain(_seconds(seconds))}"
    return (
        f'<div class="number {cls}"><span>{escape(title)}</span><b>{value}</b>'
        f"<span>{escape(note + more)}</span></div>"
    )


def _why(summary: dict[str, Any]) -> str:
    found = [f"{name} {s:,.0f} s" for name, s in summary["throttle_by_reason_s"].items() if s]
    return ", ".join(found) or "no reason was ever set"


def _per_token(summary: dict[str, Any]) -> str:
    value = summary["energy_per_output_token_j"]
    return "no token was made" if value is None else f"{value:.3g} J per output token"


def _words(value: float | None, unit: str) -> str:
    return _plain(_kilo(value, unit))


def _plain(html: str) -> str:
    return html.replace("<small>", "").replace("</small>", "")


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} <small>%</small>"


def _seconds(value: float | None) -> str:
    """Seconds for people.

    >>> _seconds(0.0123), _seconds(2.5)
    ('12.3 <small>ms</small>', '2.50 <small>s</small>')
    """
    if value is None:
        return "–"
    number, unit = (value * 1e3, "ms") if value < 1 else (value, "s")
    return f"{number:#.3g}".rstrip(".") + f" <small>{unit}</small>"


def _kilo(value: float | None, unit: str) -> str:
    """A number with a prefix.

    >>> _kilo(756412, "J"), _kilo(12, "W")
    ('756 <small>kJ</small>', '12 <small>W</small>')
    """
    if value is None:
        return "–"
    for scale, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:#.3g}".rstrip(".") + f" <small>{prefix}{unit}</small>"
    return f"{value:.3g} <small>{unit}</small>"


def duration_words(seconds: float) -> str:
    """A length of time for people.

    >>> duration_words(59.5), duration_words(180), duration_words(7200)
    ('59.5 s', '3 min 0 s', '2 h 0 min')
    """
    if seconds < 120:
        return f"{seconds:.1f}".removesuffix(".0") + " s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


# Sections.


def _classes(summary: dict[str, Any]) -> str:
    rows = [
        [
            name,
            f"{one['completed']:,} of {one['arrived']:,}",
            _plain(_percent(one["slo_attained_frac"])),
            *(_plain(_seconds(one["ttft_s"][p])) for p in ("p50", "p90", "p99")),
            _plain(_seconds(one["ttft_limit_s"])),
            *(_plain(_seconds(one["tpot_s"][p])) for p in ("p50", "p99")),
            _plain(_seconds(one["tpot_limit_s"])),
        ]
        for name, one in summary["classes"].items()
    ]
    head = ["class", "completed", "SLO attained", "TTFT p50", "p90", "p99", "limit",
            "time per token p50", "p99", "limit"]  # fmt: skip
    if not rows:
        return ""
    return card(table(head, rows, right=range(1, 10)))


_LEDGER = {
    "energy_kwh": "energy (kWh)",
    "carbon_kg": "carbon (kg)",
    "energy_usd": "energy (USD)",
    "gpu_h": "GPU time (h)",
    "gpu_usd": "GPU time (USD)",
}


def _ledger(summary: dict[str, Any], recording: Recording) -> str:
    """What the run drew, emitted and cost, and whose it was."""
    found = summary["ledger"]
    tariff = recording.spec.ledger
    shown = [name for name in _LEDGER if found[name] is not None]

    def line(name: str, part: dict[str, Any], share: str) -> list[str]:
        return [name, share, *(ledger_number(part[number]) for number in shown)]

    tables = []
    for of in ("class", "tenant"):
        parts = sorted(found[f"by_{of}"].items(), key=lambda entry: -entry[1]["share_frac"])
        rows = [line(name, part, _plain(_percent(part["share_frac"]))) for name, part in parts][
            :TABLE_ROWS
        ]
        head = [of, "share of energy", *(_LEDGER[number] for number in shown)]
        tables.append(table(head, [*rows, line("all", found, "")], right=range(1, len(head))))
    facts = [
        f"GPUs {ledger_number(found['gpu_kwh'])} kWh, hosts {ledger_number(found['host_kwh'])} kWh"
        + (f", times a PUE of {tariff.pue:g}" if tariff.pue != 1 else ""),
        f"nodes given back drew {ledger_number(found['released_kwh'])} kWh more"
        if found["released_kwh"]
        else "",
        f"carbon by the hours of {tariff.grid}" if tariff.grid else "no grid named: carbon unknown",
        f"energy at day-ahead prices of {tariff.price}"
        if tariff.price
        else "energy at an assumed price",
        f"GPU time at {tariff.gpu_usd_per_h:g} USD/h (assumed)",
        f"the run stands for {found['time_scale']:g} times its length"
        if found["time_scale"] != 1
        else "",
    ]
    how = "; ".join(fact for fact in facts if fact) + "."
    rule = (
        "A GPU's energy is its holder's: a customer's opaque VM, or an instance, whose energy is "
        "divided among the requests that it served, by tokens."
    )
    return card(tag("p", f"{how[0].upper()}{how[1:]} {rule}", "soft") + "".join(tables))


def ledger_number(value: float | None) -> str:
    """An amount of energy, carbon or money.

    >>> ledger_number(12345.6), ledger_number(0.00001234), ledger_number(None), ledger_number(0.0)
    ('12,346', '0.0000123', '–', '0')
    """
    if value is None:
        return "–"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return np.format_float_positional(value, precision=3, fractional=False, trim="-")


def _cap_cost(run: Run) -> str:
    """Latencies while the serving row was capped, beside those while it was not."""
    lines = cap_cost(run)
    if not lines:
        return ""
    rows = [
        [what, f"{count:,}", *(_plain(_seconds(found[p])) for p in ("p50", "p90", "p99"))]
        for what, count, found in lines
    ]
    return card(
        "<h3>What the cap cost</h3>"
        + table(["", "count", "p50", "p90", "p99"], rows, right=range(1, 5))
        + '<p class="soft">Load differs between the two as well: caps come when load is high. '
        "Compare two runs for the effect of the cap alone.</p>"
    )  # fmt: skip


def cap_cost(run: Run) -> list[tuple[str, int, dict[str, float | None]]]:
    """TTFT and gaps between tokens with and without a cap on the row that served them."""
    if not run.capped.any():
        return []
    row_of = np.zeros(len(run.recording.columns("instance_index", "name")["name"]), np.int64)
    serving = run.index["instance"] >= 0
    row_of[run.index["instance"][serving]] = run.index["row"][serving]
    found = []
    requests = run.requests
    served = (requests.instance >= 0) & ~np.isnan(requests.ttft_s)
    capped = np.zeros(len(served), bool)
    at_s, row = requests.arrival_s[served], row_of[requests.instance[served]]
    capped[served] = run.capped_at(at_s, row)
    for label, chosen in (("capped", served & capped), ("not capped", served & ~capped)):
        found.append(
            (f"TTFT, {label} at arrival", int(chosen.sum()), percentiles(requests.ttft_s[chosen]))
        )
    gaps = run.recording.columns("itl", "t_s", "instance", "bin", "count")
    if len(np.unique(gaps["t_s"])) > 1:
        capped = run.capped_at(gaps["t_s"], row_of[gaps["instance"]])
        for label, chosen in (("capped", capped), ("not capped", ~capped)):
            counts = np.bincount(gaps["bin"][chosen], gaps["count"][chosen], ITL_BINS)
            found.append(
                (
                    f"gap between tokens, {label}",
                    int(counts.sum()),
                    itl_percentiles(counts.astype(np.int64)),
                )
            )
    return found


def _orders(orders: list[Order]) -> str:
    if not orders:
        return ""
    rows = [
        [
            f"{order.t_s:.1f}",
            order.policy,
            order.precedence,
            order.kind,
            value_words(order),
            _targets(order.targets),
            order.outcome + (f" by {order.winner}" if order.winner else ""),
            order.why,
        ]
        for order in orders[:TABLE_ROWS]
    ]
    head = ["t (s)", "policy", "precedence", "kind", "value", "targets", "outcome", "why"]
    count = f"{len(orders):,} commands" + (
        f", the first {TABLE_ROWS} shown" if len(orders) > TABLE_ROWS else ""
    )
    return card(
        f'<div class="bar"><h3>Who asked for what</h3>{tag("span", count, "soft")}'
        '<input type="search" placeholder="Filter: a policy, a GPU, overruled" '
        'data-filters="orders" aria-label="Filter commands"></div>'
        f'<div class="scroll">{table(head, rows, right=[0], name="orders")}</div>'
    )


def _targets(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _events(recording: Recording) -> str:
    found = recording.table("events").to_pylist()
    if not found:
        return ""
    rows = [
        [f"{e['t_s']:.1f}", e["level"], e["source"], e["kind"], e["text"]]
        for e in found[:TABLE_ROWS]
    ]
    more = (
        "" if len(found) <= TABLE_ROWS else f"{len(found):,} events, the first {TABLE_ROWS} shown"
    )
    head = ["t (s)", "level", "source", "kind", ""]
    return card(f'<div class="scroll">{table(head, rows, right=[0])}</div>{tag("p", more, "soft")}')


def _lateness(recording: Recording) -> str:
    last = last_lateness(recording)
    if not last:
        return card(tag("p", "Time was virtual: nothing can be late.", "soft"))
    rows = [
        [
            row["source"],
            *(_plain(_seconds(row[f"late_{p}_s"])) for p in ("p50", "p99", "max")),
            f"{row['events']:,}",
            f"{row['missed']:,}",
        ]
        for row in sorted(last, key=lambda row: -row["late_p99_s"])[:TABLE_ROWS]
    ]
    limit = _plain(_seconds(late_limit_s(recording)))
    head = ["loop", "late p50", "p99", "most", "events", "missed"]
    note = f"How long after they were due things were done; a p99 above {limit} voids the run."
    return card(tag("p", note, "soft") + table(head, rows, right=range(1, 6)))


def _provenance(recording: Recording) -> str:
    manifest = recording.manifest
    known = "".join(_known(entry) for entry in manifest["meta"].get("provenance", []))
    host = manifest["host"]
    versions = [f"{name} {version}" for name, version in manifest["versions"].items()]
    facts = {
        "run": manifest["run_id"],
        "exit status": manifest["exit_status"],
        "started": manifest["started_utc"],
        "ended": manifest["ended_utc"] or "unknown",
        "commit": manifest["git"] or "unknown",
        "host": f"{host['name']}, {host['cpus']} CPUs, {host['platform']}",
        "versions": ", ".join(versions),
    }
    spec = json.dumps(manifest["spec"], indent=2)
    return card(
        (f"<h3>What is real</h3><table>{known}</table>" if known else "")
        + table(["", ""], [[key, str(value)] for key, value in facts.items()])
        + "<details><summary>The spec, with every default</summary>"
        + f"<pre>{escape(spec)}</pre></details>"
    )


def _known(entry: dict[str, Any]) -> str:
    """A line on where a quantity comes from: measured, emulated or assumed."""
    how = str(entry.get("how", ""))
    colour = {"measured": " good", "assumed": " warn"}.get(how, "")
    badge = tag("span", how, f"badge{colour}")
    what, source = str(entry.get("what", "")), str(entry.get("source", ""))
    return f"<tr><td>{badge}</td>{tag('td', what)}{tag('td', source, 'soft')}</tr>"
