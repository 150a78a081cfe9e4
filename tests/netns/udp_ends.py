"""A host of the lab whose overlay is a pump, without a daemon: TUN, socket, routes, and a pod."""

from __future__ import annotations

import contextlib
import os
from ipaddress import IPv4Address, ip_address, ip_network
from typing import TYPE_CHECKING

from flanneld_py.addresses import PerFamily
from flanneld_py.lab.entering import inside
from flanneld_py.udp.pump import Pump, Running, open_socket, open_tun
from flanneld_py.udp.table import Here, Peer, SourceCheck, pack

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from flanneld_py.lab import Host
    from flanneld_py.udp.pump import Plane

DEVICE = "flannel0"
MTU = 1500 - 28
PORT = 8285


def subnet(number: int, *, ipv6: bool = False) -> str:
    """Of the host with that number."""
    return f"fd00:5:{number:x}::/64" if ipv6 else f"10.5.{number}.0/24"


def as_peer(host: Host, *, ipv6: bool = False) -> Peer:
    """The host as others' tables name it."""
    subnets = [ip_network(subnet(host.number))]
    if ipv6:
        subnets.append(ip_network(subnet(host.number, ipv6=True)))
    return Peer(IPv4Address(host.address), tuple(subnets), PORT, ipv6)


class End:
    """One host of an overlay."""

    def __init__(
        self,
        host: Host,
        plane: Plane = "native",
        off: Collection[str] = (),
        *,
        ipv6: bool = False,
        mtu: int = MTU,
    ) -> None:
        self.host, self.mtu, self.ipv6 = host, mtu, ipv6
        with contextlib.ExitStack() as stack:
            with inside(host):
                self.tun = open_tun(DEVICE, persistent=False)
                stack.callback(os.close, self.tun)
                self.udp = stack.enter_context(open_socket(host.address, PORT))
            self._plumb()
            self.pump = Pump(self.tun, self.udp.fileno(), plane, off)
            stack.callback(self.pump.close)
            self.running = self.start()
            self._stack = stack.pop_all()

    def _plumb(self) -> None:
        number = self.host.number
        commands = [
            f"link set {DEVICE} mtu {self.mtu} up",
            f"address add 10.5.{number}.0/32 dev {DEVICE}",
            f"route add 10.5.0.0/16 dev {DEVICE}",
        ]
        gateways = f"FLANNEL_SUBNET=10.5.{number}.1/24\n"
        if self.ipv6:
            gateways += f"FLANNEL_IPV6_SUBNET=fd00:5:{number:x}::1/64\n"
            commands += [
                f"address add fd00:5:{number:x}::/128 dev {DEVICE} nodad",
                f"route add fd00:5::/32 dev {DEVICE}",
            ]
        self.host.ip_batch(commands)
        self.host.subnet_file.write_text(f"{gateways}FLANNEL_MTU={self.mtu}\n")
        self.host.attach_pods()

    def start(self) -> Running:
        """A new worker, in the host's namespace."""
        with inside(self.host):
            return self.pump.start()

    def tend(self) -> str | None:
        """As Pump.tend, in the host's namespace."""
        with inside(self.host):
            return self.pump.tend()

    def table(self, peers: Iterable[Peer], check: SourceCheck = SourceCheck.TRUE) -> bytes:
        """What this host's pump needs to know to reach these peers."""
        number = self.host.number
        v6 = ip_network(subnet(number, ipv6=True)) if self.ipv6 else None
        here = Here(
            subnets=PerFamily(ip_network(subnet(number)), v6),
            addresses=PerFamily(
                ip_address(f"10.5.{number}.0"), ip_address(f"fd00:5:{number:x}::") if self.ipv6 else None
            ),
            networks=(ip_network("10.5.0.0/16"), *([ip_network("fd00:5::/32")] if self.ipv6 else [])),
            mtu=self.mtu,
            source_check=check,
        )
        return pack(here, peers)

    def drops(self) -> dict[str, int]:
        """`receive.ttl-zero` → how many, without those that are 0."""
        return {
            name.replace(".drop.", "."): number
            for name, number in self.pump.counters().items()
            if ".drop." in name and number
        }

    def close(self) -> None:
        """End the worker, let go of TUN and socket."""
        self._stack.close()
