"""Hosts that are sent packets made to do harm, and what there is to see of these."""

from __future__ import annotations

import socket
from collections import Counter
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING, Any
from urllib.request import urlopen

from flanneld_py.lab import wait_for
from flanneld_py.lab.capture import Capture
from flanneld_py.lab.entering import inside
from flanneld_py.lab.underlay import mac
from tests.netns.oracle import own_key, subnets_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from flanneld_py.lab import Host
    from flanneld_py.lab.netns import Namespace

PORT = 8285
METRICS = "127.0.0.1:9100"


@dataclass(frozen=True, slots=True)
class Scene:
    """Three hosts with daemons; one as flannel's, which announces no IPv6 inside."""

    alpha: Host
    beta: Host
    gamma: Host
    plain: Host
    plain_subnets: dict[int, str]

    @property
    def owners(self) -> dict[str, str]:
        """Subnet → address of its host."""
        hosts = (self.alpha, self.beta, self.gamma)
        found = {subnet: host.address for host in hosts for subnet in subnets_of(own_key(host)).values()}
        return found | dict.fromkeys(self.plain_subnets.values(), self.plain.address)

    def pod(self, host: Host, family: int = 4) -> str:
        return str(host.pod.addresses[family == 6])


def from_wire(sender: Namespace, address: str, target: Host, datagrams: Iterable[bytes]) -> None:
    """Datagrams from one of the sender's addresses, and another port than the overlay's, as behind a NAT."""
    with inside(sender), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as wire:
        wire.bind((address, 0))
        for datagram in datagrams:
            wire.sendto(datagram, (target.address, PORT))


def into_tun(host: Host, packets: Iterable[bytes]) -> None:
    """As they are, past all that the kernel would look at."""
    with inside(host), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind(("flannel0", 0x0800))
        for packet in packets:
            raw.send(packet)


def _counted(host: Host, begin: str) -> dict[str, int]:
    """What follows `begin` in the lines of /metrics → number."""
    with inside(host), urlopen(f"http://{METRICS}/metrics", timeout=5) as page:
        lines = page.read().decode().splitlines()
    found = (line.removeprefix(begin).split('"} ') for line in lines if line.startswith(begin))
    return {name: int(float(number)) for name, number in found}


def drops(host: Host, direction: str) -> Counter[str]:
    """Reason → number, `rx` or `tx`."""
    return Counter(_counted(host, f'flanneld_udp_drops_total{{direction="{direction}",reason="'))


def passed(host: Host, direction: str) -> int:
    """Packets handed on."""
    return _counted(host, 'flanneld_udp_packets_total{direction="')[direction]


def wait_drops(host: Host, direction: str, before: Counter[str], expected: Counter[str]) -> None:
    """Until that many more were counted, reason by reason, and no others."""
    wait_for(
        lambda: drops(host, direction) - before,
        5,
        f"drops {direction}",
        lambda found: found == expected,
    )


def holding(packets: Iterable[Any], mark: bytes) -> list[bytes]:
    return [data for data in map(bytes, packets) if mark in data]


def bridge_mac(host: Host) -> str:
    address: str = host.ip("link", "show", "dev", host.pod_bridge)[0]["address"]
    return address


class Watch:
    """What a host sends to the underlay, and what comes to its pod."""

    def __init__(self, host: Host) -> None:
        self._out = Capture(host.underlay, host.underlay.port(host.name), f"ether src {mac(host.number)}")
        self._pod = Capture(host.pod, "eth0", f"ether src {bridge_mac(host)} and (ip or ip6)")
        self.sent: list[Any] = []
        self.arrived: list[Any] = []

    def stop(self) -> None:
        self.sent, self.arrived = self._out.stop(), self._pod.stop()


def destination(packet: bytes) -> str:
    return str(ip_address(packet[24:40] if packet[0] >> 4 == 6 else packet[16:20]))


def misled(packets: Iterable[Any], owners: dict[str, str]) -> list[str]:
    """Datagrams of the overlay that go to another host than the one whose subnet the inner packet is for."""
    wrong = []
    for packet in packets:
        if not packet.haslayer("UDP") or packet["UDP"].dport != PORT:
            continue
        inner = bytes(packet["UDP"].payload)
        target = ip_address(destination(inner))
        owner = next((host for net, host in owners.items() if target in ip_network(net)), "nobody")
        if packet["IP"].dst != owner:
            wrong.append(f"{target} to {packet['IP'].dst}, not to {owner}")
    return wrong
