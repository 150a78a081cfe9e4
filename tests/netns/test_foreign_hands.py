"""What others do to our chains and tables, and the rules of theirs that lead to ours."""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING

import pytest
from msgspec.structs import replace

from flanneld_py.drivers.filtertools import find_tools
from flanneld_py.drivers.packetrules import PacketRules
from flanneld_py.lab import wait_for
from flanneld_py.model import State
from flanneld_py.packetfilter import ChainKey
from tests.netns.observing import wait_status
from tests.netns.packet_filters import filtered_overlay, rules_text
from tests.netns.test_ctl import flannelctl
from tests.netns.test_packet_rules import NAMES, agent, apply, net, rules, saved, settle, wanted

if TYPE_CHECKING:
    from flanneld_py.core.rules import Tool
    from flanneld_py.lab import Lab
    from tests.netns.inside import Agent, Namespace

__all__ = ["agent", "net", "rules"]


def lines(net: Namespace) -> list[str]:
    """All rules, in whichever order the tables and chains are shown."""
    return sorted(saved(net).splitlines())


LEADING = [
    "-i cni0 -j",
    "-m conntrack --ctstate RELATED,ESTABLISHED -j",
    "-m physdev --physdev-is-bridged -j",
    "-p tcp -j",
    "-g",
    "-j",
]


@pytest.mark.parametrize("tool", ["iptables-nft", "iptables-legacy"])
@pytest.mark.parametrize("words", LEADING)
def test_a_rule_of_others_that_leads_to_our_chain_stays(
    net: Namespace, rules: PacketRules, tool: Tool, words: str
) -> None:
    """It was written back as `-d cni0`, or ended the process, and kept our chains from going."""
    settle(rules, wanted(tool, dual=False))
    net.run(*f"{tool} -I FORWARD {words} FLANNEL-FWD".split())
    before = lines(net)
    settle(rules, wanted(tool, dual=False))
    assert lines(net) == before
    (theirs,) = [
        line for line in net.run(tool, "-S", "FORWARD").splitlines() if "comment" not in line and "-A" in line
    ]

    settle(rules, State())
    left = [line for line in net.run(f"{tool}-save").splitlines() if "FLANNEL" in line]
    assert left == [":FLANNEL-FWD - [0:0]", theirs]
    where = "legacy " if tool == "iptables-legacy" else ""
    (said,) = rules.left_to_others()
    assert f"{where}ip filter FLANNEL-FWD stays, empty, as rule 1 of {where}ip filter FORWARD" in said
    settle(rules, wanted(tool, dual=False))
    assert lines(net) == before


@pytest.mark.parametrize("tool", ["iptables-nft", "iptables-legacy"])
def test_the_daemon_lives_with_a_rule_that_leads_to_its_chain_and_cleanup_names_it(
    lab: Lab, tool: str
) -> None:
    """It ended with 70 at each start, and cleanup with a traceback."""
    (alpha,) = filtered_overlay(lab, tool, "alpha")
    (chain,) = set(re.findall(r"FLANNEL-FWD\S*", rules_text(alpha, tool))) - {""}
    alpha.run(f"{tool} -I FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j {chain}".split())
    alpha.run([tool, "-F", chain])
    wait_for(lambda: "10.5.0.0/16" in alpha.run([tool, "-S", chain]), 2, "the rules to be back")
    wait_status(alpha.daemon, "the daemon to be in sync", lambda seen: seen["state"] == "in sync")
    assert alpha.daemon.terminate() == 0
    said = flannelctl(alpha, "cleanup")
    assert said.code == 0, said
    assert f"{chain} stays, empty, as rule 1 of " in said.out
    assert "--ctstate RELATED,ESTABLISHED" in alpha.run([tool, "-S", "FORWARD"])


@pytest.mark.parametrize(
    "commands",
    [
        ["add table ip flannel-ipv4 { flags dormant ; }"],
        ["flush ruleset", "add table ip flannel-ipv4 { flags dormant ; }"],
        [
            "add chain ip flannel-ipv4 x",
            "add map ip flannel-ipv4 m { type ipv4_addr : verdict ; elements = { 192.0.2.9 : jump x } ; }",
        ],
        ["add chain ip flannel-ipv4 x", "add chain ip flannel-ipv4 y", "add rule ip flannel-ipv4 y jump x"],
        [
            "delete chain ip flannel-ipv4 forward",
            "add chain ip flannel-ipv4 forward",
            "add chain ip flannel-ipv4 x",
            "add rule ip flannel-ipv4 x jump forward",
        ],
    ],
    ids=["dormant", "dormant and empty", "a map", "chains", "another kind of chain"],
)
def test_what_others_made_of_our_own_table_is_undone(
    net: Namespace, rules: PacketRules, commands: list[str]
) -> None:
    """A dormant table was refused for ever, and so was the chain that a map of theirs leads to."""
    settle(rules, wanted("nft", dual=False))
    before = lines(net)
    for command in commands:
        net.run("nft", command)
    for _ in range(3):
        apply(rules, wanted("nft", dual=False))
    settle(rules, wanted("nft", dual=False))
    assert lines(net) == before


def test_a_tool_that_is_installed_later_is_used_without_a_restart(agent: Agent) -> None:
    found = find_tools()
    for tool, there in (("nft", replace(found, nft="")), ("iptables-legacy", replace(found, restore={}))):
        driver = agent.make(PacketRules, NAMES, there, None, partial(replace, found))
        settle(driver, wanted(tool, dual=False))  # type: ignore[arg-type]


def test_a_chain_that_takes_no_rule_of_ours_holds_up_no_other(net: Namespace, rules: PacketRules) -> None:
    """Such as one in a table with an owner."""
    refused = ChainKey("nft", "inet", "nowhere", "forward")
    (error,) = apply(rules, wanted("nft", dual=False, accept=(refused,)))
    assert "No such file or directory" in error
    assert "table ip flannel-ipv4" in saved(net)


def test_a_chain_of_a_table_that_iptables_does_not_know_is_written_by_nft(
    net: Namespace, rules: PacketRules
) -> None:
    net.run("nft", "add table ip fw; add chain ip fw forward { type filter hook forward priority 5; }")
    key = ChainKey("nft", "ip", "fw", "forward")
    settle(rules, wanted("iptables-nft", dual=False, accept=(key,)))
    settle(rules, wanted("iptables-nft", dual=False))


def test_the_accept_is_put_at_the_head_again(lab: Lab) -> None:
    """It stayed behind the drop that somebody put before it."""
    (alpha,) = filtered_overlay(lab, "nft", "alpha", args=["--forward-accept-in=DOCKER-USER"])
    for words in ("-N DOCKER-USER", "-A FORWARD -j DOCKER-USER", "-P FORWARD DROP"):
        alpha.run(["iptables-nft", *words.split()])

    def first() -> str:
        return "".join(alpha.run(["iptables-nft", "-S", "DOCKER-USER"]).splitlines()[1:2])

    wait_for(lambda: "10.5.0.0/16" in first(), 3, "the accept")
    alpha.run(["iptables-nft", "-I", "DOCKER-USER", "-d", "10.0.0.0/8", "-j", "DROP"])
    wait_for(lambda: "10.5.0.0/16" in first(), 3, "the accept to come first")
    wait_status(alpha.daemon, "no drop", lambda seen: seen["ready"])
