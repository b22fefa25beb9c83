"""Every message travels and comes back the same; whatever else arrives is refused."""

from __future__ import annotations

import math
import random
import re
import struct
import types
import typing
from dataclasses import fields
from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from testbed.core import messages, view
from testbed.core.columns import Columns
from testbed.core.errors import TransportError
from testbed.core.messages import (
    Body,
    Envelope,
    GpuReadings,
    Heartbeat,
    InstanceReadings,
    Lease,
    Report,
    RowReport,
    SlotReadings,
    Stop,
    TenantReadings,
    decode,
    encode,
    merge,
    report,
)
from testbed.core.topics import TOPICS
from tests.conftest import ROOT

BODIES: tuple[type, ...] = typing.get_args(Body)
STRUCTS = [
    kind
    for kind in vars(messages).values()
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and kind.__struct_fields__
]
READINGS = [GpuReadings, InstanceReadings, TenantReadings]
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
    if hint in (Report, RowReport):
        return reports() if hint is Report else row_reports()
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        hints = typing.get_type_hints(hint)
        return st.builds(hint, **{name: instances_of(hints[name]) for name in hints})
    if typing.get_origin(hint) is list:
        return st.lists(instances_of(typing.get_args(hint)[0]), max_size=3)
    if typing.get_origin(hint) is typing.Literal:
        return st.sampled_from(typing.get_args(hint))
    if typing.get_origin(hint) is types.UnionType:
        return st.one_of(*(instances_of(choice) for choice in typing.get_args(hint)))
    return {float: FINITE, int: INTEGERS, bool: st.booleans(), str: TEXT, bytes: st.binary()}[hint]


def builtins_of(envelope: msgspec.Struct) -> Any:
    """What is on the wire, as another library sees it."""
    return msgspec.to_builtins(envelope, builtin_types=[bytes])


def reports() -> st.SearchStrategy[Report]:
    """Whole reports: their packed readings have lengths that go together."""
    packed = {
        name: st.integers(0, 3)
        .map(kind.size_bytes.__mul__)
        .flatmap(lambda n: st.binary(min_size=n, max_size=n))
        for name, kind in zip(("gpus", "instances", "tenants"), READINGS, strict=True)
    }
    return st.builds(Report, **packed, lease_epoch=INTEGERS, lease_sequence=INTEGERS,
                     drift_total=INTEGERS, late_s=FINITE,
                     slots=st.none() | instances_of(SlotReadings))  # fmt: skip


def row_reports() -> st.SearchStrategy[RowReport]:
    words = st.builds(Envelope, TEXT, INTEGERS, INTEGERS, st.just(1.0), reports())
    return st.lists(words, max_size=3).map(merge)


ENVELOPES = instances_of(Envelope)


@given(ENVELOPES)
def test_what_is_decoded_is_what_was_encoded(envelope):
    assert decode(encode(envelope)) == envelope


@given(ENVELOPES)
def test_another_msgpack_library_reads_the_same(envelope):
    assert msgpack.unpackb(encode(envelope), strict_map_key=False) == builtins_of(envelope)


@given(ENVELOPES)
def test_and_what_another_library_writes_is_read_here(envelope):
    assert decode(msgpack.packb(builtins_of(envelope))) == envelope


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


# Readings.


def columns_of(kind: type[Columns], count: st.SearchStrategy[int]) -> st.SearchStrategy[Columns]:
    """Readings whose columns are of one length."""
    entries = {"f": FINITE, "i": INTEGERS, "u": st.booleans()}
    record = st.tuples(*(entries[kind.layout[name].kind] for name in kind.names))
    rows = count.flatmap(lambda n: st.lists(record, min_size=n, max_size=n))
    return rows.map(
        lambda rows: kind(*map(list, zip(*rows, strict=True))) if rows else kind.empty()
    )


def bank(kind: type[Columns]) -> st.SearchStrategy[Columns]:
    return columns_of(kind, st.integers(0, 3))


def report_of(gpus: GpuReadings, instances: InstanceReadings | None = None, slots=None) -> Report:
    return report(gpus, instances or InstanceReadings.empty(), TenantReadings.empty(), slots=slots)


def slots_of(node: int) -> SlotReadings | None:
    """Every second node is elastic."""
    return SlotReadings(node, [node], [1], [0.5]) if node % 2 else None


@pytest.mark.parametrize("kind", READINGS)
@given(st.data())
def test_readings_are_the_same_after_packing(kind, data):
    readings = data.draw(bank(kind))
    got = kind.unpack(readings.pack())
    assert got == readings
    assert len(got) == len(readings) == len(readings.pack()) // kind.size_bytes
    for name in kind.names:
        assert getattr(got, name).tolist() == getattr(readings, name).tolist()
    with pytest.raises(AttributeError):
        _ = got.no_such_column


def test_a_record_has_no_padding_and_names_its_fields_in_order():
    assert GpuReadings.names[0] == "power_instant_w"
    assert GpuReadings.layout.names == GpuReadings.names
    assert GpuReadings.size_bytes == 9 * 8 + 2 * 8 + 1
    two = GpuReadings(*([[1.5, 2.5]] * 9), [3, 4], [5, 6], [False, True])
    assert struct.unpack("<9d2qB", two.pack()[:89]) == (*([1.5] * 9), 3, 5, 0)
    assert struct.unpack("<9d2qB", two.pack()[89:]) == (*([2.5] * 9), 4, 6, 1)


def test_any_flag_but_zero_means_yes():
    data = bytearray(GpuReadings(*([[0.0]] * 9), [0], [0], [True]).pack())
    data[-1] = 7
    assert GpuReadings.unpack(bytes(data)).lost.tolist() == [True]


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"x" * 90, r"no whole number of records - at `\$.body`"),
        ([1.0], r"Expected `bytes`, got `array` - at `\$.body.gpus`"),
        (None, r"Expected `bytes`, got `None` - at `\$.body.gpus`"),
    ],
)
def test_readings_that_cannot_be_are_refused_with_the_place(data, what):
    whole = builtins_of(Envelope("n", 1, 1, 0.0, report_of(GpuReadings.empty())))
    whole["body"]["gpus"] = data
    with pytest.raises(TransportError, match=what):
        decode(msgpack.packb(whole))


def test_columns_of_different_lengths_are_refused_where_they_are_made():
    with pytest.raises(ValueError, match="output_tokens_total: 2 of 1 entries"):
        InstanceReadings([1], [1], [0.5], [1], [1, 2], [0])
    with pytest.raises(TypeError, match="6 columns needed"):
        InstanceReadings([1], [1])
    with pytest.raises(TypeError, match="surprise"):
        InstanceReadings([1], [1], [0.5], [1], [1], surprise=[0])


@given(st.lists(st.tuples(bank(GpuReadings), bank(InstanceReadings)), min_size=1, max_size=4),
       st.data())  # fmt: skip
def test_a_row_report_is_its_nodes_reports_one_after_the_other(parts, data):
    words = [
        Envelope(f"node{k}", 10 + k, 20 + k, 3.0, report_of(*part, slots_of(k)))
        for k, part in enumerate(parts)
    ]
    row = merge(words)
    assert decode(encode(Envelope("row0", 1, 1, 3.0, row))).body == row
    gpus = GpuReadings.unpack(row.gpus)
    for name in gpus.names:
        expected = [value for part, _ in parts for value in getattr(part, name).tolist()]
        assert getattr(gpus, name).tolist() == expected
    keep = data.draw(st.lists(st.booleans(), min_size=len(parts), max_size=len(parts)))
    kept = [word for word, stays in zip(words, keep, strict=True) if stays]
    assert row.pick(keep) == merge(kept)


@pytest.mark.parametrize("name", [*RowReport.__struct_fields__])
def test_a_row_report_with_a_column_too_long_is_refused(name):
    one = report_of(GpuReadings(*([[1.0]] * 9), [1], [1], [False]))
    whole = builtins_of(Envelope("row0", 1, 1, 0.0, merge([Envelope("n", 1, 1, 0.0, one)] * 2)))
    column = whole["body"][name]
    if isinstance(column, dict):
        column[2] = builtins_of(SlotReadings(1, [1], [1], [0.0]))
    elif isinstance(column, list):
        column.append(column[0])
    else:
        whole["body"][name] += b"x" * READINGS_BYTES[name]
    with pytest.raises(TransportError, match="bad message"):
        decode(msgpack.packb(whole))


READINGS_BYTES = {
    "gpus": GpuReadings.size_bytes,
    "instances": InstanceReadings.size_bytes,
    "tenants": TenantReadings.size_bytes,
}


# Names.


def floats_of(kind: type) -> list[str]:
    """Names of the fields of a struct or dataclass that hold floats, alone or in a column."""
    if issubclass(kind, Columns):
        return [name for name in kind.names if kind.layout[name].kind == "f"]
    if issubclass(kind, msgspec.Struct):
        hints = {name: str(hint) for name, hint in typing.get_type_hints(kind).items()}
        return [name for name, hint in hints.items() if "float" in hint]
    return [field.name for field in fields(kind) if "loat" in str(field.type)]


@pytest.mark.parametrize("kind", [*STRUCTS, *READINGS, *COLUMNS], ids=lambda kind: kind.__name__)
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
