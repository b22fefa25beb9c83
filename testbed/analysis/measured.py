"""Readers of the measured sets that fidelity compares with, in the layout they are published in.

A folder may hold any subset of the sets, and a set any subset of its rows. A column that is not
there is an error of one line; a set that is not there is skipped.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import csv, parquet

from emulators.models import available_models
from testbed.core.errors import SpecError

Columns = dict[str, Any]
"""Column name -> NumPy array; numbers are floats, text is objects."""

FOLDS = 5
"""Parts that configurations are divided into for cross-validation."""


def read(path: Path) -> Columns:
    """A CSV (plain or gzip) or Parquet file as columns.

    Raises:
        SpecError: the file cannot be read.
    """
    try:
        reader = parquet.read_table if path.suffix == ".parquet" else csv.read_csv
        table = reader(path)
    except (pa.ArrowException, OSError) as error:
        raise SpecError(f"{path}: {str(error).splitlines()[0]}") from None
    return {name: _column(table[name]) for name in table.column_names}


def _column(values: pa.ChunkedArray) -> Any:
    kind = values.type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        return values.cast(pa.float64()).to_numpy().astype(float)
    if pa.types.is_null(kind):
        return np.full(len(values), np.nan)
    return np.asarray(values.cast(pa.string()).to_pylist(), dtype=object)


def find(data: Path, *names: str) -> Columns | None:
    """The first of these files under ``data`` that has rows, with any of the known endings."""
    for name in names:
        for ending in (".parquet", ".csv.gz", ".csv"):
            path = data / f"{name}{ending}"
            if path.is_file():
                columns = read(path)
                if size(columns):
                    return columns
    return None


def need(columns: Columns, names: Iterable[str], where: str) -> None:
    """Check that columns are there.

    Raises:
        SpecError: one is missing.
    """
    missing = [name for name in names if name not in columns]
    if missing:
        raise SpecError(f"{where}: no column {', '.join(missing)}")


def take(columns: Columns, rows: Any) -> Columns:
    """Some rows, by mask or index."""
    return {name: values[rows] for name, values in columns.items()}


def size(columns: Columns) -> int:
    """Number of rows."""
    return len(next(iter(columns.values()))) if columns else 0


def keys(columns: Columns, names: Sequence[str]) -> Any:
    """The configuration of each row as one string: these columns, joined."""
    parts = []
    for name in names:
        values = columns[name]
        if values.dtype == object:
            parts.append([str(value) for value in values])
        else:
            parts.append([f"{value:g}" for value in values])
    return np.asarray(["|".join(row) for row in zip(*parts, strict=True)], dtype=object)


def fold_of(configurations: Any) -> Any:
    """Which of `FOLDS` each configuration is in: a hash, so the same for any subset of rows.

    Constants fitted for fold f have not seen a row of it. So a prediction with the constants of a
    configuration's own fold is out of sample, whether the row was there when they were fitted or
    not.

    >>> fold_of(["a|1", "b|2", "a|1"]).tolist()[0::2]
    [0, 0]
    """
    return np.asarray([zlib.crc32(key.encode()) % FOLDS for key in configurations], dtype=int)


_CARDS = [
    ("qwen3-coder-480b", "qwen3-coder-480b-a35b"),
    ("qwen3-coder-30b", "qwen3-30b-a3b"),
    ("qwen3-vl-235b", "qwen3-vl-235b-a22b"),
    ("qwen3-vl-30b", "qwen3-vl-30b-a3b"),
    ("qwen3-vl-32b", "qwen3-vl-32b"),
    ("qwen3-vl-8b", "qwen3-vl-8b"),
    ("qwen3-omni-30b", "qwen3-omni-30b-a3b"),
    ("qwen3.5-397b", "qwen3.5-397b-a17b"),
    ("qwen3-235b", "qwen3-235b-a22b"),
    ("qwen3-30b", "qwen3-30b-a3b"),
    ("qwen3-32b", "qwen3-32b"),
    ("qwen3-14b", "qwen3-14b"),
    ("qwen3-8b", "qwen3-8b"),
    ("qwen-72b", "qwen-72b"),
    ("qwen2.5-72b", "qwen2.5-72b"),
    ("qwen2.5-7b", "qwen2.5-7b"),
    ("deepseek", "deepseek-v3"),
    ("kimi-k2", "kimi-k2.5"),
    ("glm-5", "glm-5"),
    ("minimax-m2", "minimax-m2.5"),
    ("gemma-3-12b", "gemma-3-12b"),
    ("gemma-3-27b", "gemma-3-27b"),
    ("gpt-oss-120b", "gpt-oss-120b"),
    ("gpt-oss-20b", "gpt-oss-20b"),
    ("3.2-11b", "llama-3.2-vision-11b"),
    ("3.2-90b", "llama-3.2-vision-90b"),
    ("llama-3.1-405b", "llama-3.1-405b"),
    ("llama-3.1-70b", "llama-3.1-70b"),
    ("llama-3.3-70b", "llama-3.1-70b"),
    ("llama-3-70b", "llama-3.1-70b"),
    ("llama-3.1-8b", "llama-3.1-8b"),
    ("llama-3-8b", "llama-3.1-8b"),
    ("llama-2-70b", "llama-2-70b"),
    ("llama2-70b", "llama-2-70b"),
    ("llama-2-13b", "llama-2-13b"),
    ("llama-2-7b", "llama-2-7b"),
    ("codellama-34b", "codellama-34b"),
    ("internlm-20b", "internlm-20b"),
    ("phi-2", "phi-2"),
    ("bloom", "bloom-176b"),
    ("maverick", "llama-4-maverick-17b-128e"),
    ("scout", "llama-4-scout-17b-16e"),
    ("nano-12b-v2", "nemotron-nano-12b-v2"),
    ("nano-9b-v2", "nemotron-nano-9b-v2"),
    ("mixtral-8x7b", "mixtral-8x7b"),
    ("pixtral-12b", "pixtral-12b"),
    ("codellama-7b", "llama-2-7b"),
    ("codellama-13b", "llama-2-13b"),
    ("codellama-70b", "llama-2-70b"),
    ("mistral-7b", "mistral-7b"),
    ("mistral-nemo", "mistral-nemo-12b"),
    ("mistral-large", "mistral-large-123b"),
    ("mixtral-8x22b", "mixtral-8x22b"),
    ("gemma-2-2b", "gemma-2-2b"),
    ("gemma-2-9b", "gemma-2-9b"),
    ("gemma-2-27b", "gemma-2-27b"),
    ("codegemma-1.1-2b", "codegemma-2b"),
    ("codegemma-7b", "codegemma-7b"),
    ("starcoder2-3b", "starcoder2-3b"),
    ("starcoder2-7b", "starcoder2-7b"),
    ("starcoder2-15b", "starcoder2-15b"),
    ("phi-3-mini", "phi-3-mini"),
    ("phi-3-small", "phi-3-small"),
    ("phi-3-medium", "phi-3-medium"),
]


def card_for(model: str) -> str | None:
    """Name of the model card for a model as a data set or we call it; None if there is none.

    >>> card_for("meta-llama/Llama-3.3-70B-Instruct"), card_for("nobody/Unknown-9B")
    ('llama-3.1-70b', None)
    """
    lower = model.lower()
    if lower in available_models():
        return lower
    return next((card for part, card in _CARDS if part in lower), None)
