"""A policy that says anything, often: what it does to requests is what matters."""

import numpy as np

from testbed.policies import (
    Command,
    OrderQueue,
    Placement,
    RecallWaiting,
    SetBatch,
    SetLayout,
    View,
)


class Shuffle:
    """Random layouts and queue changes for random nodes, until ``until_s``."""

    period_s = 0.3

    def __init__(self, *, seed: int = 1, until_s: float = 10.0):
        self.random = np.random.default_rng(seed)
        self.until_s = until_s

    def step(self, view: View) -> list[Command]:
        nodes = int(view.gpus.node.max()) + 1
        per_node = len(view.gpus.node) // nodes
        if view.now_s > self.until_s:
            # Something for everybody, so that all can end.
            whole = (Placement(0, per_node, 0, 0),)
            own = SetBatch(np.arange(len(view.instances.num_gpus)), 0)
            return [*(SetLayout(node, whole) for node in range(nodes)), own]
        random = self.random
        commands: list[Command] = [
            SetLayout(int(random.integers(nodes)), self.layout(view, per_node))
        ]
        slot = random.integers(len(view.instances.num_gpus), size=2)
        commands.append(SetBatch(slot, int(random.integers(0, 6))))
        commands.append(RecallWaiting(slot))
        commands.append(OrderQueue(slot, by=("deadline", "arrival")[int(random.integers(2))]))
        return commands if random.random() < 0.7 else []

    def layout(self, view: View, per_node: int) -> tuple[Placement, ...]:
        placements = []
        gpu = 0
        while gpu < per_node:
            fits = [tp for tp in (1, 2, 4, 8) if gpu + tp <= per_node]
            tp = int(self.random.choice(fits))
            if self.random.random() < 0.7:
                pool = int(self.random.integers(len(view.pools)))
                model = int(self.random.integers(len(view.models)))
                precision = ("bf16", "fp8")[int(self.random.integers(2))]
                placements.append(Placement(gpu, tp, pool, model, precision))
            gpu += tp
        return tuple(placements)
