"""Packet-filter rules as values: what we want, and what any tool has set up.

One form for nf_tables (nft's own tables and those of iptables-nft) and for the older tables of legacy
iptables: so what we want is compared with what the kernel shows, whoever wrote it with which tool.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, TypeAlias

from msgspec import Struct

from flanneld_py.addresses import IPNetwork
from flanneld_py.values import PartlyCompared

Field: TypeAlias = Literal[
    "saddr", "daddr", "mark", "iifname", "oifname", "l4proto", "nfproto", "ct state", "ct status", "other"
]
Value: TypeAlias = "IPNetwork | Mark | int | str"
Hook: TypeAlias = Literal["", "prerouting", "input", "forward", "output", "postrouting", "ingress", "egress"]


class Mark(NamedTuple):
    """Matches a packet whose mark is `value` in the bits of `mask`."""

    value: int
    mask: int = 0xFFFF_FFFF


class Match(Struct, frozen=True):
    """One condition of a rule: the packet's `field` is among `values`, or is not.

    The values of saddr and daddr are networks; of mark `Mark`s; of iifname and oifname device names, where a
    `*` at the end stands for any rest; of l4proto numbers (linux/in.h IPPROTO_*); of nfproto 4 and 6; of
    `ct state` and `ct status` names (`new`, `established`, `dnat`). Whatever we do not understand is `other`
    with a text for the operator.
    """

    field: Field
    values: tuple[Value, ...]
    negated: bool = False


class Verdict(Struct, frozen=True):
    """What becomes of a packet that a rule matches.

    `none`: the next rule (a counter, a log, a mark that is set); `unknown`: we do not understand it.
    """

    kind: Literal[
        "none", "accept", "drop", "reject", "return", "jump", "goto", "masquerade", "nat", "queue", "unknown"
    ]
    target: str = ""
    """Of jump and goto: the chain."""
    fully_random: bool = False
    """Of masquerade: whether the source port is chosen at random (NF_NAT_RANGE_PROTO_RANDOM_FULLY)."""


class Rule(PartlyCompared, frozen=True):
    """One rule of a chain; its matches all hold for a packet it decides on."""

    compared = 4

    matches: tuple[Match, ...]
    verdict: Verdict
    comment: str = ""
    sets: frozenset[Field] = frozenset()
    """What it changes of the packet, so that a later match may find another value: `mark`, `ct state`."""
    handle: int = 0
    """nf_tables: the number by which the kernel deletes it."""
    packets: int | None = None
    """What its counter says; None where it counts nothing."""


class Chain(Struct, frozen=True):
    """The rules of a chain in order, and where it is hooked in; `hook` is empty for one that is jumped to."""

    rules: tuple[Rule, ...] = ()
    hook: Hook = ""
    kind: str = ""
    """`filter` or `nat`, of a base chain."""
    priority: int = 0
    policy: str = ""
    """`accept` or `drop`, of a base chain."""
    late: bool = False
    """Of our accepts in a chain of others: whether something there may decide before they do."""


class ChainKey(NamedTuple):
    """Where a chain is."""

    where: Literal["nft", "legacy"]
    """Whether nf_tables keeps it or legacy iptables; what iptables-nft writes is in nf_tables."""
    family: Literal["ip", "ip6", "inet", "arp", "bridge", "netdev"]
    table: str
    chain: str

    def __str__(self) -> str:
        kind = "" if self.where == "nft" else "legacy "
        return f"{kind}{self.family} {self.table} {self.chain}"


Chains: TypeAlias = Mapping[ChainKey, Chain]
