"""The ledger of a run: energy, carbon and money, for the whole and by class and tenant.

Energy comes from the GPUs' counters, carbon from an hourly series of the grid's intensity, money
from a price of energy and a price of GPU time. Nodes that hold no instance have been given back: of
an elastic run the ledger counts what nodes draw while they hold one, and says what the rest drew.
What a request cost is not measured: a node's energy is divided among the requests that it served
by tokens, a token given out counting as `OUTPUT_WEIGHT` tokens taken in.

Everything is as the run went, except that a run whose trace was compressed k times stands for k
times its length: energy and GPU time are multiplied, and the grid's hours pass k times as fast.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from emulators.datacenter import Host
from emulators.profiles import load_gpu
from testbed.analysis.layouts import read_layouts
from testbed.core.errors import SpecError
from testbed.core.spec import LedgerSpec, PlantSpec, RunSpec
from testbed.core.view import OFF, Floats, Ints
from testbed.recorder.reader import Recording, Source

J_PER_KWH = 3.6e6
OUTPUT_WEIGHT = 8.0
"""Energy of a token of output over one of input: published measurements of serving on A100 and
H100 put it at 7 to 10."""
_BIN_S = 30.0
"""Energy is binned so finely, at most as finely as GPUs were recorded."""


@cache
def carbon_g_per_kwh(grid: str) -> Floats:
    """Hourly carbon intensity of a grid from 9 May 2022, 00:00 UTC (grid_data/README.md).

    Raises:
        SpecError: we ship no such grid.

    >>> len(carbon_g_per_kwh("CISO")), round(float(carbon_g_per_kwh("BPAT").mean()))
    (288, 25)
    """
    text = files("testbed.analysis").joinpath("grid_data/carbon_2022_may.csv").read_text("utf-8")
    rows = list(csv.DictReader(text.splitlines()))
    if grid not in rows[0] or grid == "timestamp":
        known = ", ".join(name for name in rows[0] if name != "timestamp")
        raise SpecError(f"run spec: ledger.grid = {grid!r} is none of: {known}")
    values = [float(row[grid]) if row[grid] else np.nan for row in rows]
    known_at = np.flatnonzero(~np.isnan(values))
    return np.asarray(np.interp(np.arange(len(values)), known_at, np.array(values)[known_at]))


@dataclass(frozen=True, slots=True)
class Energy:
    """What each node drew in each bin of time, and for which share of it it was in use."""

    edges_s: Floats
    drawn_j: Floats
    """``[bin, node]``, of its GPUs."""
    used_frac: Floats
    """``[bin, node]``: share of the bin in which the node held an instance."""
    gpu_s: float
    """GPU-seconds of nodes in use."""

    @property
    def used_j(self) -> Floats:
        """``[bin, node]``: drawn while in use; evenly within a bin."""
        return self.drawn_j * self.used_frac


def read_energy(
    recording: Recording, from_s: float = 0.0, to_s: float = np.inf, *, given_back: bool = True
) -> Energy:
    """Energy of nodes between two times of a recording.

    Args:
        recording: of any run.
        from_s: begin here.
        to_s: end here.
        given_back: nodes that hold nothing are nobody's; else those that ever held an instance
            are in use throughout.
    """
    gpus = recording.columns("gpus", "t_s", "gpu", "energy_j")
    node_of = recording.columns("gpu_index", "node")["node"].astype(np.int64)
    end_s = min(to_s, float(gpus["t_s"].max(initial=0.0)))
    period_s = max(_BIN_S, recording.spec.record.gpu_period_s)
    bins = max(1, round((end_s - from_s) / period_s))
    edges_s = np.linspace(from_s, max(end_s, from_s + 1e-9), bins + 1)
    num_nodes = int(node_of.max(initial=0)) + 1
    drawn_j = np.zeros((bins, num_nodes))
    order = np.lexsort((gpus["t_s"], gpus["gpu"]))
    t_s, gpu, counter_j = (gpus[name][order] for name in ("t_s", "gpu", "energy_j"))
    starts = np.searchsorted(gpu, np.arange(len(node_of) + 1))
    for index, node in enumerate(node_of):
        mine = slice(starts[index], starts[index + 1])
        if starts[index] < starts[index + 1]:
            rise = np.diff(np.interp(edges_s, t_s[mine], _rising(counter_j[mine])))
            drawn_j[:, node] += rise
    used = _used_frac(recording, edges_s, num_nodes)
    if not given_back:
        used[:, used.any(axis=0)] = 1.0
    per_node = np.bincount(node_of, minlength=num_nodes)
    gpu_s = float((used * np.diff(edges_s)[:, None] * per_node).sum())
    return Energy(edges_s, drawn_j, used, gpu_s)


def _rising(counter_j: Floats) -> Floats:
    """A counter without its resets: what it shows after one was drawn since."""
    rise = np.diff(counter_j, prepend=counter_j[:1])
    rise = np.where(rise < 0, counter_j, rise)
    return np.cumsum(rise)


def _used_frac(recording: Recording, edges_s: Floats, num_nodes: int) -> Floats:
    bins = len(edges_s) - 1
    if not recording.spec.cluster.elastic:
        return np.ones((bins, num_nodes))
    layouts = read_layouts(recording)
    node_of = recording.columns("instance_index", "node")["node"].astype(np.int64)
    used = np.zeros((bins, num_nodes))
    for node, spans in _held_spans(layouts.t_s, layouts.instance, layouts.state, node_of).items():
        for start_s, until_s in spans:
            inside = np.minimum(edges_s[1:], until_s) - np.maximum(edges_s[:-1], start_s)
            used[:, node] += np.maximum(inside, 0.0)
    return np.minimum(used / np.diff(edges_s)[:, None], 1.0)


def _held_spans(
    t_s: Floats, instance: Ints, state: Ints, node_of: Ints
) -> dict[int, list[tuple[float, float]]]:
    """When each node held at least one instance."""
    held: dict[int, set[int]] = {}
    since: dict[int, float] = {}
    spans: dict[int, list[tuple[float, float]]] = {}
    for place in np.argsort(t_s, kind="stable"):
        slot, now_s = int(instance[place]), float(t_s[place])
        node = int(node_of[slot])
        mine = held.setdefault(node, set())
        before = bool(mine)
        if state[place] == OFF:
            mine.discard(slot)
        else:
            mine.add(slot)
        if mine and not before:
            since[node] = now_s
        elif before and not mine:
            spans.setdefault(node, []).append((since.pop(node), now_s))
    for node, start_s in since.items():
        spans.setdefault(node, []).append((start_s, np.inf))
    return spans


def ledger(
    source: Source,
    tariff: LedgerSpec | None = None,
    from_s: float = 0.0,
    to_s: float = np.inf,
    *,
    given_back: bool = True,
) -> dict[str, Any]:
    """Energy, carbon and cost between two times of a run.

    Args:
        source: a recording.
        tariff: prices and grid; the run file's by default.
        from_s: begin here, as after a warm-up.
        to_s: end here.
        given_back: see `read_energy`.

    Returns:
        Totals, then ``by_class`` and ``by_tenant`` with their share of each. ``*_kwh`` are of
        nodes in use; ``released_kwh`` is what the others drew.
    """
    recording = Recording.open(source)
    tariff = tariff or recording.spec.ledger
    energy = read_energy(recording, from_s, to_s, given_back=given_back)
    scale = recording.spec.workload.time_scale
    middle_s = (energy.edges_s[1:] + energy.edges_s[:-1]) / 2 * scale
    length_s = np.diff(energy.edges_s)[:, None] * scale
    gpu_kwh = energy.used_j * scale / J_PER_KWH
    whole_host_w = _host_w(recording.spec, tariff, energy)
    host_kwh = whole_host_w * energy.used_frac * length_s / J_PER_KWH
    kwh = (gpu_kwh + host_kwh) * tariff.pue
    released_kwh = energy.drawn_j * (1 - energy.used_frac) * scale / J_PER_KWH
    if tariff.plant_hosts:
        released_kwh += whole_host_w * (1 - energy.used_frac) * length_s / J_PER_KWH
    carbon_g = _hourly(tariff.grid, middle_s, tariff.begins_h)[:, None] * kwh
    usd = _priced(tariff.price_usd_per_kwh, middle_s, tariff.begins_h)[:, None] * kwh
    gpu_h = energy.gpu_s * scale / 3600
    totals = {
        "gpu_kwh": float(gpu_kwh.sum()),
        "host_kwh": float(host_kwh.sum()),
        "energy_kwh": float(kwh.sum()),
        "released_kwh": float(released_kwh.sum()) * tariff.pue,
        "carbon_kg": float(carbon_g.sum()) / 1000 if tariff.grid else None,
        "energy_usd": float(usd.sum()),
        "gpu_h": gpu_h,
        "gpu_usd": gpu_h * tariff.gpu_usd_per_h,
    }
    shares = _shares(recording, kwh.sum(axis=0))
    return {
        **totals,
        "time_scale": scale,
        "policies": [policy.use for policy in recording.spec.policy],
        **{
            f"by_{column}": {name: _part(totals, share) for name, share in found.items()}
            for column, found in shares.items()
        },
    }


def _host_w(spec: RunSpec, tariff: LedgerSpec, energy: Energy) -> Floats:
    """``[bin, node]``: what nodes draw beside their GPUs while they are on."""
    if not tariff.plant_hosts:
        return np.full(energy.drawn_j.shape, tariff.host_w)
    host = Host(spec.plant or PlantSpec(), load_gpu(spec.cluster.gpu), spec.cluster.gpus_per_node)
    return host.host_w(host.load(energy.drawn_j / np.diff(energy.edges_s)[:, None]))


def _part(totals: dict[str, Any], share: float) -> dict[str, float | None]:
    names = ("energy_kwh", "carbon_kg", "energy_usd", "gpu_usd")
    return {
        "share_frac": share,
        **{name: None if totals[name] is None else totals[name] * share for name in names},
    }


def _shares(recording: Recording, node_kwh: Floats) -> dict[str, dict[str, float]]:
    """Share of the energy by tenant and class; what served nobody is ``(idle)``."""
    table = recording.columns("requests")
    node_of = recording.columns("instance_index", "node")["node"].astype(np.int64)
    served = (table["instance"] >= 0) & (table["status"] == "completed")
    tokens = table["prompt_tokens"] + table["image_tokens"] + OUTPUT_WEIGHT * table["output_tokens"]
    node = node_of[table["instance"][served]] if len(node_of) else np.zeros(0, np.int64)
    weight = tokens[served].astype(np.float64)
    total = np.bincount(node, weight, minlength=len(node_kwh))
    kwh = weight * (node_kwh / np.maximum(total, 1e-12))[node]
    all_kwh = max(float(node_kwh.sum()), 1e-12)
    idle = float(node_kwh[total == 0].sum()) / all_kwh
    found = {}
    for column in ("slo_class", "tenant"):
        names, index = np.unique(table[column][served].astype(str), return_inverse=True)
        parts = np.bincount(index, kwh, minlength=len(names)) / all_kwh
        named = dict(zip(names.tolist(), parts.tolist(), strict=True))
        found["class" if column == "slo_class" else column] = {**named, "(idle)": idle}
    return found


def _hourly(grid: str, t_s: Floats, begins_h: float) -> Floats:
    """Carbon intensity at times of the run; the series repeats."""
    if not grid:
        return np.zeros(len(t_s))
    series = carbon_g_per_kwh(grid)
    return np.asarray(series[((t_s / 3600 + begins_h) % len(series)).astype(int)])


def _priced(prices: Sequence[float], t_s: Floats, begins_h: float) -> Floats:
    """Price of energy at times of the run: one for all, or one for each hour of the day (UTC)."""
    series = np.asarray(prices, dtype=np.float64)
    return np.asarray(series[((t_s / 3600 + begins_h) % len(series)).astype(int)])
