"""Messages: refused when wrong, named with units, readable by any MessagePack reader."""

from __future__ import annotations

import contextlib
import re
import typing
from dataclasses import fields

import msgpack
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.core import messages, view
from testbed.core.errors import TransportError
from testbed.core.messages import Body, Envelope, Lease, Ping, Request, Submit, decode, encode
from testbed.core.spec import RunSpec
from testbed.core.topics import TOPICS

UNITS = (
    "_s", "_w", "_j", "_c", "_mhz", "_bytes", "_frac", "_w_per_s", "_rps", "_tokens", "_mib",
)  # fmt: skip
PLAIN = {
    # Numbers without a unit, by their nature.
    "burst_cv", "share", "speedup",
}  # fmt: skip


def structs(root: type) -> list[type[msgspec.Struct]]:
    found: list[type[msgspec.Struct]] = []

    def walk(kind: object) -> None:
        for part in typing.get_args(kind):
            walk(part)
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and kind not in found:
            found.append(kind)
            for hint in typing.get_type_hints(kind).values():
                walk(hint)

    walk(root)
    return found


@pytest.mark.parametrize("struct", [*structs(Envelope), *structs(RunSpec)])
def test_every_float_says_its_unit(struct):
    for name, hint in typing.get_type_hints(struct).items():
        if "float" in str(hint) and name not in PLAIN:
            assert name.endswith(UNITS), f"{struct.__name__}.{name}"


@pytest.mark.parametrize(
    "columns", [view.GpuColumns, view.InstanceColumns, view.TenantColumns, view.RowColumns]
)
def test_every_column_of_floats_says_its_unit(columns):
    for column in fields(columns):
        if column.type == "Floats":
            assert column.name.endswith(UNITS), column.name


def test_every_body_has_a_topic():
    assert set(TOPICS) == set(typing.get_args(Body))


def test_any_messagepack_reader_can_read_the_wire():
    request = Request(7, 1.5, 100, 20, tenant="t", slo_class="chat")
    tree = msgpack.unpackb(encode(Envelope("n0", 1, 2, 3.5, Submit(4, request))))
    assert tree["source"] == "n0"
    assert tree["body"]["type"] == "Submit"
    assert tree["body"]["request"]["prompt_tokens"] == 100


@pytest.mark.parametrize(
    "change",
    [
        {"t_s": "soon"},
        {"sequence": 1.5},
        {"body": {"type": "Explode"}},
        {"body": {"type": "Ping"}},
        {"body": {"type": "Ping", "sent_ns": 1, "more": 2}},
        {"extra": 1},
    ],
)
def test_what_is_wrong_is_refused(change):
    tree = msgpack.unpackb(encode(Envelope("n", 1, 1, 0.0, Ping(1))))
    with pytest.raises(TransportError, match="bad message"):
        decode(msgpack.packb({**tree, **change}))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_noise_is_refused_and_never_crashes(data):
    with pytest.raises(TransportError):
        decode(data)


@settings(max_examples=300, deadline=None)
@given(place=st.integers(0, 10_000), value=st.integers(0, 255))
def test_a_flipped_byte_is_refused_or_still_a_message(place, value):
    data = bytearray(encode(Envelope("node", 1, 2, 3.0, Lease(1, 2, 3.0, [1.0] * 4, [0.0] * 4))))
    data[place % len(data)] = value
    with contextlib.suppress(TransportError):
        assert isinstance(decode(bytes(data)), Envelope)


def test_no_pickle_anywhere():
    from tests.conftest import ROOT

    for folder in ("testbed", "daemons", "emulators"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not re.search(
                r"^\s*(import|from) (pickle|marshal|shelve)", path.read_text(), re.M
            )
    assert messages.PROTOCOL_VERSION >= 1
