"""What a strange kernel may answer about nf_tables' rules, or tell of their changes."""

from __future__ import annotations

import atexit
import struct
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from flanneld_py.drivers import nfmessages as nf
from flanneld_py.drivers import nfreader
from flanneld_py.drivers.netlink import attribute
from flanneld_py.drivers.nfmonitor import NfMonitor, Touched
from flanneld_py.errors import KernelError
from flanneld_py.packetfilter import Chain, ChainKey
from tests.fuzz.kernel import DONE, ERROR, LIES, TORN, FuzzedSocket, Message, Wire, pack, unpack
from tests.fuzz.target import Target, one_line

if TYPE_CHECKING:
    from collections.abc import Iterator

TABLE, CHAIN, RULE, SET, ELEMENT, GENERATION = range(6)
KINDS = (
    *(nf.SUBSYSTEM | number for number in (0, 3, 6, 9, 12, 15)),
    *(nf.SUBSYSTEM | number for number in (2, 5, 8, 11, 14)),
    ERROR,
    DONE,
)
"""NFT_MSG_NEW… in the order above, then NFT_MSG_DEL…"""
WANTED = ChainKey("nft", "ip", "filter", "FORWARD")


def check(data: bytes) -> None:
    messages = list(unpack(data))
    chosen = data[0] % (1 + len(READERS)) if data else len(READERS)
    if chosen == len(READERS):
        _monitor(messages)
        return
    wire = Wire(messages, KINDS)
    with patch.object(nfreader, "NetlinkSocket", lambda _: FuzzedSocket(wire)):
        reader = nfreader.NfReader()
    try:
        _check_chains(READERS[chosen](reader))
        reader.tables()
    except KernelError as error:
        one_line(str(error)[:300])


READERS: tuple[Callable[[nfreader.NfReader], Mapping[ChainKey, Chain]], ...] = (
    lambda reader: reader.chains(),
    lambda reader: reader.chains([("ip", "filter"), ("inet", "flannel-ipv4")]),
    lambda reader: reader.some([WANTED]),
    lambda reader: reader.table(("ip", "filter")),
)


def _monitor(messages: list[Message]) -> None:
    wire = Wire(messages, KINDS)
    wire.tell()
    with patch.object(_listener(), "_socket", wire):
        heard = _listener()._drain()
    assert heard is None or isinstance(heard, Touched)


@cache
def _listener() -> NfMonitor:
    monitor = NfMonitor()
    atexit.register(monitor.close)
    return monitor


def _check_chains(chains: Mapping[ChainKey, Chain]) -> None:
    for key, chain in chains.items():
        assert key.where == "nft"
        hash(chain)
        for rule in chain.rules:
            assert len(rule.matches) < 1000


# --- seeds ----------------------------------------------------------------------------------------


def _attributes(value: int | str | bytes | Mapping[int, Any]) -> bytes:
    """A number of four bytes, a name, a value as it is, or attributes."""
    if isinstance(value, int):
        return struct.pack("!I", value)
    if isinstance(value, str):
        return value.encode() + b"\0"
    if isinstance(value, bytes):
        return value
    return b"".join(attribute(kind, _attributes(part)) for kind, part in value.items())


def _message(kind: int, family: str, found: Mapping[int, Any]) -> Message:
    number: int = nf.FAMILIES[family]  # type: ignore[index]
    return Message(kind, 0, nf.NFGENMSG.pack(number, 0, 0) + _attributes(found))


def _rule(*expressions: tuple[str, Mapping[int, Any]]) -> Message:
    listed = b"".join(
        attribute(nf.LIST_ELEM, _attributes({nf.EXPR_NAME: name, nf.EXPR_DATA: found}))
        for name, found in expressions
    )
    found = {1: "filter", nf.RULE_CHAIN: "FORWARD", nf.RULE_HANDLE: 9, nf.RULE_EXPRESSIONS: listed}
    return _message(RULE, "ip", found | {nf.RULE_USERDATA: b"\0\3ab\0"})


def _cmp(value: bytes, operator: int = 0) -> tuple[str, Mapping[int, Any]]:
    return "cmp", {1: 1, 2: operator, 3: {1: value}}


RULES = (
    _rule(
        ("payload", {1: 1, 2: 1, 3: 12, 4: 4}),
        _cmp(bytes((10, 5, 0, 0))),
        ("immediate", {1: 0, 2: {2: {1: 1}}}),
    ),
    _rule(
        ("payload", {1: 1, 2: 1, 3: 16, 4: 4}),
        ("bitwise", {1: 1, 2: 1, 3: 4, 4: {1: b"\xff\xff\0\0"}, 5: {1: bytes(4)}}),
        _cmp(bytes((10, 5, 0, 0)), 1),
        ("counter", {1: bytes(8), 2: bytes(7) + b"\7"}),
    ),
    _rule(
        ("meta", {1: 1, 2: 6}),
        _cmp(b"flannel.1" + bytes(7)),
        ("immediate", {1: 0, 2: {2: {1: 0xFFFFFFFD, 2: "X"}}}),
    ),
    _rule(("meta", {1: 1, 2: 4}), _cmp(struct.pack("=I", 1)), ("masq", {1: 0x10})),
    _rule(
        ("ct", {1: 1, 2: 0}),
        ("bitwise", {1: 1, 2: 1, 3: 4, 4: {1: b"\6\0\0\0"}, 5: {1: bytes(4)}}),
        _cmp(bytes(4), 1),
    ),
    _rule(("payload", {1: 1, 2: 1, 3: 12, 4: 4}), ("lookup", {1: "s", 2: 1, 3: 0})),
    _rule(("payload", {1: 1, 2: 1, 3: 12, 4: 4}), ("lookup", {1: "t", 2: 1})),
    _rule(
        ("payload", {1: 1, 2: 1, 3: 12, 4: 4}),
        ("range", {1: 1, 2: 0, 3: {1: b"\0\0\0\1"}, 4: {1: b"\0\0\0\7"}}),
    ),
    _rule(("match", {1: "comment", 2: 0, 3: b"hello\0"}), ("target", {1: "MASQUERADE", 2: 0, 3: bytes(20)})),
    _rule(("match", {1: "conntrack", 2: 3, 3: bytes(146) + b"\1\0\0\0\2\0\0\0"}), ("reject", {})),
    _rule(("fib", {1: 1, 2: 3, 3: 1}), _cmp(b"\2\0\0\0"), ("limit", {}), ("queue", {}), ("notrack", {})),
)


def seeds() -> Iterator[bytes]:
    key = {nf.ELEMENT_KEY: {nf.DATA_VALUE: bytes((10, 5, 0, 0))}}
    other = {nf.ELEMENT_KEY: {nf.DATA_VALUE: bytes((10, 6, 0, 0))}, nf.ELEMENT_FLAGS: 1}
    verdict = {nf.ELEMENT_DATA: {nf.DATA_VERDICT: {nf.VERDICT_CODE: 0}}}
    element = attribute(1, _attributes(key | verdict)) + attribute(1, _attributes(other | verdict))
    hook = {nf.HOOK_NUMBER: 2, nf.HOOK_PRIORITY: 0xFFFFFFFF}
    world = [
        _message(GENERATION, "inet", {nf.GEN_ID: 7, 2: 9, 3: "nft"}),
        _message(TABLE, "ip", {nf.TABLE_NAME: "filter", nf.TABLE_FLAGS: 0}),
        _message(TABLE, "inet", {nf.TABLE_NAME: "flannel-ipv4", nf.TABLE_FLAGS: 1}),
        _message(CHAIN, "ip", {1: "filter", 3: "FORWARD", 4: hook, 5: 0, 7: "filter"}),
        _message(CHAIN, "ip", {1: "filter", 3: "X"}),
        _message(CHAIN, "inet", {1: "flannel-ipv4", 3: "forward", 4: hook, 5: 1, 7: "filter"}),
        _message(SET, "ip", {1: "filter", 2: "s", 3: 0xC, 5: 4, 16: 1}),
        _message(SET, "ip", {1: "filter", 2: "t", 3: 0, 5: 4, 16: 2}),
        _message(ELEMENT, "ip", {1: "filter", 2: "s", 3: element}),
        *RULES,
    ]
    heaps = [world, [one._replace(flags=TORN) for one in world]]
    heaps += ([*world[:9], rule] for rule in RULES)
    for number, one in enumerate(world):
        heaps.append([one._replace(flags=LIES), *world])
        heaps.append([*world[:number], one._replace(body=one.body[:-3]), *world[number + 1 :]])
    for heap in heaps:
        yield from pack(heap, len(READERS) + 1)


NAMES = (
    *("bitwise", "byteorder", "cmp", "connlimit", "counter", "ct", "dup", "dynset", "exthdr", "fib"),
    *("flow_offload", "hash", "immediate", "last", "limit", "log", "lookup", "masq", "match", "meta"),
    *("nat", "notrack", "numgen", "objref", "osf", "payload", "queue", "quota", "range", "redir", "reject"),
    *("rt", "socket", "target", "tunnel", "xfrm", "conntrack", "mark", "state", "comment", "MASQUERADE"),
)
TARGET = Target(check, seeds, words=NAMES)
