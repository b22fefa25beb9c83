"""TAPAS: thermal- and power-aware placement, routing and configuration (arXiv 2501.02600).

Written from published descriptions. Three controllers, each a switch: the allocator places new GPU
VMs (`allocator`), the balancer keeps requests from instances at risk (`balancer.TapasRouter`, the
run's router), and the configurator gives instances the setting that serves their demand with the
least heat and power (`configurator`). All go by models learnt from telemetry (`predictors`).

An emergency is when limits are well below what they were rated for: a UPS or an air handler is out.
Then only instances of the provider give way, also in quality, so that opaque VMs are not capped.
Periods, margins and percentiles are not known; those here are ours.

>>> from testbed.core.view import view_of, with_facility
>>> view = view_of([[0.0, 0.0], [600.0, 0.0]])
>>> view.gpus.instance[[0, 1, 3]] = -1
>>> view = with_facility(view, row_limit_w=1400.0, inlet_c=[24.0, 20.0, 24.0, 24.0], waiting=[-1])
>>> [command] = Tapas(configure=False).step(view)
>>> command.vms.tolist(), command.nodes.tolist()  # the cooler of the free places
([0], [1])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from testbed.core.view import Facility
from testbed.policies import Command, View
from testbed.policies.tapas.allocator import Allocator
from testbed.policies.tapas.balancer import TapasRouter
from testbed.policies.tapas.configurator import Configurator
from testbed.policies.tapas.predictors import Predictors

__all__ = ["Tapas", "TapasRouter"]

_SHRUNK = 0.97
"""Limits under this share of their rating are an emergency."""


class Tapas:
    """Allocator and configurator on common predictors.

    Args:
        place: run the allocator.
        configure: run the configurator.
        profiles: what instances can be, see `configurator.Profiles`.
        temp_limit_c: temperature at which GPUs slow down.
        temp_margin_c: how far below it predictions must stay.
        margin: share of row power and aisle air that the allocator keeps free.
        target, air_target: shares of row power and aisle air that the configurator may use.
        percentile: of VMs' power at an hour of the day that is planned with.
        observe_s: how often telemetry is learnt from.
        period_s: how often clocks and batches may move.
    """

    needs = ("plant",)

    def __init__(
        self,
        *,
        place: bool = True,
        configure: bool = True,
        profiles: Sequence[dict[str, Any]] = (),
        temp_limit_c: float = 87.0,
        temp_margin_c: float = 3.0,
        margin: float = 0.05,
        target: float = 0.93,
        air_target: float = 1.0,
        percentile: float = 0.95,
        demand_margin: float = 0.25,
        reload_period_s: float = 300.0,
        observe_s: float = 60.0,
        period_s: float = 10.0,
    ) -> None:
        for name, value in {"margin": margin, "target": target, "percentile": percentile}.items():
            if not 0 < value < 1:
                raise ValueError(f"{name} = {value} must be between 0 and 1")
        self.place, self.configure = place, configure
        self.percentile, self.observe_s, self.period_s = percentile, observe_s, period_s
        temp_c = temp_limit_c - temp_margin_c
        self._allocator = Allocator(temp_limit_c=temp_c, margin=margin)
        self._configurator = Configurator(
            profiles,
            temp_limit_c=temp_c,
            target=target,
            air_target=air_target,
            demand_margin=demand_margin,
            reload_period_s=reload_period_s,
        )
        self._models: Predictors | None = None
        self._observed_s = -np.inf

    @property
    def remarks(self) -> list[str]:
        """What it will not do."""
        if not self.configure or len(self._configurator.profiles.tp):
            return []
        return ["configure = true without profiles: instances are left as they are"]

    def step(self, view: View) -> list[Command]:
        """Learn from the view, place what waits, configure what serves."""
        facility = view.facility
        if facility is None:
            return []
        models = self._learn(view, facility)
        commands: list[Command] = []
        if self.place:
            placed = self._allocator.place(view.gpus, facility, models)
            commands += [placed] if placed is not None else []
        if self.configure:
            emergency = in_emergency(facility)
            commands += self._configurator.step(view, models, emergency=emergency)
        return commands

    def forget_time(self) -> None:
        """Begin a new run with what was learnt in another: clocks start at zero again."""
        self._observed_s = -np.inf
        self._configurator.reset()

    def _learn(self, view: View, facility: Facility) -> Predictors:
        if self._models is None:
            self._models = Predictors(view.gpus, facility, self.percentile)
        if view.now_s - self._observed_s >= self.observe_s - 1e-9:
            self._observed_s = view.now_s
            self._models.observe(view.gpus, facility)
            self._allocator.observe(facility)
        return self._models


def in_emergency(facility: Facility) -> bool:
    """Whether a UPS or an air handler is out."""
    short = facility.aisles.capacity_m3_s < _SHRUNK * facility.aisles.rating_m3_s
    return bool(short.any() or not facility.ups.up.all())
