"""Packet-filter rules against a real kernel, by each tool, read with `nft list` and `iptables-save`."""

from __future__ import annotations

import shlex
from functools import partial
from ipaddress import ip_network
from itertools import groupby
from typing import TYPE_CHECKING, Any, get_args

import pytest
from msgspec.structs import replace

from flanneld_py.addresses import PerFamily, Subnets
from flanneld_py.core.plan import plan
from flanneld_py.core.rules import Tool, Wish, desired_rules, names_of
from flanneld_py.drivers.filtertools import Tools, find_tools
from flanneld_py.drivers.packetrules import PacketRules
from flanneld_py.model import Scope, State
from flanneld_py.packetfilter import ChainKey
from tests.netns.inside import Namespace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.netns.inside import Agent

PREFIX = "/coreos.com/network"
NAMES = names_of(PREFIX)
NET, POD = ip_network("10.5.0.0/16"), ip_network("10.5.34.0/24")
NET6, POD6 = ip_network("fd00:5::/48"), ip_network("fd00:5:0:34::/64")
SCOPE = Scope(PREFIX, (NET, NET6))
ALL = Wish(masquerade=True)
TOOLS: tuple[Tool, ...] = get_args(Tool)

DOCKER = """
*filter
:FORWARD DROP [0:0]
:DOCKER - [0:0]
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -o docker0 -j DOCKER
-A FORWARD -i docker0 ! -o docker0 -j ACCEPT
-A DOCKER-USER -j RETURN
COMMIT
*nat
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
COMMIT
"""
FIREWALL = """
table inet firewalld {
    chain filter_FORWARD {
        type filter hook forward priority filter + 10; policy accept;
        ct state { established, related } accept
        iifname "lo" accept
        reject with icmpx admin-prohibited
    }
}
"""


@pytest.fixture
def net() -> Iterator[Namespace]:
    with Namespace() as namespace:
        yield namespace


@pytest.fixture
def agent(net: Namespace) -> Agent:
    return net.agent()


@pytest.fixture
def rules(agent: Agent) -> PacketRules:
    return agent.make(PacketRules, NAMES, find_tools())


def wanted(tool: Tool, wish: Wish = ALL, accept: tuple[ChainKey, ...] = (), *, dual: bool = True) -> State:
    networks: Subnets = PerFamily(NET, NET6 if dual else None)
    own: Subnets = PerFamily(POD, POD6 if dual else None)
    return State(rules=desired_rules(networks, own, wish, NAMES, tool, accept))


def apply(driver: PacketRules, want: State, scope: Scope = SCOPE) -> list[str]:
    """One pass; what could not be done."""
    ops = plan(want, driver.observe(scope))
    outcomes = [
        outcome for _, run in groupby(ops, key=lambda op: op.verb) for outcome in driver.apply(list(run))
    ]
    return [outcome.error for outcome in outcomes if outcome.error is not None]


def settle(driver: PacketRules, want: State) -> None:
    """One pass brings it about, and the next finds nothing to do."""
    assert apply(driver, want) == []
    assert driver.observe(SCOPE) == want


def saved(net: Namespace) -> str:
    """All rules there are, without counters and handles."""
    legacy = ("iptables-legacy-save", "ip6tables-legacy-save")
    texts = [net.run("nft", "--stateless", "list", "ruleset"), *(net.run(tool) for tool in legacy)]
    lines = (line for text in texts for line in text.splitlines() if not line.startswith("#"))
    return "\n".join(line.split("[")[0] if line.startswith(":") else line for line in lines)


def feed(net: Namespace, text: str, *command: str) -> None:
    net.run(*command, text=text)


def setup_others(net: Namespace) -> None:
    for variant in ("nft", "legacy"):
        feed(net, DOCKER, f"iptables-{variant}-restore", "--noflush")
    feed(net, FIREWALL, "nft", "-f", "-")


@pytest.mark.parametrize("tool", TOOLS)
def test_t41_t42_t44_rules_are_made_once_and_taken_away_without_a_trace(
    net: Namespace, rules: PacketRules, tool: Tool
) -> None:
    setup_others(net)
    if tool == "iptables-legacy":
        net.run("ip6tables-legacy", "-t", "nat", "-S")  # this alone makes its tables
        net.run("ip6tables-legacy", "-S")
    if tool == "iptables-nft":
        net.run(
            "nft",
            "add table ip6 nat; add chain ip6 nat POSTROUTING { type nat hook postrouting priority 100; }",
        )
        net.run(
            "nft",
            "add table ip6 filter; add chain ip6 filter FORWARD { type filter hook forward priority 0; }",
        )
    before = saved(net)
    settle(rules, wanted(tool))
    assert "10.5.34.0/24" in saved(net)
    settle(rules, wanted(tool, Wish(masquerade=False)))
    assert "10.5.34.0/24" not in saved(net)
    settle(rules, State())
    assert saved(net) == before


def test_what_iptables_shows_are_flannels_rules(net: Namespace, rules: PacketRules) -> None:
    """T45, whose rules are those of any flannel."""
    for tool, command in (("iptables-nft", "iptables-nft"), ("iptables-legacy", "iptables-legacy")):
        settle(rules, wanted(tool, dual=False))  # type: ignore[arg-type]
        masq, forward = '-m comment --comment "flanneld masq"', '-m comment --comment "flanneld forward"'
        assert net.run(command, "-t", "nat", "-S").splitlines()[-7:] == [
            f"-A POSTROUTING {masq} -j FLANNEL-POSTRTG",
            f"-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 {masq} -j RETURN",
            f"-A FLANNEL-POSTRTG -s 10.5.34.0/24 -d 10.5.0.0/16 {masq} -j RETURN",
            f"-A FLANNEL-POSTRTG -s 10.5.0.0/16 -d 10.5.34.0/24 {masq} -j RETURN",
            f"-A FLANNEL-POSTRTG ! -s 10.5.0.0/16 -d 10.5.34.0/24 {masq} -j RETURN",
            f"-A FLANNEL-POSTRTG -s 10.5.0.0/16 ! -d 224.0.0.0/4 {masq} -j MASQUERADE --random-fully",
            f"-A FLANNEL-POSTRTG ! -s 10.5.0.0/16 -d 10.5.0.0/16 {masq} -j MASQUERADE --random-fully",
        ]
        assert net.run(command, "-S").splitlines()[-3:] == [
            f"-A FORWARD {forward} -j FLANNEL-FWD",
            f"-A FLANNEL-FWD -s 10.5.0.0/16 {forward} -j ACCEPT",
            f"-A FLANNEL-FWD -d 10.5.0.0/16 {forward} -j ACCEPT",
        ]


LED = "-m comment --comment flanneld\\ forward -j FLANNEL-FWD"
DRIFT = {
    "flushed": {
        "nft": ["nft flush ruleset"],
        "iptables-nft": ["iptables-nft -F", "iptables-nft -t nat -F"],
        "iptables-legacy": ["iptables-legacy -F", "iptables-legacy -t nat -F"],
    },
    "a rule gone": {
        "nft": ["nft flush chain ip flannel-ipv4 postrtg"],
        "iptables-nft": ["iptables-nft -t nat -D FLANNEL-POSTRTG 3"],
        "iptables-legacy": ["iptables-legacy -t nat -D FLANNEL-POSTRTG 3"],
    },
    "a rule more": {
        "nft": ["nft insert rule ip flannel-ipv4 forward drop"],
        "iptables-nft": ["iptables-nft -I FLANNEL-FWD -j DROP"],
        "iptables-legacy": ["iptables-legacy -I FLANNEL-FWD -j DROP"],
    },
    "led there twice": {
        "iptables-nft": [f"iptables-nft -A FORWARD {LED}"],
        "iptables-legacy": [f"iptables-legacy -A FORWARD {LED}"],
    },
    "led there no more": {
        "iptables-nft": ["iptables-nft -D FORWARD 1"],
        "iptables-legacy": ["iptables-legacy -D FORWARD 1"],
    },
    "dropping by policy": {
        "nft": ["nft add chain ip flannel-ipv4 forward { policy drop ; }"],
    },
    "hung elsewhere": {
        "nft": [
            "nft delete chain ip flannel-ipv4 forward",
            "nft add chain ip flannel-ipv4 forward { type filter hook input priority 5 ; }",
        ],
    },
}


@pytest.mark.parametrize(
    ("drift", "tool"), [(drift, tool) for drift, tools in DRIFT.items() for tool in tools]
)
def test_what_others_change_is_put_right(net: Namespace, rules: PacketRules, drift: str, tool: Tool) -> None:
    settle(rules, wanted(tool))
    before = saved(net)
    for command in DRIFT[drift][tool]:
        net.run(*shlex.split(command))
    assert saved(net) != before
    assert rules.observe(SCOPE) != wanted(tool)
    settle(rules, wanted(tool))
    assert saved(net) == before or drift == "flushed"  # which takes chains of iptables along


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("then", TOOLS)
def test_another_tool_leaves_nothing_of_the_first(
    net: Namespace, rules: PacketRules, tool: Tool, then: Tool
) -> None:
    setup_others(net)
    settle(rules, wanted(tool))
    settle(rules, wanted(then))
    marks = {"nft": "table ip flannel-ipv4", "iptables-nft": "FLANNEL", "iptables-legacy": "FLANNEL"}
    for each in TOOLS:
        texts = {
            "nft": ("nft", "list", "ruleset"),
            "iptables-nft": ("iptables-nft-save",),
            "iptables-legacy": ("iptables-legacy-save",),
        }
        assert (marks[each] in net.run(*texts[each])) == (each == then), each


GO_NFT = """
table ip flannel-ipv4 {
    comment "rules for flannel-ipv4"
    chain forward {
        type filter hook forward priority filter; policy accept;
        ip saddr NET accept
        ip daddr NET accept
    }
    chain postrtg {
        type nat hook postrouting priority srcnat; policy accept;
        meta mark 0x4000 return
        ip saddr POD ip daddr NET return
        ip saddr NET ip daddr POD return
        ip saddr != POD ip daddr NET return
        ip saddr NET ip daddr != 224.0.0.0/4 masquerade fully-random
    }
}
table ip6 flannel-ipv6 {
    chain forward { type filter hook forward priority filter; policy accept; }
    chain postrtg { type nat hook postrouting priority srcnat; policy accept; }
}
"""


def go_nft(network: str, pod: str) -> str:
    return GO_NFT.replace("NET", network).replace("POD", pod)


@pytest.mark.parametrize("tool", TOOLS)
def test_flannels_own_rules_are_taken_over(net: Namespace, rules: PacketRules, tool: Tool) -> None:
    settle(rules, wanted("iptables-nft", dual=False))  # in its words
    feed(net, go_nft("10.5.0.0/16", "10.5.34.0/24"), "nft", "-f", "-")
    settle(rules, wanted(tool, dual=False))
    assert ("flannel-ipv6" in net.run("nft", "list", "ruleset")) is False
    assert ("FLANNEL" in net.run("iptables-nft-save")) == (tool == "iptables-nft")


def test_rules_of_a_flannel_of_another_network_are_left_alone_and_named(
    net: Namespace, rules: PacketRules
) -> None:
    feed(net, go_nft("10.42.0.0/16", "10.42.3.0/24"), "nft", "-f", "-")
    before = saved(net)
    (*_, error) = apply(rules, wanted("nft", dual=False))
    assert "flannel-ipv4 forward is there and speaks of 10.42.0.0/16 10.42.3.0/24" in error
    assert "--etcd-prefix" in error
    assert saved(net) == before
    settle(rules, State())
    assert saved(net) == before


def test_daemons_of_two_prefixes_have_rules_of_their_own(agent: Agent) -> None:
    tools = find_tools()
    one, two = agent.make(PacketRules, NAMES, tools), agent.make(PacketRules, names_of("/b"), tools)
    for tool in TOOLS:
        other = State(
            rules=desired_rules(PerFamily(NET, NET6), PerFamily(POD, POD6), ALL, names_of("/b"), tool)
        )
        settle(one, wanted(tool))
        assert apply(two, other) == []
        settle(one, wanted(tool))
        assert two.observe(SCOPE) == other
        settle(one, State())
        assert two.observe(SCOPE) == other
        assert apply(two, State()) == []


@pytest.mark.parametrize(
    "key",
    [
        ChainKey("nft", "ip", "filter", "DOCKER-USER"),
        ChainKey("legacy", "ip", "filter", "DOCKER-USER"),
        ChainKey("nft", "inet", "firewalld", "filter_FORWARD"),
    ],
    ids=str,
)
@pytest.mark.parametrize("tool", TOOLS)
def test_accepting_in_a_chain_of_others_comes_first_and_goes_without_a_trace(
    net: Namespace, rules: PacketRules, key: ChainKey, tool: Tool
) -> None:
    setup_others(net)
    settle(rules, wanted(tool))
    before = saved(net)
    settle(rules, wanted(tool, accept=(key,)))
    assert saved(net) != before
    assert [rule.verdict.kind for rule in rules.observe(SCOPE).rules[key].rules][:2] == ["accept", "accept"]
    settle(rules, wanted(tool))
    assert saved(net) == before


def test_a_missing_tool_is_named(net: Namespace, agent: Agent) -> None:
    found = find_tools()
    for tool, tools, missing in (
        ("nft", replace(found, nft=""), "nft is not installed; install nftables"),
        ("iptables-legacy", Tools(nft=found.nft), "iptables-legacy-restore is not installed"),
    ):
        driver = agent.make(PacketRules, NAMES, tools, None, partial(replace, tools))
        assert missing in apply(driver, wanted(tool, dual=False))[0]  # type: ignore[arg-type]
    # What is in nf_tables goes without any tool.
    settle(agent.make(PacketRules, NAMES, found), wanted("iptables-nft"))
    settle(agent.make(PacketRules, NAMES, Tools(), None, Tools), State())
    assert "FLANNEL" not in net.run("iptables-nft-save")


def test_only_one_tool_is_used_where_only_one_is() -> None:
    found = find_tools()
    assert found.choose(nftables=True) == "nft"
    assert found.choose(nftables=False) == ("iptables-nft" if found.default == "nft" else "iptables-legacy")
    assert replace(found, nft="").choose(nftables=True) == found.choose(nftables=False)
    assert replace(found, default=None).choose(nftables=False) == "nft"
    assert Tools().choose(nftables=True) is None


def test_masquerading_keeps_the_port_where_that_is_asked_for(net: Namespace, rules: PacketRules) -> None:
    wish: Any = replace(ALL, fully_random=False)
    for tool in TOOLS:
        settle(rules, wanted(tool, wish))
        assert "random" not in saved(net)
