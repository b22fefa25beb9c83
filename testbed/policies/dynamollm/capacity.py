"""What shapes and clocks can do for a pool, in units of a whole node.

A load of 1 is what a node (one instance on all its GPUs) serves of a class at the highest clock
with every latency inside its limit; in these units loads of different classes add up. A pool that
also serves what smaller pools had no node for can do less than that: a short request waits behind a
long one. How much less was measured for each pool with all classes that it covers
(`classes.MIXES`); in between, capacity is the harmonic mean of the two by how much of the load is
foreign, and power the mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from testbed.core.errors import PolicyError
from testbed.core.view import Floats
from testbed.policies.dynamollm.classes import ALL, CLASSES, MIXES, covers, mix_of
from testbed.policies.serving_profile import ServingProfile

STEPS = 48
"""Loads that a shape's tables hold values at."""


_PARTS = 10
"""Shares of foreign load are rounded up to so many parts, so that few mixes are worked out."""


class Capacity:
    """Maximum loads of a profile's classes.

    Args:
        profile: of the device.
        slack_frac: how much plans use of the room between what a class has on a whole node with
            next to no load and its limits. A share of the limits themselves would ask for what no
            node can do.

    Raises:
        PolicyError: a class cannot be served within its limits even by a whole node.
    """

    def __init__(self, profile: ServingProfile, slack_frac: float = 1.0) -> None:
        self.profile = profile
        whole, top = len(profile.tps) - 1, len(profile.clocks_mhz) - 1
        shape = (len(profile.classes), len(profile.tps), len(profile.clocks_mhz))
        limits = np.zeros(shape)
        for cls, tp, clock in np.ndindex(shape):
            ttft, tpot = (
                _most(float(ratio[cls, whole, top, 1]), slack_frac)
                for ratio in (profile.ttft_ratio, profile.tpot_ratio)
            )
            limits[cls, tp, clock] = profile.limit_rps(
                cls, tp, clock, ttft_most=ttft, tpot_most=tpot
            )
        node_rps = limits[:, whole, top]
        self.node_rps = dict(zip(profile.classes, node_rps.tolist(), strict=True))
        """ML of each class: requests per second of a whole node at the highest clock."""
        for name, share in zip(profile.classes, profile.shares, strict=True):
            if share > 0 and not self.node_rps[name]:
                raise PolicyError(
                    f"dynamollm: class {name!r} cannot meet its limits on {profile.tps[-1]} GPUs"
                )
        self._limits = limits
        self._shapes: dict[tuple[tuple[str, float], ...], Shapes] = {}
        self._node_of = dict(self.node_rps)
        """Requests per second that are one node's worth of load, of mixes too."""
        for name, members in MIXES:
            if name in profile.classes:
                shares = {m: float(profile.shares[profile.classes.index(m)]) for m in members}
                load = sum(share / self.node_rps[m] for m, share in shares.items() if share)
                total = sum(shares.values())
                self._node_of[name] = total / load if load else self.node_rps[members[-1]]

    def of(self, pool: str, mix: Mapping[str, float]) -> Shapes:
        """Shapes for a pool that serves loads (in nodes) of these classes."""
        if pool == ALL or pool not in CLASSES:
            parts = {pool: 1.0}
        else:
            total = sum(mix.values())
            foreign = 1.0 - mix.get(pool, 0.0) / total if total else 0.0
            usual = self._foreign(pool)
            mixed = min(1.0, foreign / usual) if usual else 0.0
            mixed = math.ceil(mixed * _PARTS) / _PARTS
            parts = {pool: 1.0 - mixed, mix_of(pool): mixed}
            parts = {name: part for name, part in parts.items() if part > 0}
        key = tuple(parts.items())
        if key not in self._shapes:
            self._shapes[key] = self._make(parts)
        return self._shapes[key]

    def _make(self, parts: Mapping[str, float]) -> Shapes:
        index = [self.profile.classes.index(name) for name in parts]
        weight = np.array(list(parts.values()))
        node_rps = np.array([self._node_of[name] for name in parts])
        limits = self._limits[index] / np.maximum(node_rps, 1e-9)[:, None, None]
        with np.errstate(divide="ignore"):
            most = np.nan_to_num(1.0 / (weight[:, None, None] / limits).sum(axis=0), posinf=0.0)
        power_w, running = np.zeros((2, *most.shape, STEPS))
        for tp, clock in np.ndindex(most.shape):
            at = _GRID * most[tp, clock]
            for share, cls, rps in zip(weight, index, node_rps, strict=True):
                power_w[tp, clock] += share * self.profile.power_at_w(cls, tp, clock, at * rps)
                running[tp, clock] += share * self.profile.running_at(cls, tp, clock, at * rps)
        return Shapes(self.profile.tps, self.profile.clocks_mhz, most, power_w, running)

    def most_of(self, pool: str, mix: Mapping[str, float]) -> float:
        """What a whole node of a pool with this mix can do, in nodes: 1 without foreign load."""
        return float(self.of(pool, mix).most[-1, -1])

    def mixed_frac(self, pool: str, mix: Mapping[str, float]) -> float:
        """Share of what a whole node can do with this mix that it can do with all it covers."""
        if pool not in CLASSES[1:]:
            return 1.0
        others = {name: 1.0 for name in CLASSES if name != pool and covers(pool, name)}
        return min(1.0, self.most_of(pool, others) / max(self.most_of(pool, mix), 1e-9))

    def prefill_tps(self, pool: str, serves: frozenset[str], tp: int) -> float:
        """Prompt tokens per second of a shape at the highest clock, of what a pool serves.

        Args:
            pool: its name.
            serves: classes that it is planned for.
            tp: place in the profile's ``tps``.
        """
        name = mix_of(pool) if serves - {pool} and pool in CLASSES else pool
        return float(self.profile.prefill_tps[self.profile.classes.index(name), tp])

    def _foreign(self, pool: str) -> float:
        """Share of the load that is foreign in the mix that was measured."""
        members = dict(MIXES).get(mix_of(pool), ())
        loads = {
            m: float(self.profile.shares[self.profile.classes.index(m)]) / self.node_rps[m]
            for m in members
            if self.node_rps[m]
        }
        total = sum(loads.values())
        return 1.0 - loads.get(pool, 0.0) / total if total else 0.0


def _most(least: float, slack_frac: float) -> float:
    """Latency over its limit that plans allow, where it is ``least`` on an empty node.

    >>> _most(0.5, 1.0), _most(0.5, 0.2), _most(1.2, 0.2)
    (1.0, 0.6, 1.0)
    """
    return least + slack_frac * (1.0 - least) if least < 1.0 else 1.0


@dataclass(frozen=True, eq=False)
class Shapes:
    """Each shape and clock for one mix: ``[tp, clock]``, with tables over shares of ``most``."""

    tps: tuple[int, ...]
    clocks_mhz: Floats
    most: Floats
    """Highest load within the limits, in nodes; 0 where they cannot be met."""
    power_w: Floats
    running: Floats

    def clock_for(self, tp: int, load: float) -> int:
        """Index of the clock that serves a load for the least power; the highest if none can.

        Args:
            tp: place in ``tps``.
            load: in nodes.
        """
        powers = [
            self._power(tp, clock, load) if self.most[tp, clock] >= load else np.inf
            for clock in range(len(self.clocks_mhz))
        ]
        best = int(np.argmin(powers))
        return best if powers[best] < np.inf else len(self.clocks_mhz) - 1

    def _power(self, tp: int, clock: int, load: float) -> float:
        most = float(self.most[tp, clock])
        return float(np.interp(load / most, _GRID, self.power_w[tp, clock])) if most else np.inf

    def least_power_w(self, tp: int, load: float, *, free_clock: bool) -> float:
        """Power of a shape at a load with the best clock, or at the highest."""
        top = len(self.clocks_mhz) - 1
        clock = self.clock_for(tp, load) if free_clock else top
        return self._power(tp, clock, load) if self.most[tp, clock] >= load else np.inf

    def added_w(self, tp: int) -> list[float]:
        """Power that another node's worth of load adds, over loads up to the most, at best clocks.

        The instance manager will follow the load, so the router looks at the clock that it will
        choose and not at the one that holds.
        """
        if tp not in self._added:
            loads = _GRID * float(self.most[tp].max())
            # Rounding may put the last load a hair beyond the most.
            loads[-1] *= 1.0 - 1e-9
            powers = [self.least_power_w(tp, load, free_clock=True) for load in loads.tolist()]
            usable = loads[-1] > 0 and np.isfinite(powers).all()
            slope_w = np.gradient(powers, loads) if usable else np.full(STEPS, np.inf)
            self._added[tp] = slope_w.tolist()
        return self._added[tp]

    @cached_property
    def _added(self) -> dict[int, list[float]]:
        return {}

    def card(self, tp: int, clock: int) -> Card:
        """What the router looks things up in."""
        key = (tp, clock)
        if key not in self._cards:
            self._cards[key] = self._make_card(tp, clock)
        return self._cards[key]

    @cached_property
    def _cards(self) -> dict[tuple[int, int], Card]:
        return {}

    def _make_card(self, tp: int, clock: int) -> Card:
        most = float(self.most[tp, clock])
        loads, running = _GRID * most, self.running[tp, clock]
        counts = np.arange(COUNTS)
        rising = running + 1e-9 * np.arange(STEPS)
        load = np.interp(counts, rising, loads)
        beyond = counts > rising[-1]
        load[beyond] = most * counts[beyond] / max(rising[-1], 1e-6)
        slope_w = np.gradient(self.power_w[tp, clock], loads) if most else np.full(STEPS, np.inf)
        return Card(load.tolist(), slope_w.tolist(), most)


_GRID = np.linspace(0.0, 1.0, STEPS)
COUNTS = 600
"""Requests in flight on an instance that cards go up to."""


@dataclass(frozen=True, slots=True)
class Card:
    """An instance as the router sees it."""

    load: list[float]
    """By number of requests in flight: load in nodes that so many requests in flight stand for."""
    slope_w: list[float]
    """Power that another node's worth of load would add, over shares of ``most``."""
    most: float
    """Highest load within the limits."""
