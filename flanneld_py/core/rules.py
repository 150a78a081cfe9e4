"""The packet-filter rules that we want, and which of those that stand are ours.

Masquerading and forwarding as flannel has them, under its names of tables and chains; a daemon of another
etcd prefix has names of its own, so that two on one host do not take each other's for theirs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cache
from ipaddress import ip_network
from typing import Literal, NamedTuple, TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from flanneld_py.addresses import FAMILIES, Family, IPNetwork, PerFamily, Subnets
from flanneld_py.core.ownership import prefix_hash
from flanneld_py.core.subnets import inside
from flanneld_py.packetfilter import Chain, ChainKey, Chains, Mark, Match, Rule, Verdict

Tool: TypeAlias = Literal["nft", "iptables-nft", "iptables-legacy"]
"""With which our rules are written; iptables comes in two variants, for two places in the kernel."""
DEFAULT_PREFIX = "/coreos.com/network"
FAMILY_NAMES: dict[Family, Literal["ip", "ip6"]] = {4: "ip", 6: "ip6"}
MULTICAST: dict[Family, IPNetwork] = {4: ip_network("224.0.0.0/4"), 6: ip_network("ff00::/8")}
KUBE_PROXY_MARK = Mark(0x4000, 0x4000)
"""What kube-proxy has marked it masquerades by itself."""
FILTER, SRCNAT = 0, 100
"""Priorities (linux/netfilter_ipv4.h NF_IP_PRI_FILTER, NF_IP_PRI_NAT_SRC)."""
BUILTIN = {"nat": "POSTROUTING", "filter": "FORWARD"}
"""Table of iptables → its chain from which ours is jumped to."""
HARMLESS = ("accept", "none")
"""Verdicts of rules that may stand before our accepts: no packet is lost there, nor led past ours."""


class Names(NamedTuple):
    """What our tables and chains are called."""

    postrtg: str
    fwd: str
    tables: tuple[str, str]
    """nft's, of IPv4 and IPv6."""
    masq: str
    """Comment of each rule that has to do with masquerading."""
    forward: str
    """The same for forwarding."""

    def own_chain(self, key: ChainKey) -> bool:
        """Whether all of that chain is ours by its name."""
        return self.is_own_table(key) or key.chain in (self.postrtg, self.fwd)

    def is_own_table(self, key: ChainKey) -> bool:
        return key.where == "nft" and (key.family, key.table) in zip(("ip", "ip6"), self.tables, strict=True)


def names_of(prefix: str) -> Names:
    """Flannel's names for its default prefix; for others with eight hex digits of the prefix's hash."""
    suffix = "" if prefix == DEFAULT_PREFIX else f"-{prefix_hash(prefix):08x}"
    return Names(
        f"FLANNEL-POSTRTG{suffix}",
        f"FLANNEL-FWD{suffix}",
        (f"flannel-ipv4{suffix}", f"flannel-ipv6{suffix}"),
        f"flanneld masq{suffix}",
        f"flanneld forward{suffix}",
    )


class Wish(Struct, frozen=True):
    """Which rules the operator asks for."""

    masquerade: bool = False
    forward: bool = True
    fully_random: bool = True
    """Whether masquerading chooses source ports at random, so that two connections hardly ever meet."""
    accept_in: tuple[str, ...] = ()
    """Chains of others that are to accept what is forwarded: `DOCKER-USER`, `inet filter forward`."""


def desired_rules(
    networks: PerFamily[IPNetwork],
    own: Subnets,
    wish: Wish,
    names: Names,
    tool: Tool,
    accept_in: Iterable[ChainKey] = (),
) -> dict[ChainKey, Chain]:
    """The rows of the table `rules`.

    Args:
        networks: the overlay's.
        own: this host's subnets.
        wish: what is asked for.
        names: of our tables and chains.
        tool: which writes them.
        accept_in: those of the operator's chains that are there.
    """
    rows: dict[ChainKey, Chain] = {}
    for family, network in networks.items():
        subnet = own.get(family)
        if wish.masquerade and subnet is not None:
            rules = _masquerade(family, network, subnet, fully_random=wish.fully_random)
            rows |= _chains(family, tool, names, "nat", _commented(rules, names.masq))
        if wish.forward:
            rows |= _chains(family, tool, names, "filter", _commented(_forward(network), names.forward))
        for key in accept_in:
            if names.own_chain(key):
                continue  # they are there anyway
            if key.family in (FAMILY_NAMES[family], "inet"):
                there = rows.get(key, Chain())
                accepts = _commented(_forward(network, guarded=key.family == "inet"), names.forward)
                rows[key] = replace(there, rules=(*accepts, *there.rules))
    return rows


def _masquerade(
    family: Family, network: IPNetwork, subnet: IPNetwork, *, fully_random: bool
) -> tuple[Rule, ...]:
    """What leaves the network bears the host's address, and what enters it from outside, too.

    Within the network pods keep theirs; what enters for a pod of this host does so as well, so that its
    service sees who asks.
    """
    masquerade = Verdict("masquerade", fully_random=fully_random)
    back = Verdict("return")
    inside_net, to_net = Match("saddr", (network,)), Match("daddr", (network,))
    outside, to_pod = Match("saddr", (network,), negated=True), Match("daddr", (subnet,))
    return tuple(
        Rule(matches, verdict)
        for matches, verdict in (
            ((Match("mark", (KUBE_PROXY_MARK,)),), back),
            ((Match("saddr", (subnet,)), to_net), back),
            ((inside_net, to_pod), back),
            ((outside, to_pod), back),
            ((inside_net, Match("daddr", (MULTICAST[family],), negated=True)), masquerade),
            ((outside, to_net), masquerade),
        )
    )


def _forward(network: IPNetwork, *, guarded: bool = False) -> tuple[Rule, ...]:
    """What comes from the network or goes there is let through.

    `guarded`: in a table of both families a rule asks for its own first, as nft writes it.
    """
    accept = Verdict("accept")
    guard = (Match("nfproto", (network.version,)),) if guarded else ()
    return (
        Rule((*guard, Match("saddr", (network,))), accept),
        Rule((*guard, Match("daddr", (network,))), accept),
    )


def _commented(rules: Iterable[Rule], comment: str) -> tuple[Rule, ...]:
    return tuple(replace(rule, comment=comment) for rule in rules)


def _chains(
    family: Family, tool: Tool, names: Names, table: Literal["nat", "filter"], rules: tuple[Rule, ...]
) -> Iterator[tuple[ChainKey, Chain]]:
    """A chain with these rules, and what leads packets to it."""
    name = FAMILY_NAMES[family]
    if tool == "nft":
        base = (
            ("postrtg", Chain(rules, "postrouting", "nat", SRCNAT, "accept"))
            if table == "nat"
            else ("forward", Chain(rules, "forward", "filter", FILTER, "accept"))
        )
        yield ChainKey("nft", name, names.tables[FAMILIES.index(family)], base[0]), base[1]
        return
    where: Literal["nft", "legacy"] = "nft" if tool == "iptables-nft" else "legacy"
    chain = names.postrtg if table == "nat" else names.fwd
    yield ChainKey(where, name, table, chain), Chain(rules)
    yield ChainKey(where, name, table, BUILTIN[table]), Chain((_jump(chain, names),))


def _jump(chain: str, names: Names) -> Rule:
    """What leads to a chain of ours."""
    return Rule((), Verdict("jump", chain), names.masq if chain == names.postrtg else names.forward)


def matching(wanted: Iterable[str], chains: Chains) -> tuple[ChainKey, ...]:
    """Those of the chains there that an operator has named.

    `DOCKER-USER` is a chain of iptables' filter table, of both families and wherever it is kept;
    `inet filter forward` one of nft's.
    """
    places = {tuple(name.split()) for name in wanted}
    return tuple(
        sorted(
            key
            for key in chains
            if (key.family, key.table, key.chain) in places
            or ((key.chain,) in places and key.table == "filter" and key.family in ("ip", "ip6"))
        )
    )


# --- what is ours ---------------------------------------------------------------------------------


def own_rows(chains: Chains, names: Names, networks: Collection[IPNetwork]) -> dict[ChainKey, Chain]:
    """Of all that stands, what is ours; of a chain that we share with others, our rules of it.

    A table or chain under our name whose rules are all about other networks belongs to another flannel. In a
    chain of others only what is exactly as we write it is ours, comment and all: a rule that somebody else
    made to lead to our chain is his. An emptied chain of ours to which such a rule leads is his as well, as
    it cannot go before that.
    """
    foreign = set(others(chains, names, networks))
    rows: dict[ChainKey, Chain] = {}
    for key, chain in chains.items():
        if names.own_chain(key):
            if key not in foreign and (chain.rules or not referrers(key, chains, names)):
                rows[key] = chain
            continue
        jumps = [
            _jump(name, names)
            for name in (names.postrtg, names.fwd)
            if key._replace(chain=name) not in foreign
        ]
        accepts = [number for number, rule in enumerate(chain.rules) if _is_own_accept(rule, names, networks)]
        rules = tuple(rule for number, rule in enumerate(chain.rules) if number in accepts or rule in jumps)
        if rules:
            before = chain.rules[: max(accepts, default=0)]
            rows[key] = Chain(
                rules,
                late=any(rule.verdict.kind not in HARMLESS and rule not in jumps for rule in before),
            )
    return rows


def referrers(key: ChainKey, chains: Chains, names: Names) -> tuple[tuple[ChainKey, int], ...]:
    """Chain and number, from 1 on, of each rule of others that leads to a chain of iptables that is ours."""
    if names.is_own_table(key):
        return ()
    jump = _jump(key.chain, names)
    return tuple(
        (there, number)
        for there, chain in chains.items()
        if there[:3] == key[:3] and not names.own_chain(there)
        for number, rule in enumerate(chain.rules, 1)
        if rule.verdict.kind in ("jump", "goto") and rule.verdict.target == key.chain and rule != jump
    )


def tell_referrers(key: ChainKey, found: Iterable[tuple[ChainKey, int]]) -> str:
    """What an operator should know of a chain that cannot be deleted."""
    rules = " and ".join(f"rule {number} of {there}" for there, number in found)
    return f"{key} stays, empty, as {rules} of somebody else leads there; delete that rule, then the chain"


def places(chains: Chains, names: Names, rows: Collection[ChainKey]) -> frozenset[ChainKey]:
    """Where something of ours is or may come to be: to know that, no other chain needs to be read again.

    Args:
        chains: all that stand.
        names: of our tables and chains.
        rows: which of them have rules of ours.
    """
    mine = (names.postrtg, names.fwd)
    tables = zip(FAMILY_NAMES.values(), names.tables, strict=True)
    own = [ChainKey("nft", *table, chain) for table in tables for chain in ("postrtg", "forward")]
    for family in FAMILY_NAMES.values():
        for (table, base), ours in zip(BUILTIN.items(), mine, strict=True):
            own += (ChainKey("nft", family, table, chain) for chain in (base, ours))
            own += (ChainKey("legacy", family, table, chain) for chain in (base, ours))
    found = (
        key
        for key, chain in chains.items()
        if names.own_chain(key) or any(rule.verdict.target in mine for rule in chain.rules)
    )
    return frozenset((*own, *found, *rows))


def others(
    chains: Chains, names: Names, networks: Collection[IPNetwork]
) -> Mapping[ChainKey, tuple[IPNetwork, ...]]:
    """Chains that bear our names, but speak of other networks only → of which."""
    groups: dict[tuple[str, ...], list[ChainKey]] = {}
    for key in chains:
        if names.own_chain(key):
            # Both of nft's tables go together: flannel makes the one of the other family, too, and empty.
            group = ("nft",) if names.is_own_table(key) else (key.where, key.family, key.table)
            groups.setdefault(group, []).append(key)
    found: dict[ChainKey, tuple[IPNetwork, ...]] = {}
    for keys in groups.values():
        named = {net for key in keys for rule in chains[key].rules for net in _networks(rule)}
        if named and not any(_is_among(net, networks) for net in named):
            found |= dict.fromkeys(keys, tuple(sorted(named, key=str)))
    return found


def _is_own_accept(rule: Rule, names: Names, networks: Collection[IPNetwork]) -> bool:
    if rule.comment != names.forward:
        return False
    return any(rule in _accepts(net, names) for net in _networks(rule) if _is_among(net, networks))


@cache
def _accepts(network: IPNetwork, names: Names) -> tuple[Rule, ...]:
    """In all the forms in which we write them."""
    rules = (*_forward(network), *_forward(network, guarded=True))
    return _commented(rules, names.forward)


def _networks(rule: Rule) -> Iterator[IPNetwork]:
    """The networks a rule is about, multicast aside."""
    for match in rule.matches:
        if match.field in ("saddr", "daddr"):
            for net in match.values:
                if not isinstance(net, str | int | Mark) and not net.is_multicast:
                    yield net


def _is_among(net: IPNetwork, networks: Collection[IPNetwork]) -> bool:
    return any(inside(net.network_address, ours) for ours in networks)
