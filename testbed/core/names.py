"""Names are paths, outermost first: ``row0/rack1/node003/gpu5``.

>>> gpu_name(node_name(0, 1, 3), 5)
'row0/rack1/node003/gpu5'
>>> row_of("row0/rack1/node003/gpu5"), parent("row0/rack1/node003/gpu5")
('row0', 'row0/rack1/node003')
"""

from __future__ import annotations


def node_name(row: int, rack: int, node: int) -> str:
    """Path of a node; ``node`` counts through the whole cluster, so its last part is unique."""
    return f"row{row}/rack{rack}/node{node:03d}"


def gpu_name(node: str, index: int) -> str:
    """Path of a GPU. ``index`` is its place in the node at start; devices are keyed by UUID."""
    return f"{node}/gpu{index}"


def instance_name(node: str, pool: str, index: int) -> str:
    """Path of a serving instance on its node."""
    return f"{node}/{pool}{index}"


def slot_name(node: str, index: int) -> str:
    """Path of an instance slot, in runs whose instances change: that of the GPU it begins at."""
    return f"{node}/slot{index}"


def parent(name: str) -> str:
    """The path one level up; empty for an outermost name."""
    return name.rpartition("/")[0]


def row_of(name: str) -> str:
    """The row that a node, GPU or instance belongs to."""
    return name.partition("/")[0]
