"""Rule sets as their tools take them, and rules written down by hand to compare with what is read."""

from __future__ import annotations

from ipaddress import ip_network
from typing import TYPE_CHECKING, Any

from flanneld_py.packetfilter import Chain, ChainKey, Field, Mark, Match, Rule, Verdict
from tests import foreign_rules

if TYPE_CHECKING:
    from tests.netns.inside import Namespace

RESTORE = {"ip": "iptables-nft-restore", "ip6": "ip6tables-nft-restore"}
NETWORKS = {
    "ip": {"NET": "10.5.0.0/16", "POD": "10.5.34.0/24", "MC": "224.0.0.0/4"},
    "ip6": {"NET": "fd00:5::/32", "POD": "fd00:5:0:34::/64", "MC": "ff00::/8"},
}
ACCEPT, DROP, NONE, RETURN = Verdict("accept"), Verdict("drop"), Verdict("none"), Verdict("return")
REJECT, NAT, UNKNOWN = Verdict("reject"), Verdict("nat"), Verdict("unknown")
MASQUERADE = Verdict("masquerade", fully_random=True)
IPTABLES = """
*nat
:POSTROUTING ACCEPT [0:0]
:FLANNEL-POSTRTG - [0:0]
-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG
-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s {POD} -d {NET} -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s {NET} -d {POD} -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG ! -s {NET} -d {POD} -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s {NET} ! -d {MC} -m comment --comment "flanneld masq" -j MASQUERADE --random-fully
-A FLANNEL-POSTRTG ! -s {NET} -d {NET} -m comment --comment "flanneld masq" -j MASQUERADE
COMMIT
*filter
:FORWARD ACCEPT [0:0]
:FLANNEL-FWD - [0:0]
-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD
-A FLANNEL-FWD -s {NET} -m comment --comment "flanneld forward" -j ACCEPT
-A FLANNEL-FWD -d {NET} -m comment --comment "flanneld forward" -j ACCEPT
COMMIT
"""
NFT = """
table FAMILY flannel {
  chain forward {
    type filter hook forward priority filter; policy accept;
    FAMILY saddr {NET} accept comment "flanneld forward"
    FAMILY daddr {NET} accept comment "flanneld forward"
  }
  chain postrtg {
    type nat hook postrouting priority srcnat; policy accept;
    meta mark & 0x4000 == 0x4000 return comment "flanneld masq"
    FAMILY saddr {POD} FAMILY daddr {NET} return comment "flanneld masq"
    FAMILY saddr {NET} FAMILY daddr {POD} return comment "flanneld masq"
    FAMILY saddr != {NET} FAMILY daddr {POD} return comment "flanneld masq"
    FAMILY saddr {NET} FAMILY daddr != {MC} masquerade fully-random comment "flanneld masq"
    FAMILY saddr != {NET} FAMILY daddr {NET} masquerade comment "flanneld masq"
  }
}
"""
DOCKER = (
    foreign_rules.DOCKER
    + """*nat
:PREROUTING ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A DOCKER -i docker0 -j RETURN
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80
COMMIT
"""
)
FIREWALLD = """
table inet firewalld {
  set trusted { type ipv4_addr; flags interval; elements = { 192.0.2.0/24 }; }
  chain filter_FORWARD {
    type filter hook forward priority filter + 10; policy accept;
    ct state { established, related } accept
    ct status dnat accept
    iifname "lo" accept
    ip6 daddr { ::/96, ::ffff:0.0.0.0/96, 2002::/24 } reject with icmpv6 addr-unreachable
    ip saddr @trusted accept
    jump filter_FORWARD_ZONES
    ct state invalid log prefix "STATE_INVALID_DROP: " drop
    reject with icmpx admin-prohibited
  }
  chain filter_FORWARD_ZONES {
    iifname "eth0" goto filter_FWD_public
    goto filter_FWD_public
  }
  chain filter_FWD_public {
    meta l4proto { icmp, ipv6-icmp } accept
    tcp dport 22 ct state { new, untracked } accept
  }
}
"""


def load(net: Namespace, text: str, *command: str) -> None:
    """What `nft -f -`, or another command, takes."""
    net.run(*(command or ("nft", "-f", "-")), text=text)


def when(field: Field, *values: Any) -> Match:
    """A condition; addresses are given as text."""
    if field in ("saddr", "daddr"):
        values = tuple(ip_network(value) for value in values)
    return Match(field, values)


def unless(field: Field, *values: Any) -> Match:
    return Match(field, when(field, *values).values, negated=True)


def rules(chains: dict[ChainKey, Chain], family: Any, table: str, chain: str) -> list[tuple[object, ...]]:
    """Of each rule the matches, then the verdict."""
    return [(*rule.matches, rule.verdict) for rule in chains[ChainKey("nft", family, table, chain)].rules]


def filled(text: str, family: str) -> str:
    for name, network in NETWORKS[family].items():
        text = text.replace(f"{{{name}}}", network)
    return text.replace("FAMILY", family)


def flannel(family: str, packets: int | None) -> tuple[tuple[Rule, ...], tuple[Rule, ...]]:
    """The rules of masquerading and of forwarding."""
    net, pod, multicast = NETWORKS[family].values()
    masq = (
        ((when("mark", Mark(0x4000, 0x4000)),), RETURN),
        ((when("saddr", pod), when("daddr", net)), RETURN),
        ((when("saddr", net), when("daddr", pod)), RETURN),
        ((unless("saddr", net), when("daddr", pod)), RETURN),
        ((when("saddr", net), unless("daddr", multicast)), MASQUERADE),
        ((unless("saddr", net), when("daddr", net)), Verdict("masquerade")),
    )
    forward = (((when("saddr", net),), ACCEPT), ((when("daddr", net),), ACCEPT))
    return (
        tuple(Rule(matches, verdict, "flanneld masq", packets=packets) for matches, verdict in masq),
        tuple(Rule(matches, verdict, "flanneld forward", packets=packets) for matches, verdict in forward),
    )
