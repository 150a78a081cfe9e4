"""What is read of nf_tables, against rules written by hand, loaded with nft and with iptables-nft."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from flanneld_py.drivers.nfreader import NfReader
from flanneld_py.errors import KernelError
from flanneld_py.packetfilter import Chain, ChainKey, Rule, Verdict
from tests.netns.inside import Namespace
from tests.netns.nftables.rulesets import (
    ACCEPT,
    DOCKER,
    DROP,
    FIREWALLD,
    IPTABLES,
    NAT,
    NFT,
    REJECT,
    RESTORE,
    RETURN,
    filled,
    flannel,
    load,
    rules,
    unless,
    when,
)

# --- flannel's rules ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["ip", "ip6"])
def test_flannels_rules_by_iptables(net: Namespace, reader: NfReader, family: Any) -> None:
    load(net, filled(IPTABLES, family), RESTORE[family])
    masq, forward = flannel(family, packets=0)
    found = reader.chains()
    assert found == {
        ChainKey("nft", family, "nat", "POSTROUTING"): Chain(
            (Rule((), Verdict("jump", "FLANNEL-POSTRTG"), "flanneld masq"),),
            "postrouting",
            "nat",
            100,
            "accept",
        ),
        ChainKey("nft", family, "nat", "FLANNEL-POSTRTG"): Chain(masq),
        ChainKey("nft", family, "filter", "FORWARD"): Chain(
            (Rule((), Verdict("jump", "FLANNEL-FWD"), "flanneld forward"),), "forward", "filter", 0, "accept"
        ),
        ChainKey("nft", family, "filter", "FLANNEL-FWD"): Chain(forward),
    }
    assert all(rule.packets == 0 for chain in found.values() for rule in chain.rules)


@pytest.mark.parametrize("family", ["ip", "ip6"])
def test_flannels_rules_by_nft(net: Namespace, reader: NfReader, family: Any) -> None:
    load(net, filled(NFT, family))
    masq, forward = flannel(family, packets=None)
    found = reader.chains()
    assert found == {
        ChainKey("nft", family, "flannel", "forward"): Chain(forward, "forward", "filter", 0, "accept"),
        ChainKey("nft", family, "flannel", "postrtg"): Chain(masq, "postrouting", "nat", 100, "accept"),
    }
    assert all(rule.packets is None for chain in found.values() for rule in chain.rules)


def test_a_handle_deletes_the_rule_it_was_read_with(net: Namespace, reader: NfReader) -> None:
    load(net, filled(NFT, "ip"))
    key = ChainKey("nft", "ip", "flannel", "postrtg")
    before = reader.chains()[key].rules
    net.run("nft", "delete", "rule", "ip", "flannel", "postrtg", "handle", str(before[2].handle))
    assert reader.chains()[key].rules == before[:2] + before[3:]


def test_a_counter_tells_its_packets(net: Namespace, reader: NfReader) -> None:
    load(
        net,
        "table ip t { chain c { type filter hook output priority 0; counter; ip daddr 127.0.0.9 drop; }; }",
    )
    net.run("ping", "-c2", "-i0.01", "127.0.0.1")
    counted, other = reader.chains()[ChainKey("nft", "ip", "t", "c")].rules
    assert (counted.packets, other.packets) == (4, None)


# --- whole rule sets ------------------------------------------------------------------------------


def test_dockers_rules(net: Namespace, reader: NfReader) -> None:
    load(net, DOCKER, RESTORE["ip"])
    chains = reader.chains()
    forward = chains[ChainKey("nft", "ip", "filter", "FORWARD")]
    assert (forward.hook, forward.kind, forward.priority, forward.policy) == ("forward", "filter", 0, "drop")
    inside_, outside = when("iifname", "docker0"), unless("oifname", "docker0")
    assert rules(chains, "ip", "filter", "FORWARD") == [
        (Verdict("jump", "DOCKER-USER"),),
        (Verdict("jump", "DOCKER-ISOLATION-STAGE-1"),),
        (when("oifname", "docker0"), when("ct state", "established", "related"), ACCEPT),
        (when("oifname", "docker0"), Verdict("jump", "DOCKER")),
        (inside_, outside, ACCEPT),
        (inside_, when("oifname", "docker0"), ACCEPT),
    ]
    assert rules(chains, "ip", "filter", "DOCKER") == [
        (
            unless("iifname", "docker0"),
            when("oifname", "docker0"),
            when("l4proto", 6),
            when("daddr", "172.17.0.2"),
            when("other", "dport 80"),
            ACCEPT,
        )
    ]
    assert rules(chains, "ip", "filter", "DOCKER-ISOLATION-STAGE-2") == [
        (when("oifname", "docker0"), DROP),
        (RETURN,),
    ]
    assert rules(chains, "ip", "nat", "PREROUTING") == [
        (when("other", "-m addrtype"), Verdict("jump", "DOCKER"))
    ]
    assert chains[ChainKey("nft", "ip", "nat", "PREROUTING")].priority == -100
    assert rules(chains, "ip", "nat", "POSTROUTING") == [
        (outside, when("saddr", "172.17.0.0/16"), Verdict("masquerade"))
    ]
    assert rules(chains, "ip", "nat", "DOCKER") == [
        (inside_, RETURN),
        (unless("iifname", "docker0"), when("l4proto", 6), when("other", "dport 8080"), NAT),
    ]


def test_firewallds_rules(net: Namespace, reader: NfReader) -> None:
    load(net, FIREWALLD)
    chains = reader.chains()
    assert chains[ChainKey("nft", "inet", "firewalld", "filter_FORWARD")].priority == 10
    assert rules(chains, "inet", "firewalld", "filter_FORWARD") == [
        (when("ct state", "established", "related"), ACCEPT),
        (when("ct status", "dnat"), ACCEPT),
        (when("iifname", "lo"), ACCEPT),
        (when("nfproto", 6), when("daddr", "::/96", "::ffff:0.0.0.0/96", "2002::/24"), REJECT),
        (when("nfproto", 4), when("saddr", "192.0.2.0/24"), ACCEPT),
        (Verdict("jump", "filter_FORWARD_ZONES"),),
        (when("ct state", "invalid"), DROP),
        (REJECT,),
    ]
    assert rules(chains, "inet", "firewalld", "filter_FORWARD_ZONES") == [
        (when("iifname", "eth0"), Verdict("goto", "filter_FWD_public")),
        (Verdict("goto", "filter_FWD_public"),),
    ]
    assert rules(chains, "inet", "firewalld", "filter_FWD_public") == [
        (when("l4proto", 1, 58), ACCEPT),
        (when("l4proto", 6), when("other", "dport 22"), when("ct state", "new", "untracked"), ACCEPT),
    ]


# --- reading --------------------------------------------------------------------------------------


def test_some_tables_only(net: Namespace, reader: NfReader) -> None:
    load(net, DOCKER, RESTORE["ip"])
    load(net, FIREWALLD)
    load(net, "table ip6 nat { chain c { drop; }; }\ntable arp nat { chain c { drop; }; }")
    everything = reader.chains()
    assert {key[1:3] for key in everything} == {
        ("ip", "filter"), ("ip", "nat"), ("inet", "firewalld"), ("ip6", "nat")
    }  # fmt: skip
    for asked in ([("ip", "nat")], [("inet", "firewalld"), ("ip6", "nat")], [("ip", "absent")], []):
        expected = {key: chain for key, chain in everything.items() if key[1:3] in asked}
        assert reader.chains(asked) == expected
    assert reader.chains() == everything


def test_a_dormant_table_hooks_nothing(net: Namespace, reader: NfReader) -> None:
    load(
        net,
        "table ip t { flags dormant; chain c { type filter hook forward priority 0; policy drop; drop; }; }",
    )
    assert reader.chains() == {ChainKey("nft", "ip", "t", "c"): Chain((Rule((), DROP),))}


def test_the_same_expressions_with_another_set_mean_something_else(net: Namespace, reader: NfReader) -> None:
    for address in ("192.0.2.1", "192.0.2.2"):
        load(
            net,
            f"""table ip t {{
              set s {{ type ipv4_addr; elements = {{ {address} }}; }}
              chain c {{ ip saddr @s drop; }}
            }}""",
        )
        assert rules(reader.chains(), "ip", "t", "c") == [(when("saddr", address), DROP)]
        net.run("nft", "flush", "ruleset")


def test_a_set_that_was_too_large_is_not_read_again(net: Namespace, reader: NfReader) -> None:
    many = ", ".join(f"10.{n >> 8}.{n & 255}.1" for n in range(5000))
    for name, addresses in (("large", many), ("fit", "10.0.0.1")):
        elements = f"set {name} {{ type ipv4_addr; elements = {{ {addresses} }}; }}"
        load(net, f"table ip t {{ {elements}\n chain {name} {{ ip saddr @{name} drop; }}; }}")
    unread = [(when("other", "saddr in @large"), DROP)]
    assert rules(reader.chains(), "ip", "t", "large") == unread
    assert rules(reader.chains(), "ip", "t", "fit") == [(when("saddr", "10.0.0.1"), DROP)]
    for name in ("large", "fit"):
        net.run("nft", "flush", "set", "ip", "t", name)
        net.run("nft", "add", "element", "ip", "t", name, "{ 10.0.0.2 }")
    assert rules(reader.chains(), "ip", "t", "large") == unread
    assert rules(reader.chains(), "ip", "t", "fit") == [(when("saddr", "10.0.0.2"), DROP)]


@pytest.mark.parametrize("flags", ["timeout", "dynamic", "interval, timeout"])
def test_a_set_whose_elements_come_and_go_untold_is_unknown(
    net: Namespace, reader: NfReader, flags: str
) -> None:
    load(
        net,
        f"""table ip t {{
          set s {{ type ipv4_addr; flags {flags}; size 9; elements = {{ 10.0.0.1 }}; }}
          chain c {{ ip saddr @s drop; }}
        }}""",
    )
    assert rules(reader.chains(), "ip", "t", "c") == [(when("other", "saddr in @s"), DROP)]


def test_a_device_that_takes_the_number_of_another_is_named(net: Namespace, reader: NfReader) -> None:
    net.ip("link add d0 index 77 type veth peer name p0")
    load(net, "table ip t { chain c { iif d0 drop; }; }")
    assert rules(reader.chains(), "ip", "t", "c") == [(when("iifname", "d0"), DROP)]
    net.ip("link del d0", "link add d1 index 77 type veth peer name p1")
    assert rules(reader.chains(), "ip", "t", "c") == [(when("iifname", "d1"), DROP)]
    net.ip("link del d1")


def test_the_generation_rises_with_every_change_and_only_then(net: Namespace, reader: NfReader) -> None:
    seen = [reader.generation()]
    for text in ("add table ip t", "add chain ip t c", "add rule ip t c drop", "flush ruleset"):
        assert reader.generation() == seen[-1]
        reader.chains()
        net.run("nft", *text.split())
        seen.append(reader.generation())
    assert all(before < after for before, after in pairwise(seen))
    assert reader.chains() == {}


def test_a_reading_shows_one_moment_while_rules_change(net: Namespace, reader: NfReader) -> None:
    """A chain and its rule come and go together, too fast for some readings, which then fail as a whole."""
    with net.popen("nft", "-i") as changing:
        assert changing.stdin is not None
        for n in range(600):
            changing.stdin.write(f"add table ip t; delete table ip t; add table ip t; add chain ip t c{n}; ")
            changing.stdin.write(f"add rule ip t c{n} ip saddr 10.0.{n >> 8}.{n & 255} drop\n")
        changing.stdin.close()
        while ChainKey("nft", "ip", "t", "c599") not in (chains := unless_changing(reader)):
            for key, chain in chains.items():
                n = int(key.chain.removeprefix("c"))
                assert chain == Chain((Rule((when("saddr", f"10.0.{n >> 8}.{n & 255}"),), DROP),))
    assert len(chains) == 1


def unless_changing(reader: NfReader) -> dict[ChainKey, Chain]:
    try:
        return reader.chains()
    except KernelError as error:
        if "kept changing" not in str(error):
            raise
        return {}


def test_who_may_not_read_is_told(net: Namespace) -> None:
    reader = net.agent("setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin").make(NfReader)
    with pytest.raises(KernelError, match=r"cannot read the packet-filter rules .*needs CAP_NET_ADMIN"):
        reader.chains()
