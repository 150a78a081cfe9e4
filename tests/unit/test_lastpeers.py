"""The peers of the last run, written and read back."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from flanneld_py.core.lastpeers import parse_peers, render_peers
from flanneld_py.core.records import decode
from flanneld_py.model import Entry, Record

PREFIX = "/coreos.com/network"
GO = (
    '{"PublicIP":"192.0.2.9","PublicIPv6":null,"BackendType":"vxlan",'
    '"BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:09"}}'
)
DUAL = '{"PublicIP":"192.0.2.8","PublicIPv6":"2001:db8::8","BackendType":"host-gw","NodeID":"eight"}'


def stored(key: str, value: str) -> Record:
    return decode(Entry(f"subnets/{key}", value.encode(), 3, 4, 5))


PEERS = (
    stored("10.5.9.0-24", GO),
    stored("10.5.8.0-24&fd00:5:0:8::-64", DUAL),
    stored("0.0.0.0-0&fd00:5:0:7::-64", DUAL.replace("eight", "seven")),
)


def test_what_is_written_is_read_back() -> None:
    last = parse_peers(render_peers(PREFIX, 2**64 - 1, 77, PEERS), PREFIX)
    assert last is not None
    assert (last.cluster_id, last.revision) == (2**64 - 1, 77)
    bare = [replace(record, create_revision=0, mod_revision=0, etcd_lease=0) for record in PEERS]
    assert list(last.records.values()) == bare
    assert list(last.records) == [record.key for record in PEERS]


def changed(**fields: Any) -> str:
    body = json.loads(render_peers(PREFIX, 7, 77, PEERS)) | fields
    return json.dumps(body)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "null",
        "[" * 100_000,
        changed(revision=78),
        changed(peers={}),
        changed(sha256=""),
        render_peers(PREFIX, 7, 77, PEERS)[:-40],
        render_peers("/other", 7, 77, PEERS),
    ],
)
def test_anything_else_is_as_if_there_were_none(text: str) -> None:
    assert parse_peers(text, PREFIX) is None
