"""Fitting instances into nodes, with as few changes as possible.

>>> fit([4, 4, 8, 2], {0: (8,), 1: (4, 2, 2)}, [0, 1, 2], gpus_per_node=8)
{0: (8,), 1: (4, 2), 2: (4,)}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Shape = tuple[int, ...]
"""Tensor-parallel degrees of the instances on a node, largest first."""


def fit(
    tps: Sequence[int],
    before: Mapping[int, Shape],
    nodes: Sequence[int],
    *,
    gpus_per_node: int,
) -> dict[int, Shape]:
    """The shape of each node such that all of ``tps`` find a place.

    Instances that are there already stay as far as they are wanted; the rest fill nodes up, the
    largest first. Degrees are powers of two, so that whatever fits in sum fits in place.
    """
    wanted = {tp: list(tps).count(tp) for tp in sorted(set(tps), reverse=True)}
    kept: dict[int, list[int]] = {}
    # Nodes that can be left alone first: every instance that moves costs a restart.
    for node in sorted(nodes, key=lambda node: -len(before.get(node, ()))):
        kept[node] = []
        for tp in before.get(node, ()):
            if wanted.get(tp, 0):
                wanted[tp] -= 1
                kept[node].append(tp)
    for tp, count in wanted.items():
        for _ in range(count):
            place = _roomiest(kept, tp, gpus_per_node)
            if place is None:
                place = _emptied(kept, tp, gpus_per_node)
            if place is not None:
                kept[place].append(tp)
    return {node: tuple(sorted(kept[node], reverse=True)) for node in nodes}


def _roomiest(kept: Mapping[int, list[int]], tp: int, gpus: int) -> int | None:
    """The fullest node that still has room."""
    able = [node for node, held in kept.items() if sum(held) + tp <= gpus]
    return max(able, key=lambda node: (sum(kept[node]), -node), default=None)


def _emptied(kept: dict[int, list[int]], tp: int, gpus: int) -> int | None:
    """A node made roomy by moving its smallest instances to others, if that can be done."""
    for node, held in sorted(kept.items(), key=lambda entry: sum(entry[1])):
        moving = sorted(held)
        others = {other: list(has) for other, has in kept.items() if other != node}
        stays = list(moving)
        for small in moving:
            if sum(stays) + tp <= gpus:
                break
            place = _roomiest(others, small, gpus)
            if place is None:
                break
            others[place].append(small)
            stays.remove(small)
        if sum(stays) + tp <= gpus:
            kept.update(others)
            kept[node] = stays
            return node
    return None


def first_gpus(shape: Shape) -> list[int]:
    """Where each instance of a shape begins on its node.

    >>> first_gpus((4, 2, 2))
    [0, 4, 6]
    """
    return [sum(shape[:place]) for place in range(len(shape))]
