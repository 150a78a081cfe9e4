"""Who drops the overlay's traffic in random rule sets: an oracle tries every packet."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Network, ip_network
from itertools import product
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from flanneld_py.core.drops import Flow, find_drops
from flanneld_py.packetfilter import Chain, ChainKey, Mark, Match, Rule, Verdict
from tests.unit.flows import IN, NETWORK, OUT, key
from tests.unit.strategies import thorough

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from flanneld_py.packetfilter import Chains, Value

CHAIN_NAMES = ("a", "b", "c")
"""Each jumps to later ones only, as the kernel refuses rings."""
CONDITIONS = (
    Match("saddr", (NETWORK,)),
    Match("saddr", (ip_network("10.5.34.0/24"),)),
    Match("daddr", (ip_network("10.5.34.0/24"), ip_network("192.0.2.0/24"))),
    Match("iifname", ("flannel.*",)),
    Match("iifname", ("cni0", "docker0")),
    Match("oifname", ("cni*", "eth0")),
    Match("l4proto", (6,)),
    Match("l4proto", (1, 58)),
    Match("ct state", ("new", "related")),
    Match("ct state", ("established",)),
    Match("mark", (Mark(0x4000, 0x4000),)),
)
UNDECIDED = tuple(Match("other", (f"coin {number}",)) for number in range(3))


@dataclass(frozen=True)
class Packet:
    """All that the oracle knows of one packet, values of fields as text."""

    flow: Flow
    protocol: int
    coins: Mapping[str, bool]

    def fits(self, match: Match) -> bool:
        return any(self.fits_value(match.field, value) for value in match.values) != match.negated

    def fits_value(self, field: str, value: Value) -> bool:
        if isinstance(value, IPv4Network):
            address = self.flow.source if field == "saddr" else self.flow.destination
            return int(value.network_address) <= int(address) <= int(value.broadcast_address)
        if isinstance(value, Mark):
            return (0 & value.mask) == value.value
        if field == "l4proto":
            return value == self.protocol
        if field == "other":
            return self.coins[str(value)]
        if field == "ct state":
            return value == "new"
        name = self.flow.iif if field == "iifname" else self.flow.oif
        assert name is not None
        text = str(value)
        return name[: len(text) - 1] == text[:-1] if text[-1] == "*" else name == text


def travel(chains: Chains, start: ChainKey, packet: Packet) -> str:
    """`accept`, `drop`, or `` when the end of the chain is reached."""
    for rule in chains[start].rules:
        if not all(packet.fits(match) for match in rule.matches):
            continue
        kind = rule.verdict.kind
        if kind in ("accept", "drop"):
            return kind
        if kind == "reject":
            return "drop"
        if kind == "return":
            return ""
        if kind in ("jump", "goto"):
            end = travel(chains, start._replace(chain=rule.verdict.target), packet)
            if end or kind == "goto":
                return end
    return ""


def falls(chains: Chains, base: ChainKey, packet: Packet) -> bool:
    return (travel(chains, base, packet) or chains[base].policy) == "drop"


def matches(conditions: Sequence[Match]) -> st.SearchStrategy[Match]:
    return st.builds(
        lambda match, negated: replace(match, negated=negated), st.sampled_from(conditions), st.booleans()
    )


@st.composite
def rule_sets(draw: st.DrawFn, conditions: Sequence[Match]) -> dict[ChainKey, Chain]:
    chains: dict[ChainKey, Chain] = {}
    simple = [Verdict(kind) for kind in ("accept", "drop", "reject", "return", "none")]
    for place in range(len(CHAIN_NAMES) + 1):
        later = CHAIN_NAMES[place:]
        jumps = [Verdict(kind, name) for name in later for kind in ("jump", "goto")]
        rules = draw(
            st.lists(
                st.builds(
                    Rule,
                    st.just(()) | st.lists(matches(conditions), max_size=2).map(tuple),
                    st.sampled_from([*simple, *jumps]),
                ),
                max_size=4,
            )
        )
        base = ("forward", "filter", 0, draw(st.sampled_from(["accept", "drop"]))) if place == 0 else ()
        name = "FORWARD" if place == 0 else CHAIN_NAMES[place - 1]
        chains[key(name)] = Chain(tuple(rules), *base)
    return chains


@thorough
@given(rule_sets(CONDITIONS), st.sampled_from([IN, OUT]))
def test_where_all_is_decided_the_answer_is_exact(chains: Chains, flow: Flow) -> None:
    base = key("FORWARD")
    expected = all(falls(chains, base, Packet(flow, protocol, {})) for protocol in (6, 253))
    found = find_drops(chains, [flow])
    assert [drop.base for drop in found] == [base] * expected
    assert found == find_drops(dict(reversed(list(chains.items()))), [flow])


@thorough
@given(rule_sets((*CONDITIONS, *UNDECIDED)), st.sampled_from([IN, OUT]))
def test_what_is_named_is_dropped_however_the_rest_turns_out(chains: Chains, flow: Flow) -> None:
    for drop in find_drops(chains, [flow]):
        for coins in product((True, False), repeat=len(UNDECIDED)):
            told = dict(zip((str(match.values[0]) for match in UNDECIDED), coins, strict=True))
            for protocol in (6, 253):
                assert falls(chains, drop.base, Packet(flow, protocol, told))
