"""Records that anybody may have written under `P/subnets/`: what becomes of them, up to the routes.

An input is a byte that chooses a backend, then key, value, key, value …, with a NUL between them.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

from msgspec.structs import replace

from flanneld_py.addresses import PerFamily
from flanneld_py.backends import backend_of
from flanneld_py.core.admission import Admission
from flanneld_py.core.admit import Peers, admit
from flanneld_py.core.allocate import decide_lease
from flanneld_py.core.config import parse_config
from flanneld_py.core.describe import describe
from flanneld_py.core.desired import desired
from flanneld_py.core.leasedecision import Keep, Release, Wish
from flanneld_py.core.plan import plan
from flanneld_py.core.records import (
    SUBNETS_PREFIX,
    _decode_any,
    decode,
    encode,
    fold,
    format_key,
    snapshot,
)
from flanneld_py.core.usualrecords import decode_usual
from flanneld_py.model import Change, Changes, Entry, Listing, NetworkConfig, Record, Snapshot, State
from tests.fuzz.rows import HOST, NETWORKS, OWN, OWN_MAC, assert_harmless
from tests.fuzz.target import Target, one_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from flanneld_py.backends.base import Backend

BACKENDS = (
    {"Type": "vxlan"},
    {"Type": "vxlan", "DirectRouting": True},
    {"Type": "host-gw"},
    {"Type": "udp"},
)
PUBLISHED = ("vxlan", "vxlan", "host-gw", "")
OWN_KEY = format_key(PerFamily(*OWN))
FIELDS = ("PublicIP", "PublicIPv6", "BackendType", "BackendData", "BackendV6Data", "NodeID")
MOST_RECORDS = 6
GARBAGE = Path(__file__).parents[1] / "netns" / "garbage.json"


class World(NamedTuple):
    """A network with two good peers, to which records are added."""

    config: NetworkConfig
    backend: Backend
    published: str
    entries: tuple[Entry, ...]
    before: Snapshot
    own: Record
    state: State = State()
    """Of us, with the good peers …"""
    peers: Peers = Peers()
    """… which are these."""


def check(data: bytes) -> None:
    world = _world(data[0] % len(BACKENDS) if data else 0)
    entries = list(_entries(data[1:]))
    for entry in entries:
        _reads_the_usual_alike(entry)
    listed = snapshot(Listing(40, 1, (*world.entries, *entries)), world.before)
    changes = tuple(Change(entry.key, entry) for entry in entries)
    folded = fold(world.before, Changes(40, changes))
    assert (listed.records, listed.bad) == (folded.records, folded.bad), "a restart sees another registry"
    for key, reason in listed.bad.items():
        one_line(reason[:300], *FIELDS, "the value", "subnet", "canonical form")
        assert key not in world.before.records or listed.records[key] is world.before.records[key]
    for key, record in listed.records.items():
        if record is not world.before.records.get(key):
            _reads_what_it_writes(record)
    taken = {entry.key.removeprefix(SUBNETS_PREFIX) for entry in entries}
    state, peers = _wanted(world, listed)
    for reason in (*peers.rejected.values(), *peers.doubtful.values()):
        one_line(reason)
    _decides_alike_bit_by_bit(world, listed, peers)
    assert_harmless(state)
    _keeps_the_good(world, state, taken)
    for op in plan(state, world.state)[:MOST_RECORDS]:
        one_line(describe(op))
    if OWN_KEY not in taken:
        _keeps_our_lease(world, listed)


def _reads_the_usual_alike(entry: Entry) -> None:
    """What is spelled as usual is read quickly, and is what the careful way makes of it."""
    quick = decode_usual(entry)
    if quick is not None:
        assert quick == _decode_any(entry)


def _entries(data: bytes) -> Iterator[Entry]:
    parts = data.split(b"\0")[: 2 * MOST_RECORDS]
    seen = set()
    for number, (key, value) in enumerate(zip(parts[::2], parts[1::2], strict=False), 11):
        name = SUBNETS_PREFIX + key.decode("utf-8", "backslashreplace")
        if name not in seen:
            seen.add(name)
            yield Entry(name, value, number, number, 0x99)


def _reads_what_it_writes(record: Record) -> None:
    again = decode(Entry(SUBNETS_PREFIX + record.key, encode(record).encode()))
    same = replace(
        again,
        create_revision=record.create_revision,
        mod_revision=record.mod_revision,
        etcd_lease=record.etcd_lease,
    )
    # Of a family that it has no subnet in, an address is not kept.
    assert same == record, "a record becomes another when it is written again"


def _wanted(world: World, records: Snapshot) -> tuple[State, Peers]:
    peers = admit(records, world.own, world.config, HOST, world.published)
    return desired(world.backend.desired, world.own, peers.accepted, HOST, ("/subnet.env", "")), peers


def _decides_alike_bit_by_bit(world: World, listed: Snapshot, peers: Peers) -> None:
    """A daemon that runs judges what has changed; that comes to what one that starts makes of it all."""
    admission = Admission()
    for records, expected in ((world.before, world.peers), (listed, peers), (world.before, world.peers)):
        admitted = admission.admit(records, world.own, world.config, HOST, world.published)
        assert admitted.peers == expected, "another decision than at a start"


def _keeps_the_good(world: World, state: State, taken: set[str]) -> None:
    """What was there before stays, to the row, unless somebody wrote to its very key."""
    good = {entry.key.removeprefix(SUBNETS_PREFIX) for entry in world.entries}
    if taken & good:
        return
    for table in ("links", "addrs", "fdb", "neighs", "nexthops", "routes", "tunnel", "pumps", "files"):
        before: Mapping[Any, Any] = getattr(world.state, table)
        after: Mapping[Any, Any] = getattr(state, table)
        assert before.items() <= after.items(), f"{table} of a good peer have changed"


def _keeps_our_lease(world: World, records: Snapshot) -> None:
    wish = Wish(
        world.published,
        HOST.external.public,
        world.own.backend_data,
        previous=(world.own.subnets,),
        etcd_lease=world.own.etcd_lease,
        held=world.own,
    )
    decision = decide_lease(world.config, records, HOST, wish, Random(1))
    # Another record with our name and address is a second one of ours, which goes.
    second = isinstance(decision, Release) and decision.record.key != OWN_KEY
    assert isinstance(decision, Keep) or second, f"we would give up our lease: {decision}"


@cache
def _world(number: int) -> World:
    published = PUBLISHED[number]
    text = json.dumps(
        {
            "Network": str(NETWORKS[0]),
            "EnableIPv6": True,
            "IPv6Network": str(NETWORKS[1]),
            "Backend": BACKENDS[number],
        }
    )
    config = parse_config(text)
    entries = tuple(
        Entry(SUBNETS_PREFIX + key, json.dumps(_value(n, published)).encode(), n, n, n)
        for n, key in enumerate((OWN_KEY, "10.5.20.0-24&fd00:5:0:20::-64", "10.5.22.0-24"), 1)
    )
    before = snapshot(Listing(10, 1, entries))
    world = World(config, backend_of(config), published, entries, before, before.records[OWN_KEY])
    state, peers = _wanted(world, before)
    return world._replace(state=state, peers=peers)


def _value(number: int, published: str) -> dict[str, Any]:
    """The record of a host, as a daemon of ours writes it."""
    value: dict[str, Any] = {"PublicIP": f"192.0.2.{number}", "PublicIPv6": f"2001:db8::{number}"}
    mac = OWN_MAC[:-1] + str(number)
    if published:
        value["BackendType"] = published
    if published == "vxlan":
        value["BackendData"] = value["BackendV6Data"] = {"VNI": 1, "VtepMAC": mac}
    if not published:
        value["BackendV6Data"] = {"DualStack": True}
    return value | {"NodeID": f"node-{number}"}


def seeds() -> Iterator[bytes]:
    """Each piece of tests/netns/garbage.json alone, and all of them in heaps; then records that do."""
    pieces = []
    for entry in json.loads(GARBAGE.read_text(encoding="utf-8")):
        if isinstance(entry.get("key"), str) and "value" in entry:
            value = entry["value"] if isinstance(entry["value"], str) else json.dumps(entry["value"])
            pieces.append((entry["key"], value.replace("$FILL", "")))
    for number, published in enumerate(PUBLISHED):
        kind = bytes([number])
        filled = [
            b"\0".join(
                text.replace("$BACKEND", published)
                .replace("$OWN_MAC", OWN_MAC)
                .replace("$OTHER", "host-gw")
                .encode()
                for text in piece
            )
            for piece in pieces
        ]
        yield from (kind + piece for piece in filled)
        for start in range(0, len(filled), MOST_RECORDS):
            yield kind + b"\0".join(filled[start : start + MOST_RECORDS])
        good = (
            f"10.5.4{n}.0-24\0{json.dumps(_value(4 + n, published), separators=(',', ':'))}" for n in range(4)
        )
        yield kind + "\0".join(good).encode()
        usual = _value(5, published) | {"PublicIPv6": None}
        usual.pop("BackendV6Data", None)
        yield kind + f"10.5.45.0-24\0{json.dumps(usual, separators=(',', ':'))}".encode()
        yield kind + f"0.0.0.0-0&fd00:5:0:44::-64\0{json.dumps(_value(9, published))}".encode()


TARGET = Target(
    check,
    seeds,
    words=(
        *(*FIELDS, "VtepMAC", "VNI"),
        *("vxlan", "host-gw", "DualStack", OWN_MAC, OWN_KEY, "10.5.1.0-24", "10.5.0.0-16", "10.5.1.128-25"),
        *(
            "10.5.30.0-24",
            "10.5.33.0-24",
            "192.0.2.1",
            "192.0.2.127",
            "2001:db8::1",
            "127.0.0.1",
            "10.5.20.0-24",
        ),
        *("224.0.0.1", "0.0.0.0-0", "&fd00:5:0:1::-64", "ff02::1", "node-1", "02:00:00:00:00:02", "null"),
    ),
)
