"""Single conditions and verdicts, as nft and iptables-nft write them, read from a real kernel."""

from __future__ import annotations

import pytest

from flanneld_py.drivers.nfreader import NfReader
from flanneld_py.packetfilter import ChainKey, Mark, Match, Verdict
from tests.netns.inside import Namespace
from tests.netns.nftables.rulesets import (
    ACCEPT,
    DROP,
    MASQUERADE,
    NAT,
    NONE,
    REJECT,
    RESTORE,
    RETURN,
    UNKNOWN,
    load,
    rules,
    unless,
    when,
)

# --- single conditions ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ip saddr 10.0.0.0/8", when("saddr", "10.0.0.0/8")),
        ("ip saddr 10.5.34.0/24", when("saddr", "10.5.34.0/24")),
        ("ip daddr != 10.5.32.0/20", unless("daddr", "10.5.32.0/20")),
        ("ip daddr 192.0.2.1", when("daddr", "192.0.2.1")),
        ("ip saddr 10.0.0.1-10.0.0.4", when("saddr", "10.0.0.1", "10.0.0.2/31", "10.0.0.4")),
        ("ip saddr != 10.0.0.0-10.0.0.3", unless("saddr", "10.0.0.0/30")),
        ("ip saddr < 64.0.0.0", when("saddr", "0.0.0.0/2")),
        ("ip saddr >= 192.0.0.0", when("saddr", "192.0.0.0/2")),
        ("ip saddr > 191.255.255.255", when("saddr", "192.0.0.0/2")),
        ("ip saddr <= 63.255.255.255", when("saddr", "0.0.0.0/2")),
        ("ip saddr & 255.0.0.255 == 10.0.0.1", when("other", "saddr & 4278190335 167772161")),
        ("ip saddr { 10.7.0.0/16, 10.5.0.1 }", when("saddr", "10.5.0.1", "10.7.0.0/16")),
        ("ip saddr != { 192.0.2.1, 192.0.2.3 }", unless("saddr", "192.0.2.1", "192.0.2.3")),
        ("ip saddr { 128.0.0.0/1, 10.0.0.0/9 }", when("saddr", "10.0.0.0/9", "128.0.0.0/1")),
        ("ip saddr @blocked", when("saddr", "10.0.0.0/30", "10.0.0.8/29")),
        ("ip saddr @many", when("other", "saddr in @many")),
        ("ip saddr . ip daddr { 10.0.0.1 . 10.0.0.2 }", when("other", "saddr in a set")),
        ("meta mark 0x4000", when("mark", Mark(0x4000))),
        ("meta mark & 0xff00 == 0x4000", when("mark", Mark(0x4000, 0xFF00))),
        ("meta mark & 0x4000 != 0", unless("mark", Mark(0, 0x4000))),
        ("meta mark { 0x2, 0x1 }", when("mark", Mark(1), Mark(2))),
        ("meta mark 0x10-0x20", when("other", "mark 16-32")),
        ("iifname eth0", when("iifname", "eth0")),
        ("oifname != abcdefghijklmno", unless("oifname", "abcdefghijklmno")),
        ('iifname "cali*"', when("iifname", "cali*")),
        ('oifname { "eth0", "cali*" }', when("oifname", "cali*", "eth0")),
        ("iif lo", when("iifname", "lo")),
        ("oif != lo", unless("oifname", "lo")),
        ("iif 4711", when("other", "iif 4711")),
        ("meta l4proto { udp, tcp }", when("l4proto", 6, 17)),
        ("ip protocol != icmp", unless("l4proto", 1)),
        ("meta protocol ip6", when("nfproto", 6)),
        ("ct state established,related", when("ct state", "established", "related")),
        ("ct state { related, new }", when("ct state", "related", "new")),
        ("ct state invalid", when("ct state", "invalid")),
        ("ct state != established", unless("ct state", "established")),
        ("ct state untracked", when("ct state", "untracked")),
        ("ct state & (new|established) == 0", unless("ct state", "established", "new")),
        ("ct status dnat", when("ct status", "dnat")),
        ("ct status dnat,snat", when("ct status", "snat", "dnat")),
        ("ct mark 5", when("other", "ct mark 5")),
        ("fib daddr type local", when("other", "fib daddr type local")),
        ("limit rate 5/second", when("other", "limit")),
        ("udp length 8", when("other", "transport header bytes 4-5 8")),
    ],
)
def test_conditions_of_nft(net: Namespace, reader: NfReader, text: str, expected: Match) -> None:
    many = ", ".join(f"10.{n >> 8}.{n & 255}.1" for n in range(5000))
    load(
        net,
        f"""table ip t {{
          set blocked {{
            type ipv4_addr; flags interval; elements = {{ 10.0.0.8/29, 10.0.0.0-10.0.0.3 }};
          }}
          set many {{ type ipv4_addr; elements = {{ {many} }}; }}
          chain c {{ {text} drop; }}
        }}""",
    )
    ((*guards, found, verdict),) = rules(reader.chains(), "ip", "t", "c")
    assert found == expected
    assert verdict == DROP
    assert guards in ([], [when("l4proto", 17)])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ip6 saddr fd00::/8", when("saddr", "fd00::/8")),
        ("ip6 daddr != fd00:5::/33", unless("daddr", "fd00:5::/33")),
        ("ip6 daddr fd00::1", when("daddr", "fd00::1")),
        ("ip6 saddr { fd00:1::/64, fe80::/10 }", when("saddr", "fd00:1::/64", "fe80::/10")),
        ("ip6 saddr fd00::1-fd00::3", when("saddr", "fd00::1", "fd00::2/127")),
        ("ip6 nexthdr tcp", when("other", "network header bytes 6-6 6")),
    ],
)
def test_conditions_of_ipv6(net: Namespace, reader: NfReader, text: str, expected: Match) -> None:
    load(net, f"table ip6 t {{ chain c {{ {text}; }}; }}\ntable inet t {{ chain c {{ {text}; }}; }}")
    chains = reader.chains()
    assert rules(chains, "ip6", "t", "c") == [(expected, NONE)]
    assert rules(chains, "inet", "t", "c") == [(when("nfproto", 6), expected, NONE)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("-m mark --mark 0x4000/0x4000", when("mark", Mark(0x4000, 0x4000))),
        ("-m mark ! --mark 0x1", unless("mark", Mark(1))),
        ("-s 10.5.0.0/17", when("saddr", "10.5.0.0/17")),
        ("! -d 192.0.2.1", unless("daddr", "192.0.2.1")),
        ("-m iprange --src-range 10.0.0.1-10.0.0.9", when("other", "-m iprange")),
        ("-i eth0", when("iifname", "eth0")),
        ("! -o cali+", unless("oifname", "cali*")),
        ("-p tcp", when("l4proto", 6)),
        ("! -p icmp", unless("l4proto", 1)),
        ("-m conntrack --ctstate RELATED,ESTABLISHED", when("ct state", "established", "related")),
        ("-m conntrack ! --ctstate NEW", unless("ct state", "new")),
        ("-m conntrack --ctstate UNTRACKED,INVALID", when("ct state", "invalid", "untracked")),
        ("-m conntrack --ctstate DNAT", when("ct status", "dnat")),
        ("-m conntrack --ctstate NEW,DNAT", when("other", "-m conntrack")),
        ("-m conntrack --ctstatus ASSURED", when("ct status", "assured")),
        ("-m conntrack --ctstate NEW --ctproto 6", when("other", "-m conntrack")),
        ("-m state --state INVALID", when("ct state", "invalid")),
        ("-m addrtype --dst-type LOCAL", when("other", "-m addrtype")),
        ("-m physdev --physdev-is-bridged", when("other", "-m physdev")),
        ("-m limit --limit 5/min", when("other", "limit")),
    ],
)
def test_conditions_of_iptables(net: Namespace, reader: NfReader, text: str, expected: Match) -> None:
    load(net, f"*filter\n:C -\n-A C {text} -j DROP\nCOMMIT\n", RESTORE["ip"])
    assert rules(reader.chains(), "ip", "filter", "C") == [(expected, DROP)]


# --- verdicts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("counter", NONE),
        ("accept", ACCEPT),
        ("drop", DROP),
        ("continue", NONE),
        ("return", RETURN),
        ("jump other", Verdict("jump", "other")),
        ("goto other", Verdict("goto", "other")),
        ("reject", REJECT),
        ("reject with icmp type host-unreachable", REJECT),
        ('log prefix "x" drop', DROP),
        ("meta mark set 0x1 accept", ACCEPT),
        ("masquerade", Verdict("masquerade")),
        ("masquerade fully-random", MASQUERADE),
        ("masquerade random", NAT),
        ("snat to 192.0.2.1", NAT),
    ],
)
def test_verdicts_of_nft(net: Namespace, reader: NfReader, text: str, expected: Verdict) -> None:
    kind, hook = ("nat", "postrouting") if "nat" in text or "masq" in text else ("filter", "input")
    load(
        net,
        f"table ip t {{ chain other {{ }}\n chain c {{ type {kind} hook {hook} priority 0; {text}; }}; }}",
    )
    assert rules(reader.chains(), "ip", "t", "c") == [(expected,)]


@pytest.mark.parametrize(
    ("table", "text", "expected"),
    [
        ("filter", "", NONE),
        ("filter", "-j ACCEPT", ACCEPT),
        ("filter", "-j RETURN", RETURN),
        ("filter", "-j REJECT --reject-with icmp-port-unreachable", REJECT),
        ("filter", "-j LOG", NONE),
        ("filter", "-j MARK --set-mark 1", NONE),
        ("filter", "-g OTHER", Verdict("goto", "OTHER")),
        ("filter", "-j OTHER", Verdict("jump", "OTHER")),
        ("filter", "-j NFQUEUE", Verdict("queue")),
        ("nat", "-j SNAT --to-source 192.0.2.1", NAT),
        ("nat", "-j MASQUERADE", Verdict("masquerade")),
        ("nat", "-j MASQUERADE --random-fully", MASQUERADE),
        ("nat", "-j MASQUERADE --random", NAT),
        ("raw", "-j NOTRACK", NONE),
    ],
)
def test_verdicts_of_iptables(
    net: Namespace, reader: NfReader, table: str, text: str, expected: Verdict
) -> None:
    load(net, f"*{table}\n:C -\n:OTHER -\n-A C {text}\nCOMMIT\n", RESTORE["ip"])
    assert rules(reader.chains(), "ip", table, "C") == [(expected,)]


def test_what_a_rule_changes_of_a_packet(net: Namespace, reader: NfReader) -> None:
    load(net, "table ip t { chain c { meta mark set 1; notrack; ip daddr set 192.0.2.1; ct mark set 1; }; }")
    load(
        net,
        "*raw\n:C -\n-A C -j MARK --set-mark 1\n-A C -j CT --notrack\n-A C -j LOG\nCOMMIT\n",
        RESTORE["ip"],
    )
    chains = reader.chains()
    assert [rule.sets for rule in chains[ChainKey("nft", "ip", "t", "c")].rules] == [
        {"mark"}, {"ct state"}, {"saddr", "daddr"}, set()
    ]  # fmt: skip
    assert [rule.sets for rule in chains[ChainKey("nft", "ip", "raw", "C")].rules] == [
        {"mark"}, {"ct state"}, set()
    ]  # fmt: skip


def test_a_verdict_map_is_a_rule_for_each_element(net: Namespace, reader: NfReader) -> None:
    load(
        net,
        """table ip t {
          chain other { }
          chain c {
            tcp dport 22 ct state vmap { established : accept, new : jump other, invalid : drop } comment "x"
            ip saddr vmap { 10.0.0.0/8 : drop, 192.0.2.1 : accept }
            tcp dport vmap { 22 : accept, 23 : drop }
            ct state vmap { new : accept, * : drop }
          }
        }""",
    )
    found = reader.chains()[ChainKey("nft", "ip", "t", "c")].rules
    ssh = (when("l4proto", 6), when("other", "dport 22"))
    assert {(rule.matches, rule.verdict) for rule in found[:3]} == {
        ((*ssh, when("ct state", "established")), ACCEPT),
        ((*ssh, when("ct state", "new")), Verdict("jump", "other")),
        ((*ssh, when("ct state", "invalid")), DROP),
    }
    assert {rule.comment for rule in found[:3]} == {"x"}
    assert {rule.handle for rule in found[:3]} == {found[0].handle}
    assert [(*rule.matches, rule.verdict) for rule in found[3:]] == [
        (when("saddr", "10.0.0.0/8"), DROP),
        (when("saddr", "192.0.2.1"), ACCEPT),
        (when("l4proto", 6), when("other", "dport in a set"), UNKNOWN),
        (when("other", "ct state in a set"), UNKNOWN),
    ]
