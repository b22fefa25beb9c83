"""Read a recording: one that is closed, one still being written, or one whose process was killed.

>>> Recording.open("no/such/folder")
Traceback (most recent call last):
...
testbed.core.errors.RecordingError: recording no/such/folder: no such folder
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Union

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from testbed.core.errors import RecordingError
from testbed.core.spec import RunSpec
from testbed.recorder.tables import FORMAT, TABLES
from testbed.recorder.writer import lock_folder, read_stream

Source = Union["Recording", Path, str]
"""What functions that read a recording take: an open one, or its folder."""


class Recording:
    """A run folder, as tables. Make one with `Recording.open`."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest

    @classmethod
    def open(cls, folder: Source) -> Recording:
        """The recording in ``folder``; one that is open already is given back.

        Raises:
            RecordingError: there is none, or it is of another version.
        """
        if isinstance(folder, Recording):
            return folder
        folder = Path(folder)
        if not folder.is_dir():
            raise RecordingError(f"recording {folder}: no such folder")
        manifest = _read_json(folder / "manifest.json")
        found = manifest.get("format")
        if found != FORMAT:
            raise RecordingError(
                f"recording {folder}: format {found!r}, this version reads {FORMAT}"
            )
        return cls(folder, manifest)

    @property
    def run_id(self) -> str:
        """Name of the run, unique among its siblings."""
        return str(self.manifest["run_id"])

    @property
    def spec(self) -> RunSpec:
        """What was asked for.

        Raises:
            RecordingError: the spec is of another version.
        """
        try:
            return msgspec.convert(self.manifest["spec"], RunSpec)
        except (msgspec.ValidationError, KeyError) as error:
            raise RecordingError(f"recording {self.folder}: its spec: {error}") from None

    @property
    def summary(self) -> dict[str, Any] | None:
        """The summary, or None where none was written yet."""
        path = self.folder / "summary.json"
        return _read_json(path) if path.exists() else None

    @property
    def state(self) -> Literal["closed", "running", "killed"]:
        """Whether the run ended in good order, goes on, or was killed."""
        if self.manifest["exit_status"] == "killed":
            return "killed"
        if self.manifest["exit_status"] != "running":
            return "closed"
        try:
            os.close(lock_folder(self.folder))
        except RecordingError:
            return "running"
        return "killed"

    def names(self) -> list[str]:
        """Tables that have rows (or had, before they were cut off)."""
        paths = [*self.folder.glob("*.parquet"), *self.folder.glob("*.arrows")]
        return sorted({path.stem for path in paths})

    def table(self, name: str, columns: Sequence[str] | None = None) -> Any:
        """A table as a ``pyarrow.Table``; known tables without rows are empty, not missing.

        Columns of repeating names are dictionary-encoded. Units are in the fields' metadata.

        Raises:
            RecordingError: no such table, no such column, or a damaged file.
        """
        parquet = self.folder / f"{name}.parquet"
        stream = self.folder / f"{name}.arrows"
        try:
            # Streams first: a run that closes between the two looks has a Parquet file by then.
            if stream.exists() and (found := _read_stream(stream)) is not None:
                return found if columns is None else found.select(list(columns))
            if parquet.exists():
                return _read_parquet(parquet, columns)
        except (pa.ArrowInvalid, OSError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise RecordingError(f"recording {self.folder}: table {name}: {reason}") from None
        if name not in TABLES:
            raise RecordingError(
                f"recording {self.folder}: no table {name!r}, there are {self.names()}"
            )
        empty = _named(TABLES[name].schema().empty_table())
        return empty if columns is None else empty.select(list(columns))

    def columns(self, name: str, *columns: str) -> dict[str, NDArray[Any]]:
        """Columns of a table as NumPy arrays; names as an array of objects."""
        found = self.table(name, columns or None)
        return {column: _to_numpy(found[column]) for column in found.column_names}

    def batches(self, name: str, columns: Sequence[str]) -> Iterator[dict[str, NDArray[Any]]]:
        """Like `columns`, a part of the rows at a time; one part without rows if there are none."""
        path = self.folder / f"{name}.parquet"
        if not path.exists() or (self.folder / f"{name}.arrows").exists():
            yield self.columns(name, *columns)
            return
        schema = pq.read_schema(path)
        named = [field.name for field in schema if _kind(field) == b"name"]
        with pq.ParquetFile(path, read_dictionary=named) as file:
            for group in range(file.num_row_groups):
                rows = file.read_row_group(group, columns=list(columns))
                yield {column: _to_numpy(rows[column]) for column in columns}

    def units(self, name: str) -> dict[str, str]:
        """Unit of each column of a table."""
        return {f.name: f.metadata[b"unit"].decode() for f in self.table(name).schema}


def _to_numpy(column: Any) -> NDArray[Any]:
    if not pa.types.is_dictionary(column.type):
        return np.asarray(column.to_numpy(zero_copy_only=False))
    parts = [
        np.asarray(chunk.dictionary.to_pylist(), object)[chunk.indices.to_numpy()]
        for chunk in column.chunks
    ]
    return np.concatenate(parts) if parts else np.zeros(0, object)


def _read_stream(path: Path) -> Any:
    schema, batches = read_stream(path)
    if schema is None:
        return None
    return _named(pa.Table.from_batches(list(batches), schema=schema))


def _read_parquet(path: Path, columns: Sequence[str] | None) -> Any:
    schema = pq.read_schema(path)
    named = [field.name for field in schema if _kind(field) == b"name"]
    if columns is not None:
        missing = [column for column in columns if column not in schema.names]
        if missing:
            raise KeyError(f"no column {missing[0]!r}")
    return pq.read_table(
        path, columns=None if columns is None else list(columns), read_dictionary=named
    ).unify_dictionaries()


def _named(table: Any) -> Any:
    """The table with its columns of names dictionary-encoded, as Parquet gives them."""
    for place, field in enumerate(table.schema):
        if _kind(field) == b"name":
            encoded = table.column(place).dictionary_encode().unify_dictionaries()
            table = table.set_column(place, field.with_type(encoded.type), encoded)
    return table


def _kind(field: Any) -> bytes:
    return bytes((field.metadata or {}).get(b"kind", b""))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text())
    except FileNotFoundError:
        raise RecordingError(f"recording {path.parent}: no {path.name}") from None
    except (OSError, ValueError) as error:
        raise RecordingError(f"recording {path.parent}: {path.name}: {error}") from None
    if not isinstance(tree, dict):
        raise RecordingError(f"recording {path.parent}: {path.name} is not a table")
    return tree
