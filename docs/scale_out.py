"""Give a pool another node when its instances have much to do, and take it back when not."""

import numpy as np

from testbed.policies import Command, Placement, SetLayout, View


class ScaleOut:
    """Fills whole nodes with one instance of pool 0, by outstanding tokens per instance."""

    period_s = 5.0

    def __init__(self, *, high_tokens: float = 20_000.0, low_tokens: float = 4_000.0, tp: int = 8):
        self.high_tokens, self.low_tokens, self.tp = high_tokens, low_tokens, tp

    def step(self, view: View) -> list[Command]:
        slots = view.instances
        held = slots.num_gpus > 0
        load = slots.outstanding_tokens.sum() / max(held.sum(), 1)
        empty = np.setdiff1d(slots.node, slots.node[held])
        if load > self.high_tokens and len(empty):
            layout = (Placement(0, self.tp, pool=0, model=0),)
            return [SetLayout(int(empty[0]), layout, why=f"{load:.0f} tokens per instance")]
        if load < self.low_tokens and held.sum() > 1:
            last = int(slots.node[held].max())
            return [SetLayout(last, (), why=f"only {load:.0f} tokens per instance")]
        return []
