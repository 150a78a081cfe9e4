"""Who drops the overlay's traffic: rule sets of firewalls as they are."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING, Literal

import pytest
from msgspec.structs import replace

from flanneld_py.core.drops import Flow, find_drops
from flanneld_py.packetfilter import Chain, ChainKey, Mark, Match, Rule, Verdict
from tests import foreign_rules
from tests.unit.flows import IN, NETWORK, OUT, key

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flanneld_py.packetfilter import Chains, Field, Value

OVERLAY = (
    Rule((Match("saddr", (NETWORK,)),), Verdict("accept")),
    Rule((Match("daddr", (NETWORK,)),), Verdict("accept")),
)
PROTOCOLS = {"icmp": 1, "tcp": 6, "udp": 17}
OPTIONS: dict[str, Field] = {
    "-s": "saddr",
    "-d": "daddr",
    "-i": "iifname",
    "-o": "oifname",
    "-p": "l4proto",
    "--ctstate": "ct state",
}


def legacy(text: str, where: Literal["legacy", "nft"] = "legacy") -> dict[ChainKey, Chain]:
    """What `iptables-save` prints, as far as the rule sets here need it."""
    chains: dict[str, Chain] = {}
    for line in text.splitlines():
        if line.startswith(":"):
            name, policy, *_ = line[1:].split()
            builtin = name in ("INPUT", "FORWARD", "OUTPUT")
            chains[name] = Chain((), name.lower(), "filter", 0, policy.lower()) if builtin else Chain()  # type: ignore[arg-type]
        elif line.startswith("-A"):
            name, rule = rule_of(line)
            chains[name] = replace(chains[name], rules=(*chains[name].rules, rule))
    return {ChainKey(where, "ip", "filter", name): chain for name, chain in chains.items()}


def rule_of(line: str) -> tuple[str, Rule]:
    words = line.split()
    matches: list[Match] = []
    target = words[words.index("-j") + 1]
    position = 2
    while words[position] != "-j":
        if negated := words[position] == "!":
            position += 1
        option, value = words[position : position + 2]
        if option in OPTIONS:
            values = tuple(value_of(option, one) for one in value.lower().split(","))
            matches.append(Match(OPTIONS[option], values, negated))
        elif option != "-m":
            matches.append(Match("other", (f"{option} {value}",), negated))
        position += 2
    kinds = {"ACCEPT": "accept", "DROP": "drop", "RETURN": "return", "REJECT": "reject", "LOG": "none"}
    verdict = Verdict(kinds[target]) if target in kinds else Verdict("jump", target)  # type: ignore[arg-type]
    return words[1], Rule(tuple(matches), verdict)


def value_of(option: str, text: str) -> Value:
    if option in ("-s", "-d"):
        return ip_network(text)
    return PROTOCOLS[text] if option == "-p" else text


def ahead(chains: dict[ChainKey, Chain], chain: str, *rules: Rule) -> dict[ChainKey, Chain]:
    """The same with rules at the head of a chain."""
    there = chains[key(chain)]
    return {**chains, key(chain): replace(there, rules=(*rules, *there.rules))}


def places(chains: Chains, *flows: Flow) -> list[str]:
    return [drop.place for drop in find_drops(chains, flows or (IN, OUT))]


# --- the firewalls that our users have ------------------------------------------------------------


@pytest.mark.parametrize("text", [foreign_rules.DOCKER, foreign_rules.DOCKER_28])
def test_docker_drops_by_policy(text: str) -> None:
    assert places(legacy(text)) == ["legacy ip filter FORWARD policy drop"] * 2
    assert places(legacy(text, "nft")) == ["ip filter FORWARD policy drop"] * 2
    first = find_drops(legacy(text), [IN])[0]
    assert str(first) == (
        "traffic from other hosts to 10.5.34.0/24 is dropped by legacy ip filter FORWARD policy drop"
    )


@pytest.mark.parametrize("text", [foreign_rules.DOCKER, foreign_rules.DOCKER_28])
def test_an_accept_in_docker_user_cures_it(text: str) -> None:
    assert places(ahead(legacy(text), "DOCKER-USER", *OVERLAY)) == []


def test_half_a_cure_leaves_the_other_half() -> None:
    half = Rule((Match("iifname", ("flannel.1",)),), Verdict("accept"))
    assert [
        drop.flow for drop in find_drops(ahead(legacy(foreign_rules.DOCKER), "DOCKER-USER", half), [IN, OUT])
    ] == [OUT]


def test_an_accept_behind_the_return_of_docker_user_cures_nothing() -> None:
    chains = legacy(foreign_rules.DOCKER)
    user = chains[key("DOCKER-USER")]
    chains[key("DOCKER-USER")] = replace(user, rules=(*user.rules, *OVERLAY))
    assert len(places(chains)) == 2


def test_docker_on_our_subnet() -> None:
    """docker0 has our subnet: the policy drops what comes in, or since 28 a rule; containers get out."""
    flows = (replace(IN, oif="docker0"), replace(OUT, iif="docker0"))
    assert places(legacy(foreign_rules.DOCKER), *flows) == ["legacy ip filter FORWARD policy drop"]
    (drop,) = find_drops(legacy(foreign_rules.DOCKER_28), flows)
    assert drop.place == "legacy ip filter DOCKER: iifname != docker0 oifname docker0 drop"
    assert (drop.base, drop.chain) == (key("FORWARD"), key("DOCKER"))


def test_the_published_port_of_a_container_does_not_hide_the_drop() -> None:
    text = foreign_rules.DOCKER.replace("172.17.0.2", "10.5.34.2")
    assert places(legacy(text), replace(IN, oif="docker0")) == ["legacy ip filter FORWARD policy drop"]


def test_our_table_does_not_override_docker() -> None:
    ours = {
        ChainKey("nft", "ip", "flannel-ipv4", "forward"): Chain(OVERLAY, "forward", "filter", 0, "accept"),
    }
    assert len(places({**legacy(foreign_rules.DOCKER), **ours})) == 2


def test_our_jump_in_the_same_forward_chain_does() -> None:
    chains = legacy(foreign_rules.DOCKER)
    forward = chains[key("FORWARD")]
    chains[key("FORWARD")] = replace(
        forward, rules=(*forward.rules, Rule((), Verdict("jump", "FLANNEL-FWD")))
    )
    chains[key("FLANNEL-FWD")] = Chain(OVERLAY)
    assert places(chains) == []


def test_our_jump_in_the_other_variant_does_not() -> None:
    ours = {
        key("FORWARD", "nft"): Chain((Rule((), Verdict("jump", "F")),), "forward", "filter", 0, "accept"),
        key("F", "nft"): Chain(OVERLAY),
    }
    assert len(places({**legacy(foreign_rules.DOCKER), **ours})) == 2


def test_ufw_drops_although_pings_pass() -> None:
    assert places(legacy(foreign_rules.UFW)) == ["legacy ip filter FORWARD policy drop"] * 2


def test_a_route_allowed_in_ufw_cures_it() -> None:
    chains = ahead(legacy(foreign_rules.UFW), "ufw-user-forward", *OVERLAY)
    assert places(chains) == []


def firewalld(**more: tuple[Rule, ...]) -> dict[ChainKey, Chain]:
    """tests.foreign_rules.FIREWALLD; `more`: rules ahead of those of a chain."""
    accept, reject = Verdict("accept"), Verdict("reject")
    tests6 = Match("daddr", (ip_network("::/96"), ip_network("2002::/24")))

    def rules(*found: tuple[tuple[Match, ...], Verdict]) -> tuple[Rule, ...]:
        return tuple(Rule(matches, verdict) for matches, verdict in found)

    chains = {
        "filter_FORWARD": rules(
            ((Match("ct state", ("established", "related")),), accept),
            ((Match("ct status", ("dnat",)),), accept),
            ((Match("iifname", ("lo",)),), accept),
            ((tests6,), reject),
            ((), Verdict("jump", "zones")),
            ((Match("ct state", ("invalid",)),), Verdict("drop")),
            ((), reject),
        ),
        "zones": rules(
            ((Match("iifname", ("cni0",)),), Verdict("goto", "trusted")),
            ((Match("iifname", ("eth0",)),), Verdict("goto", "public")),
            ((), Verdict("goto", "public")),
        ),
        "trusted": rules(((), accept)),
        "public": rules(((), Verdict("jump", "allow")), ((), reject)),
        "allow": rules(
            ((Match("l4proto", (1, 58)),), accept),
            ((Match("oifname", ("eth0",)),), accept),
        ),
    }
    return {
        ChainKey("nft", "inet", "firewalld", name): Chain(
            (*more.get(name, ()), *found),
            *(("forward", "filter", 10, "accept") if name == "filter_FORWARD" else ()),
        )
        for name, found in chains.items()
    }


def test_firewalld_rejects_by_zone() -> None:
    assert [str(drop) for drop in find_drops(firewalld(), [IN, OUT])] == [
        "traffic from other hosts to 10.5.34.0/24 is dropped by inet firewalld public: reject"
    ]


def test_the_device_in_the_trusted_zone_cures_firewalld() -> None:
    trusted = Rule((Match("iifname", ("flannel.1",)),), Verdict("goto", "trusted"))
    assert places(firewalld(zones=(trusted,))) == []


def test_an_inet_table_drops_both_families() -> None:
    six = Flow("v6", ip_address("fd00:5:7::"), ip_address("fd00:5:34::"), "flannel-v6.1", "cni0")
    assert places(firewalld(), six) == ["inet firewalld public: reject"]
    assert places(legacy(foreign_rules.DOCKER), six) == []


def test_every_base_chain_that_drops_is_named() -> None:
    assert places({**legacy(foreign_rules.DOCKER), **firewalld()}, IN) == [
        "legacy ip filter FORWARD policy drop",
        "inet firewalld public: reject",
    ]


# --- single containers ----------------------------------------------------------------------------

MEMBERS = replace(IN, subnet=ip_network("10.5.34.0/24"))
MEMBERS_OUT = replace(OUT, subnet=ip_network("10.5.34.0/24"))


def addressed(name: Field, *nets: str, negated: bool = False) -> dict[ChainKey, Chain]:
    """A raw table that drops what Docker drops from version 28 on, of these addresses."""
    asked = Match(name, tuple(map(ip_network, nets)), negated), Match("iifname", ("docker0",), negated=True)
    rules = (Rule(asked, Verdict("drop")),)
    return {ChainKey("nft", "ip", "raw", "PREROUTING"): Chain(rules, "prerouting", "filter", -300, "accept")}


def told(chains: Chains, *flows: Flow) -> list[str]:
    return [str(drop).partition(" is dropped by ")[0] for drop in find_drops(chains, flows)]


def test_what_docker_28_drops_for_one_container_is_named() -> None:
    (drop,) = find_drops(addressed("daddr", "10.5.34.2/32"), [MEMBERS, MEMBERS_OUT])
    assert str(drop) == (
        "traffic from other hosts to 10.5.34.2 is dropped by ip raw PREROUTING: "
        "daddr 10.5.34.2/32 iifname != docker0 drop"
    )


@pytest.mark.parametrize(
    ("nets", "expected"),
    [
        (["10.5.34.1/32", "10.5.34.2/31", "10.5.34.4/30", "10.5.34.254/32"], ["10.5.34.2"]),
        (["10.5.34.128/25"], ["10.5.34.128"]),
        (["10.5.34.255/32"], []),
        (["10.5.35.2/32"], []),
        (["10.5.34.0/24"], ["10.5.34.0/24"]),
        (["10.5.0.0/16"], ["10.5.34.0/24"]),
    ],
)
def test_of_a_range_one_container_is_named_and_of_the_subnet_the_subnet(
    nets: list[str], expected: list[str]
) -> None:
    found = told(addressed("daddr", *nets), MEMBERS)
    assert found == [f"traffic from other hosts to {one}" for one in expected]
    found = told(addressed("saddr", *nets), MEMBERS_OUT)
    assert found == [f"traffic from {one} to other hosts" for one in expected]


def test_of_all_containers_but_one_the_subnet_is_named() -> None:
    chains = addressed("daddr", "10.5.34.9/32", negated=True)
    assert told(chains, MEMBERS) == ["traffic from other hosts to 10.5.34.0/24"]


def test_each_container_is_named_once_and_not_beside_the_whole_subnet() -> None:
    one, other = (addressed("daddr", f"10.5.34.{n}/32") for n in (2, 3))
    ((key, chain),) = one.items()
    both = replace(chain, rules=(*chain.rules, *other[key].rules, *chain.rules))
    assert told({key: both}, MEMBERS) == [f"traffic from other hosts to 10.5.34.{n}" for n in (2, 3)]
    assert told({key: replace(both, policy="drop")}, MEMBERS) == ["traffic from other hosts to 10.5.34.0/24"]


# --- what is not certain --------------------------------------------------------------------------


def forward(
    *rules: Rule, policy: str = "drop", jumped_to: Mapping[str, Chain] | None = None
) -> dict[ChainKey, Chain]:
    base = {key("FORWARD"): Chain(rules, "forward", "filter", 0, policy)}
    return base | {key(name): chain for name, chain in (jumped_to or {}).items()}


def prerouting(priority: int, *rules: Rule) -> dict[ChainKey, Chain]:
    chain = Chain(rules, "prerouting", "filter", priority, "accept")
    return {ChainKey("legacy", "ip", "x", "PREROUTING"): chain}


UNKNOWN = Match("other", ("-m time",))
ACCEPT, DROP = Verdict("accept"), Verdict("drop")


@pytest.mark.parametrize(
    "rule",
    [
        Rule((UNKNOWN,), ACCEPT),
        Rule((UNKNOWN, Match("iifname", ("flannel.1",))), ACCEPT),
        Rule((UNKNOWN,), Verdict("jump", "accepting")),
        Rule((UNKNOWN,), Verdict("goto", "accepting")),
        Rule((), Verdict("unknown")),
        Rule((), Verdict("queue")),
        Rule((), Verdict("jump", "not shown")),
        Rule((Match("l4proto", (6,)), Match("other", ("--dport 80",))), ACCEPT),
    ],
)
def test_what_may_accept_makes_a_drop_uncertain(rule: Rule) -> None:
    accepting = {"accepting": Chain((Rule((), ACCEPT),))}
    assert places(forward(rule, jumped_to=accepting), IN) == []
    assert places(forward(rule, Rule((), DROP), jumped_to=accepting), IN) == []


POLICY = ["legacy ip filter FORWARD policy drop"]


@pytest.mark.parametrize(
    "rule",
    [
        Rule((UNKNOWN,), DROP),
        Rule((UNKNOWN,), Verdict("return")),
        Rule((UNKNOWN,), Verdict("jump", "empty")),
        Rule((UNKNOWN,), Verdict("goto", "empty")),
        Rule((UNKNOWN, Match("iifname", ("eth0",))), ACCEPT),
        Rule((Match("l4proto", (17,)), UNKNOWN), ACCEPT),
        Rule((Match("mark", (Mark(0x4000, 0x4000),)),), ACCEPT),
        Rule((Match("saddr", (ip_network("fd00::/8"),), negated=True),), ACCEPT),
        Rule((Match("iifname", ("*",), negated=True),), ACCEPT),
        Rule((Match("nfproto", (6,)),), ACCEPT),
    ],
)
def test_what_cannot_save_a_packet_does_not_hide_the_drop(rule: Rule) -> None:
    assert places(forward(rule, jumped_to={"empty": Chain()}), IN) == POLICY


@pytest.mark.parametrize(
    "rule",
    [
        Rule((Match("l4proto", (6,)),), DROP),
        Rule((Match("l4proto", (6, 17)),), DROP),
        Rule((UNKNOWN,), DROP),
        Rule((Match("mark", (Mark(1),)),), DROP),
        Rule((Match("ct state", ("invalid",)),), DROP),
        Rule((Match("ct status", ("dnat",)),), DROP),
        Rule((Match("daddr", (ip_network("10.5.34.9/32"),)),), DROP),
        Rule((Match("iifname", ("flannel.10", "eth*")),), DROP),
        Rule((Match("iifname", ("flannel.*",), negated=True),), DROP),
    ],
)
def test_a_drop_of_some_packets_is_no_drop_of_the_overlay(rule: Rule) -> None:
    assert places(forward(rule, policy="accept"), IN) == []


def test_the_rule_for_all_is_named_when_tcp_is_reset() -> None:
    chains = forward(
        Rule((Match("l4proto", (6,)),), Verdict("reject")),
        Rule((), Verdict("reject"), "the rest"),
        policy="accept",
    )
    assert places(chains, IN) == ['legacy ip filter FORWARD: reject comment "the rest"']


def test_an_unknown_device_is_not_decided() -> None:
    flow = replace(IN, oif=None)
    only_cni = Rule((Match("oifname", ("cni0",)),), ACCEPT)
    assert places(forward(only_cni), flow) == []
    assert places(forward(only_cni), replace(IN, oif="br0")) == POLICY
    assert places(forward(), flow) == POLICY
    assert places(forward(Rule((Match("oifname", ("*",)),), ACCEPT)), flow) == []


def test_a_rule_that_marks_makes_marks_undecided() -> None:
    marks = Rule((Match("iifname", ("flannel.1",)),), Verdict("none"), sets=frozenset({"mark"}))
    accepts = Rule((Match("mark", (Mark(1),)),), ACCEPT)
    assert places(forward(marks, accepts), IN) == []
    assert places(forward(marks, accepts), OUT) == POLICY
    assert places(forward(accepts, marks), IN) == POLICY
    mangle = {
        ChainKey("legacy", "ip", "mangle", "PREROUTING"): Chain(
            (marks,), "prerouting", "filter", -150, "accept"
        )
    }
    assert places(forward(accepts) | mangle, IN) == []
    assert (
        places(forward(Rule((), Verdict("jump", "marks")), accepts, jumped_to={"marks": Chain((marks,))}), IN)
        == []
    )


def test_connections_that_are_not_tracked_have_no_state() -> None:
    notrack = Rule((), Verdict("none"), sets=frozenset({"ct state"}))
    raw = {
        ChainKey("legacy", "ip", "raw", "PREROUTING"): Chain(
            (notrack,), "prerouting", "filter", -300, "accept"
        )
    }
    chains = forward(Rule((Match("ct state", ("untracked",)),), ACCEPT))
    assert places(chains, IN) == POLICY
    assert places(chains | raw, IN) == []


def test_before_connections_are_tracked_no_state_is_known() -> None:
    drop_new = Rule((Match("ct state", ("new",)),), DROP)
    assert places(prerouting(-300, drop_new), IN) == []
    assert places(prerouting(-150, drop_new), IN) == ["legacy ip x PREROUTING: ct state new drop"]


@pytest.mark.parametrize(("hook", "reached"), [("prerouting", True), ("postrouting", True), ("input", False)])
def test_hooks_before_and_after_forwarding_count(hook: Literal["prerouting"], reached: bool) -> None:
    drop = Rule((Match("daddr", (NETWORK,)),), DROP)
    chains = {ChainKey("legacy", "ip", "mangle", "X"): Chain((drop,), hook, "filter", -150, "accept")}
    assert places(chains, IN) == (["legacy ip mangle X: daddr 10.5.0.0/16 drop"] if reached else [])


def test_rules_in_a_ring_end() -> None:
    ring = {"a": Chain((Rule((), Verdict("jump", "b")),)), "b": Chain((Rule((), Verdict("goto", "a")),))}
    assert places(forward(Rule((), Verdict("jump", "a")), jumped_to=ring), IN) == []


def test_many_ways_to_one_chain_cost_no_more_than_one() -> None:
    twice = {f"c{number}": Chain((Rule((), Verdict("jump", f"c{number + 1}")),) * 2) for number in range(50)}
    assert places(forward(Rule((), Verdict("jump", "c0")), jumped_to=twice | {"c50": Chain()}), IN) == POLICY


def test_how_rules_are_shown() -> None:
    rule = Rule(
        (
            Match("saddr", (ip_network("10.4.0.0/16"), NETWORK)),
            Match("mark", (Mark(0, 0xFF),)),
            Match("iifname", ("cni0",), negated=True),
            Match("l4proto", (17,), negated=True),
        ),
        Verdict("reject"),
        "no",
    )
    assert places(forward(rule, policy="accept"), IN) == [
        "legacy ip filter FORWARD: saddr { 10.4.0.0/16, 10.5.0.0/16 } mark 0x0/0xff iifname != cni0 "
        'l4proto != 17 reject comment "no"'
    ]
