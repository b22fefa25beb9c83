"""Plain data as bytes and back, for checkpoints: no code is ever loaded from a file.

MessagePack, with the types that it lacks marked by a word: tuples, sets, deques, dictionaries with
any keys, NumPy arrays and generators, `random.Random`, and the messages of `testbed.core`. Of other
objects only the attributes are kept (`attributes`), and put into objects that are there already
(`put_back`): whoever resumes has built everything anew from the run file.

>>> found = thaw(freeze({"a": (1, 2.5, None), (0, "b"): np.arange(3), "c": {3, 1}}))
>>> found["a"], found[0, "b"].tolist(), found["c"]
((1, 2.5, None), [0, 1, 2], {1, 3})
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable
from typing import Any

import msgspec
import numpy as np

from testbed.core import messages
from testbed.core.errors import TestbedError


class FreezeError(TestbedError):
    """Something that a checkpoint cannot hold."""


def freeze(value: Any) -> bytes:
    """Bytes of a value.

    Raises:
        FreezeError: it holds something that is no plain data.
    """
    return msgspec.msgpack.encode(_marked(value))


def thaw(data: bytes) -> Any:
    """The value again."""
    return _unmarked(msgspec.msgpack.decode(data))


def attributes(thing: Any, without: Iterable[str] = ()) -> dict[str, Any]:
    """The attributes of an object, but for some."""
    left_out = set(without)
    slots = [name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())]
    names = [*getattr(thing, "__dict__", ()), *slots]
    return {name: getattr(thing, name) for name in names if name not in left_out}


def put_back(thing: Any, kept: dict[str, Any]) -> None:
    """Give an object its attributes again; arrays are filled where they are, since views show them.

    Raises:
        FreezeError: it has no such attribute: the checkpoint is of another version.
    """
    for name, value in kept.items():
        if not hasattr(thing, name):
            raise FreezeError(f"checkpoint: {type(thing).__name__} has no {name!r} in this version")
        old = getattr(thing, name)
        arrays = isinstance(old, np.ndarray) and isinstance(value, np.ndarray)
        if arrays and old.shape == value.shape:
            old[...] = value
        else:
            setattr(thing, name, value)


def _marked(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | float | str | bytes):
        return value
    if isinstance(value, int):
        return value if abs(value) < 2**63 else ["int", str(value)]
    if isinstance(value, messages.Frozen):
        fields = [_marked(getattr(value, name)) for name in value.__struct_fields__]
        return ["message", type(value).__name__, fields]
    if isinstance(value, list):
        return ["list", [_marked(entry) for entry in value]]
    if isinstance(value, tuple):
        return ["tuple", [_marked(entry) for entry in value]]
    if isinstance(value, deque):
        return ["deque", [_marked(entry) for entry in value]]
    if isinstance(value, set | frozenset):
        return ["set", [_marked(entry) for entry in sorted(value)]]
    if isinstance(value, dict):
        return ["dict", [[_marked(key), _marked(entry)] for key, entry in value.items()]]
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        kind = value.dtype.str if value.dtype.names is None else "raw"
        return ["array", kind, list(value.shape), value.tobytes()]
    if isinstance(value, random.Random):
        return ["random", _marked(value.getstate())]
    if isinstance(value, np.random.Generator):
        return ["generator", _marked(value.bit_generator.state)]
    raise FreezeError(f"a checkpoint cannot hold a {type(value).__name__}: {str(value)[:60]}")


def _unmarked(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    kind, *rest = value
    if kind == "message":
        made: type[Any] = getattr(messages, rest[0])
        return made(*(_unmarked(entry) for entry in rest[1]))
    if kind == "int":
        return int(rest[0])
    if kind == "dict":
        return {_unmarked(key): _unmarked(entry) for key, entry in rest[0]}
    if kind == "array":
        dtype = np.dtype(np.uint8 if rest[0] == "raw" else rest[0])
        flat = np.frombuffer(rest[2], dtype).copy()
        return flat if rest[0] == "raw" else flat.reshape(rest[1])
    if kind == "random":
        made_random = random.Random()
        made_random.setstate(_unmarked(rest[0]))
        return made_random
    if kind == "generator":
        state = _unmarked(rest[0])
        bits = getattr(np.random, state["bit_generator"])()
        bits.state = state
        return np.random.Generator(bits)
    entries = [_unmarked(entry) for entry in rest[0]]
    return {"list": list, "tuple": tuple, "deque": deque, "set": set}[kind](entries)
