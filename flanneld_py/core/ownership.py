"""The marks by which a restart without memory knows what is ours (docs/architecture.md, "What is ours")."""

from __future__ import annotations

import hashlib

NEXTHOP_SLOT_BITS = 17
"""Nexthop objects per prefix: 131,072."""


def prefix_hash(prefix: str) -> int:
    """A 32-bit number that tells daemons of different etcd prefixes on one host apart."""
    return int.from_bytes(hashlib.sha256(prefix.encode()).digest()[:4], "big")


def link_alias(prefix: str) -> str:
    """The ifalias of every link of ours."""
    return f"flanneld-py:{prefix}"


def nexthop_ids(prefix: str) -> range:
    """The ids (u32, linux/nexthop.h NHA_ID) our nexthop objects may bear: high bit, slot, index."""
    slot = prefix_hash(prefix) >> 18
    start = 0x8000_0000 | slot << NEXTHOP_SLOT_BITS
    return range(start + 1, start + (1 << NEXTHOP_SLOT_BITS))


def lock_name(prefix: str) -> str:
    """Abstract unix socket (unix(7)) held by the daemon of a prefix; one per network namespace."""
    return f"\0flanneld-py:{prefix}"
