"""What serving by real engines has in common: its instances stay what they were at the start."""

from __future__ import annotations

from emulators.server import NO_SLOTS
from testbed.core.errors import DeviceError
from testbed.core.messages import InstanceConfig, NodeConfig, SlotReadings, StartHow


class FixedServing:
    """The part of `daemons.seams.Serving` that changes instances: refused."""

    def configure_slots(self, config: NodeConfig, t_s: float) -> None:
        """Refuse.

        Raises:
            DeviceError: always.
        """
        raise DeviceError(
            "instances of real engines are fixed: cluster.elastic needs emulated GPUs"
        )

    def arrange(
        self, sequence: int, instances: list[InstanceConfig], how: StartHow, t_s: float
    ) -> None:
        """Refuse.

        Raises:
            DeviceError: always.
        """
        raise DeviceError(f"instances of real engines are fixed: no layout {sequence} for them")

    def slots(self) -> SlotReadings:
        """There are none."""
        return NO_SLOTS
