"""Who drops the traffic of the overlay: what this host's packet filter does to it, whoever wrote the rules.

A rule of ours that accepts ends its own base chain only; what another base chain drops stays dropped. So the
packet is followed through all of them. Of some conditions we cannot say whether they hold; then both ways are
followed, and a drop is named only when no way leads past it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from ipaddress import IPv4Network, IPv6Network
from typing import NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from flanneld_py.addresses import IPAddress, IPNetwork
from flanneld_py.core.subnets import inside
from flanneld_py.packetfilter import Chain, ChainKey, Chains, Field, Hook, Mark, Match, Rule, Value

HOOKS: tuple[Hook, ...] = ("prerouting", "forward", "postrouting")
"""Those that a packet comes through that this host forwards, in order."""
CONNTRACK = -200
"""Priority at which, in prerouting, a packet is found to belong to a connection (NF_IP_PRI_CONNTRACK)."""
WITNESSES = (6, 253)
"""TCP, and a protocol for experiments that nobody has rules for (RFC 3692).

Firewalls let pings pass and drop the rest, and operators forbid this port or that protocol on purpose. What
is dropped whatever its protocol is, and with it all of TCP, is cut off.
"""
STATUSES = frozenset({"expected", "seen-reply", "assured", "confirmed", "snat", "dnat", "dying"})
"""None of them is true of the first packet of a connection whose addresses stay."""
CHANGEABLE: frozenset[Field] = frozenset({"mark", "ct state", "ct status"})
"""What a rule that we do not understand may change."""
MOST_SINGLE = 32
"""Containers that are judged one by one."""
DEEPEST = 64
"""Jumps within jumps that we follow; nf_tables allows 16."""


class Flow(Struct, frozen=True):
    """New connections that this host forwards, unmarked and with the addresses they began with.

    An address that no container has, as the first one of a subnet, is better than another: rules about
    single containers do not concern it. Those are judged apart, where it is said whose containers they are.
    """

    description: str
    """For the operator: `from other hosts to 10.5.34.0/24`."""
    source: IPAddress
    destination: IPAddress
    iif: str | None
    """The device they come in by; None: it is not known."""
    oif: str | None
    subnet: IPNetwork | None = None
    """Of the source or of the destination: where the containers are that this host knows."""
    single: bool = False
    """It is that of one container only."""


class Drop(Struct, frozen=True):
    """A flow that certainly does not pass a base chain."""

    flow: Flow
    base: ChainKey
    """The base chain: somewhere on the way through it there would have to be an accept."""
    chain: ChainKey
    """Where the rule is: the base chain, or one that leads to."""
    rule: str
    """`iifname != docker0 drop`, or `policy drop`."""

    @property
    def place(self) -> str:
        """`ip filter FORWARD policy drop`, `inet firewalld filter_FORWARD: reject`."""
        return f"{self.chain} {self.rule}" if self.rule == POLICY else f"{self.chain}: {self.rule}"

    def __str__(self) -> str:
        return f"traffic {self.flow.description} is dropped by {self.place}"


POLICY = "policy drop"


def find_drops(chains: Chains, flows: Sequence[Flow]) -> tuple[Drop, ...]:
    """For each flow the base chains that drop all of it, in the order a packet meets them.

    All of them are named, not the first one only: each has to be cured.
    """
    found: list[Drop] = []
    for flow in flows:
        whole = list(_drops(chains, flow))
        found += whole
        told = {(drop.base, "") for drop in whole}
        for part in _single(chains, flow):
            for drop in _drops(chains, part):
                if told.isdisjoint({(drop.base, ""), (drop.chain, drop.rule)}):
                    told.add((drop.chain, drop.rule))
                    found.append(drop)
    return tuple(found)


def _drops(chains: Chains, flow: Flow) -> Iterator[Drop]:
    walks = [dict(_Walk(chains, flow, protocol).drops()) for protocol in WITNESSES]
    # What drops that protocol says no other, so it is the rule for all that came so far.
    for base, stop in walks[-1].items():
        if all(base in walk for walk in walks):
            yield Drop(flow, base, *stop)


def _single(chains: Chains, flow: Flow) -> Iterator[Flow]:
    """The same flow for single containers, of which some rule says that they get or send nothing."""
    subnet = flow.subnet
    if subnet is None:
        return
    name: Field = "daddr" if flow.destination in subnet else "saddr"
    dropped = (
        match.values
        for chain in chains.values()
        for rule in chain.rules
        if rule.verdict.kind in ("drop", "reject")
        for match in rule.matches
        if match.field == name and not match.negated
    )
    found: dict[IPAddress, None] = {}
    for values in dropped:
        address = next((one for value in values if (one := _container(value, subnet)) is not None), None)
        if address is not None:
            found[address] = None
        if len(found) == MOST_SINGLE:
            break
    for address in found:
        told = flow.description.replace(str(subnet), str(address))
        single = replace(flow, description=told, single=True)
        yield replace(single, destination=address) if name == "daddr" else replace(single, source=address)


def _container(value: Value, subnet: IPNetwork) -> IPAddress | None:
    """An address in that part of the subnet; the ends and the bridge's own, the second, no container has."""
    if not isinstance(value, IPNetwork) or value.version != subnet.version:
        return None
    if value == subnet or not inside(value.network_address, subnet):
        return None
    first = max(int(value.network_address), int(subnet.network_address) + 2)
    last = min(int(value.broadcast_address), int(subnet.broadcast_address) - 1)
    return type(subnet.network_address)(first) if first <= last else None


class _Stop(NamedTuple):
    """Where a packet is dropped."""

    chain: ChainKey
    rule: str


class _Fate(NamedTuple):
    """What may become of a packet in a chain."""

    accepted: bool
    onward: bool
    """It comes back to where the chain was jumped to from, in a base chain to the policy."""
    stop: _Stop | None
    """Where it is dropped, if it is: the last place of several."""


ANYTHING = _Fate(accepted=True, onward=True, stop=None)


class _Walk:
    """One packet's way through the host."""

    def __init__(self, chains: Chains, flow: Flow, protocol: int) -> None:
        self._chains = chains
        self._flow = flow
        self._protocol = protocol
        self._version = flow.source.version
        self._unsure: frozenset[Field] = frozenset()
        """What rules on the way may have changed."""
        self._hidden: frozenset[Field] = frozenset()
        """What cannot be known in this base chain."""
        self._known: dict[tuple[ChainKey, frozenset[Field]], _Fate] = {}
        """In this base chain: chain, and what is unsure when it begins."""

    def drops(self) -> Iterator[tuple[ChainKey, _Stop]]:
        """The base chains that no way leads through."""
        for hook in HOOKS:
            for key, chain in self._base_chains(hook):
                self._hidden = _hidden(hook, chain.priority)
                self._known.clear()
                accepted, onward, stop = self._through(key, ())
                if onward and chain.policy == "drop":
                    onward, stop = False, _Stop(key, POLICY)
                if not accepted and not onward and stop is not None:
                    yield key, stop

    def _base_chains(self, hook: Hook) -> list[tuple[ChainKey, Chain]]:
        families = ("ip" if self._version == 4 else "ip6", "inet")
        here = [item for item in self._chains.items() if item[1].hook == hook and item[0].family in families]
        return sorted(here, key=lambda item: (item[1].priority, item[0]))

    def _through(self, key: ChainKey, path: tuple[ChainKey, ...]) -> _Fate:
        chain = self._chains.get(key)
        if chain is None or key in path or len(path) > DEEPEST:
            self._unsure |= CHANGEABLE
            return ANYTHING
        begun = (key, self._unsure)
        if begun not in self._known:
            self._known[begun] = self._rules(key, chain, (*path, key))
        return self._known[begun]

    def _rules(self, key: ChainKey, chain: Chain, path: tuple[ChainKey, ...]) -> _Fate:
        accepted = onward = False
        stop = None
        for rule in chain.rules:
            holds = self._holds(rule)
            if holds is False:
                continue
            self._unsure |= rule.sets
            fate = self._fate(rule, key, path)
            accepted |= fate.accepted
            stop = fate.stop or stop
            leaves = rule.verdict.kind in ("return", "goto")
            onward |= leaves and fate.onward
            if holds and (leaves or not fate.onward):
                return _Fate(accepted, onward, stop)
        return _Fate(accepted, True, stop)

    def _fate(self, rule: Rule, key: ChainKey, path: tuple[ChainKey, ...]) -> _Fate:
        """Of a packet for which all conditions of a rule hold; onward: past the rule, or what it leads to."""
        match rule.verdict.kind:
            case "drop" | "reject":
                return _Fate(accepted=False, onward=False, stop=_Stop(key, _text(rule)))
            case "jump" | "goto":
                return self._through(key._replace(chain=rule.verdict.target), path)
            case "none" | "return":
                return _Fate(accepted=False, onward=True, stop=None)
            case "unknown":
                self._unsure |= CHANGEABLE
                return ANYTHING
            case _:
                # Of a queue another program decides; it may accept.
                return _Fate(accepted=True, onward=False, stop=None)

    # --- conditions: True, False, or None where it cannot be said -------------------------------------

    def _holds(self, rule: Rule) -> bool | None:
        found = [self._matches(match) for match in rule.matches]
        return False if False in found else None if None in found else True

    def _matches(self, match: Match) -> bool | None:
        if match.field in self._hidden or match.field in self._unsure:
            return None
        if match.field in ("saddr", "daddr") and not any(self._same_family(value) for value in match.values):
            return False  # the rule is about packets of the other family, also when turned round
        found = [self._equals(match.field, value) for value in match.values]
        held = True if True in found else None if None in found else False
        return held if held is None else held is not match.negated

    def _same_family(self, value: Value) -> bool:
        return isinstance(value, IPNetwork) and value.version == self._version

    def _equals(self, field: Field, value: Value) -> bool | None:
        flow = self._flow
        held: bool | None = None
        match field, value:
            case "saddr", IPv4Network() | IPv6Network():
                held = flow.source in value
            case "daddr", IPv4Network() | IPv6Network():
                held = flow.destination in value
            case "mark", Mark():
                held = value.value == 0
            case "iifname", str():
                held = _is_device(flow.iif, value)
            case "oifname", str():
                held = _is_device(flow.oif, value)
            case "l4proto", int():
                held = value == self._protocol
            case "nfproto", int():
                held = value == self._version
            case "ct state", str():
                held = value == "new"
            case "ct status", str() if value in STATUSES:
                held = False
        return held


def _hidden(hook: Hook, priority: int) -> frozenset[Field]:
    """Which conditions on a packet cannot be judged there."""
    match hook:
        case "prerouting":
            late: frozenset[Field] = frozenset({"oifname"})
            return late | {"ct state", "ct status"} if priority <= CONNTRACK else late
        case "postrouting":
            return frozenset({"iifname"})  # some kernels still know it there, others do not
    return frozenset()


def _is_device(name: str | None, pattern: str) -> bool | None:
    if pattern == "*":
        return True
    if name is None:
        return None
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern


# --- words for the operator -----------------------------------------------------------------------


def _text(rule: Rule) -> str:
    """In the way of nft: `iifname != docker0 oifname docker0 drop`."""
    words = [_match_text(match) for match in rule.matches] + [rule.verdict.kind]
    if rule.comment:
        words.append(f'comment "{rule.comment}"')
    return " ".join(words)


def _match_text(match: Match) -> str:
    values = [_value_text(value) for value in match.values]
    text = values[0] if len(values) == 1 else f"{{ {', '.join(values)} }}"
    if match.field == "other":
        return f"not {text}" if match.negated else text
    return f"{match.field} {'!= ' if match.negated else ''}{text}"


def _value_text(value: Value) -> str:
    return f"{value.value:#x}/{value.mask:#x}" if isinstance(value, Mark) else str(value)
