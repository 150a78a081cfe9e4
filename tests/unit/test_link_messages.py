"""The messages about devices are those that pyroute2 makes, byte for byte."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import pytest
from pyroute2 import IPBatch

from flanneld_py.drivers.linkmessages import Request, encode

if TYPE_CHECKING:
    from collections.abc import Iterator

NLM_F_ACK = 4
VXLAN = {
    "ifname": "flannel.1",
    "kind": "vxlan",
    "index": 1 << 24,
    "mtu": 1450,
    "address": "02:00:00:00:00:01",
    "txqlen": 0,
    "vxlan_id": 9_999_999,
    "vxlan_link": 3,
    "vxlan_local": "192.0.2.1",
    "vxlan_port": 8472,
    "vxlan_learning": False,
}
CHANGES: list[dict[str, Any]] = [
    {"ifalias": "flanneld-py:/coreos.com/network"},
    {"state": "up"},
    {"state": "down"},
    {"ifname": "flannel.1"},
    {"mtu": 1400},
    {"address": "82:4b:b1:2c:8f:a1"},
    {"kind": "vxlan", "vxlan_local": "192.0.2.7"},
    {"kind": "vxlan", "vxlan_local6": "2001:db8::7"},
    {"kind": "vxlan", "vxlan_learning": True},
    {"kind": "vxlan", "vxlan_link": 12},
    {"ifalias": "flanneld-py:/x", "mtu": 1472, "txqlen": 1000},
]
REQUESTS = [
    Request("link", "add", VXLAN),
    Request("link", "add", {**VXLAN, "vxlan_gbp": True, "vxlan_learning": True}),
    Request("link", "del", {"index": 77}),
    *(Request("link", "set", {"index": 77, **change}) for change in CHANGES),
    Request("addr", "add", {"index": 77, "address": "10.5.3.0", "prefixlen": 32}),
    Request("addr", "add", {"index": 77, "address": "fd00:5:3::", "prefixlen": 128, "flags": 2}),
    Request("addr", "del", {"index": 77, "address": "10.5.3.0", "prefixlen": 32}),
    Request("addr", "del", {"index": 77, "address": "fd00:5:3::", "prefixlen": 128}),
]


@pytest.fixture
def batch() -> Iterator[Any]:
    made = IPBatch()
    yield made
    made.close()


@pytest.mark.parametrize("request_", REQUESTS, ids=str)
def test_as_pyroute2_makes_them(batch: Any, request_: Request) -> None:
    batch.reset()
    getattr(batch, request_.what)(request_.verb, **request_.arguments)
    theirs = bytearray(batch.batch)
    (flags,) = struct.unpack_from("=H", theirs, 6)
    struct.pack_into("=HII", theirs, 6, flags & ~NLM_F_ACK, 0, 0)
    assert encode(request_) == bytes(theirs)


def test_no_field_is_passed_over() -> None:
    with pytest.raises(KeyError):
        encode(Request("link", "set", {"index": 1, "colour": "red"}))
