"""Chains of others that the operator names to accept the overlay's traffic: `--forward-accept-in`."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from flanneld_py.core.drops import Drop
from flanneld_py.core.rules import matching
from flanneld_py.packetfilter import Chains

FAMILIES = ("ip", "ip6", "inet")
"""Those that see what is forwarded."""
OWN = ("FLANNEL-", "flannel-ipv")
"""How our own chains and tables are called."""
NAME = re.compile(r"[\w.][\w./-]*", re.ASCII)
EXPECTED = "expected a chain of iptables' filter table (DOCKER-USER), or of nft as FAMILY TABLE CHAIN"


def check_chain(text: str) -> None:
    """Raise ValueError, in words for the operator, for what can be no such chain."""
    words = text.split()
    if "," in text:
        raise ValueError(f"{EXPECTED}; for several give the flag once for each")
    if len(words) not in (1, 3) or not all(NAME.fullmatch(word) for word in words):
        raise ValueError(EXPECTED)
    if len(words) == 3 and words[0] not in FAMILIES:
        raise ValueError(f"{EXPECTED}, FAMILY one of {', '.join(FAMILIES)}")
    if len(words) == 3 and words[1] == "nat":
        raise ValueError("an accept in table nat lets nothing pass; name a chain that filters")
    if any(word.startswith(OWN) for word in words):
        raise ValueError("those are our own rules; name the chain of others that drops")


def missing(wanted: Iterable[str], chains: Chains) -> tuple[str, ...]:
    """Those of the named chains that are not there."""
    return tuple(name for name in wanted if not matching((name,), chains))


def cure(drops: Collection[Drop], wanted: Collection[str], chains: Chains) -> str:
    """What an operator may do so that the traffic passes."""
    absent = missing(wanted, chains)
    if absent:
        names = ", ".join(absent)
        return (
            f"--forward-accept-in names {names}, which is not there (yet); correct it, or let it pass there"
        )
    there = set(matching(wanted, chains))
    bases = (drop.base for drop in drops if drop.base not in there)
    base = next((base for base in bases if base.table not in ("nat", "raw", "mangle")), None)
    if base is None and any(drop.base.table == "raw" for drop in drops):
        return "let it pass there; if Docker drops there, by its option allow-direct-routing=true"
    if base is None:
        return "let it pass there"
    by_iptables = base.table == "filter" and base.family in ("ip", "ip6")
    user = base._replace(chain="DOCKER-USER")
    name = (
        ("DOCKER-USER" if user in chains and user not in there else base.chain) if by_iptables else str(base)
    )
    return f'let it pass there, or set --forward-accept-in="{name}"'
