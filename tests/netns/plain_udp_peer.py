"""A peer as Go flannel is one: no offloads, one packet a datagram, TTL less by one in both directions."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import struct
import threading
from ipaddress import IPv4Address, IPv4Network
from typing import TYPE_CHECKING

from flanneld_py.lab.entering import inside
from tests.netns.udp_ends import DEVICE, MTU, PORT, subnet
from tests.netns.udp_traffic import ones_sum

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flanneld_py.lab import Host

TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000


def _one_hop(packet: bytes) -> bytes:
    header = packet[:8] + bytes([packet[8] - 1]) + packet[9:10] + b"\0\0" + packet[12:20]
    return header[:10] + struct.pack(">H", 0xFFFF & ~ones_sum(header)) + header[12:] + packet[20:]


class PlainPeer:
    """Runs in a thread until closed. `longest` datagram it got; `wrong`: what no peer should send it."""

    def __init__(self, host: Host, routes: Mapping[str, str]) -> None:
        self.host, self.longest = host, 0
        self.wrong: list[str] = []
        self._routes = {IPv4Network(net): address for net, address in routes.items()}
        with inside(host):
            self._tun = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
            request = struct.pack("16sH22x", DEVICE.encode(), IFF_TUN | IFF_NO_PI)
            fcntl.ioctl(self._tun, TUNSETIFF, request)
            self._udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._udp.setsockopt(socket.SOL_SOCKET, 33, 8 << 20)
        self._udp.bind((host.address, PORT))
        os.set_blocking(self._tun, False)
        self._udp.setblocking(False)
        number = host.number
        host.ip_batch(
            [
                f"link set {DEVICE} mtu {MTU} up",
                f"address add 10.5.{number}.0/32 dev {DEVICE}",
                f"route add 10.5.0.0/16 dev {DEVICE}",
            ]
        )
        host.subnet_file.write_text(f"FLANNEL_SUBNET={subnet(number)[:-4]}1/24\nFLANNEL_MTU={MTU}\n")
        host.attach_pods()
        self._ending, self._end = os.pipe()
        self._thread = threading.Thread(target=self._forward)
        self._thread.start()

    def _forward(self) -> None:
        while True:
            ready, _, _ = select.select([self._tun, self._udp.fileno(), self._ending], [], [])
            if self._ending in ready:
                return
            with contextlib.suppress(BlockingIOError):
                for _ in range(64):
                    self._send(os.read(self._tun, 65536))
            with contextlib.suppress(BlockingIOError):
                for _ in range(64):
                    self._receive(self._udp.recv(65536))

    def _send(self, packet: bytes) -> None:
        if packet[0] >> 4 != 4:
            return
        target = IPv4Address(packet[16:20])
        for network, address in self._routes.items():
            if target in network:
                self._udp.sendto(_one_hop(packet), (address, PORT))

    def _receive(self, packet: bytes) -> None:
        self.longest = max(self.longest, len(packet))
        if packet[0] != 0x45 or ones_sum(packet[:20]) != 0xFFFF or len(packet) > MTU:
            self.wrong.append(packet[:20].hex())
        os.write(self._tun, _one_hop(packet))

    def close(self) -> None:
        """End the thread."""
        os.write(self._end, b".")
        self._thread.join()
        for fd in (self._tun, self._ending, self._end):
            os.close(fd)
        self._udp.close()
