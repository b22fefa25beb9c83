"""Reading a trace: CSV, plain or gzip, checked row by row, into NumPy arrays.

Every field arrives as text and is converted a block at a time; only when a block does not convert
is the row at fault looked for. Rows are counted from 1 after the header line; blank lines do not
count.

Two ways of writing time are read: seconds, and UTC wall time as the Azure files have it
(``2023-11-16 18:17:03.9799600``, with or without a zone), which becomes seconds since the first
row. Neither may go backwards.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
from numpy.typing import NDArray

from testbed.core.errors import TraceError
from testbed.workloads.lengths import DATA

Holds = Literal["wall_time", "seconds", "count", "name"]
"""What a column holds."""

_EXPECTED: dict[Holds, str] = {
    "wall_time": "a time such as 2023-11-16 18:17:03.9799600",
    "seconds": "a finite number of seconds >= 0",
    "count": "a whole number from 0 to 2147483647",
    "name": "a name that is not empty",
}
_COUNT_MAX = 2**31 - 1
_BLOCK_BYTES = 4 << 20
_ZONE = re.compile(r"(Z|[+-]\d\d:\d\d)$")


def find_trace(trace: str, shipped: Mapping[str, str]) -> Path:
    """The file that ``trace`` names: one of those shipped, or a path.

    Raises:
        TraceError: there is no such file, with the names that are shipped.
    """
    if trace in shipped:
        return DATA / shipped[trace]
    path = Path(trace)
    if path.is_file():
        return path
    what = "is a folder, not a file" if path.is_dir() else "no such file"
    names = f"; shipped: {', '.join(sorted(shipped))}" if shipped else ""
    raise TraceError(f"trace {trace!r}: {what}{names}")


class TraceFile:
    """The columns of one trace file.

    Args:
        path: the file; a name ending in .gz is unpacked on the way.
        required: columns that must be there, and what they hold.
        optional: columns that may be there. Any other is refused.

    Raises:
        TraceError: the file cannot be read, has no rows, or a row is broken; the text names the
            file, the row, the field and its value.
    """

    def __init__(
        self,
        path: Path,
        required: Mapping[str, Holds],
        optional: Mapping[str, Holds] | None = None,
    ) -> None:
        self.path = path
        self._holds: dict[str, Holds] = {**required, **(optional or {})}
        parts: dict[str, list[NDArray[Any]]] = {}
        before = 0
        with self._open() as reader:
            self._check_header(reader.schema.names, required)
            for batch in reader:
                for name in reader.schema.names:
                    values = self._convert(name, batch.column(name), before)
                    parts.setdefault(name, []).append(values)
                before += batch.num_rows
        if before == 0:
            raise TraceError(f"{path}: has a header and no rows")
        self._columns = {name: np.concatenate(blocks) for name, blocks in parts.items()}
        for name in self._columns:
            self._check_times(name)

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def __contains__(self, name: str) -> bool:
        return name in self._columns

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._columns[name]

    def get(self, name: str) -> NDArray[Any] | None:
        """A column, or None where the file does not have it."""
        return self._columns.get(name)

    def require(self, name: str, good: NDArray[np.bool_], expected: str) -> None:
        """Refuse the file, naming the first row in which ``good`` is not set."""
        if not good.all():
            index = int(np.argmin(good))
            self._refuse(index, name, self._columns[name][index], expected)

    def _refuse(self, index: int, name: str, value: object, expected: str) -> NoReturn:
        raise TraceError(f"{self.path}: row {index + 1}: {name} = {value} must be {expected}")

    @contextmanager
    def _open(self) -> Iterator[pa_csv.CSVStreamingReader]:
        """The file as a stream of text columns, with pyarrow's errors as ours."""
        broken: list[pa_csv.InvalidRow] = []

        def keep(row: pa_csv.InvalidRow) -> str:
            broken.append(row)
            return "error"

        text = {name: pa.string() for name in self._holds}
        try:
            with pa_csv.open_csv(
                str(self.path),
                read_options=pa_csv.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES),
                parse_options=pa_csv.ParseOptions(invalid_row_handler=keep),
                convert_options=pa_csv.ConvertOptions(column_types=text, strings_can_be_null=False),
            ) as reader:
                yield reader
        except (pa.ArrowInvalid, OSError) as error:
            if broken:
                row = broken[0]
                raise TraceError(
                    f"{self.path}: row {row.number - 1}: {row.actual_columns} fields in "
                    f"{row.text!r} must be {row.expected_columns}"
                ) from None
            raise TraceError(f"{self.path}: cannot be read: {error}") from None

    def _check_header(self, names: list[str], required: Mapping[str, Holds]) -> None:
        missing = [name for name in required if name not in names]
        unknown = [name for name in names if name not in self._holds]
        if missing or unknown or len(set(names)) != len(names):
            optional = [name for name in self._holds if name not in required]
            more = f", and may be {', '.join(optional)}" if optional else ""
            raise TraceError(
                f"{self.path}: columns {', '.join(names)} must be {', '.join(required)}{more}"
            )

    def _convert(self, name: str, column: Any, before: int) -> NDArray[Any]:
        """A block of text as numbers, nanoseconds or names, checked."""
        holds = self._holds[name]
        try:
            values = _values(column, holds)
            good = _good(values, holds)
        except pa.ArrowInvalid:
            good = np.array([_converts(text, holds) for text in column.to_pylist()])
        if not good.all():
            index = int(np.argmin(good))
            self._refuse(before + index, name, repr(column[index].as_py()), _EXPECTED[holds])
        return values

    def _check_times(self, name: str) -> None:
        """Refuse time that goes backwards; turn wall time into seconds since the first row."""
        if self._holds[name] not in ("wall_time", "seconds"):
            return
        times = self._columns[name]
        wall = self._holds[name] == "wall_time"
        shown = times.astype("datetime64[ns]") if wall else times
        back = np.flatnonzero(np.diff(times) < 0)
        if len(back):
            index = int(back[0]) + 1
            self._refuse(
                index, name, shown[index], f"no earlier than the row above, {shown[index - 1]}"
            )
        if wall:
            self._columns[name] = (times - times[0]) / 1e9


def _values(column: Any, holds: Holds) -> NDArray[Any]:
    """Text as what it stands for; wall time in nanoseconds."""
    if holds == "name":
        return np.array(column.to_pylist(), dtype=object)
    if holds == "wall_time":
        zone = "UTC" if len(column) and _ZONE.search(column[0].as_py()) else None
        column = column.cast(pa.timestamp("ns", zone)).cast(pa.int64())
    else:
        column = column.cast(pa.float64() if holds == "seconds" else pa.int64())
    values: NDArray[Any] = column.to_numpy(zero_copy_only=False)
    return values


def _good(values: NDArray[Any], holds: Holds) -> NDArray[np.bool_]:
    """Which values are in the range of their kind."""
    if holds == "seconds":
        return np.asarray(np.isfinite(values) & (values >= 0))
    if holds == "count":
        return np.asarray((values >= 0) & (values <= _COUNT_MAX))
    if holds == "name":
        return np.array([value != "" for value in values], dtype=bool)
    return np.ones(len(values), dtype=bool)


def _converts(text: str, holds: Holds) -> bool:
    try:
        return bool(_good(_values(pa.array([text]), holds), holds)[0])
    except pa.ArrowInvalid:
        return False
