"""Every message travels and comes back the same; whatever else arrives is refused."""

from __future__ import annotations

import math
import random
import re
import types
import typing
from dataclasses import fields

import msgpack
import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from testbed.core import messages, view
from testbed.core.errors import TransportError
from testbed.core.messages import Body, Envelope, Heartbeat, Lease, Stop, decode, encode
from testbed.core.topics import TOPICS
from tests.conftest import ROOT

BODIES: tuple[type, ...] = typing.get_args(Body)
STRUCTS = [
    kind
    for kind in vars(messages).values()
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and kind.__struct_fields__
]
COLUMNS = [
    view.GpuColumns,
    view.InstanceColumns,
    view.TenantColumns,
    view.RowColumns,
    view.View,
    view.SetPowerLimit,
    view.LockClocks,
    view.SetMemoryLimit,
    view.DrainInstance,
    view.Placement,
    view.SetLayout,
    view.SetBatch,
    view.OrderQueue,
    view.RecallWaiting,
    view.Squash,
]

_UNITS = ("s", "w", "j", "c", "mhz", "bytes", "tokens", "rps", "tps", "hz", "frac", "count")

FINITE = st.floats(allow_nan=False, allow_infinity=False)
INTEGERS = st.integers(-(2**63), 2**63 - 1)
# The wire is UTF-8: a lone surrogate cannot be a name.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def instances_of(hint: object) -> st.SearchStrategy[object]:
    """Values of a field's type, structs included."""
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        hints = typing.get_type_hints(hint)
        return st.builds(hint, **{name: instances_of(hints[name]) for name in hints})
    if typing.get_origin(hint) is list:
        return st.lists(instances_of(typing.get_args(hint)[0]), max_size=3)
    if typing.get_origin(hint) is typing.Literal:
        return st.sampled_from(typing.get_args(hint))
    if typing.get_origin(hint) is types.UnionType:
        return st.one_of(*(instances_of(choice) for choice in typing.get_args(hint)))
    return {float: FINITE, int: INTEGERS, bool: st.booleans(), str: TEXT}[hint]


ENVELOPES = instances_of(Envelope)


@given(ENVELOPES)
def test_what_is_decoded_is_what_was_encoded(envelope):
    assert decode(encode(envelope)) == envelope


@given(ENVELOPES)
def test_another_msgpack_library_reads_the_same(envelope):
    assert msgpack.unpackb(encode(envelope), strict_map_key=False) == msgspec.to_builtins(envelope)


@given(ENVELOPES)
def test_and_what_another_library_writes_is_read_here(envelope):
    assert decode(msgpack.packb(msgspec.to_builtins(envelope))) == envelope


def test_every_message_has_a_topic_and_every_topic_a_message():
    assert set(TOPICS) == set(BODIES)
    assert {topic.stream for topic in TOPICS.values()} == {"control", "telemetry"}


def test_the_kind_of_a_message_is_on_the_wire_by_its_name():
    for kind in BODIES:
        assert kind.__struct_config__.tag == kind.__name__


def test_messages_cannot_be_changed_once_made():
    for kind in STRUCTS:
        assert kind.__struct_config__.frozen, kind
        assert kind.__struct_config__.forbid_unknown_fields, kind


def test_infinities_travel_and_come_back():
    lease = Lease(1, 1, math.inf, [-math.inf], [0.0])
    assert decode(encode(Envelope("n", 1, 1, 0.0, lease))).body == lease


# What is not a message.


def refused(data: bytes) -> bool:
    """Whether `decode` refuses ``data``; nothing but `TransportError` may come out."""
    try:
        again = decode(data)
    except TransportError as error:
        return str(error).startswith(f"bad message of {len(data)} bytes: ")
    assert isinstance(again, Envelope)
    return False


@given(st.binary(max_size=200))
@example(b"")
@example(b"\xc1")
@example(b"\xdf\xff\xff\xff\xff")  # a map that says it has four thousand million entries
@example(b"\xdd\xff\xff\xff\xff")
@example(b"\x91" * 100_000)  # lists, one in the other
@settings(max_examples=500)
def test_noise_is_refused(data):
    assert refused(data)


@given(ENVELOPES, st.integers(0, 2**32))
@settings(max_examples=500)
def test_a_damaged_message_is_refused_or_still_a_message(envelope, seed):
    """Bits flip, bytes vanish, appear and repeat. A flipped bit of a number leaves a message."""
    chance = random.Random(seed)
    data = bytearray(encode(envelope))
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(data) + 1)
        damage = chance.randrange(4)
        if damage == 0 and place < len(data):
            data[place] ^= 1 << chance.randrange(8)
        elif damage == 1:
            del data[place : place + chance.randint(1, 8)]
        elif damage == 2:
            data[place:place] = chance.randbytes(chance.randint(1, 8))
        else:
            data[place:place] = data[: chance.randrange(len(data) + 1)]
    refused(bytes(data))


@given(ENVELOPES)
def test_no_part_of_a_message_is_a_message(envelope):
    data = encode(envelope)
    for length in range(0, len(data), max(1, len(data) // 50)):
        assert refused(data[:length])
    assert refused(data + b"\x00")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"t_s": "soon"}, "float"),
        ({"sequence": 1.5}, "int"),
        ({"source": 7}, "str"),
        ({"surprise": 1}, "unknown field"),
        ({"body": {"type": "Reboot"}}, "Reboot"),
        ({"body": {}}, "type"),
        ({"body": {"type": "Stop"}}, "reason"),
        ({"body": {"type": "Stop", "reason": "x", "force": True}}, "force"),
    ],
)
def test_the_text_says_what_was_wrong(change, what):
    good = msgspec.to_builtins(Envelope("n", 1, 1, 0.0, Heartbeat()))
    with pytest.raises(TransportError, match=what):
        decode(msgpack.packb({**good, **change}))


@pytest.mark.parametrize("name", list(Envelope.__struct_fields__))
def test_no_field_may_be_missing(name):
    whole = msgspec.to_builtins(Envelope("n", 1, 1, 0.0, Heartbeat()))
    del whole[name]
    with pytest.raises(TransportError, match=name):
        decode(msgpack.packb(whole))


def test_text_that_is_not_utf8_is_refused():
    data = encode(Envelope("n", 1, 1, 0.0, Stop("xyz"))).replace(b"xyz", b"\xff\xfe\xfd")
    with pytest.raises(TransportError, match="utf-8"):
        decode(data)


def test_what_a_stranger_wrote_cannot_begin_a_line_of_the_log():
    whole = msgspec.to_builtins(Envelope("n", 1, 1, 0.0, Heartbeat()))
    with pytest.raises(TransportError) as error:
        decode(msgpack.packb({**whole, "x\nINFO all is well": 1}))
    assert "\n" not in str(error.value)


def test_a_length_that_lies_costs_no_memory():
    data = encode(Envelope("n", 1, 1, 0.0, Lease(1, 1, 1.0, [1.0], [1.0])))
    place = data.index(b"power_limit_w") + len(b"power_limit_w")
    lying = data[:place] + b"\xdd\x7f\xff\xff\xff" + data[place + 1 :]
    assert refused(lying)


# Names.


def floats_of(kind: type) -> list[str]:
    """Names of the fields of a struct or dataclass that hold floats, alone or in a column."""
    if issubclass(kind, msgspec.Struct):
        hints = {name: str(hint) for name, hint in typing.get_type_hints(kind).items()}
        return [name for name, hint in hints.items() if "float" in hint]
    return [field.name for field in fields(kind) if "loat" in str(field.type)]


@pytest.mark.parametrize("kind", [*STRUCTS, *COLUMNS], ids=lambda kind: kind.__name__)
def test_every_float_says_its_unit_last(kind):
    for name in floats_of(kind):
        assert name.endswith(tuple(f"_{unit}" for unit in _UNITS)), f"{kind.__name__}.{name}"


def test_the_walk_finds_what_it_should():
    assert floats_of(messages.GpuReadings)[:2] == ["power_instant_w", "power_avg_w"]
    assert floats_of(view.SetPowerLimit) == ["power_limit_w"]
    assert {"draw_w", "lost", "name"}.isdisjoint(floats_of(view.GpuColumns))
    assert "energy_j" in floats_of(view.GpuColumns)
    assert set(BODIES) - {Heartbeat} <= set(STRUCTS)


def test_no_pickle_anywhere():
    for folder in ("testbed", "daemons", "emulators"):
        for path in (ROOT / folder).rglob("*.py"):
            found = re.search(r"^\s*(import|from) (pickle|marshal|shelve)", path.read_text(), re.M)
            assert not found, path
