"""Lower the clock of GPUs that run hot, and give it back when they have cooled."""

import numpy as np

from testbed.policies import Command, LockClocks, View


class CoolDown:
    """Locks GPUs above ``hot_c`` at a share of their clock, until they are under ``cool_c``."""

    period_s = 2.0

    def __init__(self, *, hot_c: float = 70.0, cool_c: float = 62.0, clock_frac: float = 0.7):
        self.hot_c, self.cool_c, self.clock_frac = hot_c, cool_c, clock_frac
        self.slowed: set[int] = set()

    def step(self, view: View) -> list[Command]:
        gpus = view.gpus
        hot = set(np.flatnonzero(gpus.temp_c > self.hot_c).tolist()) - self.slowed
        cool = set(np.flatnonzero(gpus.temp_c < self.cool_c).tolist()) & self.slowed
        self.slowed = (self.slowed | hot) - cool
        commands: list[Command] = []
        if hot:
            slow = np.array(sorted(hot))
            clock_mhz = gpus.sm_clock_max_mhz[slow] * self.clock_frac
            commands.append(LockClocks(slow, clock_mhz, f"{len(hot)} above {self.hot_c:g} C"))
        if cool:
            commands.append(LockClocks(np.array(sorted(cool)), 0.0, f"{len(cool)} have cooled"))
        return commands
