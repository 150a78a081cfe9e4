"""Whether the flows that are said to be dropped are those that a real host drops, with real rule sets.

A router between two hosts: `flannel.1` leads to one with 10.5.7.2, `cni0` to one with 10.5.34.2.
"""

from __future__ import annotations

import socket
import subprocess
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING

import pytest
from msgspec.structs import replace

from flanneld_py.core.drops import Flow, find_drops
from flanneld_py.drivers.nfreader import NfReader
from flanneld_py.drivers.xtables import LegacyTables
from tests import foreign_rules
from tests.netns.inside import Call, Namespace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flanneld_py.packetfilter import Chains
    from tests.netns.inside import Agent

IN = Flow("in", ip_address("10.5.7.0"), ip_address("10.5.34.0"), "flannel.1", "cni0")
OUT = Flow("out", ip_address("10.5.34.0"), ip_address("10.5.7.0"), "cni0", "flannel.1")
IN6 = replace(IN, description="in6", source=ip_address("fd00:5:7::"), destination=ip_address("fd00:5:34::"))
OUT6 = replace(
    OUT, description="out6", source=ip_address("fd00:5:34::"), destination=ip_address("fd00:5:7::")
)
FLOWS = (IN, OUT, IN6, OUT6)
HOST = 2
"""What our two hosts have added to the first address of their subnets."""
PORT = 5001
SOON, QUIET = 5.0, 0.3
"""Seconds to wait for an answer that should come, and for one that should not."""


def listen() -> socket.socket:
    sock = socket.create_server(("::", PORT), family=socket.AF_INET6, dualstack_ipv6=True)
    sock.listen(1000)
    return sock


def connects(address: str, timeout: float) -> bool:
    try:
        socket.create_connection((address, PORT), timeout).close()
    except OSError:
        return False
    return True


@dataclass
class Passage:
    """The router and the two hosts."""

    router: Namespace
    hosts: dict[str, tuple[Namespace, Agent]]
    """By the device of the router that leads there."""
    tables: LegacyTables
    nft: NfReader

    def chains(self) -> Chains:
        return {**self.nft.chains(), **self.tables.chains()}

    def load(self, *rules: tuple[str, str]) -> None:
        for tool, text in rules:
            command = ["nft", "-f", "-"] if tool == "nft" else [f"{tool}-restore", "--noflush"]
            self.router.run(*command, text=text)

    def clear(self) -> None:
        empty = "*filter\n:FORWARD ACCEPT\nCOMMIT\n*mangle\nCOMMIT\n*raw\nCOMMIT\n"
        for tool in ("iptables-legacy", "ip6tables-legacy"):
            self.router.run(f"{tool}-restore", text=empty)
        self.router.run("nft", "flush", "ruleset")

    def passes(self, flow: Flow, expected: bool, *, by_ping: bool) -> bool:
        """Whether a new connection of that flow, or a ping, is answered."""
        assert flow.iif is not None
        net, agent = self.hosts[flow.iif]
        target, patience = str(flow.destination + HOST), SOON if expected else QUIET
        if not by_ping:
            return agent.call(connects, target, patience)
        ping = ["ping", "-q", "-c", "1", "-W", str(patience), target]
        return (
            subprocess.run(
                ["nsenter", f"--net={net.path}", *ping], capture_output=True, check=False
            ).returncode
            == 0
        )


@pytest.fixture(scope="module")
def shared_passage() -> Iterator[Passage]:
    with Namespace() as router, Namespace() as other, Namespace() as pod:
        hosts = {"flannel.1": (other, other.agent()), "cni0": (pod, pod.agent())}
        router.run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
        for dev, number in (("flannel.1", 7), ("cni0", 34)):
            net, agent = hosts[dev]
            router.ip(
                f"link add {dev} type veth peer name eth0 netns {net.path}",
                f"addr add 10.5.{number}.1/24 dev {dev}",
                f"addr add fd00:5:{number}::1/64 dev {dev} nodad",
                f"link set {dev} up",
            )
            net.ip(
                f"addr add 10.5.{number}.2/24 dev eth0",
                f"addr add fd00:5:{number}::2/64 dev eth0 nodad",
                "link set eth0 up",
                f"route add default via 10.5.{number}.1",
                f"route add default via fd00:5:{number}::1",
            )
            agent.ask(Call(__name__, "listen", keep=True))
        agent = router.agent()
        yield Passage(router, hosts, agent.make(LegacyTables), agent.make(NfReader))


@pytest.fixture
def passage(shared_passage: Passage) -> Iterator[Passage]:
    yield shared_passage
    shared_passage.clear()


def appended(text: str, *lines: str) -> str:
    """An `iptables-save` with more lines at its end."""
    return text.replace("COMMIT\n", "".join(f"{line}\n" for line in lines) + "COMMIT\n")


def on_cni0(text: str) -> str:
    """Docker with our subnet."""
    return text.replace("docker0", "cni0").replace("172.17.0.2", "10.5.34.9")


ACCEPT_IN_DOCKER_USER = ("-I DOCKER-USER -s 10.5.0.0/16 -j ACCEPT", "-I DOCKER-USER -d 10.5.0.0/16 -j ACCEPT")
FLANNEL_FWD = (
    ":FLANNEL-FWD - [0:0]",
    "-A FORWARD -j FLANNEL-FWD",
    "-A FLANNEL-FWD -s 10.5.0.0/16 -j ACCEPT",
    "-A FLANNEL-FWD -d 10.5.0.0/16 -j ACCEPT",
)
OUR_TABLE = """table ip flannel-ipv4 {
    chain forward {
        type filter hook forward priority filter; policy accept;
        ip saddr 10.5.0.0/16 accept
        ip daddr 10.5.0.0/16 accept
    }
}
"""
ONLY_MARKED = """*mangle
-A PREROUTING -s 10.5.0.0/16 -j MARK --set-mark 0x1
COMMIT
*filter
:FORWARD DROP [0:0]
-A FORWARD -m mark --mark 0x1 -j ACCEPT
COMMIT
"""
NEW = "-m conntrack --ctstate NEW"
"""Without it the answers to the other direction are dropped as well."""
TRUSTED = ('iifname "cni0" goto', 'iifname { "cni0", "flannel.*" } goto')
POLICY4 = "ip filter FORWARD policy drop"
IPTABLES = {
    "docker": (foreign_rules.DOCKER, {"in": POLICY4, "out": POLICY4}),
    "docker 28": (foreign_rules.DOCKER_28, {"in": POLICY4, "out": POLICY4}),
    "docker on our subnet": (on_cni0(foreign_rules.DOCKER), {"in": POLICY4}),
    "docker 28 on our subnet": (
        on_cni0(foreign_rules.DOCKER_28),
        {"in": "ip filter DOCKER: iifname != cni0 oifname cni0 drop"},
    ),
    "docker, accept in DOCKER-USER": (appended(foreign_rules.DOCKER, *ACCEPT_IN_DOCKER_USER), {}),
    "docker, accept behind the return": (
        appended(foreign_rules.DOCKER, "-A DOCKER-USER -s 10.5.0.0/16 -j ACCEPT"),
        {"in": POLICY4, "out": POLICY4},
    ),
    "docker, FLANNEL-FWD": (appended(foreign_rules.DOCKER, *FLANNEL_FWD), {}),
    "ufw": (foreign_rules.UFW, {"in": POLICY4, "out": POLICY4}),
    "ufw, half open": (
        appended(foreign_rules.UFW, "-A ufw-user-forward -i flannel.1 -o cni+ -j ACCEPT"),
        {"out": POLICY4},
    ),
    "one way only": (
        f"*filter\n:FORWARD ACCEPT [0:0]\n-A FORWARD -i flannel.1 {NEW} -j DROP\nCOMMIT\n",
        {"in": "ip filter FORWARD: iifname flannel.1 ct state new drop"},
    ),
    "goto returns to the policy": (
        "*filter\n:FORWARD ACCEPT [0:0]\n:X - [0:0]\n"
        f"-A FORWARD -d 10.5.34.0/24 -g X\n-A FORWARD {NEW} -j REJECT\n-A X -s 10.6.0.0/16 -j DROP\nCOMMIT\n",
        {"out": "ip filter FORWARD: ct state new reject"},
    ),
    "dropped before routing": (
        f"*mangle\n-A PREROUTING -i cni0 {NEW} -j DROP\nCOMMIT\n",
        {"out": "ip mangle PREROUTING: iifname cni0 ct state new drop"},
    ),
    "dropped after routing": (
        f"*mangle\n-A POSTROUTING -o flannel.+ {NEW} -j DROP\nCOMMIT\n",
        {"out": "ip mangle POSTROUTING: oifname flannel.* ct state new drop"},
    ),
    "marked packets are accepted": (ONLY_MARKED, {}),
}


@pytest.mark.parametrize("variant", ["legacy", "nft"])
@pytest.mark.parametrize("name", IPTABLES)
def test_iptables(passage: Passage, variant: str, name: str) -> None:
    text, expected = IPTABLES[name]
    passage.load((f"iptables-{variant}", text))
    kind = "legacy " if variant == "legacy" else ""
    check(passage, {flow: [kind + place] for flow, place in expected.items()}, by_ping="ufw" not in name)


@pytest.mark.parametrize("variant", ["legacy", "nft"])
def test_ip6tables(passage: Passage, variant: str) -> None:
    passage.load(
        (f"ip6tables-{variant}", "*filter\n:FORWARD DROP [0:0]\n-A FORWARD -i lo -j ACCEPT\nCOMMIT\n")
    )
    place = f"{'legacy ' if variant == 'legacy' else ''}ip6 filter FORWARD policy drop"
    check(passage, {"in6": [place], "out6": [place]})


FWD_PUBLIC = "inet firewalld filter_FWD_public: reject"


def test_firewalld(passage: Passage) -> None:
    passage.load(("nft", foreign_rules.FIREWALLD))
    check(passage, {"in": [FWD_PUBLIC], "in6": [FWD_PUBLIC]}, by_ping=False)


def test_firewalld_with_our_device_trusted(passage: Passage) -> None:
    passage.load(("nft", foreign_rules.FIREWALLD.replace(*TRUSTED)))
    check(passage, {}, by_ping=False)


@pytest.mark.parametrize("variant", ["legacy", "nft"])
def test_an_accept_in_our_table_does_not_undo_docker(passage: Passage, variant: str) -> None:
    passage.load((f"iptables-{variant}", foreign_rules.DOCKER), ("nft", OUR_TABLE))
    place = f"{'legacy ' if variant == 'legacy' else ''}{POLICY4}"
    check(passage, {"in": [place], "out": [place]})


def test_our_jump_in_one_variant_does_not_undo_the_other(passage: Passage) -> None:
    ours = "\n".join(("*filter", *FLANNEL_FWD, "COMMIT", ""))
    passage.load(("iptables-legacy", foreign_rules.DOCKER), ("iptables-nft", ours))
    check(passage, {"in": [f"legacy {POLICY4}"], "out": [f"legacy {POLICY4}"]})


def test_two_firewalls_are_both_named(passage: Passage) -> None:
    passage.load(("nft", foreign_rules.FIREWALLD), ("iptables-legacy", foreign_rules.DOCKER))
    expected = {"in": [f"legacy {POLICY4}", FWD_PUBLIC], "out": [f"legacy {POLICY4}"], "in6": [FWD_PUBLIC]}
    check(passage, expected, by_ping=False)


@pytest.mark.parametrize("variant", ["legacy", "nft"])
@pytest.mark.parametrize("target", ["-d 10.5.34.2", "-m iprange --dst-range 10.5.34.1-10.5.34.254"])
def test_what_docker_28_drops_for_a_container_in_our_subnet(
    passage: Passage, variant: str, target: str
) -> None:
    text = f"*raw\n-A PREROUTING {target} ! -i cni0 -j DROP\nCOMMIT\n"
    passage.load((f"iptables-{variant}", text))
    subnet = ip_network("10.5.34.0/24")
    flows = [replace(flow, description=f"x {subnet}", subnet=subnet) for flow in (IN, OUT)]
    drops = [drop.flow for drop in find_drops(passage.chains(), flows)]
    container = ip_address("10.5.34.2")
    named = [replace(flows[0], description=f"x {container}", destination=container, single=True)]
    # What iptables asks of a range we do not understand; nft's ranges are networks to us.
    assert drops == ([] if "range" in target else named)
    assert not passage.passes(IN, expected=False, by_ping=True)


def check(passage: Passage, expected: dict[str, list[str]], *, by_ping: bool = True) -> None:
    """What is found is what is expected, and the packets agree."""
    drops = find_drops(passage.chains(), FLOWS)
    found: dict[str, list[str]] = {}
    for drop in drops:
        found.setdefault(drop.flow.description, []).append(drop.place)
    assert found == expected
    seen = {
        flow.description
        for flow in FLOWS
        if not passage.passes(flow, flow.description not in found, by_ping=by_ping)
    }
    assert seen == found.keys()
