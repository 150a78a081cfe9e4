"""The marks by which a restart without memory knows what is ours (docs/architecture.md, "What is ours")."""

from __future__ import annotations

import hashlib
import re

from flanneld_py.model import HostFacts

NEXTHOP_SLOT_BITS = 17
"""Nexthop objects per prefix: 131,072."""
TUN_NAME = re.compile(r"flannel\d{1,8}")
"""As flannel calls its TUN, by the kernel's template flannel%d."""
FIRST_MARK_BIT, MARK_BITS = 18, 14
"""RTAX_MAX has been 17 since Linux 4.15."""


def prefix_hash(prefix: str) -> int:
    """A 32-bit number that tells daemons of different etcd prefixes on one host apart."""
    return int.from_bytes(hashlib.sha256(prefix.encode()).digest()[:4], "big")


def link_alias(prefix: str) -> str:
    """The ifalias of every link of ours."""
    return f"flanneld-py:{prefix}"


def tun_name(facts: HostFacts, prefix: str) -> str:
    """Of our TUN device, whether it is there or is to be made: the first that no other daemon has marked.

    One of somebody else's keeps ours away, as it may be flannel's.
    """
    tuns = {link.name: link.alias for link in facts.links if TUN_NAME.fullmatch(link.name)}
    ours = sorted((name for name, alias in tuns.items() if alias == link_alias(prefix)), key=len)
    free = (f"flannel{n}" for n in range(len(tuns) + 1))
    return ours[0] if ours else next(n for n in free if not tuns.get(n, "").startswith(link_alias("")))


def nexthop_ids(prefix: str) -> range:
    """The ids (u32, linux/nexthop.h NHA_ID) our nexthop objects may bear: high bit, slot, index."""
    slot = prefix_hash(prefix) >> 18
    start = 0x8000_0000 | slot << NEXTHOP_SLOT_BITS
    return range(start + 1, start + (1 << NEXTHOP_SLOT_BITS))


def route_mark(prefix: str) -> int:
    """What IPv6 and blackhole routes of this prefix bear in RTAX_LOCK (linux/rtnetlink.h): never 0.

    Each bit there locks the metric of its number against change; those above RTAX_MAX lock nothing. Nothing
    else of such a route is ours to choose.
    """
    return (1 + prefix_hash(prefix) % ((1 << MARK_BITS) - 1)) << FIRST_MARK_BIT


LONGEST_NAME = 107
"""Bytes of an abstract unix socket's name behind its NUL (unix(7): sun_path has 108)."""


def lock_name(prefix: str) -> str:
    """Abstract unix socket (unix(7)) held by the daemon of a prefix; one per network namespace."""
    return _abstract("flanneld-py:", prefix)


def file_lock_name(subnet_file: str) -> str:
    """The same for a subnet file (its real path): beside it is room for one status and one socket."""
    return _abstract("flanneld-py-file:", subnet_file)


def _abstract(kind: str, what: str) -> str:
    name = kind + what
    raw = what.encode(errors="surrogateescape")
    if len(kind) + len(raw) > LONGEST_NAME:
        digest = hashlib.sha256(raw).hexdigest()[:32]
        head = raw[: LONGEST_NAME - len(kind) - len(digest) - 3].decode(errors="ignore")
        name = f"{kind}{head}...{digest}"
    return f"\0{name}"
