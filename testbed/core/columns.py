"""Columns of readings: one array per quantity in use, packed records on the wire.

A bank report has a dozen quantities for each GPU, and a coordinator takes in hundreds of thousands
of them a second. As lists, every number would be decoded into an object and checked by itself. So
a table of readings is an array of fixed records (little-endian, no padding) and travels as its
bytes; what can be wrong with them is their number. Joining the tables of many nodes is joining
their bytes.

>>> class Readings(Columns):
...     power_w: F8
...     lost: Flags
>>> sent = Readings(power_w=[300.5, 0.0], lost=[False, True])
>>> got = Readings.unpack(sent.pack())
>>> got == sent, len(got), got.power_w.tolist(), got.lost.tolist(), Readings.size_bytes
(True, 2, [300.5, 0.0], [False, True], 9)
>>> Readings.unpack(b"four")
Traceback (most recent call last):
...
ValueError: 4 bytes are no whole number of records of 9
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Self, dataclass_transform, get_type_hints

import numpy as np
from numpy.typing import NDArray

F8 = Annotated[Sequence[float] | NDArray[np.float64], "<f8"]
"""A column of real numbers. In full precision: live and virtual decisions must not differ."""
I8 = Annotated[Sequence[int] | NDArray[np.int64], "<i8"]
Flags = Annotated[Sequence[bool] | NDArray[np.bool_], "u1"]
"""A byte each, of which any but 0 means yes: so no byte is a wrong one."""


@dataclass_transform()
class Columns:
    """One column per annotated field, all of one length; see the module's story."""

    names: ClassVar[tuple[str, ...]] = ()
    layout: ClassVar[np.dtype[Any]]
    """One record: a field per column, in their order."""
    size_bytes: ClassVar[int]
    """Of a record."""

    def __init_subclass__(cls) -> None:
        hints = get_type_hints(cls, include_extras=True)
        kinds = [
            (name, hint.__metadata__[0])
            for name, hint in hints.items()
            if hasattr(hint, "__metadata__")
        ]
        cls.names = tuple(name for name, _ in kinds)
        cls.layout = np.dtype(kinds)
        cls.size_bytes = cls.layout.itemsize

    def __init__(self, *columns: Any, **named: Any) -> None:
        given = dict(zip(self.names, columns, strict=False), **named)
        if len(columns) + len(named) != len(self.names) or given.keys() != set(self.names):
            odd = sorted(given.keys() ^ set(self.names))
            raise TypeError(f"{type(self).__name__}: {len(self.names)} columns needed; see {odd}")
        count = len(given[self.names[0]])
        self.records = np.empty(count, self.layout)
        for name, column in given.items():
            if len(column) != count:
                raise ValueError(f"{type(self).__name__}.{name}: {len(column)} of {count} entries")
            self.records[name] = column

    @classmethod
    def of(cls, records: NDArray[Any]) -> Self:
        """Columns of an array of records, not copied."""
        made = cls.__new__(cls)
        made.records = records
        return made

    @classmethod
    def empty(cls) -> Self:
        """No entries."""
        return cls.of(np.empty(0, cls.layout))

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """The columns in ``data``, which `pack` made; they can be read and not changed.

        Raises:
            ValueError: it cannot be that.
        """
        if len(data) % cls.size_bytes:
            raise ValueError(
                f"{len(data)} bytes are no whole number of records of {cls.size_bytes}"
            )
        return cls.of(np.frombuffer(data, cls.layout))

    def pack(self) -> bytes:
        """The records as they travel."""
        return self.records.tobytes()

    def __getattr__(self, name: str) -> Any:
        if name not in self.names:
            raise AttributeError(f"{type(self).__name__} has no {name}")
        column = self.records[name]
        return column != 0 if column.dtype == np.uint8 else column

    def values(self) -> list[NDArray[Any]]:
        """All columns, in their order."""
        return [getattr(self, name) for name in self.names]

    def __len__(self) -> int:
        return len(self.records)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.pack() == other.pack()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        columns = zip(self.names, self.values(), strict=True)
        text = ", ".join(f"{name}={column.tolist()}" for name, column in columns)
        return f"{type(self).__name__}({text})"
