"""Put each GPU VM on some free node, whatever it draws: the placement that others are held against.

Rows are filled evenly by number of VMs, and within a row the choice is pseudo-random (seeded), so
that neither the order of arrival nor the numbering of servers makes a pattern.

>>> from testbed.core.view import view_of, with_facility
>>> view = view_of([[0.0, 0.0], [0.0, 0.0]])
>>> view.gpus.instance[:] = -1
>>> view = with_facility(view, waiting=[-1, -1])
>>> [command] = BlindPlacement().step(view)
>>> command.vms.tolist(), len(set(command.nodes.tolist()))
([0, 1], 2)
"""

from __future__ import annotations

import numpy as np

from testbed.policies import Command, PlaceVm, View


class BlindPlacement:
    """Spreads VMs over rows by count and over a row at random."""

    needs = ("plant",)

    def __init__(self, *, seed: int = 1, period_s: float = 1.0) -> None:
        self.period_s = period_s
        self._random = np.random.default_rng([seed, 43])

    def step(self, view: View) -> list[Command]:
        """Places for all VMs that wait and for which there is room."""
        if view.facility is None:
            return []
        vms, servers = view.facility.vms, view.facility.servers
        free = servers.free_gpus.copy()
        taken = np.bincount(servers.row[vms.node[vms.node >= 0]], minlength=len(view.rows.name))
        chosen: list[tuple[int, int]] = []
        for vm in np.flatnonzero(vms.node == -1):
            room = np.flatnonzero((free >= vms.num_gpus[vm]) & ~servers.dark)
            if not len(room):
                break
            emptiest = room[taken[servers.row[room]] == taken[servers.row[room]].min()]
            node = int(self._random.choice(emptiest))
            free[node] -= vms.num_gpus[vm]
            taken[servers.row[node]] += 1
            chosen.append((int(vm), node))
        if not chosen:
            return []
        which, where = np.array(chosen).T
        return [PlaceVm(which, where, "spread")]
