"""The cluster manager: how many nodes each pool gets.

nodes = ceil(PL / ML), peak load predicted over the most that a node can do. Nine pools that each
round up would waste up to nine nodes, so only the largest may be over-provisioned: the others get
the whole nodes they fill, and what is left over moves up to the next larger class. A node that
serves several classes may do less than half of what one class's could, though, so that moving up
can take more nodes than it saves: a pool keeps its remainder where that makes fewer in all.

Loads are in nodes (`capacity`): a class's requests per second over those a node can serve.

>>> nodes_for({"ss": 1.25, "sm": 0.25, "ll": 0.75})
{'ss': 1, 'll': 2}
>>> spread({"ss": 1.25, "sm": 0.25, "ll": 0.75}, {"ss": 1, "ll": 2})
{'ss': {'ss': 1.0}, 'll': {'sm': 0.25, 'ss': 0.25, 'll': 0.75}}
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from testbed.policies.dynamollm.classes import ALL, CLASSES, next_larger

Mix = dict[str, float]
"""Load by class, in nodes."""
_NOTHING = 1e-6
_LEAST = 0.05
"""Least that a node is taken to do."""
MostOf = Callable[[str, Mapping[str, float]], float]


def _whole(pool: str, mix: Mapping[str, float]) -> float:
    return 1.0


def nodes_for(load: Mapping[str, float], most_of: MostOf = _whole) -> dict[str, int]:
    """Nodes of each pool that gets any.

    Args:
        load: predicted peak of each class; of `ALL` only in a system of one pool.
        most_of: what a node of a pool with a mix can do, in nodes.

    >>> half_if_mixed = lambda pool, mix: 1.0 if len(mix) == 1 else 0.5
    >>> nodes_for({"ls": 0.8, "ll": 0.4}, half_if_mixed)
    {'ls': 1, 'll': 1}
    """
    keeping: frozenset[str] = frozenset()
    best = _nodes(load, most_of, keeping)
    while True:
        able = [name for name in CLASSES[:-1] if name in load and name not in keeping]
        tried = [(_nodes(load, most_of, keeping | {name}), keeping | {name}) for name in able]
        fewest = min(tried, key=lambda one: sum(one[0].values()), default=None)
        if fewest is None or sum(fewest[0].values()) >= sum(best.values()):
            return best
        best, keeping = fewest


def _nodes(load: Mapping[str, float], most_of: MostOf, keeping: frozenset[str]) -> dict[str, int]:
    """By the rule, where the pools in ``keeping`` are rounded up too."""
    nodes: dict[str, int] = {}

    def room(name: str, have: Mix) -> float:
        most = max(most_of(name, have), _LEAST)
        need = sum(have.values()) / most
        up = name in (CLASSES[-1], ALL) or name in keeping
        nodes[name] = math.ceil(need - _NOTHING) if up else math.floor(need + _NOTHING)
        return nodes[name] * most

    _flow(load, room)
    return {name: count for name, count in nodes.items() if count}


def spread(
    load: Mapping[str, float], nodes: Mapping[str, float], most_of: MostOf = _whole
) -> dict[str, Mix]:
    """Which classes' load each pool with nodes serves, where none but the last may overflow."""

    def room(name: str, have: Mix) -> float:
        count = nodes.get(name, 0)
        return count * max(most_of(name, have), _LEAST) if count else 0.0

    served = _flow(load, room)
    names = [name for name in (*CLASSES, ALL) if nodes.get(name)]
    # Nobody above has nodes: what would go there stays in the largest pool that has some.
    for name in [name for name in served if not nodes.get(name)]:
        if names:
            _add(served.setdefault(names[-1], {}), served.pop(name))
    return {name: served[name] for name in names if served.get(name)}


def _flow(load: Mapping[str, float], room: Callable[[str, Mix], float]) -> dict[str, Mix]:
    """Let what has no room move up; the largest class keeps what comes to it."""
    if ALL in load:
        room(ALL, dict(load))
        return {ALL: dict(load)}
    arrived: dict[str, Mix] = {name: {} for name in CLASSES}
    served: dict[str, Mix] = {}
    for name in CLASSES:
        have = arrived[name]
        if load.get(name, 0.0) > _NOTHING:
            _add(have, {name: load[name]})
        if sum(have.values()) <= _NOTHING:
            continue
        left = room(name, have)
        if name == CLASSES[-1]:
            served[name] = have
            continue
        for other in sorted(have, key=lambda other: other != name):  # its own class first
            part = min(have[other], left)
            left -= part
            if part > _NOTHING:
                _add(served.setdefault(name, {}), {other: part})
            if have[other] - part > _NOTHING:
                _add(arrived[next_larger(name)], {other: have[other] - part})
    return served


def _add(to: Mix, more: Mapping[str, float]) -> None:
    for name, value in more.items():
        to[name] = to.get(name, 0.0) + value
