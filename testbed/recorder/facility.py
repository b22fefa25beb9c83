"""The building of a view as flat columns, and back: how a recording keeps it.

>>> from testbed.core.view import view_of, with_facility
>>> facility = with_facility(view_of([[300.0], [0.0]]), waiting=[-1]).facility
>>> columns = facility_columns(facility)
>>> columns["servers.draw_w"].tolist(), columns["vms.node"].tolist(), columns["hour"].tolist()
([300.0, 0.0], [-1.0], [4884.0])
>>> again = facility_of(columns, facility.servers.name)
>>> bool(again.servers.dark.dtype == facility.servers.dark.dtype), again.vms.name
(True, ('vm0',))
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from testbed.core.view import (
    AisleColumns,
    Facility,
    Floats,
    ServerColumns,
    UpsColumns,
    VmColumns,
)

_PARTS: dict[str, tuple[type[Any], str]] = {
    "servers": (ServerColumns, "node"),
    "aisles": (AisleColumns, "aisle"),
    "ups": (UpsColumns, "ups"),
    "vms": (VmColumns, "vm"),
}
OWNERS = ("gpu_vm", "vms.customer")
"""Quantities that say which opaque VM holds a GPU, and whose it is."""
_KINDS = {"Floats": np.float64, "Ints": np.int64, "Bools": np.bool_}


def facility_columns(facility: Facility) -> dict[str, Floats]:
    """Every quantity by name, one value per place; copies."""
    found: dict[str, Floats] = {}
    for part in fields(facility):
        value = getattr(facility, part.name)
        if is_dataclass(value):
            for column in fields(value):
                if column.name != "name":
                    values = np.array(getattr(value, column.name), np.float64)
                    found[f"{part.name}.{column.name}"] = values
        else:
            found[part.name] = np.atleast_1d(np.array(value, np.float64))
    return found


def facility_of(columns: dict[str, Floats], nodes: tuple[str, ...]) -> Facility:
    """The facility that such columns are of; ``nodes`` names its servers."""
    parts: dict[str, Any] = {}
    for part in fields(Facility):
        if part.name in _PARTS:
            struct, word = _PARTS[part.name]
            inner = [column for column in fields(struct) if column.name != "name"]
            values: dict[str, Any] = {
                column.name: columns[f"{part.name}.{column.name}"].astype(_KINDS[str(column.type)])
                for column in inner
            }
            count = len(values[inner[0].name])
            names = nodes if part.name == "servers" else tuple(f"{word}{k}" for k in range(count))
            parts[part.name] = struct(name=names, **values)
        elif str(part.type) == "float":
            parts[part.name] = float(columns[part.name][0])
        else:
            parts[part.name] = columns[part.name].astype(_KINDS[str(part.type)])
    return Facility(**parts)
