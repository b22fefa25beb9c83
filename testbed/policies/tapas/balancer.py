"""Which instance of an endpoint takes a request: those at risk of heat or power take less, or none.

A table of risks is made every ``table_s`` from what the view shows: how near the hottest GPU is to
its limit, and how much of their limits row and aisle use. Between ``ramp`` and the limit an
instance's weight falls from 1 to 0; with all of a pool at risk the least endangered still serve.
Rows with more room than others get somewhat more. Requests then go to the least loaded instance
for its weight.

>>> from testbed.core.view import view_of, with_facility
>>> from testbed.policies import Request
>>> view = with_facility(view_of([[500.0], [100.0]], outstanding_tokens=[0.0, 500.0]),
...                      row_limit_w=500.0)
>>> TapasRouter().route(Request(0, 0.0, 10, 10), view)
1
"""

from __future__ import annotations

import numpy as np

from testbed.core.view import Floats
from testbed.policies import Request, View


class TapasRouter:
    """Least outstanding tokens per weight, where weight falls with risk.

    Args:
        temp_limit_c: temperature at which GPUs slow down.
        temp_ramp_c: where a weight begins to fall, below that; it is 0 ``temp_margin_c`` below.
        ramp: load of row or aisle where it begins to fall; it is 0 at ``top``.
        lean: how strongly rows with room are preferred.
        table_s: age of the table of risks.
    """

    def __init__(
        self,
        *,
        temp_limit_c: float = 87.0,
        temp_ramp_c: float = 6.0,
        temp_margin_c: float = 2.0,
        ramp: float = 0.88,
        top: float = 0.97,
        lean: float = 2.0,
        table_s: float = 60.0,
    ) -> None:
        if not 0 < ramp < top:
            raise ValueError(f"need 0 < ramp < top, not {ramp}, {top}")
        if not 0 <= temp_margin_c < temp_ramp_c:
            raise ValueError(
                f"need temp_margin_c < temp_ramp_c, not {temp_margin_c}, {temp_ramp_c}"
            )
        self.temp_limit_c, self.temp_ramp_c = temp_limit_c, temp_ramp_c
        self.temp_margin_c = temp_margin_c
        self.ramp, self.top, self.lean, self.table_s = ramp, top, lean, table_s
        self._made_s = -np.inf
        self._weights: Floats = np.zeros(0)

    def route(self, request: Request, view: View) -> int | None:
        """The least loaded instance for its weight, or None while the whole pool is down."""
        instances = view.instances
        usable = (instances.pool == view.pool_of_class[request.slo_class]) & instances.up
        if not usable.any():
            return None
        weights = np.where(usable, self.weights(view), 0.0)
        if weights.max() <= 0.0:
            weights = usable.astype(float)
        with np.errstate(divide="ignore"):
            # One request's worth, so that idle instances differ by weight as well.
            tokens = (instances.outstanding_tokens + 1000.0) / weights
        return int(np.argmin(tokens))

    def weights(self, view: View) -> Floats:
        """Weight of each instance, from a table that is at most ``table_s`` old."""
        if view.now_s - self._made_s >= self.table_s - 1e-9 or len(self._weights) != len(
            view.instances.name
        ):
            self._made_s = view.now_s
            table = self._table(view)
            # Half way at a time: all at once, the load would swing between two rows.
            same = len(self._weights) == len(table)
            self._weights = (self._weights + table) / 2 if same else table
        return self._weights

    def _table(self, view: View) -> Floats:
        gpus, instances, facility = view.gpus, view.instances, view.facility
        served = gpus.instance >= 0
        hottest_c = np.full(len(instances.name), -np.inf)
        np.maximum.at(hottest_c, gpus.instance[served], gpus.temp_c[served])
        span_c = self.temp_ramp_c - self.temp_margin_c
        risk = (hottest_c - self.temp_limit_c + self.temp_ramp_c) / span_c
        row_of_node = np.zeros(int(gpus.node.max()) + 1, np.int64)
        row_of_node[gpus.node] = gpus.row
        row = row_of_node[instances.node]
        row_load = view.row_load_frac()
        loads = row_load[row]
        risk = np.maximum(risk, (loads - self.ramp) / (self.top - self.ramp))
        if facility is not None:
            aisles = facility.aisles
            used = aisles.airflow_m3_s / np.maximum(aisles.capacity_m3_s, 1e-9)
            short = used[facility.servers.aisle[instances.node]]
            risk = np.maximum(risk, (short - self.ramp) / (self.top - self.ramp))
        weight = np.clip(1.0 - risk, 0.0, 1.0)
        slack = 1.0 - np.clip(np.where(np.isfinite(row_load), row_load, 0.0), 0.0, 1.5)
        leaning = np.clip(1.0 + self.lean * (slack - slack.mean()), 0.25, 2.0)[row]
        # Nobody is left out altogether where everybody is at risk.
        table: Floats = weight * leaning
        for pool in np.unique(instances.pool):
            members = instances.pool == pool
            if table[members].max() < 0.05:
                table[members] = leaning[members] / (1.0 + np.maximum(risk[members], 0.0))
        return table
