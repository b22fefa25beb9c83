"""Columns of readings: sequences in memory, packed records on the wire.

A bank report has a dozen quantities for each GPU, and a coordinator takes in hundreds of thousands
of them a second. As lists, every number would be decoded into an object and checked by itself. So a
table of readings travels as one binary string of fixed records (little-endian, no padding), is
checked by its length, and becomes NumPy columns only when somebody looks at one. Joining the
tables of many nodes is joining their strings.

In memory nothing is packed: a sender fills in lists or arrays, and a receiver in the same process
reads the very same ones.

>>> class Readings(Columns):
...     power_w: F8
...     lost: Flags
>>> sent = Readings(power_w=[300.5, 0.0], lost=[False, True])
>>> got = Readings.unpack(sent.pack())
>>> got == sent, len(got), got.power_w.tolist(), len(got.pack())
(True, 2, [300.5, 0.0], 18)
>>> Readings.unpack(b"four")
Traceback (most recent call last):
...
ValueError: 4 bytes are no whole number of records of 9
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Annotated, Any, ClassVar, Self, dataclass_transform, get_type_hints

import numpy as np
from numpy.typing import NDArray

F8 = Annotated[Sequence[float] | NDArray[np.float64], "<f8"]
"""A column of real numbers. In full precision: live and virtual decisions must not differ."""
I8 = Annotated[Sequence[int] | NDArray[np.int64], "<i8"]
Flags = Annotated[Sequence[bool] | NDArray[np.bool_], "?"]


@dataclass_transform()
class Columns:
    """One column per annotated field, all of one length; see the module's story."""

    names: ClassVar[tuple[str, ...]] = ()
    layout: ClassVar[np.dtype[Any]]
    """One record: a field per column, in their order."""
    _empty: ClassVar[Any]
    _expected: ClassVar[frozenset[str]]
    _flags: ClassVar[tuple[int, ...]]
    """Where in a record a byte must be 0 or 1."""

    def __init_subclass__(cls) -> None:
        hints = get_type_hints(cls, include_extras=True)
        kinds = {
            k: hint.__metadata__[0] for k, hint in hints.items() if hasattr(hint, "__metadata__")
        }
        cls.names = tuple(kinds)
        cls._expected = frozenset(kinds)
        cls.layout = np.dtype(list(kinds.items()))
        offsets: Any = cls.layout.fields
        cls._flags = tuple(offsets[name][1] for name, kind in kinds.items() if kind == "?")

    def __init__(self, *columns: Any, **named: Any) -> None:
        mine = self.__dict__
        mine.update(zip(self.names, columns, strict=False))
        mine.update(named)
        if len(columns) + len(named) != len(self.names) or mine.keys() != self._expected:
            odd = sorted(mine.keys() ^ self._expected)
            raise TypeError(f"{type(self).__name__}: {len(self.names)} columns needed; see {odd}")

    @classmethod
    def empty(cls) -> Self:
        """No entries: one for all, as nothing can be put in."""
        made = cls.__dict__.get("_empty")
        if made is None:
            made = cls(*(() for _ in cls.names))
            cls._empty = made
        return made

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """The columns in ``data``, which `pack` made.

        Raises:
            ValueError: it cannot be that.
        """
        if not data:
            return cls.empty()
        size = cls.layout.itemsize
        if len(data) % size:
            raise ValueError(f"{len(data)} bytes are no whole number of records of {size}")
        for place in cls._flags:
            if data[place::size].strip(b"\0\1"):
                raise ValueError(f"a flag is neither 0 nor 1, at byte {place} of a record")
        made = cls.__new__(cls)
        made.__dict__["_data"] = data
        return made

    def __getattr__(self, name: str) -> Any:
        """A column of packed records, when it is first asked for."""
        if name not in self.names or "_data" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__} has no {name}")
        column = self.__dict__[name] = self.records()[name]
        return column

    def records(self) -> NDArray[Any]:
        """All columns side by side, as an array of records."""
        data = self.__dict__.get("_data")
        if data is not None:
            return np.frombuffer(data, self.layout)
        count = len(self)
        records = np.empty(count, self.layout)
        for name in self.names:
            column = getattr(self, name)
            if len(column) != count:
                raise ValueError(f"{type(self).__name__}.{name}: {len(column)} of {count} entries")
            records[name] = column
        return records

    def pack(self) -> bytes:
        """The records as they travel."""
        data: bytes | None = self.__dict__.get("_data")
        return self.records().tobytes() if data is None else data

    def values(self) -> list[Any]:
        """The columns in order, as they are held: lists, arrays, or views of records."""
        data = self.__dict__.get("_data")
        if data is None:
            return [getattr(self, name) for name in self.names]
        records = np.frombuffer(data, self.layout)
        return [records[name] for name in self.names]

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """The entries of all parts, one after the other."""
        if len(parts) == 1:
            return parts[0]
        if any("_data" in part.__dict__ for part in parts):
            made = cls.__new__(cls)
            made.__dict__["_data"] = b"".join([part.pack() for part in parts])
            return made
        return cls(
            *(list(chain.from_iterable(c)) for c in zip(*(p.values() for p in parts), strict=True))
        )

    def pick(self, entries: Any) -> Self:
        """The entries at these places, or under this mask."""
        return type(self).unpack(self.records()[entries].tobytes())

    def __len__(self) -> int:
        data = self.__dict__.get("_data")
        if data is not None:
            return len(data) // self.layout.itemsize
        return len(self.__dict__[self.names[0]])

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.pack() == other.pack()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        columns = ", ".join(
            f"{name}={np.asarray(column).tolist()}"
            for name, column in zip(self.names, self.values(), strict=True)
        )
        return f"{type(self).__name__}({columns})"
