"""The pool manager: how the GPUs of a pool are cut into instances.

    min   sum_j N_j * E_j      s.t.  sum_j tp_j * N_j <= GPUs,  sum_j N_j * L_j >= L

over kinds of instance j: a tensor-parallel degree at a load L_j within its latency limits, drawing
E_j at the best clock. An integer program, solved by HiGHS within ``TIME_LIMIT_S``; if that finds
nothing, greedily by watts per load.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from testbed.policies.dynamollm.capacity import Shapes

TIME_LIMIT_S = 2.0
WORTH_FRAC = 0.05
"""Power that another layout must save to be worth its change: what an instance was doing is handed
back and computed again, and a fifth of what is sent there in the first two seconds is late."""
_LOADS = np.array([0.0, 0.15, 0.3, 0.45, 0.6, 0.7, 0.8, 0.9, 1.0])
"""Loads that instances may be planned for, as shares of the most they can do."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of instance."""

    tp: int
    load: float
    power_w: float


def kinds_of(shapes: Shapes, allowed: tuple[int, ...], *, free_clock: bool) -> list[Kind]:
    """Every kind that the planner may use.

    Args:
        shapes: what shapes can do for the pool's mix.
        allowed: tensor-parallel degrees.
        free_clock: clocks may be lowered; else all run at the highest.
    """
    found = []
    for place, tp in enumerate(shapes.tps):
        if tp not in allowed:
            continue
        most = float(shapes.most[place].max() if free_clock else shapes.most[place, -1])
        if most <= 0:
            continue
        for load in _LOADS * most:
            power_w = shapes.least_power_w(place, float(load), free_clock=free_clock)
            if np.isfinite(power_w):
                found.append(Kind(tp, float(load), power_w))
    return found


def plan(
    kinds: list[Kind],
    gpus: int,
    load: float,
    *,
    use_all: bool,
    empty_w: float = 0.0,
    held: Sequence[int] = (),
) -> list[Kind]:
    """The instances that serve ``load`` for the least power; the largest load they can if none do.

    Args:
        kinds: what may be used.
        gpus: of the pool.
        load: in nodes.
        use_all: leave no GPU without an instance.
        empty_w: draw of a GPU without one.
        held: tensor-parallel degrees of the instances that are there. They stay as they are where
            they can serve the load for at most `WORTH_FRAC` more than others would.

    >>> cheap, quick = Kind(2, 0.2, 500.0), Kind(8, 1.0, 3000.0)
    >>> [kind.tp for kind in plan([cheap, quick], 8, 0.5, use_all=False)]
    [2, 2, 2]
    >>> [kind.tp for kind in plan([cheap, quick], 8, 0.9, use_all=False)]
    [8]
    """
    if not kinds or gpus <= 0:
        return []
    counts = _solve(kinds, gpus, load, use_all, empty_w)
    if counts is None:
        counts = _greedy(kinds, gpus, load)
    elif held:
        kept = _solve(kinds, gpus, load, use_all, empty_w, held)
        if kept is not None:
            new_w, kept_w = (_power_w(kinds, some, gpus, empty_w) for some in (counts, kept))
            counts = kept if kept_w <= new_w * (1.0 + WORTH_FRAC) else counts
    return [kind for kind, count in zip(kinds, counts, strict=True) for _ in range(count)]


def _power_w(kinds: list[Kind], counts: list[int], gpus: int, empty_w: float) -> float:
    chosen = list(zip(kinds, counts, strict=True))
    used = sum(kind.tp * count for kind, count in chosen)
    return sum(kind.power_w * count for kind, count in chosen) + empty_w * (gpus - used)


def _solve(
    kinds: list[Kind],
    gpus: int,
    load: float,
    use_all: bool,
    empty_w: float,
    held: Sequence[int] = (),
) -> list[int] | None:
    """Counts of each kind, or None; with ``held`` just so many of each degree."""
    tp = np.array([kind.tp for kind in kinds], dtype=np.float64)
    cost_w = np.array([kind.power_w for kind in kinds]) - empty_w * tp
    served = np.array([kind.load for kind in kinds])
    limits = [
        LinearConstraint(tp, gpus if use_all else 0, gpus),
        LinearConstraint(served, load, np.inf),
    ]
    if held:
        for degree in sorted({*held, *tp.astype(int).tolist()}):
            count = list(held).count(degree)
            limits.append(LinearConstraint((tp == degree).astype(float), count, count))
    result = milp(
        cost_w,
        integrality=np.ones(len(kinds)),
        bounds=Bounds(0, gpus),
        constraints=limits,
        options={"time_limit": TIME_LIMIT_S, "mip_rel_gap": 1e-3},
    )
    if result.x is None:
        return None
    return [round(count) for count in result.x]


def _greedy(kinds: list[Kind], gpus: int, load: float) -> list[int]:
    """Instances one by one, the fewest watts per load served first, until all of it is served.

    Where the GPUs do not suffice, those that serve the most per GPU.

    >>> _greedy([Kind(2, 0.2, 500.0), Kind(8, 1.0, 3000.0)], 16, 0.4)
    [2, 0]
    >>> _greedy([Kind(2, 0.2, 500.0), Kind(8, 1.0, 3000.0)], 16, 9.0)
    [0, 2]
    """
    able = [k for k, kind in enumerate(kinds) if kind.load > 0]
    counts = [0] * len(kinds)
    if not able:
        return counts
    densest = max(able, key=lambda k: kinds[k].load / kinds[k].tp)
    enough = gpus // kinds[densest].tp * kinds[densest].load >= load
    left, room = load, gpus
    while room > 0 and not (enough and left <= 0):
        need = max(left, 1e-9)
        fits = [k for k in able if kinds[k].tp <= room]
        fits.sort(key=lambda k: kinds[k].power_w / min(kinds[k].load, need))
        if not fits:
            break
        # The cheapest, as long as the rest could still be served; else the densest.
        chosen = next(
            (
                k
                for k in fits
                if (room - kinds[k].tp) // kinds[densest].tp * kinds[densest].load
                >= left - kinds[k].load
            ),
            densest if kinds[densest].tp <= room else fits[0],
        )
        counts[chosen] += 1
        room -= kinds[chosen].tp
        left -= kinds[chosen].load
    return counts
