"""The short way to read a record gives what the long way gives, or leaves it to that."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanneld_py.core import records
from flanneld_py.core.usualrecords import decode_usual
from flanneld_py.errors import RecordError
from flanneld_py.model import Entry, Record

KEYS = [
    "10.5.34.0-24",
    "10.5.34.1-24",
    "010.5.34.0-24",
    "10.5.34.0-32",
    "10.5.34.0-0",
    "0.0.0.0-8",
    "10.5.034.0-24",
    "10.5.34-24",
    "10.5.34.0-24&fd00:34::-64",
    "1\N{ARABIC-INDIC DIGIT ZERO}.5.34.0-24",
    "10.5.34.0-024",
    "256.5.34.0-24",
]
ADDRESSES = [
    "192.0.2.7",
    "0.0.0.0",  # noqa: S104 - of nobody
    "127.0.0.1",
    "224.0.0.1",
    "255.255.255.255",
    "192.0.2.07",
    "192.0.2",
    "0.0.0.1",
]
MACS = [
    "82:4b:b1:2c:8f:a1",
    "00:00:00:00:00:00",
    "83:4b:b1:2c:8f:a1",
    "82:4B:b1:2c:8f:a1",
    "82-4b-b1-2c-8f-a1",
    "",
]
BITS = st.sampled_from(
    [
        '"PublicIPv6":null',
        '"BackendType":"vxlan"',
        '"BackendType":"host-gw"',
        '"BackendType":"VXLAN"',
        '"BackendType":""',
        '"BackendData":null',
        '"BackendData":{"VNI":01,"VtepMAC":"82:4b:b1:2c:8f:a1"}',
        '"NodeID":"0123456789abcdef"',
        '"NodeID":"not one"',
        '"NodeID":""',
        '"PublicIP":"192.0.2.9"',
        '"x":1',
    ]
)


@st.composite
def values(draw: st.DrawFn) -> bytes:
    parts = [f'"PublicIP":"{draw(st.sampled_from(ADDRESSES))}"']
    if draw(st.integers(0, 9)):
        parts.append('"PublicIPv6":null')
    parts += draw(st.sampled_from([[], ['"BackendType":"vxlan"'], ['"BackendType":"host-gw"']]))
    if draw(st.booleans()):
        vni, mac = draw(st.integers(-1, 10**9)), draw(st.sampled_from(MACS))
        parts.append(f'"BackendData":{{"VNI":{vni},"VtepMAC":"{mac}"}}')
    parts += draw(st.sampled_from([[], ['"NodeID":"0123456789abcdef0123456789abcdef"']]))
    parts += draw(st.lists(BITS, max_size=1))
    return ("{" + ",".join(parts) + "}").encode() + draw(st.sampled_from([b"", b"", b"\n", b"x"]))


def long_way(entry: Entry) -> Record | None:
    try:
        return records._decode_any(entry)
    except RecordError:
        return None


@given(st.sampled_from(KEYS), values())
def test_both_ways_agree(key: str, value: bytes) -> None:
    entry = Entry(f"subnets/{key}", value, 3, 5, 77)
    found = decode_usual(entry)
    assert found is None or found == long_way(entry)
    if found is not None:
        assert records.encode(found) == records.encode(long_way(entry) or found)


@pytest.mark.parametrize("fields", [{}, {"node_id": ""}, {"backend_type": "", "vxlan": False}])
def test_what_we_write_is_usual(fields: dict[str, Any]) -> None:
    kind, node = fields.get("backend_type", "vxlan"), fields.get("node_id", "f" * 32)
    data = ',"BackendData":{"VNI":1,"VtepMAC":"82:4b:b1:2c:8f:a1"}' if fields.get("vxlan", True) else ""
    text = '{"PublicIP":"192.0.2.7","PublicIPv6":null'
    text += (
        (f',"BackendType":"{kind}"' if kind else "") + data + (f',"NodeID":"{node}"' if node else "") + "}"
    )
    found = decode_usual(Entry("subnets/10.5.34.0-24", text.encode(), 3, 5, 77))
    assert found is not None
    assert records.encode(found) == text
