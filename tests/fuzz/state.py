"""What an earlier run left of its lease: state.json, any text.

A right checksum is no proof, as anybody can make one: each input is read as it is, and with one put right.
"""

from __future__ import annotations

import hashlib
import json
import math
from ipaddress import IPv4Network, IPv6Network
from typing import TYPE_CHECKING, Any

from flanneld_py.addresses import PerFamily
from flanneld_py.core.statefile import SavedState, parse_state, render_state, why_unusable
from flanneld_py.daemon.leaseground import LastRun
from tests.fuzz.target import Target, one_line

if TYPE_CHECKING:
    from collections.abc import Iterator

PREFIX = "/coreos.com/network"
LEASE_IDS = range(-(1 << 63), 1 << 63)
"""etcd's are int64."""


def check(data: bytes) -> None:
    text = data.decode(errors="backslashreplace")  # as daemon/oldfiles.py reads files
    for whole in (text, _signed(text)):
        saved = parse_state(whole)
        if saved is None:
            one_line(why_unusable(whole))
        else:
            _check_state(saved)


def _signed(text: str) -> str:
    """The same with a checksum that is right, where it is an object at all."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if not isinstance(body, dict):
        return text
    body.pop("sha256", None)
    try:
        digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        return json.dumps({**body, "sha256": digest})
    except (TypeError, RecursionError):
        return text


def _check_state(saved: SavedState) -> None:
    assert type(saved.etcd_lease) is int
    assert saved.etcd_lease in LEASE_IDS, "etcd's client cannot send it"
    assert type(saved.put_due) in (int, float)
    assert math.isfinite(saved.put_due), "a time that never comes, or always"
    for text in (saved.prefix, saved.node_id, saved.mac, saved.mac_seed):
        assert isinstance(text, str)
        text.encode()  # raises for half a character
    for net in (*saved.networks, *saved.subnets.values()):
        assert isinstance(net, IPv4Network | IPv6Network)
    assert parse_state(render_state(saved)) == saved
    run = LastRun.of(saved)
    assert bool(run.key) == bool(saved.subnets.values())


def seeds() -> Iterator[bytes]:
    state = SavedState(
        PREFIX,
        "node-1",
        (IPv4Network("10.5.0.0/16"), IPv6Network("fd00:5::/48")),
        PerFamily(IPv4Network("10.5.1.0/24"), IPv6Network("fd00:5:0:1::/64")),
        0x6943_0000_0000_0001,
        "02:00:00:00:00:01",
        "0123456789abcdef",
        1_795_000_000.25,
    )
    body: dict[str, Any] = json.loads(render_state(state))
    yield render_state(state).encode()
    yield from (json.dumps(body | odd).encode() for odd in ODD)
    yield from (b"", b"{}", b"[]", b"null", b"\xff" * 8)


ODD: tuple[dict[str, Any], ...] = (
    {"format": 2},
    {"prefix": 7},
    {"mac": 7},
    {"networks": [7]},
    {"networks": ["10.5.0.0/33"]},
    {"subnets": {"10.5.1.0/24": 1}},
    {"etcd_lease": True},
    {"etcd_lease": 10**30},
    {"put_due": float("nan")},
    {"put_due": float("inf")},
    {"node_id": "\ud800"},
)

TARGET = Target(
    check,
    seeds,
    words=(
        *("format", "prefix", "node_id", "networks", "subnets", "etcd_lease", "mac", "mac_seed", "put_due"),
        *("sha256", "NaN", "Infinity", "null", "true"),
    ),
)
