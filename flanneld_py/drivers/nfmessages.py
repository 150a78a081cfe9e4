"""nf_tables' netlink messages (linux/netfilter/nf_tables.h, nfnetlink.h): numbers, requests, attributes.

Numbers in attributes are big-endian; what packets are compared with is as it stands in the kernel's memory.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Literal, TypeAlias

from flanneld_py.drivers.netlink import ATTRIBUTE, NLA_TYPE_MASK, attribute
from flanneld_py.packetfilter import Hook

Family: TypeAlias = Literal["ip", "ip6", "inet"]

NFGENMSG = struct.Struct("!BBH")
"""Family, version, resource id."""
FAMILIES: Mapping[Family, int] = {"inet": 1, "ip": 2, "ip6": 10}
"""linux/netfilter.h NFPROTO_*: those that see what is routed."""
FAMILY_NAMES: Mapping[int, Family] = {number: name for name, number in FAMILIES.items()}
HOOKS: tuple[Hook, ...] = ("prerouting", "input", "forward", "output", "postrouting", "ingress")
"""By enum nf_inet_hooks."""
NETLINK_NETFILTER = 12  # linux/netlink.h
NFNLGRP_NFTABLES = 7

SUBSYSTEM = 10 << 8  # NFNL_SUBSYS_NFTABLES
GETCHAIN = SUBSYSTEM | 4
GETTABLE = SUBSYSTEM | 1
GETRULE = SUBSYSTEM | 7
GETSET = SUBSYSTEM | 10
GETSETELEM = SUBSYSTEM | 13
NEWGEN = SUBSYSTEM | 15
GETGEN = SUBSYSTEM | 16

OBJECT_TABLE = 1
"""The table's name, in messages of chains, rules, sets, elements and further objects alike."""
TABLE_NAME, TABLE_FLAGS = 1, 2
TABLE_DORMANT = 0x1
CHAIN_NAME, CHAIN_HOOK, CHAIN_POLICY, CHAIN_TYPE = 3, 4, 5, 7
HOOK_NUMBER, HOOK_PRIORITY = 1, 2
RULE_CHAIN, RULE_HANDLE, RULE_EXPRESSIONS, RULE_USERDATA = 2, 3, 4, 7
USERDATA_COMMENT = 0  # libnftnl/udata.h
LIST_ELEM = 1
EXPR_NAME, EXPR_DATA = 1, 2
COUNTER = attribute(EXPR_NAME, b"counter\0")
COUNTER_PACKETS = 2
DATA_VALUE, DATA_VERDICT = 1, 2
VERDICT_CODE, VERDICT_CHAIN = 1, 2
SET_NAME, SET_FLAGS, SET_KEY_LEN, SET_HANDLE = 2, 3, 5, 16
SET_INTERVAL, SET_MAP, SET_TIMEOUT, SET_DYNAMIC, SET_CONCAT = 0x4, 0x8, 0x10, 0x20, 0x80
ELEMENTS_SET, ELEMENTS = 2, 3
ELEMENT_KEY, ELEMENT_DATA, ELEMENT_FLAGS = 1, 2, 3
ELEMENT_INTERVAL_END, ELEMENT_CATCHALL = 0x1, 0x2
GEN_ID, GEN_PROC_PID, GEN_PROC_NAME = 1, 2, 3


def body(family: int = 0, *texts: tuple[int, str]) -> bytes:
    """The body of a request: the family (0: all), and attributes that are names."""
    found = (attribute(kind, text.encode() + b"\0") for kind, text in texts)
    return NFGENMSG.pack(family, 0, 0) + b"".join(found)


def listed(data: bytes, start: int = 0) -> Iterator[tuple[int, bytes]]:
    """Type and payload of attributes, in order, those of one type each by itself."""
    end = len(data)
    while start + 4 <= end:
        length, kind = ATTRIBUTE.unpack_from(data, start)
        if length < 4 or start + length > end:
            return
        yield kind & NLA_TYPE_MASK, data[start + 4 : start + length]
        start += length + 3 & ~3


def number(found: Mapping[int, bytes], kind: int) -> int:
    """An attribute that is an unsigned number; 0 where it is missing."""
    return int.from_bytes(found.get(kind, b""), "big")


def signed(found: Mapping[int, bytes], kind: int) -> int:
    return int.from_bytes(found.get(kind, b""), "big", signed=True)


def name(found: Mapping[int, bytes], kind: int) -> str:
    """An attribute that is a name."""
    return text(found.get(kind, b""))


def text(data: bytes) -> str:
    """What stands before the first zero byte."""
    return data.split(b"\0", 1)[0].decode(errors="replace")


def comment_of(userdata: bytes) -> str:
    """The comment in a rule's userdata, where nft keeps it: type and length of one byte, then the value."""
    start = 0
    while start + 2 <= len(userdata):
        kind, length = userdata[start], userdata[start + 1]
        if kind == USERDATA_COMMENT:
            return text(userdata[start + 2 : start + 2 + length])
        start += 2 + length
    return ""
