"""Objects and plain data as bytes and back, for checkpoints: no code is ever loaded from a file.

MessagePack, with the types that it lacks marked by a word: tuples, sets, deques, dictionaries with
any keys, NumPy arrays and generators, `random.Random`, the messages of `testbed.core`, and objects
of our own classes and of policies in files. An object is its attributes: `thaw` makes an empty one
of the same class, which must be loaded already, and runs no method of it (of a compiled class its
constructor, without arguments). What was one object (or list, or array) in several places is one
again.

A class says itself what of it is not its state: the attributes named in ``WIRED`` are handed over
by whoever builds the object, or made of the run file. Everything else is kept, and what cannot be
(a function, a file) is refused with its name, so that a new attribute is either state or declared.
An object with a ``WIRED`` is not made from a file: `put_back` gives its state to the one that was
built anew.

>>> found = thaw(freeze({"a": (1, 2.5, None), (0, "b"): np.arange(3), "c": {3, 1}}))
>>> found["a"], found[0, "b"].tolist(), found["c"]
((1, 2.5, None), [0, 1, 2], {1, 3})
"""

from __future__ import annotations

import random
import sys
from collections import deque
from typing import Any

import msgspec
import numpy as np

from testbed.core import messages
from testbed.core.errors import TestbedError

_OURS = ("testbed", "emulators", "daemons")
POLICY_MODULE = "_policy_"
"""What the names of modules begin with that are policies in files."""


class FreezeError(TestbedError):
    """Something that a checkpoint cannot hold, or that has no place in this version."""


class _NamedError(FreezeError):
    """One that says already which attribute it is about."""


class _Kept:
    """The state of an object with a ``WIRED``, as a file had it."""

    def __init__(self, kind: type[Any]) -> None:
        self.__kind__ = kind


def freeze(value: Any) -> bytes:
    """Bytes of a value.

    Raises:
        FreezeError: it holds something that is neither plain data nor an object of ours; says in
            which attribute of which class.
    """
    return msgspec.msgpack.encode(_Freezer().marked(value))


def thaw(data: bytes) -> Any:
    """The value again; of objects with a ``WIRED`` their state only, for `put_back`.

    Raises:
        FreezeError: it holds an object of a class that this version does not have.
    """
    return _Thawer().unmarked(msgspec.msgpack.decode(data))


def attributes(thing: Any) -> dict[str, Any]:
    """The attributes of an object that are its state."""
    if isinstance(thing, _Kept):
        return {name: value for name, value in vars(thing).items() if name != "__kind__"}
    wired = set(getattr(type(thing), "WIRED", ()))
    found = [*getattr(thing, "__dict__", ())]
    for kind in type(thing).__mro__:
        found += vars(kind).get("__mypyc_attrs__", vars(kind).get("__slots__", ()))
    names = [name for name in dict.fromkeys(found) if name not in wired]
    return {name: getattr(thing, name) for name in names if hasattr(thing, name)}


def put_back(thing: Any, kept: Any) -> None:
    """Give an object the state of a thawed one of its class.

    Of one that declares what it is wired with, arrays are filled where they are, since views show
    them, and so are parts that declare it, too; at the end its method ``resumed`` is called, if it
    has one. Of others (policies) everything is replaced.

    Raises:
        FreezeError: they differ in class or attributes: the checkpoint is of another version.
    """
    kind, state = type(thing), attributes(kept)
    was = _kind_of(kept)
    declared = _declares(thing)
    odd = sorted(state.keys() ^ attributes(thing).keys()) if declared else []
    if odd or was is not kind:
        what = f"has other attributes ({', '.join(odd)})" if odd else f"was a {was.__name__}"
        raise FreezeError(f"checkpoint of another version: {kind.__name__} {what}")
    for name, value in state.items():
        old = getattr(thing, name, None)
        array = isinstance(value, np.ndarray)
        if declared and array and isinstance(old, np.ndarray) and old.shape == value.shape:
            old[...] = value
        elif _declares(old) and type(old) is _kind_of(value):
            put_back(old, value)
        else:
            setattr(thing, name, value)
    if declared and hasattr(thing, "resumed"):
        thing.resumed()


def _kind_of(thing: Any) -> type[Any]:
    kind: type[Any] = thing.__kind__ if isinstance(thing, _Kept) else type(thing)
    return kind


def _declares(thing: Any) -> bool:
    return hasattr(type(thing), "WIRED")


def _name_of(kind: type[Any]) -> str:
    """Module and name of a class of ours; empty for others."""
    root = kind.__module__.partition(".")[0]
    ours = root in _OURS or root.startswith(POLICY_MODULE)
    return f"{kind.__module__}:{kind.__qualname__}" if ours else ""


def _class_of(name: str) -> type[Any]:
    """The class of that name, if it is ours and loaded: nothing is imported because of a file."""
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, type) or _name_of(found) != name:
        raise FreezeError(f"checkpoint of another version: there is no class {name}")
    return found


class _Freezer:
    """Marks values; what can change and is met again becomes a word for where it was first."""

    def __init__(self) -> None:
        # The things themselves as well: of one that is gone another could have the number.
        self._met: dict[int, tuple[int, Any]] = {}
        self._owned = False
        """Inside an object that does not declare what it is wired with."""

    def marked(self, value: Any) -> Any:
        if isinstance(value, np.generic):
            value = value.item()
        if value is None or isinstance(value, bool | float | str | bytes):
            return value
        if isinstance(value, int):
            return value if abs(value) < 2**63 else ["int", str(value)]
        if type(value) is tuple:
            return ["tuple", self._all(value)]
        if isinstance(value, frozenset):
            return ["frozenset", self._all(sorted(value))]
        if isinstance(value, tuple) and _name_of(type(value)):
            return ["named", _name_of(type(value)), self._all(value)]
        met = self._met.get(id(value))
        if met is not None:
            return ["same", met[0]]
        self._met[id(value)] = (len(self._met), value)
        return self._changeable(value)

    def _all(self, values: Any) -> list[Any]:
        return [self.marked(entry) for entry in values]

    def _changeable(self, value: Any) -> Any:
        kind = type(value)
        if isinstance(value, messages.Frozen):
            fields = [getattr(value, name) for name in value.__struct_fields__]
            return ["message", kind.__name__, self._all(fields)]
        if kind is list:
            return ["list", self._all(value)]
        if kind is deque:
            return ["deque", self._all(value), value.maxlen]
        if kind is set:
            return ["set", self._all(sorted(value))]
        if kind is dict:
            return ["dict", [[self.marked(key), self.marked(each)] for key, each in value.items()]]
        if isinstance(value, np.ndarray) and not value.dtype.hasobject:
            fields = self.marked(np.lib.format.dtype_to_descr(value.dtype))
            return ["array", fields, list(value.shape), value.tobytes()]
        if isinstance(value, random.Random):
            return ["random", self.marked(value.getstate())]
        if isinstance(value, np.random.Generator):
            return ["generator", self.marked(value.bit_generator.state)]
        if self._owned and _declares(value):
            # It would come back as a copy, which nobody fills any more.
            raise FreezeError(f"a checkpoint cannot hold a {kind.__name__} that is not its own")
        if _name_of(kind) and not isinstance(value, msgspec.Struct) and _has_attributes(value):
            return ["object", _name_of(kind), self._object(value)]
        raise FreezeError(f"a checkpoint cannot hold a {kind.__name__}: {str(value)[:60]}")

    def _object(self, thing: Any) -> list[list[Any]]:
        pairs: list[list[Any]] = []
        before, self._owned = self._owned, not _declares(thing)
        for name, value in attributes(thing).items():
            try:
                pairs.append([name, self.marked(value)])
            except _NamedError:
                raise
            except FreezeError as error:
                where = type(thing).__name__
                help_ = f"; if it is made anew, name it in {where}.WIRED" * _declares(thing)
                raise _NamedError(f"{where}.{name}: {error}{help_}") from None
        self._owned = before
        return pairs


def _has_attributes(thing: Any) -> bool:
    """Whether `attributes` sees them."""
    kinds = type(thing).__mro__
    shown = any("__slots__" in vars(kind) or "__mypyc_attrs__" in vars(kind) for kind in kinds)
    return shown or hasattr(thing, "__dict__")


class _Thawer:
    """Makes values of marked ones; numbers what can change in the order that `_Freezer` does."""

    def __init__(self) -> None:
        self._made: list[Any] = []

    def unmarked(self, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        kind, *rest = value
        if kind == "same":
            return self._made[rest[0]]
        if kind == "int":
            return int(rest[0])
        if kind in ("tuple", "frozenset"):
            return {"tuple": tuple, "frozenset": frozenset}[kind](self._all(rest[0]))
        if kind == "named":
            named: Any = tuple.__new__(_class_of(rest[0]), self._all(rest[1]))
            return named
        place = len(self._made)
        self._made.append(None)
        if kind in ("list", "deque", "set", "dict", "object"):
            return self._container(kind, rest, place)
        self._made[place] = made = self._leaf(kind, rest)
        return made

    def _all(self, values: list[Any]) -> list[Any]:
        return [self.unmarked(entry) for entry in values]

    def _container(self, kind: str, rest: list[Any], place: int) -> Any:
        """Known before it is filled: it may hold itself."""
        made: Any
        if kind == "object":
            known = _class_of(rest[0])
            if hasattr(known, "WIRED"):
                made = _Kept(known)
            elif "__mypyc_attrs__" in vars(known):
                made = known()  # compiled: there is no other way to one
            else:
                made = object.__new__(known)
            self._made[place] = made
            for name, value in rest[1]:
                object.__setattr__(made, name, self.unmarked(value))
        elif kind == "dict":
            self._made[place] = made = {}
            for pair in rest[0]:  # in this order, by which things are numbered
                key, value = self._all(pair)
                made[key] = value
        elif kind == "set":
            self._made[place] = made = set()
            made.update(self._all(rest[0]))
        else:
            self._made[place] = made = [] if kind == "list" else deque(maxlen=rest[1])
            made.extend(self._all(rest[0]))
        return made

    def _leaf(self, kind: str, rest: list[Any]) -> Any:
        if kind == "message":
            message: type[Any] = getattr(messages, rest[0])
            return message(*self._all(rest[1]))
        if kind == "array":
            dtype = np.lib.format.descr_to_dtype(self.unmarked(rest[0]))
            return np.frombuffer(rest[2], dtype).reshape(rest[1]).copy()
        if kind == "random":
            made_random = random.Random()
            made_random.setstate(self.unmarked(rest[0]))
            return made_random
        assert kind == "generator", kind
        state = self.unmarked(rest[0])
        bits = getattr(np.random, state["bit_generator"])()
        bits.state = state
        return np.random.Generator(bits)
