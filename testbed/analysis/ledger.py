"""The ledger of a run: energy, carbon and money, for the whole and by class and tenant.

Energy comes from the GPUs' counters, carbon from an hourly series of the grid's intensity, money
from a price of energy and a price of GPU time. Nodes that hold no instance have been given back: of
an elastic run the ledger counts what nodes draw while they hold one, and says what the rest drew.
A GPU's energy, and its part of what its host draws, is its holder's: the customer of an opaque VM,
or an instance. What a request cost is not measured: an instance's energy is divided among the
requests that it served by tokens, a token given out counting as `OUTPUT_WEIGHT` tokens taken in.
GPUs that nobody holds, or whose instance served nobody, are ``(idle)``.

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
    return _series("carbon_2022_may.csv", "grid", grid)


@cache
def price_usd_per_kwh(grid: str) -> Floats:
    """Hourly day-ahead price of energy in a grid, the same hours as `carbon_g_per_kwh`.

    Raises:
        SpecError: we ship no such series.

    >>> series = price_usd_per_kwh("CISO")
    >>> len(series), round(float(series.mean()), 3)
    (288, 0.066)
    """
    return _series("price_2022_may.csv", "price", grid) / 1000


def _series(file: str, field: str, grid: str) -> Floats:
    """A column of a file of hours; gaps are bridged."""
    text = files("testbed.analysis").joinpath("grid_data", file).read_text("utf-8")
    rows = list(csv.DictReader(text.splitlines()))
    if grid not in rows[0] or grid == "timestamp":
        known = ", ".join(name for name in rows[0] if name != "timestamp")
        raise SpecError(f"run spec: ledger.{field} = {grid!r} is none of: {known}")
    values = [float(row[grid]) if row[grid] else np.nan for row in rows]
    known_at = np.flatnonzero(~np.isnan(values))
    return np.asarray(np.interp(np.arange(len(values)), known_at, np.array(values)[known_at]))


def check_tariff(tariff: LedgerSpec) -> None:
    """Before a run, since the ledger is made after it.

    Raises:
        SpecError: names a series that we do not ship.
    """
    if tariff.grid:
        carbon_g_per_kwh(tariff.grid)
    if tariff.price:
        price_usd_per_kwh(tariff.price)


@dataclass(frozen=True, slots=True)
class Holds:
    """Who held which GPU, from when to when: one row per GPU and span, in order of GPUs."""

    gpu: Ints
    holder: Ints
    """An instance (or slot), or their number and a VM."""
    start_s: Floats
    end_s: Floats
    num_instances: int
    customer: Ints
    """Of each opaque VM."""

    @property
    def num_holders(self) -> int:
        """Instances and VMs."""
        return self.num_instances + len(self.customer)


def read_holds(recording: Recording) -> Holds:
    """What instances and opaque VMs held, of any run."""
    num_instances = len(recording.columns("instance_index", "instance")["instance"])
    if recording.spec.cluster.elastic:
        layouts = read_layouts(recording)
        until_s = _until_s(layouts.t_s, layouts.instance)
        rows = np.flatnonzero(layouts.state != OFF)
        rows = np.repeat(rows, layouts.num_gpus[rows])
        # A slot has the number of its first GPU.
        first = np.append(True, rows[1:] != rows[:-1]) if len(rows) else np.zeros(0, bool)
        place = np.arange(len(rows)) - np.maximum.accumulate(
            np.where(first, np.arange(len(rows)), 0)
        )
        holder = layouts.instance[rows].astype(np.int64)
        gpu, start_s, end_s = holder + place, layouts.t_s[rows], until_s[rows]
    else:
        instance = recording.columns("gpu_index", "instance")["instance"].astype(np.int64)
        gpu = np.flatnonzero(instance >= 0)
        holder, start_s = instance[gpu], np.zeros(len(gpu))
        end_s = np.full(len(gpu), np.inf)
    customer = np.zeros(0, np.int64)
    if recording.spec.vms.count:
        vm_gpu, vm, vm_start_s, vm_end_s, customer = _vm_spans(recording)
        gpu, holder = np.append(gpu, vm_gpu), np.append(holder, num_instances + vm)
        start_s, end_s = np.append(start_s, vm_start_s), np.append(end_s, vm_end_s)
    order = np.argsort(gpu, kind="stable")
    return Holds(gpu[order], holder[order], start_s[order], end_s[order], num_instances, customer)


def _until_s(t_s: Floats, whose: Ints) -> Floats:
    """When each of some states ends, in order of whose they are and of time: with the next one's
    beginning, or never."""
    until_s = np.append(t_s[1:], np.inf)
    until_s[np.append(whose[1:] != whose[:-1], True)] = np.inf
    return until_s


def _vm_spans(recording: Recording) -> tuple[Ints, Ints, Floats, Floats, Ints]:
    """GPU, VM, start and end of each span that policies saw, and the customer of each VM."""
    table = recording.columns("facility", "now_s", "quantity", "place_index", "value")
    quantity = table["quantity"].astype(str)

    def of(name: str) -> tuple[Ints, Floats, Ints]:
        mine = np.flatnonzero(quantity == name)
        place = table["place_index"][mine].astype(np.int64)
        order = np.lexsort((table["now_s"][mine], place))
        return place[order], table["now_s"][mine][order], table["value"][mine][order].astype(int)

    gpu, t_s, vm = of("gpu_vm")
    until_s = _until_s(t_s, gpu)
    held = vm >= 0
    whose, _, customer = of("vms.customer")
    _, latest = np.unique(whose[::-1], return_index=True)
    customer = customer[::-1][latest]
    return gpu[held], vm[held], t_s[held], until_s[held], customer


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
    holds: Holds
    held_j: Floats
    """By holder: what its GPUs drew while it held them."""
    held_s: Floats
    """By holder: GPU-seconds."""
    holder_node: Ints
    """By holder; -1 for one that held nothing."""

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
    holds = read_holds(recording)
    spans = np.searchsorted(holds.gpu, np.arange(len(node_of) + 1))
    from_to_s = np.array([holds.start_s, holds.end_s]).clip(from_s, edges_s[-1])
    held_j = np.zeros(holds.num_holders)
    order = np.lexsort((gpus["t_s"], gpus["gpu"]))
    t_s, gpu, counter_j = (gpus[name][order] for name in ("t_s", "gpu", "energy_j"))
    starts = np.searchsorted(gpu, np.arange(len(node_of) + 1))
    for index, node in enumerate(node_of):
        mine = slice(starts[index], starts[index + 1])
        if starts[index] < starts[index + 1]:
            rising_j = _rising(counter_j[mine])
            drawn_j[:, node] += np.diff(np.interp(edges_s, t_s[mine], rising_j))
            span = slice(spans[index], spans[index + 1])
            [span_j] = np.diff(np.interp(from_to_s[:, span], t_s[mine], rising_j), axis=0)
            np.add.at(held_j, holds.holder[span], span_j)
    used = _used_frac(recording, holds, edges_s, node_of, num_nodes)
    if not given_back:
        used[:, used.any(axis=0)] = 1.0
    per_node = np.bincount(node_of, minlength=num_nodes)
    gpu_s = float((used * np.diff(edges_s)[:, None] * per_node).sum())
    [span_s] = np.diff(from_to_s, axis=0)
    held_s = np.bincount(holds.holder, span_s, holds.num_holders).astype(np.float64)
    holder_node = np.full(holds.num_holders, -1, np.int64)
    holder_node[holds.holder] = node_of[holds.gpu]
    return Energy(edges_s, drawn_j, used, gpu_s, holds, held_j, held_s, holder_node)


def _rising(counter_j: Floats) -> Floats:
    """A counter without its resets: what it shows after one was drawn since."""
    rise = np.diff(counter_j, prepend=counter_j[:1])
    rise = np.where(rise < 0, counter_j, rise)
    return np.cumsum(rise)


def _used_frac(
    recording: Recording, holds: Holds, edges_s: Floats, node_of: Ints, num_nodes: int
) -> Floats:
    bins = len(edges_s) - 1
    if not recording.spec.cluster.elastic:
        return np.ones((bins, num_nodes))
    used = np.zeros((bins, num_nodes))
    holds_node = node_of[holds.gpu]
    for node in range(num_nodes):
        mine = holds_node == node
        for start_s, until_s in _together(holds.start_s[mine], holds.end_s[mine]):
            inside = np.minimum(edges_s[1:], until_s) - np.maximum(edges_s[:-1], start_s)
            used[:, node] += np.maximum(inside, 0.0)
    return np.minimum(used / np.diff(edges_s)[:, None], 1.0)


def _together(start_s: Floats, end_s: Floats) -> list[tuple[float, float]]:
    """Spans in which at least one of these holds.

    >>> _together(np.array([5.0, 0.0, 1.0]), np.array([6.0, 2.0, 3.0]))
    [(0.0, 3.0), (5.0, 6.0)]
    """
    spans: list[tuple[float, float]] = []
    order = np.argsort(start_s, kind="stable")
    for start, end in zip(start_s[order].tolist(), end_s[order].tolist(), strict=True):
        if spans and start <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(spans[-1][1], end))
        else:
            spans.append((start, end))
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
        Totals, then ``by_class`` and ``by_tenant`` with their share of each: ``share_frac`` of the
        energy, and so of carbon and its price, and ``gpu_h`` of GPU time. Opaque VMs are class
        ``(vms)`` and tenants ``vm:customer0``. ``*_kwh`` are of nodes in use; ``released_kwh`` is
        what the others drew.
    """
    recording = Recording.open(source)
    tariff = tariff or recording.spec.ledger
    energy = read_energy(recording, from_s, to_s, given_back=given_back)
    scale = recording.spec.workload.time_scale
    middle_s = (energy.edges_s[1:] + energy.edges_s[:-1]) / 2 * scale
    length_s = np.diff(energy.edges_s)[:, None] * scale
    gpu_kwh = energy.used_j * scale / J_PER_KWH
    hosts = _plant_hosts(recording.spec, tariff)
    whole_host_w = _host_w(recording.spec, tariff, energy)
    host_kwh = whole_host_w * energy.used_frac * length_s / J_PER_KWH
    kwh = (gpu_kwh + host_kwh) * tariff.pue
    released_kwh = energy.drawn_j * (1 - energy.used_frac) * scale / J_PER_KWH
    if hosts:
        released_kwh += whole_host_w * (1 - energy.used_frac) * length_s / J_PER_KWH
    intensity = carbon_g_per_kwh(tariff.grid) if tariff.grid else [0.0]
    carbon_g = _at_hours(intensity, middle_s, tariff.begins_h)[:, None] * kwh
    prices = price_usd_per_kwh(tariff.price) if tariff.price else tariff.price_usd_per_kwh
    usd = _at_hours(prices, middle_s, tariff.begins_h)[:, None] * kwh
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
    shares = _shares(recording, energy, kwh.sum(axis=0))
    return {
        **totals,
        "time_scale": scale,
        "policies": [policy.use for policy in recording.spec.policy],
        **{
            f"by_{column}": {name: _part(totals, *parts) for name, parts in found.items()}
            for column, found in shares.items()
        },
    }


def _plant_hosts(spec: RunSpec, tariff: LedgerSpec) -> bool:
    """Whether hosts are counted as a plant has them."""
    if tariff.plant_hosts is None:
        return spec.plant is not None and not tariff.host_w
    return tariff.plant_hosts


def _host_w(spec: RunSpec, tariff: LedgerSpec, energy: Energy) -> Floats:
    """``[bin, node]``: what nodes draw beside their GPUs while they are on."""
    if not _plant_hosts(spec, tariff):
        return np.full(energy.drawn_j.shape, tariff.host_w)
    host = Host(spec.plant or PlantSpec(), load_gpu(spec.cluster.gpu), spec.cluster.gpus_per_node)
    return host.host_w(host.load(energy.drawn_j / np.diff(energy.edges_s)[:, None]))


def _part(totals: dict[str, Any], energy_frac: float, time_frac: float) -> dict[str, float | None]:
    by_energy = ("energy_kwh", "carbon_kg", "energy_usd")
    return {
        "share_frac": energy_frac,
        **{
            name: None if totals[name] is None else totals[name] * energy_frac for name in by_energy
        },
        **{name: totals[name] * time_frac for name in ("gpu_h", "gpu_usd")},
    }


def _shares(
    recording: Recording, energy: Energy, node_kwh: Floats
) -> dict[str, dict[str, tuple[float, float]]]:
    """Share of energy and of GPU time by class and tenant."""
    held = np.array([_held_kwh(energy, node_kwh), energy.held_s])
    totals = np.array([node_kwh.sum(), energy.gpu_s])
    # Bins and spans do not meet exactly where nodes come and go: then all is held.
    held /= np.maximum(np.maximum(totals, held.sum(axis=1)), 1e-12)[:, None]
    num_instances = energy.holds.num_instances
    weights = _token_weights(recording, num_instances)
    sums = sum(weights["tenant"].values(), start=np.zeros(num_instances))
    parts = held[:, :num_instances] / np.maximum(sums, 1e-12)
    vms = held[:, energy.holds.num_instances :]
    customers = [f"vm:customer{k}" for k in energy.holds.customer.tolist()]
    found = {}
    for column, of_vms in (("slo_class", ["(vms)"] * len(customers)), ("tenant", customers)):
        named: dict[str, tuple[float, float]] = {}
        shares = [(name, parts @ mine) for name, mine in sorted(weights[column].items())]
        for name, (kwh, time) in [*shares, *zip(of_vms, vms.T, strict=True)]:
            before = named.get(name, (0.0, 0.0))
            named[name] = (before[0] + float(kwh), before[1] + float(time))
        sizes = np.array(list(named.values())).reshape(-1, 2).sum(axis=0)
        idle_kwh, idle_time = (max(0.0, 1.0 - float(size)) for size in sizes)
        named["(idle)"] = (idle_kwh, idle_time)
        found["class" if column == "slo_class" else column] = named
    return found


def _token_weights(recording: Recording, num_instances: int) -> dict[str, dict[str, Floats]]:
    """Weighed tokens of completed requests by instance, of each class and of each tenant.

    A part of the requests at a time: there may be tens of millions.
    """
    counted = ("prompt_tokens", "image_tokens", "output_tokens")
    found: dict[str, dict[str, Floats]] = {"slo_class": {}, "tenant": {}}
    if not num_instances:
        return found
    for part in recording.batches("requests", ("instance", "status", *counted, *found)):
        served = (part["instance"] >= 0) & (part["status"] == "completed")
        prompt, image, output = (part[name][served].astype(np.float64) for name in counted)
        weight = prompt + image + OUTPUT_WEIGHT * output
        instance = part["instance"][served].astype(np.int64)
        for column, known in found.items():
            names, index = np.unique(part[column][served].astype(str), return_inverse=True)
            place = index * num_instances + instance
            sums = np.bincount(place, weight, len(names) * num_instances)
            for name, mine in zip(names.tolist(), sums.reshape(-1, num_instances), strict=True):
                known.setdefault(name, np.zeros(num_instances))
                known[name] += mine
    return found


def _held_kwh(energy: Energy, node_kwh: Floats) -> Floats:
    """By holder: its GPUs' energy, with hosts and losses of its node in proportion."""
    node_j = np.maximum(energy.used_j.sum(axis=0), 1e-12)
    node = np.maximum(energy.holder_node, 0)  # who held nothing drew nothing
    return np.asarray(energy.held_j * (node_kwh / node_j)[node])


def _at_hours(series: Sequence[float] | Floats, t_s: Floats, begins_h: float) -> Floats:
    """Values of an hourly series, which repeats, at times of the run."""
    values = np.asarray(series, dtype=np.float64)
    return np.asarray(values[((t_s / 3600 + begins_h) % len(values)).astype(int)])
