"""Which addresses datagrams come from and go to: behind a NAT, of a host with several, of one that moves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flanneld_py.lab import wait_for
from tests.netns.scenes import config
from tests.netns.udp_packets import ipv4
from tests.netns.udp_scene import METRICS, drops, from_wire

if TYPE_CHECKING:
    from flanneld_py.lab import Host, Lab

NAT, SECOND, NEXT = "198.18.0.2", "192.0.2.77", "192.0.2.88"


def start(lab: Lab, public: str = "", *, alpha_knows: str = "", beta_has: str = "") -> tuple[Host, Host]:
    """Two hosts with daemons, the other one's with --iface as an address and --public-ip."""
    lab.etcd.put_config(config("udp"))
    alpha, beta = lab.add_hosts("alpha", "beta")
    if alpha_knows:
        alpha.ip("route", "add", alpha_knows, "via", beta.address)
    if beta_has:
        beta.ip("address", "add", f"{beta_has}/24", "dev", "eth0")
    if public:
        beta.iface = beta.address
    alpha.start_daemon([f"--metrics-addr={METRICS}"])
    beta.start_daemon([f"--public-ip={public}"] if public else [])
    for host in (alpha, beta):
        host.daemon.wait_ready()
        host.attach_pods()
    return alpha, beta


def wait_talk(alpha: Host, beta: Host) -> None:
    wait_for(lambda: alpha.pod.ping(beta.pod.address, count=1).received, 15, "an answer")
    for one, other in ((alpha, beta), (beta, alpha)):
        assert one.pod.ping(other.pod.address).lost == 0


def test_a_peer_behind_a_nat_that_changes_its_port(lab: Lab) -> None:
    alpha, beta = start(lab, NAT, alpha_knows=NAT)
    beta.nft(
        "table ip translated {\n"
        " chain out { type nat hook postrouting priority 100;\n"
        f"  oifname eth0 udp sport 8285 snat to {NAT}:40000\n }}\n"
        " chain in { type nat hook prerouting priority -100;\n"
        f"  ip daddr {NAT} udp dport 8285 dnat to {beta.address}\n }}\n}}\n"
    )
    wait_talk(alpha, beta)


def test_a_host_that_publishes_another_of_its_addresses(lab: Lab) -> None:
    """Its socket once had the interface's first one, from which no peer takes and to which none sends."""
    alpha, beta = start(lab, SECOND, beta_has=SECOND)
    wait_talk(alpha, beta)
    before = drops(alpha, "rx")
    from_wire(beta, beta.address, alpha, [ipv4(beta.pod.address, alpha.pod.address)])
    wait_for(lambda: drops(alpha, "rx") - before, 5, "the drop", lambda n: n["outer-source-unknown"] == 1)


def test_a_peer_that_moves_to_another_address(lab: Lab) -> None:
    """And nobody who gets the old one is taken for it."""
    alpha, beta = start(lab)
    wait_talk(alpha, beta)
    beta.ip_batch(
        [
            f"address delete {beta.address}/24 dev eth0",
            f"address add {NEXT}/24 dev eth0",
            "route replace default via 192.0.2.254 dev eth0",
        ]
    )
    wait_talk(alpha, beta)
    heir = lab.add_host("heir")
    heir.ip("address", "add", f"{beta.address}/24", "dev", "eth0")
    alpha.ip("neighbour", "flush", "dev", "eth0")
    before = drops(alpha, "rx")
    from_wire(heir, beta.address, alpha, [ipv4(beta.pod.address, alpha.pod.address)] * 3)
    wait_for(lambda: drops(alpha, "rx") - before, 5, "the drops", lambda n: n["outer-source-unknown"] == 3)
    wait_talk(alpha, beta)
