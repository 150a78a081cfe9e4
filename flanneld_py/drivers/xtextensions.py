"""The matches and targets of iptables' extensions, as the kernel keeps them (linux/netfilter/x_tables.h).

Legacy iptables uses them, and iptables-nft for what nf_tables has no expression for. Their numbers are
native-endian, addresses and ports excepted.
"""

from __future__ import annotations

from typing import Literal

from flanneld_py.drivers.netlink import U16, U32
from flanneld_py.packetfilter import Field, Mark, Match, Verdict

RANDOM_FULLY = 0x10
"""linux/netfilter/nf_nat.h NF_NAT_RANGE_PROTO_RANDOM_FULLY."""
CT_STATES = ((0x1, "invalid"), (0x2, "established"), (0x4, "related"), (0x8, "new"))
"""Bits that nf_tables, xt_conntrack and xt_state have in common."""
CT_STATUSES = (
    (0x1, "expected"),
    (0x2, "seen-reply"),
    (0x4, "assured"),
    (0x8, "confirmed"),
    (0x10, "snat"),
    (0x20, "dnat"),
    (0x200, "dying"),
)
"""linux/netfilter/nf_conntrack_common.h enum ip_conntrack_status, by nft's names."""
XT_STATES = (*CT_STATES, (0x100, "untracked"))
XT_STATE_NAT = ((0x40, "snat"), (0x80, "dnat"))
"""xt_conntrack's virtual states: what nf_tables calls a status."""
XT_STATE_ONLY = (*CT_STATES, (0x40, "untracked"))
"""Of xt_state, where translation is no state."""
CONNTRACK_FLAGS = 146
"""Where match_flags, invert_flags, state_mask and status_mask are in struct xt_conntrack_mtinfo*."""
CONNTRACK_STATE, CONNTRACK_STATUS, CONNTRACK_STATE_ALIAS = 0x1, 0x40, 0x2000

GO_ON = frozenset(
    {
        "AUDIT",
        "CHECKSUM",
        "CLASSIFY",
        "CONNMARK",
        "CONNSECMARK",
        "CT",
        "DSCP",
        "HL",
        "HMARK",
        "IDLETIMER",
        "LED",
        "LOG",
        "MARK",
        "NFLOG",
        "NOTRACK",
        "RATEEST",
        "SECMARK",
        "SET",
        "TCPMSS",
        "TCPOPTSTRIP",
        "TEE",
        "TOS",
        "TRACE",
        "TTL",
        "ULOG",
    }
)
"""Targets after which the next rule is asked."""
TRANSLATIONS = frozenset({"DNAT", "DNPT", "NETMAP", "REDIRECT", "SNAT", "SNPT"})
SETS: dict[str, frozenset[Field]] = {
    **dict.fromkeys(("CONNMARK", "HMARK", "MARK", "SET"), frozenset({"mark"})),
    **dict.fromkeys(("CT", "NOTRACK"), frozenset({"ct state"})),
}
"""Target → what of the packet it may change."""


def bit_names(bits: int, names: tuple[tuple[int, str], ...]) -> tuple[str, ...] | None:
    """The names of bits; None if not all have one."""
    found = tuple(name for bit, name in names if bits & bit)
    return found if sum(bit for bit, _ in names if bits & bit) == bits else None


def comment_text(info: bytes) -> str:
    """The text of a `comment` match."""
    return info.split(b"\0", 1)[0].decode(errors="replace")


def extension_match(name: str, revision: int, info: bytes) -> Match:
    """What a match of an extension (`-m name`) asks for."""
    found = None
    if name == "mark" and revision == 1 and len(info) >= 9:
        (value,), (mask,) = U32.unpack_from(info, 0), U32.unpack_from(info, 4)
        found = Match("mark", (Mark(value, mask),), bool(info[8]))
    elif name == "conntrack" and revision in (1, 2, 3):
        found = _conntrack(revision, info)
    elif name == "state" and revision == 0 and len(info) >= 4:
        states = bit_names(U32.unpack_from(info, 0)[0], XT_STATE_ONLY)
        found = Match("ct state", states) if states else None
    return found or Match("other", (f"-m {name}",))


def _conntrack(revision: int, info: bytes) -> Match | None:
    if len(info) < CONNTRACK_FLAGS + 8:
        return None
    (asked,), (inverted,) = (U16.unpack_from(info, CONNTRACK_FLAGS + at) for at in (0, 2))
    if revision == 1:
        states, status = info[CONNTRACK_FLAGS + 4], info[CONNTRACK_FLAGS + 5]
    else:
        (states,), (status,) = (U16.unpack_from(info, CONNTRACK_FLAGS + at) for at in (4, 6))
    asked &= ~CONNTRACK_STATE_ALIAS
    negated = bool(inverted & asked)
    if asked == CONNTRACK_STATE:
        if names := bit_names(states, XT_STATES):
            return Match("ct state", names, negated)
        names = bit_names(states, XT_STATE_NAT)
    elif asked == CONNTRACK_STATUS:
        names = bit_names(status, CT_STATUSES)
    else:
        names = None
    return Match("ct status", names, negated) if names else None


def extension_verdict(name: str, info: bytes, version: Literal[4, 6]) -> Verdict:
    """What a target of an extension (`-j NAME`) in a table of IPv4 or of IPv6 does with a packet."""
    if name == "MASQUERADE":
        # nf_nat_ipv4_multi_range_compat begins with a count, nf_nat_range with its flags.
        at = 4 if version == 4 else 0
        flags = U32.unpack_from(info, at)[0] if len(info) >= at + 4 else 0
        if flags & ~RANDOM_FULLY:
            return Verdict("nat")  # to ports that are given, or at random in the old way
        return Verdict("masquerade", fully_random=bool(flags & RANDOM_FULLY))
    if name == "REJECT":
        return Verdict("reject")
    if name == "NFQUEUE":
        return Verdict("queue")
    if name in TRANSLATIONS:
        return Verdict("nat")
    return Verdict("none") if name in GO_ON else Verdict("unknown")


def extension_sets(name: str) -> frozenset[Field]:
    """What of the packet a target may change, so that a later match finds another value."""
    return SETS.get(name, frozenset())
