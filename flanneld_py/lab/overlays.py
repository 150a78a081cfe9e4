"""What the demo puts into etcd for each backend that carries packets, and what it then expects to see."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flanneld_py.lab.hosts import Host
from flanneld_py.lab.waiting import LabError

NETWORK = "10.5.0.0/16"


@dataclass(frozen=True, slots=True)
class Overlay:
    """One backend as its users and the wire see it."""

    backend: str
    overhead: int
    """Bytes that each packet gains on the way."""
    expression: str
    """Matches its packets on the wire (pcap-filter(7))."""
    decode: Callable[[Sequence[Any], Host, Host], list[str]]
    """Packets captured while the first host's pod pings the second's → what one of them is, line by line.

    Raises LabError when none is as it should be.
    """
    device: str | None = None
    """The device it makes, which may be deleted to see it come back."""
    in_user_space: bool = False
    """Whether a process forwards the packets, behind one route to all peers."""
    link: str | None = None
    """What the kernel must be able to make, for requirements.obstacle."""

    @property
    def config(self) -> str:
        """The JSON of the network config."""
        return network_config(self.backend)


def network_config(backend: str, options: Mapping[str, str] | None = None) -> str:
    """The JSON of the network config."""
    return json.dumps({"Network": NETWORK, "Backend": {"Type": backend, **(options or {})}})


def _echo_requests(packets: Sequence[Any], source: Host, target: Host, layer: str) -> Sequence[Any]:
    """Those that carry, in the last layer of that name, a ping from one host's pod to the other's."""
    wanted = (source.pod.address, target.pod.address)
    found = []
    for packet in packets:
        inner = packet.getlayer(layer)
        inner = inner.payload if layer == "VXLAN" and inner else packet
        if "ICMP" in inner and inner["ICMP"].type == 8 and (inner["IP"].src, inner["IP"].dst) == wanted:
            found.append(packet)
    if not found:
        seen = "; ".join(packet.summary() for packet in packets) or "nothing"
        raise LabError(f"no {layer} packet with a ping from {wanted[0]} to {wanted[1]}; captured: {seen}")
    return found


def _decode_vxlan(packets: Sequence[Any], source: Host, target: Host) -> list[str]:
    packet = _echo_requests(packets, source, target, "VXLAN")[0]
    outer, udp, vxlan = packet["IP"], packet["UDP"], packet["VXLAN"]
    inner = vxlan.payload
    if (outer.src, outer.dst, udp.dport, vxlan.vni) != (source.address, target.address, 8472, 1):
        raise LabError(f"the outer headers are wrong: {packet.summary()}, VNI {vxlan.vni}")
    return [
        f"outer  {packet.src} > {packet.dst}",
        f"       {outer.src} > {outer.dst}, {outer.len} bytes, UDP {udp.sport} > {udp.dport}",
        f"VXLAN  VNI {vxlan.vni}",
        f"inner  {inner.src} > {inner.dst}",
        f"       {inner['IP'].src} > {inner['IP'].dst}, {inner['IP'].len} bytes, ICMP echo request",
    ]


def _decode_udp(packets: Sequence[Any], source: Host, target: Host) -> list[str]:
    from scapy.layers.inet import IP  # noqa: PLC0415 - as in capture

    sent = [
        packet
        for packet in packets
        if (packet["IP"].src, packet["IP"].dst) == (source.address, target.address)
    ]
    inside = [IP(bytes(packet["UDP"].payload)) for packet in sent]
    inner = _echo_requests(inside, source, target, "IP")[0]
    outer, udp = sent[0]["IP"], sent[0]["UDP"]
    if udp.dport != 8285:
        raise LabError(f"the outer headers are wrong: {sent[0].summary()}")
    return [
        f"outer  {outer.src} > {outer.dst}, {outer.len} bytes, UDP {udp.sport} > {udp.dport}",
        f"inner  {inner.src} > {inner.dst}, {inner.len} bytes, ICMP echo request",
    ]


def _decode_hostgw(packets: Sequence[Any], source: Host, target: Host) -> list[str]:
    packet = _echo_requests(packets, source, target, "IP")[0]
    macs = {host: host.ip("link", "show", "eth0")[0]["address"] for host in (source, target)}
    if (packet.src, packet.dst) != (macs[source], macs[target]):
        raise LabError(f"sent from {packet.src} to {packet.dst}, not from host to host: {macs.values()}")
    return [
        f"frame  {packet.src} > {packet.dst} (host {source.name} > host {target.name})",
        f"       {packet['IP'].src} > {packet['IP'].dst}, {packet['IP'].len} bytes, ICMP echo request",
    ]


OVERLAYS = {
    overlay.backend: overlay
    for overlay in (
        Overlay(
            backend="vxlan",
            overhead=50,
            expression="udp dst port 8472",
            decode=_decode_vxlan,
            device="flannel.1",
            link="vxlan id 1 dstport 0",
        ),
        Overlay(
            backend="udp",
            overhead=28,
            expression="udp dst port 8285",
            decode=_decode_udp,
            device="flannel0",
            in_user_space=True,
        ),
        Overlay(
            backend="host-gw",
            overhead=0,
            expression="icmp[icmptype] == icmp-echo",
            decode=_decode_hostgw,
        ),
    )
}
