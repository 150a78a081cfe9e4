"""Which packet-filter rules there are to be, in which words, and which of those that stand are ours."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Any

import pytest
from msgspec.structs import replace

from flanneld_py.addresses import PerFamily
from flanneld_py.core.rules import (
    Names,
    Tool,
    Wish,
    desired_rules,
    matching,
    names_of,
    others,
    own_rows,
    referrers,
    tell_referrers,
)
from flanneld_py.core.ruletext import Edit, iptables_script, nft_script
from flanneld_py.packetfilter import Chain, ChainKey, Match, Rule, Verdict

NET, POD = ip_network("10.5.0.0/16"), ip_network("10.5.34.0/24")
NET6, POD6 = ip_network("fd00:5::/48"), ip_network("fd00:5:0:34::/64")
NAMES = names_of("/coreos.com/network")
DUAL: tuple[Any, Any] = (PerFamily(NET, NET6), PerFamily(POD, POD6))
V4: tuple[Any, Any] = (PerFamily(NET), PerFamily(POD))


def rows(
    nets: tuple[Any, Any] = V4,
    *,
    tool: Tool = "iptables-nft",
    names: Names = NAMES,
    accept: Any = (),
    **wish: Any,
) -> dict[ChainKey, Chain]:
    return desired_rules(*nets, Wish(**{"masquerade": True, **wish}), names, tool, accept)


def edits(wanted: dict[ChainKey, Chain], table: str = "") -> list[Edit]:
    return [
        Edit(key, chain, None, NAMES.own_chain(key))
        for key, chain in wanted.items()
        if not table or (key.family, key.table) == ("ip", table)
    ]


def test_t40_masquerading_one_network_takes_seven_rules_in_flannels_order() -> None:
    script = iptables_script("nat", edits(rows(), "nat"))
    masq = '-m comment --comment "flanneld masq"'
    assert script.splitlines() == [
        "*nat",
        ":FLANNEL-POSTRTG - [0:0]",
        f"-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 {masq} -j RETURN",
        f"-A FLANNEL-POSTRTG -s 10.5.34.0/24 -d 10.5.0.0/16 {masq} -j RETURN",
        f"-A FLANNEL-POSTRTG -s 10.5.0.0/16 -d 10.5.34.0/24 {masq} -j RETURN",
        f"-A FLANNEL-POSTRTG ! -s 10.5.0.0/16 -d 10.5.34.0/24 {masq} -j RETURN",
        f"-A FLANNEL-POSTRTG -s 10.5.0.0/16 ! -d 224.0.0.0/4 {masq} -j MASQUERADE --random-fully",
        f"-A FLANNEL-POSTRTG ! -s 10.5.0.0/16 -d 10.5.0.0/16 {masq} -j MASQUERADE --random-fully",
        f"-A POSTROUTING {masq} -j FLANNEL-POSTRTG",
        "COMMIT",
    ]


def test_forwarding_is_accepted_from_and_to_the_network() -> None:
    forward = '-m comment --comment "flanneld forward"'
    assert iptables_script("filter", edits(rows(), "filter")).splitlines() == [
        "*filter",
        ":FLANNEL-FWD - [0:0]",
        f"-A FLANNEL-FWD -s 10.5.0.0/16 {forward} -j ACCEPT",
        f"-A FLANNEL-FWD -d 10.5.0.0/16 {forward} -j ACCEPT",
        f"-A FORWARD {forward} -j FLANNEL-FWD",
        "COMMIT",
    ]


def test_nft_has_the_same_rules_with_the_same_meaning() -> None:
    script = nft_script(edits(rows(tool="nft")))
    masq = 'comment "flanneld masq"'
    assert [line for line in script.splitlines() if "postrtg" in line] == [
        "add chain ip flannel-ipv4 postrtg { type nat hook postrouting priority 100; policy accept; }",
        "flush chain ip flannel-ipv4 postrtg",
        f"add rule ip flannel-ipv4 postrtg meta mark & 0x4000 == 0x4000 return {masq}",
        f"add rule ip flannel-ipv4 postrtg ip saddr 10.5.34.0/24 ip daddr 10.5.0.0/16 return {masq}",
        f"add rule ip flannel-ipv4 postrtg ip saddr 10.5.0.0/16 ip daddr 10.5.34.0/24 return {masq}",
        f"add rule ip flannel-ipv4 postrtg ip saddr != 10.5.0.0/16 ip daddr 10.5.34.0/24 return {masq}",
        f"add rule ip flannel-ipv4 postrtg ip saddr 10.5.0.0/16 ip daddr != 224.0.0.0/4 "
        f"masquerade fully-random {masq}",
        f"add rule ip flannel-ipv4 postrtg ip saddr != 10.5.0.0/16 ip daddr 10.5.0.0/16 "
        f"masquerade fully-random {masq}",
    ]


@pytest.mark.parametrize("tool", ["nft", "iptables-nft", "iptables-legacy"])
def test_what_is_wanted_is_known_as_ours(tool: Tool) -> None:
    wanted = rows(DUAL, tool=tool)
    assert {key.where for key in wanted} == {"legacy" if tool == "iptables-legacy" else "nft"}
    assert {key.family for key in wanted} == {"ip", "ip6"}
    assert own_rows(wanted, NAMES, (NET, NET6)) == wanted
    assert others(wanted, NAMES, (NET, NET6)) == {}
    # A daemon of another prefix calls its own otherwise.
    assert own_rows(wanted, names_of("/b"), (NET, NET6)) == {}
    assert not wanted.keys() & {
        key for key in rows(DUAL, tool=tool, names=names_of("/b")) if "FLANNEL" in key.chain
    }


def test_t43_ipv6_has_its_own_multicast_and_no_rule_names_ipv4() -> None:
    wanted = rows((PerFamily(v6=NET6), PerFamily(v6=POD6)), tool="nft")
    assert {key[:3] for key in wanted} == {("nft", "ip6", "flannel-ipv6")}
    assert "ip6 saddr fd00:5::/48 ip6 daddr != ff00::/8 masquerade" in nft_script(edits(wanted))


def test_wishes() -> None:
    assert rows(masquerade=False, forward=False) == {}
    assert {key.table for key in rows(masquerade=False)} == {"filter"}
    assert {key.table for key in rows(forward=False)} == {"nat"}
    assert "random" not in iptables_script("nat", edits(rows(fully_random=False), "nat"))


def test_rules_of_another_flannel_under_the_same_names_are_not_ours() -> None:
    other = rows((PerFamily(ip_network("10.42.0.0/16")), PerFamily(ip_network("10.42.3.0/24"))))
    docker = ChainKey("nft", "ip", "filter", "DOCKER-USER")
    foreign = Chain((Rule((), Verdict("jump", "FLANNEL-FWD")), Rule((), Verdict("return"))))
    assert own_rows({**other, docker: foreign}, NAMES, (NET,)) == {}
    assert {key.chain for key in others(other, NAMES, (NET,))} == {"FLANNEL-POSTRTG", "FLANNEL-FWD"}


def test_flannels_empty_table_of_the_other_family_goes_with_its_own() -> None:
    """Flannel makes both of its tables, whichever families it has."""
    ours = rows(tool="nft")
    empty = {
        key._replace(family="ip6", table="flannel-ipv6"): replace(chain, rules=())
        for key, chain in ours.items()
    }
    assert own_rows({**ours, **empty}, NAMES, (NET,)) == {**ours, **empty}
    assert own_rows({**ours, **empty}, NAMES, (ip_network("10.42.0.0/16"),)) == {}


def test_a_chain_of_ours_that_was_emptied_is_still_ours() -> None:
    wanted = rows()
    emptied = {key: replace(chain, rules=()) for key, chain in wanted.items()}
    assert own_rows(emptied, NAMES, (NET,)).keys() == {key for key in wanted if NAMES.own_chain(key)}


# --- chains of others -----------------------------------------------------------------------------

DOCKER_USER = ChainKey("nft", "ip", "filter", "DOCKER-USER")
INET = ChainKey("nft", "inet", "filter", "forward")


def test_a_chain_is_named_as_iptables_or_nft_do() -> None:
    there = {
        key: Chain()
        for key in (
            DOCKER_USER,
            DOCKER_USER._replace(family="ip6", where="legacy"),
            INET,
            INET._replace(table="fw"),
        )
    }
    assert matching(("DOCKER-USER",), there) == tuple(sorted(list(there)[:2]))
    assert matching(("inet filter forward", "nonsense"), there) == (INET,)
    assert matching(("forward",), there) == ()


def test_accepting_in_a_chain_of_others_goes_to_its_head_and_is_known_again() -> None:
    assert rows(masquerade=False, forward=False, accept=(DOCKER_USER,), tool="nft").keys() == {DOCKER_USER}
    wanted = rows(masquerade=False, accept=(DOCKER_USER, INET), tool="nft")
    theirs = (Rule((Match("saddr", (NET,)),), Verdict("drop")), Rule((), Verdict("return")))
    standing = {key: replace(chain, rules=(*chain.rules, *theirs)) for key, chain in wanted.items()}
    assert own_rows({key: standing[key] for key in (DOCKER_USER, INET)}, NAMES, (NET,)) == {
        key: wanted[key] for key in (DOCKER_USER, INET)
    }
    comment = 'comment "flanneld forward"'
    assert nft_script([Edit(INET, wanted[INET], None, whole=False)]).splitlines() == [
        f"insert rule inet filter forward meta nfproto ipv4 ip {side} 10.5.0.0/16 accept {comment}"
        for side in ("daddr", "saddr")
    ]
    text = iptables_script(
        "filter", [Edit(DOCKER_USER, wanted[DOCKER_USER], wanted[DOCKER_USER], whole=False)]
    )
    verbs = [line.split()[0] for line in text.splitlines()]
    assert verbs == ["*filter", "-D", "-D", "-I", "-I", "COMMIT"]


def test_what_is_gone_takes_its_jump_along() -> None:
    wanted = rows(masquerade=False)
    gone = [Edit(key, Chain(), chain, NAMES.own_chain(key), gone=True) for key, chain in wanted.items()]
    assert iptables_script("filter", gone).splitlines() == [
        "*filter",
        '-D FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD',
        "-F FLANNEL-FWD",
        "-X FLANNEL-FWD",
        "COMMIT",
    ]


FORWARD = ChainKey("legacy", "ip", "filter", "FORWARD")
FWD = FORWARD._replace(chain="FLANNEL-FWD")
OPERATORS = [
    Rule((), Verdict("jump", "FLANNEL-FWD")),
    Rule((), Verdict("goto", "FLANNEL-FWD")),
    Rule((Match("iifname", ("cni0",)),), Verdict("jump", "FLANNEL-FWD")),
    Rule((Match("ct state", ("established", "related")),), Verdict("jump", "FLANNEL-FWD")),
    Rule((Match("other", ("physdev",)),), Verdict("jump", "FLANNEL-FWD"), "flanneld forward"),
    Rule((Match("saddr", (NET,)), Match("l4proto", (6,))), Verdict("accept"), "flanneld forward"),
]


@pytest.mark.parametrize("rule", OPERATORS, ids=str)
def test_in_a_chain_of_others_only_what_is_as_we_write_it_is_ours(rule: Rule) -> None:
    """What an operator made to lead to our chain was taken for ours and written back as `-d cni0`."""
    wanted = rows(masquerade=False, tool="iptables-legacy")
    standing = {**wanted, FORWARD: Chain((rule, *wanted[FORWARD].rules, rule))}
    assert own_rows(standing, NAMES, (NET,)) == wanted
    assert len(referrers(FWD, standing, NAMES)) == (2 if rule.verdict.target else 0)
    assert own_rows({FORWARD: Chain((rule,))}, NAMES, (NET,)) == {}
    if rule.verdict.target:
        emptied = {FORWARD: Chain((rule,)), FWD: Chain()}
        assert own_rows(emptied, NAMES, (NET,)) == {}
        assert own_rows({FWD: Chain()}, NAMES, (NET,)) == {FWD: Chain()}


def test_a_chain_that_others_lead_to_is_emptied_and_stays() -> None:
    edit = Edit(FWD, Chain(), Chain(), whole=True, gone=True, referred=True)
    assert iptables_script("filter", [edit]).splitlines() == ["*filter", "-F FLANNEL-FWD", "COMMIT"]
    assert tell_referrers(FWD, [(FORWARD, 1)]) == (
        "legacy ip filter FLANNEL-FWD stays, empty, as rule 1 of legacy ip filter FORWARD of somebody else "
        "leads there; delete that rule, then the chain"
    )


@pytest.mark.parametrize(
    ("verdict", "late"),
    [
        (Verdict("drop"), True),
        (Verdict("return"), True),
        (Verdict("jump", "ufw-before-forward"), True),
        (Verdict("unknown"), True),
        (Verdict("accept"), False),
        (Verdict("none"), False),
    ],
    ids=str,
)
def test_accepts_that_come_too_late_are_put_at_the_head_again(verdict: Verdict, late: bool) -> None:
    """Two daemons that both accept there do not fight over the first place."""
    wanted = rows(masquerade=False, forward=False, accept=(DOCKER_USER,))
    theirs, (first, second) = Rule((), verdict), wanted[DOCKER_USER].rules
    for standing in ((theirs, first, second), (first, theirs, second)):
        found = own_rows({DOCKER_USER: Chain(standing)}, NAMES, (NET,))
        assert (found != wanted) == late
        assert found[DOCKER_USER].rules == wanted[DOCKER_USER].rules
    assert own_rows({DOCKER_USER: Chain((first, second, theirs))}, NAMES, (NET,)) == wanted


def test_a_table_of_ours_is_made_anew_in_one_transaction() -> None:
    """A dormant one takes no chain that hangs anywhere, so it goes and comes back awake."""
    script = nft_script(edits(rows(masquerade=False, tool="nft")), [("ip", "flannel-ipv4")])
    assert script.splitlines()[:3] == [f"{verb} table ip flannel-ipv4" for verb in ("add", "delete", "add")]
